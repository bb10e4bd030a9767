//! What is read of a client's certificate (RFC 5280): the names of its holder.

use x509_parser::{certificate::X509Certificate, extensions::GeneralName, prelude::FromDer as _};

/// Most names of one kind that are taken from a certificate.
const MAX_NAMES: usize = 100;

/// The names of a certificate's holder. Which authority has issued it is checked when the
/// connection is made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PeerCertificate {
    /// Common names of the subject.
    pub common_names: Vec<String>,
    /// Names of hosts among the alternative ones.
    pub dns: Vec<String>,
    /// Addresses among the alternative names, such as SPIFFE ids.
    pub uris: Vec<String>,
    /// Mail addresses among the alternative names.
    pub emails: Vec<String>,
}

impl PeerCertificate {
    /// Reads a certificate in DER. One that cannot be read has no names.
    pub(crate) fn of(der: &[u8]) -> Option<Self> {
        let (_, certificate) = X509Certificate::from_der(der)
            .inspect_err(|error| tracing::warn!(%error, "failed to read a client's certificate"))
            .ok()?;
        let mut names = Self::default();
        for name in certificate.subject().iter_common_name().take(MAX_NAMES) {
            names.common_names.extend(name.as_str().ok().map(str::to_owned));
        }
        let alternative = certificate.subject_alternative_name().ok().flatten();
        for name in alternative.iter().flat_map(|san| &san.value.general_names) {
            let (all, text) = match name {
                GeneralName::DNSName(text) => (&mut names.dns, text),
                GeneralName::URI(text) => (&mut names.uris, text),
                GeneralName::RFC822Name(text) => (&mut names.emails, text),
                _ => continue,
            };
            if all.len() < MAX_NAMES {
                all.push((*text).to_owned());
            }
        }
        Some(names)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, DnType, KeyPair, SanType};

    fn made(names: &[SanType]) -> PeerCertificate {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "alice");
        params.subject_alt_names = names.to_vec();
        let key = KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("a certificate");
        PeerCertificate::of(certificate.der()).expect("a certificate that can be read")
    }

    #[test]
    fn the_names_of_a_certificate_are_read() {
        let uri = SanType::URI("spiffe://trust.test/ns/x".try_into().expect("a name"));
        let dns = SanType::DnsName("a.test".try_into().expect("a name"));
        let mail = SanType::Rfc822Name("a@b.test".try_into().expect("a name"));
        let names = made(&[uri, dns, mail, SanType::IpAddress([127, 0, 0, 1].into())]);
        let texts = |all: &[&str]| all.iter().map(|t| (*t).to_owned()).collect::<Vec<_>>();
        let expected = PeerCertificate {
            common_names: texts(&["alice"]),
            dns: texts(&["a.test"]),
            uris: texts(&["spiffe://trust.test/ns/x"]),
            emails: texts(&["a@b.test"]),
        };
        assert_eq!(names, expected);
    }

    #[test]
    fn a_certificate_may_have_so_many_names_and_be_no_certificate() {
        let many: Vec<SanType> = (0..=MAX_NAMES)
            .map(|n| SanType::DnsName(format!("h{n}.test").try_into().expect("a name")))
            .collect();
        assert_eq!(made(&many).dns.len(), MAX_NAMES);
        for bad in [&b""[..], b"no DER", &[0x30, 0x82, 0xff, 0xff], &[0x30; 100]] {
            assert_eq!(PeerCertificate::of(bad), None);
        }
    }
}
