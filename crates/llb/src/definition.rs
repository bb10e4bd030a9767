//! The container that travels: operations as bytes, metadata by digest, the source map (rows
//! `llb.def`, `llb.md.*`, `llb.src`).

use bytes::Bytes;
use prost::Message;
use shipway_fault::{Fault, Position, SourceFile, Span};
use shipway_oci::Digest;
use shipway_proto::pb;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

/// A build graph as it travels. The last operation is the terminal one (row `llb.terminal`).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Definition {
    /// Marshalled operations, byte for byte as they came.
    pub ops: Vec<Bytes>,
    /// Metadata by digest of the operation's bytes.
    pub metadata: BTreeMap<String, OpMetadata>,
    /// Where operations come from.
    pub source: Option<Arc<SourceMap>>,
}

/// What is known of an operation besides its bytes; not part of its digest.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OpMetadata {
    /// Whether it runs though the cache has a result (row `llb.md.ignorecache`).
    pub ignore_cache: bool,
    /// Free text by key; `llb.customname` is its name in progress (row `llb.md.desc`).
    pub description: BTreeMap<String, String>,
    /// Whether its result goes into exported caches; `None` leaves that to the export (row
    /// `llb.md.exportcache`).
    pub export_cache: Option<ExportCache>,
    /// Capabilities that it needs; one that is not known fails the load (row `llb.md.caps`).
    pub caps: BTreeSet<String>,
    /// Group that it is shown under (row `llb.md.progress`).
    pub progress_group: Option<ProgressGroup>,
    /// Limits of memory and processors for a step; not part of the cache key (row `llb.md.res`).
    pub resources: Option<LinuxResources>,
}

impl OpMetadata {
    /// Adds what `other` says, as Go's client does when two states marshal to the same operation.
    pub fn merge(&mut self, other: &OpMetadata) {
        self.ignore_cache |= other.ignore_cache;
        self.description.extend(other.description.clone());
        if other.export_cache.is_some() {
            self.export_cache = other.export_cache;
        }
        self.caps.extend(other.caps.iter().cloned());
        if other.progress_group.is_some() {
            self.progress_group.clone_from(&other.progress_group);
        }
        if other.resources.is_some() {
            self.resources.clone_from(&other.resources);
        }
    }
}

/// Whether a vertex's result goes into exported caches, where the vertex says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportCache {
    /// It goes, also where only the build's result is exported.
    Yes,
    /// It does not go.
    No,
}

/// A group that clients fold vertices into.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct ProgressGroup {
    /// What the vertices of one group have in common.
    pub id: String,
    /// Name of the group in progress.
    pub name: String,
    /// Whether the vertex alone is no reason to show the group.
    pub weak: bool,
}

/// Limits of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LinuxResources {
    /// Memory, in bytes.
    pub memory: i64,
    /// Memory and swap together, in bytes; -1 for no limit.
    pub memory_swap: i64,
    /// Weight among other processes that want the processors.
    pub cpu_shares: u64,
    /// Length of a period of the scheduler, in microseconds.
    pub cpu_period: u64,
    /// Processor time within a period, in microseconds.
    pub cpu_quota: i64,
    /// Processors that may be used, such as `0-3,7`.
    pub cpuset_cpus: String,
    /// Memory nodes that may be used, such as `0`.
    pub cpuset_mems: String,
}

/// Where operations come from.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SourceMap {
    /// The texts.
    pub files: Vec<Arc<SourceFile>>,
    /// Places by digest of the operation.
    pub locations: BTreeMap<String, Vec<Location>>,
}

/// Places in one text.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Location {
    /// Index into [`SourceMap::files`].
    pub file: usize,
    /// Where.
    pub spans: Vec<Span>,
}

impl SourceMap {
    /// The texts and spans of an operation.
    pub fn find<'a>(
        &'a self,
        digest: &str,
    ) -> impl Iterator<Item = (&'a Arc<SourceFile>, &'a [Span])> + 'a {
        let locations = self.locations.get(digest).map(Vec::as_slice).unwrap_or_default();
        locations.iter().filter_map(|l| Some((self.files.get(l.file)?, l.spans.as_slice())))
    }
}

impl Definition {
    /// Reads an encoded `pb.Definition`.
    pub fn decode(bytes: &[u8]) -> Result<Self, Fault> {
        let pb = pb::Definition::decode(bytes)
            .map_err(|e| Fault::invalid(format!("failed to parse llb definition: {e}")))?;
        Ok(Self::from_pb(pb))
    }

    /// The encoded `pb.Definition`.
    pub fn encode(&self) -> Vec<u8> {
        self.to_pb().encode_to_vec()
    }

    /// Takes a definition off the wire.
    pub fn from_pb(pb: pb::Definition) -> Self {
        Self {
            ops: pb.def.into_iter().map(Bytes::from).collect(),
            metadata: pb
                .metadata
                .into_iter()
                .map(|(digest, m)| (digest, OpMetadata::from_pb(m)))
                .collect(),
            source: pb.source.map(|s| Arc::new(SourceMap::from_pb(s))),
        }
    }

    /// Puts it on the wire.
    pub fn to_pb(&self) -> pb::Definition {
        pb::Definition {
            def: self.ops.iter().map(|op| op.to_vec()).collect(),
            metadata: self.metadata.iter().map(|(digest, m)| (digest.clone(), m.to_pb())).collect(),
            source: self.source.as_ref().map(|s| s.to_pb()),
        }
    }

    /// The same operations, with the output `output` of the operation `head` as the result.
    #[must_use]
    pub fn with_head(&self, head: Digest, output: usize) -> Self {
        let mut ops = self.ops.clone();
        ops.pop();
        ops.push(crate::encode::terminal(head, output));
        Self { ops, ..self.clone() }
    }

    /// Whether there is nothing in it, which means scratch.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// Digest of the operation whose result the definition is; `None` for an empty or broken one.
    pub fn head(&self) -> Option<Digest> {
        let op = pb::Op::decode(self.ops.last()?.as_ref()).ok()?;
        op.inputs.first()?.digest.parse().ok()
    }
}

impl OpMetadata {
    fn from_pb(pb: pb::OpMetadata) -> Self {
        Self {
            ignore_cache: pb.ignore_cache,
            description: pb.description,
            export_cache: pb
                .export_cache
                .map(|e| if e.value { ExportCache::Yes } else { ExportCache::No }),
            caps: pb.caps.into_keys().collect(),
            progress_group: pb.progress_group.map(|g| ProgressGroup {
                id: g.id,
                name: g.name,
                weak: g.weak,
            }),
            resources: pb.linux_resources.map(|r| LinuxResources {
                memory: r.memory,
                memory_swap: r.memory_swap,
                cpu_shares: r.cpu_shares,
                cpu_period: r.cpu_period,
                cpu_quota: r.cpu_quota,
                cpuset_cpus: r.cpuset_cpus,
                cpuset_mems: r.cpuset_mems,
            }),
        }
    }

    fn to_pb(&self) -> pb::OpMetadata {
        pb::OpMetadata {
            ignore_cache: self.ignore_cache,
            description: self.description.clone(),
            export_cache: self
                .export_cache
                .map(|e| pb::ExportCache { value: e == ExportCache::Yes }),
            caps: self.caps.iter().map(|c| (c.clone(), true)).collect(),
            progress_group: self.progress_group.clone().map(|g| pb::ProgressGroup {
                id: g.id,
                name: g.name,
                weak: g.weak,
            }),
            linux_resources: self.resources.clone().map(|r| pb::LinuxResources {
                memory: r.memory,
                memory_swap: r.memory_swap,
                cpu_shares: r.cpu_shares,
                cpu_period: r.cpu_period,
                cpu_quota: r.cpu_quota,
                cpuset_cpus: r.cpuset_cpus,
                cpuset_mems: r.cpuset_mems,
            }),
        }
    }
}

impl SourceMap {
    fn from_pb(pb: pb::Source) -> Self {
        let position = |p: Option<pb::Position>| {
            p.map(|p| Position { line: p.line, character: p.character }).unwrap_or_default()
        };
        let span = |r: pb::Range| Span { start: position(r.start), end: position(r.end) };
        let location = |l: pb::Location| {
            Some(Location {
                file: usize::try_from(l.source_index).ok()?,
                spans: l.ranges.into_iter().map(span).collect(),
            })
        };
        let file = |i: pb::SourceInfo| {
            Arc::new(SourceFile {
                filename: i.filename,
                language: i.language,
                data: i.data,
                definition: i.definition.map(|d| d.encode_to_vec()),
            })
        };
        Self {
            files: pb.infos.into_iter().map(file).collect(),
            locations: pb
                .locations
                .into_iter()
                .map(|(d, l)| (d, l.locations.into_iter().filter_map(location).collect()))
                .collect(),
        }
    }

    fn to_pb(&self) -> pb::Source {
        let position = |p: Position| Some(pb::Position { line: p.line, character: p.character });
        let range = |s: &Span| pb::Range { start: position(s.start), end: position(s.end) };
        let location = |l: &Location| pb::Location {
            source_index: i32::try_from(l.file).unwrap_or(i32::MAX),
            ranges: l.spans.iter().map(range).collect(),
        };
        let info = |f: &Arc<SourceFile>| pb::SourceInfo {
            filename: f.filename.clone(),
            language: f.language.clone(),
            data: f.data.clone(),
            definition: f.definition.as_deref().and_then(|d| pb::Definition::decode(d).ok()),
        };
        pb::Source {
            locations: self
                .locations
                .iter()
                .map(|(d, l)| {
                    (d.clone(), pb::Locations { locations: l.iter().map(location).collect() })
                })
                .collect(),
            infos: self.files.iter().map(info).collect(),
        }
    }
}
