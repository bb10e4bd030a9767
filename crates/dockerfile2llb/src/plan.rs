//! The stages of one Dockerfile for one platform, and what each needs of the others.

use crate::{
    args::{self, Globals},
    build_context::BuildContext,
    error::{ConvertError, Result},
    named::{NamedContext, PendingLocal},
    outline::Outline,
    platform::Platforms,
    stage::{Base, Declared, Phase, SCRATCH, Stage, Step, Titles},
};
use shipway_dockerfile::{self as df, Command, Dockerfile, Lex, Lines, Linter, Token};
use shipway_fault::Fault;
use shipway_gocompat::quote;
use std::collections::HashMap;

/// More stages, images copied from and instructions than this are refused.
const MAX_STAGES: usize = 10_000;

/// How much is converted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The target and what it needs.
    Target,
    /// Everything, for lints.
    All,
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

impl<'a> Plan<'a> {
    /// The stages of `file` and what they need, as far as that is known before their bases are.
    pub fn of(
        cx: &'a BuildContext,
        file: &Dockerfile,
        platforms: Platforms,
        globals: Globals,
        scope: Scope,
        linter: &mut Linter,
    ) -> Result<(Self, usize)> {
        let mut plan = Self {
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
        if let [Stage { declared: Some(only), .. }] = plan.stages.as_mut_slice() {
            only.titles.stage.clear();
        }
        Ok((plan, target))
    }
}

impl Plan<'_> {
    fn add_stages(&mut self, file: &Dockerfile, linter: &mut Linter) -> Result<()> {
        if file.stages.len() > MAX_STAGES {
            return Err(ConvertError::new(format!(
                "the Dockerfile has more than {MAX_STAGES} stages"
            )));
        }
        for (i, from) in file.stages.iter().enumerate() {
            let base = args::expand_from(&self.lex, from, &self.globals, linter)?;
            let (platform, mut used) =
                args::expand_platform(&self.lex, from, &self.globals, linter)?;
            used.extend(base.matched);
            let named = match from.name.as_str() {
                "" => None,
                name => {
                    let platform = platform.as_ref().unwrap_or(&self.platforms.target);
                    NamedContext::find(self.cx, name, Some(platform))?
                }
            };
            let (parent, mut outline) = self.parent(&base.text);
            let base = match (named, parent) {
                (Some(named), _) => Base::Context { named: Box::new(named), written: base.text },
                (None, Some(index)) => Base::Stage { index, triggers_read: false },
                (None, None) => Base::without_stage(base.text),
            };
            let stage = if from.name.is_empty() { format!("stage-{i}") } else { from.name.clone() };
            let mut titles = Titles { stage, ..Titles::default() };
            let replaced = matches!(base, Base::Context { .. });
            if !replaced {
                titles.total = from.instructions.iter().filter(|i| has_vertex(&i.command)).count();
                titles.total += usize::from(matches!(base, Base::Image(_)));
                outline.used.extend(used);
            }
            let declared = Declared {
                name: from.name.clone(),
                description: from.description.clone(),
                source: from.source.clone(),
                steps: Vec::new(),
                ignore_cache: !replaced && self.cx.options.is_no_cache(&from.name),
                titles,
            };
            // A later one of the same name takes the name over.
            if !from.name.is_empty() {
                self.names.insert(from.name.to_lowercase(), i);
            }
            self.stages.push(Stage {
                declared: Some(declared),
                base,
                lines: from.lines,
                platform,
                deps: Vec::new(),
                outline,
                phase: Phase::Waiting,
            });
        }
        Ok(())
    }

    /// The stage that is called `base`, and what is known of the arguments of one that is built on
    /// it.
    fn parent(&self, base: &str) -> (Option<usize>, Outline) {
        match self.names.get(base).copied() {
            Some(parent) => (Some(parent), self.stages[parent].outline.clone()),
            None => {
                let known = self.globals.declared.clone();
                (None, Outline { known, ..Outline::default() })
            }
        }
    }

    fn find(&self, name: &str) -> Option<usize> {
        self.names.get(&name.to_lowercase()).copied()
    }

    /// Names of stages, for suggestions.
    pub fn shown_names(&self) -> Vec<&str> {
        self.stages.iter().map(Stage::display_name).filter(|s| !s.is_empty()).collect()
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
            ConvertError::from(fault).suggest(wanted, self.shown_names())
        })
    }

    fn add_steps(&mut self, file: &Dockerfile) -> Result<()> {
        let mut failures = Vec::new();
        for (i, from) in file.stages.iter().enumerate() {
            for instruction in &from.instructions {
                match self.step(instruction.clone(), false) {
                    Ok(step) => {
                        self.depend(i, &step);
                        if let Some(declared) = &mut self.stages[i].declared {
                            declared.steps.push(step);
                        }
                    }
                    Err(failure) => failures
                        .push(failure.near(instruction.lines).about(Token::Flag("--from".into()))),
                }
            }
        }
        ConvertError::all(failures)
    }

    pub fn depend(&mut self, stage: usize, step: &Step) {
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
    pub fn step(&mut self, instruction: df::Instruction, trigger: bool) -> Result<Step> {
        let mut sources = Vec::new();
        match &instruction.command {
            Command::Copy(copy) if !copy.from.is_empty() => {
                let from = &copy.from;
                if self.lex.word(from, &())?.text != *from {
                    let message = "variable expansion is not supported for --from, define a new stage with FROM using ARG from global scope as a workaround";
                    return Err(ConvertError::new(message));
                }
                sources.push(match from.parse::<i64>() {
                    Err(_) => self
                        .find(from)
                        .map_or_else(|| self.add_image(from, instruction.lines), Ok)?,
                    Ok(n) => match usize::try_from(n) {
                        Ok(n) if n < self.stages.len() => n,
                        _ => {
                            return Err(ConvertError::new(format!("invalid stage index {n}"))
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
            return Err(ConvertError::new(format!(
                "the Dockerfile has more than {MAX_STAGES} stages and images"
            ))
            .at(lines));
        }
        let (_, outline) = self.parent(name);
        self.stages.push(Stage {
            declared: None,
            base: Base::without_stage(name.to_owned()),
            lines,
            platform: None,
            deps: Vec::new(),
            outline,
            phase: Phase::Waiting,
        });
        Ok(self.stages.len() - 1)
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
                    let failure = ConvertError::new(format!(
                        "circular dependency detected on stage: {}",
                        self.stages[first].display_name()
                    ));
                    let lines =
                        path.iter().map(|(stage, next)| self.stages[*stage].deps[next - 1].1);
                    return Err(lines.fold(failure, ConvertError::at));
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
    pub fn reachable(&self, target: usize) -> Vec<bool> {
        let mut reachable = vec![false; self.stages.len()];
        let mut todo = vec![target];
        while let Some(i) = todo.pop() {
            if !std::mem::replace(&mut reachable[i], true) {
                todo.extend(self.stages[i].parent());
                todo.extend(self.stages[i].deps.iter().map(|(dep, _)| *dep));
            }
        }
        reachable
    }
}

impl Base {
    /// What a name means that no stage has.
    fn without_stage(written: String) -> Self {
        if written == SCRATCH { Self::Scratch } else { Self::Image(written) }
    }
}

/// Whether an instruction makes a vertex that is numbered.
fn has_vertex(command: &Command) -> bool {
    matches!(command, Command::Add(_) | Command::Copy(_) | Command::Run(_) | Command::Workdir(_))
}
