//! The words: names, kinds, times, labels, usage, mounts.

use parking_lot::{Mutex, MutexGuard};
use serde::{Deserialize, Serialize};
use shipway_fault::{Fault, Result};
use shipway_layermount::MappedIds;
use shipway_oci::ChainId;
use std::{
    borrow::Borrow,
    collections::BTreeMap,
    fmt,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// Most bytes of a name.
pub const MAX_NAME: usize = 4096;
/// Most bytes of all labels of a snapshot together. containerd bounds each to 4096 and not their
/// number.
pub const MAX_LABELS: usize = 1 << 20;
/// The label that names the chain ID that a snapshot is, or that an active one is about to become.
pub const SNAPSHOT_REF: &str = "containerd.io/snapshot.ref";
/// The labels that say which ids of a container's user namespace are which of ours.
const UID_MAPPING: &str = "containerd.io/snapshot/uidmapping";
const GID_MAPPING: &str = "containerd.io/snapshot/gidmapping";

/// Number of a layer in the store of layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LayerId(pub u64);

/// Labels of a snapshot. None is empty: an empty value removes a label.
pub type Labels = BTreeMap<String, String>;

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What a panicking thread left is as consistent as what a kill leaves.
    mutex.lock()
}

/// The ids that labels map, if they map any.
pub(crate) fn mapped_ids(labels: &Labels) -> Result<Option<Arc<MappedIds>>> {
    match (labels.get(UID_MAPPING), labels.get(GID_MAPPING)) {
        (None, None) => Ok(None),
        (uids, gids) => {
            let text = |ids: Option<&String>| ids.map_or("", String::as_str).to_owned();
            MappedIds::parse(&text(uids), &text(gids)).map(|ids| Some(Arc::new(ids)))
        }
    }
}

/// Checks labels from outside and drops those with an empty value, as containerd's store does.
pub(crate) fn checked(mut labels: Labels) -> Result<Labels> {
    let size: usize = labels.iter().map(|(key, value)| key.len() + value.len()).sum();
    if size > MAX_LABELS {
        return Err(Fault::invalid(format!(
            "the labels of a snapshot have {size} bytes; at most {MAX_LABELS} are kept"
        )));
    }
    labels.retain(|_, value| !value.is_empty());
    Ok(labels)
}

/// Name of a committed snapshot or key of one that is not: 1 to [`MAX_NAME`] bytes.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(Arc<str>);

impl Name {
    /// Checks a name from outside.
    pub fn new(text: impl Into<String>) -> Result<Self> {
        let text = text.into();
        match text.len() {
            0 => Err(Fault::invalid("a snapshot has no name")),
            1..=MAX_NAME => Ok(Self(text.into())),
            n => Err(Fault::invalid(format!(
                "the name of a snapshot has {n} bytes; at most {MAX_NAME} are allowed"
            ))),
        }
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The containerd namespace it was made in: what is before the first slash.
    pub fn namespace(&self) -> &str {
        self.0.split_once('/').map_or("", |(namespace, _)| namespace)
    }

    /// What containerd's client called it: the third part of `<namespace>/<number>/<key>`, or the
    /// whole of another name.
    pub fn local(&self) -> &str {
        self.0.splitn(3, '/').nth(2).unwrap_or(&self.0)
    }
}

impl TryFrom<String> for Name {
    type Error = Fault;
    fn try_from(text: String) -> Result<Self> {
        Self::new(text)
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.as_str().to_owned()
    }
}

impl Borrow<str> for Name {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", &*self.0)
    }
}

/// Kind of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Writable.
    Active,
    /// Read-only mount of a committed one.
    View,
    /// Immutable, and the only kind that can be a parent.
    Committed,
}

impl Kind {
    /// As containerd's filters spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::View => "view",
            Self::Committed => "committed",
        }
    }
}

/// Nanoseconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Time(u64);

impl Time {
    pub(crate) fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
    }
}

impl From<Time> for SystemTime {
    fn from(time: Time) -> Self {
        UNIX_EPOCH + Duration::from_nanos(time.0)
    }
}

/// Disk use of one snapshot without its parents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Bytes of the blocks that are allocated.
    pub bytes: u64,
    /// Inodes.
    pub inodes: u64,
}

/// A mount for the client to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// `overlay` or `bind`.
    pub kind: &'static str,
    /// Source path, or `overlay`.
    pub source: String,
    /// Options, those that are flags of mount(2) included.
    pub options: Vec<String>,
}

/// What is known of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// Its name.
    pub name: Name,
    /// Its kind.
    pub kind: Kind,
    /// Name of its parent.
    pub parent: Option<Name>,
    /// Its labels.
    pub labels: Labels,
    /// When it was made, or committed.
    pub created: Time,
    /// When its labels were changed last.
    pub updated: Time,
}

/// Number of a directory below `snapshots/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct DirectoryId(pub(crate) u64);

/// Where the files of a snapshot are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Backing {
    Directory(DirectoryId),
    Layer(LayerId),
}

/// A snapshot as it is stored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Row {
    pub(crate) backing: Backing,
    pub(crate) kind: Kind,
    pub(crate) parent: Option<Name>,
    pub(crate) labels: Labels,
    pub(crate) created: Time,
    pub(crate) updated: Time,
    /// Nothing until the files of a committed one were counted.
    pub(crate) usage: Option<Usage>,
}

impl Row {
    pub(crate) fn info(&self, name: &Name) -> Info {
        Info {
            name: name.clone(),
            kind: self.kind,
            parent: self.parent.clone(),
            labels: self.labels.clone(),
            created: self.created,
            updated: self.updated,
        }
    }

    /// The chain ID that it is or is to become: what its label says, else its name if that is one,
    /// as `Image.Unpack` of older clients and our builder leave it.
    pub(crate) fn chain<'a>(&'a self, name: &'a Name) -> Option<&'a str> {
        let labeled = self.labels.get(SNAPSHOT_REF).map(String::as_str);
        labeled.or_else(|| {
            (self.kind == Kind::Committed && name.local().parse::<ChainId>().is_ok())
                .then(|| name.local())
        })
    }
}
