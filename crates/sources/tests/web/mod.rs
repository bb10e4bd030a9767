//! A web server on loopback for tests: whole answers, chosen per request, and a log of what was
//! asked.

use parking_lot::Mutex;
use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    sync::Arc,
};

pub struct Answer {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Vec<u8>,
}

/// An answer with status 200.
pub fn ok(body: impl Into<Vec<u8>>) -> Answer {
    Answer { status: 200, headers: vec![], body: body.into() }
}

pub fn status(status: u16) -> Answer {
    Answer { status, headers: vec![], body: vec![] }
}

impl Answer {
    pub fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }
}

type Handler = dyn Fn(&str, &str) -> Answer + Send + Sync;

/// Lives as long as the test process.
pub struct Web {
    pub host: String,
    log: Arc<Mutex<Vec<String>>>,
}

impl Web {
    /// `handler` gets the first line's method and path, and the whole head.
    pub fn start(handler: impl Fn(&str, &str) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let log = Arc::new(Mutex::new(Vec::new()));
        let (handler, lines): (Arc<Handler>, _) = (Arc::new(handler), log.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (handler, lines) = (handler.clone(), lines.clone());
                std::thread::spawn(move || serve(stream, &*handler, &lines));
            }
        });
        Self { host, log }
    }

    pub fn log(&self) -> Vec<String> {
        self.log.lock().clone()
    }

    pub fn forget(&self) {
        self.log.lock().clear();
    }
}

fn serve(mut stream: TcpStream, handler: &Handler, log: &Mutex<Vec<String>>) -> Option<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).ok()?;
        head.push(byte[0]);
        if head[0] == 0x16 {
            // A TLS greeting.
            return None;
        }
    }
    let head = String::from_utf8(head).ok()?;
    let line = head.lines().next()?.rsplit_once(' ')?.0.to_owned();
    log.lock().push(line.clone());
    let answer = handler(&line, &head);
    let mut out = format!(
        "HTTP/1.1 {} X\r\nConnection: close\r\nContent-Length: {}\r\n",
        answer.status,
        answer.body.len()
    );
    for (name, value) in &answer.headers {
        out += &format!("{name}: {value}\r\n");
    }
    stream.write_all(format!("{out}\r\n").as_bytes()).ok()?;
    if !line.starts_with("HEAD") {
        stream.write_all(&answer.body).ok()?;
    }
    Some(())
}
