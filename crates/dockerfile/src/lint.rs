//! Lint rules: their names, words and settings (rows `dfl.*`).
//!
//! The parser reports what it can see; the conversion reports the rest through the same [`Linter`],
//! which drops what the file's settings (`# check=skip=…;error=…;experimental=…`) or the comment
//! above an instruction switch off.

use shipway_fault::Span;
use shipway_gocompat::{parse_bool, quote};

use crate::{
    ast::{Lines, Stage},
    directive,
    error::{Error, Result},
    place::Source,
    token::Token,
};

macro_rules! rules {
    ($($name:ident, $kebab:literal, $description:literal;)*) => {
        /// A rule.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[allow(missing_docs)]
        pub enum Rule { $($name),* }

        impl Rule {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// Its name, as settings and messages say it.
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => stringify!($name)),* }
            }

            /// What it asks for.
            pub fn description(self) -> &'static str {
                match self { $(Self::$name => $description),* }
            }

            /// The page that explains it; empty for a rule without one.
            pub fn url(self) -> &'static str {
                match self {
                    $(Self::$name if $kebab.is_empty() => "",
                    Self::$name => concat!("https://docs.docker.com/go/dockerfile/rule/", $kebab, "/"),)*
                }
            }
        }
    };
}

rules! {
    StageNameCasing, "stage-name-casing", "Stage names should be lowercase";
    FromAsCasing, "from-as-casing", "The 'as' keyword should match the case of the 'from' keyword";
    NoEmptyContinuation, "no-empty-continuation", "Empty continuation lines will become errors in a future release";
    ConsistentInstructionCasing, "consistent-instruction-casing", "All commands within the Dockerfile should use the same casing (either upper or lower)";
    DuplicateStageName, "duplicate-stage-name", "Stage names should be unique";
    ReservedStageName, "reserved-stage-name", "Reserved words should not be used as stage names";
    JSONArgsRecommended, "json-args-recommended", "JSON arguments recommended for ENTRYPOINT/CMD to prevent unintended behavior related to OS signals";
    MaintainerDeprecated, "maintainer-deprecated", "The MAINTAINER instruction is deprecated, use a label instead to define an image author";
    UndefinedArgInFrom, "undefined-arg-in-from", "FROM command must use declared ARGs";
    WorkdirRelativePath, "workdir-relative-path", "Relative workdir without an absolute workdir declared within the build can have unexpected results if the base image changes";
    UndefinedVar, "undefined-var", "Variables should be defined before their use";
    MultipleInstructionsDisallowed, "multiple-instructions-disallowed", "Multiple instructions of the same type should not be used in the same stage";
    LegacyKeyValueFormat, "legacy-key-value-format", "Legacy key/value format with whitespace separator should not be used";
    InvalidBaseImagePlatform, "", "Base image platform does not match expected target platform";
    RedundantTargetPlatform, "redundant-target-platform", "Setting platform to predefined $TARGETPLATFORM in FROM is redundant as this is the default behavior";
    SecretsUsedInArgOrEnv, "secrets-used-in-arg-or-env", "Sensitive data should not be used in the ARG or ENV commands";
    InvalidDefaultArgInFrom, "invalid-default-arg-in-from", "Default value for global ARG results in an empty or invalid base image name";
    FromPlatformFlagConstDisallowed, "from-platform-flag-const-disallowed", "FROM --platform flag should not use a constant value";
    CopyIgnoredFile, "copy-ignored-file", "Attempting to Copy file that is excluded by .dockerignore";
    InvalidDefinitionDescription, "invalid-definition-description", "Comment for build stage or argument should follow the format: `# <arg/stage name> <description>`. If this is not intended to be a description comment, add an empty line or comment between the instruction and the comment.";
    ExposeProtoCasing, "expose-proto-casing", "Protocol in EXPOSE instruction should be lowercase";
    ExposeInvalidFormat, "expose-invalid-format", "IP address and host-port mapping should not be used in EXPOSE instruction. This will become an error in a future release";
}

impl Rule {
    /// Whether it only runs when asked for.
    pub fn experimental(self) -> bool {
        self == Self::InvalidDefinitionDescription
    }
}

/// A violation: a rule and what it is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Finding<'a> {
    StageNameCasing {
        stage: &'a str,
    },
    FromAsCasing {
        from: &'a str,
        r#as: &'a str,
    },
    NoEmptyContinuation,
    ConsistentInstructionCasing {
        keyword: &'a str,
        majority: &'a str,
    },
    DuplicateStageName {
        stage: &'a str,
    },
    ReservedStageName {
        stage: &'a str,
    },
    /// `line` is the command as the shell would get it.
    JSONArgsRecommended {
        keyword: &'a str,
        line: &'a str,
    },
    MaintainerDeprecated,
    UndefinedArgInFrom {
        arg: &'a str,
        suggestion: Option<&'a str>,
    },
    WorkdirRelativePath {
        path: &'a str,
    },
    UndefinedVar {
        name: &'a str,
        suggestion: Option<&'a str>,
    },
    MultipleInstructionsDisallowed {
        keyword: &'a str,
    },
    /// Key and value are as they are written.
    LegacyKeyValueFormat {
        keyword: &'a str,
        key: &'a str,
        value: &'a str,
    },
    InvalidBaseImagePlatform {
        image: &'a str,
        expected: &'a str,
        actual: &'a str,
    },
    RedundantTargetPlatform {
        platform: &'a str,
    },
    SecretsUsedInArgOrEnv {
        instruction: &'a str,
        key: &'a str,
    },
    InvalidDefaultArgInFrom {
        base: &'a str,
    },
    FromPlatformFlagConstDisallowed {
        platform: &'a str,
    },
    /// `verb` is `Copy` or `Add`; `rule` says which line of the ignore file it is.
    CopyIgnoredFile {
        verb: &'a str,
        path: &'a str,
        rule: &'a str,
    },
    InvalidDefinitionDescription {
        instruction: &'a str,
        name: &'a str,
    },
    ExposeProtoCasing {
        port: &'a str,
    },
    ExposeInvalidFormat {
        port: &'a str,
    },
}

impl Finding<'_> {
    /// The rule it violates.
    pub fn rule(&self) -> Rule {
        match self {
            Self::StageNameCasing { .. } => Rule::StageNameCasing,
            Self::FromAsCasing { .. } => Rule::FromAsCasing,
            Self::NoEmptyContinuation => Rule::NoEmptyContinuation,
            Self::ConsistentInstructionCasing { .. } => Rule::ConsistentInstructionCasing,
            Self::DuplicateStageName { .. } => Rule::DuplicateStageName,
            Self::ReservedStageName { .. } => Rule::ReservedStageName,
            Self::JSONArgsRecommended { .. } => Rule::JSONArgsRecommended,
            Self::MaintainerDeprecated => Rule::MaintainerDeprecated,
            Self::UndefinedArgInFrom { .. } => Rule::UndefinedArgInFrom,
            Self::WorkdirRelativePath { .. } => Rule::WorkdirRelativePath,
            Self::UndefinedVar { .. } => Rule::UndefinedVar,
            Self::MultipleInstructionsDisallowed { .. } => Rule::MultipleInstructionsDisallowed,
            Self::LegacyKeyValueFormat { .. } => Rule::LegacyKeyValueFormat,
            Self::InvalidBaseImagePlatform { .. } => Rule::InvalidBaseImagePlatform,
            Self::RedundantTargetPlatform { .. } => Rule::RedundantTargetPlatform,
            Self::SecretsUsedInArgOrEnv { .. } => Rule::SecretsUsedInArgOrEnv,
            Self::InvalidDefaultArgInFrom { .. } => Rule::InvalidDefaultArgInFrom,
            Self::FromPlatformFlagConstDisallowed { .. } => Rule::FromPlatformFlagConstDisallowed,
            Self::CopyIgnoredFile { .. } => Rule::CopyIgnoredFile,
            Self::InvalidDefinitionDescription { .. } => Rule::InvalidDefinitionDescription,
            Self::ExposeProtoCasing { .. } => Rule::ExposeProtoCasing,
            Self::ExposeInvalidFormat { .. } => Rule::ExposeInvalidFormat,
        }
    }

    /// The words users see.
    pub fn message(&self) -> String {
        let near = |mark: &str, s: Option<&str>| {
            s.map(|s| format!(" (did you mean {mark}{s}?)")).unwrap_or_default()
        };
        match *self {
            Self::StageNameCasing { stage } => format!("Stage name '{stage}' should be lowercase"),
            Self::FromAsCasing { from, r#as } => {
                format!("'{as}' and '{from}' keywords' casing do not match")
            }
            Self::NoEmptyContinuation => "Empty continuation line".into(),
            Self::ConsistentInstructionCasing { keyword, majority } => {
                format!(
                    "Command '{keyword}' should match the case of the command majority ({majority})"
                )
            }
            Self::DuplicateStageName { stage } => {
                format!("Duplicate stage name {}, stage names should be unique", quote(stage))
            }
            Self::ReservedStageName { stage } => format!(
                "Stage name should not use the same name as reserved stage {}",
                quote(stage)
            ),
            Self::JSONArgsRecommended { keyword, .. } => {
                format!(
                    "JSON arguments recommended for {keyword} to prevent unintended behavior related to OS signals"
                )
            }
            Self::MaintainerDeprecated => {
                "Maintainer instruction is deprecated in favor of using label".into()
            }
            Self::UndefinedArgInFrom { arg, suggestion } => {
                format!("FROM argument '{arg}' is not declared{}", near("", suggestion))
            }
            Self::WorkdirRelativePath { path } => {
                format!(
                    "Relative workdir {} can have unexpected results if the base image changes",
                    quote(path)
                )
            }
            Self::UndefinedVar { name, suggestion } => {
                format!("Usage of undefined variable '${name}'{}", near("$", suggestion))
            }
            Self::MultipleInstructionsDisallowed { keyword } => {
                format!(
                    "Multiple {keyword} instructions should not be used in the same stage because only the last one will be used"
                )
            }
            Self::LegacyKeyValueFormat { keyword, .. } => {
                format!(
                    "\"{keyword} key=value\" should be used instead of legacy \"{keyword} key value\" format"
                )
            }
            Self::InvalidBaseImagePlatform { image, expected, actual } => {
                format!(
                    "Base image {image} was pulled with platform {}, expected {} for current build",
                    quote(actual),
                    quote(expected)
                )
            }
            Self::RedundantTargetPlatform { platform } => {
                format!(
                    "Setting platform to predefined {platform} in FROM is redundant as this is the default behavior"
                )
            }
            Self::SecretsUsedInArgOrEnv { instruction, key } => {
                format!(
                    "Do not use ARG or ENV instructions for sensitive data ({instruction} {})",
                    quote(key)
                )
            }
            Self::InvalidDefaultArgInFrom { base } => {
                format!("Default value for ARG {base} results in empty or invalid base image name")
            }
            Self::FromPlatformFlagConstDisallowed { platform } => {
                format!("FROM --platform flag should not use constant value {}", quote(platform))
            }
            Self::CopyIgnoredFile { verb, path, .. } => {
                format!(
                    "Attempting to {verb} file {} that is excluded by .dockerignore",
                    quote(path)
                )
            }
            Self::InvalidDefinitionDescription { instruction, name } => {
                format!(
                    "Comment for {instruction} should follow the format: `# {name} <description>`"
                )
            }
            Self::ExposeProtoCasing { port } => {
                format!("Defined protocol '{port}' in EXPOSE instruction should be lowercase")
            }
            Self::ExposeInvalidFormat { port } => {
                format!(
                    "EXPOSE instruction should not define an IP address or host-port mapping, found '{port}'"
                )
            }
        }
    }

    /// What it is about in the instruction it is reported on.
    pub fn token(&self) -> Option<Token> {
        Some(match *self {
            // It is reported where the instruction ends, as the reference does.
            Self::NoEmptyContinuation => return None,
            Self::StageNameCasing { .. }
            | Self::DuplicateStageName { .. }
            | Self::ReservedStageName { .. } => Token::Word(2),
            Self::FromAsCasing { .. } => Token::Word(1),
            Self::InvalidBaseImagePlatform { .. } | Self::InvalidDefaultArgInFrom { .. } => {
                Token::Word(0)
            }
            Self::ConsistentInstructionCasing { .. }
            | Self::MaintainerDeprecated
            | Self::MultipleInstructionsDisallowed { .. } => Token::Keyword,
            Self::JSONArgsRecommended { .. }
            | Self::LegacyKeyValueFormat { .. }
            | Self::WorkdirRelativePath { .. } => Token::Arguments,
            Self::UndefinedArgInFrom { arg: name, .. } | Self::UndefinedVar { name, .. } => {
                Token::Variable(name.to_owned())
            }
            Self::RedundantTargetPlatform { .. } | Self::FromPlatformFlagConstDisallowed { .. } => {
                Token::Flag("--platform".to_owned())
            }
            Self::SecretsUsedInArgOrEnv { key: text, .. }
            | Self::CopyIgnoredFile { path: text, .. }
            | Self::ExposeProtoCasing { port: text }
            | Self::ExposeInvalidFormat { port: text }
            | Self::InvalidDefinitionDescription { name: text, .. } => Token::Text(text.to_owned()),
        })
    }

    /// What to do about it.
    pub fn fix(&self) -> Fix {
        let advice = |advice: String| Fix { advice, replacement: None };
        let write = |text: String| Fix { advice: format!("write {text}"), replacement: Some(text) };
        let nearest = |near: &str| Fix {
            advice: format!("did you mean {near}?"),
            replacement: Some(near.to_owned()),
        };
        match *self {
            Self::StageNameCasing { stage } => write(stage.to_lowercase()),
            Self::FromAsCasing { from, .. } => write(if from == from.to_lowercase() { "as" } else { "AS" }.to_owned()),
            Self::NoEmptyContinuation => advice("remove the empty line, or begin it with #".into()),
            Self::ConsistentInstructionCasing { keyword, majority: "lowercase" } => write(keyword.to_lowercase()),
            Self::ConsistentInstructionCasing { keyword, .. } => write(keyword.to_uppercase()),
            Self::DuplicateStageName { .. } => advice("give one of the two stages another name".into()),
            Self::ReservedStageName { stage } => advice(format!("give the stage another name than {stage}")),
            Self::JSONArgsRecommended { keyword, line } => match json_form(line) {
                Some(array) => write(array),
                None => advice(format!(r#"write {keyword} ["executable", "argument"], or say which shell is meant with SHELL"#)),
            },
            Self::MaintainerDeprecated => advice(r#"write LABEL org.opencontainers.image.authors="…""#.into()),
            Self::UndefinedArgInFrom { suggestion: Some(near), .. } | Self::UndefinedVar { suggestion: Some(near), .. } => nearest(near),
            Self::UndefinedArgInFrom { arg, .. } => advice(format!("declare it above the first FROM: ARG {arg}")),
            Self::UndefinedVar { name, .. } => advice(format!("declare it in this stage with ARG {name} or ENV {name}=…")),
            Self::WorkdirRelativePath { path } => advice(format!("begin with an absolute path, such as WORKDIR /{path}")),
            Self::MultipleInstructionsDisallowed { keyword } => advice(format!("remove it: only the last {keyword} of a stage counts")),
            Self::LegacyKeyValueFormat { keyword, key, value } => match pair(key, value) {
                Some(pair) => write(pair),
                None => advice(format!(r#"write {keyword} {key}="…""#)),
            },
            Self::InvalidBaseImagePlatform { expected, actual, .. } => {
                advice(format!("take an image for {expected}, or write FROM --platform={actual} if that one is meant"))
            }
            Self::RedundantTargetPlatform { .. } => Fix { advice: "remove it".into(), replacement: Some(String::new()) },
            Self::SecretsUsedInArgOrEnv { key, .. } => {
                advice(format!("give it to the instructions that need it: RUN --mount=type=secret,id={key},env={key} …"))
            }
            Self::InvalidDefaultArgInFrom { .. } => advice("give the ARGs in it defaults that make it the name of an image".into()),
            Self::FromPlatformFlagConstDisallowed { .. } => {
                advice("remove it, or write --platform=$BUILDPLATFORM for a stage that runs where the build does".into())
            }
            Self::CopyIgnoredFile { rule: "", .. } => advice("take it out of the ignore file, or do not copy it".into()),
            Self::CopyIgnoredFile { rule, .. } => advice(format!("do not copy it, or change {rule}")),
            Self::InvalidDefinitionDescription { name, .. } => {
                advice(format!("begin the comment with {name}, or put an empty line between the comment and the instruction"))
            }
            Self::ExposeProtoCasing { port } => write(port.to_lowercase()),
            Self::ExposeInvalidFormat { port } => write(port.rsplit(':').next().unwrap_or(port).to_owned()),
        }
    }
}

/// The command line as a JSON array, if a shell would find nothing in it but words.
fn json_form(line: &str) -> Option<String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "./-_=:,@+% ".contains(c);
    let words: Vec<String> = line.split_whitespace().map(quote).collect();
    // What has an assignment in front is for a shell too.
    let command = words.first().is_some_and(|word| !word.contains('='));
    (command && line.chars().all(plain)).then(|| format!("[{}]", words.join(", ")))
}

/// `key=value`, with quotes where the value needs them, if they alone do it.
fn pair(key: &str, value: &str) -> Option<String> {
    if key.contains(['"', '\'', '\\']) || value.contains(['"', '\'', '\\', '`']) {
        return None;
    }
    Some(if value.contains(char::is_whitespace) {
        format!("{key}=\"{value}\"")
    } else {
        format!("{key}={value}")
    })
}

/// What would make a violation go away.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fix {
    /// What to do, for people.
    pub advice: String,
    /// What to write in the place of the violation's [`Token`], where that alone is enough.
    pub replacement: Option<String>,
}

/// A violation that was reported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lint {
    /// The rule.
    pub rule: Rule,
    /// What is wrong.
    pub message: String,
    /// Where.
    pub lines: Lines,
    /// What on these lines; `None` is all of it.
    pub token: Option<Token>,
    /// What to do about it.
    pub fix: Fix,
}

impl Lint {
    /// `Rule: message (line N)`, the short text of a warning.
    pub fn short(&self) -> String {
        let place = if self.lines.start > 0 {
            format!(" (line {})", self.lines.start)
        } else {
            String::new()
        };
        format!("{}: {}{place}", self.rule.name(), self.message)
    }

    /// The lines in `source` with the place in them.
    pub fn spans(&self, source: &Source<'_>) -> Vec<Span> {
        source.spans(self.lines, self.token.as_ref())
    }
}

/// Some or all rules.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    all: bool,
    rules: Vec<String>,
}

impl Selection {
    fn parse(list: &str) -> Self {
        match list.trim() {
            "all" => Self { all: true, rules: Vec::new() },
            list => {
                Self { all: false, rules: list.split(',').map(|r| r.trim().to_owned()).collect() }
            }
        }
    }

    fn has(&self, rule: Rule) -> bool {
        self.all || self.rules.iter().any(|r| r == rule.name())
    }
}

/// Settings of `# check=`, of `BUILDKIT_DOCKERFILE_CHECK`, or of a comment above an instruction.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LintConfig {
    /// Rules that do not run.
    pub skip: Selection,
    /// Experimental rules that do.
    pub experimental: Selection,
    /// Whether a violation fails the build.
    pub error: bool,
}

impl LintConfig {
    /// Reads `skip=A,B;error=true;experimental=all`.
    pub fn parse(text: &str) -> Result<Self> {
        let mut config = Self::default();
        let text = text.trim();
        if text.is_empty() {
            return Ok(config);
        }
        for part in text.splitn(3, ';') {
            let Some((key, value)) = part.split_once('=') else {
                return Err(Error::new(format!("invalid check option {}", quote(part))));
            };
            match key.trim() {
                "skip" => config.skip = Selection::parse(value),
                "experimental" => config.experimental = Selection::parse(value),
                "error" => {
                    let value = value.trim();
                    config.error = parse_bool(value).ok_or_else(|| {
                        let cause =
                            format!("strconv.ParseBool: parsing {}: invalid syntax", quote(value));
                        Error::new(format!("failed to parse check option {}: {cause}", quote(part)))
                    })?;
                }
                key => return Err(Error::new(format!("invalid check option {}", quote(key)))),
            }
        }
        Ok(config)
    }

    /// The settings that the file's own `# check=` directive asks for.
    pub fn of_file(text: &[u8]) -> Result<Self> {
        match directive::find("check", text) {
            Some(found) => Self::parse(&found.first_word).map_err(|e| Error {
                message: format!("failed to parse check options: {}", e.message),
                ..e
            }),
            None => Ok(Self::default()),
        }
    }

    fn admits(&self, rule: Rule) -> bool {
        if rule.experimental() { self.experimental.has(rule) } else { !self.skip.has(rule) }
    }

    /// What the comments above an instruction change: they switch rules off, and experimental ones
    /// on.
    fn of_comments(comments: &[String]) -> Option<Self> {
        let directive = comments
            .iter()
            .find_map(|c| directive::parse_line(c).filter(|(name, _)| name == "check"))?;
        Self::parse(directive.1.split(' ').next().unwrap_or_default()).ok()
    }
}

/// Collects violations that the settings admit.
#[derive(Clone, Debug, Default)]
pub struct Linter {
    config: LintConfig,
    found: Vec<Lint>,
}

impl Linter {
    /// A linter with the file's settings ([`LintConfig::of_file`]) or a client's.
    pub fn new(config: LintConfig) -> Self {
        Self { config, found: Vec::new() }
    }

    /// Reports a violation on `lines`; `comments` are those above the instruction, which may change
    /// the settings.
    pub fn report(&mut self, finding: Finding<'_>, lines: Lines, comments: &[String]) {
        self.add(finding, lines, comments, true);
    }

    /// The same for an instruction that does not stand on `lines` itself: a trigger of the image
    /// there.
    pub fn report_inherited(&mut self, finding: Finding<'_>, lines: Lines, comments: &[String]) {
        self.add(finding, lines, comments, false);
    }

    fn add(&mut self, finding: Finding<'_>, lines: Lines, comments: &[String], stands_there: bool) {
        let rule = finding.rule();
        let local = LintConfig::of_comments(comments);
        let admitted = match &local {
            Some(local) if rule.experimental() => self.config.admits(rule) || local.admits(rule),
            Some(local) => self.config.admits(rule) && local.admits(rule),
            None => self.config.admits(rule),
        };
        if admitted {
            let mut fix = finding.fix();
            fix.replacement = fix.replacement.filter(|_| stands_there);
            let token = finding.token().filter(|_| stands_there);
            self.found.push(Lint { rule, message: finding.message(), lines, token, fix });
        }
    }

    /// What was reported, in its order.
    pub fn found(&self) -> &[Lint] {
        &self.found
    }

    /// Hands over what was reported.
    pub fn take(&mut self) -> Vec<Lint> {
        std::mem::take(&mut self.found)
    }

    /// The failure that `error=true` asks for when something was reported (row `dfl.error`); ask
    /// before [`Linter::take`].
    pub fn error(&self) -> Result<()> {
        if !self.config.error || self.found.is_empty() {
            return Ok(());
        }
        let mut rules: Vec<&str> = Vec::new();
        for lint in &self.found {
            if !rules.contains(&lint.rule.name()) {
                rules.push(lint.rule.name());
            }
        }
        Err(Error::new(format!("lint violation found for rules: {}", rules.join(", "))))
    }
}

/// Rules about all stages together: names and the case of keywords.
pub(crate) fn stages(stages: &[Stage], linter: &mut Linter) {
    let mut seen = std::collections::HashSet::new();
    for stage in stages.iter().filter(|s| !s.name.is_empty()) {
        if matches!(stage.name.as_str(), "context" | "scratch") {
            linter.report(Finding::ReservedStageName { stage: &stage.name }, stage.lines, &[]);
        }
        if !seen.insert(stage.name.as_str()) {
            linter.report(Finding::DuplicateStageName { stage: &stage.name }, stage.lines, &[]);
        }
    }
    casing(stages, linter);
}

fn casing(stages: &[Stage], linter: &mut Linter) {
    let keywords = || {
        stages.iter().flat_map(|stage| {
            let rest = stage.instructions.iter().map(|i| (i.keyword.as_str(), i.lines));
            std::iter::once((stage.keyword.as_str(), stage.lines)).chain(rest)
        })
    };
    let lower = |k: &str| !k.bytes().any(|b| b.is_ascii_uppercase());
    let upper = |k: &str| !k.bytes().any(|b| b.is_ascii_lowercase());
    let lowers = keywords().filter(|(k, _)| lower(k)).count();
    let uppers = keywords().filter(|(k, _)| upper(k)).count();
    let majority = if lowers > uppers { "lowercase" } else { "uppercase" };
    for (keyword, lines) in keywords() {
        if !(if lowers > uppers { lower(keyword) } else { upper(keyword) }) {
            linter.report(Finding::ConsistentInstructionCasing { keyword, majority }, lines, &[]);
        }
    }
}

/// Whether a variable's name looks like that of a secret (rule `SecretsUsedInArgOrEnv`).
pub fn is_secret_name(name: &str) -> bool {
    const SECRET: [&str; 10] = [
        "apikey",
        "auth",
        "credential",
        "credentials",
        "key",
        "password",
        "pword",
        "passwd",
        "secret",
        "token",
    ];
    const HARMLESS: [&str; 3] = ["public", "file", "version"];
    let words = || name.split('_').map(str::to_lowercase);
    words().any(|w| SECRET.contains(&w.as_str()))
        && !words().any(|w| HARMLESS.contains(&w.as_str()))
}
