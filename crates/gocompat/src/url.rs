//! Addresses as Go's `net/url` reads and writes them: what is not one, and which bytes are escaped,
//! decides what a source is called and so what is found in caches (rows `dfc.git`, `df.add`).

use std::net::Ipv6Addr;

/// A parsed address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Url {
    /// In lower case; empty when there is none.
    pub scheme: String,
    user: Option<(String, Option<String>)>,
    /// With its port, escapes resolved.
    pub host: String,
    /// Escapes resolved.
    pub path: String,
    written_path: String,
    /// Whether it ends with a `?` that nothing follows.
    empty_query: bool,
    /// As it is written.
    pub query: String,
    /// Escapes resolved.
    pub fragment: String,
}

/// Parts of an address, which differ in the bytes that stand for themselves.
#[derive(Clone, Copy, PartialEq)]
enum Part {
    User,
    Host,
    Path,
    Query,
    Fragment,
}

impl Url {
    /// Reads an address with a scheme and an authority; `None` when it is none.
    pub fn parse(text: &str) -> Option<Self> {
        let (rest, fragment) = text.split_once('#').unwrap_or((text, ""));
        if rest.bytes().any(|b| b.is_ascii_control()) {
            return None;
        }
        let (scheme, rest) = rest.split_once("://")?;
        let mut letters = scheme.chars();
        if !letters.next()?.is_ascii_alphabetic()
            || !letters.all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c))
        {
            return None;
        }
        let scheme = scheme.to_ascii_lowercase();
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let empty_query =
            query.is_empty() && text.split('#').next().is_some_and(|t| t.ends_with('?'));
        let (authority, path) = rest.find('/').map_or((rest, ""), |at| rest.split_at(at));
        let (user, host) =
            authority.rsplit_once('@').map_or((None, authority), |(user, host)| (Some(user), host));
        Some(Self {
            user: match user {
                Some(user) => Some(userinfo(user)?),
                None => None,
            },
            host: parse_host(&scheme, host)?,
            scheme,
            path: unescape(path, Part::Path)?,
            written_path: path.to_owned(),
            empty_query,
            query: query.to_owned(),
            fragment: unescape(fragment, Part::Fragment)?,
        })
    }

    /// The address without query and fragment, escaped as it has to be.
    pub fn remote(&self) -> String {
        let mut out = format!("{}:", self.scheme);
        if !self.host.is_empty() || !self.path.is_empty() || self.user.is_some() {
            out += "//";
        }
        if let Some((name, password)) = &self.user {
            out += &escape(name, Part::User);
            if let Some(password) = password {
                out += &format!(":{}", escape(password, Part::User));
            }
            out.push('@');
        }
        out += &escape(&self.host, Part::Host);
        let legal = |b: u8| b"!$&'()*+,;=:@[]%".contains(&b) || !must_escape(b, Part::Path);
        if self.written_path.bytes().all(legal) {
            out += &self.written_path;
        } else {
            out += &escape(&self.path, Part::Path);
        }
        if self.empty_query {
            out.push('?');
        }
        out
    }

    /// The pairs of the query in their order; what is wrongly escaped is passed over.
    pub fn pairs(query: &str) -> Vec<(String, String)> {
        let pair = |part: &str| {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            let word = |text: &str| unescape(&text.replace('+', " "), Part::Query);
            Some((word(key)?, word(value)?))
        };
        query.split('&').filter(|p| !p.is_empty() && !p.contains(';')).filter_map(pair).collect()
    }

    /// What a download of it is called.
    pub fn file_name(&self) -> Option<&str> {
        self.path.trim_end_matches('/').rsplit('/').next().filter(|name| !matches!(*name, "" | "."))
    }
}

fn userinfo(text: &str) -> Option<(String, Option<String>)> {
    if !text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._:~!$&'()*+,;=%@".contains(&b)) {
        return None;
    }
    Some(match text.split_once(':') {
        None => (unescape(text, Part::User)?, None),
        Some((name, password)) => {
            (unescape(name, Part::User)?, Some(unescape(password, Part::User)?))
        }
    })
}

fn parse_host(scheme: &str, host: &str) -> Option<String> {
    let port = match host.strip_prefix('[') {
        Some(inside) => {
            let (address, port) = inside.rsplit_once(']')?;
            let address: std::result::Result<Ipv6Addr, _> =
                address.split("%25").next().unwrap_or(address).parse();
            address.ok().map(|_| port)?
        }
        None if host.contains('[') => return None,
        // Where a browser may go, two colons are one too many.
        None if scheme.starts_with("http") => host.find(':').map_or("", |at| &host[at..]),
        None => host.rfind(':').map_or("", |at| &host[at..]),
    };
    let digits = port
        .strip_prefix(':')
        .map_or(port.is_empty(), |digits| digits.bytes().all(|b| b.is_ascii_digit()));
    if digits { unescape(host, Part::Host) } else { None }
}

/// Resolves `%xx`; `None` where that is not what it says, or where a byte may not stand in a host.
fn unescape(text: &str, part: Part) -> Option<String> {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let byte = bytes[at];
        if byte == b'%' {
            let digits =
                text.get(at + 1..at + 3).filter(|d| d.bytes().all(|b| b.is_ascii_hexdigit()))?;
            let value = u8::from_str_radix(digits, 16).ok()?;
            // In hosts only what is not ASCII is escaped, and the sign itself.
            if part == Part::Host && value < 0x80 && value != b'%' {
                return None;
            }
            out.push(value);
            at += 3;
        } else if part == Part::Host && byte.is_ascii() && must_escape(byte, part) {
            return None;
        } else {
            out.push(byte);
            at += 1;
        }
    }
    Some(String::from_utf8_lossy(&out).into_owned())
}

fn must_escape(byte: u8, part: Part) -> bool {
    if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
        return false;
    }
    match part {
        Part::Host => !b"!$&'()*+,;=:[]<>\"".contains(&byte),
        Part::Path => !b"$&+,/:;=@".contains(&byte),
        Part::User => !b"$&+,;=".contains(&byte),
        Part::Query | Part::Fragment => true,
    }
}

fn escape(text: &str, part: Part) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if must_escape(byte, part) {
            out += &format!("%{byte:02X}");
        } else {
            out.push(char::from(byte));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_written_as_they_are_read() {
        for (text, want) in [
            ("HTTP://h/a.git?x=1#y", "http://h/a.git"),
            ("http://h/a b", "http://h/a%20b"),
            ("http://h/%7Ea%2fb", "http://h/%7Ea%2fb"),
            ("http://é:80/ü!", "http://%C3%A9:80/%C3%BC%21"),
            ("http://u%40v:p!@h", "http://u%40v:p%21@h"),
            ("http://u@v@h", "http://u%40v@h"),
            ("http://[::1]:80/", "http://[::1]:80/"),
            ("http://h/a?", "http://h/a?"),
            ("git://h:80:80/", "git://h:80:80/"),
            ("git://", "git:"),
            ("http:///a", "http:///a"),
        ] {
            assert_eq!(Url::parse(text).expect(text).remote(), want, "{text}");
        }
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in [
            "h/a",
            "1x://h",
            "http://h:port/x",
            "http://h:-1/x",
            "http://h:80:80/",
            "http://[::1/x",
            "http://[1.2.3.4]/",
            "http://h[::1]/",
            "http://h%zz/x",
            "http://h%41/",
            "http://h /x",
            "http://h/%zz",
            "http://h/x#%z",
            "http://h/\tx",
            "http://u<@h/",
        ] {
            assert_eq!(Url::parse(text), None, "{text}");
        }
    }

    #[test]
    fn files_and_queries_have_names() {
        let name = |text: &str| Url::parse(text).and_then(|u| u.file_name().map(str::to_owned));
        assert_eq!(name("http://h/a/b%20c?x#y").as_deref(), Some("b c"));
        assert_eq!(name("http://h/a/../").as_deref(), Some(".."));
        assert_eq!((name("http://h"), name("http://h/."), name("http://h//")), (None, None, None));
        let pairs = Url::pairs("a=b+c&%zz=1&d;e=2&f&g=%26");
        let pairs: Vec<_> = pairs.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        assert_eq!(pairs, [("a", "b c"), ("f", ""), ("g", "&")]);
    }
}
