//! The LLB operations as solver operations, over refs, sources and the executor.
//!
//! [`LlbOp`] is one vertex's work: made by the engine from a checked [`shipway_llb::Vertex`], run
//! by the solver. Each LLB operation is one module that implements `VertexOp`, and one line in
//! `operations`: a source is pinned for its key and fetched when needed; a process (`exec`) gets
//! snapshots as mounts and its writable ones committed; file actions (`file`) run in the daemon, by
//! crate `fileops`. Which devices of the host a process gets is decided before it has a key
//! (`devices`); programs of other processors get an emulator where the kernel has none
//! (`emulator`).

mod build;
mod cache_mounts;
mod container;
mod content;
mod devices;
mod diff;
mod emulator;
mod exec;
mod export_plan;
mod failed_state;
mod file;
mod job;
mod key;
mod merge;
mod op;
mod operations;
mod passthrough;
mod source;
mod step_options;

pub use build::{Nested, NestedGraph, NestedGraphs, SolveNested};
pub use cache_mounts::{CacheMounts, MountDir, MountName, MountSource, OpenPlace, UsedMount};
pub use container::{Container, ContainerSpec};
pub use devices::DeviceGrants;
pub use emulator::Emulators;
pub use exec::{HeldSteps, LeftSteps, LogLimits};
pub use export_plan::ExportPlan;
pub use failed_state::{FailedStates, LeftState};
pub use job::{BuildJudge, Entitlements, JobData, Judge, NetworkGrants, Services};
pub use op::LlbOp;
pub use step_options::StepOptions;
