//! Looking into a step of a build (rows `bx.debug.build`, `nd.builderdebug`): processes at our
//! terminal, a small language to go about in, files, and what the step was.

mod files;
mod looking;
mod monitor;
mod process;
mod terminal;

use shipway_client::{Invocation, Step};
use shipway_fault::{Fault, Result};
use shipway_gocompat::parse_bool;

use crate::{csv, failure};

pub(crate) use self::{
    files::{copy, listing},
    looking::{Looking, When},
    monitor::{Monitor, Next},
    process::{Attached, Processes},
    terminal::Terminal,
};

/// What is run in a step where nothing is asked for.
const SHELL: &str = "/bin/sh";

/// What to run in a step, as `--invoke` says it (row `bx.debug.build`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Invoke {
    entrypoint: Vec<String>,
    args: Vec<String>,
    env: Vec<String>,
    user: Option<String>,
    cwd: Option<String>,
    tty: Option<bool>,
}

impl Invoke {
    /// Reads a command, or `key=value,…` with args, entrypoint, cmd, env, user, cwd, tty.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let mut invoke = Self::default();
        if matches!(text, "" | "default" | "on-error" | "debug-shell") {
            return Ok(invoke);
        }
        if !text.contains('=') {
            invoke.args = words(text)?;
            return Ok(invoke);
        }
        for field in csv::fields(text)? {
            let (key, value) = field.split_once('=').ok_or_else(|| {
                Fault::invalid(format!("--invoke: invalid field {field:?}")).hint(
                    "want a command, or args=COMMAND,env=NAME=VALUE,cwd=DIR,user=NAME,tty=BOOL",
                )
            })?;
            match key {
                "args" | "cmd" => invoke.args = words(value)?,
                "entrypoint" => invoke.entrypoint = words(value)?,
                "env" => invoke.env.push(value.to_owned()),
                "user" => invoke.user = Some(value.to_owned()),
                "cwd" => invoke.cwd = Some(value.to_owned()),
                "tty" => {
                    invoke.tty = Some(parse_bool(value).ok_or_else(|| {
                        Fault::invalid(format!("--invoke: failed to parse tty: {value:?}"))
                    })?);
                }
                other => {
                    return Err(Fault::invalid(format!("--invoke: unknown key {other:?}")));
                }
            }
        }
        Ok(invoke)
    }

    /// The command `args`.
    pub(crate) fn command(args: Vec<String>) -> Self {
        Self { args, ..Self::default() }
    }

    /// The process in `step`; with a terminal if there is one, unless it was asked for without.
    pub(crate) fn of(&self, step: &Step, terminal: bool) -> Invocation {
        let mut args = [self.entrypoint.clone(), self.args.clone()].concat();
        if args.is_empty() {
            args.push(SHELL.to_owned());
        }
        let mut process = step.invocation(args, self.tty.unwrap_or(true) && terminal);
        for entry in &self.env {
            let name = entry.split('=').next().unwrap_or(entry);
            process.env.retain(|known| known.split('=').next() != Some(name));
            process.env.push(entry.clone());
        }
        if let Some(user) = &self.user {
            process.user.clone_from(user);
        }
        if let Some(cwd) = &self.cwd {
            process.cwd.clone_from(cwd);
        }
        process
    }
}

/// The words of a command, as a shell has them: quotes and backslashes keep blanks.
pub(crate) fn words(text: &str) -> Result<Vec<String>> {
    let (mut all, mut word, mut quote) = (Vec::new(), None::<String>, None);
    let mut characters = text.chars();
    while let Some(c) = characters.next() {
        match (quote, c) {
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (Some(q), c) if q == c => quote = None,
            (None | Some('"'), '\\') => {
                let next = characters.next();
                word.get_or_insert_default().extend(next);
            }
            (None, c) if c.is_whitespace() => all.extend(word.take()),
            (_, c) => word.get_or_insert_default().push(c),
        }
    }
    if quote.is_some() {
        return Err(Fault::invalid(format!("{text:?} has a quote that does not end")));
    }
    all.extend(word);
    Ok(all)
}

/// What a step is: where it is written, what ran, and what it saw.
pub(crate) fn described(step: &Step) -> String {
    let mut out = String::new();
    if let Some(place) = &step.place {
        out.push_str(&failure::excerpt(&place.file, &place.spans));
    }
    let process = step.invocation(Vec::new(), false);
    let mut row = |title: &str, text: &str| {
        if !text.is_empty() {
            out.push_str(&format!("{title:<11}{text}\n"));
        }
    };
    row("step", &step.name);
    let quoted: Vec<String> = process.args.iter().map(|a| quoted(a)).collect();
    row("command", &quoted.join(" "));
    row("directory", &process.cwd);
    row("user", if process.user.is_empty() { "root" } else { &process.user });
    for mount in step.mounts() {
        let notes = [(mount.readonly, "read-only"), (mount.lost, "not kept: empty")];
        let notes: String =
            notes.iter().filter(|(is, _)| *is).map(|(_, note)| format!(", {note}")).collect();
        row("mount", &format!("{} ({}{notes})", mount.path, mount.kind));
    }
    for entry in &process.env {
        row("variable", entry);
    }
    out
}

/// An argument as a shell would take it.
pub(crate) fn quoted(argument: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:@%+,".contains(c);
    match !argument.is_empty() && argument.chars().all(is_plain) {
        true => argument.to_owned(),
        false => format!("'{}'", argument.replace('\'', "'\\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_read_as_buildx_reads_them() {
        let args = |text: &str| Invoke::parse(text).map(|i| [i.entrypoint, i.args].concat());
        for default in ["", "default", "on-error"] {
            assert_eq!(args(default).unwrap(), [""; 0], "{default}");
        }
        assert_eq!(args("/bin/bash").unwrap(), ["/bin/bash"]);
        assert_eq!(args("sh -c 'a b'").unwrap(), ["sh", "-c", "a b"]);
        let all = r#"entrypoint=sh,"args=-c id",env=A=1,user=u,cwd=/w,tty=false"#;
        let invoke = Invoke::parse(all).unwrap();
        assert_eq!(
            invoke,
            Invoke {
                entrypoint: vec!["sh".into()],
                args: vec!["-c".into(), "id".into()],
                env: vec!["A=1".into()],
                user: Some("u".into()),
                cwd: Some("/w".into()),
                tty: Some(false),
            }
        );
        for (wrong, why) in [
            ("args=a,b", "invalid field \"b\""),
            ("what=a", "unknown key \"what\""),
            ("tty=perhaps", "failed to parse tty"),
            ("args='a", "does not end"),
        ] {
            let refused = Invoke::parse(wrong).unwrap_err().to_string();
            assert!(refused.contains(why), "{refused}");
        }
    }

    #[test]
    fn words_are_those_of_a_shell() {
        assert_eq!(words(r#"a "b c"'d' \ e ''"#).unwrap(), ["a", "b cd", " e", ""]);
        assert_eq!(words("  ").unwrap(), [""; 0]);
        for argument in ["a", "a b", "it's", "", "$x"] {
            assert_eq!(words(&quoted(argument)).unwrap(), [argument]);
        }
    }
}
