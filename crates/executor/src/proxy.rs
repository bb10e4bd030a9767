//! What stands between a process and the network when it may reach it through a proxy only (row
//! `exec.proxynet`).

use async_trait::async_trait;
use bytes::Bytes;
use std::{fmt, io, net::SocketAddr, sync::Arc};
use tokio::net::{TcpListener, TcpStream};

/// A way out, for the proxy of a process.
#[async_trait]
pub trait Egress: Send + Sync {
    /// Opens a connection.
    async fn connect(&self, to: SocketAddr) -> io::Result<TcpStream>;
}

/// The proxy of one process.
#[async_trait]
pub trait StepProxy: Send + Sync {
    /// Certificates, as PEM, that the process is made to trust.
    fn trusted(&self) -> Bytes;

    /// Serves the connections that come in by `listener` and goes out by `egress`; ends when its
    /// future is dropped.
    async fn serve(&self, listener: TcpListener, egress: Arc<dyn Egress>);
}

/// A proxy to be given to a process.
#[derive(Clone)]
pub struct Proxied(pub Arc<dyn StepProxy>);

impl fmt::Debug for Proxied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a proxy")
    }
}

/// The variables that name the proxy at `address` to a process; they go after its own.
pub fn environment(address: SocketAddr) -> Vec<String> {
    let (proxy, direct) = (format!("http://{address}"), "127.0.0.1,localhost,::1");
    ["HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"]
        .iter()
        .map(|name| format!("{name}={proxy}"))
        .chain(["NO_PROXY", "no_proxy"].iter().map(|name| format!("{name}={direct}")))
        .collect()
}

/// Sets `variables` in an environment, in the place of what has their names.
pub fn set_variables(env: &mut Vec<String>, variables: Vec<String>) {
    let name =
        |v: &str| v.split_once('=').map_or_else(|| v.to_owned(), |(name, _)| name.to_owned());
    let names: Vec<String> = variables.iter().map(|v| name(v)).collect();
    env.retain(|v| !names.contains(&name(v)));
    env.extend(variables);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proxy_of_the_images_is_replaced_and_not_doubled() {
        let mut env = vec!["A=1".to_owned(), "HTTP_PROXY=http://other".into(), "NO_PROXY=*".into()];
        set_variables(&mut env, environment("127.0.0.1:99".parse().expect("an address")));
        assert_eq!(env.len(), 7);
        assert!(
            env.contains(&"A=1".to_owned())
                && env.contains(&"HTTP_PROXY=http://127.0.0.1:99".to_owned())
        );
        assert!(env.contains(&"no_proxy=127.0.0.1,localhost,::1".to_owned()));
    }
}
