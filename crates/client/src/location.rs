//! Where a daemon is: a socket, or a command whose standard streams lead to one.

use std::{fmt, str::FromStr};

use shipway_fault::{Fault, Result, nearest};
use shipway_grpc::Address;

const SCHEMES: [&str; 7] =
    ["unix", "tcp", "docker-container", "nerdctl-container", "podman-container", "kube-pod", "ssh"];

/// Where a daemon is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// A socket to connect to.
    Socket(Address),
    /// A command to start, whose standard streams are the connection.
    Command {
        /// The address as given.
        url: String,
        /// Program and arguments.
        argv: Vec<String>,
    },
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(address) => address.fmt(f),
            Self::Command { url, .. } => f.write_str(url),
        }
    }
}

impl FromStr for Location {
    type Err = Fault;

    fn from_str(text: &str) -> Result<Self> {
        let Some((scheme, rest)) = text.split_once("://") else {
            return Err(Fault::invalid(format!("invalid address {text}: it has no scheme"))
                .hint(format!("did you mean unix://{text}?")));
        };
        let argv = match scheme {
            "unix" | "tcp" => return Ok(Self::Socket(text.parse()?)),
            "docker-container" => container("docker", "--context", rest),
            "nerdctl-container" => container("nerdctl", "--namespace", rest),
            "podman-container" => container("podman", "--connection", rest),
            "kube-pod" => kube_pod(rest),
            "ssh" => ssh(rest),
            "npipe" => {
                return Err(Fault::unimplemented("connecting to a Windows pipe")
                    .context(format!("use the address {text}")));
            }
            other => {
                let fault =
                    Fault::invalid(format!("invalid address {text}: unknown scheme {other}"));
                return Err(match nearest(other, SCHEMES) {
                    Some(near) => fault.hint(format!("did you mean {near}://{rest}?")),
                    None => fault.hint(format!("known schemes are {}", SCHEMES.join(", "))),
                });
            }
        };
        let argv = argv.map_err(|fault| fault.context(format!("use the address {text}")))?;
        Ok(Self::Command { url: text.to_owned(), argv })
    }
}

/// Name and query of a URL without its scheme.
fn name_and_query(rest: &str) -> Result<(&str, Vec<(&str, &str)>)> {
    let (name, query) = rest.split_once('?').unwrap_or((rest, ""));
    let name = name.trim_end_matches('/');
    // A name that starts with a dash would be an option of the program that gets it.
    if name.is_empty() || name.starts_with('-') {
        return Err(Fault::invalid(format!("{name:?} names no host, container or pod")));
    }
    Ok((name, query.split('&').filter_map(|pair| pair.split_once('=')).collect()))
}

fn argv(words: &[&str]) -> Vec<String> {
    words.iter().map(|w| (*w).to_owned()).collect()
}

fn container(program: &str, flag: &str, rest: &str) -> Result<Vec<String>> {
    let (name, query) = name_and_query(rest)?;
    let mut out = argv(&[program]);
    let key = flag.trim_start_matches('-');
    out.extend(
        query
            .iter()
            .filter(|(k, _)| *k == key || *k == "context")
            .map(|(_, v)| format!("{flag}={v}")),
    );
    out.extend(argv(&["exec", "-i", name, "buildctl", "dial-stdio"]));
    Ok(out)
}

fn kube_pod(rest: &str) -> Result<Vec<String>> {
    let (pod, query) = name_and_query(rest)?;
    let mut out = argv(&["kubectl"]);
    for (key, value) in &query {
        match *key {
            "context" => out.push(format!("--context={value}")),
            "namespace" => out.push(format!("--namespace={value}")),
            _ => {}
        }
    }
    out.extend(argv(&["exec", "-i", pod]));
    out.extend(
        query.iter().filter(|(k, _)| *k == "container").map(|(_, v)| format!("--container={v}")),
    );
    out.extend(argv(&["--", "buildctl", "dial-stdio"]));
    Ok(out)
}

fn ssh(rest: &str) -> Result<Vec<String>> {
    let (authority, socket) = rest.find('/').map_or((rest, ""), |at| rest.split_at(at));
    let (user, host) = authority.rsplit_once('@').map_or((None, authority), |(u, h)| (Some(u), h));
    let (host, port) = host.rsplit_once(':').map_or((host, None), |(h, p)| (h, Some(p)));
    if user.is_some_and(|u| u.contains(':')) {
        return Err(
            Fault::invalid("plain-text password is not supported").hint("use a key or an agent")
        );
    }
    if host.is_empty() || host.starts_with('-') {
        return Err(Fault::invalid("no host specified"));
    }
    let mut out = argv(&["ssh"]);
    if let Some(user) = user {
        out.extend(argv(&["-l", user]));
    }
    if let Some(port) = port {
        out.extend(argv(&["-p", port]));
    }
    out.extend(argv(&["--", host, "buildctl"]));
    if !socket.is_empty() && socket != "/" {
        out.extend(["--addr".to_owned(), format!("unix://{socket}")]);
    }
    out.push("dial-stdio".to_owned());
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(url: &str, expected: &str) {
        let shown = match url.parse() {
            Ok(Location::Socket(address)) => format!("socket {address}"),
            Ok(Location::Command { argv, .. }) => argv.join(" "),
            Err(fault) => format!("error {fault}"),
        };
        assert_eq!(shown, expected);
    }

    #[test]
    fn addresses_become_sockets_and_commands() {
        check("unix:///run/x.sock", "socket unix:///run/x.sock");
        check("tcp://10.0.0.1:1234", "socket tcp://10.0.0.1:1234");
        check(
            "docker-container://b0?context=far",
            "docker --context=far exec -i b0 buildctl dial-stdio",
        );
        check("podman-container://b0", "podman exec -i b0 buildctl dial-stdio");
        check(
            "kube-pod://p?namespace=ns&container=c&context=k",
            "kubectl --namespace=ns --context=k exec -i p --container=c -- buildctl dial-stdio",
        );
        check(
            "ssh://me@host:22/run/b.sock",
            "ssh -l me -p 22 -- host buildctl --addr unix:///run/b.sock dial-stdio",
        );
        check("ssh://host", "ssh -- host buildctl dial-stdio");
        check(
            "docker-container://-v",
            "error use the address docker-container://-v: \"-v\" names no host, container or pod",
        );
        check("/run/x.sock", "error invalid address /run/x.sock: it has no scheme");
        check("unx:///run/x", "error invalid address unx:///run/x: unknown scheme unx");
    }
}
