//! Addresses that nothing is fetched from. A build names hosts that the daemon then asks, and the
//! daemon may reach what its users must not: the metadata service of a cloud, for one.

use hyper_util::client::legacy::connect::dns::{GaiResolver, Name};
use serde::Deserialize;
use std::{
    fmt,
    future::Future,
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    str::FromStr,
    task::{Context, Poll},
};
use tower_service::Service;

/// Link-local addresses, where clouds have their metadata services, and the address of Amazon's
/// among the others.
const DEFAULT: [&str; 3] = ["169.254.0.0/16", "fe80::/10", "fd00:ec2::254"];

/// A network, `10.0.0.0/8`, or one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Network {
    address: IpAddr,
    /// Leading bits that count.
    bits: u32,
}

impl Network {
    /// Whether `address` is one of its addresses. IPv4 addresses that are written as IPv6 ones are
    /// IPv4 addresses.
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address.to_canonical()) {
            (IpAddr::V4(own), IpAddr::V4(other)) => {
                self.bits == 0 || (own.to_bits() ^ other.to_bits()) >> (32 - self.bits) == 0
            }
            (IpAddr::V6(own), IpAddr::V6(other)) => {
                self.bits == 0 || (own.to_bits() ^ other.to_bits()) >> (128 - self.bits) == 0
            }
            _ => false,
        }
    }
}

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "{text:?} is not a network: want an address, or one with the number of its leading bits, as in 10.0.0.0/8"
            )
        };
        let (address, bits) =
            text.split_once('/').map_or((text, None), |(address, bits)| (address, Some(bits)));
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let all = if address.is_ipv4() { 32 } else { 128 };
        let bits = bits.map_or(Ok(all), |bits| bits.parse().map_err(|_| wrong()))?;
        if bits > all { Err(wrong()) } else { Ok(Self { address, bits }) }
    }
}

impl TryFrom<String> for Network {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.bits)
    }
}

/// Networks that are not connected to.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct DeniedNetworks(pub Vec<Network>);

impl Default for DeniedNetworks {
    fn default() -> Self {
        Self(DEFAULT.iter().filter_map(|text| text.parse().ok()).collect())
    }
}

impl DeniedNetworks {
    /// Refuses an address of one of them, in words.
    pub fn check(&self, host: &str, address: IpAddr) -> Result<(), String> {
        match self.0.iter().find(|network| network.contains(address)) {
            Some(network) => Err(format!(
                "{host} has the address {address}, and {network} is one of the daemon's deniedNetworks"
            )),
            None => Ok(()),
        }
    }

    /// Addresses of `host` that may be connected to; an error if it has others only.
    fn allowed(
        &self,
        host: &str,
        found: impl Iterator<Item = SocketAddr>,
    ) -> Result<Vec<SocketAddr>, String> {
        let (mut allowed, mut refusal) = (Vec::new(), None);
        for address in found {
            match self.check(host, address.ip()) {
                Ok(()) => allowed.push(address),
                Err(why) => refusal = Some(why),
            }
        }
        match refusal {
            Some(why) if allowed.is_empty() => Err(why),
            _ => Ok(allowed),
        }
    }

    /// Looks up a host, for programs that connect by themselves: its addresses that may be
    /// connected to. Empty if it cannot be looked up here.
    pub async fn addresses(&self, host: &str, port: u16) -> Result<Vec<IpAddr>, String> {
        let name = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let Ok(found) = tokio::net::lookup_host((name, port)).await else { return Ok(Vec::new()) };
        Ok(self.allowed(host, found)?.into_iter().map(|address| address.ip()).collect())
    }
}

/// Looks up names, and gives what may be connected to.
#[derive(Clone)]
pub(crate) struct Resolver {
    pub denied: DeniedNetworks,
    system: GaiResolver,
}

impl Resolver {
    pub fn new(denied: DeniedNetworks) -> Self {
        Self { denied, system: GaiResolver::new() }
    }
}

impl Service<Name> for Resolver {
    type Response = std::vec::IntoIter<SocketAddr>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.system.poll_ready(cx)
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let (denied, host, found) = (self.denied.clone(), name.to_string(), self.system.call(name));
        Box::pin(async move {
            let allowed = denied.allowed(&host, found.await?);
            allowed
                .map(Vec::into_iter)
                .map_err(|why| io::Error::new(io::ErrorKind::PermissionDenied, why))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn denied(networks: &[&str]) -> DeniedNetworks {
        DeniedNetworks(networks.iter().map(|n| n.parse().unwrap()).collect())
    }

    #[test]
    fn networks_have_their_addresses() {
        for (network, inside, outside) in [
            ("10.0.0.0/8", "10.255.0.1", "11.0.0.1"),
            ("192.0.2.7", "192.0.2.7", "192.0.2.6"),
            ("0.0.0.0/0", "203.0.113.9", "::1"),
            ("fe80::/10", "febf::1", "fec0::1"),
            ("::/0", "2001:db8::1", "192.0.2.1"),
            ("169.254.0.0/16", "::ffff:169.254.169.254", "169.253.0.1"),
        ] {
            let network: Network = network.parse().unwrap();
            assert!(network.contains(inside.parse().unwrap()), "{network} {inside}");
            assert!(!network.contains(outside.parse().unwrap()), "{network} {outside}");
        }
        for wrong in ["", "10.0.0.0/33", "::/129", "10.0.0.0/-1", "10.0.0/8", "host", "10.0.0.0/"] {
            assert!(wrong.parse::<Network>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn metadata_services_are_denied_and_nothing_else_unless_it_is_said() {
        let default = DeniedNetworks::default();
        assert_eq!(default.0.len(), DEFAULT.len());
        for (address, is_denied) in [
            ("169.254.169.254", true),
            ("fd00:ec2::254", true),
            ("127.0.0.1", false),
            ("10.0.0.1", false),
        ] {
            assert_eq!(
                default.check("h", address.parse().unwrap()).is_err(),
                is_denied,
                "{address}"
            );
        }
        let both: Vec<SocketAddr> =
            ["127.0.0.1:1", "192.0.2.1:1"].map(|a| a.parse().unwrap()).into();
        let local = denied(&["127.0.0.0/8"]);
        assert_eq!(local.allowed("h", both.clone().into_iter()), Ok(vec![both[1]]));
        let why = local.allowed("h", both[..1].iter().copied()).unwrap_err();
        assert_eq!(
            why,
            "h has the address 127.0.0.1, and 127.0.0.0/8 is one of the daemon's deniedNetworks"
        );
        assert_eq!(local.allowed("h", [].into_iter()), Ok(vec![]));
    }

    #[tokio::test]
    async fn names_lead_to_allowed_addresses_only() {
        let name = || Name::from_str("localhost").unwrap();
        assert!(Resolver::new(DeniedNetworks::default()).call(name()).await.unwrap().count() > 0);
        let fault = Resolver::new(denied(&["127.0.0.0/8", "::1"])).call(name()).await.unwrap_err();
        assert!(fault.to_string().contains("deniedNetworks"), "{fault}");
        assert!(denied(&["127.0.0.1"]).addresses("127.0.0.1", 80).await.is_err());
    }
}
