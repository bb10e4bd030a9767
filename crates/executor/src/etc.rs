//! The texts of `/etc/resolv.conf` and `/etc/hosts` in a container (rows `exec.resolv`,
//! `exec.hosts`).

use crate::{HostEntry, spec::DEFAULT_HOSTNAME};
use shipway_fault::{Class, Fault, Result};
use std::{fmt::Write as _, net::IpAddr, path::PathBuf};

/// Settings that replace those of the host's resolver.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dns {
    /// Name servers.
    pub nameservers: Vec<String>,
    /// Options.
    pub options: Vec<String>,
    /// Search domains.
    pub search: Vec<String>,
    /// A file that is read in the place of [`RESOLV`], as the one that a resolver's program keeps.
    pub resolv_conf: Option<PathBuf>,
}

impl Dns {
    /// A container's `resolv.conf` as of now: what the host's resolver changes, the next container
    /// has. Blocks.
    ///
    /// # Errors
    /// If a file that the settings name cannot be read; without the host's own one there are public
    /// servers.
    pub fn resolv_conf_now(&self, host_network: bool) -> Result<String> {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let mut text = match &self.resolv_conf {
            Some(path) => std::fs::read_to_string(path).map_err(|e| {
                Fault::io(format!("read {}, the resolver's configuration", path.display()), e)
                    .with_class(Class::Environment)
                    .hint("dns.resolvConf of the daemon's configuration names the file")
            })?,
            None => read(RESOLV),
        };
        if !host_network && is_stub(&text) {
            text = read(RESOLVED);
        }
        Ok(resolv_conf(&text, self, host_network))
    }
}

/// Servers for containers that cannot reach the host's loopback, when nothing better is known.
const PUBLIC: [&str; 4] = ["8.8.8.8", "8.8.4.4", "2001:4860:4860::8888", "2001:4860:4860::8844"];
/// Where systemd-resolved listens; a host whose only server this is keeps the real ones in
/// [`RESOLVED`].
const STUB: &str = "127.0.0.53";
/// The host's resolver configuration.
const RESOLV: &str = "/etc/resolv.conf";
/// systemd-resolved's list of real servers.
const RESOLVED: &str = "/run/systemd/resolve/resolv.conf";

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
fn is_stub(resolv: &str) -> bool {
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
fn resolv_conf(host: &str, dns: &Dns, host_network: bool) -> String {
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
    fn a_file_that_is_named_is_read_each_time_and_has_to_be_there() {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        let dns = Dns { resolv_conf: Some(file.path().into()), ..Dns::default() };
        for server in ["10.0.0.1", "10.0.0.2"] {
            std::fs::write(file.path(), format!("nameserver {server}\n")).expect("write");
            let text = dns.resolv_conf_now(false).expect("a configuration");
            assert_eq!(text, format!("nameserver {server}\n"));
        }
        let gone = Dns { resolv_conf: Some("/no/such/file".into()), ..Dns::default() };
        let fault = gone.resolv_conf_now(false).expect_err("no file");
        assert!(fault.to_string().contains("/no/such/file"), "{fault}");
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
