//! What builds ask for: the attributes of `--cache-mount-to` and `--cache-mount-from`.

use crate::keys::{Keys, Limits, MAX_SIZE};
use shipway_fault::{Fault, Result};
use shipway_gocompat::{GoDuration, parse_size};
use shipway_oci::ImageName;
use std::collections::BTreeMap;

/// What the type of a cache option begins with, followed by the kind of place, where it asks for
/// contents of cache mounts. Daemons that do not know it refuse it as an unknown cache.
pub const REQUEST: &str = "shipway.cache-mounts.";
/// Key of a build's response with the descriptor of what the save with this number wrote.
pub const RESPONSE: &str = "shipway.cache-mounts.";
/// Attributes by which a client says what its directory has: an artifact's digest and its name.
pub const DIGEST: &str = "digest";
/// See [`DIGEST`].
pub const FOUND: &str = "found";

/// What artifacts are called where nothing else is asked for.
const NAME: &str = "cache-mounts";
/// Longest time that may be asked for.
const MAX_TIMEOUT: u64 = 60 * 60;

/// Whether contents are written or read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// `--cache-mount-to`.
    Save,
    /// `--cache-mount-from`.
    Restore,
}

/// A place that contents of cache mounts are saved to or restored from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Kind of the place: `registry`, `local`, `s3`.
    pub kind: String,
    /// Attributes of the place.
    pub attrs: BTreeMap<String, String>,
    /// The name in which all names at the place begin that belong to this one.
    pub base: String,
    /// Names of what is wanted.
    pub keys: Keys,
    /// Which mounts, and how much.
    pub limits: Limits,
}

impl Request {
    /// The request for a place of kind `kind` with these attributes, all of which are checked that
    /// do not belong to an object store.
    pub fn of(kind: &str, attrs: &BTreeMap<String, String>, direction: Direction) -> Result<Self> {
        let mut attrs = attrs.clone();
        let mut take = |key: &str| attrs.remove(key).filter(|v| !v.is_empty());
        let (key, fallback) = (take("key"), take("fallback"));
        let (ids, size, timeout) = (take("id"), take("max-size"), take("timeout"));
        if fallback.is_some() && direction == Direction::Save {
            return Err(Fault::invalid("cache mounts are saved under one key, without a fallback"));
        }
        let (base, known): (String, &[&str]) = match kind {
            "registry" => {
                let reference = attrs.get("ref").filter(|r| !r.is_empty());
                let reference = reference
                    .ok_or_else(|| Fault::invalid("cache mounts in a registry require ref"))?;
                let name: ImageName = reference
                    .parse()
                    .map_err(|e| Fault::invalid(format!("failed to parse {reference}: {e}")))?;
                if name.digest().is_some() {
                    return Err(Fault::invalid(format!(
                        "ref {reference} of cache mounts has a digest"
                    ))
                    .hint("name a repository, or a tag in one"));
                }
                // A name without a tag is that of an image, which cache mounts must not replace.
                let last = reference.rsplit('/').next().unwrap_or_default();
                let tag = name.tag().filter(|_| last.contains(':'));
                (tag.unwrap_or(NAME).to_owned(), &["ref", "registry.insecure"])
            }
            "local" => {
                let (wanted, other) = match direction {
                    Direction::Save => ("dest", "src"),
                    Direction::Restore => ("src", "dest"),
                };
                if attrs.get(wanted).is_none_or(String::is_empty) {
                    let mut fault =
                        Fault::invalid(format!("cache mounts in a directory require {wanted}"));
                    if attrs.contains_key(other) {
                        fault = fault.hint(format!("{other} is for the other direction"));
                    }
                    return Err(fault);
                }
                let tag = attrs.remove("tag").filter(|t| !t.is_empty());
                let known: &[&str] = match direction {
                    Direction::Save => &["dest", "reset", DIGEST, FOUND],
                    Direction::Restore => &["src", DIGEST, FOUND],
                };
                (tag.unwrap_or_else(|| NAME.to_owned()), known)
            }
            "s3" => {
                let name = attrs.remove("name").filter(|n| !n.is_empty());
                (name.unwrap_or_else(|| NAME.to_owned()), &[])
            }
            _ => {
                return Err(Fault::unimplemented(format!("cache mounts in a {kind:?}"))
                    .hint("use registry, local or s3"));
            }
        };
        if let Some(unknown) =
            attrs.keys().find(|key| !known.is_empty() && !known.contains(&key.as_str()))
        {
            let own = ["key", "fallback", "id", "max-size", "timeout"];
            let fault = Fault::invalid(format!("unknown attribute {unknown:?} of cache mounts"));
            return Err(match shipway_fault::nearest(unknown, known.iter().copied().chain(own)) {
                Some(near) => fault.hint(format!("did you mean {near}?")),
                None => fault,
            });
        }
        let keys = Keys::new(
            &base,
            key.as_deref().unwrap_or_default(),
            fallback.as_deref().unwrap_or_default(),
        )?;
        let limits = limits(ids, size, timeout)?;
        Ok(Self { kind: kind.to_owned(), attrs, base, keys, limits })
    }

    /// What it is for people, without credentials.
    pub fn shown(&self) -> String {
        let named = ["ref", "dest", "src", "bucket"].iter().find_map(|key| self.attrs.get(*key));
        let place = named.map_or(self.kind.as_str(), String::as_str);
        format!("{place} ({})", self.keys.exact())
    }
}

fn limits(ids: Option<String>, size: Option<String>, timeout: Option<String>) -> Result<Limits> {
    let mut limits = Limits::default();
    if let Some(ids) = ids {
        limits.ids = ids.split(';').filter(|id| !id.is_empty()).map(str::to_owned).collect();
    }
    if let Some(text) = size {
        let size = parse_size(&text).and_then(|n| u64::try_from(n).ok()).filter(|n| *n > 0);
        limits.max_size = size.filter(|n| *n <= MAX_SIZE).ok_or_else(|| {
            Fault::invalid(format!("max-size={text} of cache mounts is not a valid size"))
                .hint(format!("write it as 512m or 2g, at most {}g", MAX_SIZE >> 30))
        })?;
    }
    if let Some(text) = timeout {
        let timeout = text.parse::<GoDuration>().ok().and_then(|d| d.to_std());
        limits.timeout =
            timeout.filter(|t| !t.is_zero() && t.as_secs() <= MAX_TIMEOUT).ok_or_else(|| {
                Fault::invalid(format!("timeout={text} of cache mounts is not a valid duration"))
                    .hint("write it as 90s or 10m, at most 1h")
            })?;
    }
    Ok(limits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn of(kind: &str, text: &str, direction: Direction) -> Result<Request> {
        let pairs = text.split(',').filter_map(|word| word.split_once('='));
        let attrs = pairs.map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
        Request::of(kind, &attrs, direction)
    }

    #[test]
    fn attributes_are_read_and_those_of_the_place_stay() {
        use Direction::{Restore, Save};
        let request =
            of("registry", "ref=r.example/x:c,key=main,id=a;b,max-size=2g,timeout=90s", Save)
                .expect("a request");
        assert_eq!(request.keys.exact(), "c-main");
        assert_eq!(request.limits.max_size, 2 << 30);
        assert_eq!(request.limits.timeout, Duration::from_secs(90));
        assert!(request.limits.has("a") && request.limits.has("/b") && !request.limits.has("/c"));
        assert_eq!(request.attrs.keys().collect::<Vec<_>>(), ["ref"]);
        assert_eq!(request.shown(), "r.example/x:c (c-main)");
        let plain = of("registry", "ref=r.example/x", Restore).expect("a request");
        assert_eq!((plain.keys.exact(), plain.limits), ("cache-mounts", Limits::default()));
        let local = of("local", "src=d,tag=t,key=k,fallback=a;b", Restore).expect("a request");
        assert_eq!(local.keys.fallback(), ["t-a", "t-b"]);
        let s3 = of("s3", "bucket=b,secret_access_key=s,name=n", Save).expect("a request");
        assert_eq!((s3.keys.exact(), s3.shown().as_str()), ("n", "b (n)"));
    }

    #[test]
    fn mistakes_are_named() {
        use Direction::{Restore, Save};
        let digest = format!("ref=r.example/x@sha256:{}", "0".repeat(64));
        for (kind, text, direction, words) in [
            ("registry", "key=k", Save, "require ref"),
            ("registry", digest.as_str(), Save, "has a digest"),
            ("registry", "ref=r.example/x,maxsize=1", Save, "unknown attribute \"maxsize\""),
            ("registry", "ref=r.example/x,fallback=k", Save, "without a fallback"),
            ("local", "src=d", Save, "require dest"),
            ("local", "dest=d", Restore, "require src"),
            ("gha", "", Save, "cache mounts in a \"gha\" is not implemented"),
            ("s3", "max-size=17g", Save, "not a valid size"),
            ("s3", "max-size=0", Save, "not a valid size"),
            ("s3", "timeout=2h", Save, "not a valid duration"),
            ("s3", "timeout=-1s", Save, "not a valid duration"),
        ] {
            let said = of(kind, text, direction).expect_err(text).to_string();
            assert!(said.contains(words), "{text}: {said}");
        }
    }
}
