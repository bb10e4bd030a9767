//! States that come from a finished definition: inputs of a frontend, which it builds on without
//! taking them apart.

use crate::{
    Definition, OpMetadata, SourceLocation, VertexOptions, decode,
    state::{Draft, DraftKind, Output, OutputKind, State},
};
use bytes::Bytes;
use shipway_fault::Fault;
use shipway_oci::Digest;
use std::{collections::HashMap, sync::Arc};

impl State {
    /// The state that `definition` results in. Its operations keep their bytes, and so their
    /// digests.
    pub fn from_definition(definition: &Definition) -> Result<Self, Fault> {
        let Some((last, ops)) = definition.ops.split_last() else { return Ok(Self::scratch()) };
        let terminal = decode::raw(last)?;
        let Some(head) = terminal.inputs.first() else {
            return Err(Fault::invalid("invalid LLB with no inputs on last vertex"));
        };
        let by_digest: HashMap<Digest, &Bytes> =
            ops.iter().map(|op| (Digest::of(op), op)).collect();
        let mut done: HashMap<Digest, Arc<Draft>> = HashMap::new();
        let mut platform = None;
        let root = digest(&head.digest)?;
        let mut stack = vec![(root, false)];
        while let Some((current, inputs_done)) = stack.pop() {
            if done.contains_key(&current) {
                continue;
            }
            let Some(&bytes) = by_digest.get(&current) else {
                return Err(Fault::invalid(format!("invalid missing input digest {current}")));
            };
            let decoded = decode::op(bytes)?;
            let inputs = decoded
                .inputs
                .iter()
                .map(|(d, i)| Ok((digest(d)?, output(*i)?)))
                .collect::<Result<Vec<_>, Fault>>()?;
            if !inputs_done {
                stack.push((current, true));
                stack.extend(inputs.iter().rev().map(|(d, _)| (*d, false)));
                continue;
            }
            if current == root {
                platform = decoded.platform;
            }
            let inputs = inputs
                .iter()
                .map(|(d, index)| Output(OutputKind::Of { vertex: done[d].clone(), index: *index }))
                .collect();
            let draft = Draft {
                kind: DraftKind::Foreign(bytes.clone()),
                inputs,
                options: options(definition, current),
            };
            done.insert(current, Arc::new(draft));
        }
        let out =
            Output(OutputKind::Of { vertex: done[&root].clone(), index: output(head.index)? });
        Ok(Self::new(Some(out), platform))
    }
}

fn options(definition: &Definition, current: Digest) -> VertexOptions {
    let text = current.to_string();
    let metadata: OpMetadata = definition.metadata.get(&text).cloned().unwrap_or_default();
    let places = definition.source.iter().flat_map(|s| s.find(&text));
    let locations = places
        .map(|(file, spans)| SourceLocation { file: file.clone(), spans: spans.to_vec() })
        .collect();
    VertexOptions { metadata, locations, ..VertexOptions::default() }
}

fn digest(text: &str) -> Result<Digest, Fault> {
    text.parse().map_err(|_| {
        Fault::invalid(format!(
            "invalid missing input digest {}",
            text.chars().take(100).collect::<String>()
        ))
    })
}

fn output(index: i64) -> Result<usize, Fault> {
    usize::try_from(index).map_err(|_| Fault::invalid(format!("invalid output index {index}")))
}
