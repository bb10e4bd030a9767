//! Finding the daemon and connecting to it: the flags that every command has.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use shipway_client::{Client, ClientTls, ConnectOptions, Location, TokenSource};
use shipway_fault::{Code, Context, Fault, Result};

use crate::{
    Persona,
    builders::{Builder, Store},
    nodes::Nodes,
};

/// Which daemon to talk to, and how.
#[derive(clap::Args, Clone, Debug, Default)]
pub(crate) struct ConnectArgs {
    /// Address of the daemon (unix://, tcp://, ssh://, docker-container://, nerdctl-container://,
    /// podman-container://, kube-pod://)
    #[arg(long, global = true, value_name = "URL")]
    addr: Option<String>,
    /// Builder whose daemon to talk to.
    #[arg(skip)]
    pub(crate) builder: Option<String>,
    /// Name to expect in the daemon's certificate
    #[arg(long = "tlsservername", global = true, value_name = "NAME", help_heading = "TLS")]
    server_name: Option<String>,
    /// CA certificate that the daemon's must come from
    #[arg(long = "tlscacert", global = true, value_name = "FILE", help_heading = "TLS")]
    ca: Option<PathBuf>,
    /// Client certificate
    #[arg(long = "tlscert", global = true, value_name = "FILE", help_heading = "TLS")]
    cert: Option<PathBuf>,
    /// Client key
    #[arg(long = "tlskey", global = true, value_name = "FILE", help_heading = "TLS")]
    key: Option<PathBuf>,
    /// Directory with ca.pem, cert.pem and key.pem, or ca.crt, tls.crt and tls.key
    #[arg(long = "tlsdir", global = true, value_name = "DIR", help_heading = "TLS")]
    dir: Option<PathBuf>,
    /// File with a token that says who calls; read again for each call
    #[arg(
        long = "token-file",
        global = true,
        env = "SHIPWAY_TOKEN_FILE",
        hide_env_values = true,
        value_name = "FILE",
        help_heading = "Identity"
    )]
    token_file: Option<PathBuf>,
    /// Who issues a token that says who calls: github, in a job of GitHub Actions that has the
    /// permission id-token: write (github,audience=NAME for another audience than shipway)
    #[arg(
        long,
        global = true,
        env = "SHIPWAY_AUTH",
        hide_env_values = true,
        conflicts_with = "token_file",
        value_name = "ISSUER",
        help_heading = "Identity"
    )]
    auth: Option<String>,
    /// Seconds after which connecting fails; 0 for never
    #[arg(long, global = true, default_value_t = 5, value_name = "SECONDS")]
    timeout: u64,
    /// Seconds to wait for a daemon that goes away during a build, which then goes on from what is
    /// in the cache; 0 for not at all
    #[arg(
        long = "reconnect-timeout",
        global = true,
        env = "SHIPWAY_RECONNECT_TIMEOUT",
        hide_env_values = true,
        default_value_t = 60,
        value_name = "SECONDS"
    )]
    reconnect: u64,
    /// Wait until the daemon answers
    #[arg(long, global = true, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", hide_default_value = true, action = clap::ArgAction::Set)]
    wait: bool,
}

impl ConnectArgs {
    /// Where the daemon is: as given, else as the environment says, else where daemons usually
    /// listen.
    pub(crate) fn location(&self, persona: Persona) -> Result<Location> {
        if let Some(addr) = self.addr.as_deref().filter(|a| !a.is_empty()) {
            return addr.parse().map_err(|f: Fault| f.context("--addr"));
        }
        let names: &[&str] = match persona {
            Persona::Shipway => &["SHIPWAY_HOST", "BUILDKIT_HOST"],
            Persona::Buildctl => &["BUILDKIT_HOST"],
        };
        for name in names {
            if let Some(addr) = std::env::var(name).ok().filter(|a| !a.is_empty()) {
                return addr.parse().map_err(|f: Fault| f.context(format!("${name}")));
            }
        }
        let sockets = usual_sockets(
            persona,
            run_dir().as_deref(),
            std::env::var("CONTAINERD_NAMESPACE").ok().as_deref(),
        );
        let found = sockets.iter().find(|socket| socket.exists());
        match (found, persona) {
            (Some(socket), _) => Ok(Location::Socket(shipway_grpc_unix(socket))),
            // The first of them, so that connecting fails as with the program whose name this is.
            (None, Persona::Buildctl) => Ok(Location::Socket(shipway_grpc_unix(&sockets[0]))),
            (None, Persona::Shipway) => {
                let tried: Vec<String> =
                    sockets.iter().map(|s| format!("unix://{}", s.display())).collect();
                Err(Fault::new(Code::Unavailable, format!("found no daemon to talk to; tried {}", tried.join(", ")))
                    .hint("start one with `systemctl start shipwayd`, or name its address with --addr or $SHIPWAY_HOST"))
            }
        }
    }

    fn tls(&self, location: &Location) -> Result<Option<ClientTls>> {
        let (mut ca, mut cert, mut key) = (self.ca.clone(), self.cert.clone(), self.key.clone());
        if let Some(dir) = &self.dir {
            if ca.is_some() || cert.is_some() || key.is_some() {
                return Err(Fault::invalid(
                    "cannot specify tlsdir and tlscacert/tlscert/tlskey at the same time",
                ));
            }
            let one = |either: &str, or: &str| {
                let found =
                    [either, or].iter().map(|name| dir.join(name)).find(|path| path.exists());
                let lacking = || {
                    Fault::not_found(format!(
                        "{} did not contain one of the needed files: {either} or {or}",
                        dir.display()
                    ))
                };
                found.ok_or_else(lacking).map(Some)
            };
            (ca, cert, key) =
                (one("ca.pem", "ca.crt")?, one("cert.pem", "tls.crt")?, one("key.pem", "tls.key")?);
        }
        let identity = match (cert, key) {
            (Some(cert), Some(key)) => Some((cert, key)),
            (None, None) => None,
            _ => return Err(Fault::invalid("--tlscert and --tlskey need each other")),
        };
        let wanted = ca.is_some() || identity.is_some();
        let tcp =
            matches!(location, Location::Socket(_)) && location.to_string().starts_with("tcp://");
        Ok((wanted && tcp).then(|| ClientTls {
            server_name: self.server_name.clone(),
            ca,
            identity,
        }))
    }

    /// Where tokens come from that say who calls.
    fn token(&self) -> Result<Option<TokenSource>> {
        if let Some(file) = self.token_file.as_ref().filter(|f| !f.as_os_str().is_empty()) {
            return Ok(Some(TokenSource::File(file.clone())));
        }
        let issuer = self.auth.as_deref().filter(|a| !a.is_empty());
        issuer.map(|i| i.parse().map_err(|f: Fault| f.context("--auth"))).transpose()
    }

    /// How long a daemon is waited for that goes away during a build.
    pub(crate) fn reconnect(&self) -> Option<Duration> {
        (self.reconnect > 0).then(|| Duration::from_secs(self.reconnect))
    }

    /// The names of the builder and its first node, under which builds are filed; those of Docker's
    /// own where the daemon was named by its address.
    pub(crate) fn names(&self) -> Result<(String, String)> {
        let found = self.builder(Persona::Shipway)?;
        let names = found.and_then(|b| Some((b.name, b.nodes.into_iter().next()?.name)));
        Ok(names.unwrap_or_else(|| ("default".to_owned(), "default".to_owned())))
    }

    /// The builder that was named, or that is used where no address is given.
    fn builder(&self, persona: Persona) -> Result<Option<Builder>> {
        let set = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
        if persona != Persona::Shipway || self.addr.as_ref().is_some_and(|a| !a.is_empty()) {
            return Ok(None);
        }
        let checked = |builder: Builder| builder.driver().map(|_| Some(builder));
        if let Some(name) = &self.builder {
            return checked(Store::open()?.need(name).context(|| "--builder")?);
        }
        if set("SHIPWAY_HOST").or_else(|| set("BUILDKIT_HOST")).is_some() {
            return Ok(None);
        }
        if let Some(name) = set("BUILDX_BUILDER") {
            return checked(Store::open()?.need(&name).context(|| "$BUILDX_BUILDER")?);
        }
        // One of another driver is buildx's to use.
        let current = Store::open_existing()?.map(|store| store.current()).transpose()?.flatten();
        Ok(current.filter(|builder| builder.driver().is_ok()))
    }

    /// The nodes of the builder, or the daemon; nothing is connected yet.
    pub(crate) fn nodes(&self, persona: Persona) -> Result<Nodes> {
        if let Some(builder) = self.builder(persona)? {
            return Nodes::of(builder, self.wait, self.token()?);
        }
        let location = self.location(persona)?;
        let (tls, token) = (self.tls(&location)?, self.token()?);
        let (timeout, wait) = (self.patience(), self.wait);
        Ok(Nodes::at(location, ConnectOptions { tls, token, timeout, wait }))
    }

    /// Connects, to the first of several nodes.
    pub(crate) async fn connect(&self, persona: Persona) -> Result<Client> {
        self.nodes(persona)?.client(0).await
    }

    /// How long connecting may take.
    pub(crate) fn patience(&self) -> Option<Duration> {
        (self.timeout > 0).then(|| Duration::from_secs(self.timeout))
    }
}

fn shipway_grpc_unix(path: &Path) -> shipway_grpc::Address {
    shipway_grpc::Address::Unix(path.to_owned())
}

/// Where this user's daemons have their sockets, if not in `/run`.
fn run_dir() -> Option<PathBuf> {
    let id = rustix::process::geteuid();
    if id.is_root() {
        return None;
    }
    let set = std::env::var_os("XDG_RUNTIME_DIR").filter(|v| !v.is_empty()).map(PathBuf::from);
    Some(set.unwrap_or_else(|| format!("/run/user/{}", id.as_raw()).into()))
}

fn usual_sockets(persona: Persona, own: Option<&Path>, namespace: Option<&str>) -> Vec<PathBuf> {
    let namespace = namespace.unwrap_or("default");
    let namespaced = format!("buildkit-{namespace}/buildkitd.sock");
    let names: [&str; 3] = match persona {
        Persona::Shipway => ["shipway/shipwayd.sock", &namespaced, "buildkit/buildkitd.sock"],
        Persona::Buildctl => ["buildkit/buildkitd.sock", &namespaced, "shipway/shipwayd.sock"],
    };
    let dirs = own.into_iter().chain([Path::new("/run")]);
    dirs.flat_map(|dir| names.iter().map(move |name| dir.join(name))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_looked_for_in_order() {
        let shown = |persona, own: Option<&str>, namespace| {
            usual_sockets(persona, own.map(Path::new), namespace)
                .iter()
                .map(|p| p.display().to_string())
                .collect::<Vec<_>>()
        };
        assert_eq!(
            shown(Persona::Shipway, None, Some("k8s.io")),
            [
                "/run/shipway/shipwayd.sock",
                "/run/buildkit-k8s.io/buildkitd.sock",
                "/run/buildkit/buildkitd.sock"
            ]
        );
        assert_eq!(
            shown(Persona::Buildctl, Some("/run/user/7"), None)[0],
            "/run/user/7/buildkit/buildkitd.sock"
        );
    }
}
