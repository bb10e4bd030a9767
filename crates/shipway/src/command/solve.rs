//! `buildctl build`: a solve, with its parts named one by one.

use std::{
    collections::BTreeMap,
    io::{IsTerminal, Read},
    path::PathBuf,
};

use serde_json::Map;
use shipway_client::{
    Answer, Client, Definition, DockerConfig, LocalDirs, Policy, SolveOptions, shared_key,
};
use shipway_fault::{Context, Fault, Result};

use crate::{
    output,
    progress::Mode,
    run::{self, Extras},
    spec,
};

/// Largest definition that is read.
const MAX_DEFINITION: u64 = 64 << 20;

/// Build with a frontend, or the LLB definition on standard input
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// What becomes of the result, such as type=image,name=docker.io/username/image,push=true; may
    /// be repeated
    #[arg(short, long)]
    output: Vec<String>,
    /// How to show progress: auto, plain, tty, rawjson, quiet; for auto, BUILDKIT_PROGRESS counts
    #[arg(long, default_value = "auto")]
    progress: Mode,
    /// File to which the build's events are added as JSON
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// A local directory to offer, as NAME=DIR; may be repeated
    #[arg(long, value_name = "NAME=DIR")]
    local: Vec<String>,
    /// A local OCI layout to offer, as NAME=DIR; may be repeated
    #[arg(long, value_name = "NAME=DIR")]
    oci_layout: Vec<String>,
    /// Frontend, such as dockerfile.v0
    #[arg(long, default_value = "", hide_default_value = true)]
    frontend: String,
    /// An option of the frontend, such as target=foo or build-arg:foo=bar; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    opt: Vec<String>,
    /// Use no cache for any step
    #[arg(long)]
    no_cache: bool,
    /// A cache to write, such as type=registry,ref=example.com/foo/bar; may be repeated
    #[arg(long, value_name = "CACHE")]
    export_cache: Vec<String>,
    /// A cache to read, such as type=local,src=path/to/dir; may be repeated
    #[arg(long, value_name = "CACHE")]
    import_cache: Vec<String>,
    /// A secret to offer: id=NAME,src=FILE or id=NAME,env=VARIABLE; may be repeated
    #[arg(long)]
    secret: Vec<String>,
    /// A privilege to allow: network.host, security.insecure, device; may be repeated
    #[arg(long)]
    allow: Vec<String>,
    /// An SSH agent, socket or keys to offer: default|ID[=SOCKET[,raw=true]|KEY,…]; may be
    /// repeated
    #[arg(long)]
    ssh: Vec<String>,
    /// File that gets the build's metadata, such as the image's digest, as JSON
    #[arg(long, value_name = "FILE")]
    metadata_file: Option<PathBuf>,
    /// File with a source policy
    #[arg(long, value_name = "FILE")]
    source_policy_file: Option<PathBuf>,
    /// Let steps reach the network only through a recording proxy
    #[arg(long)]
    proxy_network: bool,
    /// File that gets the build's id
    #[arg(long, value_name = "FILE")]
    ref_file: Option<PathBuf>,
    /// TLS for fetching tokens for a registry: host=HOST,ca=FILE,cert=FILE,key=FILE,insecure=BOOL;
    /// may be repeated
    #[arg(long, value_name = "CONTEXT")]
    registry_auth_tlscontext: Vec<String>,
    /// Where to write what came from the cache, as JSON: a file, stdout or stderr
    #[arg(long, value_name = "FILE")]
    debug_json_cache_metrics: Option<String>,
}

pub(crate) async fn run(client: &Client, args: Args) -> Result<()> {
    let (mode, ref_file) =
        (mode(args.progress, std::env::var("BUILDKIT_PROGRESS").ok())?, args.ref_file.clone());
    let extras =
        Extras { trace: args.trace.clone(), metrics: args.debug_json_cache_metrics.clone() };
    let mut options = options(&args, &|name| std::env::var(name).ok())?;
    if options.frontend.is_empty() {
        let mut definition = shipway_task::blocking("read the definition", read_definition).await?;
        if args.no_cache {
            definition.ignore_cache();
        }
        options.definition = Some(definition);
    }
    let reference = shipway_client::new_reference()?;
    options.reference.clone_from(&reference);
    let built =
        match options.frontend_attrs.contains_key("requestid") && !options.frontend.is_empty() {
            true => run::ask(client, options, mode)
                .await
                .and_then(|answer| output::print(&summary(&answer))),
            false => run::build(client, options, mode, &extras).await.and_then(|(outcome, _)| {
                let Some(path) = &args.metadata_file else { return Ok(()) };
                let text = output::metadata(&outcome.response, Map::new());
                output::write_file(path, text.as_bytes())
            }),
        };
    if let Some(path) = ref_file {
        output::write_file(&path, reference.as_bytes())?;
    }
    built
}

/// How progress is shown: as was asked for, or else as the environment says.
fn mode(asked: Mode, env: Option<String>) -> Result<Mode> {
    match env.filter(|v| asked == Mode::Auto && !v.is_empty()) {
        Some(text) => text.parse().map_err(|fault: Fault| fault.context("BUILDKIT_PROGRESS")),
        None => Ok(asked),
    }
}

/// A frontend's answer: the text for people, or else every part of it.
fn summary(answer: &Answer) -> String {
    if let Some(text) = answer.get("result.txt") {
        return String::from_utf8_lossy(text).into_owned();
    }
    let parts = answer.iter().filter(|(key, _)| key.starts_with("result."));
    parts.map(|(key, value)| format!("{key}\n{}\n", String::from_utf8_lossy(value))).collect()
}

fn read_definition() -> Result<Definition> {
    let stdin = std::io::stdin();
    if stdin.is_terminal() {
        return Err(Fault::invalid("please specify --frontend or pipe LLB definition to stdin"));
    }
    let mut data = Vec::new();
    stdin
        .take(MAX_DEFINITION)
        .read_to_end(&mut data)
        .map_err(|e| Fault::io("read the definition from standard input", e))?;
    Definition::read(&data)
}

/// What the arguments ask for, without what is read from standard input.
fn options(args: &Args, env: &dyn Fn(&str) -> Option<String>) -> Result<SolveOptions> {
    let mut attrs = frontend_attrs(&args.opt, env).context(|| "invalid opt")?;
    if !args.frontend.is_empty() && args.no_cache {
        attrs.insert("no-cache".to_owned(), String::new());
    }
    let mut dirs = LocalDirs::default();
    for (name, dir) in spec::pairs(&args.local).context(|| "invalid local")? {
        dirs.add(name, dir).context(|| "invalid local")?;
    }
    let mut docker = docker_config();
    docker.set_tls(spec::auth_tls(&args.registry_auth_tlscontext)?);
    let layouts = spec::pairs(&args.oci_layout).context(|| "invalid oci-layout")?;
    Ok(SolveOptions {
        frontend: args.frontend.clone(),
        frontend_attrs: attrs,
        exports: args.output.iter().map(|text| spec::typed_output(text)).collect::<Result<_>>()?,
        cache_exports: args
            .export_cache
            .iter()
            .map(|text| spec::cache(text, "--export-cache", true))
            .collect::<Result<_>>()?,
        cache_imports: args
            .import_cache
            .iter()
            .map(|text| spec::cache(text, "--import-cache", false))
            .collect::<Result<_>>()?,
        entitlements: spec::entitlements(&args.allow)?,
        policy: args.source_policy_file.as_deref().map(Policy::load).transpose()?,
        proxy_network: args.proxy_network,
        shared_key: shared_key(dirs.iter()),
        dirs,
        layouts: layouts.into_iter().map(|(name, dir)| (name, dir.into())).collect(),
        secrets: spec::secrets(&args.secret)?,
        ssh: spec::ssh(&args.ssh)?,
        docker: Some(docker),
        ..SolveOptions::default()
    })
}

/// Docker's configuration; one that cannot be read does not keep from building.
pub(crate) fn docker_config() -> DockerConfig {
    let config = DockerConfig::default_path().map(|path| DockerConfig::load(&path));
    config
        .transpose()
        .unwrap_or_else(|fault| {
            tracing::warn!("{fault}");
            None
        })
        .unwrap_or_default()
}

/// `--opt` values; a build argument without a value takes the environment's.
fn frontend_attrs(
    opts: &[String],
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<BTreeMap<String, String>> {
    let mut attrs = BTreeMap::new();
    if let Some(epoch) = env("SOURCE_DATE_EPOCH") {
        attrs.insert("build-arg:SOURCE_DATE_EPOCH".to_owned(), epoch);
    }
    for opt in opts {
        match (opt.split_once('='), opt.strip_prefix("build-arg:").filter(|name| !name.is_empty()))
        {
            (Some((key, value)), _) => _ = attrs.insert(key.to_owned(), value.to_owned()),
            (None, Some(name)) => {
                if let Some(value) = env(name) {
                    attrs.insert(opt.clone(), value);
                }
            }
            (None, None) => return Err(Fault::invalid(format!("invalid value {opt}"))),
        }
    }
    Ok(attrs)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    #[track_caller]
    fn check_opts(opts: &[&str], env: &[(&str, &str)], expected: Result<&[(&str, &str)], &str>) {
        let opts: Vec<String> = opts.iter().map(|o| (*o).to_owned()).collect();
        let lookup =
            |name: &str| env.iter().find(|(k, _)| *k == name).map(|(_, v)| (*v).to_owned());
        let found = frontend_attrs(&opts, &lookup).map_err(|f| f.to_string());
        let expected = expected
            .map(|list| list.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect())
            .map_err(str::to_owned);
        assert_eq!(found, expected);
    }

    #[test]
    fn build_arguments_take_the_environment() {
        check_opts(
            &["target=a", "build-arg:X=1"],
            &[],
            Ok(&[("target", "a"), ("build-arg:X", "1")]),
        );
        check_opts(&["build-arg:X"], &[("X", "e")], Ok(&[("build-arg:X", "e")]));
        check_opts(&["build-arg:X"], &[], Ok(&[]));
        check_opts(&["build-arg:X=1", "build-arg:X"], &[("X", "e")], Ok(&[("build-arg:X", "e")]));
        check_opts(&[], &[("SOURCE_DATE_EPOCH", "7")], Ok(&[("build-arg:SOURCE_DATE_EPOCH", "7")]));
        check_opts(&["target"], &[], Err("invalid value target"));
        check_opts(&["build-arg:"], &[], Err("invalid value build-arg:"));
    }

    #[test]
    fn the_environment_says_how_progress_is_shown_where_nothing_was_asked_for() {
        let of = |asked, env: Option<&str>| {
            mode(asked, env.map(str::to_owned)).map_err(|f| f.to_string())
        };
        assert_eq!(of(Mode::Auto, Some("plain")), Ok(Mode::Plain));
        assert_eq!(of(Mode::Tty, Some("plain")), Ok(Mode::Tty));
        assert_eq!(
            (of(Mode::Auto, Some("")), of(Mode::Auto, None)),
            (Ok(Mode::Auto), Ok(Mode::Auto))
        );
        assert_eq!(
            of(Mode::Auto, Some("loud")),
            Err("BUILDKIT_PROGRESS: invalid progress mode loud".into())
        );
    }

    /// The command line that `nerdctl build` makes.
    #[test]
    fn the_arguments_of_nerdctl_are_understood() {
        let dir = tempfile::tempdir().expect("temp dir");
        let line = format!(
            "build --progress=plain --frontend=dockerfile.v0 --local=context={d} --output=type=image,unpack=true,name=docker.io/library/x:latest \
             --local=dockerfile={d} --opt=filename=Dockerfile --opt=build-arg:A=b=c --opt=label:k=v --no-cache --opt=image-resolve-mode=pull \
             --allow=network.host --opt=force-network-mode=host --export-cache=type=inline --metadata-file=/tmp/x",
            d = dir.path().display()
        );
        let args =
            Line::try_parse_from(line.split_whitespace()).unwrap_or_else(|e| panic!("{e}")).args;
        let options = options(&args, &|_| None).expect("options");
        let attrs: Vec<String> =
            options.frontend_attrs.iter().map(|(k, v)| format!("{k}={v}")).collect();
        assert_eq!(
            attrs,
            [
                "build-arg:A=b=c",
                "filename=Dockerfile",
                "force-network-mode=host",
                "image-resolve-mode=pull",
                "label:k=v",
                "no-cache="
            ]
        );
        assert_eq!(options.exports[0].attrs["name"], "docker.io/library/x:latest");
        assert_eq!(
            options.dirs.iter().map(|(name, _)| name).collect::<Vec<_>>(),
            ["context", "dockerfile"]
        );
        assert_eq!(
            (options.cache_exports[0].kind.as_str(), &*options.entitlements[0]),
            ("inline", "network.host")
        );
    }
}
