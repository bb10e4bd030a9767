//! One place to ask: how it is spoken to, and what it may be asked.

use crate::HostConfig;
use http::HeaderMap;
use shipway_http::{KeyPair, TlsSettings, is_loopback};
use std::{
    path::{Path, PathBuf},
    time::Duration,
};

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

/// What an endpoint must be able to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Capability {
    Pull,
    Resolve,
    Push,
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

    pub(crate) fn can(&self, need: Capability) -> bool {
        let c = self.capabilities;
        match need {
            Capability::Pull => c.pull,
            Capability::Resolve => c.pull && c.resolve,
            Capability::Push => c.push,
        }
    }

    pub(crate) fn may_be_plain(&self) -> bool {
        self.scheme == Scheme::Either
    }

    /// Applies `[registry."host"]`. Loopback hosts without settings may speak either way,
    /// unverified, as with containerd.
    pub(crate) fn with(mut self, config: &HostConfig) -> Result<Self, String> {
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
pub(crate) fn certificate_files(dir: &Path) -> Result<(Vec<PathBuf>, Vec<KeyPair>), String> {
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
