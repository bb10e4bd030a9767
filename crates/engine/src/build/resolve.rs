//! Metadata of sources, asked for by frontends, policies and the engine itself.

use super::scope::BuildScope;
use shipway_fault::Result;
use shipway_frontend::SourceMeta;
use shipway_llb::{ResolveOptions, SourceOp};
use shipway_oci::{Digest, Platform};
use shipway_sources::{SourceContext, SourceSpec};

/// What is asked of a source besides its name.
#[derive(Default)]
pub(crate) struct SourceQuery {
    pub(crate) platform: Option<Platform>,
    pub(crate) log_name: String,
    pub(crate) options: ResolveOptions,
}

impl BuildScope {
    /// Metadata of a source that may be used.
    pub(crate) async fn resolve(&self, source: SourceOp, query: SourceQuery) -> Result<SourceMeta> {
        let platform = query.platform.unwrap_or_else(|| self.parts.native().clone());
        let name = if query.log_name.is_empty() {
            format!("resolve {}", source.identifier)
        } else {
            query.log_name
        };
        let reporter = self.journal.reporter(Digest::of(format!("{}\n{name}", self.id)), name);
        reporter.started();
        let (sessions, memo) = (self.data.sessions.clone(), self.data.memo.clone());
        let cx = SourceContext::new(sessions, reporter.clone(), memo);
        let spec = SourceSpec {
            identifier: source.identifier.clone(),
            attrs: source.attrs.clone(),
            platform,
        };
        let resolved = self.parts.services.sources.resolve(&spec, &query.options, &cx).await;
        reporter.completed(resolved.as_ref().err().map(ToString::to_string));
        Ok(SourceMeta { source, facts: resolved? })
    }
}
