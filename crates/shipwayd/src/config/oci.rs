//! `[worker.oci]`: the settings of the worker that containerd stands in for.

use super::{DiskSpace, GcPolicy, Worker};
use serde::{Deserialize, Deserializer, de::Error};
use std::collections::BTreeMap;

/// The table, and which keys it has.
#[derive(Clone, Debug, Default)]
pub struct OciWorker {
    /// Keys that are set.
    pub keys: Vec<String>,
    settings: Table,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Table {
    enabled: Option<bool>,
    labels: BTreeMap<String, String>,
    platforms: Vec<String>,
    snapshotter: Option<String>,
    rootless: bool,
    #[serde(rename = "noProcessSandbox")]
    no_process_sandbox: bool,
    gc: Option<bool>,
    gckeepstorage: Option<DiskSpace>,
    #[serde(rename = "reservedSpace")]
    reserved_space: Option<DiskSpace>,
    #[serde(rename = "maxUsedSpace")]
    max_used_space: Option<DiskSpace>,
    #[serde(rename = "minFreeSpace")]
    min_free_space: Option<DiskSpace>,
    gcpolicy: Vec<GcPolicy>,
    #[serde(rename = "networkMode")]
    network_mode: Option<String>,
    #[serde(rename = "cniConfigPath")]
    cni_config_path: Option<String>,
    #[serde(rename = "cniBinaryPath")]
    cni_binary_path: Option<String>,
    #[serde(rename = "cniPoolSize")]
    cni_pool_size: usize,
    #[serde(rename = "bridgeName")]
    bridge_name: Option<String>,
    #[serde(rename = "bridgeSubnet")]
    bridge_subnet: Option<String>,
    #[serde(rename = "userRemapUnsupported")]
    user_remap: Option<String>,
    binary: Option<String>,
    #[serde(rename = "proxySnapshotterPath")]
    proxy_snapshotter_path: Option<String>,
    #[serde(rename = "defaultCgroupParent")]
    default_cgroup_parent: Option<String>,
    #[serde(rename = "stargzSnapshotter")]
    stargz_snapshotter: Option<toml::Table>,
    #[serde(rename = "apparmor-profile")]
    apparmor_profile: Option<String>,
    selinux: bool,
    #[serde(rename = "max-parallelism")]
    max_parallelism: usize,
}

impl<'de> Deserialize<'de> for OciWorker {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let table = toml::Table::deserialize(d)?;
        let keys = table.keys().cloned().collect();
        let settings = Table::deserialize(table).map_err(|e| D::Error::custom(e.message()))?;
        Ok(Self { keys, settings })
    }
}

impl OciWorker {
    /// Whether the file turns it on or off.
    pub fn enabled(&self) -> Option<bool> {
        self.settings.enabled
    }

    /// Takes what is set here for what is not set in `w`, and says what of it has no effect.
    pub fn fill(self, w: &mut Worker) -> Vec<String> {
        let Table {
            enabled: _,
            labels,
            platforms,
            snapshotter,
            rootless,
            no_process_sandbox,
            gc,
            gckeepstorage,
            reserved_space,
            max_used_space,
            min_free_space,
            gcpolicy,
            network_mode,
            cni_config_path,
            cni_binary_path,
            cni_pool_size,
            bridge_name,
            bridge_subnet,
            user_remap,
            binary,
            proxy_snapshotter_path,
            default_cgroup_parent,
            stargz_snapshotter,
            apparmor_profile,
            selinux,
            max_parallelism,
        } = self.settings;
        for (key, value) in labels {
            w.labels.entry(key).or_insert(value);
        }
        fn first<T>(ours: &mut Option<T>, other: Option<T>) {
            *ours = ours.take().or(other);
        }
        first(&mut w.snapshotter, snapshotter.filter(|s| s != "auto"));
        first(&mut w.gc, gc);
        first(&mut w.network_mode, network_mode);
        first(&mut w.cni_config_path, cni_config_path);
        first(&mut w.cni_binary_path, cni_binary_path);
        first(&mut w.bridge_name, bridge_name);
        first(&mut w.bridge_subnet, bridge_subnet);
        first(&mut w.runtime.path, binary);
        first(&mut w.default_cgroup_parent, default_cgroup_parent);
        first(&mut w.apparmor_profile, apparmor_profile);
        // Limits of garbage collection belong together.
        if [w.gckeepstorage, w.reserved_space, w.max_used_space, w.min_free_space]
            .iter()
            .all(Option::is_none)
        {
            (w.gckeepstorage, w.reserved_space) = (gckeepstorage, reserved_space);
            (w.max_used_space, w.min_free_space) = (max_used_space, min_free_space);
        }
        if w.gcpolicy.is_empty() {
            w.gcpolicy = gcpolicy;
        }
        if w.platforms.is_empty() {
            w.platforms = platforms;
        }
        if w.cni_pool_size == 0 {
            w.cni_pool_size = cni_pool_size;
        }
        if w.max_parallelism == 0 {
            w.max_parallelism = max_parallelism;
        }
        w.rootless |= rootless;
        w.selinux |= selinux;
        let without = [
            (
                no_process_sandbox,
                "noProcessSandbox",
                "steps have PID namespaces of their own all the same",
            ),
            (user_remap.is_some(), "userRemapUnsupported", "users of steps are not mapped"),
            (
                proxy_snapshotter_path.is_some(),
                "proxySnapshotterPath",
                "proxy snapshotters are containerd's to configure",
            ),
            (
                stargz_snapshotter.is_some(),
                "stargzSnapshotter",
                "snapshotters are containerd's to configure",
            ),
        ];
        without
            .iter()
            .filter(|w| w.0)
            .map(|(_, key, why)| format!("worker.oci.{key} has no effect: {why}"))
            .collect()
    }
}
