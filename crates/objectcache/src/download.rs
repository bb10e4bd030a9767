//! A layer as it comes, with as many requests as it takes.

use crate::ObjectCache;
use bytes::Bytes;
use shipway_fault::{Code, Fault, Result};
use shipway_http::{BodyReader, HttpError};
use shipway_oci::Descriptor;
use std::{sync::Arc, time::Duration};

/// Breaks without a byte in between that end a download.
const MAX_STRIKES: u32 = 3;
/// Pause after the first break; as many times as long after the next ones.
const PAUSE: Duration = Duration::from_millis(500);

/// Reads a layer and goes on where a connection broke.
pub struct Download {
    cache: Arc<dyn ObjectCache>,
    layer: Descriptor,
    body: BodyReader,
    at: u64,
    strikes: u32,
}

impl Download {
    /// The bytes of `layer` from the beginning.
    pub async fn start(cache: Arc<dyn ObjectCache>, layer: &Descriptor) -> Result<Self> {
        let body = cache.open(layer, 0).await?;
        Ok(Self { cache, layer: layer.clone(), body, at: 0, strikes: 0 })
    }

    /// The next piece; `None` after the last one.
    pub async fn next(&mut self) -> Result<Option<Bytes>> {
        loop {
            let broken = match self.body.next().await {
                Ok(Some(piece)) => {
                    self.at += piece.len() as u64;
                    if self.at > self.layer.size {
                        return Err(Fault::unknown(format!(
                            "layer {} in {} is longer than {} bytes",
                            self.layer.digest,
                            self.cache.name(),
                            self.layer.size
                        )));
                    }
                    self.strikes = 0;
                    return Ok(Some(piece));
                }
                Ok(None) if self.at == self.layer.size => return Ok(None),
                Ok(None) => HttpError::Broken(format!("it ended after {} bytes", self.at)),
                Err(broken) => broken,
            };
            self.strikes += 1;
            if self.strikes >= MAX_STRIKES {
                let (at, size) = (self.at, self.layer.size);
                let fault = Fault::from(broken).with_code(Code::Unavailable);
                return Err(fault.context(format!(
                    "read layer {} from {} ({at} of {size} bytes)",
                    self.layer.digest,
                    self.cache.name()
                )));
            }
            tracing::debug!(%broken, layer = %self.layer.digest, at = self.at, "download broke, going on");
            tokio::time::sleep(PAUSE * self.strikes).await;
            self.body = self.cache.open(&self.layer, self.at).await?;
        }
    }
}
