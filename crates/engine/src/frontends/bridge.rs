//! The bridge of a build's frontends: what they may ask of the engine.

use super::{container::EngineContainer, image};
use crate::{
    build::{Build, CallLog, Explainer, FrontendCall, SourceQuery},
    export::caches,
    failures::FAILED_STEP,
    image_frontends::ImageFrontends,
    parts::EngineParts,
    provenance,
};
use futures::{FutureExt as _, future::BoxFuture};
use shipway_attest::ImageSource;
use shipway_fault::{Context as _, Detail, Fault, Result};
use shipway_frontend::{
    Bridge, BuildRef, Container, ContainerRequest, Explain, FrontendOptions, FrontendResult,
    Frontends, NamedContexts, SolveRequest, SourceMeta, SourceRequest, Warning, Worker,
};
use shipway_llb::{Definition, SourceOp};
use shipway_oci::{Digest, Platform};
use shipway_progress::{Event, SourceSpan, WarningUpdate};
use shipway_remotecache::CacheRequest;
use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
};

/// The bridge of one frontend of a build: a nested frontend has options and inputs of its own.
pub(crate) struct EngineBridge {
    pub(crate) build: Arc<Build>,
    pub(crate) options: FrontendOptions,
    pub(crate) inputs: BTreeMap<String, Definition>,
    /// How many frontends called each other up to here.
    pub(crate) depth: usize,
    /// What was asked through it.
    pub(crate) log: Arc<CallLog>,
}

/// Frontends may call frontends this deep.
const MAX_DEPTH: usize = 16;

/// The frontend that is an image.
const GATEWAY: &str = "gateway.v0";

impl EngineBridge {
    /// A bridge for the engine's own use, whose calls no provenance has.
    pub(crate) fn unlogged(build: Arc<Build>) -> Self {
        Self {
            build,
            options: FrontendOptions::default(),
            inputs: BTreeMap::new(),
            depth: 0,
            log: CallLog::root(FrontendCall::default()),
        }
    }

    async fn run_frontend(&self, request: SolveRequest) -> Result<FrontendResult> {
        if self.depth >= MAX_DEPTH {
            return Err(Fault::invalid(format!(
                "frontends called each other more than {MAX_DEPTH} deep"
            )));
        }
        let parts = &self.build.scope.parts;
        let wanted = Wanted::of(&request, parts)?;
        let in_house = match &wanted {
            Wanted::InHouse(name) => Some(parts.frontends.find(name, &request.frontend)?),
            Wanted::Image(_) => None,
        };
        let detail = Detail::Frontend {
            name: request.frontend.clone(),
            source: request.options.get("source").cloned().unwrap_or_default(),
        };
        let call = FrontendCall {
            frontend: request.frontend,
            options: request.options.clone(),
            inputs: request.inputs.clone(),
        };
        let log = self.log.nested(call);
        let bridge = Arc::new(EngineBridge {
            build: self.build.clone(),
            options: request.options,
            inputs: request.inputs,
            depth: self.depth + 1,
            log: log.clone(),
        });
        let result = match (in_house, wanted) {
            (Some(frontend), _) => frontend.run(bridge).await,
            (None, Wanted::Image(source) | Wanted::InHouse(source)) => {
                Box::pin(image::run(&self.build, &self.log, &source, bridge)).await
            }
        };
        let mut result = result.map_err(|fault| fault.detail(detail))?;
        self.log.adopt(log);
        if let Some(explain) = result.explain.take() {
            let build = Arc::downgrade(&self.build);
            self.build.scope.add_explainer(Arc::new(FrontendExplainer { build, explain }));
        }
        Ok(result)
    }
}

/// What a request for a frontend means.
#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    /// The one of this name that is part of the daemon.
    InHouse(String),
    /// The one in this image.
    Image(String),
}

impl Wanted {
    fn of(request: &SolveRequest, parts: &EngineParts) -> Result<Self> {
        Self::among(request, &parts.frontends, &*parts.contexts, &parts.image_frontends)
    }

    fn among(
        request: &SolveRequest,
        frontends: &Frontends,
        contexts: &dyn NamedContexts,
        images: &ImageFrontends,
    ) -> Result<Self> {
        let name = &request.frontend;
        if frontends.has(name) {
            return Ok(Self::InHouse(name.clone()));
        }
        if name != GATEWAY || !images.enabled() {
            return Err(Fault::not_found(format!("invalid frontend: {name}")));
        }
        let source = request.options.get("source");
        let source = source.ok_or_else(|| Fault::invalid("no source specified for gateway"))?;
        images.check(source)?;
        // An image is not run whose language a frontend of ours speaks; but the build may have put
        // another in its place.
        let in_house = frontends.serving(source);
        Ok(match in_house {
            Some(name) if contexts.find(&request.options, source)?.is_none() => {
                Self::InHouse(name.to_owned())
            }
            _ => Self::Image(source.clone()),
        })
    }
}

/// Lets a frontend that has returned explain failures, by a bridge for that.
struct FrontendExplainer {
    build: Weak<Build>,
    explain: Arc<dyn Explain>,
}

impl Explainer for FrontendExplainer {
    fn explain(&self, fault: Fault) -> BoxFuture<'_, Fault> {
        async move {
            match self.build.upgrade() {
                Some(build) => self.explain.explain(&EngineBridge::unlogged(build), fault).await,
                None => fault,
            }
        }
        .boxed()
    }
}

impl Bridge for EngineBridge {
    fn options(&self) -> &FrontendOptions {
        &self.options
    }

    fn session(&self) -> &str {
        self.build.scope.session.as_str()
    }

    fn platforms(&self) -> Vec<Platform> {
        self.build.scope.parts.platforms.clone()
    }

    fn worker(&self) -> Worker {
        Worker { platforms: self.platforms(), ..self.build.scope.parts.worker.clone() }
    }

    fn solve(&self, request: SolveRequest) -> BoxFuture<'_, Result<FrontendResult>> {
        async move {
            if request.definition.is_some() && !request.frontend.is_empty() {
                return Err(Fault::invalid(
                    "cannot solve with both Definition and Frontend specified",
                ));
            }
            let imports: Vec<CacheRequest> = request
                .cache_imports
                .iter()
                .map(|c| CacheRequest { kind: c.kind.clone(), attrs: c.attrs.clone() })
                .collect();
            caches::import_all(&self.build.scope, &imports)?;
            let evaluate = request.evaluate;
            let result = match request.definition.clone() {
                Some(definition) if definition.ops.is_empty() => FrontendResult::of(None),
                Some(definition) => FrontendResult::of(Some(
                    self.build.state(definition, &request.policies, &self.log).await?
                        as Arc<dyn BuildRef>,
                )),
                None if request.frontend.is_empty() => FrontendResult::of(None),
                None if request.frontend == FAILED_STEP => {
                    let scope = &self.build.scope;
                    let failures = &scope.shared.failures;
                    return Err(failures.open(&request.options, &scope.data.failed).await);
                }
                None => self.run_frontend(request).await?,
            };
            if evaluate {
                futures::future::try_join_all(result.states().map(|s| s.evaluate())).await?;
            }
            for state in result.states().filter_map(|s| self.build.states.find(s.as_ref())) {
                if let Some(log) = state.log.upgrade() {
                    provenance::add_producer(&self.build.scope, &log, &state.lazy).await?;
                }
            }
            Ok(result)
        }
        .boxed()
    }

    fn resolve_source(&self, request: SourceRequest) -> BoxFuture<'_, Result<SourceMeta>> {
        async move {
            let source = SourceOp { identifier: request.identifier, attrs: request.attrs };
            let scope = &self.build.scope;
            let source = scope.check(source, request.platform.as_ref(), &request.policies).await;
            let source = source.context(|| "could not resolve image due to policy")?;
            let platform = request.platform.clone();
            let query = SourceQuery {
                platform: request.platform,
                log_name: request.log_name,
                options: request.options,
            };
            let mut meta = scope.resolve(source, query).await?;
            if let Some(image) = meta.facts.image.as_mut().filter(|_| request.no_config) {
                image.config.clear();
            }
            if let Some(image) = &meta.facts.image {
                let identifier = &meta.source.identifier;
                let layout = identifier.strip_prefix("oci-layout://");
                let reference = layout
                    .or_else(|| identifier.strip_prefix("docker-image://"))
                    .unwrap_or(identifier);
                if let Ok(name) = reference.parse() {
                    let digest = Some(image.digest);
                    self.log.note_image(ImageSource {
                        name,
                        platform,
                        digest,
                        local: layout.is_some(),
                        stored: None,
                    });
                }
            }
            Ok(meta)
        }
        .boxed()
    }

    fn inputs(&self) -> BoxFuture<'_, Result<BTreeMap<String, Definition>>> {
        async move { Ok(self.inputs.clone()) }.boxed()
    }

    fn local_names<'a>(
        &'a self,
        local: &'a str,
        session: &'a str,
        dir: &'a str,
    ) -> BoxFuture<'a, Result<Vec<String>>> {
        async move {
            let scope = &self.build.scope;
            let sources = &scope.parts.services.sources;
            sources.local_names(local, &session.into(), dir, &scope.data.sessions).await
        }
        .boxed()
    }

    fn failed_states(&self, fault: &Fault) -> Vec<Arc<dyn BuildRef>> {
        self.build.states.failed(fault)
    }

    fn new_container(
        &self,
        request: ContainerRequest,
    ) -> BoxFuture<'_, Result<Arc<dyn Container>>> {
        async move {
            let container = EngineContainer::new(&self.build, request).await?;
            Ok(Arc::new(container) as Arc<dyn Container>)
        }
        .boxed()
    }

    fn warn(&self, warning: Warning) -> BoxFuture<'_, Result<()>> {
        async move {
            let scope = &self.build.scope;
            scope.journal.push(Event::Warning(Arc::new(WarningUpdate {
                vertex: warning.vertex.unwrap_or_else(|| Digest::of(&scope.id)),
                level: if warning.level == 0 { 1 } else { warning.level },
                short: warning.short,
                detail: warning.detail,
                url: warning.url,
                source: warning.file.map(|file| SourceSpan { file, spans: warning.spans }),
            })));
            Ok(())
        }
        .boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use async_trait::async_trait;
    use shipway_frontend::{ContextFiles, Frontend};
    use shipway_oci::ImageName;

    /// A frontend that serves one image, and named contexts that are never loaded.
    struct Fake;

    #[async_trait]
    impl Frontend for Fake {
        async fn run(&self, _: Arc<dyn Bridge>) -> Result<FrontendResult> {
            Ok(FrontendResult::of(None))
        }
        fn serves(&self, image: &ImageName) -> bool {
            image.repository() == "docker/dockerfile"
        }
    }

    #[async_trait]
    impl NamedContexts for Fake {
        fn find(&self, options: &FrontendOptions, name: &str) -> Result<Option<String>> {
            Ok(options.get(&format!("context:{name}")).cloned())
        }
        async fn load(&self, _: Arc<dyn Bridge>, _: &str) -> Result<ContextFiles> {
            Err(Fault::unimplemented("named contexts"))
        }
    }

    #[test]
    fn a_frontend_that_is_turned_off_is_not_found() {
        let frontends = Frontends::default().with("dockerfile.v0", Fake, false);
        // Nor is the image run that it stands for.
        assert_eq!(frontends.serving("docker/dockerfile:1"), Some("dockerfile.v0"));
        let found = frontends.find("dockerfile.v0", "gateway.v0");
        assert_eq!(found.err().unwrap().to_string(), "invalid frontend: gateway.v0");
    }

    #[test]
    fn frontends_are_what_the_configuration_allows_and_the_build_puts_in_their_place() {
        let frontends = Frontends::default().with("dockerfile.v0", Fake, true);
        let wanted = |frontend: &str, options: &[(&str, &str)], images: &ImageFrontends| {
            let options = options.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
            let request =
                SolveRequest { frontend: frontend.into(), options, ..SolveRequest::default() };
            Wanted::among(&request, &frontends, &Fake, images).map_err(|f| f.to_string())
        };
        let in_house = || Ok(Wanted::InHouse("dockerfile.v0".to_owned()));
        let unknown = |name: &str| Err(format!("invalid frontend: {name}"));
        let any = ImageFrontends::new(true, &[]).unwrap();
        let image = |source: &str| Ok(Wanted::Image(source.to_owned()));
        let official = ("source", "docker/dockerfile:1.7");
        assert_eq!(wanted("dockerfile.v0", &[], &any), in_house());
        assert_eq!(wanted("gateway.v0", &[official], &any), in_house());
        assert_eq!(wanted("gateway.v0", &[("source", "dockerfile.v0")], &any), in_house());
        assert_eq!(
            wanted("gateway.v0", &[("source", "example.com/f")], &any),
            image("example.com/f")
        );
        let other = ("context:docker/dockerfile:1.7", "docker-image://example.com/f");
        assert_eq!(wanted("gateway.v0", &[official, other], &any), image("docker/dockerfile:1.7"));
        let built_in = ("context:dockerfile.v0", "docker-image://example.com/f");
        assert_eq!(
            wanted("gateway.v0", &[("source", "dockerfile.v0"), built_in], &any),
            image("dockerfile.v0")
        );
        assert_eq!(
            wanted("gateway.v0", &[], &any),
            Err("no source specified for gateway".to_owned())
        );
        assert_eq!(wanted("other", &[], &any), unknown("other"));

        let none = ImageFrontends::new(false, &[]).unwrap();
        assert_eq!(wanted("gateway.v0", &[official], &none), unknown("gateway.v0"));
        assert_eq!(wanted("dockerfile.v0", &[], &none), in_house());

        let some = ImageFrontends::new(
            true,
            &["example.com/f:1".to_owned(), "docker/dockerfile".to_owned()],
        )
        .unwrap();
        assert_eq!(wanted("gateway.v0", &[official], &some), in_house());
        assert_eq!(
            wanted("gateway.v0", &[("source", "example.com/f:2")], &some),
            image("example.com/f:2")
        );
        let refused = Err("'example.com/g' is not an allowed gateway source".to_owned());
        assert_eq!(wanted("gateway.v0", &[("source", "example.com/g")], &some), refused);
    }
}
