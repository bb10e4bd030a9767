//! A registry that misbehaves: passes requests on to a good one, except those a fault is meant for.

use crate::http;
use parking_lot::Mutex;
use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

/// What goes wrong.
#[derive(Clone, Debug)]
pub enum RegistryFault {
    /// This status, with this text.
    Status(u16, &'static str),
    /// No answer, ever.
    Hang,
    /// The right answer, after so long.
    Late(Duration),
    /// The right headers, then a byte now and then.
    Trickle,
    /// The right length of wrong bytes.
    Corrupt,
    /// The same for so many answers, each of which takes one away; then they are right.
    CorruptSome(Arc<AtomicU32>),
    /// Refused without the `Authorization` that is right at the moment.
    Login(Arc<Mutex<String>>),
    /// Refused without a bearer token. `/token` gives one for this `user:password` alone, and notes
    /// who asked for it.
    Tokens {
        /// Whom to give a token.
        login: &'static str,
        /// How those who asked called themselves.
        asked: Arc<Mutex<Vec<String>>>,
    },
}

/// A running one; ends when dropped.
pub struct FaultyRegistry {
    port: u16,
    ended: Arc<AtomicBool>,
}

impl FaultyRegistry {
    /// Starts one in front of the registry at `upstream`; `fault` happens to requests whose path
    /// contains `path`.
    pub fn start(upstream: &str, path: &str, fault: RegistryFault) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let ended = Arc::new(AtomicBool::new(false));
        let (upstream, path, over) = (upstream.to_owned(), path.to_owned(), ended.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if over.load(Ordering::Relaxed) {
                    break;
                }
                let (upstream, path, fault, over) =
                    (upstream.clone(), path.clone(), fault.clone(), over.clone());
                // Clients hang up when they like.
                std::thread::spawn(move || drop(serve(stream, &upstream, &path, &fault, &over)));
            }
        });
        Self { port, ended }
    }

    /// `address:port`.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }
}

impl Drop for FaultyRegistry {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(self.address());
    }
}

fn pause(ended: &AtomicBool) -> std::io::Result<()> {
    // Not a wait for anything: the delay is what is being served.
    #[allow(clippy::disallowed_methods)]
    std::thread::sleep(Duration::from_millis(500));
    if ended.load(Ordering::Relaxed) { Err(std::io::ErrorKind::Interrupted.into()) } else { Ok(()) }
}

fn serve(
    mut stream: TcpStream,
    upstream: &str,
    path: &str,
    fault: &RegistryFault,
    ended: &AtomicBool,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut lines = reader.by_ref().lines().map_while(Result::ok);
    let first = lines.next().unwrap_or_default();
    let all: Vec<(String, String)> = lines
        .take_while(|l| !l.is_empty())
        .filter_map(|l| l.split_once(':').map(|(n, v)| (n.trim().to_owned(), v.trim().to_owned())))
        .collect();
    let header = |name: &str| {
        all.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map_or("", |(_, v)| v.as_str())
    };
    let passed = all
        .iter()
        .filter(|(n, _)| ["accept", "range", "authorization"].contains(&n.to_lowercase().as_str()));
    let mut headers: Vec<(String, String)> = passed.cloned().collect();
    let mut words = first.split_whitespace();
    let (method, target) = (words.next().unwrap_or("GET"), words.next().unwrap_or("/"));
    let meant = target.contains(path);
    let authorization = headers
        .iter()
        .position(|(n, _)| n.eq_ignore_ascii_case("authorization"))
        .map(|at| headers.remove(at).1);
    match fault {
        RegistryFault::Status(status, text) if meant => {
            return write!(
                stream,
                "HTTP/1.1 {status} Fault\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{text}",
                text.len()
            );
        }
        RegistryFault::Hang if meant => loop {
            pause(ended)?;
        },
        RegistryFault::Late(after) if meant => {
            let since = Instant::now();
            while since.elapsed() < *after {
                pause(ended)?;
            }
        }
        RegistryFault::Login(right) if meant && authorization.as_ref() != Some(&right.lock()) => {
            let challenge = "WWW-Authenticate: Basic realm=\"lab\"";
            return write!(
                stream,
                "HTTP/1.1 401 Fault\r\nConnection: close\r\n{challenge}\r\nContent-Length: 0\r\n\r\n"
            );
        }
        RegistryFault::Tokens { login, asked } if target.starts_with("/token") => {
            let mut form = vec![0; header("content-length").parse().unwrap_or(0)];
            reader.read_exact(&mut form)?;
            let form = String::from_utf8_lossy(&form).into_owned();
            let field = |name: &str| {
                form.split('&')
                    .find_map(|f| f.strip_prefix(name)?.strip_prefix('='))
                    .unwrap_or_default()
                    .to_owned()
            };
            asked.lock().push(field("client_id"));
            let good = format!("{}:{}", field("username"), field("password")) == *login;
            let (status, text) = if good {
                (200, r#"{"access_token":"lab","expires_in":3000}"#)
            } else {
                (403, "no")
            };
            return write!(
                stream,
                "HTTP/1.1 {status} Token\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{text}",
                text.len()
            );
        }
        RegistryFault::Tokens { .. } if authorization.as_deref() != Some("Bearer lab") => {
            let challenge = format!(
                "WWW-Authenticate: Bearer realm=\"http://{}/token\",service=\"lab\"",
                header("host")
            );
            return write!(
                stream,
                "HTTP/1.1 401 Fault\r\nConnection: close\r\n{challenge}\r\nContent-Length: 0\r\n\r\n"
            );
        }
        _ => {}
    }
    let headers: Vec<(&str, &str)> =
        headers.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
    let answer = http::request(method, upstream, target, &headers, &[])?;
    write!(stream, "HTTP/1.1 {} Passed\r\nConnection: close\r\n", answer.status)?;
    for name in ["Content-Type", "Docker-Content-Digest", "Content-Range"] {
        if let Some(value) = answer.header(name) {
            write!(stream, "{name}: {value}\r\n")?;
        }
    }
    let length =
        answer.header("Content-Length").map_or(answer.body.len(), |l| l.parse().unwrap_or(0));
    write!(stream, "Content-Length: {length}\r\n\r\n")?;
    match fault {
        RegistryFault::Trickle if meant => {
            for byte in &answer.body {
                stream.write_all(&[*byte])?;
                stream.flush()?;
                pause(ended)?;
            }
            Ok(())
        }
        RegistryFault::Corrupt if meant => stream.write_all(&vec![b'x'; answer.body.len()]),
        RegistryFault::CorruptSome(left)
            if meant
                && left
                    .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1))
                    .is_ok() =>
        {
            stream.write_all(&vec![b'x'; answer.body.len()])
        }
        _ => stream.write_all(&answer.body),
    }
}
