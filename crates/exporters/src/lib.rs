//! Exporters: what becomes of a build's result. [`Exporters::resolve`] checks attributes before
//! anything is built; the exporter it gives runs when all is solved.
//!
//! `writer` writes manifests, configs and indexes for all that make images; layers are compressed
//! by `refs`. Names are written last, by field path.

mod archive;
mod config;
mod exporters;
mod hollow;
mod image;
mod learn;
mod lease;
mod optimize;
mod options;
mod port;
mod publish;
mod push;
mod replace;
mod services;
mod spdx;
mod statements;
mod tarball;
mod tree;
mod writer;

pub use exporters::Exporters;
pub use hollow::LazyBlobs;
pub use port::{
    Content, ExportAttestation, ExportContext, ExportInput, ExportPlatform, ExportTarget, Exported,
    Exporter, Finalizers, Maker, Response, StateWatcher,
};
pub use publish::Publishing;
pub use writer::is_internal;
