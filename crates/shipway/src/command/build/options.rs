//! From the arguments of `shipway build` to a solve (rows `dfo.*`).

use std::{collections::BTreeMap, io::Cursor, path::Path};

use shipway_cachemounts::Direction;
use shipway_client::{Definition, Export, Policy, SolveOptions, Target, shared_key};
use shipway_fault::{Code, Context, Fault, Result, nearest};
use shipway_gocompat::parse_bool;
use shipway_oci::{ImageName, NetworkName, Platform};
use tokio::io::AsyncReadExt;

use super::{
    Args,
    call::Call,
    context::{Input, Place, is_remote},
    vcs,
};
use crate::{command::solve, csv, size, spec};

/// Looks up a variable of the environment that arguments refer to.
pub(super) type Env<'a> = &'a dyn Fn(&str) -> Option<String>;

/// The solve that `args` ask for.
pub(super) fn of(args: &Args, input: &Input, env: Env<'_>) -> Result<SolveOptions> {
    let docker = solve::docker_config();
    let mut options = SolveOptions {
        frontend: "dockerfile.v0".to_owned(),
        entitlements: spec::entitlements(&args.allow)?,
        cache_exports: args
            .cache_to
            .iter()
            .map(|text| spec::cache(text, "--cache-to", true))
            .collect::<Result<_>>()?,
        cache_imports: args
            .cache_from
            .iter()
            .map(|text| spec::cache(text, "--cache-from", false))
            .collect::<Result<_>>()?,
        mount_saves: args
            .cache_mount_to
            .iter()
            .map(|text| spec::cache_mounts(text, "--cache-mount-to", Direction::Save, env))
            .collect::<Result<_>>()?,
        mount_restores: args
            .cache_mount_from
            .iter()
            .map(|text| spec::cache_mounts(text, "--cache-mount-from", Direction::Restore, env))
            .collect::<Result<_>>()?,
        secrets: spec::secrets(&args.secrets)?,
        ssh: spec::ssh(&args.ssh)?,
        policy: policy(args, env)?,
        exports: exports(args)?,
        ..SolveOptions::default()
    };
    locals(input, &mut options).context(|| "offer the context")?;
    if let Some(subdir) = &args.subdir {
        options.frontend_attrs.insert("contextsubdir".to_owned(), subdir.clone());
    }
    named_contexts(args, &mut options)?;
    let vcs = match input.directory() {
        Some(dir) => {
            let file = input.dockerfile_dir.as_ref().map(|dir| dir.join(&input.filename));
            vcs::attributes(dir, file.as_deref(), options.dirs.iter(), env)
        }
        None => BTreeMap::new(),
    };
    let attrs = &mut options.frontend_attrs;
    // We draw the columns of what is wrong; other clients get lines only.
    attrs.insert("source-columns".to_owned(), "true".to_owned());
    for (name, value) in docker.proxy_args() {
        attrs.insert(format!("build-arg:{name}"), value);
    }
    build_args(args, env, attrs);
    for (key, value) in spec::pairs(&args.labels).context(|| "--label")? {
        attrs.insert(format!("label:{key}"), value);
    }
    // What the user says counts.
    for (key, value) in vcs {
        attrs.entry(key).or_insert(value);
    }
    if let Some(target) = &args.target {
        attrs.insert("target".to_owned(), target.clone());
    }
    platforms(args, env, attrs)?;
    caching(args, attrs)?;
    steps(args, attrs, &mut options.entitlements)?;
    attestations(args, attrs)?;
    if attrs.get("build-arg:BUILDKIT_INLINE_CACHE").and_then(|v| parse_bool(v)) == Some(true) {
        options.cache_exports.push(spec::cache("type=inline", "--cache-to", true)?);
    }
    if let Some(call) = Call::of(args)? {
        // A question makes nothing that could be exported.
        options.frontend_attrs.insert("requestid".to_owned(), call.request());
        options.exports.clear();
        options.cache_exports.clear();
        options.mount_saves.clear();
    }
    options.shared_key = shared_key(options.dirs.iter());
    options.docker = Some(docker);
    Ok(options)
}

fn locals(input: &Input, options: &mut SolveOptions) -> Result<()> {
    options.frontend_attrs.insert("filename".to_owned(), input.filename.clone());
    match &input.context {
        Place::Remote(url) => _ = options.frontend_attrs.insert("context".to_owned(), url.clone()),
        Place::Directory(dir) => options.dirs.add("context", dir)?,
        Place::Stdin(head) => {
            let url = options.uploads.add(Cursor::new(head.clone()).chain(tokio::io::stdin()))?;
            options.frontend_attrs.insert("context".to_owned(), url);
        }
    }
    if let Some(url) = input.dockerfile_url.as_ref().filter(|_| input.directory().is_some()) {
        options
            .frontend_inputs
            .insert("dockerfile".to_owned(), Definition::download(url, &input.filename));
    }
    dockerfile(input, options)
}

/// Offers the directory of the Dockerfile, if that is on this machine.
pub(super) fn dockerfile(input: &Input, options: &mut SolveOptions) -> Result<()> {
    let Some(dir) = &input.dockerfile_dir else { return Ok(()) };
    if input.directory().is_none() {
        options.frontend_attrs.insert("dockerfilekey".to_owned(), "dockerfile".to_owned());
    }
    options.dirs.add("dockerfile", dir)?;
    options.shared_key = shared_key(options.dirs.iter());
    Ok(())
}

/// What the build may use, by file or as the environment says.
fn policy(args: &Args, env: Env<'_>) -> Result<Option<Policy>> {
    if let Some(file) = &args.source_policy_file {
        return Policy::load(file).map(Some).context(|| "--source-policy-file");
    }
    let mut file = env("EXPERIMENTAL_BUILDKIT_SOURCE_POLICY").filter(|v| !v.is_empty());
    for text in &args.policies {
        let truth = |value: &str| {
            parse_bool(value).ok_or_else(|| {
                Fault::invalid(format!("--policy {text}: {value:?} is not true or false"))
            })
        };
        for (key, value) in csv::attributes(text).context(|| "--policy")? {
            match key.as_str() {
                "filename" if value.ends_with(".rego") => {
                    return Err(Fault::new(
                        Code::Unimplemented,
                        format!("--policy {text}: policies in Rego are not implemented"),
                    )
                    .hint("write the rules as the JSON of --source-policy-file"));
                }
                "filename" => file = Some(value),
                "disabled" | "reset" if truth(&value)? => file = None,
                "disabled" | "reset" => {}
                "strict" if truth(&value)? => {}
                "strict" => {
                    return Err(Fault::unimplemented(format!("--policy {text}: strict=false"))
                        .hint("a policy always counts: leave it out, or say disabled=true"));
                }
                _ => {
                    let known = ["filename", "reset", "disabled", "strict"];
                    let fault = Fault::invalid(format!("--policy {text}: unexpected key {key:?}"));
                    return Err(match nearest(&key, known) {
                        Some(near) => fault.hint(format!("did you mean {near}?")),
                        None => fault.hint(format!("known are {}", known.join(", "))),
                    });
                }
            }
        }
    }
    file.map(|file| Policy::load(file.as_ref())).transpose()
}

fn build_args(args: &Args, env: Env<'_>, attrs: &mut BTreeMap<String, String>) {
    if let Some(epoch) = env("SOURCE_DATE_EPOCH") {
        attrs.insert("build-arg:SOURCE_DATE_EPOCH".to_owned(), epoch);
    }
    for text in &args.build_args {
        let value = match text.split_once('=') {
            Some((name, value)) => Some((name, value.to_owned())),
            // Without a value in the environment, the Dockerfile's default counts.
            None => env(text).map(|value| (text.as_str(), value)),
        };
        if let Some((name, value)) = value {
            attrs.insert(format!("build-arg:{name}"), value);
        }
    }
}

fn platforms(args: &Args, env: Env<'_>, attrs: &mut BTreeMap<String, String>) -> Result<()> {
    let mut wanted = args.platforms.clone();
    if wanted.is_empty() {
        wanted.extend(env("DOCKER_DEFAULT_PLATFORM").filter(|v| !v.is_empty()));
    }
    let mut out: Vec<String> = Vec::new();
    for text in wanted.iter().map(|text| text.trim()).filter(|text| !text.is_empty()) {
        let platform = match text {
            "local" => Platform::host(),
            text => text.parse().map_err(|e| Fault::invalid(format!("--platform {text}: {e}")))?,
        };
        let text = platform.normalized().to_string();
        if !out.contains(&text) {
            out.push(text);
        }
    }
    if !out.is_empty() {
        attrs.insert("platform".to_owned(), out.join(","));
    }
    Ok(())
}

fn caching(args: &Args, attrs: &mut BTreeMap<String, String>) -> Result<()> {
    match (args.no_cache, args.no_cache_filter.is_empty()) {
        (true, false) => {
            return Err(Fault::invalid(
                "cannot use --no-cache and --no-cache-filter at the same time",
            ));
        }
        (true, true) => _ = attrs.insert("no-cache".to_owned(), String::new()),
        (false, false) => _ = attrs.insert("no-cache".to_owned(), args.no_cache_filter.join(",")),
        (false, true) => {}
    }
    if args.pull == Some(true) {
        attrs.insert("image-resolve-mode".to_owned(), "pull".to_owned());
    }
    Ok(())
}

/// What RUN steps find around them.
fn steps(
    args: &Args,
    attrs: &mut BTreeMap<String, String>,
    entitlements: &mut Vec<String>,
) -> Result<()> {
    let likely = |name: &str| nearest(name, ["default", "none", "host"]).map(str::to_owned);
    match args.network.as_deref() {
        None | Some("" | "default" | "sandbox") => {}
        Some("none") => _ = attrs.insert("force-network-mode".to_owned(), "none".to_owned()),
        Some("host") => {
            attrs.insert("force-network-mode".to_owned(), "host".to_owned());
            if !entitlements.iter().any(|e| e == "network.host") {
                entitlements.push("network.host".to_owned());
            }
        }
        // Asking for it does not grant it: definitions of bake ask, too.
        Some(other) if other.parse::<NetworkName>().is_ok() && likely(other).is_none() => {
            attrs.insert("force-network-mode".to_owned(), other.to_owned());
        }
        Some(other) => {
            let fault = Fault::invalid(format!("network mode {other:?} not supported"));
            if let Some(near) = likely(other) {
                return Err(fault.hint(format!("did you mean {near}?")));
            }
            return Err(
                fault.hint("it is default, none, host or the name of one of the daemon's networks")
            );
        }
    }
    if !args.add_hosts.is_empty() {
        let hosts = args.add_hosts.iter().map(|text| host(text)).collect::<Result<Vec<_>>>()?;
        attrs.insert("add-hosts".to_owned(), hosts.join(","));
    }
    if let Some(text) = &args.shm_size {
        attrs.insert(
            "shm-size".to_owned(),
            size::parse_bytes(text).context(|| "--shm-size")?.to_string(),
        );
    }
    if !args.ulimits.is_empty() {
        let limits = args.ulimits.iter().map(|text| ulimit(text)).collect::<Result<Vec<_>>>()?;
        attrs.insert("ulimit".to_owned(), limits.join(","));
    }
    let short = [
        ("memory", &args.memory),
        ("memory-swap", &args.memory_swap),
        ("cpu-shares", &args.cpu_shares),
        ("cpu-period", &args.cpu_period),
        ("cpu-quota", &args.cpu_quota),
        ("cpuset-cpus", &args.cpuset_cpus),
        ("cpuset-mems", &args.cpuset_mems),
    ];
    for (name, value) in short {
        let Some(value) = value else { continue };
        resource(&format!("{name}={value}"), attrs).context(|| format!("--{name} {value}"))?;
    }
    for text in &args.resources {
        resource(text, attrs).context(|| format!("--resource {text}"))?;
    }
    if let Some(parent) = &args.cgroup_parent {
        attrs.insert("cgroup-parent".to_owned(), parent.clone());
    }
    Ok(())
}

/// Limits by the names that Docker's flags for them have, as the frontend's attributes.
const RESOURCES: [(&str, &str); 7] = [
    ("memory", "memory"),
    ("memory-swap", "memswap"),
    ("cpu-shares", "cpushares"),
    ("cpu-period", "cpuperiod"),
    ("cpu-quota", "cpuquota"),
    ("cpuset-cpus", "cpusetcpus"),
    ("cpuset-mems", "cpusetmems"),
];

/// `name=value[,name=value]`; a set of processors has commas of its own, so what is no limit
/// belongs to the one before.
fn resource(text: &str, attrs: &mut BTreeMap<String, String>) -> Result<()> {
    let mut last: Option<&str> = None;
    for part in text.split(',') {
        match (part.split_once('='), last) {
            (Some((name, value)), _) => {
                let names = RESOURCES.map(|(name, _)| name);
                let Some((_, attr)) = RESOURCES.iter().find(|(known, _)| *known == name) else {
                    let fault = Fault::invalid(format!("unknown resource {name:?}"));
                    return Err(match nearest(name, names) {
                        Some(near) => fault.hint(format!("did you mean {near}?")),
                        None => fault.hint(format!("known are {}", names.join(", "))),
                    });
                };
                let value = match name {
                    "memory" | "memory-swap" if value != "-1" => {
                        size::parse_bytes(value)?.to_string()
                    }
                    _ => value.to_owned(),
                };
                attrs.insert((*attr).to_owned(), value);
                last = Some(attr).filter(|a| a.starts_with("cpuset")).copied();
            }
            (None, Some(attr)) => {
                attrs.entry(attr.to_owned()).or_default().push_str(&format!(",{part}"));
            }
            (None, None) => {
                return Err(Fault::invalid(format!("invalid value {part:?}"))
                    .hint("write it as name=value"));
            }
        }
    }
    Ok(())
}

/// `host:ip` or `host=ip`, with IPv6 addresses bare or in brackets, as `host=ip`.
fn host(text: &str) -> Result<String> {
    let broken = || Fault::invalid(format!("invalid host {text:?}")).hint("write it as host:ip");
    let (host, ip) = text.split_once('=').or_else(|| text.split_once(':')).ok_or_else(broken)?;
    let ip = ip.strip_prefix('[').and_then(|ip| ip.strip_suffix(']')).unwrap_or(ip);
    if ip == "host-gateway" {
        return Err(Fault::new(
            Code::Unimplemented,
            format!("--add-host {text}: host-gateway is not implemented"),
        )
        .hint("name an address"));
    }
    let ip: std::net::IpAddr = ip.parse().map_err(|_| broken())?;
    if host.is_empty() { Err(broken()) } else { Ok(format!("{host}={ip}")) }
}

/// `name=soft[:hard]` as `name=soft:hard`.
fn ulimit(text: &str) -> Result<String> {
    let broken = || {
        Fault::invalid(format!("invalid ulimit {text:?}"))
            .hint("write it as name=soft:hard, such as nofile=1024:2048")
    };
    let (name, limits) = text.split_once('=').ok_or_else(broken)?;
    let (soft, hard) = limits.split_once(':').unwrap_or((limits, limits));
    let number = |text: &str| text.parse::<i64>().ok().filter(|n| *n >= -1).ok_or_else(broken);
    let (soft, hard) = (number(soft)?, number(hard)?);
    if name.is_empty() || (hard != -1 && (soft > hard || soft == -1)) {
        return Err(broken());
    }
    Ok(format!("{name}={soft}:{hard}"))
}

fn attestations(args: &Args, attrs: &mut BTreeMap<String, String>) -> Result<()> {
    for text in &args.attests {
        let (kind, rest) = csv::kind(text, "--attest")?;
        if !["sbom", "provenance"].contains(&kind.as_str()) {
            return Err(Fault::invalid(format!("--attest {text}: unknown attestation {kind:?}"))
                .hint("it is sbom or provenance"));
        }
        if rest.get("disabled").and_then(|v| parse_bool(v)) != Some(true) {
            let rest: Vec<String> = rest
                .iter()
                .filter(|(k, _)| *k != "disabled")
                .map(|(k, v)| format!("{k}={v}"))
                .collect();
            attrs.insert(format!("attest:{kind}"), rest.join(","));
        }
    }
    for (kind, value) in [("provenance", &args.provenance), ("sbom", &args.sbom)] {
        match (value.as_deref(), value.as_deref().and_then(parse_bool)) {
            (None, _) | (_, Some(false)) => {}
            (_, Some(true)) => _ = attrs.insert(format!("attest:{kind}"), String::new()),
            (Some(text), None) => _ = attrs.insert(format!("attest:{kind}"), text.to_owned()),
        }
    }
    Ok(())
}

/// `name=value` contexts: local directories are offered under their name.
fn named_contexts(args: &Args, options: &mut SolveOptions) -> Result<()> {
    for text in &args.contexts {
        let (name, value) = text.split_once('=').ok_or_else(|| {
            Fault::invalid(format!("invalid context {text}")).hint("write it as name=context")
        })?;
        let name = context_name(name)?;
        let attr = match value.split_once("://") {
            Some(("oci-layout", rest)) => layout(&name, rest, options)?,
            _ if is_remote(value)
                || value.starts_with("docker-image://")
                || value.starts_with("target:") =>
            {
                value.to_owned()
            }
            _ => {
                options
                    .dirs
                    .add(name.clone(), value)
                    .context(|| format!("--build-context {text}"))?;
                format!("local:{name}")
            }
        };
        options.frontend_attrs.insert(format!("context:{name}"), attr);
    }
    Ok(())
}

/// A context's name as frontends look for it: stage and image names compare without case, and an
/// image's has more than one form.
pub(crate) fn context_name(name: &str) -> Result<String> {
    let parsed: ImageName = name
        .to_lowercase()
        .parse()
        .map_err(|e| Fault::invalid(format!("invalid context name {name}: {e}")))?;
    let name = parsed.familiar();
    Ok(name.strip_suffix(":latest").unwrap_or(&name).to_owned())
}

/// Looks for mistakes that show without files, a daemon or a Dockerfile.
pub(super) fn check(args: &Args) -> Result<()> {
    platforms(args, &|_| None, &mut BTreeMap::new())?;
    steps(args, &mut BTreeMap::new(), &mut Vec::new())?;
    spec::secrets(&args.secrets)?;
    spec::ssh(&args.ssh)?;
    for text in &args.outputs {
        output(text).context(|| format!("--output {text}"))?;
    }
    spec::pairs(&args.annotations).context(|| "--annotation").map(drop)
}

fn layout(name: &str, rest: &str, options: &mut SolveOptions) -> Result<String> {
    let (path, digest) = rest
        .rsplit_once('@')
        .map_or((rest, None), |(path, digest)| (path, Some(digest.to_owned())));
    let (path, tag) = match path.rsplit_once(':') {
        Some((path, tag)) if !tag.contains('/') => (path, Some(tag)),
        _ => (path, None),
    };
    let what = || format!("--build-context {name}=oci-layout://{rest}");
    let digest = match digest {
        Some(digest) => digest,
        None => {
            shipway_client::layout_digest(Path::new(path), tag).context(what)?.ok_or_else(|| {
                Fault::not_found(format!(
                    "{}: the layout has no {}",
                    what(),
                    tag.unwrap_or("latest image")
                ))
            })?
        }
    };
    options.layouts.insert(name.to_owned(), path.into());
    Ok(format!("oci-layout://{name}@{digest}"))
}

/// What becomes of the result; an image in containerd's store if nothing else is said.
fn exports(args: &Args) -> Result<Vec<Export>> {
    let names = args
        .tags
        .iter()
        .map(|tag| {
            tag.parse::<ImageName>()
                .map(|name| name.to_string())
                .map_err(|e| Fault::invalid(format!("invalid tag {tag:?}: {e}")))
        })
        .collect::<Result<Vec<_>>>()?;
    let mut exports = Vec::new();
    for text in &args.outputs {
        exports.extend(output(text).context(|| format!("--output {text}"))?);
    }
    let cache_only = exports.is_empty() && !args.outputs.is_empty();
    let image = |attrs: &[(&str, &str)]| {
        let attrs = attrs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Export { kind: "image".to_owned(), attrs, target: Target::None }
    };
    if args.push {
        if names.is_empty() && !exports.iter().any(|e| e.attrs.contains_key("name")) {
            return Err(Fault::invalid("tag is needed when pushing to registry")
                .hint("name the image with --tag"));
        }
        match exports.iter_mut().find(|e| e.kind == "image") {
            Some(export) => _ = export.attrs.insert("push".to_owned(), "true".to_owned()),
            None => exports.push(image(&[("push", "true")])),
        }
    }
    if (args.load || (exports.is_empty() && !cache_only))
        && !exports.iter().any(|e| e.kind == "image")
    {
        exports.push(image(&[]));
    }
    if args.optimize.is_some() && !exports.iter().any(is_image) {
        return Err(Fault::invalid("--optimize is of no use without an image")
            .hint("leave it out, or add --output type=image"));
    }
    for export in &mut exports {
        name(export, &names);
        annotate(export, args)?;
        optimize(export, args);
    }
    Ok(exports)
}

fn is_image(export: &Export) -> bool {
    ["image", "oci", "docker"].contains(&export.kind.as_str())
}

/// Layers in the order in which a command reads their files; that takes a table of contents.
fn optimize(export: &mut Export, args: &Args) {
    if let Some(command) = args.optimize.as_ref().filter(|_| is_image(export)) {
        export.attrs.entry("optimize".to_owned()).or_insert_with(|| command.clone());
        export.attrs.entry("compression".to_owned()).or_insert_with(|| "estargz".to_owned());
    }
}

fn name(export: &mut Export, names: &[String]) {
    if !is_image(export) {
        return;
    }
    if !names.is_empty() {
        export.attrs.entry("name".to_owned()).or_insert_with(|| names.join(","));
    }
    if export.kind == "image" {
        export.attrs.entry("unpack".to_owned()).or_insert_with(|| "true".to_owned());
        if !export.attrs.contains_key("name") {
            // Without any name the image would have no owner, and be gone with the next garbage
            // collection.
            export
                .attrs
                .entry("dangling-name-prefix".to_owned())
                .or_insert_with(|| "<none>".to_owned());
        }
    }
}

/// `key=value`, which may begin with what it annotates.
fn annotate(export: &mut Export, args: &Args) -> Result<()> {
    if !is_image(export) {
        return Ok(());
    }
    for (key, value) in spec::pairs(&args.annotations).context(|| "--annotation")? {
        let (kinds, key) = match key.split_once(':') {
            Some((kinds, key)) if kinds.split(',').all(known_annotation) => (kinds, key),
            _ => ("manifest", key.as_str()),
        };
        for kind in kinds.split(',') {
            export.attrs.insert(format!("annotation-{kind}.{key}"), value.clone());
        }
    }
    Ok(())
}

fn known_annotation(kind: &str) -> bool {
    let kind = kind.split('[').next().unwrap_or(kind);
    ["manifest", "index", "manifest-descriptor", "index-descriptor"].contains(&kind)
}

/// A value of `--output`; none if nothing is to be exported.
fn output(text: &str) -> Result<Option<Export>> {
    let fields = csv::fields(text)?;
    if let [single] = &fields[..]
        && !single.starts_with("type=")
    {
        let kind = if single == "-" { "tar" } else { "local" };
        return spec::export(
            kind.to_owned(),
            BTreeMap::from([("dest".to_owned(), single.clone())]),
        )
        .map(Some);
    }
    let (kind, mut attrs) = csv::kind(text, "--output")?;
    match kind.as_str() {
        "cacheonly" => return Ok(None),
        "registry" => {
            attrs.insert("push".to_owned(), "true".to_owned());
            return spec::export("image".to_owned(), attrs).map(Some);
        }
        // Docker's way to say: into the store. Ours is containerd's, and needs no copy.
        "docker" if !attrs.contains_key("dest") => {
            return spec::export("image".to_owned(), attrs).map(Some);
        }
        _ => {}
    }
    spec::export(kind, attrs).map(Some)
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

    /// What a command line becomes: attributes, exports, directories, entitlements; `$D` is a
    /// directory with a Dockerfile.
    #[track_caller]
    fn check(line: &str, expected: &[&str]) {
        let dir = tempfile::tempdir().expect("temp dir");
        std::fs::write(dir.path().join("Dockerfile"), "FROM scratch\n").expect("writes");
        let path = dir.path().to_str().expect("utf-8");
        let words = format!("build {line} $D").replace("$D", path);
        let args =
            Line::try_parse_from(words.split_whitespace()).unwrap_or_else(|e| panic!("{e}")).args;
        let env = |name: &str| match name {
            "FROM_ENV" => Some("e".to_owned()),
            // Wherever temporary files are.
            "BUILDX_GIT_INFO" => Some("false".to_owned()),
            _ => None,
        };
        let input = Input::read(args.file.as_deref(), &args.context).expect("input");
        let shown: Vec<String> = match of(&args, &input, &env) {
            Err(fault) => vec![format!("error {fault}")],
            Ok(options) => {
                let attrs = options.frontend_attrs.iter().filter(|(k, v)| {
                    !matches!(
                        (k.as_str(), v.as_str()),
                        ("filename", "Dockerfile") | ("source-columns", "true")
                    )
                });
                let mut shown: Vec<String> = attrs.map(|(k, v)| format!("{k}={v}")).collect();
                shown.extend(options.exports.iter().map(|e| {
                    let attrs: Vec<String> =
                        e.attrs.iter().map(|(k, v)| format!("{k}={v}")).collect();
                    format!("-> {} {} {:?}", e.kind, attrs.join(","), e.target)
                }));
                shown.extend(
                    options
                        .cache_exports
                        .iter()
                        .map(|c| format!("cache-to {} {:?}", c.kind, c.attrs)),
                );
                shown.extend(options.entitlements.iter().map(|e| format!("allow {e}")));
                let dirs = options
                    .dirs
                    .iter()
                    .filter(|(name, _)| !["context", "dockerfile"].contains(name));
                shown.extend(dirs.map(|(name, _)| format!("dir {name}")));
                shown
            }
        };
        let shown: Vec<String> = shown.iter().map(|s| s.replace(path, "$D")).collect();
        assert_eq!(shown, expected, "{line}");
    }

    #[test]
    fn results_go_where_they_are_sent() {
        check("", &["-> image dangling-name-prefix=<none>,unpack=true None"]);
        check(
            "-t a -t b:c",
            &["-> image name=docker.io/library/a:latest,docker.io/library/b:c,unpack=true None"],
        );
        check(
            "-t a --push",
            &["-> image name=docker.io/library/a:latest,push=true,unpack=true None"],
        );
        check("--push", &["error tag is needed when pushing to registry"]);
        check(
            "-t a --optimize app",
            &[
                "-> image compression=estargz,name=docker.io/library/a:latest,optimize=app,unpack=true None",
            ],
        );
        check(
            "-o type=oci,dest=$D/x.tar,compression=zstdchunked --optimize app",
            &[r#"-> oci compression=zstdchunked,optimize=app File(Path("$D/x.tar"))"#],
        );
        check("-o $D/out --optimize app", &["error --optimize is of no use without an image"]);
        check("-t a -o $D/out", &[r#"-> local  Dir { path: "$D/out", delete: false }"#]);
        check(
            "-o type=oci,dest=$D/x.tar -t a",
            &[r#"-> oci name=docker.io/library/a:latest File(Path("$D/x.tar"))"#],
        );
        check("-o type=cacheonly", &[]);
        check(
            "-t a -o type=docker",
            &["-> image name=docker.io/library/a:latest,unpack=true None"],
        );
        check(
            "-o type=registry,name=r.example/x",
            &["-> image name=r.example/x,push=true,unpack=true None"],
        );
        check(
            "-t UPPER",
            &[
                "error invalid tag \"UPPER\": invalid reference format: repository name (library/UPPER) must be lowercase",
            ],
        );
    }

    #[test]
    fn flags_become_attributes() {
        let none = "-> image dangling-name-prefix=<none>,unpack=true None";
        check(
            "--build-arg A=1 --build-arg FROM_ENV --build-arg MISSING --label k=v=w --target t",
            &["build-arg:A=1", "build-arg:FROM_ENV=e", "label:k=v=w", "target=t", none],
        );
        check(
            "--platform linux/amd64,linux/arm64/v8 --platform linux/arm64",
            &["platform=linux/amd64,linux/arm64", none],
        );
        check("--no-cache --pull", &["image-resolve-mode=pull", "no-cache=", none]);
        check("--no-cache-filter a,b --pull=false", &["no-cache=a,b", none]);
        check("--network host", &["force-network-mode=host", none, "allow network.host"]);
        check("--network corp", &["force-network-mode=corp", none]);
        check("--network hosts", &["error network mode \"hosts\" not supported"]);
        check("--network a/b", &["error network mode \"a/b\" not supported"]);
        check(
            "--add-host a:1.2.3.4 --add-host b=::1 --add-host c:[::2]",
            &["add-hosts=a=1.2.3.4,b=::1,c=::2", none],
        );
        check(
            "--shm-size 64m --ulimit nofile=10:20 --ulimit core=0 --cgroup-parent p",
            &["cgroup-parent=p", "shm-size=67108864", "ulimit=nofile=10:20,core=0:0", none],
        );
        check(
            "--resource memory=64m,memory-swap=-1,cpuset-cpus=0-1,3,cpu-quota=5 --resource cpuset-mems=0",
            &[
                "cpuquota=5",
                "cpusetcpus=0-1,3",
                "cpusetmems=0",
                "memory=67108864",
                "memswap=-1",
                none,
            ],
        );
        check(
            "-m 64m --memory-swap -1 -c 5 --cpuset-cpus 0-1",
            &["cpusetcpus=0-1", "cpushares=5", "memory=67108864", "memswap=-1", none],
        );
        check("--isolation default --security-opt seccomp=unconfined --squash", &[none]);
        check(
            "--policy filename=a.rego",
            &["error --policy filename=a.rego: policies in Rego are not implemented"],
        );
        check("--policy filename=/no/such --policy disabled=true", &[none]);
        check("--policy nope=1", &["error --policy nope=1: unexpected key \"nope\""]);
        check("--resource memry=1", &["error --resource memry=1: unknown resource \"memry\""]);
        check("--resource memory=1,2", &["error --resource memory=1,2: invalid value \"2\""]);
        check("--ulimit nofile=20:10", &["error invalid ulimit \"nofile=20:10\""]);
        check(
            "--attest type=provenance,mode=max --sbom",
            &["attest:provenance=mode=max", "attest:sbom=", none],
        );
        check(
            "--build-arg BUILDKIT_INLINE_CACHE=1",
            &["build-arg:BUILDKIT_INLINE_CACHE=1", none, r#"cache-to inline {"mode": "min"}"#],
        );
        check("--call outline -t a", &["requestid=frontend.outline"]);
        check("--check", &["requestid=frontend.lint"]);
        check(
            "--annotation a=b --annotation index:c=d",
            &[
                "-> image annotation-index.c=d,annotation-manifest.a=b,dangling-name-prefix=<none>,unpack=true None",
            ],
        );
    }

    #[test]
    fn contexts_are_named() {
        let none = "-> image dangling-name-prefix=<none>,unpack=true None";
        check(
            "--build-context SRC=$D --build-context docker.io/library/base:latest=docker-image://alpine --build-context s=target:x",
            &[
                "context:base=docker-image://alpine",
                "context:s=target:x",
                "context:src=local:src",
                none,
                "dir src",
            ],
        );
        check(
            "--build-context a=/no/such",
            &[
                "error --build-context a=/no/such: open the directory /no/such: no such file or directory",
            ],
        );
    }
}
