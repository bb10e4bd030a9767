//! Owns small conversions between containerd's messages and ours that several services share.

use containerd_client::types;
use shipway_fault::{Fault, Result};
use shipway_oci::{Descriptor, Digest};
use shipway_storage::{Labels, Mount, RawMount};
use std::{
    collections::HashMap,
    time::{Duration, SystemTime},
};

pub(crate) fn labels_in(labels: HashMap<String, String>) -> Labels {
    labels.into_iter().collect()
}

pub(crate) fn labels_out(labels: &Labels) -> HashMap<String, String> {
    labels.iter().map(|(k, v)| (k.clone(), v.clone())).collect()
}

/// Field paths that touch just these labels, so that others' labels stay.
pub(crate) fn label_paths(labels: &Labels) -> impl Iterator<Item = String> {
    labels.keys().map(|k| format!("labels.{k}"))
}

pub(crate) fn mask(paths: impl IntoIterator<Item = String>) -> Option<prost_types::FieldMask> {
    Some(prost_types::FieldMask { paths: paths.into_iter().collect() })
}

pub(crate) fn time_in(time: Option<prost_types::Timestamp>) -> Option<SystemTime> {
    let time = time?;
    SystemTime::UNIX_EPOCH
        .checked_add(Duration::new(time.seconds.try_into().ok()?, time.nanos.try_into().ok()?))
}

pub(crate) fn digest_in(digest: &str) -> Result<Digest> {
    digest.parse().map_err(|e| {
        Fault::unimplemented(format!(
            "containerd names a blob {digest:?} ({e}); a digest other than sha256"
        ))
    })
}

pub(crate) fn descriptor_out(descriptor: &Descriptor) -> types::Descriptor {
    types::Descriptor {
        media_type: descriptor.media_type.clone(),
        digest: descriptor.digest.to_string(),
        size: descriptor.size as i64,
        annotations: descriptor.annotations.iter().map(|(k, v)| (k.clone(), v.clone())).collect(),
    }
}

pub(crate) fn descriptor_in(descriptor: types::Descriptor) -> Result<Descriptor> {
    let mut out = Descriptor::new(
        descriptor.media_type,
        digest_in(&descriptor.digest)?,
        descriptor.size.max(0) as u64,
    );
    out.annotations = descriptor.annotations.into_iter().collect();
    Ok(out)
}

pub(crate) fn mount_in(mount: types::Mount) -> Mount {
    Mount::from(RawMount {
        kind: mount.r#type,
        source: mount.source,
        target: mount.target,
        options: mount.options,
    })
}

pub(crate) fn mount_out(mount: &Mount) -> types::Mount {
    let RawMount { kind, source, target, options } = mount.raw();
    types::Mount { r#type: kind, source, target, options }
}
