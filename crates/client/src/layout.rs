//! The index of an OCI layout on disk: what it lists, and adding to it.

use std::{collections::HashSet, io::Write, path::Path};

use serde_json::{Map, Value, json};
use shipway_fault::{Fault, Result};

const INDEX: &str = "index.json";
const REF_NAME: &str = "org.opencontainers.image.ref.name";
const IMAGE_NAME: &str = "io.containerd.image.name";

/// What an entry is called.
#[derive(Clone, Copy, Debug)]
pub(crate) enum LayoutName<'a> {
    /// A bare tag.
    Tag(&'a str),
    /// The full name of an image.
    Image(&'a str),
}

fn read(dir: &Path) -> Result<Option<Value>> {
    let path = dir.join(INDEX);
    let what = || format!("read {}", path.display());
    match std::fs::read(&path) {
        Ok(data) => serde_json::from_slice(&data)
            .map(Some)
            .map_err(|e| Fault::invalid(format!("{}: {e}", what()))),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Fault::io(what(), e)),
    }
}

fn annotation<'a>(entry: &'a Value, key: &str) -> Option<&'a str> {
    entry.get("annotations")?.get(key)?.as_str()
}

/// The digest of the entry called `tag`.
pub(crate) fn find(dir: &Path, tag: &str) -> Result<Option<String>> {
    let index = read(dir)?.unwrap_or_default();
    let entries =
        index.get("manifests").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let named = |key| entries.iter().find(move |entry| annotation(entry, key) == Some(tag));
    let found = named(IMAGE_NAME).or_else(|| named(REF_NAME));
    Ok(found.and_then(|entry| entry.get("digest")?.as_str()).map(str::to_owned))
}

/// The tags of all entries that have one, with their digests, in the order in which they were
/// written.
pub(crate) fn tags(dir: &Path) -> Result<Vec<(String, String)>> {
    let index = read(dir)?.unwrap_or_default();
    let entries =
        index.get("manifests").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let named = |entry: &Value| {
        let digest = entry.get("digest")?.as_str()?;
        Some((annotation(entry, REF_NAME)?.to_owned(), digest.to_owned()))
    };
    Ok(entries.iter().filter_map(named).collect())
}

/// The digest of the only entry.
pub(crate) fn only(dir: &Path) -> Result<Option<String>> {
    let index = read(dir)?.unwrap_or_default();
    let entries =
        index.get("manifests").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let [entry] = entries else { return Ok(None) };
    Ok(entry.get("digest").and_then(Value::as_str).map(str::to_owned))
}

/// The tag in an image's name.
fn tag(name: &str) -> &str {
    let name = name.split('@').next().unwrap_or(name);
    match name.rsplit_once(':') {
        Some((_, tag)) if !tag.contains('/') => tag,
        _ => "latest",
    }
}

/// Lists `descriptor` in `dir` under each of `names`; entries that had these names lose them.
pub(crate) fn put(dir: &Path, descriptor: &[u8], names: &[LayoutName<'_>]) -> Result<()> {
    let descriptor: Map<String, Value> = serde_json::from_slice(descriptor)
        .map_err(|e| Fault::invalid(format!("the daemon's descriptor cannot be read: {e}")))?;
    let mut index = read(dir)?.unwrap_or_else(
        || json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json"}),
    );
    let entries = index.get_mut("manifests").and_then(Value::as_array_mut).map(std::mem::take);
    let mut entries = entries.unwrap_or_default();
    for name in names {
        let mut wanted = Map::new();
        let (short, full) = match name {
            LayoutName::Tag(tag) => (*tag, None),
            LayoutName::Image(name) => (tag(name), Some(*name)),
        };
        wanted.insert(REF_NAME.to_owned(), short.into());
        if let Some(full) = full {
            wanted.insert(IMAGE_NAME.to_owned(), full.into());
        }
        entries.retain(|e| {
            annotation(e, REF_NAME) != Some(short) || annotation(e, IMAGE_NAME) != full
        });
        let mut entry = descriptor.clone();
        let mut annotations =
            entry.get("annotations").and_then(Value::as_object).cloned().unwrap_or_default();
        annotations.extend(wanted);
        entry.insert("annotations".to_owned(), annotations.into());
        entries.push(entry.into());
    }
    if let Some(object) = index.as_object_mut() {
        object.insert("manifests".to_owned(), entries.into());
    }
    write(dir, "oci-layout", &json!({"imageLayoutVersion": "1.0.0"}))?;
    write(dir, INDEX, &index)
}

/// Largest manifest or index that is read for what it refers to.
const MAX_MANIFEST: u64 = 16 << 20;

/// Deletes the blobs in `dir` that nothing in its index leads to (`reset=true` of a local cache).
/// Nothing is deleted where that is not known.
pub(crate) fn reset(dir: &Path) -> Result<()> {
    let blobs = dir.join("blobs/sha256");
    let index = read(dir)?.unwrap_or_default();
    let (mut kept, mut queue) = (HashSet::new(), vec![index]);
    while let Some(document) = queue.pop() {
        let lists = ["manifests", "layers", "blobs"]
            .iter()
            .filter_map(|key| document.get(key)?.as_array())
            .flatten();
        for entry in lists.chain(document.get("config")) {
            let Some(hex) =
                entry.get("digest").and_then(Value::as_str).and_then(|d| d.strip_prefix("sha256:"))
            else {
                continue;
            };
            let plain = hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_hexdigit());
            let kind = entry.get("mediaType").and_then(Value::as_str).unwrap_or_default();
            if plain
                && kept.insert(hex.to_owned())
                && (kind.contains(".manifest.") || kind.contains(".index."))
            {
                queue.extend(manifest(&blobs.join(hex))?);
            }
        }
    }
    let what = || format!("reset the cache in {}", dir.display());
    for entry in std::fs::read_dir(&blobs).map_err(|e| Fault::io(what(), e))? {
        let entry = entry.map_err(|e| Fault::io(what(), e))?;
        if !entry.file_name().to_str().is_some_and(|name| kept.contains(name)) {
            std::fs::remove_file(entry.path()).map_err(|e| Fault::io(what(), e))?;
        }
    }
    Ok(())
}

/// A manifest or index; none if it is not there, as layouts may be partial.
fn manifest(path: &Path) -> Result<Option<Value>> {
    use std::io::Read as _;
    let what = || format!("read {}", path.display());
    let file = match std::fs::File::open(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(|e| Fault::io(what(), e))?,
    };
    let mut data = Vec::new();
    file.take(MAX_MANIFEST + 1).read_to_end(&mut data).map_err(|e| Fault::io(what(), e))?;
    if data.len() as u64 > MAX_MANIFEST {
        return Err(Fault::invalid(format!("{}: it is larger than {MAX_MANIFEST} bytes", what())));
    }
    serde_json::from_slice(&data).map(Some).map_err(|e| Fault::invalid(format!("{}: {e}", what())))
}

fn write(dir: &Path, name: &str, value: &Value) -> Result<()> {
    let path = dir.join(name);
    let fill = |file: &mut std::fs::File| file.write_all(value.to_string().as_bytes());
    shipway_host::replace_file(&path, 0o666, fill)
        .map_err(|e| Fault::io(format!("write {}", path.display()), e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reset_keeps_what_the_index_leads_to() {
        let dir = tempfile::tempdir().expect("temp dir");
        let blobs = dir.path().join("blobs/sha256");
        std::fs::create_dir_all(&blobs).expect("makes a directory");
        let add = |bytes: &[u8]| {
            let hex = shipway_oci::Digest::of(bytes).hex();
            std::fs::write(blobs.join(&hex), bytes).expect("writes");
            hex
        };
        let descriptor = |hex: &str, kind: &str| json!({"digest": format!("sha256:{hex}"), "mediaType": format!("application/vnd.oci.image.{kind}.v1+json")});
        let (layer, config, old) = (add(b"layer"), add(b"config"), add(b"old"));
        let of = |layer: &str| {
            json!({"layers": [descriptor(layer, "layer")], "config": descriptor(&config, "config")})
                .to_string()
        };
        let (manifest, gone) = (add(of(&layer).as_bytes()), add(of(&old).as_bytes()));
        let outer =
            add(json!({"manifests": [descriptor(&manifest, "manifest")]}).to_string().as_bytes());
        put(
            dir.path(),
            descriptor(&outer, "index").to_string().as_bytes(),
            &[LayoutName::Tag("latest")],
        )
        .expect("puts");
        reset(dir.path()).expect("resets");
        let left: HashSet<_> = std::fs::read_dir(&blobs)
            .expect("lists")
            .map(|e| e.expect("an entry").file_name().into_string().expect("text"))
            .collect();
        assert_eq!(left, HashSet::from([layer, config.clone(), manifest.clone(), outer]));
        assert!(!left.contains(&gone));
        // A manifest that cannot be read: nothing is known, and nothing is deleted.
        std::fs::write(blobs.join(&manifest), "{").expect("writes");
        let more = add(b"more");
        assert!(reset(dir.path()).is_err() && blobs.join(more).exists());
    }

    #[test]
    fn entries_take_over_names() {
        let dir = tempfile::tempdir().expect("temp dir");
        let put_one = |digest: &str, name| {
            put(dir.path(), json!({"digest": digest}).to_string().as_bytes(), &[name])
                .expect("puts")
        };
        assert_eq!(find(dir.path(), "latest").expect("no index yet"), None);
        assert_eq!(only(dir.path()).expect("no index yet"), None);
        put_one("sha256:a", LayoutName::Tag("latest"));
        assert_eq!(only(dir.path()).expect("reads"), Some("sha256:a".into()));
        put_one("sha256:b", LayoutName::Tag("latest"));
        put_one("sha256:c", LayoutName::Image("r.example:5000/x:v1"));
        assert_eq!(find(dir.path(), "latest").expect("reads"), Some("sha256:b".into()));
        assert_eq!(only(dir.path()).expect("two"), None);
        let tags = tags(dir.path()).expect("reads");
        let both = [("latest", "sha256:b"), ("v1", "sha256:c")];
        assert_eq!(tags, both.map(|(tag, digest)| (tag.to_owned(), digest.to_owned())));
        assert_eq!(
            find(dir.path(), "r.example:5000/x:v1").expect("reads"),
            Some("sha256:c".into())
        );
        let index = read(dir.path()).expect("reads").expect("is there");
        assert_eq!(index["manifests"].as_array().map(Vec::len), Some(2));
    }
}
