//! Operations as JSON, in the form that BuildKit's provenance has them (row `at.prov.buildcfg`):
//! field names are the wire's, defaults are left out, enumerations are numbers and bytes are
//! base64. Alternatives stand under a name of their own: `Op`, `Action`, `User`.

use crate::{Definition, decode, definition::Location};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::{Map, Value, json};
use shipway_fault::{Fault, Position};
use shipway_oci::Digest;
use shipway_proto::pb;
use std::collections::{BTreeMap, HashMap, HashSet};

/// An operation with what it needs, by position in the list that it came in.
#[derive(Clone, Debug, PartialEq)]
pub struct JsonOp {
    /// Digest of the operation.
    pub digest: Digest,
    /// The operation without its inputs.
    pub op: Value,
    /// Positions of its inputs, with the output of each.
    pub inputs: Vec<(usize, i64)>,
}

/// An object that leaves defaults out.
#[derive(Default)]
struct Object(Map<String, Value>);

impl Object {
    fn put(mut self, key: &str, value: impl Into<Value>) -> Self {
        let value = value.into();
        let empty = match &value {
            Value::Null => true,
            Value::Bool(b) => !b,
            Value::Number(n) => n.as_i64() == Some(0),
            Value::String(s) => s.is_empty(),
            Value::Array(a) => a.is_empty(),
            Value::Object(_) => false,
        };
        if !empty {
            self.0.insert(key.into(), value);
        }
        self
    }

    fn map(self, key: &str, map: &BTreeMap<String, String>) -> Self {
        if map.is_empty() { self } else { self.put(key, json!(map)) }
    }

    fn done(self) -> Value {
        Value::Object(self.0)
    }
}

fn object() -> Object {
    Object::default()
}

fn exec(e: &pb::ExecOp) -> Value {
    let mounts: Vec<Value> = e.mounts.iter().map(mount).collect();
    let secret = |s: &pb::SecretEnv| {
        object()
            .put("ID", s.id.clone())
            .put("name", s.name.clone())
            .put("optional", s.optional)
            .done()
    };
    let device =
        |d: &pb::CdiDevice| object().put("name", d.name.clone()).put("optional", d.optional).done();
    object()
        .put("meta", e.meta.as_ref().map(meta))
        .put("mounts", mounts)
        .put("network", e.network)
        .put("security", e.security)
        .put("secretenv", e.secretenv.iter().map(secret).collect::<Vec<_>>())
        .put("cdiDevices", e.cdi_devices.iter().map(device).collect::<Vec<_>>())
        .done()
}

fn meta(m: &pb::Meta) -> Value {
    let proxy = |p: &pb::ProxyEnv| {
        object()
            .put("http_proxy", p.http_proxy.clone())
            .put("https_proxy", p.https_proxy.clone())
            .put("ftp_proxy", p.ftp_proxy.clone())
            .put("no_proxy", p.no_proxy.clone())
            .put("all_proxy", p.all_proxy.clone())
            .done()
    };
    let host = |h: &pb::HostIp| object().put("Host", h.host.clone()).put("IP", h.ip.clone()).done();
    let limit = |u: &pb::Ulimit| {
        object().put("Name", u.name.clone()).put("Soft", u.soft).put("Hard", u.hard).done()
    };
    object()
        .put("args", m.args.clone())
        .put("env", m.env.clone())
        .put("cwd", m.cwd.clone())
        .put("user", m.user.clone())
        .put("proxy_env", m.proxy_env.as_ref().map(proxy))
        .put("extraHosts", m.extra_hosts.iter().map(host).collect::<Vec<_>>())
        .put("hostname", m.hostname.clone())
        .put("ulimit", m.ulimit.iter().map(limit).collect::<Vec<_>>())
        .put("cgroupParent", m.cgroup_parent.clone())
        .put("removeMountStubsRecursive", m.remove_mount_stubs_recursive)
        .put("validExitCodes", m.valid_exit_codes.clone())
        .done()
}

fn mount(m: &pb::Mount) -> Value {
    let secret = |s: &pb::SecretOpt| {
        let out = object().put("ID", s.id.clone()).put("uid", s.uid).put("gid", s.gid);
        out.put("mode", s.mode).put("optional", s.optional).done()
    };
    let ssh = |s: &pb::SshOpt| {
        let out = object().put("ID", s.id.clone()).put("uid", s.uid).put("gid", s.gid);
        out.put("mode", s.mode).put("optional", s.optional).done()
    };
    object()
        .put("input", m.input)
        .put("selector", m.selector.clone())
        .put("dest", m.dest.clone())
        .put("output", m.output)
        .put("readonly", m.readonly)
        .put("mountType", m.mount_type)
        .put("TmpfsOpt", m.tmpfs_opt.as_ref().map(|t| object().put("size", t.size).done()))
        .put(
            "cacheOpt",
            m.cache_opt
                .as_ref()
                .map(|c| object().put("ID", c.id.clone()).put("sharing", c.sharing).done()),
        )
        .put("secretOpt", m.secret_opt.as_ref().map(secret))
        .put("SSHOpt", m.ssh_opt.as_ref().map(ssh))
        .put("resultID", m.result_id.clone())
        .put("contentCache", m.content_cache)
        .done()
}

fn source(s: &pb::SourceOp) -> Value {
    // Which client and which transfer it was means nothing later.
    let attrs =
        s.attrs.iter().filter(|(k, _)| !["local.session", "local.unique"].contains(&k.as_str()));
    let attrs = attrs.map(|(k, v)| (k.clone(), v.clone())).collect();
    object().put("identifier", s.identifier.clone()).map("attrs", &attrs).done()
}

fn owner(o: &pb::ChownOpt) -> Value {
    use pb::user_opt::User;
    let user = |u: &pb::UserOpt| {
        let inner = match &u.user {
            Some(User::ByName(n)) => object()
                .put("byName", object().put("name", n.name.clone()).put("input", n.input).done()),
            Some(User::ById(id)) => object().put("byId", *id),
            None => object(),
        };
        json!({ "User": inner.done() })
    };
    object().put("user", o.user.as_ref().map(user)).put("group", o.group.as_ref().map(user)).done()
}

fn action(a: &pb::FileAction) -> Value {
    use pb::file_action::Action;
    let (name, kind) = match &a.action {
        Some(Action::Copy(c)) => ("copy", copy(c)),
        Some(Action::Mkfile(m)) => {
            let out = object()
                .put("path", m.path.clone())
                .put("mode", m.mode)
                .put("data", BASE64_STANDARD.encode(&m.data));
            (
                "mkfile",
                out.put("owner", m.owner.as_ref().map(owner)).put("timestamp", m.timestamp).done(),
            )
        }
        Some(Action::Mkdir(m)) => {
            let out = object()
                .put("path", m.path.clone())
                .put("mode", m.mode)
                .put("makeParents", m.make_parents);
            (
                "mkdir",
                out.put("owner", m.owner.as_ref().map(owner)).put("timestamp", m.timestamp).done(),
            )
        }
        Some(Action::Rm(r)) => {
            let out = object().put("path", r.path.clone()).put("allowNotFound", r.allow_not_found);
            ("rm", out.put("allowWildcard", r.allow_wildcard).done())
        }
        Some(Action::Symlink(s)) => {
            let out = object().put("oldpath", s.oldpath.clone()).put("newpath", s.newpath.clone());
            (
                "symlink",
                out.put("owner", s.owner.as_ref().map(owner)).put("timestamp", s.timestamp).done(),
            )
        }
        None => ("", Value::Null),
    };
    json!({ "input": a.input, "secondaryInput": a.secondary_input, "output": a.output, "Action": object().put(name, kind).done() })
}

fn copy(c: &pb::FileActionCopy) -> Value {
    object()
        .put("src", c.src.clone())
        .put("dest", c.dest.clone())
        .put("owner", c.owner.as_ref().map(owner))
        .put("mode", c.mode)
        .put("followSymlink", c.follow_symlink)
        .put("dirCopyContents", c.dir_copy_contents)
        .put("attemptUnpackDockerCompatibility", c.attempt_unpack_docker_compatibility)
        .put("createDestPath", c.create_dest_path)
        .put("allowWildcard", c.allow_wildcard)
        .put("allowEmptyWildcard", c.allow_empty_wildcard)
        .put("timestamp", c.timestamp)
        .put("include_patterns", c.include_patterns.clone())
        .put("exclude_patterns", c.exclude_patterns.clone())
        .put("alwaysReplaceExistingDestPaths", c.always_replace_existing_dest_paths)
        .put("modeStr", c.mode_str.clone())
        .put("required_paths", c.required_paths.clone())
        .done()
}

fn op(o: &pb::Op) -> Value {
    use pb::op::Op;
    let input = |i: i64| object().put("input", i).done();
    let (name, kind) = match &o.op {
        Some(Op::Exec(e)) => ("exec", exec(e)),
        Some(Op::Source(s)) => ("source", source(s)),
        Some(Op::File(f)) => (
            "file",
            object().put("actions", f.actions.iter().map(action).collect::<Vec<_>>()).done(),
        ),
        Some(Op::Build(b)) => {
            let inputs: Map<String, Value> =
                b.inputs.iter().map(|(k, i)| (k.clone(), input(i.input))).collect();
            let out = object().put("builder", b.builder).map("attrs", &b.attrs);
            (
                "build",
                if inputs.is_empty() {
                    out.done()
                } else {
                    out.put("inputs", Value::Object(inputs)).done()
                },
            )
        }
        Some(Op::Merge(m)) => (
            "merge",
            object()
                .put("inputs", m.inputs.iter().map(|i| input(i.input)).collect::<Vec<_>>())
                .done(),
        ),
        Some(Op::Diff(d)) => {
            let lower = d.lower.as_ref().map(|l| input(l.input));
            (
                "diff",
                object()
                    .put("lower", lower)
                    .put("upper", d.upper.as_ref().map(|u| input(u.input)))
                    .done(),
            )
        }
        Some(Op::Passthrough(p)) => (
            "passthrough",
            object().put("id", p.id.clone()).put("outputs", p.outputs.clone()).done(),
        ),
        None => ("", Value::Null),
    };
    let platform = |p: &pb::Platform| {
        object()
            .put("Architecture", p.architecture.clone())
            .put("OS", p.os.clone())
            .put("Variant", p.variant.clone())
            .put("OSVersion", p.os_version.clone())
            .put("OSFeatures", p.os_features.clone())
            .done()
    };
    object()
        .put("Op", object().put(name, kind).done())
        .put("platform", o.platform.as_ref().map(platform))
        .put(
            "constraints",
            o.constraints.as_ref().map(|c| object().put("filter", c.filter.clone()).done()),
        )
        .done()
}

/// The operations of a definition, inputs before those that need them, the terminal one last. An
/// empty definition has none.
pub fn operations(definition: &Definition) -> Result<Vec<JsonOp>, Fault> {
    let Some(last) = definition.ops.last() else { return Ok(Vec::new()) };
    let mut raw = HashMap::new();
    for bytes in &definition.ops {
        raw.insert(Digest::of(bytes), decode::raw(bytes)?);
    }
    // Depth first without recursion: a digest is left when all its inputs are placed.
    let (mut placed, mut order, mut seen) = (HashMap::new(), Vec::new(), HashSet::new());
    let mut stack = vec![(Digest::of(last), false)];
    while let Some((digest, entered)) = stack.pop() {
        let known = raw
            .get(&digest)
            .ok_or_else(|| Fault::invalid(format!("failed to find input {digest}")))?;
        if entered {
            placed.insert(digest, order.len());
            order.push(digest);
        } else if seen.insert(digest) {
            stack.push((digest, true));
            for input in known.inputs.iter().rev() {
                let input: Digest = input.digest.parse().map_err(|_| {
                    Fault::invalid(format!("failed to find input {}", input.digest))
                })?;
                if !seen.contains(&input) {
                    stack.push((input, false));
                }
            }
        }
    }
    let one = |digest: &Digest| {
        let known = &raw[digest];
        let position =
            |i: &pb::Input| i.digest.parse().ok().and_then(|d: Digest| placed.get(&d).copied());
        let inputs = known.inputs.iter().filter_map(|i| Some((position(i)?, i.index))).collect();
        JsonOp { digest: *digest, op: op(known), inputs }
    };
    Ok(order.iter().map(one).collect())
}

/// Places as JSON.
pub fn locations(places: &[Location]) -> Value {
    let position = |p: &Position| object().put("line", p.line).put("character", p.character).done();
    let one = |l: &Location| {
        let ranges: Vec<Value> = l
            .spans
            .iter()
            .map(|s| json!({ "start": position(&s.start), "end": position(&s.end) }))
            .collect();
        object().put("sourceIndex", l.file).put("ranges", ranges).done()
    };
    object().put("locations", places.iter().map(one).collect::<Vec<_>>()).done()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encode;

    #[test]
    fn operations_come_after_their_inputs_and_without_defaults() {
        let attrs = BTreeMap::from([
            ("local.session".to_owned(), "x".to_owned()),
            ("a".to_owned(), String::new()),
        ]);
        let source = pb::Op {
            op: Some(pb::op::Op::Source(pb::SourceOp { identifier: "local://c".into(), attrs })),
            ..Default::default()
        };
        let source = encode::raw(source);
        let input = |bytes: &[u8]| pb::Input { digest: Digest::of(bytes).to_string(), index: 0 };
        let meta = pb::Meta { args: vec!["a".into()], cwd: "/".into(), ..Default::default() };
        let exec = pb::Op {
            inputs: vec![input(&source)],
            op: Some(pb::op::Op::Exec(pb::ExecOp {
                meta: Some(meta),
                network: 2,
                ..Default::default()
            })),
            ..Default::default()
        };
        let exec = encode::raw(exec);
        let terminal = encode::raw(pb::Op { inputs: vec![input(&exec)], ..Default::default() });
        let definition = Definition { ops: vec![exec, source, terminal], ..Definition::default() };
        let got = operations(&definition).unwrap();
        assert_eq!(
            got.iter().map(|o| o.inputs.clone()).collect::<Vec<_>>(),
            [vec![], vec![(0, 0)], vec![(1, 0)]]
        );
        assert_eq!(
            got[0].op,
            json!({ "Op": { "source": { "identifier": "local://c", "attrs": { "a": "" } } } })
        );
        assert_eq!(
            got[1].op,
            json!({ "Op": { "exec": { "meta": { "args": ["a"], "cwd": "/" }, "network": 2 } } })
        );
        assert_eq!(got[2].op, json!({ "Op": {} }));
        assert!(operations(&Definition::default()).unwrap().is_empty());
    }
}
