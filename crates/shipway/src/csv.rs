//! Comma-separated `key=value` words, in which a field may be quoted: the form of `--output`,
//! `--secret`, `--cache-to` and others.

use std::collections::BTreeMap;

use shipway_fault::{Fault, Result};
use shipway_gocompat::csv_fields;

/// The fields of `text`. A quoted field may hold commas, and doubled quotes that stand for one.
pub(crate) fn fields(text: &str) -> Result<Vec<String>> {
    csv_fields(text, ',')
        .map_err(|_| Fault::invalid(format!("{text:?} has a quote in the wrong place")))
}

/// Keys, in lower case, and values; the last of equal keys counts.
pub(crate) fn attributes(text: &str) -> Result<BTreeMap<String, String>> {
    let pair = |field: String| match field.split_once('=') {
        Some((key, value)) => Ok((key.trim().to_lowercase(), value.to_owned())),
        None => Err(Fault::invalid(format!("invalid value {field}")).hint("write it as key=value")),
    };
    fields(text)?.into_iter().map(pair).collect()
}

/// Takes `type` out of attributes.
pub(crate) fn kind(text: &str, flag: &str) -> Result<(String, BTreeMap<String, String>)> {
    let mut attrs = attributes(text)?;
    match attrs.remove("type") {
        Some(kind) if !kind.is_empty() => Ok((kind, attrs)),
        _ => Err(Fault::invalid(format!("{flag} requires type=<type>"))),
    }
}
