//! The part of the Compose specification that says what services may build, and secrets.

use std::collections::BTreeMap;

use shipway_fault::{Fault, Result, nearest};

use super::yaml::Yaml;

/// What a value has to be.
#[derive(Clone, Copy)]
enum Shape {
    Text,
    /// A text or a truth.
    Truth,
    /// A text or a whole number.
    Size,
    Texts,
    /// A map of scalars, or a list of texts.
    Pairs,
    Hosts,
    Secrets,
    Ulimits,
    EnvFiles,
}

const BUILD: [(&str, Shape); 25] = [
    ("context", Shape::Text),
    ("dockerfile", Shape::Text),
    ("dockerfile_inline", Shape::Text),
    ("entitlements", Shape::Texts),
    ("args", Shape::Pairs),
    ("ssh", Shape::Pairs),
    ("labels", Shape::Pairs),
    ("cache_from", Shape::Texts),
    ("cache_to", Shape::Texts),
    ("no_cache", Shape::Truth),
    ("additional_contexts", Shape::Pairs),
    ("network", Shape::Text),
    ("provenance", Shape::Truth),
    ("sbom", Shape::Truth),
    ("pull", Shape::Truth),
    ("target", Shape::Text),
    ("shm_size", Shape::Size),
    ("extra_hosts", Shape::Hosts),
    ("isolation", Shape::Text),
    ("privileged", Shape::Truth),
    ("secrets", Shape::Secrets),
    ("tags", Shape::Texts),
    ("ulimits", Shape::Ulimits),
    ("platforms", Shape::Texts),
    ("no_cache_filter", Shape::Texts),
];
const SERVICE: [(&str, Shape); 3] =
    [("image", Shape::Text), ("environment", Shape::Pairs), ("env_file", Shape::EnvFiles)];
const SECRET: [&str; 7] =
    ["name", "environment", "file", "external", "labels", "driver", "driver_opts"];

fn wrong(at: &str, what: &str) -> Fault {
    Fault::invalid(format!("{at} must be a {what}"))
}

/// Checks services and secrets.
pub(crate) fn check(root: &BTreeMap<String, Yaml>) -> Result<()> {
    if let Some(services) = root.get("services") {
        let services = services.as_map().ok_or_else(|| wrong("services", "mapping"))?;
        for (name, service) in services {
            let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
            if name.is_empty() || !name.chars().all(is_name) {
                return Err(Fault::invalid(format!(
                    "services additional properties '{name}' not allowed"
                )));
            }
            check_service(service, &format!("services.{name}"))?;
        }
    }
    if let Some(secrets) = root.get("secrets") {
        let secrets = secrets.as_map().ok_or_else(|| wrong("secrets", "mapping"))?;
        for (name, secret) in secrets {
            let at = format!("secrets.{name}");
            let secret = secret.as_map().ok_or_else(|| wrong(&at, "mapping"))?;
            for (key, value) in secret {
                let at = format!("{at}.{key}");
                match key.as_str() {
                    "name" | "environment" | "file" | "driver" => text(value, &at)?,
                    "template_driver" => text(value, &at)?,
                    "external" | "labels" | "driver_opts" => {}
                    key if key.starts_with("x-") => {}
                    _ => return Err(unknown(&format!("secrets.{name}"), key, &SECRET)),
                }
            }
        }
    }
    Ok(())
}

fn unknown(at: &str, key: &str, known: &[&str]) -> Fault {
    let fault = Fault::invalid(format!("{at} additional properties '{key}' not allowed"));
    match nearest(key, known.iter().copied()) {
        Some(near) => fault.hint(format!("did you mean {near}?")),
        None => fault,
    }
}

fn check_service(service: &Yaml, at: &str) -> Result<()> {
    let service = match service {
        Yaml::Map(map) => map,
        _ => return Ok(()),
    };
    for (key, shape) in SERVICE {
        if let Some(value) = service.get(key) {
            shape.check(value, &format!("{at}.{key}"))?;
        }
    }
    let at = format!("{at}.build");
    match service.get("build") {
        None | Some(Yaml::Text(_)) => Ok(()),
        Some(Yaml::Map(build)) => {
            for (key, value) in build {
                match BUILD.iter().find(|(k, _)| k == key) {
                    Some((_, shape)) => shape.check(value, &format!("{at}.{key}"))?,
                    None if key.starts_with("x-") => {}
                    None => return Err(unknown(&at, key, &BUILD.map(|(k, _)| k))),
                }
            }
            Ok(())
        }
        Some(_) => Err(wrong(&at, "mapping or string")),
    }
}

fn text(value: &Yaml, at: &str) -> Result<()> {
    value.as_str().map(|_| ()).ok_or_else(|| wrong(at, "string"))
}

impl Shape {
    fn check(self, value: &Yaml, at: &str) -> Result<()> {
        let texts = |list: &[Yaml], once: bool| {
            for (n, value) in list.iter().enumerate() {
                text(value, &format!("{at}.{n}"))?;
                if once && list[..n].contains(value) {
                    return Err(Fault::invalid(format!("{at} items at {n} and before are equal")));
                }
            }
            Ok(())
        };
        match (self, value) {
            (Self::Text, value) => text(value, at),
            (Self::Truth, Yaml::Text(_) | Yaml::Bool(_)) => Ok(()),
            (Self::Truth, _) => Err(wrong(at, "boolean or string")),
            (Self::Size, Yaml::Text(_) | Yaml::Int(_)) => Ok(()),
            (Self::Size, _) => Err(wrong(at, "integer or string")),
            (Self::Texts, Yaml::List(list)) => texts(list, false),
            (Self::Texts, _) => Err(wrong(at, "array")),
            (Self::Pairs, Yaml::List(list)) => texts(list, true),
            (Self::Pairs, Yaml::Map(map)) => map
                .iter()
                .find(|(_, v)| matches!(v, Yaml::List(_) | Yaml::Map(_)))
                .map_or(Ok(()), |(key, _)| {
                    Err(wrong(&format!("{at}.{key}"), "boolean, null, number or string"))
                }),
            (Self::Hosts, Yaml::List(list)) => texts(list, true),
            (Self::Hosts, Yaml::Map(map)) => map.iter().try_for_each(|(key, v)| match v {
                Yaml::Text(_) => Ok(()),
                Yaml::List(list) => texts(list, false),
                _ => Err(wrong(&format!("{at}.{key}"), "array or string")),
            }),
            (Self::Pairs | Self::Hosts, _) => Err(wrong(at, "array or mapping")),
            (Self::Secrets, Yaml::List(list)) => {
                for (n, secret) in list.iter().enumerate() {
                    let at = format!("{at}.{n}");
                    let secret = match secret {
                        Yaml::Text(_) => continue,
                        Yaml::Map(map) => map,
                        _ => return Err(wrong(&at, "mapping or string")),
                    };
                    for (key, value) in secret {
                        const KNOWN: [&str; 5] = ["source", "target", "uid", "gid", "mode"];
                        match key.as_str() {
                            "source" | "target" | "uid" | "gid" => {
                                text(value, &format!("{at}.{key}"))?;
                            }
                            "mode" => {}
                            key if key.starts_with("x-") => {}
                            _ => return Err(unknown(&at, key, &KNOWN)),
                        }
                    }
                }
                Ok(())
            }
            (Self::Secrets, _) => Err(wrong(at, "array")),
            (Self::Ulimits, Yaml::Map(map)) => {
                for (name, limit) in map {
                    let at = format!("{at}.{name}");
                    if let Yaml::Map(limit) = limit {
                        for (key, value) in limit {
                            match (key.as_str(), value) {
                                ("hard" | "soft", Yaml::Int(_) | Yaml::Text(_)) => {}
                                (key, _) if key.starts_with("x-") => {}
                                ("hard" | "soft", _) => {
                                    return Err(wrong(&format!("{at}.{key}"), "integer or string"));
                                }
                                _ => return Err(unknown(&at, key, &["hard", "soft"])),
                            }
                        }
                        for key in ["soft", "hard"] {
                            if !limit.contains_key(key) {
                                return Err(Fault::invalid(format!(
                                    "{at} missing property '{key}'"
                                )));
                            }
                        }
                    }
                }
                Ok(())
            }
            (Self::Ulimits, _) => Err(wrong(at, "mapping")),
            (Self::EnvFiles, Yaml::Text(_)) => Ok(()),
            (Self::EnvFiles, Yaml::List(list)) => {
                for (n, file) in list.iter().enumerate() {
                    let at = format!("{at}.{n}");
                    let file = match file {
                        Yaml::Text(_) => continue,
                        Yaml::Map(map) => map,
                        _ => return Err(wrong(&at, "mapping or string")),
                    };
                    match file.get("path") {
                        Some(path) => text(path, &format!("{at}.path"))?,
                        None => {
                            return Err(Fault::invalid(format!("{at} missing property 'path'")));
                        }
                    }
                    const KNOWN: [&str; 3] = ["path", "format", "required"];
                    if let Some(key) = file.keys().find(|k| !KNOWN.contains(&k.as_str())) {
                        return Err(unknown(&at, key, &KNOWN));
                    }
                }
                Ok(())
            }
            (Self::EnvFiles, _) => Err(wrong(at, "array or string")),
        }
    }
}
