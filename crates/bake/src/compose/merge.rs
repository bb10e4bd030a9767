//! How one Compose file overrides another, and what makes each canonical.

use std::collections::BTreeMap;

use shipway_fault::{Fault, Result};

use super::yaml::Yaml;

/// Whether `path` is what `pattern` means, in which `*` is any key.
pub(crate) fn matches(path: &[String], pattern: &str) -> bool {
    let mut parts = pattern.split('.');
    path.iter().all(|key| parts.next().is_some_and(|p| p == "*" || p == key))
        && parts.next().is_none()
}

fn shown(path: &[String]) -> String {
    path.join(".")
}

fn with(path: &[String], key: &str) -> Vec<String> {
    path.iter().cloned().chain([key.to_owned()]).collect()
}

/// Lists of `key=value`, which may be maps, too.
const SEQUENCES: [&str; 14] = [
    "services.*.annotations",
    "services.*.build.args",
    "services.*.build.additional_contexts",
    "services.*.build.labels",
    "services.*.deploy.labels",
    "services.*.dns",
    "services.*.dns_opt",
    "services.*.dns_search",
    "services.*.env_file",
    "services.*.label_file",
    "services.*.environment",
    "services.*.labels",
    "services.*.sysctls",
    "services.*.tmpfs",
];
/// What is replaced as a whole.
const REPLACED: [&str; 4] = [
    "services.*.command",
    "services.*.entrypoint",
    "services.*.healthcheck.test",
    "services.*.logging",
];
/// Maps that may be lists of keys.
const MAPPINGS: [&str; 3] = ["services.*.depends_on", "services.*.networks", "services.*.models"];
/// Lists in which a key is there once.
const UNIQUE: [&str; 18] = [
    "services.*.annotations",
    "services.*.build.args",
    "services.*.build.additional_contexts",
    "services.*.build.tags",
    "services.*.build.labels",
    "services.*.cap_add",
    "services.*.cap_drop",
    "services.*.deploy.labels",
    "services.*.dns",
    "services.*.dns_opt",
    "services.*.dns_search",
    "services.*.environment",
    "services.*.env_file",
    "services.*.labels",
    "services.*.links",
    "services.*.profiles",
    "services.*.sysctls",
    "services.*.tmpfs",
];

/// A list of texts of what may be a map.
fn sequence(value: Yaml) -> Vec<Yaml> {
    match value {
        Yaml::List(list) => list,
        text @ Yaml::Text(_) => vec![text],
        Yaml::Map(map) => map
            .into_iter()
            .flat_map(|(key, value)| match value {
                Yaml::Null => vec![Yaml::Text(key)],
                Yaml::List(all) => all
                    .iter()
                    .map(|v| Yaml::Text(format!("{key}={}", v.printed().unwrap_or_default())))
                    .collect(),
                other => {
                    vec![Yaml::Text(format!("{key}={}", other.printed().unwrap_or_default()))]
                }
            })
            .collect(),
        _ => Vec::new(),
    }
}

fn mapping(value: Yaml) -> BTreeMap<String, Yaml> {
    match value {
        Yaml::Map(map) => map,
        Yaml::List(list) => {
            list.iter().filter_map(Yaml::as_str).map(|k| (k.to_owned(), Yaml::Null)).collect()
        }
        _ => BTreeMap::new(),
    }
}

/// `over` over `base`.
pub(crate) fn merge(base: Yaml, over: Yaml, path: &[String]) -> Result<Yaml> {
    let is = |patterns: &[&str]| patterns.iter().any(|p| matches(path, p));
    if matches(path, "services.*.build") {
        let build = |value: Yaml| match value {
            Yaml::Text(context) => BTreeMap::from([("context".to_owned(), Yaml::Text(context))]),
            Yaml::Map(map) => map,
            _ => BTreeMap::new(),
        };
        return merge_maps(build(base), build(over), path);
    }
    if is(&SEQUENCES) {
        return Ok(Yaml::List(sequence(base).into_iter().chain(sequence(over)).collect()));
    }
    if matches(path, "services.*.extra_hosts") || matches(path, "services.*.build.extra_hosts") {
        let mut all = sequence(base);
        let more: Vec<Yaml> = sequence(over).into_iter().filter(|v| !all.contains(v)).collect();
        all.extend(more);
        return Ok(Yaml::List(all));
    }
    if is(&REPLACED) {
        return Ok(over);
    }
    if is(&MAPPINGS) {
        return merge_maps(mapping(base), mapping(over), path);
    }
    match (base, over) {
        (base, Yaml::Null) => Ok(base),
        (Yaml::Map(base), Yaml::Map(over)) => merge_maps(base, over, path),
        (Yaml::List(mut base), Yaml::List(over)) => {
            base.extend(over);
            Ok(Yaml::List(base))
        }
        (Yaml::Map(_) | Yaml::List(_), _) => {
            Err(Fault::invalid(format!("cannot override {}", shown(path))))
        }
        (_, over) => Ok(over),
    }
}

fn merge_maps(
    mut base: BTreeMap<String, Yaml>,
    over: BTreeMap<String, Yaml>,
    path: &[String],
) -> Result<Yaml> {
    for (key, value) in over {
        let merged = match base.remove(&key) {
            Some(old) => merge(old, value, &with(path, &key))?,
            None => value,
        };
        base.insert(key, merged);
    }
    Ok(Yaml::Map(base))
}

/// Drops what is there twice in lists of keys: the later value, at the place of the first.
pub(crate) fn unique(value: Yaml, path: &[String]) -> Result<Yaml> {
    match value {
        Yaml::Map(map) => {
            let each = map.into_iter().map(|(k, v)| {
                let path = with(path, &k);
                Ok((k, unique(v, &path)?))
            });
            Ok(Yaml::Map(each.collect::<Result<_>>()?))
        }
        Yaml::List(list) if UNIQUE.iter().any(|p| matches(path, p)) => {
            let mut kept: Vec<(String, Yaml)> = Vec::new();
            for (n, entry) in list.into_iter().enumerate() {
                let key = match &entry {
                    Yaml::Text(text) => text.split('=').next().unwrap_or_default().to_owned(),
                    Yaml::Map(map) if path.last().is_some_and(|p| p == "env_file") => {
                        map.get("path").and_then(Yaml::as_str).unwrap_or_default().to_owned()
                    }
                    other => {
                        return Err(Fault::invalid(format!(
                            "{}.[{n}]: unexpected type {}",
                            shown(path),
                            other.kind()
                        )));
                    }
                };
                match kept.iter_mut().find(|(k, _)| *k == key) {
                    Some((_, old)) => *old = entry,
                    None => kept.push((key, entry)),
                }
            }
            Ok(Yaml::List(kept.into_iter().map(|(_, v)| v).collect()))
        }
        other => Ok(other),
    }
}

/// Short forms of services become long ones.
pub(crate) fn canonical(root: &mut BTreeMap<String, Yaml>) -> Result<()> {
    let Some(Yaml::Map(services)) = root.get_mut("services") else { return Ok(()) };
    for (name, service) in services {
        let Yaml::Map(service) = service else { continue };
        let at = |key: &str| format!("services.{name}.{key}");
        if let Some(build) = service.get_mut("build") {
            match build {
                Yaml::Text(context) => {
                    let context = Yaml::Text(std::mem::take(context));
                    *build = Yaml::Map(BTreeMap::from([("context".to_owned(), context)]));
                }
                Yaml::Map(build) => canonical_build(build, &at("build"))?,
                other => {
                    let kind = other.kind();
                    return Err(Fault::invalid(format!(
                        "{}: invalid type {kind} for build",
                        at("build")
                    )));
                }
            }
        }
        match service.get_mut("env_file") {
            None => {}
            Some(Yaml::Text(path)) => {
                let file = env_file(std::mem::take(path));
                service.insert("env_file".into(), Yaml::List(vec![file]));
            }
            Some(Yaml::List(list)) => {
                for entry in list {
                    match entry {
                        Yaml::Text(path) => *entry = env_file(std::mem::take(path)),
                        Yaml::Map(map) => {
                            map.entry("required".into()).or_insert(Yaml::Bool(true));
                        }
                        _ => {}
                    }
                }
            }
            Some(other) => {
                let kind = other.kind();
                return Err(Fault::invalid(format!(
                    "{}: invalid type {kind} for env_file",
                    at("env_file")
                )));
            }
        }
    }
    Ok(())
}

fn env_file(path: String) -> Yaml {
    Yaml::Map(BTreeMap::from([
        ("path".to_owned(), Yaml::Text(path)),
        ("required".to_owned(), Yaml::Bool(true)),
    ]))
}

fn canonical_build(build: &mut BTreeMap<String, Yaml>, at: &str) -> Result<()> {
    let invalid = |why: String| Fault::invalid(format!("{at}.{why}"));
    if let Some(Yaml::List(list)) = build.get_mut("secrets") {
        for secret in list {
            match secret {
                Yaml::Text(source) => {
                    let source = Yaml::Text(std::mem::take(source));
                    *secret = Yaml::Map(BTreeMap::from([("source".to_owned(), source)]));
                }
                Yaml::Map(_) => {}
                other => {
                    return Err(invalid(format!("secrets: unsupported type {}", other.kind())));
                }
            }
        }
    }
    for key in ["provenance", "sbom"] {
        if let Some(value) = build.get_mut(key) {
            *value = Yaml::Text(value.printed().unwrap_or_else(|| "<nil>".into()));
        }
    }
    match build.get("additional_contexts") {
        None | Some(Yaml::Map(_)) => {}
        Some(Yaml::List(list)) => {
            let pairs = list.iter().map(|entry| {
                let pair = entry.as_str().and_then(|e| e.split_once('='));
                let (k, v) = pair.ok_or_else(|| {
                    let shown = entry.printed().unwrap_or_default();
                    invalid(format!(
                        "additional_contexts: invalid value {shown}, expected key=value"
                    ))
                })?;
                Ok((k.to_owned(), Yaml::Text(v.to_owned())))
            });
            let map = pairs.collect::<Result<_>>()?;
            build.insert("additional_contexts".into(), Yaml::Map(map));
        }
        Some(other) => {
            return Err(invalid(format!("additional_contexts: invalid type {}", other.kind())));
        }
    }
    match build.get("ssh") {
        None | Some(Yaml::Map(_)) => {}
        Some(Yaml::List(list)) => {
            let pairs = list.iter().map(|entry| match entry.as_str() {
                Some("default") => Ok(("default".to_owned(), Yaml::Null)),
                Some(text) => match text.split_once('=') {
                    Some((id, path)) => Ok((id.to_owned(), Yaml::Text(path.to_owned()))),
                    None => Err(Fault::invalid(format!("invalid ssh key {text:?}"))),
                },
                None => Err(Fault::invalid(format!("invalid ssh key type {}", entry.kind()))),
            });
            let map = pairs.collect::<Result<_>>()?;
            build.insert("ssh".into(), Yaml::Map(map));
        }
        Some(other) => return Err(invalid(format!("ssh: invalid type {}", other.kind()))),
    }
    if let Some(Yaml::Map(ulimits)) = build.get("ulimits") {
        for (name, limit) in ulimits {
            if !matches!(limit, Yaml::Map(_) | Yaml::Int(_)) {
                return Err(invalid(format!("ulimits.{name}: invalid type {}", limit.kind())));
            }
        }
    }
    Ok(())
}

/// Takes away what `resets` names.
pub(crate) fn reset(value: &mut Yaml, resets: &[Vec<String>], path: &[String]) {
    match value {
        Yaml::Map(map) => {
            map.retain(|key, _| !resets.contains(&with(path, key)));
            for (key, value) in map {
                reset(value, resets, &with(path, key));
            }
        }
        Yaml::List(list) => {
            for (n, value) in list.iter_mut().enumerate() {
                reset(value, resets, &with(path, &format!("[{n}]")));
            }
        }
        _ => {}
    }
}
