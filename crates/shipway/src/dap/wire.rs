//! Messages: a header with the length, and JSON.

use serde_json::{Value, json};
use shipway_fault::{Fault, Result};
use tokio::io::{AsyncBufRead, AsyncBufReadExt as _, AsyncReadExt as _, AsyncWrite, AsyncWriteExt};

/// Largest message that is read.
const MAX_MESSAGE: usize = 4 << 20;
/// Longest line of a header.
const MAX_LINE: u64 = 1024;
/// Lines of a header.
const MAX_LINES: usize = 32;

/// A request of the editor's.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Request {
    pub(super) seq: i64,
    pub(super) command: String,
    pub(super) arguments: Value,
}

/// The next request; `None` if there are no more. Answers of the editor's are passed over.
pub(super) async fn read(from: &mut (impl AsyncBufRead + Unpin)) -> Result<Option<Request>> {
    let failed = |e| Fault::io("read a message of the editor", e);
    loop {
        let mut length = None;
        for number in 0.. {
            if number == MAX_LINES {
                return Err(Fault::invalid("a message of the editor has too long a header"));
            }
            let mut line = Vec::new();
            let read = (&mut *from).take(MAX_LINE).read_until(b'\n', &mut line).await;
            if read.map_err(failed)? == 0 {
                return Ok(None);
            }
            let line = String::from_utf8_lossy(&line);
            let line = line.trim_end();
            if line.is_empty() {
                break;
            }
            if let Some((name, value)) = line.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                length = value.trim().parse::<usize>().ok();
            }
        }
        let length = length.filter(|n| *n <= MAX_MESSAGE).ok_or_else(|| {
            Fault::invalid(format!(
                "a message of the editor has no Content-Length of at most {MAX_MESSAGE}"
            ))
        })?;
        let mut body = vec![0; length];
        from.read_exact(&mut body).await.map_err(failed)?;
        let message: Value = serde_json::from_slice(&body)
            .map_err(|e| Fault::invalid(format!("failed to parse a message of the editor: {e}")))?;
        if message["type"] == "request" {
            return Ok(Some(Request {
                seq: message["seq"].as_i64().unwrap_or_default(),
                command: message["command"].as_str().unwrap_or_default().to_owned(),
                arguments: message["arguments"].clone(),
            }));
        }
    }
}

/// Writes messages, and numbers them.
pub(super) struct Writer<W> {
    to: W,
    seq: i64,
}

impl<W: AsyncWrite + Unpin> Writer<W> {
    pub(super) fn new(to: W) -> Self {
        Self { to, seq: 0 }
    }

    async fn write(&mut self, mut message: Value) -> Result<()> {
        self.seq += 1;
        message["seq"] = self.seq.into();
        let body = message.to_string();
        let text = format!("Content-Length: {}\r\n\r\n{body}", body.len());
        let failed = |e| Fault::io("write a message to the editor", e);
        self.to.write_all(text.as_bytes()).await.map_err(failed)?;
        self.to.flush().await.map_err(failed)
    }

    /// Answers `request`.
    pub(super) async fn answer(&mut self, request: &Request, body: Result<Value>) -> Result<()> {
        let mut message = json!({
            "type": "response",
            "request_seq": request.seq,
            "command": request.command,
            "success": body.is_ok(),
        });
        match body {
            Ok(Value::Null) => {}
            Ok(body) => message["body"] = body,
            Err(fault) => {
                let text = fault.to_string();
                message["body"] = json!({"error": {"id": 1, "format": text, "showUser": true}});
                message["message"] = text.into();
            }
        }
        self.write(message).await
    }

    /// Reports an event.
    pub(super) async fn event(&mut self, event: &str, body: Value) -> Result<()> {
        self.write(json!({"type": "event", "event": event, "body": body})).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn all(mut bytes: &[u8]) -> Result<Vec<Request>> {
        let mut all = Vec::new();
        while let Some(request) = read(&mut bytes).await? {
            all.push(request);
        }
        Ok(all)
    }

    #[tokio::test]
    async fn requests_are_read_and_answered() {
        let text = |body: &str| format!("content-length: {}\r\nX: y\r\n\r\n{body}", body.len());
        let first = text(r#"{"seq":3,"type":"request","command":"next","arguments":{"a":1}}"#);
        let other = text(r#"{"seq":4,"type":"response","command":"runInTerminal"}"#);
        let requests = all((first + &other).as_bytes()).await.unwrap();
        let [request] = requests.as_slice() else { panic!("{requests:?}") };
        assert_eq!(
            (request.seq, &*request.command, &request.arguments["a"]),
            (3, "next", &json!(1))
        );
        let mut out = Vec::new();
        let mut writer = Writer::new(&mut out);
        writer.answer(request, Err(Fault::invalid("no"))).await.unwrap();
        writer.event("stopped", json!({"reason": "step"})).await.unwrap();
        let out = String::from_utf8(out).unwrap();
        for part in ["Content-Length: ", "\"request_seq\":3", "\"message\":\"no\"", "\"seq\":2"] {
            assert!(out.contains(part), "{part}: {out}");
        }
    }

    #[tokio::test]
    async fn what_is_too_large_or_no_message_is_refused() {
        let large = format!("Content-Length: {}\r\n\r\n", MAX_MESSAGE + 1);
        for wrong in [
            large.as_str(),
            "Content-Length: x\r\n\r\n",
            "\r\n",
            "Content-Length: 2\r\n\r\nno",
            &"a: b\r\n".repeat(MAX_LINES + 1),
        ] {
            assert!(all(wrong.as_bytes()).await.is_err(), "{wrong:.40}");
        }
        // One that is cut off.
        assert!(all(b"Content-Length: 9\r\n\r\n{}").await.is_err());
        assert_eq!(all(b"").await.unwrap(), []);
    }
}
