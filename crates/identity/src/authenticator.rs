//! From a connection and a token to an identity.

use crate::{
    AuthConfig, Caller, Policy,
    caller::{nobody, not_recognized},
    identity::{Identity, unauthenticated},
    jwt::Token,
    kubernetes::TokenReviewer,
    local,
    oidc::Issuer,
};
use http::{HeaderMap, header};
use shipway_fault::{Context as _, Fault, Result};
use shipway_grpc::Peer;
use std::sync::Arc;

/// Recognizes callers, and finds the policies that apply to them.
pub struct Authenticator {
    issuers: Vec<Issuer>,
    kubernetes: Option<TokenReviewer>,
    policies: Vec<Arc<Policy>>,
}

impl Authenticator {
    /// An authenticator of this configuration, which is checked; nothing is fetched yet. Reads
    /// files.
    pub fn new(config: AuthConfig) -> Result<Self> {
        Self::with_variables(config, |name| std::env::var(name).ok())
    }

    fn with_variables(
        config: AuthConfig,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self> {
        let AuthConfig { oidc, kubernetes, policy } = config;
        if policy.is_empty() {
            return Err(Fault::invalid("[auth] lets nobody in: it has no [[auth.policy]]").hint(
                "add one for those who may build, and one for yourself, or leave [auth] out",
            ));
        }
        policy.iter().try_for_each(Policy::check).context(|| "[[auth.policy]]")?;
        let issuers: Vec<Issuer> = oidc.into_iter().map(Issuer::new).collect::<Result<_>>()?;
        for (n, issuer) in issuers.iter().enumerate() {
            if issuers[..n].iter().any(|other| other.name() == issuer.name()) {
                return Err(Fault::invalid(format!(
                    "[[auth.oidc]]: two issuers have the name {:?}",
                    issuer.name()
                )));
            }
        }
        let kubernetes =
            kubernetes.map(|config| TokenReviewer::new(config, variable)).transpose()?;
        Ok(Self { issuers, kubernetes, policies: policy.into_iter().map(Arc::new).collect() })
    }

    /// The caller of a request that came from `peer` with `headers`. A token counts more than the
    /// connection's own identity, and a bad one is not made up for by it.
    pub async fn caller(&self, peer: &Peer, headers: &HeaderMap) -> Result<Caller> {
        let identity = self.identity(peer, headers).await.inspect_err(|fault| {
            let peer = match (peer.uid, peer.address) {
                (Some(uid), _) => format!("unix:{uid}"),
                (None, Some(address)) => address.to_string(),
                (None, None) => "unknown".to_owned(),
            };
            not_recognized(&peer, fault);
        })?;
        let policies = self.policies.iter().filter(|p| p.applies_to(&identity)).cloned().collect();
        Ok(Caller::new(identity, policies))
    }

    async fn identity(&self, peer: &Peer, headers: &HeaderMap) -> Result<Identity> {
        let mut tokens = headers.get_all(header::AUTHORIZATION).iter();
        let (token, more) = (tokens.next(), tokens.next());
        match (token, peer.uid, &peer.certificate) {
            _ if more.is_some() => Err(unauthenticated("the request has several tokens")),
            (Some(value), ..) => {
                let token = value.to_str().ok().and_then(bearer).ok_or_else(|| {
                    unauthenticated("the request's authorization cannot be read")
                        .hint("it has to be `Bearer` and a token")
                })?;
                self.of_token(peer, token).await
            }
            (None, Some(uid), _) => local::identity(uid, peer.gid),
            (None, None, Some(certificate)) => Identity::of_certificate(certificate),
            (None, None, None) => Err(nobody(self.what_helps(peer))),
        }
    }

    /// What somebody should show who shows nothing.
    fn what_helps(&self, peer: &Peer) -> String {
        if !peer.encrypted {
            return "use the unix socket, or TLS with a client certificate or a token".into();
        }
        match self.issuers.is_empty() && self.kubernetes.is_none() {
            true => "give a client certificate (--tlsdir, or --tlscert and --tlskey)".into(),
            false => {
                "give a client certificate (--tlsdir), or a token (--token-file or --auth=github)"
                    .into()
            }
        }
    }

    async fn of_token(&self, peer: &Peer, text: &str) -> Result<Identity> {
        if !peer.encrypted && peer.uid.is_none() {
            return Err(unauthenticated("a token came over a connection that is not encrypted")
                .hint("it has been seen by others: withdraw it, and use TLS"));
        }
        let parsed = Token::parse(text);
        let issuer = parsed.as_ref().ok().and_then(|t| self.issuers.iter().find(|i| i.issued(t)));
        match (parsed, issuer, &self.kubernetes) {
            (Ok(token), Some(issuer), _) => issuer.identify(token).await,
            // What form tokens have is the cluster's business.
            (_, _, Some(kubernetes)) => kubernetes.identify(text).await,
            (Err(fault), ..) if !self.issuers.is_empty() => Err(fault),
            (_, _, None) => {
                let fault = unauthenticated("no issuer that is configured has issued the token");
                let names: Vec<&str> = self.issuers.iter().map(Issuer::name).collect();
                Err(match names.is_empty() {
                    true => fault.hint("this daemon takes no tokens: use a client certificate"),
                    false => fault.hint(format!("tokens of {} are taken", names.join(", "))),
                })
            }
        }
    }
}

/// The token of an `Authorization` header (RFC 6750, section 2.1).
fn bearer(value: &str) -> Option<&str> {
    let (scheme, token) = value.split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Action, OidcConfig,
        jwt::tests::{ISSUER, Signer},
    };
    use serde_json::json;
    use shipway_fault::Code;
    use shipway_grpc::PeerCertificate;
    use std::time::SystemTime;

    fn config(text: &str) -> AuthConfig {
        toml::from_str(text).unwrap()
    }

    fn authenticator(keys: Option<&Signer>) -> (Authenticator, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("keys.json");
        let mut config = config(
            "[[policy]]\nname = 'local'\nclaims = { kind = 'unix' }\n\
             [[policy]]\nname = 'people'\nsubject = 'cert:*'\n\
             [[policy]]\nname = 'ci'\nsubject = 'ci:org/*'\nallow = { push = 'example.org/*' }\n",
        );
        if let Some(signer) = keys {
            std::fs::write(&file, json!({"keys": [signer.jwk("k")]}).to_string()).unwrap();
            config.oidc.push(OidcConfig {
                name: "ci".into(),
                issuer: ISSUER.into(),
                audience: vec!["shipway".into()],
                jwks: Some(file),
                ca: None,
            });
        }
        (Authenticator::with_variables(config, |_| None).unwrap(), dir)
    }

    fn tls(certificate: Option<&str>) -> Peer {
        let certificate = certificate.map(|cn| {
            Arc::new(PeerCertificate {
                common_names: vec![cn.to_owned()],
                ..PeerCertificate::default()
            })
        });
        Peer { encrypted: true, certificate, ..Peer::default() }
    }

    fn headers(values: &[&str]) -> HeaderMap {
        let pair = |v: &&str| (header::AUTHORIZATION, v.parse().unwrap());
        values.iter().map(pair).collect()
    }

    fn token(signer: &Signer, subject: &str) -> String {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        let claims = json!({"iss": ISSUER, "sub": subject, "aud": "shipway", "exp": now + 300});
        signer.sign(&json!({"alg": signer.algorithm(), "kid": "k"}), &claims)
    }

    #[tokio::test]
    async fn connections_and_tokens_are_identities() {
        let signer = Signer::ed25519();
        let (auth, _dir) = authenticator(Some(&signer));
        let name = async |peer: Peer, values: &[&str]| {
            let caller = auth.caller(&peer, &headers(values)).await;
            caller.map(|c| c.owner().unwrap().to_string()).map_err(|f| {
                assert_eq!(f.code(), Code::Unauthenticated, "{f:?}");
                f.to_string()
            })
        };
        let unix = || Peer { uid: Some(7), gid: Some(7), ..Peer::default() };
        assert_eq!(name(unix(), &[]).await.unwrap(), "unix:7");
        assert_eq!(name(tls(Some("ann")), &[]).await.unwrap(), "cert:ann");
        let good = token(&signer, "org/app");
        for scheme in ["Bearer", "bearer"] {
            let value = format!("{scheme} {good}");
            assert_eq!(name(tls(None), &[&value]).await.unwrap(), "ci:org/app");
            // A token says who it is for, whatever carries it.
            assert_eq!(name(tls(Some("ann")), &[&value]).await.unwrap(), "ci:org/app");
            assert_eq!(name(unix(), &[&value]).await.unwrap(), "ci:org/app");
            let said = name(Peer::default(), &[&value]).await.unwrap_err();
            assert!(said.contains("not encrypted"), "{said}");
            let said = name(tls(None), &[&value, &value]).await.unwrap_err();
            assert!(said.contains("several tokens"), "{said}");
        }
        assert!(name(tls(None), &[]).await.unwrap_err().contains("who calls"));
        assert!(name(Peer::default(), &[]).await.unwrap_err().contains("who calls"));
        // A bad token is not made up for by who brings it.
        let forged = token(&Signer::ed25519(), "org/app");
        for bad in
            [format!("Bearer {forged}"), "Bearer x".into(), "Basic eDp5".into(), "Bearer ".into()]
        {
            name(tls(Some("ann")), &[&bad]).await.unwrap_err();
            name(unix(), &[&bad]).await.unwrap_err();
        }
        let (auth, _dir) = authenticator(None);
        let value = format!("Bearer {good}");
        let fault = auth.caller(&tls(Some("ann")), &headers(&[&value])).await.unwrap_err();
        assert!(fault.to_string().contains("no issuer"), "{fault}");
        assert!(fault.hints().any(|h| h.contains("takes no tokens")), "{fault:?}");
    }

    #[tokio::test]
    async fn callers_have_the_policies_that_apply_to_them() {
        let signer = Signer::p256();
        let (auth, _dir) = authenticator(Some(&signer));
        let caller = async |subject: &str| {
            let value = format!("Bearer {}", token(&signer, subject));
            auth.caller(&tls(None), &headers(&[&value])).await.unwrap()
        };
        let ours = caller("org/app").await;
        ours.check(Action::Build).unwrap();
        ours.check(Action::Push("example.org/app")).unwrap();
        assert!(ours.check(Action::Store("example.org/app")).is_err());
        let others = caller("other/app").await;
        assert_eq!(others.check(Action::Ask).unwrap_err().code(), Code::PermissionDenied);
    }

    #[test]
    fn configurations_that_cannot_be_meant_are_refused() {
        let said = |text: &str| {
            let made = Authenticator::with_variables(config(text), |_| None);
            made.err().expect("it was taken").to_string()
        };
        const ALL: &str = "[[policy]]\nname = 'all'\nsubject = '*'\n";
        assert!(said("").contains("lets nobody in"));
        assert!(said("[[policy]]\nname = 'x'\n").contains("applies to nobody"));
        assert!(said(&format!("{ALL}[kubernetes]\n")).contains("not a pod"));
        let issuer =
            "[[oidc]]\nname = 'a'\nissuer = 'https://a.test'\naudience = ['x']\njwks = '/k'\n";
        assert!(said(&format!("{ALL}{issuer}{issuer}")).contains("two issuers"));
        assert!(toml::from_str::<AuthConfig>("[[oidc]]\nhs256secret = 'x'").is_err());
    }
}
