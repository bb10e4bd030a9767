//! Devices of the host: what vendors describe in files of the Container Device Interface (CDI,
//! versions 0.3.0 to 1.1.0), and which of them a step means by a name (rows `exec.cdi`, `so.cdi`).
//!
//! A [`CdiCatalog`] knows the directories and keeps nothing: [`CdiCatalog::read`] reads the files
//! for every request, so that a file takes effect the moment it is there, and nothing watches
//! a directory that most machines do not have. What it finds is [`Devices`], which answer names
//! with devices and devices with the [`Edits`](shipway_executor::Edits) of a runtime specification.
//! A file that cannot be used is left out and reported.
//!
//! Files are foreign bytes: bounded in size, number, depth and what aliases expand to, and opened
//! so that a pipe cannot hold us.
//!
//! # Why no crate for CDI
//!
//! The vendors' own (`container-device-interface` 1.1) reads files of any size, checks them with a
//! JSON schema validator and brings that, `clap` and the abandoned `serde_yaml` along. What is
//! needed of the format is a screenful, in `spec`.
//!
//! `saphyr-parser` is the reader of YAML below `saphyr`: alive, without `unsafe`, one small
//! dependency, linear in hostile input, and it gives events, over which `yaml` keeps its own bounds
//! and takes scalars as those programs do for which the files are written. JSON is YAML, so one
//! reader does for both; only a character written as two `\u` escapes is refused.

mod catalog;
mod devices;
mod spec;
mod yaml;

pub use catalog::{CdiCatalog, DEFAULT_DIRS};
pub use devices::{Device, Devices};
