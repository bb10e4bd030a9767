//! Whether layers begin with what is read first (row `ex.c.compress`), and how that is learned.

use shipway_executor::NetworkMode;
use shipway_fault::{Fault, Result};
use shipway_gocompat::parse_bool;
use shipway_refs::Compression;
use std::time::Duration;

/// How long the result is run where nothing is said: many programs never end.
const TIME: Duration = Duration::from_secs(30);
/// Longest that it may be run.
const MAX_TIME: Duration = Duration::from_secs(3600);
/// What runs a command where the image does not say.
const SHELL: [&str; 2] = ["/bin/sh", "-c"];

/// How the order of files is learned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Optimize {
    /// What is run in the result; an empty one is the image's own program.
    pub command: Option<String>,
    /// Whether what the build's steps opened comes next.
    pub steps: bool,
    /// How long it may run.
    pub time: Duration,
    /// Its network.
    pub network: NetworkMode,
}

impl Optimize {
    /// Takes `optimize`, `optimize-steps`, `optimize-time` (seconds) and `optimize-network`.
    pub fn take(
        mut attr: impl FnMut(&str) -> Option<String>,
        compression: Compression,
    ) -> Result<Option<Self>> {
        let command = attr("optimize");
        let steps = match attr("optimize-steps").as_deref() {
            None => false,
            Some("") => true,
            Some(text) => parse_bool(text).ok_or_else(|| {
                Fault::invalid(format!("non-bool value specified for optimize-steps: {text:?}"))
                    .hint("use true or false")
            })?,
        };
        let time = match attr("optimize-time") {
            None => TIME,
            Some(text) => {
                let time = text.parse().map(Duration::from_secs).ok();
                let fits = |time: &Duration| !time.is_zero() && *time <= MAX_TIME;
                time.filter(fits).ok_or_else(|| {
                    Fault::invalid(format!("optimize-time {text:?} is not a number of seconds"))
                        .hint(format!("use 1 to {}", MAX_TIME.as_secs()))
                })?
            }
        };
        let network = match attr("optimize-network").as_deref() {
            None | Some("none") => NetworkMode::None,
            Some("default") => NetworkMode::Default,
            Some(other) => {
                return Err(Fault::invalid(format!(
                    "optimize-network {other:?} is not a network to run the result on"
                ))
                .hint("use none or default"));
            }
        };
        if command.is_none() && !steps {
            return Ok(None);
        }
        if !compression.kind.is_indexed() {
            let fault = Fault::invalid(format!(
                "compression={} has no place for an order of files",
                compression.kind
            ));
            return Err(fault.hint("add compression=estargz or compression=zstdchunked"));
        }
        Ok(Some(Self { command, steps, time, network }))
    }
}

/// What is run for `command`: it, by the image's shell, or the image's own program.
pub(crate) fn arguments(
    command: &str,
    shell: &[String],
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
) -> Result<Vec<String>> {
    if !command.is_empty() {
        let shell = match shell {
            [] => SHELL.map(str::to_owned).to_vec(),
            shell => shell.to_vec(),
        };
        return Ok(shell.into_iter().chain([command.to_owned()]).collect());
    }
    let own: Vec<String> = [entrypoint, cmd].into_iter().flatten().flatten().collect();
    match own.is_empty() {
        false => Ok(own),
        true => Err(Fault::invalid("the image has no program of its own to see what it reads")
            .hint("name a command: optimize=\"app --help\"")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shipway_refs::CompressionKind;

    fn take(attrs: &[(&str, &str)], kind: CompressionKind) -> Result<Option<Optimize>> {
        let attr =
            |key: &str| attrs.iter().find(|(k, _)| *k == key).map(|(_, value)| (*value).to_owned());
        Optimize::take(attr, Compression { kind, ..Compression::default() })
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let estargz = |attrs: &[(&str, &str)]| take(attrs, CompressionKind::Estargz);
        assert_eq!(estargz(&[]).unwrap(), None);
        assert_eq!(estargz(&[("optimize-steps", "false")]).unwrap(), None);
        let own = estargz(&[("optimize", "")]).unwrap().unwrap();
        let want = Optimize {
            command: Some(String::new()),
            steps: false,
            time: TIME,
            network: NetworkMode::None,
        };
        assert_eq!(own, want);
        let all = [
            ("optimize", "app --help"),
            ("optimize-steps", ""),
            ("optimize-time", "3600"),
            ("optimize-network", "default"),
        ];
        let all = estargz(&all).unwrap().unwrap();
        assert_eq!((all.time, all.network, all.steps), (MAX_TIME, NetworkMode::Default, true));
        for wrong in [
            ("optimize-time", "0"),
            ("optimize-time", "3601"),
            ("optimize-time", "soon"),
            ("optimize-network", "host"),
        ] {
            assert!(
                estargz(&[("optimize", "x"), wrong]).unwrap_err().to_string().contains(wrong.0)
            );
        }
        let refused = take(&[("optimize", "x")], CompressionKind::Gzip).unwrap_err();
        assert!(refused.to_string().contains("compression=gzip has no place"), "{refused}");
    }

    #[test]
    fn a_command_is_run_by_the_shell_and_an_empty_one_is_the_images_own() {
        let words = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
        let of = |command, shell: &[&str], entrypoint: &[&str], cmd: &[&str]| {
            arguments(command, &words(shell), Some(words(entrypoint)), Some(words(cmd)))
        };
        assert_eq!(of("a b", &[], &["e"], &["c"]).unwrap(), ["/bin/sh", "-c", "a b"]);
        assert_eq!(of("a", &["bash", "-ec"], &[], &[]).unwrap(), ["bash", "-ec", "a"]);
        assert_eq!(of("", &[], &["e"], &["c"]).unwrap(), ["e", "c"]);
        assert!(of("", &["sh"], &[], &[]).is_err());
    }
}
