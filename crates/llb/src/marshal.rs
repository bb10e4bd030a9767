//! States to definitions, with the same bytes, metadata and order as Go's client (rows `llb.def`,
//! `llb.digest`, `llb.terminal`).

use crate::{
    Caps, Definition, Location, MountKind, Op, OpMetadata, SourceLocation, SourceMap, attr, encode,
    ops::{
        ContentCache, DiffOp, ExecOp, FileAction, FileActionKind, FileOp, MergeOp, NetMode, Owner,
        PassthroughOp, SecurityMode, SourceOp,
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
                    .or(spec.platform.as_ref())
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
        let mut op = spec.op.clone();
        if op.meta.args.is_empty() {
            return Err(Fault::invalid("arguments are required"));
        }
        if op.meta.cwd.is_empty() {
            return Err(Fault::invalid("working directory is required"));
        }
        let mut env = (*spec.env).clone();
        let agent = op.mounts.iter().find(|mount| matches!(mount.kind, MountKind::Ssh(_)));
        if let Some(agent) = agent
            && env.get("SSH_AUTH_SOCK").is_none()
        {
            env.set("SSH_AUTH_SOCK", agent.dest.as_str());
        }
        if let Some(caps) = &self.options.caps {
            if caps.has("exec.meta.setsdefaultpath") {
                metadata.caps.insert("exec.meta.setsdefaultpath".into());
            } else if platform.os != "windows" && env.get("PATH").is_none() {
                env.set("PATH", DEFAULT_PATH);
            }
        }
        op.meta.env = env.to_vec();
        let mut table = Table::default();
        for mount in &mut op.mounts {
            mount.input = mount.input.and_then(|i| inputs[i]).map(|i| table.add(i));
        }
        exec_caps(&op, metadata);
        Ok((table.0, op))
    }
}

/// The capabilities that a process needs, as Go's client finds them.
fn exec_caps(op: &ExecOp, metadata: &mut OpMetadata) {
    let has_resources = metadata.resources.is_some();
    let mut cap = |name: &str, needed: bool| {
        if needed {
            metadata.caps.insert(name.into());
        }
    };
    cap("exec.validexitcode", !op.meta.valid_exit_codes.is_empty());
    cap("exec.meta.ulimit", !op.meta.ulimits.is_empty());
    cap("exec.meta.linux.resources", has_resources);
    cap("exec.meta.network", op.network != NetMode::Unset);
    cap("exec.meta.security", op.security == SecurityMode::Insecure);
    cap("exec.meta.proxyenv", op.meta.proxy.is_some());
    cap("exec.meta.base", true);
    for mount in &op.mounts {
        cap("exec.mount.selector", !mount.selector.is_empty());
        match &mount.kind {
            MountKind::Cache(_) => {
                cap("exec.mount.cache", true);
                cap("exec.mount.cache.sharing", true);
            }
            MountKind::Tmpfs { size } => {
                cap("exec.mount.tmpfs", true);
                cap("exec.mount.tmpfs.size", *size > 0);
            }
            MountKind::Bind => cap("exec.mount.bind", mount.input.is_some()),
            MountKind::Secret(_) => cap("exec.mount.secret", true),
            MountKind::Ssh(_) => cap("exec.mount.ssh", true),
        }
        cap("exec.mount.cache.content", mount.content_cache != ContentCache::Default);
    }
    // Also for those that are variables only.
    cap("exec.mount.secret", !op.secret_env.is_empty());
    cap("exec.secretenv", !op.secret_env.is_empty());
    cap("exec.meta.cdi", !op.devices.is_empty());
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
