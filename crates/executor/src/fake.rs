//! An executor for tests, which runs closures.

use crate::{
    ExecMount, Executor, ExitStatus, OutputSink, OutputTarget, ProcessIo, ProcessSpec, RootFs,
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
}

impl FakeExecutor {
    /// An executor whose processes do what `script` does.
    pub fn new(
        script: impl Fn(&ProcessSpec, &RootFs, &[ExecMount], &OutputSink) -> Result<ExitStatus>
        + Send
        + Sync
        + 'static,
    ) -> Self {
        Self { script: Arc::new(script), ran: Arc::default() }
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
        let output: OutputSink = match io.output {
            OutputTarget::Sink(sink) => sink,
            OutputTarget::Queue(queue) => Arc::new(move |output| drop(queue.try_send(output))),
        };
        self.ran.lock().push(process.clone());
        (self.script)(&process, &root, &mounts, &output)
    }

    async fn exec(&self, container: &str, _: ProcessSpec, _: ProcessIo) -> Result<ExitStatus> {
        Err(Fault::not_found(format!("container {container} does not run")))
    }

    async fn retire_idle(&self) {}

    async fn drained(&self) {}

    async fn sweep(&self) -> Result<()> {
        Ok(())
    }
}
