//! What is known of the way to a host: its round trip, its throughput, and how much to have asked
//! for at a time.

use std::{collections::VecDeque, time::Duration};

/// Believed until something was measured: a megabyte on its way fills a usual line.
const FIRST_RTT: Duration = Duration::from_millis(40);
const FIRST_RATE: f64 = 24e6;
/// Throughput is measured over at least this long.
const PERIOD: Duration = Duration::from_millis(50);
/// The same once it has settled.
const SETTLED_PERIOD: Duration = Duration::from_millis(400);
/// It has settled after so many periods in a row in which it did not rise by as much as this: what
/// is asked for more because of a rise comes two round trips later.
const SETTLED: u32 = 3;
const RISE: f64 = 1.1;
/// Bounds of what is believed, so that no clock and no burst leads astray.
const MIN_RTT: Duration = Duration::from_micros(200);
const MAX_RTT: Duration = Duration::from_secs(2);
const MIN_RATE: f64 = 64e3;
const MAX_RATE: f64 = 4e9;
/// A background request may delay another one by so much at the most.
pub(crate) const BACKGROUND_DELAY: Duration = Duration::from_millis(50);

/// Measurements of one host. Times are since an arbitrary start.
///
/// The round trip is the time to the first byte of an answer; answers that queue behind others tell
/// of the queue instead, so only what was asked on a quiet line makes the figure grow. Throughput
/// is measured from the first byte after a pause on; it rises with every faster period, and falls
/// only with those in which enough was asked for to fill the line. When it does not rise any more,
/// no period is believed alone: whoever reads late on a busy machine finds much at once, as if the
/// line were faster.
#[derive(Clone, Debug)]
pub(crate) struct Measured {
    rtt: Option<Duration>,
    /// Usual time to the first byte, queueing included.
    usual: Option<Duration>,
    rate: Option<f64>,
    /// Bytes and lengths of the last periods.
    periods: VecDeque<(u64, Duration)>,
    /// The fastest period, and how many have not been faster since.
    best: f64,
    flat: u32,
    /// When the first byte of the period came.
    since: Option<Duration>,
    bytes: u64,
    least_in_flight: u64,
}

impl Measured {
    pub(crate) fn new() -> Self {
        Self {
            rtt: None,
            usual: None,
            rate: None,
            periods: VecDeque::new(),
            best: 0.0,
            flat: 0,
            since: None,
            bytes: 0,
            least_in_flight: 0,
        }
    }

    /// As if measured.
    #[cfg(test)]
    pub(crate) fn known(rtt: Duration, rate: f64) -> Self {
        Self { rtt: Some(rtt), usual: Some(rtt), rate: Some(rate), ..Self::new() }
    }

    /// Round trip.
    pub(crate) fn rtt(&self) -> Duration {
        self.rtt.unwrap_or(FIRST_RTT)
    }

    /// Usual time to the first byte; `None` before the first one.
    pub(crate) fn usual(&self) -> Option<Duration> {
        self.usual
    }

    /// Bytes per second.
    pub(crate) fn rate(&self) -> f64 {
        self.rate.unwrap_or(FIRST_RATE)
    }

    /// Bytes that arrive in `time`.
    pub(crate) fn bytes_in(&self, time: Duration) -> u64 {
        (self.rate() * time.as_secs_f64()) as u64
    }

    /// The bandwidth × delay product in bytes.
    pub(crate) fn bdp(&self) -> u64 {
        self.bytes_in(self.rtt())
    }

    /// The first byte came `after` the request, which was sent with `in_flight` bytes asked for and
    /// not there.
    pub(crate) fn first_byte(&mut self, after: Duration, in_flight: u64) {
        let after = after.clamp(MIN_RTT, MAX_RTT);
        let quiet = in_flight <= self.bdp() / 2;
        self.rtt = Some(match self.rtt {
            None => after,
            Some(rtt) if after <= rtt => after,
            Some(rtt) if quiet => rtt + (after - rtt) / 8,
            Some(rtt) => rtt,
        });
        self.usual = Some(self.usual.map_or(after, |usual| (usual * 7 + after) / 8));
    }

    /// `bytes` arrived; `in_flight` are still on their way.
    pub(crate) fn arrived(&mut self, now: Duration, bytes: u64, in_flight: u64) {
        let Some(since) = self.since else { return self.begin(now, in_flight) };
        self.bytes += bytes;
        self.least_in_flight = self.least_in_flight.min(in_flight);
        let period = now.saturating_sub(since);
        if period < PERIOD.max(self.rtt()) {
            return;
        }
        let sample = self.sample(period);
        if sample < self.best * RISE {
            self.flat += 1;
        } else if !self.is_settled() {
            (self.best, self.flat) = (sample, 0);
        }
        self.rate = match self.rate {
            Some(rate) if sample > rate => Some(sample),
            Some(rate) if self.least_in_flight >= self.bdp() => Some(rate + (sample - rate) / 4.0),
            // Before anything is known, a line that was never idle is taken at its word.
            None if self.least_in_flight > 0 => Some(sample),
            known => known,
        };
        self.rate = self.rate.map(|rate| rate.clamp(MIN_RATE, MAX_RATE));
        self.begin(now, in_flight);
    }

    fn is_settled(&self) -> bool {
        self.flat >= SETTLED
    }

    /// Throughput by the period that ends, and those before it.
    fn sample(&mut self, period: Duration) -> f64 {
        self.periods.push_front((self.bytes, period));
        let (mut bytes, mut time, mut count) = (0, Duration::ZERO, 0);
        let enough = if self.is_settled() { SETTLED_PERIOD } else { period };
        for (some, long) in &self.periods {
            if time >= enough {
                break;
            }
            (bytes, time, count) = (bytes + some, time + *long, count + 1);
        }
        if time >= SETTLED_PERIOD {
            self.periods.truncate(count);
        }
        bytes as f64 / time.as_secs_f64()
    }

    fn begin(&mut self, now: Duration, in_flight: u64) {
        (self.since, self.bytes, self.least_in_flight) = (Some(now), 0, in_flight);
    }

    /// Nothing is on its way any more.
    pub(crate) fn idle(&mut self) {
        self.since = None;
    }

    /// Whether the throughput was measured.
    pub(crate) fn is_known(&self) -> bool {
        self.rate.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_queue_does_not_look_like_a_long_way() {
        let mut line = Measured::new();
        line.first_byte(20 * MS, 0);
        assert_eq!((line.rtt(), line.usual()), (20 * MS, Some(20 * MS)));
        for _ in 0..100 {
            line.first_byte(200 * MS, 10 << 20);
        }
        assert_eq!(line.rtt(), 20 * MS);
        assert!(line.usual().unwrap() > 190 * MS);
        for _ in 0..100 {
            line.first_byte(60 * MS, 0);
        }
        assert!(line.rtt() > 59 * MS);
        line.first_byte(Duration::from_secs(90), 0);
        line.first_byte(Duration::ZERO, 0);
        assert_eq!(line.rtt(), MIN_RTT);
    }

    #[test]
    fn what_was_read_late_does_not_look_like_a_fast_line() {
        let mut line = Measured::new();
        line.first_byte(20 * MS, 0);
        // 200 kB each 10 ms, of which nothing is seen for 60 of each 150 ms, and then all at once.
        for ms in (0..30_000u32).step_by(10) {
            let seen = ms.max(ms / 150 * 150 + 60);
            line.arrived(seen * MS, 200_000, 8 << 20);
            assert!(ms < 2000 || (14e6..24e6).contains(&line.rate()), "{ms}: {}", line.rate());
        }
    }

    #[test]
    fn throughput_follows_the_line_and_not_the_demand() {
        let mut line = Measured::new();
        line.first_byte(20 * MS, 0);
        // So many bytes each 10 ms, with enough asked for.
        let run = |line: &mut Measured, start: u32, bytes: u64, in_flight: u64| {
            line.idle();
            for n in 0..200 {
                line.arrived((start + n) * 10 * MS, bytes, in_flight);
            }
        };
        run(&mut line, 0, 600_000, 8 << 20);
        assert!((55e6..61e6).contains(&line.rate()), "{}", line.rate());
        // Little was asked for: that says nothing of the line.
        run(&mut line, 1000, 1000, 1000);
        assert!((55e6..61e6).contains(&line.rate()), "{}", line.rate());
        // The line has become slow.
        run(&mut line, 2000, 50_000, 8 << 20);
        assert!((4.9e6..6e6).contains(&line.rate()), "{}", line.rate());
        assert_eq!(line.bdp(), line.bytes_in(20 * MS));
    }
}
