//! A stand-in for GitHub's cache of Actions: both protocols, the blobs of the second, and the part
//! of the API that lists keys. `object_caches` shows that the published client gets along with it.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

/// What a signed address ends in.
const SIGNATURE: &str = "sig=right";

/// A running one; ends when dropped.
pub struct GithubCache {
    port: u16,
    ended: Arc<AtomicBool>,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    token: String,
    api_token: String,
    scope: String,
    entries: Vec<Entry>,
    asked: Vec<String>,
    /// Requests that are still to be refused for coming too fast.
    limited: usize,
}

struct Entry {
    key: String,
    version: String,
    bytes: Vec<u8>,
    blocks: BTreeMap<String, Vec<u8>>,
    whole: bool,
}

struct Asked {
    method: String,
    path: String,
    query: BTreeMap<String, String>,
    headers: BTreeMap<String, String>,
    body: Vec<u8>,
}

struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
}

impl Answer {
    fn new(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: Vec::new() }
    }

    fn json(status: u16, body: Value) -> Self {
        let headers = vec![("Content-Type", "application/json".to_owned())];
        Self { status, headers, body: body.to_string().into_bytes() }
    }

    fn with(mut self, name: &'static str, value: impl ToString) -> Self {
        self.headers.push((name, value.to_string()));
        self
    }
}

impl GithubCache {
    /// Starts one, whose jobs run on the branch `scope` and may read `main` besides.
    pub fn start(scope: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let ended = Arc::new(AtomicBool::new(false));
        let state = State {
            token: token(scope),
            api_token: "api-token".into(),
            scope: scope.into(),
            ..State::default()
        };
        let state = Arc::new(Mutex::new(state));
        let (all, over) = (state.clone(), ended.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if over.load(Ordering::Relaxed) {
                    break;
                }
                let all = all.clone();
                // Clients hang up when they like.
                std::thread::spawn(move || drop(serve(stream, &all, port)));
            }
        });
        Self { port, ended, state }
    }

    /// Address of both protocols, and of the API.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// A job's token.
    pub fn token(&self) -> String {
        self.state.lock().token.clone()
    }

    /// A token for the API.
    pub fn api_token(&self) -> String {
        self.state.lock().api_token.clone()
    }

    /// Keys of what is whole, the oldest first.
    pub fn keys(&self) -> Vec<String> {
        let state = self.state.lock();
        state.entries.iter().filter(|e| e.whole).map(|e| e.key.clone()).collect()
    }

    /// The entry of a key.
    pub fn entry(&self, key: &str) -> Option<Vec<u8>> {
        let state = self.state.lock();
        state.entries.iter().find(|e| e.whole && e.key == key).map(|e| e.bytes.clone())
    }

    /// Method and path of what was asked since the last time.
    pub fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().asked)
    }

    /// Refuses the next `requests` for coming too fast.
    pub fn limit(&self, requests: usize) {
        self.state.lock().limited = requests;
    }

    /// Forgets the entries whose keys `gone` accepts.
    pub fn evict(&self, gone: impl Fn(&str) -> bool) {
        self.state.lock().entries.iter_mut().filter(|e| gone(&e.key)).for_each(|e| e.key.clear());
    }
}

impl Drop for GithubCache {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

/// A token for a job on the branch `scope`.
fn token(scope: &str) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let scopes = json!([
        { "Scope": scope, "Permission": 3 },
        { "Scope": "refs/heads/main", "Permission": 1 },
    ]);
    // What GitHub's own client wants to find in it is `scp`.
    let claims = json!({
        "ac": scopes.to_string(), "nbf": now - 60, "exp": now + 3600,
        "scp": "Actions.Results:run:job",
    });
    let part = |value: Value| URL_SAFE_NO_PAD.encode(value.to_string());
    format!("{}.{}.c2lnbmF0dXJl", part(json!({ "alg": "none" })), part(claims))
}

fn serve(mut stream: TcpStream, state: &Mutex<State>, port: u16) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    while let Some(asked) = read(&mut reader, &mut stream)? {
        let head = asked.method == "HEAD";
        let Answer { status, headers, body } = state.lock().answer(&asked, port);
        let mut text = format!("HTTP/1.1 {status} Answer\r\n");
        if status != 204 && !(head && headers.iter().any(|(n, _)| *n == "Content-Length")) {
            text += &format!("Content-Length: {}\r\n", body.len());
        }
        for (name, value) in headers {
            text += &format!("{name}: {value}\r\n");
        }
        stream.write_all(format!("{text}\r\n").as_bytes())?;
        if !head {
            stream.write_all(&body)?;
        }
    }
    Ok(())
}

/// The next request of a connection.
fn read(
    reader: &mut BufReader<TcpStream>,
    stream: &mut TcpStream,
) -> std::io::Result<Option<Asked>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace();
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let pair = |pair: &str| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        (name.to_owned(), decoded(value))
    };
    let mut asked = Asked {
        method: method.to_owned(),
        path: path.to_owned(),
        query: query.split('&').filter(|p| !p.is_empty()).map(pair).collect(),
        headers: BTreeMap::new(),
        body: Vec::new(),
    };
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        asked.headers.insert(name.to_lowercase(), value.trim().to_owned());
    }
    if asked.header("expect").eq_ignore_ascii_case("100-continue") {
        stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
    }
    if asked.header("transfer-encoding").eq_ignore_ascii_case("chunked") {
        loop {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            let size = usize::from_str_radix(line.trim(), 16).map_err(std::io::Error::other)?;
            let mut chunk = vec![0; size + 2];
            reader.read_exact(&mut chunk)?;
            if size == 0 {
                break;
            }
            asked.body.extend_from_slice(&chunk[..size]);
        }
    } else {
        asked.body = vec![0; asked.header("content-length").parse().unwrap_or(0)];
        reader.read_exact(&mut asked.body)?;
    }
    Ok(Some(asked))
}

fn decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, more @ ..] = rest {
        let hex =
            more.get(..2).and_then(|h| u8::from_str_radix(std::str::from_utf8(h).ok()?, 16).ok());
        match (first, hex) {
            (b'%', Some(byte)) => {
                bytes.push(byte);
                rest = &more[2..];
            }
            (byte, _) => {
                bytes.push(*byte);
                rest = more;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

impl Asked {
    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }

    fn query(&self, name: &str) -> &str {
        self.query.get(name).map_or("", String::as_str)
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    /// First byte and the one after the last of a header such as `bytes=3-` or `bytes 3-7/*`.
    fn range(&self, name: &str, length: usize) -> Option<(usize, usize)> {
        let text =
            self.headers.get(name)?.trim_start_matches("bytes").trim_start_matches([' ', '=']);
        let (from, to) = text.split('/').next()?.split_once('-')?;
        let from = from.parse().ok()?;
        Some((from, to.parse().map_or(length, |to: usize| to + 1).min(length.max(from))))
    }
}

impl State {
    fn answer(&mut self, asked: &Asked, port: u16) -> Answer {
        self.asked.push(format!("{} {}", asked.method, asked.path));
        if self.limited > 0 {
            self.limited -= 1;
            return Answer::json(429, json!({ "message": "too many requests" }))
                .with("Retry-After", 0);
        }
        let path: Vec<&str> = asked.path.trim_matches('/').split('/').collect();
        if let ["blob", number] = path[..] {
            return self.blob(asked, number);
        }
        let token = if path[0] == "repos" { &self.api_token } else { &self.token };
        if asked.header("authorization") != format!("Bearer {token}") {
            return Answer::json(401, json!({ "message": "not authorized" }));
        }
        let base = format!("http://127.0.0.1:{port}");
        let location = |number: usize| format!("{base}/blob/{number}?{SIGNATURE}");
        match (asked.method.as_str(), &path[..]) {
            ("GET", ["_apis", "artifactcache", "cache"]) => {
                let keys: Vec<&str> = asked.query("keys").split(',').collect();
                match self.find(&keys, asked.query("version")) {
                    None => Answer::new(204),
                    Some(number) => Answer::json(
                        200,
                        json!({
                            "cacheKey": self.entries[number].key, "scope": self.scope,
                            "archiveLocation": location(number),
                        }),
                    ),
                }
            }
            ("POST", ["_apis", "artifactcache", "caches"]) => match self.reserve(&asked.json()) {
                None => Answer::json(
                    409,
                    json!({
                        "typeKey": "ArtifactCacheItemAlreadyExistsException",
                        "message": "Cache already exists",
                    }),
                ),
                Some(number) => Answer::json(201, json!({ "cacheId": number + 1 })),
            },
            (method, ["_apis", "artifactcache", "caches", id]) => {
                let Some(entry) =
                    id.parse::<usize>().ok().and_then(|n| self.entries.get_mut(n.wrapping_sub(1)))
                else {
                    return Answer::json(404, json!({ "message": "no such cache" }));
                };
                if method == "PATCH" {
                    let Some((from, to)) = asked.range("content-range", usize::MAX) else {
                        return Answer::json(400, json!({ "message": "no range" }));
                    };
                    if to - from != asked.body.len() {
                        return Answer::json(400, json!({ "message": "another length" }));
                    }
                    entry.bytes.resize(entry.bytes.len().max(to), 0);
                    entry.bytes[from..to].copy_from_slice(&asked.body);
                    return Answer::new(204);
                }
                entry.whole = asked.json()["size"] == entry.bytes.len();
                let status = if entry.whole { 204 } else { 400 };
                Answer::new(status)
            }
            ("POST", ["twirp", "github.actions.results.api.v1.CacheService", call]) => {
                self.twirp(call, &asked.json(), &location)
            }
            ("GET", ["repos", _, _, "actions", "caches"]) => {
                let page: usize = asked.query("page").parse().unwrap_or(1);
                let size: usize = asked.query("per_page").parse().unwrap_or(30);
                let right = asked.query("ref") == self.scope;
                let all: Vec<Value> = self
                    .entries
                    .iter()
                    .filter(|e| right && e.whole && e.key.starts_with(asked.query("key")))
                    .map(|e| json!({ "key": e.key, "size_in_bytes": e.bytes.len() }))
                    .collect();
                let total = all.len();
                let some: Vec<Value> = all.into_iter().skip((page - 1) * size).take(size).collect();
                Answer::json(200, json!({ "total_count": total, "actions_caches": some }))
            }
            _ => Answer::json(404, json!({ "message": format!("no such place: {}", asked.path) })),
        }
    }

    fn twirp(&mut self, call: &str, wanted: &Value, location: &dyn Fn(usize) -> String) -> Answer {
        match call {
            "CreateCacheEntry" => match self.reserve(wanted) {
                None => Answer::json(
                    409,
                    json!({
                        "code": "already_exists", "msg": "cache entry with the same key already exists",
                    }),
                ),
                Some(number) => {
                    Answer::json(200, json!({ "ok": true, "signed_upload_url": location(number) }))
                }
            },
            "FinalizeCacheEntryUpload" => {
                let size = match &wanted["size_bytes"] {
                    Value::String(text) => text.parse().unwrap_or(0),
                    other => other.as_u64().unwrap_or(0),
                };
                let entry = self.entries.iter_mut().find(|e| e.key == wanted["key"] && !e.whole);
                let done = entry.is_some_and(|entry| {
                    entry.whole = entry.bytes.len() as u64 == size;
                    entry.whole
                });
                Answer::json(200, json!({ "ok": done, "entry_id": "1" }))
            }
            "GetCacheEntryDownloadURL" => {
                let more = wanted["restore_keys"].as_array().cloned().unwrap_or_default();
                let all: Vec<Value> = [wanted["key"].clone()].into_iter().chain(more).collect();
                let keys: Vec<&str> = all.iter().filter_map(Value::as_str).collect();
                match self.find(&keys, wanted["version"].as_str().unwrap_or_default()) {
                    None => Answer::json(200, json!({ "ok": false })),
                    Some(number) => Answer::json(
                        200,
                        json!({
                            "ok": true, "signed_download_url": location(number),
                            "matched_key": self.entries[number].key,
                        }),
                    ),
                }
            }
            _ => Answer::json(404, json!({ "code": "bad_route", "msg": call })),
        }
    }

    /// The entry of one of these keys, or else the newest whose key begins with one.
    fn find(&self, keys: &[&str], version: &str) -> Option<usize> {
        let newest = |right: &dyn Fn(&str) -> bool| {
            self.entries.iter().rposition(|e| {
                e.whole && e.version == version && !e.key.is_empty() && right(&e.key)
            })
        };
        keys.iter()
            .find_map(|key| newest(&|k| k == *key).or_else(|| newest(&|k| k.starts_with(key))))
    }

    fn reserve(&mut self, wanted: &Value) -> Option<usize> {
        let text = |name: &str| wanted[name].as_str().unwrap_or_default().to_owned();
        let (key, version) = (text("key"), text("version"));
        if self.entries.iter().any(|e| e.key == key && e.version == version) {
            return None;
        }
        self.entries.push(Entry {
            key,
            version,
            bytes: Vec::new(),
            blocks: BTreeMap::new(),
            whole: false,
        });
        Some(self.entries.len() - 1)
    }

    /// Azure's part: signed addresses of block blobs.
    fn blob(&mut self, asked: &Asked, number: &str) -> Answer {
        if asked.query("sig") != "right" {
            return Answer::new(403);
        }
        let Some(entry) = number.parse::<usize>().ok().and_then(|n| self.entries.get_mut(n)) else {
            return Answer::new(404);
        };
        match (asked.method.as_str(), asked.query("comp")) {
            ("PUT", "block") => {
                entry.blocks.insert(asked.query("blockid").to_owned(), asked.body.clone());
                Answer::new(201)
            }
            ("PUT", "blocklist") => {
                let list = String::from_utf8_lossy(&asked.body).into_owned();
                // Elements are Latest, Committed or Uncommitted.
                let ids =
                    list.split('>').filter_map(|part| part.split_once("</").map(|(id, _)| id));
                let ids: Vec<&str> = ids.filter(|id| !id.is_empty()).collect();
                entry.bytes = ids.iter().flat_map(|id| entry.blocks[*id].clone()).collect();
                Answer::new(201).with("ETag", "\"1\"")
            }
            ("PUT", _) if asked.header("x-ms-blob-type") == "BlockBlob" => {
                entry.bytes.clone_from(&asked.body);
                Answer::new(201).with("ETag", "\"1\"")
            }
            ("GET" | "HEAD", _) => {
                let length = entry.bytes.len();
                let range =
                    asked.range("x-ms-range", length).or_else(|| asked.range("range", length));
                let (status, (from, to)) = range.map_or((200, (0, length)), |range| (206, range));
                let mut answer = Answer::new(status)
                    .with("ETag", "\"1\"")
                    .with("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
                    .with("Accept-Ranges", "bytes")
                    .with("x-ms-blob-type", "BlockBlob");
                if status == 206 {
                    let range = format!("bytes {from}-{}/{length}", to.saturating_sub(1));
                    answer = answer.with("Content-Range", range);
                }
                answer.body = entry.bytes.get(from..to).unwrap_or_default().to_vec();
                if asked.method == "HEAD" {
                    answer = answer.with("Content-Length", length);
                }
                answer
            }
            _ => Answer::new(400),
        }
    }
}
