//! Leases and image records of the fake.

use super::{FakeStorage, ImageState, LeaseState, filter::Filters, relabel};
use crate::{ImageRecord, Images, Labels, Lease, LeaseId, LeaseResource, Leases};
use async_trait::async_trait;
use shipway_fault::{Code, Fault, Result};
use shipway_oci::Descriptor;
use std::time::SystemTime;

#[async_trait]
impl Leases for FakeStorage {
    async fn create(&self, id: &LeaseId, labels: &Labels) -> Result<()> {
        let mut state = self.state();
        if state.leases.contains_key(id) {
            return Err(Fault::new(Code::AlreadyExists, format!("lease {:?} exists", id.0)));
        }
        let lease = LeaseState {
            labels: labels.clone(),
            created: SystemTime::now(),
            resources: Vec::new(),
        };
        state.leases.insert(id.clone(), lease);
        state.committed(1);
        Ok(())
    }

    async fn delete(&self, id: &LeaseId, _sync: bool) -> Result<()> {
        {
            let mut state = self.state();
            if state.leases.remove(id).is_some() {
                state.committed(1);
            }
        }
        self.gc();
        Ok(())
    }

    async fn list(&self, filters: &[String]) -> Result<Vec<Lease>> {
        let filters = Filters::parse(filters)?;
        let state = self.state();
        let leases = state.leases.iter().filter(|(id, lease)| {
            filters.matches(&|f| (f == "id").then(|| id.0.clone()), &lease.labels)
        });
        Ok(leases
            .map(|(id, l)| Lease {
                id: id.clone(),
                labels: l.labels.clone(),
                created: Some(l.created),
            })
            .collect())
    }

    async fn add(&self, id: &LeaseId, resource: LeaseResource) -> Result<()> {
        let mut state = self.state();
        state.keep(id, resource)?;
        state.committed(1);
        Ok(())
    }

    async fn remove(&self, id: &LeaseId, resource: LeaseResource) -> Result<()> {
        let mut state = self.state();
        state.known(id)?;
        if let Some(lease) = state.leases.get_mut(id) {
            lease.resources.retain(|r| *r != resource);
        }
        state.committed(1);
        Ok(())
    }

    async fn resources(&self, id: &LeaseId) -> Result<Vec<LeaseResource>> {
        let state = self.state();
        state.known(id)?;
        Ok(state.leases.get(id).map(|l| l.resources.clone()).unwrap_or_default())
    }
}

fn record(name: &str, image: &ImageState) -> ImageRecord {
    ImageRecord {
        name: name.into(),
        target: image.target.clone(),
        labels: image.labels.clone(),
        updated: Some(image.updated),
    }
}

#[async_trait]
impl Images for FakeStorage {
    async fn get(&self, name: &str) -> Result<ImageRecord> {
        let state = self.state();
        state
            .images
            .get(name)
            .map(|i| record(name, i))
            .ok_or_else(|| Fault::not_found(format!("image {name:?} does not exist")))
    }

    async fn list(&self, filters: &[String]) -> Result<Vec<ImageRecord>> {
        let filters = Filters::parse(filters)?;
        let state = self.state();
        let images = state.images.iter().filter(|(name, image)| {
            let field = |f: &str| match f {
                "name" => Some((*name).clone()),
                "target.digest" => Some(image.target.digest.to_string()),
                "target.mediatype" => Some(image.target.media_type.clone()),
                _ => None,
            };
            filters.matches(&field, &image.labels)
        });
        Ok(images.map(|(name, image)| record(name, image)).collect())
    }

    async fn put(&self, name: &str, target: &Descriptor, labels: &Labels) -> Result<()> {
        let mut state = self.state();
        if !state.blobs.contains_key(&target.digest) {
            // containerd takes such a record; here it shows a name that was published too early.
            return Err(Fault::internal(format!(
                "image {name:?} names {}, which is not stored",
                target.digest
            )));
        }
        let updated = SystemTime::now();
        let image = state.images.entry(name.into()).or_insert_with(|| ImageState {
            target: target.clone(),
            labels: Labels::new(),
            updated,
        });
        image.target = target.clone();
        image.updated = updated;
        relabel(&mut image.labels, labels);
        state.committed(1);
        Ok(())
    }

    async fn delete(&self, name: &str, _sync: bool) -> Result<()> {
        {
            let mut state = self.state();
            if state.images.remove(name).is_none() {
                return Err(Fault::not_found(format!("image {name:?} does not exist")));
            }
            state.committed(1);
        }
        self.gc();
        Ok(())
    }
}
