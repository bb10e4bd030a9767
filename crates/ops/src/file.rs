//! File actions (rows `file.*`): the key, what is read of the inputs, and the order in which
//! actions are done on states.

mod key;

use crate::{
    content::ContentSelector,
    export_plan::BaseLayers,
    failed_state::{BySlot, FailedState, FailedStates},
    op::{Context, LlbOp, VertexOp},
};
use async_trait::async_trait;
use shipway_fault::{Class, Code, Fault, Result, Subject};
use shipway_fileops::{Beside, OwnerRoots, owner_of};
use shipway_host::is_out_of_space;
use shipway_llb::{FileAction, FileActionKind, FileOp, Owner};
use shipway_refs::{ImmutableRef, LocalMount, MutableRef, RecordType};
use shipway_solver::CacheMap;
use std::path::Path;
use tokio_util::sync::CancellationToken;

/// The result of an action, as long as it may be needed.
enum State {
    /// Being written; only the next action sees it.
    Open(Box<Open>),
    /// Finished.
    Done(ImmutableRef),
}

/// A state that is being written.
struct Open {
    state: MutableRef,
    mount: LocalMount,
    /// Files that are copied into it once it is not mounted any more.
    beside: Option<Beside>,
}

/// A state to read from.
struct Readable {
    mount: LocalMount,
    /// What is thrown away afterwards: an empty state of its own.
    _empty: Option<MutableRef>,
}

impl Readable {
    fn path(&self) -> &Path {
        self.mount.path()
    }
}

struct Runner<'a> {
    of: &'a LlbOp,
    cx: &'a Context,
    file: &'a FileOp,
    inputs: Vec<ImmutableRef>,
    /// The actions that are done, in this order.
    order: Vec<usize>,
    results: Vec<Option<State>>,
}

struct FileVertex(FileOp);

/// The work of `op`.
pub(crate) fn work(op: &FileOp) -> Box<dyn VertexOp> {
    Box::new(FileVertex(op.clone()))
}

#[async_trait]
impl VertexOp for FileVertex {
    async fn cache_map(&self, of: &LlbOp, _cx: &Context) -> Result<CacheMap> {
        Ok(key::cache_map(&self.0, &of.vertex))
    }

    fn selectors(&self, input: usize) -> Option<Vec<ContentSelector>> {
        key::selectors(&self.0, input)
    }

    /// Does the actions that the outputs need and commits the outputs.
    async fn run(
        &self,
        of: &LlbOp,
        inputs: Vec<ImmutableRef>,
        cx: &Context,
    ) -> Result<Vec<ImmutableRef>> {
        let file = &self.0;
        let count = output_count(file)?;
        let order = order(file, inputs.len())?;
        let mut results = Vec::new();
        results.resize_with(file.actions.len(), || None);
        let mut runner = Runner { of, cx, file, inputs, order: order.clone(), results };
        for index in order {
            if let Err(e) = runner.action(index, &file.actions[index]).await {
                return Err(runner.failed(index, e).await);
            }
        }
        let mut outputs = vec![None; count];
        for (index, action) in file.actions.iter().enumerate() {
            if let Some(output) = action.output {
                outputs[output] = Some(runner.done(index).await?);
            }
        }
        outputs.into_iter().map(|o| o.map_or_else(|| of.services.refs.scratch(), Ok)).collect()
    }

    fn base_layers(&self, output: usize, inputs: usize) -> BaseLayers {
        let base = base(&self.0, output, inputs);
        BaseLayers { inputs: base.into_iter().collect(), adds_layer: true }
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

/// Outputs are numbered from 0 without gaps.
fn output_count(file: &FileOp) -> Result<usize> {
    let mut outputs: Vec<usize> = file.actions.iter().filter_map(|a| a.output).collect();
    outputs.sort_unstable();
    match outputs.iter().enumerate().find(|(i, o)| i != *o) {
        _ if outputs.is_empty() => Err(Fault::invalid("no outputs specified")),
        Some((i, o)) if *o < i => Err(Fault::invalid(format!("duplicate output {o}"))),
        Some((i, _)) => Err(Fault::invalid(format!("missing output index {i}"))),
        None => Ok(outputs.len()),
    }
}

/// The actions whose results an action needs.
fn needs(action: &FileAction, inputs: usize) -> Vec<usize> {
    let [user, group] = lookups(&action.kind);
    [action.input, action.secondary, user, group]
        .into_iter()
        .filter_map(|n| n?.checked_sub(inputs))
        .collect()
}

/// The actions that the outputs need, each after those that it needs itself. They may be written in
/// any order, but not in circles.
fn order(file: &FileOp, inputs: usize) -> Result<Vec<usize>> {
    #[derive(Clone, Copy, PartialEq)]
    enum Mark {
        Unseen,
        Open,
        Done,
    }
    let mut marks = vec![Mark::Unseen; file.actions.len()];
    let mut order = Vec::new();
    let absent = |index: usize| {
        Fault::invalid(format!(
            "invalid input index {}, {} provided",
            index + inputs,
            inputs + file.actions.len()
        ))
    };
    for start in (0..file.actions.len()).filter(|i| file.actions[*i].output.is_some()) {
        // Each with what it needs and has not been looked at yet.
        let mut way: Vec<(usize, Vec<usize>)> = Vec::new();
        let mut next = Some(start);
        loop {
            if let Some(index) = next.take() {
                match marks.get(index).ok_or_else(|| absent(index))? {
                    Mark::Open => {
                        return Err(Fault::invalid(format!("loop from index {}", index + inputs)));
                    }
                    Mark::Done => {}
                    Mark::Unseen => {
                        marks[index] = Mark::Open;
                        let mut needed = needs(&file.actions[index], inputs);
                        needed.reverse();
                        way.push((index, needed));
                    }
                }
            }
            let Some((index, needed)) = way.last_mut() else { break };
            next = needed.pop();
            if next.is_none() {
                marks[*index] = Mark::Done;
                order.push(*index);
                way.pop();
            }
        }
    }
    Ok(order)
}

/// The inputs in which an action looks names up.
fn lookups(kind: &FileActionKind) -> [Option<usize>; 2] {
    let place = |owner: Option<&Owner>| match owner {
        Some(Owner::Name { input, .. }) => *input,
        _ => None,
    };
    let owner = owner_of(kind);
    [place(owner.and_then(|o| o.user.as_ref())), place(owner.and_then(|o| o.group.as_ref()))]
}

impl Runner<'_> {
    /// Whether the result of action `index` is read only by the one action that goes on
    /// writing it.
    fn is_passed_on(&self, index: usize) -> bool {
        let number = self.inputs.len() + index;
        let wanted = |a: &FileAction| {
            usize::from(a.input == Some(number))
                + usize::from(a.secondary == Some(number))
                + lookups(&a.kind).iter().filter(|l| **l == Some(number)).count()
        };
        let done = || self.order.iter().map(|i| &self.file.actions[*i]);
        let uses: usize = done().map(wanted).sum();
        let written = done().any(|a| a.input == Some(number));
        self.file.actions[index].output.is_none() && uses == 1 && written
    }

    /// The finished result of an earlier action.
    async fn done(&mut self, index: usize) -> Result<ImmutableRef> {
        let done = match self.results.get_mut(index).and_then(Option::take) {
            Some(State::Done(done)) => done,
            Some(State::Open(open)) => {
                let Open { state, mount, beside } = *open;
                mount.unmount().await?;
                if let Some(beside) = beside {
                    let cancel = CancellationToken::new();
                    let _guard = cancel.clone().drop_guard();
                    let copy = move || beside.copy(&|| !cancel.is_cancelled());
                    shipway_task::blocking("copy files", copy).await?;
                }
                self.of
                    .commit(
                        state,
                        self.of.vertex.name.clone(),
                        self.file.actions[index].output,
                        self.cx,
                    )
                    .await?
            }
            None => {
                return Err(Fault::invalid(format!(
                    "the result of file action {index} is used before it is there"
                )));
            }
        };
        self.results[index] = Some(State::Done(done.clone()));
        Ok(done)
    }

    /// The state that index `number` means.
    async fn finished(&mut self, number: usize) -> Result<ImmutableRef> {
        match number.checked_sub(self.inputs.len()) {
            None => Ok(self.inputs[number].clone()),
            Some(index) => self.done(index).await,
        }
    }

    /// What an action changes.
    async fn target(&mut self, action: &FileAction) -> Result<(MutableRef, LocalMount)> {
        if let Some(index) = action.input.and_then(|n| n.checked_sub(self.inputs.len()))
            && self.is_passed_on(index)
            && let Some(State::Open(open)) = self.results.get_mut(index).and_then(Option::take)
        {
            // Only an action that is alone has files that are copied afterwards.
            return Ok((open.state, open.mount));
        }
        let parent = match action.input {
            Some(number) => Some(self.finished(number).await?).filter(|p| !p.is_scratch()),
            None => None,
        };
        self.writable(parent.as_ref()).await
    }

    /// A state to read from; `None` for scratch.
    async fn readable(&mut self, number: Option<usize>) -> Result<Option<Readable>> {
        let Some(number) = number else { return Ok(None) };
        let state = self.finished(number).await?;
        if state.is_scratch() {
            return Ok(None);
        }
        state.materialize(Some(&self.cx.reporter)).await?;
        Ok(Some(Readable { mount: state.mount().await?, _empty: None }))
    }

    /// A new state on `parent`.
    async fn writable(&self, parent: Option<&ImmutableRef>) -> Result<(MutableRef, LocalMount)> {
        let name = self.of.vertex.name.clone();
        let state = self
            .of
            .services
            .refs
            .mutable(parent, name, RecordType::Regular, Some(&self.cx.reporter))
            .await?;
        let mount = state.mount().await?;
        Ok((state, mount))
    }

    /// How a copy may do without the mount: if it is all there is to do, so that nothing looks at
    /// the files in between.
    async fn beside(&self, action: &FileAction, state: &MutableRef) -> Result<Option<Beside>> {
        let ([FileAction { kind: FileActionKind::Copy(_), .. }], Some(source)) =
            (&self.file.actions[..], action.secondary)
        else {
            return Ok(None);
        };
        let Some(source) = self.inputs.get(source) else { return Ok(None) };
        let (false, Some(dir)) = (source.is_scratch(), state.layer_dir()?) else { return Ok(None) };
        let mount = source.mount().await?;
        Beside::between(mount, dir)
    }

    /// What an action copies from. Scratch is an empty directory.
    async fn source(&mut self, action: &FileAction) -> Result<Option<Readable>> {
        let source = self.readable(action.secondary).await?;
        if source.is_some() || !matches!(action.kind, FileActionKind::Copy(_)) {
            return Ok(source);
        }
        let (state, mount) = self.writable(None).await?;
        Ok(Some(Readable { mount, _empty: Some(state) }))
    }

    async fn action(&mut self, index: usize, action: &FileAction) -> Result<()> {
        let source = self.source(action).await?;
        let [user, group] = lookups(&action.kind);
        let (user, group) = (self.readable(user).await?, self.readable(group).await?);
        let (state, mount) = self.target(action).await?;
        let beside = self.beside(action, &state).await?;
        // Cancelled when the caller stops waiting.
        let cancel = CancellationToken::new();
        let guard = cancel.clone().drop_guard();
        let kind = action.kind.clone();
        // The closure owns what it works on, so that it is not unmounted under it when the
        // caller stops waiting.
        let work = move || {
            let owners = OwnerRoots {
                user: user.as_ref().map(Readable::path),
                group: group.as_ref().map(Readable::path),
            };
            let done = shipway_fileops::apply(
                &kind,
                mount.path(),
                source.as_ref().map(Readable::path),
                &owners,
                beside.as_ref(),
                &cancel,
            );
            Ok((done, Open { state, mount, beside }))
        };
        let (done, open) = shipway_task::blocking("do a file action", work).await?;
        drop(guard);
        // Kept after a failure, too: it shows how far things came.
        self.results[index] = Some(State::Open(Box::new(open)));
        done
    }

    /// The failure of action `index`, with the states to look into: what it changed, and what it
    /// copied from.
    async fn failed(&mut self, index: usize, fault: Fault) -> Fault {
        // A full disk has no room for what nobody may look into.
        if fault.is_cancelled() || is_out_of_space(&fault) {
            return fault;
        }
        let mut shown_states: BySlot =
            std::iter::repeat_with(|| None).take(self.file.actions.len()).collect();
        let source =
            self.file.actions[index].secondary.and_then(|n| n.checked_sub(self.inputs.len()));
        for shown in source.into_iter().chain([index]) {
            if let Ok(state) = self.done(shown).await {
                shown_states[shown] = Some(FailedState::Done(state));
            }
        }
        // What is wrong with the user's files is a failure of the build: nothing that the client
        // asked for by name is `NotFound`.
        let fault =
            if fault.class() == Class::User { fault.with_code(Code::Unknown) } else { fault };
        let inputs = self.inputs.iter().map(|i| Some(FailedState::Done(i.clone()))).collect();
        let subject = Subject::FileAction(i64::try_from(index).unwrap_or(-1));
        FailedStates::attach(
            fault,
            &self.of.vertex,
            &(self.cx.jobs)(),
            inputs,
            shown_states,
            Some(subject),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shipway_llb::FileMkdir;

    #[track_caller]
    fn check(outputs: &[Option<usize>], expected: Result<usize, &str>) {
        let action = |output: &Option<usize>| FileAction {
            input: None,
            secondary: None,
            output: *output,
            kind: FileActionKind::Mkdir(FileMkdir::default()),
        };
        let file = FileOp { actions: outputs.iter().map(action).collect() };
        assert_eq!(output_count(&file).map_err(|e| e.to_string()), expected.map_err(str::to_owned));
    }

    /// Actions on one input: what each changes, what it copies from, and its output.
    #[track_caller]
    fn check_order(
        actions: &[(Option<usize>, Option<usize>, Option<usize>)],
        expected: Result<&[usize], &str>,
    ) {
        let action =
            |(input, secondary, output): &(Option<usize>, Option<usize>, Option<usize>)| {
                FileAction {
                    input: *input,
                    secondary: *secondary,
                    output: *output,
                    kind: FileActionKind::Copy(Default::default()),
                }
            };
        let file = FileOp { actions: actions.iter().map(action).collect() };
        assert_eq!(
            order(&file, 1).map_err(|e| e.to_string()),
            expected.map(<[usize]>::to_vec).map_err(str::to_owned)
        );
    }

    #[test]
    fn actions_are_done_when_they_are_needed() {
        check_order(&[(Some(0), None, None), (Some(1), None, Some(0))], Ok(&[0, 1]));
        check_order(&[(Some(2), None, Some(0)), (Some(0), None, None)], Ok(&[1, 0]));
        check_order(&[(Some(0), None, None), (Some(0), None, Some(0))], Ok(&[1]));
        check_order(
            &[(Some(0), Some(3), Some(0)), (None, Some(3), Some(1)), (None, None, None)],
            Ok(&[2, 0, 1]),
        );
        check_order(&[(Some(2), None, Some(0)), (Some(1), None, None)], Err("loop from index 1"));
        check_order(&[(Some(1), None, Some(0))], Err("loop from index 1"));
        check_order(&[(Some(7), None, Some(0))], Err("invalid input index 7, 2 provided"));
    }

    #[test]
    fn outputs_are_numbered_without_gaps() {
        check(&[None, Some(0)], Ok(1));
        check(&[Some(1), Some(0)], Ok(2));
        check(&[None], Err("no outputs specified"));
        check(&[Some(1)], Err("missing output index 0"));
        check(&[Some(0), Some(0)], Err("duplicate output 0"));
    }

    #[test]
    fn layers_are_followed_down_to_the_inputs_they_come_from() {
        let action = |input, output| FileAction {
            input,
            secondary: Some(1),
            output,
            kind: FileActionKind::Mkdir(FileMkdir::default()),
        };
        #[track_caller]
        fn check(actions: &[FileAction], output: usize, inputs: usize, expected: &[usize]) {
            let file = FileVertex(FileOp { actions: actions.to_vec() });
            let expected = BaseLayers { inputs: expected.to_vec(), adds_layer: true };
            assert_eq!(file.base_layers(output, inputs), expected);
        }
        let chain = [
            action(Some(0), None),
            action(Some(2), None),
            action(Some(3), Some(0)),
            action(None, Some(1)),
        ];
        check(&chain, 0, 2, &[0]);
        check(&chain, 1, 2, &[]);
        // An action that goes on with itself.
        check(&[action(Some(1), Some(0))], 0, 1, &[]);
    }
}
