//! Operations to be, as builders of graphs describe them: what every vertex has,
//! processes and their mounts, chains of file actions. [`crate::State`] turns them into vertices.

use crate::{
    CdiDevice, ContentCache, HostIp, LinuxResources, NetMode, OpMetadata, ProgressGroup, ProxyEnv,
    SecurityMode, State, Ulimit,
    definition::ExportCache,
    ops::{
        CacheSharing, Chown, FileActionKind, FileCopy, FileMkdir, FileMkfile, FileRm, FileSymlink,
        Owner,
    },
};
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

/// A process to run on a state.
#[derive(Clone, Debug, Default)]
pub struct ExecDraft {
    /// Arguments.
    pub args: Vec<String>,
    /// Proxy settings.
    pub proxy: Option<ProxyEnv>,
    /// Whether the root may not be written to; the result is then the state itself.
    pub readonly_root: bool,
    /// Mounts besides the root.
    pub mounts: Vec<MountDraft>,
    /// Secrets as files or variables.
    pub secrets: Vec<SecretDraft>,
    /// SSH agents.
    pub ssh: Vec<SshDraft>,
    /// CDI devices.
    pub devices: Vec<CdiDevice>,
    /// Hosts besides the state's.
    pub extra_hosts: Vec<HostIp>,
    /// Resource limits.
    pub ulimits: Vec<Ulimit>,
    /// Parent cgroup.
    pub cgroup_parent: String,
    /// Network, instead of the state's.
    pub network: Option<NetMode>,
    /// Confinement, instead of the state's.
    pub security: Option<SecurityMode>,
    /// Exit codes that are successes.
    pub valid_exit_codes: Vec<i32>,
}

/// A mount of an [`ExecDraft`].
#[derive(Clone, Debug, Default)]
pub struct MountDraft {
    /// Where it appears.
    pub target: String,
    /// What it shows.
    pub source: MountSource,
    /// Path inside the source; empty for all.
    pub selector: String,
    /// Whether it may not be written to.
    pub readonly: bool,
    /// Whether what is written is thrown away.
    pub no_output: bool,
    /// Content hashing.
    pub content_cache: ContentCache,
}

/// What a [`MountDraft`] shows.
#[derive(Clone, Debug)]
pub enum MountSource {
    /// A state.
    State(State),
    /// A cache directory on top of a state.
    Cache {
        /// Identity.
        id: String,
        /// Who may use it at once.
        sharing: CacheSharing,
        /// What it starts from.
        base: State,
    },
    /// Memory, with a size limit unless 0.
    Tmpfs(i64),
}

impl Default for MountSource {
    fn default() -> Self {
        Self::State(State::scratch())
    }
}

impl MountDraft {
    pub(crate) fn state(&self) -> Option<&State> {
        match &self.source {
            MountSource::State(state) | MountSource::Cache { base: state, .. } => Some(state),
            MountSource::Tmpfs(_) => None,
        }
    }

    /// Whether what is written to it becomes an output.
    pub(crate) fn has_output(&self) -> bool {
        matches!(self.source, MountSource::State(_)) && !self.readonly && !self.no_output
    }
}

/// A secret of an [`ExecDraft`].
#[derive(Clone, Debug, Default)]
#[allow(missing_docs)]
pub struct SecretDraft {
    pub id: String,
    /// File it appears as.
    pub target: Option<String>,
    /// Variable it appears as.
    pub env: Option<String>,
    pub uid: u32,
    pub gid: u32,
    pub mode: u32,
    pub optional: bool,
}

/// An SSH agent of an [`ExecDraft`]. Without a target it appears as `/run/buildkit/ssh_agent.N`.
#[derive(Clone, Debug, Default)]
#[allow(missing_docs)]
pub struct SshDraft {
    pub id: String,
    pub target: String,
    pub uid: u32,
    pub gid: u32,
    pub mode: u32,
    pub optional: bool,
}

/// File actions to do on a state, one after the other. Relative paths are under the state's
/// directory; the `input` of an [`Owner::Name`] is set by [`State::file`].
#[derive(Clone, Debug, Default)]
pub struct FileDraft(pub(crate) Vec<(FileActionKind, Option<State>)>);

impl FileDraft {
    /// No actions.
    pub fn new() -> Self {
        Self::default()
    }

    /// Copies from `source`.
    #[must_use]
    pub fn copy(mut self, source: &State, copy: FileCopy) -> Self {
        self.0.push((FileActionKind::Copy(copy), Some(source.clone())));
        self
    }

    /// Makes a directory.
    #[must_use]
    pub fn mkdir(self, mkdir: FileMkdir) -> Self {
        self.push(FileActionKind::Mkdir(mkdir))
    }

    /// Makes a file.
    #[must_use]
    pub fn mkfile(self, mkfile: FileMkfile) -> Self {
        self.push(FileActionKind::Mkfile(mkfile))
    }

    /// Removes.
    #[must_use]
    pub fn rm(self, rm: FileRm) -> Self {
        self.push(FileActionKind::Rm(rm))
    }

    /// Makes a symbolic link.
    #[must_use]
    pub fn symlink(self, symlink: FileSymlink) -> Self {
        self.push(FileActionKind::Symlink(symlink))
    }

    fn push(mut self, kind: FileActionKind) -> Self {
        self.0.push((kind, None));
        self
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Chown {
    /// From `user` or `user:group`, by name or number.
    pub fn parse(text: &str) -> Self {
        let owner = |t: &str| match t {
            "root" | "" => Owner::Id(0),
            t => match t.parse::<i32>() {
                Ok(id) => Owner::Id(id as u32),
                Err(_) => Owner::Name { name: t.into(), input: None },
            },
        };
        match text.split_once(':') {
            Some((user, group)) => Self { user: Some(owner(user)), group: Some(owner(group)) },
            None => Self { user: Some(owner(text)), group: None },
        }
    }
}
