//! What to ask for next: a state machine without clock or I/O.
//!
//! It is told what is wanted ([`Queue::want`], [`Queue::stream`]) and what happens to requests, and
//! gives the requests to send now ([`Queue::poll`]). Times are since an arbitrary start.
//!
//! The unit is a *frame*: a gzip member or zstd frame, by its place in a layer's blob. A frame is
//! in the queue once, whoever wants it. What the background needs is no list of frames but the blob
//! itself, in order; a request of its is cut from that when there is room.
//!
//! Rules, for each host:
//! - A class gets its turn when those above it have nothing to send and less than a bandwidth ×
//!   delay product on its way.
//! - What is on its way of a class and those above it stays within some two bandwidth × delay
//!   products; together with the background no more than keeps a new request from waiting longer
//!   than [`BACKGROUND_DELAY`], and as long as somebody waited lately ([`RECENT`]) no more than the
//!   product, so that nothing queues.
//! - Neighbors of the same layer are asked for together if no more than [`MAX_GAP`] lies between.
//!
//! And for all: requests reserve memory before they are sent.

use crate::line::{BACKGROUND_DELAY, Measured};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Range,
    time::Duration,
};

/// Frames are asked for together if at most so many bytes lie between them.
pub(crate) const MAX_GAP: u64 = 64 << 10;
/// Longest request, if no frame is longer.
pub(crate) const MAX_REQUEST: u64 = 4 << 20;
/// Shortest limit of a request, and the same for the background.
const MIN_REQUEST: u64 = 64 << 10;
const MIN_PIECE: u64 = 16 << 10;
/// What the background has on its way as long as nothing is known of the line.
const FIRST_BACKGROUND: u64 = 256 << 10;
/// Least that may be on its way, however short the way.
const MIN_WINDOW: u64 = 256 << 10;
/// Connections that only what somebody waits for may use, besides the others: at least so many, or
/// a quarter.
const RESERVED: usize = 2;
/// Length of background requests in time on the line. Some are on their way at once, so that each
/// is shorter than what all may delay another.
const BACKGROUND_PIECE: Duration = Duration::from_millis(25);
/// The same while somebody waited lately.
const POLITE_PIECE: Duration = Duration::from_millis(8);
/// Who has waited for something soon waits again, for so long.
const RECENT: Duration = Duration::from_secs(1);

/// How urgent something is, most urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// Somebody waits for it.
    Demand,
    /// It will be read, as a profile or a landmark says.
    Learned,
    /// It may be read: read-ahead.
    Ahead,
    /// The rest of the layer.
    Background,
}

impl Class {
    const ALL: [Self; 4] = [Self::Demand, Self::Learned, Self::Ahead, Self::Background];
}

/// A frame: layer, and where in its blob it begins.
pub(crate) type FrameKey = (u32, u64);

/// A host, as a number that [`Queue::line`] gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct LineNo(pub usize);

/// A request that was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct OrderNo(pub u64);

/// What an earlier try showed about a frame or a part of a blob.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tried {
    /// Times that it was asked for.
    pub tries: u32,
    /// Times in a row that only another source could have helped.
    pub refused: u32,
    /// The source that failed last.
    pub avoid: Option<usize>,
    /// Whether wrong bytes came, so that caches on the way are not to be believed.
    pub fresh: bool,
}

/// A request to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Order {
    pub no: OrderNo,
    pub line: LineNo,
    pub layer: u32,
    /// Bytes of the blob.
    pub range: Range<u64>,
    pub class: Class,
    /// Where the frames begin that are wanted of it; none if it is a part of the background.
    pub frames: Vec<u64>,
    pub tried: Tried,
}

/// Bounds of the whole engine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Bytes that requests may reserve.
    pub memory: u64,
    /// Connections for each host.
    pub connections: usize,
}

#[derive(Debug)]
struct Frame {
    end: u64,
    class: Class,
    tried: Tried,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Waits for its turn, with this number in the line of its class.
    Queued(u64),
    /// Not before this time.
    Delayed(Duration),
    /// Asked for.
    Sent(OrderNo),
}

/// A request on its way.
#[derive(Debug)]
struct Sent {
    line: LineNo,
    class: Class,
    /// Bytes that have not come.
    left: u64,
    reserved: u64,
    at: Duration,
    /// What was on its way when it was sent.
    before: u64,
}

/// A blob that the background reads.
#[derive(Debug)]
struct Stream {
    layer: u32,
    next: u64,
    end: u64,
    start_at: Duration,
    /// Whether somebody waits for the end.
    waited: bool,
    /// Bytes that were asked for and not consumed.
    outstanding: u64,
    /// Parts to be asked for again. Their memory is still reserved.
    again: BTreeMap<u64, (u64, Duration, Tried)>,
}

#[derive(Debug)]
struct Line {
    measured: Measured,
    queued: [BTreeMap<u64, FrameKey>; 3],
    delayed: BTreeSet<(Duration, FrameKey)>,
    streams: Vec<Stream>,
    in_flight: [u64; 4],
    requests: usize,
    /// Until when the background is polite, for somebody waited lately.
    polite_until: Duration,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Queue {
    limits: Limits,
    lines: Vec<Line>,
    layers: HashMap<u32, LineNo>,
    frames: BTreeMap<FrameKey, Frame>,
    sent: HashMap<OrderNo, Sent>,
    reserved: u64,
    next: u64,
}

impl Line {
    fn new() -> Self {
        Self {
            measured: Measured::new(),
            queued: Default::default(),
            delayed: BTreeSet::new(),
            streams: Vec::new(),
            in_flight: [0; 4],
            requests: 0,
            polite_until: Duration::ZERO,
        }
    }

    fn in_flight(&self) -> u64 {
        self.in_flight.iter().sum()
    }

    /// What may be on its way of `class` and those above it.
    fn window(&self, class: Class, now: Duration) -> u64 {
        let bdp = self.measured.bdp();
        let delay = self.measured.bytes_in(BACKGROUND_DELAY);
        match class {
            Class::Background if !self.measured.is_known() => FIRST_BACKGROUND,
            Class::Background if now < self.polite_until => bdp.max(2 * MIN_PIECE),
            Class::Background => (bdp + delay).max(2 * MIN_PIECE),
            _ => (bdp * 7 / 4).max(MIN_WINDOW),
        }
    }

    /// Longest request of `class`.
    fn request(&self, class: Class, now: Duration) -> u64 {
        match class {
            Class::Background if !self.measured.is_known() => MIN_REQUEST,
            Class::Background => {
                let polite = now < self.polite_until;
                let time = if polite { POLITE_PIECE } else { BACKGROUND_PIECE };
                self.measured.bytes_in(time).clamp(MIN_PIECE, MAX_REQUEST)
            }
            _ => (self.window(class, now) / 4).clamp(MIN_REQUEST, MAX_REQUEST),
        }
    }
}

impl Queue {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            limits,
            lines: Vec::new(),
            layers: HashMap::new(),
            frames: BTreeMap::new(),
            sent: HashMap::new(),
            reserved: 0,
            next: 0,
        }
    }

    /// A new host.
    pub(crate) fn line(&mut self) -> LineNo {
        self.lines.push(Line::new());
        LineNo(self.lines.len() - 1)
    }

    /// A layer that is fetched over `line`.
    pub(crate) fn add(&mut self, layer: u32, line: LineNo) {
        self.layers.insert(layer, line);
    }

    /// Forgets a layer; its requests on their way may still end.
    pub(crate) fn remove(&mut self, layer: u32) {
        let all: Vec<FrameKey> =
            self.frames.range((layer, 0)..=(layer, u64::MAX)).map(|(key, _)| *key).collect();
        for key in all {
            self.forget(key);
        }
        self.stop(layer);
        self.layers.remove(&layer);
    }

    /// What is known of a host.
    pub(crate) fn measured(&self, line: LineNo) -> &Measured {
        &self.lines[line.0].measured
    }

    /// Sets what is known of a host.
    #[cfg(test)]
    pub(crate) fn measure(&mut self, line: LineNo, rtt: Duration, rate: f64) {
        self.lines[line.0].measured = Measured::known(rtt, rate);
    }

    /// Whether a frame waits for its turn and may have it.
    #[cfg(test)]
    pub(crate) fn is_waiting(&self, key: FrameKey) -> bool {
        self.frames.get(&key).is_some_and(|f| matches!(f.state, State::Queued(_)))
    }

    /// The bandwidth × delay product of the way that a layer comes.
    pub(crate) fn bdp(&self, layer: u32) -> u64 {
        self.layers.get(&layer).map_or(0, |line| self.measured(*line).bdp())
    }

    /// The round trip to a host, measured by others.
    pub(crate) fn round_trip(&mut self, line: LineNo, rtt: Duration) {
        self.lines[line.0].measured.first_byte(rtt, 0);
    }

    /// Number of frames of a layer in `class` that are waiting for their turn.
    pub(crate) fn waiting(&self, layer: u32, class: Class) -> usize {
        let frames = self.frames.range((layer, 0)..=(layer, u64::MAX));
        frames.filter(|(_, f)| f.class == class && !matches!(f.state, State::Sent(_))).count()
    }

    /// Bytes that are reserved.
    pub(crate) fn reserved(&self) -> u64 {
        self.reserved
    }

    /// Wants the frame `range` of `layer`. `false` if it was wanted already: then it only becomes
    /// as urgent as `class`.
    pub(crate) fn want(&mut self, layer: u32, range: Range<u64>, class: Class) -> bool {
        debug_assert!(class != Class::Background);
        let Some(line) = self.layers.get(&layer).copied() else { return false };
        let (key, no) = ((layer, range.start), self.number());
        let queued = &mut self.lines[line.0].queued;
        match self.frames.get_mut(&key) {
            None => {
                let state = State::Queued(no);
                let (end, tried) = (range.end, Tried::default());
                self.frames.insert(key, Frame { end, class, tried, state });
                queued[class as usize].insert(no, key);
                true
            }
            Some(frame) => {
                if class < frame.class {
                    if let State::Queued(old) = frame.state {
                        queued[frame.class as usize].remove(&old);
                        queued[class as usize].insert(no, key);
                        frame.state = State::Queued(no);
                    }
                    frame.class = class;
                }
                false
            }
        }
    }

    /// Whether a frame is wanted, and how urgently.
    pub(crate) fn wanted(&self, key: FrameKey) -> Option<Class> {
        self.frames.get(&key).map(|f| f.class)
    }

    /// A frame that nobody waits for any more; it is still asked for if it is on its way.
    pub(crate) fn cancel(&mut self, key: FrameKey) {
        if self.frames.get(&key).is_some_and(|f| !matches!(f.state, State::Sent(_))) {
            self.forget(key);
        }
    }

    /// Counts the tries for a frame from the start: who waited for it does no more, and others
    /// begin anew.
    pub(crate) fn restart(&mut self, key: FrameKey) {
        if let Some(frame) = self.frames.get_mut(&key) {
            (frame.tried.tries, frame.tried.refused) = (0, 0);
        }
    }

    /// What is known of earlier tries for a frame.
    pub(crate) fn tried(&self, key: FrameKey) -> Tried {
        self.frames.get(&key).map(|frame| frame.tried).unwrap_or_default()
    }

    /// Keeps no more than the newest `most` frames of a layer that wait in `class`; gives those
    /// that are wanted no more.
    pub(crate) fn trim(&mut self, layer: u32, class: Class, most: usize) -> Vec<FrameKey> {
        let Some(line) = self.layers.get(&layer) else { return Vec::new() };
        let queued = &self.lines[line.0].queued[class as usize];
        let waiting: Vec<FrameKey> = queued.values().filter(|k| k.0 == layer).copied().collect();
        let surplus = waiting.len().saturating_sub(most);
        for key in &waiting[..surplus] {
            self.forget(*key);
        }
        waiting[..surplus].to_vec()
    }

    /// A frame that is there, or is given up.
    pub(crate) fn forget(&mut self, key: FrameKey) {
        let Some(frame) = self.frames.remove(&key) else { return };
        let Some(line) = self.layers.get(&key.0) else { return };
        let line = &mut self.lines[line.0];
        match frame.state {
            State::Queued(no) => drop(line.queued[frame.class as usize].remove(&no)),
            State::Delayed(until) => drop(line.delayed.remove(&(until, key))),
            State::Sent(_) => {}
        }
    }

    /// Asks for a frame again after `until`, if it is still wanted.
    pub(crate) fn again(&mut self, key: FrameKey, until: Duration, tried: Tried) {
        let Some(frame) = self.frames.get_mut(&key) else { return };
        let Some(line) = self.layers.get(&key.0) else { return };
        (frame.tried, frame.state) = (tried, State::Delayed(until));
        self.lines[line.0].delayed.insert((until, key));
    }

    /// Reads the bytes `range` of a blob in the background, in order, from `start_at` on.
    pub(crate) fn stream(&mut self, layer: u32, range: Range<u64>, start_at: Duration) {
        self.begin(layer, range, start_at, false);
    }

    /// The same for somebody who waits: at once, and before the blobs that nobody waits for. Of
    /// several such blobs each gets its share.
    pub(crate) fn stream_now(&mut self, layer: u32, range: Range<u64>) {
        self.begin(layer, range, Duration::ZERO, true);
    }

    fn begin(&mut self, layer: u32, range: Range<u64>, start_at: Duration, waited: bool) {
        let Some(line) = self.layers.get(&layer).copied() else { return };
        self.stop(layer);
        let (next, end) = (range.start, range.end);
        let (outstanding, again) = (0, BTreeMap::new());
        let stream = Stream { layer, next, end, start_at, waited, outstanding, again };
        self.lines[line.0].streams.push(stream);
    }

    /// Ends what [`Queue::stream`] began.
    pub(crate) fn stop(&mut self, layer: u32) {
        let Some(line) = self.layers.get(&layer) else { return };
        let streams = &mut self.lines[line.0].streams;
        if let Some(at) = streams.iter().position(|s| s.layer == layer) {
            let parts = streams.remove(at).again;
            self.reserved -= parts.iter().map(|(start, (end, ..))| end - start).sum::<u64>();
        }
    }

    /// No background begins before `until`; what has begun goes on.
    pub(crate) fn quiet_until(&mut self, until: Duration) {
        let streams = self.lines.iter_mut().flat_map(|l| &mut l.streams);
        for stream in streams.filter(|s| s.next == 0 && !s.waited) {
            stream.start_at = stream.start_at.max(until);
        }
    }

    /// Asks for a part of a stream again after `until`. Its memory stays reserved.
    pub(crate) fn stream_again(
        &mut self,
        layer: u32,
        part: Range<u64>,
        until: Duration,
        tried: Tried,
    ) {
        let stream = self
            .layers
            .get(&layer)
            .and_then(|line| self.lines[line.0].streams.iter_mut().find(|s| s.layer == layer));
        match stream {
            Some(stream) => drop(stream.again.insert(part.start, (part.end, until, tried))),
            None => self.reserved -= part.end - part.start,
        }
    }

    /// The consumer of a stream is done with so many bytes.
    pub(crate) fn consumed(&mut self, layer: u32, bytes: u64) {
        self.reserved -= bytes;
        if let Some(line) = self.layers.get(&layer)
            && let Some(stream) = self.lines[line.0].streams.iter_mut().find(|s| s.layer == layer)
        {
            stream.outstanding = stream.outstanding.saturating_sub(bytes);
        }
    }

    /// The answer to a request begins.
    pub(crate) fn first_byte(&mut self, order: OrderNo, now: Duration) {
        let Some(sent) = self.sent.get(&order) else { return };
        let after = now.saturating_sub(sent.at);
        self.lines[sent.line.0].measured.first_byte(after, sent.before);
    }

    /// Bytes of an answer came.
    pub(crate) fn arrived(&mut self, order: OrderNo, bytes: u64, now: Duration) {
        let Some(sent) = self.sent.get_mut(&order) else { return };
        let line = &mut self.lines[sent.line.0];
        let counted = bytes.min(sent.left);
        sent.left -= counted;
        line.in_flight[sent.class as usize] -= counted;
        line.measured.arrived(now, bytes, line.in_flight());
    }

    /// A request is over. Its frames that are not there are to be asked for again or forgotten by
    /// the caller; memory of frames is free, that of a stream when [`Queue::consumed`] says so.
    pub(crate) fn end(&mut self, order: OrderNo) {
        let Some(sent) = self.sent.remove(&order) else { return };
        let line = &mut self.lines[sent.line.0];
        line.in_flight[sent.class as usize] -= sent.left;
        line.requests -= 1;
        if sent.class != Class::Background {
            self.reserved -= sent.reserved;
        }
        if line.in_flight() == 0 {
            line.measured.idle();
        }
    }

    /// The requests to send now.
    pub(crate) fn poll(&mut self, now: Duration) -> Vec<Order> {
        let mut orders = Vec::new();
        for line in 0..self.lines.len() {
            self.wake(LineNo(line), now);
            while let Some(order) = self.next_order(LineNo(line), now) {
                orders.push(order);
            }
        }
        orders
    }

    /// When [`Queue::poll`] will have something to give though nothing happens.
    pub(crate) fn next_time(&self, now: Duration) -> Option<Duration> {
        let delayed = self.lines.iter().filter_map(|l| l.delayed.first().map(|(t, _)| *t));
        let streams = self.lines.iter().flat_map(|l| &l.streams).flat_map(|s| {
            let again = s.again.values().map(|(_, until, _)| *until);
            again.chain((s.next < s.end).then_some(s.start_at))
        });
        delayed.chain(streams.filter(|t| *t > now)).min()
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Puts frames back whose time has come.
    fn wake(&mut self, line: LineNo, now: Duration) {
        while let Some((until, key)) = self.lines[line.0].delayed.first().copied() {
            if until > now {
                break;
            }
            self.lines[line.0].delayed.remove(&(until, key));
            let no = self.number();
            if let Some(frame) = self.frames.get_mut(&key) {
                frame.state = State::Queued(no);
                self.lines[line.0].queued[frame.class as usize].insert(no, key);
            }
        }
    }

    /// What may be reserved in all for a request of `class` to be sent.
    fn memory(&self, class: Class) -> u64 {
        match class {
            Class::Demand => self.limits.memory,
            Class::Learned | Class::Ahead => self.limits.memory / 4 * 3,
            Class::Background => self.limits.memory / 2,
        }
    }

    fn next_order(&mut self, line_no: LineNo, now: Duration) -> Option<Order> {
        let line = &self.lines[line_no.0];
        let mut above = 0;
        for class in Class::ALL {
            let at = class as usize;
            above += line.in_flight[at];
            let mut places = self.limits.connections;
            if class == Class::Demand {
                places += RESERVED.max(places / 4);
            }
            if class != Class::Background {
                if line.queued[at].is_empty() {
                    // Those below may go on with what is left of the line.
                    if above >= line.measured.bdp() {
                        return None;
                    }
                    continue;
                }
                let order = self.cut(line_no, class, now)?;
                let free = self.fits(order.range.end - order.range.start, class);
                if above >= line.window(class, now) || line.requests >= places || !free {
                    return None;
                }
                return Some(self.send(order, now));
            }
            let all = line.in_flight();
            let (part, repeated) = self.cut_stream(line_no, now)?;
            let length = part.range.end - part.range.start;
            let free = repeated || self.fits(length, class);
            // A line that is idle takes at least one.
            let room = all + length <= line.window(class, now) || all == 0;
            if line.requests >= places || !free || !room {
                return None;
            }
            return Some(self.send_part(part, repeated, now));
        }
        None
    }

    fn fits(&self, bytes: u64, class: Class) -> bool {
        // What is longer than the limit goes alone.
        self.reserved + bytes <= self.memory(class) || self.reserved == 0
    }

    /// The request for the first frame of `class`, and what is asked for with it.
    fn cut(&self, line_no: LineNo, class: Class, now: Duration) -> Option<Order> {
        let line = &self.lines[line_no.0];
        let (_, key) = line.queued[class as usize].first_key_value()?;
        let frame = self.frames.get(key)?;
        let mut order = Order {
            no: OrderNo(0),
            line: line_no,
            layer: key.0,
            range: key.1..frame.end,
            class,
            frames: vec![key.1],
            tried: frame.tried,
        };
        let limit = line.request(class, now).min(self.memory(class) / 4);
        // What failed goes alone, for it may fail again.
        if frame.tried == Tried::default() {
            for ((_, start), next) in self.frames.range((key.0, key.1 + 1)..=(key.0, u64::MAX)) {
                let end = next.end.max(order.range.end);
                if *start > order.range.end + MAX_GAP || end - order.range.start > limit {
                    break;
                }
                // What is on its way already is not asked for again as a gap.
                if matches!(next.state, State::Sent(_)) {
                    break;
                }
                let queued = matches!(next.state, State::Queued(_));
                if queued && next.class <= class && next.tried == Tried::default() {
                    order.range.end = end;
                    order.frames.push(*start);
                }
            }
        }
        Some(order)
    }

    fn send(&mut self, mut order: Order, now: Duration) -> Order {
        order.no = OrderNo(self.number());
        let line = &mut self.lines[order.line.0];
        for start in &order.frames {
            if let Some(frame) = self.frames.get_mut(&(order.layer, *start)) {
                if let State::Queued(no) = frame.state {
                    line.queued[frame.class as usize].remove(&no);
                }
                frame.state = State::Sent(order.no);
                frame.tried.tries += 1;
            }
        }
        order.tried.tries += 1;
        self.reserved += order.range.end - order.range.start;
        self.note(&order, now);
        order
    }

    /// The next part of a stream, and whether it was asked for before.
    fn cut_stream(&self, line_no: LineNo, now: Duration) -> Option<(Order, bool)> {
        let line = &self.lines[line_no.0];
        let order = |layer, range, tried| Order {
            no: OrderNo(0),
            line: line_no,
            layer,
            range,
            class: Class::Background,
            frames: Vec::new(),
            tried,
        };
        let part = |s: &Stream| {
            let due = s.again.iter().find(|(_, (_, until, _))| *until <= now);
            if let Some((start, (end, _, tried))) = due {
                return Some((order(s.layer, *start..*end, *tried), true));
            }
            let end = s.end.min(s.next + line.request(Class::Background, now));
            (s.next < s.end && s.start_at <= now)
                .then(|| (order(s.layer, s.next..end, Tried::default()), false))
        };
        let waited = line.streams.iter().filter(|s| s.waited);
        let waited = waited.filter_map(|s| Some((s.outstanding, part(s)?)));
        match waited.min_by_key(|(outstanding, _)| *outstanding) {
            Some((_, part)) => Some(part),
            None => line.streams.iter().filter(|s| !s.waited).find_map(part),
        }
    }

    fn send_part(&mut self, mut part: Order, repeated: bool, now: Duration) -> Order {
        part.no = OrderNo(self.number());
        part.tried.tries += 1;
        if !repeated {
            self.reserved += part.range.end - part.range.start;
        }
        let streams = &mut self.lines[part.line.0].streams;
        if let Some(stream) = streams.iter_mut().find(|s| s.layer == part.layer) {
            match repeated {
                true => drop(stream.again.remove(&part.range.start)),
                false => {
                    stream.next = part.range.end;
                    stream.outstanding += part.range.end - part.range.start;
                }
            }
        }
        self.note(&part, now);
        part
    }

    fn note(&mut self, order: &Order, now: Duration) {
        let line = &mut self.lines[order.line.0];
        let (length, before) = (order.range.end - order.range.start, line.in_flight());
        line.in_flight[order.class as usize] += length;
        line.requests += 1;
        if order.class == Class::Demand {
            line.polite_until = now + RECENT;
        }
        let (line, class) = (order.line, order.class);
        let sent = Sent { line, class, left: length, reserved: length, at: now, before };
        self.sent.insert(order.no, sent);
    }

    /// Usual time to the first byte of the host of a request.
    pub(crate) fn usual(&self, order: OrderNo) -> Option<Duration> {
        let sent = self.sent.get(&order)?;
        self.lines[sent.line.0].measured.usual()
    }
}
