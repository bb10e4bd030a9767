//! Key files as an SSH agent of our own (row `cb.ssh.keys`): it lists its keys and signs, and
//! nothing else.
//!
//! Files are OpenSSH's own or PEM; `rustls`, which is here anyway, reads the latter and signs. Keys
//! that want a passphrase are refused by name.

mod der;

use shipway_fault::{Fault, Result};
use ssh_key::private::{EcdsaKeypair, KeypairData, RsaKeypair};
use std::{fmt, path::Path, sync::Arc};
use tokio_rustls::rustls::{
    SignatureScheme,
    crypto::ring::sign::any_supported_type,
    pki_types::{
        PrivateKeyDer, PrivatePkcs1KeyDer, PrivatePkcs8KeyDer, PrivateSec1KeyDer,
        pem::PemObject as _,
    },
    sign::SigningKey,
};

/// Largest key file that is read, as the reference has it.
pub(crate) const MAX_KEY_FILE: u64 = 100 << 10;
/// What a client asks, and what is answered.
const LIST: u8 = 11;
const SIGN: u8 = 13;
const KEYS: u8 = 12;
const SIGNATURE: u8 = 14;
const FAILURE: u8 = 5;
/// With an RSA key: which hash.
const WITH_SHA256: u32 = 2;
const WITH_SHA512: u32 = 4;

/// Keys that sign.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeyRing(Vec<Key>);

#[derive(Clone)]
struct Key {
    /// The public key, as SSH writes it.
    public: Vec<u8>,
    comment: String,
    kind: Kind,
    signer: Arc<dyn SigningKey>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Ed25519,
    P256,
    P384,
    Rsa,
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {}", self.kind, self.comment)
    }
}

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        self.public == other.public
    }
}

impl Eq for Key {}

/// Appends a string in SSH's way.
fn put(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend(u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes());
    out.extend_from_slice(bytes);
}

/// The next string of a message.
fn take<'a>(from: &mut &'a [u8]) -> Option<&'a [u8]> {
    let (length, rest) = from.split_first_chunk::<4>()?;
    let (string, rest) =
        rest.split_at_checked(usize::try_from(u32::from_be_bytes(*length)).ok()?)?;
    *from = rest;
    Some(string)
}

fn passphrase(path: &Path) -> Fault {
    Fault::invalid(format!("the key {} is protected by a passphrase", path.display()))
        .hint("add it to an agent with ssh-add, and forward the agent with --ssh default")
}

impl KeyRing {
    /// Adds the key in the file `path`.
    pub fn add(&mut self, path: &Path) -> Result<()> {
        use std::io::Read as _;
        let what = || format!("read the key {}", path.display());
        let file = std::fs::File::open(path).map_err(|e| Fault::io(what(), e))?;
        let mut text = Vec::new();
        file.take(MAX_KEY_FILE).read_to_end(&mut text).map_err(|e| Fault::io(what(), e))?;
        self.0.push(Key::read(&text, path)?);
        Ok(())
    }

    /// The answer to a message of a client, both without their length.
    pub(crate) fn answer(&self, question: &[u8]) -> Vec<u8> {
        let answer = match question.split_first() {
            Some((&LIST, _)) => Some(self.list()),
            Some((&SIGN, rest)) => self.sign(rest),
            _ => None,
        };
        answer.unwrap_or_else(|| vec![FAILURE])
    }

    fn list(&self) -> Vec<u8> {
        let mut out = vec![KEYS];
        out.extend(u32::try_from(self.0.len()).unwrap_or(u32::MAX).to_be_bytes());
        for key in &self.0 {
            put(&mut out, &key.public);
            put(&mut out, key.comment.as_bytes());
        }
        out
    }

    fn sign(&self, mut request: &[u8]) -> Option<Vec<u8>> {
        let (public, data) = (take(&mut request)?, take(&mut request)?);
        let flags = u32::from_be_bytes(*request.first_chunk()?);
        let signature = self.0.iter().find(|k| k.public == public)?.sign(data, flags)?;
        let mut out = vec![SIGNATURE];
        put(&mut out, &signature);
        Some(out)
    }
}

impl Key {
    fn read(text: &[u8], path: &Path) -> Result<Self> {
        let refused = |why: &str| {
            Fault::invalid(format!("failed to parse {}: {why}", path.display()))
                .hint("Ed25519, RSA, and ECDSA (P-256, P-384) keys can be used")
        };
        let has = |word: &[u8]| text.windows(word.len()).any(|w| w == word);
        let (key, comment) = if has(b"BEGIN OPENSSH PRIVATE KEY") {
            let key =
                ssh_key::PrivateKey::from_openssh(text).map_err(|e| refused(&e.to_string()))?;
            if key.is_encrypted() {
                return Err(passphrase(path));
            }
            let comment = key.comment().to_owned();
            (of_openssh(key.key_data()).ok_or_else(|| refused("a key of another kind"))?, comment)
        } else if has(b"BEGIN ENCRYPTED PRIVATE KEY") || has(b"Proc-Type: 4,ENCRYPTED") {
            return Err(passphrase(path));
        } else {
            (
                PrivateKeyDer::from_pem_slice(text)
                    .map_err(|_| refused("no private key is in it"))?,
                String::new(),
            )
        };
        let signer = any_supported_type(&key).map_err(|e| refused(&e.to_string()))?;
        let (kind, public) =
            public(signer.as_ref()).ok_or_else(|| refused("a key of another kind"))?;
        let comment = if comment.is_empty() { path.display().to_string() } else { comment };
        Ok(Self { public, comment, kind, signer })
    }

    /// The signature of `data`, as SSH writes it.
    fn sign(&self, data: &[u8], flags: u32) -> Option<Vec<u8>> {
        let (name, scheme) = match self.kind {
            Kind::Ed25519 => ("ssh-ed25519", SignatureScheme::ED25519),
            Kind::P256 => ("ecdsa-sha2-nistp256", SignatureScheme::ECDSA_NISTP256_SHA256),
            Kind::P384 => ("ecdsa-sha2-nistp384", SignatureScheme::ECDSA_NISTP384_SHA384),
            Kind::Rsa if flags & WITH_SHA512 != 0 => {
                ("rsa-sha2-512", SignatureScheme::RSA_PKCS1_SHA512)
            }
            Kind::Rsa if flags & WITH_SHA256 != 0 => {
                ("rsa-sha2-256", SignatureScheme::RSA_PKCS1_SHA256)
            }
            // With SHA-1, which servers of today refuse as well.
            Kind::Rsa => return None,
        };
        let signed = self.signer.choose_scheme(&[scheme])?.sign(data).ok()?;
        let signed = match self.kind {
            Kind::P256 | Kind::P384 => {
                let mut pair = der::read(&mut &signed[..], der::SEQUENCE)?;
                let mut both = Vec::new();
                put(&mut both, der::read(&mut pair, der::INTEGER)?);
                put(&mut both, der::read(&mut pair, der::INTEGER)?);
                both
            }
            Kind::Ed25519 | Kind::Rsa => signed,
        };
        let mut out = Vec::new();
        put(&mut out, name.as_bytes());
        put(&mut out, &signed);
        Some(out)
    }
}

/// A key out of OpenSSH's own format, as `rustls` reads it. None for kinds that it does not know.
fn of_openssh(data: &KeypairData) -> Option<PrivateKeyDer<'static>> {
    Some(match data {
        KeypairData::Ed25519(pair) => {
            PrivatePkcs8KeyDer::from(der::ed25519(&pair.private.to_bytes())).into()
        }
        KeypairData::Ecdsa(EcdsaKeypair::NistP256 { public, private }) => {
            PrivateSec1KeyDer::from(der::ecdsa(der::P256, private.as_slice(), public.as_bytes()))
                .into()
        }
        KeypairData::Ecdsa(EcdsaKeypair::NistP384 { public, private }) => {
            PrivateSec1KeyDer::from(der::ecdsa(der::P384, private.as_slice(), public.as_bytes()))
                .into()
        }
        KeypairData::Rsa(RsaKeypair { public, private }) => {
            let number = |m: &ssh_key::Mpint| m.as_positive_bytes().map(<[u8]>::to_vec);
            let (n, e, d) = (number(&public.n)?, number(&public.e)?, number(&private.d)?);
            let (p, q, inverse) =
                (number(&private.p)?, number(&private.q)?, number(&private.iqmp)?);
            PrivatePkcs1KeyDer::from(der::rsa(&n, &e, &d, &p, &q, &inverse)?).into()
        }
        _ => return None,
    })
}

/// The kind of a key, and its public half as SSH writes it.
fn public(signer: &dyn SigningKey) -> Option<(Kind, Vec<u8>)> {
    let info = signer.public_key()?;
    let mut info = der::read(&mut info.as_ref(), der::SEQUENCE)?;
    let mut algorithm = der::read(&mut info, der::SEQUENCE)?;
    let (&0, bits) = der::read(&mut info, der::BITS)?.split_first()? else { return None };
    let mut out = Vec::new();
    let kind = match der::read(&mut algorithm, der::OBJECT)? {
        der::ED25519 => {
            put(&mut out, b"ssh-ed25519");
            put(&mut out, bits);
            Kind::Ed25519
        }
        der::RSA => {
            let mut numbers = der::read(&mut &bits[..], der::SEQUENCE)?;
            let (n, e) =
                (der::read(&mut numbers, der::INTEGER)?, der::read(&mut numbers, der::INTEGER)?);
            put(&mut out, b"ssh-rsa");
            put(&mut out, e);
            put(&mut out, n);
            Kind::Rsa
        }
        der::EC => {
            let (kind, curve) = match der::read(&mut algorithm, der::OBJECT)? {
                der::P256 => (Kind::P256, "nistp256"),
                der::P384 => (Kind::P384, "nistp384"),
                _ => return None,
            };
            put(&mut out, format!("ecdsa-sha2-{curve}").as_bytes());
            put(&mut out, curve.as_bytes());
            put(&mut out, bits);
            kind
        }
        _ => return None,
    };
    Some((kind, out))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// Runs `ssh-keygen` and the like, which are there where people have keys.
    #[track_caller]
    fn run(command: &mut Command) -> Vec<u8> {
        let done = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
        done.stdout
    }

    fn keygen(path: &Path, arguments: &[&str]) {
        run(Command::new("ssh-keygen")
            .args(["-q", "-C", "me@here", "-f"])
            .arg(path)
            .args(arguments));
    }

    /// The key in `path` signs what `ssh-keygen` of its public half believes, in the names of
    /// `algorithms`.
    #[track_caller]
    fn check(path: &Path, algorithms: &[(&str, u32)]) {
        let mut ring = KeyRing::default();
        ring.add(path).expect("a key");
        let listed = ring.answer(&[LIST]);
        let mut rest = &listed[5..];
        let public = take(&mut rest).expect("a public key").to_vec();
        // The same line that ssh-keygen makes of it.
        let line = String::from_utf8(run(Command::new("ssh-keygen").args(["-y", "-f"]).arg(path)))
            .expect("text");
        use base64::Engine as _;
        let expected = base64::engine::general_purpose::STANDARD
            .decode(line.split_whitespace().nth(1).expect("a key"))
            .expect("base64");
        assert_eq!(public, expected, "{line}");
        let parsed = ssh_key::PublicKey::from_openssh(&line).expect("a public key");
        for (algorithm, flags) in algorithms {
            let mut question = vec![SIGN];
            put(&mut question, &public);
            put(&mut question, b"what is to be signed");
            question.extend(flags.to_be_bytes());
            let answer = ring.answer(&question);
            assert_eq!(answer[0], SIGNATURE, "{algorithm}");
            let mut signature = take(&mut &answer[1..]).expect("a signature");
            assert_eq!(take(&mut signature), Some(algorithm.as_bytes()));
            let signature = take(&mut signature).expect("its bytes");
            verify(&parsed, algorithm, signature);
        }
    }

    #[track_caller]
    fn verify(public: &ssh_key::PublicKey, algorithm: &str, signature: &[u8]) {
        use ring::signature::{self as s, UnparsedPublicKey, VerificationAlgorithm};
        let mut bytes = signature.to_vec();
        let fixed = |size: usize| {
            let (mut rest, mut out) = (signature, Vec::new());
            for _ in 0..2 {
                let number = take(&mut rest).expect("a number");
                let number = &number[number.iter().take_while(|b| **b == 0).count()..];
                out.extend(std::iter::repeat_n(0, size - number.len()));
                out.extend_from_slice(number);
            }
            out
        };
        let (key, how): (Vec<u8>, &dyn VerificationAlgorithm) = match public.key_data() {
            ssh_key::public::KeyData::Ed25519(k) => (k.0.to_vec(), &s::ED25519),
            ssh_key::public::KeyData::Ecdsa(k) if algorithm.ends_with("256") => {
                bytes = fixed(32);
                (k.as_sec1_bytes().to_vec(), &s::ECDSA_P256_SHA256_FIXED)
            }
            ssh_key::public::KeyData::Ecdsa(k) => {
                bytes = fixed(48);
                (k.as_sec1_bytes().to_vec(), &s::ECDSA_P384_SHA384_FIXED)
            }
            ssh_key::public::KeyData::Rsa(k) => {
                let how = if algorithm.ends_with("512") {
                    &s::RSA_PKCS1_2048_8192_SHA512
                } else {
                    &s::RSA_PKCS1_2048_8192_SHA256
                };
                let (n, e) = (
                    k.n.as_positive_bytes().expect("a modulus"),
                    k.e.as_positive_bytes().expect("an exponent"),
                );
                let key = s::RsaPublicKeyComponents { n, e };
                key.verify(how, b"what is to be signed", &bytes).expect("a good signature");
                return;
            }
            other => panic!("{other:?}"),
        };
        UnparsedPublicKey::new(how, key)
            .verify(b"what is to be signed", &bytes)
            .expect("a good signature");
    }

    const RSA: [(&str, u32); 2] = [("rsa-sha2-256", WITH_SHA256), ("rsa-sha2-512", WITH_SHA512)];

    #[test]
    fn keys_of_openssh_and_pem_sign() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let at = |name: &str| dir.path().join(name);
        for (name, arguments, algorithms) in [
            ("ed25519", &["-N", "", "-t", "ed25519"][..], &[("ssh-ed25519", 0)][..]),
            ("p256", &["-N", "", "-t", "ecdsa", "-b", "256"], &[("ecdsa-sha2-nistp256", 0)]),
            ("p384", &["-N", "", "-t", "ecdsa", "-b", "384"], &[("ecdsa-sha2-nistp384", 0)]),
            ("rsa", &["-N", "", "-t", "rsa", "-b", "2048"], &RSA),
            // PKCS#1, SEC1 and PKCS#8.
            ("rsa1", &["-N", "", "-t", "rsa", "-b", "2048", "-m", "PEM"], &RSA),
            (
                "sec1",
                &["-N", "", "-t", "ecdsa", "-b", "256", "-m", "PEM"],
                &[("ecdsa-sha2-nistp256", 0)],
            ),
            ("rsa8", &["-N", "", "-t", "rsa", "-b", "2048", "-m", "PKCS8"], &RSA),
            (
                "p256-8",
                &["-N", "", "-t", "ecdsa", "-b", "256", "-m", "PKCS8"],
                &[("ecdsa-sha2-nistp256", 0)],
            ),
        ] {
            keygen(&at(name), arguments);
            check(&at(name), algorithms);
        }
    }

    #[test]
    fn a_key_that_cannot_be_used_is_refused_by_name() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let refusal = |name: &str| {
            KeyRing::default().add(&dir.path().join(name)).expect_err("refused").to_string()
        };
        for (name, form) in [("new", "RFC4716"), ("old", "PEM"), ("eight", "PKCS8")] {
            keygen(
                &dir.path().join(name),
                &["-N", "secret", "-t", "rsa", "-b", "2048", "-m", form],
            );
            assert!(
                refusal(name).contains(&format!("{name} is protected by a passphrase")),
                "{}",
                refusal(name)
            );
        }
        keygen(&dir.path().join("p521"), &["-N", "", "-t", "ecdsa", "-b", "521"]);
        std::fs::write(dir.path().join("text"), "hello").expect("write");
        std::fs::write(dir.path().join("huge"), vec![b'x'; 1 << 20]).expect("write");
        for name in ["p521", "text", "huge"] {
            assert!(refusal(name).contains("failed to parse"), "{}", refusal(name));
        }
    }

    #[test]
    fn what_is_no_question_of_a_client_fails() {
        let ring = KeyRing::default();
        let sign = [SIGN, 0, 0, 0, 1, 7, 0, 0, 0, 0, 0, 0, 0, 0];
        for question in [&[][..], &[SIGN], &[SIGN, 255, 255, 255, 255], &sign, &[17, 0], &[27]] {
            assert_eq!(ring.answer(question), [FAILURE], "{question:?}");
        }
        assert_eq!(ring.answer(&[LIST]), [KEYS, 0, 0, 0, 0]);
    }
}
