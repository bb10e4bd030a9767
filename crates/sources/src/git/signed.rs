//! Signatures of commits and annotated tags (row `src.git.sig`).

use super::repo::{Object, Objects};
use shipway_fault::{Fault, Result};
use shipway_signing::{GitObject, ObjectKind, Trusted, Validity};
use std::time::SystemTime;

/// Whose signature is wanted, and of what.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct WantSigned {
    /// Public keys, as the user gives them.
    pub keys: String,
    pub validity: Validity,
    /// The tag must be signed; that its commit is does not do.
    pub require_tag: bool,
    /// The commit must be signed; that its tag is does not do.
    pub ignore_tag: bool,
}

impl WantSigned {
    /// Takes the attribute `git.sig.<what>`.
    pub(super) fn take(&mut self, what: &str, value: &str) -> Result<()> {
        let yes = value == "true";
        match what {
            "pubkey" => value.clone_into(&mut self.keys),
            "rejectexpired" => {
                self.validity = if yes { Validity::Now } else { Validity::AtSigning }
            }
            "requiresignedtag" => self.require_tag = yes,
            "ignoresignedtag" => self.ignore_tag = yes,
            // It may ask for more than what is known here, and must not be passed over.
            _ => {
                return Err(Fault::unimplemented(format!(
                    "the attribute git.sig.{what} of a git source"
                )));
            }
        }
        Ok(())
    }

    /// Whether the attributes are all there.
    pub(super) fn check(&self) -> Result<()> {
        if self.keys.is_empty() {
            return Err(Fault::invalid(
                "verifying the signature of a git source needs git.sig.pubkey",
            )
            .hint(
                "give armored PGP keys (gpg --armor --export), or an SSH key as in the files *.pub",
            ));
        }
        Ok(())
    }

    /// Whether the tag, or else the commit, is signed as wanted.
    pub(super) async fn verify(&self, objects: &Objects) -> Result<()> {
        let copy = |o: &Object| Object { name: o.name.clone(), text: o.text.clone() };
        let (want, commit, tag) =
            (self.clone(), copy(&objects.commit), objects.tag.as_ref().map(copy));
        let verify = move || want.verify_now(&commit, tag.as_ref());
        shipway_task::blocking("verify a signature", verify).await
    }

    fn verify_now(&self, commit: &Object, tag: Option<&Object>) -> Result<()> {
        let by_tag =
            tag.filter(|_| !self.ignore_tag).map(|tag| self.verify_object(ObjectKind::Tag, tag));
        match by_tag {
            Some(Ok(())) => return Ok(()),
            Some(Err(fault)) if self.require_tag => return Err(fault),
            None if self.require_tag => {
                return Err(Fault::invalid("signed tag required but no signed tag found")
                    .hint("name an annotated tag that is signed (git tag -s), or leave out git.sig.requiresignedtag"));
            }
            _ => {}
        }
        let by_commit = self.verify_object(ObjectKind::Commit, commit);
        by_commit.map_err(|fault| match by_tag {
            Some(Err(tag)) => {
                fault.hint(format!("the signature of the tag does not count either: {tag}"))
            }
            _ => fault,
        })
    }

    fn verify_object(&self, kind: ObjectKind, object: &Object) -> Result<()> {
        let trusted = Trusted { keys: &self.keys, validity: self.validity, now: SystemTime::now() };
        GitObject::parse(kind, &object.name, &object.text)?.verify(&trusted)
    }
}
