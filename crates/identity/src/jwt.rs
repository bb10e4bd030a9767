//! JSON Web Tokens (RFC 7519) as signed ones (RFC 7515, compact form).

use crate::{
    identity::unauthenticated,
    jwk::{Algorithm, Keys},
};
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Map, Value};
use shipway_fault::{Fault, Result};
use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

/// Longest token that is looked at, in bytes.
pub const MAX_TOKEN: usize = 16 << 10;
/// How far clocks may be apart.
pub const SKEW: Duration = Duration::from_secs(60);
/// Longest name of a key or an issuer that is shown.
const SHOWN: usize = 100;

#[derive(Deserialize)]
struct Header {
    alg: String,
    #[serde(default)]
    kid: Option<String>,
    /// Extensions that must be understood; none are.
    #[serde(default)]
    crit: Option<Value>,
}

/// A token that has the form of one. Nothing in it is known to be true.
pub(crate) struct Token<'a> {
    /// What is signed.
    signed: &'a str,
    signature: Vec<u8>,
    pub algorithm: Algorithm,
    pub key: Option<String>,
    claims: Map<String, Value>,
}

/// What a token says, which is known to come from its issuer.
#[derive(Debug)]
pub(crate) struct Claims(Map<String, Value>);

/// Text from a token that is not verified, for a message.
pub(crate) fn shown(text: &str) -> String {
    let short: String = text.chars().take(SHOWN).collect();
    format!("{short:?}")
}

fn bad(why: &'static str) -> Fault {
    unauthenticated(format!("the token is not valid: {why}"))
}

fn decoded<T: DeserializeOwned>(part: &str) -> Option<T> {
    serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(part).ok()?).ok()
}

impl<'a> Token<'a> {
    /// Reads a token; one that is not signed, or with an algorithm that is not wanted, is refused.
    pub fn parse(text: &'a str) -> Result<Self> {
        if text.len() > MAX_TOKEN {
            return Err(unauthenticated(format!("the token has more than {MAX_TOKEN} bytes")));
        }
        let (signed, signature) = text.rsplit_once('.').ok_or_else(|| bad("it has no parts"))?;
        let (header, claims) = signed.split_once('.').ok_or_else(|| bad("it has two parts"))?;
        let header: Header = decoded(header).ok_or_else(|| bad("its header cannot be read"))?;
        if header.crit.is_some() {
            return Err(bad("it has critical extensions, and none is known"));
        }
        let algorithm = Algorithm::of(&header.alg).ok_or_else(|| {
            let alg = shown(&header.alg);
            unauthenticated(format!("the token is not valid: it is signed with {alg}"))
                .hint("RS256, ES256 and EdDSA are taken")
        })?;
        let signature = BASE64_URL_SAFE_NO_PAD.decode(signature).ok();
        Ok(Self {
            signed,
            signature: signature.ok_or_else(|| bad("its signature cannot be read"))?,
            algorithm,
            key: header.kid,
            claims: decoded(claims).ok_or_else(|| bad("its claims cannot be read"))?,
        })
    }

    /// Who is said to have issued it.
    pub fn issuer(&self) -> Option<&str> {
        self.claims.get("iss")?.as_str()
    }

    /// What the token says, if it was signed by one of `keys`, by `issuer` for one of `audience`,
    /// and `now` is in its time.
    pub fn verify(
        self,
        keys: &Keys,
        issuer: &str,
        audience: &[String],
        now: SystemTime,
    ) -> Result<Claims> {
        let (signed, key) = (self.signed.as_bytes(), self.key.as_deref());
        if !keys.verify(key, self.algorithm, signed, &self.signature) {
            return Err(bad("its signature is not its issuer's"));
        }
        if self.issuer() != Some(issuer) {
            return Err(bad("it is another issuer's"));
        }
        let claims = Claims(self.claims);
        let meant = claims.texts("aud");
        if !audience.iter().any(|a| meant.contains(a)) {
            return Err(bad("it is for another audience")
                .hint(format!("request a token for the audience {:?}", audience.join(", "))));
        }
        claims.check_times(now)?;
        Ok(claims)
    }
}

impl Claims {
    /// A time of the token, in seconds since 1970 (NumericDate, which may have a fraction).
    fn time(&self, name: &str) -> Result<Option<f64>> {
        match self.0.get(name) {
            None => Ok(None),
            Some(value) => {
                value.as_f64().map(Some).ok_or_else(|| bad("one of its times is not a number"))
            }
        }
    }

    fn check_times(&self, now: SystemTime) -> Result<()> {
        let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let skew = SKEW.as_secs_f64();
        let end = self.time("exp")?.ok_or_else(|| bad("it never expires"))?;
        if now >= end + skew {
            return Err(bad("it has expired").hint("request another one, or look at the clocks"));
        }
        for begin in ["nbf", "iat"] {
            if self.time(begin)?.is_some_and(|begin| begin > now + skew) {
                return Err(
                    bad("its time has not come").hint("look at the clocks of both machines")
                );
            }
        }
        Ok(())
    }

    /// The values of a claim: of a text, a number, a truth value, or a list of these.
    fn texts(&self, name: &str) -> Vec<String> {
        self.0.get(name).map(texts).unwrap_or_default()
    }

    /// The subject.
    pub fn subject(&self) -> Result<String> {
        match self.0.get("sub").and_then(Value::as_str) {
            Some(subject) if !subject.is_empty() => Ok(subject.to_owned()),
            _ => Err(bad("it has no subject")),
        }
    }

    /// All claims that have values.
    pub fn all(&self) -> BTreeMap<String, Vec<String>> {
        let all = self.0.iter().map(|(name, value)| (name.clone(), texts(value)));
        all.filter(|(_, values)| !values.is_empty()).collect()
    }
}

fn texts(value: &Value) -> Vec<String> {
    match value {
        Value::String(text) => vec![text.clone()],
        Value::Number(number) => vec![number.to_string()],
        Value::Bool(truth) => vec![truth.to_string()],
        Value::Array(values) => values.iter().filter(|v| !v.is_array()).flat_map(texts).collect(),
        Value::Null | Value::Object(_) => Vec::new(),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use ring::{
        hmac,
        rand::SystemRandom,
        signature::{
            ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _,
            RSA_PKCS1_SHA256, RsaKeyPair, RsaPublicKeyComponents,
        },
    };
    use serde_json::json;
    use shipway_fault::Code;

    pub(crate) const ISSUER: &str = "https://issuer.test";
    const NOW: u64 = 1_800_000_000;

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(NOW)
    }

    pub(crate) fn encoded(bytes: impl AsRef<[u8]>) -> String {
        BASE64_URL_SAFE_NO_PAD.encode(bytes)
    }

    /// A key with what it is called in tokens and sets.
    pub(crate) enum Signer {
        Rsa(Box<RsaKeyPair>),
        P256(EcdsaKeyPair),
        Ed25519(Ed25519KeyPair),
    }

    impl Signer {
        pub(crate) fn rsa() -> Self {
            // Made for these tests; `ring` makes no such keys.
            Self::Rsa(Box::new(RsaKeyPair::from_pkcs8(include_bytes!("../tests/rsa.der")).unwrap()))
        }

        pub(crate) fn p256() -> Self {
            let (kind, random) = (&ECDSA_P256_SHA256_FIXED_SIGNING, SystemRandom::new());
            let key = EcdsaKeyPair::generate_pkcs8(kind, &random).unwrap();
            Self::P256(EcdsaKeyPair::from_pkcs8(kind, key.as_ref(), &random).unwrap())
        }

        pub(crate) fn ed25519() -> Self {
            let key = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
            Self::Ed25519(Ed25519KeyPair::from_pkcs8(key.as_ref()).unwrap())
        }

        pub(crate) fn algorithm(&self) -> &'static str {
            match self {
                Self::Rsa(_) => "RS256",
                Self::P256(_) => "ES256",
                Self::Ed25519(_) => "EdDSA",
            }
        }

        fn public(&self) -> Vec<u8> {
            match self {
                Self::Rsa(key) => key.public_key().as_ref().to_vec(),
                Self::P256(key) => key.public_key().as_ref().to_vec(),
                Self::Ed25519(key) => key.public_key().as_ref().to_vec(),
            }
        }

        pub(crate) fn jwk(&self, id: &str) -> Value {
            let mut key = match self {
                Self::Rsa(key) => {
                    let RsaPublicKeyComponents { n, e } =
                        RsaPublicKeyComponents::<Vec<u8>>::from(key.public());
                    json!({"kty": "RSA", "n": encoded(n), "e": encoded(e)})
                }
                Self::P256(key) => {
                    let point = key.public_key().as_ref();
                    json!({"kty": "EC", "crv": "P-256", "x": encoded(&point[1..33]), "y": encoded(&point[33..])})
                }
                Self::Ed25519(key) => {
                    json!({"kty": "OKP", "crv": "Ed25519", "x": encoded(key.public_key())})
                }
            };
            key["kid"] = id.into();
            key
        }

        pub(crate) fn sign(&self, header: &Value, claims: &Value) -> String {
            let signed = format!("{}.{}", encoded(header.to_string()), encoded(claims.to_string()));
            let random = SystemRandom::new();
            let signature = match self {
                Self::Rsa(key) => {
                    let mut signature = vec![0; key.public().modulus_len()];
                    let bytes = signed.as_bytes();
                    key.sign(&RSA_PKCS1_SHA256, &random, bytes, &mut signature).unwrap();
                    signature
                }
                Self::P256(key) => key.sign(&random, signed.as_bytes()).unwrap().as_ref().to_vec(),
                Self::Ed25519(key) => key.sign(signed.as_bytes()).as_ref().to_vec(),
            };
            format!("{signed}.{}", encoded(signature))
        }

        /// A good token with some claims changed; null takes one away.
        fn token(&self, changed: &Value) -> String {
            self.sign(&self.header(), &claims(changed))
        }

        fn header(&self) -> Value {
            json!({"alg": self.algorithm(), "kid": "k", "typ": "JWT"})
        }
    }

    fn claims(changed: &Value) -> Value {
        let mut claims = json!({
            "iss": ISSUER, "sub": "repo:org/name", "aud": "shipway", "exp": NOW + 300,
            "nbf": NOW - 10, "iat": NOW - 10, "repository": "org/name", "groups": ["a", 7, true],
        });
        for (name, value) in changed.as_object().unwrap() {
            match value {
                Value::Null => drop(claims.as_object_mut().unwrap().remove(name)),
                value => claims[name] = value.clone(),
            }
        }
        claims
    }

    fn verified(keys: &Keys, token: &str) -> Result<Claims> {
        let audience = ["other".to_owned(), "shipway".to_owned()];
        Token::parse(token)?.verify(keys, ISSUER, &audience, now())
    }

    #[track_caller]
    fn refused(keys: &Keys, token: &str, why: &str) {
        let fault = verified(keys, token).expect_err("it was taken");
        assert_eq!(fault.code(), Code::Unauthenticated, "{fault}");
        assert!(fault.to_string().contains(why), "{why}: {fault}");
        // Nothing of the token is in the words but names.
        assert!(!token.split('.').any(|part| part.len() > 20 && fault.to_string().contains(part)));
    }

    fn signers() -> [(Signer, Keys); 3] {
        [Signer::rsa(), Signer::p256(), Signer::ed25519()].map(|signer| {
            let keys = Keys::of(&json!({ "keys": [signer.jwk("k")] })).unwrap();
            (signer, keys)
        })
    }

    #[test]
    fn good_tokens_of_all_algorithms_are_taken() {
        for (signer, keys) in signers() {
            let claims = verified(&keys, &signer.token(&json!({}))).unwrap();
            assert_eq!(claims.subject().unwrap(), "repo:org/name");
            let all = claims.all();
            assert_eq!(
                (&*all["repository"], &*all["groups"]),
                (&["org/name".to_owned()][..], &["a".into(), "7".into(), "true".into()][..])
            );
            let list =
                json!({"aud": ["x", "shipway"], "nbf": null, "iat": null, "exp": NOW as f64 + 0.5});
            verified(&keys, &signer.token(&list)).unwrap();
            let bare = signer.sign(&json!({"alg": signer.algorithm()}), &claims_of());
            verified(&keys, &bare).unwrap();
        }
    }

    fn claims_of() -> Value {
        claims(&json!({}))
    }

    #[test]
    fn tokens_count_in_their_time_and_for_their_audience_only() {
        let (signer, keys) = &signers()[2];
        let skew = SKEW.as_secs();
        let refused = |changed: Value, why| refused(keys, &signer.token(&changed), why);
        verified(keys, &signer.token(&json!({"exp": NOW - skew + 1}))).unwrap();
        refused(json!({"exp": NOW - skew}), "expired");
        refused(json!({"exp": null}), "never expires");
        refused(json!({"exp": "soon"}), "not a number");
        refused(json!({"exp": [NOW + 300]}), "not a number");
        for begin in ["nbf", "iat"] {
            verified(keys, &signer.token(&json!({ begin: NOW + skew }))).unwrap();
            refused(json!({ begin: NOW + skew + 1 }), "not come");
            refused(json!({ begin: true }), "not a number");
        }
        refused(json!({"aud": "elsewhere"}), "audience");
        refused(json!({"aud": null}), "audience");
        refused(json!({"aud": [["shipway"]]}), "audience");
        refused(json!({"aud": {"shipway": 1}}), "audience");
        refused(json!({"iss": "https://other.test"}), "another issuer");
        refused(json!({"iss": null}), "another issuer");
        for none in [json!({"sub": null}), json!({"sub": ""}), json!({"sub": 7})] {
            let claims = verified(keys, &signer.token(&none)).unwrap();
            assert!(claims.subject().is_err(), "{none}");
        }
    }

    #[test]
    fn tokens_that_only_look_signed_are_refused() {
        let all = signers();
        for (signer, keys) in &all {
            let good = signer.token(&json!({}));
            let (signed, signature) = good.rsplit_once('.').unwrap();
            let with = |header: Value| {
                format!("{}.{}", encoded(header.to_string()), encoded(claims_of().to_string()))
            };
            for none in ["none", "None", "NONE", "nOnE", ""] {
                let unsigned = with(json!({"alg": none, "kid": "k"}));
                refused(keys, &format!("{unsigned}."), "signed with");
                refused(keys, &format!("{unsigned}.{signature}"), "signed with");
            }
            refused(keys, &format!("{signed}."), "signature");
            // The public key, in each form that it has, as a secret.
            for secret in [signer.public(), signer.jwk("k").to_string().into_bytes()] {
                for alg in ["HS256", "HS384", "HS512"] {
                    let signed = with(json!({"alg": alg, "kid": "k"}));
                    let key = hmac::Key::new(hmac::HMAC_SHA256, &secret);
                    let tag = hmac::sign(&key, signed.as_bytes());
                    refused(keys, &format!("{signed}.{}", encoded(tag)), "signed with");
                }
            }
            // Other keys of the same kind, and of other kinds, under the same name.
            for (other, _) in signers() {
                if !matches!(other, Signer::Rsa(_)) {
                    refused(keys, &other.token(&json!({})), "signature");
                }
                let header = json!({"alg": signer.algorithm(), "kid": "k"});
                if other.algorithm() != signer.algorithm() {
                    refused(keys, &other.sign(&header, &claims_of()), "signature");
                }
            }
            let unknown =
                signer.sign(&json!({"alg": signer.algorithm(), "kid": "x"}), &claims_of());
            refused(keys, &unknown, "signature");
            // A key that is brought along, or fetched from where the token says, is not used.
            let own = Signer::ed25519();
            let header = json!({"alg": "EdDSA", "kid": "mine", "jwk": own.jwk("mine"), "jku": "https://evil.test/keys"});
            refused(keys, &own.sign(&header, &claims_of()), "signature");
            let critical =
                json!({"alg": signer.algorithm(), "kid": "k", "crit": ["b64"], "b64": false});
            refused(keys, &signer.sign(&critical, &claims_of()), "critical");
        }
    }

    #[test]
    fn what_is_no_token_is_refused_whatever_it_is() {
        let (signer, keys) = &signers()[1];
        let good = signer.token(&json!({}));
        for bad in ["", ".", "..", "...", "a.b", "a.b.c", "e30.e30.e30", "é.ü.ß"] {
            refused(keys, bad, "token");
        }
        refused(keys, &good.replace('.', ".."), "token");
        refused(keys, &format!("{good}="), "token");
        refused(keys, &format!("{good}.x"), "token");
        refused(keys, &good.to_uppercase(), "token");
        let long = signer.token(&json!({"pad": "x".repeat(MAX_TOKEN)}));
        refused(keys, &long, "more than");
        let deep = format!("{{\"a\":{}{}}}", "[".repeat(5000), "]".repeat(5000));
        let signed = format!("{}.{}", encoded(signer.header().to_string()), encoded(deep));
        refused(keys, &format!("{signed}.AAAA"), "claims");
        let name = "k".repeat(5000);
        refused(keys, &signer.sign(&json!({"alg": name}), &claims_of()), "signed with");
    }

    /// A small generator of pseudo-random numbers (xorshift).
    fn random(state: &mut u64) -> usize {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        usize::try_from(*state % (1 << 30)).unwrap()
    }

    /// Whatever is changed in a token, it is not taken: the only text that counts is the one that
    /// was signed.
    #[test]
    fn no_change_of_a_token_is_taken() {
        const ALPHABET: &[u8] =
            b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.=+/ \n";
        let mut state = 0x9e37_79b9_7f4a_7c15;
        for (signer, keys) in signers() {
            let good = signer.token(&json!({}));
            for _ in 0..400 {
                let mut bytes = good.clone().into_bytes();
                for _ in 0..=random(&mut state) % 3 {
                    let at = random(&mut state) % bytes.len();
                    let byte = ALPHABET[random(&mut state) % ALPHABET.len()];
                    match random(&mut state) % 4 {
                        0 => bytes.insert(at, byte),
                        1 => drop(bytes.remove(at)),
                        2 => bytes.truncate(at.max(1)),
                        _ => bytes[at] = byte,
                    }
                }
                let changed = String::from_utf8(bytes).unwrap();
                let taken = verified(&keys, &changed);
                assert!(changed == good || taken.is_err(), "{changed}");
            }
        }
    }
}
