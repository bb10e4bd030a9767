//! Documents of S3's (the API reference names their elements).

use crate::calls::StoreError;
use quick_xml::{de::from_str, escape::escape};
use serde::{Deserialize, de::DeserializeOwned};
use shipway_fault::{Class, Code, Fault, Result};

fn read<T: DeserializeOwned>(bytes: &[u8], what: &str) -> Result<T> {
    let text = std::str::from_utf8(bytes).map_err(|e| e.to_string());
    text.and_then(|t| from_str(t).map_err(|e| e.to_string())).map_err(|why| {
        Fault::unknown(format!("{what} of an S3 store cannot be read: {why}"))
            .with_class(Class::Environment)
    })
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct Refusal {
    code: String,
    message: String,
}

/// What an error document says.
pub(super) fn error(bytes: &[u8]) -> StoreError {
    let Refusal { code, message } =
        read(bytes, "an error").unwrap_or_else(|_: Fault| Refusal::default());
    StoreError { code, message }
}

/// One page of a list.
#[derive(Deserialize)]
pub(super) struct Page {
    #[serde(rename = "IsTruncated", default)]
    pub truncated: bool,
    #[serde(rename = "Contents", default)]
    pub objects: Vec<Listed>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Listed {
    pub key: String,
    pub size: u64,
    #[serde(rename = "LastModified", default)]
    pub modified: String,
}

pub(super) fn page(bytes: &[u8]) -> Result<Page> {
    read(bytes, "a list")
}

/// The id of an upload that was begun.
pub(super) fn upload(bytes: &[u8]) -> Result<String> {
    #[derive(Deserialize)]
    struct Begun {
        #[serde(rename = "UploadId")]
        id: String,
    }
    read(bytes, "an answer").map(|begun: Begun| begun.id)
}

/// The list of parts that an upload is made of.
pub(super) fn parts(tags: &[(u64, String)]) -> String {
    let part = |(number, tag): &(u64, String)| {
        format!(
            "<Part><PartNumber>{number}</PartNumber><ETag>{}</ETag></Part>",
            escape(tag.as_str())
        )
    };
    let parts: String = tags.iter().map(part).collect();
    format!("<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>")
}

/// Whether a request that takes long was done: a store begins to answer before it knows.
pub(super) fn finished(bytes: &[u8]) -> Result<()> {
    let said = error(bytes);
    if said.code.is_empty() {
        return Ok(());
    }
    let text = format!("{}: {}", said.code, said.message);
    Err(Fault::new(Code::Unavailable, text).with_class(Class::Environment))
}

/// The tag of a copy that was made.
pub(super) fn copied(bytes: &[u8]) -> Result<String> {
    #[derive(Deserialize)]
    struct Copied {
        #[serde(rename = "ETag")]
        tag: String,
    }
    finished(bytes)?;
    read(bytes, "an answer").map(|copied: Copied| copied.tag)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_of_stores_are_read() {
        let list = br#"<?xml version="1.0" encoding="UTF-8"?>
            <ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>b</Name>
            <Prefix>blobs/</Prefix><KeyCount>2</KeyCount><MaxKeys>2</MaxKeys><IsTruncated>true</IsTruncated>
            <Contents><Key>blobs/a&amp;b</Key><LastModified>2024-05-06T07:08:09.000Z</LastModified><ETag>"x"</ETag><Size>12</Size></Contents>
            <Contents><Key>blobs/c</Key><Size>0</Size><StorageClass>STANDARD</StorageClass></Contents>
            </ListBucketResult>"#;
        let read = page(list).unwrap();
        assert!(read.truncated);
        let keys: Vec<_> = read.objects.iter().map(|o| (o.key.as_str(), o.size)).collect();
        assert_eq!(keys, [("blobs/a&b", 12), ("blobs/c", 0)]);
        let empty = page(b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>");
        assert!(empty.is_ok_and(|p| p.objects.is_empty() && !p.truncated));
        let begun = b"<InitiateMultipartUploadResult><Bucket>b</Bucket><UploadId>u+/=</UploadId></InitiateMultipartUploadResult>";
        assert_eq!(upload(begun).unwrap(), "u+/=");
        let copy = b"<CopyObjectResult><ETag>&quot;t&quot;</ETag></CopyObjectResult>";
        assert_eq!(copied(copy).unwrap(), "\"t\"");
        assert_eq!(
            parts(&[(1, "\"a\"".into())]),
            "<CompleteMultipartUpload><Part><PartNumber>1</PartNumber><ETag>&quot;a&quot;</ETag></Part></CompleteMultipartUpload>"
        );
    }

    #[test]
    fn an_error_may_come_with_a_good_status() {
        let refusal = b"<Error><Code>InternalError</Code><Message>again</Message></Error>";
        assert_eq!(
            error(refusal),
            StoreError { code: "InternalError".into(), message: "again".into() }
        );
        assert!(finished(refusal).is_err_and(|f| f.code() == Code::Unavailable));
        assert!(copied(refusal).is_err());
        let done = b"<CompleteMultipartUploadResult><ETag>x</ETag></CompleteMultipartUploadResult>";
        assert!(finished(done).is_ok());
    }

    #[test]
    fn garbage_is_no_document() {
        for garbage in [
            &b""[..],
            b"<",
            b"\xff",
            b"<a><b></a>",
            b"{}",
            b"<!DOCTYPE x [<!ENTITY y 'z'>]><a>&y;</a>",
        ] {
            assert!(upload(garbage).is_err());
            assert_eq!(error(garbage), StoreError::default());
        }
    }
}
