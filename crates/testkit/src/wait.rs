//! Waiting for conditions, and free ports.

use std::time::{Duration, Instant};

/// Asks `condition` until it gives a value; panics with `what` and its last complaint after
/// `limit`.
pub fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> Result<T, String>,
) -> T {
    let start = Instant::now();
    loop {
        match condition() {
            Ok(value) => return value,
            Err(why) if start.elapsed() > limit => {
                panic!("{what}: not within {} s: {why}", limit.as_secs_f32())
            }
            // The only sleep there is: the pause between two looks at a process we cannot be told
            // about.
            #[allow(clippy::disallowed_methods)]
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// A TCP port on loopback that was free a moment ago.
pub fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
