//! Owns the image port over containerd's Images service. Records are only ever updated by field
//! path, because CRI and others keep their labels on the same records.

use crate::{
    conn::{Connection, MAX_MESSAGE, deadline},
    wire,
};
use async_trait::async_trait;
use containerd_client::services::v1::{self as api, images_client::ImagesClient};
use shipway_fault::{Fault, Result};
use shipway_grpc::TracedChannel;
use shipway_oci::Descriptor;
use shipway_storage::{ImageRecord, Images, Labels};
use std::time::SystemTime;

/// Rounds of create-or-update before giving up on a name that others keep creating and deleting.
const PUT_ATTEMPTS: usize = 5;

pub(crate) struct ImageStore {
    connection: Connection,
}

impl ImageStore {
    pub(crate) fn new(connection: Connection) -> Self {
        Self { connection }
    }

    fn client(&self) -> ImagesClient<TracedChannel> {
        ImagesClient::new(self.connection.control()).max_decoding_message_size(MAX_MESSAGE)
    }

    async fn create(&self, image: api::Image, time: Option<SystemTime>) -> Result<()> {
        let what = format!("create image {:?}", image.name);
        let request = self.connection.request(api::CreateImageRequest {
            image: Some(image),
            source_date_epoch: time.map(Into::into),
        })?;
        self.connection
            .call(|| what, deadline::QUICK, self.client().create(request))
            .await
            .map(drop)
    }

    async fn update(
        &self,
        image: api::Image,
        labels: &Labels,
        time: Option<SystemTime>,
    ) -> Result<()> {
        let what = format!("update image {:?}", image.name);
        let update_mask =
            wire::mask(std::iter::once("target".to_owned()).chain(wire::label_paths(labels)));
        let request = self.connection.request(api::UpdateImageRequest {
            image: Some(image),
            update_mask,
            source_date_epoch: time.map(Into::into),
        })?;
        self.connection
            .call(|| what, deadline::QUICK, self.client().update(request))
            .await
            .map(drop)
    }
}

fn record(image: api::Image) -> Result<ImageRecord> {
    let target = image
        .target
        .ok_or_else(|| Fault::internal(format!("image record {:?} has no target", image.name)))?;
    Ok(ImageRecord {
        target: wire::descriptor_in(target)?,
        labels: wire::labels_in(image.labels),
        updated: wire::time_in(image.updated_at),
        name: image.name,
    })
}

#[async_trait]
impl Images for ImageStore {
    async fn get(&self, name: &str) -> Result<ImageRecord> {
        let request = self.connection.request(api::GetImageRequest { name: name.into() })?;
        let answer = self
            .connection
            .call(|| format!("get image {name:?}"), deadline::QUICK, self.client().get(request))
            .await?;
        record(answer.image.ok_or_else(|| {
            Fault::internal(format!("get image {name:?}: containerd sent an empty answer"))
        })?)
    }

    async fn list(&self, filters: &[String]) -> Result<Vec<ImageRecord>> {
        let request =
            self.connection.request(api::ListImagesRequest { filters: filters.to_vec() })?;
        let answer = self
            .connection
            .call(|| "list images".into(), deadline::QUICK, self.client().list(request))
            .await?;
        answer.images.into_iter().map(record).collect()
    }

    async fn put(&self, name: &str, target: &Descriptor, labels: &Labels) -> Result<()> {
        self.put_at(name, target, labels, None).await
    }

    async fn put_at(
        &self,
        name: &str,
        target: &Descriptor,
        labels: &Labels,
        time: Option<SystemTime>,
    ) -> Result<()> {
        let image = api::Image {
            name: name.into(),
            labels: wire::labels_out(labels),
            target: Some(wire::descriptor_out(target)),
            created_at: None,
            updated_at: None,
        };
        let mut last = None;
        for _ in 0..PUT_ATTEMPTS {
            match self.update(image.clone(), labels, time).await {
                Err(e) if e.is_not_found() => {}
                answer => return answer,
            }
            match self.create(image.clone(), time).await {
                Err(e) if e.is_already_exists() => last = Some(e),
                answer => return answer,
            }
        }
        Err(last.unwrap_or_else(|| Fault::internal("put image without an attempt")))
    }

    async fn delete(&self, name: &str, sync: bool) -> Result<()> {
        let request = self.connection.request(api::DeleteImageRequest {
            name: name.into(),
            sync,
            target: None,
        })?;
        let limit = if sync { deadline::COLLECT } else { deadline::QUICK };
        self.connection
            .call(|| format!("delete image {name:?}"), limit, self.client().delete(request))
            .await
    }
}
