//! Names of networks that an operator gives to steps.

use std::{fmt, str::FromStr, sync::Arc};

/// Longest name of a network.
pub const MAX_NETWORK_NAME: usize = 32;
/// Names that mean something else where networks are named.
const RESERVED: [&str; 4] = ["default", "host", "none", "sandbox"];
/// What asks for a network in the filter of an operation's worker constraints.
const CONSTRAINT: &str = "network==";
/// What asks for a network among entitlements, as in `network.host`.
const ENTITLEMENT: &str = "network.";

/// The name of a network in the daemon's configuration (row `exec.net.named`): letters, digits, `-`
/// and `_`. Clones share it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NetworkName(Arc<str>);

/// A text that cannot be the name of a network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkNameError(String);

impl fmt::Display for NetworkNameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is not a valid name of a network", self.0)
    }
}

impl std::error::Error for NetworkNameError {}

impl NetworkName {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The entitlement of using it.
    pub fn entitlement(&self) -> String {
        format!("{ENTITLEMENT}{self}")
    }

    /// The network that an entitlement is about; `None` for other entitlements, such as
    /// `network.host`.
    pub fn of_entitlement(text: &str) -> Option<Self> {
        text.strip_prefix(ENTITLEMENT)?.parse().ok()
    }

    /// The worker constraint by which an operation asks for it: the definition of a build has no
    /// other place for names of networks.
    pub fn constraint(&self) -> String {
        format!("{CONSTRAINT}{self}")
    }

    /// The network that a worker constraint asks for, if it is about networks.
    pub fn of_constraint(text: &str) -> Option<Result<Self, NetworkNameError>> {
        text.strip_prefix(CONSTRAINT).map(str::parse)
    }
}

impl FromStr for NetworkName {
    type Err = NetworkNameError;

    fn from_str(text: &str) -> Result<Self, NetworkNameError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        let good = text.starts_with(|c: char| c.is_ascii_alphanumeric())
            && text.len() <= MAX_NETWORK_NAME
            && text.chars().all(plain)
            && !RESERVED.contains(&text);
        if good {
            Ok(Self(text.into()))
        } else {
            Err(NetworkNameError(text.chars().take(2 * MAX_NETWORK_NAME).collect()))
        }
    }
}

impl fmt::Display for NetworkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn names_are_plain_and_not_those_of_modes() {
        for good in ["corp", "a", "7-x_Y", &"n".repeat(MAX_NETWORK_NAME)] {
            assert_eq!(good.parse::<NetworkName>().unwrap().as_str(), good);
        }
        let long = "n".repeat(MAX_NETWORK_NAME + 1);
        for bad in ["", "host", "none", "default", "sandbox", "-a", "a.b", "a/b", "ä", "a b", &long]
        {
            assert!(bad.parse::<NetworkName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn entitlements_and_constraints_name_networks() {
        let corp: NetworkName = "corp".parse().unwrap();
        assert_eq!(NetworkName::of_entitlement(&corp.entitlement()), Some(corp.clone()));
        assert_eq!(NetworkName::of_constraint(&corp.constraint()), Some(Ok(corp)));
        for other in ["network.host", "network.", "security.insecure", "network"] {
            assert_eq!(NetworkName::of_entitlement(other), None, "{other}");
        }
        assert_eq!(NetworkName::of_constraint("platform==x"), None);
        assert!(NetworkName::of_constraint("network==a b").unwrap().is_err());
    }
}
