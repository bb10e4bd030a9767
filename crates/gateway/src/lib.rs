//! The LLBBridge service: carries the [`Bridge`](shipway_frontend::Bridge) port to clients and
//! frontends over gRPC.
//!
//! Clients do not build through one `Solve`: they send an empty one and then drive the build
//! through this service on the same connection, by build id (row `top.1`). [`Builds`] routes by
//! that id, waiting a little for a build that is about to be registered; [`GatewayBuild`] is the
//! state of one such build: the references it handed out, and what it returned.
//!
//! Containers and their processes (`containers`, `processes`) are the engine's; here they get names
//! and messages. A frontend out of an image is served alone, over its standard input and output, by
//! [`serve`].
//!
//! A build is driven by its owner; where the daemon asks nobody who they are, all clients that
//! reach it may name any build. What a build made is found only by ids that cannot be guessed.
//! `base64` reads metadata as old clients send it.

mod build;
mod containers;
mod convert;
mod processes;
mod service;

pub use build::{Builds, GatewayBuild, WorkerSource, serve};
pub use service::BridgeService;
