//! What a server that did not do as asked says: its status as an error, its words, and when to come
//! back.

use crate::error::Kind;
use http::{HeaderMap, Method, header};
use shipway_http::{Response, display_of};
use std::time::{Duration, SystemTime};

/// Longest error document that is read.
const MAX_ERROR_BODY: u64 = 64 << 10;
/// Most characters of a server's words that are repeated.
const MAX_WORDS: usize = 400;

/// Lets 2xx through and makes an error of everything else.
pub(crate) async fn check_status(response: Response, method: &Method) -> Result<Response, Kind> {
    let status = response.head.status;
    if status.is_success() {
        return Ok(response);
    }
    let request = format!("{method} request to {}", display_of(&response.uri));
    let wait = retry_after(&response.head.headers);
    let server = server_message(response).await;
    Err(match status.as_u16() {
        404 => Kind::NotFound,
        401 => Kind::Unauthorized { server, with_credentials: false },
        403 => Kind::Forbidden { server },
        429 => Kind::TooManyRequests { server, retry_after: wait },
        status => Kind::Status { status, request, server },
    })
}

/// The server's words on an error; nothing when they cannot be had.
pub(crate) async fn server_message(response: Response) -> String {
    message_in(&response.body.collect(MAX_ERROR_BODY).await.unwrap_or_default())
}

/// When a server wants to be asked again, if it says so: in how many seconds, or at what date (RFC
/// 9110 10.2.3). A date that has passed is now.
pub(crate) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse::<u32>() {
        return Some(Duration::from_secs(seconds.into()));
    }
    let at = httpdate::parse_http_date(text).ok()?;
    Some(at.duration_since(SystemTime::now()).unwrap_or_default())
}

/// A short, printable form of an error document: the specification's `errors` list, a token
/// server's `details`, or plain text.
pub(crate) fn message_in(body: &[u8]) -> String {
    let text = match serde_json::from_slice::<serde_json::Value>(body) {
        Ok(json) => message_in_json(&json),
        Err(_) => {
            let text = String::from_utf8_lossy(body);
            let text = text.trim();
            if text.starts_with('<') { String::new() } else { text.to_owned() }
        }
    };
    let clean: String =
        text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_WORDS + 1).collect();
    match clean.char_indices().nth(MAX_WORDS) {
        Some((end, _)) => format!("{}…", &clean[..end]),
        None => clean,
    }
}

fn message_in_json(json: &serde_json::Value) -> String {
    let word = |v: &serde_json::Value, key: &str| {
        v.get(key).and_then(|w| w.as_str()).unwrap_or_default().trim().to_owned()
    };
    let list = json.get("errors").and_then(|e| e.as_array()).map(Vec::as_slice).unwrap_or_default();
    let said: Vec<String> = list
        .iter()
        .take(5)
        .map(|e| match (word(e, "code").to_lowercase().replace('_', " "), word(e, "message")) {
            (code, message) if message.is_empty() => code,
            (code, message) if code.is_empty() => message,
            (code, message) => format!("{code}: {message}"),
        })
        .collect();
    if !said.is_empty() {
        return said.join("; ");
    }
    ["error_description", "details", "message", "error"]
        .iter()
        .map(|k| word(json, k))
        .find(|w| !w.is_empty())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn a_server_says_in_seconds_or_by_date_when_to_come_back() {
        let after = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::RETRY_AFTER, HeaderValue::from_str(text).unwrap());
            retry_after(&headers)
        };
        assert_eq!(after(" 120 "), Some(Duration::from_secs(120)));
        let soon = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(600));
        let soon = after(&soon).unwrap().as_secs();
        assert!((590..=600).contains(&soon), "{soon}");
        // All three forms that a date may have.
        for past in [
            "Sun, 06 Nov 1994 08:49:37 GMT",
            "Sunday, 06-Nov-94 08:49:37 GMT",
            "Sun Nov  6 08:49:37 1994",
        ] {
            assert_eq!(after(past), Some(Duration::ZERO), "{past}");
        }
        for nonsense in ["", "soon", "-1", "1.5", "99999999999", "Sun, 06 Nov 1994"] {
            assert_eq!(after(nonsense), None, "{nonsense}");
        }
        assert_eq!(retry_after(&HeaderMap::new()), None);
    }

    #[test]
    fn server_words_are_short_and_printable() {
        for (body, want) in [
            (
                r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"},{"code":"DENIED"}]}"#,
                "manifest unknown: manifest unknown; denied",
            ),
            (r#"{"details":"incorrect username or password"}"#, "incorrect username or password"),
            ("plain\x1b[31m text\n", "plain [31m text"),
            ("<html>…", ""),
            ("", ""),
            ("[1,2]", ""),
        ] {
            assert_eq!(message_in(body.as_bytes()), want, "{body}");
        }
        assert_eq!(message_in("x".repeat(10_000).as_bytes()).chars().count(), MAX_WORDS + 1);
    }
}
