//! Signatures of git objects and of files: whether one was made by a key that the user trusts (rows
//! `src.git.sig`, `src.http.sig`).
//!
//! [`GitObject::verify`] takes commits and annotated tags, signed with PGP or SSH keys;
//! [`verify_detached`] a file with a PGP signature beside it. Everything here is computed from
//! bytes in memory or in an open file; callers fetch them, and decide what a refusal means for a
//! build.
//!
//! Objects, signatures and keys are foreign bytes: each has a bound ([`MAX_OBJECT`],
//! [`MAX_SIGNATURE`], [`MAX_KEYS`], [`MAX_OWN_SIGNATURES`], [`MAX_TRIES`]).
//!
//! # What counts as a valid PGP signature
//!
//! It is made over binary or text data with SHA-256, SHA-384 or SHA-512 and by RSA (2048 bits or
//! more), ECDSA or EdDSA; by a primary key or a cross-signed subkey whose own signatures allow
//! signing; not by a revoked key; and in the time of the key ([`Validity`]). That is BuildKit's
//! rule, but for three points:
//!
//! - Each signature of a block is held to the list of algorithms, not only the first.
//! - A revocation of a subkey without a reason, or because its key was stolen, counts for every
//!   signature, however old it claims to be (RFC 9580, section 5.2.3.31). BuildKit goes by the
//!   date, which a thief chooses.
//! - A key's own signature that is newer than the one to verify is accepted. Extending the life
//!   of a key replaces that signature, and BuildKit then refuses everything that was signed before.
//!
//! # Dependencies
//!
//! `pgp` (rPGP) reads packets and computes signatures: alive, audited twice, without C, and it
//! bounds what it reads, but leaves it to its users which key may sign what and when. That is `pgp`
//! here. Sequoia decides that, too, but is under the LGPL. `ssh-key` is the SSH half, with the same
//! implementations of the algorithms below. Of `ring` only SHA-1 is used, for the names of git
//! objects.

mod git;
mod openpgp;
mod ssh;

pub use git::{GitObject, ObjectKind};
pub use openpgp::verify_detached;

use shipway_fault::{Class, Code, Fault, Result};
use std::time::SystemTime;

/// Largest commit or tag that is verified, in bytes. The largest in the wild are merges that quote
/// signed tags, some 100 KiB.
pub const MAX_OBJECT: usize = 1 << 20;
/// Longest armored signature, in bytes.
pub const MAX_SIGNATURE: usize = 64 << 10;
/// Longest text of public keys, in bytes. A key with many certifications takes some 100 KiB.
pub const MAX_KEYS: usize = 1 << 20;
/// Most signatures by a PGP key over its own parts that are verified in order to judge one
/// signature.
pub const MAX_OWN_SIGNATURES: usize = 512;
/// Most times that signed data is read through for one block of signatures: once for each key that
/// may have made one of them.
pub const MAX_TRIES: usize = 8;
/// RSA keys of fewer bits are refused.
pub const MIN_RSA_BITS: usize = 2048;

/// At which time a PGP key must be valid.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Validity {
    /// When the signature was made, as far as it says so itself.
    #[default]
    AtSigning,
    /// Now: keys and signatures that have expired since are refused.
    Now,
}

/// Whose signatures count.
#[derive(Clone, Copy, Debug)]
pub struct Trusted<'a> {
    /// Public keys: armored PGP blocks, of which any key counts, or one SSH key as in
    /// `authorized_keys`.
    pub keys: &'a str,
    /// When PGP keys must be valid. SSH keys say nothing of that.
    pub validity: Validity,
    /// The time that it is.
    pub now: SystemTime,
}

/// A signature that does not count, or cannot be judged.
#[track_caller]
fn refused(why: impl Into<String>) -> Fault {
    Fault::new(Code::FailedPrecondition, why.into()).with_class(Class::User)
}

#[track_caller]
fn bounded(what: &str, size: usize, most: usize) -> Result<()> {
    if size > most {
        return Err(Fault::invalid(format!(
            "{what} has {size} bytes; at most {most} are accepted"
        )));
    }
    Ok(())
}

/// The armored blocks in `text`, each with its kind: what is between `-----BEGIN <kind>-----` and
/// the end line of that kind. What is around them is skipped.
fn blocks(text: &str) -> impl Iterator<Item = (&str, &str)> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let start = line_start(rest, "-----BEGIN ")?;
        let block = &rest[start..];
        let kind = block["-----BEGIN ".len()..].lines().next()?.trim_end().strip_suffix("-----")?;
        let end = format!("-----END {kind}-----");
        let Some(at) = line_start(block, &end) else {
            rest = "";
            return Some((kind, block));
        };
        let (block, after) = block.split_at(at + end.len());
        rest = after;
        Some((kind, block))
    })
}

/// Where the first line begins that begins with `prefix`.
fn line_start(text: &str, prefix: &str) -> Option<usize> {
    text.match_indices(prefix)
        .map(|(at, _)| at)
        .find(|at| *at == 0 || text.as_bytes()[at - 1] == b'\n')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_found_among_other_lines() {
        // A file that ends without a newline may have another right behind it.
        let text = "x\n-----BEGIN A-----\n1\n-----END A-----\r\nno -----BEGIN C-----\n-----BEGIN B B-----\n2\n-----END B B----------BEGIN D-----";
        let found: Vec<_> = blocks(text).collect();
        assert_eq!(
            found,
            [
                ("A", "-----BEGIN A-----\n1\n-----END A-----"),
                ("B B", "-----BEGIN B B-----\n2\n-----END B B-----"),
                ("D", "-----BEGIN D-----")
            ]
        );
        assert_eq!(
            blocks("-----BEGIN A-----\n1").collect::<Vec<_>>(),
            [("A", "-----BEGIN A-----\n1")]
        );
        assert_eq!(blocks("-----BEGIN A\n-----END A").count(), 0);
        assert_eq!(blocks("").count(), 0);
    }
}
