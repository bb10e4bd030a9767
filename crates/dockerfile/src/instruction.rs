//! The second pass: nodes to typed instructions, with the checks and words the reference has, in
//! its order (rows `df.*`).

use std::time::Duration;

use crate::{
    ast::*,
    error::{Error, Result},
    flags::{FlagKind, Flags},
    heredoc,
    lines::{Keyword, Node},
    lint::{Finding, Linter},
    literals::with_suggestion,
    token::Token,
    words::example,
};
use shipway_gocompat::{GoDuration, InvalidDuration, quote};

/// What a node is.
pub(crate) enum Parsed {
    Stage(Stage),
    Instruction(Instruction),
}

/// Gives a node its meaning.
pub(crate) fn parse(mut node: Node, linter: &mut Linter) -> Result<Parsed> {
    let lines = node.lines;
    let Some(keyword) = node.kind else {
        let names = Keyword::NAMES.map(|(name, _)| name);
        let error = with_suggestion(
            format!("unknown instruction: {}", node.keyword),
            &node.keyword,
            &names,
            false,
        );
        return Err(error.at(Token::Keyword));
    };
    let command = match keyword {
        Keyword::From => return from(node, linter).map(Parsed::Stage),
        Keyword::Add => add(&mut node).map(Command::Add),
        Keyword::Arg => arg(&node, linter).map(Command::Arg),
        Keyword::Cmd => no_flags(&node).map(|()| Command::Cmd(command_line(&mut node))),
        Keyword::Copy => copy(&mut node).map(Command::Copy),
        Keyword::Entrypoint => {
            no_flags(&node).map(|()| Command::Entrypoint(command_line(&mut node)))
        }
        Keyword::Env => pairs(&mut node, "ENV").map(Command::Env),
        Keyword::Expose => expose(&mut node).map(Command::Expose),
        Keyword::Healthcheck => healthcheck(&node).map(Command::Healthcheck),
        Keyword::Label => pairs(&mut node, "LABEL").map(Command::Label),
        Keyword::Maintainer => {
            linter.report(Finding::MaintainerDeprecated, lines, &node.comments);
            single(&mut node, "MAINTAINER").map(Command::Maintainer)
        }
        Keyword::Onbuild => onbuild(&node).map(Command::Onbuild),
        Keyword::Run => run(&mut node).map(Command::Run),
        Keyword::Shell => shell(&mut node).map(Command::Shell),
        // Flags are not looked at here, nor for ARG.
        Keyword::StopSignal => exactly_one(&mut node, "STOPSIGNAL").map(Command::StopSignal),
        Keyword::User => single(&mut node, "USER").map(Command::User),
        Keyword::Volume => volume(&mut node).map(Command::Volume),
        Keyword::Workdir => single(&mut node, "WORKDIR").map(Command::Workdir),
    };
    let command = command?;
    let source = trimmed(node.original);
    Ok(Parsed::Instruction(Instruction {
        keyword: node.keyword,
        source,
        lines,
        comments: node.comments,
        command,
    }))
}

/// The text trimmed, without a copy where that is possible.
fn trimmed(mut text: String) -> String {
    if text.starts_with(char::is_whitespace) {
        return text.trim().to_owned();
    }
    text.truncate(text.trim_end().len());
    text
}

fn at_least_one(keyword: &str) -> Error {
    Error::new(format!("{keyword} requires at least one argument"))
        .at(Token::Keyword)
        .hint(example(keyword))
}

fn exactly_one(node: &mut Node, keyword: &str) -> Result<String> {
    match node.args.pop() {
        Some(word) if node.args.is_empty() => Ok(word),
        _ => Err(Error::new(format!("{keyword} requires exactly one argument"))
            .at(Token::Arguments)
            .hint(example(keyword))),
    }
}

fn no_flags(node: &Node) -> Result<()> {
    Flags::parse(&node.flags, &[]).map(|_| ())
}

fn single(node: &mut Node, keyword: &str) -> Result<String> {
    let word = exactly_one(node, keyword)?;
    no_flags(node)?;
    Ok(word)
}

/// What a comment `# <name> <text>` says about `name`.
fn description(comments: &[String], name: &str) -> String {
    let text = |comment: &String| comment.strip_prefix(name)?.strip_prefix(' ').map(str::to_owned);
    if name.is_empty() { String::new() } else { comments.iter().find_map(text).unwrap_or_default() }
}

/// Reports a comment above that looks like a description and names something else.
fn lint_description(instruction: &str, names: &[&str], node: &Node, linter: &mut Linter) {
    let (Some(last), Some(&first)) = (node.comments.last(), names.first()) else { return };
    if names.iter().any(|n| last.split(' ').next() == Some(n)) {
        return;
    }
    let name = if names.len() > 1 { "<arg_key>" } else { first };
    linter.report(
        Finding::InvalidDefinitionDescription { instruction, name },
        node.lines,
        &node.comments,
    );
}

fn from(node: Node, linter: &mut Linter) -> Result<Stage> {
    let args = &node.args;
    if let [_, _, stage] = args.as_slice()
        && *stage != stage.to_lowercase()
    {
        linter.report(Finding::StageNameCasing { stage }, node.lines, &node.comments);
    }
    if let [_, r#as, _, ..] = args.as_slice() {
        let keyword = &node.keyword;
        let differs = if *keyword == keyword.to_lowercase() {
            *r#as != r#as.to_lowercase()
        } else {
            // Mixed case is another rule's.
            *keyword == keyword.to_uppercase() && *r#as != r#as.to_uppercase()
        };
        if differs {
            linter.report(
                Finding::FromAsCasing { from: keyword, r#as },
                node.lines,
                &node.comments,
            );
        }
    }
    let name = match args.as_slice() {
        [_, r#as, name] if r#as.eq_ignore_ascii_case("as") => stage_name(name)?,
        [_] => String::new(),
        _ => {
            return Err(Error::new("FROM requires either one or three arguments")
                .at(Token::Arguments)
                .hint(example("FROM")));
        }
    };
    let platform = Flags::parse(&node.flags, &[("platform", FlagKind::Text)])?.text("platform");
    if !name.is_empty() {
        lint_description("FROM", &[&name], &node, linter);
    }
    Ok(Stage {
        description: description(&node.comments, &name),
        base: args[0].clone(),
        platform,
        source: trimmed(node.original),
        name,
        keyword: node.keyword,
        lines: node.lines,
        comments: node.comments,
        instructions: Vec::new(),
    })
}

fn stage_name(written: &str) -> Result<String> {
    let name = written.to_lowercase();
    let rest =
        |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '_' | '.');
    if name.starts_with(|c: char| c.is_ascii_lowercase()) && name.chars().all(rest) {
        return Ok(name);
    }
    let message = format!(
        "invalid name for build stage: {}, name can't start with a number or contain symbols",
        quote(written)
    );
    let hint = "begin with a letter, and go on with letters, digits, -, _ and .";
    Err(Error::new(message).at(Token::Word(2)).hint(hint))
}

fn pairs(node: &mut Node, keyword: &str) -> Result<Vec<Pair>> {
    no_flags(node)?;
    if node.args.is_empty() {
        return Err(at_least_one(keyword));
    }
    let mut pairs = Vec::with_capacity(node.args.len() / 3);
    let mut words = std::mem::take(&mut node.args).into_iter();
    while let (Some(key), Some(value), Some(separator)) = (words.next(), words.next(), words.next())
    {
        if key.is_empty() {
            let error = Error::new(format!("{keyword} names can not be blank"))
                .at(Token::Text(format!("={value}")));
            return Err(error.hint(example(keyword)));
        }
        pairs.push(Pair { key, value, legacy: separator.is_empty() });
    }
    Ok(pairs)
}

fn arg(node: &Node, linter: &mut Linter) -> Result<Arg> {
    if node.args.is_empty() {
        return Err(at_least_one("ARG"));
    }
    let mut args = Vec::with_capacity(node.args.len());
    for word in &node.args {
        let (name, default) =
            word.split_once('=').map_or((word.as_str(), None), |(n, d)| (n, Some(d.to_owned())));
        if name.is_empty() && default.is_some() {
            return Err(Error::new("ARG names can not be blank")
                .at(Token::Text(word.clone()))
                .hint(example("ARG")));
        }
        args.push(ArgPair {
            name: name.to_owned(),
            default,
            description: description(&node.comments, name),
        });
    }
    let names: Vec<&str> = args.iter().map(|a| a.name.as_str()).collect();
    lint_description("ARG", &names, node, linter);
    Ok(Arg { args })
}

const COPY_FLAGS: [(&str, FlagKind); 6] = [
    ("chmod", FlagKind::Text),
    ("chown", FlagKind::Text),
    ("exclude", FlagKind::List),
    ("from", FlagKind::Text),
    ("link", FlagKind::Switch),
    ("parents", FlagKind::Switch),
];

const ADD_FLAGS: [(&str, FlagKind); 7] = [
    ("checksum", FlagKind::Text),
    ("chmod", FlagKind::Text),
    ("chown", FlagKind::Text),
    ("exclude", FlagKind::List),
    ("keep-git-dir", FlagKind::Switch),
    ("link", FlagKind::Switch),
    ("unpack", FlagKind::Switch),
];

fn copy(node: &mut Node) -> Result<Copy> {
    let (flags, files) = files(node, "COPY", &COPY_FLAGS)?;
    Ok(Copy { files, from: flags.text("from"), parents: flags.switch("parents") == Some(true) })
}

fn add(node: &mut Node) -> Result<Add> {
    let (flags, files) = files(node, "ADD", &ADD_FLAGS)?;
    let (keep_git_dir, unpack) = (flags.switch("keep-git-dir"), flags.switch("unpack"));
    Ok(Add { files, checksum: flags.text("checksum"), keep_git_dir, unpack })
}

fn files(
    node: &mut Node,
    keyword: &str,
    known: &[(&'static str, FlagKind)],
) -> Result<(Flags, Files)> {
    if node.args.len() < 2 {
        let message = "requires at least two arguments, but only one was provided. Destination could not be determined";
        return Err(Error::new(format!("{keyword} {message}"))
            .at(Token::Arguments)
            .hint(example(keyword)));
    }
    let flags = Flags::parse(&node.flags, known)?;
    // A word that is not a heredoc is a path.
    let heredoc = |word: &str| heredoc::parse(word).ok().flatten();
    let mut words = std::mem::take(&mut node.args);
    let dest = words.pop().unwrap_or_default();
    if heredoc(&dest).is_some() {
        let error = Error::new(format!("{keyword} cannot accept a heredoc as a destination"))
            .at(Token::Text(dest));
        return Err(error.hint("write the destination after the heredoc"));
    }
    let mut files = Files {
        dest,
        chown: flags.text("chown"),
        chmod: flags.text("chmod"),
        link: flags.switch("link") == Some(true),
        excludes: flags.list("exclude"),
        ..Files::default()
    };
    for word in words {
        let Some(opening) = heredoc(&word) else {
            files.sources.push(word);
            continue;
        };
        // The last one of a name gives the text, as with the reference.
        let body = node
            .heredocs
            .iter()
            .rev()
            .find(|h| h.name == opening.name)
            .map_or("", |h| h.data.as_str());
        let data = if opening.strip { heredoc::strip_tabs(body) } else { body.to_owned() };
        files.contents.push(InlineFile { name: opening.name, data, expand: opening.expand });
    }
    Ok((flags, files))
}

fn command_line(node: &mut Node) -> CommandLine {
    let words = std::mem::take(&mut node.args);
    if node.json { CommandLine::Exec(words) } else { CommandLine::Shell(words.into_iter().next()) }
}

fn run(node: &mut Node) -> Result<Run> {
    let known = [
        ("device", FlagKind::List),
        ("mount", FlagKind::List),
        ("network", FlagKind::Text),
        ("security", FlagKind::Text),
    ];
    let flags = Flags::parse(&node.flags, &known)?;
    let devices =
        flags.list("device").iter().map(|raw| Device::parse(raw)).collect::<Result<_>>()?;
    let mounts =
        flags.list("mount").iter().map(|raw| MountSpec::parse(raw)).collect::<Result<_>>()?;
    let used = flags.used();
    let value = |name: &str| used.iter().any(|u| u == name).then(|| flags.text(name));
    let network = match value("network").as_deref() {
        None | Some("default") => Network::Default,
        Some("none") => Network::None,
        Some("host") => Network::Host,
        Some(other) => Network::Named(other.parse().map_err(|_| {
            Error::new(format!("invalid network mode {}", quote(other)))
                .hint("use default, none, host or the name of one of the daemon's networks")
        })?),
    };
    let security = match value("security").as_deref() {
        None | Some("sandbox") => Security::Sandbox,
        Some("insecure") => Security::Insecure,
        Some(other) => {
            return Err(Error::new(format!("security {} is not valid", quote(other)))
                .hint("use sandbox or insecure"));
        }
    };
    let heredocs = std::mem::take(&mut node.heredocs);
    Ok(Run {
        command: command_line(node),
        heredocs,
        mounts,
        network,
        security,
        devices,
        flags_used: used,
    })
}

fn expose(node: &mut Node) -> Result<Vec<String>> {
    if node.args.is_empty() {
        return Err(at_least_one("EXPOSE"));
    }
    no_flags(node)?;
    let mut ports = std::mem::take(&mut node.args);
    ports.sort();
    Ok(ports)
}

fn volume(node: &mut Node) -> Result<Vec<String>> {
    if node.args.is_empty() {
        return Err(at_least_one("VOLUME"));
    }
    no_flags(node)?;
    let paths: Vec<String> = node.args.iter().map(|path| path.trim().to_owned()).collect();
    if paths.iter().any(String::is_empty) {
        return Err(Error::new("VOLUME specified can not be an empty string").at(Token::Arguments));
    }
    Ok(paths)
}

fn shell(node: &mut Node) -> Result<Vec<String>> {
    no_flags(node)?;
    if node.args.is_empty() {
        return Err(at_least_one("SHELL"));
    }
    if !node.json {
        let hint = "write it as a JSON array, for example SHELL [\"/bin/bash\", \"-c\"]";
        return Err(Error::new("SHELL requires the arguments to be in JSON form")
            .at(Token::Arguments)
            .hint(hint));
    }
    Ok(std::mem::take(&mut node.args))
}

fn onbuild(node: &Node) -> Result<Onbuild> {
    let Some(trigger) = node.args.first() else { return Err(at_least_one("ONBUILD")) };
    no_flags(node)?;
    match trigger.trim().to_uppercase().as_str() {
        "ONBUILD" => {
            return Err(Error::new("Chaining ONBUILD via `ONBUILD ONBUILD` isn't allowed")
                .at(Token::Word(0)));
        }
        trigger @ ("MAINTAINER" | "FROM") => {
            return Err(Error::new(format!("{trigger} isn't allowed as an ONBUILD trigger"))
                .at(Token::Word(0)));
        }
        _ => {}
    }
    let blank = |c: char| matches!(c, '\t' | '\n' | '\x0c' | '\r' | ' ');
    let text = node.original.trim_start_matches(blank);
    let mut trigger =
        text.get("onbuild".len()..).unwrap_or_default().trim_start_matches(blank).to_owned();
    for heredoc in &node.heredocs {
        trigger.push('\n');
        trigger.push_str(&heredoc.data);
        trigger.push_str(&heredoc.name);
    }
    Ok(Onbuild { trigger })
}

fn healthcheck(node: &Node) -> Result<Healthcheck> {
    let Some((kind, words)) = node.args.split_first() else {
        return Err(at_least_one("HEALTHCHECK"));
    };
    let kind = kind.to_uppercase();
    if kind == "NONE" {
        if !words.is_empty() {
            return Err(Error::new("HEALTHCHECK NONE takes no arguments").at(Token::Arguments));
        }
        return Ok(Healthcheck { test: vec![kind], ..Healthcheck::default() });
    }
    let names = ["interval", "retries", "start-interval", "start-period", "timeout"];
    let flags = Flags::parse(&node.flags, &names.map(|n| (n, FlagKind::Text)))?;
    if kind != "CMD" {
        let error = Error::new(format!("Unknown type {} in HEALTHCHECK (try CMD)", quote(&kind)));
        return Err(error.at(Token::Word(0)).hint(example("HEALTHCHECK")));
    }
    if words.is_empty() {
        return Err(Error::new("Missing command after HEALTHCHECK CMD")
            .at(Token::Arguments)
            .hint(example("HEALTHCHECK")));
    }
    let mut test = vec![if node.json { kind } else { "CMD-SHELL".to_owned() }];
    test.extend_from_slice(words);
    let interval = interval(&flags, "interval")?;
    let timeout = self::interval(&flags, "timeout")?;
    let start_period = self::interval(&flags, "start-period")?;
    let start_interval = self::interval(&flags, "start-interval")?;
    let retries = retries(&flags.text("retries"))?;
    Ok(Healthcheck { test, interval, timeout, start_period, start_interval, retries })
}

fn interval(flags: &Flags, name: &str) -> Result<Duration> {
    let text = flags.text(name);
    if text.is_empty() {
        return Ok(Duration::ZERO);
    }
    let flag = || Token::Flag(format!("--{name}"));
    let hint = "write a number with its unit, such as 30s or 1m30s";
    let wrong = |message: String| Error::new(message).at(flag()).hint(hint);
    let value: GoDuration = text.parse().map_err(|e: InvalidDuration| wrong(e.to_string()))?;
    let value = value.to_std().filter(|d| d.is_zero() || *d >= Duration::from_millis(1));
    value.ok_or_else(|| wrong(format!("Interval {} cannot be less than 1ms", quote(name))))
}

fn retries(text: &str) -> Result<i32> {
    if text.is_empty() {
        return Ok(0);
    }
    let flag = || Token::Flag("--retries".into());
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    let numeric = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    let value: i32 = text.parse().map_err(|_| {
        let why = if numeric { "value out of range" } else { "invalid syntax" };
        let error = Error::new(format!("strconv.ParseInt: parsing {}: {why}", quote(text)));
        error.at(flag()).hint("write a whole number, such as --retries=3")
    })?;
    if value < 0 {
        return Err(Error::new(format!("--retries cannot be negative ({value})")).at(flag()));
    }
    Ok(value)
}
