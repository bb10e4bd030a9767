//! An executor for tests, which runs closures.

use crate::{
    ExecMount, Executor, ExitStatus, LeftProcess, OutputSink, OutputTarget, ProcessIo, ProcessSpec,
    RootFs,
};
use async_trait::async_trait;
use parking_lot::Mutex;
use shipway_fault::{Fault, Result};
use std::sync::Arc;

type Script =
    dyn Fn(&ProcessSpec, &RootFs, &[ExecMount], &OutputSink) -> Result<ExitStatus> + Send + Sync;

/// Answers every process by a closure and remembers what it was asked.
#[derive(Clone)]
pub struct FakeExecutor {
    script: Arc<Script>,
    ran: Arc<Mutex<Vec<ProcessSpec>>>,
    left: Arc<Mutex<Vec<LeftProcess>>>,
    resumed: Arc<Mutex<Vec<ProcessSpec>>>,
}

impl FakeExecutor {
    /// An executor whose processes do what `script` does.
    pub fn new(
        script: impl Fn(&ProcessSpec, &RootFs, &[ExecMount], &OutputSink) -> Result<ExitStatus>
        + Send
        + Sync
        + 'static,
    ) -> Self {
        Self {
            script: Arc::new(script),
            ran: Arc::default(),
            left: Arc::default(),
            resumed: Arc::default(),
        }
    }

    /// The same with processes that an earlier run left.
    pub fn with_left(self, left: Vec<LeftProcess>) -> Self {
        *self.left.lock() = left;
        self
    }

    /// Those of them that were neither resumed nor abandoned.
    pub fn left(&self) -> Vec<LeftProcess> {
        self.left.lock().clone()
    }

    /// The processes resumed so far.
    pub fn resumed(&self) -> Vec<ProcessSpec> {
        self.resumed.lock().clone()
    }

    fn forget(&self, id: &str) -> bool {
        let mut left = self.left.lock();
        let before = left.len();
        left.retain(|process| process.id != id);
        left.len() < before
    }

    /// The processes run so far.
    pub fn ran(&self) -> Vec<ProcessSpec> {
        self.ran.lock().clone()
    }
}

#[async_trait]
impl Executor for FakeExecutor {
    async fn run(
        &self,
        process: ProcessSpec,
        root: RootFs,
        mounts: Vec<ExecMount>,
        io: ProcessIo,
    ) -> Result<ExitStatus> {
        self.ran.lock().push(process.clone());
        (self.script)(&process, &root, &mounts, &sink(io.output))
    }

    async fn exec(&self, container: &str, _: ProcessSpec, _: ProcessIo) -> Result<ExitStatus> {
        Err(Fault::not_found(format!("container {container} does not run")))
    }

    async fn retire_idle(&self) {}

    async fn drained(&self) {}

    async fn sweep(&self) -> Result<Vec<LeftProcess>> {
        Ok(self.left())
    }

    async fn resume(&self, process: ProcessSpec, output: OutputTarget) -> Result<ExitStatus> {
        if !self.forget(&process.id) {
            return Err(Fault::not_found(format!("no process {} was left", process.id)));
        }
        self.resumed.lock().push(process.clone());
        let root = RootFs { snapshot: None, mounts: Vec::new(), read_only: false };
        (self.script)(&process, &root, &[], &sink(output))
    }

    async fn abandon(&self, id: &str) {
        self.forget(id);
    }

    fn leave(&self) {}
}

fn sink(output: OutputTarget) -> OutputSink {
    match output {
        OutputTarget::Sink(sink) => sink,
        OutputTarget::Queue(queue) => Arc::new(move |output| drop(queue.try_send(output))),
    }
}
