//! Kubernetes service accounts: tokens that the cluster's API is asked about by a TokenReview
//! (`authentication.k8s.io/v1`).

use crate::{
    KubernetesConfig, fetch,
    identity::{Identity, IdentityKind, unauthenticated},
    jwt::MAX_TOKEN,
};
use http::Uri;
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::json;
use shipway_fault::{Class, Code, Context as _, Fault, Result};
use shipway_http::Client;
use shipway_oci::Digest;
use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::time::Instant;

/// How long an answer counts: as long as a token is still taken that was withdrawn.
const KEPT: Duration = Duration::from_secs(30);
/// How many answers are kept.
const MAX_KEPT: usize = 1024;
/// Where pods have what they need to talk to the API.
const POD: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// Asks the API about tokens.
pub(crate) struct TokenReviewer {
    client: Client,
    reviews: Uri,
    token_file: PathBuf,
    audience: Vec<String>,
    /// By the digests of tokens.
    kept: Mutex<HashMap<Digest, (Instant, Result<Identity>)>>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Review {
    status: Status,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Status {
    authenticated: bool,
    user: User,
    audiences: Vec<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct User {
    username: String,
    uid: String,
    groups: Vec<String>,
    extra: BTreeMap<String, Vec<String>>,
}

impl Status {
    /// Who it is about, if it says that the token is good and for one of `audience`.
    fn identity(self, audience: &[String]) -> Result<Identity> {
        let Self { authenticated, user, audiences } = self;
        let refused = |why| {
            unauthenticated(format!("the token is not valid: the Kubernetes API says {why}")).hint(
                "request one for the daemon: a projected volume with the audience, or `kubectl create token --audience`",
            )
        };
        if !authenticated {
            return Err(refused("that it does not know it, or not for this audience"));
        }
        // An API that knows nothing of audiences would take tokens that are for itself.
        if !audience.is_empty() && !audience.iter().any(|a| audiences.contains(a)) {
            return Err(refused("that it is for another audience"));
        }
        let mut claims: BTreeMap<String, Vec<String>> = user.extra;
        claims.insert("username".into(), vec![user.username.clone()]);
        claims.insert("uid".into(), vec![user.uid]);
        claims.insert("group".into(), user.groups);
        // Only from here: names among the extra ones mean nothing.
        claims.remove("namespace");
        claims.remove("serviceaccount");
        let account = user.username.strip_prefix("system:serviceaccount:");
        if let Some((namespace, name)) = account.and_then(|account| account.split_once(':')) {
            claims.insert("namespace".into(), vec![namespace.to_owned()]);
            claims.insert("serviceaccount".into(), vec![name.to_owned()]);
        }
        if user.username.is_empty() {
            return Err(refused("nothing of whose it is"));
        }
        Identity::new(IdentityKind::Kubernetes, format!("kubernetes:{}", user.username), claims)
    }
}

impl TokenReviewer {
    /// The API of the configuration, or that of the cluster which the daemon runs in, as
    /// `variable` says.
    pub fn new(
        config: KubernetesConfig,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self> {
        let KubernetesConfig { server, ca, token_file, audience } = config;
        let what = || "[auth.kubernetes]".to_owned();
        let server = match server {
            Some(server) => server,
            None => {
                let host = variable("KUBERNETES_SERVICE_HOST");
                let (Some(host), Some(port)) = (host, variable("KUBERNETES_SERVICE_PORT")) else {
                    return Err(Fault::invalid("server is missing, and this is not a pod")
                        .hint("give the API's address, a CA and a file with a token")
                        .context(what()));
                };
                let host = if host.contains(':') { format!("[{host}]") } else { host };
                format!("https://{host}:{port}")
            }
        };
        let own = |name: &str| Path::new(POD).join(name);
        let ca = ca.or_else(|| Some(own("ca.crt")).filter(|path| path.exists()));
        let reviews =
            format!("{}/apis/authentication.k8s.io/v1/tokenreviews", server.trim_end_matches('/'));
        Ok(Self {
            client: fetch::client(ca.as_ref()).context(what)?,
            reviews: fetch::https(&reviews).context(what)?,
            token_file: token_file.unwrap_or_else(|| own("token")),
            audience,
            kept: Mutex::default(),
        })
    }

    /// Who has the token.
    pub async fn identify(&self, token: &str) -> Result<Identity> {
        if token.len() > MAX_TOKEN {
            return Err(unauthenticated(format!("the token has more than {MAX_TOKEN} bytes")));
        }
        let hash = Digest::of(token);
        let now = Instant::now();
        if let Some((until, known)) = self.kept.lock().get(&hash)
            && *until > now
        {
            return known.clone();
        }
        let identity = self.review(token).await?.identity(&self.audience);
        let mut kept = self.kept.lock();
        if kept.len() >= MAX_KEPT {
            kept.retain(|_, (until, _)| *until > now);
        }
        if kept.len() >= MAX_KEPT {
            kept.clear();
        }
        kept.insert(hash, (now + KEPT, identity.clone()));
        identity
    }

    async fn review(&self, token: &str) -> Result<Status> {
        // Pods' tokens are replaced every hour.
        let own = tokio::fs::read_to_string(&self.token_file)
            .await
            .map_err(|e| Fault::io(format!("read {}", self.token_file.display()), e));
        let review = json!({
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": { "token": token, "audiences": self.audience },
        });
        let asked = async {
            let own = own?;
            fetch::post::<Review>(&self.client, &self.reviews, own.trim(), review.to_string()).await
        };
        match asked.await {
            Ok(review) => Ok(review.status),
            Err(error) => {
                tracing::warn!(%error, "failed to ask the Kubernetes API about a token");
                let fault =
                    Fault::unavailable("the Kubernetes API does not say whose the token is")
                        .with_class(Class::Environment);
                Err(match error.code() {
                    Code::PermissionDenied => fault.hint("the daemon's service account may not create tokenreviews: bind it to the cluster role system:auth-delegator"),
                    _ => fault.hint("the daemon's log says why"),
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(status: serde_json::Value, audience: &[&str]) -> Result<Identity> {
        let audience: Vec<String> = audience.iter().map(|a| (*a).to_owned()).collect();
        let review: Review = serde_json::from_value(json!({ "status": status })).unwrap();
        review.status.identity(&audience)
    }

    #[test]
    fn a_review_gives_a_service_account_with_its_namespace() {
        let user = json!({
            "username": "system:serviceaccount:team:builder", "uid": "u1",
            "groups": ["system:serviceaccounts", "system:serviceaccounts:team"],
            "extra": {"authentication.kubernetes.io/pod-name": ["p"], "namespace": ["forged"]},
        });
        let good = json!({"authenticated": true, "user": user, "audiences": ["shipway"]});
        let found = identity(good.clone(), &["shipway"]).unwrap();
        assert_eq!(found.name(), "kubernetes:system:serviceaccount:team:builder");
        assert_eq!(
            (found.claim("namespace"), found.claim("serviceaccount")),
            (vec!["team"], vec!["builder"])
        );
        assert_eq!(found.claim("authentication.kubernetes.io/pod-name"), ["p"]);
        assert_eq!(found.claim("group").len(), 2);
        identity(good.clone(), &[]).unwrap();
        let why = identity(good, &["other"]).unwrap_err().to_string();
        assert!(why.contains("another audience"), "{why}");
        let person = json!({"authenticated": true, "user": {"username": "ann"}});
        let person = identity(person, &[]).unwrap();
        assert!(person.name() == "kubernetes:ann" && person.claim("namespace").is_empty());
        for bad in [
            json!({"authenticated": false, "user": {"username": "ann"}}),
            json!({"user": {"username": "ann"}}),
            json!({"authenticated": true}),
            json!({}),
        ] {
            assert_eq!(identity(bad, &[]).unwrap_err().code(), Code::Unauthenticated);
        }
    }

    #[test]
    fn the_api_is_the_configured_one_or_the_clusters() {
        let variable = |name: &str| match name {
            "KUBERNETES_SERVICE_HOST" => Some("fd00::1".to_owned()),
            "KUBERNETES_SERVICE_PORT" => Some("443".to_owned()),
            _ => None,
        };
        let of = |server: Option<&str>, variable: &dyn Fn(&str) -> Option<String>| {
            let server = server.map(str::to_owned);
            let config = KubernetesConfig { server, ..KubernetesConfig::default() };
            TokenReviewer::new(config, variable)
                .map(|r| r.reviews.to_string())
                .map_err(|f| f.to_string())
        };
        const PATH: &str = "/apis/authentication.k8s.io/v1/tokenreviews";
        assert_eq!(of(None, &variable).unwrap(), format!("https://[fd00::1]:443{PATH}"));
        assert_eq!(
            of(Some("https://api.test/"), &variable).unwrap(),
            format!("https://api.test{PATH}")
        );
        assert!(of(Some("http://api.test"), &variable).unwrap_err().contains("https://"));
        assert!(of(None, &|_| None).unwrap_err().contains("not a pod"));
    }
}
