//! The devices there are, and what a name means among them.

use crate::spec::{self, Spec};
use oci_spec::runtime::{LinuxDeviceType, LinuxIntelRdt};
use rustix::fs::FileType;
use shipway_executor::{DeviceNode, Edits, Hook, HookPoint, spec::mount};
use shipway_fault::{Context as _, Fault, Result};
use shipway_gocompat::parse_bool;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
};

/// Annotation that gives a device another name, which several may share.
const CLASS: &str = "org.mobyproject.buildkit.device.class";
/// Annotation by which every build may use a device.
const AUTO_ALLOW: &str = "org.mobyproject.buildkit.device.autoallow";

/// The devices that were there when the files were read.
#[derive(Debug, Default)]
pub struct Devices {
    pub(crate) by_name: BTreeMap<String, Device>,
    pub(crate) problems: Vec<String>,
}

/// One device.
#[derive(Clone, Debug)]
pub struct Device {
    /// `vendor/class=name`.
    pub name: String,
    /// Annotations of its file, and over them its own.
    pub annotations: BTreeMap<String, String>,
    /// Whether every build may use it.
    pub auto_allow: bool,
    pub(crate) path: PathBuf,
    spec: Arc<Spec>,
    /// Which of the file's devices it is.
    index: usize,
}

/// `vendor/class` of `vendor/class=name`.
fn kind_of(name: &str) -> &str {
    name.split_once('=').map_or(name, |(kind, _)| kind)
}

impl Device {
    pub(crate) fn new(
        path: &Path,
        spec: Arc<Spec>,
        index: usize,
        auto_allowed: &BTreeSet<String>,
    ) -> Self {
        let device = &spec.devices[index];
        let name = format!("{}={}", spec.kind.0, device.name.0);
        let both = spec.annotations.iter().chain(&device.annotations);
        let annotations: BTreeMap<_, _> = both.map(|(k, v)| (k.clone(), v.0.clone())).collect();
        let says_so = annotations.get(AUTO_ALLOW).and_then(|v| parse_bool(v)) == Some(true);
        let auto_allow =
            says_so || auto_allowed.contains(&name) || auto_allowed.contains(&spec.kind.0);
        Self { name, annotations, auto_allow, path: path.to_owned(), spec, index }
    }
}

impl Devices {
    /// None at all, because of `why`.
    pub fn none(why: &str) -> Self {
        Self { problems: vec![why.to_owned()], ..Self::default() }
    }

    /// All of them by name.
    pub fn iter(&self) -> impl Iterator<Item = &Device> {
        self.by_name.values()
    }

    /// Which files and directories could not be used, and why.
    pub fn problems(&self) -> &[String] {
        &self.problems
    }

    /// Whether every build may use the device of this full name.
    pub fn is_auto_allowed(&self, name: &str) -> bool {
        self.by_name.get(name).is_some_and(|d| d.auto_allow)
    }

    /// Full names of the devices that `asked` means: one by its full name, the first of a kind, all
    /// of a kind (`kind=*`), or else all of a class.
    pub fn find(&self, asked: &str) -> Vec<&str> {
        let mut found: Vec<&str> = Vec::new();
        let (kind, name) = asked.split_once('=').unwrap_or((asked, ""));
        if spec::split_kind(kind).is_some() {
            let of_kind = self.by_name.keys().filter(|n| kind_of(n) == kind).map(String::as_str);
            match name {
                "" => found.extend(of_kind.take(1)),
                "*" => found.extend(of_kind),
                _ => found.extend(self.by_name.get_key_value(asked).map(|(name, _)| name.as_str())),
            }
        }
        if found.is_empty() {
            let of_class = self
                .iter()
                .filter(|d| d.annotations.get(CLASS).is_some_and(|class| class == asked));
            found.extend(of_class.map(|d| d.name.as_str()));
        }
        found
    }

    /// Full names of the devices that all of `asked` mean, each once; of those that need not be
    /// there (the second of each pair) perhaps none.
    pub fn resolve<'a>(
        &self,
        asked: impl IntoIterator<Item = (&'a str, bool)>,
    ) -> Result<Vec<String>> {
        let mut all: Vec<String> = Vec::new();
        for (asked, optional) in asked {
            let found = self.find(asked);
            if found.is_empty() && !optional {
                return Err(self.missing(asked));
            }
            for name in found {
                if !all.iter().any(|n| n == name) {
                    all.push(name.to_owned());
                }
            }
        }
        Ok(all)
    }

    fn missing(&self, asked: &str) -> Fault {
        let fault = Fault::not_found(format!("required device {asked:?} is not registered"));
        if let Some(near) = shipway_fault::nearest(asked, self.by_name.keys().map(String::as_str)) {
            return fault.hint(format!("did you mean {near}?"));
        }
        if !self.problems.is_empty() {
            return fault
                .hint(format!("not every device can be used: {}", self.problems.join("; ")));
        }
        match kind_of(asked) {
            "nvidia.com/gpu" | "docker.com/gpu" => fault.hint(
                "this daemon sets up no device on demand: install its driver and write its CDI file on the host, for NVIDIA's with `nvidia-ctk cdi generate`",
            ),
            _ => fault.hint("the daemon shows the devices it has with `shipway workers -v`; they are described by files in /etc/cdi"),
        }
    }

    /// What the devices of these full names change, in this order; what a file says for all its
    /// devices once, before the first. Looks at nodes of the host, and so blocks.
    pub fn edits<'a>(&self, names: impl IntoIterator<Item = &'a str>) -> Result<Edits> {
        let mut all = Edits::default();
        let mut begun: Vec<&Arc<Spec>> = Vec::new();
        for name in names {
            let device = self.by_name.get(name).ok_or_else(|| self.missing(name))?;
            let of_file = (!begun.iter().any(|s| Arc::ptr_eq(s, &device.spec)))
                .then_some(&device.spec.container_edits);
            for edits in
                of_file.into_iter().chain([&device.spec.devices[device.index].container_edits])
            {
                append(&mut all, edits)
                    .context(|| format!("device {name} of {}", device.path.display()))?;
            }
            begun.push(&device.spec);
        }
        Ok(all)
    }
}

fn texts(texts: &[spec::Text]) -> Vec<String> {
    texts.iter().map(|t| t.0.clone()).collect()
}

fn append(all: &mut Edits, more: &spec::Edits) -> Result<()> {
    all.env.extend(texts(&more.env));
    for wanted in &more.device_nodes {
        all.nodes.push(node(wanted)?);
    }
    all.interfaces.extend(
        more.net_devices.iter().map(|i| (i.host_interface_name.0.clone(), i.name.0.clone())),
    );
    all.mounts.extend(
        more.mounts
            .iter()
            .map(|m| mount(&m.container_path.0, &m.r#type.0, &m.host_path.0, texts(&m.options))),
    );
    for hook in &more.hooks {
        let name = &hook.hook_name.0;
        let when = HookPoint::of(name)
            .ok_or_else(|| Fault::invalid(format!("invalid hook name {name:?}")))?;
        all.hooks.push(Hook {
            when,
            path: hook.path.0.clone(),
            args: texts(&hook.args),
            env: texts(&hook.env),
            timeout: hook.timeout,
        });
    }
    if let Some(rdt) = &more.intel_rdt {
        let text = |text: &spec::Text| Some(text.0.clone()).filter(|t| !t.is_empty());
        let mut value = LinuxIntelRdt::default();
        value
            .set_clos_id(text(&rdt.clos_id))
            .set_l3_cache_schema(text(&rdt.l3_cache_schema))
            .set_mem_bw_schema(text(&rdt.mem_bw_schema))
            .set_schemata(rdt.schemata.as_deref().map(texts))
            .set_enable_monitoring(rdt.enable_monitoring.then_some(true));
        all.rdt = Some(value);
    }
    all.groups.extend(&more.additional_gids);
    Ok(())
}

/// The node with what the file leaves to the host.
fn node(wanted: &spec::Node) -> Result<DeviceNode> {
    let path = wanted.path.0.clone();
    let host = if wanted.host_path.0.is_empty() { &path } else { &wanted.host_path.0 };
    let named = match wanted.r#type.0.as_str() {
        "" => None,
        kind => Some(kind.parse().map_err(|_| {
            Fault::invalid(format!("CDI device {path:?}: {kind:?} is not a type of device"))
        })?),
    };
    let mut node = DeviceNode {
        kind: named.unwrap_or_default(),
        major: wanted.major,
        minor: wanted.minor,
        mode: wanted.file_mode,
        uid: wanted.uid,
        gid: wanted.gid,
        access: if wanted.permissions.0.is_empty() {
            "rwm".into()
        } else {
            wanted.permissions.0.clone()
        },
        path: path.clone(),
    };
    let known = named.is_some_and(|kind| node.major != 0 || kind == LinuxDeviceType::P);
    let found = rustix::fs::lstat(host)
        .map_err(|e| Fault::io(format!("failed to stat CDI host device {host:?}"), e.into()))
        .and_then(|stat| {
            let kind = match FileType::from_raw_mode(stat.st_mode) {
                FileType::BlockDevice => LinuxDeviceType::B,
                FileType::CharacterDevice => LinuxDeviceType::C,
                FileType::Fifo => LinuxDeviceType::P,
                _ => {
                    return Err(Fault::invalid(format!(
                        "failed to stat CDI host device {host:?}: not a device node"
                    )));
                }
            };
            Ok((stat, kind))
        });
    let (stat, kind) = match found {
        Ok(found) => found,
        // A file may say everything of a node that is not there.
        Err(_) if known => return Ok(node),
        Err(fault) => return Err(fault),
    };
    node.mode = node.mode.or(Some(stat.st_mode & 0o7777));
    if known {
        return Ok(node);
    }
    if let Some(named) = named.filter(|named| *named != kind) {
        return Err(Fault::invalid(format!(
            "CDI device ({path:?}, {host:?}), host type mismatch ({}, {})",
            named.as_str(),
            kind.as_str()
        )));
    }
    node.kind = kind;
    if kind != LinuxDeviceType::P {
        (node.major, node.minor) =
            (rustix::fs::major(stat.st_rdev).into(), rustix::fs::minor(stat.st_rdev).into());
    }
    Ok(node)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::CdiCatalog;

    fn devices(files: &[&str], auto_allowed: &[&str]) -> Devices {
        let dir = tempfile::tempdir().unwrap();
        for (i, text) in files.iter().enumerate() {
            std::fs::write(dir.path().join(format!("{i}.yaml")), text).unwrap();
        }
        CdiCatalog::new([dir.path().to_owned()], auto_allowed.iter().map(|s| (*s).to_owned()))
            .read()
    }

    const TWO: &str = r#"
cdiVersion: "0.6.0"
kind: v.com/gpu
annotations:
  org.mobyproject.buildkit.device.class: card
  x: of the file
devices:
- name: b
  containerEdits: {env: [B=1]}
- name: a
  annotations: {x: its own, org.mobyproject.buildkit.device.autoallow: true}
  containerEdits: {env: [A=1]}
containerEdits: {env: [ALL=1]}
"#;
    const THIRD: &str = "{cdiVersion: 0.6.0, kind: w.com/gpu, devices: [{name: c, annotations: {org.mobyproject.buildkit.device.class: card}, \
                         containerEdits: {env: [C=1]}}]}";

    #[test]
    fn names_mean_devices() {
        let all = devices(&[TWO, THIRD], &[]);
        assert_eq!(all.problems(), [""; 0]);
        let check =
            |asked: &str, expected: &[&str]| assert_eq!(all.find(asked), expected, "{asked}");
        check("v.com/gpu=b", &["v.com/gpu=b"]);
        check("v.com/gpu", &["v.com/gpu=a"]);
        check("v.com/gpu=", &["v.com/gpu=a"]);
        check("v.com/gpu=*", &["v.com/gpu=a", "v.com/gpu=b"]);
        check("card", &["v.com/gpu=a", "v.com/gpu=b", "w.com/gpu=c"]);
        check("v.com/gp", &[]);
        check("v.com/gpu=c", &[]);
        check("gpu=a", &[]);
        check("", &[]);
        let both = all.resolve([("w.com/gpu", false), ("card", false), ("no", true)]).unwrap();
        assert_eq!(both, ["w.com/gpu=c", "v.com/gpu=a", "v.com/gpu=b"]);
        let error = all.resolve([("v.com/gpu=d", false)]).unwrap_err();
        assert_eq!(error.to_string(), "required device \"v.com/gpu=d\" is not registered");
        assert!(error.hints().any(|h| h.contains("did you mean v.com/gpu=a")), "{error:?}");
        let error = all.resolve([("nvidia.com/gpu=all", false)]).unwrap_err();
        assert!(error.hints().any(|h| h.contains("on demand")), "{error:?}");
    }

    #[test]
    fn annotations_and_the_configuration_allow_devices() {
        let check = |auto: &[&str], expected: [bool; 3]| {
            let all = devices(&[TWO, THIRD], auto);
            assert_eq!(all.iter().map(|d| d.auto_allow).collect::<Vec<_>>(), expected, "{auto:?}");
        };
        check(&[], [true, false, false]);
        check(&["v.com/gpu"], [true, true, false]);
        check(&["w.com/gpu=c"], [true, false, true]);
        let all = devices(&[TWO], &[]);
        let seen: Vec<_> = all.iter().map(|d| d.annotations["x"].as_str()).collect();
        assert_eq!(seen, ["its own", "of the file"]);
    }

    #[test]
    fn edits_come_in_order_and_those_of_a_file_once() {
        let all = devices(&[TWO, THIRD], &[]);
        let edits = all.edits(["w.com/gpu=c", "v.com/gpu=b", "v.com/gpu=a"]).unwrap();
        assert_eq!(edits.env, ["C=1", "ALL=1", "B=1", "A=1"]);
        assert!(all.edits(["v.com/gpu=z"]).unwrap_err().to_string().contains("not registered"));
    }

    #[test]
    fn what_a_file_leaves_out_of_a_node_is_the_hosts() {
        let check = |node: &str, expected: Result<(&str, i64, i64), &str>| {
            let text = format!(
                "{{cdiVersion: 0.6.0, kind: v/c, devices: [{{name: a, containerEdits: {{deviceNodes: [{node}]}}}}]}}"
            );
            let found = devices(&[&text], &[]).edits(["v/c=a"]);
            match (found, expected) {
                (Ok(edits), Ok(expected)) => {
                    let node = &edits.nodes[0];
                    assert_eq!((node.kind.as_str(), node.major, node.minor), expected);
                }
                (Err(fault), Err(why)) if fault.to_string().contains(why) => {}
                other => panic!("{text}: {other:?}"),
            }
        };
        check("{path: /dev/null}", Ok(("c", 1, 3)));
        check("{path: /dev/x, hostPath: /dev/zero}", Ok(("c", 1, 5)));
        check("{path: /dev/null, type: b, major: 7, minor: 9}", Ok(("b", 7, 9)));
        check("{path: /dev/none, type: p}", Ok(("p", 0, 0)));
        check("{path: /dev/null, type: b}", Err("host type mismatch (b, c)"));
        check(
            "{path: /dev/no-such}",
            Err("failed to stat CDI host device \"/dev/no-such\": no such file or directory"),
        );
        check("{path: /etc/passwd}", Err("not a device node"));
    }
}
