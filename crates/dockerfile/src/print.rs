//! The tree as text again, in one canonical form: what it prints parses to the same tree, texts and
//! lines of instructions aside.
//!
//! Every instruction takes one line and its heredocs; words stay raw, so nothing is expanded or
//! lost. Two oddities of the language cannot be written again: two inline files of one `COPY` with
//! the same name and different texts, and words that end in a blank which does not separate words
//! (such as U+00A0) when they come last.

use std::fmt::{self, Write};

use crate::{ast::*, heredoc, json, words::BLANKS};

/// Lines are broken before they reach the length the parser refuses.
const MAX_LINE: usize = 32 * 1024;

impl fmt::Display for Dockerfile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for directive in &self.directives {
            writeln!(f, "# {}={}", directive.name, directive.value)?;
        }
        // So that a comment which looks like a directive is not taken for one.
        writeln!(f)?;
        for instruction in &self.global_args {
            print_instruction(f, instruction, self.escape)?;
        }
        for stage in &self.stages {
            print_comments(f, &stage.comments)?;
            let mut line = Line::new(&stage.keyword, self.escape);
            line.text_flag("platform", &stage.platform);
            let name =
                if stage.name.is_empty() { String::new() } else { format!(" AS {}", stage.name) };
            line.rest(&format!("{}{name}", stage.base));
            line.print(f)?;
            for instruction in &stage.instructions {
                print_instruction(f, instruction, self.escape)?;
            }
        }
        Ok(())
    }
}

fn print_comments(f: &mut fmt::Formatter<'_>, comments: &[String]) -> fmt::Result {
    comments.iter().try_for_each(|comment| writeln!(f, "# {comment}"))
}

fn print_instruction(
    f: &mut fmt::Formatter<'_>,
    instruction: &Instruction,
    escape: char,
) -> fmt::Result {
    print_comments(f, &instruction.comments)?;
    let mut line = Line::new(&instruction.keyword, escape);
    match &instruction.command {
        Command::Add(add) => {
            line.files_flags(&add.files);
            line.text_flag("checksum", &add.checksum);
            line.switch("keep-git-dir", add.keep_git_dir);
            line.switch("unpack", add.unpack);
            line.files(&add.files);
        }
        Command::Copy(copy) => {
            line.text_flag("from", &copy.from);
            line.files_flags(&copy.files);
            line.switch("parents", copy.parents.then_some(true));
            line.files(&copy.files);
        }
        Command::Arg(arg) => {
            let word = |a: &ArgPair| {
                a.default.as_ref().map_or(a.name.clone(), |d| format!("{}={d}", a.name))
            };
            line.rest(&arg.args.iter().map(word).collect::<Vec<_>>().join(" "));
        }
        Command::Cmd(command) | Command::Entrypoint(command) => line.command(command),
        Command::Env(pairs) | Command::Label(pairs) => {
            let word =
                |p: &Pair| format!("{}{}{}", p.key, if p.legacy { ' ' } else { '=' }, p.value);
            line.rest(&pairs.iter().map(word).collect::<Vec<_>>().join(" "));
        }
        Command::Expose(ports) => line.rest(&ports.join(" ")),
        Command::Healthcheck(check) => line.healthcheck(check),
        Command::Maintainer(text)
        | Command::StopSignal(text)
        | Command::User(text)
        | Command::Workdir(text) => line.rest(text),
        // Its heredocs are in its text already, and so is what must not be taken for a flag.
        Command::Onbuild(onbuild) => line.text.push_str(&format!(" {}", onbuild.trigger)),
        Command::Run(run) => line.run(run),
        Command::Shell(words) => line.rest(&array(words)),
        Command::Volume(paths) => line.list(paths),
    }
    line.print(f)
}

/// One instruction on its way out.
struct Line {
    text: String,
    escape: char,
    bodies: String,
}

impl Line {
    fn new(keyword: &str, escape: char) -> Self {
        Self { text: keyword.to_owned(), escape, bodies: String::new() }
    }

    /// What follows the flags.
    fn rest(&mut self, text: &str) {
        if text.starts_with("--") {
            self.text.push_str(" --");
        }
        if !text.is_empty() {
            self.text.push(' ');
            self.text.push_str(text);
        }
    }

    fn flag(&mut self, name: &str, value: &str) {
        self.text.push_str(" --");
        self.text.push_str(name);
        self.text.push('=');
        let mut open = None;
        for c in value.chars() {
            let wanted = match c {
                '"' => Some('\''),
                '\'' => Some('"'),
                c if c.is_whitespace() => open.or(Some('"')),
                _ => open,
            };
            if wanted != open {
                self.text.extend(open);
                self.text.extend(wanted);
                open = wanted;
            }
            // Escapes work in all quotes here.
            self.text.extend((c == self.escape).then_some(c));
            self.text.push(c);
        }
        self.text.extend(open);
    }

    fn text_flag(&mut self, name: &str, value: &str) {
        if !value.is_empty() {
            self.flag(name, value);
        }
    }

    fn switch(&mut self, name: &str, value: Option<bool>) {
        if let Some(value) = value {
            self.flag(name, if value { "true" } else { "false" });
        }
    }

    fn command(&mut self, command: &CommandLine) {
        match command {
            CommandLine::Shell(text) => self.rest(text.as_deref().unwrap_or_default()),
            CommandLine::Exec(words) => self.rest(&array(words)),
        }
    }

    /// Words between blanks where that is possible, else an array.
    fn list(&mut self, words: &[String]) {
        let plain = words.join(" ");
        let separable =
            words.iter().all(|w| !w.is_empty() && !w.contains(BLANKS)) && plain.trim() == plain;
        if separable && json::array(&plain) == json::Array::Not {
            self.rest(&plain)
        } else {
            self.rest(&array(words))
        }
    }

    fn files_flags(&mut self, files: &Files) {
        self.text_flag("chown", &files.chown);
        self.text_flag("chmod", &files.chmod);
        self.switch("link", files.link.then_some(true));
        for exclude in &files.excludes {
            self.flag("exclude", exclude);
        }
    }

    fn files(&mut self, files: &Files) {
        // Heredocs come first, because quotes in other words could swallow them.
        let heredocs = files.contents.iter().map(|c| opening(&c.name, c.expand));
        let words: Vec<String> =
            heredocs.chain(files.sources.iter().cloned()).chain([files.dest.clone()]).collect();
        let before = self.text.len();
        self.list(&words);
        if self.text[before..].starts_with(" [")
            && json::array(&self.text[before..]) != json::Array::Not
        {
            return;
        }
        for opened in heredoc::in_line(&self.text).unwrap_or_default() {
            let data = files
                .contents
                .iter()
                .find(|c| c.name == opened.name)
                .map_or("", |c| c.data.as_str());
            self.bodies.push_str(&format!("{data}{}\n", opened.name));
        }
    }

    fn run(&mut self, run: &Run) {
        for device in &run.devices {
            let name = csv_field(&format!("name={}", device.name));
            self.flag(
                "device",
                &format!("{name}{}", if device.required { ",required" } else { "" }),
            );
        }
        for mount in &run.mounts {
            self.flag("mount", &mount.raw);
        }
        let used = |name: &str| run.flags_used.iter().any(|u| u == name);
        if used("network") {
            let mode = match &run.network {
                Network::Default => "default",
                Network::None => "none",
                Network::Host => "host",
                Network::Named(name) => name.as_str(),
            };
            self.flag("network", mode);
        }
        if used("security") {
            let mode = match run.security {
                Security::Sandbox => "sandbox",
                Security::Insecure => "insecure",
            };
            self.flag("security", mode);
        }
        self.command(&run.command);
        for heredoc in &run.heredocs {
            self.bodies.push_str(&format!("{}{}\n", heredoc.data, heredoc.name));
        }
    }

    fn healthcheck(&mut self, check: &Healthcheck) {
        let intervals = [
            ("interval", check.interval),
            ("timeout", check.timeout),
            ("start-period", check.start_period),
            ("start-interval", check.start_interval),
        ];
        for (name, interval) in intervals.into_iter().filter(|(_, i)| !i.is_zero()) {
            self.flag(name, &format!("{}ns", interval.as_nanos()));
        }
        if check.retries != 0 {
            self.flag("retries", &check.retries.to_string());
        }
        match check.test.split_first() {
            Some((kind, words)) if kind == "CMD" => self.rest(&format!("CMD {}", array(words))),
            Some((kind, words)) if kind == "CMD-SHELL" => {
                self.rest(&format!("CMD {}", words.join(" ")))
            }
            _ => self.rest("NONE"),
        }
    }

    fn print(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut length = 0;
        let mut before = ' ';
        for c in self.text.chars() {
            if c == '\n' {
                length = 0;
            } else if length > MAX_LINE
                && before != self.escape
                && !c.is_whitespace()
                && c != '#'
                && c != self.escape
            {
                f.write_char(self.escape)?;
                f.write_char('\n')?;
                length = 0;
            }
            f.write_char(c)?;
            length += c.len_utf8();
            before = c;
        }
        let doubled = format!("{0}{0}", self.escape);
        if before == self.escape && !self.text.ends_with(&doubled) {
            // A blank that does not let the escape continue the line, and is trimmed off again.
            f.write_char('\u{a0}')?;
        }
        writeln!(f)?;
        f.write_str(&self.bodies)
    }
}

fn array(words: &[String]) -> String {
    let mut out = String::from("[");
    for (n, word) in words.iter().enumerate() {
        out.push_str(if n == 0 { "\"" } else { ", \"" });
        for c in word.chars() {
            match c {
                '"' | '\\' => out.extend(['\\', c]),
                c if c < ' ' => out.push_str(&format!("\\u{:04x}", c as u32)),
                c => out.push(c),
            }
        }
        out.push('"');
    }
    out.push(']');
    out
}

fn csv_field(field: &str) -> String {
    if field.contains([',', '"']) {
        format!("\"{}\"", field.replace('"', "\"\""))
    } else {
        field.to_owned()
    }
}

/// `<<` and a word that reads as `name`.
fn opening(name: &str, expand: bool) -> String {
    let mut out = String::from("<<");
    if !expand && !name.contains('\'') {
        out.push_str(&format!("'{name}'"));
        return out;
    }
    let open = (!expand).then_some('"');
    out.extend(open);
    for c in name.chars() {
        let plain = c.is_alphanumeric() || matches!(c, '_' | '.');
        let escaped = if expand { !plain } else { matches!(c, '"' | '$' | '\\') };
        out.extend(escaped.then_some('\\'));
        out.push(c);
    }
    out.extend(open);
    out
}
