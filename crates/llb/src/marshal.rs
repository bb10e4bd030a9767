//! States to definitions, with the same bytes, metadata and order as Go's client (rows `llb.def`,
//! `llb.digest`, `llb.terminal`).

use crate::{
    Caps, Definition, Location, Mount, MountKind, Op, OpMetadata, SourceMap, attr,
    draft::{MountSource, SourceLocation},
    encode,
    ops::{
        CacheMount, DiffOp, ExecMeta, ExecOp, FileAction, FileActionKind, FileOp, MergeOp, NetMode,
        Owner, PassthroughOp, SecretEnv, SecretMount, SecurityMode, SourceOp, SshMount,
    },
    state::{Draft, DraftKind, ExecSpec, FileStep, Output, OutputKind, State},
};
use bytes::Bytes;
use shipway_fault::Fault;
use shipway_oci::{Digest, Platform};
use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

/// Search path of processes whose image has none.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a definition is marshalled for.
#[derive(Clone, Debug)]
pub struct MarshalOptions {
    /// Platform of operations that name none.
    pub platform: Platform,
    /// What the daemon can; `None` when unknown.
    pub caps: Option<Caps>,
    /// `local.unique` of local sources without a session.
    pub local_unique_id: String,
}

/// A marshalled input: digest and output.
type Input = (Digest, usize);

impl State {
    /// The definition of the state; empty for scratch.
    pub fn marshal(&self, options: &MarshalOptions) -> Result<Definition, Fault> {
        let Some((vertex, index)) = self.out.as_ref().map(resolve).transpose()?.flatten() else {
            return Ok(Definition::default());
        };
        let mut run = Run {
            options,
            digests: HashMap::new(),
            seen: HashSet::new(),
            definition: Definition::default(),
            map: SourceMap::default(),
        };
        run.reach(&vertex)?;
        let digest = run.digests[&Arc::as_ptr(&vertex)];
        let Run { mut definition, map, .. } = run;
        let terminal = encode::terminal(digest, index);
        let mut metadata = OpMetadata::default();
        metadata.caps.extend(["constraints".to_owned(), "platform".to_owned()]);
        for m in definition.metadata.values() {
            let caps = [
                (m.ignore_cache, "meta.ignorecache"),
                (!m.description.is_empty(), "meta.description"),
                (m.export_cache.is_some(), "meta.exportcache"),
            ];
            metadata
                .caps
                .extend(caps.into_iter().filter(|(used, _)| *used).map(|(_, cap)| cap.to_owned()));
        }
        definition.metadata.insert(Digest::of(&terminal).to_string(), metadata);
        definition.ops.push(terminal);
        definition.source = Some(Arc::new(map));
        Ok(definition)
    }
}

/// Follows decided states; `None` is scratch.
fn resolve(output: &Output) -> Result<Option<(Arc<Draft>, usize)>, Fault> {
    let mut output = output;
    loop {
        match &output.0 {
            OutputKind::Of { vertex, index } => return Ok(Some((vertex.clone(), *index))),
            OutputKind::Later(later) => match later.get() {
                None => {
                    return Err(Fault::internal(
                        "a deferred state was marshalled before it was decided",
                    ));
                }
                Some(state) => match &state.out {
                    None => return Ok(None),
                    Some(next) => output = next,
                },
            },
        }
    }
}

struct Run<'a> {
    options: &'a MarshalOptions,
    digests: HashMap<*const Draft, Digest>,
    seen: HashSet<Digest>,
    definition: Definition,
    map: SourceMap,
}

impl Run<'_> {
    /// Depth first with an explicit stack: chains can be as long as a Dockerfile.
    fn reach(&mut self, root: &Arc<Draft>) -> Result<(), Fault> {
        let mut stack = vec![(root.clone(), false)];
        while let Some((draft, inputs_done)) = stack.pop() {
            if self.digests.contains_key(&Arc::as_ptr(&draft)) {
                continue;
            }
            if inputs_done {
                self.add(&draft)?;
                continue;
            }
            let mut inputs = draft.inputs.iter().map(resolve).collect::<Result<Vec<_>, _>>()?;
            if matches!(draft.kind, DraftKind::File(_)) && inputs.len() > 2 {
                // Go's client visits the base first and then the copies' sources, last one first.
                let from = usize::from(
                    matches!(&draft.kind, DraftKind::File(steps) if steps[0].base.is_some()),
                );
                inputs[from..].reverse();
            }
            stack.push((draft, true));
            stack.extend(inputs.into_iter().rev().flatten().map(|(vertex, _)| (vertex, false)));
        }
        Ok(())
    }

    fn add(&mut self, draft: &Arc<Draft>) -> Result<(), Fault> {
        let mut inputs: Vec<Option<Input>> = Vec::with_capacity(draft.inputs.len());
        for input in &draft.inputs {
            inputs.push(
                resolve(input)?.map(|(vertex, index)| (self.digests[&Arc::as_ptr(&vertex)], index)),
            );
        }
        let mut metadata = draft.options.metadata.clone();
        let bytes = self.encode(draft, &inputs, &mut metadata)?;
        let digest = Digest::of(&bytes);
        self.digests.insert(Arc::as_ptr(draft), digest);
        let text = digest.to_string();
        self.definition.metadata.entry(text.clone()).or_default().merge(&metadata);
        let locations: Vec<Location> =
            draft.options.locations.iter().map(|l| self.location(l)).collect();
        self.map.locations.entry(text).or_default().extend(locations);
        if self.seen.insert(digest) {
            self.definition.ops.push(bytes);
        }
        Ok(())
    }

    fn location(&mut self, location: &SourceLocation) -> Location {
        let same = |f: &Arc<_>| Arc::ptr_eq(f, &location.file) || **f == *location.file;
        let file = self.map.files.iter().position(same).unwrap_or_else(|| {
            self.map.files.push(location.file.clone());
            self.map.files.len() - 1
        });
        Location { file, spans: location.spans.clone() }
    }

    fn encode(
        &self,
        draft: &Draft,
        inputs: &[Option<Input>],
        metadata: &mut OpMetadata,
    ) -> Result<Bytes, Fault> {
        let options = &draft.options;
        let platform = options.platform.as_ref().unwrap_or(&self.options.platform);
        match &draft.kind {
            DraftKind::Foreign(bytes) => Ok(bytes.clone()),
            DraftKind::Source { identifier, attrs } => {
                let mut attrs = attrs.clone();
                if identifier.starts_with("local://") && !attrs.contains_key(attr::LOCAL_SESSION) {
                    attrs.insert(attr::LOCAL_UNIQUE.into(), self.options.local_unique_id.clone());
                    metadata.caps.insert("source.local.unique".into());
                }
                let specific = identifier.starts_with("docker-image://")
                    || identifier.starts_with("oci-layout://");
                let op = Op::Source(SourceOp { identifier: identifier.clone(), attrs });
                Ok(encode::op(&[], &op, specific.then_some(platform), &options.constraints))
            }
            DraftKind::Exec(spec) => {
                let platform = options
                    .platform
                    .as_ref()
                    .or(spec.defaults.platform.as_ref())
                    .unwrap_or(&self.options.platform);
                let (inputs, op) = self.exec(spec, inputs, platform, metadata)?;
                Ok(encode::op(&inputs, &Op::Exec(op), Some(platform), &options.constraints))
            }
            DraftKind::File(steps) => {
                let (inputs, op) = file(steps, inputs);
                Ok(encode::op(&inputs, &Op::File(op), None, &options.constraints))
            }
            DraftKind::Merge => {
                let inputs: Vec<Input> = inputs.iter().flatten().copied().collect();
                let op = Op::Merge(MergeOp { inputs: (0..inputs.len()).map(Some).collect() });
                Ok(encode::op(&inputs, &op, None, &options.constraints))
            }
            DraftKind::Diff { lower, upper } => {
                let mut table = Table::default();
                let lower = lower.and_then(|i| inputs[i]).map(|i| table.push(i));
                let upper = upper.and_then(|i| inputs[i]).map(|i| table.push(i));
                Ok(encode::op(
                    &table.0,
                    &Op::Diff(DiffOp { lower, upper }),
                    None,
                    &options.constraints,
                ))
            }
            DraftKind::Passthrough { id, outputs } => {
                let inputs: Vec<Input> = inputs.iter().flatten().copied().collect();
                let op =
                    Op::Passthrough(PassthroughOp { id: id.clone(), outputs: outputs.clone() });
                Ok(encode::op(&inputs, &op, None, &options.constraints))
            }
        }
    }

    fn exec(
        &self,
        spec: &ExecSpec,
        inputs: &[Option<Input>],
        platform: &Platform,
        metadata: &mut OpMetadata,
    ) -> Result<(Vec<Input>, ExecOp), Fault> {
        let (draft, defaults) = (&spec.draft, &spec.defaults);
        if draft.args.is_empty() {
            return Err(Fault::invalid("arguments are required"));
        }
        if defaults.dir.is_empty() {
            return Err(Fault::invalid("working directory is required"));
        }
        let mut env = (*spec.env).clone();
        let ssh_target = |i: usize| match draft.ssh[i].target.as_str() {
            "" => format!("/run/buildkit/ssh_agent.{i}"),
            target => target.to_owned(),
        };
        if !draft.ssh.is_empty() && env.get("SSH_AUTH_SOCK").is_none() {
            env.set("SSH_AUTH_SOCK", ssh_target(0));
        }
        if let Some(caps) = &self.options.caps {
            if caps.has("exec.meta.setsdefaultpath") {
                metadata.caps.insert("exec.meta.setsdefaultpath".into());
            } else if platform.os != "windows" && env.get("PATH").is_none() {
                env.set("PATH", DEFAULT_PATH);
            }
        }
        let network = draft.network.unwrap_or(defaults.network);
        let security = draft.security.unwrap_or(defaults.security);
        exec_caps(spec, inputs, network, security, metadata);
        let mut table = Table::default();
        let mut output = 0;
        let mut mounts = Vec::with_capacity(spec.mounts.len());
        for (m, input) in &spec.mounts {
            let input = input.and_then(|i| inputs[i]).map(|i| table.add(i));
            let out = m.has_output().then(|| {
                output += 1;
                output - 1
            });
            let kind = match &m.source {
                MountSource::State(_) => MountKind::Bind,
                MountSource::Cache { id, sharing, .. } => {
                    MountKind::Cache(CacheMount { id: id.clone(), sharing: *sharing })
                }
                MountSource::Tmpfs(size) => MountKind::Tmpfs { size: *size },
            };
            mounts.push(Mount {
                input,
                selector: m.selector.clone(),
                dest: m.target.clone(),
                output: out,
                readonly: m.readonly,
                kind,
                content_cache: m.content_cache,
                result_id: String::new(),
            });
        }
        let mut secret_env = Vec::new();
        for s in &draft.secrets {
            if let Some(name) = &s.env {
                secret_env.push(SecretEnv {
                    id: s.id.clone(),
                    name: name.clone(),
                    optional: s.optional,
                });
            }
            if let Some(target) = &s.target {
                let secret = SecretMount {
                    id: s.id.clone(),
                    uid: s.uid,
                    gid: s.gid,
                    mode: s.mode,
                    optional: s.optional,
                };
                mounts.push(Mount {
                    dest: target.clone(),
                    kind: MountKind::Secret(secret),
                    ..Mount::default()
                });
            }
        }
        for (i, s) in draft.ssh.iter().enumerate() {
            let ssh = SshMount {
                id: s.id.clone(),
                uid: s.uid,
                gid: s.gid,
                mode: s.mode,
                optional: s.optional,
            };
            mounts.push(Mount {
                dest: ssh_target(i),
                kind: MountKind::Ssh(ssh),
                ..Mount::default()
            });
        }
        let meta = ExecMeta {
            args: draft.args.clone(),
            env: env.to_vec(),
            cwd: defaults.dir.clone(),
            user: defaults.user.clone(),
            proxy: draft.proxy.clone(),
            extra_hosts: defaults.extra_hosts.iter().chain(&draft.extra_hosts).cloned().collect(),
            hostname: defaults.hostname.clone(),
            ulimits: draft.ulimits.clone(),
            cgroup_parent: draft.cgroup_parent.clone(),
            remove_mount_stubs_recursive: true,
            valid_exit_codes: draft.valid_exit_codes.clone(),
        };
        Ok((
            table.0,
            ExecOp {
                meta,
                mounts,
                network,
                // The wire has it among the constraints, which are the vertex's.
                named_network: None,
                security,
                secret_env,
                devices: draft.devices.clone(),
                proxied: false,
            },
        ))
    }
}

/// The capabilities that a process needs, as Go's client finds them.
fn exec_caps(
    spec: &ExecSpec,
    inputs: &[Option<Input>],
    network: NetMode,
    security: SecurityMode,
    metadata: &mut OpMetadata,
) {
    let draft = &spec.draft;
    let has_resources = metadata.resources.is_some();
    let mut cap = |name: &str, needed: bool| {
        if needed {
            metadata.caps.insert(name.into());
        }
    };
    cap("exec.validexitcode", !draft.valid_exit_codes.is_empty());
    cap("exec.meta.ulimit", !draft.ulimits.is_empty());
    cap("exec.meta.linux.resources", has_resources);
    cap("exec.meta.network", network != NetMode::Unset);
    cap("exec.meta.security", security == SecurityMode::Insecure);
    cap("exec.meta.proxyenv", draft.proxy.is_some());
    cap("exec.meta.base", true);
    for (m, input) in &spec.mounts {
        cap("exec.mount.selector", !m.selector.is_empty());
        match &m.source {
            MountSource::Cache { .. } => {
                cap("exec.mount.cache", true);
                cap("exec.mount.cache.sharing", true);
            }
            MountSource::Tmpfs(size) => {
                cap("exec.mount.tmpfs", true);
                cap("exec.mount.tmpfs.size", *size > 0);
            }
            MountSource::State(_) => {
                cap("exec.mount.bind", input.and_then(|i| inputs[i]).is_some())
            }
        }
        cap("exec.mount.cache.content", m.content_cache != crate::ContentCache::Default);
    }
    cap("exec.mount.secret", !draft.secrets.is_empty());
    cap("exec.secretenv", draft.secrets.iter().any(|s| s.env.is_some()));
    cap("exec.mount.ssh", !draft.ssh.is_empty());
    cap("exec.meta.cdi", !draft.devices.is_empty());
}

/// Inputs of one operation without repetitions.
#[derive(Default)]
struct Table(Vec<Input>);

impl Table {
    fn add(&mut self, input: Input) -> usize {
        self.0.iter().position(|i| *i == input).unwrap_or_else(|| self.push(input))
    }

    fn push(&mut self, input: Input) -> usize {
        self.0.push(input);
        self.0.len() - 1
    }
}

fn file(steps: &[FileStep], inputs: &[Option<Input>]) -> (Vec<Input>, FileOp) {
    let mut table = Table::default();
    let resolved: Vec<(Option<usize>, Option<usize>)> = steps
        .iter()
        .map(|step| {
            let mut index = |i: Option<usize>| i.and_then(|i| inputs[i]).map(|i| table.add(i));
            (index(step.base), index(step.source))
        })
        .collect();
    let count = table.0.len();
    let actions = steps.iter().zip(resolved).enumerate().map(|(i, (step, (base, secondary)))| {
        let mut kind = step.kind.clone();
        rebase(&mut kind, base);
        FileAction {
            input: if i == 0 { base } else { Some(count + i - 1) },
            secondary,
            output: (i + 1 == steps.len()).then_some(0),
            kind,
        }
    });
    let op = FileOp { actions: actions.collect() };
    (table.0, op)
}

/// Points names of owners at the base as it is numbered on the wire.
fn rebase(kind: &mut FileActionKind, base: Option<usize>) {
    let owner = match kind {
        FileActionKind::Copy(c) => &mut c.owner,
        FileActionKind::Mkfile(m) => &mut m.owner,
        FileActionKind::Mkdir(m) => &mut m.owner,
        FileActionKind::Symlink(s) => &mut s.owner,
        FileActionKind::Rm(_) => return,
    };
    for who in owner.iter_mut().flat_map(|o| [&mut o.user, &mut o.group]).flatten() {
        if let Owner::Name { input, .. } = who {
            *input = base;
        }
    }
}
