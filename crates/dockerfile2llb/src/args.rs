//! Arguments of the global scope, and the words of `FROM` that use them (rows `df.arg`, `df.from`,
//! `df.arg.sde`).

use crate::{
    build_context::BuildContext,
    epoch,
    error::{ConvertError, Result},
    outline::ArgInfo,
    platform::Platforms,
    stage::Vars,
};
use shipway_dockerfile::{
    self as df, Command, Dockerfile, Expanded, Finding, Instruction, Lex, Linter, Token, suggest,
};
use shipway_llb::{EnvList, ProxyEnv};
use shipway_oci::{ImageName, Platform};
use std::collections::{BTreeMap, BTreeSet};

/// What is known before the first stage.
#[derive(Clone, Debug, Default)]
pub struct Globals {
    pub env: EnvList,
    /// What is declared with `ARG`.
    pub declared: BTreeMap<String, ArgInfo>,
    /// Build arguments, `SOURCE_DATE_EPOCH` resolved.
    pub build_args: BTreeMap<String, String>,
    pub proxy: Option<ProxyEnv>,
    /// `SOURCE_DATE_EPOCH` in seconds.
    pub epoch: Option<i64>,
}

impl Globals {
    pub async fn read(
        cx: &BuildContext,
        file: &Dockerfile,
        platforms: &Platforms,
        linter: &mut Linter,
    ) -> Result<Self> {
        let options = &cx.options;
        let lex = Lex::new(file.escape).part_of(&cx.work);
        let last = file.stages.last().map(|s| s.name.as_str()).unwrap_or_default();
        let stage = if options.target.is_empty() { last } else { &options.target };
        let defaults = platforms.default_args(&options.build_args, stage);
        lint_default_bases(&lex, file, &defaults, linter);
        let (env, declared) = declare(&lex, &file.global_args, defaults, &options.build_args)?;
        let mut globals = Self {
            env,
            declared,
            build_args: options.build_args.clone(),
            proxy: proxy(&options.build_args),
            epoch: None,
        };
        let given = globals.build_args.get("SOURCE_DATE_EPOCH").cloned();
        if let Some(value) = given.or_else(|| {
            globals.env.get("SOURCE_DATE_EPOCH").filter(|v| !v.is_empty()).map(str::to_owned)
        }) {
            let args = epoch::Arguments { globals: &globals.env, given: &globals.build_args };
            globals.epoch = epoch::resolve(cx, file, &args, &value).await?;
            globals.set_epoch();
        }
        Ok(globals)
    }

    fn set_epoch(&mut self) {
        const NAME: &str = "SOURCE_DATE_EPOCH";
        let value = self.epoch.map(|e| e.to_string());
        if self.build_args.contains_key(NAME) {
            match &value {
                Some(value) => self.build_args.insert(NAME.into(), value.clone()),
                None => self.build_args.remove(NAME),
            };
        }
        if self.env.get(NAME).is_some() {
            match value {
                Some(value) => self.env.set(NAME, value),
                None => self.env.remove(NAME),
            }
        }
    }
}

/// The environment after the `ARG`s before the first `FROM`.
fn declare(
    lex: &Lex,
    args: &[Instruction],
    mut env: EnvList,
    build_args: &BTreeMap<String, String>,
) -> Result<(EnvList, BTreeMap<String, ArgInfo>)> {
    let mut declared: BTreeMap<String, ArgInfo> = BTreeMap::new();
    for instruction in args {
        let Command::Arg(arg) = &instruction.command else { continue };
        for pair in &arg.args {
            let mut info = ArgInfo {
                name: pair.name.clone(),
                description: pair.description.clone(),
                lines: instruction.lines,
                ..ArgInfo::default()
            };
            let value = match (build_args.get(&pair.name), &pair.default) {
                (Some(given), _) => Some(given.clone()),
                (None, Some(default)) => {
                    let expanded = lex
                        .word(default, &Vars(&env))
                        .map_err(|e| ConvertError::from(e).at(instruction.lines))?;
                    info.deps = expanded.matched;
                    // An argument made of itself is made of what it was made of before.
                    if info.deps.remove(&pair.name)
                        && let Some(old) = declared.get(&pair.name)
                    {
                        info.deps.extend(old.deps.iter().cloned());
                    }
                    Some(expanded.text)
                }
                (None, None) => None,
            };
            if let Some(value) = value {
                env.set(&pair.name, &value);
                info.value = value;
            }
            declared.insert(pair.name.clone(), info);
        }
    }
    Ok((env, declared))
}

/// Bases must be image names without any build argument too (rule `InvalidDefaultArgInFrom`).
fn lint_default_bases(lex: &Lex, file: &Dockerfile, defaults: &EnvList, linter: &mut Linter) {
    let Ok((env, _)) = declare(lex, &file.global_args, defaults.clone(), &BTreeMap::new()) else {
        return;
    };
    for stage in &file.stages {
        let Ok(name) = lex.word(&stage.base, &Vars(&env)) else { return };
        if name.text.parse::<ImageName>().is_err() {
            linter.report(Finding::InvalidDefaultArgInFrom { base: &stage.base }, stage.lines, &[]);
        }
    }
}

/// The base of a stage.
pub fn expand_from(
    lex: &Lex,
    stage: &df::Stage,
    globals: &Globals,
    linter: &mut Linter,
) -> Result<Expanded> {
    let expanded = expand(lex, &stage.base, stage, globals, linter)
        .map_err(|e| ConvertError::from(e).at(stage.lines))?;
    if expanded.text.is_empty() {
        return Err(ConvertError::new(format!("base name ({}) should not be blank", stage.base))
            .at(stage.lines)
            .about(Token::Word(0)));
    }
    Ok(expanded)
}

/// The value of `--platform`, and the variables that it used.
pub fn expand_platform(
    lex: &Lex,
    stage: &df::Stage,
    globals: &Globals,
    linter: &mut Linter,
) -> Result<(Option<Platform>, BTreeSet<String>)> {
    let written = &stage.platform;
    if written.is_empty() {
        return Ok((None, BTreeSet::new()));
    }
    let expanded = expand(lex, written, stage, globals, linter).map_err(|e| {
        ConvertError::from(e).context("failed to process arguments for platform ").at(stage.lines)
    })?;
    lint_platform(&expanded, stage, globals, linter);
    let flag = || Token::Flag("--platform".into());
    let near = |failure: ConvertError| match expanded
        .unmatched
        .iter()
        .find(|n| suggest(n, globals.env.names(), true).is_some())
    {
        Some(name) => failure.suggest(name, globals.env.names()),
        None => failure,
    };
    if expanded.text.is_empty() {
        return Err(near(
            ConvertError::new(format!("empty platform value from expression {written}"))
                .at(stage.lines)
                .about(flag()),
        ));
    }
    match expanded.text.parse() {
        Ok(platform) => Ok((Some(platform), expanded.matched)),
        Err(e) => {
            let failure = ConvertError::new(format!("failed to parse platform {written}: {e}"))
                .at(stage.lines)
                .at(stage.lines);
            Err(near(failure.about(flag()).hint("write <os>/<architecture>, such as linux/arm64")))
        }
    }
}

/// Expands a word of `FROM` and reports the variables in it that are not declared, also where the
/// expansion fails.
fn expand(
    lex: &Lex,
    word: &str,
    stage: &df::Stage,
    globals: &Globals,
    linter: &mut Linter,
) -> df::Result<Expanded> {
    let mut unmatched = BTreeSet::new();
    let expanded = lex.word_noting(word, &Vars(&globals.env), &mut unmatched);
    lint_undeclared(&unmatched, stage, globals, linter);
    expanded
}

fn lint_undeclared(
    unmatched: &BTreeSet<String>,
    stage: &df::Stage,
    globals: &Globals,
    linter: &mut Linter,
) {
    for name in unmatched
        .iter()
        .filter(|n| !globals.declared.contains_key(*n) && globals.env.get(n).is_none())
    {
        let options: BTreeSet<&str> =
            globals.declared.keys().map(String::as_str).chain(globals.env.names()).collect();
        let near = suggest(name, options, true);
        linter.report(
            Finding::UndefinedArgInFrom { arg: name, suggestion: near.as_deref() },
            stage.lines,
            &stage.comments,
        );
    }
}

fn lint_platform(expanded: &Expanded, stage: &df::Stage, globals: &Globals, linter: &mut Linter) {
    let constant = expanded.matched.is_empty() && expanded.unmatched.is_empty();
    if constant && let Ok(platform) = expanded.text.parse::<Platform>() {
        // A name that says the platform shows that the constant is meant.
        if !stage.name.contains(&platform.os) && !stage.name.contains(&platform.architecture) {
            linter.report(
                Finding::FromPlatformFlagConstDisallowed { platform: &expanded.text },
                stage.lines,
                &stage.comments,
            );
        }
    }
    let only_target = expanded.matched.len() == 1
        && expanded.matched.contains("TARGETPLATFORM")
        && expanded.unmatched.is_empty();
    if only_target && globals.env.get("TARGETPLATFORM") == Some(&expanded.text) {
        linter.report(
            Finding::RedundantTargetPlatform { platform: &stage.platform },
            stage.lines,
            &stage.comments,
        );
    }
}

/// Proxy settings among the build arguments, in whichever case (row `df.arg.proxy`).
fn proxy(args: &BTreeMap<String, String>) -> Option<ProxyEnv> {
    let mut proxy = ProxyEnv::default();
    let mut found = false;
    for (name, value) in args {
        let field = match name.to_ascii_lowercase().as_str() {
            "http_proxy" => &mut proxy.http,
            "https_proxy" => &mut proxy.https,
            "ftp_proxy" => &mut proxy.ftp,
            "no_proxy" => &mut proxy.no,
            "all_proxy" => &mut proxy.all,
            _ => continue,
        };
        field.clone_from(value);
        found = true;
    }
    found.then_some(proxy)
}
