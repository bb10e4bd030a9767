//! Maps of sparse files: which parts of a file an archive has. There are four forms: GNU's old one,
//! in the header and blocks after it, and three in extended records (versions 0.0, 0.1 and 1.0 of
//! GNU tar's "PAX sparse"), of which the last has the map in front of the content.

use super::{
    MAX_SPECIAL,
    block::{self, BLOCK, Header},
    broken,
};
use std::io::{self, Read};

/// A part of a file that the archive has; the rest is zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    pub offset: u64,
    pub len: u64,
}

/// Most parts of a file; as many as the largest map in extended records can have.
const MAX_EXTENTS: usize = (MAX_SPECIAL / 4) as usize;
/// An extent in GNU's old form.
const OLD_EXTENT: usize = 24;

/// What extended records say of a sparse file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Records {
    /// Whether the map is in front of the content (version 1.0).
    pub in_content: bool,
    /// The numbers of the map in turn: offset, length.
    numbers: Vec<u64>,
    /// Whether there is a map in the records.
    pub mapped: bool,
    /// The size of the whole file.
    pub size: Option<u64>,
    /// The name of the file; the entry's own is made up.
    pub name: Option<Vec<u8>>,
}

fn decimal(text: &[u8]) -> io::Result<u64> {
    let digits = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    let number = std::str::from_utf8(text).ok().filter(|_| digits).and_then(|t| t.parse().ok());
    number.ok_or_else(|| broken("the map of a sparse file has something that is not a number"))
}

impl Records {
    /// Takes a record whose key begins with `GNU.sparse.`; `key` is what follows.
    pub fn take(&mut self, key: &[u8], value: &[u8]) -> io::Result<()> {
        match key {
            b"major" => self.in_content = value == b"1",
            b"offset" | b"numbytes" => {
                self.mapped = true;
                // They come in turn.
                if (key == b"offset") != self.numbers.len().is_multiple_of(2) {
                    return Err(broken("the map of a sparse file is out of order"));
                }
                self.numbers.push(decimal(value)?);
            }
            b"map" => {
                self.mapped = true;
                let parts = value.split(|b| *b == b',').filter(|part| !part.is_empty());
                self.numbers = parts.map(decimal).collect::<io::Result<_>>()?;
            }
            b"size" | b"realsize" => self.size = Some(decimal(value)?),
            b"name" => self.name = Some(value.to_vec()),
            // Versions 0.0 and 0.1 say how many parts there are, too.
            _ => {}
        }
        Ok(())
    }

    /// Whether the file is sparse.
    pub fn is_sparse(&self) -> bool {
        self.mapped || self.in_content
    }

    /// The map in the records.
    pub fn extents(&self) -> io::Result<Vec<Extent>> {
        pairs(&self.numbers)
    }
}

fn pairs(numbers: &[u64]) -> io::Result<Vec<Extent>> {
    let (pairs, []) = numbers.as_chunks::<2>() else {
        return Err(broken("the map of a sparse file has half a part"));
    };
    Ok(pairs.iter().map(|[offset, len]| Extent { offset: *offset, len: *len }).collect())
}

/// Reads GNU's old map: four parts in the header, the others in blocks after it. Also says how
/// large the file is.
pub fn old(header: &Header, tar: &mut dyn Read) -> io::Result<(Vec<Extent>, u64)> {
    let number = |field: &[u8]| {
        let number = block::number(field).and_then(|n| u64::try_from(n).ok());
        number.ok_or_else(|| broken("the map of a sparse file has something that is not a number"))
    };
    let size = number(&header.0[483..495])?;
    let mut extents = Vec::new();
    let mut more = |fields: &[u8]| {
        for field in fields.chunks_exact(OLD_EXTENT) {
            // Unused fields are empty.
            if field[0] == 0 && field[12] == 0 {
                break;
            }
            extents.push(Extent { offset: number(&field[..12])?, len: number(&field[12..])? });
        }
        if extents.len() > MAX_EXTENTS {
            Err(broken("the map of a sparse file is too large"))
        } else {
            Ok(())
        }
    };
    more(&header.0[386..482])?;
    let mut extended = header.0[482];
    let mut blocks = 0;
    while extended != 0 {
        let map = block::read(tar)?.ok_or_else(block::cut)?;
        more(&map[..504])?;
        extended = map[504];
        blocks += 1;
        if blocks > MAX_EXTENTS / 21 {
            return Err(broken("the map of a sparse file is too large"));
        }
    }
    Ok((extents, size))
}

/// Reads the map in front of the content: decimal numbers on lines of their own, first how many
/// parts there are. Also says how many bytes it took.
pub fn in_content(tar: &mut dyn Read, stored: u64) -> io::Result<(Vec<Extent>, u64)> {
    let (mut text, mut at) = (Vec::new(), 0);
    let mut next = || loop {
        if let Some(len) = text[at..].iter().position(|b| *b == b'\n') {
            let number = decimal(&text[at..at + len]);
            at += len + 1;
            return number.map(|number| (number, text.len() as u64));
        }
        // A number never crosses more than one block's end.
        if text.len() - at > BLOCK || text.len() as u64 >= MAX_SPECIAL.min(stored) {
            return Err(broken("the map of a sparse file is too large"));
        }
        text.extend(block::read(tar)?.ok_or_else(block::cut)?);
    };
    let (count, mut took) = next()?;
    let count = usize::try_from(count)
        .ok()
        .filter(|n| *n <= MAX_EXTENTS)
        .ok_or_else(|| broken("the map of a sparse file is too large"))?;
    let mut numbers = Vec::new();
    for _ in 0..count * 2 {
        let (number, all) = next()?;
        numbers.push(number);
        took = all;
    }
    Ok((pairs(&numbers)?, took))
}

/// Whether the parts are in order, within a file of `size`, and exactly what is stored.
pub fn check(extents: &[Extent], size: u64, stored: u64) -> io::Result<()> {
    let (mut end, mut sum) = (0_u64, 0_u64);
    for extent in extents {
        let next = extent
            .offset
            .checked_add(extent.len)
            .filter(|next| extent.offset >= end && *next <= size);
        end = next.ok_or_else(|| {
            broken("the parts of a sparse file are not in order, or beyond its end")
        })?;
        sum += extent.len;
    }
    if sum == stored {
        Ok(())
    } else {
        Err(broken("the parts of a sparse file are not what is stored of it"))
    }
}
