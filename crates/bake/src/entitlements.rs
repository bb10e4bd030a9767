//! What a definition may do beyond building, since it may come from elsewhere.

use shipway_fault::{Fault, Result};
use shipway_gocompat::csv_fields;
use shipway_oci::NetworkName;
use std::collections::BTreeSet;

/// Devices that are granted or asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Devices {
    /// None.
    #[default]
    None,
    /// These.
    Named(Vec<String>),
    /// All.
    All,
}

/// What is granted, by `--allow` or by the caller.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Granted {
    /// The network of the host.
    pub network_host: bool,
    /// Networks of the daemon's configuration.
    pub networks: BTreeSet<NetworkName>,
    /// Privileged steps.
    pub security_insecure: bool,
    /// The default SSH agent.
    pub ssh: bool,
    /// Devices.
    pub devices: Devices,
    /// Files and directories that are read; `*` for all.
    pub read: Vec<String>,
    /// Files and directories that are written; `*` for all.
    pub write: Vec<String>,
}

impl Granted {
    /// Values of `--allow`.
    pub fn parse(values: &[String]) -> Result<Self> {
        let mut granted = Self::default();
        for value in values {
            let (key, rest) = value.split_once('=').unwrap_or((value, ""));
            match key {
                "network.host" if rest.is_empty() => granted.network_host = true,
                _ if rest.is_empty() && NetworkName::of_entitlement(key).is_some() => {
                    granted.networks.extend(NetworkName::of_entitlement(key));
                }
                "security.insecure" if rest.is_empty() => granted.security_insecure = true,
                "ssh" if rest.is_empty() => granted.ssh = true,
                "device" => granted.devices.add(rest)?,
                "fs.read" => granted.read.push(rest.to_owned()),
                "fs.write" => granted.write.push(rest.to_owned()),
                "fs" => {
                    granted.read.push(rest.to_owned());
                    granted.write.push(rest.to_owned());
                }
                // Other programs accept these, and nothing requires them.
                "image.push" | "image.load" | "image" => {}
                _ => {
                    let fault = Fault::invalid(format!("unknown entitlement key {key:?}"));
                    const KNOWN: [&str; 7] = [
                        "network.host",
                        "security.insecure",
                        "ssh",
                        "device",
                        "fs",
                        "fs.read",
                        "fs.write",
                    ];
                    return Err(match shipway_fault::nearest(key, KNOWN) {
                        Some(near) => fault.hint(format!("did you mean {near}?")),
                        None => fault.hint(format!("entitlements are {}", KNOWN.join(", "))),
                    });
                }
            }
        }
        Ok(granted)
    }
}

impl Devices {
    /// Adds what `device=…` names; nothing is all.
    pub fn add(&mut self, text: &str) -> Result<()> {
        if text.is_empty() {
            *self = Self::All;
            return Ok(());
        }
        let fields = csv_fields(text, ',')
            .map_err(|_| Fault::invalid(format!("failed to parse device entitlement {text:?}")))?;
        let name = fields.into_iter().next().unwrap_or_default();
        match self {
            Self::All => {}
            Self::None => *self = Self::Named(vec![name]),
            Self::Named(names) => {
                if !names.contains(&name) {
                    names.push(name);
                }
            }
        }
        Ok(())
    }

    /// Those that `self` has and `granted` has not.
    pub fn beyond(&self, granted: &Self) -> Self {
        match (self, granted) {
            (Self::None, _) | (_, Self::All) => Self::None,
            (Self::All, _) => Self::All,
            (Self::Named(names), granted) => {
                let have: &[String] = match granted {
                    Self::Named(have) => have,
                    _ => &[],
                };
                let more: Vec<String> =
                    names.iter().filter(|n| !have.contains(n)).cloned().collect();
                if more.is_empty() { Self::None } else { Self::Named(more) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_granted_is_told_by_name() {
        let words = ["network.host", "fs=/x", "fs.read=*", "ssh", "device=a", "device=b,x=y"];
        let granted = Granted::parse(&words.map(String::from)).unwrap();
        assert_eq!(granted.read, ["/x", "*"]);
        assert_eq!(granted.write, ["/x"]);
        assert_eq!(granted.devices, Devices::Named(vec!["a".into(), "b".into()]));
        assert!(granted.network_host && granted.ssh && !granted.security_insecure);
        let corp = Granted::parse(&["network.corp".into()]).unwrap();
        assert!(!corp.network_host && corp.networks.len() == 1);
        let fault = Granted::parse(&["fs.raed=x".into()]).unwrap_err();
        assert_eq!(fault.to_string(), "unknown entitlement key \"fs.raed\"");
        assert_eq!(fault.hints().collect::<Vec<_>>(), ["did you mean fs.read?"]);
    }
}
