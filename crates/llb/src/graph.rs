//! The checked graph: vertices in an order in which inputs come first (rows `llb.terminal`,
//! `llb.digest`, `llb.validate`).

use crate::{
    Caps, Definition, OpMetadata, SourceMap, decode, encode, names,
    ops::{Op, SourceOp},
};
use bytes::Bytes;
use shipway_fault::{Fault, redact_text};
use shipway_oci::{Digest, Platform};
use shipway_proto::pb;
use std::{collections::HashMap, sync::Arc};

/// More operations than this in one definition are refused.
pub const MAX_OPS: usize = 100_000;
/// More inputs of all operations together than this are refused.
pub const MAX_EDGES: usize = 1_000_000;

/// One output of a vertex.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Edge {
    /// Index into [`Graph::vertices`].
    pub vertex: usize,
    /// Which of its outputs.
    pub output: usize,
}

/// An operation in its graph.
#[derive(Clone, Debug)]
pub struct Vertex {
    /// sha256 of `bytes`: its identity towards clients.
    pub digest: Digest,
    /// The operation as it came.
    pub bytes: Bytes,
    /// What it does.
    pub op: Op,
    /// What it needs; the vertices come earlier in the graph.
    pub inputs: Vec<Edge>,
    /// Where it runs: defaulted and normalized after digesting (row `llb.normplat`).
    pub platform: Platform,
    /// Filters for workers. There is one worker, so only those that name a network count (row
    /// `llb.constraints`), and those are in the operation already.
    pub constraints: Vec<String>,
    /// Its name in progress: the custom one, or by what it does (rows `llb.vname`, `llb.md.desc`).
    pub name: String,
    /// What else is known of it.
    pub metadata: OpMetadata,
}

impl Vertex {
    /// The operation as it came, but for users and passwords in the address of a source: for
    /// errors, which are kept.
    pub fn shown(&self) -> Bytes {
        let Ok(mut op) = decode::raw(&self.bytes) else { return self.bytes.clone() };
        let Some(pb::op::Op::Source(source)) = &mut op.op else { return self.bytes.clone() };
        let mut changed = false;
        for text in std::iter::once(&mut source.identifier).chain(source.attrs.values_mut()) {
            let shown = redact_text(text);
            changed |= shown != *text;
            *text = shown;
        }
        if changed { encode::raw(op) } else { self.bytes.clone() }
    }
}

/// A checked definition. It has at least one vertex.
#[derive(Clone, Debug)]
pub struct Graph {
    /// Inputs before those that need them; only what the result needs.
    pub vertices: Vec<Arc<Vertex>>,
    /// What the definition results in.
    pub result: Edge,
    /// Where operations come from.
    pub source: Option<Arc<SourceMap>>,
}

impl Graph {
    /// Reads and checks a definition; operations without platform get `platform`, and capabilities
    /// that `caps` lacks are refused.
    ///
    /// Digests are those of the bytes as they came, which are the ones a client correlates by.
    pub fn decode(
        definition: &Definition,
        caps: &Caps,
        platform: &Platform,
    ) -> Result<Self, Fault> {
        let Some((last, ops)) = definition.ops.split_last() else {
            return Err(Fault::invalid("invalid empty definition"));
        };
        if ops.is_empty() {
            return Err(Fault::invalid("invalid LLB with 1 vertexes"));
        }
        if definition.ops.len() > MAX_OPS {
            return Err(Fault::invalid(format!(
                "invalid LLB with {} vertexes: at most {MAX_OPS} are accepted",
                definition.ops.len()
            )));
        }
        let terminal = decode::raw(last)?;
        let Some(head) = terminal.inputs.first() else {
            return Err(Fault::invalid("invalid LLB with no inputs on last vertex"));
        };
        let by_digest: HashMap<Digest, &Bytes> =
            ops.iter().map(|bytes| (Digest::of(bytes), bytes)).collect();
        let mut walk = Walk {
            definition,
            caps,
            platform,
            by_digest,
            done: HashMap::new(),
            vertices: Vec::new(),
            edges: 0,
        };
        let head_digest = parse_digest(&head.digest)?;
        walk.reach(head_digest)?;
        let result = Edge { vertex: walk.done[&head_digest], output: output_index(0, head.index)? };
        Ok(Self { vertices: walk.vertices, result, source: definition.source.clone() })
    }

    /// The definition `definition`, from which this graph came, with other sources in the vertices
    /// that `changed` names by their digest. Whatever depends on them gets another digest; what was
    /// known of an operation is known of the one in its place.
    pub fn with_sources(
        &self,
        definition: &Definition,
        changed: &HashMap<Digest, SourceOp>,
    ) -> Result<Definition, Fault> {
        let mut renamed: HashMap<Digest, Digest> = HashMap::new();
        let mut out = Definition { metadata: definition.metadata.clone(), ..Definition::default() };
        let mut source = definition.source.as_deref().cloned();
        let rename = |op: &mut pb::Op, renamed: &HashMap<Digest, Digest>| -> Result<(), Fault> {
            for input in &mut op.inputs {
                if let Some(new) = renamed.get(&parse_digest(&input.digest)?) {
                    input.digest = new.to_string();
                }
            }
            Ok(())
        };
        for vertex in &self.vertices {
            let mut op = decode::raw(&vertex.bytes)?;
            rename(&mut op, &renamed)?;
            if let Some(new) = changed.get(&vertex.digest) {
                op.op = Some(pb::op::Op::Source(pb::SourceOp {
                    identifier: new.identifier.clone(),
                    attrs: new.attrs.clone(),
                }));
            }
            let touched = changed.contains_key(&vertex.digest)
                || vertex
                    .inputs
                    .iter()
                    .any(|e| renamed.contains_key(&self.vertices[e.vertex].digest));
            if !touched {
                out.ops.push(vertex.bytes.clone());
                continue;
            }
            let bytes = encode::raw(op);
            let (old, new) = (vertex.digest.to_string(), Digest::of(&bytes));
            if let Some(metadata) = definition.metadata.get(&old) {
                out.metadata.insert(new.to_string(), metadata.clone());
            }
            if let Some(map) = &mut source
                && let Some(places) = map.locations.get(&old).cloned()
            {
                map.locations.insert(new.to_string(), places);
            }
            renamed.insert(vertex.digest, new);
            out.ops.push(bytes);
        }
        if let Some(last) = definition.ops.last() {
            let mut terminal = decode::raw(last)?;
            rename(&mut terminal, &renamed)?;
            out.ops.push(encode::raw(terminal));
        }
        out.source = source.map(Arc::new);
        Ok(out)
    }

    /// The vertex of an edge.
    pub fn vertex(&self, edge: Edge) -> &Arc<Vertex> {
        &self.vertices[edge.vertex]
    }
}

struct Walk<'a> {
    definition: &'a Definition,
    caps: &'a Caps,
    platform: &'a Platform,
    by_digest: HashMap<Digest, &'a Bytes>,
    done: HashMap<Digest, usize>,
    vertices: Vec<Arc<Vertex>>,
    edges: usize,
}

impl Walk<'_> {
    /// Depth first without recursion, so that a long chain cannot exhaust the stack. Cycles cannot
    /// be: they would need a digest that contains itself.
    fn reach(&mut self, head: Digest) -> Result<(), Fault> {
        let mut stack = vec![(head, false)];
        while let Some((digest, inputs_done)) = stack.pop() {
            if self.done.contains_key(&digest) {
                continue;
            }
            let Some(&bytes) = self.by_digest.get(&digest) else {
                return Err(Fault::invalid(format!("invalid missing input digest {digest}")));
            };
            let decoded = decode::op(bytes)?;
            if inputs_done {
                self.add(digest, bytes.clone(), decoded)?;
                continue;
            }
            self.edges += decoded.inputs.len();
            if self.edges > MAX_EDGES {
                return Err(Fault::invalid(format!(
                    "invalid LLB with more than {MAX_EDGES} inputs"
                )));
            }
            stack.push((digest, true));
            for (input, _) in decoded.inputs.iter().rev() {
                stack.push((parse_digest(input)?, false));
            }
        }
        Ok(())
    }

    fn add(&mut self, digest: Digest, bytes: Bytes, decoded: decode::Decoded) -> Result<(), Fault> {
        let metadata =
            self.definition.metadata.get(&digest.to_string()).cloned().unwrap_or_default();
        for cap in &metadata.caps {
            self.caps.require(cap)?;
        }
        let inputs = decoded
            .inputs
            .iter()
            .enumerate()
            .map(|(i, (input, index))| {
                Ok(Edge {
                    vertex: self.done[&parse_digest(input)?],
                    output: output_index(i, *index)?,
                })
            })
            .collect::<Result<Vec<_>, Fault>>()?;
        let name = match metadata.description.get("llb.customname") {
            Some(name) => name.clone(),
            None => {
                names::of(&decoded.op, |input| self.vertices[inputs[input].vertex].name.as_str())
            }
        };
        let platform = decoded.platform.unwrap_or_else(|| self.platform.clone()).normalized();
        let vertex = Vertex {
            digest,
            bytes,
            op: decoded.op,
            inputs,
            platform,
            constraints: decoded.constraints,
            name,
            metadata,
        };
        self.done.insert(digest, self.vertices.len());
        self.vertices.push(Arc::new(vertex));
        Ok(())
    }
}

fn parse_digest(text: &str) -> Result<Digest, Fault> {
    text.parse().map_err(|_| {
        Fault::invalid(format!(
            "invalid missing input digest {}",
            text.chars().take(100).collect::<String>()
        ))
    })
}

fn output_index(input: usize, index: i64) -> Result<usize, Fault> {
    usize::try_from(index)
        .map_err(|_| Fault::invalid(format!("invalid input {input} output index {index}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{FileDraft, FileMkdir, MarshalOptions, State, VertexOptions};

    fn graph(definition: &Definition) -> Graph {
        Graph::decode(definition, &Caps::llb(), &Platform::new("linux", "amd64", "")).unwrap()
    }

    #[test]
    fn a_source_is_shown_without_what_is_secret_in_its_address() {
        let options = MarshalOptions {
            platform: Platform::new("linux", "amd64", ""),
            caps: None,
            local_unique_id: String::new(),
        };
        let built = |name: &str| {
            graph(
                &State::image(name, "", Default::default(), VertexOptions::named("base"))
                    .marshal(&options)
                    .unwrap(),
            )
        };
        let plain = built("docker.io/library/a:1");
        assert_eq!(plain.vertices[0].shown(), plain.vertices[0].bytes);
        let mut vertex = (*plain.vertices[0]).clone();
        let mut op = decode::raw(&vertex.bytes).unwrap();
        let Some(pb::op::Op::Source(source)) = &mut op.op else { panic!("no source") };
        source.identifier = "git://https://t0ken@h/r.git".into();
        source.attrs.insert("git.fullurl".into(), "https://u:t0ken@h/r.git".into());
        vertex.bytes = encode::raw(op);
        let shown = vertex.shown();
        assert!(!shown.windows(6).any(|w| w == b"t0ken@") && decode::raw(&shown).is_ok());
    }

    #[test]
    fn other_sources_give_other_digests_and_nothing_is_forgotten() {
        let image =
            |name: &str| State::image(name, "", Default::default(), VertexOptions::named("base"));
        let built = |name: &str| {
            let mkdir = FileMkdir { path: "/x".into(), mode: 0o755, ..FileMkdir::default() };
            let state =
                image(name).file(FileDraft::new().mkdir(mkdir), VertexOptions::named("mkdir"));
            state
                .marshal(&MarshalOptions {
                    platform: Platform::new("linux", "amd64", ""),
                    caps: None,
                    local_unique_id: String::new(),
                })
                .unwrap()
        };
        let (before, wanted) = (built("docker.io/library/a:1"), built("docker.io/library/b:1"));
        let graph_before = graph(&before);
        let source = SourceOp {
            identifier: "docker-image://docker.io/library/b:1".into(),
            attrs: Default::default(),
        };
        let changed = HashMap::from([(graph_before.vertices[0].digest, source)]);
        let after = graph_before.with_sources(&before, &changed).unwrap();
        assert_eq!(after.head(), wanted.head());
        assert_eq!(
            graph(&after).vertices.iter().map(|v| v.name.clone()).collect::<Vec<_>>(),
            ["base", "mkdir"]
        );
        assert_eq!(graph_before.with_sources(&before, &HashMap::new()).unwrap().ops, before.ops);
    }
}
