//! The Dockerfile frontend: `dockerfile.v0`, in-house.
//!
//! [`DockerfileFrontend::run`] reads options, Dockerfile and ignore file through the [`Bridge`]
//! (`build_context`), converts the Dockerfile once per platform (`convert`) and answers with states
//! and image configs. A conversion is a `plan` of stages, each of which goes through the types of
//! `stage`: their bases are resolved together (`base`), then the instructions of those that the
//! target needs are turned into vertices (`instruct`, `run`, `copy`, `expose`). Names, metadata,
//! history and digests are those of BuildKit's frontend, because clients and caches compare them.
//! Nothing here touches files, processes or the network: whatever is needed from outside is a
//! question to the bridge.
//!
//! Places are lines, as the reference's are. With the option `source-columns`, which `shipway`
//! gives, warnings and errors also say the columns and the advice, and a check says all mistakes;
//! the graph's source map never changes.
//!
//! `base64` reads image configs inside `input-metadata:` options; `futures` asks for several images
//! at once.

mod apart;
mod args;
mod base;
mod build;
mod build_context;
mod convert;
mod copy;
mod epoch;
mod error;
mod explain;
mod expose;
mod instruct;
mod named;
mod options;
mod outline;
mod plan;
mod platform;
mod reading;
mod remote;
mod run;
mod stage;
mod subrequest;
mod text;

pub use named::DockerfileContexts;

use async_trait::async_trait;
use shipway_dockerfile::Work;
use shipway_fault::Result;
use shipway_frontend::{Bridge, Frontend, FrontendResult};
use shipway_oci::ImageName;
use std::sync::Arc;

/// Whether `image` is one of the official Dockerfile frontend.
fn is_official(image: &ImageName) -> bool {
    image.registry() == "docker.io"
        && ["docker/dockerfile", "docker/dockerfile-upstream"].contains(&image.repository())
}

/// Builds from Dockerfiles (`dockerfile.v0`).
#[derive(Clone, Copy, Debug, Default)]
pub struct DockerfileFrontend;

#[async_trait]
impl Frontend for DockerfileFrontend {
    fn serves(&self, image: &ImageName) -> bool {
        is_official(image)
    }

    async fn run(&self, bridge: Arc<dyn Bridge>) -> Result<FrontendResult> {
        let work = Work::default();
        apart::run(work.clone(), build::run(bridge, work)).await
    }
}
