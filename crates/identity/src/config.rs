//! `[auth]` of the daemon's configuration.

use crate::Policy;
use serde::Deserialize;
use std::path::PathBuf;

/// Who may use the daemon, and for what. Without it everybody who reaches the daemon may do
/// everything.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AuthConfig {
    /// Issuers whose tokens are believed.
    pub oidc: Vec<OidcConfig>,
    /// The Kubernetes API, which is asked about other tokens.
    pub kubernetes: Option<KubernetesConfig>,
    /// What callers may do; who meets none of them may do nothing.
    pub policy: Vec<Policy>,
}

impl AuthConfig {
    /// Whether callers may be recognized by tokens, so that they need no certificate.
    pub fn takes_tokens(&self) -> bool {
        !self.oidc.is_empty() || self.kubernetes.is_some()
    }
}

/// An issuer of tokens.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OidcConfig {
    /// What names of its identities begin with, such as `github`.
    pub name: String,
    /// Its address, as tokens have it in `iss`.
    pub issuer: String,
    /// Tokens have to be for one of these (`aud`).
    pub audience: Vec<String>,
    /// A file with its keys (a JSON Web Key Set); they are fetched from it if there is none.
    pub jwks: Option<PathBuf>,
    /// A file of authorities that its certificate may come from, beside the machine's.
    pub ca: Option<PathBuf>,
}

/// How the Kubernetes API is reached. What is missing is what pods have.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KubernetesConfig {
    /// Its address.
    pub server: Option<String>,
    /// A file of authorities that its certificate may come from.
    pub ca: Option<PathBuf>,
    /// A file with the daemon's own token.
    #[serde(rename = "tokenFile")]
    pub token_file: Option<PathBuf>,
    /// Tokens have to be for one of these; if there are none, for the API itself.
    pub audience: Vec<String>,
}

impl Default for KubernetesConfig {
    fn default() -> Self {
        Self { server: None, ca: None, token_file: None, audience: vec!["shipway".to_owned()] }
    }
}
