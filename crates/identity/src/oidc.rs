//! Issuers of OpenID Connect: their keys, fetched and kept, and identities of their tokens.

use crate::{
    OidcConfig, fetch,
    identity::{Identity, IdentityKind, unauthenticated},
    jwk::{Algorithm, Keys},
    jwt::{Token, shown},
};
use http::Uri;
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::Value;
use shipway_fault::{Class, Context as _, Fault, Result};
use shipway_http::Client;
use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::{io::AsyncReadExt as _, time::Instant};

/// Keys are looked at again after this time.
const REFRESH: Duration = Duration::from_secs(3600);
/// Keys are looked at no more often than this, whatever tokens name.
const PAUSE: Duration = Duration::from_secs(10);
/// Keys of an issuer that cannot be asked any more are used for this time: its tokens are short.
const STALE: Duration = Duration::from_secs(24 * 3600);

/// Names that identities of other kinds have in front.
const RESERVED: [&str; 4] = ["unix", "cert", "spiffe", "kubernetes"];

/// Where keys come from.
enum Source {
    /// From the issuer, as its discovery document has it.
    Discovery { client: Box<Client>, document: Uri },
    /// From a file.
    File(PathBuf),
}

/// What discovery says (OpenID Connect Discovery 1.0, section 3).
#[derive(Deserialize)]
struct Metadata {
    issuer: String,
    jwks_uri: String,
}

impl Source {
    async fn read(&self, issuer: &str) -> Result<Keys> {
        let set: Value = match self {
            Self::Discovery { client, document } => {
                let metadata: Metadata = fetch::get(client, document).await?;
                if metadata.issuer != issuer {
                    let other = shown(&metadata.issuer);
                    return Err(Fault::invalid(format!(
                        "its discovery document is that of {other}"
                    ))
                    .with_class(Class::Environment));
                }
                fetch::get(client, &fetch::https(&metadata.jwks_uri)?).await?
            }
            Self::File(path) => {
                let failed = |e| Fault::io(format!("read {}", path.display()), e);
                let file = tokio::fs::File::open(path).await.map_err(failed)?;
                let (limit, mut bytes) = (fetch::MAX_DOCUMENT, Vec::new());
                file.take(limit + 1).read_to_end(&mut bytes).await.map_err(failed)?;
                if bytes.len() as u64 > limit {
                    return Err(Fault::invalid(format!("{} is too large", path.display())));
                }
                serde_json::from_slice(&bytes)
                    .map_err(|e| Fault::invalid(format!("{} is not JSON: {e}", path.display())))?
            }
        };
        Keys::of(&set)
    }
}

/// The keys that are known, and when they were looked at.
#[derive(Clone, Default)]
struct Known {
    keys: Option<Arc<Keys>>,
    read: Option<Instant>,
    /// The last time they were looked at, and how that failed.
    tried: Option<(Instant, Option<Fault>)>,
}

impl Known {
    /// The keys, if they may still be used.
    fn usable(&self, now: Instant) -> Option<&Arc<Keys>> {
        let read = self.read?;
        self.keys.as_ref().filter(|_| now.duration_since(read) < STALE)
    }

    fn is_fresh(&self, now: Instant) -> bool {
        self.read.is_some_and(|read| now.duration_since(read) < REFRESH)
    }

    fn may_try(&self, now: Instant) -> bool {
        self.tried.as_ref().is_none_or(|(tried, _)| now.duration_since(*tried) >= PAUSE)
    }
}

/// An issuer whose tokens are believed.
pub(crate) struct Issuer {
    name: String,
    issuer: String,
    audience: Vec<String>,
    source: Source,
    known: Mutex<Known>,
    /// Held while keys are read.
    reading: tokio::sync::Mutex<()>,
}

impl Issuer {
    /// The issuer of the configuration. Nothing is fetched yet.
    pub fn new(config: OidcConfig) -> Result<Self> {
        let OidcConfig { name, issuer, audience, jwks, ca } = config;
        let what = || format!("[[auth.oidc]] {name:?}");
        let is_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if name.is_empty() || !name.chars().all(is_name) || RESERVED.contains(&&*name) {
            let words =
                "name has to be of a-z, 0-9 and -, and none of unix, cert, spiffe and kubernetes";
            return Err(Fault::invalid(words).context(what()));
        }
        if audience.iter().all(String::is_empty) {
            return Err(Fault::invalid("audience is missing")
                .hint(
                    "tokens for other services would be taken: name what clients request them for",
                )
                .context(what()));
        }
        let address = fetch::https(&issuer).context(what)?;
        let source = match jwks {
            Some(file) => Source::File(file),
            None => Source::Discovery {
                document: fetch::https(&format!(
                    "{}/.well-known/openid-configuration",
                    address.to_string().trim_end_matches('/')
                ))?,
                client: Box::new(fetch::client(ca.as_ref()).context(what)?),
            },
        };
        Ok(Self {
            name,
            issuer,
            audience,
            source,
            known: Mutex::default(),
            reading: tokio::sync::Mutex::new(()),
        })
    }

    /// What names of its identities begin with.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it says of itself that it has issued `token`.
    pub fn issued(&self, token: &Token<'_>) -> bool {
        token.issuer() == Some(&self.issuer)
    }

    /// Who has the token, which this issuer is said to have issued.
    pub async fn identify(&self, token: Token<'_>) -> Result<Identity> {
        let keys = self.keys(token.key.as_deref(), token.algorithm).await?;
        let claims = token.verify(&keys, &self.issuer, &self.audience, SystemTime::now())?;
        let name = format!("{}:{}", self.name, claims.subject()?);
        let mut all = claims.all();
        all.insert("issuer".to_owned(), vec![self.name.clone()]);
        Identity::new(IdentityKind::Oidc, name, all)
    }

    /// The keys; looked at anew where they are old or do not have the one that is wanted.
    async fn keys(&self, id: Option<&str>, algorithm: Algorithm) -> Result<Arc<Keys>> {
        let good = |known: &Known| {
            let (now, is_there) = (Instant::now(), |keys: &&Arc<Keys>| keys.has(id, algorithm));
            known.usable(now).filter(|_| known.is_fresh(now)).filter(is_there).cloned()
        };
        if let Some(keys) = good(&self.known.lock()) {
            return Ok(keys);
        }
        let _reading = self.reading.lock().await;
        // Somebody else may have read them meanwhile.
        if let Some(keys) = good(&self.known.lock()) {
            return Ok(keys);
        }
        if self.known.lock().may_try(Instant::now()) {
            let read = self.source.read(&self.issuer).await;
            let mut known = self.known.lock();
            known.tried = Some((Instant::now(), read.as_ref().err().cloned()));
            match read {
                Ok(keys) => {
                    known.keys = Some(Arc::new(keys));
                    known.read = Some(Instant::now());
                }
                Err(error) => {
                    tracing::warn!(issuer = self.name, %error, "failed to look at the keys of an issuer of tokens");
                }
            }
        }
        let known = self.known.lock();
        match (known.usable(Instant::now()), &known.tried) {
            (Some(keys), _) if keys.has(id, algorithm) => Ok(keys.clone()),
            (Some(_), _) => Err(unauthenticated(format!(
                "the token is not valid: {} has no key {} for it",
                self.name,
                shown(id.unwrap_or_default())
            ))),
            (None, failed) => {
                let why = failed.as_ref().and_then(|(_, why)| why.as_ref());
                let why = why.map_or_else(|| "they are too old".to_owned(), ToString::to_string);
                Err(Fault::unavailable(format!("the keys of {} cannot be had: {why}", self.issuer))
                    .hint("tokens cannot be verified until the issuer answers the daemon"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jwt::tests::{ISSUER, Signer};
    use serde_json::json;
    use shipway_fault::Code;
    use std::path::Path;

    fn config(file: &Path) -> OidcConfig {
        OidcConfig {
            name: "test".into(),
            issuer: ISSUER.into(),
            audience: vec!["shipway".into()],
            jwks: Some(file.to_owned()),
            ca: None,
        }
    }

    #[test]
    fn issuers_are_configured_whole_or_not_at_all() {
        let said = |change: fn(&mut OidcConfig)| {
            let mut config = config(Path::new("/keys"));
            change(&mut config);
            Issuer::new(config).err().map(|f| f.to_string()).unwrap_or_default()
        };
        assert_eq!(said(|_| ()), "");
        for name in ["", "unix", "spiffe", "Git Hub", "a:b"] {
            let mut config = config(Path::new("/keys"));
            config.name = name.into();
            let said = Issuer::new(config).err().unwrap().to_string();
            assert!(said.contains("name has to be"), "{name}: {said}");
        }
        assert!(said(|c| c.audience.clear()).contains("audience is missing"));
        assert!(said(|c| c.audience = vec![String::new()]).contains("audience is missing"));
        assert!(said(|c| c.issuer = "http://issuer.test".into()).contains("https://"));
        assert!(
            said(|c| (c.jwks, c.ca) = (None, Some("/nowhere/ca.pem".into()))).contains("ca.pem")
        );
    }

    fn token(signer: &Signer, id: &str) -> String {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        let claims =
            json!({"iss": ISSUER, "sub": "me", "aud": "shipway", "exp": now + 300, "kind": "unix"});
        signer.sign(&json!({"alg": signer.algorithm(), "kid": id}), &claims)
    }

    async fn identify(issuer: &Issuer, token: &str) -> Result<Identity> {
        let token = Token::parse(token)?;
        assert!(issuer.issued(&token));
        issuer.identify(token).await
    }

    #[tokio::test(start_paused = true)]
    async fn keys_are_looked_at_again_when_one_is_missing_and_not_too_often() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("keys.json");
        let put = |keys: Value| std::fs::write(&file, json!({ "keys": keys }).to_string()).unwrap();
        let (old, new) = (Signer::p256(), Signer::ed25519());
        let issuer = Issuer::new(config(&file)).unwrap();
        // Nothing there yet: that is not the token's fault.
        let fault = identify(&issuer, &token(&old, "old")).await.unwrap_err();
        assert_eq!(fault.code(), Code::Unavailable, "{fault}");
        put(json!([old.jwk("old")]));
        assert_eq!(
            identify(&issuer, &token(&old, "old")).await.unwrap_err().code(),
            Code::Unavailable,
            "it was read again at once"
        );
        tokio::time::advance(PAUSE).await;
        let identity = identify(&issuer, &token(&old, "old")).await.unwrap();
        assert_eq!((identity.name(), identity.claim("issuer")), ("test:me", vec!["test"]));
        assert_eq!(identity.claim("kind"), ["oidc"], "a claim of the token was believed");
        // The keys are changed: the new one is found, if the last look was not just now.
        put(json!([new.jwk("new")]));
        let fault = identify(&issuer, &token(&new, "new")).await.unwrap_err();
        assert_eq!(fault.code(), Code::Unauthenticated, "{fault}");
        assert!(fault.to_string().contains("has no key \"new\""), "{fault}");
        identify(&issuer, &token(&old, "old")).await.unwrap();
        tokio::time::advance(PAUSE).await;
        identify(&issuer, &token(&new, "new")).await.unwrap();
        assert!(identify(&issuer, &token(&old, "old")).await.is_err(), "its key is gone");
        // Keys that cannot be had again are used for a day.
        std::fs::remove_file(&file).unwrap();
        tokio::time::advance(REFRESH).await;
        identify(&issuer, &token(&new, "new")).await.unwrap();
        tokio::time::advance(STALE - REFRESH).await;
        let fault = identify(&issuer, &token(&new, "new")).await.unwrap_err();
        assert_eq!(fault.code(), Code::Unavailable, "{fault}");
        let long = format!("[{}]", " ".repeat(usize::try_from(fetch::MAX_DOCUMENT).unwrap()));
        std::fs::write(&file, long).unwrap();
        tokio::time::advance(PAUSE).await;
        let fault = identify(&issuer, &token(&new, "new")).await.unwrap_err();
        assert!(fault.to_string().contains("too large"), "{fault}");
    }
}
