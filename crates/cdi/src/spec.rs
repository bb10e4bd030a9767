//! One device file: its members, and what makes it usable.

use crate::yaml;
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Display,
};

/// The versions there are; features ask for one of them or a later one.
const VERSIONS: [&str; 10] =
    ["0.1.0", "0.2.0", "0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0", "1.1.0"];
/// Oldest version still in use.
const EARLIEST: usize = 2;
const HOOKS: [&str; 6] =
    ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];
/// Bytes of all annotations of a device.
const MAX_ANNOTATIONS: usize = 256 * 1024;

/// A text, for which numbers and truth values may stand.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Text(pub String);

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        yaml::text(value).map(Self).ok_or_else(|| serde::de::Error::custom("not a text"))
    }
}

pub(crate) type Annotations = BTreeMap<String, Text>;

/// A whole file.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub(crate) struct Spec {
    pub cdi_version: Text,
    /// `vendor/class` of all its devices.
    pub kind: Text,
    pub annotations: Annotations,
    pub devices: Vec<Device>,
    /// Made once where any of the devices is used.
    pub container_edits: Edits,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub(crate) struct Device {
    pub name: Text,
    pub annotations: Annotations,
    pub container_edits: Edits,
}

#[derive(Debug, Default, Deserialize, PartialEq)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub(crate) struct Edits {
    pub env: Vec<Text>,
    pub device_nodes: Vec<Node>,
    pub net_devices: Vec<Interface>,
    pub hooks: Vec<Hook>,
    pub mounts: Vec<Mount>,
    pub intel_rdt: Option<Rdt>,
    pub additional_gids: Vec<u32>,
}

#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub(crate) struct Node {
    pub path: Text,
    pub host_path: Text,
    pub r#type: Text,
    pub major: i64,
    pub minor: i64,
    pub file_mode: Option<u32>,
    pub permissions: Text,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
}

#[derive(Debug, Default, Deserialize, PartialEq)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub(crate) struct Interface {
    pub host_interface_name: Text,
    pub name: Text,
}

#[derive(Debug, Default, Deserialize, PartialEq)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub(crate) struct Hook {
    pub hook_name: Text,
    pub path: Text,
    pub args: Vec<Text>,
    pub env: Vec<Text>,
    pub timeout: Option<i64>,
}

#[derive(Debug, Default, Deserialize, PartialEq)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub(crate) struct Mount {
    pub host_path: Text,
    pub container_path: Text,
    pub options: Vec<Text>,
    pub r#type: Text,
}

#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub(crate) struct Rdt {
    #[serde(rename = "closID")]
    pub clos_id: Text,
    pub l3_cache_schema: Text,
    pub mem_bw_schema: Text,
    pub schemata: Option<Vec<Text>>,
    pub enable_monitoring: bool,
}

/// Refuses unless `good`.
fn ensure(good: bool, why: impl FnOnce() -> String) -> Result<(), String> {
    if good { Ok(()) } else { Err(why()) }
}

/// `vendor` and `class`, if `kind` is made of both.
pub(crate) fn split_kind(kind: &str) -> Option<(&str, &str)> {
    kind.split_once('/').filter(|(vendor, class)| !vendor.is_empty() && !class.is_empty())
}

impl Spec {
    /// Reads the text of a file and checks it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let spec: Self = serde_json::from_value(yaml::read(text)?).map_err(|e| e.to_string())?;
        spec.check()?;
        Ok(spec)
    }

    fn check(&self) -> Result<(), String> {
        let version = self.cdi_version.0.strip_prefix('v').unwrap_or(&self.cdi_version.0);
        let at = VERSIONS
            .iter()
            .position(|v| *v == version)
            .ok_or_else(|| format!("invalid version {version:?}"))?;
        let needed = self.needed_version();
        ensure(at >= needed, || {
            format!("the spec version must be at least v{}", VERSIONS[needed])
        })?;
        let kind = split_kind(&self.kind.0);
        let (vendor, class) =
            kind.ok_or_else(|| format!("kind {:?} is not of the form vendor/class", self.kind.0))?;
        check_name("vendor", vendor, &['_', '-', '.'], |c| c.is_ascii_alphabetic())?;
        check_name("class", class, &['_', '-', '.'], |c| c.is_ascii_alphabetic())?;
        check_annotations(&self.annotations)?;
        self.container_edits.check()?;
        ensure(!self.devices.is_empty(), || "no devices".into())?;
        let mut names = BTreeSet::new();
        for device in &self.devices {
            device.check().map_err(|e| format!("device {:?}: {e}", device.name.0))?;
            ensure(names.insert(&device.name), || {
                format!("device {:?} is there twice", device.name.0)
            })?;
        }
        Ok(())
    }

    fn all_edits(&self) -> impl Iterator<Item = &Edits> {
        std::iter::once(&self.container_edits)
            .chain(self.devices.iter().map(|d| &d.container_edits))
    }

    /// Index of the first version that has everything this file uses.
    fn needed_version(&self) -> usize {
        let any = |uses: fn(&Edits) -> bool| self.all_edits().any(uses);
        let class = split_kind(&self.kind.0).map_or("", |(_, class)| class);
        let uses = [
            (
                9,
                any(|e| {
                    !e.net_devices.is_empty()
                        || e.intel_rdt
                            .as_ref()
                            .is_some_and(|r| r.schemata.is_some() || r.enable_monitoring)
                }),
            ),
            (6, any(|e| e.intel_rdt.is_some() || !e.additional_gids.is_empty())),
            (
                5,
                !self.annotations.is_empty()
                    || self.devices.iter().any(|d| !d.annotations.is_empty())
                    || class.contains('.'),
            ),
            (4, self.devices.iter().any(|d| d.name.0.starts_with(|c: char| c.is_ascii_digit()))),
            (4, any(|e| e.device_nodes.iter().any(|n| !n.host_path.0.is_empty()))),
            (3, any(|e| e.mounts.iter().any(|m| !m.r#type.0.is_empty()))),
        ];
        uses.into_iter().find(|(_, used)| *used).map_or(EARLIEST, |(version, _)| version)
    }
}

/// Letters, digits and some more between a good beginning and a letter or digit.
fn check_name(
    what: impl Display,
    name: &str,
    between: &[char],
    begin: fn(char) -> bool,
) -> Result<(), String> {
    let good = name.starts_with(begin)
        && name.ends_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || between.contains(&c));
    ensure(good, || format!("{name:?} is not a valid name of a {what}"))
}

fn check_annotations(all: &Annotations) -> Result<(), String> {
    let size: usize = all.iter().map(|(k, v)| k.len() + v.0.len()).sum();
    ensure(size <= MAX_ANNOTATIONS, || {
        format!("{size} bytes of annotations, and at most {MAX_ANNOTATIONS} are accepted")
    })
}

fn check_env(env: &[Text]) -> Result<(), String> {
    let bad = env.iter().find(|v| v.0.find('=').is_none_or(|at| at == 0));
    bad.map_or(Ok(()), |v| Err(format!("invalid environment variable {:?}", v.0)))
}

impl Device {
    fn check(&self) -> Result<(), String> {
        check_name("device", &self.name.0, &['_', '-', '.', ':'], |c| c.is_ascii_alphanumeric())?;
        check_annotations(&self.annotations)?;
        ensure(self.container_edits != Edits::default(), || "empty device edits".into())?;
        self.container_edits.check()
    }
}

impl Edits {
    fn check(&self) -> Result<(), String> {
        check_env(&self.env)?;
        for Node { path, r#type, permissions, .. } in &self.device_nodes {
            ensure(!path.0.is_empty(), || "a device node without path".into())?;
            ensure(["", "b", "c", "u", "p"].contains(&r#type.0.as_str()), || {
                format!("{}: invalid type {:?}", path.0, r#type.0)
            })?;
            let good = permissions.0.chars().all(|c| "rwm".contains(c));
            ensure(good, || format!("{}: invalid permissions {:?}", path.0, permissions.0))?;
        }
        for hook in &self.hooks {
            ensure(HOOKS.contains(&hook.hook_name.0.as_str()), || {
                format!("invalid hook name {:?}", hook.hook_name.0)
            })?;
            ensure(!hook.path.0.is_empty(), || format!("hook {} without path", hook.hook_name.0))?;
            check_env(&hook.env)?;
        }
        for mount in &self.mounts {
            ensure(!mount.host_path.0.is_empty() && !mount.container_path.0.is_empty(), || {
                "a mount without one of its paths".into()
            })?;
        }
        if let Some(Rdt { clos_id: Text(id), .. }) = &self.intel_rdt {
            let good = id == "/"
                || (id.len() < 4096 && id != "." && id != ".." && !id.contains(['/', '\n']));
            ensure(good, || "invalid ClosID".into())?;
        }
        let (mut outside, mut inside) = (BTreeSet::new(), BTreeSet::new());
        for Interface { host_interface_name: host, name } in &self.net_devices {
            ensure(!host.0.is_empty() && !name.0.is_empty(), || {
                "a network interface without one of its names".into()
            })?;
            ensure(outside.insert(host) && inside.insert(name), || {
                format!("network interface {} is there twice", host.0)
            })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Which error a device of `kind` and `version` with `edits` gives.
    #[track_caller]
    fn check(version: &str, kind: &str, rest: &str, expected: Option<&str>) {
        let text = format!("cdiVersion: {version}\nkind: {kind}\n{rest}");
        match (Spec::parse(&text), expected) {
            (Ok(_), None) => {}
            (Err(error), Some(why)) if error.contains(why) => {}
            (other, _) => panic!("{text}\nis {other:?}, not {expected:?}"),
        }
    }

    #[test]
    fn no_damage_does_harm() {
        let whole = format!(
            "cdiVersion: 0.7.0\nkind: v/c\nannotations: {{a: &x 'b', c: *x}}\n{}",
            edits("{env: [\"A=b\"], additionalGids: [1]}")
        );
        assert!(Spec::parse(&whole).is_ok());
        for at in 0..whole.len() {
            let _ = Spec::parse(&whole[..at]);
            for damage in "[]{}:&*!\"'#-,|>%@?~\t\n\r\0é".chars() {
                let _ = Spec::parse(&format!("{}{damage}{}", &whole[..at], &whole[at..]));
                let _ = Spec::parse(&format!("{}{damage}{}", &whole[..at], &whole[at + 1..]));
            }
        }
    }

    const ONE: &str = "devices: [{name: a, containerEdits: {env: [A=b]}}]\n";

    fn edits(text: &str) -> String {
        format!("devices: [{{name: a, containerEdits: {text}}}]\n")
    }

    #[test]
    fn names_and_versions() {
        check("0.3.0", "v.com/c", ONE, None);
        check("v1.1.0", "v.com/c", ONE, None);
        check("0.1.0", "v.com/c", ONE, Some("the spec version must be at least v0.3.0"));
        check("0.9.0", "v.com/c", ONE, Some("invalid version \"0.9.0\""));
        check("0.6.0", "v.com", ONE, Some("not of the form vendor/class"));
        check("0.6.0", "/c", ONE, Some("not of the form vendor/class"));
        check("0.6.0", "1v/c", ONE, Some("not a valid name of a vendor"));
        check("0.6.0", "v/c-", ONE, Some("not a valid name of a class"));
        check("0.5.0", "v/c.d", ONE, Some("at least v0.6.0"));
        check("0.6.0", "v/c", "devices: []", Some("no devices"));
        check("0.6.0", "v/c", "", Some("no devices"));
        check(
            "0.6.0",
            "v/c",
            &ONE.replace("name: a", "name: a b"),
            Some("\"a b\" is not a valid name of a device"),
        );
        check(
            "0.6.0",
            "v/c",
            &ONE.replace("name: a", "name: é"),
            Some("not a valid name of a device"),
        );
        check("0.4.0", "v/c", &ONE.replace("name: a", "name: '0'"), Some("at least v0.5.0"));
        check("0.6.0", "v/c", &ONE.replace("name: a", "name: 'a:0'"), None);
        check(
            "0.6.0",
            "v/c",
            &format!("{}{}", ONE.replace("]}}]", "]}},"), &ONE["devices: [".len()..]),
            Some("device \"a\" is there twice"),
        );
        check("0.6.0", "v/c", &format!("{ONE}annotations: {{a: true, b: 5}}"), None);
        check("0.5.0", "v/c", &format!("{ONE}annotations: {{a: true}}"), Some("at least v0.6.0"));
        check(
            "0.6.0",
            "v/c",
            &format!("{ONE}annotations: {{a: {}}}", "x".repeat(300_000)),
            Some("bytes of annotations"),
        );
        check("0.6.0", "v/c", &format!("{ONE}color: red"), Some("unknown field `color`"));
    }

    #[test]
    fn every_edit_is_checked() {
        let check =
            |version: &str, text: &str, expected| check(version, "v/c", &edits(text), expected);
        check("0.6.0", "{}", Some("empty device edits"));
        check("0.6.0", "null", Some("empty device edits"));
        check("0.6.0", "[1]", Some("invalid type"));
        check("0.6.0", "{env: [A]}", Some("invalid environment variable \"A\""));
        check("0.6.0", "{env: [=A]}", Some("invalid environment variable"));
        check("0.6.0", "{env: [[A]]}", Some("not a text"));
        check(
            "0.6.0",
            "{deviceNodes: [{path: /dev/x, type: d}]}",
            Some("/dev/x: invalid type \"d\""),
        );
        check(
            "0.6.0",
            "{deviceNodes: [{path: /dev/x, permissions: rx}]}",
            Some("invalid permissions \"rx\""),
        );
        check("0.6.0", "{deviceNodes: [{hostPath: /dev/x}]}", Some("a device node without path"));
        check("0.6.0", "{deviceNodes: [{path: /dev/x, fileMode: -1}]}", Some("invalid value"));
        check(
            "0.6.0",
            "{deviceNodes: [{path: /dev/x, hostPath: /dev/y, type: c, major: 1, uid: 5, fileMode: 0660}]}",
            None,
        );
        check(
            "0.4.0",
            "{deviceNodes: [{path: /dev/x, hostPath: /dev/y}]}",
            Some("at least v0.5.0"),
        );
        check("0.6.0", "{mounts: [{hostPath: /a}]}", Some("a mount without one of its paths"));
        check(
            "0.3.0",
            "{mounts: [{hostPath: /a, containerPath: /b, type: bind}]}",
            Some("at least v0.4.0"),
        );
        check(
            "0.6.0",
            "{hooks: [{hookName: later, path: /x}]}",
            Some("invalid hook name \"later\""),
        );
        check("0.6.0", "{hooks: [{hookName: poststop, path: ''}]}", Some("without path"));
        check(
            "0.6.0",
            "{hooks: [{hookName: poststop, path: /x, env: [x]}]}",
            Some("invalid environment variable"),
        );
        check("0.6.0", "{additionalGids: [1]}", Some("at least v0.7.0"));
        check("0.7.0", "{additionalGids: [1]}", None);
        check("0.7.0", "{intelRdt: {closID: ../x}}", Some("invalid ClosID"));
        check("0.7.0", "{intelRdt: {closID: x}}", None);
        check("0.8.0", "{intelRdt: {enableMonitoring: true}}", Some("at least v1.1.0"));
        check("1.0.0", "{netDevices: [{hostInterfaceName: a, name: b}]}", Some("at least v1.1.0"));
        check(
            "1.1.0",
            "{netDevices: [{hostInterfaceName: a, name: b}, {hostInterfaceName: a, name: c}]}",
            Some("is there twice"),
        );
        check(
            "1.1.0",
            "{netDevices: [{hostInterfaceName: a, name: ''}]}",
            Some("without one of its names"),
        );
    }
}
