//! buildkitd's flags for what is not here: harmless ones are accepted, so that its units go on working; asking for what would not be done is an error.

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
    /// Accepted: no traces are collected from steps yet
    #[arg(id = "otel-socket-path", long = "otel-socket-path", hide = true)]
    pub otel_socket_path: Option<String>,
}

impl AbsentFlags {
    /// Refuses what was asked for and would not be done; `rootless` and `selinux` are the configuration file's.
    pub fn check(&self, rootless: bool, selinux: bool) -> Result<()> {
        for (asked, what) in [
            (rootless || self.rootless == Some(true) || self.worker_rootless == Some(true), "rootless mode"),
            (selinux || self.selinux == Some(true), "SELinux labels of steps"),
        ] {
            if asked {
                return Err(Fault::unimplemented(what));
            }
        }
        Ok(())
    }
}
