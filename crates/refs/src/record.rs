//! What is known of a state, and how it is written into the labels of its lease.

use crate::{exact, id::RefId};
use shipway_oci::{Descriptor, DiffId, Digest};
use shipway_storage::{GC_FLAT, Labels, Lease, LeaseId, SnapshotKey};
use std::{
    fmt,
    str::FromStr,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// Paths of files in a root filesystem, in the order in which they are read.
pub type ReadOrder = Arc<[Vec<u8>]>;

/// What a state is for (row `so.rectypes`); prints as clients know it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum RecordType {
    /// The result of a step, or an image.
    #[default]
    Regular,
    /// Something of ours.
    Internal,
    /// The root filesystem of a frontend.
    Frontend,
    /// A client's directory.
    LocalSource,
    /// A git repository.
    GitCheckout,
    /// A cache mount.
    CacheMount,
}

impl RecordType {
    /// Whether it is a copy of what is elsewhere, and kept only to be brought up to date.
    pub(crate) fn is_source(self) -> bool {
        matches!(self, Self::LocalSource | Self::GitCheckout)
    }

    /// The name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Regular => "regular",
            Self::Internal => "internal",
            Self::Frontend => "frontend",
            Self::LocalSource => "source.local",
            Self::GitCheckout => "source.git.checkout",
            Self::CacheMount => "exec.cachemount",
        }
    }
}

impl fmt::Display for RecordType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for RecordType {
    type Err = ();

    fn from_str(s: &str) -> Result<Self, ()> {
        [
            Self::Regular,
            Self::Internal,
            Self::Frontend,
            Self::LocalSource,
            Self::GitCheckout,
            Self::CacheMount,
        ]
        .into_iter()
        .find(|t| t.as_str() == s)
        .ok_or(())
    }
}

/// One layer as a record remembers it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LayerMeta {
    pub diff_id: DiffId,
    /// Its blob, where one was known when the record was made.
    pub blob: Option<Descriptor>,
    /// Where the blob was to be fetched from then, as [`crate::LayerSource::origin`] says it.
    pub origin: Option<String>,
    /// Name of the snapshot whose top layer it is a copy of.
    pub copy_of: Option<SnapshotKey>,
    /// Name of the snapshot, where that has more than the layer.
    pub own: Option<SnapshotKey>,
    /// Whether the blob alone has the whole layer.
    pub blob_only: bool,
    /// When it came to be, where that is not when the record was made.
    pub created: Option<SystemTime>,
}

/// A state as its lease's labels record it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RecordMeta {
    pub record_type: RecordType,
    pub description: String,
    pub created: SystemTime,
    pub parents: Vec<RefId>,
    pub body: RecordBody,
}

/// The kinds of states that outlive the daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum RecordBody {
    /// Committed layers, lowest first.
    Layers(Vec<LayerMeta>),
    /// An active snapshot with this key, found by name.
    Named { name: String, snapshot: SnapshotKey },
}

/// Label that marks our leases and says which kind they are.
pub(crate) const KIND: &str = "shipway/kind";
/// Its value on leases that the next run deletes.
pub(crate) const KIND_RUN: &str = "epoch";
/// A label and its value for leases that the next run of the daemon deletes.
pub const RUN_KIND: (&str, &str) = (KIND, KIND_RUN);
/// A label and its value for leases of manifests and configs that sources keep for the next build;
/// a prune of everything ends them.
pub const DOCUMENT_KIND: (&str, &str) = (KIND, "document");
const KIND_LAYERS: &str = "layers";
const KIND_NAMED: &str = "named";
const PREFIX: &str = "shipway-ref-";
/// Labels of layers and of their blobs' annotations; the number of the layer follows.
const LAYER: &str = "shipway/layer.";
const ANNOTATIONS: &str = "shipway/annotations.";
/// containerd bounds a label's name and value together to 4096 bytes.
const VALUE_MAX: usize = 3900;

pub(crate) fn lease_of(id: &RefId) -> LeaseId {
    LeaseId(format!("{PREFIX}{}", id.0))
}

/// The labels of a state's lease.
pub(crate) fn labels_of(meta: &RecordMeta) -> Labels {
    let created = meta.created.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    let mut labels = exact::labels();
    labels.extend([
        (GC_FLAT.to_owned(), "true".to_owned()),
        ("shipway/type".into(), meta.record_type.to_string()),
        ("shipway/description".into(), cut(&meta.description, VALUE_MAX).into()),
        ("shipway/created".into(), created.to_string()),
    ]);
    if !meta.parents.is_empty() {
        let parents: Vec<&str> = meta.parents.iter().map(|p| p.0.as_str()).collect();
        labels.insert("shipway/parents".into(), cut(&parents.join(","), VALUE_MAX).into());
    }
    match &meta.body {
        RecordBody::Layers(layers) => {
            labels.insert(KIND.into(), KIND_LAYERS.into());
            for (i, layer) in layers.iter().enumerate() {
                let mut text = layer.diff_id.to_string();
                if let Some(blob) = &layer.blob {
                    text += &format!(" blob={},{},{}", blob.digest, blob.size, blob.media_type);
                    if let Some(notes) = annotations_of(blob) {
                        labels.insert(format!("{ANNOTATIONS}{i:04}"), notes);
                    }
                }
                if let Some(origin) = &layer.origin {
                    text += &format!(" origin={origin}");
                }
                if let Some(copy) = &layer.copy_of {
                    text += &format!(" copy={copy}");
                }
                if let Some(own) = &layer.own {
                    text += &format!(" own={own}");
                }
                if layer.blob_only {
                    text += " blob-only";
                }
                if let Some(created) = layer.created {
                    text += &format!(
                        " created={}",
                        created.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis()
                    );
                }
                labels.insert(format!("{LAYER}{i:04}"), text);
            }
        }
        RecordBody::Named { name, snapshot } => {
            labels.insert(KIND.into(), KIND_NAMED.into());
            labels.insert("shipway/name".into(), name.clone());
            labels.insert("shipway/snapshot".into(), snapshot.0.clone());
        }
    }
    labels
}

/// The annotations of a blob's descriptor as a label has them: manifests that name the blob again
/// repeat them. More of them than a label takes are not remembered.
fn annotations_of(blob: &Descriptor) -> Option<String> {
    let json = serde_json::to_string(&blob.annotations).ok();
    json.filter(|json| !blob.annotations.is_empty() && json.len() <= VALUE_MAX)
}

/// Reads a lease back; `None` for leases that are not ours, or that another version wrote in a way
/// we do not know.
pub(crate) fn read(lease: &Lease) -> Option<(RefId, RecordMeta)> {
    let id = RefId(lease.id.0.strip_prefix(PREFIX)?.to_owned());
    let label = |name: &str| lease.labels.get(name);
    let body = match label(KIND)?.as_str() {
        KIND_LAYERS => RecordBody::Layers(
            lease
                .labels
                .iter()
                .filter_map(|(k, v)| Some((k.strip_prefix(LAYER)?, v)))
                .map(|(i, v)| layer(v, label(&format!("{ANNOTATIONS}{i}"))))
                .collect::<Option<_>>()?,
        ),
        KIND_NAMED => RecordBody::Named {
            name: label("shipway/name")?.clone(),
            snapshot: SnapshotKey(label("shipway/snapshot")?.clone()),
        },
        _ => return None,
    };
    let meta = RecordMeta {
        record_type: label("shipway/type")?.parse().ok()?,
        description: label("shipway/description").cloned().unwrap_or_default(),
        created: UNIX_EPOCH + Duration::from_millis(label("shipway/created")?.parse().ok()?),
        parents: label("shipway/parents")
            .map(|p| p.split(',').map(|p| RefId(p.into())).collect())
            .unwrap_or_default(),
        body,
    };
    Some((id, meta))
}

fn layer(text: &str, annotations: Option<&String>) -> Option<LayerMeta> {
    let mut words = text.split(' ');
    let mut meta = LayerMeta {
        diff_id: words.next()?.parse().ok()?,
        blob: None,
        origin: None,
        copy_of: None,
        own: None,
        blob_only: false,
        created: None,
    };
    for word in words {
        if let Some(blob) = word.strip_prefix("blob=") {
            let mut parts = blob.splitn(3, ',');
            let (digest, size, media_type) = (parts.next()?, parts.next()?, parts.next()?);
            let mut blob = Descriptor::new(media_type, digest.parse().ok()?, size.parse().ok()?);
            blob.annotations =
                annotations.and_then(|a| serde_json::from_str(a).ok()).unwrap_or_default();
            meta.blob = Some(blob);
        } else if let Some(origin) = word.strip_prefix("origin=") {
            meta.origin = Some(origin.to_owned());
        } else if let Some(chain) = word.strip_prefix("copy=") {
            meta.copy_of = Some(SnapshotKey(chain.into()));
        } else if let Some(own) = word.strip_prefix("own=") {
            meta.own = Some(SnapshotKey(own.into()));
        } else if let Some(created) = word.strip_prefix("created=") {
            meta.created = UNIX_EPOCH.checked_add(Duration::from_millis(created.parse().ok()?));
        } else if word == "blob-only" {
            meta.blob_only = true;
        }
    }
    Some(meta)
}

/// The name of a named state as a label can hold it: long ones by digest.
pub(crate) fn name_of(key: &str) -> String {
    if key.len() <= VALUE_MAX && !key.is_empty() {
        key.to_owned()
    } else {
        Digest::of(key).to_string()
    }
}

fn cut(text: &str, max: usize) -> &str {
    &text[..text.floor_char_boundary(max)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::fresh_id;

    #[test]
    fn records_survive_their_labels() {
        let d = DiffId(Digest::of("x"));
        let mut blob = Descriptor::new("a/b+gzip", Digest::of("blob"), 7);
        blob.annotations.insert("k".into(), "a value, with \"quotes\"".into());
        let layers = vec![
            LayerMeta {
                diff_id: d,
                blob: Some(blob),
                origin: Some("r.example/a:1@sha256:x".into()),
                copy_of: Some(SnapshotKey(d.to_string())),
                own: Some(exact::own_name()),
                blob_only: true,
                created: Some(UNIX_EPOCH + Duration::from_millis(1_600_000_000_007)),
            },
            LayerMeta {
                diff_id: d,
                blob: None,
                origin: None,
                copy_of: None,
                own: None,
                blob_only: false,
                created: None,
            },
        ];
        for body in [
            RecordBody::Layers(layers),
            RecordBody::Named { name: "k".into(), snapshot: SnapshotKey("s".into()) },
        ] {
            let meta = RecordMeta {
                record_type: RecordType::CacheMount,
                description: "mount / from exec".into(),
                created: UNIX_EPOCH + Duration::from_millis(1_700_000_000_123),
                parents: vec![RefId("p".into()), RefId("q".into())],
                body,
            };
            let id = fresh_id();
            let lease = Lease { id: lease_of(&id), labels: labels_of(&meta), created: None };
            assert_eq!(read(&lease), Some((id, meta)));
        }
    }
}
