//! The body of an answer on its way to the step, hashed as it passes; what became of it is noted at
//! its end.

use crate::{Capture, target::RequestTarget};
use bytes::Bytes;
use http::{Method, StatusCode};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use shipway_oci::{Digest, Hasher};
use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

/// What has to be noted of an answer.
pub(crate) struct Note {
    pub capture: Capture,
    pub method: Method,
    pub target: RequestTarget,
    pub status: StatusCode,
    /// Whether only a part of the file was asked for.
    pub ranged: bool,
}

impl Note {
    /// Notes the end of the body: its digest if it came whole.
    fn end(self, digest: Option<Digest>) {
        let reason = match digest {
            _ if self.method != Method::GET => "method_not_materializable",
            _ if self.ranged || self.status == StatusCode::PARTIAL_CONTENT => "partial_response",
            None => "body_read_failed",
            _ if self.status.as_u16() >= 400 => "unsuccessful_response",
            Some(digest) => {
                if self.status.is_success() {
                    self.capture.material(self.target.to_string(), digest);
                }
                return;
            }
        };
        self.capture.incomplete(self.method.to_string(), self.target.to_string(), reason);
    }
}

/// The body.
pub(crate) struct Recorded {
    body: Incoming,
    hash: Hasher,
    note: Option<Note>,
}

impl Recorded {
    pub fn new(body: Incoming, note: Note) -> Self {
        let mut recorded = Self { body, hash: Hasher::new(), note: Some(note) };
        if recorded.body.is_end_stream() {
            recorded.whole();
        }
        recorded
    }

    fn whole(&mut self) {
        if let Some(note) = self.note.take() {
            note.end(Some(std::mem::replace(&mut self.hash, Hasher::new()).finish()));
        }
    }
}

impl Body for Recorded {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    self.hash.update(data);
                }
                // A sender need not ask again.
                if self.body.is_end_stream() {
                    self.whole();
                }
            }
            Some(Err(_)) => drop(self.note.take().map(|n| n.end(None))),
            None => self.whole(),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        if let Some(note) = self.note.take() {
            note.end(None);
        }
    }
}
