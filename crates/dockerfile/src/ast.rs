//! The tree: what a Dockerfile says, typed, with the words still unexpanded.
//!
//! `FROM` opens a [`Stage`]; every other instruction is an [`Instruction`] holding a typed
//! [`Command`], its own text and its lines. Words keep quotes, escapes and `$variables` until
//! [`Command::expand`] is given the environment of its moment, because that depends on stages and
//! build arguments which only the conversion knows (rows `df.*`).

use std::time::Duration;

use shipway_fault::{Position, Span};
use shipway_oci::NetworkName;

/// The lines an instruction covers in its file, from 1, both ends included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Lines {
    /// First line.
    pub start: i32,
    /// Last line.
    pub end: i32,
}

impl Lines {
    /// One span per line with characters 0, the form clients and source maps know.
    pub fn spans(self) -> Vec<Span> {
        (self.start..=self.end.max(self.start))
            .map(|line| Span {
                start: Position { line, character: 0 },
                end: Position { line, character: 0 },
            })
            .collect()
    }
}

/// A parser directive at the top of the file (rows `df.dir.*`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Directive {
    /// `syntax`, `escape` or `check`.
    pub name: String,
    /// Everything after `=`, trimmed.
    pub value: String,
    /// Its line.
    pub line: i32,
}

/// A whole Dockerfile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dockerfile {
    /// Directives in their order.
    pub directives: Vec<Directive>,
    /// The escape character, `\` or `` ` ``; it is also the one [`crate::Lex`] must be given.
    pub escape: char,
    /// `ARG`s before the first `FROM`, in their order; every `command` is [`Command::Arg`].
    pub global_args: Vec<Instruction>,
    /// Stages in their order. May be empty: then a build answers
    /// `dockerfile contains no stages to build`.
    pub stages: Vec<Stage>,
}

/// A `FROM` and what follows it (row `df.from`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stage {
    /// Name after `AS`, in lower case; empty when it has none.
    pub name: String,
    /// Base image or stage, unexpanded.
    pub base: String,
    /// Value of `--platform`, unexpanded; empty when not given.
    pub platform: String,
    /// `FROM` as it was spelled.
    pub keyword: String,
    /// Text of the `FROM` line, continuation lines joined, trimmed.
    pub source: String,
    /// Lines of the `FROM`.
    pub lines: Lines,
    /// Comment lines directly above, without `#`.
    pub comments: Vec<String>,
    /// What the comment `# <name> <text>` above says about the stage; empty when there is none.
    pub description: String,
    /// The instructions of the stage.
    pub instructions: Vec<Instruction>,
}

/// An instruction other than `FROM`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// The keyword as it was spelled.
    pub keyword: String,
    /// Its text: continuation lines joined, comments out, trimmed, without heredoc bodies. Vertex
    /// names and history show it.
    pub source: String,
    /// Lines it covers, heredoc bodies included.
    pub lines: Lines,
    /// Comment lines directly above, without `#`.
    pub comments: Vec<String>,
    /// What it says.
    pub command: Command,
}

/// What an instruction says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// `ADD` (row `df.add`).
    Add(Add),
    /// `ARG` (row `df.arg`).
    Arg(Arg),
    /// `CMD` (row `df.cmd`).
    Cmd(CommandLine),
    /// `COPY` (row `df.copy`).
    Copy(Copy),
    /// `ENTRYPOINT` (row `df.entrypoint`); no words mean that the config's entrypoint becomes null.
    Entrypoint(CommandLine),
    /// `ENV` (row `df.env`).
    Env(Vec<Pair>),
    /// `EXPOSE`: port words, sorted, unexpanded; one word may expand to several
    /// ([`crate::Lex::words`]) (row `df.expose`).
    Expose(Vec<String>),
    /// `HEALTHCHECK` (row `df.healthcheck`).
    Healthcheck(Healthcheck),
    /// `LABEL` (row `df.label`).
    Label(Vec<Pair>),
    /// `MAINTAINER` (row `df.maintainer`).
    Maintainer(String),
    /// `ONBUILD` (row `df.onbuild`).
    Onbuild(Onbuild),
    /// `RUN` (row `df.run`).
    Run(Run),
    /// `SHELL`: at least one word (row `df.shell`).
    Shell(Vec<String>),
    /// `STOPSIGNAL` (row `df.stopsignal`).
    StopSignal(String),
    /// `USER` (row `df.user`).
    User(String),
    /// `VOLUME`: at least one path (row `df.volume`).
    Volume(Vec<String>),
    /// `WORKDIR` (row `df.workdir`).
    Workdir(String),
}

/// A command with or without a shell around it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CommandLine {
    /// Text for the shell; `None` when the instruction has no words at all.
    Shell(Option<String>),
    /// A JSON array: the words of the process.
    Exec(Vec<String>),
}

impl CommandLine {
    /// The words: of the exec form all, of the shell form the text as one.
    pub fn words(&self) -> Vec<String> {
        match self {
            Self::Shell(text) => text.iter().cloned().collect(),
            Self::Exec(words) => words.clone(),
        }
    }

    /// Whether the stage's shell goes in front.
    pub fn is_shell(&self) -> bool {
        matches!(self, Self::Shell(_))
    }
}

/// A key and a value of `ENV` or `LABEL`, both expanded as words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    /// Key.
    pub key: String,
    /// Value.
    pub value: String,
    /// Whether it was written `key value`, the old form.
    pub legacy: bool,
}

/// One argument of `ARG`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArgPair {
    /// Name.
    pub name: String,
    /// Default, unexpanded, when `=` was written.
    pub default: Option<String>,
    /// What the comment `# <name> <text>` above says; empty when there is none.
    pub description: String,
}

/// `ARG a=1 b`. Its words expand one by one ([`Arg::expand`]) because a build argument may make a
/// bad default harmless.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arg {
    /// The arguments, in their order.
    pub args: Vec<ArgPair>,
}

/// What `COPY` and `ADD` have in common.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Files {
    /// Source paths, wildcards or (for `ADD`) addresses.
    pub sources: Vec<String>,
    /// Files whose text stands in the Dockerfile.
    pub contents: Vec<InlineFile>,
    /// Destination.
    pub dest: String,
    /// `--chown`; empty when not given.
    pub chown: String,
    /// `--chmod`, octal or symbolic; empty when not given.
    pub chmod: String,
    /// `--link`.
    pub link: bool,
    /// `--exclude`s, never expanded.
    pub excludes: Vec<String>,
}

/// A heredoc as a source of `COPY` or `ADD` (row `df.heredoc`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InlineFile {
    /// Its name: the heredoc's word.
    pub name: String,
    /// Its text; leading tabs are already gone where `<<-` asked for it.
    pub data: String,
    /// Whether the text is expanded ([`Command::expand_contents`]).
    pub expand: bool,
}

/// `COPY`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Copy {
    /// Sources, destination and ownership.
    pub files: Files,
    /// `--from`: a stage's name or number, a context or an image; empty when not given.
    pub from: String,
    /// `--parents`.
    pub parents: bool,
}

/// `ADD`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Add {
    /// Sources, destination and ownership.
    pub files: Files,
    /// `--checksum`; empty when not given.
    pub checksum: String,
    /// `--keep-git-dir`, when given.
    pub keep_git_dir: Option<bool>,
    /// `--unpack`, when given.
    pub unpack: Option<bool>,
}

/// `RUN`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// What runs.
    pub command: CommandLine,
    /// Heredocs in the command, in their order; only the shell form has any.
    pub heredocs: Vec<Heredoc>,
    /// `--mount`s, unexpanded.
    pub mounts: Vec<MountSpec>,
    /// `--network`.
    pub network: Network,
    /// `--security`.
    pub security: Security,
    /// `--device`s.
    pub devices: Vec<Device>,
    /// Names of the flags that were given, sorted, without dashes.
    pub flags_used: Vec<String>,
}

/// A heredoc of a command (row `df.heredoc`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heredoc {
    /// The word that ends it.
    pub name: String,
    /// The descriptor in front of `<<`; 0 when none.
    pub fd: u64,
    /// False when the word was quoted.
    pub expand: bool,
    /// Whether it was `<<-`: leading tabs do not count. [`crate::strip_tabs`] removes them; `data`
    /// still has them.
    pub strip: bool,
    /// Its text as written, ends of lines included.
    pub data: String,
}

/// A `--mount` as written. Only `from` is known before expansion, because variables are not allowed
/// there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountSpec {
    /// The option's value, a CSV line.
    pub raw: String,
    /// The last `from=`; empty when there is none.
    pub from: String,
}

/// What kind of mount (rows `df.run.mount.*`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum MountKind {
    /// Files of a context, stage or image.
    #[default]
    Bind,
    /// A directory kept between builds.
    Cache,
    /// Memory.
    Tmpfs,
    /// A secret of the session.
    Secret,
    /// The session's SSH agent.
    Ssh,
}

/// Who may use a cache mount at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Sharing {
    /// All steps at once.
    Shared,
    /// Each step has its own.
    Private,
    /// One after the other.
    Locked,
}

/// An expanded and checked mount.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mount {
    /// Kind.
    pub kind: MountKind,
    /// Stage, context or image; empty when not given.
    pub from: String,
    /// Path in it (for a secret: its id); empty when not given.
    pub source: String,
    /// Where it appears; empty when not given.
    pub target: String,
    /// Whether it may not be written to.
    pub readonly: bool,
    /// Size limit of a tmpfs in bytes; 0 when not given.
    pub size: i64,
    /// `id`; empty when not given.
    pub id: String,
    /// `sharing`, when given.
    pub sharing: Option<Sharing>,
    /// Whether a missing secret or agent fails the step.
    pub required: bool,
    /// Variable that gets the secret; `Some("")` takes the default name.
    pub env: Option<String>,
    /// Permission bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
}

/// `--network` of `RUN` (row `df.run.network`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub enum Network {
    /// The build's network.
    #[default]
    Default,
    /// None.
    None,
    /// The host's.
    Host,
    /// One of the daemon's configuration (row `exec.net.named`); BuildKit's frontend has no such
    /// names.
    Named(NetworkName),
}

/// `--security` of `RUN` (row `df.run.security`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Security {
    /// Confined.
    #[default]
    Sandbox,
    /// Privileged.
    Insecure,
}

/// `--device` of `RUN` (row `df.run.device`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Device {
    /// Its CDI name.
    pub name: String,
    /// Whether a missing device fails the step.
    pub required: bool,
}

/// `HEALTHCHECK`, in the terms of the image config.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Healthcheck {
    /// `["NONE"]`, `["CMD", word…]` or `["CMD-SHELL", text]`.
    pub test: Vec<String>,
    /// `--interval`; zero when not given, as all the others.
    pub interval: Duration,
    /// `--timeout`.
    pub timeout: Duration,
    /// `--start-period`.
    pub start_period: Duration,
    /// `--start-interval`.
    pub start_interval: Duration,
    /// `--retries`.
    pub retries: i32,
}

/// `ONBUILD`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Onbuild {
    /// The instruction's text with its heredocs, as the image config keeps it;
    /// [`crate::parse_trigger`] reads it.
    pub trigger: String,
}
