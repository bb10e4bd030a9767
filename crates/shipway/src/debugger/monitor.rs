//! A person in a step: a process at the terminal, and beside it a prompt, to which Ctrl-a c leads
//! (row `bx.debug.build`).

use std::path::Path;

use shipway_client::{DebugBuild, DebugContainer, Step};
use shipway_fault::{Fault, Result, nearest};

use super::{Attached, Invoke, Processes, Terminal, copy, described, listing, words};
use crate::output;

const PROMPT: &str = "(shipway) ";

/// What the monitor understands.
const COMMANDS: [(&str, &str); 13] = [
    ("attach [N]", "go to a process, or the latest that runs"),
    ("cat PATH", "print a file"),
    ("cp PATH TO", "copy a file or directory to this machine"),
    ("env", "show the step's variables, mounts and place in the Dockerfile"),
    ("exec COMMAND", "start a process beside the others, and go to it"),
    ("exit", "end the session"),
    ("help", "show this"),
    ("kill N", "kill a process"),
    ("ls [PATH]", "list a directory"),
    ("ps", "list processes"),
    ("reload", "build again"),
    ("rollback [COMMAND]", "begin anew in the step as it was left"),
    ("where", "show the step's place in the Dockerfile"),
];

/// How a session in a step ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// The person has seen enough.
    Exit,
    /// The build is to run again.
    Reload,
}

/// A session in a step.
pub(crate) struct Monitor<'a> {
    build: &'a DebugBuild,
    step: &'a Step,
    invoke: &'a Invoke,
    /// Whether there is a build that can run again.
    reloads: bool,
    container: DebugContainer,
    processes: Processes,
}

impl<'a> Monitor<'a> {
    /// Runs the process of `invoke` in `step`, and then what is asked for at the prompt.
    pub(crate) async fn run(
        build: &'a DebugBuild,
        step: &'a Step,
        invoke: &'a Invoke,
        reloads: bool,
        terminal: &mut Terminal,
    ) -> Result<Next> {
        let container = build.container(step).await?;
        let processes = Processes::default();
        let mut monitor = Self { build, step, invoke, reloads, container, processes };
        let next = monitor.session(terminal).await;
        monitor.container.release().await;
        next
    }

    async fn session(&mut self, terminal: &mut Terminal) -> Result<Next> {
        if terminal.is_terminal() {
            eprintln!("Ctrl-a c leads to the monitor, whose command `help` lists the others");
        }
        self.begin(terminal).await?;
        loop {
            if terminal.is_terminal() {
                eprint!("{PROMPT}");
            }
            let Some(line) = terminal.line().await else { return Ok(Next::Exit) };
            let command = match words(&line) {
                Ok(words) => words,
                Err(fault) => {
                    eprintln!("{fault}");
                    continue;
                }
            };
            let Some((command, arguments)) = command.split_first() else { continue };
            match self.obey(command, arguments, terminal).await {
                Ok(None) => {}
                Ok(Some(next)) => return Ok(next),
                Err(fault) if fault.is_cancelled() => return Err(fault),
                Err(fault) => {
                    eprint!("{}", crate::failure::describe(&fault, crate::Persona::Shipway))
                }
            }
        }
    }

    /// Starts the process that was asked for, and puts it at the terminal.
    async fn begin(&mut self, terminal: &mut Terminal) -> Result<()> {
        let process = self.invoke.of(self.step, terminal.is_terminal());
        let number = self.processes.start(&self.container, process).await?;
        self.attach(number, terminal).await
    }

    async fn attach(&self, number: usize, terminal: &mut Terminal) -> Result<()> {
        match self.processes.attach(number, terminal).await {
            Ok(Attached::Ended(0)) => {}
            Ok(Attached::Ended(code)) => eprintln!("process {number} exited with code {code}"),
            Ok(Attached::Away) => eprintln!("\nprocess {number} goes on"),
            Err(fault) if fault.is_cancelled() => return Err(fault),
            Err(fault) => eprintln!("process {number}: {fault}"),
        }
        Ok(())
    }

    async fn obey(
        &mut self,
        command: &str,
        arguments: &[String],
        terminal: &mut Terminal,
    ) -> Result<Option<Next>> {
        let number = |text: &String| {
            text.parse::<usize>().map_err(|_| Fault::invalid(format!("{text:?} is not a number")))
        };
        let wants = |what: &str| Fault::invalid(format!("usage: {what}"));
        match (command, arguments) {
            ("exit" | "quit" | "disconnect", []) => return Ok(Some(Next::Exit)),
            ("reload", []) if self.reloads => return Ok(Some(Next::Reload)),
            ("reload", []) => return Err(Fault::invalid("there is no build to run again")),
            ("help", _) => {
                for (usage, what) in COMMANDS {
                    eprintln!("  {usage:<20}{what}");
                }
            }
            ("ps" | "list", []) => output::print(&self.processes.list())?,
            ("attach", []) => {
                let latest = self.processes.latest();
                let latest = latest.ok_or_else(|| Fault::not_found("no process runs"))?;
                self.attach(latest, terminal).await?;
            }
            ("attach", [one]) => self.attach(number(one)?, terminal).await?,
            ("kill", [one]) => self.processes.kill(number(one)?).await?,
            ("exec", []) => return Err(wants("exec COMMAND")),
            ("exec", command) => {
                // The container lives as long as its first process.
                if self.processes.latest().is_none() {
                    self.renew().await?;
                }
                let process = Invoke::command(command.to_vec());
                let process = process.of(self.step, terminal.is_terminal());
                let number = self.processes.start(&self.container, process).await?;
                self.attach(number, terminal).await?;
            }
            ("rollback", command) => {
                self.renew().await?;
                let asked = Invoke::command(command.to_vec());
                let invoke = if command.is_empty() { self.invoke } else { &asked };
                let process = invoke.of(self.step, terminal.is_terminal());
                let number = self.processes.start(&self.container, process).await?;
                self.attach(number, terminal).await?;
            }
            ("env", []) => output::print(&described(self.step))?,
            ("where", []) => {
                let place = self.step.place.as_ref();
                let place = place.ok_or_else(|| Fault::not_found("the step is in no file"))?;
                output::print(&crate::failure::excerpt(&place.file, &place.spans))?;
            }
            ("ls", []) => {
                let here = self.step.invocation(Vec::new(), false).cwd;
                output::print(&listing(&self.container.list(&here).await?))?;
            }
            ("ls", [path]) => output::print(&listing(&self.container.list(path).await?))?,
            ("cat", [path]) => self.container.read(path, output::print_bytes).await?,
            ("cp", [from, to]) => copy(&self.container, from, Path::new(to)).await?,
            (other, _) => return Err(unknown(other)),
        }
        Ok(None)
    }

    /// Begins in a new container: what processes changed is gone.
    async fn renew(&mut self) -> Result<()> {
        let fresh = self.build.container(self.step).await?;
        self.processes = Processes::default();
        std::mem::replace(&mut self.container, fresh).release().await;
        Ok(())
    }
}

/// A command that is not one, or has other arguments.
fn unknown(command: &str) -> Fault {
    let name = |usage: &'static str| usage.split(' ').next().unwrap_or(usage);
    let known = COMMANDS.iter().find(|(usage, _)| name(usage) == command);
    if let Some((usage, _)) = known {
        return Fault::invalid(format!("usage: {usage}"));
    }
    let fault = Fault::invalid(format!("unknown command {command:?}"));
    match nearest(command, COMMANDS.iter().map(|(usage, _)| name(usage))) {
        Some(near) => fault.hint(format!("did you mean {near}?")),
        None => fault.hint("`help` lists commands"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_understood_is_named() {
        let shown =
            |command: &str| crate::failure::describe(&unknown(command), crate::Persona::Shipway);
        assert_eq!(shown("cp"), "ERROR: usage: cp PATH TO\n");
        assert_eq!(
            shown("atach"),
            "ERROR: unknown command \"atach\"\nhint: did you mean attach?\n"
        );
        assert!(shown("zzzzzz").contains("`help` lists commands"));
    }
}
