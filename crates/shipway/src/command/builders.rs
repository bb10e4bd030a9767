//! `shipway create`, `use`, `ls`, `inspect`, `rm` and `stop`: builders, which buildx sees, too
//! (rows `bx.create` and others).

use std::{collections::BTreeMap, path::Path};

use base64::{Engine, engine::general_purpose::STANDARD};
use futures::future::join_all;
use shipway_client::{Location, WorkerInfo};
use shipway_fault::{Context, Fault, Result};

use crate::{
    builders::{Builder, Node, Store},
    csv,
    driver::{CONFIG, CONFIG_DIR, Driver, Keep, State, kubernetes},
    output, table,
};

/// Bytes of a configuration or certificate that is given to daemons, at most.
const MAX_CONFIG: u64 = 1 << 20;

/// Make a builder of a daemon, or add a node to one
#[derive(clap::Args, Debug)]
pub(crate) struct CreateArgs {
    /// Address of the daemon (unix://, tcp://, ssh://, docker-container://, kube-pod://), or
    /// Docker's context or host for the driver docker-container
    #[arg(value_name = "ENDPOINT")]
    endpoint: Option<String>,
    /// Name of the builder
    #[arg(long)]
    name: Option<String>,
    /// How the daemon is had: remote (it runs), docker-container, kubernetes (it is started)
    /// [default: the builder's, or remote]
    #[arg(long)]
    driver: Option<String>,
    /// Option of the driver, such as cacert, image, namespace, env.NAME; may be repeated
    #[arg(long = "driver-opt", value_name = "NAME=VALUE")]
    driver_opts: Vec<String>,
    /// Platform that the node is for; may be repeated or a list
    #[arg(long = "platform", value_delimiter = ',')]
    platforms: Vec<String>,
    /// Name of the node
    #[arg(long)]
    node: Option<String>,
    /// Add a node to a builder that there is
    #[arg(long)]
    append: bool,
    /// Take a node out of a builder
    #[arg(long)]
    leave: bool,
    /// Use the builder from now on
    #[arg(long = "use")]
    use_it: bool,
    /// Wait until the daemon answers
    #[arg(long)]
    bootstrap: bool,
    /// Flags of the daemon, for drivers that start one
    #[arg(long, allow_hyphen_values = true, value_name = "FLAGS")]
    buildkitd_flags: Option<String>,
    /// Configuration of the daemon, for drivers that start one
    #[arg(long, alias = "config", value_name = "FILE")]
    buildkitd_config: Option<String>,
}

/// Use a builder from now on
#[derive(clap::Args, Debug)]
pub(crate) struct UseArgs {
    /// The builder
    name: String,
    /// Also for this endpoint of Docker whenever it is chosen again
    #[arg(long)]
    default: bool,
    /// For all endpoints of Docker
    #[arg(long)]
    global: bool,
}

/// Show a builder
#[derive(clap::Args, Debug)]
pub(crate) struct InspectArgs {
    /// The builder [default: the one that is used]
    name: Option<String>,
    /// Wait until the daemon answers
    #[arg(long)]
    bootstrap: bool,
}

/// Forget builders
#[derive(clap::Args, Debug)]
pub(crate) struct RemoveArgs {
    /// The builders [default: the one that is used]
    names: Vec<String>,
    /// Those that do not answer
    #[arg(long)]
    all_inactive: bool,
    /// Do not ask; accepted for compatibility
    #[arg(short, long, hide = true)]
    force: bool,
    /// Keep what daemons have on disk
    #[arg(long)]
    keep_state: bool,
    /// Let daemons run; those of the driver remote always do
    #[arg(long)]
    keep_daemon: bool,
}

/// Stop a builder
#[derive(clap::Args, Debug)]
pub(crate) struct StopArgs {
    /// The builders [default: the one that is used]
    names: Vec<String>,
}

fn driver_options(driver: Driver, texts: &[String]) -> Result<Option<BTreeMap<String, String>>> {
    let mut options = BTreeMap::new();
    for text in texts {
        for field in csv::fields(text)? {
            let (key, value) = field
                .split_once('=')
                .ok_or_else(|| Fault::invalid(format!("invalid value {field:?}, expecting k=v")))?;
            options.insert(key.to_owned(), value.to_owned());
        }
    }
    driver.check_options(&options)?;
    Ok((!options.is_empty()).then_some(options))
}

pub(crate) async fn create(args: CreateArgs) -> Result<()> {
    let store = Store::open()?;
    if args.name.as_deref() == Some("default") {
        return Err(Fault::invalid(
            "default is a reserved name and cannot be used to identify builder instance",
        ));
    }
    let existing = args.name.as_deref().map(|name| store.get(name)).transpose()?.flatten();
    let mut builder = match (existing, args.append || args.leave) {
        (Some(builder), true) => builder,
        (Some(builder), false) if args.node.is_none() => {
            return Err(Fault::invalid(format!(
                "existing instance for {:?} but no append mode, specify the node name to make changes for existing instances",
                builder.name
            )));
        }
        (Some(builder), false) => builder,
        (None, true) if args.name.is_none() => {
            let what = if args.leave { "leave" } else { "append" };
            return Err(Fault::invalid(format!("--{what} requires a builder name"))
                .hint("name it with --name"));
        }
        (None, true) => {
            let what = if args.leave { "leave" } else { "append" };
            let name = args.name.as_deref().unwrap_or_default();
            return Err(Fault::not_found(format!("failed to find instance {name:?} for {what}")));
        }
        (None, false) => {
            let driver = Driver::parse(args.driver.as_deref().unwrap_or("remote"))?;
            let name = match &args.name {
                Some(name) => name.clone(),
                None => free_name(&store)?,
            };
            Builder { name, driver: driver.name().into(), ..Builder::default() }
        }
    };
    let driver = Driver::parse(&builder.driver)?;
    if args.driver.as_ref().is_some_and(|wanted| *wanted != builder.driver) {
        return Err(Fault::invalid(format!(
            "existing instance for {:?} but has mismatched driver {:?}",
            builder.name, builder.driver
        )));
    }
    if args.leave {
        let node = args.node.as_deref().ok_or_else(|| {
            Fault::invalid("leave requires instance name and node name").hint("name it with --node")
        })?;
        leave(&mut builder, node)?;
        store.save(&builder)?;
        return output::print(&format!("{}\n", builder.name));
    }
    update(&mut builder, driver, &args, store.docker_endpoint())?;
    store.save(&builder)?;
    if args.use_it {
        store.use_builder(&builder.name, false, false)?;
    }
    drop(store);
    if args.bootstrap {
        for node in &builder.nodes {
            answer(driver, node, true).await?;
        }
    }
    output::print(&format!("{}\n", builder.name))
}

fn free_name(store: &Store) -> Result<String> {
    for n in 0.. {
        let name = format!("remote{n}");
        if store.get(&name)?.is_none() {
            return Ok(name);
        }
    }
    Err(Fault::internal("no name is free"))
}

fn leave(builder: &mut Builder, node: &str) -> Result<()> {
    let n =
        builder.nodes.iter().position(|n| n.name == node).ok_or_else(|| {
            Fault::not_found(format!("node {node:?} not found for {}", builder.name))
        })?;
    if builder.nodes.len() == 1 {
        return Err(Fault::invalid("can not leave last node, do you want to rm instance instead?"));
    }
    builder.nodes.remove(n);
    Ok(())
}

/// Where a new node is, or what changes of one that there is.
fn endpoint(
    builder: &Builder,
    driver: Driver,
    args: &CreateArgs,
    docker: &str,
) -> Result<Option<String>> {
    let given = args.endpoint.clone();
    Ok(match driver {
        Driver::Remote => {
            let env = || std::env::var("BUILDKIT_HOST").ok().filter(|h| !h.is_empty());
            let endpoint = given.or_else(env);
            if let Some(endpoint) = &endpoint {
                endpoint.parse::<Location>().context(|| "use the endpoint")?;
            }
            endpoint
        }
        Driver::Container => given,
        Driver::Kubernetes => match given {
            Some(given) => {
                return Err(Fault::invalid(format!(
                    "kubernetes driver does not support endpoint args {given:?}"
                ))
                .hint("$KUBECONFIG and the option namespace say where the pods are"));
            }
            None => None,
        },
    }
    .or_else(|| {
        let is_new = args.node.as_ref().is_none_or(|n| builder.nodes.iter().all(|m| m.name != *n));
        (is_new && driver == Driver::Container).then(|| docker.to_owned())
    }))
}

/// Adds or changes the node that `args` tell.
fn update(builder: &mut Builder, driver: Driver, args: &CreateArgs, docker: &str) -> Result<()> {
    let starts_none = driver == Driver::Remote;
    if starts_none && (args.buildkitd_flags.is_some() || args.buildkitd_config.is_some()) {
        return Err(Fault::invalid("the remote driver starts no daemon that could be configured"));
    }
    let endpoint = endpoint(builder, driver, args, docker)?;
    let platforms = args
        .platforms
        .iter()
        .map(|text| {
            let parsed: Result<shipway_oci::Platform, _> = text.trim().parse();
            let parsed = parsed.map_err(|e| Fault::invalid(format!("--platform {text}: {e}")))?;
            Ok(parsed.normalized())
        })
        .collect::<Result<Vec<_>>>()?;
    let options = driver_options(driver, &args.driver_opts)?;
    let flags = args.buildkitd_flags.as_deref().map(words).transpose()?;
    let files = args.buildkitd_config.as_deref().map(config_files).transpose()?;
    let known =
        args.node.as_deref().and_then(|name| builder.nodes.iter().position(|n| n.name == name));
    let n = match known {
        Some(n) => {
            if let Some(flags) = flags {
                builder.nodes[n].flags = Some(driver.flags(flags));
            }
            n
        }
        None => {
            if let (false, [_, ..], Some(name)) = (args.append, &builder.nodes[..], &args.node) {
                return Err(Fault::not_found(format!(
                    "node {name} not found, did you mean to append?"
                )));
            }
            let name = match (&args.node, driver) {
                (Some(name), _) => crate::builders::checked(name)?,
                (None, Driver::Kubernetes) => kubernetes::new_node()?,
                (None, _) => (0..)
                    .map(|n| format!("{}{n}", builder.name))
                    .find(|name| builder.nodes.iter().all(|n| n.name != *name))
                    .unwrap_or_default(),
            };
            let endpoint = match (&endpoint, driver) {
                (Some(endpoint), _) => endpoint.clone(),
                (None, Driver::Kubernetes) => {
                    let config = std::env::var("KUBECONFIG").unwrap_or_default();
                    kubernetes::endpoint(&builder.name, &name, &config)
                }
                (None, _) => {
                    return Err(Fault::invalid("no remote endpoint provided")
                        .hint(
                            "give the address of a daemon, such as unix:///run/shipway/shipwayd.sock",
                        )
                        .hint("or start one with --driver docker-container or kubernetes"));
                }
            };
            if builder.nodes.iter().any(|n| n.endpoint == endpoint) {
                return Err(Fault::invalid(format!("invalid duplicate endpoint {endpoint}")));
            }
            let flags = driver.flags(flags.unwrap_or_default());
            let flags = (!flags.is_empty()).then_some(flags);
            builder.nodes.push(Node { name, endpoint, flags, ..Node::default() });
            builder.nodes.len() - 1
        }
    };
    // A platform has one node that was created for it.
    for other in builder.nodes.iter_mut().enumerate().filter(|(m, _)| *m != n).map(|(_, o)| o) {
        if let Some(theirs) = &mut other.platforms {
            theirs.retain(|platform| !platforms.contains(platform));
        }
    }
    let node = &mut builder.nodes[n];
    if let Some(endpoint) = endpoint {
        node.endpoint = endpoint;
    }
    if !platforms.is_empty() {
        node.platforms = Some(platforms);
    }
    if options.is_some() {
        node.driver_opts = options;
    }
    if let Some(files) = files {
        node.files.get_or_insert_default().extend(files);
    }
    node.tls().map(drop)
}

/// The words of a command line, with quotes as a shell has them.
fn words(text: &str) -> Result<Vec<String>> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (c, quote) {
            (c, Some(q)) if c == q => quote = None,
            ('\\', None | Some('"')) => word.get_or_insert_default().extend(chars.next()),
            ('\'' | '"', None) => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (c, None) if c.is_whitespace() => words.extend(word.take()),
            (c, _) => word.get_or_insert_default().push(c),
        }
    }
    match quote {
        Some(quote) => Err(Fault::invalid(format!("--buildkitd-flags: {quote} is not closed"))),
        None => Ok(words.into_iter().chain(word).collect()),
    }
}

/// A file that is given to a daemon.
fn config_file(path: &Path) -> Result<Vec<u8>> {
    use std::io::Read as _;
    let failed = |e| Fault::io(format!("read {}", path.display()), e);
    let mut data = Vec::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    file.take(MAX_CONFIG + 1).read_to_end(&mut data).map_err(failed)?;
    match data.len() as u64 > MAX_CONFIG {
        true => Err(Fault::invalid(format!("{} is larger than 1 MB", path.display()))),
        false => Ok(data),
    }
}

/// The configuration at `path` with the certificates that it names for registries, which get new
/// places in the container or pod; in base64.
fn config_files(path: &str) -> Result<BTreeMap<String, String>> {
    let data = config_file(Path::new(path)).context(|| "--buildkitd-config")?;
    let text = String::from_utf8_lossy(&data);
    let mut config: toml::Table = text
        .parse()
        .map_err(|e: toml::de::Error| Fault::invalid(format!("--buildkitd-config {path}: {e}")))?;
    let mut files = BTreeMap::new();
    let mut moved = |registry: &str, value: &mut toml::Value| {
        let Some(from) = value.as_str().map(Path::new) else { return Ok(()) };
        let is_fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-');
        let registry: String = registry.chars().map(|c| if is_fine(c) { c } else { '_' }).collect();
        let name = from.file_name().and_then(|n| n.to_str()).unwrap_or("file");
        let to = format!("certs/{registry}/{name}");
        files.insert(to.clone(), STANDARD.encode(config_file(from)?));
        *value = toml::Value::String(format!("{CONFIG_DIR}/{to}"));
        Ok::<_, Fault>(())
    };
    let registries = config.get_mut("registry").and_then(toml::Value::as_table_mut);
    for (name, registry) in registries.into_iter().flatten() {
        let list = |value: Option<&mut toml::Value>| {
            value.and_then(toml::Value::as_array_mut).map(std::mem::take).unwrap_or_default()
        };
        let mut roots = list(registry.get_mut("ca"));
        roots.iter_mut().try_for_each(|root| moved(name, root))?;
        let mut pairs = list(registry.get_mut("keypair"));
        for pair in &mut pairs {
            for key in ["key", "cert"] {
                pair.get_mut(key).map_or(Ok(()), |file| moved(name, file))?;
            }
        }
        for (key, list) in [("ca", roots), ("keypair", pairs)] {
            if let Some(place) = registry.get_mut(key) {
                *place = toml::Value::Array(list);
            }
        }
    }
    let text = toml::to_string(&config)
        .map_err(|e| Fault::internal(format!("write the configuration: {e}")))?;
    files.insert(CONFIG.to_owned(), STANDARD.encode(text));
    Ok(files)
}

pub(crate) fn use_builder(args: &UseArgs) -> Result<()> {
    let store = Store::open()?;
    let builder = store.need(&args.name)?;
    store.use_builder(&builder.name, args.global, args.default)
}

/// What a node says of itself.
struct Said {
    state: State,
    version: String,
    workers: Vec<WorkerInfo>,
}

/// Asks a node; with `boot`, one that does not run is started.
async fn answer(driver: Driver, node: &Node, boot: bool) -> Result<Said> {
    let state = if boot { State::Running } else { driver.state(node).await? };
    if state != State::Running {
        return Ok(Said { state, version: String::new(), workers: Vec::new() });
    }
    let client = driver.connect(node, boot, None).await?;
    let version = client.info().await.map(|info| info.buildkit_version.version);
    let workers = client.workers(Vec::new()).await?;
    Ok(Said { state, version: version.unwrap_or_default(), workers })
}

fn platforms(node: &Node, workers: &[WorkerInfo]) -> String {
    let own = node.platforms.iter().flatten();
    let mut shown: Vec<String> = own.map(|p| format!("{p}*")).collect();
    for platform in workers.iter().flat_map(|w| &w.platforms) {
        let text = platform.clone().normalized().to_string();
        if !shown.iter().any(|s| s.trim_end_matches('*') == text) {
            shown.push(text);
        }
    }
    shown.join(", ")
}

pub(crate) async fn list() -> Result<()> {
    let (builders, current) = match Store::open_existing()? {
        Some(store) => (store.list()?, store.current()?.map(|b| b.name)),
        None => (Vec::new(), None),
    };
    // All at once: some may not answer.
    let answers = join_all(builders.iter().map(|builder| async move {
        match Driver::parse(&builder.driver) {
            Ok(driver) => join_all(builder.nodes.iter().map(|n| answer(driver, n, false))).await,
            Err(_) => Vec::new(),
        }
    }))
    .await;
    let mut text = String::from("NAME/NODE\tDRIVER/ENDPOINT\tSTATUS\tBUILDKIT\tPLATFORMS\n");
    let mut failed = Vec::new();
    for (builder, answers) in builders.iter().zip(answers) {
        let mark = if current.as_ref() == Some(&builder.name) { "*" } else { "" };
        text.push_str(&format!("{}{mark}\t{}\t\t\t\n", builder.name, builder.driver));
        let mut answers = answers.into_iter();
        for node in &builder.nodes {
            let (status, version, platforms) = match answers.next() {
                Some(Ok(Said { state, version, workers })) => {
                    (state.name(), version, platforms(node, &workers))
                }
                Some(Err(fault)) => {
                    failed.push(format!("Cannot load builder {}: {fault}\n", builder.name));
                    ("error", String::new(), platforms(node, &[]))
                }
                None => ("unknown", String::new(), platforms(node, &[])),
            };
            text.push_str(&format!(
                " \\_ {}\t \\_ {}\t{status}\t{version}\t{platforms}\n",
                node.name, node.endpoint
            ));
        }
    }
    output::print(&(table::align(&text) + &failed.concat()))
}

/// The builders named, or the one that is used.
fn named(store: &Store, names: &[String]) -> Result<Vec<Builder>> {
    if !names.is_empty() {
        return names.iter().map(|name| store.need(name)).collect();
    }
    let env = std::env::var("BUILDX_BUILDER").ok().filter(|n| !n.is_empty());
    let builder = match env {
        Some(name) => Some(store.need(&name).context(|| "$BUILDX_BUILDER")?),
        None => store.current()?,
    };
    builder.map(|b| vec![b]).ok_or_else(|| {
        Fault::not_found("no builder is used").hint("name one, or choose one with `shipway use`")
    })
}

pub(crate) async fn inspect(args: InspectArgs) -> Result<()> {
    let names: Vec<String> = args.name.into_iter().collect();
    let builder = named(&Store::open()?, &names)?.remove(0);
    let mut text = format!("Name:\t{}\nDriver:\t{}\n\nNodes:\n", builder.name, builder.driver);
    for (n, node) in builder.nodes.iter().enumerate() {
        if n > 0 {
            text.push('\n');
        }
        text.push_str(&format!("Name:\t{}\nEndpoint:\t{}\n", node.name, node.endpoint));
        if let Some(options) = &node.driver_opts {
            let shown: Vec<String> = options.iter().map(|(k, v)| format!("{k}={v:?}")).collect();
            text.push_str(&format!("Driver Options:\t{}\n", shown.join(" ")));
        }
        let Ok(driver) = Driver::parse(&builder.driver) else {
            text.push_str("Status:\tunknown\nError:\tthe driver is not implemented here\n");
            continue;
        };
        match answer(driver, node, args.bootstrap).await {
            Ok(Said { state, version, workers }) => {
                text.push_str(&format!("Status:\t{}\n", state.name()));
                if let Some(flags) = &node.flags {
                    text.push_str(&format!("BuildKit daemon flags:\t{}\n", flags.join(" ")));
                }
                let platforms = platforms(node, &workers);
                for (name, value) in [("BuildKit version", version), ("Platforms", platforms)] {
                    if !value.is_empty() {
                        text.push_str(&format!("{name}:\t{value}\n"));
                    }
                }
                let labels: BTreeMap<&String, &String> =
                    workers.iter().flat_map(|w| &w.labels).collect();
                if !labels.is_empty() {
                    text.push_str("Labels:\n");
                }
                for (key, value) in labels {
                    text.push_str(&format!(" {key}:\t{value}\n"));
                }
            }
            Err(fault) => text.push_str(&format!("Error:\t{fault}\n")),
        }
    }
    output::print(&table::align(&text))
}

pub(crate) async fn remove(args: RemoveArgs) -> Result<()> {
    let store = Store::open()?;
    let builders = match (args.all_inactive, args.names.is_empty()) {
        (true, false) => {
            return Err(Fault::invalid("cannot specify builder name when --all-inactive is set"));
        }
        (true, true) => {
            let mut inactive = Vec::new();
            for builder in store.list()? {
                let Ok(driver) = Driver::parse(&builder.driver) else { continue };
                let answers = builder.nodes.iter().map(|n| answer(driver, n, false));
                let runs = |said: &Result<Said>| {
                    said.as_ref().is_ok_and(|said| said.state == State::Running)
                };
                if !join_all(answers).await.iter().any(runs) {
                    inactive.push(builder);
                }
            }
            inactive
        }
        (false, _) => named(&store, &args.names)?,
    };
    let keep = Keep { daemon: args.keep_daemon, state: args.keep_state };
    for builder in builders {
        // What drivers that are not ours started would be left behind.
        let driver = match builder.driver() {
            Ok(driver) => driver,
            Err(_) if keep.daemon => Driver::Remote,
            Err(fault) => {
                let fault = fault.context("remove the builder");
                return Err(fault.hint("use docker buildx rm, or keep the daemon: --keep-daemon"));
            }
        };
        let nodes = builder.nodes.iter().map(|node| driver.remove(node, keep));
        let failed = join_all(nodes).await.into_iter().find_map(Result::err);
        // As with buildx, a builder whose daemons cannot be reached is forgotten, too.
        store.remove(&builder.name)?;
        if let Some(fault) = failed {
            return Err(fault.context(format!("{} is forgotten, but not all of it", builder.name)));
        }
        output::print(&format!("{} removed\n", builder.name))?;
    }
    Ok(())
}

pub(crate) async fn stop(args: StopArgs) -> Result<()> {
    let builders = named(&Store::open()?, &args.names)?;
    for builder in builders {
        let driver = builder.driver().map_err(|f| f.context("stop the builder"))?;
        for node in &builder.nodes {
            driver.stop(node).await?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: CreateArgs,
    }

    /// What the builder has after `create` with each of `lines`, or why the last is refused.
    #[track_caller]
    fn check(driver: Driver, lines: &[&str], expected: &str) {
        let mut builder =
            Builder { name: "b".into(), driver: driver.name().into(), ..Builder::default() };
        let mut shown = String::new();
        for line in lines {
            let words = ["create"].into_iter().chain(line.split_whitespace());
            let args =
                <Line as clap::Parser>::try_parse_from(words).unwrap_or_else(|e| panic!("{e}"));
            shown = match update(&mut builder, driver, &args.args, "unix:///d") {
                Err(fault) => format!("error {fault}"),
                Ok(()) => {
                    let node = |n: &Node| {
                        let platforms: Vec<String> =
                            n.platforms.iter().flatten().map(ToString::to_string).collect();
                        let flags = n.flags.clone().unwrap_or_default();
                        format!(
                            "{}={} {}{}",
                            n.name,
                            n.endpoint,
                            platforms.join("+"),
                            flags.join(" ")
                        )
                    };
                    builder.nodes.iter().map(node).collect::<Vec<_>>().join("; ")
                }
            };
        }
        assert_eq!(shown, expected, "{lines:?}");
    }

    #[test]
    fn nodes_are_added_and_changed() {
        let first = "unix:///a --platform linux/amd64,linux/arm64";
        check(Driver::Remote, &[first], "b0=unix:///a linux/amd64+linux/arm64");
        check(
            Driver::Remote,
            &[first, "unix:///b --append --platform linux/arm64"],
            "b0=unix:///a linux/amd64; b1=unix:///b linux/arm64",
        );
        check(
            Driver::Remote,
            &[first, "unix:///c --node b0"],
            "b0=unix:///c linux/amd64+linux/arm64",
        );
        check(
            Driver::Remote,
            &[first, "unix:///a --append"],
            "error invalid duplicate endpoint unix:///a",
        );
        check(
            Driver::Remote,
            &[first, "unix:///b --node x"],
            "error node x not found, did you mean to append?",
        );
        check(
            Driver::Remote,
            &["unix:///a --buildkitd-flags=--debug"],
            "error the remote driver starts no daemon that could be configured",
        );
        check(
            Driver::Container,
            &["--buildkitd-flags=--debug"],
            "b0=unix:///d --debug --allow-insecure-entitlement=network.host",
        );
        check(
            Driver::Kubernetes,
            &["--node my_n far"],
            "error kubernetes driver does not support endpoint args \"far\"",
        );
    }

    #[test]
    fn flags_are_split_as_by_a_shell() {
        assert_eq!(
            words("--a 'b c'  \"d\\\"e\" f\\ g ''").unwrap(),
            ["--a", "b c", "d\"e", "f g", ""]
        );
        assert!(words("'a").is_err());
    }

    #[test]
    fn certificates_go_with_the_configuration() {
        let dir = tempfile::tempdir().unwrap();
        let ca = dir.path().join("ca.pem");
        std::fs::write(&ca, "root").unwrap();
        let config = dir.path().join("b.toml");
        let text = format!("debug = true\n[registry.\"r.io:5000\"]\nca = [{:?}]\n", ca);
        std::fs::write(&config, text).unwrap();
        let files = config_files(config.to_str().unwrap()).unwrap();
        assert_eq!(files["certs/r.io_5000/ca.pem"], STANDARD.encode("root"));
        let text = String::from_utf8(STANDARD.decode(&files[CONFIG]).unwrap()).unwrap();
        assert!(text.contains("/etc/buildkit/certs/r.io_5000/ca.pem"), "{text}");
        std::fs::write(&config, vec![b' '; MAX_CONFIG as usize + 1]).unwrap();
        assert!(config_files(config.to_str().unwrap()).is_err());
    }
}
