//! Configuration files of the lab's programs.

use super::Flavour;
use std::path::Path;

/// containerd with everything below `dir` and nothing that two daemons of one machine would fight
/// over; with CRI if there is an image for its sandboxes.
pub(super) fn containerd(dir: &Path, flavour: Flavour, sandbox: Option<&str>) -> String {
    let cri = sandbox.map(|image| cri(dir, flavour, image)).unwrap_or_default();
    let dir = dir.display();
    let version = if flavour == Flavour::Newer { 3 } else { 2 };
    let mut disabled = vec!["snapshotter.v1.devmapper", "snapshotter.v1.zfs"];
    if flavour == Flavour::Newer {
        disabled.extend(["nri.v1.nri", "snapshotter.v1.blockfile"]);
    }
    if cri.is_empty() {
        disabled.push("grpc.v1.cri");
        if flavour == Flavour::Newer {
            disabled.extend(["cri.v1.images", "cri.v1.runtime"]);
        }
    }
    let disabled: Vec<String> =
        disabled.iter().map(|name| format!("\"io.containerd.{name}\"")).collect();
    let disabled = disabled.join(", ");
    format!(
        r#"version = {version}
root = "{dir}/containerd-root"
state = "{dir}/containerd-state"
disabled_plugins = [{disabled}]

[grpc]
  address = "{dir}/containerd.sock"

[ttrpc]
  address = "{dir}/containerd.sock.ttrpc"

[plugins."io.containerd.internal.v1.opt"]
  path = "{dir}/opt"
{cri}"#
    )
}

/// CRI for pods in the host's network: no CNI configuration is there, nor looked for outside the
/// lab. A virtual machine may not let processes be made less likely to be killed for memory, so CRI
/// is told not to try.
fn cri(dir: &Path, flavour: Flavour, sandbox: &str) -> String {
    let dir = dir.display();
    match flavour {
        Flavour::System | Flavour::Between => format!(
            "\n[plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image = \"{sandbox}\"\n  restrict_oom_score_adj = true\n\
             [plugins.\"io.containerd.grpc.v1.cri\".cni]\n  conf_dir = \"{dir}/cni\"\n"
        ),
        Flavour::Newer => format!(
            "\n[plugins.\"io.containerd.cri.v1.images\".pinned_images]\n  sandbox = \"{sandbox}\"\n\
             [plugins.\"io.containerd.cri.v1.runtime\"]\n  restrict_oom_score_adj = true\n\
             [plugins.\"io.containerd.cri.v1.runtime\".cni]\n  conf_dir = \"{dir}/cni\"\n"
        ),
    }
}

/// The snapshotter with everything below `dir`, whatever else is on the disk.
pub(super) fn snapshotter(dir: &Path, more: &str, lazy: &str) -> String {
    let dir = dir.display();
    format!(
        "root = \"{dir}/snapshotter\"\naddress = \"{dir}/snapshotter.sock\"\nstatus_address = \"{dir}/snapshotter-status.sock\"\n\
         control_address = \"{dir}/snapshotter-control.sock\"\n{more}\n\
         [lazy]\n  run = \"{dir}/run\"\n  keeper_address = \"{dir}/run/keeper.sock\"\n  min_free_percent = 0\n{lazy}\n\
         [registry]\n  config_path = \"{dir}/certs.d\"\n  docker_config = \"{dir}/docker.json\"\n\n\
         [cri]\n  address = \"{dir}/snapshotter-cri.sock\"\n  containerd = \"{dir}/containerd.sock\"\n\n\
         [log]\n  level = \"debug\"\n"
    )
}

/// A registry on loopback that also deletes.
pub(super) fn registry(dir: &Path, port: u16) -> String {
    format!(
        "version: 0.1\nlog:\n  level: warn\nstorage:\n  filesystem:\n    rootdirectory: {}/registry\n  delete:\n    enabled: true\n\
         http:\n  addr: 127.0.0.1:{port}\n",
        dir.display()
    )
}

/// The daemon on the lab's containerd, with the lab's registry as the mirror of `docker.io`.
pub(super) fn shipwayd(
    dir: &Path,
    namespace: &str,
    registry: Option<&str>,
    worker: &str,
    more: &str,
) -> String {
    let dir = dir.display();
    let registries = registry.map_or(String::new(), |registry| {
        format!("[registry.\"docker.io\"]\n  mirrors = [\"{registry}\"]\n\n[registry.\"{registry}\"]\n  http = true\n\n")
    });
    format!(
        r#"root = "{dir}/shipwayd"
insecure-entitlements = ["network.host", "security.insecure"]

[grpc]
  address = ["unix://{dir}/shipwayd.sock"]

[worker.containerd]
  address = "{dir}/containerd.sock"
  namespace = "{namespace}"
{worker}
{registries}{more}"#
    )
}
