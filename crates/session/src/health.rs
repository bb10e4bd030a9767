//! Health checks of attached clients (rows `ses.health`, `ses.hdr.health`).

use std::time::Duration;

use shipway_fault::{Code, Fault};
use shipway_grpc::{TracedChannel, fault_of};
use shipway_proto::grpc::health::v1::{HealthCheckRequest, health_client::HealthClient};
use tokio::time::Instant;

/// How often a client is asked and how patiently. The defaults forgive a slow line that is busy
/// with other data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HealthPolicy {
    interval: Duration,
    timeout: Duration,
    /// Failures in a row that end the session.
    failures: u32,
}

impl HealthPolicy {
    /// The policy that a client asks for with its header, which may be empty.
    pub(crate) fn of(header: &str) -> Self {
        match header.parse::<u64>() {
            Ok(ms) if ms > 0 => {
                let timeout = Duration::from_millis(ms).max(Duration::from_secs(1));
                Self { interval: timeout, timeout, failures: 1 }
            }
            _ => Self {
                interval: Duration::from_secs(5),
                timeout: Duration::from_secs(15),
                failures: 2,
            },
        }
    }

    /// Asks again and again; returns when the client has failed too often.
    pub(crate) async fn monitor(self, channel: TracedChannel) -> Fault {
        let mut client = HealthClient::new(channel);
        let mut ticks = tokio::time::interval(self.interval);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        ticks.tick().await;
        let (mut failures, mut last) = (0, Duration::ZERO);
        loop {
            ticks.tick().await;
            let timeout = self.timeout.max(last.mul_f32(1.5));
            let started = Instant::now();
            let fault =
                match tokio::time::timeout(timeout, client.check(HealthCheckRequest::default()))
                    .await
                {
                    Ok(Ok(_)) => None,
                    Ok(Err(status)) => Some(fault_of(&status)),
                    Err(_) => Some(Fault::new(
                        Code::DeadlineExceeded,
                        format!("no answer within {timeout:?}"),
                    )),
                };
            last = started.elapsed();
            match fault {
                None => failures = 0,
                Some(fault) => {
                    failures += 1;
                    if failures >= self.failures {
                        return fault;
                    }
                    tracing::debug!(error = %fault, "healthcheck failed");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_can_ask_for_its_own_patience() {
        let (ms, s) = (Duration::from_millis, Duration::from_secs);
        for (header, interval, timeout, failures) in [
            ("", s(5), s(15), 2),
            ("x", s(5), s(15), 2),
            ("0", s(5), s(15), 2),
            ("10", s(1), s(1), 1),
            ("2500", ms(2500), ms(2500), 1),
        ] {
            assert_eq!(
                HealthPolicy::of(header),
                HealthPolicy { interval, timeout, failures },
                "{header}"
            );
        }
    }
}
