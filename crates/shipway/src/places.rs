//! Registries and containerd's store, as commands that need no daemon reach them.

use std::{path::PathBuf, sync::Arc};

use async_trait::async_trait;
use shipway_client::DockerConfig;
use shipway_containerd::Containerd;
use shipway_fault::{Fault, Result};
use shipway_oci::ImageName;
use shipway_registry::{
    CredentialSource, Credentials, Given, Mode, Registry, RegistryConfig, Repository,
};
use shipway_storage::Storage;

/// How registries are reached.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct RegistryArgs {
    /// Take any certificate of the registries, and plain HTTP
    #[arg(long)]
    insecure: bool,
    /// Directory with a hosts.toml for each registry, as containerd has it
    #[arg(long, value_name = "DIR", default_value = REGISTRY_CONFIG)]
    registry_config: PathBuf,
}

/// Which store of containerd's is meant.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct StoreArgs {
    /// containerd's socket
    #[arg(
        long,
        value_name = "SOCKET",
        env = "CONTAINERD_ADDRESS",
        default_value = "/run/containerd/containerd.sock"
    )]
    containerd_addr: PathBuf,
    /// Namespace of containerd
    #[arg(long, value_name = "NAME", env = "CONTAINERD_NAMESPACE", default_value = "default")]
    namespace: String,
}

/// The user's credentials.
struct Login(DockerConfig);

#[async_trait]
impl CredentialSource for Login {
    async fn credentials(&self, host: &str) -> Result<Option<Given<Credentials>>> {
        let found = self.0.lookup(host).await?;
        Ok(found.map(|(username, secret)| Given::alone(Credentials { username, secret })))
    }

    fn identity(&self) -> Option<String> {
        Some("user".to_owned())
    }
}

/// The registries, with the user's credentials. Clones share connections.
#[derive(Clone)]
pub(crate) struct Registries {
    registry: Registry,
    login: Arc<Login>,
    insecure: bool,
}

/// Where containerd has what is known of registries.
const REGISTRY_CONFIG: &str = "/etc/containerd/certs.d";

impl RegistryArgs {
    /// As without flags but, maybe, `--insecure`.
    pub(crate) fn usual(insecure: bool) -> Self {
        Self { insecure, registry_config: REGISTRY_CONFIG.into() }
    }

    /// Nothing is dialed yet.
    pub(crate) fn open(&self) -> Result<Registries> {
        let config_path = Some(self.registry_config.clone());
        let config = RegistryConfig { config_path, ..RegistryConfig::default() };
        let docker =
            DockerConfig::default_path().map(|path| DockerConfig::load(&path)).transpose()?;
        let login = Arc::new(Login(docker.unwrap_or_default()));
        Ok(Registries { registry: Registry::new(config), login, insecure: self.insecure })
    }
}

impl Registries {
    /// The repository of `name`.
    pub(crate) fn repository(&self, name: &ImageName, mode: Mode) -> Repository {
        let repository = self.registry.repository(name, self.login.clone(), mode);
        if self.insecure { repository.insecure() } else { repository }
    }
}

impl StoreArgs {
    /// The namespace, as it is known in messages.
    pub(crate) fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The stores of the namespace.
    pub(crate) async fn connect(&self) -> Result<Storage> {
        let containerd = Containerd::connect(&self.containerd_addr).await.map_err(|fault| {
            fault.hint(
                "is containerd running, may you use its socket, and is --containerd-addr right?",
            )
        })?;
        // Nothing is mounted, so that the snapshotter does not matter.
        containerd.storage(&self.namespace, "overlayfs")
    }
}

/// An image's name; of the short ones, in full.
pub(crate) fn image_name(text: &str) -> Result<ImageName> {
    text.parse().map_err(|e: shipway_oci::NameError| {
        Fault::invalid(format!("{text:?} is not the name of an image: {e}")).hint(e.why)
    })
}

/// The same for a name that is given to an image, which has no digest.
pub(crate) fn new_name(text: &str) -> Result<ImageName> {
    let name = image_name(text)?;
    match name.digest() {
        None => Ok(name),
        Some(_) => {
            Err(Fault::invalid(format!("{text} names a digest, which follows of the image"))
                .hint("name a tag"))
        }
    }
}
