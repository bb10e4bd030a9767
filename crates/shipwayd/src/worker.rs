//! The worker as clients see it (rows `ctl.workerrec`, `so.labels`).

mod platforms;

use shipway_cdi::{Device, Devices};
use shipway_grpc::platform_to_wire;
use shipway_oci::Platform;
use shipway_proto::moby::buildkit::v1::types::{
    BuildkitVersion, CdiDevice, GcPolicy, WorkerRecord,
};
use std::collections::BTreeMap;

pub use platforms::Platforms;

/// Version of BuildKit's API that we implement; clients compare it (row `bx.version-semver`).
pub const API_VERSION: &str = "v0.31.0";

/// What `--version`, Info and worker records say.
pub fn version() -> BuildkitVersion {
    BuildkitVersion {
        package: "shipway".into(),
        version: API_VERSION.into(),
        revision: format!("shipway-{}", env!("CARGO_PKG_VERSION")),
        dockerfile_version: "1.20.0".into(),
    }
}

/// Labels by name without prefix; the ones that let nerdctl share the image store are all here.
pub fn labels(
    uuid: &str,
    namespace: &str,
    snapshotter: &str,
    network: &str,
    apparmor: Option<&str>,
    extra: &BTreeMap<String, String>,
) -> BTreeMap<String, String> {
    let hostname = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let own = [
        ("executor", "containerd"),
        ("snapshotter", snapshotter),
        ("hostname", &hostname),
        ("network", network),
        ("selinux.enabled", "false"),
        ("containerd.uuid", uuid),
        ("containerd.namespace", namespace),
    ];
    let own = own.into_iter().chain(apparmor.map(|profile| ("apparmor.profile", profile)));
    let mut labels: BTreeMap<_, _> =
        own.map(|(k, v)| (format!("org.mobyproject.buildkit.worker.{k}"), v.to_owned())).collect();
    labels.extend(extra.clone());
    labels
}

/// The record, without devices.
pub fn record(
    id: &str,
    labels: BTreeMap<String, String>,
    platforms: &[Platform],
    gc: Vec<GcPolicy>,
) -> WorkerRecord {
    WorkerRecord {
        id: id.to_owned(),
        labels,
        platforms: platforms.iter().map(platform_to_wire).collect(),
        gc_policy: gc,
        buildkit_version: Some(version()),
        cdi_devices: Vec::new(),
    }
}

/// The devices as the record has them.
pub fn devices(there: &Devices) -> Vec<CdiDevice> {
    let device = |d: &Device| CdiDevice {
        name: d.name.clone(),
        auto_allow: d.auto_allow,
        annotations: d.annotations.clone(),
        on_demand: false,
    };
    there.iter().map(device).collect()
}
