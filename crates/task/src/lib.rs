//! The only ways to start a task, so that each has a name, a span, and a log line when it panics.
//!
//! - [`spawn`] starts a future on the runtime, [`spawn_in`] in a span of the caller's, [`spawn_on`]
//!   on a given runtime (for `Drop`);
//! - [`named`] makes the same of a future that something else starts, such as a `JoinSet`;
//! - [`blocking`] runs what blocks (files, hashes, compression) on a thread where that is allowed.
//!
//! Groups of tasks are tokio-util's `TaskTracker` and shutdown is its `CancellationToken`; both go
//! with these functions: `spawn("watch a session", tracker.track_future(token.cancelled_owned()))`.
//!
//! What is started is boxed: tokio's code for a task is large, and is compiled once for each type
//! of result instead of once for each future.
//!
//! `futures` is used for `catch_unwind` and `boxed`, and nothing else of it.

use futures::FutureExt;
use shipway_fault::{Fault, Result};
use std::{
    any::Any,
    future::Future,
    panic::{AssertUnwindSafe, resume_unwind},
};
use tokio::{
    runtime::Handle,
    task::{JoinError, JoinHandle},
};
use tracing::{Instrument, Span, error, info_span};

/// Starts `future` on the current runtime, in a span `task` with field `name` below the current
/// span. `name` says what the task does ("accept connections").
///
/// A panic is logged and then reported by the handle, as by tokio. Dropping the handle detaches
/// the task; tokio-util's `AbortOnDropHandle` ends it instead.
///
/// The span keeps those around it alive, so a task must not start its own successor for ever.
///
/// # Panics
///
/// Outside a runtime.
#[track_caller]
pub fn spawn<F>(name: &'static str, future: F) -> JoinHandle<F::Output>
where
    F: Future<Output: Send + 'static> + Send + 'static,
{
    spawn_on(&Handle::current(), name, future)
}

/// [`spawn`] on `runtime`.
#[track_caller]
#[allow(clippy::disallowed_methods, reason = "this is the function to use instead")]
pub fn spawn_on<F>(runtime: &Handle, name: &'static str, future: F) -> JoinHandle<F::Output>
where
    F: Future<Output: Send + 'static> + Send + 'static,
{
    runtime.spawn(named(name, future.boxed()))
}

/// [`spawn`] in `span`, for tasks whose span has more to say than a name.
#[track_caller]
#[allow(clippy::disallowed_methods, reason = "this is the function to use instead")]
pub fn spawn_in<F>(span: Span, future: F) -> JoinHandle<F::Output>
where
    F: Future<Output: Send + 'static> + Send + 'static,
{
    tokio::spawn(logged(future.boxed()).instrument(span))
}

/// `future` as [`spawn`] starts it: in its span, panics logged before they go on.
pub fn named<F: Future>(name: &'static str, future: F) -> impl Future<Output = F::Output> {
    logged(future).instrument(info_span!("task", name))
}

async fn logged<F: Future>(future: F) -> F::Output {
    // Nothing is looked at after a panic: it goes on at once.
    AssertUnwindSafe(future).catch_unwind().await.unwrap_or_else(|panic| {
        error!(panic = message(&*panic), "task panicked");
        resume_unwind(panic)
    })
}

/// Starts `work` on a thread where blocking is allowed, in the current span, and gives what it
/// returned. `what` says what is done, as an error's context does ("hash a layer").
///
/// The work starts when this is called, not when it is first awaited, and it goes on to its end
/// when the future is dropped: what must end with its build looks at a `CancellationToken`.
///
/// # Errors
///
/// Those of `work`; `Internal` if it panicked; `Cancelled` if the runtime is shutting down.
///
/// # Panics
///
/// Outside a runtime.
#[track_caller]
pub fn blocking<T, F>(what: &'static str, work: F) -> impl Future<Output = Result<T>> + use<T, F>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T> + Send + 'static,
{
    blocking_on(&Handle::current(), what, work)
}

/// [`blocking`] on `runtime`, for `Drop` outside of one.
#[allow(clippy::disallowed_methods, reason = "this is the function to use instead")]
pub fn blocking_on<T, F>(
    runtime: &Handle,
    what: &'static str,
    work: F,
) -> impl Future<Output = Result<T>> + use<T, F>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T> + Send + 'static,
{
    let span = Span::current();
    let work: Box<dyn FnOnce() -> Result<T> + Send> = Box::new(work);
    let running = runtime.spawn_blocking(move || span.in_scope(work));
    async move { running.await.unwrap_or_else(|e| Err(fault_of(what, e))) }
}

fn fault_of(what: &'static str, error: JoinError) -> Fault {
    match error.try_into_panic() {
        Ok(panic) => Fault::internal(format!("panicked: {}", message(&*panic))).context(what),
        Err(_) => Fault::cancelled().context(what),
    }
}

/// The text of a panic; what is neither `&str` nor `String` has none.
fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use parking_lot::Mutex;
    use shipway_fault::Code;
    use std::{
        io::{self, Write},
        sync::Arc,
    };
    use tokio_util::{sync::CancellationToken, task::TaskTracker};
    use tracing::{info, subscriber::DefaultGuard};

    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl Log {
        /// What this thread logs while the guard lives.
        fn capture() -> (Self, DefaultGuard) {
            let log = Self::default();
            let sink = log.clone();
            let subscriber =
                tracing_subscriber::fmt().with_ansi(false).with_writer(move || sink.clone());
            (log, tracing::subscriber::set_default(subscriber.finish()))
        }

        #[track_caller]
        fn has(&self, words: &str) {
            let text = String::from_utf8(self.0.lock().clone()).unwrap();
            assert!(text.contains(words), "no {words:?} in {text}");
        }
    }

    impl Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn a_task_logs_in_its_own_span_below_that_of_its_starter() {
        let (log, _guard) = Log::capture();
        let build = info_span!("build", id = 7);
        build.in_scope(|| spawn("count", async { info!("one") })).await.unwrap();
        log.has("build{id=7}:task{name=\"count\"}: shipway_task::tests: one");
    }

    #[tokio::test]
    async fn a_panic_is_logged_and_reported_by_the_handle() {
        let (log, _guard) = Log::capture();
        let task = spawn("divide", async { panic!("by {}", 0) });
        assert!(task.await.unwrap_err().is_panic());
        log.has("task{name=\"divide\"}: shipway_task: task panicked panic=\"by 0\"");
    }

    #[tokio::test]
    async fn a_named_future_is_the_same_in_a_join_set() {
        let (log, _guard) = Log::capture();
        let mut set = tokio::task::JoinSet::new();
        set.spawn(named("sum", async { 1 + 1 }));
        set.spawn(named("fail", async { panic!("no sum") }));
        let results = [set.join_next().await.unwrap(), set.join_next().await.unwrap()];
        assert_eq!(results.iter().filter(|r| matches!(r, Ok(2))).count(), 1);
        log.has("task{name=\"fail\"}");
    }

    #[tokio::test]
    async fn a_tracker_waits_for_named_tasks() {
        let (tracker, stop) = (TaskTracker::new(), CancellationToken::new());
        let task = spawn("wait", tracker.track_future(stop.clone().cancelled_owned()));
        tracker.close();
        assert!(tracker.wait().now_or_never().is_none());
        stop.cancel();
        tracker.wait().await;
        task.await.unwrap();
    }

    #[tokio::test]
    async fn blocking_work_starts_at_once_and_gives_its_result() {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let work = blocking("send", move || sender.send(5).map_err(|_| Fault::cancelled()));
        assert_eq!(receiver.await, Ok(5));
        work.await.unwrap();
        let failed = blocking("read", || Err::<(), _>(Fault::not_found("no such file"))).await;
        assert_eq!(failed.unwrap_err().to_string(), "no such file");
    }

    #[tokio::test]
    async fn blocking_work_that_panics_is_an_internal_fault() {
        let fault = blocking::<(), _>("hash a layer", || panic!("no layer")).await.unwrap_err();
        assert_eq!(fault.code(), Code::Internal);
        assert_eq!(fault.to_string(), "hash a layer: panicked: no layer");
    }

    #[test]
    fn blocking_work_is_cancelled_with_its_runtime() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let handle = runtime.handle().clone();
        drop(runtime);
        let _entered = handle.enter();
        let late = futures::executor::block_on(blocking("hash a layer", || Ok(())));
        assert!(late.unwrap_err().is_cancelled());
    }
}
