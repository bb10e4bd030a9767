//! Targets and groups, and how they are merged, inherited and overridden.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap, HashSet},
    rc::Rc,
};

use serde::{Serialize, Serializer};
use shipway_fault::{Fault, Result};
use shipway_gocompat::{Glob, has_wildcards, parse_bool};

use crate::{
    Host,
    entitlements::Granted,
    entry::{self, Attest, Cache, ListEntry, Output, Secret, Ssh},
};

/// Targets that inherit from one another, or are contexts of one another, in a row, at most.
const MAX_CHAIN: usize = 100;

/// A group of targets.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Group {
    /// Its name.
    #[serde(skip)]
    pub name: String,
    /// What it is for.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// Its targets and groups; none are shown as null, as others do.
    #[serde(serialize_with = "null_if_empty")]
    pub targets: Vec<String>,
}

fn null_if_empty<S: Serializer>(
    list: &[String],
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    if list.is_empty() { serializer.serialize_none() } else { list.serialize(serializer) }
}

/// Something to build. What is `None` or empty was not set; an empty list that is set overrides.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Target {
    /// Its name.
    pub name: String,
    /// What it is for.
    pub description: String,
    /// Targets that it begins with.
    pub inherits: Vec<String>,
    /// Annotations, as `--annotation` has them.
    pub annotations: Option<Vec<String>>,
    /// Attestations.
    pub attest: Option<Vec<Attest>>,
    /// Directory or address of the context.
    pub context: Option<String>,
    /// Further contexts, by name.
    pub contexts: BTreeMap<String, String>,
    /// The Dockerfile.
    pub dockerfile: Option<String>,
    /// The text of the Dockerfile.
    pub dockerfile_inline: Option<String>,
    /// Build arguments.
    pub args: BTreeMap<String, Option<String>>,
    /// Labels.
    pub labels: BTreeMap<String, Option<String>>,
    /// Names of the image.
    pub tags: Option<Vec<String>>,
    /// Caches to read.
    pub cache_from: Option<Vec<Cache>>,
    /// Caches to write.
    pub cache_to: Option<Vec<Cache>>,
    /// The stage.
    pub target: Option<String>,
    /// Secrets.
    pub secrets: Option<Vec<Secret>>,
    /// Agents and keys.
    pub ssh: Option<Vec<Ssh>>,
    /// Platforms.
    pub platforms: Option<Vec<String>>,
    /// What becomes of the result.
    pub outputs: Option<Vec<Output>>,
    /// Whether registries are asked for newer images.
    pub pull: Option<bool>,
    /// Whether the cache is not used.
    pub no_cache: Option<bool>,
    /// The network of steps.
    pub network: Option<String>,
    /// Stages that do not use the cache.
    pub no_cache_filter: Option<Vec<String>>,
    /// Size of /dev/shm in steps.
    pub shm_size: Option<String>,
    /// Limits of steps.
    pub ulimits: Option<Vec<String>>,
    /// Limits of steps by control groups, by name.
    pub resources: BTreeMap<String, String>,
    /// What is asked of the frontend in place of building.
    pub call: Option<String>,
    /// Privileges.
    pub entitlements: Option<Vec<String>>,
    /// Entries of /etc/hosts in steps.
    pub extra_hosts: BTreeMap<String, Option<String>>,
    /// It is only built because others use it.
    pub linked: bool,
}

fn extend<T: Clone>(list: &mut Option<Vec<T>>, more: &Option<Vec<T>>) {
    if let Some(more) = more {
        list.get_or_insert_default().extend_from_slice(more);
    }
}

fn replace<T: Clone>(value: &mut Option<T>, with: &Option<T>) {
    if with.is_some() {
        value.clone_from(with);
    }
}

/// Entries of one list are followed by those of another, each once.
fn join<E: ListEntry>(list: &mut Option<Vec<E>>, more: &Option<Vec<E>>) {
    if let Some(more) = more {
        let all = entry::merged(list.take().unwrap_or_default(), more);
        *list = (!all.is_empty()).then_some(all);
    }
}

/// Sets what has a value: null is none.
fn set(map: &mut BTreeMap<String, Option<String>>, more: &BTreeMap<String, Option<String>>) {
    let present = more.iter().filter(|(_, v)| v.is_some());
    map.extend(present.map(|(k, v)| (k.clone(), v.clone())));
}

/// Without empty ones and doubles.
fn normal(list: &mut Option<Vec<String>>) {
    if let Some(list) = list {
        let mut seen = HashSet::new();
        list.retain(|s| !s.is_empty() && seen.insert(s.clone()));
    }
}

impl Target {
    /// What `other` sets is added to what is there or takes its place.
    pub(crate) fn merge(&mut self, other: &Self) {
        replace(&mut self.context, &other.context);
        replace(&mut self.dockerfile, &other.dockerfile);
        replace(&mut self.dockerfile_inline, &other.dockerfile_inline);
        set(&mut self.args, &other.args);
        self.contexts.extend(other.contexts.iter().map(|(k, v)| (k.clone(), v.clone())));
        set(&mut self.labels, &other.labels);
        replace(&mut self.tags, &other.tags);
        replace(&mut self.target, &other.target);
        replace(&mut self.call, &other.call);
        extend(&mut self.annotations, &other.annotations);
        join(&mut self.attest, &other.attest);
        join(&mut self.secrets, &other.secrets);
        join(&mut self.ssh, &other.ssh);
        replace(&mut self.platforms, &other.platforms);
        join(&mut self.cache_from, &other.cache_from);
        replace(&mut self.cache_to, &other.cache_to);
        replace(&mut self.outputs, &other.outputs);
        replace(&mut self.pull, &other.pull);
        replace(&mut self.no_cache, &other.no_cache);
        replace(&mut self.network, &other.network);
        extend(&mut self.no_cache_filter, &other.no_cache_filter);
        replace(&mut self.shm_size, &other.shm_size);
        extend(&mut self.ulimits, &other.ulimits);
        self.resources.extend(other.resources.iter().map(|(k, v)| (k.clone(), v.clone())));
        if !other.description.is_empty() {
            self.description.clone_from(&other.description);
        }
        extend(&mut self.entitlements, &other.entitlements);
        set(&mut self.extra_hosts, &other.extra_hosts);
        self.inherits.extend_from_slice(&other.inherits);
    }

    fn normalize(&mut self) {
        fn unique<E: ListEntry>(list: &mut Option<Vec<E>>) {
            *list = list.take().map(E::unique).filter(|all| !all.is_empty());
        }
        normal(&mut self.annotations);
        unique(&mut self.attest);
        normal(&mut self.tags);
        unique(&mut self.secrets);
        unique(&mut self.ssh);
        normal(&mut self.platforms);
        unique(&mut self.cache_from);
        unique(&mut self.cache_to);
        unique(&mut self.outputs);
        normal(&mut self.no_cache_filter);
        normal(&mut self.ulimits);
        if self.network.as_deref() == Some("host") {
            self.entitlements.get_or_insert_default().push("network.host".into());
        }
        normal(&mut self.entitlements);
        self.contexts.retain(|_, v| !v.is_empty());
    }

    fn set_push(&mut self, push: bool) {
        let outputs = self.outputs.get_or_insert_default();
        if !push {
            // The last one fills the gap, as in other programs.
            let mut n = 0;
            while n < outputs.len() {
                if outputs[n].kind == "registry" {
                    outputs.swap_remove(n);
                    continue;
                }
                if outputs[n].kind == "image" {
                    outputs[n].attrs.insert("push".into(), "false".into());
                }
                n += 1;
            }
            return;
        }
        for image in outputs.iter_mut().filter(|o| o.kind == "image") {
            image.attrs.insert("push".into(), "true".into());
        }
        if outputs.iter().all(|o| o.kind == "docker") {
            let mut image = Output::of_kind("image");
            image.attrs.insert("push".into(), "true".into());
            outputs.push(image);
        }
    }

    fn set_load(&mut self, load: bool) {
        let outputs = self.outputs.get_or_insert_default();
        let enough = outputs.iter().any(|o| match o.kind.as_str() {
            "docker" => o.dest.is_empty(),
            "image" | "registry" | "oci" => false,
            _ => true,
        });
        if load && !enough {
            outputs.push(Output::of_kind("docker"));
        }
    }

    fn apply(&mut self, overrides: &Overrides, granted: &mut Granted) -> Result<()> {
        // What becomes of the outputs is known once these are.
        let is_late = |key: &str| matches!(key, "load" | "push");
        let early = overrides.iter().filter(|(key, _)| !is_late(key));
        let late = overrides.iter().filter(|(key, _)| is_late(key));
        for (key, given) in early.chain(late) {
            let (name, rest) = match key.split_once('.') {
                Some((name, rest)) => (name, Some(rest)),
                None => (key.as_str(), None),
            };
            let value = || given.value.clone();
            let named = |form: &str| {
                let rest = rest.map(str::to_owned);
                rest.ok_or_else(|| {
                    Fault::invalid(format!("invalid format for {name}, expecting {form}"))
                })
            };
            let truth = || {
                parse_bool(&given.value).ok_or_else(|| {
                    Fault::invalid(format!("invalid value {} for boolean key {name}", given.value))
                })
            };
            match name {
                "context" => self.context = Some(value()),
                "dockerfile" => self.dockerfile = Some(value()),
                "args" => _ = self.args.insert(named("args.<name>=<value>")?, Some(value())),
                "contexts" => {
                    _ = self.contexts.insert(named("contexts.<name>=<value>")?, value());
                }
                "labels" => _ = self.labels.insert(named("labels.<name>=<value>")?, Some(value())),
                "tags" => given.texts(&mut self.tags),
                "cache-from" => {
                    given.entries(&mut self.cache_from)?;
                    for cache in self.cache_from.iter().flatten().filter(|c| c.kind == "local") {
                        granted.read.extend(cache.attrs.get("src").cloned());
                    }
                }
                "cache-to" => {
                    given.entries(&mut self.cache_to)?;
                    for cache in self.cache_to.iter().flatten().filter(|c| c.kind == "local") {
                        granted.write.extend(cache.attrs.get("dest").cloned());
                    }
                }
                "target" => self.target = Some(value()),
                "call" => self.call = Some(value()),
                "secrets" => {
                    given.entries(&mut self.secrets)?;
                    let files = self.secrets.iter().flatten().map(|s| s.src.clone());
                    granted.read.extend(files.filter(|f| !f.is_empty()));
                }
                "ssh" => {
                    given.entries(&mut self.ssh)?;
                    granted.read.extend(self.ssh.iter().flatten().flat_map(|s| s.paths.clone()));
                }
                "platform" => given.texts(&mut self.platforms),
                "output" => {
                    given.entries(&mut self.outputs)?;
                    let files = self.outputs.iter().flatten().map(|o| o.dest.clone());
                    granted.write.extend(files.filter(|f| !f.is_empty()));
                }
                "entitlements" => {
                    extend(&mut self.entitlements, &Some(given.values.clone()));
                    granted.network_host |= given.values.iter().any(|v| v == "network.host");
                    granted.security_insecure |=
                        given.values.iter().any(|v| v == "security.insecure");
                }
                "annotations" => extend(&mut self.annotations, &Some(given.values.clone())),
                "attest" => {
                    let more = entry::parse_all(&given.values).map_err(Fault::invalid)?;
                    join(&mut self.attest, &Some(more));
                }
                "no-cache" => self.no_cache = Some(truth()?),
                "no-cache-filter" => given.texts(&mut self.no_cache_filter),
                "shm-size" => self.shm_size = Some(value()),
                "ulimits" => given.texts(&mut self.ulimits),
                "network" => self.network = Some(value()),
                "pull" => self.pull = Some(truth()?),
                "push" => self.set_push(truth()?),
                "load" => self.set_load(truth()?),
                "extra-hosts" => {
                    let name = named("extra-hosts.<hostname>=<ip>")?;
                    self.extra_hosts.insert(name, Some(value()));
                }
                "resources" => {
                    let name = named("resources.<name>=<value>")?;
                    self.resources.insert(name, value());
                }
                other => {
                    let fault = Fault::invalid(format!("unknown key: {other}"));
                    return Err(match shipway_fault::nearest(other, KEYS) {
                        Some(near) => fault.hint(format!("did you mean {near}?")),
                        None => fault,
                    });
                }
            }
        }
        Ok(())
    }
}

/// What `--set` can set.
const KEYS: [&str; 27] = [
    "annotations",
    "args",
    "attest",
    "cache-from",
    "cache-to",
    "call",
    "context",
    "contexts",
    "dockerfile",
    "entitlements",
    "extra-hosts",
    "labels",
    "load",
    "network",
    "no-cache",
    "no-cache-filter",
    "output",
    "platform",
    "pull",
    "push",
    "resources",
    "secrets",
    "shm-size",
    "ssh",
    "tags",
    "target",
    "ulimits",
];

/// A value of `--set`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Override {
    value: String,
    values: Vec<String>,
    append: bool,
}

impl Override {
    fn texts(&self, list: &mut Option<Vec<String>>) {
        match self.append {
            true => extend(list, &Some(self.values.clone())),
            false => *list = Some(self.values.clone()),
        }
    }

    fn entries<E: ListEntry>(&self, list: &mut Option<Vec<E>>) -> Result<()> {
        let entries = entry::parse_all(&self.values).map_err(Fault::invalid)?;
        match self.append {
            true => join(list, &Some(entries)),
            false => *list = Some(entries),
        }
        Ok(())
    }
}

/// Values of `--set` for one target, by key.
type Overrides = BTreeMap<String, Override>;

/// All targets and groups of a definition, before they inherit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BakeConfig {
    /// Groups.
    pub groups: Vec<Group>,
    /// Targets.
    pub targets: Vec<Target>,
}

/// Targets to build, with all that they inherit, and the groups that name them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// Groups, by name.
    #[serde(rename = "group", skip_serializing_if = "BTreeMap::is_empty")]
    pub groups: BTreeMap<String, Group>,
    /// Targets, by name.
    #[serde(rename = "target")]
    pub targets: BTreeMap<String, Target>,
}

pub(crate) fn unique(names: &[String]) -> Vec<String> {
    let mut seen = HashSet::new();
    names.iter().filter(|n| seen.insert(n.as_str())).cloned().collect()
}

/// The name that a service has as a target.
pub(crate) fn sanitized(name: &str) -> String {
    name.replace('.', "_")
}

impl BakeConfig {
    /// Merges targets of one name, and drops doubles within groups.
    pub(crate) fn deduplicated(self) -> Self {
        let mut targets: Vec<Target> = Vec::new();
        let mut places: BTreeMap<String, usize> = BTreeMap::new();
        for target in self.targets {
            match places.get(&target.name) {
                Some(n) => targets[*n].merge(&target),
                None => {
                    places.insert(target.name.clone(), targets.len());
                    targets.push(target);
                }
            }
        }
        let group = |g: Group| Group { targets: unique(&g.targets), ..g };
        Self { groups: self.groups.into_iter().map(group).collect(), targets }
    }

    /// The targets that `names` name, with what `sets` changes, and those that they use.
    pub fn plan(
        &self,
        host: &dyn Host,
        names: &[String],
        sets: &[String],
        granted: &mut Granted,
    ) -> Result<Plan> {
        let mut wanted = Vec::new();
        for name in names {
            wanted.extend(self.matching(&sanitized(name))?);
        }
        let wanted = unique(&wanted);
        let mut resolving = Resolving {
            config: self,
            targets: self.targets.iter().rev().map(|t| (t.name.as_str(), t)).collect(),
            overrides: self.overrides(host, sets)?,
            granted,
        };
        let mut plan = Plan::default();
        for name in &wanted {
            let (mut targets, mut groups) = (Vec::new(), Vec::new());
            self.members(name, &mut targets, &mut groups);
            for name in unique(&targets) {
                let target = resolving.target(&name)?;
                plan.targets.insert(name, target);
            }
            for name in groups {
                if let Some(group) = self.groups.iter().find(|g| g.name == name) {
                    plan.groups.entry(name).or_insert_with(|| group.clone());
                }
            }
        }
        for name in &wanted {
            if name == "default" && plan.groups.contains_key("default") {
                continue;
            }
            let group = || Group { name: "default".into(), ..Group::default() };
            plan.groups.entry("default".into()).or_insert_with(group).targets.push(name.clone());
        }
        if let Some(group) = plan.groups.get_mut("default") {
            group.targets = unique(&group.targets);
            group.targets.sort_unstable();
        }
        let roots: Vec<String> = plan.targets.keys().cloned().collect();
        let mut done = HashSet::new();
        for name in &roots {
            resolving.link(name, &mut plan, &mut Vec::new(), &mut done)?;
        }
        Ok(plan)
    }

    /// The groups and targets that `pattern` matches; a name without wildcards is that name.
    fn matching(&self, pattern: &str) -> Result<Vec<String>> {
        if !pattern.contains(['*', '?', '[', ']']) {
            return Ok(vec![pattern.to_owned()]);
        }
        let names = self.groups.iter().map(|g| &g.name).chain(self.targets.iter().map(|t| &t.name));
        let found: Vec<String> = match Glob::new(pattern) {
            Ok(glob) => names.filter(|n| glob.matches(n)).cloned().collect(),
            Err(_) => Vec::new(),
        };
        match found.is_empty() {
            true => Err(Fault::invalid(format!("could not find any target matching {pattern:?}"))),
            false => Ok(found),
        }
    }

    /// The targets that `--set` means by `pattern`.
    fn expand(&self, pattern: &str) -> Result<Vec<String>> {
        if self.targets.iter().any(|t| t.name == pattern) {
            return Ok(vec![pattern.to_owned()]);
        }
        let glob = Glob::new(pattern).map_err(|_| {
            Fault::invalid(format!(
                "could not match targets with '{pattern}': syntax error in pattern"
            ))
        })?;
        let names = self.targets.iter().map(|t| t.name.as_str());
        let found: Vec<String> =
            names.clone().filter(|n| glob.matches(n)).map(str::to_owned).collect();
        if !found.is_empty() {
            return Ok(found);
        }
        let fault = Fault::invalid(format!("could not find any target matching '{pattern}'"));
        Err(match shipway_fault::nearest(pattern, names).filter(|_| !has_wildcards(pattern)) {
            Some(near) => fault.hint(format!("did you mean {near}?")),
            None => fault,
        })
    }

    fn overrides(&self, host: &dyn Host, sets: &[String]) -> Result<BTreeMap<String, Overrides>> {
        let mut all: BTreeMap<String, Overrides> = BTreeMap::new();
        for set in sets {
            let (left, value) = match set.split_once('=') {
                Some((left, value)) => (left, Some(value)),
                None => (set.as_str(), None),
            };
            let (key, append) = match left.strip_suffix('+') {
                Some(key) => (key, true),
                None => (left, false),
            };
            let parts: Vec<&str> = key.splitn(3, '.').collect();
            let [pattern, name, ..] = parts[..] else {
                return Err(Fault::invalid(format!(
                    "invalid override key {key}, expected target.name"
                )));
            };
            if value.is_none() && name != "args" {
                return Err(Fault::invalid(format!(
                    "invalid override {set}, expected target.name=value"
                )));
            }
            let needs_name = matches!(name, "args" | "contexts" | "resources");
            for target in self.expand(pattern)? {
                let own = all.entry(target).or_default();
                if needs_name && parts.len() != 3 {
                    return Err(Fault::invalid(format!(
                        "invalid key {left}, {name} requires name"
                    )));
                }
                let value = match value {
                    Some(value) => value.to_owned(),
                    // What the environment does not have leaves all as it is.
                    None => match host.env(parts[2]) {
                        Some(value) => value,
                        None => continue,
                    },
                };
                let given = own.entry(parts[1..].join(".")).or_default();
                match name {
                    "output" | "cache-to" | "cache-from" | "tags" | "platform" | "secrets"
                    | "ssh" | "attest" | "entitlements" | "annotations" | "no-cache-filter"
                    | "ulimits" => {
                        given.append = append;
                        given.values.push(value);
                    }
                    _ => given.value = value,
                }
            }
        }
        Ok(all)
    }

    /// The targets of `name`, which may be a group of groups, and the groups on the way.
    fn members(&self, name: &str, targets: &mut Vec<String>, groups: &mut Vec<String>) {
        let Some(group) = self.groups.iter().find(|g| g.name == name) else {
            targets.push(name.to_owned());
            return;
        };
        if groups.iter().any(|g| g == name) {
            return;
        }
        groups.push(name.to_owned());
        for member in &group.targets {
            self.members(member, targets, groups);
        }
    }
}

/// Targets as they inherit from one another.
struct Resolving<'c> {
    config: &'c BakeConfig,
    /// Its targets by their names.
    targets: HashMap<&'c str, &'c Target>,
    overrides: BTreeMap<String, Overrides>,
    granted: &'c mut Granted,
}

/// Targets with what they inherit, and `None` for those that are being made.
type Visited = BTreeMap<String, Option<Rc<Target>>>;

impl Resolving<'_> {
    /// `name` with what it inherits, and with defaults.
    fn target(&mut self, name: &str) -> Result<Target> {
        let found = self.inherited(name, &mut Visited::new(), 0)?;
        let mut target = found.map(Rc::unwrap_or_clone).unwrap_or_default();
        name.clone_into(&mut target.name);
        target.inherits.clear();
        target.context.get_or_insert_with(|| ".".into());
        if target.dockerfile.as_deref().unwrap_or_default().is_empty() {
            target.dockerfile = Some("Dockerfile".into());
        }
        Ok(target)
    }

    /// `name` with what it inherits; `None` for one that inherits from itself.
    fn inherited(
        &mut self,
        name: &str,
        visited: &mut Visited,
        depth: usize,
    ) -> Result<Option<Rc<Target>>> {
        if let Some(known) = visited.get(name) {
            return Ok(known.clone());
        }
        if depth > MAX_CHAIN {
            return Err(Fault::invalid(format!(
                "targets inherit from one another more than {MAX_CHAIN} levels deep"
            )));
        }
        visited.insert(name.to_owned(), None);
        let Some(own) = self.targets.get(name).copied() else {
            let fault = Fault::invalid(format!("failed to find target {name}"));
            let names = self.config.targets.iter().map(|t| t.name.as_str());
            return Err(match shipway_fault::nearest(name, names) {
                Some(near) => fault.hint(format!("did you mean {near}?")),
                None => fault,
            });
        };
        let mut target = Target::default();
        for parent in &own.inherits {
            if let Some(parent) = self.inherited(parent, visited, depth + 1)? {
                target.merge(&parent);
            }
        }
        target.merge(own);
        if let Some(overrides) = self.overrides.get(name) {
            target
                .apply(overrides, self.granted)
                .map_err(|fault| fault.context(format!("--set for target {name}")))?;
        }
        target.normalize();
        let target = Rc::new(target);
        // Nobody asks for the first one again.
        if depth > 0 {
            visited.insert(name.to_owned(), Some(target.clone()));
        }
        Ok(Some(target))
    }

    /// Adds the targets that `name` has as contexts, and theirs.
    fn link(
        &mut self,
        name: &str,
        plan: &mut Plan,
        visited: &mut Vec<String>,
        done: &mut HashSet<String>,
    ) -> Result<()> {
        if visited.len() > MAX_CHAIN {
            return Err(Fault::invalid(format!(
                "targets are contexts of one another more than {MAX_CHAIN} levels deep"
            )));
        }
        visited.push(name.to_owned());
        let contexts = plan.targets.get(name).map(|t| t.contexts.clone()).unwrap_or_default();
        for other in contexts.values().filter_map(|c| c.strip_prefix("target:")) {
            if other == name {
                return Err(Fault::invalid(format!("target {other} cannot link to itself")));
            }
            if visited.iter().any(|v| v == other) {
                return Err(Fault::invalid(format!("infinite loop from {name} to {other}")));
            }
            if !plan.targets.contains_key(other) {
                let mut target = self.target(other)?;
                target.outputs = Some(vec![Output::of_kind("cacheonly")]);
                target.linked = true;
                plan.targets.insert(other.to_owned(), target);
            }
            if !done.contains(other) {
                self.link(other, plan, visited, done)?;
                visited.retain(|v| v != other);
            }
            let used = plan.targets.get(other);
            let entitlements = used.and_then(|t| t.entitlements.clone()).unwrap_or_default();
            let theirs = used.and_then(|t| t.platforms.clone()).unwrap_or_default();
            let Some(target) = plan.targets.get_mut(name) else { continue };
            for entitlement in entitlements {
                let own = target.entitlements.get_or_insert_default();
                if !own.contains(&entitlement) {
                    own.push(entitlement);
                }
            }
            let own = target.platforms.as_deref().unwrap_or_default();
            if own.len() > 1 && theirs.len() > 1 && !own.iter().all(|p| theirs.contains(p)) {
                return Err(Fault::invalid(format!(
                    "target {other} can't be used by {name} because its platforms [{}] are not a subset of [{}]",
                    own.join(" "),
                    theirs.join(" ")
                )));
            }
        }
        visited.pop();
        done.insert(name.to_owned());
        Ok(())
    }
}

/// Text as it would stand in a definition.
fn escaped(text: &str) -> Cow<'_, str> {
    match text.contains("${") || text.contains("%{") {
        true => text.replace("${", "$${").replace("%{", "%%{").into(),
        false => text.into(),
    }
}

/// Texts by name, as they would stand in a definition.
struct Texts<'t>(&'t BTreeMap<String, Option<String>>);

impl Texts<'_> {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Serialize for Texts<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(k, v)| (k, v.as_deref().map(escaped))))
    }
}

/// In the order and with the names of definitions, so that what is printed is one.
impl Serialize for Target {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        #[serde(rename_all = "kebab-case")]
        struct Shown<'t> {
            #[serde(skip_serializing_if = "str::is_empty")]
            description: &'t str,
            #[serde(skip_serializing_if = "<[_]>::is_empty")]
            inherits: &'t [String],
            #[serde(skip_serializing_if = "Vec::is_empty")]
            annotations: Vec<Cow<'t, str>>,
            #[serde(skip_serializing_if = "<[_]>::is_empty")]
            attest: &'t [Attest],
            #[serde(skip_serializing_if = "Option::is_none")]
            context: &'t Option<String>,
            #[serde(skip_serializing_if = "BTreeMap::is_empty")]
            contexts: &'t BTreeMap<String, String>,
            #[serde(skip_serializing_if = "Option::is_none")]
            dockerfile: &'t Option<String>,
            #[serde(skip_serializing_if = "Option::is_none")]
            dockerfile_inline: Option<Cow<'t, str>>,
            #[serde(skip_serializing_if = "Texts::is_empty")]
            args: Texts<'t>,
            #[serde(skip_serializing_if = "Texts::is_empty")]
            labels: Texts<'t>,
            #[serde(skip_serializing_if = "<[_]>::is_empty")]
            tags: &'t [String],
            #[serde(skip_serializing_if = "<[_]>::is_empty")]
            cache_from: &'t [Cache],
            #[serde(skip_serializing_if = "<[_]>::is_empty")]
            cache_to: &'t [Cache],
            #[serde(skip_serializing_if = "Option::is_none")]
            target: &'t Option<String>,
            #[serde(skip_serializing_if = "<[_]>::is_empty")]
            secret: &'t [Secret],
            #[serde(skip_serializing_if = "<[_]>::is_empty")]
            ssh: &'t [Ssh],
            #[serde(skip_serializing_if = "<[_]>::is_empty")]
            platforms: &'t [String],
            #[serde(skip_serializing_if = "<[_]>::is_empty")]
            output: &'t [Output],
            #[serde(skip_serializing_if = "Option::is_none")]
            pull: Option<bool>,
            #[serde(skip_serializing_if = "Option::is_none")]
            no_cache: Option<bool>,
            #[serde(skip_serializing_if = "Option::is_none")]
            network: &'t Option<String>,
            #[serde(skip_serializing_if = "<[_]>::is_empty")]
            no_cache_filter: &'t [String],
            #[serde(skip_serializing_if = "Option::is_none")]
            shm_size: &'t Option<String>,
            #[serde(skip_serializing_if = "<[_]>::is_empty")]
            ulimits: &'t [String],
            #[serde(skip_serializing_if = "BTreeMap::is_empty")]
            resources: &'t BTreeMap<String, String>,
            #[serde(skip_serializing_if = "Option::is_none")]
            call: &'t Option<String>,
            #[serde(skip_serializing_if = "<[_]>::is_empty")]
            entitlements: &'t [String],
            #[serde(skip_serializing_if = "Texts::is_empty")]
            extra_hosts: Texts<'t>,
        }
        fn list<T>(list: &Option<Vec<T>>) -> &[T] {
            list.as_deref().unwrap_or_default()
        }
        Shown {
            description: &self.description,
            inherits: &self.inherits,
            annotations: list(&self.annotations).iter().map(|a| escaped(a)).collect(),
            attest: list(&self.attest),
            context: &self.context,
            contexts: &self.contexts,
            dockerfile: &self.dockerfile,
            dockerfile_inline: self.dockerfile_inline.as_deref().map(escaped),
            args: Texts(&self.args),
            labels: Texts(&self.labels),
            tags: list(&self.tags),
            cache_from: list(&self.cache_from),
            cache_to: list(&self.cache_to),
            target: &self.target,
            secret: list(&self.secrets),
            ssh: list(&self.ssh),
            platforms: list(&self.platforms),
            output: list(&self.outputs),
            pull: self.pull,
            no_cache: self.no_cache,
            network: &self.network,
            no_cache_filter: list(&self.no_cache_filter),
            shm_size: &self.shm_size,
            ulimits: list(&self.ulimits),
            resources: &self.resources,
            call: &self.call,
            entitlements: list(&self.entitlements),
            extra_hosts: Texts(&self.extra_hosts),
        }
        .serialize(serializer)
    }
}
