//! The port that frontends implement, and the table of those that are part of the daemon.

use crate::{Bridge, FrontendOptions, FrontendResult};
use async_trait::async_trait;
use shipway_fault::{Fault, Result};
use shipway_llb::State;
use shipway_oci::{ImageConfig, ImageName};
use std::sync::Arc;

/// Turns options into a result.
#[async_trait]
pub trait Frontend: Send + Sync {
    /// Runs for one build. `bridge.options()` holds the options.
    async fn run(&self, bridge: Arc<dyn Bridge>) -> Result<FrontendResult>;

    /// Whether it speaks the language of the frontend in `image`, which then need not run.
    fn serves(&self, image: &ImageName) -> bool {
        let _ = image;
        false
    }
}

/// The files of a named context.
#[derive(Clone, Debug)]
pub struct ContextFiles {
    /// The files.
    pub state: State,
    /// The config of the image that they are, if they are one.
    pub config: Option<ImageConfig>,
}

/// The named contexts of a build (`--build-context`), which may stand in for a frontend's image.
#[async_trait]
pub trait NamedContexts: Send + Sync {
    /// What `options` have in the place of `name`, such as `docker-image://example.com/frontend`.
    fn find(&self, options: &FrontendOptions, name: &str) -> Result<Option<String>>;

    /// The context `name` among the options of `bridge`; `NotFound` if it is not there.
    async fn load(&self, bridge: Arc<dyn Bridge>, name: &str) -> Result<ContextFiles>;
}

/// A frontend of the table.
struct Row {
    name: &'static str,
    frontend: Arc<dyn Frontend>,
    enabled: bool,
}

/// The frontends that are part of the daemon, by name.
#[derive(Default)]
pub struct Frontends(Vec<Row>);

impl Frontends {
    /// Adds a frontend. One that is not `enabled` keeps its name and the images that it serves, and
    /// builds that ask for it fail.
    #[must_use]
    pub fn with(
        mut self,
        name: &'static str,
        frontend: impl Frontend + 'static,
        enabled: bool,
    ) -> Self {
        self.0.push(Row { name, frontend: Arc::new(frontend), enabled });
        self
    }

    fn get(&self, name: &str) -> Option<&Row> {
        self.0.iter().find(|row| row.name == name)
    }

    /// The name of the frontend that stands for the image or frontend `source`.
    pub fn serving(&self, source: &str) -> Option<&'static str> {
        let image: Option<ImageName> = source.parse().ok();
        let serves = |row: &&Row| image.as_ref().is_some_and(|image| row.frontend.serves(image));
        self.get(source).or_else(|| self.0.iter().find(serves)).map(|row| row.name)
    }

    /// Whether there is a frontend `name`, enabled or not.
    pub fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    /// The frontend `name`; `NotFound` if there is none or it is not enabled, which the message
    /// says of what the build `asked` for.
    pub fn find(&self, name: &str, asked: &str) -> Result<Arc<dyn Frontend>> {
        let row = self.get(name).filter(|row| row.enabled);
        row.map(|row| row.frontend.clone())
            .ok_or_else(|| Fault::not_found(format!("invalid frontend: {asked}")))
    }
}
