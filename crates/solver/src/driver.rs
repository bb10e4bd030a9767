//! Runs the state machine: feeds it what happens, and does what it asks for.

use crate::{
    CacheKey, CacheStore, Completion, Limits, Operation, RecordMeta, SolvedVertex,
    event::{Effect, Event, ProbeResult, Promise, VertexProgress, Why},
    graph::Graph,
    ids::{JobNo, RequestNo, TaskNo},
    miss,
};
use futures::{
    FutureExt,
    future::{BoxFuture, Shared},
};
use shipway_fault::{Fault, Result};
use shipway_progress::CacheMiss;
use shipway_task::spawn_in;
use shipway_telemetry::meter;
use std::{collections::HashMap, future::Future, panic::AssertUnwindSafe, sync::Arc};
use tokio::{
    sync::{
        mpsc::{UnboundedReceiver, UnboundedSender, WeakUnboundedSender},
        oneshot,
    },
    task::AbortHandle,
};
use tracing::info_span;

/// Where a request's answer goes.
pub(crate) type ReplySender<O> = oneshot::Sender<Result<(O, Completion)>>;

/// What the owner task receives.
pub(crate) enum Message<Op: Operation> {
    /// Something happened.
    Event(Event<Op>),
    /// A request, with where to answer it.
    Request { event: Event<Op>, request: RequestNo, reply: ReplySender<Op::Output> },
    /// What a job's vertices came to.
    SolvedVertices { job: JobNo, reply: oneshot::Sender<Vec<SolvedVertex<Op>>> },
    /// A task ended.
    Ended { task: TaskNo, event: Event<Op> },
}

/// Starts the owner task. It ends when the last handle is gone.
pub(crate) fn spawn<Op: Operation>(
    inbox: WeakUnboundedSender<Message<Op>>,
    messages: UnboundedReceiver<Message<Op>>,
    store: Arc<dyn CacheStore<Op::Output>>,
    limits: Limits,
) {
    let driver = Driver {
        inbox,
        store,
        graph: Graph::new(limits.max_parallel),
        tasks: HashMap::new(),
        replies: HashMap::new(),
        forgetting: None,
    };
    spawn_in(info_span!("solver"), driver.run(messages));
}

struct Driver<Op: Operation> {
    inbox: WeakUnboundedSender<Message<Op>>,
    store: Arc<dyn CacheStore<Op::Output>>,
    graph: Graph<Op>,
    tasks: HashMap<TaskNo, AbortHandle>,
    replies: HashMap<RequestNo, ReplySender<Op::Output>>,
    /// Drops records of lost results; they must not be found again.
    forgetting: Option<Shared<BoxFuture<'static, ()>>>,
}

impl<Op: Operation> Drop for Driver<Op> {
    fn drop(&mut self) {
        for task in self.tasks.values() {
            task.abort();
        }
    }
}

impl<Op: Operation> Driver<Op> {
    async fn run(mut self, mut messages: UnboundedReceiver<Message<Op>>) {
        while let Some(message) = messages.recv().await {
            let event = match message {
                Message::Event(event) => {
                    if let Event::Withdraw { request } = &event {
                        self.replies.remove(request);
                    }
                    event
                }
                Message::Request { event, request, reply } => {
                    self.replies.insert(request, reply);
                    event
                }
                Message::SolvedVertices { job, reply } => {
                    // The receiver may be gone: then the result is not needed.
                    let _ = reply.send(self.graph.solved_for(job));
                    continue;
                }
                Message::Ended { task, event } => {
                    self.tasks.remove(&task);
                    event
                }
            };
            for effect in self.graph.step(event) {
                self.perform(effect);
            }
            meter::STEPS_QUEUED.set(self.graph.queue.len() as u64);
        }
    }

    fn perform(&mut self, effect: Effect<Op>) {
        match effect {
            Effect::Map { task, node, vertex, cx } => {
                let span = info_span!("cache map", vertex = %vertex.name);
                let work = async move { caught(vertex.op.cache_map(&cx)).await };
                self.spawn(task, span, work, move |result| Event::Mapped { task, node, result });
            }
            Effect::Content { task, node, vertex, input, value, cx } => {
                let span = info_span!("content key", vertex = %vertex.name, input);
                let work = async move {
                    caught(vertex.op.content_key(input, &value, &cx))
                        .await
                        .map_err(|f| f.context("failed to compute cache key"))
                };
                self.spawn(task, span, work, move |result| Event::Content {
                    task,
                    node,
                    input,
                    result,
                });
            }
            Effect::Run { task, node, vertex, inputs, why, cx } => {
                let span = info_span!("run", vertex = %vertex.name);
                let store = self.store.clone();
                let work = async move {
                    // Before it runs: what it stores would be found as the latest of its kind.
                    if let Some(miss) = explained(store, why).await {
                        tracing::debug!(?miss, "no result in the cache");
                        cx.reporter.missed(miss);
                    }
                    let _running = meter::STEPS_RUNNING.enter();
                    caught(vertex.op.run(inputs, &cx)).await
                };
                self.spawn(task, span, work, move |result| Event::Ran { task, node, result });
            }
            Effect::Probe { task, edge, keys, load } => {
                let (store, forgetting) = (self.store.clone(), self.forgetting.clone());
                let work = async move {
                    if let Some(forgetting) = forgetting {
                        forgetting.await;
                    }
                    probe(store, keys, load).await
                };
                self.spawn(task, info_span!("probe"), work, move |answer| Event::Probed {
                    task,
                    edge,
                    answer,
                });
            }
            Effect::Read { task, job, cache } => {
                let work = async move { cache.ready().await };
                self.spawn(task, info_span!("read an imported cache"), work, move |()| {
                    Event::Imported { task, job }
                });
            }
            Effect::Fetch { task, edge, from, keys, meta } => {
                let store = self.store.clone();
                self.spawn(
                    task,
                    info_span!("fetch"),
                    fetch(store, from, keys, meta),
                    move |answer| Event::Probed { task, edge, answer },
                );
            }
            Effect::Forget { value } => {
                let (store, before) = (self.store.clone(), self.forgetting.take());
                let work = async move {
                    if let Some(before) = before {
                        before.await;
                    }
                    warned(
                        "drop a lost result from the build cache",
                        caught(store.forget(&value)).await,
                    );
                };
                let work = work.boxed().shared();
                spawn_in(info_span!("forget"), work.clone());
                self.forgetting = Some(work);
            }
            Effect::Save { task, edge, strong, weak, value, meta } => {
                let store = self.store.clone();
                let work = async move {
                    let saved = async {
                        let first = store.primaries(&strong).await?.into_iter().next();
                        let mut keys: Vec<CacheKey> =
                            first.into_iter().chain(strong).chain(weak).collect();
                        let mut seen = std::collections::HashSet::new();
                        keys.retain(|k| seen.insert(*k));
                        store.save(&keys, &value, &meta).await
                    };
                    warned("store a result in the build cache", caught(saved).await)
                };
                self.spawn(task, info_span!("save"), work, move |primary| Event::Saved {
                    task,
                    edge,
                    primary,
                });
            }
            Effect::Alias { primary, keys } => {
                let store = self.store.clone();
                let work = async move {
                    warned("link keys in the build cache", store.alias(primary, &keys).await);
                };
                spawn_in(info_span!("alias"), work);
            }
            Effect::Cancel { task } => {
                if let Some(task) = self.tasks.remove(&task) {
                    task.abort();
                }
            }
            Effect::Report { reporter, what } => match what {
                VertexProgress::Started => reporter.started(),
                VertexProgress::Cached => reporter.cached(),
                VertexProgress::Completed(error) => reporter.completed(error),
            },
            Effect::Reply { request, result } => {
                if let Some(reply) = self.replies.remove(&request) {
                    // The receiver may be gone: then the result is not needed.
                    let _ = reply.send(result);
                }
            }
        }
    }

    fn spawn<T: Send + 'static>(
        &mut self,
        task: TaskNo,
        span: tracing::Span,
        work: impl Future<Output = T> + Send + 'static,
        event: impl FnOnce(T) -> Event<Op> + Send + 'static,
    ) {
        let inbox = self.inbox.clone();
        let handle = spawn_in(span, async move {
            let event = event(work.await);
            if let Some(inbox) = inbox.upgrade() {
                send(&inbox, Message::Ended { task, event });
            }
        });
        self.tasks.insert(task, handle.abort_handle());
    }
}

fn send<Op: Operation>(inbox: &UnboundedSender<Message<Op>>, message: Message<Op>) {
    // The owner task ends only with the last handle; then nothing listens.
    let _ = inbox.send(message);
}

/// Turns a panic of foreign work into a fault.
async fn caught<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    match AssertUnwindSafe(work).catch_unwind().await {
        Ok(result) => result,
        Err(panic) => {
            let text = panic
                .downcast_ref::<&str>()
                .map(|s| s.to_string())
                .or_else(|| panic.downcast_ref::<String>().cloned());
            Err(Fault::internal(format!("an operation panicked: {}", text.unwrap_or_default())))
        }
    }
}

/// The cache failing must not fail a build.
fn warned<T>(what: &str, result: Result<T>) -> Option<T> {
    result.inspect_err(|fault| tracing::warn!(%fault, "failed to {what}")).ok()
}

/// Why a vertex runs; `None` if that cannot be found out.
async fn explained<O: Send + 'static>(
    store: Arc<dyn CacheStore<O>>,
    why: Option<Why>,
) -> Option<CacheMiss> {
    match why? {
        Why::Known(miss) => Some(miss),
        Why::Unlike(now, names) => {
            let before = caught(store.similar(&now)).await;
            let before = warned("look up similar work in the build cache", before)?;
            Some(miss::compare(before.as_ref(), &now, &names))
        }
    }
}

async fn probe<O: Send + 'static>(
    store: Arc<dyn CacheStore<O>>,
    keys: Vec<CacheKey>,
    load: bool,
) -> ProbeResult<O> {
    if load
        && let Some(Some((primary, value))) =
            warned("load a result from the build cache", caught(store.load(&keys)).await)
    {
        meter::CACHE_LOCAL.add(1);
        return ProbeResult::Hit(primary, value);
    }
    if load {
        meter::CACHE_MISSES.add(1);
    }
    ProbeResult::Miss(
        warned("look up keys in the build cache", caught(store.primaries(&keys)).await)
            .unwrap_or_default(),
    )
}

async fn fetch<O: Send + Sync + 'static>(
    store: Arc<dyn CacheStore<O>>,
    from: Vec<Promise<O>>,
    keys: Vec<CacheKey>,
    meta: RecordMeta,
) -> ProbeResult<O> {
    for Promise { cache, key, .. } in from {
        let Some(Some(value)) =
            warned("load a result of an imported cache", caught(cache.load(&key)).await)
        else {
            continue;
        };
        let adopted = warned(
            "store a result of an imported cache",
            caught(store.adopt(&keys, &value, &meta)).await,
        );
        meter::CACHE_IMPORTED.add(1);
        return ProbeResult::Imported(adopted, value);
    }
    ProbeResult::Miss(Vec::new())
}
