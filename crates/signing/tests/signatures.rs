//! Signatures that gpg, ssh-keygen and git made (`fixtures/make.sh`), and ones that they would not
//! make.

#![allow(clippy::unwrap_used)]

use pgp::{
    composed::{
        ArmorOptions, Deserializable, DetachedSignature, KeyType, SecretKeyParamsBuilder,
        SignedPublicKey, SignedSecretKey, SubkeyParamsBuilder,
    },
    crypto::hash::HashAlgorithm,
    packet::{Signature, SignatureConfig, SignatureType, Subpacket, SubpacketData},
    types::{KeyDetails, Password, SigningKey, Timestamp},
};
use shipway_fault::Fault;
use shipway_signing::{
    GitObject, MAX_KEYS, MAX_OWN_SIGNATURES, MAX_SIGNATURE, MAX_TRIES, ObjectKind, Trusted,
    Validity, verify_detached,
};
use std::{
    io::Cursor,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

fn fixture(name: &str) -> String {
    std::fs::read_to_string(path(name)).unwrap()
}

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

/// The beginning of a year.
fn year(year: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs((year - 1970) * 31_556_952)
}

fn check(
    data: &[u8],
    signature: &str,
    keys: &str,
    validity: Validity,
    now: SystemTime,
) -> Result<(), Fault> {
    verify_detached(Cursor::new(data), signature, &Trusted { keys, validity, now })
}

/// In mid-2026, at the time of signing.
fn verify(data: &[u8], signature: &str, keys: &str) -> Result<(), Fault> {
    check(data, signature, keys, Validity::AtSigning, year(2026))
}

#[track_caller]
fn refused(result: Result<(), Fault>, why: &str) {
    let fault = result.unwrap_err();
    assert!(fault.to_string().contains(why), "{fault} is not {why}");
}

fn data() -> Vec<u8> {
    std::fs::read(path("data")).unwrap()
}

#[test]
fn signatures_of_every_algorithm_are_verified() {
    let changed = b"signed data\nof three lines\n";
    for name in ["rsa2048", "ed25519", "nistp256", "nistp384", "nistp521", "user1"] {
        let (keys, signature) = (fixture(&format!("{name}.pub")), fixture(&format!("{name}.sig")));
        verify(&data(), &signature, &keys).unwrap_or_else(|e| panic!("{name}: {e:?}"));
        refused(
            verify(changed, &signature, &keys),
            "failed to verify pgp signature: signature by ",
        );
        refused(verify(changed, &signature, &keys), "one of them was changed");
        refused(
            verify(&data(), &signature, &fixture("user2.pub")),
            "signature made by unknown entity",
        );
    }
    let rsa = fixture("rsa2048.pub");
    verify(b"signed data\r\nof two lines\r\n", &fixture("text.sig"), &rsa).unwrap();
    refused(
        verify(b"signed data\r\nof two lines\r\n", &fixture("rsa2048.sig"), &rsa),
        "was changed",
    );
    verify(&data(), &fixture("sha384.sig"), &fixture("ed25519.pub")).unwrap();
}

#[test]
fn weak_and_odd_signatures_are_refused() {
    for (name, key, why) in [
        ("sha1", "rsa2048", "rejecting weak/unknown hash: SHA1"),
        ("dsa2048", "dsa2048", "rejecting unsupported pubkey algorithm"),
        ("rsa1024", "rsa1024", "RSA key too short: 1024 bits"),
        ("future", "rsa2048", "signature creation time is in the future"),
        ("notation", "ed25519", "unknown critical notation: must@example.com"),
    ] {
        refused(
            verify(&data(), &fixture(&format!("{name}.sig")), &fixture(&format!("{key}.pub"))),
            why,
        );
    }
    let far = year(2091);
    check(&data(), &fixture("future.sig"), &fixture("rsa2048.pub"), Validity::AtSigning, far)
        .unwrap();
}

#[test]
fn keys_count_in_their_time() {
    use Validity::{AtSigning, Now};
    let at = |name: &str, key: &str, validity, now| {
        check(
            &data(),
            &fixture(&format!("{name}.sig")),
            &fixture(&format!("{key}.pub")),
            validity,
            year(now),
        )
    };
    at("expired", "expired", AtSigning, 2026).unwrap();
    at("expired", "expired", Now, 2020).unwrap_err();
    refused(at("expired", "expired", Now, 2026), "key expired");
    refused(at("late", "late", AtSigning, 2026), "key expired");
    at("prolonged", "prolonged", AtSigning, 2026).unwrap();
    at("prolonged", "prolonged", Now, 2026).unwrap();
    // A subkey of one year, and a signature of one.
    at("user1", "user1", AtSigning, 2026).unwrap();
    refused(at("user1", "user1", Now, 2026), "subkey expired");
    at("lasting", "ed25519", AtSigning, 2026).unwrap();
    refused(at("lasting", "ed25519", Now, 2026), "signature expired");
}

#[test]
fn revoked_keys_do_not_count() {
    use Validity::{AtSigning, Now};
    let at = |name: &str, key: &str, validity| {
        check(
            &data(),
            &fixture(&format!("{name}.sig")),
            &fixture(&format!("{key}.pub")),
            validity,
            year(2026),
        )
    };
    at("revoked", "unrevoked", AtSigning).unwrap();
    refused(at("revoked", "revoked", AtSigning), "key revoked: retired");
    // An older copy of the key does not make the revocation undone, in whatever order they come.
    let (revoked, before) = (fixture("revoked.pub"), fixture("unrevoked.pub"));
    for keys in [format!("{revoked}{before}"), format!("{before}\n{revoked}")] {
        refused(verify(&data(), &fixture("revoked.sig"), &keys), "key revoked: retired");
    }
    at("superseded", "superseded", AtSigning).unwrap();
    refused(at("superseded", "superseded", Now), "the subkey is revoked");
    refused(at("stolen", "stolen", AtSigning), "the subkey is revoked");
    refused(at("early", "early", AtSigning), "the subkey is revoked");
    at("withdrawn", "withdrawn", AtSigning).unwrap();
}

#[test]
fn any_key_of_any_block_counts() {
    let (one, two, signature) = (fixture("user1.pub"), fixture("user2.pub"), fixture("user1.sig"));
    for keys in [
        format!("{one}{two}"),
        format!("{two}\n{one}"),
        format!("some words\r\n{}\r\n{two}", one.replace('\n', "\r\n")),
    ] {
        verify(&data(), &signature, &keys).unwrap();
    }
    let both =
        [&*fixture("ed25519.pub"), &*two].map(|k| SignedPublicKey::from_string(k).unwrap().0);
    let bytes: Vec<u8> =
        both.iter().flat_map(|k| pgp::ser::Serialize::to_bytes(k).unwrap()).collect();
    let block = armored("PGP PUBLIC KEY BLOCK", &bytes);
    verify(&data(), &fixture("ed25519.sig"), &block).unwrap();
    verify(&data(), &fixture("user2.sig"), &block).unwrap();
    // A signature by somebody unknown beside one that counts.
    let beside = [fixture("user1.sig"), fixture("ed25519.sig")]
        .map(|s| DetachedSignature::from_string(&s).unwrap().0);
    let bytes: Vec<u8> =
        beside.iter().flat_map(|s| pgp::ser::Serialize::to_bytes(s).unwrap()).collect();
    verify(&data(), &armored("PGP SIGNATURE", &bytes), &fixture("ed25519.pub")).unwrap();
}

/// A block as `gpg --armor` makes it, but for the checksum, which nobody needs.
fn armored(kind: &str, bytes: &[u8]) -> String {
    let text = base64(bytes);
    let lines: Vec<_> =
        text.as_bytes().chunks(64).map(|c| std::str::from_utf8(c).unwrap()).collect();
    format!("-----BEGIN {kind}-----\n\n{}\n-----END {kind}-----\n", lines.join("\n"))
}

fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let n = chunk.iter().fold(0u32, |n, b| n << 8 | u32::from(*b)) << (8 * (3 - chunk.len()));
        let letters = (0..4).map(|i| {
            if i <= chunk.len() { ALPHABET[(n >> (18 - 6 * i)) as usize & 63] as char } else { '=' }
        });
        text.extend(letters);
    }
    text
}

#[test]
fn what_is_no_key_and_no_signature_is_said_to_be_none() {
    let (key, signature) = (fixture("ed25519.pub"), fixture("ed25519.sig"));
    for (keys, why) in [
        (String::new(), "failed to read armored public key: no armored data found"),
        (fixture("ssh-ed25519.pub"), "failed to read armored public key: no armored data found"),
        (signature.clone(), "expected public or private key block, got: PGP SIGNATURE"),
        (key[..key.len() / 2].to_owned(), "failed to read armored public key"),
        (armored("PGP PUBLIC KEY BLOCK", b"garbage"), "failed to read armored public key"),
        (" ".repeat(MAX_KEYS + 1), "at most 1048576 are accepted"),
    ] {
        refused(verify(&data(), &signature, &keys), why);
    }
    for (signature, why) in [
        (String::new(), "failed to decode armored signature"),
        (key.clone(), "failed to decode armored signature"),
        (fixture("ssh-ed25519.sig"), "failed to decode armored signature"),
        (signature[..signature.len() / 2].to_owned(), "failed to decode armored signature"),
        (armored("PGP SIGNATURE", b""), "failed to decode armored signature"),
        (" ".repeat(MAX_SIGNATURE + 1), "at most 65536 are accepted"),
    ] {
        refused(verify(&data(), &signature, &key), why);
    }
    refused(verify(&data(), &fixture("user1.sig"), &fixture("certify.pub")), "unknown entity");
}

/// Every damage to a signature or a key is refused, and none is more than that.
#[test]
fn damaged_signatures_and_keys_are_refused() {
    let (key, signature) = (fixture("ed25519.pub"), fixture("ed25519.sig"));
    let bytes = |text: &str| -> Vec<u8> {
        let (found, _) = DetachedSignature::from_string(text).unwrap();
        pgp::ser::Serialize::to_bytes(&found).unwrap()
    };
    let whole = bytes(&signature);
    verify(&data(), &armored("PGP SIGNATURE", &whole), &key).unwrap();
    // At its end are two numbers of 32 bytes, each behind its length in bits, of which the lowest
    // do not matter, and before them two bytes of the hash. Before those is the issuer's
    // identifier, which is a hint: the fingerprint is hashed.
    let numbers = whole.len() - 2 * (2 + 32);
    let free = [numbers + 1, numbers + 2 + 32 + 1]
        .into_iter()
        .chain(numbers - 2 - 9..numbers - 2)
        .collect::<Vec<_>>();
    for at in 0..whole.len() {
        let mut damaged = whole.clone();
        damaged[at] ^= 1 << (at % 8);
        let verified = verify(&data(), &armored("PGP SIGNATURE", &damaged), &key);
        assert!(verified.is_err() || free.contains(&at), "byte {at} of {}", whole.len());
    }
    let (public, _) = SignedPublicKey::from_string(&key).unwrap();
    let whole = pgp::ser::Serialize::to_bytes(&public).unwrap();
    let mut accepted = 0;
    for at in 0..whole.len() {
        let mut damaged = whole.clone();
        damaged[at] ^= 1 << (at % 8);
        accepted += usize::from(
            verify(&data(), &signature, &armored("PGP PUBLIC KEY BLOCK", &damaged)).is_ok(),
        );
    }
    // The same in the key's own signature.
    assert!(accepted <= free.len(), "{accepted} damaged keys were accepted");
}

struct Forge {
    key: SignedSecretKey,
}

impl Forge {
    fn new() -> Self {
        let subkey = SubkeyParamsBuilder::default()
            .key_type(KeyType::Ed25519Legacy)
            .can_sign(true)
            .build()
            .unwrap();
        let params = SecretKeyParamsBuilder::default()
            .key_type(KeyType::Ed25519Legacy)
            .can_certify(true)
            .can_sign(true)
            .primary_user_id("forge <forge@example.com>".into())
            .subkey(subkey)
            .build()
            .unwrap();
        Self { key: params.generate(rand::thread_rng()).unwrap() }
    }

    fn public(&self) -> SignedPublicKey {
        self.key.to_public_key()
    }

    fn text(key: &SignedPublicKey) -> String {
        key.to_armored_string(ArmorOptions::default()).unwrap()
    }

    /// A signature by the primary key, or by the subkey, of this type.
    fn sign(&self, by_subkey: bool, kind: SignatureType, issuer: bool) -> String {
        let primary = &self.key.primary_key;
        let subkey = &self.key.secret_subkeys[0].key;
        let (algorithm, fingerprint) = if by_subkey {
            (subkey.algorithm(), subkey.fingerprint())
        } else {
            (primary.algorithm(), primary.fingerprint())
        };
        let mut config = SignatureConfig::v4(kind, algorithm, HashAlgorithm::Sha256);
        config.hashed_subpackets = vec![
            Subpacket::regular(SubpacketData::SignatureCreationTime(Timestamp::now())).unwrap(),
        ];
        if issuer {
            config
                .hashed_subpackets
                .push(Subpacket::regular(SubpacketData::IssuerFingerprint(fingerprint)).unwrap());
        }
        // By hand, since the library makes no such statements as some of these, though it verifies
        // them.
        let mut hasher = config.hash_alg.new_hasher().unwrap();
        let short = matches!(kind, SignatureType::Standalone | SignatureType::Timestamp);
        let data = data();
        hasher.update(if short { &data[..1] } else { &data });
        let length = config.hash_signature_data(&mut hasher).unwrap();
        hasher.update(&config.trailer(length).unwrap());
        let hash = hasher.finalize();
        let signed = match by_subkey {
            true => SigningKey::sign(subkey, &Password::empty(), config.hash_alg, &hash),
            false => SigningKey::sign(primary, &Password::empty(), config.hash_alg, &hash),
        };
        let signed = Signature::from_config(config, [hash[0], hash[1]], signed.unwrap()).unwrap();
        DetachedSignature::new(signed).to_armored_string(ArmorOptions::default()).unwrap()
    }
}

fn verify_now(signature: &str, keys: &str) -> Result<(), Fault> {
    check(&data(), signature, keys, Validity::AtSigning, SystemTime::now())
}

#[test]
fn forged_signatures_and_keys_are_refused() {
    let (owner, thief) = (Forge::new(), Forge::new());
    let keys = Forge::text(&owner.public());
    let binary = owner.sign(false, SignatureType::Binary, true);
    verify_now(&binary, &keys).unwrap();
    let by_subkey = owner.sign(true, SignatureType::Binary, true);
    verify_now(&by_subkey, &keys).unwrap();
    // A statement about nothing, or about a time, is computed over bytes, too.
    for kind in [SignatureType::Standalone, SignatureType::Timestamp] {
        let signature = owner.sign(false, kind, true);
        let (parsed, _) = DetachedSignature::from_string(&signature).unwrap();
        parsed.verify(owner.key.primary_key.public_key(), &data()).unwrap();
        refused(verify_now(&signature, &keys), "says nothing about data");
    }
    refused(
        verify_now(&owner.sign(false, SignatureType::Binary, false), &keys),
        "doesn't have an issuer",
    );
    // Another's subkey below a key of one's own: with the owner's binding, and with none that is
    // valid.
    let mut stolen = thief.public();
    stolen.public_subkeys = owner.public().public_subkeys;
    refused(verify_now(&by_subkey, &Forge::text(&stolen)), "the subkey does not belong to the key");
    // One's own binding of another's subkey lacks what only that subkey could sign.
    let subkey = &owner.public().public_subkeys[0].key;
    let mut config = SignatureConfig::v4(
        SignatureType::SubkeyBinding,
        thief.key.primary_key.algorithm(),
        HashAlgorithm::Sha256,
    );
    let mut flags = pgp::packet::KeyFlags::default();
    flags.set_sign(true);
    config.hashed_subpackets = [
        SubpacketData::SignatureCreationTime(Timestamp::now()),
        SubpacketData::KeyFlags(flags),
        SubpacketData::IssuerFingerprint(thief.key.primary_key.fingerprint()),
    ]
    .map(|d| Subpacket::regular(d).unwrap())
    .into();
    let binding = config
        .sign_subkey_binding(
            &thief.key.primary_key,
            thief.key.primary_key.public_key(),
            &Password::empty(),
            subkey,
        )
        .unwrap();
    stolen.public_subkeys[0].signatures = vec![binding];
    refused(verify_now(&by_subkey, &Forge::text(&stolen)), "missing cross-signature");
    // Another's users and what they were certified for.
    let mut claimed = owner.public();
    claimed.details = thief.public().details;
    refused(verify_now(&binary, &Forge::text(&claimed)), "no valid signature of its own");
    // A revocation by somebody else cannot be judged.
    let mut config = SignatureConfig::v4(
        SignatureType::KeyRevocation,
        thief.key.primary_key.algorithm(),
        HashAlgorithm::Sha256,
    );
    config.hashed_subpackets =
        vec![Subpacket::regular(SubpacketData::SignatureCreationTime(Timestamp::now())).unwrap()];
    let revocation = config
        .sign_key(&thief.key.primary_key, &Password::empty(), owner.key.primary_key.public_key())
        .unwrap();
    let mut revoked = owner.public();
    revoked.details.revocation_signatures.push(revocation);
    refused(verify_now(&binary, &Forge::text(&revoked)), "a revocation that cannot be verified");
}

#[test]
fn a_key_with_very_many_signatures_is_refused() {
    let forge = Forge::new();
    let mut public = forge.public();
    let one = public.details.users[0].signatures[0].clone();
    public.details.users[0].signatures = vec![one; MAX_OWN_SIGNATURES + 1];
    let signature = forge.sign(false, SignatureType::Binary, true);
    refused(verify_now(&signature, &Forge::text(&public)), "more than 512 signatures of its own");
    public.details.users[0].signatures.truncate(MAX_OWN_SIGNATURES);
    verify_now(&signature, &Forge::text(&public)).unwrap();
}

#[test]
fn data_is_not_read_for_very_many_signatures() {
    let bytes = |name: &str| {
        pgp::ser::Serialize::to_bytes(&DetachedSignature::from_string(&fixture(name)).unwrap().0)
            .unwrap()
    };
    let changed = b"signed data\nof three lines\n";
    let many = |n: usize| {
        armored("PGP SIGNATURE", &[bytes("sha384.sig").repeat(n), bytes("ed25519.sig")].concat())
    };
    let key = fixture("ed25519.pub");
    let fault = verify(changed, &many(MAX_TRIES + 20), &key).unwrap_err().to_string();
    assert!(
        fault.contains("more than 8 keys would have to be tried")
            && fault.matches("was changed").count() == 7,
        "{fault}"
    );
    // Those that are refused unread are not counted.
    let weak = [bytes("sha1.sig").repeat(3 * MAX_TRIES), bytes("rsa2048.sig")].concat();
    verify(&data(), &armored("PGP SIGNATURE", &weak), &fixture("rsa2048.pub")).unwrap();
}

/// A tag whose message is the signed data, with a signature behind it.
fn tag(signature: &str) -> (Vec<u8>, String) {
    let raw = [&data()[..], signature.as_bytes()].concat();
    let mut hash = ring::digest::Context::new(&ring::digest::SHA1_FOR_LEGACY_USE_ONLY);
    hash.update(format!("tag {}\0", raw.len()).as_bytes());
    hash.update(&raw);
    let name = hash.finish().as_ref().iter().map(|b| format!("{b:02x}")).collect();
    (raw, name)
}

fn verify_tag(signature: &str, keys: &str) -> Result<(), Fault> {
    let (raw, name) = tag(signature);
    let trusted = Trusted { keys, validity: Validity::Now, now: year(2026) };
    GitObject::parse(ObjectKind::Tag, &name, &raw)?.verify(&trusted)
}

#[test]
fn ssh_signatures_of_every_algorithm_are_verified() {
    for kind in ["ed25519", "ecdsa-256", "ecdsa-384", "ecdsa-521", "rsa-3072"] {
        let (key, signature) =
            (fixture(&format!("ssh-{kind}.pub")), fixture(&format!("ssh-{kind}.sig")));
        verify_tag(&signature, &key).unwrap_or_else(|e| panic!("{kind}: {e:?}"));
        verify_tag(&signature, &format!("# mine\ncommand=\"a b\",restrict {key}")).unwrap();
        refused(
            verify_tag(&signature, &fixture("ssh-other.pub")),
            "failed to verify ssh signature: public key does not match",
        );
        let changed = format!("one more line\n{signature}");
        refused(
            verify_tag(&changed, &key),
            "failed to verify ssh signature: signature did not verify",
        );
    }
    verify_tag(&fixture("ssh-sha256.sig"), &fixture("ssh-ed25519.pub")).unwrap();
    for (name, key, why) in [
        ("file", "ed25519", "unexpected SSH signature namespace: \"file\""),
        ("rsa-1024", "rsa-1024", "RSA key too short: 1024 bits"),
    ] {
        refused(
            verify_tag(&fixture(&format!("ssh-{name}.sig")), &fixture(&format!("ssh-{key}.pub"))),
            why,
        );
    }
    let whole = fixture("ssh-ed25519.sig");
    refused(verify_tag(&whole, &fixture("user1.pub")), "failed to parse ssh public key");
    refused(
        verify_tag(&fixture("user1.sig"), &fixture("ssh-ed25519.pub")),
        "failed to read armored public key",
    );
    refused(
        verify_tag(&whole[..whole.len() / 2], &fixture("ssh-ed25519.pub")),
        "failed to parse ssh signature",
    );
    refused(verify_tag("", &fixture("ssh-ed25519.pub")), "git object is not signed");
    refused(
        verify_tag("-----BEGIN SIGNED MESSAGE-----\n", &fixture("ssh-ed25519.pub")),
        "invalid signature format",
    );
}

#[track_caller]
fn git(dir: &Path, arguments: &[&str]) -> Vec<u8> {
    let output = Command::new("git").current_dir(dir).args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

#[test]
fn objects_that_git_signed_are_verified() {
    use ObjectKind::{Commit, Tag};
    for format in ["sha1", "sha256"] {
        let dir =
            std::env::temp_dir().join(format!("shipway-signing-{}-{format}", std::process::id()));
        git(
            Path::new("/"),
            &[
                "clone",
                "-q",
                "--bare",
                path(&format!("git-{format}.bundle")).to_str().unwrap(),
                dir.to_str().unwrap(),
            ],
        );
        let object = |kind: ObjectKind, reference: &str| {
            let name =
                String::from_utf8(git(&dir, &["rev-parse", reference])).unwrap().trim().to_owned();
            (git(&dir, &["cat-file", kind.name(), &name]), name)
        };
        for (kind, reference, key, why) in [
            (Commit, "b-pgp", "user1.pub", ""),
            (Commit, "b-pgp", "user2.pub", "signature made by unknown entity"),
            (Commit, "both^{}", "ssh-ed25519.pub", ""),
            (Commit, "both^{}", "ssh-other.pub", "public key does not match"),
            (Commit, "b-unsigned", "user1.pub", "git object is not signed"),
            (Tag, "both", "ssh-other.pub", ""),
            (Tag, "nested", "ssh-other.pub", ""),
            (Tag, "tag-pgp", "user1.pub", ""),
            (Tag, "plain", "user1.pub", "git object is not signed"),
        ] {
            let (raw, name) = object(kind, reference);
            let keys = fixture(key);
            let trusted = Trusted { keys: &keys, validity: Validity::AtSigning, now: year(2026) };
            let verified = GitObject::parse(kind, &name, &raw).unwrap().verify(&trusted);
            match why {
                "" => verified.unwrap_or_else(|e| panic!("{format} {reference}: {e:?}")),
                why => refused(verified, why),
            }
            // Another object of the same name is none.
            let mut changed = raw.clone();
            *changed.last_mut().unwrap() ^= 1;
            refused(
                GitObject::parse(kind, &name, &changed).map(drop),
                "checksum verification failed",
            );
        }
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
