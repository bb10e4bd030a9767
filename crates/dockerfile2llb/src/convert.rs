//! One Dockerfile for one platform: stages, what they need, their bases, and the order of it all.

use crate::{
    args::Globals,
    base,
    build_context::BuildContext,
    error::{ConvertError, Result},
    explain::ContextUse,
    instruct::StageContext,
    outline,
    plan::{Plan, Scope},
    platform::Platforms,
    stage::{Base, ConvertedStage, OpenStage, Phase, Step},
};
use shipway_dockerfile::{self as df, Command, Dockerfile, Linter};
use shipway_fault::Fault;
use shipway_gocompat::path;
use shipway_llb::{Deferred, State};
use shipway_oci::{ImageConfig, Platform};
use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
};

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

/// Converts `file` for `platform`; without one the worker's platform or the base image decides.
pub async fn convert(
    cx: &BuildContext,
    file: &Dockerfile,
    platform: Option<&Platform>,
    scope: Scope,
    linter: &mut Linter,
) -> Result<Converted> {
    if file.stages.is_empty() {
        return Err(ConvertError::new("dockerfile contains no stages to build"));
    }
    let platforms = Platforms::new(platform, cx.build_platform());
    let globals = Globals::read(cx, file, &platforms, linter).await?;
    let (mut plan, target) = Plan::of(cx, file, platforms, globals, scope, linter)?;
    let needed = plan.resolve(target, linter).await?;
    plan.dispatch(target, &needed, linter).await
}

impl Plan<'_> {
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
                if needed && self.stages[i].declared.is_some() {
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
        let triggers = self.new_triggers(i);
        let lines = self.stages[i].lines;
        let mut steps = Vec::with_capacity(triggers.len());
        let mut more = false;
        for trigger in triggers {
            let instruction = df::parse_trigger(&trigger, lines)
                .map_err(|e| ConvertError::from(e).only_at(lines).of_trigger())?;
            let step = self.step(instruction, true).map_err(|e| e.only_at(lines).of_trigger())?;
            more |= !step.sources.is_empty();
            self.depend(i, &step);
            steps.push(step);
        }
        if let Some(declared) = &mut self.stages[i].declared {
            declared.titles.total += steps.len();
            declared.steps.splice(0..0, steps);
        }
        Ok(more)
    }

    /// The triggers of a stage's base, the first time.
    fn new_triggers(&mut self, i: usize) -> Vec<String> {
        let stage = &mut self.stages[i];
        match (&mut stage.base, &mut stage.phase) {
            (Base::Stage { index, triggers_read }, _) => {
                let (index, read) = (*index, mem::replace(triggers_read, true));
                let steps = if read { &[] } else { self.stages[index].steps() };
                let trigger = |step: &Step| match &step.instruction.command {
                    Command::Onbuild(onbuild) => Some(onbuild.trigger.clone()),
                    _ => None,
                };
                steps.iter().filter_map(trigger).collect()
            }
            (_, Phase::Resolved(rootfs) | Phase::Converted(ConvertedStage { rootfs, .. })) => {
                mem::take(&mut rootfs.image.config.on_build)
            }
            (_, Phase::Waiting | Phase::Open) => Vec::new(),
        }
    }

    /// Begins to convert the instructions of a stage whose base is known.
    fn open(&mut self, i: usize) -> Result<OpenStage> {
        let phase = mem::replace(&mut self.stages[i].phase, Phase::Open);
        let (stage, target) = (&self.stages[i], &self.platforms.target);
        let outline = stage.outline.clone();
        let opened = match (&stage.declared, &stage.base, phase) {
            (Some(declared), Base::Stage { index, .. }, _) => {
                let base = self.stages[*index].converted();
                base.map(|base| OpenStage::on_stage(declared, outline, base, target))
            }
            (Some(declared), _, Phase::Resolved(rootfs)) => {
                Some(OpenStage::on_rootfs(i, declared, outline, rootfs, target))
            }
            _ => None,
        };
        opened.ok_or_else(|| {
            ConvertError::from(Fault::internal("a stage is converted before its base"))
                .at(stage.lines)
        })
    }

    /// The stage that records which paths of stage `i` are used.
    fn path_owner(&self, i: usize) -> usize {
        self.stages[i].converted().map_or(i, |stage| stage.path_owner)
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
            if !needed || self.stages[i].converted().is_some() {
                continue;
            }
            let mut open = self.open(i)?;
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
            stage_cx.run_stage(&mut open, self.stages[i].steps())?;
            failures.append(&mut stage_cx.failures);
            context_paths.append(&mut open.context_paths);
            uses.append(&mut open.uses);
            let stage = &mut self.stages[i];
            stage.outline = mem::take(&mut open.outline);
            stage.phase = Phase::Converted(open.converted(stage.name(), &self.globals.env));
        }
        ConvertError::all(failures)?;
        linter.error()?;
        // The target is read whole.
        paths[self.path_owner(target)].insert("/".into());
        for (stage, pending) in mem::take(&mut self.pending) {
            pending.decide(&follow(&paths[self.path_owner(stage)]));
        }
        context.decide(self.cx.main_context(&follow(&context_paths)).await?);
        let extras = self.extras(target, &context);
        Ok(Converted { extras, ..self.finish(target, uses)? })
    }

    /// What a scanner sees besides the result.
    fn extras(&self, target: usize, context: &Deferred) -> BTreeMap<String, State> {
        let mut extras = BTreeMap::new();
        if self.stages[target].converted().is_some_and(|stage| stage.scanned.context) {
            extras.insert("context".to_owned(), context.state());
        }
        let mut seen = vec![false; self.stages.len()];
        let mut todo = vec![target];
        while let Some(i) = todo.pop() {
            if std::mem::replace(&mut seen[i], true) {
                continue;
            }
            let stage = &self.stages[i];
            if let Some(converted) = stage.converted().filter(|c| i != target && c.scanned.stage) {
                extras.insert(stage.name().to_owned(), converted.rootfs.state.clone());
            }
            todo.extend(stage.deps.iter().map(|(dep, _)| *dep).chain(stage.parent()));
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
                order.push(&self.stages[i].outline);
                todo.extend(self.stages[i].deps.iter().rev().map(|(dep, _)| *dep));
                todo.extend(self.stages[i].parent());
            }
        }
        let (args, secrets, ssh) = outline::collect(order.into_iter());
        let stage = &self.stages[target];
        TargetOutline {
            name: stage.name().to_owned(),
            description: stage
                .declared
                .as_ref()
                .map_or_else(String::new, |d| d.description.clone()),
            args,
            secrets,
            ssh,
        }
    }

    fn finish(self, target: usize, uses: Vec<ContextUse>) -> Result<Converted> {
        let outline = self.outline(target);
        let stage = &self.stages[target];
        let Some(ConvertedStage { rootfs, .. }) = stage.converted().cloned() else {
            return Err(ConvertError::from(Fault::internal("the target was not converted")));
        };
        let mut image = rootfs.image;
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
        Ok(Converted {
            state: rootfs.state,
            image,
            base_image: rootfs.base_image,
            extras: BTreeMap::new(),
            ignore_cache: stage.declared.as_ref().is_some_and(|d| d.ignore_cache),
            epoch: self.globals.epoch,
            platform: self.platforms.target,
            uses,
            outline,
        })
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
