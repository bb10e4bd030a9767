//! Keys of issuers: JSON Web Key Sets (RFC 7517, RFC 7518 section 6, RFC 8037).

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use ring::signature::{
    ECDSA_P256_SHA256_FIXED, ED25519, RSA_PKCS1_2048_8192_SHA256, RsaPublicKeyComponents,
    UnparsedPublicKey,
};
use serde::Deserialize;
use serde_json::Value;
use shipway_fault::{Fault, Result};

/// Most keys of a set that are looked at.
pub(crate) const MAX_KEYS: usize = 100;
/// Longest number of a key, in bytes: RSA with 8192 bits.
const MAX_NUMBER: usize = 1024;
/// Coordinates on P-256, and points on Curve25519, have so many bytes.
const COORDINATE: usize = 32;

/// Algorithms that tokens may be signed with. All are for pairs of keys: what a key is published
/// for makes no signature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Algorithm {
    /// RSA with PKCS #1 v1.5 and SHA-256.
    Rs256,
    /// ECDSA on P-256 with SHA-256.
    Es256,
    /// Ed25519.
    EdDsa,
}

impl Algorithm {
    /// The one that is called `name` in headers and keys.
    pub fn of(name: &str) -> Option<Self> {
        match name {
            "RS256" => Some(Self::Rs256),
            "ES256" => Some(Self::Es256),
            "EdDSA" => Some(Self::EdDsa),
            _ => None,
        }
    }
}

/// The set as a document. Keys of kinds that are not known have other members.
#[derive(Default, Deserialize)]
struct Document {
    keys: Vec<Value>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Fields {
    kty: String,
    kid: Option<String>,
    #[serde(rename = "use")]
    usage: Option<String>,
    alg: Option<String>,
    crv: String,
    n: String,
    e: String,
    x: String,
    y: String,
}

/// A public key, which is for one algorithm.
enum Material {
    Rsa {
        n: Vec<u8>,
        e: Vec<u8>,
    },
    /// Uncompressed (SEC 1, section 2.3.3).
    P256(Vec<u8>),
    Ed25519(Vec<u8>),
}

struct Key {
    id: Option<String>,
    material: Material,
}

impl Key {
    /// The key, if it is one that signatures of tokens may be verified with.
    fn of(value: &Value) -> Option<Self> {
        let fields = Fields::deserialize(value).ok()?;
        let number = |text: &str| {
            let bytes = BASE64_URL_SAFE_NO_PAD.decode(text).ok()?;
            // Numbers of RSA keys may have been written with zeros in front.
            let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
            let bytes = bytes[zeros..].to_vec();
            (!bytes.is_empty() && bytes.len() <= MAX_NUMBER).then_some(bytes)
        };
        let coordinate = |text: &str| {
            let bytes = BASE64_URL_SAFE_NO_PAD.decode(text).ok()?;
            (bytes.len() == COORDINATE).then_some(bytes)
        };
        let (material, algorithm) = match (&*fields.kty, &*fields.crv) {
            ("RSA", _) => {
                let (n, e) = (number(&fields.n)?, number(&fields.e)?);
                (Material::Rsa { n, e }, Algorithm::Rs256)
            }
            ("EC", "P-256") => {
                let (x, y) = (coordinate(&fields.x)?, coordinate(&fields.y)?);
                (Material::P256([vec![4], x, y].concat()), Algorithm::Es256)
            }
            ("OKP", "Ed25519") => (Material::Ed25519(coordinate(&fields.x)?), Algorithm::EdDsa),
            _ => return None,
        };
        let fits = fields.alg.is_none_or(|alg| Algorithm::of(&alg) == Some(algorithm))
            && fields.usage.is_none_or(|usage| usage == "sig");
        fits.then_some(Self { id: fields.kid, material })
    }

    fn algorithm(&self) -> Algorithm {
        match self.material {
            Material::Rsa { .. } => Algorithm::Rs256,
            Material::P256(_) => Algorithm::Es256,
            Material::Ed25519(_) => Algorithm::EdDsa,
        }
    }

    fn verifies(&self, signed: &[u8], signature: &[u8]) -> bool {
        match &self.material {
            Material::Rsa { n, e } => RsaPublicKeyComponents { n, e }
                .verify(&RSA_PKCS1_2048_8192_SHA256, signed, signature)
                .is_ok(),
            Material::P256(point) => UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point)
                .verify(signed, signature)
                .is_ok(),
            Material::Ed25519(point) => {
                UnparsedPublicKey::new(&ED25519, point).verify(signed, signature).is_ok()
            }
        }
    }
}

/// The keys of an issuer.
pub(crate) struct Keys(Vec<Key>);

impl Keys {
    /// The keys of a set that can be used; there has to be one.
    pub fn of(set: &Value) -> Result<Self> {
        let document = Document::deserialize(set)
            .map_err(|_| Fault::invalid("it is not a JSON Web Key Set"))?;
        let keys: Vec<Key> = document.keys.iter().take(MAX_KEYS).filter_map(Key::of).collect();
        match keys.is_empty() {
            true => Err(Fault::invalid("it has no key for RS256, ES256 or EdDSA")),
            false => Ok(Self(keys)),
        }
    }

    /// The key `id` for `algorithm`; without an id the only one that there is.
    fn find(&self, id: Option<&str>, algorithm: Algorithm) -> Option<&Key> {
        let mut fitting = self.0.iter().filter(|key| {
            key.algorithm() == algorithm && id.is_none_or(|id| key.id.as_deref() == Some(id))
        });
        match (fitting.next(), fitting.next()) {
            (Some(only), None) => Some(only),
            _ => None,
        }
    }

    /// Whether there is a key that a token names so.
    pub fn has(&self, id: Option<&str>, algorithm: Algorithm) -> bool {
        self.find(id, algorithm).is_some()
    }

    /// Whether `signature` of `signed` is by the key `id`.
    pub fn verify(
        &self,
        id: Option<&str>,
        algorithm: Algorithm,
        signed: &[u8],
        signature: &[u8],
    ) -> bool {
        self.find(id, algorithm).is_some_and(|key| key.verifies(signed, signature))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const POINT: &str = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

    #[test]
    fn keys_that_cannot_verify_tokens_are_passed_over() {
        let ed = |more: Value| {
            let mut key = json!({"kty": "OKP", "crv": "Ed25519", "x": POINT});
            for (name, value) in more.as_object().unwrap() {
                key[name] = value.clone();
            }
            key
        };
        let usable = |key: Value| Keys::of(&json!({ "keys": [key] })).is_ok();
        assert!(usable(ed(json!({}))));
        assert!(usable(ed(json!({"alg": "EdDSA", "use": "sig", "x5c": ["ignored"]}))));
        for bad in [
            ed(json!({"use": "enc"})),
            ed(json!({"alg": "HS256"})),
            ed(json!({"alg": "RS256"})),
            ed(json!({"x": "AAAA"})),
            ed(json!({"x": "not base64!"})),
            ed(json!({"crv": "X25519"})),
            ed(json!({"kty": "oct", "k": POINT})),
            json!({"kty": "EC", "crv": "P-256", "x": POINT}),
            json!({"kty": "EC", "crv": "P-521", "x": POINT, "y": POINT}),
            json!({"kty": "RSA", "n": "", "e": "AQAB"}),
            json!({"kty": "RSA", "n": "A".repeat(2000), "e": "AQAB"}),
            json!({"kty": 7}),
            json!("text"),
        ] {
            assert!(!usable(bad.clone()), "{bad}");
        }
        for bad in [json!([]), json!({}), json!({"keys": {}}), json!({"keys": []}), json!(null)] {
            assert!(Keys::of(&bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_set_has_no_more_keys_than_are_looked_at() {
        let key =
            |id: usize| json!({"kty": "OKP", "crv": "Ed25519", "x": POINT, "kid": id.to_string()});
        let all: Vec<Value> = (0..=MAX_KEYS).map(key).collect();
        let keys = Keys::of(&json!({ "keys": all })).unwrap();
        assert!(keys.has(Some(&(MAX_KEYS - 1).to_string()), Algorithm::EdDsa));
        assert!(!keys.has(Some(&MAX_KEYS.to_string()), Algorithm::EdDsa));
    }

    #[test]
    fn a_token_without_a_key_id_means_the_only_key() {
        let key = |id: &str| json!({"kty": "OKP", "crv": "Ed25519", "x": POINT, "kid": id});
        let one = Keys::of(&json!({ "keys": [key("a")] })).unwrap();
        assert!(one.has(None, Algorithm::EdDsa) && one.has(Some("a"), Algorithm::EdDsa));
        assert!(!one.has(None, Algorithm::Es256) && !one.has(Some("b"), Algorithm::EdDsa));
        let two = Keys::of(&json!({ "keys": [key("a"), key("b")] })).unwrap();
        assert!(!two.has(None, Algorithm::EdDsa) && two.has(Some("b"), Algorithm::EdDsa));
    }
}
