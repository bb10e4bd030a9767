//! containerd's `certs.d/<host>/hosts.toml` (containerd docs, `hosts.md`), and Docker's bare
//! certificate directories.

use crate::endpoint::{Capabilities, Endpoint, Scheme, certificate_files, host_of_authority};
use http::{HeaderMap, HeaderName, HeaderValue, Uri};
use serde::Deserialize;
use shipway_gocompat::GoDuration;
use shipway_http::{KeyPair, is_loopback};
use std::{path::Path, time::Duration};

/// Longest file that is read.
const MAX_FILE: u64 = 1 << 20;
/// A `dial_timeout` must be shorter.
const MAX_TIMEOUT: Duration = Duration::from_secs(86_400);

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    server: String,
    #[serde(default)]
    host: toml::Table,
    #[serde(flatten)]
    root: Host,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Host {
    capabilities: Vec<String>,
    ca: OneOrMany,
    client: Clients,
    skip_verify: Option<bool>,
    header: toml::Table,
    override_path: bool,
    dial_timeout: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl Default for OneOrMany {
    fn default() -> Self {
        Self::Many(Vec::new())
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Clients {
    One(String),
    Many(Vec<OneOrMany>),
}

impl Default for Clients {
    fn default() -> Self {
        Self::Many(Vec::new())
    }
}

/// Endpoints for `registry` by the files under `root`; `None` when there are none for it.
pub(crate) fn load(root: &Path, registry: &str) -> Result<Option<Vec<Endpoint>>, String> {
    // A registry's name comes from a Dockerfile: it must not lead out of the directory.
    if registry.contains('/') || registry.starts_with('.') {
        return Ok(None);
    }
    let underscored = registry.rsplit_once(':').map(|(host, port)| format!("{host}_{port}_"));
    let Some(dir) = underscored
        .as_deref()
        .into_iter()
        .chain([registry, "_default"])
        .map(|n| root.join(n))
        .find(|d| d.is_dir())
    else {
        return Ok(None);
    };
    let file = dir.join("hosts.toml");
    let text = match std::fs::metadata(&file) {
        Ok(m) if m.len() > MAX_FILE => return Err(format!("{} is too long", file.display())),
        Ok(_) => {
            std::fs::read_to_string(&file).map_err(|e| format!("read {}: {e}", file.display()))?
        }
        Err(_) => String::new(),
    };
    if text.trim().is_empty() {
        let (ca, keypair) = certificate_files(&dir)?;
        let mut origin = origin(registry, None);
        origin.tls.skip_verify &= ca.is_empty();
        (origin.tls.ca, origin.tls.keypair) = (ca, keypair);
        return Ok(Some(vec![origin]));
    }
    parse(&dir, registry, &text).map(Some).map_err(|e| format!("{}: {e}", file.display()))
}

fn parse(dir: &Path, registry: &str, text: &str) -> Result<Vec<Endpoint>, String> {
    let file: File = toml::from_str(text).map_err(|e| e.to_string())?;
    let mut endpoints = Vec::new();
    for (url, table) in file.host {
        let host: Host = table.try_into().map_err(|e| format!("[host.{url:?}]: {e}"))?;
        endpoints
            .push(endpoint(dir, registry, &url, host).map_err(|e| format!("[host.{url:?}]: {e}"))?);
    }
    endpoints.push(endpoint(dir, registry, &file.server, file.root)?);
    Ok(endpoints)
}

/// The registry itself, when no file names a server.
fn origin(registry: &str, skip_verify: Option<bool>) -> Endpoint {
    let mut origin = Endpoint::origin(registry);
    origin.tls.skip_verify = skip_verify.unwrap_or(false);
    if is_loopback(host_of_authority(registry)) {
        let port = registry.rsplit_once(':').and_then(|(_, p)| p.parse().ok());
        (origin.scheme, origin.tls.skip_verify) = match port {
            Some(80) => (Scheme::Http, false),
            None | Some(443) => (Scheme::Https, skip_verify.unwrap_or(true)),
            Some(_) => (Scheme::Either, skip_verify.unwrap_or(true)),
        };
    }
    origin
}

fn endpoint(dir: &Path, registry: &str, url: &str, host: Host) -> Result<Endpoint, String> {
    let mut endpoint =
        if url.is_empty() { origin(registry, host.skip_verify) } else { named(url, &host)? };
    endpoint.capabilities = capabilities(&host.capabilities)?;
    endpoint.headers = headers(&host.header)?;
    endpoint.dial_timeout = host.dial_timeout.as_deref().map(duration).transpose()?;
    let path = |p: String| dir.join(p);
    endpoint.tls.ca = match host.ca {
        OneOrMany::One(file) => vec![path(file)],
        OneOrMany::Many(files) => files.into_iter().map(path).collect(),
    };
    endpoint.tls.keypair = clients(host.client)?
        .into_iter()
        .map(|(cert, key)| KeyPair { key: path(key), cert: path(cert) })
        .collect();
    Ok(endpoint)
}

fn named(url: &str, host: &Host) -> Result<Endpoint, String> {
    let url = if url.starts_with("http") && url.contains("://") {
        url.to_owned()
    } else {
        format!("https://{url}")
    };
    let uri: Uri = url.parse().map_err(|e| format!("{url:?} is not a valid address: {e}"))?;
    let authority = uri.authority().ok_or_else(|| format!("{url:?} names no host"))?.as_str();
    let path = uri.path().trim_end_matches('/');
    let path = if host.override_path || path.ends_with("/v2") {
        path.to_owned()
    } else {
        format!("{path}/v2")
    };
    let mut endpoint = Endpoint::at(authority, path, Capabilities::ALL);
    endpoint.tls.skip_verify = host.skip_verify.unwrap_or(false);
    let tls_meant = host.skip_verify.is_some()
        || !matches!(&host.ca, OneOrMany::Many(l) if l.is_empty())
        || !matches!(&host.client, Clients::Many(l) if l.is_empty());
    endpoint.scheme = match uri.scheme_str() {
        // Plain HTTP with TLS settings means: TLS if it is spoken there.
        Some("http") if tls_meant && uri.port_u16() != Some(80) => Scheme::Either,
        Some("http") => Scheme::Http,
        _ => Scheme::Https,
    };
    Ok(endpoint)
}

fn capabilities(words: &[String]) -> Result<Capabilities, String> {
    if words.is_empty() {
        return Ok(Capabilities::ALL);
    }
    let mut c = Capabilities { pull: false, resolve: false, push: false };
    for word in words {
        match word.to_lowercase().as_str() {
            "pull" => c.pull = true,
            "resolve" => c.resolve = true,
            "push" => c.push = true,
            "referrers" => {}
            other => return Err(format!("unknown capability {other:?}: want pull, resolve, push")),
        }
    }
    Ok(c)
}

fn headers(table: &toml::Table) -> Result<HeaderMap, String> {
    let mut map = HeaderMap::new();
    for (name, value) in table {
        let bad = |e: &dyn std::fmt::Display| format!("header {name:?}: {e}");
        let header: HeaderName =
            name.parse().map_err(|e: http::header::InvalidHeaderName| bad(&e))?;
        let values: Vec<&str> = match value {
            toml::Value::String(s) => vec![s],
            toml::Value::Array(a) => a.iter().filter_map(|v| v.as_str()).collect(),
            _ => return Err(bad(&"want a string or a list of strings")),
        };
        for v in values {
            // The value may be a secret: it is not repeated in the message.
            let mut v: HeaderValue =
                v.parse().map_err(|_| bad(&"a value has a character that headers cannot have"))?;
            v.set_sensitive(true);
            map.append(header.clone(), v);
        }
    }
    Ok(map)
}

fn clients(clients: Clients) -> Result<Vec<(String, String)>, String> {
    let all = match clients {
        Clients::One(file) => vec![OneOrMany::One(file)],
        Clients::Many(all) => all,
    };
    all.into_iter()
        .map(|c| match c {
            OneOrMany::One(file) => Ok((file.clone(), file)),
            OneOrMany::Many(pair) => match <[String; 2]>::try_from(pair) {
                Ok([cert, key]) if key.is_empty() => Ok((cert.clone(), cert)),
                Ok([cert, key]) => Ok((cert, key)),
                Err(_) => Err("client: want a file, or pairs of certificate and key".to_owned()),
            },
        })
        .collect()
}

/// A duration as Go writes it, of less than a day.
fn duration(text: &str) -> Result<Duration, String> {
    let parsed = text.parse().ok().and_then(GoDuration::to_std).filter(|d| *d < MAX_TIMEOUT);
    parsed.ok_or_else(|| format!("dial_timeout {text:?}: want for example \"5s\""))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    #[track_caller]
    fn check(registry: &str, text: &str, want: &[&str]) {
        let got: Vec<String> = parse(Path::new("/certs"), registry, text)
            .unwrap()
            .iter()
            .map(|e| {
                let c = e.capabilities;
                let caps = [(c.pull, "pull"), (c.resolve, "resolve"), (c.push, "push")]
                    .iter()
                    .filter(|c| c.0)
                    .map(|c| c.1)
                    .collect::<Vec<_>>();
                format!(
                    "{:?} {}{} {} verify={}",
                    e.scheme,
                    e.authority,
                    e.path,
                    caps.join("+"),
                    !e.tls.skip_verify
                )
            })
            .collect();
        assert_eq!(got, want);
    }

    #[test]
    fn hosts_are_asked_in_the_order_of_the_file() {
        check(
            "docker.io",
            r#"
server = "https://docker.example"
[host."https://z.example/hub"]
  capabilities = ["pull", "resolve"]
  skip_verify = true
[host."http://a.example:5000"]
[host."https://b.example/x/v2"]
  override_path = true
  capabilities = ["pull"]
  [host."https://b.example/x/v2".header]
    x-key = ["1", "2"]
"#,
            &[
                "Https z.example/hub/v2 pull+resolve verify=false",
                "Http a.example:5000/v2 pull+resolve+push verify=true",
                "Https b.example/x/v2 pull verify=true",
                "Https docker.example/v2 pull+resolve+push verify=true",
            ],
        );
        check(
            "docker.io",
            "ca = \"x.crt\"",
            &["Https registry-1.docker.io/v2 pull+resolve+push verify=true"],
        );
        check(
            "localhost:5000",
            "capabilities = [\"pull\"]",
            &["Either localhost:5000/v2 pull verify=false"],
        );
    }

    #[test]
    fn certificates_are_found_beside_the_file() {
        let text = "server = \"https://s\"\nca = [\"a.crt\", \"/abs/b.crt\"]\nclient = [\"both.pem\", [\"c.cert\", \"c.key\"]]\ndial_timeout = \"1m30s\"";
        let e = &parse(Path::new("/certs"), "s", text).unwrap()[0];
        assert_eq!(e.tls.ca, [PathBuf::from("/certs/a.crt"), PathBuf::from("/abs/b.crt")]);
        assert_eq!(e.tls.keypair[0].key, PathBuf::from("/certs/both.pem"));
        assert_eq!(e.tls.keypair[1].key, PathBuf::from("/certs/c.key"));
        assert_eq!(e.dial_timeout, Some(Duration::from_secs(90)));
    }

    #[test]
    fn a_directory_may_hold_certificates_only() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("r.io_5000_");
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(dir.join("ca.crt"), "").unwrap();
        let e = &load(root.path(), "r.io:5000").unwrap().unwrap()[0];
        assert_eq!(e.tls.ca, [dir.join("ca.crt")]);
        assert!(load(root.path(), "other.io").unwrap().is_none());
        assert!(load(root.path(), "..").unwrap().is_none());
    }

    #[test]
    fn mistakes_are_named() {
        for bad in [
            "capabilities = [\"fly\"]",
            "server = \"https://\"",
            "[host.\"https://x\"]\ndial_timeout = \"5 apples\"",
            "dial_timeout = \"24h\"",
            "dial_timeout = \"-1s\"",
            "server = 5",
        ] {
            assert!(parse(Path::new("/"), "r.io", bad).is_err(), "{bad}");
        }
    }
}
