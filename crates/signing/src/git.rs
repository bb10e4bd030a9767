//! Commits and annotated tags, as git stores and signs them (git's `gitformat-signature`).

use crate::{MAX_OBJECT, MAX_SIGNATURE, Trusted, bounded, openpgp, refused, ssh};
use ring::digest::{self, SHA1_FOR_LEGACY_USE_ONLY, SHA256};
use shipway_fault::{Context as _, Result};
use std::io::Cursor;

/// How the text of a signature begins. git knows two more, which no key of ours verifies.
const PGP: &str = "-----BEGIN PGP SIGNATURE-----";
const SSH: &str = "-----BEGIN SSH SIGNATURE-----";
const MARKERS: [&str; 4] =
    [PGP, SSH, "-----BEGIN PGP MESSAGE-----", "-----BEGIN SIGNED MESSAGE-----"];

/// What an object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ObjectKind {
    /// A commit, whose signature is in a header.
    Commit,
    /// An annotated tag, whose signature is behind its message.
    Tag,
}

impl ObjectKind {
    /// git's word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Commit => "commit",
            Self::Tag => "tag",
        }
    }
}

/// An object taken apart into what is signed and the signature.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GitObject {
    kind: ObjectKind,
    signed: Vec<u8>,
    signature: Option<String>,
}

impl GitObject {
    /// Takes apart the object `name`, whose content is `raw`.
    ///
    /// # Errors
    ///
    /// The object is too large, is not the one of that name, or has a signature that is not text.
    pub fn parse(kind: ObjectKind, name: &str, raw: &[u8]) -> Result<Self> {
        let what = kind.name();
        bounded(&format!("the {what} {name}"), raw.len(), MAX_OBJECT)?;
        let found = object_name(kind, name.len(), raw);
        if found != name {
            return Err(refused(format!(
                "{what} object checksum verification failed: expected {name}, got {found}"
            )));
        }
        let (signed, signature) = match kind {
            // Repositories of either hash have their own header, and ones that are being converted
            // both.
            ObjectKind::Commit if name.len() == 64 => take_header(raw, b"gpgsig-sha256 "),
            ObjectKind::Commit => take_header(raw, b"gpgsig "),
            ObjectKind::Tag => {
                let (message, signature) = raw.split_at(trailer(raw));
                (take_header(message, b"").0, signature.to_vec())
            }
        };
        bounded(&format!("the signature of the {what} {name}"), signature.len(), MAX_SIGNATURE)?;
        let signature = String::from_utf8(signature)
            .map_err(|_| refused(format!("the signature of the {what} {name} is not text")))?;
        Ok(Self { kind, signed, signature: Some(signature).filter(|s| !s.is_empty()) })
    }

    /// Whether the object is signed by a key in `trusted`.
    ///
    /// # Errors
    ///
    /// It is not; the fault says why, and what to try.
    pub fn verify(&self, trusted: &Trusted<'_>) -> Result<()> {
        let what = self.kind.name();
        let Some(signature) = &self.signature else {
            return Err(refused(format!("git object is not signed: the {what} has no signature"))
                .hint(match self.kind {
                    ObjectKind::Commit => {
                        "sign it (git commit -S), or name a commit or tag that is signed"
                    }
                    ObjectKind::Tag => "sign it (git tag -s), or name a tag that is signed",
                }));
        };
        let verified = match () {
            () if signature.starts_with(PGP) => {
                openpgp::verify(Cursor::new(&self.signed), signature, trusted)
            }
            () if signature.starts_with(SSH) => ssh::verify(&self.signed, signature, trusted.keys),
            () => Err(refused("invalid signature format").hint(
                "only signatures by PGP and SSH keys can be verified, and not those of X.509",
            )),
        };
        verified.context(|| format!("verify the signature of the git {what}"))
    }
}

/// The name of an object: the hash over its kind, size and content; SHA-1 or SHA-256 by the length
/// of names.
fn object_name(kind: ObjectKind, length: usize, raw: &[u8]) -> String {
    let mut hash =
        digest::Context::new(if length == 64 { &SHA256 } else { &SHA1_FOR_LEGACY_USE_ONLY });
    hash.update(format!("{} {}\0", kind.name(), raw.len()).as_bytes());
    hash.update(raw);
    hex::encode(hash.finish())
}

/// What is signed of `raw`, and the value of the header `name`: everything but the headers that
/// hold signatures, of this hash or another.
fn take_header(raw: &[u8], name: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let (mut signed, mut signature) = (Vec::with_capacity(raw.len()), Vec::new());
    /// What lines that begin with a blank belong to.
    enum In {
        Signed,
        Signature,
        Other,
    }
    let mut at = In::Signed;
    let mut lines = raw.split_inclusive(|b| *b == b'\n');
    for line in lines.by_ref() {
        if line == b"\n" {
            signed.extend_from_slice(line);
            break;
        }
        let continued = line.strip_prefix(b" ");
        match (continued, &at) {
            (Some(value), In::Signature) => signature.extend_from_slice(value),
            (Some(_), In::Other) => {}
            (Some(_), In::Signed) => signed.extend_from_slice(line),
            (None, _) => match line.strip_prefix(name).filter(|_| !name.is_empty()) {
                Some(value) => {
                    at = In::Signature;
                    signature.extend_from_slice(value);
                }
                None if line.starts_with(b"gpgsig") => at = In::Other,
                None => {
                    at = In::Signed;
                    signed.extend_from_slice(line);
                }
            },
        }
    }
    signed.extend(lines.flatten());
    (signed, signature)
}

/// Where the signature of a tag begins: at the last line that begins one, as git has it; its end if
/// there is none.
fn trailer(raw: &[u8]) -> usize {
    let (mut at, mut found) = (0, raw.len());
    for line in raw.split_inclusive(|b| *b == b'\n') {
        if MARKERS.iter().any(|marker| line.starts_with(marker.as_bytes())) {
            found = at;
        }
        at += line.len();
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(kind: ObjectKind, length: usize, raw: &str) -> (String, String) {
        let object =
            GitObject::parse(kind, &object_name(kind, length, raw.as_bytes()), raw.as_bytes())
                .unwrap();
        (String::from_utf8(object.signed).unwrap(), object.signature.unwrap_or_default())
    }

    #[test]
    fn what_is_signed_of_a_commit_is_all_but_its_signatures() {
        let raw = "tree t\nparent p\ngpgsig A\n a\n \n z\ngpgsig-sha256 B\n b\nmergetag object x\n gpgsig no\n -----BEGIN\nencoding e\n\ngpgsig in the message\n";
        let signed = "tree t\nparent p\nmergetag object x\n gpgsig no\n -----BEGIN\nencoding e\n\ngpgsig in the message\n";
        assert_eq!(parse(ObjectKind::Commit, 40, raw), (signed.into(), "A\na\n\nz\n".into()));
        assert_eq!(parse(ObjectKind::Commit, 64, raw), (signed.into(), "B\nb\n".into()));
        assert_eq!(
            parse(ObjectKind::Commit, 40, "tree t\n\nm"),
            ("tree t\n\nm".into(), String::new())
        );
        assert_eq!(
            parse(ObjectKind::Commit, 40, "tree t\ngpgsig A"),
            ("tree t\n".into(), "A".into())
        );
    }

    #[test]
    fn what_is_signed_of_a_tag_is_all_before_the_last_signature() {
        let raw =
            format!("object o\ngpgsig-sha256 B\n b\ntag t\n\nmessage\n{PGP}\nquoted\n{SSH}\nabc\n");
        let signed = format!("object o\ntag t\n\nmessage\n{PGP}\nquoted\n");
        assert_eq!(parse(ObjectKind::Tag, 40, &raw), (signed, format!("{SSH}\nabc\n")));
        assert_eq!(
            parse(ObjectKind::Tag, 64, "object o\n\nm\n"),
            ("object o\n\nm\n".into(), String::new())
        );
    }

    #[test]
    fn objects_have_their_names_and_bounds() {
        // What `git hash-object -t commit --literally` says of it.
        let raw = b"tree 4b825dc642cb6eb9a060e54bf8d69288fbee4904\nauthor a <a@a> 1 +0000\ncommitter a <a@a> 1 +0000\n\nm\n";
        let name = "d9e6f0dcd3e8b6bde1f2c63e5b2e7ab0c9f5c1de";
        let fault = GitObject::parse(ObjectKind::Commit, name, &raw[1..]).unwrap_err();
        assert!(fault.to_string().contains("checksum verification failed"), "{fault}");
        let large = vec![b'a'; MAX_OBJECT + 1];
        let fault = GitObject::parse(ObjectKind::Tag, name, &large).unwrap_err();
        assert!(fault.to_string().contains("at most 1048576"), "{fault}");
        let long = format!("object o\n\n{PGP}\n{}", "a".repeat(MAX_SIGNATURE));
        let named = object_name(ObjectKind::Tag, 40, long.as_bytes());
        let fault = GitObject::parse(ObjectKind::Tag, &named, long.as_bytes()).unwrap_err();
        assert!(fault.to_string().contains("at most 65536"), "{fault}");
        let odd = [b"object o\n\n", PGP.as_bytes(), b"\n\xff"].concat();
        let named = object_name(ObjectKind::Tag, 40, &odd);
        assert!(
            GitObject::parse(ObjectKind::Tag, &named, &odd)
                .unwrap_err()
                .to_string()
                .contains("not text")
        );
    }
}
