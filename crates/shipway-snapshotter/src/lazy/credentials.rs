//! Whose credentials layers are fetched with: those of Docker's configuration file, read again when
//! it has changed, and nobody's where it has none.

use async_trait::async_trait;
use shipway_dockerconfig::DockerConfig;
use shipway_fault::Fault;
use shipway_lazyfetch::Credentials as CredentialsOf;
use shipway_oci::ImageName;
use shipway_registry::{CredentialSource, Credentials, Given};
use std::{path::PathBuf, sync::Arc};

/// Credentials of the machine.
#[derive(Clone, Debug)]
pub struct MachineCredentials {
    config: PathBuf,
}

impl MachineCredentials {
    /// Those in the file `config`, which need not exist.
    pub fn new(config: PathBuf) -> Self {
        Self { config }
    }
}

impl CredentialsOf for MachineCredentials {
    fn of(&self, _: &ImageName) -> Arc<dyn CredentialSource> {
        Arc::new(self.clone())
    }
}

#[async_trait]
impl CredentialSource for MachineCredentials {
    async fn credentials(&self, host: &str) -> Result<Option<Given<Credentials>>, Fault> {
        let path = self.config.clone();
        let read = move || DockerConfig::load(&path);
        let config = shipway_task::blocking("read credentials", read).await?;
        let found = config.lookup(host).await?;
        Ok(found.map(|(username, secret)| Given::alone(Credentials { username, secret })))
    }

    fn identity(&self) -> Option<String> {
        Some("machine".into())
    }
}
