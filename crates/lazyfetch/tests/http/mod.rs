//! A server on loopback whose answers a test chooses: as much of HTTP/1.1 as a registry's client
//! needs.

#![allow(clippy::unwrap_used)]

use bytes::Bytes;
use std::{collections::HashMap, sync::Arc};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
};

/// A request as it arrived.
pub struct Asked {
    pub method: String,
    /// Path and query.
    pub path: String,
    headers: HashMap<String, String>,
    pub body: Bytes,
}

impl Asked {
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }
}

/// An answer.
pub struct Reply {
    pub code: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Bytes,
}

type Handler = dyn Fn(&Asked) -> Reply + Send + Sync;

/// A running server.
pub struct Fake {
    pub host: String,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Fake {
    pub async fn start(handler: impl Fn(&Asked) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let handler: Arc<Handler> = Arc::new(handler);
        let task = shipway_task::spawn("test", async move {
            while let Ok((tcp, _)) = listener.accept().await {
                shipway_task::spawn("test", serve(tcp, handler.clone()));
            }
        });
        Self { host, task }
    }
}

/// Serves a connection until something about it is wrong, as a greeting of TLS is.
async fn serve(tcp: TcpStream, handler: Arc<Handler>) -> Option<()> {
    let mut tcp = BufReader::new(tcp);
    loop {
        let asked = request(&mut tcp).await?;
        let Reply { code, headers, body } = handler(&asked);
        let mut head = format!("HTTP/1.1 {code} x\r\ncontent-length: {}\r\n", body.len());
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        let mut answer = format!("{head}\r\n").into_bytes();
        if asked.method != "HEAD" {
            answer.extend_from_slice(&body);
        }
        tcp.write_all(&answer).await.ok()?;
        tcp.flush().await.ok()?;
    }
}

async fn request(tcp: &mut BufReader<TcpStream>) -> Option<Asked> {
    // A greeting of TLS, which has no end of a line.
    if tcp.fill_buf().await.ok()?.first() == Some(&0x16) {
        return None;
    }
    let mut line = String::new();
    tcp.read_line(&mut line).await.ok()?;
    let (method, rest) = line.trim_end().split_once(' ')?;
    let (method, path) = (method.to_owned(), rest.strip_suffix(" HTTP/1.1")?.to_owned());
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        tcp.read_line(&mut line).await.ok()?;
        let Some((name, value)) = line.trim_end().split_once(": ") else { break };
        headers.insert(name.to_ascii_lowercase(), value.to_owned());
    }
    let mut body = Vec::new();
    match headers.get("content-length") {
        Some(length) => {
            body.resize(length.parse().ok()?, 0);
            tcp.read_exact(&mut body).await.ok()?;
        }
        None if headers.contains_key("transfer-encoding") => chunked(tcp, &mut body).await?,
        None => {}
    }
    Some(Asked { method, path, headers, body: body.into() })
}

async fn chunked(tcp: &mut BufReader<TcpStream>, body: &mut Vec<u8>) -> Option<()> {
    loop {
        let mut line = String::new();
        tcp.read_line(&mut line).await.ok()?;
        let length = usize::from_str_radix(line.trim_end(), 16).ok()?;
        let at = body.len();
        body.resize(at + length, 0);
        tcp.read_exact(&mut body[at..]).await.ok()?;
        tcp.read_exact(&mut [0; 2]).await.ok()?;
        if length == 0 {
            return Some(());
        }
    }
}
