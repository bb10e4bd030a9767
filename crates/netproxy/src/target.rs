//! Where a request goes: one spelling for what the policy sees, what is fetched and what is noted.

use http::{
    HeaderMap, Uri, header,
    uri::{Authority, PathAndQuery, Scheme},
};
use std::{fmt, net::IpAddr};

/// Longest address of a request.
pub const MAX_URL: usize = 16 << 10;

/// A place in the web, without user or password: host in lower case, no port that the scheme
/// implies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RequestTarget {
    pub https: bool,
    /// A name, or an address without brackets.
    pub host: String,
    pub port: u16,
    pub path: PathAndQuery,
}

fn port_of(https: bool) -> u16 {
    if https { 443 } else { 80 }
}

/// A host as one spelling: `EXAMPLE.com.` is `example.com`. None for what cannot be a host.
fn host_of(authority: &Authority) -> Option<String> {
    let host = authority.host();
    let host = match host.strip_prefix('[') {
        Some(v6) => v6.strip_suffix(']')?.parse::<std::net::Ipv6Addr>().ok()?.to_string(),
        None => host.trim_end_matches('.').to_ascii_lowercase(),
    };
    (!host.is_empty() && host.len() <= 253).then_some(host)
}

impl RequestTarget {
    pub fn new(https: bool, authority: &Authority, path: Option<&PathAndQuery>) -> Option<Self> {
        let port = match authority
            .as_str()
            .rsplit_once(']')
            .map_or(authority.as_str(), |(_, rest)| rest)
            .rsplit_once(':')
        {
            Some((_, port)) if !port.is_empty() => port.parse().ok()?,
            _ => port_of(https),
        };
        let path = path
            .filter(|p| p.as_str().starts_with('/'))
            .cloned()
            .unwrap_or_else(|| PathAndQuery::from_static("/"));
        Some(Self { https, host: host_of(authority)?, port, path })
    }

    /// From a whole address.
    pub fn parse(url: &str) -> Option<Self> {
        Self::of_uri(&url.split('#').next()?.parse().ok()?)
    }

    fn of_uri(uri: &Uri) -> Option<Self> {
        let https = match uri.scheme()? {
            s if *s == Scheme::HTTP => false,
            s if *s == Scheme::HTTPS => true,
            _ => return None,
        };
        Self::new(https, uri.authority()?, uri.path_and_query())
    }

    /// From the head of a request: within `tunnel` its path counts, otherwise its whole address, or
    /// else its `Host`.
    pub fn of_request(
        uri: &Uri,
        headers: &HeaderMap,
        tunnel: Option<&RequestTarget>,
    ) -> Option<Self> {
        if let Some(tunnel) = tunnel {
            let path = uri.path_and_query().filter(|p| p.as_str().starts_with('/'))?;
            return Some(Self { path: path.clone(), ..tunnel.clone() });
        }
        if uri.scheme().is_some() {
            return Self::of_uri(uri);
        }
        let host: Authority = headers.get(header::HOST)?.to_str().ok()?.parse().ok()?;
        Self::new(false, &host, uri.path_and_query())
    }

    /// The target of a `Location` in its answer.
    pub fn follow(&self, location: &str) -> Option<String> {
        if location.len() > MAX_URL {
            return None;
        }
        if location.contains("://") {
            return Some(
                Self::parse(location).map_or_else(|| location.to_owned(), |t| t.to_string()),
            );
        }
        if let Some(rest) = location.strip_prefix("//") {
            return Self::parse(&format!("{}://{rest}", self.scheme())).map(|t| t.to_string());
        }
        let path = match location {
            l if l.starts_with('/') => l.to_owned(),
            l => format!("{}/{l}", self.path.path().rsplit_once('/').map_or("", |(dir, _)| dir)),
        };
        let path = path.split('#').next()?.parse().ok()?;
        Some(Self { path, ..self.clone() }.to_string())
    }

    pub fn scheme(&self) -> &'static str {
        if self.https { "https" } else { "http" }
    }

    /// Host and port, as in a `Host` header.
    pub fn authority(&self) -> String {
        let host = match self.host.parse::<IpAddr>() {
            Ok(IpAddr::V6(v6)) => format!("[{v6}]"),
            _ => self.host.clone(),
        };
        if self.port == port_of(self.https) { host } else { format!("{host}:{}", self.port) }
    }
}

impl fmt::Display for RequestTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}{}", self.scheme(), self.authority(), self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(url: &str, expected: Option<&str>) {
        assert_eq!(RequestTarget::parse(url).map(|t| t.to_string()).as_deref(), expected, "{url}");
    }

    #[test]
    fn an_address_has_one_spelling() {
        check("http://Example.COM.:80/a?b#c", Some("http://example.com/a?b"));
        check("https://user:secret@h:443", Some("https://h/"));
        check("https://h:8443/x", Some("https://h:8443/x"));
        check("http://[0:0::1]:80/", Some("http://[::1]/"));
        check("http://[::1]:8080/", Some("http://[::1]:8080/"));
        for bad in ["ftp://h/", "h/x", "http://", "http://h:99999/", "http://./", "/x"] {
            check(bad, None);
        }
    }

    #[test]
    fn a_redirect_leads_where_the_client_will_go() {
        let from = RequestTarget::parse("https://h/dir/file?q").unwrap();
        for (location, to) in [
            ("/other", "https://h/other"),
            ("near", "https://h/dir/near"),
            ("//else/x", "https://else/x"),
            ("http://U:P@Else:80/x", "http://else/x"),
        ] {
            assert_eq!(from.follow(location).as_deref(), Some(to));
        }
        assert_eq!(from.follow(&"x".repeat(MAX_URL + 1)), None);
    }

    #[test]
    fn within_a_tunnel_the_host_is_the_tunnels() {
        let tunnel = RequestTarget::parse("https://h/").unwrap();
        let headers = HeaderMap::from_iter([(header::HOST, "other".parse().unwrap())]);
        let of = |uri: &str, tunnel| {
            RequestTarget::of_request(&uri.parse().unwrap(), &headers, tunnel)
                .map(|t: RequestTarget| t.to_string())
        };
        assert_eq!(of("/x", Some(&tunnel)).as_deref(), Some("https://h/x"));
        assert_eq!(of("http://elsewhere/x", Some(&tunnel)).as_deref(), Some("https://h/x"));
        assert_eq!(of("/x", None).as_deref(), Some("http://other/x"));
    }
}
