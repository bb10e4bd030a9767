//! The port to layers that are readable without having been unpacked.

use crate::{Labels, Usage};
use serde::{Deserialize, Serialize};
use shipway_fault::{Fault, Result};
use std::path::PathBuf;

/// Number of a layer in the store of layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LayerId(pub u64);

/// Whoever serves layers out of a registry. All calls may block; none is made while a lock is held.
pub trait LazyLayers: Send + Sync + 'static {
    /// The layer that the labels of a Prepare name, ready to be read; `None` if it has to be
    /// unpacked the ordinary way, for whatever reason. Called again for a layer that is known
    /// already when another chain ends in it.
    fn find(&self, labels: &Labels) -> Option<LayerId>;

    /// The directory with the layer's files, mounted when this returns and for as long as a
    /// snapshot that can be written or viewed stands on it.
    fn directory(&self, layer: LayerId) -> Result<PathBuf>;

    /// What of the layer is on the disk now.
    fn usage(&self, layer: LayerId) -> Result<Usage>;

    /// No snapshot is made of this layer any more.
    fn release(&self, layer: LayerId);
}

/// Every layer is unpacked.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoLazyLayers;

impl LazyLayers for NoLazyLayers {
    fn find(&self, _: &Labels) -> Option<LayerId> {
        None
    }

    fn directory(&self, layer: LayerId) -> Result<PathBuf> {
        Err(unserved(layer))
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
