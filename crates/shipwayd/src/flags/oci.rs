//! The flags of BuildKit's OCI worker. There is no such worker here: a daemon told to run one builds on containerd all the same, under the settings
//! that were meant for it, so that units and scripts written for `buildkitd --oci-worker=true` go on working.

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
    /// Accepted; the runtime is containerd's matter
    #[arg(id = "oci-worker-binary", long = "oci-worker-binary", hide = true)]
    pub binary: Option<String>,
}

/// The settings of a containerd worker that stands in for an OCI worker.
#[derive(Debug, PartialEq, Eq)]
pub struct StandIn {
    /// Its namespace unless one is named: an OCI worker has a store of its own below its root, and so do daemons with roots of their own.
    pub namespace: Option<String>,
    /// What the log should say.
    pub note: String,
}

/// Whether the flags ask for an OCI worker, or leave no worker at all. `containerd` is the value of `--containerd-worker`, or of the file.
pub fn stand_in(oci: Option<&str>, containerd: Option<&str>, root: &Path, usual_root: &str) -> Result<Option<StandIn>> {
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
    let namespace = own.then(|| format!("buildkit-{}", &Digest::of(root.as_os_str().as_encoded_bytes()).hex()[..12]));
    let note = "there is no OCI worker here: steps run in containerd all the same".to_owned();
    Ok(Some(StandIn { namespace, note }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_oci_worker_is_stood_in_for() {
        let check = |oci: Option<&str>, containerd: Option<&str>, root: &str| {
            stand_in(oci, containerd, Path::new(root), "/usual").map(|s| s.map(|s| s.namespace.is_some())).map_err(|e| e.to_string())
        };
        assert_eq!(check(None, None, "/usual"), Ok(None));
        assert_eq!(check(Some("auto"), Some("true"), "/other"), Ok(None));
        assert_eq!(check(Some("true"), Some("false"), "/usual"), Ok(Some(false)));
        assert_eq!(check(Some("true"), Some("false"), "/other"), Ok(Some(true)));
        assert_eq!(check(None, Some("false"), "/other"), Ok(Some(false)));
        assert!(check(Some("false"), Some("false"), "/usual").unwrap_err().starts_with("no worker found"));
    }
}
