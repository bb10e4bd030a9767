//! Owns the network of processes: the host's, none, or namespaces made ready by CNI plug-ins (row `exec.net`).
//!
//! A namespace costs a plug-in run of many milliseconds, so clean ones are kept for the next process and used one at a time.

mod cni;
mod netns;

use cni::CniNetwork;
use netns::NetNs;
use shipway_executor::NetworkMode;
use shipway_fault::{Fault, Result};
use std::{
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

/// What processes get that ask for the default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NetworkDefault {
    /// CNI where a configuration exists, else the host's.
    #[default]
    Auto,
    /// CNI; a missing configuration is an error.
    Cni,
    /// The host's.
    Host,
    /// Loopback only.
    None,
}

/// Settings of the network.
#[derive(Clone, Debug)]
pub struct NetworkConfig {
    /// The default.
    pub mode: NetworkDefault,
    /// CNI configuration: a `.conflist` or `.conf`, as JSON.
    pub cni_config: PathBuf,
    /// Directory of CNI plug-ins.
    pub cni_bin: PathBuf,
    /// Namespaces kept ready.
    pub pool: usize,
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self { mode: NetworkDefault::Auto, cni_config: "/etc/buildkit/cni.json".into(), cni_bin: "/opt/cni/bin".into(), pool: 16 }
    }
}

pub(crate) struct Network {
    config: NetworkConfig,
    cni: Option<CniNetwork>,
    /// Where namespaces are mounted.
    dir: PathBuf,
    made: AtomicU64,
    ready: Mutex<Vec<NetNs>>,
}

/// A namespace in use by one process.
pub(crate) struct Lease {
    netns: NetNs,
}

impl Lease {
    pub(crate) fn path(&self) -> &Path {
        self.netns.path()
    }
}

impl Network {
    /// Whether CNI is configured.
    pub fn has_cni(&self) -> bool {
        self.cni.is_some()
    }

    pub(crate) fn new(config: NetworkConfig, dir: PathBuf) -> Result<Self> {
        std::fs::create_dir_all(&dir).map_err(|e| Fault::io(format!("create {}", dir.display()), e))?;
        let wanted = match config.mode {
            NetworkDefault::Auto => config.cni_config.exists(),
            NetworkDefault::Cni => true,
            NetworkDefault::Host | NetworkDefault::None => false,
        };
        let cni = wanted.then(|| CniNetwork::load(&config.cni_config, &config.cni_bin)).transpose()?;
        Ok(Self { config, cni, dir, made: AtomicU64::new(0), ready: Mutex::default() })
    }

    /// Whether a process in `mode` is in the host's namespace.
    pub(crate) fn is_host(&self, mode: NetworkMode) -> bool {
        match mode {
            NetworkMode::Host => true,
            NetworkMode::None => false,
            NetworkMode::Default => self.cni.is_none() && self.config.mode != NetworkDefault::None,
        }
    }

    fn ready(&self) -> MutexGuard<'_, Vec<NetNs>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A namespace for a process in `mode`; `None` where the runtime does what is needed.
    pub(crate) async fn lease(&self, mode: NetworkMode) -> Result<Option<Lease>> {
        let (NetworkMode::Default, Some(cni)) = (mode, &self.cni) else { return Ok(None) };
        if let Some(netns) = self.ready().pop() {
            return Ok(Some(Lease { netns }));
        }
        let name = format!("{}-{}", std::process::id(), self.made.fetch_add(1, Ordering::Relaxed));
        let netns = NetNs::new(&self.dir, &name).await?;
        match cni.add(netns.id(), netns.path()).await {
            Ok(()) => Ok(Some(Lease { netns })),
            Err(e) => {
                let _ = cni.del(netns.id(), netns.path()).await;
                netns.remove().await;
                Err(e)
            }
        }
    }

    /// Takes a namespace back, for another process if it is `reusable`.
    pub(crate) async fn give_back(&self, lease: Lease, reusable: bool) {
        {
            let mut ready = self.ready();
            if reusable && ready.len() < self.config.pool {
                ready.push(lease.netns);
                return;
            }
        }
        self.discard(lease.netns).await;
    }

    async fn discard(&self, netns: NetNs) {
        if let Some(cni) = &self.cni
            && let Err(e) = cni.del(netns.id(), netns.path()).await
        {
            tracing::warn!(netns = netns.id(), "could not release a network namespace: {e}");
        }
        netns.remove().await;
    }

    /// Removes the namespaces that nobody uses.
    pub(crate) async fn retire_idle(&self) {
        let idle: Vec<NetNs> = self.ready().drain(..).collect();
        for netns in idle {
            self.discard(netns).await;
        }
    }

    /// Removes what an earlier life left.
    pub(crate) async fn sweep(&self) -> Result<()> {
        for netns in NetNs::left_in(&self.dir)? {
            self.discard(netns).await;
        }
        Ok(())
    }
}
