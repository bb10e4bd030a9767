//! Why a vertex runs: what is known of that when it starts, and how its work differs from what the
//! store has.

use crate::{
    Operation, RecordMeta,
    event::Why,
    graph::{Graph, Phase, Work},
    ids::{EdgeId, NodeNo},
    keys::Key,
};
use shipway_progress::{CacheChanges, CacheMiss};

impl<Op: Operation> Graph<Op> {
    /// Why the vertex, an edge of which is claimed, has to run.
    pub(crate) fn why(&self, no: NodeNo) -> Option<Why> {
        let node = self.nodes.get(&no)?;
        let Work::Known(map) = &node.map else { return None };
        if node.vertex.id.ignore_cache {
            return Some(Why::Known(CacheMiss::Ignored { inputs: Vec::new() }));
        }
        if map.ephemeral {
            return Some(Why::Known(CacheMiss::Uncacheable { inputs: Vec::new() }));
        }
        let (output, open) = node.edges.iter().find_map(|(output, edge)| match &edge.phase {
            Phase::Claimed(open) => Some((*output, open)),
            _ => None,
        })?;
        if !open.candidates.strong.iter().any(Key::askable) {
            return Some(Why::Known(self.unaskable(no)));
        }
        if open.gone {
            return Some(Why::Known(CacheMiss::Gone));
        }
        let names = node.vertex.inputs.iter().map(|(input, _)| input.name.clone()).collect();
        Some(Why::Unlike(self.meta(EdgeId { node: no, output }), names))
    }

    /// Which inputs are why the store cannot be asked for a result.
    fn unaskable(&self, no: NodeNo) -> CacheMiss {
        let (mut ignored, mut uncacheable) = (Vec::new(), Vec::new());
        if let Some(node) = self.nodes.get(&no) {
            let inputs = node.identity.inputs.iter().zip(&node.vertex.inputs).zip(&node.contents);
            for ((edge, (input, _)), content) in inputs {
                if matches!(content, Work::Known(Some(_))) {
                    continue;
                }
                let keys = self.edge(*edge).map(|e| e.phase.keys()).unwrap_or_default();
                if keys.iter().any(Key::askable) {
                    continue;
                }
                let fresh = keys.iter().any(|key| key.durable && key.fresh);
                let list = if fresh { &mut ignored } else { &mut uncacheable };
                list.push(input.name.clone());
            }
        }
        match ignored.is_empty() {
            false => CacheMiss::Ignored { inputs: ignored },
            true => CacheMiss::Uncacheable { inputs: uncacheable },
        }
    }
}

/// How the work `now`, whose inputs have `names`, differs from that of a record, if there is one.
pub(crate) fn compare(
    before: Option<&RecordMeta>,
    now: &RecordMeta,
    names: &[String],
) -> CacheMiss {
    let Some(before) = before else { return CacheMiss::New };
    let mut changes = CacheChanges::default();
    if !now.op_keys.iter().any(|key| before.op_keys.contains(key)) {
        changes.operation = Some(changed_parts(before, now));
    }
    // Other inputs altogether are a change of the operation.
    let comparable = before.inputs.len() == now.inputs.len();
    let inputs = names.iter().zip(before.inputs.iter().zip(&now.inputs)).enumerate();
    for (i, (name, ((keys_before, _), (keys_now, _)))) in inputs.filter(|_| comparable) {
        let content = |meta: &RecordMeta| meta.contents.get(i).copied().flatten();
        match (content(before), content(now)) {
            (Some(a), Some(b)) if a == b => {}
            (Some(_), Some(_)) => changes.contents.push(name.clone()),
            _ if keys_before.iter().any(|key| keys_now.contains(key)) => {}
            _ => changes.inputs.push(name.clone()),
        }
    }
    match changes == CacheChanges::default() {
        // All is the same, so it is the result that was not to be had.
        true => CacheMiss::Gone,
        false => CacheMiss::Changed(changes),
    }
}

/// Names of the parts that only one of both has, or that are not the same.
fn changed_parts(before: &RecordMeta, now: &RecordMeta) -> Vec<String> {
    if before.parts.is_empty() || now.parts.is_empty() {
        return Vec::new();
    }
    let lacking = |from: &RecordMeta, in_: &RecordMeta| -> Vec<String> {
        let parts = from.parts.iter().filter(|part| !in_.parts.contains(part));
        parts.map(|part| part.name.clone()).collect()
    };
    let mut names = lacking(now, before);
    for name in lacking(before, now) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CacheKey, KeyPart};
    use shipway_oci::Digest;

    /// A record from `operation part=value … | input … ~content …`; an input without a key is `-`.
    fn record(text: &str) -> RecordMeta {
        let (operation, inputs) = text.split_once('|').expect("operation | inputs");
        let mut words = operation.split_whitespace();
        let mut meta = RecordMeta {
            op_keys: words.next().map(Digest::of).into_iter().collect(),
            ..RecordMeta::default()
        };
        meta.parts.extend(words.map(|word| {
            let (name, value) = word.split_once('=').expect("part=value");
            KeyPart { name: name.into(), fingerprint: value.parse().expect("a number") }
        }));
        for word in inputs.split_whitespace() {
            let content = word.strip_prefix('~');
            let keys = if content.is_some() || word == "-" { None } else { Some(word) };
            meta.inputs.push((keys.map(|k| CacheKey(Digest::of(k))).into_iter().collect(), None));
            meta.contents.push(content.map(Digest::of));
        }
        meta
    }

    #[track_caller]
    fn check(before: &str, now: &str, expected: CacheMiss) {
        let names = ["base", "files"].map(String::from);
        assert_eq!(compare(Some(&record(before)), &record(now), &names), expected);
    }

    fn changed(operation: Option<&[&str]>, inputs: &[&str], contents: &[&str]) -> CacheMiss {
        let list = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
        CacheMiss::Changed(CacheChanges {
            operation: operation.map(list),
            inputs: list(inputs),
            contents: list(contents),
        })
    }

    #[test]
    fn what_differs_is_named() {
        check("op | a ~x", "op | b ~x", changed(None, &["base"], &[]));
        check("op | a ~x", "op | a ~y", changed(None, &[], &["files"]));
        check("op | a ~x", "op | b ~y", changed(None, &["base"], &["files"]));
        check("op a=1 b=2 | a", "po a=1 b=3 | a", changed(Some(&["b"]), &[], &[]));
        // One is new, and one is no more.
        check("op a=1 b=2 | a", "po a=1 c=2 | a", changed(Some(&["c", "b"]), &[], &[]));
        // Nothing is known of the parts.
        check("op | a", "po a=1 | a", changed(Some(&[]), &[], &[]));
        // Other inputs altogether.
        check("op m=1 | a", "po m=2 | a b", changed(Some(&["m"]), &[], &[]));
        // What is read of an input counts, not where it comes from.
        check("op | a ~x", "op | a ~x", CacheMiss::Gone);
        // An input that had a checksum and is now known by its key is another one.
        check("op | a ~x", "op | a c", changed(None, &["files"], &[]));
        assert_eq!(compare(None, &record("op |"), &[]), CacheMiss::New);
    }
}
