//! A stage while it is converted, and the texts its vertices are named by (rows `dfr.names`,
//! `dfr.history`).

use crate::{explain::ContextUse, named::NamedContext, outline::Outline};
use shipway_dockerfile::{self as df, Lex, Lines};
use shipway_gocompat::parse_bool;
use shipway_llb::{EnvList, State};
use shipway_oci::{History, ImageConfig, Platform, timestamp};
use std::{borrow::Cow, collections::BTreeSet};

/// Mark of our entries in an image's history.
const COMMENT: &str = "buildkit.dockerfile.v0";
/// The image that is none.
pub const SCRATCH: &str = "scratch";

/// How far a stage is on its way from the Dockerfile to a state. It never goes back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Progress {
    /// Known by its `FROM`.
    #[default]
    Declared,
    /// Its base has been looked up; a stage on another stage does without.
    Resolved,
    /// Its state is final.
    Converted,
}

/// A stage, or an image that an instruction copies or mounts from (`implicit`).
#[derive(Debug, Default)]
pub struct Stage {
    /// Name after `AS`.
    pub name: String,
    /// What the comment above the `FROM` says.
    pub description: String,
    /// Base with variables expanded; the full image name once it is resolved.
    pub base: String,
    /// Text of the `FROM`.
    pub source: String,
    pub lines: Lines,
    pub state: State,
    pub image: ImageConfig,
    /// Config of the base image, untouched.
    pub base_image: Option<ImageConfig>,
    pub named: Option<NamedContext>,
    pub platform: Option<Platform>,
    /// The stage that this one is built on.
    pub parent: Option<usize>,
    /// How far it is.
    pub progress: Progress,
    /// Whether the triggers of the stage that it is built on are among its steps.
    pub triggers_read: bool,
    /// Stages whose files it takes, and the instructions that do.
    pub deps: Vec<(usize, Lines)>,
    /// `ARG`s so far.
    pub args: Vec<(String, Option<String>)>,
    pub outline: Outline,
    pub steps: Vec<Step>,
    /// Paths of the main context that it uses.
    pub context_paths: BTreeSet<String>,
    /// Which instructions copy what from the main context.
    pub uses: Vec<ContextUse>,
    /// The stage that records which paths of this one are used: it shares them with what it is
    /// built on.
    pub path_owner: usize,
    pub ignore_cache: bool,
    /// What of it a scanner sees besides the result.
    pub scanned: Scanned,
    pub implicit: bool,
    /// Its name in the names of vertices.
    pub display_name: String,
    pub done: usize,
    pub total: usize,
    /// Whether the current instruction is a trigger.
    pub in_trigger: bool,
    pub workdir_set: bool,
    pub last_cmd: Option<Lines>,
    pub last_entrypoint: Option<Lines>,
    pub last_healthcheck: Option<Lines>,
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
    /// Reads what a stage's arguments say; those of the file count for all stages.
    pub fn of(stage: &Stage, globals: &EnvList) -> Self {
        let asked = |name: &str| {
            let own = stage
                .args
                .iter()
                .rev()
                .find(|(n, value)| n == name && value.is_some())
                .and_then(|(_, value)| value.as_deref());
            own.or_else(|| globals.get(name)).is_some_and(|value| match parse_bool(value) {
                Some(yes) => yes,
                None => value.split(',').any(|name| name == stage.name),
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
    /// Whether its state is final.
    pub fn is_converted(&self) -> bool {
        self.progress == Progress::Converted
    }

    /// Makes the state final of what has no instructions: an image that is only copied from.
    pub fn convert_if_implicit(&mut self) {
        if self.implicit {
            self.progress = Progress::Converted;
        }
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

    /// `[platform stage n/m] text`: the name of the stage's next vertex.
    pub fn title(
        &mut self,
        text: &str,
        platform: Option<&Platform>,
        env: Option<&EnvList>,
    ) -> String {
        if self.total == 0 {
            return text.to_owned();
        }
        self.done += 1;
        self.title_again(text, platform, env)
    }

    /// The name of a further vertex of the same instruction.
    pub fn title_again(
        &self,
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
        let stage = if self.display_name.is_empty() {
            String::new()
        } else {
            format!("{} ", self.display_name)
        };
        let trigger = if self.in_trigger { "ONBUILD " } else { "" };
        let width = self.total.ilog10() as usize + 1;
        format!("[{platform}{stage}{:>width$}/{}] {trigger}{text}", self.done, self.total)
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
