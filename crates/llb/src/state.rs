//! Filesystem states while a graph is being made: immutable values, each the result of an operation
//! on others, together with the defaults that processes on them get. [`State::marshal`] turns one
//! into a [`crate::Definition`].

use crate::{
    EnvList, HostIp, NetMode, SecurityMode, VertexOptions, attr,
    ops::{ExecOp, FileActionKind},
};
use shipway_gocompat::path;
use shipway_oci::Platform;
use std::{
    collections::BTreeMap,
    sync::{Arc, OnceLock},
};

/// A filesystem to be made. No output is scratch.
#[derive(Clone, Debug, Default)]
pub struct State {
    pub(crate) out: Option<Output>,
    pub(crate) env: Arc<EnvList>,
    pub(crate) defaults: Arc<Defaults>,
}

/// What processes on a state get unless they say otherwise.
#[derive(Clone, Debug, Default)]
pub(crate) struct Defaults {
    pub dir: String,
    pub user: String,
    pub hostname: String,
    pub extra_hosts: Vec<HostIp>,
    pub network: NetMode,
    pub security: SecurityMode,
    pub platform: Option<Platform>,
}

/// One output of an operation to be.
#[derive(Clone, Debug)]
pub struct Output(pub(crate) OutputKind);

#[derive(Clone, Debug)]
pub(crate) enum OutputKind {
    Of { vertex: Arc<Draft>, index: usize },
    Later(Arc<OnceLock<State>>),
}

/// A state that is decided after others already build on it: what a context needs is known only
/// when all its uses are.
#[derive(Clone, Debug, Default)]
pub struct Deferred(Arc<OnceLock<State>>);

impl Deferred {
    /// The state that will be decided.
    pub fn state(&self) -> State {
        State::new(Some(Output(OutputKind::Later(self.0.clone()))), None)
    }

    /// Decides it; the first decision stays.
    pub fn decide(&self, state: State) {
        let _ = self.0.set(state);
    }
}

/// A vertex to be. `inputs` are not yet deduplicated; the kinds index them.
#[derive(Debug)]
pub(crate) struct Draft {
    pub kind: DraftKind,
    pub inputs: Vec<Output>,
    pub options: VertexOptions,
}

#[derive(Debug)]
pub(crate) enum DraftKind {
    Source {
        identifier: String,
        attrs: BTreeMap<String, String>,
    },
    Exec(Box<ExecSpec>),
    File(Vec<FileStep>),
    Merge,
    Diff {
        lower: Option<usize>,
        upper: Option<usize>,
    },
    Passthrough {
        id: String,
        outputs: Vec<usize>,
    },
    /// An operation of a finished definition, byte for byte.
    Foreign(bytes::Bytes),
}

/// A process to be: its mounts name inputs of the vertex to be.
#[derive(Debug)]
pub(crate) struct ExecSpec {
    /// Without environment.
    pub op: ExecOp,
    pub env: Arc<EnvList>,
    /// The state's.
    pub platform: Option<Platform>,
}

#[derive(Debug)]
pub(crate) struct FileStep {
    pub base: Option<usize>,
    pub source: Option<usize>,
    pub kind: FileActionKind,
}

impl Drop for Draft {
    /// Chains can be as long as a Dockerfile; dropping them must not recurse.
    fn drop(&mut self) {
        let mut stack = std::mem::take(&mut self.inputs);
        while let Some(Output(kind)) = stack.pop() {
            if let OutputKind::Of { vertex, .. } = kind
                && let Some(mut draft) = Arc::into_inner(vertex)
            {
                stack.append(&mut draft.inputs);
            }
        }
    }
}

impl State {
    pub(crate) fn new(out: Option<Output>, platform: Option<Platform>) -> Self {
        let defaults = Defaults {
            dir: "/".into(),
            platform: platform.map(Platform::normalized),
            ..Defaults::default()
        };
        Self { out, env: Arc::default(), defaults: Arc::new(defaults) }
    }

    /// An empty filesystem.
    pub fn scratch() -> Self {
        Self::new(None, None)
    }

    /// A source by identifier and attributes; its capabilities must be in `options`.
    pub fn source(
        identifier: impl Into<String>,
        attrs: BTreeMap<String, String>,
        options: VertexOptions,
    ) -> Self {
        let platform = options.platform.clone();
        let kind = DraftKind::Source { identifier: identifier.into(), attrs };
        Self::new(Some(Output::of(kind, Vec::new(), options, 0)), platform)
    }

    /// An image by its full name. `mode` is the `image.resolvemode`; empty for the default.
    pub fn image(
        name: &str,
        mode: &str,
        extra: BTreeMap<String, String>,
        options: VertexOptions,
    ) -> Self {
        let mut attrs = extra;
        let mut options = options.cap("source.image");
        if !mode.is_empty() {
            attrs.insert(attr::IMAGE_RESOLVE_MODE.into(), mode.into());
            if mode == "pull" {
                options = options.cap("source.image.resolvemode");
            }
        }
        for (name, cap) in [
            (attr::IMAGE_LAYER_LIMIT, "source.image.layerlimit"),
            (attr::IMAGE_CHECKSUM, "source.image.checksum"),
        ] {
            if attrs.contains_key(name) {
                options = options.cap(cap);
            }
        }
        Self::source(format!("docker-image://{name}"), attrs, options)
    }

    /// A directory of the client. `attrs` are the `local.*` attributes wanted; empty values do not
    /// count.
    pub fn local(name: &str, mut attrs: BTreeMap<String, String>, options: VertexOptions) -> Self {
        attrs.retain(|_, v| !v.is_empty());
        let mut options = options.cap("source.local");
        for (name, cap) in [
            (attr::LOCAL_SESSION, "source.local.sessionid"),
            (attr::LOCAL_INCLUDE_PATTERNS, "source.local.includepatterns"),
            (attr::LOCAL_FOLLOW_PATHS, "source.local.followpaths"),
            (attr::LOCAL_EXCLUDE_PATTERNS, "source.local.excludepatterns"),
            (attr::LOCAL_SHARED_KEY_HINT, "source.local.sharedkeyhint"),
            (attr::LOCAL_METADATA_TRANSFER, "source.local.metadatatransfer"),
        ] {
            if attrs.contains_key(name) {
                options = options.cap(cap);
            }
        }
        Self::source(format!("local://{name}"), attrs, options)
    }

    /// A file behind an address. `attrs` are the `http.*` attributes wanted; empty values do not
    /// count.
    pub fn http(url: &str, mut attrs: BTreeMap<String, String>, options: VertexOptions) -> Self {
        attrs.retain(|_, v| !v.is_empty());
        let mut options = options.cap("source.http");
        for (name, cap) in [
            (attr::HTTP_CHECKSUM, "source.http.checksum"),
            (attr::HTTP_PERM, "source.http.perm"),
            (attr::HTTP_UID, "soruce.http.uidgid"),
            (attr::HTTP_GID, "soruce.http.uidgid"),
            (attr::HTTP_AUTH_HEADER_SECRET, "source.http.auth"),
        ] {
            if attrs.contains_key(name) {
                options = options.cap(cap);
            }
        }
        Self::source(url, attrs, options)
    }

    /// An image of a client's content store. `attrs` are the `oci.*` attributes.
    pub fn oci_layout(name: &str, attrs: BTreeMap<String, String>, options: VertexOptions) -> Self {
        Self::source(format!("oci-layout://{name}"), attrs, options.cap("source.ocilayout"))
    }

    /// Stacks states; scratch does not count.
    pub fn merge(states: &[State], options: VertexOptions) -> Self {
        let real: Vec<&State> = states.iter().filter(|s| s.out.is_some()).collect();
        match real.as_slice() {
            [] => Self::scratch(),
            [one] => (*one).clone(),
            [first, ..] => {
                let inputs = real.iter().filter_map(|s| s.out.clone()).collect();
                first.with_output(
                    Some(Output::of(DraftKind::Merge, inputs, options.cap("mergeop"), 0)),
                    None,
                )
            }
        }
    }

    /// What `upper` has that `lower` has not.
    pub fn diff(lower: &State, upper: &State, options: VertexOptions) -> Self {
        let Some(low) = lower.out.clone() else { return upper.clone() };
        let mut inputs = vec![low];
        let upper = upper.out.clone().map(|out| {
            inputs.push(out);
            1
        });
        lower.with_output(
            Some(Output::of(
                DraftKind::Diff { lower: Some(0), upper },
                inputs,
                options.cap("diffop"),
                0,
            )),
            None,
        )
    }

    /// The same filesystem, made only after `others`.
    #[must_use]
    pub fn requires(&self, id: &str, others: &[State], options: VertexOptions) -> Self {
        let Some(own) = self.out.clone() else { return self.clone() };
        let mut inputs = vec![own];
        inputs.extend(others.iter().filter_map(|s| s.out.clone()));
        let kind = DraftKind::Passthrough { id: id.into(), outputs: vec![0] };
        self.with_output(Some(Output::of(kind, inputs, options.cap("passthroughop"), 0)), None)
    }

    pub(crate) fn with_output(&self, out: Option<Output>, platform: Option<Platform>) -> Self {
        let mut state = Self { out, ..self.clone() };
        if let Some(platform) = platform {
            state = state.with_platform(platform);
        }
        state
    }

    /// The same environment, directory and other defaults on the filesystem of `other`.
    #[must_use]
    pub fn with_filesystem(&self, other: &State) -> Self {
        self.with_output(other.out.clone(), None)
    }

    /// Whether it is an empty filesystem for sure.
    pub fn is_scratch(&self) -> bool {
        self.out.is_none()
    }

    /// Sets a variable.
    #[must_use]
    pub fn add_env(mut self, name: &str, value: &str) -> Self {
        Arc::make_mut(&mut self.env).set(name, value);
        self
    }

    /// The environment.
    pub fn env(&self) -> &EnvList {
        &self.env
    }

    /// The working directory.
    pub fn dir(&self) -> &str {
        &self.defaults.dir
    }

    /// The platform, when one is known.
    pub fn platform(&self) -> Option<&Platform> {
        self.defaults.platform.as_ref()
    }

    /// Sets the working directory; a relative one is under the current one.
    #[must_use]
    pub fn with_dir(self, dir: &str) -> Self {
        let dir = match dir.starts_with('/') {
            true => dir.to_owned(),
            false => {
                path::join(if self.defaults.dir.is_empty() { "/" } else { &self.defaults.dir }, dir)
            }
        };
        self.edit(|d| d.dir = dir)
    }

    /// Sets the user.
    #[must_use]
    pub fn with_user(self, user: &str) -> Self {
        self.edit(|d| d.user = user.into())
    }

    /// Sets the host name.
    #[must_use]
    pub fn with_hostname(self, name: &str) -> Self {
        self.edit(|d| d.hostname = name.into())
    }

    /// Sets the network.
    #[must_use]
    pub fn with_network(self, network: NetMode) -> Self {
        self.edit(|d| d.network = network)
    }

    /// Sets the confinement.
    #[must_use]
    pub fn with_security(self, security: SecurityMode) -> Self {
        self.edit(|d| d.security = security)
    }

    /// Sets the platform.
    #[must_use]
    pub fn with_platform(self, platform: Platform) -> Self {
        self.edit(|d| d.platform = Some(platform.normalized()))
    }

    /// Adds a host.
    #[must_use]
    pub fn with_extra_host(self, host: HostIp) -> Self {
        self.edit(|d| d.extra_hosts.push(host))
    }

    fn edit(mut self, f: impl FnOnce(&mut Defaults)) -> Self {
        f(Arc::make_mut(&mut self.defaults));
        self
    }
}

impl Output {
    pub(crate) fn of(
        kind: DraftKind,
        inputs: Vec<Output>,
        options: VertexOptions,
        index: usize,
    ) -> Self {
        Self(OutputKind::Of { vertex: Arc::new(Draft { kind, inputs, options }), index })
    }
}
