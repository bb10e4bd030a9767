//! Persistent index from cache keys to results.
//!
//! A [`CacheDb`] is one file of `redb`, an embedded transactional store in Rust. It is an index and
//! nothing more: results live elsewhere, named by a text that a [`ResultStore`] gives and
//! understands, and deleting the file costs cache hits only. A damaged file is moved aside and
//! begun anew.
//!
//! Writing costs microseconds, because only a background task makes it durable, now and then: a
//! crash loses the last moments and nothing else.

mod db;
mod index;

pub use db::Record;
pub use index::{CacheDb, ResultStore};
