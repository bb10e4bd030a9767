//! One attestation on its way to an exporter, generic over what holds its content (rows
//! `at.filter`, `at.bundle`, `at.make`).

use crate::intoto::{DigestSet, STATEMENT, Statement, Subject};
use serde_json::Value;
use shipway_fault::{Fault, Result};
use std::collections::BTreeMap;

/// Keys of an attestation's metadata.
pub mod keys {
    /// Why it is there.
    pub const REASON: &str = "reason";
    /// Whether only images carry it.
    pub const INLINE_ONLY: &str = "inline-only";
    /// Name of the scan of the result itself, among scans of other things.
    pub const SBOM_CORE: &str = "sbom-core";
}

/// What the content is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// A predicate.
    #[default]
    InToto,
    /// A directory of statements.
    Bundle,
}

/// How a subject is named.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SubjectKind {
    /// What is exported.
    #[default]
    Itself,
    /// Something else, with its digests.
    Raw,
}

/// A subject as a frontend names it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct SubjectSpec {
    pub kind: SubjectKind,
    pub name: String,
    pub digests: DigestSet,
}

/// One attestation; `C` holds its content.
#[derive(Clone, Debug, Default)]
pub struct Attestation<C> {
    /// What the content is.
    pub kind: Kind,
    /// Where in the state the content lies, or what its file will be called.
    pub path: String,
    /// See [`keys`].
    pub metadata: BTreeMap<String, Vec<u8>>,
    /// Predicate type.
    pub predicate_type: String,
    /// What it is about; none means what is exported.
    pub subjects: Vec<SubjectSpec>,
    /// The content.
    pub content: C,
}

impl<C> Attestation<C> {
    /// The same with another content.
    pub fn with<D>(self, content: D) -> Attestation<D> {
        Attestation {
            kind: self.kind,
            path: self.path,
            metadata: self.metadata,
            predicate_type: self.predicate_type,
            subjects: self.subjects,
            content,
        }
    }

    /// Whether only images carry it.
    pub fn inline_only(&self) -> bool {
        self.metadata.get(keys::INLINE_ONLY).is_some_and(|v| v == b"true")
    }

    /// Whether this is the scan of the result itself, rather than of something beside it.
    pub fn is_core(&self) -> bool {
        let file = self.path.rsplit('/').next().unwrap_or_default();
        let stem = file.split('.').next().unwrap_or_default();
        self.metadata.get(keys::SBOM_CORE).is_some_and(|name| name == stem.as_bytes())
    }

    /// The statement with `predicate`. What it says of the result itself it says of each of
    /// `exported`.
    pub fn statement(&self, predicate: Value, exported: &[Subject]) -> Statement {
        let own = [SubjectSpec::default()];
        let mut subject = Vec::new();
        for spec in if self.subjects.is_empty() { &own[..] } else { &self.subjects } {
            match spec.kind {
                SubjectKind::Itself => {
                    for e in exported {
                        subject.push(e.clone());
                        if !spec.name.is_empty() && spec.name != "_" {
                            subject.push(Subject {
                                name: spec.name.clone(),
                                digest: e.digest.clone(),
                            });
                        }
                    }
                }
                SubjectKind::Raw => {
                    let name =
                        if spec.name.is_empty() { "_".to_owned() } else { spec.name.clone() };
                    subject.push(Subject { name, digest: spec.digests.clone() });
                }
            }
        }
        Statement {
            kind: STATEMENT.into(),
            predicate_type: self.predicate_type.clone(),
            subject,
            predicate,
        }
    }

    /// Refuses what no exporter could name.
    pub fn check(&self) -> Result<()> {
        if self.kind == Kind::InToto && self.path.is_empty() {
            return Err(Fault::invalid("attestation does not have set path"));
        }
        Ok(())
    }
}

/// Those that not only images carry.
pub fn filter_inline<C>(all: Vec<Attestation<C>>) -> Vec<Attestation<C>> {
    all.into_iter().filter(|a| !a.inline_only()).collect()
}

/// Scans of the result itself before everything else.
pub fn core_first<C>(all: Vec<Attestation<C>>) -> Vec<Attestation<C>> {
    let (core, rest): (Vec<_>, Vec<_>) = all.into_iter().partition(Attestation::is_core);
    core.into_iter().chain(rest).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_of_the_result_is_said_of_everything_exported() {
        let exported = [Subject {
            name: "pkg:docker/a@1".into(),
            digest: DigestSet::from([("sha256".into(), "aa".into())]),
        }];
        let mut a = Attestation { predicate_type: "t".into(), ..Attestation::<()>::default() };
        let names = |a: &Attestation<()>| -> Vec<String> {
            a.statement(Value::Null, &exported).subject.into_iter().map(|s| s.name).collect()
        };
        assert_eq!(names(&a), ["pkg:docker/a@1"]);
        a.subjects = vec![
            SubjectSpec { name: "x".into(), ..SubjectSpec::default() },
            SubjectSpec { kind: SubjectKind::Raw, ..SubjectSpec::default() },
        ];
        assert_eq!(names(&a), ["pkg:docker/a@1", "x", "_"]);
    }

    #[test]
    fn what_only_images_carry_is_left_out_elsewhere() {
        let of = |path: &str, inline: Option<&str>| Attestation {
            path: path.into(),
            metadata: inline
                .map(|v| (keys::INLINE_ONLY.to_owned(), v.as_bytes().to_vec()))
                .into_iter()
                .collect(),
            ..Attestation::<()>::default()
        };
        let rest =
            filter_inline(vec![of("a", None), of("b", Some("true")), of("c", Some("false"))]);
        assert_eq!(rest.iter().map(|a| a.path.as_str()).collect::<Vec<_>>(), ["a", "c"]);
    }

    #[test]
    fn scans_of_the_result_come_first() {
        let scan = |path: &str| Attestation {
            path: path.into(),
            metadata: [(keys::SBOM_CORE.to_owned(), b"sbom".to_vec())].into(),
            ..Attestation::<()>::default()
        };
        let sorted =
            core_first(vec![scan("/out/sbom-base.spdx.json"), scan("/out/sbom.spdx.json")]);
        assert_eq!(sorted[0].path, "/out/sbom.spdx.json");
    }
}
