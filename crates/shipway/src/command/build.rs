//! `shipway build`: an image from a Dockerfile, with the flags of `docker build`.

mod call;
mod context;
mod options;
mod target;
mod vcs;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use shipway_client::{Client, Definition, SolveOptions};
use shipway_fault::{Context as _, Detail, Fault, Result, SourceFile};

use self::{
    call::Call,
    context::{Input, Place},
};
pub(crate) use self::{
    context::{is_remote, is_tar},
    options::context_name,
    target::Prepared,
};
use crate::{
    Persona,
    builders::{BuildState, Store},
    connect::ConnectArgs,
    dap,
    debugger::Looking,
    nodes::{Nodes, Part, platforms_of},
    notes::Notes,
    output,
    progress::Mode,
    run::{self, Extras},
    spread::{Built, Spread},
};

/// Build an image from a Dockerfile. Without --output, the image is in containerd's store when the
/// build ends
#[derive(clap::Args, Clone, Debug, Default)]
pub(crate) struct Args {
    /// Directory, URL of a Git repository or of a tar, or - for a Dockerfile or tar on standard
    /// input
    #[arg(value_name = "PATH | URL | -")]
    context: String,
    /// Dockerfile; `-` reads it from standard input, an HTTP URL is downloaded
    /// [default: Dockerfile in the context]
    #[arg(short, long, value_name = "FILE")]
    file: Option<String>,
    /// Name of the image; may be repeated
    #[arg(short, long = "tag", value_name = "NAME[:TAG]")]
    tags: Vec<String>,
    /// Stage to build
    #[arg(long)]
    target: Option<String>,
    /// Value of a build argument, or the name of one to take from the environment; may be repeated
    #[arg(long = "build-arg", value_name = "KEY[=VALUE]")]
    build_args: Vec<String>,
    /// Label of the image; may be repeated
    #[arg(long = "label", value_name = "KEY=VALUE")]
    labels: Vec<String>,
    /// Annotation of the image, as [manifest|index|manifest-descriptor|index-descriptor:]KEY=VALUE;
    /// may be repeated
    #[arg(long = "annotation", value_name = "KEY=VALUE")]
    annotations: Vec<String>,
    /// Platform to build for; may be repeated or a list
    #[arg(long = "platform", value_delimiter = ',')]
    platforms: Vec<String>,
    /// What becomes of the result: a directory, - for a tar on standard output, or type=TYPE,...;
    /// may be repeated
    #[arg(short, long = "output", value_name = "OUTPUT")]
    outputs: Vec<String>,
    /// Command to run in the result: what it reads comes first in its layers and is fetched at
    /// once where they are pulled lazily; an empty one is the image's own program
    #[arg(long, value_name = "COMMAND")]
    optimize: Option<String>,
    /// Push the image to its registry
    #[arg(long)]
    push: bool,
    /// Leave the image in containerd's store, which is also the default
    #[arg(long)]
    load: bool,
    /// Use no cache
    #[arg(long)]
    no_cache: bool,
    /// Use no cache for these stages
    #[arg(long, value_name = "STAGE", value_delimiter = ',')]
    no_cache_filter: Vec<String>,
    /// Ask registries for newer base images
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    pull: Option<bool>,
    /// Secret to offer: id=NAME,src=FILE or id=NAME,env=VARIABLE; may be repeated
    #[arg(long = "secret")]
    secrets: Vec<String>,
    /// SSH agent, socket or keys to offer: default|ID[=SOCKET[,raw=true]|KEY,…]; may be
    /// repeated
    #[arg(long)]
    ssh: Vec<String>,
    /// Network of RUN steps: default, none, host, or one of the daemon's by its name
    #[arg(long, value_name = "MODE")]
    network: Option<String>,
    /// Entry of /etc/hosts in RUN steps; may be repeated
    #[arg(long = "add-host", value_name = "HOST:IP")]
    add_hosts: Vec<String>,
    /// Size of /dev/shm in RUN steps, such as 128m
    #[arg(long, value_name = "SIZE")]
    shm_size: Option<String>,
    /// Limit of RUN steps; may be repeated
    #[arg(long = "ulimit", value_name = "NAME=SOFT[:HARD]")]
    ulimits: Vec<String>,
    /// Limits of RUN steps: memory, memory-swap, cpu-shares, cpu-period, cpu-quota, cpuset-cpus,
    /// cpuset-mems; a list, may be repeated
    #[arg(long = "resource", value_name = "NAME=VALUE")]
    resources: Vec<String>,
    /// Parent of the cgroups of RUN steps
    #[arg(long, value_name = "CGROUP")]
    cgroup_parent: Option<String>,
    /// Another context: a directory, docker-image://, oci-layout://, target:, or a URL; may be
    /// repeated
    #[arg(long = "build-context", value_name = "NAME=CONTEXT")]
    contexts: Vec<String>,
    /// Cache to read, such as an image's name or type=local,src=DIR; may be repeated
    #[arg(long, value_name = "CACHE")]
    cache_from: Vec<String>,
    /// Cache to write, such as an image's name or type=inline; may be repeated
    #[arg(long, value_name = "CACHE")]
    cache_to: Vec<String>,
    /// Place to restore contents of cache mounts from (RUN --mount=type=cache), such as an image's
    /// name or type=local,src=DIR or type=s3,bucket=NAME, with key=KEY, fallback=KEY;KEY, id=ID;
    /// may be repeated
    #[arg(long, value_name = "PLACE")]
    cache_mount_from: Vec<String>,
    /// Place to save contents of cache mounts to after the build, such as an image's name or
    /// type=local,dest=DIR, with key=KEY, id=ID, max-size=SIZE; may be repeated
    #[arg(long, value_name = "PLACE")]
    cache_mount_to: Vec<String>,
    /// Privilege to allow: network.host, network.NAME, security.insecure, device; may be repeated
    #[arg(long)]
    allow: Vec<String>,
    /// File with a source policy: rules on what the build may use, as JSON
    #[arg(long, value_name = "FILE", conflicts_with = "policies")]
    source_policy_file: Option<PathBuf>,
    /// Policy: filename=FILE with rules as JSON, or disabled=true
    #[arg(long = "policy", value_name = "POLICY")]
    policies: Vec<String>,
    /// Attestation, such as type=sbom or type=provenance,mode=max; may be repeated
    #[arg(long = "attest", value_name = "ATTESTATION")]
    attests: Vec<String>,
    /// Short for --attest=type=provenance
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "MODE")]
    provenance: Option<String>,
    /// Short for --attest=type=sbom
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "MODE")]
    sbom: Option<String>,
    /// File that gets the build's metadata, such as digests, as JSON
    #[arg(long, value_name = "FILE")]
    metadata_file: Option<PathBuf>,
    /// File that gets the image's id
    #[arg(long, value_name = "FILE")]
    iidfile: Option<PathBuf>,
    /// Print nothing but the image's id
    #[arg(short, long)]
    quiet: bool,
    /// How to show progress: auto, tty, plain, rawjson, quiet
    #[arg(long, env = "BUILDKIT_PROGRESS", default_value = "auto", hide_env_values = true)]
    progress: Option<Mode>,
    /// Say at the end why steps ran that the cache had no result for
    #[arg(long)]
    explain_cache: bool,
    /// Only look for mistakes in the Dockerfile
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    check: Option<bool>,
    /// What to do: build, check, outline, targets, convertllb; METHOD,format=json prints data,
    /// METHOD,ignorestatus=true makes no failure of findings
    #[arg(
        long,
        alias = "print",
        default_value = "build",
        hide_default_value = true,
        value_name = "METHOD"
    )]
    call: String,
    /// How --check and --call print: text, json, sarif
    #[arg(long, value_name = "FORMAT")]
    format: Option<String>,
    /// Accepted for compatibility
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    rm: Option<bool>,
    /// Accepted for compatibility
    #[arg(long, hide = true)]
    force_rm: bool,
    /// Accepted for compatibility
    #[arg(long, hide = true)]
    compress: bool,
    /// Accepted for compatibility
    #[arg(long, hide = true)]
    squash: bool,
    /// Short for --resource memory=
    #[arg(short, long, hide = true)]
    memory: Option<String>,
    /// Short for --resource memory-swap=
    #[arg(long, hide = true, allow_hyphen_values = true)]
    memory_swap: Option<String>,
    /// Short for --resource cpu-shares=
    #[arg(short, long, hide = true)]
    cpu_shares: Option<String>,
    /// Short for --resource cpu-period=
    #[arg(long, hide = true)]
    cpu_period: Option<String>,
    /// Short for --resource cpu-quota=
    #[arg(long, hide = true)]
    cpu_quota: Option<String>,
    /// Short for --resource cpuset-cpus=
    #[arg(long, hide = true)]
    cpuset_cpus: Option<String>,
    /// Short for --resource cpuset-mems=
    #[arg(long, hide = true)]
    cpuset_mems: Option<String>,
    /// Accepted for compatibility
    #[arg(long, hide = true)]
    isolation: Option<String>,
    /// Accepted for compatibility
    #[arg(long = "security-opt", hide = true)]
    security_opts: Vec<String>,
    /// Directory of a context from elsewhere that is the context.
    #[arg(skip)]
    subdir: Option<String>,
}

impl Args {
    /// The same, with what an editor's launch request names.
    pub(crate) fn launched(
        mut self,
        dockerfile: Option<String>,
        context: Option<String>,
        target: Option<String>,
    ) -> Self {
        if let Some(context) = context {
            self.context = context;
        }
        self.file = dockerfile.or(self.file);
        self.target = target.or(self.target);
        self
    }

    fn mode(&self) -> Mode {
        if self.quiet { Mode::Quiet } else { self.progress.unwrap_or(Mode::Auto) }
    }
}

/// Builds; `debug` prints warnings in full, and `looking` looks into the build where it stops.
pub(crate) async fn run(
    connect: &ConnectArgs,
    args: Args,
    debug: bool,
    looking: Option<&Looking>,
) -> Result<ExitCode> {
    let done = attempt(connect, args, debug, looking).await;
    done.map_err(|fault| fault.context("failed to build"))
}

async fn attempt(
    connect: &ConnectArgs,
    args: Args,
    debug: bool,
    looking: Option<&Looking>,
) -> Result<ExitCode> {
    // Mistakes in the arguments are reported before anything is connected to.
    if looking.is_some() && (args.context == "-" || args.file.as_deref() == Some("-")) {
        let what = "the build reads standard input, which is needed to look into it";
        return Err(Fault::invalid(what)
            .hint("name a directory as the context, and a Dockerfile with --file"));
    }
    let call = Call::of(&args)?;
    let Ready { input, mut options, nodes, parts, client } = ready(connect, &args).await?;
    let mode = args.mode();
    if let Some(call) = call {
        let answer = run::ask(&client, options, mode).await.map_err(|fault| input.named(fault))?;
        return call.print(&answer, &input).map_err(|fault| input.named(fault));
    }
    // Nodes that build together know the build by one id, as with buildx.
    options.reference = shipway_client::new_reference()?;
    options.reconnect = connect.reconnect();
    for part in &parts {
        remember(nodes.names(part.node), &options.reference, &args, &input);
    }
    if looking.is_some() && parts.len() > 1 {
        return Err(Fault::unimplemented("looking into a build on several nodes")
            .hint("name one platform with --platform"));
    }
    let (input, stdin) = match parts.len() {
        1 => (input, None),
        _ => {
            let spool = move || input.spool().map(|stdin| (input, stdin));
            shipway_task::blocking("read standard input", spool).await?
        }
    };
    let built = match looking {
        Some(looking) => {
            let named = |fault| input.named(fault);
            let done = looking.build(&client, options, mode, &named).await;
            done.map(|(outcome, shown)| (Built::alone(parts[0].node, outcome), shown))
        }
        None => {
            let spread = Spread::of(&nodes, &parts, &options, stdin.as_ref()).await?;
            drop(options);
            let work = async |events, stop| spread.build(events, stop).await;
            run::watched(mode, &Extras::default(), work).await
        }
    };
    let (built, shown) = built.map_err(|fault| input.named(fault))?;
    if let Some(path) = &args.metadata_file {
        let notes = Notes::of(|name| std::env::var(name).ok());
        let mut all = notes.of_build(&nodes, &built.outcomes).await?;
        all.extend(notes.of_warnings(&shown.warnings)?);
        output::write_file(path, output::metadata(&built.response, all).as_bytes())?;
    }

    let id = built
        .response
        .get("containerimage.digest")
        .or_else(|| built.response.get("containerimage.config.digest"));
    if let Some(path) = &args.iidfile {
        let id = id.ok_or_else(|| {
            Fault::invalid("--iidfile: the build made no image")
                .hint("remove --iidfile, or export an image")
        })?;
        output::write_file(path, id.as_bytes())?;
    }
    match (mode, id) {
        (Mode::Quiet, Some(id)) => output::print(&format!("{id}\n"))?,
        (Mode::Auto | Mode::Tty | Mode::Plain, _) => {
            eprint!("{}", run::warnings(&shown.warnings, debug));
            if args.explain_cache {
                eprint!("\n{}", shown.explained.text());
            }
        }
        _ => {}
    }
    drop(input);
    Ok(ExitCode::SUCCESS)
}

/// A build that can be asked for.
struct Ready {
    input: Input,
    options: SolveOptions,
    nodes: Nodes,
    parts: Vec<Part>,
    client: Client,
}

/// Reads what the build needs here, and connects.
async fn ready(connect: &ConnectArgs, args: &Args) -> Result<Ready> {
    let reading = (args.file.clone(), args.context.clone());
    let input = move || Input::read(reading.0.as_deref(), &reading.1);
    let mut input = shipway_task::blocking("read the context", input).await?;
    let mut options = options::of(args, &input, &|name| std::env::var(name).ok())?;
    let nodes = connect.nodes(Persona::Shipway)?;
    let parts = nodes.choose(&platforms_of(&options.frontend_attrs)?).await?;
    let client = nodes.client(parts[0].node).await?;
    if let Some(url) = input.awaited_dockerfile() {
        let file = Definition::download(&url, &input.filename);
        let text = client.read(file, &input.filename).await.context(|| format!("read {url}"))?;
        input.take_dockerfile(&text)?;
        options::dockerfile(&input, &mut options)?;
    }
    Ok(Ready { input, options, nodes, parts, client })
}

/// The build for an editor, which goes through its steps.
pub(crate) async fn prepared(connect: &ConnectArgs, args: Args) -> Result<dap::Prepared> {
    if args.context == "-"
        || args.file.as_deref().is_some_and(|file| file == "-" || is_remote(file))
    {
        return Err(Fault::invalid("an editor needs a context and a Dockerfile on this machine"));
    }
    let Ready { input, mut options, parts, client, .. } = ready(connect, &args).await?;
    let dir = match (&input.dockerfile_dir, parts.len()) {
        (Some(dir), 1) => dir,
        (None, _) => {
            return Err(Fault::invalid("an editor needs a Dockerfile on this machine")
                .hint("name it with --file"));
        }
        _ => {
            return Err(Fault::unimplemented("going through a build on several nodes")
                .hint("name one platform with --platform"));
        }
    };
    options.reference = shipway_client::new_reference()?;
    let (path, filename) = (dir.join(&input.filename), input.filename.clone());
    Ok(dap::Prepared { client, options, path, filename, kept: Box::new(input) })
}

/// Notes for `history` where the build's files are, if buildx or we keep builders here: the daemon
/// does not know it.
fn remember(names: (&str, &str), reference: &str, args: &Args, input: &Input) {
    let full = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let text = |path: PathBuf| path.to_string_lossy().into_owned();
    let local_path = match input.directory() {
        Some(dir) if args.context != "-" => text(full(dir)),
        _ => args.context.clone(),
    };
    let dockerfile_path = match (args.file.as_deref(), &input.dockerfile_dir) {
        (Some(file), _) if file == "-" || is_remote(file) => file.to_owned(),
        (_, Some(dir)) if args.context != "-" => text(full(&dir.join(&input.filename))),
        (file, _) => file.unwrap_or_default().to_owned(),
    };
    let target = "default".to_owned();
    let state = BuildState { target, local_path, dockerfile_path, ..BuildState::default() };
    let save = || match Store::open_existing()? {
        Some(store) => store.save_build_state((names.0, names.1, reference), &state),
        None => Ok(()),
    };
    if let Err(fault) = save() {
        tracing::warn!("{fault}");
    }
}

impl Input {
    /// The fault, in which the Dockerfile is called what the user calls it.
    fn named(&self, fault: Fault) -> Fault {
        fault.map_details(|detail| match detail {
            Detail::Source { file, spans } if file.filename == self.filename => {
                let file = SourceFile { filename: self.shown.clone(), ..(**file).clone() };
                Detail::Source { file: Arc::new(file), spans: spans.clone() }
            }
            other => other.clone(),
        })
    }

    /// Whether the context is a local directory.
    fn directory(&self) -> Option<&std::path::Path> {
        match &self.context {
            Place::Directory(dir) => Some(dir),
            Place::Remote(_) | Place::Stdin(_) => None,
        }
    }
}
