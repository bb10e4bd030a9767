//! The JSON, read entry by entry into the builder: nothing of it is kept but the records.

use super::{
    Tag, Time, Toc,
    builder::{Builder, Raw, RawKind, Tagged},
    gate::Gate,
};
use crate::{
    Codec, Error, Layout, Result, TocDigest,
    codec::Frames,
    error::Problem,
    footer::{MAX_COMPRESSED_TOC, MAX_TOC},
};
use base64::prelude::{BASE64_STANDARD, Engine as _};
use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use shipway_oci::Digest;
use std::{
    fmt,
    io::{BufReader, Read},
};

/// Versions of the table that we know.
const VERSION: u64 = 1;
/// Longest JSON that is held in memory while it is read, which is several times faster: some forty
/// thousand entries. A longer one is read as a stream.
const IN_MEMORY: u64 = 16 << 20;
/// Bytes of a tar header.
const HEADER: usize = 512;

/// What is known of a table of contents before it is read.
#[derive(Clone, Copy, Debug)]
pub struct Expected {
    /// Its digest, from the manifest.
    pub digest: TocDigest,
    /// Length of the layer's tar, if the manifest has it: no more data than that is believed.
    pub uncompressed_size: Option<u64>,
}

impl Toc {
    /// Reads the table of contents of a blob with this `layout` from its `compressed` bytes
    /// ([`Layout::toc_in`], or what is stored elsewhere). Nothing is returned unless its digest is
    /// the expected one.
    pub fn read(compressed: &[u8], layout: &Layout, expected: &Expected) -> Result<Self> {
        let size = compressed.len() as u64;
        if size > MAX_COMPRESSED_TOC {
            return Err(Error::TooLarge {
                what: "a compressed table of contents",
                size,
                limit: MAX_COMPRESSED_TOC,
            });
        }
        if let TocDigest::Compressed(digest) = expected.digest {
            check(digest, Digest::of(compressed))?;
        }
        match layout.codec {
            // The JSON is the only member of a tar, in one member of gzip.
            Codec::Gzip => {
                let mut tar = flate2::bufread::GzDecoder::new(compressed);
                let mut header = [0; HEADER];
                tar.read_exact(&mut header).map_err(|e| Error::Corrupt(cut(&e)))?;
                let size = toc_size(&header)?;
                Self::read_json(&mut tar.take(size), size, layout, expected)
            }
            Codec::Zstd => {
                let size = layout.toc_size.unwrap_or(MAX_TOC);
                // One more, so that a longer one is found.
                Self::read_json(
                    &mut Frames::new(Codec::Zstd, compressed)?.take(size + 1),
                    size,
                    layout,
                    expected,
                )
            }
        }
    }

    /// Reads JSON that should have `size` bytes.
    fn read_json(
        json: &mut dyn Read,
        size: u64,
        layout: &Layout,
        expected: &Expected,
    ) -> Result<Self> {
        let mut gate = Gate::new(json);
        let parsed = parse(&mut gate, size, layout, expected.uncompressed_size);
        // What is wrong with a table that is not the expected one is of no interest.
        let (actual, actual_size) = gate.finish().map_err(|e| Error::Corrupt(cut(&e)))?;
        if let TocDigest::Json(digest) = expected.digest {
            check(digest, actual)?;
        }
        match parsed {
            Ok(_) if actual_size != size => Err(syntax(&"it has not the length that was told")),
            parsed => parsed,
        }
    }
}

fn check(expected: Digest, actual: Digest) -> Result<()> {
    if expected == actual { Ok(()) } else { Err(Error::TocDigest { expected, actual }) }
}

fn syntax(why: &dyn fmt::Display) -> Error {
    Error::Syntax(cut(why))
}

/// A message, which may repeat what strangers wrote.
fn cut(why: &dyn fmt::Display) -> String {
    why.to_string().chars().take(200).collect()
}

/// The length that a tar header gives the table of contents.
fn toc_size(header: &[u8; HEADER]) -> Result<u64> {
    let name = header[..100].split(|b| *b == 0).next().unwrap_or_default();
    if name != super::TOC_NAME.as_bytes() {
        return Err(syntax(&"its archive has another name"));
    }
    let digits = header[124..136]
        .trim_ascii_end()
        .split(|b| *b == 0)
        .next()
        .and_then(|d| std::str::from_utf8(d).ok());
    let size = digits
        .and_then(|d| u64::from_str_radix(d.trim(), 8).ok())
        .ok_or_else(|| syntax(&"its archive has no size"))?;
    if size > MAX_TOC {
        Err(Error::TooLarge { what: "a table of contents", size, limit: MAX_TOC })
    } else {
        Ok(size)
    }
}

fn parse(
    gate: &mut Gate<&mut dyn Read>,
    size: u64,
    layout: &Layout,
    declared: Option<u64>,
) -> Result<Toc> {
    let mut state = State {
        builder: Builder::new(layout.codec, layout.payload_end, declared),
        raw: Raw::default(),
        error: None,
    };
    let done = if size <= IN_MEMORY {
        let mut json = Vec::new();
        let read = gate.read_to_end(&mut json).map_err(serde_json::Error::io);
        read.and_then(|_| document(&mut state, serde_json::Deserializer::from_slice(&json)))
    } else {
        document(
            &mut state,
            serde_json::Deserializer::from_reader(BufReader::with_capacity(64 << 10, gate)),
        )
    };
    match (done, state.error) {
        (_, Some(error)) => Err(error),
        (Ok(()), None) => state.builder.finish(),
        (Err(e), None) if e.is_io() => match std::io::Error::from(e).downcast::<Error>() {
            Ok(error) => Err(error),
            // The bytes are in memory, so what fails is the decompression.
            Err(e) => Err(Error::Corrupt(cut(&e))),
        },
        (Err(e), None) => Err(syntax(&e)),
    }
}

fn document<'de>(
    state: &mut State,
    mut json: serde_json::Deserializer<impl serde_json::de::Read<'de>>,
) -> serde_json::Result<()> {
    Document(state).deserialize(&mut json).and_then(|()| json.end())
}

struct State {
    builder: Builder,
    raw: Raw,
    /// What was wrong with an entry, which the parser's error cannot hold.
    error: Option<Error>,
}

impl State {
    fn keep<E: de::Error>(&mut self, error: Error) -> E {
        let e = E::custom(&error);
        self.error = Some(error);
        e
    }
}

/// Keys that were there, to find those that are there twice: which one counts depends on the
/// reader.
struct Seen(u32);

impl Seen {
    fn once<E: de::Error>(&mut self, bit: u32, key: &'static str) -> Result<(), E> {
        let twice = self.0 & 1 << bit != 0;
        self.0 |= 1 << bit;
        if twice { Err(E::duplicate_field(key)) } else { Ok(()) }
    }
}

/// The place of `key` among `known` ones; an error if it is there in other letters, for Go would
/// take it.
fn place<E: de::Error>(key: &str, known: &'static [&'static str]) -> Result<Option<usize>, E> {
    match known.iter().position(|k| *k == key) {
        None if known.iter().any(|k| k.eq_ignore_ascii_case(key)) => {
            Err(E::unknown_field(key, known))
        }
        found => Ok(found),
    }
}

/// A key among known ones.
struct Key(&'static [&'static str]);

impl<'de> DeserializeSeed<'de> for Key {
    type Value = Option<usize>;
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<Self::Value, D::Error> {
        d.deserialize_identifier(self)
    }
}

impl Visitor<'_> for Key {
    type Value = Option<usize>;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }
    fn visit_str<E: de::Error>(self, key: &str) -> Result<Self::Value, E> {
        place(key, self.0)
    }
}

/// The whole document.
struct Document<'a>(&'a mut State);

const DOCUMENT: &[&str] = &["version", "entries", "tarSplitDigest"];

impl<'de> DeserializeSeed<'de> for Document<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Document<'_> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a table of contents")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let (mut seen, mut version) = (Seen(0), None);
        while let Some(key) = map.next_key_seed(Key(DOCUMENT))? {
            let Some(key) = key else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            seen.once(key as u32, DOCUMENT[key])?;
            match key {
                0 => version = Some(map.next_value::<u64>()?),
                1 => map.next_value_seed(Entries(self.0))?,
                _ => {
                    if let Some(digest) = map.next_value_seed(DigestText)? {
                        self.0.builder.tar_split(digest);
                    }
                }
            }
        }
        match version {
            Some(VERSION) => Ok(()),
            Some(other) => {
                Err(de::Error::custom(format_args!("it has version {other}, we know {VERSION}")))
            }
            None => Err(de::Error::missing_field(DOCUMENT[0])),
        }
    }
}

/// The list of entries, which may be null.
struct Entries<'a>(&'a mut State);

impl<'de> DeserializeSeed<'de> for Entries<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        d.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Entries<'_> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of entries")
    }
    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while list.next_element_seed(EntrySeed(self.0))?.is_some() {}
        Ok(())
    }
}

/// One entry.
struct EntrySeed<'a>(&'a mut State);

/// Keys of an entry. Names of owners and other times are known and of no use.
const ENTRY: &[&str] = &[
    "type",
    "name",
    "linkName",
    "size",
    "modtime",
    "mode",
    "uid",
    "gid",
    "devMajor",
    "devMinor",
    "xattrs",
    "digest",
    "offset",
    "endOffset",
    "innerOffset",
    "chunkOffset",
    "chunkSize",
    "chunkDigest",
    "chunkType",
    "userName",
    "groupName",
    "accesstime",
    "changetime",
];

impl<'de> DeserializeSeed<'de> for EntrySeed<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for EntrySeed<'_> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an entry")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let state = self.0;
        state.raw.clear();
        let (mut seen, mut problem) = (Seen(0), None);
        while let Some(key) = map.next_key_seed(Key(ENTRY))? {
            let Some(key) = key else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            seen.once(key as u32, ENTRY[key])?;
            let raw = &mut state.raw;
            let mut number = |map: &mut A| match map.next_value::<i64>()? {
                n @ 0.. => Ok(n as u64),
                _ => {
                    problem.get_or_insert(Problem::Range(ENTRY[key]));
                    Ok(0)
                }
            };
            match ENTRY[key] {
                "type" => raw.kind = map.next_value_seed(KindText)?,
                "name" => map.next_value_seed(Text(&mut raw.name))?,
                "linkName" => map.next_value_seed(Text(&mut raw.link))?,
                "size" => raw.size = number(&mut map)?,
                "modtime" => match map.next_value_seed(TimeText)? {
                    Some(time) => raw.mtime = time,
                    None => drop(problem.get_or_insert(Problem::Time)),
                },
                "mode" => raw.mode = number(&mut map)?,
                "uid" => raw.uid = number(&mut map)?,
                "gid" => raw.gid = number(&mut map)?,
                "devMajor" => raw.major = number(&mut map)?,
                "devMinor" => raw.minor = number(&mut map)?,
                "xattrs" => map.next_value_seed(Xattrs(&mut raw.xattrs))?,
                "digest" => raw.digest = map.next_value_seed(DigestText)?,
                "offset" => raw.offset = number(&mut map)?,
                "endOffset" => raw.end_offset = number(&mut map)?,
                "innerOffset" => raw.inner = number(&mut map)?,
                "chunkOffset" => raw.chunk_offset = number(&mut map)?,
                "chunkSize" => raw.chunk_size = number(&mut map)?,
                "chunkDigest" => raw.chunk_digest = map.next_value_seed(DigestText)?,
                "chunkType" => raw.zeros = map.next_value_seed(ChunkType)?,
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        let pushed = match problem {
            Some(problem) => Err(state.builder.error(&state.raw, problem)),
            None => state.builder.push(&state.raw),
        };
        pushed.map_err(|error| state.keep(error))
    }
}

/// Makes a seed that is a text, or null where Go writes null for nothing.
macro_rules! text {
    ($(#[$doc:meta])* $name:ident $(<$life:lifetime>($field:ty))?, $value:ty, |$this:ident, $text:ident| $read:expr) => {
        $(#[$doc])*
        struct $name $(<$life>($field))?;

        impl<'de $(, $life)?> DeserializeSeed<'de> for $name $(<$life>)? {
            type Value = $value;
            fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<$value, D::Error> {
                d.deserialize_str(self)
            }
        }

        impl<'de $(, $life)?> Visitor<'de> for $name $(<$life>)? {
            type Value = $value;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text")
            }
            fn visit_str<E: de::Error>(self, $text: &str) -> Result<$value, E> {
                let $this = self;
                $read
            }
        }
    };
}

text! {
    /// A text that is kept.
    Text<'a>(&'a mut Vec<u8>), (), |this, text| { this.0.extend_from_slice(text.as_bytes()); Ok(()) }
}
text! {
    /// A digest; an empty text is none, another algorithm is none, too, and where one is needed
    /// that is an error.
    DigestText, Option<Digest>, |_this, text| Ok(text.parse().ok())
}
text! {
    /// The type of a chunk: whether it is zeros.
    ChunkType, bool, |_this, text| match text {
        "" => Ok(false),
        "zeros" => Ok(true),
        other => Err(E::unknown_variant(other, &["", "zeros"])),
    }
}
text! {
    /// The type of an entry.
    KindText, Option<RawKind>, |_this, text| {
        let tag = match text {
            "chunk" => return Ok(Some(RawKind::Chunk)),
            "dir" => Tag::Directory,
            "reg" => Tag::File,
            "symlink" => Tag::Symlink,
            "hardlink" => Tag::HardLink,
            "char" => Tag::Char,
            "block" => Tag::Block,
            "fifo" => Tag::Fifo,
            other => return Err(E::unknown_variant(other, &["dir", "reg", "symlink", "hardlink", "char", "block", "fifo", "chunk"])),
        };
        Ok(Some(RawKind::Entry(Tagged(tag))))
    }
}
text! {
    /// A time; an empty one is 1970.
    TimeText, Option<Time>, |_this, text| Ok(time(text))
}

/// Reads an RFC 3339 time as Go writes it. Go's zero time stands for none, which in a tar is 1970.
fn time(text: &str) -> Option<Time> {
    if text.is_empty() || text == "0001-01-01T00:00:00Z" {
        return Some(Time::default());
    }
    // The library reads dates alone and other forms too.
    let is_strict = text.is_ascii() && text.as_bytes().get(10) == Some(&b'T');
    let time: jiff::Timestamp = is_strict.then(|| text.parse().ok())??;
    let nanoseconds = time.as_nanosecond();
    let seconds = i64::try_from(nanoseconds.div_euclid(1_000_000_000)).ok()?;
    Some(Time { seconds, nanoseconds: nanoseconds.rem_euclid(1_000_000_000) as u32 })
}

/// Attributes: names, and values in base64.
struct Xattrs<'a>(&'a mut Vec<(Vec<u8>, Vec<u8>)>);

impl<'de> DeserializeSeed<'de> for Xattrs<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        d.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Xattrs<'_> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("extended attributes")
    }
    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(name) = map.next_key::<String>()? {
            let mut value = Vec::new();
            map.next_value_seed(Base64(&mut value))?;
            // One more than is allowed is enough for the error.
            if self.0.len() <= super::MAX_XATTRS {
                if self.0.iter().any(|(n, _)| *n == name.as_bytes()) {
                    return Err(de::Error::custom("an extended attribute is there twice"));
                }
                self.0.push((name.into_bytes(), value));
            }
        }
        Ok(())
    }
}

text! {
    /// Bytes in base64.
    Base64<'a>(&'a mut Vec<u8>), (), |this, text| BASE64_STANDARD.decode_vec(text, this.0).map_err(E::custom)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_go_writes_them() {
        for (text, want) in [
            ("", Some((0, 0))),
            ("0001-01-01T00:00:00Z", Some((0, 0))),
            ("2024-02-29T12:34:56Z", Some((1_709_210_096, 0))),
            ("2024-02-29T13:34:56.5+01:00", Some((1_709_210_096, 500_000_000))),
            ("1969-12-31T23:59:59.25Z", Some((-1, 250_000_000))),
            ("1969-12-31T23:59:59Z", Some((-1, 0))),
            ("2024-02-29", None),
            ("2024-02-30T00:00:00Z", None),
            ("2024-02-29T12:34:56", None),
        ] {
            assert_eq!(time(text).map(|t| (t.seconds, t.nanoseconds)), want, "{text}");
        }
    }
}
