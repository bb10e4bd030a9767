//! SSH signatures, as `ssh-keygen -Y sign` makes them (OpenSSH's PROTOCOL.sshsig).

use crate::{MAX_KEYS, MIN_RSA_BITS, blocks, bounded, refused};
use shipway_fault::{Fault, Result};
use ssh_key::{HashAlg, PublicKey, SshSig, public::KeyData};

/// What a signature is for; one that git made is for nothing else.
const NAMESPACE: &str = "git";
/// The one version of the format.
const VERSION: u32 = 1;
/// RSA keys of more bits are not verified by the library.
const MAX_RSA_BITS: usize = 4096;
/// Bytes behind a signature by a security key: flags and a counter of four bytes.
const TRAILER: usize = 5;
/// Flag of a security key: it was touched.
const PRESENT: u8 = 1;

/// Whether `armored` is a signature of `signed` by the key in `keys`.
pub(crate) fn verify(signed: &[u8], armored: &str, keys: &str) -> Result<()> {
    let block = blocks(armored).next().map_or(armored, |(_, block)| block);
    let signature = SshSig::from_pem(block)
        .map_err(|e| refused(format!("failed to parse ssh signature: {e}")))?;
    if signature.version() != VERSION {
        return Err(refused(format!("unsupported SSH signature version: {}", signature.version())));
    }
    if signature.namespace() != NAMESPACE {
        return Err(refused(format!("unexpected SSH signature namespace: {:?}", signature.namespace()))
            .hint("sign with git, or with ssh-keygen -Y sign -n git: what was signed for another purpose does not count"));
    }
    let key = public_key(keys)?;
    let failed = |why: String| refused(format!("failed to verify ssh signature: {why}"));
    if key.key_data() != signature.public_key() {
        return Err(failed("public key does not match".into()).hint(format!(
            "it was made by {}, and the key to verify with is {}",
            signature.public_key().fingerprint(HashAlg::Sha256),
            key.fingerprint(HashAlg::Sha256)
        )));
    }
    strong(&key, &signature).map_err(failed)?;
    // The library compares key and namespace once more.
    key.verify(NAMESPACE, signed, &signature).map_err(|_| {
        failed("signature did not verify".into())
            .hint("the object is not the one that was signed, or the signature was changed")
    })
}

/// Whether key and signature are good enough to count.
fn strong(key: &PublicKey, signature: &SshSig) -> Result<(), String> {
    match key.key_data() {
        KeyData::Rsa(rsa) => {
            let bits = rsa.n.as_positive_bytes().map_or(0, |n| n.len() * 8);
            if bits < MIN_RSA_BITS {
                return Err(format!("RSA key too short: {bits} bits"));
            }
            if bits > MAX_RSA_BITS {
                return Err(format!(
                    "RSA key too long: {bits} bits; at most {MAX_RSA_BITS} are accepted"
                ));
            }
        }
        KeyData::SkEd25519(_) | KeyData::SkEcdsaSha2NistP256(_) => {
            let bytes = signature.signature_bytes();
            let flags = bytes.len().checked_sub(TRAILER).map_or(0, |at| bytes[at]);
            if flags & PRESENT == 0 {
                return Err("the security key signed without being touched".into());
            }
        }
        _ => {}
    }
    Ok(())
}

/// The first key in lines as `authorized_keys` has them; lines that hold none are skipped.
fn public_key(keys: &str) -> Result<PublicKey> {
    bounded("the text of the SSH public key", keys.len(), MAX_KEYS)?;
    let lines =
        keys.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let found =
        lines.filter_map(|line| parse(line).or_else(|| parse(without_options(line)?))).next();
    found.ok_or_else(|| {
        Fault::invalid("failed to parse ssh public key: ssh: no key found").hint(
            "the signature is by an SSH key, so it needs one to be verified with: a line such as \"ssh-ed25519 AAAA… name\", as in the files *.pub",
        )
    })
}

/// `<type> <base64> [comment]`.
fn parse(line: &str) -> Option<PublicKey> {
    let mut words = line.split_ascii_whitespace();
    let (kind, data) = (words.next()?, words.next()?);
    PublicKey::from_openssh(&format!("{kind} {data}")).ok()
}

/// The line behind its first word, in which quotes may hold blanks (`command="a b",restrict`).
fn without_options(line: &str) -> Option<&str> {
    let (mut quoted, mut escaped) = (false, false);
    let end = line.find(|c: char| {
        match c {
            '"' if !escaped => quoted = !quoted,
            ' ' | '\t' if !quoted => return true,
            _ => {}
        }
        escaped = c == '\\';
        false
    })?;
    Some(&line[end..])
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str =
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAILM+rvN+ot98qgEN796jTiQfZfG1KaT0PtFDJ/XFSqti";

    #[test]
    fn keys_are_found_in_lines_of_authorized_keys() {
        for text in [
            KEY.to_owned(),
            format!("# comment\r\n\r\n{KEY} user@example.com with more\r\n"),
            format!("restrict {KEY}"),
            format!("command=\"echo \\\"a b\\\"\",no-pty\t{KEY} user"),
            format!("no key here\nssh-ed25519 AAAA\nssh-rsa {}\n  {KEY}", &KEY[12..]),
        ] {
            assert_eq!(public_key(&text).unwrap().to_openssh().unwrap(), KEY, "{text}");
        }
        for text in [
            "",
            "# x",
            "x",
            "a \"b c",
            "-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nabc\n",
            "ssh-ed25519",
        ] {
            let fault = public_key(text).unwrap_err();
            assert!(fault.to_string().contains("failed to parse ssh public key"), "{fault}");
        }
        let long = format!("{}{KEY}", "# x\n".repeat(MAX_KEYS / 4));
        assert!(
            public_key(&long).unwrap_err().to_string().contains("at most 1048576 are accepted")
        );
    }
}
