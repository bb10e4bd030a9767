//! Builds that stop where they fail, or at their end, and are looked into there.

use std::time::Duration;

use shipway_client::{Client, DebugBuild, Outcome, SolveOptions, Status, Step};
use shipway_fault::{Detail, Fault, Result};
use tokio::sync::{mpsc, oneshot};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use super::{Invoke, Monitor, Next, Terminal};
use crate::{
    Persona, failure,
    progress::{self, Mode, Shown, View},
    run,
};

/// How long the last words of a step that failed may lag behind the failure.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// Events on their way to the view.
const QUEUE: usize = 64;

/// When a build is looked into.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum When {
    /// Where a step fails.
    #[default]
    Error,
    /// There, and at the end of a build that goes well.
    Always,
}

/// How a build is looked into.
#[derive(Debug)]
pub(crate) struct Looking {
    pub(crate) invoke: Invoke,
    pub(crate) when: When,
}

/// The view of one try, which ends before anything else has the terminal.
struct Watched {
    view: View,
    /// Ends the view once the failure was seen, or without waiting for it.
    end: oneshot::Sender<bool>,
    _passing: AbortOnDropHandle<()>,
}

impl Watched {
    /// Begins; gives where events go.
    fn start(mode: Mode) -> Result<(mpsc::Sender<Status>, Self)> {
        let (to, view) = progress::start(mode, "Building")?;
        let (events, queue) = mpsc::channel(QUEUE);
        let (end, ended) = oneshot::channel();
        let passing = shipway_task::spawn("pass on events", pass(queue, to, ended));
        Ok((events, Self { view, end, _passing: AbortOnDropHandle::new(passing) }))
    }

    /// Ends the view, after the failure if there was one.
    async fn finish(self, failed: bool) -> Result<Shown> {
        let _ = self.end.send(failed);
        self.view.finish().await
    }
}

/// Passes events on until the end, and then drops them: the build must not wait for anybody.
async fn pass(
    mut queue: mpsc::Receiver<Status>,
    to: mpsc::Sender<Status>,
    mut ended: oneshot::Receiver<bool>,
) {
    let mut seen = false;
    let until = tokio::time::sleep(Duration::MAX);
    tokio::pin!(until);
    let mut ending = false;
    loop {
        tokio::select! {
            event = queue.recv() => {
                let Some(event) = event else { return };
                seen |= event.vertexes.iter().any(|v| !v.error.is_empty());
                let _ = to.send(event).await;
                if ending && seen {
                    break;
                }
            }
            failed = &mut ended, if !ending => {
                if failed != Ok(true) || seen {
                    break;
                }
                ending = true;
                until.as_mut().reset(tokio::time::Instant::now() + LAST_WORDS);
            }
            () = &mut until, if ending => break,
        }
    }
    drop(to);
    while queue.recv().await.is_some() {}
}

impl Looking {
    /// Builds; `named` gives failures the user's name of the Dockerfile.
    pub(crate) async fn build(
        &self,
        client: &Client,
        options: SolveOptions,
        mode: Mode,
        named: &(dyn Fn(Fault) -> Fault + Sync),
    ) -> Result<(Outcome, Shown)> {
        let mut terminal = None;
        let mut options = options;
        loop {
            match self.attempt(client, options.clone(), mode, named, &mut terminal).await? {
                Some(done) => return Ok(done),
                // It is another build.
                None => options.reference = shipway_client::new_reference()?,
            }
        }
    }

    /// Builds once; `None` if the person wants it once more.
    async fn attempt(
        &self,
        client: &Client,
        options: SolveOptions,
        mode: Mode,
        named: &(dyn Fn(Fault) -> Fault + Sync),
        terminal: &mut Option<Terminal>,
    ) -> Result<Option<(Outcome, Shown)>> {
        let stop = CancellationToken::new();
        let signals = shipway_task::spawn("watch signals", run::signals(stop.clone()));
        let signals = AbortOnDropHandle::new(signals);
        let (events, watched) = Watched::start(mode)?;
        let mut build = client.debug(options, events).await?;
        let ran = tokio::select! {
            ran = build.run(true) => ran,
            () = stop.cancelled() => Err(Fault::cancelled()),
        };
        let states = match ran {
            Ok(states) => states,
            Err(fault) => {
                watched.finish(true).await?;
                let Some(step) = Step::of_failure(&named(fault.clone())) else {
                    return Err(build.fail(fault).await);
                };
                drop(signals);
                eprint!("{}", failure::describe(&named(short(&fault)), Persona::Shipway));
                return match self.enter(&build, &step, terminal).await {
                    Ok(Next::Reload) => {
                        let _ = build.fail(fault).await;
                        Ok(None)
                    }
                    Ok(Next::Exit) => Err(build.fail(fault).await),
                    Err(other) => {
                        let _ = build.fail(fault).await;
                        Err(other)
                    }
                };
            }
        };
        if self.when == When::Error {
            let done = tokio::select! {
                done = build.finish() => done,
                () = stop.cancelled() => Err(Fault::cancelled()),
            };
            let shown = watched.finish(done.is_err()).await?;
            return done.map(|outcome| Some((outcome, shown)));
        }
        let shown = watched.finish(false).await?;
        let state = states.first().ok_or_else(|| Fault::invalid("the build has no result"))?;
        drop(signals);
        match self.enter(&build, &Step::of_result(state), terminal).await {
            Ok(Next::Reload) => {
                build.discard().await;
                Ok(None)
            }
            Ok(Next::Exit) => Ok(Some((build.finish().await?, shown))),
            Err(fault) => Err(build.fail(fault).await),
        }
    }

    async fn enter(
        &self,
        build: &DebugBuild,
        step: &Step,
        terminal: &mut Option<Terminal>,
    ) -> Result<Next> {
        let terminal = match terminal {
            Some(terminal) => terminal,
            // Opened late: until now Ctrl-C is for the build.
            None => terminal.insert(Terminal::open()?),
        };
        Monitor::run(build, step, &self.invoke, true, terminal).await
    }
}

/// The failure with its place, to be shown while there is more to come.
fn short(fault: &Fault) -> Fault {
    let place = fault.details().iter().filter(|d| matches!(d, Detail::Source { .. })).cloned();
    place.fold(Fault::new(fault.code(), fault.to_string()), Fault::detail)
}

#[cfg(test)]
mod tests {
    use shipway_client::Vertex;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_view_ends_with_the_failure_and_the_build_waits_for_nobody() {
        let failed = Status {
            vertexes: vec![Vertex { error: "x".into(), ..Vertex::default() }],
            ..Status::default()
        };
        for (seen_before, end) in [(true, true), (false, true), (false, false)] {
            let ((events, queue), (to, mut view)) = (mpsc::channel(1), mpsc::channel(8));
            let (ending, ended) = oneshot::channel();
            let passing = shipway_task::spawn("test", pass(queue, to, ended));
            events.send(Status::default()).await.unwrap();
            if seen_before {
                events.send(failed.clone()).await.unwrap();
            }
            ending.send(end).unwrap();
            if !seen_before && end {
                events.send(failed.clone()).await.unwrap();
            }
            let mut count = 0;
            while view.recv().await.is_some() {
                count += 1;
            }
            assert!(count >= 1, "{seen_before} {end}");
            // More than the queue holds.
            for _ in 0..4 {
                events.send(Status::default()).await.unwrap();
            }
            drop(events);
            passing.await.unwrap();
        }
    }
}
