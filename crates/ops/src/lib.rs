//! The LLB operations as solver operations, over refs, sources and the executor.
//!
//! [`LlbOp`] is one vertex's work: made by the engine from a checked [`shipway_llb::Vertex`], run
//! by the solver. A source is pinned for its key and fetched when needed; a process (`exec`) gets
//! snapshots as mounts and its writable ones committed; file actions (`file`) run here, in the
//! daemon, confined to their roots by the kernel (`openat2`). Which devices of the host a process
//! gets is decided before it has a key (`devices`); programs of other processors get an emulator
//! where the kernel has none (`emulator`).
//!
//! `ring` gives the ids of states that failed operations left.

mod ahead;
mod build;
mod container;
mod devices;
mod emulator;
mod exec;
mod file;
mod ids;
mod job;
mod key;
mod op;
mod remains;
mod wishes;

pub use ahead::Ahead;
pub use build::{Nested, NestedGraph, NestedGraphs, SolveNested};
pub use container::{Container, ContainerSpec};
pub use devices::DeviceGrants;
pub use emulator::Emulators;
pub use exec::LogLimits;
pub use ids::random_id;
pub use job::{BuildJudge, Entitlements, JobData, Judge, Services};
pub use op::LlbOp;
pub use remains::Remains;
pub use wishes::Wishes;
