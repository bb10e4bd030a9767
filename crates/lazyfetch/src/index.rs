//! Finding a layer's table of contents: usually one request, for the end of its blob.

use crate::{
    Hope, Settings, Source, SourceError, Wanted,
    read::{self, Reading, environment},
    settings::Backoff,
};
use futures::{StreamExt, future::BoxFuture, stream};
use shipway_estargz::{Annotated, Error, Expected, Layout, MAX_COMPRESSED_TOC, Tail, Toc};
use shipway_fault::{Class, Code, Fault};
use shipway_oci::Digest;
use std::{collections::BTreeMap, ops::Range, sync::Arc, time::Duration};
use tokio::{
    sync::Semaphore,
    time::{Instant, timeout_at},
};

/// Bytes of the end of a blob that are asked for first: these, or a two hundredth of the blob,
/// which has the table of contents of most layers.
const LEAST_END: u64 = 256 << 10;
const MOST_END: u64 = 4 << 20;
/// Layers that are looked at at once.
pub(crate) const AT_ONCE: usize = 16;
/// Tables of contents that are parsed at once.
static PARSERS: Semaphore = Semaphore::const_new(2);

/// Gives a table of contents that is not in its blob; see [`crate::external_toc`].
pub type ExternalToc = Arc<dyn Fn() -> BoxFuture<'static, Result<Vec<u8>, Fault>> + Send + Sync>;

/// A layer whose table of contents is wanted.
#[derive(Clone)]
pub struct IndexRequest {
    /// Digest of the blob.
    pub digest: Digest,
    /// Length of the blob, if it is known.
    pub size: Option<u64>,
    /// Annotations of the layer's descriptor, or labels of its snapshot.
    pub annotations: BTreeMap<String, String>,
    /// Where it comes from, in the order to ask.
    pub sources: Vec<Arc<dyn Source>>,
    /// Gets the table of contents where the blob says that it is elsewhere.
    pub external: Option<ExternalToc>,
}

/// A layer's table of contents, checked.
#[derive(Debug)]
pub struct Indexed {
    /// The table.
    pub toc: Toc,
    /// What the blob's end says.
    pub layout: Layout,
    /// Length of the blob.
    pub size: u64,
    /// Time to the first byte of the first answer: the round trip to the source, about.
    pub rtt: Duration,
}

/// Why a try failed.
enum Failed {
    Source(SourceError),
    /// Another source, or the same without caches, may have the right bytes.
    Wrong(Fault),
    /// Nothing helps.
    Final(Fault),
}

impl From<SourceError> for Failed {
    fn from(error: SourceError) -> Self {
        Self::Source(error)
    }
}

/// Finds a layer's table of contents within [`Settings::index`]. A layer that has none, or whose
/// manifest does not vouch for it, is an error.
pub async fn index(request: &IndexRequest, settings: &Settings) -> Result<Indexed, Fault> {
    let annotated = Annotated::read(&request.annotations)?.ok_or_else(|| {
        let message = "the layer's manifest does not name the digest of a table of contents";
        Fault::new(Code::FailedPrecondition, message).with_class(Class::Environment)
    })?;
    let deadline = Instant::now() + settings.index;
    let (mut backoff, mut last) = (Backoff::new(), None);
    let (mut fresh, mut doubtful, mut refused) = (false, false, 0);
    let work = async {
        if request.sources.is_empty() {
            return Err(environment("the layer has no source".to_owned()));
        }
        for tries in 1u32.. {
            let source = &request.sources[(tries as usize - 1) % request.sources.len()];
            let failed = match once(request, &annotated, &**source, fresh, settings).await {
                Ok(indexed) => return Ok(indexed),
                Err(failed) => failed,
            };
            let round = (tries as usize).is_multiple_of(request.sources.len());
            let mut pause = if round { backoff.pause(tries) } else { Duration::ZERO };
            let fault = match failed {
                // A footer has no digest: what makes it wrong may have happened on the way.
                Failed::Final(fault) if !doubtful => {
                    (doubtful, fresh) = (true, true);
                    fault
                }
                Failed::Final(fault) => return Err(fault),
                Failed::Wrong(fault) => {
                    fresh = true;
                    fault
                }
                Failed::Source(SourceError { hope, fault }) => {
                    refused = if hope == Hope::Elsewhere { refused + 1 } else { 0 };
                    // All sources get a second chance.
                    if refused >= 2 * request.sources.len() {
                        return Err(fault);
                    }
                    if round {
                        pause = hope.pause(pause);
                    }
                    fault
                }
            };
            tracing::debug!(digest = %request.digest, %fault, tries, "no table of contents yet");
            last = Some(fault);
            tokio::time::sleep(pause).await;
        }
        Err(environment("gave up".to_owned()))
    };
    match timeout_at(deadline, work).await {
        Ok(result) => result,
        Err(_) => {
            let late = format!("no table of contents within {:.0?}", settings.index);
            Err(match last {
                Some(fault) => fault.context(late),
                None => Fault::new(Code::DeadlineExceeded, late),
            })
        }
    }
}

/// The tables of contents of all layers of an image, at once; in the same order.
pub async fn index_all(
    requests: &[IndexRequest],
    settings: &Settings,
) -> Vec<Result<Indexed, Fault>> {
    stream::iter(requests).map(|request| index(request, settings)).buffered(AT_ONCE).collect().await
}

async fn once(
    request: &IndexRequest,
    annotated: &Annotated,
    source: &dyn Source,
    fresh: bool,
    settings: &Settings,
) -> Result<Indexed, Failed> {
    let started = Instant::now();
    // What the annotations tell need not be read.
    if let Some(size) = request.size
        && let Some(layout) = annotated.layout(size)
    {
        let layout = layout.map_err(|e| Failed::Final(e.into()))?;
        if let Some(place) = layout.toc.clone() {
            let (bytes, rtt) = get(request, source, place, size, fresh, settings).await?;
            return parse(annotated, layout, bytes, size, rtt).await;
        }
    }
    let ask = request.size.unwrap_or_default() / 200;
    let ask = ask.clamp(LEAST_END, MOST_END);
    let blob = (request.digest, request.size);
    let opened = read::open(source, blob, Wanted::Last(ask), fresh, settings).await?;
    let rtt = started.elapsed();
    let size = opened.size.or(request.size).ok_or_else(|| {
        let fault = environment("the server does not say how long the blob is".to_owned());
        SourceError::new(Hope::Elsewhere, fault)
    })?;
    let from = size.saturating_sub(ask);
    let mut end = Reading::new(opened, from..size, settings)?.collect().await?;
    let layout = match Tail::read(&end, size).map_err(|e| Failed::Final(e.into()))? {
        Tail::Layout(layout) => layout,
        Tail::Need(_) => {
            let fault = environment("the end of the blob is too short".to_owned());
            return Err(Failed::Wrong(fault));
        }
    };
    if layout.toc.is_none() {
        let bytes = match &request.external {
            Some(external) => external().await.map_err(|fault| {
                let hope = if fault.is_not_found() { Hope::Elsewhere } else { Hope::Soon };
                SourceError::new(hope, fault)
            })?,
            None => {
                let message = "the layer's table of contents is not in its blob";
                return Err(Failed::Final(
                    Fault::not_found(message).with_class(Class::Environment),
                ));
            }
        };
        return parse(annotated, layout, bytes, size, rtt).await;
    }
    if let Some(missing) = layout.missing(size, end.len() as u64) {
        let from = missing.start;
        let (mut bytes, _) = get(request, source, missing, size, fresh, settings).await?;
        // The table may end before what is there begins.
        if from + bytes.len() as u64 == size - end.len() as u64 {
            bytes.append(&mut end);
        }
        let toc = layout.toc.clone().unwrap_or(0..0);
        bytes.truncate((toc.end - from) as usize);
        return parse(annotated, layout, bytes, size, rtt).await;
    }
    let bytes = layout.toc_in(&end, size).unwrap_or_default().to_vec();
    drop(end);
    parse(annotated, layout, bytes, size, rtt).await
}

/// Gets a part of the blob, which is no longer than a table of contents may be.
async fn get(
    request: &IndexRequest,
    source: &dyn Source,
    range: Range<u64>,
    size: u64,
    fresh: bool,
    settings: &Settings,
) -> Result<(Vec<u8>, Duration), Failed> {
    debug_assert!(range.end - range.start <= MAX_COMPRESSED_TOC);
    let started = Instant::now();
    let (blob, wanted) = ((request.digest, Some(size)), Wanted::Range(range.clone()));
    let opened = read::open(source, blob, wanted, fresh, settings).await?;
    let rtt = started.elapsed();
    Ok((Reading::new(opened, range, settings)?.collect().await?, rtt))
}

/// Parses a table of contents and compares its digest, on a thread of its own.
async fn parse(
    annotated: &Annotated,
    layout: Layout,
    bytes: Vec<u8>,
    size: u64,
    rtt: Duration,
) -> Result<Indexed, Failed> {
    let expected =
        Expected { digest: annotated.toc_digest, uncompressed_size: annotated.uncompressed_size };
    let _permit = PARSERS.acquire().await;
    let work = shipway_task::blocking("read a table of contents", move || {
        Ok(Toc::read(&bytes, &layout, &expected).map(|toc| Indexed { toc, layout, size, rtt }))
    });
    work.await.map_err(Failed::Final)?.map_err(|error: Error| match error.is_wrong_bytes() {
        true => Failed::Wrong(error.into()),
        false => Failed::Final(error.into()),
    })
}
