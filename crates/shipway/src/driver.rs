//! How the daemons of builders are reached, started and stopped (rows `bx.drv.*`): by the programs
//! that people have for containers and clusters anyway, with the names that buildx gives, so that
//! both see the same daemons.

mod container;
pub(crate) mod kubernetes;
mod program;

use std::{collections::BTreeMap, time::Duration};

use shipway_client::{Client, ConnectOptions, Location, TokenSource};
use shipway_fault::{Code, Context, Fault, Result, nearest};

use crate::builders::{Builder, Node};

/// How long a node may take to answer.
const PATIENCE: Duration = Duration::from_secs(20);
/// What a container or pod has where no other image was named: that of buildx, which is BuildKit.
const IMAGE: &str = "moby/buildkit:buildx-stable-1";
/// The daemon's flag that buildx gives where no other privilege is named: the network of a
/// container is its own.
const NETWORK_HOST: &str = "--allow-insecure-entitlement=network.host";
/// Where the daemon's configuration is in a container or pod.
pub(crate) const CONFIG_DIR: &str = "/etc/buildkit";
/// The configuration, among a node's files.
pub(crate) const CONFIG: &str = "buildkitd.toml";

/// How the daemon of a node is had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Driver {
    /// It runs already, at an address.
    Remote,
    /// In a container that is started when it is needed.
    Container,
    /// In pods of a cluster.
    Kubernetes,
}

/// Whether a node's daemon runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// It does.
    Running,
    /// It was stopped.
    Stopped,
    /// There is none yet.
    Inactive,
}

impl State {
    /// As buildx calls it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Stopped => "stopped",
            Self::Inactive => "inactive",
        }
    }
}

/// What is left of a node that is removed.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Keep {
    /// The container or the pods.
    pub(crate) daemon: bool,
    /// What the daemon has on disk.
    pub(crate) state: bool,
}

impl Builder {
    /// The driver, if it is one that we have.
    pub(crate) fn driver(&self) -> Result<Driver> {
        if self.nodes.is_empty() {
            return Err(Fault::invalid(format!("the builder {} has no nodes", self.name)));
        }
        Driver::parse(&self.driver).context(|| format!("use the builder {}", self.name))
    }
}

impl Driver {
    /// All names, as buildx has them.
    const NAMES: [&str; 3] = ["remote", "docker-container", "kubernetes"];

    /// The driver `name`.
    pub(crate) fn parse(name: &str) -> Result<Self> {
        Ok(match name {
            "remote" => Self::Remote,
            "docker-container" => Self::Container,
            "kubernetes" => Self::Kubernetes,
            other => {
                let fault = Fault::new(
                    Code::Unimplemented,
                    format!("the driver {other:?} is not implemented"),
                );
                return Err(match nearest(other, Self::NAMES) {
                    Some(near) => fault.hint(format!("did you mean {near}?")),
                    None => fault.hint(format!("drivers are {}", Self::NAMES.join(", "))),
                });
            }
        })
    }

    /// Its name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Remote => Self::NAMES[0],
            Self::Container => Self::NAMES[1],
            Self::Kubernetes => Self::NAMES[2],
        }
    }

    /// Refuses options that the driver does not know, or values that it cannot use.
    pub(crate) fn check_options(self, options: &BTreeMap<String, String>) -> Result<()> {
        let known: &[&str] = match self {
            Self::Remote => &["cacert", "cert", "key", "servername", "default-load"],
            Self::Container => container::OPTIONS,
            Self::Kubernetes => kubernetes::OPTIONS,
        };
        for (key, value) in options {
            let is_variable = self != Self::Remote && key.starts_with("env.") && key.len() > 4;
            if !known.contains(&key.as_str()) && !is_variable {
                let fault = Fault::invalid(format!(
                    "invalid driver option {key} for {} driver",
                    self.name()
                ));
                return Err(match nearest(key, known.iter().copied()) {
                    Some(near) => fault.hint(format!("did you mean {near}?")),
                    None => fault.hint(format!("options are {}", known.join(", "))),
                });
            }
            if matches!(key.as_str(), "cacert" | "cert" | "key") && !value.starts_with('/') {
                return Err(Fault::invalid(format!(
                    "the option {key} is no absolute path: {value}"
                ))
                .hint("builders are used from other directories, too"));
            }
        }
        match self {
            Self::Kubernetes => kubernetes::Options::of(Some(options)).map(drop),
            Self::Remote | Self::Container => Ok(()),
        }
    }

    /// The flags of a daemon that was given `flags`: those of buildx.
    pub(crate) fn flags(self, mut flags: Vec<String>) -> Vec<String> {
        let names_some = flags.iter().any(|f| f.starts_with("--allow-insecure-entitlement"));
        if self != Self::Remote && !names_some {
            flags.push(NETWORK_HOST.to_owned());
        }
        flags
    }

    /// Connects to a node, whose daemon is started if it does not run; with `wait`, one that we do
    /// not start is waited for. A daemon that we do not start gets tokens.
    pub(crate) async fn connect(
        self,
        node: &Node,
        wait: bool,
        token: Option<TokenSource>,
    ) -> Result<Client> {
        let connected = async {
            let (location, tls) = match self {
                Self::Remote => (node.endpoint.parse::<Location>()?, node.tls()?),
                Self::Container => (container::boot(node).await?, None),
                Self::Kubernetes => (kubernetes::boot(node).await?, None),
            };
            let token = token.filter(|_| self == Self::Remote);
            let options = ConnectOptions { tls, token, timeout: Some(PATIENCE), wait };
            Client::connect(&location, &options).await
        };
        connected.await.context(|| format!("connect to the node {}", node.name))
    }

    /// Whether the daemon of a node runs. One that is remote is as it answers.
    pub(crate) async fn state(self, node: &Node) -> Result<State> {
        match self {
            Self::Remote => Ok(State::Running),
            Self::Container => container::state(node).await,
            Self::Kubernetes => kubernetes::state(node).await,
        }
        .context(|| format!("look for the node {}", node.name))
    }

    /// Stops the daemon of a node, if it is in a container. That of a remote builder is not ours to
    /// stop, and pods are left running by buildx, too.
    pub(crate) async fn stop(self, node: &Node) -> Result<()> {
        match self {
            Self::Container => container::stop(node).await,
            Self::Remote | Self::Kubernetes => Ok(()),
        }
        .context(|| format!("stop the node {}", node.name))
    }

    /// Removes what was started for a node.
    pub(crate) async fn remove(self, node: &Node, keep: Keep) -> Result<()> {
        if keep.daemon {
            return Ok(());
        }
        match self {
            Self::Remote => Ok(()),
            Self::Container => container::remove(node, keep.state).await,
            Self::Kubernetes => kubernetes::remove(node).await,
        }
        .context(|| format!("remove the node {}", node.name))
    }
}

/// An option that is set.
fn option<'a>(node: &'a Node, name: &str) -> Option<&'a str> {
    let options = node.driver_opts.as_ref()?;
    options.get(name).map(String::as_str).filter(|value| !value.is_empty())
}

/// Variables of the daemon's environment.
fn variables(node: &Node) -> impl Iterator<Item = (&str, &str)> {
    let options = node.driver_opts.iter().flatten();
    options.filter_map(|(key, value)| Some((key.strip_prefix("env.")?, value.as_str())))
}

/// The arguments of the daemon: its configuration, which flags may override.
fn arguments(node: &Node) -> Vec<String> {
    let has_config = node.files.iter().flatten().any(|(name, _)| name == CONFIG);
    let config = has_config.then(|| ["--config".to_owned(), format!("{CONFIG_DIR}/{CONFIG}")]);
    config.into_iter().flatten().chain(node.flags.iter().flatten().cloned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_those_of_the_driver() {
        let check = |driver: Driver, key: &str, value: &str| {
            driver.check_options(&BTreeMap::from([(key.to_owned(), value.to_owned())]))
        };
        assert!(check(Driver::Container, "env.HTTP_PROXY", "x").is_ok());
        assert!(check(Driver::Container, "memory", "1g").is_ok());
        assert!(check(Driver::Kubernetes, "replicas", "2").is_ok());
        let why = |refused: Result<()>| refused.unwrap_err().to_string();
        assert_eq!(
            why(check(Driver::Container, "memry", "1g")),
            "invalid driver option memry for docker-container driver"
        );
        assert!(why(check(Driver::Remote, "env.X", "1")).contains("invalid driver option env.X"));
        assert!(why(check(Driver::Remote, "ca", "x")).contains("for remote driver"));
        assert!(why(check(Driver::Remote, "cacert", "x.pem")).contains("no absolute path"));
        assert!(check(Driver::Kubernetes, "replicas", "many").is_err());
        assert!(Driver::parse("docker").is_err());
    }

    #[test]
    fn daemons_get_the_flags_that_buildx_gives() {
        assert_eq!(Driver::Container.flags(Vec::new()), [NETWORK_HOST]);
        let own = vec!["--allow-insecure-entitlement=security.insecure".to_owned()];
        assert_eq!(Driver::Kubernetes.flags(own.clone()), own);
        assert!(Driver::Remote.flags(Vec::new()).is_empty());
        let files = BTreeMap::from([(CONFIG.to_owned(), String::new())]);
        let node =
            Node { flags: Some(vec!["--debug".into()]), files: Some(files), ..Node::default() };
        assert_eq!(arguments(&node), ["--config", "/etc/buildkit/buildkitd.toml", "--debug"]);
    }
}
