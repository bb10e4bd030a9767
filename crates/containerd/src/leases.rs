//! Owns the lease port over containerd's Leases service.

use crate::{
    conn::{Connection, MAX_MESSAGE, deadline},
    wire,
};
use async_trait::async_trait;
use containerd_client::services::v1::{self as api, leases_client::LeasesClient};
use shipway_fault::{Fault, Result};
use shipway_grpc::TracedChannel;
use shipway_storage::{Labels, Lease, LeaseId, LeaseResource, Leases, SnapshotKey};

pub(crate) struct LeaseStore {
    connection: Connection,
}

impl LeaseStore {
    pub(crate) fn new(connection: Connection) -> Self {
        Self { connection }
    }

    fn client(&self) -> LeasesClient<TracedChannel> {
        LeasesClient::new(self.connection.control()).max_decoding_message_size(MAX_MESSAGE)
    }
}

fn resource_out(resource: &LeaseResource) -> api::Resource {
    let (id, kind) = match resource {
        LeaseResource::Content(digest) => (digest.to_string(), "content".to_owned()),
        LeaseResource::Snapshot(snapshotter, key) => {
            (key.0.clone(), format!("snapshots/{snapshotter}"))
        }
        LeaseResource::Ingest(reference) => (reference.clone(), "ingests".to_owned()),
        LeaseResource::Image(name) => (name.clone(), "images".to_owned()),
    };
    api::Resource { id, r#type: kind }
}

/// `None` for kinds that we do not know.
fn resource_in(resource: api::Resource) -> Result<Option<LeaseResource>> {
    Ok(Some(match resource.r#type.as_str() {
        "content" => LeaseResource::Content(wire::digest_in(&resource.id)?),
        "ingests" => LeaseResource::Ingest(resource.id),
        "images" => LeaseResource::Image(resource.id),
        kind => match kind.strip_prefix("snapshots/") {
            Some(snapshotter) => {
                LeaseResource::Snapshot(snapshotter.to_owned(), SnapshotKey(resource.id))
            }
            None => return Ok(None),
        },
    }))
}

#[async_trait]
impl Leases for LeaseStore {
    async fn create(&self, id: &LeaseId, labels: &Labels) -> Result<()> {
        if id.0.is_empty() {
            return Err(Fault::internal("a lease needs a name"));
        }
        let request = self
            .connection
            .request(api::CreateRequest { id: id.0.clone(), labels: wire::labels_out(labels) })?;
        self.connection
            .call(
                || format!("create lease {:?}", id.0),
                deadline::QUICK,
                self.client().create(request),
            )
            .await?;
        Ok(())
    }

    async fn delete(&self, id: &LeaseId, sync: bool) -> Result<()> {
        let request = self.connection.request(api::DeleteRequest { id: id.0.clone(), sync })?;
        let limit = if sync { deadline::COLLECT } else { deadline::QUICK };
        match self
            .connection
            .call(|| format!("delete lease {:?}", id.0), limit, self.client().delete(request))
            .await
        {
            Err(e) if !e.is_not_found() => Err(e),
            _ => Ok(()),
        }
    }

    async fn list(&self, filters: &[String]) -> Result<Vec<Lease>> {
        let request = self.connection.request(api::ListRequest { filters: filters.to_vec() })?;
        let answer = self
            .connection
            .call(|| "list leases".into(), deadline::QUICK, self.client().list(request))
            .await?;
        Ok(answer
            .leases
            .into_iter()
            .map(|l| Lease {
                id: LeaseId(l.id),
                labels: wire::labels_in(l.labels),
                created: wire::time_in(l.created_at),
            })
            .collect())
    }

    async fn add(&self, id: &LeaseId, resource: LeaseResource) -> Result<()> {
        let request = self.connection.request(api::AddResourceRequest {
            id: id.0.clone(),
            resource: Some(resource_out(&resource)),
        })?;
        self.connection
            .call(
                || format!("add {resource:?} to lease {:?}", id.0),
                deadline::QUICK,
                self.client().add_resource(request),
            )
            .await
    }

    async fn remove(&self, id: &LeaseId, resource: LeaseResource) -> Result<()> {
        let request = self.connection.request(api::DeleteResourceRequest {
            id: id.0.clone(),
            resource: Some(resource_out(&resource)),
        })?;
        self.connection
            .call(
                || format!("take {resource:?} out of lease {:?}", id.0),
                deadline::QUICK,
                self.client().delete_resource(request),
            )
            .await
    }

    async fn resources(&self, id: &LeaseId) -> Result<Vec<LeaseResource>> {
        let request = self.connection.request(api::ListResourcesRequest { id: id.0.clone() })?;
        let answer = self
            .connection
            .call(
                || format!("list what lease {:?} keeps", id.0),
                deadline::QUICK,
                self.client().list_resources(request),
            )
            .await?;
        answer.resources.into_iter().filter_map(|r| resource_in(r).transpose()).collect()
    }
}
