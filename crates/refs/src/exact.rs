//! What the snapshots of states are called.
//!
//! A snapshot under a chain ID is exactly what unpacking its layer over its parent gives, for
//! containerd and all its clients take it for that. A step that left something that its layer
//! cannot record ([`shipway_archive::Loss`]: the root's owner, a socket, …) is a state like any
//! other for the steps that follow, but its snapshot has a name of its own, and so has everything
//! on top of it. What needs the chain ID, as an image does, unpacks the layer's blob
//! ([`crate::ImmutableRef::unpack`]).
//!
//! Names of our own promise nothing and mean nothing to other programs; they are in the
//! labels of the record's lease, which alone keeps the snapshot.

use crate::{
    id::{fresh_id, id_of},
    layer::StackedLayer,
};
use shipway_fault::{Code, Fault};
use shipway_oci::{ChainId, DiffId};
use shipway_storage::{Labels, SnapshotInfo, SnapshotKey};
use std::collections::HashSet;

/// Label of snapshots that were committed as they were written, and of records: the version of the
/// rule by which they have their names. What was unpacked has no label of ours.
const RULE: &str = "shipway/exact";
/// Changes when something that an earlier version took for exact no longer is.
const VERSION: &str = "1";
/// Label of snapshots that were committed before there was a rule, with files that had other names
/// elsewhere.
const LINKED: &str = "shipway/linked";

/// The labels of a snapshot that is committed as it was written.
pub(crate) fn labels() -> Labels {
    Labels::from([(RULE.into(), VERSION.into())])
}

/// Whether something was committed, or recorded, by this rule.
pub(crate) fn is_ours(labels: &Labels) -> bool {
    labels.get(RULE).is_some_and(|v| v == VERSION)
}

/// Whether a snapshot is what its name promises: it was unpacked, or committed by this rule.
fn is_trusted(info: &SnapshotInfo) -> bool {
    is_ours(&info.labels) || !info.labels.contains_key(RULE) && !info.labels.contains_key(LINKED)
}

/// A name for a state that has more than its layers.
pub(crate) fn own_name() -> SnapshotKey {
    SnapshotKey(format!("shipway-state-{}", fresh_id()))
}

/// Names that are taken by snapshots which are not what they promise.
#[derive(Default)]
pub(crate) struct Distrusted(parking_lot::Mutex<HashSet<SnapshotKey>>);

impl Distrusted {
    /// Checks all snapshots there are. What lies on a snapshot that is not what it promises is not
    /// either.
    pub fn load(&self, all: &[SnapshotInfo]) {
        let mut bad: HashSet<SnapshotKey> =
            all.iter().filter(|s| !is_trusted(s)).map(|s| s.key.clone()).collect();
        loop {
            let over = |s: &&SnapshotInfo| {
                !bad.contains(&s.key)
                    && !is_ours(&s.labels)
                    && s.parent.as_ref().is_some_and(|p| bad.contains(p))
            };
            let more: Vec<_> = all.iter().filter(over).map(|s| s.key.clone()).collect();
            if more.is_empty() {
                break;
            }
            bad.extend(more);
        }
        *self.0.lock() = bad;
    }

    /// Whether a snapshot that exists is what its name promises; if it is not, its name is avoided
    /// from now on.
    pub fn accepts(&self, info: &SnapshotInfo) -> bool {
        if is_trusted(info) && !self.0.lock().contains(&info.key) {
            return true;
        }
        tracing::warn!(snapshot = %info.key, "snapshot was made by an incompatible version of shipway, not using it");
        self.0.lock().insert(info.key.clone());
        false
    }

    /// The name of what unpacking the layer `diff_id` over `below` gives.
    pub fn name_over(&self, below: Option<&StackedLayer>, diff_id: DiffId) -> SnapshotKey {
        let chain: SnapshotKey = ChainId::extend(below.map(|c| c.chain_id), diff_id).into();
        let exact = below.is_none_or(StackedLayer::is_exact) && !self.0.lock().contains(&chain);
        if exact {
            return chain;
        }
        let below = below.map_or("", |c| &c.snapshot.0);
        SnapshotKey(format!("shipway-over-{}", id_of(format!("{VERSION} {below} {diff_id}"))))
    }
}

/// The fault of a name that another program took in the meantime. The next build avoids it.
pub(crate) fn taken(name: &SnapshotKey) -> Fault {
    Fault::new(Code::Aborted, format!("the snapshot {name} was made by another version of shipway"))
        .hint("only one version may work in a containerd namespace; build again")
}

#[cfg(test)]
mod tests {
    use super::*;
    use shipway_storage::SnapshotKind;

    #[test]
    fn what_another_version_made_is_not_trusted_nor_what_lies_on_it() {
        let info = |key: &str, parent: &str, labels: &[(&str, &str)]| SnapshotInfo {
            key: SnapshotKey(key.into()),
            parent: (!parent.is_empty()).then(|| SnapshotKey(parent.into())),
            kind: SnapshotKind::Committed,
            labels: labels.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect(),
        };
        let all = [
            info("on both", "on old", &[]),
            info("on old", "old", &[("containerd.io/snapshot.ref", "x")]),
            info("old", "pulled", &[(RULE, "0")]),
            info("older", "pulled", &[("shipway/linked", "true")]),
            info("step", "pulled", &[(RULE, VERSION)]),
            info("pulled", "", &[]),
        ];
        let distrusted = Distrusted::default();
        distrusted.load(&all);
        let accepted: Vec<_> =
            all.iter().filter(|i| distrusted.accepts(i)).map(|i| i.key.0.as_str()).collect();
        assert_eq!(accepted, ["step", "pulled"]);
        let later = info("later", "pulled", &[(RULE, "2")]);
        assert!(!distrusted.accepts(&later));
    }
}
