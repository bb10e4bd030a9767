//! Owns [`Containerd`]: one daemon, its identity, and the way to its namespaces.

use crate::{
    conn::{Connection, deadline},
    content::Content,
    images::ImageStore,
    leases::LeaseStore,
    snapshots::Snapshots,
};
use async_trait::async_trait;
use containerd_client::services::v1 as api;
use shipway_fault::{Context, Fault, Result};
use shipway_storage::{Namespaces, Storage};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

/// Version and id that containerd reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// As in `1.6.20~ds1` or `v2.1.9`.
    pub version: String,
    /// Source revision.
    pub revision: String,
}

/// One containerd. Cheap to clone; connections are dialed when needed, and again after a restart.
#[derive(Clone)]
pub struct Containerd {
    pub(crate) connection: Connection,
}

impl Containerd {
    /// Reaches the containerd whose socket is at `address` and asks it for its version, so that a
    /// wrong address shows now.
    pub async fn connect(address: impl AsRef<Path>) -> Result<Self> {
        let daemon = Self { connection: Connection::new(address.as_ref(), "default")? };
        tokio::time::timeout(Duration::from_secs(15), daemon.version())
            .await
            .unwrap_or_else(|_| {
                Err(daemon
                    .connection
                    .stalled("ask for the version".into(), Duration::from_secs(15)))
            })
            .context(|| "connect to containerd")?;
        Ok(daemon)
    }

    /// Path of the socket.
    pub fn address(&self) -> &Path {
        self.connection.address()
    }

    /// Its version.
    pub async fn version(&self) -> Result<Version> {
        let mut client = api::version_client::VersionClient::new(self.connection.control());
        let answer = self
            .connection
            .call(
                || "ask for the version".into(),
                deadline::QUICK,
                client.version(self.connection.request(())?),
            )
            .await?;
        Ok(Version { version: answer.version, revision: answer.revision })
    }

    /// The UUID of this containerd installation, by which `nerdctl` knows that a builder shares its
    /// image store.
    pub async fn server_uuid(&self) -> Result<String> {
        let mut client =
            api::introspection_client::IntrospectionClient::new(self.connection.control());
        let answer = self
            .connection
            .call(
                || "ask for the server's UUID".into(),
                deadline::QUICK,
                client.server(self.connection.request(())?),
            )
            .await?;
        Ok(answer.uuid)
    }

    /// Names of the snapshotters that work here.
    pub async fn snapshotters(&self) -> Result<Vec<String>> {
        let mut client =
            api::introspection_client::IntrospectionClient::new(self.connection.control());
        let request =
            api::PluginsRequest { filters: vec!["type==io.containerd.snapshotter.v1".into()] };
        let answer = self
            .connection
            .call(
                || "list plug-ins".into(),
                deadline::QUICK,
                client.plugins(self.connection.request(request)?),
            )
            .await?;
        Ok(answer.plugins.into_iter().filter(|p| p.init_err.is_none()).map(|p| p.id).collect())
    }

    /// The directory that `snapshotter` keeps its snapshots in, if containerd knows: snapshotters
    /// outside of it need not say.
    pub async fn snapshots_at(&self, snapshotter: &str) -> Result<Option<PathBuf>> {
        let mut client =
            api::introspection_client::IntrospectionClient::new(self.connection.control());
        let filters = vec![
            format!("type==io.containerd.snapshotter.v1,id=={snapshotter}"),
            "type==io.containerd.content.v1".into(),
        ];
        let request = self.connection.request(api::PluginsRequest { filters })?;
        let answer = self
            .connection
            .call(|| "list plug-ins".into(), deadline::QUICK, client.plugins(request))
            .await?;
        // Where contents are is the next best: most often the same disk.
        let mut plugins = answer.plugins;
        plugins.sort_by_key(|p| p.id != snapshotter);
        let root = plugins.into_iter().find_map(|p| p.exports.get("root").map(PathBuf::from));
        // One that is made when it is first needed is on the disk of the directory above.
        Ok(root.and_then(|root| root.ancestors().find(|dir| dir.is_dir()).map(PathBuf::from)))
    }

    /// Makes the namespace if there is none of that name.
    pub async fn ensure_namespace(&self, name: &str) -> Result<()> {
        let mut client = api::namespaces_client::NamespacesClient::new(self.connection.control());
        let namespace = api::Namespace { name: name.into(), labels: Default::default() };
        let request =
            self.connection.request(api::CreateNamespaceRequest { namespace: Some(namespace) })?;
        match self
            .connection
            .call(|| format!("create namespace {name:?}"), deadline::QUICK, client.create(request))
            .await
        {
            Err(e) if !e.is_already_exists() => Err(e),
            _ => Ok(()),
        }
    }

    /// Names of all namespaces.
    pub async fn namespaces(&self) -> Result<Vec<String>> {
        let mut client = api::namespaces_client::NamespacesClient::new(self.connection.control());
        let request =
            self.connection.request(api::ListNamespacesRequest { filter: String::new() })?;
        let answer = self
            .connection
            .call(|| "list namespaces".into(), deadline::QUICK, client.list(request))
            .await?;
        Ok(answer.namespaces.into_iter().map(|n| n.name).collect())
    }

    /// The four stores of `namespace`, with filesystems in `snapshotter`. Nothing is asked of
    /// containerd yet.
    pub fn storage(&self, namespace: &str, snapshotter: &str) -> Result<Storage> {
        if snapshotter.is_empty() {
            return Err(Fault::invalid("the snapshotter's name is empty"));
        }
        let connection = self.connection.in_namespace(namespace)?;
        Ok(Storage {
            content: Arc::new(Content::new(connection.clone())),
            snapshots: Arc::new(Snapshots::new(connection.clone(), snapshotter)),
            leases: Arc::new(LeaseStore::new(connection.clone())),
            images: Arc::new(ImageStore::new(connection)),
        })
    }
}

/// What a containerd namespace may be called: containerd's `pkg/identifiers`.
fn check_namespace(name: &str) -> Result<()> {
    const LONGEST: usize = 76;
    let part = |p: &str| {
        p.starts_with(|c: char| c.is_ascii_alphanumeric())
            && p.ends_with(|c: char| c.is_ascii_alphanumeric())
            && p.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
    };
    if name.len() <= LONGEST && name.split('.').all(part) {
        return Ok(());
    }
    Err(Fault::invalid(format!("{name:?} is not a valid name of a containerd namespace")).hint(
        format!("names have letters, digits and single - _ . between them, {LONGEST} at most"),
    ))
}

/// The namespaces of a containerd, with one snapshotter.
#[derive(Clone)]
pub struct ContainerdNamespaces {
    containerd: Containerd,
    snapshotter: String,
}

impl ContainerdNamespaces {
    /// Those of `containerd`, with filesystems in `snapshotter`.
    pub fn new(containerd: &Containerd, snapshotter: &str) -> Self {
        Self { containerd: containerd.clone(), snapshotter: snapshotter.to_owned() }
    }
}

#[async_trait]
impl Namespaces for ContainerdNamespaces {
    fn storage(&self, name: &str) -> Result<Storage> {
        check_namespace(name)?;
        self.containerd.storage(name, &self.snapshotter)
    }

    async fn ensure(&self, name: &str) -> Result<()> {
        self.containerd.ensure_namespace(name).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_namespaces_are_checked() {
        for good in ["default", "k8s.io", "moby", "a", "a-b_c.d9", &"a".repeat(76)] {
            assert!(check_namespace(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "a..b", "-a", "a-", "a/b", "a b", "é", &"a".repeat(77), "a\n"] {
            assert!(check_namespace(bad).is_err(), "{bad}");
        }
    }
}
