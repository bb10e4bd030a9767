//! RUN: the process and its mounts (rows `df.run*`, `df.heredoc*`).

use crate::{
    build_context::internal,
    error::{ConvertError, Result},
    instruct::StageContext,
    stage::{OpenStage, Step, Vars, shown_text},
};
use shipway_dockerfile::{
    self as df, CommandLine, Mount, MountKind, Sharing, is_heredoc, strip_tabs,
};
use shipway_gocompat::{path, quote};
use shipway_llb::{
    CacheSharing, CdiDevice, Chown, EnvList, ExecDraft, FileDraft, FileMkdir, FileMkfile,
    MountDraft, MountSource, NetMode, Owner, SecretDraft, SecurityMode, SshDraft, State,
    VertexOptions,
};
use shipway_oci::NetworkName;
use std::borrow::Cow;

/// Where a heredoc with an interpreter of its own appears.
const PIPES: &str = "/dev/pipes/";

impl StageContext<'_> {
    pub fn run(&mut self, stage: &mut OpenStage, step: &Step, run: &df::Run) -> Result<()> {
        let instruction = &step.instruction;
        let (options, caps) = (&self.plan.cx.options, &self.plan.cx.caps);
        // A process can read anything.
        self.paths[stage.path_owner].insert("/".into());
        let mounts = {
            let stage = &*stage;
            let lex = self.plan.lex.clone();
            run.expand_mounts(&mut |w| self.word(&lex, stage, w, instruction.lines))?
        };
        let mut draft =
            ExecDraft { proxy: self.plan.globals.proxy.clone(), ..ExecDraft::default() };
        let (args, summary) = self.arguments(stage, run, &mut draft)?;
        draft.args = if run.command.is_shell() { stage.with_shell(&args) } else { args };
        self.mounts(stage, step, &mounts, &mut draft)?;
        draft.security = (run.security == df::Security::Insecure).then_some(SecurityMode::Insecure);
        let (mode, named) = match &run.network {
            df::Network::Default => (None, options.named_network.as_ref()),
            df::Network::None => (Some(NetMode::None), None),
            df::Network::Host => (Some(NetMode::Host), None),
            df::Network::Named(name) => (Some(NetMode::Unset), Some(name)),
        };
        draft.network = mode;
        draft.extra_hosts.clone_from(&options.extra_hosts);
        if caps.has("exec.meta.ulimit") {
            draft.ulimits.clone_from(&options.ulimits);
        }
        if caps.has("exec.meta.cdi") {
            draft.devices.extend(
                run.devices
                    .iter()
                    .map(|d| CdiDevice { name: d.name.clone(), optional: !d.required }),
            );
        } else if let Some(device) = run.devices.first() {
            return Err(shipway_fault::Fault::unimplemented(format!(
                "RUN --device={}",
                device.name
            ))
            .into());
        }
        if options.shm_size > 0 && caps.has("exec.mount.tmpfs.size") {
            let source = MountSource::Tmpfs(options.shm_size);
            draft.mounts.push(MountDraft {
                target: "/dev/shm".into(),
                source,
                ..MountDraft::default()
            });
        }
        if caps.has("exec.meta.cgroup.parent") {
            draft.cgroup_parent.clone_from(&options.cgroup_parent);
        }
        let shown = format!("{}{summary}", instruction.source);
        let name = shown_text(
            &self.plan.lex.clone().raw_quotes().keep_unset(),
            &shown,
            &Masked::new(stage.state.env(), &mounts),
        );
        let mut vertex = VertexOptions::named(self.run_title(stage, &name))
            .describe("com.docker.dockerfile.v1.command", instruction.source.clone())
            .at(&self.plan.cx.file, instruction.lines.spans());
        vertex.constraints.extend(named.map(NetworkName::constraint));
        if stage.ignore_cache {
            vertex = vertex.ignore_cache();
        }
        if let Some(resources) =
            options.resources.clone().filter(|_| caps.has("exec.meta.linux.resources"))
        {
            vertex = vertex.resources(resources);
        }
        let created_by = format!("RUN {} # buildkit", history_text(stage, &draft.args));
        stage.state = stage.state.run(draft, vertex);
        stage.commit(created_by, true, self.plan.globals.epoch);
        Ok(())
    }

    /// Like [`StageContext::title`], with the platform of the state, which a base image may have
    /// decided.
    fn run_title(&self, stage: &mut OpenStage, name: &str) -> String {
        let platform =
            self.plan.cx.options.multi_platform.then(|| stage.state.platform().cloned()).flatten();
        let env = stage.state.env().clone();
        stage.title(name, platform.as_ref(), Some(&env))
    }

    /// The words of the command, heredocs worked in, and what the vertex name says of them.
    fn arguments(
        &self,
        stage: &OpenStage,
        run: &df::Run,
        draft: &mut ExecDraft,
    ) -> Result<(Vec<String>, String)> {
        let words = run.command.words();
        let Some(first) = run.heredocs.first() else { return Ok((words, String::new())) };
        let CommandLine::Shell(Some(line)) = &run.command else {
            return Err(ConvertError::new(format!(
                "parsing produced an invalid run command: {words:?}"
            )));
        };
        if !is_heredoc(line) {
            // The shell reads the heredocs itself.
            let mut script = line.clone();
            for heredoc in &run.heredocs {
                script += &format!("\n{}{}", heredoc.data, heredoc.name);
            }
            return Ok((vec![script], String::new()));
        }
        let summary = format!(" ({})", summarize(&first.data));
        let data = if first.strip { strip_tabs(&first.data) } else { first.data.clone() };
        if stage.image.os == "windows" || !data.starts_with("#!") {
            return Ok((vec![data], summary));
        }
        let file = FileMkfile {
            path: first.name.clone(),
            mode: 0o755,
            data: data.into(),
            ..FileMkfile::default()
        };
        let options = stage.on_platform(internal("preparing inline document"));
        let state = State::scratch().file(FileDraft::new().mkfile(file), options);
        draft.mounts.push(MountDraft {
            target: PIPES.into(),
            source: MountSource::State(state),
            selector: "/".into(),
            readonly: true,
            ..MountDraft::default()
        });
        Ok((vec![path::join(PIPES, &first.name)], summary))
    }

    fn mounts(
        &mut self,
        stage: &mut OpenStage,
        step: &Step,
        mounts: &[Mount],
        draft: &mut ExecDraft,
    ) -> Result<()> {
        for (mount, &source) in mounts.iter().zip(&step.sources) {
            match mount.kind {
                MountKind::Secret => {
                    let secret = secret(mount)?;
                    stage.outline.note(mount, &secret.id, step.instruction.lines);
                    draft.secrets.push(secret);
                }
                MountKind::Ssh => {
                    draft.ssh.push(ssh(mount)?);
                    let id = if mount.id.is_empty() { "default" } else { &mount.id };
                    stage.outline.note(mount, id, step.instruction.lines);
                }
                MountKind::Bind | MountKind::Cache | MountKind::Tmpfs => {
                    draft.mounts.push(self.mount(stage, mount, source)?);
                }
            }
        }
        Ok(())
    }

    fn mount(&mut self, stage: &mut OpenStage, mount: &Mount, source: usize) -> Result<MountDraft> {
        let from_stage = !mount.from.is_empty();
        let (mut state, mut path_owner) = (self.context.clone(), None);
        if from_stage || mount.kind == MountKind::Cache {
            let Some(from) = self.plan.stages[source].converted() else {
                let name = if from_stage { &mount.from } else { crate::stage::SCRATCH };
                return Err(ConvertError::new(format!(
                    "cannot mount from stage {} to {}, stage needs to be defined before current command",
                    quote(name),
                    quote(&mount.target)
                )));
            };
            state = from.rootfs.state.clone();
            path_owner = Some(from.path_owner);
        }
        let target = match mount.target.starts_with('/') {
            true => mount.target.clone(),
            false => path::join("/", &format!("{}/{}", stage.state.dir(), mount.target)),
        };
        if target == "/" {
            return Err(ConvertError::new(format!("invalid mount target {}", quote(&target))));
        }
        let path = path::join("/", &mount.source);
        let mut selector = String::new();
        if path != "/" {
            selector.clone_from(&path);
        } else if mount.uid.is_some() || mount.gid.is_some() || mount.mode.is_some() {
            state = owned_directory(mount, &state);
            selector = "/cache".into();
        }
        let used = path_owner.map_or(&mut stage.context_paths, |owner| &mut self.paths[owner]);
        used.insert(path);
        let source = match mount.kind {
            MountKind::Tmpfs => MountSource::Tmpfs(mount.size),
            MountKind::Cache => MountSource::Cache {
                id: self.cache_id(mount),
                sharing: match mount.sharing {
                    None | Some(Sharing::Shared) => CacheSharing::Shared,
                    Some(Sharing::Private) => CacheSharing::Private,
                    Some(Sharing::Locked) => CacheSharing::Locked,
                },
                base: state,
            },
            _ => MountSource::State(state),
        };
        let discards = mount.kind == MountKind::Bind
            && self.plan.cx.caps.has("exec.mount.bind.readwrite-nooutput");
        Ok(MountDraft {
            target,
            source,
            selector,
            readonly: mount.readonly,
            no_output: !mount.readonly && discards,
            ..MountDraft::default()
        })
    }

    fn cache_id(&self, mount: &Mount) -> String {
        let id = if mount.id.is_empty() { path::clean(&mount.target) } else { mount.id.clone() };
        format!("{}/{id}", self.plan.cx.options.cache_namespace)
    }
}

/// A directory for a cache mount with an owner.
fn owned_directory(mount: &Mount, base: &State) -> State {
    let owner = Chown {
        user: Some(Owner::Id(mount.uid.unwrap_or(0))),
        group: Some(Owner::Id(mount.gid.unwrap_or(0))),
    };
    let mkdir = FileMkdir {
        path: "/cache".into(),
        mode: mount.mode.unwrap_or(0o755),
        owner: Some(owner),
        ..FileMkdir::default()
    };
    base.file(FileDraft::new().mkdir(mkdir), internal("setting cache mount permissions"))
}

/// A `--mount=type=secret` as a file, a variable or both (rows `df.run.mount.secret`,
/// `df.run.mount.secretenv`).
fn secret(mount: &Mount) -> Result<SecretDraft> {
    let id = match (mount.source.as_str(), mount.id.as_str(), mount.target.as_str()) {
        ("", "", "") => return Err(ConvertError::new("one of source, target required")),
        ("", "", target) => path::base(target).to_owned(),
        ("", id, _) => id.to_owned(),
        (source, ..) => source.to_owned(),
    };
    let target = match (mount.target.as_str(), &mount.env) {
        ("", Some(_)) => None,
        ("", None) => Some(format!("/run/secrets/{}", path::base(&id))),
        (target, _) => Some(target.to_owned()),
    };
    Ok(SecretDraft {
        id,
        target,
        env: mount.env.clone(),
        uid: mount.uid.unwrap_or(0),
        gid: mount.gid.unwrap_or(0),
        mode: mount.mode.unwrap_or(0o400),
        optional: !mount.required,
    })
}

/// A `--mount=type=ssh` (row `df.run.mount.ssh`).
fn ssh(mount: &Mount) -> Result<SshDraft> {
    if !mount.source.is_empty() {
        return Err(ConvertError::new("ssh does not support source"));
    }
    Ok(SshDraft {
        id: mount.id.clone(),
        target: mount.target.clone(),
        uid: mount.uid.unwrap_or(0),
        gid: mount.gid.unwrap_or(0),
        mode: mount.mode.unwrap_or(0o600),
        optional: !mount.required,
    })
}

/// The command as the image's history shows it, with the arguments that were in force.
fn history_text(stage: &OpenStage, args: &[String]) -> String {
    let mut given: Vec<(String, String)> = Vec::new();
    for (name, value) in &stage.args {
        let value = stage
            .state
            .env()
            .get(name)
            .map(str::to_owned)
            .or_else(|| value.clone())
            .unwrap_or_default();
        match given.iter_mut().find(|(n, _)| n == name) {
            Some(old) => old.1 = value,
            None => given.push((name.clone(), value)),
        }
    }
    let mut words = Vec::with_capacity(given.len() + args.len() + 1);
    if !given.is_empty() {
        words.push(format!("|{}", given.len()));
    }
    words.extend(given.into_iter().map(|(n, v)| format!("{n}={v}")));
    words.extend(args.iter().cloned());
    words.join(" ")
}

/// First line of a heredoc.
fn summarize(data: &str) -> String {
    let data = data.trim().replace("\r\n", "\n");
    match data.split_once('\n') {
        Some((first, _)) => format!("{first}..."),
        None => data,
    }
}

/// Variables with those that come from secrets made unreadable.
struct Masked<'a> {
    env: &'a EnvList,
    secrets: Vec<&'a str>,
}

impl<'a> Masked<'a> {
    fn new(env: &'a EnvList, mounts: &'a [Mount]) -> Self {
        let secrets =
            mounts.iter().filter(|m| m.kind == MountKind::Secret).filter_map(|m| m.env.as_deref());
        Self { env, secrets: secrets.collect() }
    }
}

impl df::Env for Masked<'_> {
    fn get(&self, name: &str) -> Option<Cow<'_, str>> {
        if self.secrets.contains(&name) {
            Some("****".into())
        } else {
            Vars(self.env).0.get(name).map(Cow::Borrowed)
        }
    }
}
