//! The in-toto statement (rows `at.make`, `at.layer`).

use serde::{Deserialize, Serialize};
use serde_json::Value;
use shipway_oci::Digest;
use std::collections::BTreeMap;

/// Type of a statement.
pub const STATEMENT: &str = "https://in-toto.io/Statement/v1";
/// Predicate type of an SBOM.
pub const SPDX: &str = "https://spdx.dev/Document";

/// Predicate types of provenance.
pub mod slsa {
    /// SLSA 1.
    pub const V1: &str = "https://slsa.dev/provenance/v1";
    /// SLSA 0.2.
    pub const V02: &str = "https://slsa.dev/provenance/v0.2";
    /// What all of them begin with.
    pub const PREFIX: &str = "https://slsa.dev/provenance/";
}

/// Digests by algorithm.
pub type DigestSet = BTreeMap<String, String>;

/// The set of one sha256 digest.
pub fn digest_set(digest: Digest) -> DigestSet {
    DigestSet::from([("sha256".to_owned(), digest.hex())])
}

/// What a statement is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Subject {
    #[serde(default)]
    pub name: String,
    #[serde(default)]
    pub digest: DigestSet,
}

/// A statement: a predicate about subjects.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Statement {
    #[serde(rename = "_type", default)]
    pub kind: String,
    #[serde(rename = "predicateType", default)]
    pub predicate_type: String,
    // Go writes an absent list as `null`.
    #[serde(default, deserialize_with = "list")]
    pub subject: Vec<Subject>,
    #[serde(default)]
    pub predicate: Value,
}

fn list<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Vec<Subject>, D::Error> {
    Ok(Option::<Vec<Subject>>::deserialize(d)?.unwrap_or_default())
}
