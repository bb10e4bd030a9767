//! What a definition is read from.

use std::collections::BTreeMap;

/// A file of a definition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    /// Its name, which also says its form; `-` for standard input.
    pub name: String,
    /// Its bytes.
    pub data: Vec<u8>,
}

/// What is known of a definition beside its files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Built-in variables, such as `BAKE_CMD_CONTEXT`.
    pub builtins: BTreeMap<String, String>,
    /// Values of `--var`.
    pub vars: BTreeMap<String, String>,
    /// Variables are not set from the environment.
    pub no_env: bool,
}
