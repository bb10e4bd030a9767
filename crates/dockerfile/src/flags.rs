//! The `--flags` of an instruction, checked against those it knows.

use std::collections::BTreeMap;

use crate::{
    error::{Error, Result},
    literals::with_suggestion,
    token::Token,
};

/// What a flag holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FlagKind {
    /// `--link`, `--link=false`.
    Switch,
    /// `--chown=x`, once.
    Text,
    /// `--mount=x`, any number of times.
    List,
}

/// The flags that were given.
#[derive(Debug, Default)]
pub(crate) struct Flags {
    given: BTreeMap<&'static str, Vec<String>>,
}

impl Flags {
    /// Checks `words` (`--name` or `--name=value`) against the flags `known`.
    pub(crate) fn parse(words: &[String], known: &[(&'static str, FlagKind)]) -> Result<Self> {
        let mut flags = Self::default();
        for word in words {
            let wrong = |message: String| Error::new(message).at(Token::Flag(word.clone()));
            let Some(flag) = word.strip_prefix("--") else {
                return Err(wrong(format!("arg should start with -- : {word}")));
            };
            let (name, value) = flag.split_once('=').map_or((flag, None), |(n, v)| (n, Some(v)));
            let Some(&(name, kind)) = known.iter().find(|(n, _)| *n == name) else {
                let options: Vec<&str> = known.iter().map(|(n, _)| *n).collect();
                let error =
                    with_suggestion(format!("unknown flag: --{name}"), name, &options, true)
                        .at(Token::Flag(word.clone()));
                return Err(match options.as_slice() {
                    [] => error.hint("this instruction has no flags; a word that begins with -- goes behind a lone --"),
                    known => error.hint(format!("its flags are {}", known.iter().map(|n| format!("--{n}")).collect::<Vec<_>>().join(", "))),
                });
            };
            if kind != FlagKind::List && flags.given.contains_key(name) {
                return Err(wrong(format!("duplicate flag specified: --{name}")));
            }
            let missing = || {
                wrong(format!("missing a value on flag: --{name}"))
                    .hint(format!("write --{name}=<value>"))
            };
            let value = match (kind, value) {
                (FlagKind::Switch, None) => "true".to_owned(),
                (FlagKind::Switch, Some("")) => return Err(missing()),
                // Unlike Go's ParseBool: no digits, no single letters, and any case.
                (FlagKind::Switch, Some(value)) => match value.to_lowercase() {
                    value if value == "true" || value == "false" => value,
                    _ => {
                        let error = wrong(format!(
                            "expecting boolean value for flag --{name}, not: {value}"
                        ));
                        return Err(
                            error.hint(format!("write --{name}, --{name}=true or --{name}=false"))
                        );
                    }
                },
                (_, value) => value.ok_or_else(missing)?.to_owned(),
            };
            flags.given.entry(name).or_default().push(value);
        }
        Ok(flags)
    }

    /// The value of a text flag; empty when it was not given.
    pub(crate) fn text(&self, name: &str) -> String {
        self.given.get(name).and_then(|values| values.first()).cloned().unwrap_or_default()
    }

    /// The value of a switch, when it was given.
    pub(crate) fn switch(&self, name: &str) -> Option<bool> {
        self.given.get(name).and_then(|values| values.first()).map(|value| value == "true")
    }

    /// The values of a list flag.
    pub(crate) fn list(&self, name: &str) -> Vec<String> {
        self.given.get(name).cloned().unwrap_or_default()
    }

    /// The names of the flags that were given, sorted.
    pub(crate) fn used(&self) -> Vec<String> {
        self.given.keys().map(|name| (*name).to_owned()).collect()
    }
}
