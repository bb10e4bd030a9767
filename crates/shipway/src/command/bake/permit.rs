//! What a definition asks for that was not granted (row `bx.bake.entitlements`).

use std::{
    collections::BTreeSet,
    path::{Component, Path, PathBuf},
};

use shipway_bake::Devices;
use shipway_fault::{Fault, Result};
use shipway_gocompat::parse_bool;
use shipway_oci::NetworkName;

use super::plan::Planned;
use crate::command::build::is_remote;

/// Refuses what was not allowed, and says which flags would allow it.
pub(super) fn check(planned: &Planned) -> Result<()> {
    let flag = |name: &str| match std::env::var(name) {
        Ok(text) => parse_bool(&text)
            .map(Some)
            .ok_or_else(|| Fault::invalid(format!("failed to parse {name} value {text:?}"))),
        Err(_) => Ok(None),
    };
    let limits_files = match flag("BUILDX_BAKE_ENTITLEMENTS_FS")? {
        Some(limits) => limits,
        None if planned.is_remote => flag("BAKE_ALLOW_REMOTE_FS_ACCESS")? != Some(true),
        None => true,
    };
    let (mut asked, mut flags) = (Vec::new(), Vec::new());
    let mut want = |what: String, flag: String| {
        asked.push(what);
        flags.push(format!("--allow {flag}"));
    };
    let granted = &planned.granted;
    let needs = Needs::of(planned)?;
    if needs.network_host && !granted.network_host {
        want("steps with the network of the host".into(), "network.host".into());
    }
    for network in needs.networks.difference(&granted.networks) {
        want(format!("steps on the network {network}"), network.entitlement());
    }
    if needs.security_insecure && !granted.security_insecure {
        want("privileged steps".into(), "security.insecure".into());
    }
    match needs.devices.beyond(&granted.devices) {
        Devices::None => {}
        Devices::All => want("all devices".into(), "device".into()),
        Devices::Named(names) => {
            for name in names {
                want(format!("the device {name}"), format!("device={name}"));
            }
        }
    }
    if limits_files {
        if needs.ssh && !granted.ssh {
            want("the SSH agent".into(), "ssh".into());
        }
        let (read, write) =
            (beyond(&needs.read, &granted.read), beyond(&needs.write, &granted.write));
        for path in read.difference(&write) {
            want(format!("reading {}", path.display()), format!("fs.read={}", path.display()));
        }
        for path in &write {
            let (what, flag) = match read.contains(path) {
                true => ("reading and writing", "fs"),
                false => ("writing", "fs.write"),
            };
            want(format!("{what} {}", path.display()), format!("{flag}={}", path.display()));
        }
    }
    if asked.is_empty() {
        return Ok(());
    }
    let fault = Fault::invalid(format!(
        "additional privileges requested: the definition asks for {}",
        asked.join(", ")
    ));
    Err(fault.hint(format!("grant them with {}", flags.join(" "))))
}

/// What all targets ask for.
#[derive(Default)]
struct Needs {
    network_host: bool,
    networks: BTreeSet<NetworkName>,
    security_insecure: bool,
    ssh: bool,
    devices: Devices,
    read: BTreeSet<String>,
    write: BTreeSet<String>,
}

impl Needs {
    fn of(planned: &Planned) -> Result<Self> {
        let mut needs = Self::default();
        for (name, target) in &planned.plan.targets {
            for entitlement in target.entitlements.iter().flatten() {
                match entitlement.split_once('=').unwrap_or((entitlement, "")) {
                    ("network.host", _) => needs.network_host = true,
                    (name, "") if NetworkName::of_entitlement(name).is_some() => {
                        needs.networks.extend(NetworkName::of_entitlement(name));
                    }
                    ("security.insecure", _) => needs.security_insecure = true,
                    ("device", rest) => needs.devices.add(rest)?,
                    _ => {}
                }
            }
            let is_local = |c: &&String| {
                !is_remote(c) && !c.starts_with("target:") && !c.starts_with("docker-image:")
            };
            let local = |c: &String| c.strip_prefix("cwd://").unwrap_or(c).to_owned();
            needs.read.extend(target.context.iter().filter(is_local).map(local));
            // What a definition from elsewhere names is there, unless it says otherwise.
            let is_here = |c: &&String| !planned.is_remote || c.starts_with("cwd://");
            let contexts = target.contexts.values().filter(is_local).filter(is_here);
            needs.read.extend(contexts.map(local));
            if target.dockerfile_inline.is_none() {
                let file = planned.builds.get(name).and_then(|b| b.local_dockerfile());
                needs.read.extend(file);
            }
            for cache in target.cache_from.iter().flatten().filter(|c| c.kind == "local") {
                needs.read.extend(cache.attrs.get("src").cloned());
            }
            for cache in target.cache_to.iter().flatten().filter(|c| c.kind == "local") {
                needs.write.extend(cache.attrs.get("dest").cloned());
            }
            for output in target.outputs.iter().flatten() {
                if !output.dest.is_empty() && output.dest != "-" {
                    needs.write.insert(output.dest.clone());
                }
            }
            for secret in target.secrets.iter().flatten().filter(|s| !s.src.is_empty()) {
                needs.read.insert(secret.src.clone());
            }
            for ssh in target.ssh.iter().flatten() {
                needs.ssh |= ssh.paths.is_empty();
                needs.read.extend(ssh.paths.iter().cloned());
            }
        }
        Ok(needs)
    }
}

/// The paths of `wanted` that are in none of `granted`.
fn beyond(wanted: &BTreeSet<String>, granted: &[String]) -> BTreeSet<PathBuf> {
    if granted.iter().any(|g| g == "*") {
        return BTreeSet::new();
    }
    let granted: Vec<PathBuf> = granted.iter().map(|g| real(g).1).collect();
    let is_granted = |path: &PathBuf| granted.iter().any(|g| path.starts_with(g));
    // Of what does not exist yet, the directory that will hold it is what counts.
    wanted.iter().map(|w| real(w).0).filter(|path| !is_granted(path)).collect()
}

/// The part of a path that exists, without links; and the whole of it, with that part so.
fn real(path: &str) -> (PathBuf, PathBuf) {
    let whole = std::env::current_dir().unwrap_or_default().join(path);
    let mut existing = whole.as_path();
    let mut rest: Vec<Component<'_>> = Vec::new();
    loop {
        if let Ok(found) = existing.canonicalize() {
            let mut full = found.clone();
            full.extend(rest.iter().rev());
            return (found, full);
        }
        rest.extend(existing.components().next_back());
        match existing.parent() {
            Some(parent) => existing = parent,
            None => return (Path::new("/").to_owned(), whole.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_a_granted_directory_is_granted() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        std::fs::create_dir(root.join("in")).unwrap();
        std::os::unix::fs::symlink("/etc", root.join("in/link")).unwrap();
        let at = |name: &str| root.join(name).to_string_lossy().into_owned();
        let wanted = [at("in"), at("in/new/file"), at("in/link/hosts"), at("out")];
        let found = beyond(&wanted.into(), &[at("in")]);
        let names: Vec<PathBuf> = found.into_iter().collect();
        assert_eq!(names, [PathBuf::from("/etc/hosts"), root.clone()]);
        assert!(beyond(&[at("out")].into(), &["*".into()]).is_empty());
        // A grant may name what does not exist yet.
        assert!(beyond(&[at("in/new")].into(), &[at("in")]).is_empty());
    }
}
