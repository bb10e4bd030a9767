//! Compose files: each service that is built is a target (row `bx.bake.compose`).
//!
//! `yaml` reads, `interpolate` fills in variables, `merge` puts files over one another, `check` is
//! what the specification says of the parts that matter here; other parts of a file may say what
//! they like.

mod check;
mod interpolate;
mod merge;
mod yaml;

use std::collections::BTreeMap;

use shipway_fault::{Fault, Result};
use shipway_gocompat::{parse_bool, parse_size, path};

use self::{
    interpolate::{Failure, env_file, interpolate},
    yaml::Yaml,
};
use crate::{
    File, Host, Options,
    entry::{self, Attest, ListEntry, Secret, Ssh},
    model::{BakeConfig, Group, Target, sanitized, unique},
    source::MAX_FILE,
};

/// Files that include or extend one another, at most.
const MAX_FILES: usize = 64;

type Map = BTreeMap<String, Yaml>;

/// Looks variables up.
struct Variables<'c> {
    host: &'c dyn Host,
    options: &'c Options,
    /// Those of files, the nearest first.
    files: Vec<BTreeMap<String, String>>,
}

impl Variables<'_> {
    fn get(&self, name: &str) -> Option<String> {
        let env = || self.host.env(name).filter(|_| !self.options.no_env);
        let files = || self.files.iter().find_map(|f| f.get(name).cloned());
        // The project has a name, which nothing here depends on.
        let project = || (name == "COMPOSE_PROJECT_NAME").then(|| "bake".to_owned());
        self.options.vars.get(name).cloned().or_else(env).or_else(files).or_else(project)
    }
}

/// Reading of files, which may lead to others.
struct Loader<'c> {
    variables: Variables<'c>,
    /// Files that were read, to know when it is enough.
    read: usize,
}

fn text_of(data: &[u8], name: &str) -> Result<String> {
    if data.len() > MAX_FILE {
        return Err(Fault::invalid(format!("{name} has more than {MAX_FILE} bytes")));
    }
    String::from_utf8(data.to_vec())
        .map_err(|e| Fault::invalid(format!("{name} is not valid UTF-8: {e}")))
}

/// The targets of `files`, each over those before it.
pub(crate) fn parse(files: &[&File], host: &dyn Host, options: &Options) -> Result<BakeConfig> {
    let mut variables = Variables { host, options, files: Vec::new() };
    let read = |path: &str| host.read(path).map_err(|e| Fault::io(format!("read {path}"), e));
    if let Some(data) = read(".env")? {
        let found = env_file(&text_of(&data, ".env")?, &|name| variables.get(name))
            .map_err(|e| Fault::invalid(e).context("failed to read .env"))?;
        variables.files.push(found.into_iter().collect());
    }
    let mut loader = Loader { variables, read: 0 };
    // Each has to be one by itself.
    for file in files {
        let model = loader.model(std::slice::from_ref(file), "")?;
        check::check(&model)?;
    }
    let model = loader.model(files, "")?;
    check::check(&model)?;
    loader.config(&model)
}

fn empty() -> Fault {
    Fault::invalid("empty compose file")
}

impl Loader<'_> {
    /// The merged services and secrets of files, with paths relative to `directory`.
    fn model(&mut self, files: &[&File], directory: &str) -> Result<Map> {
        let mut model = Map::new();
        for file in files {
            let text = text_of(&file.data, &file.name)?;
            model = self.load(&file.name, &text, model, directory, &mut Vec::new())?;
        }
        defaults(&mut model);
        resolve_paths(self.variables.host, &mut model, directory);
        let model: Map =
            model.into_iter().filter(|(key, _)| key == "services" || key == "secrets").collect();
        match model.is_empty() {
            true => Err(empty()),
            false => Ok(model),
        }
    }

    fn count(&mut self) -> Result<()> {
        self.read += 1;
        match self.read > MAX_FILES {
            true => Err(Fault::invalid(format!("more than {MAX_FILES} files are read"))),
            false => Ok(()),
        }
    }

    /// What the documents of a file make of `model`.
    fn load(
        &mut self,
        name: &str,
        text: &str,
        mut model: Map,
        directory: &str,
        included: &mut Vec<String>,
    ) -> Result<Map> {
        self.count()?;
        let documents = yaml::read(text)
            .map_err(|why| Fault::invalid(format!("failed to parse {name}: yaml: {why}")))?;
        for document in documents {
            let root = match document.root {
                Yaml::Map(root) => root,
                _ => return Err(Fault::invalid("top-level object must be a mapping")),
            };
            let mut root = self.interpolated(root)?;
            self.extend(&mut root, directory)?;
            let mut under = Yaml::Map(model);
            merge::reset(&mut under, &document.resets, &[]);
            self.include(&mut root, directory, included)?;
            let merged = merge::merge(under, Yaml::Map(root), &[])?;
            let Yaml::Map(mut merged) = merge::unique(merged, &[])? else { return Err(empty()) };
            merge::canonical(&mut merged)?;
            model = merged;
        }
        Ok(model)
    }

    fn interpolated(&self, root: Map) -> Result<Map> {
        match self.fill(Yaml::Map(root), &mut Vec::new())? {
            Yaml::Map(root) => Ok(root),
            _ => Err(empty()),
        }
    }

    fn fill(&self, value: Yaml, path: &mut Vec<String>) -> Result<Yaml> {
        match value {
            Yaml::Text(text) => {
                let filled = interpolate(&text, &|name| self.variables.get(name)).map_err(|e| {
                    let path = path.join(".");
                    Fault::invalid(match e {
                        Failure::Invalid(text) => format!(
                            "invalid interpolation format for {path}.\nYou may need to escape any $ with another $.\n{text}"
                        ),
                        Failure::Required(why) => format!("error while interpolating {path}: {why}"),
                    })
                })?;
                cast(filled, path)
            }
            Yaml::List(list) => {
                path.push("[]".into());
                let each = list.into_iter().map(|v| self.fill(v, path)).collect::<Result<_>>();
                path.pop();
                Ok(Yaml::List(each?))
            }
            Yaml::Map(map) => {
                let mut filled = Map::new();
                for (key, value) in map {
                    path.push(key.clone());
                    filled.insert(key, self.fill(value, path)?);
                    path.pop();
                }
                Ok(Yaml::Map(filled))
            }
            other => Ok(other),
        }
    }

    fn read_file(&mut self, path: &str) -> Result<String> {
        let read = self.variables.host.read(path);
        let data = read.map_err(|e| Fault::io(format!("read {path}"), e))?;
        text_of(&data.ok_or_else(|| Fault::not_found(format!("open {path}: no such file")))?, path)
    }

    /// Services that extend others become those, with what they say over it.
    fn extend(&mut self, root: &mut Map, directory: &str) -> Result<()> {
        let Some(services) = root.get("services") else { return Ok(()) };
        let Yaml::Map(services) = services.clone() else {
            return Err(Fault::invalid("services must be a mapping"));
        };
        let mut done = Map::new();
        for name in services.keys() {
            let service = self.extended(name, &services, directory, &mut Vec::new())?;
            done.insert(name.clone(), service);
        }
        root.insert("services".into(), Yaml::Map(done));
        Ok(())
    }

    fn extended(
        &mut self,
        name: &str,
        services: &Map,
        directory: &str,
        seen: &mut Vec<(String, String)>,
    ) -> Result<Yaml> {
        let service = match services.get(name) {
            None | Some(Yaml::Null) => return Ok(Yaml::Null),
            Some(Yaml::Map(service)) => service,
            Some(_) => {
                return Err(Fault::invalid(format!("services.{name} must be a mapping")));
            }
        };
        let (base, file) = match service.get("extends") {
            None => return Ok(Yaml::Map(service.clone())),
            Some(Yaml::Text(base)) => (base.clone(), None),
            Some(Yaml::Map(of)) => {
                let base = of
                    .get("service")
                    .and_then(Yaml::as_str)
                    .ok_or_else(|| Fault::invalid(format!("extends.{name}.service is required")))?;
                (base.to_owned(), of.get("file").and_then(Yaml::as_str).map(str::to_owned))
            }
            Some(_) => {
                return Err(Fault::invalid(format!(
                    "services.{name}.extends must be a mapping or string"
                )));
            }
        };
        let from = file.clone().unwrap_or_default();
        if seen.len() > MAX_FILES || seen.contains(&(from.clone(), name.to_owned())) {
            return Err(Fault::invalid(format!(
                "circular reference with extends: service {name:?} extends {base:?}"
            )));
        }
        seen.push((from, name.to_owned()));
        let not_found = |place: &str| {
            Fault::invalid(format!(
                "cannot extend service {name:?}{place}: service {base:?} not found"
            ))
        };
        let extended = match file {
            None if !services.contains_key(&base) => return Err(not_found("")),
            None => self.extended(&base, services, directory, seen)?,
            Some(file) => {
                let file = path::join(directory, &file);
                let text = self.read_file(&file)?;
                self.count()?;
                let mut found = Map::new();
                for document in yaml::read(&text)
                    .map_err(|why| Fault::invalid(format!("failed to parse {file}: yaml: {why}")))?
                {
                    let Yaml::Map(root) = document.root else {
                        return Err(Fault::invalid("top-level object must be a mapping"));
                    };
                    let root = self.interpolated(root)?;
                    let merged = merge::merge(Yaml::Map(found), Yaml::Map(root), &[])?;
                    let Yaml::Map(merged) = merge::unique(merged, &[])? else {
                        return Err(empty());
                    };
                    found = merged;
                    merge::canonical(&mut found)?;
                }
                let beside = file.rfind('/').map_or("", |n| &file[..n]).to_owned();
                resolve_paths(self.variables.host, &mut found, &beside);
                match found.get("services").and_then(Yaml::as_map) {
                    Some(services) if services.contains_key(&base) => {
                        self.extended(&base, &services.clone(), "", seen)?
                    }
                    _ => return Err(not_found(&format!(" in {file}"))),
                }
            }
        };
        if extended == Yaml::Null {
            return Ok(Yaml::Map(service.clone()));
        }
        let at = ["services".to_owned(), "x".to_owned()];
        let mut merged = merge::merge(extended, Yaml::Map(service.clone()), &at)?;
        if let Yaml::Map(merged) = &mut merged {
            merged.remove("extends");
        }
        Ok(merged)
    }

    /// Adds services and secrets of the files that `include` names.
    fn include(
        &mut self,
        root: &mut Map,
        directory: &str,
        included: &mut Vec<String>,
    ) -> Result<()> {
        let entries = match root.remove("include") {
            None | Some(Yaml::Null) => return Ok(()),
            Some(Yaml::List(entries)) => entries,
            Some(other) => {
                return Err(Fault::invalid(format!(
                    "`include` must be a list, got {}",
                    other.kind()
                )));
            }
        };
        for entry in entries {
            let texts = |value: Option<&Yaml>| -> Vec<String> {
                match value {
                    Some(Yaml::Text(text)) => vec![text.clone()],
                    Some(Yaml::List(list)) => {
                        list.iter().filter_map(Yaml::as_str).map(str::to_owned).collect()
                    }
                    _ => Vec::new(),
                }
            };
            let (paths, project, env_files) = match &entry {
                Yaml::Text(path) => (vec![path.clone()], None, Vec::new()),
                Yaml::Map(of) => (
                    texts(of.get("path")),
                    of.get("project_directory").and_then(Yaml::as_str).map(str::to_owned),
                    texts(of.get("env_file")),
                ),
                other => {
                    return Err(Fault::invalid(format!("include: invalid type {}", other.kind())));
                }
            };
            let main = match paths.first() {
                Some(main) => path::join(directory, main),
                None => continue,
            };
            if included.contains(&main) {
                return Err(Fault::invalid(format!(
                    "include cycle detected:\n{}\n include {main}",
                    included.join("\n include ")
                )));
            }
            let beside = match project {
                Some(project) => path::join(directory, &project),
                None => main.rfind('/').map_or("", |n| &main[..n]).to_owned(),
            };
            let env_files: Vec<String> = match env_files.is_empty() {
                true => vec![path::join(&beside, ".env")],
                false => env_files.iter().map(|f| path::join(directory, f)).collect(),
            };
            let mut own = BTreeMap::new();
            for file in env_files {
                let data = self.variables.host.read(&file).ok().flatten();
                let Some(data) = data else { continue };
                let found = env_file(&text_of(&data, &file)?, &|name| self.variables.get(name))
                    .map_err(|e| Fault::invalid(format!("failed to read {file}: {e}")))?;
                own.extend(found);
            }
            self.variables.files.push(own);
            included.push(main);
            let mut model = Map::new();
            for file in &paths {
                let file = path::join(directory, file);
                let text = self.read_file(&file)?;
                model = self.load(&file, &text, model, &beside, included)?;
            }
            included.pop();
            self.variables.files.pop();
            defaults(&mut model);
            resolve_paths(self.variables.host, &mut model, &beside);
            for kind in ["services", "secrets"] {
                let Some(Yaml::Map(found)) = model.remove(kind) else { continue };
                let into = root.entry(kind.to_owned()).or_insert_with(|| Yaml::Map(Map::new()));
                let Yaml::Map(into) = into else { continue };
                for (name, value) in found {
                    match into.get(&name) {
                        Some(same) if *same == value => {}
                        Some(_) => {
                            return Err(Fault::invalid(format!(
                                "{kind}.{name} conflicts with imported resource"
                            )));
                        }
                        None => drop(into.insert(name, value)),
                    }
                }
            }
        }
        Ok(())
    }

    fn config(&self, model: &Map) -> Result<BakeConfig> {
        let no_map = Map::new();
        let services = model.get("services").and_then(Yaml::as_map).unwrap_or(&no_map);
        let secrets = model.get("secrets").and_then(Yaml::as_map).unwrap_or(&no_map);
        consistent(services, secrets)?;
        let mut config = BakeConfig::default();
        if services.is_empty() {
            return Ok(config);
        }
        let mut group = Group { name: "default".into(), ..Group::default() };
        for (name, service) in services {
            let Some(service) = service.as_map() else { continue };
            let environment = self.environment(service)?;
            let Some(build) = service.get("build").and_then(Yaml::as_map) else { continue };
            let name = sanitized(name);
            let image = service.get("image").and_then(Yaml::as_str);
            let target = self
                .target(&name, build, image, secrets, &environment)
                .map_err(|f| f.context(format!("service {name}")))?;
            group.targets.push(name);
            config.targets.push(target);
        }
        config.groups.push(group);
        Ok(config)
    }

    /// Variables of a service, which build arguments without a value are taken from.
    fn environment(&self, service: &Map) -> Result<BTreeMap<String, Option<String>>> {
        let mut own: BTreeMap<String, Option<String>> = BTreeMap::new();
        for (key, value) in pairs(service.get("environment"))? {
            own.insert(key.clone(), value.or_else(|| self.variables.get(&key)));
        }
        let mut all: BTreeMap<String, Option<String>> = BTreeMap::new();
        let files = match service.get("env_file") {
            Some(Yaml::List(list)) => list.as_slice(),
            _ => &[],
        };
        for file in files.iter().filter_map(Yaml::as_map) {
            let path = file.get("path").and_then(Yaml::as_str).unwrap_or_default();
            let required = !matches!(file.get("required"), Some(Yaml::Bool(false)));
            let read = self.variables.host.read(path);
            let data = match read.map_err(|e| Fault::io(format!("read {path}"), e))? {
                Some(data) => data,
                None if required => {
                    return Err(Fault::not_found(format!("env file {path} not found")));
                }
                None => continue,
            };
            let lookup =
                |name: &str| self.variables.get(name).or_else(|| own.get(name).cloned().flatten());
            let found = env_file(&text_of(&data, path)?, &lookup)
                .map_err(|e| Fault::invalid(format!("failed to read {path}: {e}")))?;
            all.extend(found.into_iter().map(|(k, v)| (k, Some(v))));
        }
        all.extend(own);
        Ok(all)
    }

    fn target(
        &self,
        name: &str,
        build: &Map,
        image: Option<&str>,
        secrets: &Map,
        environment: &BTreeMap<String, Option<String>>,
    ) -> Result<Target> {
        let text = |key: &str| {
            build.get(key).and_then(Yaml::as_str).filter(|t| !t.is_empty()).map(str::to_owned)
        };
        let texts = |key: &str| -> Option<Vec<String>> {
            match build.get(key) {
                Some(Yaml::List(list)) => {
                    Some(list.iter().filter_map(Yaml::as_str).map(str::to_owned).collect())
                }
                _ => None,
            }
        };
        let truth = |key: &str| -> Result<Option<bool>> {
            let value = match build.get(key) {
                None => return Ok(None),
                Some(Yaml::Bool(b)) => *b,
                Some(value) => {
                    let text = value.printed().unwrap_or_default();
                    truth_of(&text)
                        .ok_or_else(|| Fault::invalid(format!("{key}: invalid boolean: {text}")))?
                }
            };
            Ok(value.then_some(true))
        };
        let mut args: BTreeMap<String, Option<String>> = BTreeMap::new();
        for (key, value) in pairs(build.get("args"))? {
            let value = value
                .or_else(|| environment.get(&key).cloned().flatten())
                .or_else(|| self.variables.get(&key));
            if value.is_some() {
                args.insert(key, value);
            }
        }
        let mut ulimits = Vec::new();
        if let Some(Yaml::Map(limits)) = build.get("ulimits") {
            for (name, limit) in limits {
                let number = |key: &str, of: &Map| -> Result<i64> {
                    let found = match of.get(key) {
                        Some(Yaml::Int(n)) => Some(*n),
                        Some(Yaml::Text(text)) => text.parse().ok(),
                        _ => None,
                    };
                    found.ok_or_else(|| {
                        Fault::invalid(format!("ulimits.{name}.{key} is not a whole number"))
                    })
                };
                let (soft, hard) = match limit {
                    Yaml::Int(n) => (*n, *n),
                    Yaml::Map(of) => (number("soft", of)?, number("hard", of)?),
                    _ => continue,
                };
                ulimits.push(format!("{name}={soft}:{hard}"));
            }
        }
        let mut ssh: Vec<Ssh> = match build.get("ssh") {
            Some(Yaml::Map(keys)) => keys
                .iter()
                .map(|(id, path)| Ssh {
                    id: id.clone(),
                    paths: path.printed().into_iter().filter(|p| !p.is_empty()).collect(),
                })
                .collect(),
            _ => Vec::new(),
        };
        ssh.sort();
        let mut used = Vec::new();
        if let Some(Yaml::List(list)) = build.get("secrets") {
            for secret in list.iter().filter_map(Yaml::as_map) {
                let source = secret.get("source").and_then(Yaml::as_str).unwrap_or_default();
                let of = secrets.get(source).and_then(Yaml::as_map);
                let field = |key: &str| {
                    of.and_then(|of| of.get(key))
                        .and_then(Yaml::as_str)
                        .unwrap_or_default()
                        .to_owned()
                };
                if of.is_some_and(is_external) {
                    return Err(Fault::invalid(format!("unsupported external secret {source}")));
                }
                used.push(Secret {
                    id: source.to_owned(),
                    src: field("file"),
                    env: field("environment"),
                });
            }
        }
        let attests: Vec<String> = ["sbom", "provenance"]
            .iter()
            .filter_map(|kind| Some(Attest::shorthand(kind, &text(kind)?)))
            .collect();
        let shm_size = match build.get("shm_size") {
            Some(Yaml::Int(n)) => Some(*n),
            Some(Yaml::Text(text)) => Some(
                parse_size(text)
                    .ok_or_else(|| Fault::invalid(format!("invalid size: '{text}'")))?,
            ),
            _ => None,
        };
        let list = |texts: Option<Vec<String>>| entry::parse_all(&texts.unwrap_or_default());
        let some = |all: Vec<_>| (!all.is_empty()).then_some(all);
        let mut target = Target {
            name: name.to_owned(),
            context: text("context"),
            contexts: contexts_of(build.get("additional_contexts")),
            dockerfile: text("dockerfile"),
            dockerfile_inline: text("dockerfile_inline"),
            tags: texts("tags"),
            labels: pairs(build.get("labels"))?
                .into_iter()
                .map(|(k, v)| (k, Some(v.unwrap_or_default())))
                .collect(),
            args,
            cache_from: some(list(texts("cache_from")).map_err(Fault::invalid)?),
            cache_to: some(list(texts("cache_to")).map_err(Fault::invalid)?),
            network: text("network"),
            platforms: texts("platforms"),
            ssh: (!ssh.is_empty()).then_some(ssh),
            secrets: (!used.is_empty()).then_some(used),
            shm_size: shm_size.filter(|n| *n > 0).map(bytes_size),
            ulimits: (!ulimits.is_empty()).then_some(ulimits),
            extra_hosts: hosts(build.get("extra_hosts"))?,
            attest: {
                let attests = entry::parse_all::<Attest>(&attests).map_err(Fault::invalid)?;
                (!attests.is_empty()).then_some(attests)
            },
            no_cache: truth("no_cache")?,
            pull: truth("pull")?,
            target: text("target"),
            ..Target::default()
        };
        if let Some(extension) = build.get("x-bake") {
            extend(&mut target, extension).map_err(|f| f.context("x-bake"))?;
        }
        if target.tags.as_ref().is_none_or(Vec::is_empty)
            && let Some(image) = image.filter(|i| !i.is_empty())
        {
            target.tags = Some(vec![image.to_owned()]);
        }
        Ok(target)
    }
}

fn is_external(secret: &Map) -> bool {
    match secret.get("external") {
        Some(Yaml::Bool(b)) => *b,
        Some(Yaml::Text(text)) => parse_bool(text).unwrap_or(false),
        Some(Yaml::Map(_)) => true,
        _ => false,
    }
}

/// What YAML 1.1 takes for a truth.
fn truth_of(text: &str) -> Option<bool> {
    match text.to_lowercase().as_str() {
        "true" | "y" | "yes" | "on" => Some(true),
        "false" | "n" | "no" | "off" => Some(false),
        _ => None,
    }
}

/// Some texts have to be numbers or truths once they are filled in.
fn cast(text: String, path: &[String]) -> Result<Yaml> {
    const WHOLE: [&str; 16] = [
        "services.*.cpu_count",
        "services.*.cpu_period",
        "services.*.cpu_quota",
        "services.*.cpu_rt_period",
        "services.*.cpu_rt_runtime",
        "services.*.cpu_shares",
        "services.*.deploy.replicas",
        "services.*.healthcheck.retries",
        "services.*.oom_score_adj",
        "services.*.pids_limit",
        "services.*.ports.[].target",
        "services.*.scale",
        "services.*.ulimits.*",
        "services.*.ulimits.*.hard",
        "services.*.ulimits.*.soft",
        "services.*.deploy.restart_policy.max_attempts",
    ];
    const TRUTH: [&str; 15] = [
        "services.*.init",
        "services.*.healthcheck.disable",
        "services.*.oom_kill_disable",
        "services.*.privileged",
        "services.*.read_only",
        "services.*.stdin_open",
        "services.*.tty",
        "services.*.volumes.[].read_only",
        "services.*.volumes.[].volume.nocopy",
        "networks.*.external",
        "networks.*.internal",
        "networks.*.attachable",
        "volumes.*.external",
        "secrets.*.external",
        "configs.*.external",
    ];
    const FRACTION: [&str; 2] = ["services.*.cpu_percent", "services.*.cpus"];
    let is = |patterns: &[&str]| patterns.iter().any(|p| merge::matches(path, p));
    let failed = || {
        let path = path.join(".");
        Fault::invalid(format!(
            "error while interpolating {path}: failed to cast to expected type: {text:?}"
        ))
    };
    if is(&WHOLE) {
        return text.parse().map(Yaml::Int).map_err(|_| failed());
    }
    if is(&TRUTH) {
        return truth_of(&text).map(Yaml::Bool).ok_or_else(failed);
    }
    if is(&FRACTION) {
        return text.parse().map(Yaml::Float).map_err(|_| failed());
    }
    Ok(Yaml::Text(text))
}

/// Where nothing is said, the context is the directory of the file.
fn defaults(model: &mut Map) {
    let Some(Yaml::Map(services)) = model.get_mut("services") else { return };
    for service in services.values_mut() {
        if let Yaml::Map(service) = service
            && let Some(Yaml::Map(build)) = service.get_mut("build")
        {
            build.entry("context".into()).or_insert_with(|| Yaml::Text(".".into()));
        }
    }
}

/// Paths are relative to the directory of their file.
fn resolve_paths(host: &dyn Host, model: &mut Map, directory: &str) {
    let local = |text: &str| {
        let home = text.strip_prefix('~').and_then(|rest| Some(path::join(&host.home()?, rest)));
        let text = home.unwrap_or_else(|| text.to_owned());
        match text.starts_with('/') || text.is_empty() {
            true => text,
            false => path::join(directory, &text),
        }
    };
    let context = |value: &mut Yaml| {
        if let Yaml::Text(text) = value
            && !text.contains("://")
            && !["service:", "github.com/", "git@"].iter().any(|p| text.starts_with(p))
        {
            *text = local(text);
        }
    };
    let file = |value: &mut Yaml| {
        if let Yaml::Text(text) = value {
            *text = local(text);
        }
    };
    if let Some(Yaml::Map(services)) = model.get_mut("services") {
        for service in services.values_mut() {
            let Yaml::Map(service) = service else { continue };
            if let Some(Yaml::Map(build)) = service.get_mut("build") {
                build.get_mut("context").into_iter().for_each(context);
                if let Some(Yaml::Map(all)) = build.get_mut("additional_contexts") {
                    all.values_mut().for_each(context);
                }
                if let Some(Yaml::Map(all)) = build.get_mut("ssh") {
                    all.values_mut().for_each(file);
                }
            }
            if let Some(Yaml::List(list)) = service.get_mut("env_file") {
                for entry in list {
                    if let Yaml::Map(entry) = entry {
                        entry.get_mut("path").into_iter().for_each(file);
                    }
                }
            }
            if let Some(Yaml::Map(extends)) = service.get_mut("extends") {
                extends.get_mut("file").into_iter().for_each(file);
            }
        }
    }
    if let Some(Yaml::Map(secrets)) = model.get_mut("secrets") {
        for secret in secrets.values_mut() {
            if let Yaml::Map(secret) = secret {
                secret.get_mut("file").into_iter().for_each(file);
            }
        }
    }
}

fn consistent(services: &Map, secrets: &Map) -> Result<()> {
    for (name, service) in services {
        let no_map = Map::new();
        let service = service.as_map().unwrap_or(&no_map);
        let build = match service.get("build") {
            Some(Yaml::Map(build)) => build,
            _ if service.get("image").and_then(Yaml::as_str).unwrap_or_default().is_empty() => {
                return Err(Fault::invalid(format!(
                    "service {name:?} has neither an image nor a build context specified: invalid compose project"
                )));
            }
            _ => continue,
        };
        let has = |key: &str| build.get(key).and_then(Yaml::as_str).is_some_and(|t| !t.is_empty());
        if has("dockerfile") && has("dockerfile_inline") {
            return Err(Fault::invalid(format!(
                "service {name:?} declares mutually exclusive dockerfile and dockerfile_inline"
            )));
        }
        for (context, value) in contexts(build.get("additional_contexts")) {
            let Some(other) = value.strip_prefix("service:") else { continue };
            let is_built =
                services.get(other).map(|s| s.as_map().is_some_and(|s| s.contains_key("build")));
            match is_built {
                Some(true) => {}
                Some(false) => {
                    return Err(Fault::invalid(format!(
                        "service {name:?} declares non-buildable service {other:?} as additional contexts {context}"
                    )));
                }
                None => {
                    return Err(Fault::invalid(format!(
                        "service {name:?} declares unknown service {other:?} as additional contexts {context}"
                    )));
                }
            }
        }
        if let Some(Yaml::List(list)) = build.get("secrets") {
            for secret in list.iter().filter_map(Yaml::as_map) {
                let source = secret.get("source").and_then(Yaml::as_str).unwrap_or_default();
                if !secrets.contains_key(source) {
                    return Err(Fault::invalid(format!(
                        "service {name:?} refers to undefined build secret {source}: invalid compose project"
                    )));
                }
            }
        }
    }
    for (name, secret) in secrets {
        let Some(secret) = secret.as_map() else { continue };
        let has = |key: &str| secret.get(key).and_then(Yaml::as_str).is_some_and(|t| !t.is_empty());
        if !is_external(secret) && !has("file") && !has("environment") {
            return Err(Fault::invalid(format!(
                "secret {name:?} must declare either `file` or `environment`: invalid compose project"
            )));
        }
    }
    Ok(())
}

/// Keys and values of a map, or of a list of `key=value`.
fn pairs(value: Option<&Yaml>) -> Result<Vec<(String, Option<String>)>> {
    match value {
        Some(Yaml::Map(map)) => Ok(map.iter().map(|(k, v)| (k.clone(), v.printed())).collect()),
        Some(Yaml::List(list)) => {
            let each = list.iter().map(|entry| {
                let text = entry.printed().unwrap_or_default();
                let (key, value) = match text.split_once('=') {
                    Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                    None => (text, None),
                };
                match key.ends_with(char::is_whitespace) {
                    true => Err(Fault::invalid(format!(
                        "environment variable {key} is declared with a trailing space"
                    ))),
                    false => Ok((key, value)),
                }
            });
            each.collect()
        }
        _ => Ok(Vec::new()),
    }
}

fn contexts(value: Option<&Yaml>) -> Vec<(String, String)> {
    match value {
        Some(Yaml::Map(map)) => {
            map.iter().map(|(k, v)| (k.clone(), v.printed().unwrap_or_default())).collect()
        }
        _ => Vec::new(),
    }
}

/// Services are targets.
fn named_context(value: &str) -> String {
    match value.strip_prefix("service:").or_else(|| value.strip_prefix("target:")) {
        Some(name) => format!("target:{}", sanitized(name)),
        None => value.to_owned(),
    }
}

fn contexts_of(value: Option<&Yaml>) -> BTreeMap<String, String> {
    contexts(value).into_iter().map(|(k, v)| (k, named_context(&v))).collect()
}

/// Addresses of hosts, several of which are joined by commas.
fn hosts(value: Option<&Yaml>) -> Result<BTreeMap<String, Option<String>>> {
    let mut found: BTreeMap<String, Vec<String>> = BTreeMap::new();
    match value {
        Some(Yaml::Map(map)) => {
            for (host, value) in map {
                let addresses = match value {
                    Yaml::List(list) => list.iter().filter_map(Yaml::printed).collect(),
                    other => vec![other.printed().unwrap_or_default()],
                };
                found.insert(host.clone(), addresses);
            }
        }
        Some(Yaml::List(list)) => {
            for entry in list {
                let text = entry.printed().unwrap_or_default();
                let (host, address) =
                    text.split_once('=').or_else(|| text.split_once(':')).ok_or_else(|| {
                        Fault::invalid(format!("invalid additional host, missing IP: {text}"))
                    })?;
                let addresses = address.split(',').map(str::to_owned);
                found.entry(host.to_owned()).or_default().extend(addresses);
            }
        }
        _ => {}
    }
    let bare = |ip: String| match ip.strip_prefix('[').and_then(|ip| ip.strip_suffix(']')) {
        Some(inner) if !inner.is_empty() => inner.to_owned(),
        _ => ip,
    };
    let each = found.into_iter().map(|(host, addresses)| {
        if host.is_empty() || host.contains([':', '=']) {
            return Err(Fault::invalid(format!("bad host name '{host}'")));
        }
        let addresses: Vec<String> = addresses.into_iter().map(bare).collect();
        Ok((host, Some(addresses.join(","))))
    });
    each.collect()
}

/// A number of bytes with its unit, four digits at most: Go's `units.BytesSize`.
fn bytes_size(bytes: i64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = if value >= 1000.0 {
        0
    } else if value >= 100.0 {
        1
    } else if value >= 10.0 {
        2
    } else {
        3
    };
    let shown = format!("{value:.digits$}");
    let shown = match shown.contains('.') {
        true => shown.trim_end_matches('0').trim_end_matches('.'),
        false => &shown,
    };
    format!("{shown}{}", UNITS[unit])
}

/// What `x-bake` adds to a target.
fn extend(target: &mut Target, extension: &Yaml) -> Result<()> {
    let map = match extension {
        Yaml::Null => return Ok(()),
        Yaml::Map(map) => map,
        other => {
            return Err(Fault::invalid(format!(
                "cannot unmarshal {} into a mapping",
                other.kind()
            )));
        }
    };
    // A text is a list of its words.
    let texts = |key: &str| -> Result<Vec<String>> {
        match map.get(key) {
            None | Some(Yaml::Null) => Ok(Vec::new()),
            Some(Yaml::List(list)) => list
                .iter()
                .map(|v| {
                    let wrong = || {
                        Fault::invalid(format!(
                            "{key}: cannot unmarshal {} into a string",
                            v.kind()
                        ))
                    };
                    v.printed().ok_or_else(wrong)
                })
                .collect(),
            Some(value @ Yaml::Map(_)) => Err(Fault::invalid(format!(
                "{key}: cannot unmarshal {} into a string",
                value.kind()
            ))),
            Some(other) => {
                let text = other.printed().unwrap_or_default();
                Ok(text.split_whitespace().map(str::to_owned).collect())
            }
        }
    };
    let truth = |key: &str| match map.get(key) {
        None | Some(Yaml::Null) => Ok(None),
        Some(Yaml::Bool(b)) => Ok(Some(*b)),
        Some(other) => {
            other.printed().and_then(|text| truth_of(&text)).map(Some).ok_or_else(|| {
                Fault::invalid(format!("{key}: cannot unmarshal {} into a boolean", other.kind()))
            })
        }
    };
    fn entries<E: ListEntry>(list: &mut Option<Vec<E>>, texts: &[String]) -> Result<()> {
        if !texts.is_empty() {
            let more = entry::parse_all(texts).map_err(Fault::invalid)?;
            *list = Some(entry::merged(list.take().unwrap_or_default(), &more));
        }
        Ok(())
    }
    fn add(list: &mut Option<Vec<String>>, more: Vec<String>) {
        if !more.is_empty() {
            let all: Vec<String> =
                list.take().unwrap_or_default().into_iter().chain(more).collect();
            *list = Some(unique(&all));
        }
    }
    add(&mut target.tags, texts("tags")?);
    entries(&mut target.cache_from, &texts("cache-from")?)?;
    entries(&mut target.cache_to, &texts("cache-to")?)?;
    entries(&mut target.secrets, &texts("secret")?)?;
    entries(&mut target.ssh, &texts("ssh")?)?;
    if let Some(ssh) = &mut target.ssh {
        ssh.sort();
    }
    add(&mut target.platforms, texts("platforms")?);
    entries(&mut target.outputs, &texts("output")?)?;
    target.pull = truth("pull")?.or(target.pull);
    target.no_cache = truth("no-cache")?.or(target.no_cache);
    add(&mut target.no_cache_filter, texts("no-cache-filter")?);
    for (name, value) in contexts_of(map.get("contexts")) {
        target.contexts.entry(name).or_insert(value);
    }
    Ok(())
}
