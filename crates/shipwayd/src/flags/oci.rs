//! The flags of BuildKit's OCI worker. There is no such worker here: a daemon configured to run one
//! builds on containerd all the same, under the settings that were meant for it, so that units and
//! scripts written for `buildkitd --oci-worker=true` go on working.

use crate::config::KeepStorage;
use clap::Args;
use shipway_fault::{Fault, Result};
use shipway_oci::Digest;
use std::path::Path;

/// The flags.
#[derive(Args, Debug, Default)]
#[allow(missing_docs)]
pub struct OciFlags {
    /// Accepted for buildkitd's sake: there is no OCI worker, containerd runs the steps
    #[arg(id = "oci-worker", long = "oci-worker", hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub enabled: Option<String>,
    #[arg(id = "oci-worker-labels", long = "oci-worker-labels", hide = true)]
    pub labels: Vec<String>,
    #[arg(id = "oci-worker-snapshotter", long = "oci-worker-snapshotter", hide = true)]
    pub snapshotter: Option<String>,
    #[arg(id = "oci-worker-platform", long = "oci-worker-platform", hide = true)]
    pub platforms: Vec<String>,
    #[arg(id = "oci-worker-net", long = "oci-worker-net", hide = true)]
    pub net: Option<String>,
    #[arg(id = "oci-cni-config-path", long = "oci-cni-config-path", hide = true)]
    pub cni_config_path: Option<String>,
    #[arg(id = "oci-cni-binary-dir", long = "oci-cni-binary-dir", hide = true)]
    pub cni_binary_dir: Option<String>,
    #[arg(id = "oci-cni-pool-size", long = "oci-cni-pool-size", hide = true)]
    pub cni_pool_size: Option<usize>,
    #[arg(id = "oci-max-parallelism", long = "oci-max-parallelism", hide = true)]
    pub max_parallelism: Option<usize>,
    #[arg(id = "oci-worker-gc", long = "oci-worker-gc", hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub gc: Option<bool>,
    #[arg(id = "oci-worker-gc-keepstorage", long = "oci-worker-gc-keepstorage", hide = true)]
    pub gc_keepstorage: Option<KeepStorage>,
    #[arg(id = "oci-worker-binary", long = "oci-worker-binary", hide = true)]
    pub binary: Option<String>,
    #[arg(id = "oci-worker-apparmor-profile", long = "oci-worker-apparmor-profile", hide = true)]
    pub apparmor_profile: Option<String>,
    #[arg(id = "oci-worker-selinux", long = "oci-worker-selinux", hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub selinux: Option<bool>,
    #[arg(id = "oci-worker-rootless", long = "oci-worker-rootless", hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub rootless: Option<bool>,
    /// The log says that it has no effect
    #[arg(id = "oci-worker-no-process-sandbox", long = "oci-worker-no-process-sandbox", hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub no_process_sandbox: Option<bool>,
    /// The log says that it has no effect
    #[arg(
        id = "oci-worker-proxy-snapshotter-path",
        long = "oci-worker-proxy-snapshotter-path",
        hide = true
    )]
    pub proxy_snapshotter_path: Option<String>,
}

impl OciFlags {
    /// The flags that are set and mean nothing to a containerd that stands in, each with why; or
    /// all of them where none stands in.
    pub fn without_effect(&self, stands_in: bool) -> Vec<String> {
        let sandbox = (
            self.no_process_sandbox == Some(true),
            "no-process-sandbox",
            "steps have PID namespaces of their own all the same",
        );
        let proxy = (
            self.proxy_snapshotter_path.is_some(),
            "proxy-snapshotter-path",
            "proxy snapshotters are containerd's to configure",
        );
        let say = |flag: &str, why: &str| format!("--oci-worker-{flag} has no effect: {why}");
        if stands_in {
            return [sandbox, proxy]
                .iter()
                .filter(|f| f.0)
                .map(|(_, flag, why)| say(flag, why))
                .collect();
        }
        let Self {
            enabled: _,
            labels,
            snapshotter,
            platforms,
            net,
            cni_config_path,
            cni_binary_dir,
            cni_pool_size,
            max_parallelism,
            gc,
            gc_keepstorage,
            binary,
            apparmor_profile,
            selinux: _,
            rootless: _,
            no_process_sandbox: _,
            proxy_snapshotter_path: _,
        } = self;
        let set = [
            ("oci-worker-labels", !labels.is_empty()),
            ("oci-worker-snapshotter", snapshotter.is_some()),
            ("oci-worker-platform", !platforms.is_empty()),
            ("oci-worker-net", net.is_some()),
            ("oci-cni-config-path", cni_config_path.is_some()),
            ("oci-cni-binary-dir", cni_binary_dir.is_some()),
            ("oci-cni-pool-size", cni_pool_size.is_some()),
            ("oci-max-parallelism", max_parallelism.is_some()),
            ("oci-worker-gc", gc.is_some()),
            ("oci-worker-gc-keepstorage", gc_keepstorage.is_some()),
            ("oci-worker-binary", binary.is_some()),
            ("oci-worker-apparmor-profile", apparmor_profile.is_some()),
            ("oci-worker-no-process-sandbox", sandbox.0),
            ("oci-worker-proxy-snapshotter-path", proxy.0),
        ];
        let of = |flag: &str| {
            format!(
                "--{flag} has no effect: it is for an OCI worker, and steps run on the containerd worker"
            )
        };
        set.iter().filter(|f| f.1).map(|f| of(f.0)).collect()
    }
}

/// The settings of a containerd worker that stands in for an OCI worker.
#[derive(Debug, PartialEq, Eq)]
pub struct StandIn {
    /// Its namespace unless one is named: an OCI worker has a store of its own below its root, and
    /// so do daemons with roots of their own.
    pub namespace: Option<String>,
    /// What the log should say.
    pub note: String,
}

/// Whether the flags ask for an OCI worker, or leave no worker at all. `containerd` is the value of
/// `--containerd-worker`, or of the file.
pub fn stand_in(
    oci: Option<&str>,
    containerd: Option<&str>,
    root: &Path,
    usual_root: &str,
) -> Result<Option<StandIn>> {
    let wanted = matches!(oci, Some("true"));
    match (oci, containerd) {
        (Some("false"), Some("false")) => {
            return Err(Fault::invalid("no worker found: the containerd worker is disabled")
                .hint("remove --containerd-worker=false or worker.containerd.enabled"));
        }
        (_, Some("false")) => {}
        _ if wanted => {}
        _ => return Ok(None),
    }
    let own = wanted && root != Path::new(usual_root);
    let namespace = own.then(|| {
        format!("buildkit-{}", &Digest::of(root.as_os_str().as_encoded_bytes()).hex()[..12])
    });
    let note = "there is no OCI worker here (--oci-worker, worker.oci.enabled): steps run in containerd all the same, with --containerd-worker=false too".to_owned();
    Ok(Some(StandIn { namespace, note }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_oci_worker_is_stood_in_for() {
        let check = |oci: Option<&str>, containerd: Option<&str>, root: &str| {
            stand_in(oci, containerd, Path::new(root), "/usual")
                .map(|s| s.map(|s| s.namespace.is_some()))
                .map_err(|e| e.to_string())
        };
        assert_eq!(check(None, None, "/usual"), Ok(None));
        assert_eq!(check(Some("auto"), Some("true"), "/other"), Ok(None));
        assert_eq!(check(Some("true"), Some("false"), "/usual"), Ok(Some(false)));
        assert_eq!(check(Some("true"), Some("false"), "/other"), Ok(Some(true)));
        assert_eq!(check(None, Some("false"), "/other"), Ok(Some(false)));
        assert!(
            check(Some("false"), Some("false"), "/usual")
                .unwrap_err()
                .starts_with("no worker found")
        );
    }
}
