//! What the rest of the program holds: the solver, jobs and requests.

use crate::{
    CacheStore, Completion, ImportedCache, JobId, Limits, Operation, SolvedVertex, Vertex,
    driver::{self, Message},
    event::Event,
    ids::{JobNo, RequestNo},
};
use parking_lot::Mutex;
use shipway_fault::{Code, Fault, Result};
use shipway_progress::Journal;
use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};
use tokio::sync::{mpsc, oneshot};

/// A handle on the one graph of this process. Clones share it; the task that owns the graph ends
/// with the last handle.
pub struct Solver<Op: Operation>(Arc<Shared<Op>>);

impl<Op: Operation> Clone for Solver<Op> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

pub(crate) struct Shared<Op: Operation> {
    // Unbounded because closing a job and dropping a request cannot wait; what it holds is bounded
    // by the live handles.
    pub(crate) inbox: mpsc::UnboundedSender<Message<Op>>,
    names: Mutex<HashSet<JobId>>,
    next: AtomicU64,
}

impl<Op: Operation> Shared<Op> {
    fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    fn names(&self) -> parking_lot::MutexGuard<'_, HashSet<JobId>> {
        self.names.lock()
    }
}

impl<Op: Operation> Solver<Op> {
    /// Starts the task that owns the graph. Must be called within a tokio runtime.
    pub fn new(store: Arc<dyn CacheStore<Op::Output>>, limits: Limits) -> Self {
        let (inbox, messages) = mpsc::unbounded_channel();
        driver::spawn(inbox.downgrade(), messages, store, limits);
        Self(Arc::new(Shared { inbox, names: Mutex::default(), next: AtomicU64::new(1) }))
    }

    /// Opens a job: `data` is what its operations may use, `journal` records every vertex it asks
    /// for. `AlreadyExists` while another job has the name (row `so.dupref`).
    pub fn job(&self, id: JobId, data: Op::Job, journal: Journal) -> Result<Job<Op>> {
        if !self.0.names().insert(id.clone()) {
            return Err(Fault::new(Code::AlreadyExists, format!("job ID {} exists", id.0))
                .hint("a build with this reference is still running; choose another reference or wait for it to end"));
        }
        let no = JobNo(self.0.number());
        let _ = self.0.inbox.send(Message::Event(Event::Open { job: no, data, journal }));
        Ok(Job { shared: self.0.clone(), id, no })
    }
}

/// One build's interest in the graph. Everything it asked for stays known until it is dropped or
/// [closed](Job::close).
pub struct Job<Op: Operation> {
    shared: Arc<Shared<Op>>,
    id: JobId,
    no: JobNo,
}

impl<Op: Operation> Job<Op> {
    /// The name it was opened under.
    pub fn id(&self) -> &JobId {
        &self.id
    }

    /// The result of one output of `vertex`. May be called many times and concurrently; the future
    /// does not borrow the job. Dropping it withdraws the request, and work that no other job wants
    /// is cancelled.
    pub fn build(
        &self,
        vertex: Arc<Vertex<Op>>,
        output: usize,
    ) -> impl Future<Output = Result<(Op::Output, Completion)>> + Send + use<Op> {
        let (shared, job) = (self.shared.clone(), self.no);
        async move {
            let request = RequestNo(shared.number());
            let (reply, answer) = oneshot::channel();
            let event = Event::Request { request, job, vertex, output };
            if shared.inbox.send(Message::Request { event, request, reply }).is_err() {
                return Err(Fault::cancelled().context("the solver has ended"));
            }
            let guard = RequestGuard { shared: &shared, request: Some(request) };
            let answer = answer.await;
            guard.answered();
            answer.unwrap_or_else(|_| Err(Fault::cancelled()))
        }
    }

    /// Looks into `cache`, too, for whatever it asks from now on, until it ends; the cache is read
    /// beside its work.
    pub fn import(&self, cache: Arc<dyn ImportedCache<Op::Output>>) {
        let _ = self.shared.inbox.send(Message::Event(Event::Import { job: self.no, cache }));
    }

    /// Says that `fault` came of using a result that [`Job::build`] gave. True if the result is
    /// lost and another [`Job::build`] makes it again.
    pub async fn lost(&self, vertex: Arc<Vertex<Op>>, output: usize, fault: Fault) -> bool {
        let (answer, redone) = oneshot::channel();
        let _ = self.shared.inbox.send(Message::Event(Event::Lost {
            job: self.no,
            vertex,
            output,
            fault,
            answer,
        }));
        redone.await.unwrap_or(false)
    }

    /// The vertices it asked for so far, as they are worked on: where several builds want the same
    /// work, one's operation does it for all.
    pub async fn solved_vertices(&self) -> Vec<SolvedVertex<Op>> {
        let (reply, answer) = oneshot::channel();
        // Without a solver nothing is known.
        let _ = self.shared.inbox.send(Message::SolvedVertices { job: self.no, reply });
        answer.await.unwrap_or_default()
    }

    /// Ends the job, as dropping it does.
    pub fn close(self) {}
}

impl<Op: Operation> Drop for Job<Op> {
    fn drop(&mut self) {
        // The graph learns of the end before the name is free, so that a successor never meets its
        // predecessor's interest.
        let _ = self.shared.inbox.send(Message::Event(Event::Close { job: self.no }));
        self.shared.names().remove(&self.id);
    }
}

/// Withdraws a request whose future is dropped before the answer.
struct RequestGuard<'a, Op: Operation> {
    shared: &'a Shared<Op>,
    request: Option<RequestNo>,
}

impl<Op: Operation> RequestGuard<'_, Op> {
    fn answered(mut self) {
        self.request = None;
    }
}

impl<Op: Operation> Drop for RequestGuard<'_, Op> {
    fn drop(&mut self) {
        if let Some(request) = self.request.take() {
            let _ = self.shared.inbox.send(Message::Event(Event::Withdraw { request }));
        }
    }
}
