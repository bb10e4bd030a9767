//! buildkitd's flags for what is not here: harmless ones are accepted and the log says that they
//! have no effect, so that its units go on working; asking for what would not be done is an error.

use clap::Args;
use shipway_fault::{Fault, Result};

/// The flags.
#[derive(Args, Debug, Default)]
#[allow(missing_docs)]
pub struct AbsentFlags {
    #[arg(id = "rootless", long = "rootless", hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub rootless: Option<bool>,
    #[arg(id = "containerd-worker-rootless", long = "containerd-worker-rootless", hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub worker_rootless: Option<bool>,
    #[arg(id = "containerd-worker-selinux", long = "containerd-worker-selinux", hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub selinux: Option<bool>,
    /// The log says that it has no effect
    #[arg(id = "save-cache-debug", long = "save-cache-debug", hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub save_cache_debug: Option<bool>,
}

impl AbsentFlags {
    /// Refuses what was asked for and would not be done; `rootless` and `selinux` are the
    /// configuration file's.
    pub fn check(&self, rootless: bool, selinux: bool) -> Result<()> {
        for (asked, what, instead) in [
            (
                rootless || self.rootless == Some(true) || self.worker_rootless == Some(true),
                "rootless mode (rootless, --rootless, --containerd-worker-rootless, --oci-worker-rootless): the daemon mounts snapshots where containerd runs, which takes root there",
                "run the daemon as root and let users in by the group of its socket (--group); where root is not to be had, buildkitd's rootless mode serves the same clients",
            ),
            (
                selinux || self.selinux == Some(true),
                "SELinux labels of steps (selinux, --containerd-worker-selinux, --oci-worker-selinux)",
                "leave the setting out: steps run with the runtime's own label",
            ),
        ] {
            if asked {
                return Err(Fault::unimplemented(what).hint(instead));
            }
        }
        Ok(())
    }

    /// What is set without effect.
    pub fn notes(&self) -> impl Iterator<Item = String> {
        let notes = [(
            self.save_cache_debug == Some(true),
            "--save-cache-debug has no effect: cache keys have no preimages to save",
        )];
        notes.into_iter().filter(|n| n.0).map(|n| n.1.to_owned())
    }
}
