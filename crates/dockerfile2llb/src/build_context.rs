//! What a build reads from outside before and while it converts: the Dockerfile, the ignore file,
//! the main context, image configs. One per run of the frontend; the platforms of a build share it,
//! so nothing is asked twice.

use crate::{
    error::{ConvertError, Result},
    options::BuildOptions,
    text,
};
use parking_lot::Mutex;
use shipway_dockerfile::{Source, Work};
use shipway_fault::{Context as _, Fault, SourceFile};
use shipway_filesync::{IgnoreFile, PatternMatcher};
use shipway_frontend::{Bridge, BuildRef, FrontendOptions, SolveRequest, SourceRequest};
use shipway_gocompat::{parse_bool, path};
use shipway_llb::{
    Caps, FileCopy, FileDraft, GitRef, ImageFacts, MarshalOptions, ResolveOptions, State,
    VertexOptions, attr,
};
use shipway_oci::{Digest, Platform};
use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};
use tokio::sync::OnceCell;

const DOCKERFILE: &str = "Dockerfile";
pub const DOCKERIGNORE: &str = ".dockerignore";
/// The main context's local source.
pub const CONTEXT: &str = "context";
/// Larger Dockerfiles and ignore files are refused.
const MAX_FILE: u64 = 8 << 20;

/// The build: its options, its files, and the bridge to ask for more.
pub struct BuildContext {
    /// What its expansions may do.
    pub work: Work,
    pub bridge: Arc<dyn Bridge>,
    pub options: BuildOptions,
    pub raw: FrontendOptions,
    /// What the daemon's operations can.
    pub caps: Caps,
    /// The Dockerfile.
    pub file: Arc<SourceFile>,
    /// Vertex that it was read from.
    pub file_vertex: Option<Digest>,
    /// The main context, when it is not the client's directory.
    context: Option<State>,
    ignore_of_file: Option<Vec<u8>>,
    ignore: OnceCell<IgnoreFile>,
    images: Mutex<HashMap<String, Arc<Resolution>>>,
    /// The Dockerfile as text, if places are reported with columns.
    text: Option<String>,
}

/// What asking for an image gave; also a refusal is asked for once only.
type Resolution = OnceCell<Result<ResolvedName, Fault>>;

/// Where the main context and the Dockerfile come from.
struct Origin {
    context: Option<State>,
    dockerfile: Option<State>,
    dockerfile_name: String,
    filename: String,
}

/// A name of a vertex that is not the user's.
pub fn internal(name: &str) -> VertexOptions {
    VertexOptions::named(format!("[internal] {name}"))
}

/// The session that a local source comes from.
fn session<'a>(bridge: &'a dyn Bridge, options: &'a BuildOptions, local: &str) -> &'a str {
    options.local_sessions.get(local).map_or(bridge.session(), String::as_str)
}

/// Marshalling for the sources that the frontend itself reads.
fn marshal_options(bridge: &dyn Bridge) -> MarshalOptions {
    let platform = bridge.platforms().into_iter().next().unwrap_or_else(Platform::host);
    MarshalOptions { platform, caps: Some(Caps::llb()), local_unique_id: "shipway".into() }
}

/// Solves a state that is not scratch.
pub async fn solve(
    bridge: &dyn Bridge,
    state: &State,
    evaluate: bool,
) -> Result<(Arc<dyn BuildRef>, Option<Digest>, Vec<u8>), Fault> {
    let definition = state.marshal(&marshal_options(bridge))?;
    let (head, encoded) = (definition.head(), definition.encode());
    let result = bridge
        .solve(SolveRequest { definition: Some(definition), evaluate, ..SolveRequest::default() })
        .await?;
    let state =
        result.single.flatten().ok_or_else(|| Fault::internal("solving a source gave no state"))?;
    Ok((state, head, encoded))
}

/// What an image's name led to.
#[derive(Clone, Debug)]
pub enum ResolvedName {
    Image(ImageFacts),
    /// Another kind of source, by its identifier.
    Other(String),
}

impl BuildContext {
    /// Reads the options and the Dockerfile.
    pub async fn open(bridge: Arc<dyn Bridge>, work: Work) -> Result<Self> {
        let raw = bridge.options().clone();
        let options = BuildOptions::parse(&raw)?;
        let origin = Origin::find(&*bridge, &raw).await?;
        let read = Entry::read(&*bridge, &options, &origin).await?;
        let text = options.columns.then(|| String::from_utf8_lossy(&read.file.data).into_owned());
        Ok(Self {
            bridge,
            work,
            options,
            raw,
            caps: Caps::llb(),
            file: read.file,
            file_vertex: read.vertex,
            context: origin.context,
            ignore_of_file: read.ignore,
            ignore: OnceCell::new(),
            images: Mutex::default(),
            text,
        })
    }

    /// Reads the options only: for callers that need no Dockerfile.
    pub fn without_file(bridge: Arc<dyn Bridge>) -> Result<Self> {
        let raw = bridge.options().clone();
        let options = BuildOptions::parse(&raw)?;
        Ok(Self {
            bridge,
            work: Work::default(),
            options,
            raw,
            caps: Caps::llb(),
            file: Arc::default(),
            file_vertex: None,
            context: None,
            ignore_of_file: None,
            ignore: OnceCell::new(),
            images: Mutex::default(),
            text: None,
        })
    }

    /// Where columns are looked for; `None` if only lines are reported, as clients of the reference
    /// know them.
    pub fn source(&self) -> Option<Source<'_>> {
        self.text.as_deref().map(Source::new)
    }

    /// The fault with the lines of the Dockerfile to draw.
    pub fn fault(&self, failure: ConvertError) -> Fault {
        failure.into_fault(&self.file, self.source().as_ref())
    }

    /// The session that a local source comes from.
    pub fn session(&self, local: &str) -> &str {
        session(&*self.bridge, &self.options, local)
    }

    /// Platforms the worker runs, native first.
    pub fn build_platform(&self) -> Platform {
        self.bridge.platforms().into_iter().next().unwrap_or_else(Platform::host)
    }

    /// The ignore file of the main context; `None` when the context is not the client's directory
    /// (rows `df.lookup`, `df.ignore`).
    pub async fn ignore(&self) -> Result<Option<&IgnoreFile>> {
        if self.context.is_some() {
            return Ok(None);
        }
        let load = || async {
            let (data, name) = match &self.ignore_of_file {
                Some(data) => (data.clone(), self.ignore_name()),
                None => (
                    self.load_ignore(
                        CONTEXT,
                        &format!("{CONTEXT}-{DOCKERIGNORE}"),
                        internal(&format!("load {DOCKERIGNORE}")),
                    )
                    .await?,
                    DOCKERIGNORE.into(),
                ),
            };
            parse_ignore(&data, &name)
        };
        Ok(Some(self.ignore.get_or_try_init(load).await?))
    }

    /// Name of the ignore file in force.
    pub fn ignore_name(&self) -> String {
        match self.ignore_of_file {
            Some(_) => format!("{}{DOCKERIGNORE}", self.file.filename),
            None => DOCKERIGNORE.into(),
        }
    }

    /// The `.dockerignore` of a local source; empty when it has none.
    pub async fn load_ignore(
        &self,
        local: &str,
        key: &str,
        options: VertexOptions,
    ) -> Result<Vec<u8>, Fault> {
        let attrs = BTreeMap::from([
            (attr::LOCAL_SESSION.to_owned(), self.session(local).to_owned()),
            (attr::LOCAL_FOLLOW_PATHS.to_owned(), text::json_list(&[DOCKERIGNORE])),
            (attr::LOCAL_SHARED_KEY_HINT.to_owned(), key.to_owned()),
            (attr::LOCAL_DIFFER.to_owned(), "none".to_owned()),
        ]);
        let (state, ..) = solve(&*self.bridge, &State::local(local, attrs, options), false).await?;
        match state.read_file(DOCKERIGNORE, Some((0, MAX_FILE))).await {
            Ok(data) => Ok(data.to_vec()),
            Err(e) if e.is_cancelled() => Err(e),
            // No ignore file is the usual case; why it cannot be read does not matter here, and is
            // reported when the context is read.
            Err(_) => Ok(Vec::new()),
        }
    }

    /// The main context, of which only `follow` is needed; nothing there means all of it.
    pub async fn main_context(&self, follow: &[String]) -> Result<State> {
        if let Some(context) = &self.context {
            return Ok(context.clone());
        }
        let excludes = self
            .ignore()
            .await
            .map_err(|e| e.context("failed to read dockerignore patterns"))?
            .map(IgnoreFile::patterns);
        let attrs = BTreeMap::from([
            (attr::LOCAL_SESSION.to_owned(), self.session(CONTEXT).to_owned()),
            (
                attr::LOCAL_EXCLUDE_PATTERNS.to_owned(),
                text::json_list(&excludes.unwrap_or_default()),
            ),
            (attr::LOCAL_SHARED_KEY_HINT.to_owned(), CONTEXT.to_owned()),
            (attr::LOCAL_FOLLOW_PATHS.to_owned(), text::json_list(follow)),
        ]);
        Ok(State::local(CONTEXT, attrs, internal("load build context")))
    }

    /// The main context, unless it is the client's directory.
    pub fn remote_context(&self) -> Option<&State> {
        self.context.as_ref()
    }

    /// The config of an image, asked once per build (row `dfr.basemeta`).
    pub async fn image(
        &self,
        identifier: String,
        attrs: BTreeMap<String, String>,
        platform: &Platform,
        log_name: String,
    ) -> Result<ImageFacts, Fault> {
        match self.image_or_other(identifier.clone(), attrs, platform, log_name).await? {
            ResolvedName::Image(image) => Ok(image),
            ResolvedName::Other(_) => {
                Err(Fault::internal(format!("resolving {identifier} gave no image")))
            }
        }
    }

    /// [`Self::image`], where a source policy may have put another kind of source in the image's
    /// place.
    pub async fn image_or_other(
        &self,
        identifier: String,
        attrs: BTreeMap<String, String>,
        platform: &Platform,
        log_name: String,
    ) -> Result<ResolvedName, Fault> {
        let key = format!("{identifier}\n{platform}\n{}\n{log_name}", platform.os_version);
        let cell = self.images.lock().entry(key).or_default().clone();
        let ask = || async {
            let mode = self.options.resolve_mode;
            let request = SourceRequest {
                identifier: identifier.clone(),
                attrs,
                platform: Some(platform.clone()),
                log_name,
                options: ResolveOptions { mode, ..ResolveOptions::default() },
                ..SourceRequest::default()
            };
            let meta = self.bridge.resolve_source(request).await?;
            Ok(meta
                .facts
                .image
                .map_or(ResolvedName::Other(meta.source.identifier), ResolvedName::Image))
        };
        cell.get_or_init(ask).await.clone()
    }
}

/// Parses an ignore file and checks its patterns.
pub fn parse_ignore(data: &[u8], name: &str) -> Result<IgnoreFile> {
    let ignore = IgnoreFile::parse(data);
    match PatternMatcher::new(ignore.patterns()) {
        Ok(_) => Ok(ignore),
        // The words are the reference's; which pattern it is, and where, comes as advice.
        Err(error) => {
            Err(Fault::unknown("syntax error in pattern").hint(format!("{name}: {error}")).into())
        }
    }
}

impl Origin {
    async fn find(bridge: &dyn Bridge, raw: &FrontendOptions) -> Result<Self> {
        let get = |key: &str| raw.get(key).cloned();
        let forced = get("dockerfilekey");
        let mut origin = Self {
            context: None,
            dockerfile: None,
            dockerfile_name: forced.clone().unwrap_or_else(|| "dockerfile".into()),
            filename: get("filename").unwrap_or_else(|| DOCKERFILE.into()),
        };
        let context = get(&get("contextkey").unwrap_or_else(|| CONTEXT.into())).unwrap_or_default();
        if let Some(mut git) = GitRef::parse(&context)? {
            if get("build-arg:BUILDKIT_CONTEXT_KEEP_GIT_DIR").and_then(|v| parse_bool(&v))
                == Some(true)
            {
                git.keep_git_dir = Some(true);
            }
            if get("build-arg:SOURCE_DATE_EPOCH").is_some_and(|v| !v.is_empty())
                && git.mtime.is_empty()
            {
                git.mtime = "commit".into();
            }
            let state = git.state(internal(&format!("load git source {context}")));
            (origin.context, origin.dockerfile) = (Some(state.clone()), Some(state));
        } else if context.starts_with("http://") || context.starts_with("https://") {
            origin.take_http(bridge, &context).await?;
        } else {
            let inputs = bridge.inputs().await.context(|| "failed to get frontend inputs")?;
            let input = |name: &str| inputs.get(name).map(State::from_definition).transpose();
            // Nothing is a context that one can build from; a Dockerfile it is not.
            if inputs.get(&origin.dockerfile_name).is_some_and(|d| d.ops.is_empty()) {
                return Err(ConvertError::new("invalid nil input definition to definition op"));
            }
            origin.dockerfile = input(&origin.dockerfile_name)?;
            origin.context = input(CONTEXT)?;
        }
        if forced.is_some() {
            origin.dockerfile = None;
        }
        if let (Some(context), Some(dir)) = (&origin.context, get("contextsubdir")) {
            let copy = FileCopy {
                src: dir,
                dest: "/".into(),
                dir_copy_contents: true,
                ..FileCopy::default()
            };
            origin.context = Some(
                State::scratch()
                    .file(FileDraft::new().copy(context, copy), VertexOptions::default()),
            );
        }
        Ok(origin)
    }

    /// An archive is the context; anything else is the Dockerfile itself (row `dfc.http`).
    async fn take_http(&mut self, bridge: &dyn Bridge, url: &str) -> Result<()> {
        const NAME: &str = "context";
        let attrs = BTreeMap::from([(attr::HTTP_FILENAME.to_owned(), NAME.to_owned())]);
        let download = State::http(url, attrs, internal("load remote build context"));
        let (state, ..) =
            solve(bridge, &download, false).await.context(|| "failed to resolve httpcontext")?;
        let head = state
            .read_file(NAME, Some((0, 1024)))
            .await
            .context(|| "failed to read downloaded context")?;
        let context = if is_archive(&head) {
            let copy = FileCopy {
                src: format!("/{NAME}"),
                dest: "/".into(),
                attempt_unpack: true,
                ..FileCopy::default()
            };
            State::scratch().file(FileDraft::new().copy(&download, copy), VertexOptions::default())
        } else {
            self.filename = NAME.into();
            download
        };
        (self.context, self.dockerfile) = (Some(context.clone()), Some(context));
        Ok(())
    }
}

/// Whether a file begins as an archive that `ADD` would unpack.
fn is_archive(head: &[u8]) -> bool {
    // The reference does not know the last one, zstd.
    let magics: [&[u8]; 4] = [
        b"BZh",
        &[0x1f, 0x8b, 0x08],
        &[0xfd, b'7', b'z', b'X', b'Z', 0],
        &[0x28, 0xb5, 0x2f, 0xfd],
    ];
    magics.iter().any(|m| head.starts_with(m)) || head.get(257..262) == Some(b"ustar")
}

/// The Dockerfile as read.
struct Entry {
    file: Arc<SourceFile>,
    vertex: Option<Digest>,
    ignore: Option<Vec<u8>>,
}

impl Entry {
    async fn read(bridge: &dyn Bridge, options: &BuildOptions, origin: &Origin) -> Result<Self> {
        let name = &origin.filename;
        let (dir, base) = name.rsplit_once('/').unwrap_or((".", name));
        let dir = if dir.is_empty() { "/" } else { dir };
        let lower = (base == DOCKERFILE).then(|| path::join(dir, &DOCKERFILE.to_lowercase()));
        let ignore_name = format!("{name}{DOCKERIGNORE}");
        let source = origin.dockerfile.clone().unwrap_or_else(|| {
            let mut wanted = vec![name.clone(), ignore_name.clone()];
            wanted.extend(lower.clone());
            let local = &origin.dockerfile_name;
            let attrs = BTreeMap::from([
                (attr::LOCAL_SESSION.to_owned(), session(bridge, options, local).to_owned()),
                (attr::LOCAL_FOLLOW_PATHS.to_owned(), text::json_list(&wanted)),
                (attr::LOCAL_SHARED_KEY_HINT.to_owned(), local.clone()),
                (attr::LOCAL_DIFFER.to_owned(), "none".to_owned()),
            ]);
            State::local(local, attrs, internal(&format!("load build definition from {name}")))
        });
        let (state, vertex, definition) =
            solve(bridge, &source, false).await.context(|| "failed to resolve dockerfile")?;
        let limit = Some((0, MAX_FILE + 1));
        let data = match (state.read_file(name, limit).await, lower) {
            (Err(error), Some(lower)) => state.read_file(&lower, limit).await.map_err(|_| error),
            (read, _) => read,
        };
        let data = data.map_err(|e| missing(e, name))?;
        if data.len() as u64 > MAX_FILE {
            return Err(ConvertError::new(format!(
                "the Dockerfile {name} is larger than {MAX_FILE} bytes"
            )));
        }
        let ignore =
            state.read_file(&ignore_name, Some((0, MAX_FILE))).await.ok().map(|d| d.to_vec());
        let file = SourceFile {
            filename: name.clone(),
            language: DOCKERFILE.into(),
            data: data.to_vec(),
            definition: Some(definition),
        };
        Ok(Self { file: Arc::new(file), vertex, ignore })
    }
}

fn missing(error: Fault, name: &str) -> ConvertError {
    let found = error.is_not_found();
    let fault = error.context("failed to read dockerfile");
    match found {
        true => {
            fault.hint(format!("no file {name} in the directory of Dockerfiles; name another one with -f (option `filename`)"))
        }
        false => fault,
    }
    .into()
}
