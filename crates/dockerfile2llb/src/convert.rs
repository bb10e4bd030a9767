//! One Dockerfile for one platform: stages, what they need, their bases, and the order of it all.

use crate::{
    args::{self, Globals},
    base,
    build_context::BuildContext,
    explain::ContextUse,
    failure::{Failure, Result},
    instruct::StageContext,
    named::{NamedContext, PendingLocal},
    outline::{self, Outline},
    platform::Platforms,
    stage::{Progress, SCRATCH, Scanned, Stage, Step, empty_image},
};
use shipway_dockerfile::{self as df, Command, Dockerfile, Finding, Lex, Lines, Linter, Token};
use shipway_fault::Fault;
use shipway_gocompat::{path, quote};
use shipway_llb::{Deferred, State};
use shipway_oci::{ImageConfig, Platform};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// More stages, images copied from and instructions than this are refused.
const MAX_STAGES: usize = 10_000;

/// A converted target.
#[derive(Debug)]
pub struct Converted {
    pub state: State,
    pub image: ImageConfig,
    pub base_image: Option<ImageConfig>,
    /// What a scanner sees besides the state, by name.
    pub extras: BTreeMap<String, State>,
    /// Whether the target ignores the cache.
    pub ignore_cache: bool,
    /// `SOURCE_DATE_EPOCH` in seconds.
    pub epoch: Option<i64>,
    /// Platform of operations that name none.
    pub platform: Platform,
    /// Instructions that copy from the main context.
    pub uses: Vec<ContextUse>,
    pub outline: TargetOutline,
}

/// What the target can be given.
#[derive(Clone, Debug, Default)]
pub struct TargetOutline {
    pub name: String,
    pub description: String,
    pub args: Vec<outline::ArgInfo>,
    pub secrets: Vec<outline::Asked>,
    pub ssh: Vec<outline::Asked>,
}

/// How much is converted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The target and what it needs.
    Target,
    /// Everything, for lints.
    All,
}

/// Converts `file` for `platform`; without one the worker's platform or the base image decides.
pub async fn convert(
    cx: &BuildContext,
    file: &Dockerfile,
    platform: Option<&Platform>,
    scope: Scope,
    linter: &mut Linter,
) -> Result<Converted> {
    if file.stages.is_empty() {
        return Err(Failure::new("dockerfile contains no stages to build"));
    }
    let platforms = Platforms::new(platform, cx.build_platform());
    let globals = Globals::read(cx, file, &platforms, linter).await?;
    let mut plan = Plan {
        cx,
        platforms,
        globals,
        lex: Lex::new(file.escape).part_of(&cx.work),
        stages: Vec::new(),
        names: HashMap::new(),
        pending: Vec::new(),
        scope,
    };
    plan.add_stages(file, linter)?;
    let target = plan.target()?;
    plan.add_steps(file)?;
    plan.refuse_cycles()?;
    if plan.stages.len() == 1 {
        plan.stages[0].display_name.clear();
    }
    let needed = plan.resolve(target, linter).await?;
    plan.dispatch(target, &needed, linter).await
}

/// Stages on their way.
pub struct Plan<'a> {
    pub cx: &'a BuildContext,
    pub platforms: Platforms,
    pub globals: Globals,
    pub lex: Lex,
    pub stages: Vec<Stage>,
    names: HashMap<String, usize>,
    pub scope: Scope,
    /// Local named contexts with the stage that uses them.
    pub pending: Vec<(usize, PendingLocal)>,
}

impl Plan<'_> {
    fn add_stages(&mut self, file: &Dockerfile, linter: &mut Linter) -> Result<()> {
        if file.stages.len() > MAX_STAGES {
            return Err(Failure::new(format!("the Dockerfile has more than {MAX_STAGES} stages")));
        }
        for (i, from) in file.stages.iter().enumerate() {
            let base = args::expand_from(&self.lex, from, &self.globals, linter)?;
            let (platform, mut used) =
                args::expand_platform(&self.lex, from, &self.globals, linter)?;
            used.extend(base.matched);
            let mut stage = Stage {
                name: from.name.clone(),
                description: from.description.clone(),
                base: base.text,
                source: from.source.clone(),
                lines: from.lines,
                display_name: if from.name.is_empty() {
                    format!("stage-{i}")
                } else {
                    from.name.clone()
                },
                platform,
                ..Stage::default()
            };
            if !from.name.is_empty() {
                stage.named = NamedContext::find(
                    self.cx,
                    &from.name,
                    Some(stage.platform.as_ref().unwrap_or(&self.platforms.target)),
                )?;
            }
            let replaced = stage.named.is_some();
            let index = self.add(stage);
            let stage = &mut self.stages[index];
            if replaced {
                stage.parent = None;
                continue;
            }
            let steps = from.instructions.iter();
            let steps = steps.filter(|i| {
                matches!(
                    i.command,
                    Command::Add(_) | Command::Copy(_) | Command::Run(_) | Command::Workdir(_)
                )
            });
            stage.total =
                steps.count() + usize::from(stage.base != SCRATCH && stage.parent.is_none());
            stage.ignore_cache = self.cx.options.is_no_cache(&from.name);
            stage.outline.used.extend(used);
        }
        Ok(())
    }

    /// Adds a stage; a later one of the same name takes the name over.
    fn add(&mut self, mut stage: Stage) -> usize {
        let index = self.stages.len();
        stage.parent = self.names.get(&stage.base).copied();
        stage.path_owner = index;
        stage.outline = match stage.parent {
            Some(parent) => self.stages[parent].outline.clone(),
            None => Outline { known: self.globals.declared.clone(), ..Outline::default() },
        };
        if !stage.name.is_empty() {
            self.names.insert(stage.name.to_lowercase(), index);
        }
        self.stages.push(stage);
        index
    }

    fn find(&self, name: &str) -> Option<usize> {
        self.names.get(&name.to_lowercase()).copied()
    }

    /// Names of stages, for suggestions.
    pub fn shown_names(&self) -> Vec<&str> {
        self.stages.iter().map(|s| s.display_name.as_str()).filter(|s| !s.is_empty()).collect()
    }

    /// The stage asked for, or the last (row `dfo.target`). Stages without a name cannot be asked
    /// for.
    fn target(&self) -> Result<usize> {
        let wanted = &self.cx.options.target;
        if wanted.is_empty() {
            return Ok(self.stages.len() - 1);
        }
        self.find(wanted).ok_or_else(|| {
            let mut fault =
                Fault::unknown(format!("target stage {} could not be found", quote(wanted)));
            if wanted.parse::<usize>().is_ok() {
                fault = fault.hint("stages are asked for by name: FROM … AS name");
            }
            Failure::from(fault).suggest(wanted, self.shown_names())
        })
    }

    fn add_steps(&mut self, file: &Dockerfile) -> Result<()> {
        let mut failures = Vec::new();
        for (i, from) in file.stages.iter().enumerate() {
            for instruction in &from.instructions {
                match self.step(instruction.clone(), false) {
                    Ok(step) => {
                        self.depend(i, &step);
                        self.stages[i].steps.push(step);
                    }
                    Err(failure) => failures
                        .push(failure.near(instruction.lines).about(Token::Flag("--from".into()))),
                }
            }
        }
        Failure::all(failures)
    }

    fn depend(&mut self, stage: usize, step: &Step) {
        let deps = &mut self.stages[stage].deps;
        for &source in &step.sources {
            // The last instruction that needs a stage is the one that a circle is explained with.
            match deps.iter_mut().find(|(dep, _)| *dep == source) {
                Some((_, lines)) => *lines = step.instruction.lines,
                None => deps.push((source, step.instruction.lines)),
            }
        }
    }

    /// Finds the stages that an instruction takes files from; images that are no stage become one
    /// of their own.
    fn step(&mut self, instruction: df::Instruction, trigger: bool) -> Result<Step> {
        let mut sources = Vec::new();
        match &instruction.command {
            Command::Copy(copy) if !copy.from.is_empty() => {
                let from = &copy.from;
                if self.lex.word(from, &())?.text != *from {
                    let message = "variable expansion is not supported for --from, define a new stage with FROM using ARG from global scope as a workaround";
                    return Err(Failure::new(message));
                }
                sources.push(match from.parse::<i64>() {
                    Err(_) => self
                        .find(from)
                        .map_or_else(|| self.add_image(from, instruction.lines), Ok)?,
                    Ok(n) => match usize::try_from(n) {
                        Ok(n) if n < self.stages.len() => n,
                        _ => {
                            return Err(Failure::new(format!("invalid stage index {n}"))
                                .hint("stages are counted from 0; their names are clearer"));
                        }
                    },
                });
            }
            Command::Run(run) => {
                for mount in &run.mounts {
                    let from = if mount.from.is_empty() { SCRATCH } else { &mount.from };
                    sources.push(
                        self.find(from)
                            .map_or_else(|| self.add_image(from, instruction.lines), Ok)?,
                    );
                }
            }
            _ => {}
        }
        Ok(Step { instruction, sources, trigger })
    }

    fn add_image(&mut self, name: &str, lines: Lines) -> Result<usize> {
        if self.stages.len() >= MAX_STAGES {
            return Err(Failure::new(format!(
                "the Dockerfile has more than {MAX_STAGES} stages and images"
            ))
            .at(lines));
        }
        Ok(self.add(Stage { base: name.to_owned(), lines, implicit: true, ..Stage::default() }))
    }

    fn refuse_cycles(&self) -> Result<()> {
        // Depth first; `path` holds each open stage with the next of its dependencies to look at.
        let mut seen = vec![false; self.stages.len()];
        let mut open = vec![false; self.stages.len()];
        for first in 0..self.stages.len() {
            if std::mem::replace(&mut seen[first], true) {
                continue;
            }
            let mut path = vec![(first, 0)];
            open[first] = true;
            while let Some((stage, next)) = path.last_mut() {
                let Some(&(dep, _)) = self.stages[*stage].deps.get(*next) else {
                    open[*stage] = false;
                    path.pop();
                    continue;
                };
                *next += 1;
                if open[dep] {
                    let failure = Failure::new(format!(
                        "circular dependency detected on stage: {}",
                        self.stages[first].display_name
                    ));
                    let lines =
                        path.iter().map(|(stage, next)| self.stages[*stage].deps[next - 1].1);
                    return Err(lines.fold(failure, Failure::at));
                }
                if !std::mem::replace(&mut seen[dep], true) {
                    open[dep] = true;
                    path.push((dep, 0));
                }
            }
        }
        Ok(())
    }

    /// The target and everything it needs.
    fn reachable(&self, target: usize) -> Vec<bool> {
        let mut reachable = vec![false; self.stages.len()];
        let mut todo = vec![target];
        while let Some(i) = todo.pop() {
            if !std::mem::replace(&mut reachable[i], true) {
                todo.extend(self.stages[i].parent);
                todo.extend(self.stages[i].deps.iter().map(|(dep, _)| *dep));
            }
        }
        reachable
    }

    /// Resolves the bases of all stages that the target needs; triggers of base images may add to
    /// what it needs.
    async fn resolve(&mut self, target: usize, linter: &mut Linter) -> Result<Vec<bool>> {
        loop {
            let reachable = self.reachable(target);
            // Triggers are those of what the target needs, also where everything is looked at.
            let wanted = if self.scope == Scope::All {
                vec![true; self.stages.len()]
            } else {
                reachable.clone()
            };
            base::resolve(self, &wanted, linter).await?;
            let mut more = false;
            for (i, needed) in reachable.into_iter().enumerate() {
                if needed && !self.stages[i].implicit {
                    more |= self.read_triggers(i)?;
                }
            }
            if !more {
                return Ok(wanted);
            }
        }
    }

    /// Puts the triggers of a stage's base in front of its own instructions (row `df.onbuild`).
    fn read_triggers(&mut self, i: usize) -> Result<bool> {
        self.inherit(i);
        let mut triggers = std::mem::take(&mut self.stages[i].image.config.on_build);
        if let Some(parent) = self.stages[i].parent
            && !std::mem::replace(&mut self.stages[i].triggers_read, true)
        {
            triggers.extend(self.stages[parent].steps.iter().filter_map(|step| {
                match &step.instruction.command {
                    Command::Onbuild(onbuild) => Some(onbuild.trigger.clone()),
                    _ => None,
                }
            }));
        }
        let lines = self.stages[i].lines;
        let mut steps = Vec::with_capacity(triggers.len());
        let mut more = false;
        for trigger in triggers {
            let instruction = df::parse_trigger(&trigger, lines)
                .map_err(|e| Failure::from(e).only_at(lines).of_trigger())?;
            let step = self.step(instruction, true).map_err(|e| e.only_at(lines).of_trigger())?;
            more |= !step.sources.is_empty();
            self.depend(i, &step);
            steps.push(step);
        }
        let stage = &mut self.stages[i];
        stage.total += steps.len();
        stage.steps.splice(0..0, steps);
        Ok(more)
    }

    /// Takes over what the stage it is built on has become.
    fn inherit(&mut self, i: usize) {
        let Some(parent) = self.stages[i].parent else { return };
        let parent = &self.stages[parent];
        let (state, platform, base_image) =
            (parent.state.clone(), parent.platform.clone(), parent.base_image.clone());
        let (path_owner, workdir_set, inherited) =
            (parent.path_owner, parent.workdir_set, parent.args.clone());
        let mut image = parent.image.clone();
        image.config.on_build.clear();
        let stage = &mut self.stages[i];
        (stage.state, stage.platform, stage.image, stage.base_image) =
            (state, platform, image, base_image);
        (stage.path_owner, stage.workdir_set) = (path_owner, workdir_set);
        stage.args.extend(inherited);
    }

    async fn dispatch(
        mut self,
        target: usize,
        needed: &[bool],
        linter: &mut Linter,
    ) -> Result<Converted> {
        let context = Deferred::default();
        let ignore = self.cx.ignore().await?;
        let mut paths: Vec<BTreeSet<String>> = vec![BTreeSet::new(); self.stages.len()];
        let mut context_paths = BTreeSet::new();
        let mut uses = Vec::new();
        let mut failures = Vec::new();
        for (i, needed) in needed.iter().enumerate() {
            if !needed || self.stages[i].is_converted() {
                continue;
            }
            self.inherit(i);
            // The stage is taken out while its instructions look at the others.
            let mut stage = std::mem::take(&mut self.stages[i]);
            let mut stage_cx = StageContext {
                plan: &self,
                context: context.state(),
                ignore,
                linter: &mut *linter,
                paths: &mut paths,
                comments: Vec::new(),
                in_trigger: false,
                failures: Vec::new(),
            };
            stage_cx.run_stage(&mut stage)?;
            failures.append(&mut stage_cx.failures);
            stage.progress = Progress::Converted;
            stage.scanned = Scanned::of(&stage, &self.globals.env);
            context_paths.append(&mut stage.context_paths);
            uses.append(&mut stage.uses);
            self.stages[i] = stage;
        }
        Failure::all(failures)?;
        linter.error()?;
        // The target is read whole.
        paths[self.stages[target].path_owner].insert("/".into());
        for (stage, pending) in self.pending.drain(..) {
            pending.decide(&follow(&paths[self.stages[stage].path_owner]));
        }
        context.decide(self.cx.main_context(&follow(&context_paths)).await?);
        let extras = self.extras(target, &context);
        Ok(Converted { extras, ..self.finish(target, uses) })
    }

    /// What a scanner sees besides the result.
    fn extras(&self, target: usize, context: &Deferred) -> BTreeMap<String, State> {
        let mut extras = BTreeMap::new();
        if self.stages[target].scanned.context {
            extras.insert("context".to_owned(), context.state());
        }
        let mut seen = vec![false; self.stages.len()];
        let mut todo = vec![target];
        while let Some(i) = todo.pop() {
            if std::mem::replace(&mut seen[i], true) {
                continue;
            }
            let stage = &self.stages[i];
            if i != target && stage.scanned.stage {
                extras.insert(stage.name.clone(), stage.state.clone());
            }
            todo.extend(stage.deps.iter().map(|(dep, _)| *dep).chain(stage.parent));
        }
        extras
    }

    fn outline(&self, target: usize) -> TargetOutline {
        // The target first, then what it is built on, then what it takes from: the first to know an
        // argument describes it.
        let mut order = Vec::new();
        let mut seen = vec![false; self.stages.len()];
        let mut todo = vec![target];
        while let Some(i) = todo.pop() {
            if !std::mem::replace(&mut seen[i], true) {
                order.push(&self.stages[i]);
                todo.extend(self.stages[i].deps.iter().rev().map(|(dep, _)| *dep));
                todo.extend(self.stages[i].parent);
            }
        }
        let (args, secrets, ssh) = outline::collect(order.into_iter());
        let stage = &self.stages[target];
        TargetOutline {
            name: stage.name.clone(),
            description: stage.description.clone(),
            args,
            secrets,
            ssh,
        }
    }

    fn finish(mut self, target: usize, uses: Vec<ContextUse>) -> Converted {
        let outline = self.outline(target);
        let stage = std::mem::take(&mut self.stages[target]);
        let mut image = stage.image;
        image.config.labels.extend(self.cx.options.labels.clone());
        let wanted = &self.platforms.target;
        if !self.platforms.implicit {
            let same = wanted.os == image.os && wanted.architecture == image.architecture;
            image.os.clone_from(&wanted.os);
            image.architecture.clone_from(&wanted.architecture);
            if !wanted.variant.is_empty() || !same {
                image.variant.clone_from(&wanted.variant);
            }
            if !wanted.os_version.is_empty() || !same {
                image.os_version.clone_from(&wanted.os_version);
            }
            if !wanted.os_features.is_empty() {
                image.os_features.clone_from(&wanted.os_features);
            }
        }
        let normal = image.platform();
        (image.os, image.architecture, image.variant) =
            (normal.os, normal.architecture, normal.variant);
        Converted {
            state: stage.state,
            image,
            base_image: stage.base_image,
            extras: BTreeMap::new(),
            ignore_cache: stage.ignore_cache,
            epoch: self.globals.epoch,
            platform: self.platforms.target,
            uses,
            outline,
        }
    }
}

/// The paths to follow of a source, sorted; none when all of it is used.
fn follow(used: &BTreeSet<String>) -> Vec<String> {
    if used.contains("/") {
        return Vec::new();
    }
    let mut follow: Vec<String> =
        used.iter().map(|p| path::clean(p.trim_start_matches('/'))).collect();
    follow.sort();
    follow
}

/// Lints what a base image says of its platform.
pub fn lint_platform(
    linter: &mut Linter,
    name: &str,
    expected: &Platform,
    image: &ImageConfig,
    lines: Lines,
) {
    if expected.os == image.os && expected.architecture == image.architecture {
        return;
    }
    let (expected, actual) = (
        crate::platform::full(&expected.clone().normalized()),
        crate::platform::full(&image.platform()),
    );
    linter.report(
        Finding::InvalidBaseImagePlatform { image: name, expected: &expected, actual: &actual },
        lines,
        &[],
    );
}

/// A stage that is nothing but an empty filesystem.
pub fn make_scratch(stage: &mut Stage, platform: &Platform) {
    stage.state = State::scratch();
    stage.image = empty_image(platform);
    stage.platform = Some(platform.clone());
    stage.convert_if_implicit();
}
