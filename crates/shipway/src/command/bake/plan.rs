//! From files and flags to what is to be built.

use std::{
    collections::BTreeMap,
    io::{self, Read},
    time::SystemTime,
};

use shipway_bake::{Attest, DEFAULT_FILES, File, Granted, Host, MAX_FILE, Options, Parsed, Plan};
use shipway_fault::{Code, Context, Fault, Result};
use shipway_gocompat::{parse_bool, path};
use shipway_oci::Platform;

use super::{
    Args,
    remote::{self, Elsewhere},
};
use crate::command::build::{self, is_remote};

/// This machine.
struct Here;

impl Host for Here {
    fn env(&self, name: &str) -> Option<String> {
        std::env::var(name).ok()
    }

    fn read(&self, path: &str) -> io::Result<Option<Vec<u8>>> {
        match std::fs::metadata(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Ok(found) if found.is_dir() => return Ok(None),
            other => other?,
        };
        bounded(std::fs::File::open(path)?).map(Some)
    }

    fn home(&self) -> Option<String> {
        std::env::var("HOME").ok().filter(|home| !home.is_empty())
    }

    fn now(&self) -> SystemTime {
        SystemTime::now()
    }

    fn random(&self, bytes: &mut [u8]) -> Result<()> {
        let failed = |e| Fault::io("read random numbers", e);
        std::fs::File::open("/dev/urandom").and_then(|mut f| f.read_exact(bytes)).map_err(failed)
    }
}

/// This machine, for a definition from elsewhere, which names no files of it.
struct Closed;

impl Host for Closed {
    fn env(&self, name: &str) -> Option<String> {
        Here.env(name)
    }

    fn read(&self, _: &str) -> io::Result<Option<Vec<u8>>> {
        Ok(None)
    }

    fn home(&self) -> Option<String> {
        None
    }

    fn now(&self) -> SystemTime {
        Here.now()
    }

    fn random(&self, bytes: &mut [u8]) -> Result<()> {
        Here.random(bytes)
    }
}

/// Where definitions come from besides this machine, and the context of the command line.
pub(super) struct Origin {
    pub(super) elsewhere: Option<Elsewhere>,
    pub(super) context: String,
}

/// One byte more than a definition may have, at most.
fn bounded(from: impl Read) -> io::Result<Vec<u8>> {
    let mut data = Vec::new();
    from.take(MAX_FILE as u64 + 1).read_to_end(&mut data)?;
    Ok(data)
}

/// What is to be built, and what may be done for it.
pub(super) struct Planned {
    /// Whether the definition is from elsewhere.
    pub(super) is_remote: bool,
    pub(super) plan: Plan,
    pub(super) granted: Granted,
    /// The arguments that `shipway build` would have for each target.
    pub(super) builds: BTreeMap<String, build::Args>,
}

/// The names of files that are to be read; those that are looked for may be missing.
fn names(args: &Args, is_remote: bool) -> Result<(Vec<String>, bool)> {
    if !args.files.is_empty() {
        return Ok((args.files.clone(), false));
    }
    if let Ok(files) = std::env::var("BUILDX_BAKE_FILE") {
        let separator = std::env::var("BUILDX_BAKE_PATH_SEPARATOR").unwrap_or_default();
        let separator = if separator.is_empty() { ":" } else { &separator };
        let files: Vec<String> =
            files.split(separator).map(|f| f.trim().to_owned()).filter(|f| !f.is_empty()).collect();
        for file in files.iter().filter(|f| *f != "-" && !is_remote) {
            std::fs::metadata(file)
                .map_err(|e| Fault::io(format!("$BUILDX_BAKE_FILE: stat {file}"), e))?;
        }
        if !files.is_empty() {
            return Ok((files, false));
        }
    }
    Ok((DEFAULT_FILES.map(str::to_owned).to_vec(), true))
}

/// The names of files of a definition from elsewhere; those that are looked for may be missing.
pub(super) fn remote_names(args: &Args) -> Result<(Vec<String>, bool)> {
    let (names, optional) = names(args, true)?;
    let names: Vec<String> = names.into_iter().filter(|n| !n.starts_with(LOCAL)).collect();
    Ok(match names.is_empty() {
        true => (DEFAULT_FILES.map(str::to_owned).to_vec(), true),
        false => (names, optional),
    })
}

/// What is on this machine.
const LOCAL: &str = "cwd://";

fn files(args: &Args, elsewhere: Option<&Elsewhere>) -> Result<Vec<File>> {
    let (names, optional) = names(args, elsewhere.is_some())?;
    let mut files = elsewhere.map(|e| e.files.clone()).unwrap_or_default();
    for name in names.into_iter().filter(|n| elsewhere.is_none() || n.starts_with(LOCAL)) {
        let name = name.strip_prefix(LOCAL).unwrap_or(&name).to_owned();
        let data = match name.as_str() {
            "-" => bounded(io::stdin()).map_err(|e| Fault::io("read standard input", e))?,
            path => match std::fs::File::open(path).and_then(bounded) {
                Err(e) if optional && e.kind() == io::ErrorKind::NotFound => continue,
                data => data.map_err(|e| Fault::io(format!("open {path}"), e))?,
            },
        };
        files.push(File { name, data });
    }
    match files.is_empty() {
        true => Err(Fault::not_found("couldn't find a bake definition")
            .hint(format!("name it with --file; looked for {}", DEFAULT_FILES.join(", ")))),
        false => Ok(files),
    }
}

/// Reads and evaluates the definition.
pub(super) fn parse(args: &Args, origin: &Origin) -> Result<Parsed> {
    let mut options = Options::default();
    let platform = Platform::host().normalized().to_string();
    options.builtins.insert("BAKE_CMD_CONTEXT".into(), origin.context.clone());
    options.builtins.insert("BAKE_LOCAL_PLATFORM".into(), platform);
    options.no_env = std::env::var("BUILDX_BAKE_DISABLE_VARS_ENV_LOOKUP")
        .is_ok_and(|v| parse_bool(&v) == Some(true));
    for var in &args.vars {
        let (name, value) = match var.split_once('=') {
            Some((name, value)) => (name, value.to_owned()),
            None => match std::env::var(var) {
                Ok(value) => (var.as_str(), value),
                Err(_) => continue,
            },
        };
        options.vars.insert(name.to_owned(), value);
    }
    let files = files(args, origin.elsewhere.as_ref())?;
    shipway_bake::parse(&files, host(origin), &options)
}

fn host(origin: &Origin) -> &'static dyn Host {
    if origin.elsewhere.is_some() { &Closed } else { &Here }
}

/// What flags mean, as values of `--set`.
fn sets(args: &Args) -> Result<Vec<String>> {
    let mut sets = args.sets.clone();
    if args.push {
        sets.push("*.push=true".into());
    }
    if args.load {
        sets.push("*.load=true".into());
    }
    if let Some(call) = args.call() {
        let method = call.split(',').find(|f| !f.contains('=')).unwrap_or("build");
        let method = if method == "check" { "lint" } else { method };
        if method != "build" {
            sets.push(format!("*.call={method}"));
        }
    }
    if let Some(no_cache) = args.no_cache {
        sets.push(format!("*.no-cache={no_cache}"));
    }
    if let Some(pull) = args.pull {
        sets.push(format!("*.pull={pull}"));
    }
    for (kind, value) in [("sbom", &args.sbom), ("provenance", &args.provenance)] {
        if let Some(value) = value {
            sets.push(format!("*.attest={}", Attest::shorthand(kind, value)));
        }
    }
    Ok(sets)
}

impl Args {
    /// The question in place of a build.
    pub(super) fn call(&self) -> Option<String> {
        match self.check {
            true => Some("check".into()),
            false => self.call.clone(),
        }
    }
}

/// Picks the targets, and checks what they say as far as that can be done without building.
pub(super) fn plan(args: &Args, origin: &Origin) -> Result<Planned> {
    let mut granted = Granted::parse(&args.allow)?;
    let directory =
        std::env::current_dir().map_err(|e| Fault::io("find the current directory", e))?;
    let directory = directory.to_string_lossy().into_owned();
    granted.read.push(directory.clone());
    granted.write.push(directory);
    let parsed = parse(args, origin)?;
    let wanted = match args.targets.is_empty() {
        true => vec!["default".to_owned()],
        false => args.targets.clone(),
    };
    let mut plan = parsed.config.plan(host(origin), &wanted, &sets(args)?, &mut granted)?;
    let epoch = std::env::var("SOURCE_DATE_EPOCH").ok().filter(|v| !v.is_empty());
    let mut builds = BTreeMap::new();
    for (name, target) in &mut plan.targets {
        if let Some(epoch) = &epoch {
            target.args.entry("SOURCE_DATE_EPOCH".into()).or_insert_with(|| Some(epoch.clone()));
        }
        let at = || format!("target {name}");
        if target.context.as_deref() == Some("-") {
            return Err(Fault::invalid("context from stdin not allowed in bake").context(at()));
        }
        if target.dockerfile.as_deref() == Some("-") {
            return Err(Fault::invalid("dockerfile from stdin not allowed in bake").context(at()));
        }
        let context = target.context.take().unwrap_or_else(|| ".".into());
        let moved = match &origin.elsewhere {
            Some(elsewhere) => elsewhere.moved(&context).context(at)?,
            None => None,
        };
        let (context, subdir) = match (moved, context.strip_prefix(LOCAL)) {
            (Some(moved), _) => (moved.url, moved.subdir),
            (None, Some(local)) => (path::clean(local), None),
            (None, None) if is_remote(&context) => (context, None),
            (None, None) => (path::clean(&context), None),
        };
        let is_away = is_remote(&context);
        if is_away && target.dockerfile.as_ref().is_some_and(|file| file.starts_with(LOCAL)) {
            return Err(Fault::new(
                Code::Unimplemented,
                "a Dockerfile of this machine cannot build a context from elsewhere",
            )
            .context(at())
            .hint("write it as dockerfile-inline"));
        }
        target.context = Some(context.clone());
        let mut build = match &origin.elsewhere {
            None => build::Args::of_target(target),
            Some(elsewhere) => {
                let mut target = target.clone();
                for (name, context) in &mut target.contexts {
                    if let Some(moved) = elsewhere.moved(context).context(at)? {
                        *context = remote::whole(name, moved).context(at)?;
                    }
                }
                let mut build = build::Args::of_target(&target);
                build.add_secrets(elsewhere.logins(&context).context(at)?);
                build
            }
        };
        if let Some(subdir) = subdir {
            build.descend(subdir);
        }
        build.check().context(at)?;
        builds.insert(name.clone(), build);
    }
    Ok(Planned { is_remote: origin.elsewhere.is_some(), plan, granted, builds })
}
