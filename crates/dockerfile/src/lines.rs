//! The first pass: lines to nodes. It joins continuation lines, drops comments, collects heredoc
//! bodies, and cuts each instruction into keyword, flags and arguments; what they mean is
//! `instruction`'s business (rows `df.cont`, `df.heredoc`).

use crate::{
    ast::{Directive, Heredoc, Lines},
    directive::Directives,
    error::{Error, Result},
    heredoc,
    json::{self, Array},
    token::Token,
    words,
};

/// Longest line the reference reads, its end included.
const MAX_LINE: usize = 64 * 1024;
/// Largest file; far beyond anything a person wrote.
const MAX_FILE: usize = 16 << 20;

/// The instructions there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Keyword {
    Add,
    Arg,
    Cmd,
    Copy,
    Entrypoint,
    Env,
    Expose,
    From,
    Healthcheck,
    Label,
    Maintainer,
    Onbuild,
    Run,
    Shell,
    StopSignal,
    User,
    Volume,
    Workdir,
}

impl Keyword {
    /// All of them as they are usually written, the frequent ones first: among equally near ones,
    /// they are meant.
    pub(crate) const NAMES: [(&str, Self); 18] = [
        ("RUN", Self::Run),
        ("COPY", Self::Copy),
        ("FROM", Self::From),
        ("ENV", Self::Env),
        ("ARG", Self::Arg),
        ("CMD", Self::Cmd),
        ("USER", Self::User),
        ("WORKDIR", Self::Workdir),
        ("ADD", Self::Add),
        ("LABEL", Self::Label),
        ("EXPOSE", Self::Expose),
        ("ENTRYPOINT", Self::Entrypoint),
        ("VOLUME", Self::Volume),
        ("SHELL", Self::Shell),
        ("HEALTHCHECK", Self::Healthcheck),
        ("ONBUILD", Self::Onbuild),
        ("STOPSIGNAL", Self::StopSignal),
        ("MAINTAINER", Self::Maintainer),
    ];

    fn parse(word: &str) -> Option<Self> {
        Self::NAMES
            .iter()
            .find(|(name, _)| name.eq_ignore_ascii_case(word))
            .map(|(_, keyword)| *keyword)
    }
}

/// An instruction cut into pieces.
pub(crate) struct Node {
    pub(crate) keyword: String,
    /// What `keyword` is, if it is one.
    pub(crate) kind: Option<Keyword>,
    pub(crate) flags: Vec<String>,
    pub(crate) args: Vec<String>,
    /// Whether `args` came as a JSON array.
    pub(crate) json: bool,
    /// The joined line as it is, leading blanks gone.
    pub(crate) original: String,
    pub(crate) heredocs: Vec<Heredoc>,
    pub(crate) lines: Lines,
    pub(crate) comments: Vec<String>,
}

/// A file after the first pass.
pub(crate) struct Nodes {
    pub(crate) directives: Vec<Directive>,
    pub(crate) escape: char,
    pub(crate) nodes: Vec<Node>,
    /// Lines at which instructions with empty continuation lines end.
    pub(crate) empty_continuations: Vec<i32>,
}

/// Reads a file. With `mistakes`, instructions that cannot be cut are left out and their errors
/// pushed there.
pub(crate) fn read(text: &str, mistakes: Option<&mut Vec<Error>>) -> Result<Nodes> {
    if text.len() > MAX_FILE {
        return Err(Error::new(format!("dockerfile is larger than {} MiB", MAX_FILE >> 20)));
    }
    let mut reader = Reader {
        rest: text,
        line: 0,
        too_long: false,
        directives: Directives::new("#"),
        escape: '\\',
        comments: Vec::new(),
    };
    reader.file(mistakes)
}

struct Reader<'a> {
    rest: &'a str,
    /// Number of the line read last.
    line: i32,
    too_long: bool,
    directives: Directives,
    escape: char,
    comments: Vec<String>,
}

impl<'a> Reader<'a> {
    fn file(&mut self, mut mistakes: Option<&mut Vec<Error>>) -> Result<Nodes> {
        let mut nodes = Vec::new();
        let mut empty_continuations = Vec::new();
        let mut any = false;
        while let Some((text, start, has_empty)) = self.instruction()? {
            any = true;
            if has_empty {
                empty_continuations.push(self.line);
            }
            match self.node(text, start) {
                Ok(node) => nodes.push(node),
                // An unfinished heredoc has swallowed the rest of the file; nothing is left to go
                // on with.
                Err(error) => {
                    self.comments.clear();
                    match &mut mistakes {
                        Some(mistakes) => mistakes.push(error),
                        None => return Err(error),
                    }
                }
            }
        }
        let here = Lines { start: self.line, end: self.line };
        if !any {
            return Err(Error::new("file with no instructions").on(here));
        }
        if self.too_long {
            return Err(Error::new(format!(
                "dockerfile line greater than max allowed size of {}",
                MAX_LINE - 1
            ))
            .on(here));
        }
        Ok(Nodes {
            directives: std::mem::take(&mut self.directives.found),
            escape: self.escape,
            nodes,
            empty_continuations,
        })
    }

    /// The next line with its end.
    fn next(&mut self) -> Option<&'a str> {
        if self.rest.is_empty() || self.too_long {
            return None;
        }
        let end = self.rest.find('\n').map_or(self.rest.len(), |n| n + 1);
        // Without an end of line, the reference needs room to see the end of the file.
        if end > MAX_LINE || (end == MAX_LINE && !self.rest[..end].ends_with('\n')) {
            self.too_long = true;
            return None;
        }
        let (line, rest) = self.rest.split_at(end);
        self.rest = rest;
        Some(line)
    }

    /// The text of the next instruction, its first line, and whether a blank line was among its
    /// continuation lines.
    fn instruction(&mut self) -> Result<Option<(String, i32, bool)>> {
        loop {
            let Some(raw) = self.next() else { return Ok(None) };
            let raw =
                if self.line == 0 { raw.strip_prefix('\u{feff}').unwrap_or(raw) } else { raw };
            let line = self.first_line(raw)?;
            self.line += 1;
            let start = self.line;
            let (line, mut continues) = continuation(line, self.escape);
            if !continues && line.is_empty() {
                continue;
            }
            let mut text = line.to_owned();
            let mut has_empty = false;
            while continues {
                let Some(raw) = self.next() else { break };
                let line = raw.trim_end_matches(['\r', '\n']);
                self.line += 1;
                let trimmed = line.trim_start();
                if trimmed.starts_with('#') {
                    continue;
                }
                if trimmed.is_empty() {
                    has_empty = true;
                    continue;
                }
                let (line, more) = continuation(line, self.escape);
                text.push_str(line);
                continues = more;
            }
            return Ok(Some((text, start, has_empty)));
        }
    }

    /// What counts of a line that opens an instruction: nothing, if it is a comment.
    fn first_line(&mut self, raw: &'a str) -> Result<&'a str> {
        let line = raw.trim_end_matches(['\r', '\n']).trim_start();
        let is_comment = line.starts_with('#');
        let is_directive = self.directive(line)?;
        if is_comment && !is_directive {
            // Only a `#` in the first column is taken off.
            let mut chars = raw.chars();
            chars.next();
            match chars.as_str().trim() {
                "" => self.comments.clear(),
                comment => self.comments.push(comment.to_owned()),
            }
        }
        Ok(if is_comment { "" } else { line })
    }

    fn directive(&mut self, line: &str) -> Result<bool> {
        let here = Lines { start: self.line, end: self.line };
        if !self.directives.feed(line).map_err(|e| e.on(here).at(Token::Directive))? {
            return Ok(false);
        }
        if let Some(Directive { value, .. }) =
            self.directives.found.last().filter(|d| d.name == "escape")
        {
            self.escape = match value.as_str() {
                "\\" => '\\',
                "`" => '`',
                other => {
                    let error = Error::new(format!(
                        "invalid escape token '{other}' does not match ` or \\"
                    ))
                    .on(here);
                    return Err(error.at(Token::Directive).hint("write # escape=` or # escape=\\"));
                }
            };
        }
        Ok(true)
    }

    fn node(&mut self, text: String, start: i32) -> Result<Node> {
        let here = |end| Lines { start, end };
        let mut cut = cut(&text, self.escape).map_err(|e| e.on(here(self.line)))?;
        let mut heredocs = Vec::new();
        if cut.heredocs && text.contains("<<") {
            for mut heredoc in heredoc::in_line(&text).map_err(|e| e.on(here(self.line)))? {
                if !self.body(&mut heredoc) {
                    let error = Error::new("unterminated heredoc").on(here(self.line));
                    let error = error.at(Token::Text(heredoc.name.clone()));
                    return Err(error.hint(format!(
                        "end the heredoc with a line that says only {}",
                        heredoc.name
                    )));
                }
                heredocs.push(heredoc);
            }
        }
        Ok(Node {
            keyword: cut.keyword.to_owned(),
            kind: cut.kind,
            flags: std::mem::take(&mut cut.flags),
            args: std::mem::take(&mut cut.args),
            json: cut.json,
            heredocs,
            lines: here(self.line),
            comments: std::mem::take(&mut self.comments),
            original: text,
        })
    }

    /// Reads the text of `heredoc`; false when the file ends first.
    fn body(&mut self, heredoc: &mut Heredoc) -> bool {
        while let Some(raw) = self.next() {
            self.line += 1;
            let line = raw.trim_end_matches(['\r', '\n']);
            if heredoc.name == if heredoc.strip { line.trim_start_matches('\t') } else { line } {
                return true;
            }
            heredoc.data.push_str(raw);
        }
        false
    }
}

/// The line without its continuation character, and whether it had one: the escape character, not
/// escaped itself, at the end.
pub(crate) fn continuation(line: &str, escape: char) -> (&str, bool) {
    match line.trim_end_matches([' ', '\t']).strip_suffix(escape) {
        Some(before) if !before.ends_with(escape) => (before, true),
        _ => (line, false),
    }
}

/// An instruction's text in pieces.
struct Cut<'a> {
    keyword: &'a str,
    kind: Option<Keyword>,
    flags: Vec<String>,
    args: Vec<String>,
    json: bool,
    /// Whether heredocs may stand in it.
    heredocs: bool,
}

fn cut(text: &str, escape: char) -> Result<Cut<'_>> {
    let (keyword, flags, rest) = words::split(text, escape);
    let kind = Keyword::parse(keyword);
    if kind != Some(Keyword::Onbuild) {
        let (args, json) = arguments(kind, rest, escape)?;
        return Ok(Cut {
            keyword,
            kind,
            flags,
            args,
            json,
            heredocs: takes_heredocs(kind) && !json,
        });
    }
    // The trigger is cut too, only to find its mistakes and its heredocs; chains are refused later.
    let mut trigger = rest;
    let mut args = Vec::new();
    let mut heredocs = false;
    while !trigger.is_empty() {
        let (inner, _, rest) = words::split(trigger, escape);
        let inner_kind = Keyword::parse(inner);
        let onbuild = inner_kind == Some(Keyword::Onbuild);
        let json = !onbuild && arguments(inner_kind, rest, escape)?.1;
        if args.is_empty() {
            args.push(inner.to_owned());
            heredocs = takes_heredocs(inner_kind) && !json;
        }
        if !onbuild {
            break;
        }
        trigger = rest;
    }
    Ok(Cut { keyword, kind, flags, args, json: false, heredocs })
}

fn takes_heredocs(kind: Option<Keyword>) -> bool {
    matches!(kind, Some(Keyword::Add | Keyword::Copy | Keyword::Run))
}

/// Cuts `rest` as the keyword wants it; true when it was a JSON array. Key-value pairs come as key,
/// value and separator.
fn arguments(kind: Option<Keyword>, rest: &str, escape: char) -> Result<(Vec<String>, bool)> {
    use Keyword::*;
    let plain = |args| Ok((args, false));
    // Unknown instructions are the second pass's to refuse.
    let Some(kind) = kind else { return plain(Vec::new()) };
    match kind {
        Add | Copy | Volume => array_or(rest, words::blank_separated),
        Cmd | Entrypoint | Run | Shell => array_or(rest, words::one),
        Arg => plain(words::quoted(rest, escape).into_iter().map(str::to_owned).collect()),
        Env => plain(words::pairs("ENV", rest, escape)?),
        Label => plain(words::pairs("LABEL", rest, escape)?),
        Expose | From => plain(words::blank_separated(rest)),
        Maintainer | StopSignal | User | Workdir => plain(words::one(rest)),
        Healthcheck => {
            let (check, command) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
            let mut args = words::one(check);
            let (command, json) = array_or(command.trim_start(), words::one)?;
            args.extend(command);
            Ok((args, json))
        }
        Onbuild => plain(Vec::new()),
    }
}

fn array_or(
    rest: &str,
    otherwise: impl FnOnce(&str) -> Vec<String>,
) -> Result<(Vec<String>, bool)> {
    match json::array(rest) {
        Array::Strings(strings) => Ok((strings, true)),
        Array::Mixed => {
            let error = Error::new(
                "when using JSON array syntax, arrays must be comprised of strings only",
            )
            .at(Token::Arguments);
            Err(error.hint("put each word in double quotes, such as [\"sleep\", \"1\"]"))
        }
        Array::Not => Ok((otherwise(rest), false)),
    }
}
