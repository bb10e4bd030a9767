//! Attributes of an http source (rows `src.http.attrs`, `src.http.hdr`).

use crate::{SourceSpec, keys, login::Login};
use http::Uri;
use serde::Serialize;
use shipway_fault::{Fault, Result};
use shipway_oci::Digest;

/// What the one file of a source is to look like.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Name; empty for the default.
    pub filename: String,
    /// Permissions; 0 for the default.
    pub perm: u32,
    pub uid: u32,
    pub gid: u32,
}

impl Shape {
    /// Takes the attribute if it is about the file.
    pub(crate) fn take(&mut self, key: &str, value: &str) -> Result<bool> {
        let number = || {
            number(value)
                .ok_or_else(|| Fault::invalid(format!("{key}={value:?} is wrong: want a number")))
        };
        match key {
            "http.filename" => self.filename = value.to_owned(),
            "http.perm" => self.perm = number()?,
            "http.uid" => self.uid = number()?,
            "http.gid" => self.gid = number()?,
            _ => return Ok(false),
        }
        Ok(true)
    }
}

/// A parsed http source.
#[derive(Clone, Debug)]
pub(crate) struct HttpSpec {
    /// Address, without what is secret in it.
    pub uri: Uri,
    /// User and password in the address.
    pub login: Option<Login>,
    pub checksum: Option<Digest>,
    pub shape: Shape,
    /// Name of the secret with the `Authorization` header.
    pub auth_secret: String,
    /// Headers of the user's, sorted; only a few may be set.
    pub headers: Vec<(String, String)>,
    /// What the file must be signed with.
    pub signed: Option<Signed>,
}

/// A detached signature of the file, and the keys that may have made it (row `src.http.sig`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Signed {
    pub keys: String,
    pub signature: String,
}

#[derive(Serialize)]
struct RequestKey<'a> {
    uri: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    login: Option<&'a str>,
    filename: &'a str,
    perm: u32,
    uid: u32,
    gid: u32,
    secret: &'a str,
    headers: &'a [(String, String)],
}

impl HttpSpec {
    pub(crate) fn parse(spec: &SourceSpec) -> Result<Self> {
        let (uri, login) = super::address(&spec.identifier)?;
        let mut http = Self {
            uri,
            login,
            checksum: None,
            shape: Shape::default(),
            auth_secret: String::new(),
            headers: Vec::new(),
            signed: None,
        };
        for (key, value) in &spec.attrs {
            if http.shape.take(key, value)? {
                continue;
            }
            match key.as_str() {
                "http.checksum" => {
                    http.checksum =
                        Some(value.parse().map_err(|e| Fault::invalid(format!("{key}: {e}")))?)
                }
                "http.authheadersecret" => http.auth_secret.clone_from(value),
                "http.sig.pubkey" => http.signed.get_or_insert_default().keys.clone_from(value),
                "http.sig.signature" => {
                    http.signed.get_or_insert_default().signature.clone_from(value)
                }
                // It may ask for more than what is known here, and must not be passed over.
                k if k.starts_with("http.sig.") => {
                    return Err(Fault::unimplemented(format!(
                        "the attribute {k} of an http source"
                    )));
                }
                k => {
                    if let Some(name) = k.strip_prefix("http.header.").map(str::to_lowercase)
                        && matches!(name.as_str(), "accept" | "user-agent")
                    {
                        http.headers.push((name, value.clone()));
                    }
                }
            }
        }
        http.headers.sort();
        // Empty ones are as good as none, but only together: a single one was meant to verify
        // something.
        http.signed = http.signed.filter(|s| !s.keys.is_empty() || !s.signature.is_empty());
        if http.signed.as_ref().is_some_and(|s| s.keys.is_empty() || s.signature.is_empty()) {
            return Err(Fault::invalid("http signature verification requires both pubkey and signature").hint(
                "give armored PGP keys as http.sig.pubkey and the file's signature (gpg --armor --detach-sign) as http.sig.signature",
            ));
        }
        Ok(http)
    }

    /// Whether the client itself sends the file (row `cb.upload`).
    pub(crate) fn is_upload(&self) -> bool {
        self.uri.host() == Some("buildkit-session")
    }

    /// Identity of the request and of what is made of its answer.
    pub(crate) fn request_key(&self) -> Digest {
        let Self { shape: Shape { filename, perm, uid, gid }, auth_secret, headers, .. } = self;
        let login = self.login.as_ref().map(|l| l.0.as_str());
        keys::digest(
            "http.request",
            &RequestKey {
                uri: self.uri.to_string(),
                login,
                filename,
                perm: *perm,
                uid: *uid,
                gid: *gid,
                secret: auth_secret,
                headers,
            },
        )
    }
}

/// A number as Go's `ParseInt(s, 0, …)` reads it: `0o17` and `017` are octal, `0x` is hexadecimal.
fn number(text: &str) -> Option<u32> {
    let (digits, radix) = match text.as_bytes() {
        [b'0', b'x' | b'X', ..] => (&text[2..], 16),
        [b'0', b'o' | b'O', ..] => (&text[2..], 8),
        [b'0', b'b' | b'B', ..] => (&text[2..], 2),
        [b'0', _, ..] => (&text[1..], 8),
        _ => (text, 10),
    };
    u32::from_str_radix(digits, radix).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_as_go_does() {
        for (text, want) in [
            ("0600", Some(0o600)),
            ("0o755", Some(0o755)),
            ("0", Some(0)),
            ("1000", Some(1000)),
            ("0x10", Some(16)),
            ("-1", None),
            ("é", None),
        ] {
            assert_eq!(number(text), want, "{text}");
        }
    }
}
