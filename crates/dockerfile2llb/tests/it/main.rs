//! The frontend against a bridge that answers from texts.
#![allow(clippy::unwrap_used)]

mod columns;
mod contexts;
mod explain;
mod files;
mod reference;
mod support;
