//! Docker's configuration file: credentials for registries (plain, in a store, or with a helper per
//! registry, row `cb.auth.cred`) and the proxies of builds. Clients of the builder read it for
//! their user, the snapshotter for the machine.
//!
//! Dependencies worth a word: `tokio` runs credential helpers with a time limit.

#![cfg_attr(test, allow(clippy::unwrap_used))]

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use base64::{
    Engine,
    alphabet::STANDARD,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use serde::Deserialize;
use shipway_fault::{Code, Fault, Result};
use tokio::{io::AsyncWriteExt, process::Command};

/// Docker Hub's name in the configuration, whatever host is asked.
const HUB_KEY: &str = "https://index.docker.io/v1/";
const HUB_HOSTS: [&str; 3] = ["registry-1.docker.io", "docker.io", "index.docker.io"];
/// A helper may ask its user; it may not hang for ever.
const HELPER_LIMIT: Duration = Duration::from_secs(60);
const MAX_CONFIG: u64 = 4 << 20;
/// Old versions wrote passwords without padding.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Docker's configuration, as far as it concerns registries and builds.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DockerConfig {
    auths: BTreeMap<String, Login>,
    cred_helpers: BTreeMap<String, String>,
    creds_store: String,
    proxies: BTreeMap<String, BTreeMap<String, String>>,
    /// Where it is.
    #[serde(skip)]
    dir: Option<PathBuf>,
    /// How to speak TLS with token servers, by registry.
    #[serde(skip)]
    tls: BTreeMap<String, AuthTls>,
}

/// TLS settings for servers that issue tokens for a registry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AuthTls {
    /// Files of root certificates besides the machine's.
    pub ca: Vec<PathBuf>,
    /// Client certificates: files of a certificate and its key.
    pub keypairs: Vec<(PathBuf, PathBuf)>,
    /// Whether any certificate will do.
    pub insecure: bool,
}

#[derive(Clone, Default, Deserialize)]
#[serde(default)]
struct Login {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
    registrytoken: String,
}

impl std::fmt::Debug for Login {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Login(…)")
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Helped {
    #[serde(default)]
    username: String,
    #[serde(default)]
    secret: String,
}

/// Name and secret; without a name the secret is an identity token.
pub type Found = (String, String);

impl DockerConfig {
    /// Where the configuration is: `$DOCKER_CONFIG`, or `.docker` in the home directory.
    pub fn default_path() -> Option<PathBuf> {
        let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let dir = set("DOCKER_CONFIG").or_else(|| Some(set("HOME")?.join(".docker")))?;
        Some(dir.join("config.json"))
    }

    /// Reads `path`; what is not there is empty.
    pub fn load(path: &Path) -> Result<Self> {
        use std::io::Read;
        let what = || format!("read Docker's configuration {}", path.display());
        let dir = path.parent().map(Path::to_owned);
        let file = match std::fs::File::open(path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self { dir, ..Self::default() });
            }
            file => file.map_err(|e| Fault::io(what(), e))?,
        };
        let mut data = Vec::new();
        file.take(MAX_CONFIG).read_to_end(&mut data).map_err(|e| Fault::io(what(), e))?;
        let config: Self = serde_json::from_slice(&data)
            .map_err(|e| Fault::invalid(format!("{}: {e}", what())))?;
        Ok(Self { dir, ..config })
    }

    /// Where it is.
    pub fn dir(&self) -> Option<PathBuf> {
        self.dir.clone()
    }

    /// Sets how to speak TLS with token servers, by registry.
    pub fn set_tls(&mut self, tls: BTreeMap<String, AuthTls>) {
        self.tls = tls;
    }

    /// What was set of it.
    pub fn tls(&self) -> &BTreeMap<String, AuthTls> {
        &self.tls
    }

    /// The login for `host`, if it is here and not with a helper.
    fn login(&self, host: &str) -> Option<&Login> {
        let key = if HUB_HOSTS.contains(&host) { HUB_KEY } else { host };
        self.auths.get(key).or_else(|| {
            self.auths
                .iter()
                .find(|(k, _)| host_of_key(k) == host_of_key(key))
                .map(|(_, login)| login)
        })
    }

    /// A bearer token for `host` that was configured as it is.
    pub fn registry_token(&self, host: &str) -> Option<String> {
        self.login(host).map(|login| login.registrytoken.clone()).filter(|token| !token.is_empty())
    }

    /// The proxies that builds get, as build arguments: the `default` ones, in upper and lower
    /// case.
    pub fn proxy_args(&self) -> Vec<(String, String)> {
        let known = [
            ("httpProxy", "HTTP_PROXY"),
            ("httpsProxy", "HTTPS_PROXY"),
            ("noProxy", "NO_PROXY"),
            ("ftpProxy", "FTP_PROXY"),
            ("allProxy", "ALL_PROXY"),
        ];
        let proxies = self.proxies.get("default");
        let set = known
            .iter()
            .filter_map(|(key, name)| Some((*name, proxies?.get(*key).filter(|v| !v.is_empty())?)));
        set.flat_map(|(name, value)| {
            [(name.to_owned(), value.clone()), (name.to_lowercase(), value.clone())]
        })
        .collect()
    }

    /// The credentials for `host`.
    pub async fn lookup(&self, host: &str) -> Result<Option<Found>> {
        let key = if HUB_HOSTS.contains(&host) { HUB_KEY } else { host };
        let helper = self
            .cred_helpers
            .get(key)
            .or_else(|| self.cred_helpers.get(host))
            .unwrap_or(&self.creds_store);
        if !helper.is_empty()
            && let Some(found) = ask(helper, key).await?
        {
            return Ok(Some(found));
        }
        self.login(host).map(plain).transpose().map(Option::flatten)
    }
}

/// The host in a key of the configuration, which may be a URL; with its port if it has one.
pub fn host_of_key(key: &str) -> &str {
    let key = key.trim_start_matches("https://").trim_start_matches("http://");
    key.split('/').next().unwrap_or_default()
}

fn plain(login: &Login) -> Result<Option<Found>> {
    if !login.identitytoken.is_empty() {
        return Ok(Some((String::new(), login.identitytoken.clone())));
    }
    if login.auth.is_empty() {
        return Ok(
            (!login.password.is_empty()).then(|| (login.username.clone(), login.password.clone()))
        );
    }
    decode_auth(&login.auth).map(Some)
}

/// Reads the field `auth` of a login: name and password, as in HTTP's basic authentication. What
/// Kubernetes passes on with a pull has it, too.
pub fn decode_auth(auth: &str) -> Result<Found> {
    let broken = || {
        Fault::invalid("Docker's configuration has a login that cannot be read")
            .hint("log in again")
    };
    let text = BASE64
        .decode(auth.trim())
        .ok()
        .and_then(|data| String::from_utf8(data).ok())
        .ok_or_else(broken)?;
    let (name, password) = text.split_once(':').ok_or_else(broken)?;
    Ok((name.to_owned(), password.trim_matches('\0').to_owned()))
}

/// Asks the program `docker-credential-<helper>`.
async fn ask(helper: &str, key: &str) -> Result<Option<Found>> {
    let program = format!("docker-credential-{helper}");
    if helper.contains('/') {
        return Err(Fault::invalid(format!("{helper:?} cannot name a credential helper")));
    }
    let what = || format!("ask {program} for the credentials of {key}");
    let work = async {
        let mut child = Command::new(&program)
            .arg("get")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .map_err(|e| Fault::io(what(), e))?;
        if let Some(mut stdin) = child.stdin.take() {
            // A helper that has answered without reading needs no question.
            let _ = stdin.write_all(key.as_bytes()).await;
        }
        child.wait_with_output().await.map_err(|e| Fault::io(what(), e))
    };
    let output = tokio::time::timeout(HELPER_LIMIT, work).await.map_err(|_| {
        Fault::new(Code::DeadlineExceeded, format!("{}: no answer within a minute", what()))
    })??;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        if said.contains("credentials not found") || said.is_empty() {
            return Ok(None);
        }
        return Err(Fault::unknown(format!("{}: {said}", what())));
    }
    let helped: Helped = serde_json::from_slice(&output.stdout)
        .map_err(|e| Fault::invalid(format!("{}: {e}", what())))?;
    let name = if helped.username == "<token>" { String::new() } else { helped.username };
    Ok(Some((name, helped.secret)).filter(|(_, secret)| !secret.is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn logins_are_found_by_host() {
        let config: DockerConfig = serde_json::from_str(
            r#"{"auths":{
                "https://index.docker.io/v1/":{"auth":"aHViOnB3"},
                "https://r.example/v2/":{"auth":"dTpwOnE="},
                "token.example:5000":{"identitytoken":"t"},
                "broken.example":{"auth":"%"},
                "empty.example":{}},
              "proxies":{"default":{"httpProxy":"http://p"}},
              "other":1}"#,
        )
        .expect("reads");
        for (host, expected) in [
            ("registry-1.docker.io", Some(("hub", "pw"))),
            ("docker.io", Some(("hub", "pw"))),
            ("r.example", Some(("u", "p:q"))),
            ("token.example:5000", Some(("", "t"))),
            ("empty.example", None),
            ("unknown.example", None),
        ] {
            let found = config.lookup(host).await.expect(host);
            assert_eq!(found.as_ref().map(|(n, s)| (n.as_str(), s.as_str())), expected, "{host}");
        }
        assert!(config.lookup("broken.example").await.is_err());
        assert_eq!(
            config.proxy_args(),
            [("HTTP_PROXY".into(), "http://p".into()), ("http_proxy".into(), "http://p".into())]
        );
    }
}
