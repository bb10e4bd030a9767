//! What every vertex of a graph to be has besides what it does.

use crate::{LinuxResources, OpMetadata, ProgressGroup, definition::ExportCache};
use shipway_fault::{SourceFile, Span};
use shipway_oci::Platform;
use std::sync::Arc;

/// What an operation says about itself besides what it does.
#[derive(Clone, Debug, Default)]
pub struct VertexOptions {
    /// Platform; the state's, then the marshalled definition's, when not given.
    pub platform: Option<Platform>,
    /// Worker filters.
    pub constraints: Vec<String>,
    /// Metadata.
    pub metadata: OpMetadata,
    /// Where it comes from.
    pub locations: Vec<SourceLocation>,
}

/// Places in a text.
#[derive(Clone, Debug)]
pub struct SourceLocation {
    /// The text.
    pub file: Arc<SourceFile>,
    /// Where.
    pub spans: Vec<Span>,
}

impl VertexOptions {
    /// Options with a name for progress (`llb.customname`).
    pub fn named(name: impl Into<String>) -> Self {
        Self::default().name(name)
    }

    /// Sets the name for progress.
    #[must_use]
    pub fn name(self, name: impl Into<String>) -> Self {
        self.describe("llb.customname", name)
    }

    /// Adds to the description.
    #[must_use]
    pub fn describe(mut self, key: &str, value: impl Into<String>) -> Self {
        self.metadata.description.insert(key.into(), value.into());
        self
    }

    /// Sets the platform.
    #[must_use]
    pub fn platform(mut self, platform: Platform) -> Self {
        self.platform = Some(platform);
        self
    }

    /// Says where it comes from.
    #[must_use]
    pub fn at(mut self, file: &Arc<SourceFile>, spans: Vec<Span>) -> Self {
        self.locations.push(SourceLocation { file: file.clone(), spans });
        self
    }

    /// Runs it even if its result is known.
    #[must_use]
    pub fn ignore_cache(mut self) -> Self {
        self.metadata.ignore_cache = true;
        self
    }

    /// Puts it into a progress group.
    #[must_use]
    pub fn group(mut self, id: impl Into<String>, name: impl Into<String>, weak: bool) -> Self {
        self.metadata.progress_group =
            Some(ProgressGroup { id: id.into(), name: name.into(), weak });
        self
    }

    /// Limits its resources.
    #[must_use]
    pub fn resources(mut self, resources: LinuxResources) -> Self {
        self.metadata.resources = Some(resources);
        self
    }

    /// Says whether its result goes into exported caches.
    #[must_use]
    pub fn export_cache(mut self, export: ExportCache) -> Self {
        self.metadata.export_cache = Some(export);
        self
    }

    /// Names a capability that the operation needs.
    #[must_use]
    pub fn cap(mut self, name: &str) -> Self {
        self.metadata.caps.insert(name.into());
        self
    }
}
