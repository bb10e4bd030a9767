//! `shipway create`, `use`, `ls`, `inspect`, `rm` and `stop`: builders, which buildx sees, too
//! (rows `bx.create` and others).

use std::{collections::BTreeMap, time::Duration};

use futures::future::join_all;
use shipway_client::{Client, ConnectOptions, Location, WorkerInfo};
use shipway_fault::{Code, Context, Fault, Result};

use crate::{
    builders::{Builder, Node, Store},
    csv, output, table,
};

/// How long a node may take to answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// Make a builder of a running daemon
#[derive(clap::Args, Debug)]
pub(crate) struct CreateArgs {
    /// Address of the daemon (unix://, tcp://, ssh://, docker-container://, kube-pod://)
    #[arg(value_name = "ENDPOINT")]
    endpoint: Option<String>,
    /// Name of the builder
    #[arg(long)]
    name: Option<String>,
    /// How the daemon is reached: remote
    #[arg(long, default_value = "remote")]
    driver: String,
    /// Option of the driver: cacert, cert, key, servername; may be repeated
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
    #[arg(long, hide = true)]
    buildkitd_flags: Option<String>,
    /// Configuration of the daemon, for drivers that start one
    #[arg(long, alias = "config", hide = true)]
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
    /// Keep what the daemon has; accepted for compatibility, since it always is
    #[arg(long, hide = true)]
    keep_state: bool,
    /// Let the daemon run; accepted for compatibility, since it always does
    #[arg(long, hide = true)]
    keep_daemon: bool,
}

/// Stop a builder
#[derive(clap::Args, Debug)]
pub(crate) struct StopArgs {
    /// The builders [default: the one that is used]
    names: Vec<String>,
}

fn driver_options(texts: &[String]) -> Result<Option<BTreeMap<String, String>>> {
    const KNOWN: [&str; 5] = ["cacert", "cert", "key", "servername", "default-load"];
    let mut options = BTreeMap::new();
    for text in texts {
        for field in csv::fields(text)? {
            let (key, value) = field
                .split_once('=')
                .ok_or_else(|| Fault::invalid(format!("invalid value {field:?}, expecting k=v")))?;
            if !KNOWN.contains(&key) {
                let fault =
                    Fault::invalid(format!("invalid driver option {key} for remote driver"));
                return Err(match shipway_fault::nearest(key, KNOWN) {
                    Some(near) => fault.hint(format!("did you mean {near}?")),
                    None => fault.hint(format!("options are {}", KNOWN.join(", "))),
                });
            }
            if matches!(key, "cacert" | "cert" | "key") && !value.starts_with('/') {
                return Err(Fault::invalid(format!(
                    "the option {key} is no absolute path: {value}"
                ))
                .hint("builders are used from other directories, too"));
            }
            options.insert(key.to_owned(), value.to_owned());
        }
    }
    Ok((!options.is_empty()).then_some(options))
}

pub(crate) async fn create(args: CreateArgs) -> Result<()> {
    if args.driver != "remote" {
        let fault = Fault::new(
            Code::Unimplemented,
            format!("the driver {:?} is not implemented", args.driver),
        );
        return Err(match args.driver.as_str() {
            "docker-container" => fault.hint(
                "start the daemon yourself, and name it: shipway create docker-container://NAME",
            ),
            "kubernetes" => {
                fault.hint("deploy the daemon yourself, and name it: shipway create kube-pod://POD")
            }
            _ => fault.hint("the driver is remote"),
        });
    }
    if args.buildkitd_flags.is_some() || args.buildkitd_config.is_some() {
        return Err(Fault::invalid("the remote driver starts no daemon that could be configured"));
    }
    let store = Store::open()?;
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
        (None, _) if args.leave => {
            return Err(Fault::not_found("failed to find the builder to leave"));
        }
        (None, _) => {
            let name = match &args.name {
                Some(name) => name.clone(),
                None => free_name(&store)?,
            };
            Builder { name, driver: "remote".into(), ..Builder::default() }
        }
    };
    if !builder.nodes.is_empty() {
        builder.check_driver()?;
    }
    if args.leave {
        let node = args.node.as_deref().ok_or_else(|| {
            Fault::invalid("leave requires instance name and node name").hint("name it with --node")
        })?;
        leave(&mut builder, node)?;
        store.save(&builder)?;
        return output::print(&format!("{}\n", builder.name));
    }
    update(&mut builder, &args)?;
    store.save(&builder)?;
    if args.use_it {
        store.use_builder(&builder.name, false, false)?;
    }
    drop(store);
    if args.bootstrap {
        for node in &builder.nodes {
            answer(node, true).await?;
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

/// Adds or changes the node that `args` tell.
fn update(builder: &mut Builder, args: &CreateArgs) -> Result<()> {
    let endpoint = match &args.endpoint {
        Some(endpoint) => Some(endpoint.clone()),
        None => std::env::var("BUILDKIT_HOST").ok().filter(|h| !h.is_empty()),
    };
    if let Some(endpoint) = &endpoint {
        endpoint.parse::<Location>().context(|| "use the endpoint")?;
    }
    let platforms = args
        .platforms
        .iter()
        .map(|text| {
            let parsed: Result<shipway_oci::Platform, _> = text.trim().parse();
            let parsed = parsed.map_err(|e| Fault::invalid(format!("--platform {text}: {e}")))?;
            Ok(parsed.normalized())
        })
        .collect::<Result<Vec<_>>>()?;
    let options = driver_options(&args.driver_opts)?;
    let known =
        args.node.as_deref().and_then(|name| builder.nodes.iter().position(|n| n.name == name));
    let node = match known {
        Some(n) => &mut builder.nodes[n],
        None => {
            let endpoint = endpoint.clone().ok_or_else(|| {
                Fault::invalid("no remote endpoint provided")
                    .hint("give the address of a daemon, such as unix:///run/shipway/shipwayd.sock")
            })?;
            if builder.nodes.iter().any(|n| n.endpoint == endpoint) {
                return Err(Fault::invalid(format!("invalid duplicate endpoint {endpoint}")));
            }
            let name = match &args.node {
                Some(name) => name.clone(),
                None => (0..)
                    .map(|n| format!("{}{n}", builder.name))
                    .find(|name| builder.nodes.iter().all(|n| n.name != *name))
                    .unwrap_or_default(),
            };
            builder.nodes.push(Node { name, ..Node::default() });
            let last = builder.nodes.len() - 1;
            &mut builder.nodes[last]
        }
    };
    if let Some(endpoint) = endpoint {
        node.endpoint = endpoint;
    }
    if !platforms.is_empty() {
        node.platforms = Some(platforms);
    }
    if options.is_some() {
        node.driver_opts = options;
    }
    node.tls().map(drop)
}

pub(crate) fn use_builder(args: &UseArgs) -> Result<()> {
    let store = Store::open()?;
    let builder = store.need(&args.name)?;
    store.use_builder(&builder.name, args.global, args.default)
}

/// Connects to a node.
pub(crate) async fn connect(_driver: &str, node: &Node, wait: bool) -> Result<Client> {
    let location: Location = node.endpoint.parse()?;
    let options = ConnectOptions { tls: node.tls()?, timeout: Some(PATIENCE), wait };
    Client::connect(&location, &options)
        .await
        .context(|| format!("connect to the node {}", node.name))
}

/// What a node says of itself.
async fn answer(node: &Node, wait: bool) -> Result<(String, Vec<WorkerInfo>)> {
    let client = connect("remote", node, wait).await?;
    let version = client.info().await.map(|info| info.buildkit_version.version);
    Ok((version.unwrap_or_default(), client.workers(Vec::new()).await?))
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
        match builder.driver.as_str() {
            "remote" => join_all(builder.nodes.iter().map(|n| answer(n, false))).await,
            _ => Vec::new(),
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
                Some(Ok((version, workers))) => ("running", version, platforms(node, &workers)),
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
        if builder.driver != "remote" {
            text.push_str("Status:\tunknown\nError:\tthe driver is not implemented here\n");
            continue;
        }
        match answer(node, args.bootstrap).await {
            Ok((version, workers)) => {
                let platforms = platforms(node, &workers);
                text.push_str(&format!(
                    "Status:\trunning\nBuildKit version:\t{version}\nPlatforms:\t{platforms}\n"
                ));
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
            for builder in store.list()?.into_iter().filter(|b| b.driver == "remote") {
                let answers = join_all(builder.nodes.iter().map(|n| answer(n, false))).await;
                if answers.iter().all(Result::is_err) {
                    inactive.push(builder);
                }
            }
            inactive
        }
        (false, _) => named(&store, &args.names)?,
    };
    for builder in builders {
        // What other drivers started would be left behind.
        builder
            .check_driver()
            .map_err(|f| f.context("remove the builder").hint("use docker buildx rm"))?;
        store.remove(&builder.name)?;
        output::print(&format!("{} removed\n", builder.name))?;
    }
    Ok(())
}

pub(crate) fn stop(args: &StopArgs) -> Result<()> {
    for builder in named(&Store::open()?, &args.names)? {
        // The daemon of a remote builder is not ours to stop, and buildx lets it run, too.
        builder.check_driver().map_err(|f| f.context("stop the builder"))?;
    }
    Ok(())
}
