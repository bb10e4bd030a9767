use super::*;
use crate::layer::tests::{layer, memory, tree_image};
use rustix::{
    fd::{AsFd, OwnedFd},
    fs::{FallocateFlags, fallocate},
    io::pwrite,
};
use shipway_erofs::Nid;
use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::{Cell, RefCell},
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    rc::Rc,
};

const BLOCK: u64 = 4096;
const DEADLINE: Duration = Duration::from_secs(60);

fn request(opcode: u32, unique: u64, node: NodeId, body: &[u64]) -> Vec<u8> {
    let mut bytes = (40 + 8 * body.len() as u32).to_ne_bytes().to_vec();
    bytes.extend_from_slice(&opcode.to_ne_bytes());
    for word in [unique, node.0, 0, 0].into_iter().chain(body.iter().copied()) {
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    bytes
}

fn read_request(read: &Parked) -> Vec<u8> {
    request(15, read.unique.0, read.node, &[0, read.offset, read.size.into(), 0, 0])
}

/// Counts what each thread allocates.
struct Counting;

thread_local! {
    static ALLOCATED: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: all is left to the system's allocator.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATED.with(|n| n.set(n.get() + 1));
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn a_read_of_what_is_there_allocates_nothing() {
    let open = |path| {
        rustix::fs::open(path, rustix::fs::OFlags::RDWR, rustix::fs::Mode::empty()).expect("open")
    };
    let wake = rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).expect("eventfd");
    let kernel = crate::serve::Kernel::new(open("/dev/null"), wake);
    let (ours, theirs) = rustix::net::socketpair(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::SEQPACKET,
        rustix::net::SocketFlags::empty(),
        None,
    )
    .expect("sockets");
    kernel.set_daemon(Some(Arc::new(ours)));
    let (_memory, slots) = Slots::create().expect("slots");
    let blocks = 64;
    let data: Vec<u8> = (0..blocks * BLOCK).map(|at| at as u8).collect();
    let (meta, _, nids) = tree_image(&[blocks * BLOCK]);
    let engine = Engine::new(kernel, slots, vec![layer(4, &data, &meta)], DEADLINE);
    let mut reply = Reply::with_room_for(MAX_READ);
    engine.have(4, &(0..blocks), &mut reply);
    let requests: Vec<Vec<u8>> = (0..400u64)
        .map(|n| Parked {
            unique: Unique(2 * n),
            node: node_of(4, [File::Data, File::Image, File::Tree(nids[0])][n as usize % 3]),
            offset: n * 777,
            size: [100, 4096, 65_536, MAX_READ as u32][n as usize % 4],
        })
        .map(|read| read_request(&read))
        .chain(requests_of_trees(4, nids[0]))
        .collect();
    let before = ALLOCATED.with(Cell::get);
    for bytes in &requests {
        let reading = engine.reader(0);
        engine.handle(&Request::parse(bytes).expect("request"), &mut reply, Instant::now());
        drop(reading);
    }
    assert_eq!(ALLOCATED.with(Cell::get), before);
    // It did answer, and tell of first touches.
    let mut told = [0; 32];
    rustix::net::recv(&theirs, &mut told, rustix::net::RecvFlags::DONTWAIT).expect("touched");
    assert_eq!(Event::decode(&told), Ok(Some(Event::Touched { n: 4, block: 0 })));
    drop(vec![0]);
    assert_ne!(ALLOCATED.with(Cell::get), before, "allocations are counted");
}

/// Everything that is asked of a tree besides reads.
fn requests_of_trees(n: u32, file: Nid) -> Vec<Vec<u8>> {
    let with = |opcode, node, words: &[u64], text: &[u8]| {
        let mut bytes = request(opcode, 1000, node, words);
        bytes.extend_from_slice(text);
        let length = (bytes.len() as u32).to_ne_bytes();
        bytes[..4].copy_from_slice(&length);
        bytes
    };
    let root = node_of(n, File::Tree(Nid(40)));
    let file = node_of(n, File::Tree(file));
    vec![
        with(1, NodeId::ROOT, &[], format!("{n}\0").as_bytes()),
        with(1, root, &[], b"link\0"),
        with(1, root, &[], b"nothing\0"),
        with(1, file, &[], b".\0"),
        with(3, file, &[0, 0], b""),
        with(14, file, &[0], b""),
        with(27, root, &[0], b""),
        with(28, root, &[0, 0, 4096, 0, 0], b""),
        with(44, root, &[0, 0, MAX_READ as u64, 0, 0], b""),
        with(22, file, &[0], b"user.number\0"),
        with(22, file, &[100], b"user.number\0"),
        with(22, file, &[100], b"user.other\0"),
        with(23, file, &[0], b""),
        with(23, file, &[1000], b""),
        with(5, file, &[], b""),
    ]
}

#[test]
fn dropped_blocks_wait_for_the_requests_that_were_handled() {
    let world = Rc::new(World::new(1));
    let (_memory, slots) = Slots::create().expect("slots");
    let engine = Engine::new(Fake(world), slots, vec![layer(4, &[1; 8192], &[])], DEADLINE);
    let mut reply = Reply::default();
    engine.have(4, &(0..2), &mut reply);
    assert!(engine.is_dropped(&engine.drop_blocks(4, 0..1).expect("known")), "nobody reads");
    assert!(engine.drop_blocks(5, 0..1).is_none(), "nobody knows it");
    let reading = engine.reader(1);
    let dropping = engine.drop_blocks(4, 1..2).expect("known");
    assert!(!engine.is_dropped(&dropping) && !engine.is_quiet());
    // What begins later does not matter.
    let other = engine.reader(0);
    drop(reading);
    let again = engine.reader(1);
    assert!(engine.is_dropped(&dropping));
    drop((other, again));
    assert!(engine.is_quiet());
}

struct Killed;

/// A read as the kernel knows it.
#[derive(Clone, Debug)]
struct Ask {
    read: Parked,
    since: Instant,
    interrupted: bool,
    /// It may fail: the daemon said so, or the layer went.
    may_fail: bool,
}

struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// The kernel and the daemon, which outlive keepers.
struct World {
    dice: RefCell<Dice>,
    /// Reads without an answer, by the number that an answer has to have.
    asks: RefCell<BTreeMap<u64, Ask>>,
    /// Interrupts that the keeper has not taken.
    interrupts: RefCell<Vec<u64>>,
    /// Blocks that the daemon knows to be wanted, by layer.
    wanted: RefCell<BTreeMap<(u32, u64), ()>>,
    connected: Cell<bool>,
    now: Cell<Instant>,
    /// Calls to the outside until the keeper is killed.
    life: Cell<u64>,
    layers: [TestLayer; 2],
    answered: Cell<u64>,
    kills: Cell<u64>,
}

/// Files of a layer.
struct TestLayer {
    n: u32,
    blocks: u64,
    files: [OwnedFd; 3],
    /// The flat image, without data.
    flat: Vec<u8>,
    /// Files of the tree: inodes, where they begin in the data, and their sizes.
    tree: Vec<(Nid, u64, u64)>,
    good: RefCell<Vec<bool>>,
    there: Cell<bool>,
}

impl TestLayer {
    fn new(n: u32, blocks: u64) -> Self {
        // The first ends in the middle of its last block.
        let sizes = [blocks / 2 * BLOCK - 100, (blocks - blocks / 2) * BLOCK];
        let (meta, flat, nids) = tree_image(&sizes);
        let tree = vec![(nids[0], 0, sizes[0]), (nids[1], blocks / 2 * BLOCK, sizes[1])];
        let files = [
            memory(&[], blocks * BLOCK),
            memory(&[], blocks.div_ceil(8)),
            memory(&meta, meta.len() as u64),
        ];
        let good = RefCell::new(vec![false; blocks as usize]);
        Self { n, blocks, files, flat, tree, good, there: Cell::new(true) }
    }

    fn open(&self) -> Layer {
        let [data, map, meta] = self.files.each_ref().map(|f| f.try_clone().expect("dup"));
        Layer::new(self.n, data, map, meta).expect("layer")
    }

    fn byte(&self, at: u64) -> u8 {
        (at.wrapping_mul(7) ^ at >> 9) as u8 % 255 + 1
    }

    fn fill(&self, blocks: &Range<u64>) {
        let bytes: Vec<u8> =
            (blocks.start * BLOCK..blocks.end * BLOCK).map(|at| self.byte(at)).collect();
        assert_eq!(pwrite(&self.files[0], &bytes, blocks.start * BLOCK), Ok(bytes.len()));
        self.mark(blocks, true);
    }

    fn empty(&self, blocks: &Range<u64>) {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let (at, length) = (blocks.start * BLOCK, (blocks.end - blocks.start) * BLOCK);
        fallocate(self.files[0].as_fd(), flags, at, length).expect("punch");
        self.mark(blocks, false);
    }

    fn mark(&self, blocks: &Range<u64>, is: bool) {
        self.good.borrow_mut()[blocks.start as usize..blocks.end as usize].fill(is);
    }

    /// What a read is to give, and the blocks that it touches.
    fn want(&self, read: &Parked) -> (Vec<u8>, Range<u64>) {
        let (_, file) = file_of(read.node).expect("a file");
        let data = self.blocks * BLOCK;
        let (head, start, size) = match file {
            File::Data => (0, 0, data),
            File::Image => (self.flat.len() as u64, 0, self.flat.len() as u64 + data),
            File::Tree(nid) => {
                let (_, start, size) = self.tree.iter().find(|f| f.0 == nid).expect("a file");
                (0, *start, *size)
            }
        };
        let end = size.min(read.offset + u64::from(read.size));
        let bytes = (read.offset..end).map(|at| {
            if at < head { self.flat[at as usize] } else { self.byte(start + at - head) }
        });
        let mut touched =
            (read.offset..end).filter(|at| *at >= head).map(|at| (start + at - head) / BLOCK);
        let (first, last) = (touched.clone().next(), touched.next_back());
        (bytes.collect(), first.map_or(0, |b| b)..last.map_or(0, |b| b + 1))
    }
}

impl World {
    fn new(seed: u64) -> Self {
        Self {
            dice: RefCell::new(Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)),
            asks: RefCell::default(),
            interrupts: RefCell::default(),
            wanted: RefCell::default(),
            connected: Cell::new(false),
            now: Cell::new(Instant::now()),
            life: Cell::new(u64::MAX),
            layers: [TestLayer::new(1, 12), TestLayer::new(2, 20)],
            answered: Cell::new(0),
            kills: Cell::new(0),
        }
    }

    fn dice(&self, limit: u64) -> u64 {
        self.dice.borrow_mut().below(limit)
    }

    /// One more system call, which may be the last.
    fn call(&self) {
        let life = self.life.get();
        // Who is dying already does not die once more.
        if life == 0 && !std::thread::panicking() {
            resume_unwind(Box::new(Killed));
        }
        self.life.set(life.saturating_sub(u64::from(life != u64::MAX)));
    }

    fn layer_of(&self, node: NodeId) -> &TestLayer {
        let (n, _) = file_of(node).expect("a file");
        self.layers.iter().find(|l| l.n == n).expect("a layer")
    }

    fn blocks(&self, layer: &TestLayer) -> Range<u64> {
        let start = self.dice(layer.blocks);
        start..start + 1 + self.dice(layer.blocks - start)
    }

    fn overlapping(&self, n: u32, blocks: &Range<u64>, mut what: impl FnMut(&mut Ask)) {
        for ask in self.asks.borrow_mut().values_mut() {
            let layer = self.layer_of(ask.read.node);
            let (_, touched) = layer.want(&ask.read);
            if layer.n == n && touched.start < blocks.end && blocks.start < touched.end {
                what(ask);
            }
        }
    }
}

struct Fake(Rc<World>);

impl Outside for Fake {
    fn answer(&self, answer: &[u8]) {
        self.0.call();
        let error = i32::from_ne_bytes(answer[4..8].try_into().expect("4 bytes"));
        let unique = u64::from_ne_bytes(answer[8..16].try_into().expect("8 bytes"));
        if unique & 1 != 0 {
            assert_eq!(error, -Errno::AGAIN.raw_os_error());
            self.0.interrupts.borrow_mut().push(unique & !1);
        } else if let Some(ask) = self.0.asks.borrow_mut().remove(&unique) {
            self.0.answered.set(self.0.answered.get() + 1);
            let layer = self.0.layer_of(ask.read.node);
            match error {
                0 => assert!(answer[16..] == layer.want(&ask.read).0, "wrong bytes for {ask:?}"),
                e if e == -Errno::INTR.raw_os_error() => assert!(ask.interrupted, "{ask:?}"),
                e if e == -Errno::IO.raw_os_error() => {
                    let late = self.0.now.get() - ask.since >= DEADLINE;
                    assert!(ask.may_fail || late, "{ask:?}");
                }
                other => panic!("{other}: {ask:?}"),
            }
        }
        self.0.call();
    }

    fn report(&self, event: &Event) -> bool {
        self.0.call();
        // Sometimes the socket is full.
        let taken = self.0.connected.get() && self.0.dice(4) > 0;
        if let (true, Event::Miss { n, blocks }) = (taken, event) {
            self.0.wanted.borrow_mut().extend(blocks.clone().map(|b| ((*n, b), ())));
        }
        self.0.call();
        taken
    }

    fn wake(&self) {
        self.0.call();
    }
}

/// A keeper, killed and begun anew as it comes.
struct Life {
    world: Rc<World>,
    memory: OwnedFd,
    engine: Engine<Fake>,
    next: u64,
}

impl Life {
    fn new(seed: u64) -> Self {
        let world = Rc::new(World::new(seed));
        let (memory, slots) = Slots::create().expect("slots");
        let layers = world.layers.iter().map(TestLayer::open).collect();
        let engine = Engine::new(Fake(world.clone()), slots, layers, DEADLINE);
        Self { world, memory, engine, next: 2 }
    }

    /// Does something, in the course of which the keeper may be killed; false if it was.
    fn attempt(&mut self, what: impl FnOnce(&Engine<Fake>, &World, &mut Reply)) -> bool {
        if self.world.dice(4) == 0 {
            self.world.life.set(self.world.dice(12));
        }
        let done = catch_unwind(AssertUnwindSafe(|| {
            what(&self.engine, &self.world, &mut Reply::with_room_for(MAX_READ));
        }));
        self.world.life.set(u64::MAX);
        match done {
            Ok(()) => true,
            Err(payload) if payload.is::<Killed>() => {
                self.world.kills.set(self.world.kills.get() + 1);
                self.take_over();
                false
            }
            Err(payload) => resume_unwind(payload),
        }
    }

    fn take_over(&mut self) {
        let slots = Slots::open(&self.memory).expect("slots");
        let known = self.world.layers.iter().filter(|l| l.there.get());
        let layers = known.map(TestLayer::open).collect();
        self.world.connected.set(false);
        self.world.wanted.borrow_mut().clear();
        self.engine = Engine::new(Fake(self.world.clone()), slots, layers, DEADLINE);
        let now = self.world.now.get();
        if !self.attempt(|engine, _, reply| engine.take_over(reply, now)) {
            return;
        }
        if self.world.dice(2) == 0 {
            // The kernel sends everything again, interrupts too.
            let asks = std::mem::take(&mut *self.world.asks.borrow_mut());
            let again: Vec<u64> = asks.keys().map(|unique| unique | 1 << 63).collect();
            let renumbered = asks.into_values().map(|mut ask| {
                ask.read.unique = Unique(ask.read.unique.0 | 1 << 63);
                (ask.read.unique.0, ask)
            });
            self.world.asks.borrow_mut().extend(renumbered);
            for unique in again {
                self.deliver(unique);
            }
        }
        self.end_interrupts();
    }

    /// The keeper reads a request of the kernel's.
    fn read(&mut self, bytes: &[u8]) -> bool {
        self.attempt(|engine, world, reply| {
            let mut slot =
                engine.slots().reader(world.dice(READERS as u64) as usize).expect("slot");
            slot.clear();
            slot.bytes()[..bytes.len()].copy_from_slice(bytes);
            world.call();
            let reading = engine.reader(0);
            let request = Request::parse(slot.bytes()).expect("request");
            engine.handle(&request, reply, world.now.get());
            drop(reading);
        })
    }

    /// Reads a request that has no answer yet.
    fn deliver(&mut self, unique: u64) {
        let read = self.world.asks.borrow().get(&unique).map(|ask| ask.read);
        if let Some(read) = read {
            self.read(&read_request(&read));
        }
    }

    fn end_interrupts(&mut self) {
        loop {
            let again = std::mem::take(&mut *self.world.interrupts.borrow_mut());
            let waiting: Vec<u64> = self
                .world
                .asks
                .borrow()
                .iter()
                .filter(|(unique, ask)| {
                    ask.interrupted && again.iter().any(|a| a & !(1 << 63) == **unique & !(1 << 63))
                })
                .map(|(unique, _)| *unique)
                .collect();
            if waiting.is_empty() {
                return;
            }
            for unique in waiting {
                self.interrupt(unique);
            }
        }
    }

    fn interrupt(&mut self, unique: u64) {
        self.read(&request(36, unique | 1, NodeId(0), &[unique]));
    }

    fn step(&mut self) {
        let world = self.world.clone();
        let layer = &world.layers[world.dice(2) as usize];
        let (n, blocks) = (layer.n, world.blocks(layer));
        match world.dice(20) {
            0..8 => {
                let nid = layer.tree[world.dice(2) as usize].0;
                let file = [File::Data, File::Image, File::Tree(nid)][world.dice(3) as usize];
                let end = layer.flat.len() as u64 + layer.blocks * BLOCK;
                let (offset, size) = (world.dice(end), 1 + world.dice(5 * BLOCK) as u32);
                let read =
                    Parked { unique: Unique(self.next), node: node_of(n, file), offset, size };
                self.next += 2;
                let since = world.now.get();
                let ask = Ask { read, since, interrupted: false, may_fail: false };
                world.asks.borrow_mut().insert(read.unique.0, ask);
                self.deliver(read.unique.0);
            }
            // The daemon's commands come from a daemon.
            8..16 if !world.connected.get() => {
                world.connected.set(true);
                world.wanted.borrow_mut().clear();
                self.attempt(|engine, _, _| engine.forget_reported());
            }
            8..12 => {
                layer.fill(&blocks);
                world.wanted.borrow_mut().retain(|(l, b), ()| *l != n || !blocks.contains(b));
                self.attempt(|engine, _, reply| engine.have(n, &blocks, reply));
            }
            12 => {
                world.overlapping(n, &blocks, |ask| ask.may_fail = true);
                world.wanted.borrow_mut().retain(|(l, b), ()| *l != n || !blocks.contains(b));
                self.attempt(|engine, _, reply| engine.fail(n, &blocks, 5, reply));
            }
            13..15 => {
                let mut dropped = false;
                let again = blocks.clone();
                self.attempt(|engine, _, _| {
                    let dropping = engine.drop_blocks(n, again);
                    dropped = dropping.is_some_and(|d| engine.is_dropped(&d));
                });
                if dropped {
                    layer.empty(&blocks);
                }
            }
            15 => {
                let there = layer.there.get();
                let all = 0..layer.blocks;
                if there {
                    world.overlapping(n, &all, |ask| ask.may_fail = true);
                    world.asks.borrow_mut().values_mut().for_each(|ask| {
                        ask.may_fail |= file_of(ask.read.node).is_some_and(|(of, _)| of == n);
                    });
                    // What it wanted of the layer is nothing any more.
                    world.wanted.borrow_mut().retain(|(l, _), ()| *l != n);
                }
                layer.there.set(!there);
                self.attempt(|engine, _, reply| {
                    if there {
                        assert!(engine.remove(n, reply).is_some());
                    } else {
                        assert_eq!(engine.add(layer.open(), reply), Ok(true));
                    }
                });
            }
            16 => world.connected.set(false),
            17 => {
                world.now.set(world.now.get() + DEADLINE / 3);
                let now = world.now.get();
                self.attempt(|engine, _, reply| engine.expire(now, reply));
            }
            _ => {
                let asks: Vec<u64> = world.asks.borrow().keys().copied().collect();
                if !asks.is_empty() {
                    let unique = asks[world.dice(asks.len() as u64) as usize];
                    if let Some(ask) = world.asks.borrow_mut().get_mut(&unique) {
                        ask.interrupted = true;
                    }
                    self.interrupt(unique);
                }
            }
        }
        self.end_interrupts();
        self.check();
    }

    /// What holds whenever nothing is being done.
    fn check(&mut self) {
        let world = self.world.clone();
        // The socket takes some more.
        while world.connected.get() && !self.engine.report_all() {}
        let parked: Vec<Parked> = self.engine.slots().parked().map(|(_, read)| read).collect();
        let asks = world.asks.borrow();
        for ask in asks.values() {
            assert!(parked.contains(&ask.read), "{ask:?} waits nowhere");
            assert!(!ask.interrupted, "{ask:?} was interrupted");
            let layer = world.layer_of(ask.read.node);
            let (_, touched) = layer.want(&ask.read);
            if !layer.there.get() {
                continue;
            }
            let good = layer.good.borrow();
            let mut missing = touched.filter(|b| !good[*b as usize]).peekable();
            if missing.peek().is_none() {
                // The daemon was killed off before it said what it had written: it says it again.
                assert!(self.engine.missing(&ask.read) != Some(None), "{ask:?} is not answered");
                continue;
            }
            if world.connected.get() {
                let wanted = world.wanted.borrow();
                let unknown = missing.find(|b| !wanted.contains_key(&(layer.n, *b)));
                assert_eq!(unknown, None, "nobody knows that {ask:?} waits");
            }
        }
        // One that was answered just before a kill may still be there, and waits for nothing.
        assert!(world.kills.get() > 0 || parked.len() == asks.len());
        assert!(self.engine.is_quiet());
    }

    /// Everything comes, and nobody waits any more.
    fn finish(mut self) -> (u64, u64) {
        for layer in &self.world.clone().layers {
            layer.fill(&(0..layer.blocks));
            let mut reply = Reply::with_room_for(MAX_READ);
            if !layer.there.replace(true) {
                assert_eq!(self.engine.add(layer.open(), &mut reply), Ok(true));
            }
            self.engine.have(layer.n, &(0..layer.blocks), &mut reply);
        }
        self.check();
        assert!(self.world.asks.borrow().is_empty());
        assert_eq!(self.engine.slots().parked().count(), 0);
        (self.world.answered.get(), self.world.kills.get())
    }
}

/// Reads, commands, interrupts and kills in any order, a kill before or after any system call: no
/// wrong byte, no error without its reason, nothing that waits for ever or that the daemon does not
/// know of.
#[test]
fn any_order_of_events_is_as_in_a_simple_model() {
    let time = std::env::var("SHIPWAY_FUZZ_SECONDS")
        .ok()
        .and_then(|n| n.parse().ok())
        .map(|n| Duration::from_secs(n) / 6);
    let (started, mut answered, mut kills) = (Instant::now(), 0, 0);
    for seed in 1.. {
        if seed > 40 && time.is_none_or(|time| started.elapsed() >= time) {
            break;
        }
        // What fails says where.
        let result = catch_unwind(|| {
            let mut life = Life::new(seed);
            (0..150).for_each(|_| life.step());
            life.finish()
        });
        match result {
            Ok((a, k)) => (answered, kills) = (answered + a, kills + k),
            Err(payload) => {
                eprintln!("seed {seed}");
                resume_unwind(payload);
            }
        }
    }
    assert!(answered > 500 && kills > 100, "{answered} answers, {kills} kills");
    println!("{answered} answers, {kills} kills");
}
