//! Identities: what is known of a caller.

use shipway_fault::{Code, Fault, Result};
use shipway_grpc::PeerCertificate;
use std::collections::BTreeMap;

/// Longest name of an identity.
const MAX_NAME: usize = 1024;

/// How a caller was recognized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IdentityKind {
    /// By the kernel, on a unix socket.
    Local,
    /// By a client certificate.
    Certificate,
    /// By a token of an OIDC issuer.
    Oidc,
    /// By a token that the Kubernetes API knows.
    Kubernetes,
}

impl IdentityKind {
    /// Its name in policies and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Local => "unix",
            Self::Certificate => "certificate",
            Self::Oidc => "oidc",
            Self::Kubernetes => "kubernetes",
        }
    }
}

/// What is known of a caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    kind: IdentityKind,
    name: String,
    claims: BTreeMap<String, Vec<String>>,
}

impl Identity {
    /// The identity `name`, of which `claims` are known. Names get into logs and records, so one
    /// that is empty, very long or not printable is refused.
    pub(crate) fn new(
        kind: IdentityKind,
        name: String,
        claims: BTreeMap<String, Vec<String>>,
    ) -> Result<Self> {
        if name.is_empty() || name.len() > MAX_NAME || name.contains(char::is_control) {
            return Err(unauthenticated(format!(
                "the name of a caller must be printable and have at most {MAX_NAME} bytes"
            )));
        }
        Ok(Self { kind, name, claims })
    }

    /// The holder of a certificate: its SPIFFE id, or `cert:` and its common name, or the first of
    /// its other names.
    pub(crate) fn of_certificate(certificate: &PeerCertificate) -> Result<Self> {
        let PeerCertificate { common_names, dns, uris, emails } = certificate;
        let spiffe = uris.iter().find(|uri| uri.starts_with("spiffe://"));
        let other = || [common_names, uris, dns, emails].into_iter().find_map(|all| all.first());
        let name = match (spiffe, other()) {
            (Some(spiffe), _) => spiffe.clone(),
            (None, Some(name)) => format!("cert:{name}"),
            (None, None) => {
                return Err(unauthenticated("the client's certificate has no name")
                    .hint("give it a common name or an alternative name"));
            }
        };
        let claims = [("cn", common_names), ("dns", dns), ("uri", uris), ("email", emails)];
        let claims = claims.map(|(key, values)| (key.to_owned(), values.clone()));
        Self::new(IdentityKind::Certificate, name, claims.into())
    }

    /// How it was recognized.
    pub fn kind(&self) -> IdentityKind {
        self.kind
    }

    /// What it is called: unique among all identities, such as `unix:1000`, `cert:alice`,
    /// `spiffe://…`, `github:repo:org/name:ref:refs/heads/main` or
    /// `kubernetes:system:serviceaccount:team:builder`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The values of a claim; `kind` is one of all identities.
    pub fn claim(&self, key: &str) -> Vec<&str> {
        match key {
            "kind" => vec![self.kind.as_str()],
            key => self.claims.get(key).into_iter().flatten().map(String::as_str).collect(),
        }
    }
}

/// A fault for a caller who is not known.
#[track_caller]
pub(crate) fn unauthenticated(why: impl Into<std::borrow::Cow<'static, str>>) -> Fault {
    Fault::new(Code::Unauthenticated, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificate(cn: &[&str], dns: &[&str], uris: &[&str]) -> PeerCertificate {
        let owned = |all: &[&str]| all.iter().map(|s| (*s).to_owned()).collect();
        PeerCertificate {
            common_names: owned(cn),
            dns: owned(dns),
            uris: owned(uris),
            emails: Vec::new(),
        }
    }

    #[test]
    fn a_certificate_is_called_by_its_spiffe_id_or_by_its_own_name() {
        let name = |c: PeerCertificate| {
            Identity::of_certificate(&c).map(|i| i.name).map_err(|f| f.to_string())
        };
        assert_eq!(name(certificate(&["alice"], &["a.test"], &[])).unwrap(), "cert:alice");
        assert_eq!(name(certificate(&[], &["a.test"], &[])).unwrap(), "cert:a.test");
        let spiffe = "spiffe://trust.test/ns/x";
        assert_eq!(name(certificate(&["alice"], &[], &["https://x", spiffe])).unwrap(), spiffe);
        // A common name cannot pass for a SPIFFE id, or for a local user.
        assert_eq!(name(certificate(&[spiffe], &[], &[])).unwrap(), format!("cert:{spiffe}"));
        assert!(name(certificate(&[], &[], &[])).unwrap_err().contains("no name"));
        for bad in ["a\nb".to_owned(), "x".repeat(MAX_NAME + 1)] {
            assert!(name(certificate(&[&bad], &[], &[])).unwrap_err().contains("printable"));
        }
    }

    #[test]
    fn claims_are_found_by_their_names() {
        let identity = Identity::of_certificate(&certificate(&["a"], &["x", "y"], &[])).unwrap();
        assert_eq!(identity.claim("dns"), ["x", "y"]);
        assert_eq!(identity.claim("kind"), ["certificate"]);
        assert!(identity.claim("email").is_empty() && identity.claim("none").is_empty());
    }
}
