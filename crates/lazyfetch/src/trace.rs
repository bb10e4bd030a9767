//! Text traces of the queue: what happens on lines with `>`, what it sends below. Numbers of bytes
//! are in KiB, times in ms.

use crate::{
    line::BACKGROUND_DELAY,
    queue::{Class, Limits, LineNo, MAX_GAP, Order, OrderNo, Queue, Tried},
};
use std::{collections::BTreeMap, fmt::Write as _, ops::Range, time::Duration};

const KIB: u64 = 1024;

struct Lab {
    queue: Queue,
    lines: BTreeMap<String, LineNo>,
    now: Duration,
    /// Orders by the number that the trace gives them.
    orders: Vec<Order>,
}

fn ms(word: &str) -> Duration {
    Duration::from_millis(word.parse().expect("milliseconds"))
}

/// `start+length` in KiB.
fn range(word: &str) -> Range<u64> {
    let (start, length) = word.split_once('+').expect("start+length");
    let start = start.parse::<u64>().expect("a place") * KIB;
    start..start + length.parse::<u64>().expect("a length") * KIB
}

fn class(word: &str) -> Class {
    match word {
        "demand" => Class::Demand,
        "learned" => Class::Learned,
        "ahead" => Class::Ahead,
        _ => panic!("{word} is no class of frames"),
    }
}

impl Lab {
    fn new(memory: u64, connections: usize) -> Self {
        Self {
            queue: Queue::new(Limits { memory: memory * KIB, connections }),
            lines: BTreeMap::new(),
            now: Duration::ZERO,
            orders: Vec::new(),
        }
    }

    fn order(&self, word: &str) -> &Order {
        let number: usize = word.strip_prefix('#').expect("#n").parse().expect("a number");
        &self.orders[number - 1]
    }

    fn act(&mut self, line: &str) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let layer = |n: usize| words[n].parse::<u32>().expect("a layer");
        match words[0] {
            // `line host rtt KiB-per-ms`: as if it had been measured.
            "line" => {
                let no = self.queue.line();
                self.queue.measure(no, ms(words[2]), words[3].parse::<f64>().unwrap() * 1024e3);
                self.lines.insert(words[1].into(), no);
            }
            "layer" => self.queue.add(layer(1), self.lines[words[2]]),
            "remove" => self.queue.remove(layer(1)),
            "want" => {
                for word in &words[3..] {
                    self.queue.want(layer(1), range(word), class(words[2]));
                }
            }
            "cancel" => self.queue.cancel((layer(1), range(words[2]).start)),
            "stream" => self.queue.stream(layer(1), range(words[2]), ms(words[3])),
            "pull" => self.queue.stream_now(layer(1), range(words[2])),
            "stop" => self.queue.stop(layer(1)),
            "quiet" => self.queue.quiet_until(ms(words[1])),
            "at" => self.now = ms(words[1]),
            "first" => {
                let no = self.order(words[1]).no;
                self.queue.first_byte(no, self.now);
            }
            // `got #n KiB`.
            "got" => {
                let (no, bytes) = (self.order(words[1]).no, words[2].parse::<u64>().unwrap() * KIB);
                self.queue.arrived(no, bytes, self.now);
            }
            // All came and was written.
            "done" => {
                let order = self.order(words[1]).clone();
                let length = order.range.end - order.range.start;
                self.queue.arrived(order.no, length, self.now);
                for frame in order.frames {
                    self.queue.forget((order.layer, frame));
                }
                self.queue.end(order.no);
            }
            "consumed" => self.queue.consumed(1, words[1].parse::<u64>().unwrap() * KIB),
            // `failed #n pause [fresh]`: to be asked for again.
            "failed" => {
                let order = self.order(words[1]).clone();
                let mut tried = order.tried;
                tried.fresh = words.contains(&"fresh");
                tried.avoid = Some(0);
                let until = self.now + ms(words[2]);
                self.queue.end(order.no);
                for frame in &order.frames {
                    self.queue.again((order.layer, *frame), until, tried);
                }
                if order.class == Class::Background {
                    self.queue.stream_again(order.layer, order.range, until, tried);
                }
            }
            other => panic!("{other} is nothing that happens"),
        }
    }

    fn sent(&mut self, out: &mut String) {
        for order in self.queue.poll(self.now) {
            self.orders.push(order.clone());
            let Order { range, class, layer, frames, tried, .. } = order;
            let (start, length) = (range.start / KIB, (range.end - range.start) / KIB);
            let class = format!("{class:?}").to_lowercase();
            let _ = write!(out, "#{} {class} {layer} {start}+{length}", self.orders.len());
            if frames.len() > 1 {
                let _ = write!(out, " ({} frames)", frames.len());
            }
            if tried != (Tried { tries: 1, ..Tried::default() }) {
                let _ = write!(out, " try {}", tried.tries);
                let _ = write!(out, "{}", if tried.fresh { " fresh" } else { "" });
            }
            out.push('\n');
        }
    }
}

#[track_caller]
fn check(memory: u64, connections: usize, trace: &str) {
    let mut lab = Lab::new(memory, connections);
    let mut out = String::new();
    let trace: Vec<&str> = trace.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
    for line in trace.iter().filter_map(|l| l.strip_prefix("> ")) {
        let _ = writeln!(out, "> {line}");
        line.split(';').for_each(|part| lab.act(part));
        lab.sent(&mut out);
    }
    assert_eq!(out.trim_end(), trace.join("\n"), "\n{out}");
}

/// 20 ms and 30 KiB/ms: the product is 600 KiB, a window 1050.
const LINE: &str = "> line h 20 30; layer 1 h; layer 2 h";

#[test]
fn neighbors_are_asked_for_together_and_others_apart() {
    check(
        16384,
        16,
        &format!(
            "{LINE}
            > want 1 demand 0+10 10+10 80+10 200+10
            #1 demand 1 0+90 (3 frames)
            #2 demand 1 200+10
            > want 1 demand 0+10 80+10
            > want 2 demand 0+10
            #3 demand 2 0+10
            > done #1
            > want 1 demand 0+10
            #4 demand 1 0+10"
        ),
    );
}

#[test]
fn what_is_urgent_comes_first_and_takes_no_less_urgent_neighbors() {
    check(
        16384,
        2,
        &format!(
            "{LINE}
            > want 1 learned 0+100 1000+100 2000+100
            #1 learned 1 0+100
            #2 learned 1 1000+100
            > want 1 ahead 3000+10 2100+10
            > want 1 demand 3010+10 4000+10
            #3 demand 1 3010+10
            #4 demand 1 4000+10
            > done #3; done #4
            > done #1
            #5 learned 1 2000+100
            > want 1 demand 2110+10
            #6 demand 1 2110+10
            > done #2; done #5; done #6
            #7 ahead 1 3000+10
            #8 ahead 1 2100+10"
        ),
    );
}

#[test]
fn what_becomes_urgent_overtakes() {
    check(
        16384,
        1,
        &format!(
            "{LINE}
            > want 1 learned 0+100 1000+100 2000+100 3000+100
            #1 learned 1 0+100
            > want 1 demand 3000+100 0+100
            #2 demand 1 3000+100
            > done #2
            > done #1
            #3 learned 1 1000+100"
        ),
    );
}

#[test]
fn no_more_than_a_window_is_on_its_way_and_less_urgent_things_wait_for_a_full_line() {
    check(
        16384,
        16,
        &format!(
            "{LINE}
            > want 1 demand 0+400 1000+400 2000+400 3000+400 4000+400
            #1 demand 1 0+400
            #2 demand 1 1000+400
            #3 demand 1 2000+400
            > want 1 ahead 9000+10
            > got #1 200
            #4 demand 1 3000+400
            > got #2 400; got #1 200
            #5 demand 1 4000+400
            > done #3
            > got #4 250
            #6 ahead 1 9000+10"
        ),
    );
}

#[test]
fn the_background_fills_the_line_by_parts_and_delays_nobody_for_long() {
    // In flight: at most the product and 50 ms, 2100 KiB; parts of 25 ms, 750 KiB.
    check(
        16384,
        16,
        &format!(
            "{LINE}
            > stream 1 0+100000 0
            #1 background 1 0+750
            #2 background 1 750+750
            > got #1 160
            #3 background 1 1500+750
            > want 1 demand 90000+100
            #4 demand 1 90000+100
            > want 1 learned 80000+400 81000+400 82000+400
            #5 learned 1 80000+400
            #6 learned 1 81000+400
            #7 learned 1 82000+400
            > done #1
            > done #2
            > done #4; done #5
            > done #6
            > at 999
            > at 1000
            #8 background 1 2250+750"
        ),
    );
    assert_eq!(BACKGROUND_DELAY, Duration::from_millis(50));
}

#[test]
fn the_background_waits_for_quiet_and_goes_layer_by_layer() {
    check(
        16384,
        16,
        &format!(
            "{LINE}
            > stream 1 0+800 2000
            > stream 2 0+100 0
            #1 background 2 0+100
            > quiet 5000
            > at 2500
            > at 5000
            #2 background 1 0+750
            #3 background 1 750+50
            > quiet 9000
            > failed #2 100
            > at 5099
            > at 5100
            #4 background 1 0+750 try 2
            > done #1; done #3; done #4; consumed 900"
        ),
    );
}

#[test]
fn who_waits_for_whole_blobs_goes_before_the_background_and_shares() {
    check(
        16384,
        16,
        &format!(
            "{LINE}
            > stream 2 0+10000 0
            #1 background 2 0+750
            #2 background 2 750+750
            > quiet 9000
            > pull 1 0+10000
            > got #1 750
            #3 background 1 0+750
            > layer 3 h; pull 3 0+10000
            > got #2 750
            #4 background 3 0+750
            > got #3 750
            #5 background 1 750+750
            > got #4 750; consumed 1500
            #6 background 1 1500+750
            > got #5 750
            #7 background 1 2250+750
            > stop 1; got #6 750
            #8 background 3 750+750
            > stop 3; got #7 750
            #9 background 2 1500+750"
        ),
    );
}

#[test]
fn memory_is_reserved_before_anything_is_sent() {
    // 2 MiB: three quarters for what is not urgent, half for the background.
    check(
        2048,
        16,
        &format!(
            "{LINE}
            > stream 1 0+10000 0
            #1 background 1 0+750
            > got #1 750
            > consumed 750
            #2 background 1 750+750
            > want 2 learned 0+600 10000+400
            #3 learned 2 0+600
            > want 2 demand 20000+600 30000+600
            #4 demand 2 20000+600
            > got #4 600; got #3 600; got #2 750
            > done #4
            #5 demand 2 30000+600
            > done #5
            > done #3
            #6 learned 2 10000+400"
        ),
    );
    // What is larger than all memory goes alone.
    check(
        2048,
        16,
        &format!(
            "{LINE}
            > want 1 demand 0+5000 10000+5000
            #1 demand 1 0+5000
            > got #1 5000
            > done #1
            #2 demand 1 10000+5000"
        ),
    );
}

#[test]
fn what_failed_comes_again_alone_and_later() {
    check(
        16384,
        16,
        &format!(
            "{LINE}
            > want 1 demand 0+10 10+10
            #1 demand 1 0+20 (2 frames)
            > failed #1 50 fresh
            > want 1 demand 20+10
            #2 demand 1 20+10
            > at 49
            > at 50
            #3 demand 1 0+10 try 2 fresh
            #4 demand 1 10+10 try 2 fresh
            > failed #3 50
            > cancel 1 0+10
            > at 200
            > remove 1
            > done #4; done #2"
        ),
    );
}

#[test]
fn gaps_have_a_limit() {
    let gap = MAX_GAP / KIB;
    check(
        16384,
        16,
        &format!(
            "{LINE}
            > want 1 demand 0+1 {}+1 {}+1
            #1 demand 1 0+{} (2 frames)
            #2 demand 1 {}+1",
            1 + gap,
            3 + 2 * gap,
            2 + gap,
            3 + 2 * gap
        ),
    );
}

#[test]
fn the_newest_that_wait_are_kept() {
    let mut lab = Lab::new(16384, 1);
    let mut out = String::new();
    for line in [&LINE[2..], "want 1 ahead 0+100 1000+100 2000+100 3000+100; want 2 ahead 0+1"] {
        line.split(';').for_each(|part| lab.act(part));
        lab.sent(&mut out);
    }
    // The first is on its way.
    assert_eq!(lab.queue.trim(1, Class::Ahead, 2), [(1, 1000 * KIB)]);
    assert_eq!(lab.queue.trim(1, Class::Ahead, 2), []);
    assert_eq!((lab.queue.waiting(1, Class::Ahead), lab.queue.waiting(2, Class::Ahead)), (2, 1));
}

#[test]
fn nothing_is_left_when_all_is_done() {
    let mut lab = Lab::new(16384, 16);
    let mut out = String::new();
    for line in [
        &LINE[2..],
        "want 1 demand 0+100 500+100; want 2 learned 0+5000; stream 1 0+3000 0",
        "failed #1 10; got #2 10",
        "stop 1; remove 2",
    ] {
        line.split(';').for_each(|part| lab.act(part));
        lab.sent(&mut out);
    }
    lab.now = Duration::from_secs(1);
    lab.sent(&mut out);
    for number in 1..=lab.orders.len() {
        let order = &lab.orders[number - 1];
        let length = order.range.end - order.range.start;
        if order.class == Class::Background {
            lab.queue.consumed(order.layer, length);
        }
        lab.act(&format!("done #{number}"));
    }
    assert_eq!((lab.queue.reserved(), lab.queue.poll(lab.now).len()), (0, 0), "{out}");
    assert_eq!(lab.queue.next_time(lab.now), None);
    lab.queue.end(OrderNo(12345));
}

/// Whatever is wanted and whatever happens: no more memory than is allowed, no frame in two
/// requests, nothing urgent behind what is not, and all comes in the end.
#[test]
fn random_runs_keep_the_rules() {
    for seed in 1..200u64 {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut dice = |n: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % n
        };
        let memory = 2048 * KIB;
        let connections = 1 + dice(8) as usize;
        let mut queue = Queue::new(Limits { memory, connections });
        let line = queue.line();
        (1..=3).for_each(|layer| queue.add(layer, line));
        let mut wanted: BTreeMap<(u32, u64), Class> = BTreeMap::new();
        let mut sent: Vec<Order> = Vec::new();
        let (mut streamed, mut now) = (0, Duration::ZERO);
        for step in 0..2000 {
            let growing = step < 600;
            now += Duration::from_millis(dice(20));
            if growing && dice(3) == 0 {
                let (layer, n) = (1 + dice(3) as u32, dice(60));
                let class = [Class::Demand, Class::Learned, Class::Ahead][dice(3) as usize];
                let start = n * 100 * KIB;
                queue.want(layer, start..start + (1 + n % 90) * KIB, class);
                let known = wanted.entry((layer, start)).or_insert(class);
                *known = (*known).min(class);
            }
            if step == 100 {
                queue.stream(1, 0..5000 * KIB, now);
            }
            for order in queue.poll(now) {
                for start in &order.frames {
                    let twice = |o: &Order| o.layer == order.layer && o.frames.contains(start);
                    assert!(!sent.iter().any(twice), "seed {seed}: {order:?}");
                    assert!(order.range.contains(start));
                }
                let waits = |class: Class| {
                    let of_class = wanted.iter().filter(|(_, c)| **c == class);
                    of_class.filter(|(key, _)| queue.is_waiting(**key)).count()
                };
                if order.class == Class::Background {
                    assert_eq!(waits(Class::Demand), 0, "seed {seed}");
                }
                sent.push(order);
            }
            let all: u64 = sent.iter().map(|o| o.range.end - o.range.start).sum();
            assert!(queue.reserved() <= memory, "seed {seed}: {}", queue.reserved());
            assert!(queue.reserved() >= all, "seed {seed}");
            assert!(sent.len() <= connections + 2, "seed {seed}");
            // One of them ends, well or not.
            if sent.is_empty() || growing && dice(2) == 0 {
                continue;
            }
            let order = sent.swap_remove(dice(sent.len() as u64) as usize);
            let length = order.range.end - order.range.start;
            queue.first_byte(order.no, now);
            queue.arrived(order.no, dice(length + 1), now + Duration::from_millis(1));
            queue.end(order.no);
            let fails = growing && dice(3) == 0;
            let until = now + Duration::from_millis(dice(300));
            let tried = Tried { tries: 1, fresh: true, ..Tried::default() };
            match (order.class, fails) {
                (Class::Background, true) => {
                    queue.stream_again(order.layer, order.range, until, tried);
                }
                (Class::Background, false) => {
                    streamed += length;
                    queue.consumed(order.layer, length);
                }
                (_, true) => order.frames.iter().for_each(|f| {
                    queue.again((order.layer, *f), until, tried);
                }),
                (_, false) => order.frames.iter().for_each(|f| {
                    queue.forget((order.layer, *f));
                    wanted.remove(&(order.layer, *f));
                }),
            }
        }
        assert!(wanted.is_empty() && sent.is_empty(), "seed {seed}: {wanted:?} {sent:?}");
        assert_eq!((streamed, queue.reserved()), (5000 * KIB, 0), "seed {seed}");
    }
}
