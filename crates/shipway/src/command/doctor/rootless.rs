//! What a containerd without root needs, as `nerdctl`'s set-up tool makes one, and whether the
//! daemon works with it.

use std::path::{Path, PathBuf};

use shipway_host::doctor::{Check, Found, failed};

use super::Host;

/// Ids that a user needs for those of an image.
const IDS: u64 = 65_536;
/// The first Linux that mounts overlays in user namespaces.
const OVERLAY: (u32, u32) = (5, 11);

pub(super) fn checks(host: &Host) -> Vec<Check> {
    let mut checks = Vec::new();
    let mut add = |what, found| checks.push(Check { what, found });
    add("user namespaces", host.user_namespaces());
    add("subordinate users", host.subordinate("/etc/subuid"));
    add("subordinate groups", host.subordinate("/etc/subgid"));
    for (program, package) in
        [("newuidmap", "uidmap"), ("newgidmap", "uidmap"), ("rootlesskit", "rootlesskit")]
    {
        let found = host.program(program).map(|path| path.display().to_string());
        let found = found.ok_or_else(|| {
            failed(format!("there is no {program}")).hint(format!("apt install {package}"))
        });
        add(program, found.into());
    }
    add("overlayfs in user namespaces", overlayfs(&release()));
    add("cgroups of the user", host.delegation());
    let run = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let run = run.unwrap_or_else(|| format!("/run/user/{}", host.user.uid).into());
    add("containerd without root", host.containerd_of(&run));
    add(
        "shipwayd without root",
        Found::Missing(
            failed("it mounts, makes network namespaces and keeps files of all owners as the host's root")
                .hint("use the system's daemon: its socket's group lets a user build, with root's power"),
        ),
    );
    checks
}

fn release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

fn overlayfs(release: &str) -> Found {
    match super::version_of(release) {
        Some(version) if version < OVERLAY => Found::Missing(
            failed(format!("Linux {release} has none"))
                .hint("Linux 5.11, or containerd's snapshotter fuse-overlayfs"),
        ),
        _ => Found::Ok(format!("Linux {release}")),
    }
}

impl Host {
    fn number(&self, path: &str) -> Option<u64> {
        self.text(path)?.trim().parse().ok()
    }

    fn user_namespaces(&self) -> Found {
        let set = |key: &str, value: &str| {
            format!(
                "echo {key}={value} | sudo tee /etc/sysctl.d/99-userns.conf && sudo sysctl --system"
            )
        };
        if self.number("/proc/sys/user/max_user_namespaces") == Some(0) {
            return Found::Missing(
                failed("none may be made: user.max_user_namespaces is 0")
                    .hint(set("user.max_user_namespaces", "28633")),
            );
        }
        if !self.path("/proc/sys/user/max_user_namespaces").exists() {
            return Found::Missing(
                failed("this kernel has none").hint("a kernel with CONFIG_USER_NS"),
            );
        }
        if self.number("/proc/sys/kernel/unprivileged_userns_clone") == Some(0) {
            return Found::Missing(
                failed("only root may make them: kernel.unprivileged_userns_clone is 0")
                    .hint(set("kernel.unprivileged_userns_clone", "1")),
            );
        }
        if self.number("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == Some(1) {
            return Found::Note(
                failed("AppArmor restricts them to programs whose profile allows it")
                    .hint("a profile with `userns,` for rootlesskit in /etc/apparmor.d"),
            );
        }
        Found::Ok(String::new())
    }

    /// Whether `/etc/subuid` or `/etc/subgid` has enough ids for the user.
    fn subordinate(&self, file: &str) -> Found {
        let text = self.text(file).unwrap_or_default();
        let (name, uid) = (&self.user.name, self.user.uid.to_string());
        let ranges = text.lines().filter_map(|line| {
            let mut fields = line.split(':');
            let owner = fields.next()?;
            (owner == name || owner == uid).then(|| fields.nth(1)?.trim().parse::<u64>().ok())?
        });
        let ids = ranges.fold(0u64, u64::saturating_add);
        if ids >= IDS {
            return Found::Ok(format!("{ids} ids"));
        }
        let flag = if file.ends_with("gid") { "--add-subgids" } else { "--add-subuids" };
        Found::Missing(
            failed(format!("{name} has {ids} ids in {file}, and images need {IDS}")).hint(format!(
                "sudo usermod {flag} 100000-165535 {name}, or another range that nobody has"
            )),
        )
    }

    /// Which limits the user's service manager may set.
    fn delegation(&self) -> Found {
        const WANTED: [&str; 3] = ["cpu", "memory", "pids"];
        let uid = self.user.uid;
        let group = format!("/sys/fs/cgroup/user.slice/user-{uid}.slice/user@{uid}.service");
        let Some(controllers) = self.text(&format!("{group}/cgroup.controllers")) else {
            return Found::Note(
                failed(format!("there is no {group}: steps have no limits"))
                    .hint("cgroup version 2, and a session of systemd (loginctl enable-linger)"),
            );
        };
        let has = |name: &&str| controllers.split_whitespace().any(|word| word == *name);
        let missing: Vec<&str> = WANTED.into_iter().filter(|name| !has(name)).collect();
        if missing.is_empty() {
            return Found::Ok(controllers.trim().to_owned());
        }
        Found::Note(failed(format!("without {}", missing.join(", "))).hint(
            "Delegate=cpu cpuset io memory pids in /etc/systemd/system/user@.service.d/delegate.conf",
        ))
    }

    /// The containerd that nerdctl's tool sets up, whose namespaces are those of a process.
    fn containerd_of(&self, run: &Path) -> Found {
        let file = run.join("containerd-rootless/child_pid");
        let pid = std::fs::read_to_string(self.path(&file)).ok();
        let pid = pid.and_then(|text| text.trim().parse::<u32>().ok());
        match pid {
            Some(pid) if self.path(format!("/proc/{pid}")).is_dir() => {
                Found::Ok(format!("in the namespaces of process {pid}"))
            }
            Some(pid) => Found::Missing(
                failed(format!("process {pid} of {} is gone", file.display()))
                    .hint("systemctl --user start containerd"),
            ),
            None => Found::Missing(
                failed(format!("there is no {}", file.display()))
                    .hint("containerd-rootless-setuptool.sh install, which comes with nerdctl"),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::host, *};

    #[test]
    fn old_kernels_have_no_overlays_for_users() {
        assert_eq!(overlayfs("5.10.0-30-amd64").said().0, "missing");
        assert_eq!(overlayfs("5.11.0").said().0, "ok");
        assert_eq!(overlayfs("6.1.0-9-amd64").said().0, "ok");
    }

    #[test]
    fn user_namespaces_may_be_forbidden_in_three_ways() {
        const MAX: &str = "/proc/sys/user/max_user_namespaces";
        for (files, word, says) in [
            (&[(MAX, "100\n")][..], "ok", ""),
            (&[], "missing", "this kernel has none"),
            (&[(MAX, "0\n")], "missing", "max_user_namespaces"),
            (
                &[(MAX, "9"), ("/proc/sys/kernel/unprivileged_userns_clone", "0\n")],
                "missing",
                "unprivileged_userns_clone",
            ),
            (
                &[(MAX, "9"), ("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1")],
                "note",
                "AppArmor",
            ),
        ] {
            let (found, said) = host(files).1.user_namespaces().said();
            assert!(found == word && said.contains(says), "{files:?}: {found} {said}");
        }
    }

    #[test]
    fn ids_are_those_of_the_user_by_name_or_number() {
        for (text, word) in [
            ("ann:100000:65536\n", "ok"),
            ("1000:100000:65536\n", "ok"),
            ("ann:1:30000\nbob:1:65536\nann:100000:35536\n", "ok"),
            ("bob:100000:65536\n", "missing"),
            ("ann:100000:1000\nann:broken\n", "missing"),
            ("", "missing"),
        ] {
            let found = host(&[("/etc/subuid", text)]).1.subordinate("/etc/subuid");
            assert_eq!(found.said().0, word, "{text:?} {found:?}");
        }
    }

    #[test]
    fn limits_are_what_is_delegated() {
        const AT: &str =
            "/sys/fs/cgroup/user.slice/user-1000.slice/user@1000.service/cgroup.controllers";
        for (files, word, says) in [
            (&[(AT, "cpuset cpu io memory pids\n")][..], "ok", "cpuset"),
            (&[(AT, "memory pids\n")], "note", "without cpu"),
            (&[], "note", "no limits"),
        ] {
            let (found, said) = host(files).1.delegation().said();
            assert!(found == word && said.contains(says), "{files:?}: {found} {said}");
        }
    }

    #[test]
    fn a_containerd_without_root_is_a_process() {
        const AT: &str = "/run/user/1000/containerd-rootless/child_pid";
        let run = Path::new("/run/user/1000");
        let (dir, host) = host(&[(AT, "77\n")]);
        assert_eq!(host.containerd_of(run).said().0, "missing");
        std::fs::create_dir_all(dir.path().join("proc/77")).unwrap();
        assert_eq!(host.containerd_of(run).said().0, "ok");
        assert!(host.containerd_of(Path::new("/run/user/7")).said().1.contains("child_pid"));
    }
}
