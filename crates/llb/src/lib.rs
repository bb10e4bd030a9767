//! The typed build graph: decode, validate, digest, build.
//!
//! [`Definition`] is the container that travels: marshalled operations, their metadata, the source
//! map. [`Graph::decode`] turns one into checked [`Vertex`]es with plain Rust types; [`State`] goes
//! the other way and marshals to the same bytes as BuildKit's Go client, because digests are the
//! API (rows `llb.*`). Protobuf types appear only in the conversions of [`Definition`] and
//! [`SourceFacts`]; nothing here knows how an operation runs.
//!
//! `prost` is here because the wire types need it to encode and decode; `bytes` keeps operations as
//! they came without copies; `serde_json` and `base64` write operations as provenance has them;
//! `prost-reflect` writes definitions as canonical JSON from their descriptors.

pub mod attr;
mod canonical;
pub mod caps;
mod decode;
mod definition;
mod draft;
mod encode;
mod env;
mod facts;
mod foreign;
mod gitref;
mod graph;
pub mod json;
mod marshal;
mod names;
pub mod ops;
mod options;
pub mod paths;
pub mod policy;
mod state;

pub use caps::Caps;
pub use definition::{
    Definition, ExportCache, LinuxResources, Location, OpMetadata, ProgressGroup, SourceMap,
};
pub use draft::{ExecDraft, FileDraft, MountDraft, MountSource, SecretDraft, SshDraft};
pub use env::EnvList;
pub use facts::{
    AttestationChain, GitFacts, HttpFacts, ImageFacts, ResolveMode, ResolveOptions, SourceFacts,
};
pub use gitref::GitRef;
pub use graph::{Edge, Graph, Vertex};
pub use marshal::{DEFAULT_PATH, MarshalOptions};
pub use ops::*;
pub use options::{SourceLocation, VertexOptions};
pub use policy::SourcePolicy;
pub use state::{Deferred, Output, State};
