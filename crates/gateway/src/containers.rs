//! Containers of a build, by the names that the client gives them (rows `gw.ctr.*`, `gw.ctr.fs`).

use crate::{build::GatewayBuild, convert, service::bounded_file};
use shipway_fault::{Fault, Result};
use shipway_frontend::{Container, ContainerMount, ContainerRequest};
use shipway_llb::{HostIp, Mount, NetMode};
use shipway_proto::moby::buildkit::v1::frontend as wire;
use std::{net::IpAddr, sync::Arc};

/// PATH of processes in containers for Linux, and for Windows.
pub(crate) const DEFAULT_PATHS: [&str; 2] = [
    "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "c:\\Windows\\System32;c:\\Windows;C:\\Windows\\System32\\WindowsPowerShell\\v1.0",
];

/// A container and what is known of its processes.
pub(crate) struct HeldContainer {
    pub(crate) container: Arc<dyn Container>,
    pub(crate) path: &'static str,
    /// Whether its first process was asked for.
    pub(crate) started: bool,
}

/// Makes a container and remembers it under its name.
pub(crate) async fn new(build: &GatewayBuild, request: wire::NewContainerRequest) -> Result<()> {
    let mut mounts = Vec::new();
    for mount in request.mounts {
        let state = match mount.result_id.as_str() {
            "" => None,
            id => Some(build.find(id).map_err(|f| {
                f.context(format!("failed to find ref {id} for {:?} mount", mount.dest))
            })?),
        };
        mounts.push(ContainerMount { mount: Mount::of_container(mount)?, state });
    }
    let mut extra_hosts = Vec::new();
    for entry in request.extra_hosts {
        entry
            .ip
            .parse::<IpAddr>()
            .map_err(|_| Fault::invalid(format!("failed to parse IP {}", entry.ip)))?;
        extra_hosts.push(HostIp { host: entry.host, ip: entry.ip });
    }
    let name = request.container_id;
    let asked = ContainerRequest {
        name: name.clone(),
        mounts,
        network: NetMode::from_wire(request.network)?,
        hostname: request.hostname,
        extra_hosts,
    };
    let windows = request.platform.is_some_and(|p| p.os == "windows");
    let container = build.bridge.new_container(asked).await?;
    build.add_container(
        name,
        HeldContainer { container, path: DEFAULT_PATHS[usize::from(windows)], started: false },
    )
}

/// The container that a request to look into one means, and the mount.
fn place(build: &GatewayBuild, name: &str, mount: i32) -> Result<(Arc<dyn Container>, usize)> {
    let unknown = || Fault::unknown(format!("container details for {name}@{mount} not found"));
    let container = build.container(name).ok_or_else(unknown)?;
    let index = usize::try_from(mount)
        .map_err(|_| Fault::invalid(format!("mount index {mount} is out of bounds")))?;
    Ok((container, index))
}

pub(crate) async fn read_file(
    build: &GatewayBuild,
    r: wire::ReadFileRequest,
) -> Result<wire::ReadFileResponse> {
    let (container, mount) = place(build, &r.r#ref, r.mount_index)?;
    bounded_file(&r, async |range| container.read_file(mount, &r.file_path, range).await).await
}

pub(crate) async fn read_dir(
    build: &GatewayBuild,
    r: wire::ReadDirRequest,
) -> Result<wire::ReadDirResponse> {
    let (container, mount) = place(build, &r.r#ref, r.mount_index)?;
    let include = (!r.include_pattern.is_empty()).then_some(r.include_pattern.as_str());
    let entries = container.read_dir(mount, &r.dir_path, include).await?;
    Ok(wire::ReadDirResponse { entries: entries.into_iter().map(convert::stat).collect() })
}

pub(crate) async fn stat_file(
    build: &GatewayBuild,
    r: wire::StatFileRequest,
) -> Result<wire::StatFileResponse> {
    let (container, mount) = place(build, &r.r#ref, r.mount_index)?;
    Ok(wire::StatFileResponse {
        stat: Some(convert::stat(container.stat_file(mount, &r.path).await?)),
    })
}

pub(crate) async fn release(build: &GatewayBuild, name: &str) -> Result<()> {
    let kept = build
        .remove_container(name)
        .ok_or_else(|| Fault::unknown(format!("container details for {name} not found")))?;
    kept.container.release().await
}
