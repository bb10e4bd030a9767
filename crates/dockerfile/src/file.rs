//! The whole of a file: both passes, and what only shows when everything is there.

use crate::{
    ast::{Command, Dockerfile, Instruction, Lines},
    error::{Error, Result},
    instruction::{self, Parsed},
    lines::{self, Node},
    lint::{self, Finding, Linter},
    token::Token,
};

impl Dockerfile {
    /// Parses a file, lints aside.
    pub fn parse(text: &[u8]) -> Result<Self> {
        Self::parse_with(text, &mut Linter::default())
    }

    /// Parses a file and reports to `linter` what the rules say about its text. Stops at the first
    /// mistake, with the words and lines the reference has for it; what was reported until then
    /// stays with the linter.
    pub fn parse_with(text: &[u8], linter: &mut Linter) -> Result<Self> {
        let text = String::from_utf8_lossy(text);
        let nodes = lines::read(&text, None)?;
        let mut builder = Builder::default();
        for line in &nodes.empty_continuations {
            linter.report(Finding::NoEmptyContinuation, Lines { start: *line, end: *line }, &[]);
        }
        for node in nodes.nodes {
            builder.add(node, linter)?;
        }
        Ok(builder.finish(nodes.directives, nodes.escape, linter))
    }

    /// Parses as much of a file as can be understood and gives every mistake in it, in the order of
    /// its lines.
    pub fn diagnose(text: &[u8], linter: &mut Linter) -> (Option<Self>, Vec<Error>) {
        let text = String::from_utf8_lossy(text);
        let mut mistakes = Vec::new();
        let file = match lines::read(&text, Some(&mut mistakes)) {
            Err(error) => {
                mistakes.push(error);
                None
            }
            Ok(nodes) => {
                let mut builder = Builder::default();
                for line in &nodes.empty_continuations {
                    linter.report(
                        Finding::NoEmptyContinuation,
                        Lines { start: *line, end: *line },
                        &[],
                    );
                }
                for node in nodes.nodes {
                    mistakes.extend(builder.add(node, linter).err());
                }
                Some(builder.finish(nodes.directives, nodes.escape, linter))
            }
        };
        mistakes.sort_by_key(|e| e.lines.map(|l| l.start));
        (file, mistakes)
    }

    /// The stage called `name`, whatever its case; the last one counts.
    pub fn stage(&self, name: &str) -> Option<usize> {
        let name = name.to_lowercase();
        self.stages.iter().rposition(|s| !s.name.is_empty() && s.name == name)
    }
}

/// Parses an `ONBUILD` trigger of an image or a stage as an instruction standing on `lines`.
pub fn parse_trigger(text: &str, lines: Lines) -> Result<Instruction> {
    let mut nodes = lines::read(text, None)?.nodes;
    let (Some(mut node), true) = (nodes.pop(), nodes.is_empty()) else {
        return Err(Error::new("onbuild trigger should be a single expression"));
    };
    node.lines = lines;
    match instruction::parse(node, &mut Linter::default()).map_err(|e| e.on(lines))? {
        Parsed::Instruction(instruction) => Ok(instruction),
        // The reference names its own type here.
        Parsed::Stage(_) => Err(Error::new("*instructions.Stage is not a command type").on(lines)),
    }
}

#[derive(Default)]
struct Builder {
    global_args: Vec<Instruction>,
    stages: Vec<crate::ast::Stage>,
}

impl Builder {
    fn add(&mut self, node: Node, linter: &mut Linter) -> Result<()> {
        let lines = node.lines;
        let parsed = instruction::parse(node, linter).map_err(|e| Error {
            message: format!("dockerfile parse error on line {}: {}", lines.start, e.message),
            ..e.on(lines)
        })?;
        match (parsed, self.stages.last_mut()) {
            (Parsed::Stage(stage), _) => self.stages.push(stage),
            (Parsed::Instruction(instruction), Some(stage)) => stage.instructions.push(instruction),
            (Parsed::Instruction(instruction), None)
                if matches!(instruction.command, Command::Arg(_)) =>
            {
                self.global_args.push(instruction);
            }
            (Parsed::Instruction(_), None) => {
                let error =
                    Error::new("no build stage in current context").on(lines).at(Token::Keyword);
                return Err(
                    error.hint("start with a FROM instruction; only ARG may come before it")
                );
            }
        }
        Ok(())
    }

    fn finish(
        self,
        directives: Vec<crate::ast::Directive>,
        escape: char,
        linter: &mut Linter,
    ) -> Dockerfile {
        lint::stages(&self.stages, linter);
        Dockerfile { directives, escape, global_args: self.global_args, stages: self.stages }
    }
}
