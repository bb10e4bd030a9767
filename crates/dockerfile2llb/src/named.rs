//! Named contexts: `context:<name>` options that replace stages, images and sources (rows `dfc.*`).

use crate::{
    build_context::{BuildContext, DOCKERIGNORE, ResolvedName, parse_ignore},
    error::{ConvertError, Result},
    text,
};
use async_trait::async_trait;
use base64::Engine as _;
use shipway_fault::Fault;
use shipway_frontend::{Bridge, ContextFiles, FrontendOptions, NamedContexts};
use shipway_gocompat::quote;
use shipway_llb::{Deferred, GitRef, ImageFacts, State, VertexOptions, attr};
use shipway_oci::{ImageConfig, ImageName, Platform};
use std::{collections::BTreeMap, sync::Arc};

/// What a build uses under a name.
#[derive(Clone, Debug)]
pub struct NamedContext {
    input: String,
    name: String,
    /// The name under which the option was found.
    key: String,
    shared_key: String,
    platform: Option<Platform>,
}

/// A loaded context.
#[derive(Debug)]
pub struct Loaded {
    pub state: State,
    pub image: Option<ImageConfig>,
    /// A directory of the client; which parts of it are needed is known only after conversion.
    pub pending: Option<PendingLocal>,
}

/// A local source that waits for the paths that are used of it.
#[derive(Debug)]
pub struct PendingLocal {
    deferred: Deferred,
    local: String,
    key: String,
    session: String,
    shared_key: String,
    excludes: Vec<String>,
}

impl PendingLocal {
    /// Decides it: `follow` are the paths used; none means all.
    pub fn decide(self, follow: &[String]) {
        let attrs = BTreeMap::from([
            (attr::LOCAL_SESSION.to_owned(), self.session),
            (
                attr::LOCAL_SHARED_KEY_HINT.to_owned(),
                format!("context:{}-{}", self.key, self.shared_key),
            ),
            (attr::LOCAL_EXCLUDE_PATTERNS.to_owned(), text::json_list(&self.excludes)),
            (attr::LOCAL_FOLLOW_PATHS.to_owned(), text::json_list(follow)),
        ]);
        let options = VertexOptions::named(format!("[context {}] load from client", self.key));
        self.deferred.decide(State::local(&self.local, attrs, options));
    }
}

impl Loaded {
    fn of(state: State) -> Self {
        Self { state, image: None, pending: None }
    }
}

/// The environment, directory and platform of an image, put on a state.
fn with_config(mut state: State, image: &ImageConfig) -> State {
    for variable in &image.config.env {
        let (name, value) = variable.split_once('=').unwrap_or((variable, ""));
        if !name.is_empty() {
            state = state.add_env(name, value);
        }
    }
    state = state.with_dir(&image.config.working_dir);
    if image.architecture.is_empty() || image.os.is_empty() {
        state
    } else {
        state.with_platform(image.platform())
    }
}

pub fn parse_config(image: &ImageFacts) -> Result<ImageConfig> {
    serde_json::from_slice(&image.config).map_err(|e| {
        ConvertError::new(format!("failed to parse image config: {}: {e}", image.name))
    })
}

impl NamedContext {
    /// The context for `name`, if the build has one; with a platform's own option first (rows
    /// `dfc.override`, `dfc.platform`).
    pub fn find(
        cx: &BuildContext,
        name: &str,
        platform: Option<&Platform>,
    ) -> Result<Option<Self>> {
        Self::among(&cx.raw, name, platform)
    }

    /// The same among `options`.
    pub fn among(
        options: &FrontendOptions,
        name: &str,
        platform: Option<&Platform>,
    ) -> Result<Option<Self>> {
        if name.eq_ignore_ascii_case("scratch") || name.eq_ignore_ascii_case("context") {
            return Ok(None);
        }
        if !options.keys().any(|k| k.starts_with("context:")) {
            return Ok(None);
        }
        let parsed: ImageName = name
            .parse()
            .map_err(|e| ConvertError::new(format!("invalid context name {name}: {e}")))?;
        let familiar = parsed.familiar();
        let name = familiar.strip_suffix(":latest").unwrap_or(&familiar);
        let host = Platform::host();
        let with_platform = format!("{name}::{}", crate::platform::full(platform.unwrap_or(&host)));
        Ok([with_platform, name.to_owned()].into_iter().find_map(|key| {
            Some(Self {
                input: options.get(&format!("context:{key}"))?.clone(),
                name: name.to_owned(),
                shared_key: options
                    .get(&format!("sharedkey:localdir:{key}"))
                    .cloned()
                    .unwrap_or_default(),
                key,
                platform: platform.cloned(),
            })
        }))
    }

    /// Loads it (row `dfc.types`).
    pub async fn load(&self, cx: &BuildContext) -> Result<Loaded> {
        let Some((kind, rest)) = self.input.split_once(':') else {
            return Err(ConvertError::new(format!(
                "invalid context specifier {} for {}",
                self.input, self.key
            )));
        };
        let rest = rest.strip_prefix("//").unwrap_or(rest);
        match kind {
            "docker-image" => self.image(cx, rest).await,
            "oci-layout" => self.oci_layout(cx, rest).await,
            "http" | "https" => match GitRef::parse(&self.input)? {
                Some(git) => Ok(Loaded::of(git.state(crate::build_context::internal(&format!(
                    "load git source {}",
                    self.input
                ))))),
                None => {
                    let attrs =
                        BTreeMap::from([(attr::HTTP_FILENAME.to_owned(), "context".to_owned())]);
                    let options =
                        VertexOptions::named(format!("[context {}] {}", self.key, self.input));
                    Ok(Loaded::of(State::http(&self.input, attrs, options)))
                }
            },
            kind if kind == "git" || kind.starts_with("git@") => {
                match GitRef::parse(&self.input)? {
                    Some(git) => Ok(Loaded::of(git.state(crate::build_context::internal(
                        &format!("load git source {}", self.input),
                    )))),
                    None => Err(ConvertError::new(format!("invalid git context {}", self.input))),
                }
            }
            "local" => self.local(cx, rest).await,
            "input" => self.frontend_input(cx, rest).await,
            kind => Err(ConvertError::new(format!(
                "unsupported context source {kind} for {}",
                self.key
            ))),
        }
    }

    fn options(&self, what: &str) -> VertexOptions {
        let options = VertexOptions::named(format!("[context {}] {what}", self.key));
        match &self.platform {
            Some(platform) => options.platform(platform.clone()),
            None => options,
        }
    }

    fn asked_platform(&self, cx: &BuildContext) -> Platform {
        self.platform.clone().unwrap_or_else(|| cx.build_platform())
    }

    async fn image(&self, cx: &BuildContext, reference: &str) -> Result<Loaded> {
        if reference == "scratch" {
            return Ok(Loaded::of(State::scratch()));
        }
        let name: ImageName = reference.parse().map_err(|e| ConvertError::new(format!("{e}")))?;
        let log = format!("[context {}] load metadata for {reference}", self.key);
        let found = cx
            .image_or_other(
                format!("docker-image://{name}"),
                BTreeMap::new(),
                &self.asked_platform(cx),
                log,
            )
            .await?;
        let resolved = match found {
            ResolvedName::Image(image) => image,
            ResolvedName::Other(identifier) => {
                let input = identifier.replacen("://", ":", 1);
                return Box::pin(Self { input, ..self.clone() }.load(cx)).await;
            }
        };
        let mut image = parse_config(&resolved)?;
        image.created = None;
        let pinned: ImageName = resolved.name.parse().map_err(|e| {
            ConvertError::new(format!("failed to parse ref {}: {e}", quote(&resolved.name)))
        })?;
        let state = State::image(&pinned.to_string(), "", BTreeMap::new(), self.options(reference));
        Ok(Loaded { state: with_config(state, &image), image: Some(image), pending: None })
    }

    async fn oci_layout(&self, cx: &BuildContext, reference: &str) -> Result<Loaded> {
        let Some((name, digest)) = reference.split_once('@') else {
            return Err(ConvertError::new(format!(
                "oci-layout reference {} has no digest",
                quote(reference)
            )));
        };
        let store = match name.rsplit_once(':') {
            Some((store, tag)) if !tag.contains('/') => store,
            _ => name,
        };
        let dummy: ImageName = format!("{}@{digest}", self.name).parse().map_err(|e| {
            ConvertError::new(format!(
                "could not parse oci-layout reference {}: {e}",
                quote(reference)
            ))
        })?;
        let attrs = BTreeMap::from([
            (attr::OCI_SESSION.to_owned(), cx.bridge.session().to_owned()),
            (attr::OCI_STORE.to_owned(), store.to_owned()),
        ]);
        let log = format!("[context {}] load metadata for {dummy}", self.key);
        let resolved = cx
            .image(format!("oci-layout://{dummy}"), attrs.clone(), &self.asked_platform(cx), log)
            .await?;
        let image = parse_config(&resolved)?;
        let state =
            State::oci_layout(&dummy.to_string(), attrs, self.options("OCI load from client"));
        Ok(Loaded { state: with_config(state, &image), image: Some(image), pending: None })
    }

    async fn local(&self, cx: &BuildContext, local: &str) -> Result<Loaded> {
        let options = VertexOptions::named(format!("[context {}] load {DOCKERIGNORE}", self.key));
        let data =
            cx.load_ignore(local, &format!("context:{}-{DOCKERIGNORE}", self.key), options).await?;
        let deferred = Deferred::default();
        let pending = PendingLocal {
            deferred: deferred.clone(),
            local: local.to_owned(),
            key: self.key.clone(),
            session: cx.session(local).to_owned(),
            shared_key: self.shared_key.clone(),
            excludes: parse_ignore(&data, DOCKERIGNORE)?.patterns(),
        };
        Ok(Loaded { state: deferred.state(), image: None, pending: Some(pending) })
    }

    async fn frontend_input(&self, cx: &BuildContext, name: &str) -> Result<Loaded> {
        let inputs = cx.bridge.inputs().await?;
        let Some(definition) = inputs.get(name) else {
            return Err(ConvertError::new(format!("invalid input {name} for {}", self.key)));
        };
        let state = State::from_definition(definition)?;
        let Some(metadata) = cx.raw.get(&format!("input-metadata:{name}")) else {
            return Ok(Loaded::of(state));
        };
        let config = input_config(metadata)
            .map_err(|e| e.context(format!("failed to parse input metadata {metadata}")))?;
        match config {
            None => Ok(Loaded::of(state)),
            Some(image) => {
                Ok(Loaded { state: with_config(state, &image), image: Some(image), pending: None })
            }
        }
    }
}

/// Named contexts of a build as the Dockerfile frontend reads them, for other frontends.
#[derive(Clone, Copy, Debug, Default)]
pub struct DockerfileContexts;

#[async_trait]
impl NamedContexts for DockerfileContexts {
    fn find(&self, options: &FrontendOptions, name: &str) -> Result<Option<String>, Fault> {
        let found = NamedContext::among(options, name, None).map_err(|f| f.fault)?;
        Ok(found.map(|context| context.input))
    }

    async fn load(&self, bridge: Arc<dyn Bridge>, name: &str) -> Result<ContextFiles, Fault> {
        let cx = BuildContext::without_file(bridge).map_err(|f| f.fault)?;
        let context = NamedContext::among(&cx.raw, name, None).map_err(|f| f.fault)?;
        let context =
            context.ok_or_else(|| Fault::not_found(format!("no named context {name}")))?;
        let loaded = context.load(&cx).await.map_err(|f| f.fault)?;
        if let Some(pending) = loaded.pending {
            pending.decide(&[]);
        }
        Ok(ContextFiles { state: loaded.state, config: loaded.image })
    }
}

/// The image config in an `input-metadata:` option: JSON whose values are base64, as Go encodes
/// bytes (row `dfo.inputmeta`).
fn input_config(metadata: &str) -> Result<Option<ImageConfig>> {
    let map: BTreeMap<String, Option<String>> =
        serde_json::from_str(metadata).map_err(|e| ConvertError::new(e.to_string()))?;
    let Some(Some(encoded)) = map.get("containerimage.config") else { return Ok(None) };
    let bytes = base64::engine::general_purpose::STANDARD
        .decode(encoded)
        .map_err(|e| ConvertError::new(e.to_string()))?;
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|e| ConvertError::new(format!("failed to parse image config: {e}")))
}
