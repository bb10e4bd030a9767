//! The key of a process and what it reads of its inputs (rows `exec.key`, `exec.mnt.contentcache`).

use crate::{content::ContentSelector, key::KeyWriter};
use shipway_fault::{Fault, Result};
use shipway_gocompat::path::rooted;
use shipway_llb::{ContentCache, ExecOp, Mount, MountKind, Vertex};
use shipway_oci::Digest;
use shipway_solver::{CacheMap, InputMap};

/// A mount whose cache id is what a Dockerfile gives by default keeps its id in the key, for the
/// sake of caches made before ids were left out.
fn is_default_cache_id(id: &str, mount: &Mount) -> bool {
    id == mount.dest || id.split_once('/').is_some_and(|(_, rest)| rest == mount.dest)
}

fn write_mount(key: &mut KeyWriter, mount: &Mount) {
    key.text("mount", &mount.dest)
        .value("input", mount.input)
        .value("output", mount.output)
        .flag("readonly", mount.readonly)
        .value("content", mount.content_cache)
        .text("result", &mount.result_id);
    match &mount.kind {
        MountKind::Bind => key.flag("bind", true),
        MountKind::Secret(s) => {
            key.text("secret", &s.id).value("owner", (s.uid, s.gid, s.mode, s.optional))
        }
        MountKind::Ssh(s) => {
            key.text("ssh", &s.id).value("owner", (s.uid, s.gid, s.mode, s.optional))
        }
        MountKind::Cache(c)
            if is_default_cache_id(&c.id, mount) && c.sharing == Default::default() =>
        {
            key.text("cache", &c.id)
        }
        MountKind::Cache(_) => key.flag("cache", true),
        MountKind::Tmpfs { size } => key.value("tmpfs", size),
    };
}

fn is_plain_root(mounts: &[Mount]) -> bool {
    matches!(mounts, [m] if m.dest == "/" && !m.readonly && m.kind == MountKind::Bind && m.result_id.is_empty())
}

/// The operation's own key: everything but proxies, addresses of hosts, selectors, ids of caches,
/// and values of secrets.
pub(super) fn own_key(exec: &ExecOp, vertex: &Vertex) -> KeyWriter {
    let meta = &exec.meta;
    let mut key = KeyWriter::new("shipway.exec.v1");
    key.list("args", &meta.args)
        .variables("env", &meta.env)
        .text("cwd", &meta.cwd)
        .text("user", &meta.user)
        .text("hostname", &meta.hostname)
        .text("cgroup", &meta.cgroup_parent)
        .flag("stubs", meta.remove_mount_stubs_recursive)
        .value("exits", &meta.valid_exit_codes)
        .value("network", exec.network)
        .value("security", exec.security);
    for host in &meta.extra_hosts {
        key.text("host", &host.host);
    }
    for limit in &meta.ulimits {
        key.text("ulimit", &limit.name).value("limits", (limit.soft, limit.hard));
    }
    for secret in &exec.secret_env {
        key.text("secret", &secret.id)
            .text("variable", &secret.name)
            .flag("optional", secret.optional);
    }
    for device in &exec.devices {
        key.text("device", &device.name).flag("optional", device.optional);
    }
    if exec.proxied {
        key.flag("proxied", true);
    }
    if let Some(name) = &exec.named_network {
        key.text("network.name", name.as_str());
    }
    if !is_plain_root(&exec.mounts) {
        for mount in &exec.mounts {
            key.part(&format!("mount {}", mount.dest), |key| write_mount(key, mount));
        }
    }
    key.text("platform", &vertex.platform.to_string())
        .text("os.version", &vertex.platform.os_version);
    key
}

/// What one input is used for.
#[derive(Default)]
struct Use {
    paths: Vec<String>,
    content: bool,
}

fn uses(exec: &ExecOp, inputs: usize) -> Result<Vec<Use>> {
    let mut all: Vec<Use> = std::iter::repeat_with(Use::default).take(inputs).collect();
    for mount in
        exec.mounts.iter().filter(|m| matches!(m.kind, MountKind::Bind | MountKind::Cache(_)))
    {
        let Some(used) = mount.input.and_then(|i| all.get_mut(i)) else { continue };
        let path = rooted(&mount.selector);
        // Otherwise a step could be served a result that lacks a file of this input which it never
        // selected but passes on.
        let safe = mount.output.is_none() || mount.readonly || path == "/";
        used.content = match mount.content_cache {
            ContentCache::Off => false,
            ContentCache::On if !safe => {
                return Err(Fault::invalid(format!(
                    "invalid mount cache content: the writable mount {} passes on what it does not select",
                    mount.dest
                )));
            }
            ContentCache::On => true,
            ContentCache::Default => safe && mount.dest != "/",
        };
        used.paths.push(path);
    }
    Ok(all)
}

/// What the result depends on.
pub(crate) fn cache_map(exec: &ExecOp, vertex: &Vertex) -> Result<CacheMap> {
    let inputs = uses(exec, vertex.inputs.len())?
        .into_iter()
        .map(|used| InputMap {
            selector: (!used.paths.is_empty())
                .then(|| Digest::of(used.paths.join("\0").as_bytes())),
            content: used.content,
        })
        .collect();
    Ok(own_key(exec, vertex).map(inputs))
}

/// The parts of input number `input` that the process sees.
pub(crate) fn selectors(exec: &ExecOp, input: usize) -> Option<Vec<ContentSelector>> {
    let used = uses(exec, input + 1).ok()?.pop()?;
    if !used.content {
        return None;
    }
    if used.paths.iter().any(|p| p == "/") {
        return Some(vec![ContentSelector::path("/")]);
    }
    let mut paths = used.paths;
    paths.sort();
    paths.dedup();
    Some(paths.into_iter().map(ContentSelector::path).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use shipway_llb::{CacheMount, HostIp, Op, ProxyEnv};
    use shipway_oci::Platform;

    fn base() -> ExecOp {
        let root =
            Mount { input: Some(0), output: Some(0), dest: "/".into(), ..Default::default() };
        let mut exec = ExecOp { mounts: vec![root], ..Default::default() };
        exec.meta.args = vec!["true".into()];
        exec
    }

    fn vertex(exec: &ExecOp) -> Vertex {
        Vertex {
            digest: Digest::of("v"),
            bytes: Default::default(),
            op: Op::Exec(exec.clone()),
            inputs: vec![],
            platform: Platform::new("linux", "amd64", ""),
            constraints: vec![],
            name: String::new(),
            metadata: Default::default(),
        }
    }

    #[track_caller]
    fn check(change: impl FnOnce(&mut ExecOp), same: bool) {
        let mut changed = base();
        change(&mut changed);
        assert_eq!(
            own_key(&base(), &vertex(&base())).digest()
                == own_key(&changed, &vertex(&changed)).digest(),
            same,
            "{changed:?}"
        );
    }

    #[test]
    fn what_does_not_matter_is_not_in_the_key() {
        check(|e| e.meta.proxy = Some(ProxyEnv { http: "x".into(), ..Default::default() }), true);
        check(|e| e.mounts[0].selector = "/x".into(), true);
        check(|e| e.meta.args.push("x".into()), false);
        check(|e| e.meta.env.push("A=b".into()), false);
        check(|e| e.mounts[0].readonly = true, false);
        check(|e| e.proxied = true, false);
        check(|e| e.meta.extra_hosts = vec![HostIp { host: "h".into(), ip: "1".into() }], false);
    }

    #[test]
    fn ids_of_caches_matter_only_when_they_are_the_default() {
        let with = |id: &str| {
            let mut exec = base();
            let kind = MountKind::Cache(CacheMount { id: id.into(), sharing: Default::default() });
            exec.mounts.push(Mount { dest: "/c".into(), kind, ..Default::default() });
            own_key(&exec, &vertex(&exec)).digest()
        };
        assert_eq!(with("a"), with("b"));
        assert_ne!(with("a"), with("/c"));
    }

    #[test]
    fn content_is_hashed_only_where_it_is_safe() {
        for (selector, output, readonly, dest, expected) in [
            ("", Some(0), false, "/", false),
            ("", Some(1), false, "/m", true),
            ("/a", Some(1), false, "/m", false),
            ("/a", Some(1), true, "/m", true),
            ("/a", None, false, "/m", true),
        ] {
            let mut exec = base();
            exec.mounts = vec![Mount {
                input: Some(0),
                output,
                selector: selector.into(),
                dest: dest.into(),
                readonly,
                ..Default::default()
            }];
            assert_eq!(
                selectors(&exec, 0).is_some(),
                expected,
                "{selector} {output:?} {readonly} {dest}"
            );
        }
    }
}
