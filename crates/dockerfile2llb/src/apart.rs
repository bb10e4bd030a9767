//! The frontend's own thread. Reading and converting a Dockerfile may take seconds of computing
//! between two waits, which must not keep one of the few threads from others that they share.

use shipway_dockerfile::Work;
use shipway_fault::{Fault, Result};
use tokio::{runtime::Handle, sync::oneshot};

/// Stops what the thread does when no caller waits for it any more.
struct Guard {
    work: Work,
    _gone: oneshot::Sender<()>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.work.stop();
    }
}

/// Runs `future`, which does `work`, on a thread of its own. It ends soon after it is given up.
pub async fn run<T: Send + 'static>(
    work: Work,
    future: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    let (gone, given_up) = oneshot::channel();
    let (done, result) = oneshot::channel();
    let (runtime, span) = (Handle::current(), tracing::Span::current());
    let guard = Guard { work, _gone: gone };
    let body = move || {
        let _entered = span.enter();
        let result = runtime.block_on(async {
            tokio::select! {
                result = future => result,
                _ = given_up => Err(Fault::cancelled()),
            }
        });
        let _ = done.send(result);
    };
    let started = std::thread::Builder::new().name("dockerfile".into()).spawn(body);
    started.map_err(|e| Fault::io("start a thread for the Dockerfile", e))?;
    let result = result.await.map_err(|_| Fault::internal("the Dockerfile frontend panicked"))?;
    drop(guard);
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use shipway_dockerfile::Lex;
    use std::collections::HashMap;

    /// Expansions that take a year, unless they are ended.
    fn endless(work: &Work) -> Result<()> {
        let lex = Lex::new('\\').part_of(work);
        let env = HashMap::from([("a".to_owned(), "a".repeat(300))]);
        loop {
            lex.word("${a//*a*a*a*b/}", &env).map_err(|e| Fault::invalid(e.to_string()))?;
        }
    }

    #[tokio::test]
    async fn others_are_served_meanwhile_and_the_work_ends_with_its_build() {
        let (work, (said, ended)) = (Work::of(u64::MAX), std::sync::mpsc::channel());
        let part = work.clone();
        let build = run(work, async move {
            // There is one thread for everything else in this test.
            let outcome = endless(&part);
            let _ = said.send(outcome.is_err());
            outcome
        });
        let soon = tokio::time::timeout(std::time::Duration::from_millis(50), build).await;
        assert!(soon.is_err(), "the timer ran while the build computed");
        assert_eq!(ended.recv_timeout(std::time::Duration::from_secs(60)), Ok(true));
    }

    #[tokio::test]
    async fn the_work_of_a_build_is_limited() {
        let work = Work::of(1_000_000);
        let part = work.clone();
        let failed = run(work, async move { endless(&part) }).await.expect_err("too much");
        assert!(failed.to_string().contains("too long"), "{failed}");
    }
}
