//! The texts of `/etc/resolv.conf` and `/etc/hosts` in a container (rows `exec.resolv`,
//! `exec.hosts`).

use crate::{HostEntry, spec::DEFAULT_HOSTNAME};
use std::{fmt::Write as _, net::IpAddr};

/// Settings that replace those of the host's resolver.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dns {
    /// Name servers.
    pub nameservers: Vec<String>,
    /// Options.
    pub options: Vec<String>,
    /// Search domains.
    pub search: Vec<String>,
}

/// Servers for containers that cannot reach the host's loopback, when nothing better is known.
const PUBLIC: [&str; 4] = ["8.8.8.8", "8.8.4.4", "2001:4860:4860::8888", "2001:4860:4860::8844"];
/// Where systemd-resolved listens; a host whose only server this is keeps the real ones in
/// [`RESOLVED`].
const STUB: &str = "127.0.0.53";
/// The host's resolver configuration.
pub const RESOLV: &str = "/etc/resolv.conf";
/// systemd-resolved's list of real servers.
pub const RESOLVED: &str = "/run/systemd/resolve/resolv.conf";

fn values<'a>(text: &'a str, keyword: &'a str) -> impl Iterator<Item = &'a str> {
    text.lines()
        .filter_map(move |line| {
            let mut words = line.split_whitespace();
            (words.next() == Some(keyword))
                .then(|| words.collect::<Vec<_>>())
                .map(|w| w.into_iter())
        })
        .flatten()
}

/// Whether `resolv` leaves all to systemd-resolved's stub, which a network namespace of its own
/// does not reach.
pub fn is_stub(resolv: &str) -> bool {
    values(resolv, "nameserver").eq([STUB])
}

fn is_loopback(server: &str) -> bool {
    server
        .split('%')
        .next()
        .and_then(|s| s.parse::<IpAddr>().ok())
        .is_some_and(|ip| ip.is_loopback())
}

/// A container's `resolv.conf` from the host's. `host_network` keeps loopback servers.
pub fn resolv_conf(host: &str, dns: &Dns, host_network: bool) -> String {
    let pick = |own: &[String], keyword: &str| -> Vec<String> {
        if own.is_empty() {
            values(host, keyword).map(str::to_owned).collect()
        } else {
            own.to_vec()
        }
    };
    let mut servers = pick(&dns.nameservers, "nameserver");
    if !host_network {
        servers.retain(|s| !is_loopback(s));
    }
    if servers.is_empty() {
        servers = PUBLIC.map(str::to_owned).to_vec();
    }
    let mut text = String::new();
    for server in servers {
        let _ = writeln!(text, "nameserver {server}");
    }
    for (keyword, list) in
        [("search", pick(&dns.search, "search")), ("options", pick(&dns.options, "options"))]
    {
        if !list.is_empty() && list != ["."] {
            let _ = writeln!(text, "{keyword} {}", list.join(" "));
        }
    }
    text
}

/// A container's `hosts`.
pub fn hosts(hostname: &str, extra: &[HostEntry]) -> String {
    let hostname = if hostname.is_empty() { DEFAULT_HOSTNAME } else { hostname };
    let mut text =
        format!("127.0.0.1\tlocalhost {hostname}\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    for entry in extra {
        let _ = writeln!(text, "{}\t{}", entry.ip, entry.host);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_servers_serve_only_on_the_hosts_network() {
        let host = "# x\nnameserver 127.0.0.53\nsearch a b\noptions edns0\n";
        assert!(is_stub(host));
        assert_eq!(
            resolv_conf(host, &Dns::default(), true),
            "nameserver 127.0.0.53\nsearch a b\noptions edns0\n"
        );
        assert!(resolv_conf(host, &Dns::default(), false).starts_with("nameserver 8.8.8.8\n"));
        let dns = Dns {
            nameservers: vec!["10.0.0.1".into()],
            search: vec!["c".into()],
            ..Dns::default()
        };
        assert_eq!(
            resolv_conf(host, &dns, false),
            "nameserver 10.0.0.1\nsearch c\noptions edns0\n"
        );
    }

    #[test]
    fn hosts_name_the_container_and_what_was_asked() {
        let text = hosts("", &[HostEntry { host: "db".into(), ip: "10.0.0.9".into() }]);
        assert_eq!(
            text,
            "127.0.0.1\tlocalhost buildkitsandbox\n::1\tlocalhost ip6-localhost ip6-loopback\n10.0.0.9\tdb\n"
        );
    }
}
