//! A stage on its way from the Dockerfile to a state, a type for each part of the way, and the
//! texts its vertices are named by (rows `dfr.names`, `dfr.history`).

use crate::{explain::ContextUse, named::NamedContext, outline::Outline};
use shipway_dockerfile::{self as df, Lex, Lines};
use shipway_gocompat::parse_bool;
use shipway_llb::{EnvList, State, VertexOptions};
use shipway_oci::{History, ImageConfig, Platform, timestamp};
use std::{borrow::Cow, collections::BTreeSet};

/// Mark of our entries in an image's history.
const COMMENT: &str = "buildkit.dockerfile.v0";
/// The image that is none.
pub const SCRATCH: &str = "scratch";

/// A stage, or an image that instructions copy or mount from.
#[derive(Debug)]
pub struct Stage {
    /// What the Dockerfile says of it; `None` for an image.
    pub declared: Option<Declared>,
    pub base: Base,
    /// Lines of the `FROM`, or of the instruction that names the image.
    pub lines: Lines,
    /// What the `FROM` says, `--platform`.
    pub platform: Option<Platform>,
    /// Stages whose files it takes, and the instructions that do.
    pub deps: Vec<(usize, Lines)>,
    /// What it asks for: what is declared, and once it is converted, all.
    pub outline: Outline,
    pub phase: Phase,
}

/// A stage as it is written.
#[derive(Debug)]
pub struct Declared {
    /// Name after `AS`; may be empty.
    pub name: String,
    /// What the comment above the `FROM` says.
    pub description: String,
    /// Text of the `FROM`.
    pub source: String,
    pub steps: Vec<Step>,
    pub ignore_cache: bool,
    pub titles: Titles,
}

/// What a stage begins as.
#[derive(Debug)]
pub enum Base {
    /// Another stage, by its index.
    Stage {
        index: usize,
        /// Whether the triggers of that stage are among the steps of this one.
        triggers_read: bool,
    },
    /// The whole stage is replaced by a named context; `written` is what its `FROM` names.
    Context { named: Box<NamedContext>, written: String },
    /// An empty filesystem.
    Scratch,
    /// An image, as its name is written with variables expanded.
    Image(String),
}

/// How far a stage is on its way; it never goes back.
#[derive(Debug)]
pub enum Phase {
    /// Known by its `FROM`. Stages on other stages go on from here to being open.
    Waiting,
    /// Its base has been looked up.
    Resolved(Rootfs),
    /// Its instructions are being converted ([`OpenStage`]).
    Open,
    /// Its state is final.
    Converted(ConvertedStage),
}

/// Files, and the config that goes with them.
#[derive(Clone, Debug)]
pub struct Rootfs {
    pub state: State,
    pub image: ImageConfig,
    /// Config of the base image, untouched.
    pub base_image: Option<ImageConfig>,
    /// `None` where a named context does not say.
    pub platform: Option<Platform>,
}

/// A stage while its instructions are converted.
#[derive(Debug)]
pub struct OpenStage {
    pub state: State,
    pub image: ImageConfig,
    base_image: Option<ImageConfig>,
    pub platform: Platform,
    pub ignore_cache: bool,
    pub titles: Titles,
    pub outline: Outline,
    /// The stage that records which paths of this one are used: it shares them with what it is
    /// built on.
    pub path_owner: usize,
    /// `ARG`s so far.
    pub args: Vec<(String, Option<String>)>,
    /// Paths of the main context that it uses.
    pub context_paths: BTreeSet<String>,
    /// Which instructions copy what from the main context.
    pub uses: Vec<ContextUse>,
    /// Whether the current instruction is a trigger.
    pub in_trigger: bool,
    pub workdir_set: bool,
    pub last_cmd: Option<Lines>,
    pub last_entrypoint: Option<Lines>,
    pub last_healthcheck: Option<Lines>,
}

/// A stage whose state is final.
#[derive(Clone, Debug)]
pub struct ConvertedStage {
    pub rootfs: Rootfs,
    /// As of [`OpenStage::path_owner`].
    pub path_owner: usize,
    args: Vec<(String, Option<String>)>,
    workdir_set: bool,
    /// What of it a scanner sees besides the result.
    pub scanned: Scanned,
}

/// What a scanner sees besides the result (`BUILDKIT_SBOM_SCAN_*`, row `df.arg.scan`).
#[derive(Clone, Copy, Debug, Default)]
pub struct Scanned {
    /// The main context, if this is the target.
    pub context: bool,
    /// The stage itself, if it is not.
    pub stage: bool,
}

impl Scanned {
    /// Reads what the arguments of the stage `name` say; those of the file count for all stages.
    fn of(name: &str, args: &[(String, Option<String>)], globals: &EnvList) -> Self {
        let asked = |argument: &str| {
            let own = args
                .iter()
                .rev()
                .find(|(n, value)| n == argument && value.is_some())
                .and_then(|(_, value)| value.as_deref());
            own.or_else(|| globals.get(argument)).is_some_and(|value| match parse_bool(value) {
                Some(yes) => yes,
                None => value.split(',').any(|stage| stage == name),
            })
        };
        Self {
            context: asked("BUILDKIT_SBOM_SCAN_CONTEXT"),
            stage: asked("BUILDKIT_SBOM_SCAN_STAGE"),
        }
    }
}

/// An instruction with the stages that it takes files from.
#[derive(Clone, Debug)]
pub struct Step {
    pub instruction: df::Instruction,
    pub sources: Vec<usize>,
    pub trigger: bool,
}

impl Stage {
    /// Its name after `AS`, if it has one.
    pub fn name(&self) -> &str {
        self.declared.as_ref().map_or("", |d| &d.name)
    }

    /// Its name in messages and in the names of vertices; empty for an image, and for the only
    /// stage.
    pub fn display_name(&self) -> &str {
        self.declared.as_ref().map_or("", |d| &d.titles.stage)
    }

    /// Its instructions.
    pub fn steps(&self) -> &[Step] {
        self.declared.as_ref().map_or(&[], |d| &d.steps)
    }

    /// The stage that it is built on.
    pub fn parent(&self) -> Option<usize> {
        match self.base {
            Base::Stage { index, .. } => Some(index),
            _ => None,
        }
    }

    /// What it is, if its state is final.
    pub fn converted(&self) -> Option<&ConvertedStage> {
        match &self.phase {
            Phase::Converted(converted) => Some(converted),
            _ => None,
        }
    }

    /// Goes on with what its base is. An image is done with that: it has no instructions.
    pub fn resolved(&mut self, index: usize, rootfs: Rootfs) {
        self.phase = match &self.declared {
            Some(_) => Phase::Resolved(rootfs),
            None => Phase::Converted(ConvertedStage::without_steps(index, rootfs)),
        };
    }
}

impl Rootfs {
    /// Nothing.
    pub fn scratch(platform: &Platform) -> Self {
        let (state, image) = (State::scratch(), empty_image(platform));
        Self { state, image, base_image: None, platform: Some(platform.clone()) }
    }
}

impl ConvertedStage {
    /// The stage `index`, which has no instructions.
    pub fn without_steps(index: usize, rootfs: Rootfs) -> Self {
        let (args, scanned) = (Vec::new(), Scanned::default());
        Self { rootfs, path_owner: index, args, workdir_set: false, scanned }
    }

    /// What a stage on this one begins as. Triggers are not passed on.
    fn inherited(&self) -> Self {
        let mut inherited = self.clone();
        inherited.rootfs.image.config.on_build.clear();
        inherited
    }
}

impl OpenStage {
    /// The stage `index`, `declared` like this, on `rootfs`.
    pub fn on_rootfs(
        index: usize,
        declared: &Declared,
        outline: Outline,
        rootfs: Rootfs,
        platform: &Platform,
    ) -> Self {
        let base = ConvertedStage::without_steps(index, rootfs);
        Self::on(declared, outline, base, platform)
    }

    /// A stage, `declared` like this, on the stage `base`; without a platform it is for `platform`.
    pub fn on_stage(
        declared: &Declared,
        outline: Outline,
        base: &ConvertedStage,
        platform: &Platform,
    ) -> Self {
        Self::on(declared, outline, base.inherited(), platform)
    }

    fn on(
        declared: &Declared,
        outline: Outline,
        base: ConvertedStage,
        platform: &Platform,
    ) -> Self {
        let ConvertedStage { rootfs, path_owner, args, workdir_set, .. } = base;
        let Rootfs { state, image, base_image, platform: own } = rootfs;
        Self {
            state,
            image,
            base_image,
            platform: own.unwrap_or_else(|| platform.clone()),
            ignore_cache: declared.ignore_cache,
            titles: declared.titles.clone(),
            outline,
            path_owner,
            args,
            context_paths: BTreeSet::new(),
            uses: Vec::new(),
            in_trigger: false,
            workdir_set,
            last_cmd: None,
            last_entrypoint: None,
            last_healthcheck: None,
        }
    }

    /// The stage `name`, as its instructions have left it.
    pub fn converted(self, name: &str, globals: &EnvList) -> ConvertedStage {
        let Self { state, image, base_image, platform, path_owner, args, workdir_set, .. } = self;
        let rootfs = Rootfs { state, image, base_image, platform: Some(platform) };
        let scanned = Scanned::of(name, &args, globals);
        ConvertedStage { rootfs, path_owner, args, workdir_set, scanned }
    }

    /// Puts the stage's platform on a vertex.
    pub fn on_platform(&self, options: VertexOptions) -> VertexOptions {
        options.platform(self.platform.clone())
    }

    /// Adds an entry to the image's history.
    pub fn commit(&mut self, created_by: String, with_layer: bool, epoch: Option<i64>) {
        self.image.history.push(History {
            created: epoch.map(timestamp::format_seconds),
            created_by,
            comment: COMMENT.into(),
            empty_layer: !with_layer,
            ..History::default()
        });
    }

    /// The name of the stage's next vertex.
    pub fn title(
        &mut self,
        text: &str,
        platform: Option<&Platform>,
        env: Option<&EnvList>,
    ) -> String {
        self.titles.next(self.in_trigger, text, platform, env)
    }

    /// The name of a further vertex of the same instruction.
    pub fn title_again(
        &self,
        text: &str,
        platform: Option<&Platform>,
        env: Option<&EnvList>,
    ) -> String {
        self.titles.current(self.in_trigger, text, platform, env)
    }

    /// Words with the shell in front, for shell forms.
    pub fn with_shell(&self, words: &[String]) -> Vec<String> {
        let mut out = match self.image.config.shell.as_slice() {
            [] if self.image.os == "windows" => ["cmd", "/S", "/C"].map(String::from).to_vec(),
            [] => ["/bin/sh", "-c"].map(String::from).to_vec(),
            shell => shell.to_vec(),
        };
        out.push(words.join(" "));
        out
    }
}

/// Names of a stage's vertices: `[platform stage n/m] text`.
#[derive(Clone, Debug, Default)]
pub struct Titles {
    /// The stage's name; may be empty.
    pub stage: String,
    /// How many vertices have a name.
    pub done: usize,
    /// How many there will be; none is numbered where there are none.
    pub total: usize,
}

impl Titles {
    /// The name of the next vertex.
    pub fn next(
        &mut self,
        trigger: bool,
        text: &str,
        platform: Option<&Platform>,
        env: Option<&EnvList>,
    ) -> String {
        if self.total != 0 {
            self.done += 1;
        }
        self.current(trigger, text, platform, env)
    }

    /// The name of a further vertex of the same instruction.
    fn current(
        &self,
        trigger: bool,
        text: &str,
        platform: Option<&Platform>,
        env: Option<&EnvList>,
    ) -> String {
        if self.total == 0 {
            return text.to_owned();
        }
        let platform = platform
            .map(|p| format!("{}{} ", crate::platform::full(p), cross(p, env)))
            .unwrap_or_default();
        let stage = if self.stage.is_empty() { String::new() } else { format!("{} ", self.stage) };
        let trigger = if trigger { "ONBUILD " } else { "" };
        let width = self.total.ilog10() as usize + 1;
        format!("[{platform}{stage}{:>width$}/{}] {trigger}{text}", self.done, self.total)
    }
}

/// `->arch` where the environment says that the stage compiles for another platform.
fn cross(base: &Platform, env: Option<&EnvList>) -> String {
    let Some(mut target) = env.and_then(target_of) else { return String::new() };
    if target.os.is_empty() {
        target.os.clone_from(&base.os);
    }
    if target.architecture.is_empty() {
        target.architecture.clone_from(&base.architecture);
    }
    let target = target.normalized();
    if target.os != base.os {
        return format!("->{}", crate::platform::full(&target));
    }
    if target.architecture == base.architecture {
        return String::new();
    }
    match target.variant.as_str() {
        "" => format!("->{}", target.architecture),
        variant => format!("->{}/{variant}", target.architecture),
    }
}

fn target_of(env: &EnvList) -> Option<Platform> {
    let mut found = false;
    let mut target = Platform {
        architecture: String::new(),
        os: String::new(),
        os_version: String::new(),
        os_features: Vec::new(),
        variant: String::new(),
    };
    for (name, value) in env.iter() {
        let field = match name {
            "TARGETPLATFORM" => match value.parse() {
                Ok(platform) => return Some(platform),
                Err(_) => continue,
            },
            "TARGETOS" => &mut target.os,
            "TARGETARCH" => &mut target.architecture,
            "TARGETVARIANT" => &mut target.variant,
            _ => continue,
        };
        value.clone_into(field);
        found = true;
    }
    found.then_some(target)
}

/// The instruction's text as vertex names show it: variables replaced where that works, the keyword
/// in capitals.
pub fn shown_text<E: df::Env + ?Sized>(lex: &Lex, source: &str, env: &E) -> String {
    let text = lex.word(source, env).map_or_else(|_| source.to_owned(), |e| e.text);
    match text.split_once(' ') {
        Some((keyword, rest)) => format!("{} {rest}", keyword.to_uppercase()),
        None => text.to_uppercase(),
    }
}

/// An [`EnvList`] for words.
pub struct Vars<'a>(pub &'a EnvList);

impl df::Env for Vars<'_> {
    fn get(&self, name: &str) -> Option<Cow<'_, str>> {
        self.0.get(name).map(Cow::Borrowed)
    }
}

/// An empty image for a platform, as `FROM scratch` begins with.
pub fn empty_image(platform: &Platform) -> ImageConfig {
    let mut image = ImageConfig::empty(platform);
    image.config.working_dir = "/".into();
    if platform.os != "windows" {
        image.config.env = vec![format!("PATH={}", shipway_llb::DEFAULT_PATH)];
    }
    image
}

/// Sets a variable of an image config in its place.
pub fn set_env(env: &mut Vec<String>, name: &str, value: &str) {
    let entry = format!("{name}={value}");
    match env.iter_mut().find(|e| e.split_once('=').map_or(e.as_str(), |(n, _)| n) == name) {
        Some(old) => *old = entry,
        None => env.push(entry),
    }
}
