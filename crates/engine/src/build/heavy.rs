//! Work on what clients send that computes for long where they send much: it must not keep a thread
//! that others share.

use shipway_fault::{Fault, Result};
use std::{
    num::NonZero,
    sync::{Arc, LazyLock},
};
use tokio::sync::Semaphore;

/// As many at a time as there are processors; the others wait.
static PLACES: LazyLock<Arc<Semaphore>> = LazyLock::new(|| {
    let processors = std::thread::available_parallelism().map_or(1, NonZero::get);
    Arc::new(Semaphore::new(processors))
});

/// Does `work`, which computes and never waits, on a thread for that. What is given up before its
/// turn is not done.
pub(crate) async fn heavy<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let place = PLACES.clone().acquire_owned().await.map_err(|e| Fault::internal(e.to_string()))?;
    let work = move || {
        let _place = place;
        work()
    };
    shipway_task::blocking("compute on a request", work).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[tokio::test]
    async fn others_are_served_while_it_computes() {
        let (go, wait) = mpsc::channel();
        let work = shipway_task::spawn(
            "compute",
            heavy(move || wait.recv().map_err(|e| Fault::internal(e.to_string()))),
        );
        // The only thread for everything else is this one, and it is not kept.
        tokio::task::yield_now().await;
        go.send(7).expect("it is awaited");
        assert_eq!(work.await.expect("no panic").expect("done"), 7);
    }
}
