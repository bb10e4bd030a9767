//! What a request's attributes say of a bucket.

use crate::{CacheAttributes, encoded_path};
use http::Uri;
use shipway_fault::{Fault, Result};
use shipway_gocompat::{GoDuration, parse_bool};
use shipway_oci::Digest;
use std::time::Duration;

/// Longest name of a bucket or a region.
const MAX_NAME: usize = 255;
/// Most names of one cache.
const MAX_NAMES: usize = 100;
/// Most layers that may be on their way at the same time.
const MAX_PARALLEL: usize = 64;

/// Keys that a request brings along.
pub(super) struct StaticKeys {
    pub id: String,
    pub secret: String,
    pub token: Option<String>,
}

/// A bucket, and what of it is the cache.
pub(super) struct Config {
    pub bucket: String,
    pub region: String,
    /// Address of the bucket, without a slash at the end.
    pub base: String,
    prefix: String,
    manifests: String,
    blobs: String,
    pub names: Vec<String>,
    /// Age from which layers are made new again.
    pub touch_refresh: Duration,
    pub keys: Option<StaticKeys>,
    pub parallelism: usize,
    /// Most tries of a request.
    pub tries: u32,
}

/// Whether `text` may be part of a host name.
fn is_label(text: &str) -> bool {
    let known = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
    !text.is_empty() && text.len() <= MAX_NAME && text.chars().all(known)
}

fn positive(text: &str) -> Option<u32> {
    text.parse::<u32>().ok().filter(|n| *n > 0)
}

impl Config {
    /// Reads `attributes`; `variable` is the environment. Mistakes in `touch_refresh` and
    /// `use_path_style` are passed over, as by BuildKit.
    pub fn of(
        attributes: &CacheAttributes,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self> {
        let text = |key: &str| attributes.get(key).map(String::as_str);
        let given = |key: &str| text(key).filter(|v| !v.is_empty());
        let needed = |key: &str, name: &str| {
            let found = text(key).map(str::to_owned).or_else(|| variable(name));
            let found = found
                .ok_or_else(|| Fault::invalid(format!("{key} (${name}) not set for s3 cache")))?;
            if is_label(&found) {
                return Ok(found);
            }
            Err(Fault::invalid(format!("{key} {found:?} of an s3 cache is not a valid name")))
        };
        let bucket = needed("bucket", "AWS_BUCKET")?;
        let region = needed("region", "AWS_REGION")?;
        let count = |key: &str| {
            let wrong = || Fault::invalid(format!("{key} must be a positive integer"));
            text(key).map(|v| positive(v).ok_or_else(wrong)).transpose()
        };
        let parallelism = count("upload_parallelism")?.unwrap_or(4) as usize;
        let tries = count("retry_max_attempts")?.unwrap_or(5);
        // Both modes try as often; how long the pauses are is the store's to say.
        if !matches!(text("retry_mode"), None | Some("standard" | "adaptive")) {
            return Err(Fault::invalid("retry_mode must be \"standard\" or \"adaptive\""));
        }
        let names: Vec<String> =
            text("name").unwrap_or("buildkit").split(';').map(str::to_owned).collect();
        if names.len() > MAX_NAMES {
            return Err(Fault::invalid(format!("an s3 cache may have {MAX_NAMES} names")));
        }
        let endpoint = given("endpoint_url").map(str::to_owned);
        let path_style =
            endpoint.is_some() && text("use_path_style").and_then(parse_bool).unwrap_or(false);
        let endpoint = endpoint
            .or_else(|| variable("AWS_ENDPOINT_URL_S3"))
            .or_else(|| variable("AWS_ENDPOINT_URL"));
        let refresh = text("touch_refresh").and_then(|v| v.parse::<GoDuration>().ok());
        let keys = match (given("access_key_id"), given("secret_access_key")) {
            (Some(id), Some(secret)) => Some(StaticKeys {
                id: id.to_owned(),
                secret: secret.to_owned(),
                token: given("session_token").map(str::to_owned),
            }),
            _ => None,
        };
        Ok(Self {
            base: base(endpoint.as_deref(), &bucket, &region, path_style)?,
            bucket,
            region,
            prefix: text("prefix").unwrap_or_default().to_owned(),
            manifests: text("manifests_prefix").unwrap_or("manifests/").to_owned(),
            blobs: text("blobs_prefix").unwrap_or("blobs/").to_owned(),
            names,
            // A negative one is over at once.
            touch_refresh: refresh
                .map_or(Duration::from_secs(24 * 60 * 60), |d| d.to_std().unwrap_or_default()),
            keys,
            parallelism: parallelism.min(MAX_PARALLEL),
            tries,
        })
    }

    /// The name that is imported.
    pub fn first_name(&self) -> &str {
        self.names.first().map_or("buildkit", String::as_str)
    }

    pub fn manifest_key(&self, name: &str) -> String {
        format!("{}{}{name}", self.prefix, self.manifests)
    }

    pub fn blob_prefix(&self) -> String {
        format!("{}{}", self.prefix, self.blobs)
    }

    pub fn blob_key(&self, digest: &Digest) -> String {
        format!("{}{digest}", self.blob_prefix())
    }

    /// An object as the source of a copy.
    pub fn copy_source(&self, key: &str) -> String {
        format!("{}/{}", self.bucket, encoded_path(key))
    }

    /// The address of an object, or of the bucket.
    pub fn uri(&self, key: &str, query: &str) -> Result<Uri> {
        let mark = if query.is_empty() { "" } else { "?" };
        let text = format!("{}/{}{mark}{query}", self.base, encoded_path(key));
        text.parse().map_err(|e| Fault::invalid(format!("the s3 key {key:?} has no address: {e}")))
    }
}

/// Where the bucket is: in the host's name, unless a path is asked for, or is the only way to have
/// a certificate that fits.
fn base(endpoint: Option<&str>, bucket: &str, region: &str, path_style: bool) -> Result<String> {
    let domain = if region.starts_with("cn-") { "amazonaws.com.cn" } else { "amazonaws.com" };
    let amazon = format!("https://s3.{region}.{domain}");
    let text = endpoint.unwrap_or(&amazon).trim_end_matches('/');
    let invalid = |why: &str| {
        Fault::invalid(format!(
            "endpoint_url {:?} of an s3 cache: {why}",
            shipway_fault::redact(text)
        ))
        .hint("it is an address such as https://s3.example.com:9000")
    };
    let uri: Uri = text.parse().map_err(|_| invalid("is not a valid address"))?;
    let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
        return Err(invalid("has no scheme or no host"));
    };
    if !matches!(scheme, "http" | "https") || uri.query().is_some() {
        return Err(invalid("is not an address of a server"));
    }
    if authority.as_str().contains('@') {
        return Err(invalid("holds a user"));
    }
    let path = uri.path().trim_end_matches('/');
    let fits = !(bucket.contains('_') || scheme == "https" && bucket.contains('.'));
    if path_style || !fits {
        return Ok(format!("{scheme}://{authority}{path}/{bucket}"));
    }
    Ok(format!("{scheme}://{bucket}.{authority}{path}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(attributes: &[(&str, &str)], variables: &[(&str, &str)]) -> Result<Config> {
        let mut all = CacheAttributes::from([
            ("bucket".to_owned(), "b".to_owned()),
            ("region".to_owned(), "eu-central-1".to_owned()),
        ]);
        all.extend(attributes.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())));
        all.retain(|_, v| v != "-");
        let variable =
            |name: &str| variables.iter().find(|(k, _)| *k == name).map(|(_, v)| (*v).to_owned());
        Config::of(&all, variable)
    }

    #[test]
    fn objects_are_where_buildkit_looks_for_them() {
        let digest = Digest::of("x");
        let plain = of(&[], &[]).unwrap();
        assert_eq!(plain.manifest_key("buildkit"), "manifests/buildkit");
        assert_eq!(plain.blob_key(&digest), format!("blobs/{digest}"));
        assert_eq!(plain.names, ["buildkit"]);
        let of = of(
            &[
                ("prefix", "p/"),
                ("manifests_prefix", "m-"),
                ("blobs_prefix", ""),
                ("name", "a;b/c"),
            ],
            &[],
        )
        .unwrap();
        assert_eq!(of.names, ["a", "b/c"]);
        assert_eq!(of.manifest_key(of.first_name()), "p/m-a");
        assert_eq!(of.blob_key(&digest), format!("p/{digest}"));
    }

    #[test]
    fn the_bucket_is_in_the_host_unless_a_path_is_asked_for() {
        let base = |attributes: &[(&str, &str)], variables: &[(&str, &str)]| {
            of(attributes, variables).map(|c| c.uri("k:1/x y", "").unwrap().to_string())
        };
        for (attributes, want) in [
            (&[][..], "https://b.s3.eu-central-1.amazonaws.com/k%3A1/x%20y"),
            (&[("region", "cn-north-1")], "https://b.s3.cn-north-1.amazonaws.com.cn/k%3A1/x%20y"),
            // No certificate is for names with another dot.
            (&[("bucket", "a.b")], "https://s3.eu-central-1.amazonaws.com/a.b/k%3A1/x%20y"),
            (&[("use_path_style", "true")], "https://b.s3.eu-central-1.amazonaws.com/k%3A1/x%20y"),
            (&[("endpoint_url", "http://h:9/")], "http://b.h:9/k%3A1/x%20y"),
            (
                &[("endpoint_url", "http://h:9/s3"), ("use_path_style", "1")],
                "http://h:9/s3/b/k%3A1/x%20y",
            ),
            (
                &[("endpoint_url", "http://h"), ("use_path_style", "perhaps")],
                "http://b.h/k%3A1/x%20y",
            ),
        ] {
            assert_eq!(base(attributes, &[]).unwrap(), want, "{attributes:?}");
        }
        let elsewhere = base(&[], &[("AWS_ENDPOINT_URL", "http://e")]).unwrap();
        assert_eq!(elsewhere, "http://b.e/k%3A1/x%20y");
        for wrong in ["ftp://h", "h:9", "http://", "http://u:p@h", "http://h?x"] {
            assert!(base(&[("endpoint_url", wrong)], &[]).is_err(), "{wrong}");
        }
    }

    #[test]
    fn mistakes_are_named_as_buildkit_does() {
        let say = |attributes: &[(&str, &str)]| {
            of(attributes, &[]).map(drop).map_err(|f| f.message().to_owned()).unwrap_err()
        };
        assert_eq!(say(&[("bucket", "-")]), "bucket ($AWS_BUCKET) not set for s3 cache");
        assert_eq!(say(&[("region", "-")]), "region ($AWS_REGION) not set for s3 cache");
        for n in ["0", "-1", "x", ""] {
            let parallel = say(&[("upload_parallelism", n)]);
            assert_eq!(parallel, "upload_parallelism must be a positive integer");
            assert!(of(&[("retry_max_attempts", n)], &[]).is_err());
        }
        assert!(say(&[("retry_mode", "x")]).contains("\"standard\" or \"adaptive\""));
        // What becomes part of a host's name must be able to.
        for bucket in ["a/b", "a@b", "a b", "a?"] {
            assert!(say(&[("bucket", bucket)]).contains("is not a valid name"));
        }
        let names = vec!["n"; MAX_NAMES + 1].join(";");
        assert!(say(&[("name", &names)]).contains("100 names"));
    }

    #[test]
    fn settings_have_their_defaults_and_limits() {
        let plain = of(&[], &[]).unwrap();
        assert_eq!((plain.parallelism, plain.tries), (4, 5));
        assert_eq!(plain.touch_refresh, Duration::from_secs(86_400));
        assert!(plain.keys.is_none());
        let set = of(
            &[
                ("upload_parallelism", "1000"),
                ("retry_max_attempts", "2"),
                ("touch_refresh", "1h30m"),
                ("access_key_id", "i"),
                ("secret_access_key", "s"),
                ("retry_mode", "adaptive"),
                ("disable_accept_encoding", "true"),
            ],
            &[],
        )
        .unwrap();
        assert_eq!((set.parallelism, set.tries), (MAX_PARALLEL, 2));
        assert_eq!(set.touch_refresh, Duration::from_secs(5400));
        assert!(set.keys.is_some_and(|k| k.token.is_none()));
        let odd = of(&[("touch_refresh", "soon"), ("access_key_id", "i")], &[]).unwrap();
        assert_eq!(odd.touch_refresh, Duration::from_secs(86_400));
        assert!(odd.keys.is_none());
        let named =
            of(&[("bucket", "-"), ("region", "-")], &[("AWS_BUCKET", "e"), ("AWS_REGION", "r")]);
        assert!(named.is_ok_and(|c| c.bucket == "e" && c.region == "r"));
    }
}
