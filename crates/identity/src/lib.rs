//! Who calls the daemon, and what each may do (rows `dp.auth.*`).
//!
//! An [`Authenticator`] makes an [`Identity`] of a connection and of the token that came with a
//! request: a local user on a unix socket, a client certificate, a JSON Web Token of an OIDC
//! issuer, or a Kubernetes service account. A [`Caller`] is an identity with the [`Policy`]s that
//! apply to it; [`Caller::check`] is the one place where it is decided whether an [`Action`] is
//! allowed, and where the decision gets into the log (target `audit`) and is counted.
//!
//! A daemon without `[auth]` has one caller, [`Caller::unrestricted`], who may do everything.
//!
//! ```text
//! connection, token ── Authenticator ──▶ Identity ── policies ──▶ Caller ── check(Action)
//!                        │ oidc: JWT by keys of the issuer (RFC 7515, 7517, 7519)
//!                        └ kubernetes: TokenReview (authentication.k8s.io/v1)
//! ```
//!
//! Tokens never get into logs or errors. Of what comes from a token nothing is used before its
//! signature has been verified, but the issuer's name and the key's, by which the key is found
//! among those that are configured; addresses and keys inside of a token are never looked at.
//!
//! `ring` verifies signatures: it is what TLS uses here. Crates for JSON Web Tokens bring another
//! implementation of the same algorithms, and support more of them than are wanted.

mod authenticator;
mod caller;
mod config;
mod fetch;
mod identity;
mod jwk;
mod jwt;
mod kubernetes;
mod local;
mod oidc;
mod policy;

pub use authenticator::Authenticator;
pub use caller::Caller;
pub use config::{AuthConfig, KubernetesConfig, OidcConfig};
pub use identity::{Identity, IdentityKind};
pub use jwt::{MAX_TOKEN, SKEW};
pub use policy::{Action, Allow, Patterns, Policy};
