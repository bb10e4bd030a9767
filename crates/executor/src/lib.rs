//! The executor port: processes over mounts, in plain types; and the OCI runtime specification they
//! become.
//!
//! [`Executor`] is implemented by crate `containerd` with tasks, and by [`fake`] for tests. Nothing
//! here knows LLB.
//!
//! Beside the port lives what any implementation needs and no runtime does: who the user is in the
//! image ([`identity`]), the files of `/etc` that name hosts ([`etc`]), what devices change in the
//! specification ([`Edits`]), a look into a root filesystem ([`RootView`]), the removal of mount
//! points ([`stubs`]), and certificates beside the image's ([`trust`]).

mod edits;
mod process;
mod proxy;

pub mod etc;
pub mod fake;
pub mod identity;
mod rootview;
pub mod spec;
pub mod stubs;
pub mod trust;
mod wires;

pub use edits::{DeviceNode, Edits, Hook, HookPoint};
pub use identity::Identity;
pub use process::{
    CgroupParent, ExecMount, Executor, ExitStatus, HostEntry, Keep, MountSource, NetworkMode,
    Output, OutputSink, ProcessSpec, ResourceLimits, Rlimit, RootFs, Secret, Security, Stream,
    User,
};
pub use proxy::{Egress, Proxied, StepProxy, environment as proxy_environment, set_variables};
pub use rootview::{Access, Attached, RootView, open_in_root, reopen_regular};
pub use wires::{Control, Outlet, Wires};
