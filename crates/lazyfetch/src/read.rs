//! One answer, read with patience that ends: bytes in range, no stall, no trickle, no endless
//! beginning.

use crate::{Hope, Opened, SourceError, Wanted, port::Source, settings::Settings};
use bytes::Bytes;
use shipway_fault::{Class, Code, Fault};
use shipway_oci::Digest;
use std::{ops::Range, time::Duration};
use tokio::time::{Instant, timeout, timeout_at};

/// Most bytes before the wanted ones that are read and dropped, for servers that do not know
/// ranges.
pub const MAX_SKIP: u64 = 4 << 20;
/// An answer that moves fewer bytes than this in the time of a stall is stalled.
const TRICKLE: u64 = 4096;

fn late(what: &str, after: Duration) -> SourceError {
    let message = format!("timed out waiting for {what} (no progress for {after:.0?})");
    SourceError::new(Hope::Soon, Fault::new(Code::DeadlineExceeded, message))
}

pub(crate) fn environment(message: String) -> Fault {
    Fault::new(Code::Unavailable, message).with_class(Class::Environment)
}

/// Asks `source`, and waits for the head of its answer no longer than is set.
pub(crate) async fn open(
    source: &dyn Source,
    blob: (Digest, Option<u64>),
    wanted: Wanted,
    fresh: bool,
    settings: &Settings,
) -> Result<Opened, SourceError> {
    let wait = settings.first_byte;
    timeout(wait, source.open(blob.0, blob.1, wanted, fresh))
        .await
        .unwrap_or_else(|_| Err(late("an answer", wait)))
}

/// The wanted bytes of an answer.
pub(crate) struct Reading {
    opened: Opened,
    at: u64,
    wanted: Range<u64>,
    stall: Duration,
    moved: u64,
    until: Instant,
}

impl Reading {
    /// Reads `wanted` from an answer.
    pub(crate) fn new(
        opened: Opened,
        wanted: Range<u64>,
        settings: &Settings,
    ) -> Result<Self, SourceError> {
        let at = opened.start;
        let skip = wanted.start.checked_sub(at);
        if skip.is_none_or(|skip| skip > MAX_SKIP) {
            let message = match skip {
                Some(_) => "the server does not know ranges".to_owned(),
                None => format!("asked for bytes from {} and got those from {at}", wanted.start),
            };
            return Err(SourceError::new(Hope::Elsewhere, environment(message)));
        }
        let stall = settings.stall;
        Ok(Self { opened, at, wanted, stall, moved: 0, until: Instant::now() + stall })
    }

    /// The next bytes, and where they are in the blob; `None` when all have come.
    pub(crate) async fn next(&mut self) -> Result<Option<(u64, Bytes)>, SourceError> {
        while self.at < self.wanted.end {
            let next = timeout_at(self.until, self.opened.body.next());
            let Ok(next) = next.await else { return Err(late("data", self.stall)) };
            let Some(mut piece) = next? else {
                let message =
                    format!("the answer ended after {} of {} bytes", self.at, self.wanted.end);
                return Err(SourceError::new(Hope::Soon, environment(message)));
            };
            self.moved += piece.len() as u64;
            if self.moved >= TRICKLE {
                (self.moved, self.until) = (0, Instant::now() + self.stall);
            }
            let at = self.at;
            self.at += piece.len() as u64;
            let skip = self.wanted.start.saturating_sub(at).min(piece.len() as u64);
            piece = piece.split_off(skip as usize);
            let at = at + skip;
            piece.truncate((self.wanted.end - at.min(self.wanted.end)) as usize);
            if !piece.is_empty() {
                return Ok(Some((at, piece)));
            }
        }
        Ok(None)
    }

    /// All bytes.
    pub(crate) async fn collect(mut self) -> Result<Vec<u8>, SourceError> {
        let mut all = Vec::new();
        while let Some((_, piece)) = self.next().await? {
            all.extend_from_slice(&piece);
        }
        Ok(all)
    }
}
