//! The token of a job: a JWT that says which parts of a repository's cache it may read and write.
//!
//! Its signature is the service's to check. What is read here only chooses names.

use serde::Deserialize;
use shipway_fault::{Fault, Result};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Longest token.
pub(super) const MAX_TOKEN: usize = 64 << 10;
/// Most scopes that are looked into.
pub(super) const MAX_SCOPES: usize = 32;
/// Permission to write, among the bits.
const WRITE: u32 = 2;

/// A part of the cache: a branch or a pull request.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Scope {
    scope: String,
    permission: u32,
}

/// A token, and what it says.
pub(super) struct Token {
    /// As it is sent.
    pub text: String,
    scopes: Vec<Scope>,
    expires: SystemTime,
}

#[derive(Deserialize)]
struct Claims {
    ac: Option<String>,
    exp: Option<f64>,
    nbf: Option<f64>,
}

fn time(seconds: f64) -> Option<SystemTime> {
    UNIX_EPOCH.checked_add(Duration::try_from_secs_f64(seconds).ok()?)
}

impl Token {
    /// Reads a token that is valid at `now`.
    pub fn parse(text: &str, now: SystemTime) -> Result<Self> {
        // The text must not show up in an error.
        let invalid = |why: &str| {
            Fault::invalid(format!("the token of a GitHub Actions cache {why}"))
                .hint("it is the job's ACTIONS_RUNTIME_TOKEN")
        };
        if text.len() > MAX_TOKEN {
            return Err(invalid("is too long"));
        }
        let mut parts = text.split('.');
        let (Some(_), Some(claims), Some(_), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(invalid("is not a JSON web token"));
        };
        let claims = base64url(claims).ok_or_else(|| invalid("cannot be decoded"))?;
        let claims: Claims =
            serde_json::from_slice(&claims).map_err(|_| invalid("has no readable claims"))?;
        let scopes = claims.ac.ok_or_else(|| invalid("has no access controls"))?;
        let mut scopes: Vec<Scope> = serde_json::from_str(&scopes)
            .map_err(|_| invalid("has no readable access controls"))?;
        scopes.truncate(MAX_SCOPES);
        let expires = claims.exp.and_then(time).ok_or_else(|| invalid("has no expiration time"))?;
        let begins = claims.nbf.and_then(time).ok_or_else(|| invalid("has no issue time"))?;
        if now > expires {
            return Err(invalid("has expired"));
        }
        if now < begins {
            return Err(invalid("is not valid yet").hint("look at the clock of this machine"));
        }
        Ok(Self { text: text.to_owned(), scopes, expires })
    }

    /// Whether it is not valid any more.
    pub fn expired(&self) -> bool {
        SystemTime::now() > self.expires
    }

    /// What it may read.
    pub fn scopes(&self) -> impl Iterator<Item = &str> {
        self.scopes.iter().map(|s| s.scope.as_str())
    }

    /// What it may write: the last one that it may. Nothing is the empty scope.
    pub fn writable(&self) -> &str {
        let writable = self.scopes.iter().rev().find(|s| s.permission & WRITE != 0);
        writable.map_or("", |s| s.scope.as_str())
    }
}

/// Base64 for addresses, without padding (RFC 7515, section 2).
fn base64url(text: &str) -> Option<Vec<u8>> {
    let mut text = text.trim_end_matches('=').replace('-', "+").replace('_', "/");
    text.extend(std::iter::repeat_n('=', text.len().wrapping_neg() % 4));
    reqsign_core::hash::base64_decode(&text).ok()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A token with these access controls that is valid for an hour.
    pub fn token(scopes: &str) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        signed(&serde_json::json!({ "ac": scopes, "nbf": now - 60, "exp": now + 3600 }).to_string())
    }

    pub fn signed(claims: &str) -> String {
        let part = |text: &str| {
            let text = reqsign_core::hash::base64_encode(text.as_bytes());
            text.trim_end_matches('=').replace('+', "-").replace('/', "_")
        };
        format!("{}.{}.{}", part(r#"{"alg":"none"}"#), part(claims), part("signature"))
    }

    #[test]
    fn a_token_says_where_it_may_read_and_write() {
        let scopes = r#"[{"Scope":"refs/pull/1/merge","Permission":3},{"Scope":"refs/heads/main","Permission":1}]"#;
        let read = Token::parse(&token(scopes), SystemTime::now()).unwrap();
        assert_eq!(read.scopes().collect::<Vec<_>>(), ["refs/pull/1/merge", "refs/heads/main"]);
        assert_eq!(read.writable(), "refs/pull/1/merge");
        assert!(!read.expired());
        let last = r#"[{"Scope":"a","Permission":2},{"Scope":"b","Permission":3}]"#;
        assert_eq!(Token::parse(&token(last), SystemTime::now()).unwrap().writable(), "b");
        assert_eq!(Token::parse(&token("[]"), SystemTime::now()).unwrap().writable(), "");
    }

    #[test]
    fn what_is_no_token_is_not_shown() {
        let now = SystemTime::now();
        let good = token("[]");
        for (wrong, why) in [
            ("s3cret".to_owned(), "is not a JSON web token"),
            ("s3cret.s3cret.s3cret.s3cret".to_owned(), "is not a JSON web token"),
            ("s3cret.!!.s3cret".to_owned(), "cannot be decoded"),
            (signed("s3cret"), "has no readable claims"),
            (signed(r#"{"exp":1}"#), "has no access controls"),
            (signed(r#"{"ac":"s3cret"}"#), "has no readable access controls"),
            (signed(r#"{"ac":"[]","nbf":1}"#), "has no expiration time"),
            (signed(r#"{"ac":"[]","exp":1e300}"#), "has no expiration time"),
            (signed(r#"{"ac":"[]","exp":1,"nbf":0}"#), "has expired"),
            (signed(r#"{"ac":"[]","exp":1e11,"nbf":9e10}"#), "is not valid yet"),
            ("x".repeat(MAX_TOKEN + 1), "is too long"),
        ] {
            let fault = Token::parse(&wrong, now).map(drop).unwrap_err();
            assert!(fault.message().contains(why), "{fault}");
            assert!(!format!("{fault:?}").contains("s3cret"), "{fault:?}");
        }
        assert!(Token::parse(&good, now).is_ok());
        let many = vec![r#"{"Scope":"s","Permission":1}"#; MAX_SCOPES + 1].join(",");
        let many = Token::parse(&token(&format!("[{many}]")), now).unwrap();
        assert_eq!(many.scopes().count(), MAX_SCOPES);
    }
}
