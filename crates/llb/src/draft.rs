//! Operations to be, as builders of graphs describe them: processes and their mounts, chains of
//! file actions; and the states that they make of others.

use crate::{
    CdiDevice, ContentCache, HostIp, NetMode, ProxyEnv, SecurityMode, State, Ulimit, VertexOptions,
    ops::{
        CacheMount, CacheSharing, Chown, ExecMeta, ExecOp, FileActionKind, FileCopy, FileMkdir,
        FileMkfile, FileRm, FileSymlink, Mount, MountKind, Owner, SecretEnv, SecretMount, SshMount,
    },
    paths,
    state::{DraftKind, ExecSpec, FileStep, Output},
};
use shipway_gocompat::path;

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
    /// Whether what is written to it becomes an output.
    fn has_output(&self) -> bool {
        matches!(self.source, MountSource::State(_)) && !self.readonly && !self.no_output
    }

    /// The operation's mount; what it shows is added to `inputs`.
    fn into_mount(self, output: Option<usize>, inputs: &mut Vec<Output>) -> Mount {
        let (state, kind) = match self.source {
            MountSource::State(state) => (Some(state), MountKind::Bind),
            MountSource::Cache { id, sharing, base } => {
                (Some(base), MountKind::Cache(CacheMount { id, sharing }))
            }
            MountSource::Tmpfs(size) => (None, MountKind::Tmpfs { size }),
        };
        let input = state.and_then(|state| state.out).map(|out| {
            inputs.push(out);
            inputs.len() - 1
        });
        Mount {
            input,
            selector: self.selector,
            dest: self.target,
            output,
            readonly: self.readonly,
            kind,
            content_cache: self.content_cache,
            result_id: String::new(),
        }
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

impl SshDraft {
    /// The mount of the `n`th agent.
    fn into_mount(self, n: usize) -> Mount {
        let Self { id, target, uid, gid, mode, optional } = self;
        let dest = match target.as_str() {
            "" => format!("/run/buildkit/ssh_agent.{n}"),
            _ => target,
        };
        let kind = MountKind::Ssh(SshMount { id, uid, gid, mode, optional });
        Mount { dest, kind, ..Mount::default() }
    }
}

/// The mounts and the variables of secrets.
fn secrets(drafts: Vec<SecretDraft>) -> (Vec<Mount>, Vec<SecretEnv>) {
    let (mut files, mut variables) = (Vec::new(), Vec::new());
    for SecretDraft { id, target, env, uid, gid, mode, optional } in drafts {
        if let Some(name) = env {
            variables.push(SecretEnv { id: id.clone(), name, optional });
        }
        if let Some(dest) = target {
            let kind = MountKind::Secret(SecretMount { id, uid, gid, mode, optional });
            files.push(Mount { dest, kind, ..Mount::default() });
        }
    }
    (files, variables)
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

impl State {
    /// Runs a process; the result has what it wrote to the root.
    #[must_use]
    pub fn run(&self, draft: ExecDraft, options: VertexOptions) -> Self {
        let (readonly, platform) = (draft.readonly_root, options.platform.clone());
        let out = self.process(draft, "/", options);
        if readonly {
            return self.clone();
        }
        self.with_output(Some(out), platform)
    }

    /// Runs a process; the result is what it wrote to the mount at `target`, which must be one that
    /// keeps what is written.
    #[must_use]
    pub fn run_into(&self, draft: ExecDraft, target: &str, options: VertexOptions) -> Self {
        let platform = options.platform.clone();
        let out = self.process(draft, target, options);
        Self::scratch().with_output(Some(out), platform)
    }

    /// A process, and its output for the mount at `target`.
    fn process(&self, mut draft: ExecDraft, target: &str, options: VertexOptions) -> Output {
        let root = MountDraft {
            target: "/".into(),
            source: MountSource::State(self.clone()),
            readonly: draft.readonly_root,
            ..MountDraft::default()
        };
        let mut drafts = vec![root];
        drafts.append(&mut draft.mounts);
        // Outputs are counted in the order of the mounts.
        drafts.sort_by(|a, b| a.target.cmp(&b.target));
        let before = drafts.iter().take_while(|mount| mount.target != target);
        let index = before.filter(|mount| mount.has_output()).count();
        let (mut inputs, mut outputs) = (Vec::new(), 0..);
        let mounts = drafts.into_iter().map(|mount| {
            let output = mount.has_output().then(|| outputs.next()).flatten();
            // The graph's edges live in `inputs` alone, so that dropping a long chain stays flat.
            mount.into_mount(output, &mut inputs)
        });
        let mut mounts: Vec<Mount> = mounts.collect();
        let (files, variables) = secrets(draft.secrets);
        mounts.extend(files);
        mounts.extend(draft.ssh.into_iter().enumerate().map(|(n, ssh)| ssh.into_mount(n)));
        let defaults = &self.defaults;
        let meta = ExecMeta {
            args: draft.args,
            // Those of `ExecSpec`, which are completed when it is known what the daemon can.
            env: Vec::new(),
            cwd: defaults.dir.clone(),
            user: defaults.user.clone(),
            proxy: draft.proxy,
            extra_hosts: [&defaults.extra_hosts[..], &draft.extra_hosts].concat(),
            hostname: defaults.hostname.clone(),
            ulimits: draft.ulimits,
            cgroup_parent: draft.cgroup_parent,
            remove_mount_stubs_recursive: true,
            valid_exit_codes: draft.valid_exit_codes,
        };
        let op = ExecOp {
            meta,
            mounts,
            network: draft.network.unwrap_or(defaults.network),
            // The wire has it among the constraints, which are the vertex's.
            named_network: None,
            security: draft.security.unwrap_or(defaults.security),
            secret_env: variables,
            devices: draft.devices,
            proxied: false,
        };
        let spec = ExecSpec { op, env: self.env.clone(), platform: defaults.platform.clone() };
        Output::of(DraftKind::Exec(Box::new(spec)), inputs, options, index)
    }

    /// Does file actions; the result is that of the last one. No actions give the state itself.
    #[must_use]
    pub fn file(&self, draft: FileDraft, options: VertexOptions) -> Self {
        if draft.is_empty() {
            return self.clone();
        }
        let mut inputs = Vec::new();
        let base = self.out.clone().map(|out| {
            inputs.push(out);
            0
        });
        let mut steps = Vec::with_capacity(draft.0.len());
        for (mut kind, source) in draft.0 {
            self.place(&mut kind, source.as_ref(), base);
            let source = source.and_then(|s| s.out).map(|out| {
                inputs.push(out);
                inputs.len() - 1
            });
            steps.push(FileStep { base, source, kind });
        }
        let mut options = options.cap("file.base");
        if options.platform.is_none() {
            options.platform.clone_from(&self.defaults.platform);
        }
        self.with_output(Some(Output::of(DraftKind::File(steps), inputs, options, 0)), None)
    }

    /// Makes an action's paths absolute and sets where its owner's names are looked up.
    fn place(&self, kind: &mut FileActionKind, source: Option<&State>, base: Option<usize>) {
        let dir = &self.defaults.dir;
        let owner = match kind {
            FileActionKind::Copy(c) => {
                let src = path::clean(&c.src);
                let from = source.map_or("/", |s| &s.defaults.dir);
                c.src = if src.starts_with('/') { src } else { path::join(from, &src) };
                c.dest = paths::normalize(dir, &c.dest, true);
                &mut c.owner
            }
            FileActionKind::Mkfile(m) => {
                m.path = paths::normalize(dir, &m.path, false);
                m.mode &= 0o777;
                &mut m.owner
            }
            FileActionKind::Mkdir(m) => {
                m.path = paths::normalize(dir, &m.path, false);
                m.mode &= 0o777;
                &mut m.owner
            }
            FileActionKind::Rm(r) => {
                r.path = paths::normalize(dir, &r.path, false);
                return;
            }
            FileActionKind::Symlink(s) => &mut s.owner,
        };
        if let Some(owner) = owner {
            for who in [&mut owner.user, &mut owner.group] {
                if let Some(Owner::Name { input, .. }) = who {
                    *input = base;
                }
            }
        }
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
