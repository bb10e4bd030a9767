//! From a registry's name to the endpoints that may be asked: mirrors first, the origin last.

use crate::{HostConfig, RegistryConfig, hosts_toml};
use http::HeaderMap;
use shipway_http::{KeyPair, TlsSettings, is_loopback};
use std::{path::PathBuf, time::Duration};

/// What an endpoint may be asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Capabilities {
    pub pull: bool,
    pub resolve: bool,
    pub push: bool,
}

impl Capabilities {
    pub(crate) const ALL: Self = Self { pull: true, resolve: true, push: true };
    pub(crate) const READ: Self = Self { pull: true, resolve: true, push: false };
}

/// How an endpoint is spoken to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scheme {
    Https,
    Http,
    /// HTTPS, or plain HTTP when the other side does not speak TLS.
    Either,
}

/// One place to ask.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Endpoint {
    pub scheme: Scheme,
    /// Host and port.
    pub authority: String,
    /// Root of the API, such as `/v2`.
    pub path: String,
    pub capabilities: Capabilities,
    /// Sent with every request (`hosts.toml`).
    pub headers: HeaderMap,
    pub tls: TlsSettings,
    pub dial_timeout: Option<Duration>,
    /// Name of the registry that this endpoint stands in for, sent as `ns`.
    pub stands_for: Option<String>,
}

impl Endpoint {
    pub(crate) fn origin(registry: &str) -> Self {
        let authority = if registry == "docker.io" { "registry-1.docker.io" } else { registry };
        Self::at(authority, "/v2".into(), Capabilities::ALL)
    }

    pub(crate) fn at(authority: &str, path: String, capabilities: Capabilities) -> Self {
        Self {
            scheme: Scheme::Https,
            authority: authority.to_owned(),
            path,
            capabilities,
            headers: HeaderMap::new(),
            tls: TlsSettings::default(),
            dial_timeout: None,
            stands_for: None,
        }
    }

    /// What stands between the API's root and the repository's name (a mirror's `host/path`); part
    /// of token scopes.
    pub(crate) fn prefix(&self) -> &str {
        self.path.strip_prefix("/v2/").unwrap_or_default().trim_matches('/')
    }

    /// Applies `[registry."host"]`. Loopback hosts without settings may speak either way,
    /// unverified, as with containerd.
    fn with(mut self, config: &HostConfig) -> Result<Self, String> {
        let insecure = config.insecure.unwrap_or(false);
        let loopback = config.http.is_none() && is_loopback(host_of_authority(&self.authority));
        self.scheme = match (config.http, insecure) {
            (Some(true), false) => Scheme::Http,
            (Some(true), true) => Scheme::Either,
            _ if loopback => Scheme::Either,
            _ => Scheme::Https,
        };
        let mut tls = TlsSettings {
            ca: config.ca.clone(),
            keypair: config.keypair.clone(),
            skip_verify: insecure || loopback,
        };
        for dir in &config.tlsconfigdir {
            let (ca, keypair) = certificate_files(dir)?;
            tls.ca.extend(ca);
            tls.keypair.extend(keypair);
        }
        if loopback && !tls.ca.is_empty() && config.insecure.is_none() {
            tls.skip_verify = false;
        }
        self.tls = tls;
        Ok(self)
    }
}

/// The `*.crt` of a directory, and its `*.cert` with their `*.key`; nothing for a directory that is
/// missing or closed to us.
pub(crate) fn certificate_files(
    dir: &std::path::Path,
) -> Result<(Vec<PathBuf>, Vec<KeyPair>), String> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e)
            if matches!(
                e.kind(),
                std::io::ErrorKind::NotFound | std::io::ErrorKind::PermissionDenied
            ) =>
        {
            return Ok(Default::default());
        }
        Err(e) => return Err(format!("read {}: {e}", dir.display())),
    };
    let mut files: Vec<PathBuf> = entries.filter_map(|e| e.ok().map(|e| e.path())).collect();
    files.sort();
    let (mut ca, mut pairs) = (Vec::new(), Vec::new());
    for file in files {
        match file.extension().and_then(|e| e.to_str()) {
            Some("crt") => ca.push(file),
            Some("cert") => {
                let key = file.with_extension("key");
                // A certificate without its own key file may carry the key inside.
                pairs.push(KeyPair {
                    key: if key.exists() { key } else { file.clone() },
                    cert: file,
                });
            }
            _ => {}
        }
    }
    Ok((ca, pairs))
}

/// The endpoints of `registry`, in the order to ask. Reads files: call it where blocking is
/// allowed.
pub(crate) fn endpoints(
    config: &RegistryConfig,
    registry: &str,
    insecure: bool,
) -> Result<Vec<Endpoint>, String> {
    let mut endpoints = match (config.hosts.get(registry), &config.config_path) {
        (Some(host), _) => from_table(config, registry, host)?,
        (None, Some(dir)) => match hosts_toml::load(dir, registry)? {
            Some(found) => found,
            None => vec![Endpoint::origin(registry).with(&HostConfig::default())?],
        },
        (None, None) => vec![Endpoint::origin(registry).with(&HostConfig::default())?],
    };
    for endpoint in &mut endpoints {
        let origin = endpoint.authority == registry
            || (registry == "docker.io" && endpoint.authority == "registry-1.docker.io");
        endpoint.stands_for = (!origin).then(|| registry.to_owned());
        if insecure {
            endpoint.scheme =
                if endpoint.scheme == Scheme::Http { Scheme::Http } else { Scheme::Either };
            endpoint.tls.skip_verify = true;
        }
    }
    Ok(endpoints)
}

fn from_table(
    config: &RegistryConfig,
    registry: &str,
    host: &HostConfig,
) -> Result<Vec<Endpoint>, String> {
    let mut endpoints = Vec::with_capacity(host.mirrors.len() + 1);
    for mirror in &host.mirrors {
        // A mirror is `host` or `host/path`; some write the scheme, too.
        let (scheme, rest) = match mirror.split_once("://") {
            Some((s, rest)) => (Some(s), rest),
            None => (None, mirror.as_str()),
        };
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let path = match path.trim_matches('/') {
            "" | "v2" => "/v2".to_owned(),
            path => format!("/v2/{}", path.strip_prefix("v2/").unwrap_or(path)),
        };
        let own = config.hosts.get(authority).cloned().unwrap_or_default();
        let mut endpoint = Endpoint::at(authority, path, Capabilities::READ).with(&own)?;
        match scheme {
            Some("http") => endpoint.scheme = Scheme::Http,
            Some("https") | None => {}
            Some(other) => {
                return Err(format!(
                    "the mirror {mirror:?} of {registry} has the scheme {other:?}: want http or https"
                ));
            }
        }
        endpoints.push(endpoint);
    }
    endpoints.push(Endpoint::origin(registry).with(host)?);
    Ok(endpoints)
}

/// The host of `host[:port]` or `[v6]:port`.
pub(crate) fn host_of_authority(authority: &str) -> &str {
    if let Some(v6) = authority.strip_prefix('[') {
        return v6.split(']').next().unwrap_or_default();
    }
    match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) && !host.contains(':') => {
            host
        }
        _ => authority,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(toml: &str) -> RegistryConfig {
        RegistryConfig { hosts: toml::from_str(toml).unwrap(), ..Default::default() }
    }

    #[track_caller]
    fn check(toml: &str, registry: &str, want: &[&str]) {
        let got: Vec<String> = endpoints(&config(toml), registry, false)
            .unwrap()
            .iter()
            .map(|e| {
                format!(
                    "{:?} {}{} verify={} push={} ns={:?}",
                    e.scheme,
                    e.authority,
                    e.path,
                    !e.tls.skip_verify,
                    e.capabilities.push,
                    e.stands_for
                )
            })
            .collect();
        assert_eq!(got, want);
    }

    #[test]
    fn names_become_endpoints() {
        check("", "docker.io", &["Https registry-1.docker.io/v2 verify=true push=true ns=None"]);
        check("", "localhost:5000", &["Either localhost:5000/v2 verify=false push=true ns=None"]);
        check("", "127.0.0.2:5000", &["Either 127.0.0.2:5000/v2 verify=false push=true ns=None"]);
        check("", "[::1]:5000", &["Either [::1]:5000/v2 verify=false push=true ns=None"]);
        check("", "r.io", &["Https r.io/v2 verify=true push=true ns=None"]);
        check("[\"r.io\"]\nhttp = true", "r.io", &["Http r.io/v2 verify=true push=true ns=None"]);
        check(
            "[\"r.io\"]\ninsecure = true",
            "r.io",
            &["Https r.io/v2 verify=false push=true ns=None"],
        );
        check(
            "[\"r.io\"]\nhttp = true\ninsecure = true",
            "r.io",
            &["Either r.io/v2 verify=false push=true ns=None"],
        );
    }

    #[test]
    fn what_is_called_insecure_may_be_plain_and_is_not_verified() {
        for (toml, scheme) in [("", Scheme::Either), ("[\"r.io\"]\nhttp = true", Scheme::Http)] {
            let all = endpoints(&config(toml), "r.io", true).unwrap();
            assert_eq!(
                (all.len(), all[0].scheme, all[0].tls.skip_verify),
                (1, scheme, true),
                "{toml}"
            );
        }
    }

    #[test]
    fn mirrors_come_first_with_their_own_settings() {
        check(
            "[\"docker.io\"]\nmirrors = [\"m.io\", \"p.io:5/proxy/hub\"]\n[\"m.io\"]\nhttp = true",
            "docker.io",
            &[
                "Http m.io/v2 verify=true push=false ns=Some(\"docker.io\")",
                "Https p.io:5/v2/proxy/hub verify=true push=false ns=Some(\"docker.io\")",
                "Https registry-1.docker.io/v2 verify=true push=true ns=None",
            ],
        );
    }

    #[test]
    fn mistakes_in_the_table_are_refused() {
        assert!(
            toml::from_str::<std::collections::BTreeMap<String, HostConfig>>(
                "[\"r.io\"]\nhtpp = true"
            )
            .is_err()
        );
        assert!(endpoints(&config("[\"r.io\"]\nmirrors = [\"ftp://x\"]"), "r.io", false).is_err());
    }
}
