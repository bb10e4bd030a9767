//! A slow network in front of a server on loopback: latency, bandwidth, and outages.

use parking_lot::Mutex;
use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    time::{Duration, Instant},
};

/// Bytes that are passed on at once.
const PIECE: usize = 64 << 10;
/// Pieces of a connection that are on their way at most.
const ON_THEIR_WAY: Duration = Duration::from_millis(50);

/// What the network is like.
#[derive(Clone, Copy, Debug)]
pub struct Network {
    /// Time one way.
    pub latency: Duration,
    /// Bytes a second in each direction, for all connections together.
    pub bandwidth: u64,
}

struct Shared {
    network: Network,
    upstream: String,
    /// When the cable is free again, from the client and to it.
    free: [Mutex<Instant>; 2],
    down: AtomicBool,
    ended: AtomicBool,
    /// Bytes to the client, and connections.
    bytes: AtomicU64,
    connections: AtomicU64,
    open: Mutex<Vec<TcpStream>>,
}

/// A running one; ends when dropped.
pub struct SlowNetwork {
    port: u16,
    shared: Arc<Shared>,
}

impl SlowNetwork {
    /// Starts one in front of the server at `upstream`.
    pub fn start(upstream: &str, network: Network) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let now = || Mutex::new(Instant::now());
        let shared = Arc::new(Shared {
            network,
            upstream: upstream.to_owned(),
            free: [now(), now()],
            down: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            bytes: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            open: Mutex::default(),
        });
        let accepting = shared.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if accepting.ended.load(Ordering::Relaxed) {
                    break;
                }
                if !accepting.down.load(Ordering::Relaxed) {
                    // Whoever cannot be connected hears of it by the end of its connection.
                    let _ = connect(&accepting, stream);
                }
            }
        });
        Self { port, shared }
    }

    /// `address:port`.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Cuts all connections and takes no more, or works again.
    pub fn set_down(&self, down: bool) {
        self.shared.down.store(down, Ordering::Relaxed);
        if down {
            self.shared.cut();
        }
    }

    /// Bytes that went to clients so far.
    pub fn bytes(&self) -> u64 {
        self.shared.bytes.load(Ordering::Relaxed)
    }

    /// Connections so far.
    pub fn connections(&self) -> u64 {
        self.shared.connections.load(Ordering::Relaxed)
    }
}

impl Drop for SlowNetwork {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        self.shared.cut();
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(self.address());
    }
}

impl Shared {
    fn cut(&self) {
        for stream in self.open.lock().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// When `bytes` that come now are out at the other end, and when the cable is free again.
    fn when(&self, direction: usize, bytes: usize) -> (Instant, Instant) {
        let mut free = self.free[direction].lock();
        let time = Duration::from_secs_f64(bytes as f64 / self.network.bandwidth as f64);
        *free = (*free).max(Instant::now()) + time;
        (*free + self.network.latency, *free)
    }
}

/// What a network does with bytes.
fn delay(time: Duration) {
    let until = Instant::now() + time;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        std::thread::park_timeout(left);
    }
}

fn connect(shared: &Arc<Shared>, client: TcpStream) -> std::io::Result<()> {
    let server = TcpStream::connect(&shared.upstream)?;
    shared.connections.fetch_add(1, Ordering::Relaxed);
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    {
        let mut open = shared.open.lock();
        open.extend([client.try_clone()?, server.try_clone()?]);
    }
    // A new connection costs one round trip more.
    pump(shared, 0, client.try_clone()?, server.try_clone()?, shared.network.latency * 2);
    pump(shared, 1, server, client, Duration::ZERO);
    Ok(())
}

fn pump(
    shared: &Arc<Shared>,
    direction: usize,
    mut from: TcpStream,
    mut to: TcpStream,
    mut extra: Duration,
) {
    let (sender, receiver): (Sender<(Instant, Vec<u8>)>, Receiver<_>) = channel();
    let reading = shared.clone();
    std::thread::spawn(move || {
        let mut piece = vec![0; PIECE];
        while let Ok(n @ 1..) = from.read(&mut piece) {
            let (out, free) = reading.when(direction, n);
            if sender.send((out + extra, piece[..n].to_vec())).is_err() {
                break;
            }
            extra = Duration::ZERO;
            let ahead = free.saturating_duration_since(Instant::now());
            delay(ahead.saturating_sub(ON_THEIR_WAY));
        }
    });
    let counting = shared.clone();
    std::thread::spawn(move || {
        for (out, piece) in receiver {
            delay(out.saturating_duration_since(Instant::now()));
            if to.write_all(&piece).is_err() {
                break;
            }
            if direction == 1 {
                counting.bytes.fetch_add(piece.len() as u64, Ordering::Relaxed);
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    });
}
