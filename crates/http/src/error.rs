//! Failures of requests, and what lies below them.

use shipway_fault::{Class, Code, Fault};
use std::time::Duration;

/// Why there is no complete response.
#[derive(Clone, Debug, thiserror::Error)]
pub enum HttpError {
    /// No connection.
    #[error("failed to connect: {0}")]
    Connect(String),
    /// The other side does not speak TLS.
    #[error("the server does not speak TLS: {0}")]
    NotTls(String),
    /// The other side's certificate, or something else about TLS.
    #[error("TLS: {0}")]
    Tls(String),
    /// Nothing happened for too long.
    #[error("timed out waiting for {waiting_for} (no progress for {after:.0?})")]
    TimedOut {
        /// What was waited for.
        waiting_for: &'static str,
        /// For how long.
        after: Duration,
    },
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Broken(String),
    /// A document is larger than we accept.
    #[error("the answer is larger than {0} bytes")]
    TooLarge(u64),
    /// The server's words make no sense.
    #[error("{0}")]
    Protocol(String),
    /// The body to send could not be had.
    #[error(transparent)]
    Local(Fault),
}

impl From<HttpError> for Fault {
    fn from(f: HttpError) -> Self {
        let code = match &f {
            HttpError::Local(fault) => return fault.clone(),
            HttpError::TimedOut { .. } => Code::DeadlineExceeded,
            HttpError::TooLarge(_) | HttpError::Protocol(_) => Code::Unknown,
            _ => Code::Unavailable,
        };
        Fault::new(code, f.to_string()).with_class(Class::Environment)
    }
}

/// The failure among the sources of `error`, if one is of ours.
pub(crate) fn error_in(error: &(dyn std::error::Error + 'static)) -> Option<HttpError> {
    let mut next = Some(error);
    while let Some(e) = next {
        if let Some(f) = e.downcast_ref::<HttpError>() {
            return Some(f.clone());
        }
        if let Some(f) = e.downcast_ref::<Fault>() {
            return Some(HttpError::Local(f.clone()));
        }
        next = e.source();
    }
    None
}

/// The text of the error that is at the bottom of its sources.
pub(crate) fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut e = error;
    while let Some(s) = e.source() {
        e = s;
    }
    e.to_string()
}
