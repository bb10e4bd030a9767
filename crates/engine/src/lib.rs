//! The build pipeline: check, solve, export, record.
//!
//! [`Engine::build`] takes a [`BuildRequest`] through its life. A build with a definition or a
//! frontend runs by itself; one with neither waits for its client to drive it through the
//! [`Bridge`](shipway_frontend::Bridge) that crate `gateway` carries. Results stay lazy
//! ([`EngineRef`]) until something reads, evaluates or exports them. What happened is kept in
//! [`History`].
//!
//! Nothing here speaks a wire: requests come as plain types from `shipwayd`.

mod attestations;
mod bridge;
mod caches;
mod container;
mod engine;
mod export;
mod heavy;
mod history;
mod image_frontend;
mod policy;
mod provenance;
mod reads;
mod request;
mod results;
mod sbom;
mod state;
mod trail;
mod usage;
mod verify;
mod vertices;

pub use caches::IMPORT_DEADLINE;
pub use engine::{Engine, EngineParts, Progress};
pub use history::{
    FaultEncoder, History, HistoryEncoders, HistoryEvent, HistoryEventKind, HistoryLimits,
    HistoryRecord, HistoryStatus, HistorySummary, LogEncoder, LogFile, Steps,
};
pub use image_frontend::ImageFrontends;
pub use policy::BuildPolicy;
pub use request::{BuildRequest, BuildResponse, ExporterRequest};
pub use results::RefResults;
pub use state::EngineRef;
