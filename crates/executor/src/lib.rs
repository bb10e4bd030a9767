//! The executor port: processes over mounts, in plain types; and the OCI runtime specification they
//! become.
//!
//! [`Executor`] is implemented by crate `containerd` with tasks, and by [`fake`] for tests. Nothing
//! here knows LLB.
//!
//! Beside the port lives what any implementation needs: the specification's builder ([`spec`]),
//! what devices change in it ([`Edits`]), the files of `/etc` that name hosts ([`etc`]), and the
//! operator's certificates ([`CaBundle`]).

mod edits;
mod process;
mod proxy;
mod trust;

pub mod etc;
pub mod fake;
mod io;
pub mod spec;

pub use edits::{DeviceNode, Edits, Hook, HookPoint};
pub use io::{Control, Output, OutputSink, OutputTarget, ProcessIo, Stream};
pub use process::{
    CgroupParent, ExecMount, Executor, ExitStatus, HostEntry, KeepAlive, LeftProcess, MountSource,
    NetworkMode, OpenedFiles, ProcessSpec, ResourceLimits, Resumable, Rlimit, RootFs, Secret,
    Security, User,
};
pub use proxy::{Egress, Proxied, StepProxy, environment as proxy_environment, set_variables};
pub use trust::{CaBundle, MAX_CA_BUNDLE};
