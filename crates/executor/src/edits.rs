//! What a device of the host changes in a runtime specification (row `exec.cdi`): crate `cdi` reads
//! it from files, [`Edits::apply`] does it.

use crate::{Identity, spec::SpecMount};
use serde_json::{Value, json};

/// Changes of one or several devices, in the order in which they are made. Those of mounts are made
/// with the process's other mounts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Edits {
    /// Variables, `NAME=value`; they win over the process's own.
    pub env: Vec<String>,
    /// Device nodes, each with its permission to be used.
    pub nodes: Vec<DeviceNode>,
    /// Network interfaces of the host that move into the container: name there, name inside.
    pub interfaces: Vec<(String, String)>,
    /// Mounts; the source is a path of the host.
    pub mounts: Vec<SpecMount>,
    /// Programs of the host that the runtime runs.
    pub hooks: Vec<Hook>,
    /// Intel's resource director, as the runtime specification has it (`linux.intelRdt`).
    pub rdt: Option<Value>,
    /// Additional groups of the process.
    pub groups: Vec<u32>,
}

/// A device node, fully known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceNode {
    /// Absolute path in the container.
    pub path: String,
    /// `b`, `c`, `u` or `p`.
    pub kind: String,
    /// Major number.
    pub major: i64,
    /// Minor number.
    pub minor: i64,
    /// Permissions; `None` is the runtime's default.
    pub mode: Option<u32>,
    /// Owner; `None` is the process's user.
    pub uid: Option<u32>,
    /// Group; `None` is the process's.
    pub gid: Option<u32>,
    /// What the process may do with it: any of `r`, `w`, `m`.
    pub access: String,
}

/// A program that the runtime runs at some point of the container's life.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hook {
    /// When, in the words of the runtime specification, such as `createContainer`.
    pub when: String,
    /// Absolute path on the host.
    pub path: String,
    /// Arguments, the name of the program first.
    pub args: Vec<String>,
    /// Its environment, `NAME=value`.
    pub env: Vec<String>,
    /// Seconds it may take.
    pub timeout: Option<i64>,
}

/// The value at `key` of an object, made by `new` if it is not there.
fn entry<'a>(object: &'a mut Value, key: &str, new: fn() -> Value) -> &'a mut Value {
    let slot = &mut object[key];
    if slot.is_null() {
        *slot = new();
    }
    slot
}

fn push(object: &mut Value, key: &str, value: Value) {
    if let Value::Array(list) = entry(object, key, || json!([])) {
        list.push(value);
    }
}

impl Edits {
    /// Makes all changes but those of mounts in `spec`, the specification of a process that runs as
    /// `who`.
    pub(crate) fn apply(&self, spec: &mut Value, who: &Identity) {
        for variable in &self.env {
            set_variable(&mut spec["process"], variable);
        }
        for node in &self.nodes {
            node.apply(&mut spec["linux"], who);
        }
        for (outside, inside) in &self.interfaces {
            entry(&mut spec["linux"], "netDevices", || json!({}))[outside] =
                json!({ "name": inside });
        }
        for hook in &self.hooks {
            let mut value = json!({ "path": hook.path, "args": hook.args, "env": hook.env });
            if let Some(seconds) = hook.timeout {
                value["timeout"] = json!(seconds);
            }
            push(entry(spec, "hooks", || json!({})), &hook.when, value);
        }
        if let Some(rdt) = &self.rdt {
            spec["linux"]["intelRdt"] = rdt.clone();
        }
        for group in &self.groups {
            let user = &mut spec["process"]["user"];
            let known =
                user["additionalGids"].as_array().is_some_and(|all| all.contains(&json!(group)));
            if *group != 0 && !known {
                push(user, "additionalGids", json!(group));
            }
        }
    }
}

/// Takes the place of a variable of the same name, or goes to the end.
fn set_variable(process: &mut Value, variable: &str) {
    let name = variable.split('=').next().unwrap_or_default();
    let same = |v: &Value| {
        v.as_str().and_then(|v| v.strip_prefix(name)).is_some_and(|rest| rest.starts_with('='))
    };
    let old = process["env"].as_array_mut().and_then(|all| all.iter_mut().rev().find(|v| same(v)));
    match old {
        Some(old) => *old = json!(variable),
        None => push(process, "env", json!(variable)),
    }
}

impl DeviceNode {
    fn apply(&self, linux: &mut Value, who: &Identity) {
        let mut device = json!({ "path": self.path, "type": self.kind, "major": self.major, "minor": self.minor });
        let own = |id: u32| (id != 0).then_some(id);
        for (key, value) in [
            ("fileMode", self.mode),
            ("uid", self.uid.or(own(who.uid))),
            ("gid", self.gid.or(own(who.gid))),
        ] {
            if let Some(value) = value {
                device[key] = json!(value);
            }
        }
        if let Some(all) = linux["devices"].as_array_mut() {
            all.retain(|d| d["path"] != self.path.as_str());
        }
        push(linux, "devices", device);
        if self.kind == "b" || self.kind == "c" {
            let rule = json!({ "allow": true, "type": self.kind, "major": self.major, "minor": self.minor, "access": self.access });
            push(entry(linux, "resources", || json!({})), "devices", rule);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_change_goes_where_the_runtime_looks_for_it() {
        let null = DeviceNode {
            path: "/dev/n".into(),
            kind: "c".into(),
            major: 1,
            minor: 3,
            access: "rw".into(),
            ..Default::default()
        };
        let edits = Edits {
            env: vec!["A=2".into(), "AB=3".into()],
            nodes: vec![
                DeviceNode { mode: Some(0o600), ..null.clone() },
                DeviceNode { gid: Some(7), ..null.clone() },
                DeviceNode { path: "/p".into(), kind: "p".into(), major: 0, minor: 0, ..null },
            ],
            interfaces: vec![("ib0".into(), "eth9".into())],
            hooks: vec![Hook {
                when: "createContainer".into(),
                path: "/h".into(),
                timeout: Some(5),
                ..Default::default()
            }],
            rdt: Some(json!({ "closID": "x" })),
            groups: vec![0, 44, 5, 44],
            mounts: vec![],
        };
        let mut spec = json!({
            "process": { "env": ["A=1", "B=1"], "user": { "uid": 9, "additionalGids": [5] } },
            "linux": { "resources": { "devices": [{ "allow": false }] } },
        });
        edits.apply(&mut spec, &Identity { uid: 9, gid: 8, ..Default::default() });
        let rule = json!({ "allow": true, "type": "c", "major": 1, "minor": 3, "access": "rw" });
        let expected = json!({
            "process": { "env": ["A=2", "B=1", "AB=3"], "user": { "uid": 9, "additionalGids": [5, 44] } },
            "linux": {
                "resources": { "devices": [{ "allow": false }, rule, rule] },
                "devices": [
                    { "path": "/dev/n", "type": "c", "major": 1, "minor": 3, "uid": 9, "gid": 7 },
                    { "path": "/p", "type": "p", "major": 0, "minor": 0, "uid": 9, "gid": 8 },
                ],
                "netDevices": { "ib0": { "name": "eth9" } },
                "intelRdt": { "closID": "x" },
            },
            "hooks": { "createContainer": [{ "path": "/h", "args": [], "env": [], "timeout": 5 }] },
        });
        assert_eq!(spec, expected);
    }
}
