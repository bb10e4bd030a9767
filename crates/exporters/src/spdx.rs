//! What an image's export adds to a scan of it: which layer each file is from (row
//! `at.sbom.layers`).

use serde_json::{Value, json};
use shipway_attest::{Attestation, SPDX};
use shipway_fault::{Context as _, Result};
use shipway_gocompat::path::inside;
use shipway_oci::Descriptor;
use shipway_refs::ImmutableRef;
use std::collections::HashSet;

/// Says so in `scan`, if it is a scan of `state` itself, whose blobs are `layers`.
pub(crate) async fn name_layers(
    scan: &mut Attestation<Value>,
    state: &ImmutableRef,
    layers: &[Descriptor],
) -> Result<()> {
    if scan.predicate_type != SPDX || !scan.is_core() || !scan.content["spdxVersion"].is_string() {
        return Ok(());
    }
    let wanted: HashSet<Vec<u8>> = files(&mut scan.content).filter_map(|f| path(f)).collect();
    if !wanted.is_empty() {
        let found =
            state.layers_with(wanted).await.context(|| "find the layers of an SBOM's files")?;
        for file in files(&mut scan.content) {
            let layer = path(file).and_then(|path| layers.get(*found.get(&path)?));
            if let Some(layer) = layer {
                file["comment"] = format!("layerID: {}", layer.digest).into();
            }
        }
    }
    let info = &mut scan.content["creationInfo"];
    if info.is_null() {
        *info = json!({});
    }
    if let Some(info) = info.as_object_mut()
        && let Some(creators) = info.entry("creators").or_insert_with(|| json!([])).as_array_mut()
    {
        creators.push(concat!("Tool: shipway-", env!("CARGO_PKG_VERSION")).into());
    }
    Ok(())
}

/// The files of a scan, on their own and in packages.
fn files(scan: &mut Value) -> impl Iterator<Item = &mut Value> {
    fn list(of: Option<&mut Value>) -> impl Iterator<Item = &mut Value> {
        of.and_then(Value::as_array_mut).into_iter().flatten().filter(|v| v.is_object())
    }
    let (mut own, mut packages) = (None, None);
    for (key, value) in scan.as_object_mut().into_iter().flatten() {
        match key.as_str() {
            "files" => own = Some(value),
            "packages" => packages = Some(value),
            _ => {}
        }
    }
    list(own).chain(list(packages).flat_map(|p| list(p.get_mut("files"))))
}

/// Where a file is, unless its comment is taken: scanners write there, too, and readers cannot know
/// what.
fn path(file: &Value) -> Option<Vec<u8>> {
    if file["comment"].as_str().is_some_and(|c| !c.is_empty()) {
        return None;
    }
    Some(inside(file["fileName"].as_str()?).into_bytes()).filter(|p| !p.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_found_wherever_a_scan_lists_them() {
        let mut scan = json!({
            "files": [{ "fileName": "/a/../b" }, { "fileName": "./c" }, { "fileName": "/d", "comment": "taken" }, { "fileName": "/" }, 1, {}],
            "packages": [{ "files": [{ "fileName": "e" }] }, {}, 2],
        });
        let paths: Vec<_> = files(&mut scan)
            .filter_map(|f| path(f))
            .map(|p| String::from_utf8(p).unwrap())
            .collect();
        assert_eq!(paths, ["b", "c", "e"]);
        assert_eq!(files(&mut json!({ "files": "many" })).count(), 0);
        assert_eq!(files(&mut json!([])).count(), 0);
    }
}
