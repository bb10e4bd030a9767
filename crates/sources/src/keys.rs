//! Cache keys of sources. Stable across versions as long as the fields of the structures hashed do
//! not change.

use serde::Serialize;
use shipway_oci::Digest;

/// The digest of `what` within `domain`, which keeps keys of different kinds apart.
pub(crate) fn digest(domain: &str, what: &impl Serialize) -> Digest {
    // Plain structures of strings and numbers always serialize; if one ever did not, its key would
    // be shared with nothing of value.
    let json = serde_json::to_string(what).unwrap_or_default();
    Digest::of(format!("shipway.source.{domain}\n{json}"))
}
