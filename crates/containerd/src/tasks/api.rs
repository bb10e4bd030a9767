//! Owns the calls: container records and tasks of one namespace, labeled as ours.

use crate::{
    conn::{Connection, deadline},
    tasks::{RuntimeOptions, TaskConfig, is_runc},
    wire,
};
use containerd_client::services::v1::{
    self as api, containers_client::ContainersClient, tasks_client::TasksClient,
};
use containerd_client::types::v1::Status;
use prost_types::Any;
use shipway_fault::{Code, Fault, Result};
use shipway_grpc::TracedChannel;
use shipway_storage::Mount;
use std::{collections::HashMap, path::Path, sync::Arc, time::Duration};
use tokio::sync::OnceCell;

/// Label of our containers; its value is the executor's directory, so that several daemons leave
/// each other's alone.
pub(super) const OWNER: &str = "dev.shipway.executor";
const SPEC_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";
const PROCESS_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
const RUNC_OPTIONS: &str = "containerd.runc.v1.Options";
pub(super) const SIGKILL: u32 = 9;
/// How long containerd may be away while a task runs, as when it is restarted.
const ABSENCE: Duration = Duration::from_secs(60);

/// The runc shim's options, as far as we set them.
#[derive(Clone, PartialEq, prost::Message)]
struct RuncOptions {
    #[prost(bool, tag = "1")]
    no_pivot_root: bool,
    #[prost(bool, tag = "2")]
    no_new_keyring: bool,
    #[prost(string, tag = "3")]
    shim_cgroup: String,
    #[prost(uint32, tag = "4")]
    io_uid: u32,
    #[prost(uint32, tag = "5")]
    io_gid: u32,
    #[prost(string, tag = "6")]
    binary_name: String,
    #[prost(bool, tag = "9")]
    systemd_cgroup: bool,
}

impl RuncOptions {
    fn of(config: &TaskConfig) -> Self {
        let RuntimeOptions {
            binary_name,
            systemd_cgroup,
            no_pivot_root,
            no_new_keyring,
            shim_cgroup,
            io_uid,
            io_gid,
        } = config.options.clone();
        let binary_name = config.binary.clone().unwrap_or(binary_name);
        Self {
            no_pivot_root,
            no_new_keyring,
            shim_cgroup,
            io_uid,
            io_gid,
            binary_name,
            systemd_cgroup,
        }
    }
}

/// A process: the first of its container, or one that joined it.
#[derive(Clone, Debug)]
pub(super) struct ProcessRef {
    pub(super) container: String,
    /// Empty for the first.
    pub(super) exec: String,
}

impl ProcessRef {
    pub(super) fn first(container: &str) -> Self {
        Self { container: container.to_owned(), exec: String::new() }
    }
}

impl std::fmt::Display for ProcessRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.exec.as_str() {
            "" => write!(f, "task {}", self.container),
            exec => write!(f, "process {exec} of task {}", self.container),
        }
    }
}

/// Where a process's input comes from and its output goes.
#[derive(Clone, Copy, Default)]
pub(super) struct Stdio<'a> {
    pub(super) stdin: Option<&'a Path>,
    pub(super) stdout: Option<&'a Path>,
    pub(super) stderr: Option<&'a Path>,
    pub(super) terminal: bool,
}

#[derive(Clone)]
pub(super) struct TaskApi {
    pub(super) connection: Connection,
    pub(super) runtime: api::container::Runtime,
    snapshotter: String,
    pub(super) owner: String,
    systemd_cgroup: bool,
    /// Whether containerd has sandboxes; set by the first call that asks.
    pub(super) sandboxes: Arc<OnceCell<bool>>,
}

fn text(path: Option<&Path>) -> String {
    path.map(|p| p.display().to_string()).unwrap_or_default()
}

impl TaskApi {
    pub(super) fn new(connection: Connection, config: &TaskConfig) -> Self {
        let options = RuncOptions::of(config);
        // Only the runc shim knows these options.
        let options = (options != RuncOptions::default() && is_runc(&config.runtime)).then(|| {
            Any { type_url: RUNC_OPTIONS.into(), value: prost::Message::encode_to_vec(&options) }
        });
        Self {
            connection,
            runtime: api::container::Runtime { name: config.runtime.clone(), options },
            snapshotter: config.snapshotter.clone(),
            owner: config.root.display().to_string(),
            systemd_cgroup: config.options.systemd_cgroup,
            sandboxes: Arc::default(),
        }
    }

    /// The cgroup of container `id`, unless its process names a parent.
    pub(super) fn cgroups_path(&self, id: &str) -> String {
        if self.systemd_cgroup {
            format!("system.slice:shipway:{id}")
        } else {
            format!("/{}/{id}", self.connection.namespace())
        }
    }

    fn containers(&self) -> ContainersClient<TracedChannel> {
        ContainersClient::new(self.connection.control())
    }

    fn tasks(&self) -> TasksClient<TracedChannel> {
        TasksClient::new(self.connection.control())
    }

    /// Creates the record of container `id` with runtime specification `spec`, in `sandbox` if one
    /// is given.
    pub(super) async fn create_container(
        &self,
        id: &str,
        spec: Vec<u8>,
        snapshot: Option<&str>,
        sandbox: Option<&str>,
    ) -> Result<()> {
        let container = api::Container {
            id: id.into(),
            labels: HashMap::from([(OWNER.to_owned(), self.owner.clone())]),
            runtime: Some(self.runtime.clone()),
            spec: Some(Any { type_url: SPEC_TYPE.into(), value: spec }),
            snapshotter: if snapshot.is_some() { self.snapshotter.clone() } else { String::new() },
            snapshot_key: snapshot.unwrap_or_default().into(),
            sandbox: sandbox.unwrap_or_default().into(),
            ..Default::default()
        };
        let request =
            self.connection.request(api::CreateContainerRequest { container: Some(container) })?;
        self.connection
            .call(
                || format!("create container {id}"),
                deadline::QUICK,
                self.containers().create(request),
            )
            .await
            .map(drop)
    }

    /// Creates the task of container `id`; returns the pid of its first process, which does not run
    /// yet.
    pub(super) async fn create_task(
        &self,
        id: &str,
        rootfs: &[Mount],
        stdio: Stdio<'_>,
    ) -> Result<u32> {
        let message = api::CreateTaskRequest {
            container_id: id.into(),
            rootfs: rootfs.iter().map(wire::mount_out).collect(),
            stdin: text(stdio.stdin),
            stdout: text(stdio.stdout),
            stderr: text(stdio.stderr),
            terminal: stdio.terminal,
            options: self.runtime.options.clone(),
            ..Default::default()
        };
        let request = self.connection.request(message)?;
        let answer = self
            .connection
            .call(|| format!("create task {id}"), deadline::SLOW, self.tasks().create(request))
            .await?;
        Ok(answer.pid)
    }

    /// Adds a process to a running task; it does not run yet.
    pub(super) async fn exec(
        &self,
        place: &ProcessRef,
        spec: Vec<u8>,
        stdio: Stdio<'_>,
    ) -> Result<()> {
        let message = api::ExecProcessRequest {
            container_id: place.container.clone(),
            exec_id: place.exec.clone(),
            stdin: text(stdio.stdin),
            stdout: text(stdio.stdout),
            stderr: text(stdio.stderr),
            terminal: stdio.terminal,
            spec: Some(Any { type_url: PROCESS_TYPE.into(), value: spec }),
        };
        let request = self.connection.request(message)?;
        self.connection
            .call(|| format!("create {place}"), deadline::SLOW, self.tasks().exec(request))
            .await
            .map(drop)
    }

    /// Deletes a process that joined and has ended. A missing process is not an error.
    pub(super) async fn delete_process(&self, place: &ProcessRef) -> Result<()> {
        let message = api::DeleteProcessRequest {
            container_id: place.container.clone(),
            exec_id: place.exec.clone(),
        };
        let request = self.connection.request(message)?;
        let done = self
            .connection
            .call(
                || format!("delete {place}"),
                deadline::SLOW,
                self.tasks().delete_process(request),
            )
            .await;
        done.map(drop).or_else(gone)
    }

    /// Sends a signal to one process. A missing process is not an error.
    pub(super) async fn signal(&self, place: &ProcessRef, signal: u32) -> Result<()> {
        let message = api::KillRequest {
            container_id: place.container.clone(),
            exec_id: place.exec.clone(),
            signal,
            all: false,
        };
        let request = self.connection.request(message)?;
        let done = self
            .connection
            .call(
                || format!("send signal {signal} to {place}"),
                deadline::QUICK,
                self.tasks().kill(request),
            )
            .await;
        done.map(drop).or_else(gone)
    }

    /// Gives a process's terminal another size.
    pub(super) async fn resize(&self, place: &ProcessRef, rows: u32, columns: u32) -> Result<()> {
        let (container_id, exec_id) = (place.container.clone(), place.exec.clone());
        let request = self.connection.request(api::ResizePtyRequest {
            container_id,
            exec_id,
            width: columns,
            height: rows,
        })?;
        self.connection
            .call(
                || format!("resize the terminal of {place}"),
                deadline::QUICK,
                self.tasks().resize_pty(request),
            )
            .await
            .map(drop)
    }

    /// Ends a process's input: the shim keeps its own end of it open until then.
    pub(super) async fn close_input(&self, place: &ProcessRef) -> Result<()> {
        let (container_id, exec_id) = (place.container.clone(), place.exec.clone());
        let request =
            self.connection.request(api::CloseIoRequest { container_id, exec_id, stdin: true })?;
        self.connection
            .call(
                || format!("end the input of {place}"),
                deadline::QUICK,
                self.tasks().close_io(request),
            )
            .await
            .map(drop)
    }

    pub(super) async fn start(&self, place: &ProcessRef) -> Result<()> {
        let message = api::StartRequest {
            container_id: place.container.clone(),
            exec_id: place.exec.clone(),
        };
        let request = self.connection.request(message)?;
        self.connection
            .call(|| format!("start {place}"), deadline::SLOW, self.tasks().start(request))
            .await
            .map(drop)
    }

    /// Waits for a process's exit. Survives a restart of containerd, during which the shim and the
    /// process live on.
    pub(super) async fn wait(&self, place: &ProcessRef) -> Result<u32> {
        let mut away: Option<tokio::time::Instant> = None;
        loop {
            let message = api::WaitRequest {
                container_id: place.container.clone(),
                exec_id: place.exec.clone(),
            };
            let request = self.connection.request(message)?;
            let status = match self.tasks().wait(request).await {
                Ok(answer) => return Ok(answer.into_inner().exit_status),
                Err(status) => status,
            };
            let mut fault = self.connection.fault(format!("wait for {place}"), status);
            match self.exit_status(place).await {
                Ok(Some(code)) => return Ok(code),
                // It runs, so it was the connection that ended: wait again.
                Ok(None) if away.is_none() => {}
                Ok(None) => away = None,
                Err(e) if e.is_not_found() => return Err(lost(place, &fault)),
                Err(e) => fault = e,
            }
            let since = *away.get_or_insert_with(tokio::time::Instant::now);
            if since.elapsed() > ABSENCE {
                return Err(fault.context("containerd did not come back while a step was running"));
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// The exit code of a task that ended, `None` if it has not; `NotFound` if there is no such
    /// task.
    pub(super) async fn exit_status(&self, place: &ProcessRef) -> Result<Option<u32>> {
        match self.look_at(place).await? {
            (Status::Stopped, code) => Ok(Some(code)),
            _ => Ok(None),
        }
    }

    /// How far a process has come, and its exit code if it has ended; `NotFound` if there is none.
    pub(super) async fn look_at(&self, place: &ProcessRef) -> Result<(Status, u32)> {
        let message =
            api::GetRequest { container_id: place.container.clone(), exec_id: place.exec.clone() };
        let request = self.connection.request(message)?;
        let answer = self
            .connection
            .call(|| format!("look at {place}"), deadline::QUICK, self.tasks().get(request))
            .await?;
        let process = answer.process.unwrap_or_default();
        match Status::try_from(process.status) {
            Ok(Status::Unknown) | Err(_) => {
                Err(Fault::not_found(format!("{place} has lost its shim")))
            }
            Ok(status) => Ok((status, process.exit_status)),
        }
    }

    /// Kills everything in the task. A missing task is not an error.
    pub(super) async fn kill(&self, id: &str) -> Result<()> {
        let message = api::KillRequest {
            container_id: id.into(),
            exec_id: String::new(),
            signal: SIGKILL,
            all: true,
        };
        let request = self.connection.request(message)?;
        let done = self
            .connection
            .call(|| format!("kill task {id}"), deadline::QUICK, self.tasks().kill(request))
            .await;
        done.map(drop).or_else(gone)
    }

    /// Deletes a task that has ended. A missing task is not an error.
    pub(super) async fn delete_task(&self, id: &str) -> Result<()> {
        let request =
            self.connection.request(api::DeleteTaskRequest { container_id: id.into() })?;
        let done = self
            .connection
            .call(|| format!("delete task {id}"), deadline::SLOW, self.tasks().delete(request))
            .await;
        done.map(drop).or_else(gone)
    }

    /// Deletes a container's record. A missing container is not an error.
    pub(super) async fn delete_container(&self, id: &str) -> Result<()> {
        let request = self.connection.request(api::DeleteContainerRequest { id: id.into() })?;
        let done = self
            .connection
            .call(
                || format!("delete container {id}"),
                deadline::QUICK,
                self.containers().delete(request),
            )
            .await;
        done.map(drop).or_else(gone)
    }

    /// Ids of the containers that carry our label.
    pub(super) async fn our_containers(&self) -> Result<Vec<String>> {
        let filter = format!("labels.{OWNER:?}=={:?}", self.owner);
        let request =
            self.connection.request(api::ListContainersRequest { filters: vec![filter] })?;
        let answer = self
            .connection
            .call(|| "list containers".into(), deadline::QUICK, self.containers().list(request))
            .await?;
        Ok(answer.containers.into_iter().map(|c| c.id).collect())
    }

    /// Namespace of all this.
    pub(super) fn namespace(&self) -> &str {
        self.connection.namespace()
    }

    /// Whatever there is of container `id`: killed, deleted, gone.
    pub(super) async fn destroy(&self, id: &str) -> Result<()> {
        self.end_task(id).await?;
        self.delete_container(id).await
    }

    /// Kills and deletes the task, if there is one. Tried several times, because a dying shim takes
    /// its time.
    pub(super) async fn end_task(&self, id: &str) -> Result<()> {
        let mut last = Ok(());
        for attempt in 0..20_u64 {
            last = self.delete_task(id).await;
            let Err(e) = &last else { break };
            tracing::debug!(container = id, attempt, error = %e, "task not deleted yet, will retry");
            if let Err(e) = self.kill(id).await {
                tracing::debug!(container = id, attempt, error = %e, "task not killed yet, will retry");
            }
            tokio::time::sleep(Duration::from_millis(10 << attempt.min(6))).await;
        }
        last
    }
}

pub(super) fn gone(fault: Fault) -> Result<()> {
    if fault.is_not_found() { Ok(()) } else { Err(fault) }
}

pub(super) fn lost(place: &ProcessRef, cause: &Fault) -> Fault {
    Fault::new(Code::Unavailable, format!("containerd lost {place} while it was running ({cause})"))
        .hint("containerd or its shim was killed or restarted during the step: build again")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_of_the_runtime_reach_the_shim() {
        let parse = |runtime: &str, options: serde_json::Value| {
            RuntimeOptions::parse(runtime, options).map_err(|e| e.to_string())
        };
        let given =
            serde_json::json!({ "SystemdCgroup": true, "ShimCgroup": "/s", "BinaryName": "crun" });
        let mut config = TaskConfig {
            options: parse("io.containerd.runc.v2", given.clone()).unwrap(),
            ..TaskConfig::new("/x")
        };
        let sent = RuncOptions::of(&config);
        assert_eq!(
            (sent.systemd_cgroup, sent.shim_cgroup.as_str(), sent.binary_name.as_str()),
            (true, "/s", "crun")
        );
        config.binary = Some("/bin/runc".into());
        assert_eq!(RuncOptions::of(&config).binary_name, "/bin/runc");
        assert!(
            parse("io.containerd.runc.v2", serde_json::json!({ "Systemd": true }))
                .unwrap_err()
                .contains("unknown field `Systemd`")
        );
        assert!(
            parse("io.containerd.kata.v2", given).unwrap_err().contains("io.containerd.kata.v2")
        );
        assert!(parse("io.containerd.kata.v2", serde_json::json!({})).is_ok());
    }
}
