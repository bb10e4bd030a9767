//! Which frontends out of images the daemon runs.

use shipway_fault::{Code, Fault, Result};
use shipway_oci::ImageName;
use std::collections::BTreeSet;

/// Which frontends out of images may run (`frontend."gateway.v0"` of the configuration).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageFrontends {
    enabled: bool,
    /// Repositories; all where there are none.
    allowed: BTreeSet<String>,
}

impl ImageFrontends {
    /// Those of the repositories `allowed`, whose tags do not matter, or of all if it names none.
    pub fn new(enabled: bool, allowed: &[String]) -> Result<Self> {
        let repository = |name: &String| {
            let parsed = name.parse::<ImageName>();
            parsed.map(|n| n.locator()).map_err(|e| {
                Fault::invalid(format!("allowedRepositories: {name:?} names no repository: {e}"))
            })
        };
        Ok(Self { enabled, allowed: allowed.iter().map(repository).collect::<Result<_>>()? })
    }

    pub(crate) fn enabled(&self) -> bool {
        self.enabled
    }

    /// Whether the image `source` may be one.
    pub(crate) fn check(&self, source: &str) -> Result<()> {
        if self.allowed.is_empty() {
            return Ok(());
        }
        let name: ImageName = source.parse().map_err(|e| {
            Fault::invalid(format!("{source:?} cannot name a frontend's image: {e}"))
        })?;
        if self.allowed.contains(&name.locator()) {
            return Ok(());
        }
        Err(Fault::new(Code::PermissionDenied, format!("'{source}' is not an allowed gateway source"))
            .hint("the daemon's configuration says which are: `allowedRepositories` of [frontend.\"gateway.v0\"]"))
    }

    /// Whether what a build puts in the place of a frontend may be one.
    pub(crate) fn check_override(&self, input: &str) -> Result<()> {
        match input.strip_prefix("docker-image://") {
            _ if self.allowed.is_empty() => Ok(()),
            Some(source) => self.check(source),
            None => Err(Fault::new(Code::PermissionDenied, format!("'{input}' is not an allowed gateway source"))
                .hint("the daemon allows frontends of some repositories only: `allowedRepositories` of [frontend.\"gateway.v0\"]")),
        }
    }
}
