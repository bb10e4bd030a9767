//! The engine's side of the bridge: one build's view of everything.

use crate::{
    caches,
    container::EngineContainer,
    engine::EngineInner,
    heavy::heavy,
    image_frontend::{self, ImageFrontends},
    policy::BuildPolicy,
    provenance,
    request::BuildRequest,
    state::{EngineRef, LeftRef},
    trail::{Asked, Produced, Trail},
    usage::Sampler,
    vertices,
};
use async_trait::async_trait;
use shipway_attest::ImageSource;
use shipway_dockerfile2llb::FrontendOverride;
use shipway_fault::{Context as _, Detail, Fault, Result};
use shipway_frontend::{
    Bridge, BuildRef, Container, ContainerRequest, Explain, Frontend as _, FrontendResult, Options,
    SolveRequest, SourceMeta, SourceRequest, Warning, Worker,
};
use shipway_llb::{
    Caps, Definition, Graph, NetMode, Op, ResolveOptions, SourceOp, SourcePolicy, Vertex,
};
use shipway_oci::{Digest, Platform};
use shipway_ops::{JobData, LlbOp, SolveNested};
use shipway_progress::{Event, Journal, SourceSpan, WarningUpdate};
use shipway_refs::ImmutableRef;
use shipway_remotecache::{CacheRequest, Import};
use shipway_solver::Job;
use shipway_sources::{SourceContext, SourceSpec};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, OnceLock, PoisonError, Weak},
    time::SystemTime,
};

/// What all bridges and states of one build share. The job ends with it.
pub(crate) struct BuildScope {
    itself: Weak<Self>,
    pub(crate) engine: Arc<EngineInner>,
    pub(crate) id: String,
    pub(crate) session: String,
    /// What it brings to its vertices.
    pub(crate) data: JobData,
    pub(crate) job: Job<LlbOp>,
    pub(crate) journal: Journal,
    /// What it may use.
    pub(crate) policy: BuildPolicy,
    /// What its provenance is called.
    pub(crate) invocation: String,
    /// When it began.
    pub(crate) started: SystemTime,
    /// Whether its steps see the network through a proxy only.
    pub(crate) proxied: bool,
    /// Which version of the exporters' defaults it wants.
    pub(crate) compatibility: i64,
    finished: OnceLock<SystemTime>,
    imports: Mutex<Vec<(CacheRequest, Arc<Import>)>>,
    explainers: Mutex<Vec<Arc<dyn Explain>>>,
    produced: Mutex<Vec<Produced>>,
    usage: OnceLock<Sampler>,
}

/// What is asked of a source besides its name.
#[derive(Default)]
pub(crate) struct SourceQuery {
    pub(crate) platform: Option<Platform>,
    pub(crate) log_name: String,
    pub(crate) options: ResolveOptions,
}

impl BuildScope {
    /// Lets the build look into the cache of `request` until it ends, which `import` begins to read
    /// if nobody in this build has asked for it (row `rc.dedupe`).
    pub(crate) fn import(&self, request: &CacheRequest, import: impl FnOnce() -> Arc<Import>) {
        let mut imports = self.imports.lock().unwrap_or_else(PoisonError::into_inner);
        if imports.iter().all(|(asked, _)| asked != request) {
            let import = import();
            self.job.import(import.clone());
            imports.push((request.clone(), import));
        }
    }

    /// What the build imports.
    pub(crate) fn imports(&self) -> Vec<Arc<Import>> {
        self.imports
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .map(|(_, import)| import.clone())
            .collect()
    }

    pub(crate) fn new(
        engine: Arc<EngineInner>,
        request: &BuildRequest,
        data: JobData,
        job: Job<LlbOp>,
        journal: Journal,
    ) -> Arc<Self> {
        let started = SystemTime::now();
        let nested = data.nested.clone();
        let scope = Arc::new_cyclic(|itself| Self {
            itself: itself.clone(),
            proxied: request.proxied || engine.parts.proxied,
            engine,
            id: request.id.clone(),
            session: request.session.clone(),
            policy: request.policy.clone(),
            data,
            job,
            journal,
            invocation: Digest::of(format!("{}\n{started:?}", request.id)).hex()[..25].to_owned(),
            started,
            compatibility: request.compatibility,
            finished: OnceLock::new(),
            imports: Mutex::default(),
            explainers: Mutex::default(),
            produced: Mutex::default(),
            usage: OnceLock::new(),
        });
        nested.set(scope.itself.clone());
        scope
    }

    /// When it was done with everything but writing.
    pub(crate) fn finished(&self) -> SystemTime {
        *self.finished.get_or_init(SystemTime::now)
    }

    /// Looks at the machine from time to time from now on.
    pub(crate) fn watch_usage(&self) {
        self.usage.get_or_init(Sampler::start);
    }

    /// What was seen, if it was asked for.
    pub(crate) fn usage(&self) -> Vec<serde_json::Value> {
        self.usage.get().map(Sampler::samples).unwrap_or_default()
    }

    /// Keeps a producer known until the build ends.
    pub(crate) fn hold_producer(&self, produced: Produced) {
        self.produced.lock().unwrap_or_else(PoisonError::into_inner).push(produced);
    }

    /// Remembers who can say more about failures of this build.
    fn learn(&self, result: &mut FrontendResult) {
        if let Some(explain) = result.explain.take() {
            self.explainers.lock().unwrap_or_else(PoisonError::into_inner).push(explain);
        }
    }

    /// The fault with the hints that the build's frontends have for it.
    pub(crate) async fn explain(self: &Arc<Self>, mut fault: Fault) -> Fault {
        let explainers = self.explainers.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let trail = Trail::root(Asked::default());
        let bridge = EngineBridge {
            scope: self.clone(),
            options: Options::default(),
            inputs: BTreeMap::new(),
            depth: 0,
            trail,
        };
        for explain in explainers {
            fault = explain.explain(&bridge, fault).await;
        }
        fault
    }

    /// The lazy state of a definition, asked for by `trail`.
    pub(crate) async fn state(
        self: &Arc<Self>,
        definition: Definition,
        policies: &[SourcePolicy],
        trail: &Arc<Trail>,
    ) -> Result<Arc<EngineRef>> {
        let decode = |definition: Definition| {
            let platform = self.engine.parts.platforms[0].clone();
            heavy(move || {
                Graph::decode(&definition, &Caps::llb(), &platform).map(|graph| (definition, graph))
            })
        };
        let (definition, graph) = decode(definition).await?;
        let (definition, graph) = match self.checked(definition.clone(), &graph, policies).await? {
            Some(changed) => decode(changed).await?,
            None => (definition, graph),
        };
        // Each build is asked, whoever runs the vertex in the end: a shared or cached result needs
        // the permission too.
        for vertex in &graph.vertices {
            self.data.entitlements.check(&vertex.op)?;
        }
        self.data.wishes.note(&graph);
        let graph = self.with_proxy(self.with_devices(graph).await?);
        let made = vertices::of_graph(&graph, &self.engine.parts.services, false);
        let state = Arc::new(EngineRef::new(definition, made, trail, self.clone())?);
        trail.note_state(state.clone());
        Ok(state)
    }
}

impl BuildScope {
    /// The graph with the devices that steps get instead of those they ask for.
    async fn with_devices(&self, mut graph: Graph) -> Result<Graph> {
        let wants =
            |vertex: &Vertex| matches!(&vertex.op, Op::Exec(exec) if !exec.devices.is_empty());
        if !graph.vertices.iter().any(|v| wants(v)) {
            return Ok(graph);
        }
        let there = self.engine.parts.services.devices().await?;
        for vertex in graph.vertices.iter_mut().filter(|v| wants(v)) {
            if let Op::Exec(exec) = &mut Arc::make_mut(vertex).op {
                self.data.entitlements.grant_devices(exec, &there)?;
            }
        }
        Ok(graph)
    }

    /// The graph whose steps see the network through a proxy only, where the build is like that.
    fn with_proxy(&self, mut graph: Graph) -> Graph {
        for vertex in graph.vertices.iter_mut().filter(|_| self.proxied) {
            if let Op::Exec(exec) = &mut Arc::make_mut(vertex).op {
                exec.proxied = exec.network != NetMode::None;
            }
        }
        graph
    }

    /// Metadata of a source that may be used.
    pub(crate) async fn resolve(&self, source: SourceOp, query: SourceQuery) -> Result<SourceMeta> {
        let platform = query.platform.unwrap_or_else(|| self.engine.parts.platforms[0].clone());
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
        let resolved = self.engine.parts.services.sources.resolve(&spec, &query.options, &cx).await;
        reporter.completed(resolved.as_ref().err().map(ToString::to_string));
        Ok(SourceMeta { source, facts: resolved? })
    }
}

#[async_trait]
impl SolveNested for BuildScope {
    async fn solve_nested(&self, of: Digest, definition: Definition) -> Result<ImmutableRef> {
        let parts = &self.engine.parts;
        if definition.ops.is_empty() {
            return parts.services.refs.scratch();
        }
        let scope = self.itself.upgrade().ok_or_else(Fault::cancelled)?;
        // What it takes counts as incomplete in provenance, so nobody asks this trail.
        let state = scope.state(definition, &[], &Trail::root(Asked::default())).await?;
        let _known = self.engine.nested.enter(of, state.vertices())?;
        state.state().await
    }
}

/// The bridge of one frontend of a build: a nested frontend has options and inputs of its own.
pub(crate) struct EngineBridge {
    pub(crate) scope: Arc<BuildScope>,
    pub(crate) options: Options,
    pub(crate) inputs: BTreeMap<String, Definition>,
    /// How many frontends called each other up to here.
    pub(crate) depth: usize,
    /// What was asked through it.
    pub(crate) trail: Arc<Trail>,
}

/// Frontends may call frontends this deep.
const MAX_DEPTH: usize = 16;

impl EngineBridge {
    async fn run_frontend(&self, request: SolveRequest) -> Result<FrontendResult> {
        if self.depth >= MAX_DEPTH {
            return Err(Fault::invalid(format!(
                "frontends called each other more than {MAX_DEPTH} deep"
            )));
        }
        let parts = &self.scope.engine.parts;
        let wanted = Wanted::of(&request, &parts.image_frontends)?;
        let (frontend, image) = match wanted {
            Wanted::Dockerfile => (parts.dockerfile.as_ref(), None),
            Wanted::Image(source) => (None, Some(source)),
            Wanted::Unknown => (None, None),
        };
        if frontend.is_none() && image.is_none() {
            return Err(Fault::not_found(format!("invalid frontend: {}", request.frontend)));
        }
        let detail = Detail::Frontend {
            name: request.frontend.clone(),
            source: request.options.get("source").cloned().unwrap_or_default(),
        };
        let asked = Asked {
            frontend: request.frontend,
            options: request.options.clone(),
            inputs: request.inputs.clone(),
        };
        let trail = self.trail.nested(asked);
        let bridge = EngineBridge {
            scope: self.scope.clone(),
            options: request.options,
            inputs: request.inputs,
            depth: self.depth + 1,
            trail: trail.clone(),
        };
        let result = match (frontend, image) {
            (Some(frontend), _) => frontend.run(Arc::new(bridge)).await,
            (None, image) => {
                Box::pin(image_frontend::run(self, &image.unwrap_or_default(), bridge)).await
            }
        };
        let mut result = result.map_err(|fault| fault.detail(detail))?;
        self.trail.adopt(trail);
        self.scope.learn(&mut result);
        Ok(result)
    }
}

/// What a request for a frontend means.
#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    Dockerfile,
    /// The one in this image.
    Image(String),
    Unknown,
}

impl Wanted {
    fn of(request: &SolveRequest, images: &ImageFrontends) -> Result<Self> {
        let source = match (request.frontend.as_str(), request.options.get("source")) {
            ("dockerfile.v0", _) => return Ok(Self::Dockerfile),
            ("gateway.v0", _) if !images.enabled() => return Ok(Self::Unknown),
            ("gateway.v0", None) => return Err(Fault::invalid("no source specified for gateway")),
            ("gateway.v0", Some(source)) => source,
            _ => return Ok(Self::Unknown),
        };
        images.check(source)?;
        // An image of the official Dockerfile frontend is served by the in-house one, which speaks
        // the same language; but the build may have put another in its place.
        let in_house = source == "dockerfile.v0" || is_dockerfile_image(source);
        Ok(match in_house && FrontendOverride::find(&request.options, source)?.is_none() {
            true => Self::Dockerfile,
            false => Self::Image(source.clone()),
        })
    }
}

/// Whether `source` names an image of docker/dockerfile.
fn is_dockerfile_image(source: &str) -> bool {
    source.parse::<shipway_oci::ImageName>().is_ok_and(|n| {
        n.registry() == "docker.io"
            && ["docker/dockerfile", "docker/dockerfile-upstream"].contains(&n.repository())
    })
}

#[async_trait]
impl Bridge for EngineBridge {
    fn options(&self) -> &Options {
        &self.options
    }

    fn session(&self) -> &str {
        &self.scope.session
    }

    fn platforms(&self) -> Vec<Platform> {
        self.scope.engine.parts.platforms.clone()
    }

    fn worker(&self) -> Worker {
        Worker { platforms: self.platforms(), ..self.scope.engine.parts.worker.clone() }
    }

    async fn solve(&self, request: SolveRequest) -> Result<FrontendResult> {
        if request.definition.is_some() && !request.frontend.is_empty() {
            return Err(Fault::invalid("cannot solve with both Definition and Frontend specified"));
        }
        let imports: Vec<CacheRequest> = request
            .cache_imports
            .iter()
            .map(|c| CacheRequest { kind: c.kind.clone(), attrs: c.attrs.clone() })
            .collect();
        caches::import_all(&self.scope, &imports);
        let evaluate = request.evaluate;
        let result = match request.definition.clone() {
            Some(definition) if definition.ops.is_empty() => FrontendResult::of(None),
            Some(definition) => FrontendResult::of(Some(
                self.scope.state(definition, &request.policies, &self.trail).await?
                    as Arc<dyn BuildRef>,
            )),
            None if request.frontend.is_empty() => FrontendResult::of(None),
            None => self.run_frontend(request).await?,
        };
        if evaluate {
            futures::future::try_join_all(result.states().map(|s| s.evaluate())).await?;
        }
        for state in result.states().filter_map(|s| s.as_any().downcast_ref::<EngineRef>()) {
            if let Some(trail) = state.trail.upgrade() {
                provenance::announce(&self.scope, &trail, state).await?;
            }
        }
        Ok(result)
    }

    async fn resolve_source(&self, request: SourceRequest) -> Result<SourceMeta> {
        let source = SourceOp { identifier: request.identifier, attrs: request.attrs };
        let source = self.scope.check(source, request.platform.as_ref(), &request.policies).await;
        let source = source.context(|| "could not resolve image due to policy")?;
        let asked_for = request.platform.clone();
        let query = SourceQuery {
            platform: request.platform,
            log_name: request.log_name,
            options: request.options,
        };
        let mut meta = self.scope.resolve(source, query).await?;
        if let Some(image) = meta.facts.image.as_mut().filter(|_| request.no_config) {
            image.config.clear();
        }
        if let Some(image) = &meta.facts.image {
            let identifier = &meta.source.identifier;
            let layout = identifier.strip_prefix("oci-layout://");
            let reference =
                layout.or_else(|| identifier.strip_prefix("docker-image://")).unwrap_or(identifier);
            if let Ok(name) = reference.parse() {
                let digest = Some(image.digest);
                self.trail.note_image(ImageSource {
                    name,
                    platform: asked_for,
                    digest,
                    local: layout.is_some(),
                    stored: None,
                });
            }
        }
        Ok(meta)
    }

    async fn inputs(&self) -> Result<BTreeMap<String, Definition>> {
        Ok(self.inputs.clone())
    }

    async fn local_names(&self, local: &str, session: &str, dir: &str) -> Result<Vec<String>> {
        self.scope
            .engine
            .parts
            .services
            .sources
            .local_names(local, session, dir, &self.scope.data.sessions)
            .await
    }

    fn left_by(&self, fault: &Fault) -> Vec<Arc<dyn BuildRef>> {
        LeftRef::of(fault)
    }

    async fn new_container(&self, request: ContainerRequest) -> Result<Arc<dyn Container>> {
        Ok(Arc::new(EngineContainer::new(&self.scope, request).await?))
    }

    async fn warn(&self, warning: Warning) -> Result<()> {
        self.scope.journal.push(Event::Warning(Arc::new(WarningUpdate {
            vertex: warning.vertex.unwrap_or_else(|| Digest::of(&self.scope.id)),
            level: if warning.level == 0 { 1 } else { warning.level },
            short: warning.short,
            detail: warning.detail,
            url: warning.url,
            source: warning.file.map(|file| SourceSpan { file, spans: warning.spans }),
        })));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frontends_are_what_the_configuration_allows_and_the_build_puts_in_their_place() {
        let wanted = |frontend: &str, options: &[(&str, &str)], images: &ImageFrontends| {
            let options = options.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
            Wanted::of(
                &SolveRequest { frontend: frontend.into(), options, ..SolveRequest::default() },
                images,
            )
            .map_err(|f| f.to_string())
        };
        let any = ImageFrontends::new(true, &[]).unwrap();
        let image = |source: &str| Ok(Wanted::Image(source.to_owned()));
        let official = ("source", "docker/dockerfile:1.7");
        assert_eq!(wanted("dockerfile.v0", &[], &any), Ok(Wanted::Dockerfile));
        assert_eq!(wanted("gateway.v0", &[official], &any), Ok(Wanted::Dockerfile));
        assert_eq!(
            wanted("gateway.v0", &[("source", "dockerfile.v0")], &any),
            Ok(Wanted::Dockerfile)
        );
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
        assert_eq!(wanted("other", &[], &any), Ok(Wanted::Unknown));

        let none = ImageFrontends::new(false, &[]).unwrap();
        assert_eq!(wanted("gateway.v0", &[official], &none), Ok(Wanted::Unknown));
        assert_eq!(wanted("dockerfile.v0", &[], &none), Ok(Wanted::Dockerfile));

        let some = ImageFrontends::new(
            true,
            &["example.com/f:1".to_owned(), "docker/dockerfile".to_owned()],
        )
        .unwrap();
        assert_eq!(wanted("gateway.v0", &[official], &some), Ok(Wanted::Dockerfile));
        assert_eq!(
            wanted("gateway.v0", &[("source", "example.com/f:2")], &some),
            image("example.com/f:2")
        );
        let refused = Err("'example.com/g' is not an allowed gateway source".to_owned());
        assert_eq!(wanted("gateway.v0", &[("source", "example.com/g")], &some), refused);
    }
}
