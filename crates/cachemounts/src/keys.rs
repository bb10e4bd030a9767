//! Under which names artifacts are kept, and what is asked for.

use shipway_fault::{Fault, Result};
use std::{collections::BTreeSet, time::Duration};

/// Most bytes of one cache mount, whatever is asked for.
pub const MAX_SIZE: u64 = 16 << 30;
/// The same unless something is asked for.
const DEFAULT_SIZE: u64 = 4 << 30;
/// How long a save or a restore of all mounts of a build may take, unless something is asked for.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(5 * 60);
/// Longest name: that of a registry's tag (OCI distribution-spec 1.1, "Pulling manifests").
const MAX_NAME: usize = 128;
/// Most keys to fall back to.
const MAX_FALLBACKS: usize = 16;

/// Names for keys such as branches. A key's name begins with those of the key's prefixes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keys {
    exact: String,
    fallback: Vec<String>,
}

impl Keys {
    /// Names below `base` for `key`, and for those of `fallback` (a list with `;`) to be tried in
    /// order if there is nothing under `key`. An empty key is `base` itself.
    pub fn new(base: &str, key: &str, fallback: &str) -> Result<Self> {
        let fallback: Vec<&str> = fallback.split(';').filter(|k| !k.is_empty()).collect();
        if fallback.len() > MAX_FALLBACKS {
            return Err(Fault::invalid(format!(
                "there may be {MAX_FALLBACKS} keys to fall back to"
            )));
        }
        let fallback = fallback.into_iter().map(|key| name(base, key)).collect::<Result<_>>()?;
        Ok(Self { exact: name(base, key)?, fallback })
    }

    /// The name of the key.
    pub fn exact(&self) -> &str {
        &self.exact
    }

    /// What names of other keys that will do begin with, the best first.
    pub fn fallback(&self) -> &[String] {
        &self.fallback
    }
}

/// `base`, a dash, and the key with what tags may not have as `_` and two hex digits.
fn name(base: &str, key: &str) -> Result<String> {
    let mut name = base.to_owned();
    if !key.is_empty() {
        name.push('-');
    }
    for byte in key.bytes() {
        match byte {
            b'.' | b'-' | b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' => name.push(char::from(byte)),
            _ => name.push_str(&format!("_{byte:02x}")),
        }
    }
    if name.len() > MAX_NAME {
        let shown: String = key.chars().take(MAX_NAME).collect();
        return Err(Fault::invalid(format!("the key {shown:?} of cache mounts is too long"))
            .hint(format!("with the tag it makes a name of at most {MAX_NAME} characters")));
    }
    Ok(name)
}

/// Which mounts are meant, and how much of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Ids of the mounts; all if there are none.
    pub ids: BTreeSet<String>,
    /// Most bytes of files of a mount.
    pub max_size: u64,
    /// How long all mounts together may take.
    pub timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { ids: BTreeSet::new(), max_size: DEFAULT_SIZE, timeout: DEFAULT_TIMEOUT }
    }
}

impl Limits {
    /// Whether the mount `id` is meant. The Dockerfile frontend puts a slash before what is written
    /// there, as BuildKit's does.
    pub fn has(&self, id: &str) -> bool {
        let written = id.strip_prefix('/').unwrap_or(id);
        self.ids.is_empty() || self.ids.contains(id) || self.ids.contains(written)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_keep_prefixes_and_are_tags() {
        let keys = Keys::new("mounts", "feature/a_b:1", "main;release-").expect("keys");
        assert_eq!(keys.exact(), "mounts-feature_2fa_5fb_3a1");
        assert_eq!(keys.fallback(), ["mounts-main", "mounts-release-"]);
        assert_eq!(Keys::new("latest", "", "").expect("keys").exact(), "latest");
        let long = "x".repeat(MAX_NAME);
        assert!(Keys::new("m", &long, "").expect_err("too long").to_string().contains("too long"));
        assert!(Keys::new("m", "k", &long).is_err());
        let many = vec!["k"; MAX_FALLBACKS + 1].join(";");
        assert!(Keys::new("m", "k", &many).is_err());
        // What differs has different names.
        let name = |key| Keys::new("m", key, "").expect("keys").exact().to_owned();
        assert_ne!(name("a_2f"), name("a/"));
        assert!(name("release-1/x").starts_with(&name("release-1")));
    }
}
