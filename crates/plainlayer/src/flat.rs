//! FlatBuffers, as far as zTOCs have them: tables of numbers, strings and vectors.
//!
//! A table begins with the distance back to its *vtable* (32 bits, signed), which has its own
//! length and the table's (16 bits each), and for each field where in the table it is, or zero.
//! Strings and vectors are a length (32 bits) and what follows; a field has the distance to them.
//! All is little endian. Distances to data lead forwards, so nothing that is read leads in a
//! circle.
//!
//! Source: the internals page of FlatBuffers' documentation.

use crate::{Error, Result};

fn broken() -> Error {
    Error::Ztoc("it ends too early, or leads out of itself")
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N]> {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().ok_or_else(broken)
}

fn half(bytes: &[u8], at: usize) -> Result<usize> {
    Ok(u16::from_le_bytes(number(bytes, at)?).into())
}

/// Where the distance at `at` leads to.
fn follow(bytes: &[u8], at: usize) -> Result<usize> {
    let distance = u32::from_le_bytes(number(bytes, at)?);
    usize::try_from(distance).ok().and_then(|d| at.checked_add(d)).ok_or_else(broken)
}

/// The bytes of the string or vector of bytes at `at`.
fn text(bytes: &[u8], at: usize) -> Result<&[u8]> {
    let len = u32::from_le_bytes(number(bytes, at)?) as usize;
    bytes.get(at + 4..).and_then(|rest| rest.get(..len)).ok_or_else(broken)
}

/// A table.
#[derive(Clone, Copy, Debug)]
pub struct Table<'a> {
    bytes: &'a [u8],
    at: usize,
    size: usize,
    /// Where its fields are.
    fields: &'a [u8],
}

impl<'a> Table<'a> {
    /// The table that `bytes` are of.
    pub fn root(bytes: &'a [u8]) -> Result<Self> {
        Self::new(bytes, follow(bytes, 0)?)
    }

    fn new(bytes: &'a [u8], at: usize) -> Result<Self> {
        let back = i64::from(i32::from_le_bytes(number(bytes, at)?));
        let vtable = i64::try_from(at).ok().and_then(|at| at.checked_sub(back));
        let vtable = vtable.and_then(|v| usize::try_from(v).ok()).ok_or_else(broken)?;
        let (len, size) = (half(bytes, vtable)?, half(bytes, vtable + 2)?);
        let fields = bytes.get(vtable + 4..).and_then(|b| b.get(..len.checked_sub(4)?));
        bytes.get(at..).and_then(|b| b.get(..size)).ok_or_else(broken)?;
        Ok(Self { bytes, at, size, fields: fields.ok_or_else(broken)? })
    }

    /// Where a field of `len` bytes is, if it is there.
    fn field(&self, field: usize, len: usize) -> Result<Option<usize>> {
        if 2 * field + 2 > self.fields.len() {
            return Ok(None);
        }
        match half(self.fields, 2 * field)? {
            0 => Ok(None),
            offset if offset < 4 || offset + len > self.size => Err(broken()),
            offset => Ok(Some(self.at + offset)),
        }
    }

    fn number<const N: usize>(&self, field: usize) -> Result<Option<[u8; N]>> {
        self.field(field, N)?.map(|at| number(self.bytes, at)).transpose()
    }

    /// A number of 64 bits; zero if it is not there.
    pub fn i64(&self, field: usize) -> Result<i64> {
        Ok(self.number(field)?.map_or(0, i64::from_le_bytes))
    }

    /// A number of 32 bits; zero if it is not there.
    pub fn i32(&self, field: usize) -> Result<i32> {
        Ok(self.number(field)?.map_or(0, i32::from_le_bytes))
    }

    /// A number of 8 bits, if it is there.
    pub fn i8(&self, field: usize) -> Result<Option<i8>> {
        Ok(self.number(field)?.map(i8::from_le_bytes))
    }

    /// A string, or a vector of bytes; empty if it is not there.
    pub fn bytes(&self, field: usize) -> Result<&'a [u8]> {
        match self.field(field, 4)? {
            Some(at) => text(self.bytes, follow(self.bytes, at)?),
            None => Ok(&[]),
        }
    }

    /// A table, if it is there.
    pub fn table(&self, field: usize) -> Result<Option<Self>> {
        let at = self.field(field, 4)?;
        at.map(|at| Self::new(self.bytes, follow(self.bytes, at)?)).transpose()
    }

    /// A vector of strings or tables; empty if it is not there.
    pub fn vector(&self, field: usize) -> Result<Vector<'a>> {
        let Some(at) = self.field(field, 4)? else {
            return Ok(Vector { bytes: &[], at: 0, len: 0 });
        };
        let at = follow(self.bytes, at)?;
        let len = u32::from_le_bytes(number(self.bytes, at)?) as usize;
        let is_there = self.bytes.len().saturating_sub(at + 4) / 4 >= len;
        if is_there { Ok(Vector { bytes: self.bytes, at: at + 4, len }) } else { Err(broken()) }
    }
}

/// A vector of strings or tables.
#[derive(Clone, Copy, Debug)]
pub struct Vector<'a> {
    bytes: &'a [u8],
    at: usize,
    len: usize,
}

impl<'a> Vector<'a> {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.len
    }

    fn places(self) -> impl Iterator<Item = Result<usize>> {
        (0..self.len).map(move |n| follow(self.bytes, self.at + 4 * n))
    }

    /// Tables.
    pub fn tables(self) -> impl Iterator<Item = Result<Table<'a>>> {
        self.places().map(move |at| Table::new(self.bytes, at?))
    }

    /// Strings.
    pub fn texts(self) -> impl Iterator<Item = Result<&'a [u8]>> {
        self.places().map(move |at| text(self.bytes, at?))
    }
}

/// Something that was written: how far from the end it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place(usize);

/// Writes from the end to the beginning, as FlatBuffers' builders do, so that distances lead
/// forwards. Vtables that are the same are written once.
#[derive(Default)]
pub struct Writer {
    /// What was written, the last byte first.
    backwards: Vec<u8>,
    /// The largest alignment so far.
    align: usize,
    vtables: Vec<(Place, Vec<u16>)>,
}

impl Writer {
    fn place(&self) -> Place {
        Place(self.backwards.len())
    }

    fn put(&mut self, bytes: &[u8]) {
        self.backwards.extend(bytes.iter().rev());
    }

    /// Makes what follows `more` bytes begin at a multiple of `align`.
    fn pad(&mut self, align: usize, more: usize) {
        self.align = self.align.max(align);
        let end = (self.backwards.len() + more).next_multiple_of(align);
        self.backwards.resize(end - more, 0);
    }

    fn number<const N: usize>(&mut self, bytes: [u8; N]) {
        self.pad(N, 0);
        self.put(&bytes);
    }

    /// The distance to what was written before.
    fn distance(&mut self, to: Place) {
        self.pad(4, 0);
        // What is written is far below 4 GiB: see `MAX_ZTOC`.
        self.put(&((self.backwards.len() + 4 - to.0) as u32).to_le_bytes());
    }

    /// A string.
    pub fn string(&mut self, text: &[u8]) -> Place {
        self.pad(4, text.len() + 1);
        self.put(&[0]);
        self.bytes_and_length(text)
    }

    /// A vector of bytes.
    pub fn bytes(&mut self, bytes: &[u8]) -> Place {
        self.pad(4, bytes.len());
        self.bytes_and_length(bytes)
    }

    fn bytes_and_length(&mut self, bytes: &[u8]) -> Place {
        self.put(bytes);
        self.put(&(bytes.len() as u32).to_le_bytes());
        self.place()
    }

    /// A vector of strings or tables.
    pub fn vector(&mut self, all: &[Place]) -> Place {
        self.pad(4, 4 * all.len());
        all.iter().rev().for_each(|place| self.distance(*place));
        self.put(&(all.len() as u32).to_le_bytes());
        self.place()
    }

    /// A table; its fields are written in the order in which they are given.
    pub fn table(&mut self, fields: &[(usize, Value)]) -> Place {
        let end = self.backwards.len();
        let mut places = Vec::new();
        for (field, value) in fields {
            match *value {
                Value::I64(0) | Value::I32(0) => continue,
                Value::I64(number) => self.number(number.to_le_bytes()),
                Value::I32(number) => self.number(number.to_le_bytes()),
                Value::Place(place) => self.distance(place),
            }
            places.resize(places.len().max(field + 1), 0);
            places[*field] = self.backwards.len();
        }
        self.number([0; 4]);
        let table = self.backwards.len();
        // Tables of zTOCs have few fields.
        let offset = |place: &usize| if *place == 0 { 0 } else { (table - place) as u16 };
        let mut vtable = vec![(4 + 2 * places.len()) as u16, (table - end) as u16];
        vtable.extend(places.iter().map(offset));
        // Go's builder does not compare the tables' lengths, which differ by padding alone.
        let known = self.vtables.iter().find(|(_, known)| known[2..] == vtable[2..]);
        let at = match known {
            Some((at, _)) => *at,
            None => {
                vtable.iter().rev().for_each(|half| self.number(half.to_le_bytes()));
                self.vtables.push((self.place(), vtable));
                self.place()
            }
        };
        let back = at.0 as i64 - table as i64;
        for (n, byte) in (back as i32).to_le_bytes().into_iter().enumerate() {
            self.backwards[table - 1 - n] = byte;
        }
        Place(table)
    }

    /// The bytes, whose root is the table `root`.
    pub fn finish(mut self, root: Place) -> Vec<u8> {
        self.pad(self.align.max(4), 4);
        self.distance(root);
        self.backwards.reverse();
        self.backwards
    }
}

/// A field of a table.
#[derive(Clone, Copy, Debug)]
pub enum Value {
    /// Zero is left out.
    I64(i64),
    /// The same.
    I32(i32),
    /// A string, vector or table.
    Place(Place),
}
