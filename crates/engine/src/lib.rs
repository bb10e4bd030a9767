//! The build pipeline: check, solve, export, record.
//!
//! [`Engine::build`] takes a [`BuildRequest`] through its life. A build with a definition or a
//! frontend runs by itself; one with neither waits for its client to drive it through the
//! [`Bridge`](shipway_frontend::Bridge) that crate `gateway` carries. Results stay lazy
//! ([`EngineRef`]) until something reads, evaluates or exports them. What happened is kept in
//! crate `history`.
//!
//! At the bottom is `build`: the scope of one build, and what makes states of definitions for it.
//! `export` and `provenance` are above it, `frontends` and `attestations` above these, and
//! `pipeline` calls them one after the other. Which frontends there are, `shipwayd` decides.
//!
//! Nothing here speaks a wire: requests come as plain types from `shipwayd`.

mod attestations;
mod build;
mod engine;
mod export;
mod failures;
mod finalize;
mod frontends;
mod image_frontends;
mod parts;
mod permit;
mod pipeline;
mod provenance;
mod request;

pub use build::EngineRef;
pub use engine::{Engine, Progress};
pub use export::caches::IMPORT_DEADLINE;
pub use failures::FailureLimits;
pub use image_frontends::ImageFrontends;
pub use parts::EngineParts;
pub use request::{BuildPolicy, BuildRequest, BuildResponse, ExporterRequest};
