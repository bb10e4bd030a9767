//! COPY and ADD: files of contexts, stages, images, addresses and of the Dockerfile itself (rows
//! `df.copy*`, `df.add*`).

use crate::{
    build_context::internal,
    error::{ConvertError, Result},
    explain::ContextUse,
    instruct::StageContext,
    remote::{from_http, with_flags},
    stage::{OpenStage, Step, Vars, shown_text},
};
use shipway_dockerfile::{self as df, Files, Finding, Token};
use shipway_filesync::PatternMatcher;
use shipway_gocompat::{path, quote};
use shipway_llb::{Chown, FileCopy, FileDraft, FileMkfile, GitRef, State, VertexOptions, paths};
use shipway_oci::Digest;

/// What the two instructions have in common, settled.
struct Job<'a> {
    step: &'a Step,
    files: &'a Files,
    source: State,
    /// ADD's own abilities.
    add: Option<&'a df::Add>,
    parents: bool,
    from_context: bool,
    /// Every copy begins as this.
    base: FileCopy,
    title: String,
}

impl StageContext<'_> {
    pub fn add(&mut self, stage: &mut OpenStage, step: &Step, add: df::Add) -> Result<()> {
        let source = self.context.clone();
        self.transfer(stage, step, &add.files, source, Some(&add), false)?;
        let local = add
            .files
            .sources
            .iter()
            .filter(|s| !s.starts_with("http://") && !s.starts_with("https://"));
        stage.context_paths.extend(local.map(|s| path::join("/", s)));
        Ok(())
    }

    pub fn copy(&mut self, stage: &mut OpenStage, step: &Step, copy: df::Copy) -> Result<()> {
        let (source, path_owner) = match step.sources.first() {
            None => (self.context.clone(), None),
            Some(&source) => {
                let Some(from) = self.plan.stages[source].converted() else {
                    return Err(ConvertError::new(format!(
                        "cannot copy from stage {}, it needs to be defined before current stage {}",
                        quote(&copy.from),
                        quote(&stage.titles.stage)
                    )));
                };
                (from.rootfs.state.clone(), Some(from.path_owner))
            }
        };
        self.transfer(stage, step, &copy.files, source, None, copy.parents)?;
        let used = copy.files.sources.iter().map(|s| path::join("/", s));
        path_owner.map_or(&mut stage.context_paths, |owner| &mut self.paths[owner]).extend(used);
        Ok(())
    }

    fn transfer(
        &mut self,
        stage: &mut OpenStage,
        step: &Step,
        files: &Files,
        source: State,
        add: Option<&df::Add>,
        parents: bool,
    ) -> Result<()> {
        let instruction = &step.instruction;
        let dest = match files.dest.as_str() {
            "" | "." => "./",
            dest => dest,
        };
        let (mode, mode_str) = chmod(&files.chmod)?;
        let base = FileCopy {
            dest: paths::normalize(stage.state.dir(), dest, true),
            owner: (!files.chown.is_empty()).then(|| Chown::parse(&files.chown)),
            mode,
            mode_str,
            create_dest_path: true,
            exclude_patterns: files.excludes.clone(),
            ..FileCopy::default()
        };
        let checksum = add.map(|a| a.checksum.as_str()).unwrap_or_default();
        check_checksum(checksum, files)?;
        let name = shown_text(&self.plan.lex, &instruction.source, &Vars(stage.state.env()));
        let title = self.title(stage, &name);
        let from_context = step.sources.is_empty();
        if from_context {
            stage.uses.push(ContextUse { lines: instruction.lines, paths: files.sources.clone() });
        }
        let job =
            Job { step, files, source, add, parents, from_context, base, title: title.clone() };
        let mut draft = FileDraft::new();
        for path in &files.sources {
            draft = self
                .one_source(&job, draft, path)
                .map_err(|e| e.about(Token::Text(path.clone())))?;
        }
        for content in &files.contents {
            let file = FileMkfile {
                path: content.name.clone(),
                mode: 0o644,
                data: content.data.clone().into(),
                ..FileMkfile::default()
            };
            let options = stage.on_platform(internal("preparing inline document"));
            let state = State::scratch().file(FileDraft::new().mkfile(file), options);
            draft = draft.copy(&state, FileCopy { src: content.name.clone(), ..job.base.clone() });
        }
        let created_by = history_text(&job);
        let mut options =
            VertexOptions::named(title).at(&self.plan.cx.file, instruction.lines.spans());
        if stage.ignore_cache {
            options = options.ignore_cache();
        }
        stage.state = if files.link && files.chmod.is_empty() && self.plan.cx.caps.has("mergeop") {
            self.link(stage, &name, draft, options)
        } else {
            stage.state.file(draft, options)
        };
        stage.commit(created_by, true, self.plan.globals.epoch);
        Ok(())
    }

    /// `--link`: a layer that does not depend on those below (row `df.copy.link`).
    fn link(
        &self,
        stage: &OpenStage,
        name: &str,
        draft: FileDraft,
        options: VertexOptions,
    ) -> State {
        let platform = self.plan.cx.options.multi_platform.then(|| stage.platform.clone());
        let title = stage.title_again(name, platform.as_ref(), Some(stage.state.env()));
        // A group is known by its id within one build.
        let id = Digest::of(format!("{title}\n{}\n{}", stage.titles.stage, stage.titles.done))
            .hex()[..25]
            .to_owned();
        let copy = stage.on_platform(options.clone()).group(id.clone(), title.clone(), true);
        let copied = State::scratch().file(draft, copy);
        let linked =
            stage.title_again(&format!("LINK {name}"), platform.as_ref(), Some(stage.state.env()));
        let merged = State::merge(
            &[stage.state.clone(), copied],
            options.group(id, title, false).name(linked),
        );
        stage.state.with_filesystem(&merged)
    }

    fn one_source(&mut self, job: &Job<'_>, draft: FileDraft, path: &str) -> Result<FileDraft> {
        match GitRef::parse(path) {
            Err(e) => return Err(e.into()),
            Ok(Some(git)) if !git.looks_local => return from_git(job, draft, git),
            Ok(_) => {}
        }
        if path.starts_with("http://") || path.starts_with("https://") {
            let Some(add) = job.add else {
                return Err(ConvertError::new("source can't be a URL for COPY").hint("write ADD"));
            };
            let options = VertexOptions::named(job.title.clone())
                .describe("com.docker.dockerfile.v1.command", "");
            let (state, src) = from_http(add, path, options)?;
            return Ok(draft.copy(
                &state,
                FileCopy { src, attempt_unpack: add.unpack.unwrap_or(false), ..job.base.clone() },
            ));
        }
        self.lint_ignored(job, path);
        let (mut src, mut patterns, mut required) = (path.to_owned(), Vec::new(), Vec::new());
        if job.parents {
            let (parent, pattern) = path.split_once("/./").unwrap_or(("/", path));
            let pattern = if pattern.starts_with('/') {
                pattern.to_owned()
            } else {
                path::join("/", pattern)
            };
            if !has_wildcard(parent) && !has_wildcard(&pattern) {
                required = vec![path::join("/", &format!("{parent}/{pattern}"))];
            }
            patterns = vec![pattern.strip_prefix('/').unwrap_or(&pattern).to_owned()];
            src = parent.to_owned();
        }
        let copy = FileCopy {
            src: paths::normalize("/", &src, false),
            follow_symlink: true,
            dir_copy_contents: true,
            include_patterns: patterns,
            required_paths: required,
            attempt_unpack: job.add.is_some_and(|a| a.unpack.unwrap_or(true)),
            allow_wildcard: true,
            allow_empty_wildcard: true,
            ..job.base.clone()
        };
        Ok(draft.copy(&job.source, copy))
    }

    /// Reports sources that the ignore file hides (rule `CopyIgnoredFile`). With exceptions in it
    /// that is not known here.
    fn lint_ignored(&mut self, job: &Job<'_>, path: &str) {
        let Some(ignore) = self.ignore.filter(|_| job.from_context) else { return };
        let patterns = ignore.patterns();
        if patterns.is_empty() || patterns.iter().any(|p| p.starts_with('!')) {
            return;
        }
        let path = path::clean(path);
        if matches!(path.as_str(), "." | "/")
            && !patterns.iter().any(|p| matches!(p.as_str(), "*" | "**" | "**/*"))
        {
            return;
        }
        if PatternMatcher::new(&patterns).is_ok_and(|m| m.matches(&path)) {
            let verb = if job.add.is_some() { "Add" } else { "Copy" };
            let name = self.plan.cx.ignore_name();
            let rule = ignore.excluder(path.trim_start_matches('/')).ok().flatten();
            let rule = rule
                .map(|rule| format!("line {} of {name}: {}", rule.line, rule.text))
                .unwrap_or_default();
            self.report(
                Finding::CopyIgnoredFile { verb, path: &path, rule: &rule },
                job.step.instruction.lines,
            );
        }
    }
}

fn from_git(job: &Job<'_>, draft: FileDraft, git: GitRef) -> Result<FileDraft> {
    let Some(add) = job.add else {
        return Err(ConvertError::new("source can't be a git ref for COPY").hint("write ADD"));
    };
    let state = with_flags(git, add)?.state(VertexOptions::named(job.title.clone()));
    Ok(draft.copy(&state, FileCopy { src: "/".into(), ..job.base.clone() }))
}

fn check_checksum(checksum: &str, files: &Files) -> Result<()> {
    if checksum.is_empty() {
        return Ok(());
    }
    let [source] = files.sources.as_slice() else {
        return Err(ConvertError::new("checksum can't be specified for multiple sources")
            .about(Token::Flag("--checksum".into())));
    };
    let remote = source.starts_with("http://")
        || source.starts_with("https://")
        || GitRef::parse(source)?.is_some();
    if remote {
        Ok(())
    } else {
        Err(ConvertError::new("checksum requires HTTP(S) or Git sources")
            .about(Token::Flag("--checksum".into())))
    }
}

fn history_text(job: &Job<'_>) -> String {
    let files = job.files;
    let mut text = String::from(if job.add.is_some() { "ADD" } else { "COPY" });
    if job.parents {
        text += " --parents";
    }
    for (flag, value) in [("chown", &files.chown), ("chmod", &files.chmod)] {
        if !value.is_empty() {
            text += &format!(" --{flag}={value}");
        }
    }
    for source in &files.sources {
        text += &format!(" {source}");
    }
    for content in &files.contents {
        text += &format!(" <<{}", content.name);
    }
    text + &format!(" {} # buildkit", files.dest)
}

/// `--chmod`: bits, or a symbolic mode.
fn chmod(text: &str) -> Result<(Option<u32>, String)> {
    if text.is_empty() {
        return Ok((None, String::new()));
    }
    let not_octal = || {
        ConvertError::new(format!(
            "invalid chmod parameter: '{text}'. it should be octal string and between 0 and 07777"
        ))
    };
    if text.starts_with(|c: char| c.is_ascii_digit()) {
        return match u32::from_str_radix(text, 8) {
            Ok(bits) if bits <= 0o7777 => Ok((Some(bits), String::new())),
            _ => Err(not_octal()),
        };
    }
    if is_symbolic(text) {
        Ok((None, text.to_owned()))
    } else {
        Err(ConvertError::new("invalid syntax")
            .context(format!("invalid chmod parameter: '{text}'")))
    }
}

/// Clauses such as `u+rwX,go=r`.
fn is_symbolic(text: &str) -> bool {
    text.split(',').all(|clause| {
        let actions = clause.trim_start_matches(['a', 'u', 'g', 'o']);
        actions.starts_with(['+', '-', '=']) && actions.chars().all(|c| "+-=rstwXxugo".contains(c))
    })
}

fn has_wildcard(path: &str) -> bool {
    let mut chars = path.chars();
    while let Some(c) = chars.next() {
        match c {
            '*' | '?' | '[' => return true,
            '\\' => drop(chars.next()),
            _ => {}
        }
    }
    false
}
