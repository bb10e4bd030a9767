//! The port to layers that are readable without having been unpacked.

use crate::{Labels, LayerId, Usage};
use shipway_fault::{Fault, Result};
use shipway_oci::ChainId;
use std::{collections::BTreeSet, path::PathBuf};

/// What a layer is unpacked over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Below {
    /// It is the lowest.
    Nothing,
    /// A stack of layers.
    Chain(ChainId),
    /// A snapshot that is not known to be a stack of layers.
    Unknown,
}

/// Whoever serves layers out of a registry.
///
/// What of a layer nobody *holds* is a cache: it may go at any time, and come back by
/// [`LazyLayers::find`]. Each `find` that finds something and [`LazyLayers::restore`] give holds,
/// [`LazyLayers::release`] gives one back. There is one for all snapshots of a layer together, and
/// one for a moment each time that it is found again.
///
/// All calls may block; none is made while a lock is held. [`LazyLayers::mount`] and
/// [`LazyLayers::unmount`] of one layer are never made at the same time, and only for layers that
/// are held.
pub trait LazyLayers: Send + Sync + 'static {
    /// Called once and before all others: `layers` are those that there are snapshots of. Each is
    /// held once, and nothing else is; what else an earlier life left mounted is unmounted.
    fn restore(&self, layers: &BTreeSet<LayerId>) -> Restored;

    /// The layer that the labels of a Prepare by a client of `namespace` name, ready to be mounted
    /// and held; `None` if it has to be unpacked the ordinary way, for whatever reason. The caller
    /// waits, and containerd's client with it, so this has to end within some seconds (10 by
    /// default), unless the layer is pulled as a whole, which takes no longer than unpacking it
    /// would.
    fn find(&self, namespace: &str, labels: &Labels, below: Below) -> Option<LayerId>;

    /// A layer that [`LazyLayers::find`] did not find was unpacked: the snapshot that was prepared
    /// with these labels is committed, by the client of `namespace`. Must not wait, for containerd
    /// holds a transaction meanwhile.
    fn unpacked(&self, namespace: &str, labels: &Labels);

    /// The directory with the layer's files: mounted when this returns, and until
    /// [`LazyLayers::unmount`]. Called whenever somebody is about to use it, mounted or not. The
    /// path is short: a hundred of them have to fit into the options of one mount.
    fn mount(&self, layer: LayerId) -> Result<PathBuf>;

    /// Nobody has used the directory for a while. Containers that run have references of their own.
    fn unmount(&self, layer: LayerId) -> Result<()>;

    /// What of the layer is on the disk now.
    fn usage(&self, layer: LayerId) -> Result<Usage>;

    /// Gives back one hold. With the last one the layer is not mounted any more, unless `unmount`
    /// has failed.
    fn release(&self, layer: LayerId);
}

/// What became of the layers of an earlier life.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Those that are mounted still; they are unmounted later if no snapshot needs them.
    pub mounted: BTreeSet<LayerId>,
    /// Those whose description is gone. Their snapshots are offered to nobody, and an error on use.
    pub lost: BTreeSet<LayerId>,
}

/// Every layer is unpacked.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoLazyLayers;

impl LazyLayers for NoLazyLayers {
    fn restore(&self, layers: &BTreeSet<LayerId>) -> Restored {
        Restored { mounted: BTreeSet::new(), lost: layers.clone() }
    }

    fn find(&self, _: &str, _: &Labels, _: Below) -> Option<LayerId> {
        None
    }

    fn unpacked(&self, _: &str, _: &Labels) {}

    fn mount(&self, layer: LayerId) -> Result<PathBuf> {
        Err(unserved(layer))
    }

    fn unmount(&self, _: LayerId) -> Result<()> {
        Ok(())
    }

    fn usage(&self, layer: LayerId) -> Result<Usage> {
        Err(unserved(layer))
    }

    fn release(&self, _: LayerId) {}
}

fn unserved(layer: LayerId) -> Fault {
    Fault::new(
        shipway_fault::Code::FailedPrecondition,
        format!("layer {} was not unpacked, and nothing serves it", layer.0),
    )
}
