//! Digests and ids.

use md5::Digest as _;
use sha2::Digest as _;

use super::{
    Args, CallError, Entry,
    Param::{Number as Num, Text},
    Result,
};
use crate::value::Value;

pub(super) static TABLE: &[Entry] = &[
    ("bcrypt", &[Text], Some(Num), not_here),
    ("md5", &[Text], None, |a| {
        Ok(Value::string(hex::encode(md5::Md5::digest(a.text(0)?.as_bytes()))))
    }),
    ("rsadecrypt", &[Text, Text], None, not_here),
    ("sha1", &[Text], None, |a| {
        Ok(Value::string(hex::encode(sha1::Sha1::digest(a.text(0)?.as_bytes()))))
    }),
    ("sha256", &[Text], None, |a| {
        Ok(Value::string(hex::encode(sha2::Sha256::digest(a.text(0)?.as_bytes()))))
    }),
    ("sha512", &[Text], None, |a| {
        Ok(Value::string(hex::encode(sha2::Sha512::digest(a.text(0)?.as_bytes()))))
    }),
    ("uuidv4", &[], None, |a| {
        let mut bytes = [0; 16];
        a.host.random(&mut bytes).map_err(|e| e.to_string())?;
        Ok(Value::string(uuid(bytes, 4)))
    }),
    ("uuidv5", &[Text, Text], None, |a| {
        let namespace = match a.text(0)? {
            "dns" => well_known(0x10),
            "url" => well_known(0x11),
            "oid" => well_known(0x12),
            "x500" => well_known(0x14),
            other => parse(other).ok_or_else(|| {
                format!("uuidv5() doesn't support namespace {other} (invalid UUID)")
            })?,
        };
        let digest = sha1::Sha1::new_with_prefix(namespace).chain_update(a.text(1)?).finalize();
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&digest[..16]);
        Ok(Value::string(uuid(bytes, 5)))
    }),
];

/// A definition that needs a password hash or a private key holds secrets that belong elsewhere.
fn not_here(_: &Args<'_>) -> Result<Value> {
    Err(CallError::from(
        "it is not supported here; give the value in a variable or use a build secret",
    ))
}

/// The namespaces of RFC 4122, which differ in one byte.
fn well_known(which: u8) -> [u8; 16] {
    [0x6b, 0xa7, 0xb8, which, 0x9d, 0xad, 0x11, 0xd1, 0x80, 0xb4, 0, 0xc0, 0x4f, 0xd4, 0x30, 0xc8]
}

fn parse(text: &str) -> Option<[u8; 16]> {
    let digits: String = text.chars().filter(|c| *c != '-').collect();
    let right = text.len() == 36 && [8, 13, 18, 23].iter().all(|n| text.as_bytes()[*n] == b'-');
    (right || text.len() == 32).then(|| hex::decode(digits).ok()?.try_into().ok()).flatten()
}

fn uuid(mut bytes: [u8; 16], version: u8) -> String {
    bytes[6] = bytes[6] & 0x0f | version << 4;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex = hex::encode(bytes);
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}

#[cfg(test)]
mod tests {
    use super::super::tests::check;

    #[test]
    fn digests_and_ids_are_those_of_others() {
        check(r#"md5("a")"#, r#""0cc175b9c0f1b6a831c399e269772661""#);
        check(r#"sha1("a")"#, r#""86f7e437faa5a7fce15d1ddcb9eaeaea377667b8""#);
        check(
            r#"sha256("a")"#,
            r#""ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb""#,
        );
        check(r#"substr(sha512("a"), 0, 8)"#, r#""1f40fc92""#);
        check(r#"uuidv5("dns", "example.com")"#, r#""cfbff0d1-9375-5685-968c-48ce8b15ae17""#);
        check(r#"length(split("-", uuidv4()))"#, "5");
        check(
            r#"bcrypt("x")"#,
            "error Error in function call; Call to function \"bcrypt\" failed: it is not supported here; give the value in a variable or use a build secret.",
        );
    }
}
