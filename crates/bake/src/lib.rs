//! Bake definitions: files in HCL, JSON or Compose's YAML become targets to build (rows
//! `bx.bake.*`).
//!
//! - [`parse`] reads files and evaluates them to a [`BakeConfig`] of [`Target`]s and [`Group`]s.
//! - [`BakeConfig::plan`] picks targets, merges what they inherit, applies `--set`, and adds those
//!   that they use as contexts. A [`Plan`] serializes as `--print` shows it.
//! - [`Granted`] is what `--allow` grants.
//!
//! Nothing here reads files or the environment itself: [`Host`] does. What a definition can ask for
//! is bounded, since it may come from anywhere: its size, nesting, steps and the size of its
//! values.
//!
//! In the order of the work: `source` has blocks and attributes of HCL or JSON; `resolve` evaluates
//! variables, functions and blocks, each after what it asks for (`names`), with `eval`,
//! `functions` and `operations` over `value` and `convert`; `compose` makes targets of services;
//! `model` merges.
//!
//! Dependencies worth a word: `hcl-edit` is the one maintained parser of HCL that keeps positions;
//! `saphyr-parser` reads YAML as in `cdi`; `regex`, `jiff`, `base64`, `unicode-segmentation` and
//! the digests are what functions of definitions calculate.

mod compose;
mod convert;
mod entitlements;
mod entry;
mod eval;
mod files;
mod functions;
mod input;
mod json;
mod model;
mod names;
mod nesting;
mod number;
mod operations;
mod problem;
mod resolve;
mod source;
#[cfg(test)]
mod tests;
mod types;
mod value;

use std::{io, time::SystemTime};

pub use entitlements::{Devices, Granted};
pub use entry::{Attest, Cache, Output, Secret, Ssh};
pub use files::{DEFAULT_FILES, Parsed, parse};
pub use input::{File, Options};
pub use model::{BakeConfig, Group, Plan, Target};
pub use source::MAX_FILE;

/// What definitions may ask of their surroundings.
pub trait Host {
    /// The value of an environment variable.
    fn env(&self, name: &str) -> Option<String>;

    /// A file that a Compose file names, relative to the working directory; `None` if there is no
    /// such file.
    fn read(&self, path: &str) -> io::Result<Option<Vec<u8>>>;

    /// The home directory of the user.
    fn home(&self) -> Option<String>;

    /// What time it is.
    fn now(&self) -> SystemTime;

    /// Fills `bytes` with random ones.
    fn random(&self, bytes: &mut [u8]) -> shipway_fault::Result<()>;
}

/// A variable of a definition.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Variable {
    /// Its name.
    pub name: String,
    /// What it is for.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// Its type; empty if it was not set.
    #[serde(rename = "type", skip_serializing_if = "String::is_empty")]
    pub kind: String,
    /// Its value; `None` for null.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
}
