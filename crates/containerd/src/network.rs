//! Owns the network of processes: the host's, none, or namespaces made ready by CNI plug-ins (row
//! `exec.net`).
//!
//! A namespace costs a plug-in run of many milliseconds, so clean ones are kept for the next
//! process and used one at a time.

mod cni;
mod netns;
mod proxied;

use cni::CniNetwork;
use netns::NetNs;
use parking_lot::Mutex;
use proxied::Serving;
use shipway_executor::{NetworkMode, ProcessSpec, Proxied};
use shipway_fault::{Fault, Result};
use shipway_oci::NetworkName;
use shipway_task::blocking;
use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::SystemTime,
};

/// What processes get that ask for the default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NetworkDefault {
    /// CNI where a configuration exists, else the host's.
    #[default]
    Auto,
    /// CNI; a missing configuration is an error.
    Cni,
    /// A bridge of our own.
    Bridge,
    /// The host's.
    Host,
    /// Loopback only.
    None,
}

/// A bridge that processes are on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bridge {
    /// Name of its link.
    pub name: String,
    /// Addresses of those on it, as in `10.10.0.0/16`.
    pub subnet: String,
}

impl Default for Bridge {
    fn default() -> Self {
        Self { name: "buildkit0".into(), subnet: "10.10.0.0/16".into() }
    }
}

impl Bridge {
    /// Refuses what the kernel would not take.
    fn check(&self) -> Result<()> {
        let plain = |c: char| !c.is_whitespace() && !c.is_control() && c != '/' && c != ':';
        if self.name.is_empty()
            || self.name.len() > MAX_LINK_NAME
            || !self.name.chars().all(plain)
            || [".", ".."].contains(&&*self.name)
        {
            return Err(Fault::invalid(format!("{:?} cannot be the name of a bridge", self.name)));
        }
        let whole = |(address, bits): (&str, &str)| {
            let (address, bits) = (address.parse::<IpAddr>().ok()?, bits.parse::<u8>().ok()?);
            Some(bits <= if address.is_ipv4() { 30 } else { 126 })
        };
        if self.subnet.split_once('/').and_then(whole) != Some(true) {
            return Err(Fault::invalid(format!("{:?} is not a valid subnet", self.subnet))
                .hint("write it as 10.10.0.0/16"));
        }
        Ok(())
    }

    /// Whether its link is there; an error if something else has its name.
    fn exists(&self) -> Result<bool> {
        let link = Path::new("/sys/class/net").join(&self.name);
        match (link.exists(), link.join("bridge").exists()) {
            (true, false) => {
                Err(Fault::invalid(format!("{:?} already exists but is not a bridge", self.name)))
            }
            (there, _) => Ok(there),
        }
    }
}

/// Longest name of a link.
const MAX_LINK_NAME: usize = 15;

/// A network that processes can ask for by its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedNetwork {
    /// CNI configuration: a `.conflist` or `.conf`, as JSON.
    pub cni_config: PathBuf,
    /// Directory of its plug-ins.
    pub cni_bin: PathBuf,
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
    /// The bridge, for those that are to be on one.
    pub bridge: Bridge,
    /// A file that is locked while the first process is connected, as daemons that share a network
    /// would else make it twice.
    pub init_lock: Option<PathBuf>,
    /// Namespaces kept ready, of each network.
    pub pool: usize,
    /// Networks besides the default one (row `exec.net.named`).
    pub named: BTreeMap<NetworkName, NamedNetwork>,
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self {
            mode: NetworkDefault::Auto,
            cni_config: "/etc/buildkit/cni.json".into(),
            cni_bin: "/opt/cni/bin".into(),
            bridge: Bridge::default(),
            init_lock: None,
            pool: 16,
            named: BTreeMap::new(),
        }
    }
}

/// What begins the names of namespaces that no CNI plug-in knows.
const PROXIED: &str = "proxied-";
/// What is between the name of a network and the rest of the name of a namespace on it; names of
/// networks have none.
const ON: char = '.';

/// A network of CNI plug-ins, with what is ready on it.
struct CniPool {
    cni: CniNetwork,
    ready: Mutex<Vec<NetNs>>,
    /// Set once a process was connected.
    connected: tokio::sync::OnceCell<()>,
}

impl CniPool {
    fn new(cni: CniNetwork) -> Self {
        Self { cni, ready: Mutex::default(), connected: Default::default() }
    }

    /// Connects `netns`, the first one alone: with `init_lock` also among daemons.
    async fn connect(&self, netns: &NetNs, init_lock: Option<&Path>) -> Result<()> {
        let mut done = false;
        let first = async {
            let lock = init_lock.map(Path::to_owned);
            let locked =
                blocking("lock the network", move || lock.map(|path| lock_file(&path)).transpose())
                    .await;
            let _lock = locked?;
            done = true;
            self.cni.add(netns.id(), netns.path()).await
        };
        self.connected.get_or_try_init(|| first).await?;
        if done { Ok(()) } else { self.cni.add(netns.id(), netns.path()).await }
    }
}

pub(crate) struct Network {
    config: NetworkConfig,
    default: Option<CniPool>,
    named: BTreeMap<NetworkName, CniPool>,
    /// Where namespaces are mounted.
    dir: PathBuf,
    /// In the names of this run's namespaces: an earlier one's may be in use still.
    life: u64,
    made: AtomicU64,
    /// Whether the bridge was not there before us, so that it goes with us.
    own_bridge: bool,
}

/// A namespace in use by one process.
pub(crate) struct NetnsGuard {
    netns: NetNs,
    /// The proxy that is all there is in it.
    proxy: Option<Serving>,
}

impl NetnsGuard {
    pub(crate) fn path(&self) -> &Path {
        self.netns.path()
    }

    /// The name by which a later run finds it.
    pub(crate) fn name(&self) -> &str {
        self.netns.name()
    }

    /// What a process in it has to know.
    pub(crate) fn variables(&self) -> Vec<String> {
        self.proxy.as_ref().map(Serving::variables).unwrap_or_default()
    }
}

impl Network {
    /// Whether CNI is configured as the default.
    pub fn has_cni(&self) -> bool {
        self.default.is_some()
    }

    pub(crate) fn new(config: NetworkConfig, dir: PathBuf) -> Result<Self> {
        std::fs::create_dir_all(&dir)
            .map_err(|e| Fault::io(format!("create {}", dir.display()), e))?;
        let wanted = match config.mode {
            NetworkDefault::Auto => config.cni_config.exists(),
            NetworkDefault::Cni | NetworkDefault::Bridge => true,
            NetworkDefault::Host | NetworkDefault::None => false,
        };
        let is_bridge = config.mode == NetworkDefault::Bridge;
        let load = || {
            if !is_bridge {
                return CniNetwork::load(&config.cni_config, &config.cni_bin);
            }
            config.bridge.check()?;
            CniNetwork::bridge(
                &config.bridge,
                &config.cni_bin,
                &std::env::var_os("PATH").unwrap_or_default(),
            )
        };
        let default = wanted.then(load).transpose()?.map(CniPool::new);
        let named = config.named.iter().map(|(name, network)| {
            let cni = CniNetwork::load(&network.cni_config, &network.cni_bin)
                .map_err(|e| e.context(format!("the network {name}")))?;
            Ok((name.clone(), CniPool::new(cni)))
        });
        let named = named.collect::<Result<_>>()?;
        let own_bridge = is_bridge && !config.bridge.exists()?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let life = u64::try_from(now.as_micros()).unwrap_or_default();
        Ok(Self { config, default, named, dir, life, made: AtomicU64::new(0), own_bridge })
    }

    /// Whether `process` is in the host's namespace.
    pub(crate) fn is_host(&self, process: &ProcessSpec) -> bool {
        process.proxy.is_none() && self.goes_out_as_host(&process.network)
    }

    fn goes_out_as_host(&self, mode: &NetworkMode) -> bool {
        match mode {
            NetworkMode::Host => true,
            NetworkMode::None | NetworkMode::Named(_) => false,
            NetworkMode::Default => {
                self.default.is_none() && self.config.mode != NetworkDefault::None
            }
        }
    }

    /// The plug-ins' network for a process in `mode`, if it is on one.
    fn pool(&self, mode: &NetworkMode) -> Result<Option<&CniPool>> {
        match mode {
            NetworkMode::Host | NetworkMode::None => Ok(None),
            NetworkMode::Default => Ok(self.default.as_ref()),
            NetworkMode::Named(name) => match self.named.get(name) {
                Some(pool) => Ok(Some(pool)),
                None => Err(Fault::invalid(format!("no network {name} is configured"))),
            },
        }
    }

    /// The plug-ins' network that made `netns`; `None` for one without plug-ins, or if its network
    /// is not configured any more.
    fn pool_of(&self, netns: &NetNs) -> Option<&CniPool> {
        match netns.name().split_once(ON) {
            Some((name, _)) => self.named.get(&name.parse::<NetworkName>().ok()?),
            None if netns.name().starts_with(PROXIED) => None,
            None => self.default.as_ref(),
        }
    }

    fn name(&self, prefix: &str) -> String {
        format!("{prefix}{:x}-{}", self.life, self.made.fetch_add(1, Ordering::Relaxed))
    }

    /// A namespace for a process in `mode`; `None` where the runtime does what is needed.
    pub(crate) async fn lease(
        &self,
        mode: &NetworkMode,
        proxy: Option<&Proxied>,
    ) -> Result<Option<NetnsGuard>> {
        if let Some(proxy) = proxy {
            return self.proxied(mode, proxy).await.map(Some);
        }
        let Some(pool) = self.pool(mode)? else { return Ok(None) };
        let ready = pool.ready.lock().pop();
        if let Some(netns) = ready {
            return Ok(Some(NetnsGuard { netns, proxy: None }));
        }
        let prefix = match mode {
            NetworkMode::Named(name) => format!("{name}{ON}"),
            _ => String::new(),
        };
        let netns = NetNs::new(&self.dir, &self.name(&prefix)).await?;
        match pool.connect(&netns, self.config.init_lock.as_deref()).await {
            Ok(()) => Ok(Some(NetnsGuard { netns, proxy: None })),
            Err(e) => {
                let _ = pool.cni.del(netns.id(), netns.path()).await;
                netns.remove().await;
                Err(e)
            }
        }
    }

    /// A namespace with nothing but a loopback, on which `proxy` listens; the proxy goes out as a
    /// process in `mode` would.
    async fn proxied(&self, mode: &NetworkMode, proxy: &Proxied) -> Result<NetnsGuard> {
        let egress = match Box::pin(self.lease(mode, None)).await? {
            Some(lease) => proxied::Upstream::Namespace(lease.netns),
            None if self.goes_out_as_host(mode) => proxied::Upstream::Host,
            None => proxied::Upstream::NoEgress,
        };
        let (netns, result) = match NetNs::new(&self.dir, &self.name(PROXIED)).await {
            Ok(netns) => {
                let listener = proxied::listen(&netns).await;
                (Some(netns), listener)
            }
            Err(e) => (None, Err(e)),
        };
        match (netns, result) {
            (Some(netns), Ok(listener)) => {
                Ok(NetnsGuard { netns, proxy: Some(Serving::start(proxy, listener, egress)?) })
            }
            (netns, result) => {
                if let Some(netns) = netns {
                    netns.remove().await;
                }
                if let proxied::Upstream::Namespace(netns) = egress {
                    self.reuse(netns).await;
                }
                Err(result
                    .err()
                    .unwrap_or_else(|| Fault::internal("a proxied network has no namespace")))
            }
        }
    }

    /// Takes a namespace back, for another process if it is `reusable`.
    pub(crate) async fn give_back(&self, lease: NetnsGuard, reusable: bool) {
        if let Some(serving) = lease.proxy {
            lease.netns.remove().await;
            // Only the proxy used it.
            if let Some(egress) = serving.stop().await {
                self.reuse(egress).await;
            }
            return;
        }
        if reusable { self.reuse(lease.netns).await } else { self.discard(lease.netns).await }
    }

    async fn reuse(&self, netns: NetNs) {
        if let Some(pool) = self.pool_of(&netns) {
            let mut ready = pool.ready.lock();
            if ready.len() < self.config.pool {
                ready.push(netns);
                return;
            }
        }
        self.discard(netns).await;
    }

    async fn discard(&self, netns: NetNs) {
        match self.pool_of(&netns) {
            Some(pool) => {
                if let Err(e) = pool.cni.del(netns.id(), netns.path()).await {
                    tracing::warn!(netns = netns.id(), "failed to release network namespace: {e}");
                }
            }
            None if netns.name().contains(ON) => tracing::warn!(
                netns = netns.id(),
                "its network is not configured any more: its plug-ins may keep an address for it"
            ),
            None => {}
        }
        netns.remove().await;
    }

    /// Takes away what is only there for us, when no process will come any more.
    pub(crate) async fn close(&self) {
        self.retire_idle().await;
        if !self.own_bridge {
            return;
        }
        let name = self.config.bridge.name.clone();
        let remove = move || netns::delete_link(&name).map_err(|e| Fault::io("delete the link", e));
        if let Err(e) = blocking("remove the bridge", remove).await {
            tracing::warn!(bridge = self.config.bridge.name, "failed to remove bridge: {e}");
        }
    }

    /// Removes the unused namespaces.
    pub(crate) async fn retire_idle(&self) {
        for pool in self.default.iter().chain(self.named.values()) {
            let idle: Vec<NetNs> = pool.ready.lock().drain(..).collect();
            for netns in idle {
                self.discard(netns).await;
            }
        }
    }

    /// Removes what an earlier run left, but for what is `spared`, by name.
    pub(crate) async fn sweep(&self, spared: impl Fn(&str) -> bool) -> Result<()> {
        for netns in NetNs::left_in(&self.dir)? {
            if !spared(netns.name()) {
                self.discard(netns).await;
            }
        }
        Ok(())
    }

    /// The namespace called `name`, which an earlier run made for a process that goes on.
    pub(crate) fn left(&self, name: &str) -> NetnsGuard {
        NetnsGuard { netns: NetNs::known(&self.dir, name), proxy: None }
    }
}

/// Waits for a lock on the file `path`, which is made if it is not there.
fn lock_file(path: &Path) -> Result<std::fs::File> {
    let failed = |e: std::io::Error| Fault::io(format!("lock {}", path.display()), e);
    let file = std::fs::File::options().create(true).append(true).open(path).map_err(failed)?;
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive)
        .map_err(|e| failed(e.into()))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_is_given_back_to_the_network_that_made_it() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("plugin"), "").expect("write");
        let config = |name: &str| {
            let path = at(&format!("{name}.json"));
            std::fs::write(&path, format!(r#"{{"name":"{name}","type":"plugin"}}"#))
                .expect("write");
            path
        };
        let named = ["a", "a-1"].map(|name| {
            let cni_config = config(name);
            let parsed: NetworkName = name.parse().expect("a name");
            (parsed, NamedNetwork { cni_config, cni_bin: dir.path().into() })
        });
        let network = Network::new(
            NetworkConfig {
                mode: NetworkDefault::Cni,
                cni_config: config("default"),
                cni_bin: dir.path().into(),
                named: named.into(),
                ..NetworkConfig::default()
            },
            at("netns"),
        )
        .expect("a network");
        let of = |name: &str| {
            std::fs::write(at("netns").join(name), "").expect("write");
            let left = NetNs::left_in(&at("netns")).expect("list");
            std::fs::remove_file(at("netns").join(name)).expect("remove");
            network.pool_of(&left[0]).map(|pool| pool.cni.name().to_owned())
        };
        assert_eq!(of("7-0").as_deref(), Some("default"));
        assert_eq!(of("a.7-0").as_deref(), Some("a"));
        assert_eq!(of("a-1.7-0").as_deref(), Some("a-1"));
        assert_eq!(of("gone.7-0"), None);
        assert_eq!(of("proxied-7-0"), None);
    }

    #[test]
    fn a_named_network_without_a_configuration_stops_the_start_and_is_named() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let none = NamedNetwork { cni_config: dir.path().join("no"), cni_bin: dir.path().into() };
        let config = NetworkConfig {
            named: [("corp".parse().expect("a name"), none)].into(),
            ..NetworkConfig::default()
        };
        let fault = Network::new(config, dir.path().join("netns")).err().expect("a fault");
        assert!(fault.to_string().contains("the network corp"), "{fault}");
    }

    #[test]
    fn a_bridge_that_cannot_be_is_refused() {
        let check = |name: &str, subnet: &str| {
            Bridge { name: name.into(), subnet: subnet.into() }.check().is_ok()
        };
        assert!(Bridge::default().check().is_ok() && check("b", "fd00::/64"));
        for name in ["", "a/b", "a b", "..", "sixteen-letters-"] {
            assert!(!check(name, "10.0.0.0/8"), "{name:?}");
        }
        for subnet in ["", "10.0.0.0", "10.0.0.0/31", "10.0.0/8", "10.0.0.0/x", "10.0.0.0/-1"] {
            assert!(!check("b", subnet), "{subnet:?}");
        }
        // The loopback is a link, and no bridge.
        let lo = Bridge { name: "lo".into(), ..Bridge::default() };
        assert!(lo.exists().expect_err("not a bridge").to_string().contains("not a bridge"));
    }
}
