//! Which servers steps on the proxy network may reach at all: the operator's word, before builds'
//! policies are asked (row `toml.egress`).

use shipway_fault::{Fault, Result};
use shipway_http::Network;
use std::{fmt, net::IpAddr, str::FromStr};

/// Servers by name or address.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Pattern {
    /// `example.org`
    Host(String),
    /// `*.example.org`: the names below it, not itself.
    Below(String),
    /// `10.0.0.0/8`, or one address.
    Network(Network),
}

impl FromStr for Pattern {
    type Err = Fault;

    fn from_str(text: &str) -> Result<Self> {
        if let Ok(network) = text.parse() {
            return Ok(Self::Network(network));
        }
        let lower = text.trim_end_matches('.').to_ascii_lowercase();
        let (below, name) =
            lower.strip_prefix("*.").map_or((false, lower.as_str()), |name| (true, name));
        let plain = |c: char| c.is_ascii_alphanumeric() || ['-', '_', '.'].contains(&c);
        if name.is_empty() || name.len() > 253 || !name.chars().all(plain) {
            return Err(Fault::invalid(format!("{text:?} is not a host or a network"))
                .hint("write it as example.org, *.example.org or 10.0.0.0/8, without a port"));
        }
        Ok(if below { Self::Below(name.into()) } else { Self::Host(name.into()) })
    }
}

impl Pattern {
    /// Whether it has `host`, a name in lower case or an address.
    fn has_host(&self, host: &str) -> bool {
        match self {
            Self::Host(name) => name == host,
            Self::Below(name) => host
                .strip_suffix(name.as_str())
                .is_some_and(|rest| rest.len() > 1 && rest.ends_with('.')),
            Self::Network(network) => host.parse().is_ok_and(|address| network.contains(address)),
        }
    }

    fn has_address(&self, address: IpAddr) -> bool {
        matches!(self, Self::Network(network) if network.contains(address))
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host(name) => f.write_str(name),
            Self::Below(name) => write!(f, "*.{name}"),
            Self::Network(network) => network.fmt(f),
        }
    }
}

/// The rules. What is denied is denied, whatever else allows it; with nothing that is allowed by
/// name, all else is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EgressRules {
    allow: Vec<Pattern>,
    deny: Vec<Pattern>,
}

impl EgressRules {
    /// Rules of patterns: hosts such as `example.org`, the names below one as `*.example.org`, and
    /// networks or addresses.
    ///
    /// # Errors
    /// If a text is none of these.
    pub fn new(allow: &[String], deny: &[String]) -> Result<Self> {
        let parse =
            |all: &[String]| all.iter().map(|text| text.parse()).collect::<Result<Vec<_>>>();
        Ok(Self { allow: parse(allow)?, deny: parse(deny)? })
    }

    /// Refuses `host` if no address that it may have would be allowed.
    pub(crate) fn check_host(&self, host: &str) -> Result<()> {
        if let Some(pattern) = self.deny.iter().find(|p| p.has_host(host)) {
            return Err(refusal(format!("{host} is denied ({pattern})")));
        }
        let by_address = || self.allow.iter().any(|p| matches!(p, Pattern::Network(_)));
        if self.is_allowed_by_name(host) || (host.parse::<IpAddr>().is_err() && by_address()) {
            return Ok(());
        }
        Err(refusal(format!("{host} is not among the allowed hosts")))
    }

    /// Refuses an address of `host`, which [`check_host`](Self::check_host) passed.
    pub(crate) fn check_address(&self, host: &str, address: IpAddr) -> Result<()> {
        if let Some(pattern) = self.deny.iter().find(|p| p.has_address(address)) {
            return Err(refusal(format!(
                "{host} has the address {address}, which is denied ({pattern})"
            )));
        }
        if self.is_allowed_by_name(host) || self.allow.iter().any(|p| p.has_address(address)) {
            return Ok(());
        }
        Err(refusal(format!(
            "{host} has the address {address}, which is not among the allowed ones"
        )))
    }

    fn is_allowed_by_name(&self, host: &str) -> bool {
        self.allow.is_empty() || self.allow.iter().any(|p| p.has_host(host))
    }
}

fn refusal(what: String) -> Fault {
    Fault::new(
        shipway_fault::Code::PermissionDenied,
        format!("{what} by the daemon's egress rules"),
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn rules(allow: &[&str], deny: &[&str]) -> EgressRules {
        let texts = |all: &[&str]| all.iter().map(|t| (*t).to_owned()).collect::<Vec<_>>();
        EgressRules::new(&texts(allow), &texts(deny)).unwrap()
    }

    /// Whether `host` may be connected to when it has `address`.
    fn reaches(rules: &EgressRules, host: &str, address: &str) -> bool {
        rules.check_host(host).is_ok()
            && rules.check_address(host, address.parse().unwrap()).is_ok()
    }

    #[test]
    fn denied_is_denied_and_without_anything_allowed_the_rest_is() {
        let none = EgressRules::default();
        assert!(reaches(&none, "x.example", "10.0.0.1") && reaches(&none, "::1", "::1"));
        let deny = rules(&[], &["evil.example", "*.evil.example", "169.254.0.0/16"]);
        assert!(!reaches(&deny, "evil.example", "1.2.3.4"));
        assert!(!reaches(&deny, "a.b.evil.example", "1.2.3.4"));
        assert!(reaches(&deny, "notevil.example", "1.2.3.4"));
        // By any name, and by itself.
        assert!(!reaches(&deny, "rebound.example", "169.254.169.254"));
        assert!(!reaches(&deny, "169.254.169.254", "169.254.169.254"));
        assert!(!reaches(&deny, "mapped.example", "::ffff:169.254.169.254"));
    }

    #[test]
    fn what_is_allowed_is_all_by_name_or_by_address() {
        let some = rules(&["Debian.org.", "*.debian.org", "10.1.0.0/16"], &["bad.debian.org"]);
        assert!(reaches(&some, "debian.org", "1.2.3.4"));
        assert!(reaches(&some, "deb.debian.org", "1.2.3.4"));
        assert!(!reaches(&some, "bad.debian.org", "1.2.3.4"));
        assert!(reaches(&some, "inside.example", "10.1.2.3"));
        assert!(!reaches(&some, "inside.example", "10.2.2.3"));
        assert!(reaches(&some, "10.1.2.3", "10.1.2.3"));
        assert!(!reaches(&some, "10.2.2.3", "10.2.2.3"));
        assert!(!reaches(&some, ".debian.org", "1.2.3.4"));
        // Without networks there is nothing to look up.
        assert!(rules(&["a"], &[]).check_host("b").is_err());
    }

    #[test]
    fn patterns_have_no_ports_and_no_wildcards_elsewhere() {
        for bad in ["", "*", "*.", "a:80", "http://a", "a/b", "*.*.a", "a.*", "10.0.0.0/33"] {
            assert!(EgressRules::new(&[bad.to_owned()], &[]).is_err(), "{bad}");
        }
    }
}
