//! The image port: names of manifests and indexes.

use crate::Labels;
use async_trait::async_trait;
use shipway_fault::Result;
use shipway_oci::{Descriptor, timestamp};
use std::time::SystemTime;

/// Label on a record that a build wrote: the digest that it gave to the name, and when. It holds as
/// long as the name leads there.
const BUILT: &str = "shipway/built";
/// Label that CRI sets on the records of the images that it manages.
const CRI_IMAGE: (&str, &str) = ("io.cri-containerd.image", "managed");

/// The labels of a record that a build writes at `time` to lead to `target`.
pub fn built_labels(target: &Descriptor, time: SystemTime) -> Labels {
    Labels::from([(
        BUILT.to_owned(),
        format!("{} {}", target.digest, timestamp::format_whole(time)),
    )])
}

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

impl ImageRecord {
    /// When a build here gave the name to what it leads to. `None` for images from elsewhere:
    /// labels survive an update by field path, so one whose target another client has changed since
    /// carries the digest of another image.
    pub fn built(&self) -> Option<SystemTime> {
        let (digest, time) = self.labels.get(BUILT)?.split_once(' ')?;
        (digest.parse() == Ok(self.target.digest)).then(|| timestamp::parse(time))?
    }

    /// Whether Kubernetes' CRI manages the image.
    pub fn is_cri_managed(&self) -> bool {
        self.labels.get(CRI_IMAGE.0).is_some_and(|v| v == CRI_IMAGE.1)
    }
}

/// Image records of one namespace.
#[async_trait]
pub trait Images: Send + Sync {
    /// The record; `NotFound` if there is none.
    async fn get(&self, name: &str) -> Result<ImageRecord>;

    /// All records, or those that match any of the containerd filters.
    async fn list(&self, filters: &[String]) -> Result<Vec<ImageRecord>>;

    /// Points `name` at `target`, creating the record or updating it by field path: labels that
    /// others set survive.
    async fn put(&self, name: &str, target: &Descriptor, labels: &Labels) -> Result<()>;

    /// The same with a time for the record's own times, where the store lets one be chosen (row
    /// `ex.c.sde`).
    async fn put_at(
        &self,
        name: &str,
        target: &Descriptor,
        labels: &Labels,
        time: Option<SystemTime>,
    ) -> Result<()> {
        let _ = time;
        self.put(name, target, labels).await
    }

    /// Removes the record; `sync` waits for a garbage collection.
    async fn delete(&self, name: &str, sync: bool) -> Result<()>;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, UNIX_EPOCH};

    #[test]
    fn an_image_is_built_here_while_its_name_leads_to_what_was_built() {
        let (ours, other) = (Descriptor::of("m", b"ours"), Descriptor::of("m", b"other"));
        let time = UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let record = |target: &Descriptor, labels: Labels| ImageRecord {
            name: "n".into(),
            target: target.clone(),
            labels,
            updated: None,
        };
        assert_eq!(record(&ours, built_labels(&ours, time)).built(), Some(time));
        assert_eq!(record(&other, built_labels(&ours, time)).built(), None);
        assert_eq!(record(&ours, Labels::new()).built(), None);
        for bad in ["", "x", &format!("{} yesterday", ours.digest), &ours.digest.to_string()] {
            assert_eq!(
                record(&ours, Labels::from([(BUILT.to_owned(), bad.to_owned())])).built(),
                None,
                "{bad}"
            );
        }
    }
}
