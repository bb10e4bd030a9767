//! Block blobs of Azure, which GitHub's cache of today keeps its entries in, too (Blob service REST
//! API, "Put Blob", "Put Block", "Put Block List").

use crate::{
    LayerContent,
    calls::{Call, Calls, Payload, Sign, StoreError},
};
use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use http::{Method, Uri};
use serde::Deserialize;
use shipway_fault::{Fault, Result};

/// Version of the service that requests are written for.
pub(crate) const VERSION: (&str, &str) = ("x-ms-version", "2021-08-06");
/// Larger blobs are uploaded in blocks.
const SINGLE: u64 = 64 << 20;
/// Least size of a block.
const BLOCK: u64 = 32 << 20;
/// Most blocks of a blob.
const MAX_BLOCKS: u64 = 50_000;

/// A blob that is to be written.
pub(crate) struct NewBlob<'a> {
    pub calls: &'a Calls,
    pub signer: &'a dyn Sign,
    /// Its address. There may be a query, which stays.
    pub uri: &'a Uri,
    /// Whether one that is there is left alone. It is reported as [`Fault::is_already_exists`].
    pub only_new: bool,
    pub action: String,
    /// Blocks on their way at once.
    pub parallelism: usize,
}

/// `uri` with more in its query.
pub(crate) fn with_query(uri: &Uri, more: &str) -> Result<Uri> {
    let mark = if uri.query().is_some() { '&' } else { '?' };
    let text = format!("{uri}{mark}{more}");
    text.parse().map_err(|_| Fault::internal("a blob's address cannot be written"))
}

impl<'a> NewBlob<'a> {
    fn put(&self, uri: Uri, payload: Payload<'a>) -> Call<'a> {
        Call::new(Method::PUT, uri, self.action.clone())
            .header(VERSION.0, VERSION.1)
            .payload(payload)
    }

    /// The call that makes the blob be there.
    fn last(&self, call: Call<'a>) -> Call<'a> {
        if self.only_new { call.header("if-none-match", "*") } else { call }
    }

    /// Writes a small document.
    pub async fn write_bytes(&self, bytes: &'a Bytes) -> Result<()> {
        let call = self.put(self.uri.clone(), Payload::Bytes(bytes));
        let call = self.last(call).header("x-ms-blob-type", "BlockBlob");
        self.calls.send(&call, self.signer).await.map(drop)
    }

    /// Writes `size` bytes of a layer.
    pub async fn write(&self, content: &'a dyn LayerContent, size: u64) -> Result<()> {
        if size <= SINGLE {
            let payload = Payload::Layer { content, offset: 0, length: size };
            let call = self.put(self.uri.clone(), payload);
            let call = self.last(call).header("x-ms-blob-type", "BlockBlob");
            return self.calls.send(&call, self.signer).await.map(drop);
        }
        let length = BLOCK.max(size.div_ceil(MAX_BLOCKS));
        // Ids are in base64 and of one length; six digits are eight letters without padding.
        let id = |index: u64| base64(&format!("{index:06}"));
        let blocks = (0..size.div_ceil(length)).map(|index| async move {
            let offset = index * length;
            let length = length.min(size - offset);
            let uri = with_query(self.uri, &format!("comp=block&blockid={}", id(index)))?;
            let call = self.put(uri, Payload::Layer { content, offset, length });
            self.calls.send(&call, self.signer).await.map(drop)
        });
        stream::iter(blocks).buffer_unordered(self.parallelism).try_collect::<()>().await?;
        let ids: String =
            (0..size.div_ceil(length)).map(|i| format!("<Latest>{}</Latest>", id(i))).collect();
        let list =
            format!("<?xml version=\"1.0\" encoding=\"utf-8\"?><BlockList>{ids}</BlockList>");
        let list = Bytes::from(list);
        let call =
            Call::new(Method::PUT, with_query(self.uri, "comp=blocklist")?, self.action.clone())
                .header(VERSION.0, VERSION.1)
                .payload(Payload::Bytes(&list));
        let call = if self.only_new { call.header("if-none-match", "*") } else { call };
        self.calls.send(&call, self.signer).await.map(drop)
    }
}

/// Six decimal digits in base64. None of its letters has a meaning in addresses.
fn base64(digits: &str) -> String {
    reqsign_core::hash::base64_encode(digits.as_bytes())
}

/// What an error document of Azure says.
pub(crate) fn error(bytes: &[u8]) -> StoreError {
    #[derive(Default, Deserialize)]
    #[serde(default, rename_all = "PascalCase")]
    struct Refusal {
        code: String,
        message: String,
    }
    // It may begin with a byte order mark.
    let text = std::str::from_utf8(bytes).unwrap_or_default().trim_start_matches('\u{feff}');
    let Refusal { code, message } = quick_xml::de::from_str(text).unwrap_or_default();
    // The rest are a request's number and a time.
    StoreError { code, message: message.lines().next().unwrap_or_default().to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_blocks_need_no_escapes() {
        for index in [0, 7, 49_999, 999_999] {
            let id = base64(&format!("{index:06}"));
            assert!(id.len() == 8 && id.chars().all(|c| c.is_ascii_alphanumeric()), "{id}");
        }
    }

    #[test]
    fn errors_are_read_and_garbage_is_none() {
        let text = "\u{feff}<?xml version=\"1.0\" encoding=\"utf-8\"?><Error><Code>BlobNotFound</Code><Message>The specified blob does not exist.\nRequestId:1\nTime:2</Message></Error>";
        let said = error(text.as_bytes());
        assert_eq!(said.code, "BlobNotFound");
        assert_eq!(said.message, "The specified blob does not exist.");
        for garbage in [&b"\xff\xfe"[..], b"<", b""] {
            assert_eq!(error(garbage), StoreError::default());
        }
    }

    #[test]
    fn an_address_keeps_its_signature() {
        let uri: Uri = "https://h/c/b?sig=a%2Fb".parse().unwrap();
        assert_eq!(with_query(&uri, "comp=block").unwrap(), "https://h/c/b?sig=a%2Fb&comp=block");
        let plain: Uri = "https://h/c/b".parse().unwrap();
        assert_eq!(with_query(&plain, "x=1").unwrap(), "https://h/c/b?x=1");
    }
}
