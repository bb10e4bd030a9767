//! Attestations become statements: contents read, bundles opened (rows `at.make`, `at.bundle`).

use crate::port::{Content, ExportAttestation};
use rustix::fs::{Mode, OFlags};
use serde_json::Value;
use shipway_attest::{
    Attestation, DigestSet, Kind, Statement, Subject, SubjectKind, SubjectSpec, core_first, slsa,
};
use shipway_fault::{Context as _, Fault, Result};
use shipway_rootfs::{open_directory, open_in_root, reopen_regular};
use std::{
    io::Read as _,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
};

/// No statement is larger.
const MAX_BYTES: u64 = 40 << 20;
/// No bundle has more statements.
const MAX_BUNDLE: usize = 10_000;

/// Attestations with their predicates, scans of the result itself first.
pub(crate) async fn read(attestations: Vec<ExportAttestation>) -> Result<Vec<Attestation<Value>>> {
    let mut out = Vec::new();
    for attestation in attestations {
        let content = attestation.content.clone();
        match content {
            Content::Made(make) => {
                let bytes = make().await?;
                out.push(attestation.with(json(&bytes)?));
            }
            Content::State(state) => {
                let mount = state.mount().await?;
                let bare = attestation.with(());
                let work = move || {
                    let read = match bare.kind {
                        Kind::InToto => {
                            file(mount.path(), &bare.path).map(|bytes| vec![(bare, bytes)])
                        }
                        Kind::Bundle => bundle(mount.path(), &bare),
                    };
                    drop(mount);
                    read
                };
                for (bare, predicate) in shipway_task::blocking("read attestations", work).await? {
                    out.push(bare.with(predicate));
                }
            }
        }
    }
    Ok(core_first(out))
}

/// The statements about what was exported, with the names of their files.
pub(crate) fn statements(
    attestations: &[Attestation<Value>],
    exported: &[Subject],
) -> Vec<(String, Statement)> {
    attestations
        .iter()
        .map(|a| (a.path.clone(), a.statement(a.content.clone(), exported)))
        .collect()
}

fn json(bytes: &[u8]) -> Result<Value> {
    if bytes.is_empty() {
        return Ok(Value::Null);
    }
    serde_json::from_slice(bytes)
        .map_err(|e| Fault::invalid(format!("cannot decode in-toto statement: {e}")))
}

/// Opens what lies at `path` as seen from the root `root`.
fn open(root: &Path, path: &Path, flags: OFlags) -> Result<OwnedFd> {
    let failed = |e: rustix::io::Errno| {
        Fault::io(format!("open {} of an attestation", path.display()), e.into())
    };
    let dir = open_directory(root).map_err(failed)?;
    open_in_root(dir.as_fd(), path.as_os_str().as_bytes(), flags, Mode::empty()).map_err(failed)
}

fn file(root: &Path, path: &str) -> Result<Value> {
    let failed = |e| Fault::io(format!("read the attestation {path}"), e);
    let found = open(root, Path::new(path), OFlags::PATH)?;
    let Some(file) = reopen_regular(found.as_fd()).map_err(|e| failed(e.into()))? else {
        return Err(Fault::invalid(format!(
            "cannot read in-toto attestation: {path} is not a regular file"
        )));
    };
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(Fault::invalid(format!("{path} exceeds {MAX_BYTES} bytes")));
    }
    json(&bytes).context(|| path.to_owned())
}

/// The statements in a directory.
fn bundle(root: &Path, bundle: &Attestation<()>) -> Result<Vec<(Attestation<()>, Value)>> {
    let dir = open(root, Path::new(&bundle.path), OFlags::RDONLY | OFlags::DIRECTORY)?;
    let failed = |e: rustix::io::Errno| {
        Fault::io(format!("list the attestations in {:?}", bundle.path), e.into())
    };
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::new(dir).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name().to_string_lossy().into_owned();
        if !matches!(name.as_str(), "." | "..") {
            names.push(name);
        }
        if names.len() > MAX_BUNDLE {
            return Err(Fault::invalid(format!("a bundle of more than {MAX_BUNDLE} attestations")));
        }
    }
    names.sort();
    names.into_iter().map(|name| opened(root, bundle, &name)).collect()
}

fn opened(root: &Path, bundle: &Attestation<()>, name: &str) -> Result<(Attestation<()>, Value)> {
    let path = PathBuf::from(&bundle.path).join(name).to_string_lossy().into_owned();
    let statement: Statement = serde_json::from_value(file(root, &path)?)
        .map_err(|e| Fault::invalid(format!("cannot decode in-toto statement: {e}")))?;
    if !bundle.predicate_type.is_empty() && statement.predicate_type != bundle.predicate_type {
        return Err(Fault::invalid(format!(
            "bundle entry {} does not match required predicate type {}",
            statement.predicate_type, bundle.predicate_type
        )));
    }
    if statement.predicate_type.starts_with(slsa::PREFIX) {
        return Err(Fault::invalid("frontend may not bundle provenance attestations"));
    }
    let subject = |s: Subject| SubjectSpec {
        kind: SubjectKind::Raw,
        name: s.name,
        digests: DigestSet::from_iter(s.digest),
    };
    let attestation = Attestation {
        kind: Kind::InToto,
        path,
        metadata: bundle.metadata.clone(),
        predicate_type: statement.predicate_type,
        subjects: statement.subject.into_iter().map(subject).collect(),
        content: (),
    };
    Ok((attestation, statement.predicate))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bundle_is_opened_inside_its_root_only() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("out");
        std::fs::create_dir(&dir).unwrap();
        let text = r#"{"_type":"t","predicateType":"p","subject":[{"name":"n","digest":{"sha256":"aa"}}],"predicate":{"a":1}}"#;
        std::fs::write(dir.join("one.json"), text).unwrap();
        let at = |path: &str, kind: &str| Attestation {
            path: path.into(),
            predicate_type: kind.into(),
            ..Attestation::<()>::default()
        };
        let read = bundle(root.path(), &at("/out", "p")).unwrap();
        assert_eq!(
            (read[0].0.path.as_str(), read[0].0.subjects[0].name.as_str(), &read[0].1["a"]),
            ("/out/one.json", "n", &1.into())
        );
        assert!(
            bundle(root.path(), &at("/out", "q"))
                .unwrap_err()
                .to_string()
                .contains("required predicate type")
        );
        std::os::unix::fs::symlink("/etc/passwd", dir.join("two.json")).unwrap();
        assert!(bundle(root.path(), &at("/out", "p")).is_err());
        assert!(file(root.path(), "/out").unwrap_err().to_string().contains("not a regular file"));
    }
}
