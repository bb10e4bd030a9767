//! As much of DER as keys and signatures need.

pub(super) const INTEGER: u8 = 0x02;
pub(super) const BITS: u8 = 0x03;
pub(super) const OBJECT: u8 = 0x06;
pub(super) const SEQUENCE: u8 = 0x30;
const OCTETS: u8 = 0x04;

pub(super) const ED25519: &[u8] = &[0x2b, 0x65, 0x70];
pub(super) const RSA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01];
pub(super) const EC: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01];
pub(super) const P256: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];
pub(super) const P384: &[u8] = &[0x2b, 0x81, 0x04, 0x00, 0x22];

/// The contents of the next value, which must be of kind `tag`.
pub(super) fn read<'a>(from: &mut &'a [u8], tag: u8) -> Option<&'a [u8]> {
    let (&found, rest) = from.split_first()?;
    let (&first, mut rest) = rest.split_first()?;
    let mut length = usize::from(first);
    if first & 0x80 != 0 {
        let (bytes, after) = rest
            .split_at_checked(usize::from(first & 0x7f))
            .filter(|(b, _)| (1..=4).contains(&b.len()))?;
        length = bytes.iter().fold(0, |sum, b| sum << 8 | usize::from(*b));
        rest = after;
    }
    let (value, after) = rest.split_at_checked(length).filter(|_| found == tag)?;
    *from = after;
    Some(value)
}

fn value(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let length: usize = parts.iter().map(|p| p.len()).sum();
    let mut out = vec![tag];
    if length < 0x80 {
        out.push(length as u8);
    } else {
        let bytes: Vec<u8> = length.to_be_bytes().into_iter().skip_while(|b| *b == 0).collect();
        out.push(0x80 | bytes.len() as u8);
        out.extend(bytes);
    }
    parts.iter().for_each(|p| out.extend_from_slice(p));
    out
}

/// A positive number.
fn integer(bytes: &[u8]) -> Vec<u8> {
    let bytes = trim(bytes);
    let sign: &[u8] = if bytes.first().is_none_or(|b| b & 0x80 != 0) { &[0] } else { &[] };
    value(INTEGER, &[sign, bytes])
}

fn trim(bytes: &[u8]) -> &[u8] {
    &bytes[bytes.iter().take_while(|b| **b == 0).count()..]
}

/// A seed as PKCS#8.
pub(super) fn ed25519(seed: &[u8]) -> Vec<u8> {
    let algorithm = value(SEQUENCE, &[&value(OBJECT, &[ED25519])]);
    value(SEQUENCE, &[&integer(&[0]), &algorithm, &value(OCTETS, &[&value(OCTETS, &[seed])])])
}

/// A key of `curve` as SEC1.
pub(super) fn ecdsa(curve: &[u8], secret: &[u8], point: &[u8]) -> Vec<u8> {
    let curve = value(0xa0, &[&value(OBJECT, &[curve])]);
    let point = value(0xa1, &[&value(BITS, &[&[0], point])]);
    value(SEQUENCE, &[&integer(&[1]), &value(OCTETS, &[secret]), &curve, &point])
}

/// An RSA key as PKCS#1, whose exponents for the primes are computed. None if it cannot be one.
pub(super) fn rsa(
    n: &[u8],
    e: &[u8],
    d: &[u8],
    p: &[u8],
    q: &[u8],
    inverse: &[u8],
) -> Option<Vec<u8>> {
    let (dp, dq) = (modulo(d, &less_one(p)?), modulo(d, &less_one(q)?));
    let numbers: Vec<u8> = [&[0][..], n, e, d, p, q, &dp, &dq, inverse]
        .iter()
        .flat_map(|number| integer(number))
        .collect();
    Some(value(SEQUENCE, &[&numbers]))
}

/// An odd number that is not one, less one.
fn less_one(odd: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = trim(odd).to_vec();
    let last = bytes.last_mut().filter(|b| **b & 1 == 1)?;
    *last -= 1;
    bytes.iter().any(|b| *b != 0).then_some(bytes)
}

/// `a mod m`, bit by bit; `m` is not zero and has no zeros in front.
fn modulo(a: &[u8], m: &[u8]) -> Vec<u8> {
    // One byte more than `m`, for the bit that comes in.
    let mut rest = vec![0_u8; m.len() + 1];
    for bit in a.iter().flat_map(|byte| (0..8).rev().map(move |n| byte >> n & 1)) {
        let mut carry = bit;
        for byte in rest.iter_mut().rev() {
            (*byte, carry) = (*byte << 1 | carry, *byte >> 7);
        }
        if rest[0] != 0 || rest[1..] >= *m {
            let mut borrow = 0;
            for (n, byte) in rest.iter_mut().enumerate().rev() {
                let less = if n == 0 { 0 } else { i16::from(m[n - 1]) };
                let left = i16::from(*byte) - less - borrow;
                borrow = i16::from(left < 0);
                *byte = left.rem_euclid(256) as u8;
            }
        }
    }
    rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_divided_as_the_machine_does() {
        let mut seed = 1_u64;
        for _ in 0..2000 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let (a, m) = (seed, (seed >> (seed % 60)).max(1) | 1);
            let left = modulo(&a.to_be_bytes(), trim(&m.to_be_bytes()));
            assert_eq!(
                left.iter().fold(0_u64, |sum, b| sum << 8 | u64::from(*b)),
                a % m,
                "{a} % {m}"
            );
        }
        assert_eq!(less_one(&[0, 1, 1]), Some(vec![1, 0]));
        assert_eq!((less_one(&[2]), less_one(&[1]), less_one(&[])), (None, None, None));
    }

    #[test]
    fn what_is_cut_or_of_another_kind_is_not_read() {
        let long = value(OCTETS, &[&[7; 300]]);
        assert_eq!(read(&mut &long[..], OCTETS), Some(&[7_u8; 300][..]));
        for bad in [
            &long[..200],
            &[OCTETS],
            &[OCTETS, 0x85, 1, 1, 1, 1, 1],
            &[OCTETS, 0x80],
            &[SEQUENCE, 0],
        ] {
            assert_eq!(read(&mut &bad[..], OCTETS), None);
        }
    }
}
