//! Owns the snapshot port over containerd's Snapshots and Diff services.

use crate::{
    conn::{Connection, MAX_MESSAGE, deadline},
    wire,
};
use async_trait::async_trait;
use containerd_client::services::v1::{
    self as api,
    diff_client::DiffClient,
    leases_client::LeasesClient,
    snapshots::{self as wire_api, snapshots_client::SnapshotsClient},
};
use shipway_fault::{Fault, Result};
use shipway_grpc::TracedChannel;
use shipway_oci::{Descriptor, DiffId};
use shipway_storage::{
    Labels, LeaseId, Mount, SnapshotInfo, SnapshotKey, SnapshotKind, Snapshotter, Usage,
};

pub(crate) struct Snapshots {
    connection: Connection,
    snapshotter: String,
}

impl Snapshots {
    pub(crate) fn new(connection: Connection, snapshotter: &str) -> Self {
        Self { connection, snapshotter: snapshotter.into() }
    }

    fn client(&self) -> SnapshotsClient<TracedChannel> {
        SnapshotsClient::new(self.connection.control()).max_decoding_message_size(MAX_MESSAGE)
    }

    async fn keep(&self, lease: &LeaseId, name: &SnapshotKey) -> Result<()> {
        let resource =
            api::Resource { id: name.0.clone(), r#type: format!("snapshots/{}", self.snapshotter) };
        let request = self
            .connection
            .request(api::AddResourceRequest { id: lease.0.clone(), resource: Some(resource) })?;
        let mut leases = LeasesClient::new(self.connection.control());
        self.connection
            .call(
                || format!("add snapshot {:?} to lease {:?}", name.0, lease.0),
                deadline::QUICK,
                leases.add_resource(request),
            )
            .await
    }
}

fn info(info: wire_api::Info) -> SnapshotInfo {
    SnapshotInfo {
        key: SnapshotKey(info.name),
        parent: Some(info.parent).filter(|p| !p.is_empty()).map(SnapshotKey),
        kind: match wire_api::Kind::try_from(info.kind) {
            Ok(wire_api::Kind::Active) => SnapshotKind::Active,
            Ok(wire_api::Kind::View) => SnapshotKind::View,
            _ => SnapshotKind::Committed,
        },
        labels: wire::labels_in(info.labels),
    }
}

fn parent_out(parent: Option<&SnapshotKey>) -> String {
    parent.map(|p| p.0.clone()).unwrap_or_default()
}

fn mounts_in(mounts: Vec<containerd_client::types::Mount>) -> Vec<Mount> {
    mounts.into_iter().map(wire::mount_in).collect()
}

#[async_trait]
impl Snapshotter for Snapshots {
    fn name(&self) -> &str {
        &self.snapshotter
    }

    async fn stat(&self, key: &SnapshotKey) -> Result<SnapshotInfo> {
        let request = self.connection.request(wire_api::StatSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.0.clone(),
        })?;
        let answer = self
            .connection
            .call(
                || format!("stat snapshot {:?}", key.0),
                deadline::QUICK,
                self.client().stat(request),
            )
            .await?;
        answer.info.map(info).ok_or_else(|| {
            Fault::internal(format!("stat snapshot {:?}: containerd sent an empty answer", key.0))
        })
    }

    async fn prepare(
        &self,
        lease: &LeaseId,
        key: &SnapshotKey,
        parent: Option<&SnapshotKey>,
        labels: &Labels,
    ) -> Result<Vec<Mount>> {
        let message = wire_api::PrepareSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.0.clone(),
            parent: parent_out(parent),
            labels: wire::labels_out(labels),
        };
        let request = self.connection.leased(message, lease)?;
        let what = || format!("prepare snapshot {:?} on {:?}", key.0, parent_out(parent));
        Ok(mounts_in(
            self.connection
                .call(what, deadline::SLOW, self.client().prepare(request))
                .await?
                .mounts,
        ))
    }

    async fn view(
        &self,
        lease: &LeaseId,
        key: &SnapshotKey,
        parent: Option<&SnapshotKey>,
        labels: &Labels,
    ) -> Result<Vec<Mount>> {
        let message = wire_api::ViewSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.0.clone(),
            parent: parent_out(parent),
            labels: wire::labels_out(labels),
        };
        let request = self.connection.leased(message, lease)?;
        let what = || format!("make view {:?} of snapshot {:?}", key.0, parent_out(parent));
        Ok(mounts_in(
            self.connection.call(what, deadline::SLOW, self.client().view(request)).await?.mounts,
        ))
    }

    async fn mounts(&self, key: &SnapshotKey) -> Result<Vec<Mount>> {
        let request = self.connection.request(wire_api::MountsRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.0.clone(),
        })?;
        let what = || format!("ask for the mounts of snapshot {:?}", key.0);
        Ok(mounts_in(
            self.connection.call(what, deadline::SLOW, self.client().mounts(request)).await?.mounts,
        ))
    }

    async fn commit(
        &self,
        lease: &LeaseId,
        name: &SnapshotKey,
        key: &SnapshotKey,
        labels: &Labels,
    ) -> Result<()> {
        let message = wire_api::CommitSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            name: name.0.clone(),
            key: key.0.clone(),
            labels: wire::labels_out(labels),
        };
        let request = self.connection.leased(message, lease)?;
        let what = || format!("commit snapshot {:?} as {:?}", key.0, name.0);
        match self.connection.call(what, deadline::SLOW, self.client().commit(request)).await {
            Err(e) if e.is_already_exists() => {
                // Not every version of containerd adds the one that is there to the lease.
                self.keep(lease, name).await?;
                Err(e)
            }
            answer => answer,
        }
    }

    async fn remove(&self, key: &SnapshotKey) -> Result<()> {
        let request = self.connection.request(wire_api::RemoveSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.0.clone(),
        })?;
        self.connection
            .call(
                || format!("remove snapshot {:?}", key.0),
                deadline::SLOW,
                self.client().remove(request),
            )
            .await
    }

    async fn update_labels(&self, key: &SnapshotKey, labels: &Labels) -> Result<()> {
        let changed = wire_api::Info {
            name: key.0.clone(),
            labels: wire::labels_out(labels),
            ..Default::default()
        };
        let request = self.connection.request(wire_api::UpdateSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            info: Some(changed),
            update_mask: wire::mask(wire::label_paths(labels)),
        })?;
        self.connection
            .call(
                || format!("set labels of snapshot {:?}", key.0),
                deadline::QUICK,
                self.client().update(request),
            )
            .await
            .map(drop)
    }

    async fn usage(&self, key: &SnapshotKey) -> Result<Usage> {
        let request = self.connection.request(wire_api::UsageRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.0.clone(),
        })?;
        let answer = self
            .connection
            .call(
                || format!("measure snapshot {:?}", key.0),
                deadline::SLOW,
                self.client().usage(request),
            )
            .await?;
        Ok(Usage { bytes: answer.size.max(0) as u64, inodes: answer.inodes.max(0) as u64 })
    }

    async fn list(&self, filters: &[String]) -> Result<Vec<SnapshotInfo>> {
        let message = wire_api::ListSnapshotsRequest {
            snapshotter: self.snapshotter.clone(),
            filters: filters.to_vec(),
        };
        let request = self.connection.request(message)?;
        let what = || "list snapshots".to_owned();
        let mut stream =
            self.connection.call(what, deadline::SLOW, self.client().list(request)).await?;
        let mut all = Vec::new();
        loop {
            match tokio::time::timeout(deadline::SLOW, stream.message()).await {
                Ok(Ok(Some(batch))) => all.extend(batch.info.into_iter().map(info)),
                Ok(Ok(None)) => return Ok(all),
                Ok(Err(status)) => return Err(self.connection.fault(what(), status)),
                Err(_) => return Err(self.connection.stalled(what(), deadline::SLOW)),
            }
        }
    }

    async fn apply(&self, layer: &Descriptor, mounts: &[Mount]) -> Result<DiffId> {
        let message = api::ApplyRequest {
            diff: Some(wire::descriptor_out(layer)),
            mounts: mounts.iter().map(wire::mount_out).collect(),
            payloads: Default::default(),
            sync_fs: false,
        };
        let request = self.connection.request(message)?;
        let mut client = DiffClient::new(self.connection.control());
        let what = || format!("unpack layer {}", layer.digest);
        let answer = self.connection.call(what, deadline::UNPACK, client.apply(request)).await?;
        let applied = answer.applied.ok_or_else(|| {
            Fault::internal(format!("{}: containerd sent an empty answer", what()))
        })?;
        Ok(DiffId(wire::digest_in(&applied.digest)?))
    }
}
