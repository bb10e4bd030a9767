//! Which states of a build will be exported as layers of an image, told before its vertices run, so
//! that layers are compressed while later ones do.

use crate::{JobData, op::LlbOp};
use shipway_fault::Result;
use shipway_llb::{FileOp, MountKind, Op};
use shipway_oci::Digest;
use shipway_refs::{Compression, ImmutableRef, MutableRef};
use shipway_solver::Vertex;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};
use tokio::sync::watch;

/// What is to become of a state's topmost layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Wish {
    compression: Compression,
    /// Whether nothing but the export comes after it: then the layer is packed as it is committed.
    /// Others are packed in the background, because the next step waits for the commit.
    last: bool,
}

/// The layers that a build's exporters will want compressed. Clones share it; with the last of
/// them, at the end of the build, what is still being compressed for it stops.
#[derive(Clone, Debug, Default)]
pub struct Ahead(Arc<Told>);

#[derive(Debug, Default)]
struct Told {
    wishes: Mutex<HashMap<(Digest, usize), Wish>>,
    /// Closed at the end.
    end: watch::Sender<()>,
}

impl Ahead {
    /// Tells that output `output` of `vertex` will be exported with `compression`. What was told of
    /// a state first holds.
    pub fn announce(&self, vertex: &Arc<Vertex<LlbOp>>, output: usize, compression: Compression) {
        let mut wishes = self.0.wishes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut told = vec![(vertex, output, true)];
        while let Some((vertex, output, last)) = told.pop() {
            // A state that others are made of as well is seen once.
            let std::collections::hash_map::Entry::Vacant(entry) =
                wishes.entry((vertex.id.digest, output))
            else {
                continue;
            };
            entry.insert(Wish { compression, last });
            let (inputs, last) = below(&vertex.op.vertex.op, output, vertex.inputs.len(), last);
            told.extend(
                inputs
                    .into_iter()
                    .filter_map(|i| vertex.inputs.get(i))
                    .map(|(vertex, output)| (vertex, *output, last)),
            );
        }
    }

    fn wish(&self, vertex: Digest, output: usize) -> Option<Wish> {
        self.0.wishes.lock().unwrap_or_else(PoisonError::into_inner).get(&(vertex, output)).copied()
    }

    /// Waits for the end of the build.
    fn ended(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut end = self.0.end.subscribe();
        async move { while end.changed().await.is_ok() {} }
    }
}

/// The inputs whose layers are layers of output `output` of `op` as well, and whether they are
/// exported next.
fn below(op: &Op, output: usize, inputs: usize, last: bool) -> (Vec<usize>, bool) {
    match op {
        Op::Exec(exec) => {
            let mount = exec
                .mounts
                .iter()
                .find(|m| m.output == Some(output) && matches!(m.kind, MountKind::Bind));
            (mount.and_then(|m| m.input).into_iter().collect(), false)
        }
        Op::File(file) => (base(file, output, inputs).into_iter().collect(), false),
        Op::Merge(merge) => (merge.inputs.iter().copied().flatten().collect(), last),
        Op::Passthrough(pass) => (pass.outputs.get(output).copied().into_iter().collect(), last),
        Op::Source(_) | Op::Diff(_) | Op::Build(_) => (Vec::new(), false),
    }
}

/// The input that the actions behind an output change.
fn base(file: &FileOp, output: usize, inputs: usize) -> Option<usize> {
    let mut action = file.actions.iter().find(|a| a.output == Some(output))?;
    // Each action goes on with an earlier one; a graph that says otherwise is refused elsewhere.
    for _ in &file.actions {
        match action.input?.checked_sub(inputs) {
            None => return action.input,
            Some(earlier) => action = file.actions.get(earlier)?,
        }
    }
    None
}

impl LlbOp {
    /// Commits what output `output` is, compressed ahead if a build that shares the vertex exports
    /// it.
    pub(crate) async fn commit(
        &self,
        state: MutableRef,
        description: String,
        output: Option<usize>,
        cx: &crate::op::Context,
    ) -> Result<ImmutableRef> {
        let jobs = (cx.jobs)();
        let wish =
            |job: &JobData| Some((job.ahead.wish(self.vertex.digest, output?)?, job.ahead.ended()));
        match jobs.iter().find_map(wish) {
            None => state.commit(description).await,
            Some((Wish { compression, last: true }, _)) => {
                state.commit_packed(description, compression).await
            }
            Some((Wish { compression, last: false }, ended)) => {
                let state = state.commit(description).await?;
                state.start_compression(compression, ended);
                Ok(state)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shipway_llb::{
        ExecOp, FileAction, FileActionKind, FileMkdir, MergeOp, Mount, PassthroughOp,
    };

    #[tokio::test]
    async fn the_end_of_a_build_is_told() {
        let ahead = Ahead::default();
        let (ended, other) = (ahead.ended(), ahead.clone());
        drop(ahead);
        tokio::pin!(ended);
        assert!(futures::poll!(&mut ended).is_pending());
        drop(other);
        ended.await;
    }

    #[test]
    fn layers_are_followed_down_to_the_inputs_they_come_from() {
        let mount = |input, output| Mount { input, output, ..Mount::default() };
        let exec = Op::Exec(ExecOp {
            mounts: vec![mount(Some(2), Some(0)), mount(Some(1), None), mount(None, Some(1))],
            ..ExecOp::default()
        });
        assert_eq!(below(&exec, 0, 3, true), (vec![2], false));
        assert_eq!(below(&exec, 1, 3, true), (vec![], false));

        let action = |input, output| FileAction {
            input,
            secondary: Some(1),
            output,
            kind: FileActionKind::Mkdir(FileMkdir::default()),
        };
        let file = |actions| Op::File(FileOp { actions });
        let chain = file(vec![
            action(Some(0), None),
            action(Some(2), None),
            action(Some(3), Some(0)),
            action(None, Some(1)),
        ]);
        assert_eq!(below(&chain, 0, 2, true), (vec![0], false));
        assert_eq!(below(&chain, 1, 2, true), (vec![], false));
        assert_eq!(
            below(&file(vec![action(Some(1), Some(0))]), 0, 1, true),
            (vec![], false),
            "an action that goes on with itself"
        );

        let merge = Op::Merge(MergeOp { inputs: vec![Some(0), None, Some(1)] });
        assert_eq!(
            below(&merge, 0, 2, true),
            (vec![0, 1], true),
            "parts of what is exported next are exported next"
        );
        let pass = Op::Passthrough(PassthroughOp { id: String::new(), outputs: vec![1, 0] });
        assert_eq!(below(&pass, 0, 2, false), (vec![1], false));
    }
}
