//! The image port: names of manifests and indexes.

use crate::Labels;
use async_trait::async_trait;
use shipway_fault::Result;
use shipway_oci::Descriptor;
use std::time::SystemTime;

/// An image record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageRecord {
    /// Full name, or what a dangling prefix made of a digest.
    pub name: String,
    /// What the name points at.
    pub target: Descriptor,
    /// Labels, other programs' among them.
    pub labels: Labels,
    /// Last change.
    pub updated: Option<SystemTime>,
}

/// Image records of one namespace.
#[async_trait]
pub trait Images: Send + Sync {
    /// The record; `NotFound` if there is none.
    async fn get(&self, name: &str) -> Result<ImageRecord>;

    /// All records, or those that match any of the containerd filters.
    async fn list(&self, filters: &[String]) -> Result<Vec<ImageRecord>>;

    /// Points `name` at `target`, creating the record or updating it by field path: labels that others set survive.
    async fn put(&self, name: &str, target: &Descriptor, labels: &Labels) -> Result<()>;

    /// The same with a time for the record's own times, where the store lets one be chosen (row `ex.c.sde`).
    async fn put_at(&self, name: &str, target: &Descriptor, labels: &Labels, time: Option<SystemTime>) -> Result<()> {
        let _ = time;
        self.put(name, target, labels).await
    }

    /// Removes the record; `sync` waits for a garbage collection.
    async fn delete(&self, name: &str, sync: bool) -> Result<()>;
}
