//! PGP signatures: which key made one, and whether that key may (RFC 9580).

use crate::{
    MAX_KEYS, MAX_OWN_SIGNATURES, MAX_SIGNATURE, MAX_TRIES, MIN_RSA_BITS, Trusted, Validity,
    blocks, bounded, refused,
};
use pgp::{
    composed::{
        Deserializable, DetachedSignature, PublicOrSecret, SignedPublicKey, SignedPublicSubKey,
    },
    crypto::{hash::HashAlgorithm, public_key::PublicKeyAlgorithm},
    packet::{RevocationCode, Signature, SignatureType, SignatureVersion, SubpacketData},
    types::{Duration, KeyDetails, KeyVersion, PublicParams, Tag, Timestamp, VerifyingKey},
};
use shipway_fault::{Fault, Result};
use std::{
    io::{Read, Seek},
    time::UNIX_EPOCH,
};

/// How far ahead of ours the clock of the signer may be, in seconds.
const MAX_AHEAD: u64 = 5 * 60;

/// Most reasons, and keys, in one error.
const MAX_TOLD: usize = 8;

/// Why something does not count.
type Why = String;

/// Whether `signature` (armored) is one of `data` by a key in `trusted`.
///
/// `data` is read from its beginning, once for every key with the identifier that the signature
/// names ([`MAX_TRIES`]).
///
/// # Errors
///
/// It is not, or `data` cannot be read; the fault says why, and what to try.
pub fn verify_detached(
    data: impl Read + Seek,
    signature: &str,
    trusted: &Trusted<'_>,
) -> Result<()> {
    verify(data, signature, trusted)
        .map_err(|fault| fault.context("failed to verify pgp signature"))
}

/// The same without the context.
pub(crate) fn verify(
    mut data: impl Read + Seek,
    armored: &str,
    trusted: &Trusted<'_>,
) -> Result<()> {
    let signatures = signatures(armored)?;
    let keys = keys(trusted.keys)?;
    let mut budget = Budget(MAX_OWN_SIGNATURES);
    let (mut refusals, mut tries) = (Vec::new(), 0);
    'all: for signature in &signatures {
        let by = issuer(signature);
        let refuse = |why: Why| format!("signature by {by}: {why}");
        let times = match acceptable(signature).and_then(|created| Times::of(created, trusted)) {
            Ok(times) => times,
            Err(why) => {
                refusals.push(refuse(why));
                continue;
            }
        };
        let mut known = false;
        for signer in keys.iter().flat_map(|key| signers(key, signature)) {
            known = true;
            if let Err(why) = signer.may_sign(signature, &times, &mut budget) {
                refusals.push(refuse(why));
                continue;
            }
            if tries == MAX_TRIES {
                refusals.push(format!("more than {MAX_TRIES} keys would have to be tried"));
                break 'all;
            }
            tries += 1;
            data.rewind().map_err(|e| Fault::io("read what is signed", e))?;
            match signer.made(signature, &mut data) {
                Ok(()) => return Ok(()),
                Err(why) => refusals.push(refuse(why)),
            }
        }
        if !known {
            refusals.push(refuse("signature made by unknown entity".into()));
        }
    }
    if refusals.len() > MAX_TOLD {
        // The last one may say why there are no more.
        refusals.drain(MAX_TOLD - 1..refusals.len() - 1);
    }
    let names: Vec<_> = keys
        .iter()
        .take(MAX_TOLD)
        .map(|key| key.primary_key.fingerprint().to_string().to_uppercase())
        .collect();
    Err(refused(refusals.join("; "))
        .hint(format!("the keys to verify with are {}", names.join(", "))))
}

/// The signatures in an armored block.
fn signatures(armored: &str) -> Result<Vec<Signature>> {
    bounded("the PGP signature", armored.len(), MAX_SIGNATURE)?;
    let failed = |why: &str| {
        refused(format!("failed to decode armored signature: {why}"))
            .hint("a detached signature in text form is wanted: gpg --armor --detach-sign")
    };
    let (_, block) = blocks(armored)
        .next()
        .ok_or_else(|| failed("it has no line -----BEGIN PGP SIGNATURE-----"))?;
    let (found, _) = DetachedSignature::from_armor_many_buf(block.as_bytes())
        .map_err(|e| failed(&e.to_string()))?;
    let found = found
        .map(|one| one.map(|one| one.signature))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| failed(&e.to_string()))?;
    if found.is_empty() { Err(failed("no signature packet found")) } else { Ok(found) }
}

/// The keys in one or more armored blocks. Parts of one key that come in several blocks are one
/// key.
fn keys(text: &str) -> Result<Vec<SignedPublicKey>> {
    bounded("the text of the PGP public keys", text.len(), MAX_KEYS)?;
    let failed = |why: &str| {
        Fault::invalid(format!("failed to read armored public key: {why}"))
            .hint("the signature is by a PGP key, so it needs PGP keys to be verified with, in text form: gpg --armor --export")
    };
    let mut all: Vec<SignedPublicKey> = Vec::new();
    let mut unreadable = None;
    for (kind, block) in blocks(text) {
        if !matches!(kind, "PGP PUBLIC KEY BLOCK" | "PGP PRIVATE KEY BLOCK") {
            return Err(failed(&format!("expected public or private key block, got: {kind}")));
        }
        let (found, _) = PublicOrSecret::from_armor_many_buf(block.as_bytes())
            .map_err(|e| failed(&e.to_string()))?;
        for key in found {
            match key {
                Ok(PublicOrSecret::Public(key)) => add(&mut all, key),
                Ok(PublicOrSecret::Secret(key)) => add(&mut all, key.to_public_key()),
                // One unusable key among many is no reason to refuse the others.
                Err(e) => unreadable = Some(e.to_string()),
            }
        }
    }
    match unreadable {
        Some(why) if all.is_empty() => Err(failed(&why)),
        None if all.is_empty() => Err(failed("no armored data found")),
        _ => Ok(all),
    }
}

fn add(all: &mut Vec<SignedPublicKey>, key: SignedPublicKey) {
    match all.iter_mut().find(|k| k.primary_key == key.primary_key) {
        None => all.push(key),
        Some(known) => {
            known.details.revocation_signatures.extend(key.details.revocation_signatures);
            known.details.direct_signatures.extend(key.details.direct_signatures);
            known.details.users.extend(key.details.users);
            known.public_subkeys.extend(key.public_subkeys);
        }
    }
}

/// Who made a signature, as far as that says so.
fn issuer(signature: &Signature) -> String {
    let id = signature.issuer_key_id().first().map(ToString::to_string);
    let fingerprint = || signature.issuer_fingerprint().first().map(ToString::to_string);
    id.or_else(fingerprint).unwrap_or_else(|| "an unnamed key".into()).to_uppercase()
}

/// Whether a signature of data is one that can count, by any key; gives when that was.
fn acceptable(signature: &Signature) -> Result<Timestamp, Why> {
    let Some(config) = signature
        .config()
        .filter(|c| matches!(c.version(), SignatureVersion::V4 | SignatureVersion::V6))
    else {
        return Err(format!("unsupported signature version {:?}", signature.version()));
    };
    // Other types are not statements about data, though the same bytes may be below them.
    if !matches!(config.typ, SignatureType::Binary | SignatureType::Text) {
        return Err(format!("a signature of type {:?} says nothing about data", config.typ));
    }
    if !matches!(
        config.hash_alg,
        HashAlgorithm::Sha256 | HashAlgorithm::Sha384 | HashAlgorithm::Sha512
    ) {
        return Err(format!("rejecting weak/unknown hash: {}", config.hash_alg));
    }
    use PublicKeyAlgorithm as Algorithm;
    if !matches!(
        config.pub_alg,
        Algorithm::EdDSALegacy | Algorithm::ECDSA | Algorithm::RSA | Algorithm::RSASign
    ) {
        return Err(format!("rejecting unsupported pubkey algorithm: {:?}", config.pub_alg));
    }
    if signature.issuer_key_id().is_empty() && signature.issuer_fingerprint().is_empty() {
        return Err("signature doesn't have an issuer".into());
    }
    signature.created().ok_or_else(|| "no creation time in signature".into())
}

/// The times at which things are looked at, in seconds since 1970.
struct Times {
    /// When key and signature must be valid.
    at: u64,
    now: u64,
}

impl Times {
    fn of(created: Timestamp, trusted: &Trusted<'_>) -> Result<Self, Why> {
        let now = trusted.now.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let created = seconds(created);
        if created > now + MAX_AHEAD {
            return Err("signature creation time is in the future".into());
        }
        let at = match trusted.validity {
            Validity::AtSigning => created,
            Validity::Now => now,
        };
        Ok(Self { at, now })
    }

    /// Whether a key says something of itself that it can have said by now.
    fn said(&self, signature: &Signature) -> bool {
        signature.created().is_some_and(|created| seconds(created) <= self.now + MAX_AHEAD)
    }

    /// Whether something that began at `created` is over; a lifetime of zero is none.
    fn over(&self, created: Timestamp, lifetime: Option<Duration>) -> bool {
        lifetime
            .map(|l| u64::from(l.as_secs()))
            .filter(|l| *l > 0)
            .is_some_and(|l| self.at > seconds(created) + l)
    }
}

fn seconds(time: Timestamp) -> u64 {
    u64::from(time.as_secs())
}

/// How many more signatures are verified.
struct Budget(usize);

impl Budget {
    fn spend(&mut self) -> Result<(), Why> {
        let less = self.0.checked_sub(1).ok_or_else(|| {
            format!("the key has more than {MAX_OWN_SIGNATURES} signatures of its own")
        })?;
        self.0 = less;
        Ok(())
    }
}

/// A key that may have made a signature.
struct Signer<'k> {
    key: &'k SignedPublicKey,
    /// The subkey, if it is none but the primary key.
    subkey: Option<&'k SignedPublicSubKey>,
}

/// The keys of `key` that `signature` names.
fn signers<'k>(key: &'k SignedPublicKey, signature: &Signature) -> Vec<Signer<'k>> {
    let mut found: Vec<Signer<'k>> = Vec::new();
    if names(signature, &key.primary_key) {
        found.push(Signer { key, subkey: None });
    }
    for subkey in key.public_subkeys.iter().filter(|s| names(signature, &s.key)) {
        if !found.iter().any(|f| f.subkey.is_some_and(|s| s.key == subkey.key)) {
            found.push(Signer { key, subkey: Some(subkey) });
        }
    }
    found
}

/// Whether `signature` says that it is by `key`.
fn names(signature: &Signature, key: &impl KeyDetails) -> bool {
    signature.issuer_key_id().into_iter().any(|id| *id == key.legacy_key_id())
        || signature.issuer_fingerprint().into_iter().any(|f| *f == key.fingerprint())
}

impl Signer<'_> {
    /// Whether the signature is what the key makes of the data.
    fn made(&self, signature: &Signature, data: impl Read) -> Result<(), Why> {
        let verified = match self.subkey {
            None => signature.verify(&self.key.primary_key, data),
            Some(subkey) => signature.verify(&subkey.key, data),
        };
        verified.map_err(|e| match e {
            pgp::errors::Error::IO { source, .. } => {
                format!("what is signed cannot be read: {source}")
            }
            _ => "the signature does not belong to what is signed: one of them was changed".into(),
        })
    }

    /// Whether the key may have made such a signature.
    fn may_sign(
        &self,
        signature: &Signature,
        times: &Times,
        budget: &mut Budget,
    ) -> Result<(), Why> {
        let primary = &self.key.primary_key;
        supported(primary)?;
        self.check_revocations(budget)?;
        let own = self.self_signature(times, budget)?;
        let mut statements = vec![signature, own];
        if times.at < seconds(primary.created_at()) {
            return Err("the key was made after the signature".into());
        }
        if times.over(primary.created_at(), own.key_expiration_time()) {
            return Err(expired("key"));
        }
        let flags = match self.subkey {
            None => own.key_flags(),
            Some(subkey) => {
                supported(&subkey.key)?;
                let (binding, back) = self.binding(subkey, times, budget)?;
                if times.at < seconds(subkey.key.created_at()) {
                    return Err("the subkey was made after the signature".into());
                }
                if times.over(subkey.key.created_at(), binding.key_expiration_time()) {
                    return Err(expired("subkey"));
                }
                statements.extend([binding, back]);
                binding.key_flags()
            }
        };
        if !flags.sign() {
            return Err("the key is not one for signing".into());
        }
        for statement in statements {
            if let Some(created) = statement.created()
                && times.over(created, statement.signature_expiration_time())
            {
                return Err(expired("signature"));
            }
            if let Some(name) = critical_notation(statement) {
                return Err(format!("unknown critical notation: {name}"));
            }
        }
        Ok(())
    }

    /// Refuses a key that was revoked at any time.
    fn check_revocations(&self, budget: &mut Budget) -> Result<(), Why> {
        let Some(revocation) = self.key.details.revocation_signatures.first() else {
            return Ok(());
        };
        budget.spend()?;
        // It may be by a key that was made a revoker, whose key is not here.
        if sound(revocation).is_err() || revocation.verify_key(&self.key.primary_key).is_err() {
            return Err("the key has a revocation that cannot be verified".into());
        }
        let reason = revocation
            .revocation_reason_string()
            .map(|r| String::from_utf8_lossy(r).into_owned())
            .filter(|r| !r.is_empty());
        Err(reason.map_or_else(|| "key revoked".into(), |r| format!("key revoked: {r}")))
    }

    /// What the primary key says of itself: how long it is valid, and what it is for.
    fn self_signature(&self, times: &Times, budget: &mut Budget) -> Result<&Signature, Why> {
        let primary = &self.key.primary_key;
        if primary.version() == KeyVersion::V6 {
            let mut best = None;
            for direct in self
                .key
                .details
                .direct_signatures
                .iter()
                .filter(|s| s.typ() == Some(SignatureType::Key) && times.said(s))
            {
                budget.spend()?;
                if sound(direct).is_ok() && direct.verify_key(primary).is_ok() {
                    best = newest(best, direct);
                }
            }
            return best.ok_or_else(|| "the key has no valid signature of its own".into());
        }
        let (mut best, mut revoked): (Option<&Signature>, bool) = (None, false);
        for user in &self.key.details.users {
            // The same user may come once more in another block.
            let all = self
                .key
                .details
                .users
                .iter()
                .filter(|u| u.id == user.id)
                .flat_map(|u| &u.signatures);
            let mut own = None;
            let mut withdrawn = false;
            for certification in all.filter(|s| names(s, primary) && times.said(s)) {
                budget.spend()?;
                if sound(certification).is_err()
                    || certification.verify_certification(primary, Tag::UserId, &user.id).is_err()
                {
                    continue;
                }
                if certification.typ() == Some(SignatureType::CertRevocation) {
                    withdrawn = true;
                } else {
                    own = newest(own, certification);
                }
            }
            revoked |= withdrawn;
            let Some(own) = own.filter(|_| !withdrawn) else { continue };
            best = match best {
                Some(b) if (b.is_primary(), b.created()) >= (own.is_primary(), own.created()) => {
                    Some(b)
                }
                _ => Some(own),
            };
        }
        best.ok_or_else(|| {
            if revoked {
                "key revoked: its users were".into()
            } else {
                "the key has no valid signature of its own".into()
            }
        })
    }

    /// The statements by which primary key and subkey belong together.
    fn binding<'s>(
        &'s self,
        subkey: &SignedPublicSubKey,
        times: &Times,
        budget: &mut Budget,
    ) -> Result<(&'s Signature, &'s Signature), Why> {
        let primary = &self.key.primary_key;
        let mut best = None;
        let all = self
            .key
            .public_subkeys
            .iter()
            .filter(|s| s.key == subkey.key)
            .flat_map(|s| &s.signatures);
        for signature in all.filter(|s| times.said(s)) {
            budget.spend()?;
            if sound(signature).is_err()
                || signature.verify_subkey_binding(primary, &subkey.key).is_err()
            {
                continue;
            }
            if signature.typ() == Some(SignatureType::SubkeyRevocation) {
                let before =
                    signature.created().is_some_and(|created| seconds(created) <= times.at);
                if before || is_hard(signature) {
                    return Err("the subkey is revoked".into());
                }
            } else {
                best = newest(best, signature);
            }
        }
        let binding: &Signature = best.ok_or("the subkey does not belong to the key")?;
        budget.spend()?;
        // Without it, anyone could claim another's subkey, and with it what that signed.
        let back =
            binding.embedded_signature().ok_or("signing subkey is missing cross-signature")?;
        if sound(back).is_err() || back.verify_primary_key_binding(&subkey.key, primary).is_err() {
            return Err("the cross-signature of the signing subkey is not valid".into());
        }
        Ok((binding, back))
    }
}

/// The newer of two.
fn newest<'s>(best: Option<&'s Signature>, other: &'s Signature) -> Option<&'s Signature> {
    Some(best.filter(|b| b.created() >= other.created()).unwrap_or(other))
}

fn expired(what: &str) -> Why {
    format!("{what} expired")
}

/// Whether a revocation casts doubt on everything the key ever signed.
fn is_hard(revocation: &Signature) -> bool {
    !matches!(
        revocation.revocation_reason_code(),
        Some(RevocationCode::KeySuperseded | RevocationCode::KeyRetired)
    )
}

/// Whether what a key says of itself is hashed well enough. SHA-1 still is, as most old keys have
/// it; the library notices known collisions.
fn sound(signature: &Signature) -> Result<(), Why> {
    match signature.hash_alg() {
        Some(HashAlgorithm::Md5 | HashAlgorithm::Ripemd160) | None => Err("weak hash".into()),
        Some(_) => Ok(()),
    }
}

/// Whether a key is of a kind that counts.
fn supported(key: &impl VerifyingKey) -> Result<(), Why> {
    if !matches!(key.version(), KeyVersion::V4 | KeyVersion::V6) {
        return Err(format!("keys of version {:?} are not supported", key.version()));
    }
    if let PublicParams::RSA(rsa) = key.public_params() {
        let bits = bits(rsa);
        if bits < MIN_RSA_BITS {
            return Err(format!("RSA key too short: {bits} bits"));
        }
    }
    Ok(())
}

/// Length of the modulus, which comes first: two bytes of its length in bits and the number (RFC
/// 9580, section 3.2).
fn bits(rsa: &pgp::types::RsaPublicParams) -> usize {
    let mut bytes = Vec::new();
    match pgp::ser::Serialize::to_writer(rsa, &mut bytes) {
        Ok(()) if bytes.len() > 2 => usize::from(u16::from_be_bytes([bytes[0], bytes[1]])),
        _ => 0,
    }
}

/// A notation that must not be ignored, and that is unknown here.
fn critical_notation(signature: &Signature) -> Option<String> {
    signature.config()?.hashed_subpackets().find_map(|p| match &p.data {
        SubpacketData::Notation(n) if p.is_critical => {
            Some(String::from_utf8_lossy(&n.name).into_owned())
        }
        _ => None,
    })
}
