//! The instructions of a stage, one after the other (rows `df.*`); RUN, COPY/ADD and EXPOSE have
//! modules of their own.

use crate::{
    error::{ConvertError, Result},
    outline::ArgInfo,
    plan::{Plan, Scope},
    stage::{OpenStage, Step, Vars, set_env, shown_text},
    text,
};
use shipway_dockerfile::{
    self as df, Command, CommandLine, Finding, Lex, Lines, Linter, is_secret_name, suggest,
};
use shipway_filesync::IgnoreFile;
use shipway_gocompat::{GoDuration, path};
use shipway_llb::{Chown, FileDraft, FileMkdir, State, VertexOptions};
use shipway_oci::Healthcheck;
use std::collections::BTreeSet;

/// Arguments that steer the build and never become variables (row `df.arg.scan`).
const NOT_VARIABLES: [&str; 2] = ["BUILDKIT_SBOM_SCAN_CONTEXT", "BUILDKIT_SBOM_SCAN_STAGE"];

/// What the instructions of a stage see around them.
pub struct StageContext<'a> {
    pub plan: &'a Plan<'a>,
    /// The main context, decided later.
    pub context: State,
    pub ignore: Option<&'a IgnoreFile>,
    pub linter: &'a mut Linter,
    /// Paths used of each stage.
    pub paths: &'a mut Vec<BTreeSet<String>>,
    /// Comments above the current instruction, which may silence lints.
    pub comments: Vec<String>,
    /// Whether the current instruction comes with the base image.
    pub in_trigger: bool,
    /// What is wrong with instructions, if all mistakes are wanted.
    pub failures: Vec<ConvertError>,
}

impl StageContext<'_> {
    /// Puts the base image's config on the state and runs the instructions.
    pub fn run_stage(&mut self, stage: &mut OpenStage, steps: &[Step]) -> Result<()> {
        let options = &self.plan.cx.options;
        let needs_path = stage.platform.os != "windows";
        let env = &mut stage.image.config.env;
        if needs_path
            && !env.iter().any(|e| e.split_once('=').map_or(e.as_str(), |(n, _)| n) == "PATH")
        {
            env.push(format!("PATH={}", shipway_llb::DEFAULT_PATH));
        }
        let mut state = std::mem::take(&mut stage.state);
        for variable in env.iter() {
            let (name, value) = variable.split_once('=').unwrap_or((variable, ""));
            state = state.add_env(name, value);
        }
        if !options.hostname.is_empty() {
            state = state.with_hostname(&options.hostname);
        }
        stage.state = state;
        if !stage.image.config.working_dir.is_empty() {
            let dir = stage.image.config.working_dir.clone();
            set_workdir(stage, &dir);
        }
        if !stage.image.config.user.is_empty() {
            stage.state = std::mem::take(&mut stage.state).with_user(&stage.image.config.user);
        }
        stage.state = std::mem::take(&mut stage.state).with_network(options.network);
        for step in steps {
            self.comments.clone_from(&step.instruction.comments);
            (stage.in_trigger, self.in_trigger) = (step.trigger, step.trigger);
            let lines = step.instruction.lines;
            match self.step(stage, step).map_err(|e| e.at(lines)) {
                Ok(()) => {}
                // Nothing comes of this conversion but what is said of it. The reference says the
                // first mistake only.
                Err(failure) if self.plan.cx.options.columns && self.plan.scope == Scope::All => {
                    self.failures.push(failure)
                }
                Err(failure) => return Err(failure),
            }
        }
        Ok(())
    }

    fn step(&mut self, stage: &mut OpenStage, step: &Step) -> Result<()> {
        let instruction = &step.instruction;
        let (lines, lex) = (instruction.lines, self.plan.lex.clone());
        let command = {
            let stage = &*stage;
            let contents = Lex::for_contents().part_of(lex.work());
            let expanded = instruction.command.expand(&mut |w| self.word(&lex, stage, w, lines))?;
            expanded.expand_contents(&mut |w| self.word(&contents, stage, w, lines))?
        };
        let epoch = self.plan.globals.epoch;
        match command {
            Command::Add(add) => self.add(stage, step, add),
            Command::Copy(copy) => self.copy(stage, step, copy),
            Command::Run(run) => self.run(stage, step, &run),
            Command::Expose(words) => self.expose(stage, lines, &words),
            Command::Workdir(dir) => self.workdir(stage, instruction, &dir),
            Command::Arg(arg) => self.arg(stage, instruction, &arg),
            Command::Env(pairs) => {
                let mut message = String::from("ENV");
                for pair in &pairs {
                    self.lint_pair(instruction, pair);
                    self.lint_secret("ENV", &pair.key, lines);
                    message += &format!(" {}={}", pair.key, pair.value);
                    stage.state = std::mem::take(&mut stage.state).add_env(&pair.key, &pair.value);
                    set_env(&mut stage.image.config.env, &pair.key, &pair.value);
                }
                stage.commit(message, false, epoch);
                Ok(())
            }
            Command::Label(pairs) => {
                let mut message = String::from("LABEL");
                for pair in pairs {
                    self.lint_pair(instruction, &pair);
                    message += &format!(" {}={}", pair.key, pair.value);
                    stage.image.config.labels.insert(pair.key, pair.value);
                }
                stage.commit(message, false, epoch);
                Ok(())
            }
            Command::Maintainer(author) => {
                stage.commit(format!("MAINTAINER {author}"), false, epoch);
                stage.image.author = author;
                Ok(())
            }
            Command::Onbuild(onbuild) => {
                stage.image.config.on_build.push(onbuild.trigger);
                Ok(())
            }
            Command::Cmd(line) => {
                self.lint_once(instruction, stage.last_cmd.replace(lines));
                let words = self.with_shell(stage, instruction, &line);
                stage.commit(format!("CMD {}", text::quoted_list(&words)), false, epoch);
                stage.image.config.cmd = (!words.is_empty()).then_some(words);
                stage.image.config.args_escaped = true;
                Ok(())
            }
            Command::Entrypoint(line) => {
                self.lint_once(instruction, stage.last_entrypoint.replace(lines));
                let words = self.with_shell(stage, instruction, &line);
                stage.commit(format!("ENTRYPOINT {}", text::quoted_list(&words)), false, epoch);
                stage.image.config.entrypoint = (!words.is_empty()).then_some(words);
                if stage.last_cmd.is_none() {
                    stage.image.config.cmd = None;
                }
                Ok(())
            }
            Command::Healthcheck(check) => {
                self.lint_once(instruction, stage.last_healthcheck.replace(lines));
                stage.commit(healthcheck_text(&check), false, epoch);
                stage.image.config.healthcheck = Some(healthcheck(check));
                Ok(())
            }
            Command::User(user) => {
                stage.state = std::mem::take(&mut stage.state).with_user(&user);
                stage.commit(format!("USER {user}"), false, epoch);
                stage.image.config.user = user;
                Ok(())
            }
            Command::Volume(volumes) => {
                for volume in &volumes {
                    if volume.is_empty() {
                        return Err(ConvertError::new(
                            "VOLUME specified can not be an empty string",
                        ));
                    }
                    stage.image.config.volumes.insert(volume.clone(), shipway_oci::Member);
                }
                stage.commit(format!("VOLUME {}", text::list(&volumes)), false, epoch);
                Ok(())
            }
            Command::StopSignal(signal) => {
                if !is_signal(&signal) {
                    return Err(ConvertError::new(format!("invalid signal: {signal}")));
                }
                stage.commit(format!("STOPSIGNAL {signal}"), false, epoch);
                stage.image.config.stop_signal = signal;
                Ok(())
            }
            Command::Shell(shell) => {
                stage.commit(format!("SHELL {}", text::list(&shell)), false, epoch);
                stage.image.config.shell = shell;
                Ok(())
            }
        }
    }

    /// Reports what a rule says of the current instruction, or of an earlier one.
    pub fn report(&mut self, finding: Finding<'_>, lines: Lines) {
        match self.in_trigger {
            true => self.linter.report_inherited(finding, lines, &self.comments),
            false => self.linter.report(finding, lines, &self.comments),
        }
    }

    /// Expands a word with the stage's variables and reports those that are not set.
    pub fn word(
        &mut self,
        lex: &Lex,
        stage: &OpenStage,
        word: &str,
        lines: Lines,
    ) -> df::Result<String> {
        let env = stage.state.env();
        let mut unmatched = BTreeSet::new();
        let expanded = lex.word_noting(word, &Vars(env), &mut unmatched);
        for name in &unmatched {
            if NOT_VARIABLES.contains(&name.as_str()) || stage.args.iter().any(|(n, _)| n == name) {
                continue;
            }
            let near = suggest(name, env.names(), true);
            self.report(Finding::UndefinedVar { name, suggestion: near.as_deref() }, lines);
        }
        Ok(expanded?.text)
    }

    fn workdir(
        &mut self,
        stage: &mut OpenStage,
        instruction: &df::Instruction,
        dir: &str,
    ) -> Result<()> {
        if !std::mem::replace(&mut stage.workdir_set, true) && !dir.starts_with('/') {
            self.report(Finding::WorkdirRelativePath { path: dir }, instruction.lines);
        }
        set_workdir(stage, dir);
        let dir = stage.image.config.working_dir.clone();
        let epoch = self.plan.globals.epoch;
        if dir != "/" {
            let user = &stage.image.config.user;
            let mkdir = FileMkdir {
                path: dir.clone(),
                mode: 0o755,
                make_parents: true,
                owner: (!user.is_empty()).then(|| Chown::parse(user)),
                timestamp: epoch.map(|e| e.saturating_mul(1_000_000_000)),
            };
            let name = shown_text(&self.plan.lex, &instruction.source, &Vars(stage.state.env()));
            let options = VertexOptions::named(self.title(stage, &name))
                .at(&self.plan.cx.file, instruction.lines.spans());
            let options = stage.on_platform(options);
            stage.state = stage.state.file(FileDraft::new().mkdir(mkdir), options);
        }
        stage.commit(format!("WORKDIR {dir}"), dir != "/", epoch);
        Ok(())
    }

    /// The name of the next vertex of a stage.
    pub fn title(&self, stage: &mut OpenStage, name: &str) -> String {
        let multi = self.plan.cx.options.multi_platform;
        let platform = multi.then(|| stage.platform.clone());
        let env = stage.state.env().clone();
        stage.title(name, platform.as_ref(), Some(&env))
    }

    fn arg(
        &mut self,
        stage: &mut OpenStage,
        instruction: &df::Instruction,
        arg: &df::Arg,
    ) -> Result<()> {
        let globals = &self.plan.globals;
        let mut words = Vec::with_capacity(arg.args.len());
        for pair in &arg.args {
            self.lint_secret("ARG", &pair.name, instruction.lines);
            let value = match (globals.build_args.get(&pair.name), &pair.default) {
                (Some(given), _) => Some(given.clone()),
                (None, Some(default)) => {
                    Some(self.word(&self.plan.lex, stage, default, instruction.lines)?)
                }
                (None, None) => globals.env.get(&pair.name).map(str::to_owned),
            };
            let inherited = value.is_some()
                && pair.default.is_none()
                && !globals.build_args.contains_key(&pair.name);
            if !inherited {
                let info = ArgInfo {
                    name: pair.name.clone(),
                    value: value.clone().unwrap_or_default(),
                    description: pair.description.clone(),
                    lines: instruction.lines,
                    ..ArgInfo::default()
                };
                stage.outline.known.insert(pair.name.clone(), info);
            }
            stage.outline.used.insert(pair.name.clone());
            words.push(match &value {
                Some(value) => format!("{}={value}", pair.name),
                None => pair.name.clone(),
            });
            if let Some(value) = &value
                && !NOT_VARIABLES.contains(&pair.name.as_str())
            {
                stage.state = std::mem::take(&mut stage.state).add_env(&pair.name, value);
            }
            stage.args.push((pair.name.clone(), value));
        }
        stage.commit(format!("ARG {}", words.join(" ")), false, globals.epoch);
        Ok(())
    }

    fn with_shell(
        &mut self,
        stage: &OpenStage,
        instruction: &df::Instruction,
        line: &CommandLine,
    ) -> Vec<String> {
        let words = line.words();
        if !line.is_shell() {
            return words;
        }
        if stage.image.config.shell.is_empty() {
            self.report(
                Finding::JSONArgsRecommended {
                    keyword: &instruction.keyword,
                    line: &words.concat(),
                },
                instruction.lines,
            );
        }
        stage.with_shell(&words)
    }

    fn lint_once(&mut self, instruction: &df::Instruction, earlier: Option<Lines>) {
        if let Some(earlier) = earlier {
            // The earlier one is what has no effect.
            let finding = Finding::MultipleInstructionsDisallowed { keyword: &instruction.keyword };
            self.report(finding, earlier);
        }
    }

    fn lint_pair(&mut self, instruction: &df::Instruction, pair: &df::Pair) {
        if !pair.legacy {
            return;
        }
        // The old form has one pair; the instruction still has it as it is written.
        let (Command::Env(written) | Command::Label(written)) = &instruction.command else {
            return;
        };
        let df::Pair { key, value, .. } = written.first().unwrap_or(pair);
        self.report(
            Finding::LegacyKeyValueFormat { keyword: &instruction.keyword, key, value },
            instruction.lines,
        );
    }

    fn lint_secret(&mut self, instruction: &str, key: &str, lines: Lines) {
        if is_secret_name(key) {
            self.report(Finding::SecretsUsedInArgOrEnv { instruction, key }, lines);
        }
    }
}

/// Sets the directory of the image and the state. An absolute one is kept as it is written; an
/// empty one changes nothing.
fn set_workdir(stage: &mut OpenStage, dir: &str) {
    let absolute = |base: &str, dir: &str| {
        if dir.starts_with('/') { dir.to_owned() } else { path::join(base, dir) }
    };
    let current = absolute("/", &stage.image.config.working_dir);
    let dir = if dir.is_empty() { current } else { absolute(&current, dir) };
    stage.state = std::mem::take(&mut stage.state).with_dir(&dir);
    stage.image.config.working_dir = dir;
}

fn healthcheck(check: df::Healthcheck) -> Healthcheck {
    let nanos = |d: std::time::Duration| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX);
    Healthcheck {
        interval: nanos(check.interval),
        timeout: nanos(check.timeout),
        start_period: nanos(check.start_period),
        start_interval: nanos(check.start_interval),
        retries: check.retries.into(),
        test: check.test,
    }
}

fn healthcheck_text(c: &df::Healthcheck) -> String {
    let [interval, timeout, period, start] =
        [c.interval, c.timeout, c.start_period, c.start_interval].map(GoDuration::from);
    format!(
        "HEALTHCHECK {{Test:{} Interval:{interval} Timeout:{timeout} StartPeriod:{period} StartInterval:{start} Retries:{}}}",
        text::list(&c.test),
        c.retries
    )
}

/// Whether Docker knows the signal (row `df.stopsignal`).
fn is_signal(text: &str) -> bool {
    const NAMES: [&str; 33] = [
        "ABRT", "ALRM", "BUS", "CHLD", "CLD", "CONT", "FPE", "HUP", "ILL", "INT", "IO", "IOT",
        "KILL", "PIPE", "POLL", "PROF", "PWR", "QUIT", "SEGV", "STKFLT", "STOP", "SYS", "TERM",
        "TRAP", "TSTP", "TTIN", "TTOU", "URG", "USR1", "USR2", "VTALRM", "WINCH", "XCPU",
    ];
    if let Ok(number) = text.parse::<i64>() {
        return number != 0;
    }
    let upper = text.to_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let offset = |prefix: &str, sign: char, most: u32| {
        let rest = name.strip_prefix(prefix)?;
        Some(
            rest.is_empty()
                || rest.strip_prefix(sign)?.parse::<u32>().is_ok_and(|n| (1..=most).contains(&n)),
        )
    };
    NAMES.contains(&name)
        || name == "XFSZ"
        || offset("RTMIN", '+', 15) == Some(true)
        || offset("RTMAX", '-', 14) == Some(true)
}
