//! Addresses of networks.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{
    Args, CallError, Entry,
    Param::{Number as Num, Text},
    Result,
};
use crate::value::Value;

pub(super) static TABLE: &[Entry] = &[
    ("cidrhost", &[Text, Num], None, |a| {
        let network = Network::parse(a.text(0)?)?;
        let n = i128::from(a.whole(1)?);
        let room = network.bits - network.prefix;
        // Negative numbers count from the end.
        let size = if room >= 127 { i128::MAX } else { 1i128 << room };
        let host = if n < 0 { size + n } else { n };
        if host < 0 || host >= size {
            return Err(format!(
                "prefix of {} does not accommodate a host numbered {n}",
                network.prefix
            )
            .into());
        }
        Ok(Value::string(network.address(network.start | host.unsigned_abs()).to_string()))
    }),
    ("cidrnetmask", &[Text], None, |a| {
        let network = Network::parse(a.text(0)?)?;
        Ok(Value::string(network.address(network.mask()).to_string()))
    }),
    ("cidrsubnet", &[Text, Num, Num], None, |a| {
        let network = Network::parse(a.text(0)?)?;
        let more = extension(a, 1)?;
        let prefix = network.prefix + more;
        if prefix > network.bits {
            return Err(format!(
                "insufficient address space to extend prefix of {} by {more}",
                network.prefix
            )
            .into());
        }
        let n = u128::try_from(a.whole(2)?).ok().filter(|n| *n < 1u128 << more);
        let n = n.ok_or_else(|| {
            format!(
                "prefix extension of {more} does not accommodate a subnet numbered {}",
                a.whole(2).unwrap_or_default()
            )
        })?;
        let start = network.start | n.checked_shl(network.bits - prefix).unwrap_or(0);
        Ok(Value::string(Network { start, prefix, ..network }.to_string()))
    }),
    ("cidrsubnets", &[Text], Some(Num), |a| {
        let network = Network::parse(a.text(0)?)?;
        // In units of addresses, from the start of the network.
        let mut next = 0u128;
        let mut found = Vec::new();
        for n in 1..a.values.len() {
            let more = extension(a, n)?;
            if more < 1 {
                return Err(CallError::argument(n, "must extend prefix by at least one bit"));
            }
            let prefix = network.prefix + more;
            if prefix > network.bits {
                return Err(CallError::argument(
                    n,
                    format!("would extend prefix to {prefix} bits, which is too long"),
                ));
            }
            let room = network.bits - prefix;
            let size = 1u128.checked_shl(room).ok_or("the network is too large")?;
            let offset = next.div_ceil(size) * size;
            if network.prefix > 0 && offset >> (network.bits - network.prefix) != 0 {
                return Err(CallError::argument(
                    n,
                    format!(
                        "not enough remaining address space for a subnet with a prefix of {prefix} bits"
                    ),
                ));
            }
            next = offset.saturating_add(size);
            found.push(Network { start: network.start | offset, prefix, ..network }.to_string());
        }
        Ok(Value::strings(found))
    }),
];

fn extension(args: &Args<'_>, n: usize) -> Result<u32> {
    match u32::try_from(args.whole(n)?) {
        Ok(bits) if bits <= 32 => Ok(bits),
        _ => Err(CallError::argument(n, "may not extend prefix by more than 32 bits")),
    }
}

/// A network: its first address, and how many of the bits are its own.
#[derive(Clone, Copy)]
struct Network {
    start: u128,
    prefix: u32,
    bits: u32,
}

impl Network {
    fn parse(text: &str) -> Result<Self> {
        let invalid = || format!("invalid CIDR expression: invalid CIDR address: {text}");
        let (address, prefix) = text.split_once('/').ok_or_else(invalid)?;
        let (number, bits) = match address.parse().map_err(|_| invalid())? {
            IpAddr::V4(ip) => (u128::from(u32::from(ip)), 32),
            IpAddr::V6(ip) => (u128::from(ip), 128),
        };
        let prefix: u32 = prefix.parse().ok().filter(|p| *p <= bits).ok_or_else(invalid)?;
        let network = Self { start: number, prefix, bits };
        Ok(Self { start: number & network.mask(), ..network })
    }

    fn mask(self) -> u128 {
        let all = if self.bits == 128 { u128::MAX } else { (1 << self.bits) - 1 };
        all & !(all.checked_shr(self.prefix).unwrap_or(0))
    }

    fn address(self, number: u128) -> IpAddr {
        match self.bits {
            32 => IpAddr::V4(Ipv4Addr::from(u32::try_from(number).unwrap_or(u32::MAX))),
            _ => IpAddr::V6(Ipv6Addr::from(number)),
        }
    }
}

impl std::fmt::Display for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.address(self.start), self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::check;

    #[test]
    fn networks_are_divided() {
        check(r#"cidrhost("10.12.127.0/20", 16)"#, r#""10.12.112.16""#);
        check(r#"cidrhost("10.12.112.0/20", -1)"#, r#""10.12.127.255""#);
        check(r#"cidrhost("fd00:fd12:3456:7890::/72", 34)"#, r#""fd00:fd12:3456:7890::22""#);
        check(r#"cidrnetmask("172.16.0.0/12")"#, r#""255.240.0.0""#);
        check(r#"cidrsubnet("172.16.0.0/12", 4, 2)"#, r#""172.18.0.0/16""#);
        check(
            r#"cidrsubnets("10.1.0.0/16", 4, 4, 8, 4)"#,
            r#"["10.1.0.0/20","10.1.16.0/20","10.1.32.0/24","10.1.48.0/20"]"#,
        );
        check(
            r#"cidrhost("10.0.0.0/30", 9)"#,
            "error Error in function call; Call to function \"cidrhost\" failed: prefix of 30 does not accommodate a host numbered 9.",
        );
    }
}
