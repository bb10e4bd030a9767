//! What the daemons have in common as programs: their log, what they report to a service manager,
//! the signals that end them, how they give memory back, and how metrics are shown. No gRPC:
//! `shipwayd` and `shipway-snapshotter` stand on different releases of tonic.
//!
//! `hyper` serves those who look at metrics, `sd-notify` speaks systemd's protocol,
//! `tracing-subscriber` writes the log, `libc` has the allocator's settings.

pub mod debug;
pub mod memory;
pub mod metrics;

use serde::Deserialize;
use shipway_fault::{Fault, Result};
use std::str::FromStr;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::{EnvFilter, Layer, Registry};

pub use sd_notify::NotifyState;

/// The least severe level that is logged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum LogLevel {
    Error,
    Warn,
    #[default]
    Info,
    Debug,
    Trace,
}

impl LogLevel {
    /// The level as filters of the log have it, such as `warn`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

impl FromStr for LogLevel {
    type Err = Fault;

    /// Reads a level as buildkitd's and containerd's configurations have it.
    fn from_str(text: &str) -> Result<Self> {
        Ok(match text {
            // Nothing here is worse than an error.
            "panic" | "fatal" | "error" => Self::Error,
            "warn" | "warning" => Self::Warn,
            "info" => Self::Info,
            "debug" => Self::Debug,
            "trace" => Self::Trace,
            _ => {
                return Err(Fault::invalid(format!("unknown log level {text:?}"))
                    .hint("want error, warn, info, debug or trace"));
            }
        })
    }
}

/// The form of the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Lines for people; with colors on a terminal.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

impl FromStr for LogFormat {
    type Err = Fault;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => {
                Err(Fault::invalid(format!("unknown log format {text:?}"))
                    .hint("want text or json"))
            }
        }
    }
}

/// Starts the log on standard error. Libraries that speak HTTP/2 and TLS log at `info` at most:
/// what they write below that drowns everything else.
///
/// # Panics
///
/// When it is called a second time.
pub fn start_log(level: LogLevel, format: LogFormat) {
    use tracing_subscriber::fmt;
    let builder = fmt().with_env_filter(filter(level)).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => builder.with_ansi(rustix::termios::isatty(std::io::stderr())).init(),
        LogFormat::Json => builder.json().init(),
    }
}

/// [`start_log`] beside a layer that sees the same spans, such as one that makes traces of them.
///
/// # Panics
///
/// When the log was started before.
pub fn start_log_beside(
    level: LogLevel,
    format: LogFormat,
    layer: impl Layer<Registry> + Send + Sync,
) {
    use tracing_subscriber::{fmt, layer::SubscriberExt as _, util::SubscriberInitExt as _};
    let below = tracing_subscriber::registry().with(layer);
    let log = fmt::layer().with_writer(std::io::stderr);
    match format {
        LogFormat::Text => {
            let log = log.with_ansi(rustix::termios::isatty(std::io::stderr()));
            below.with(log.with_filter(filter(level))).init();
        }
        LogFormat::Json => below.with(log.json().with_filter(filter(level))).init(),
    }
}

/// What is logged: of spans, those that say what a line is about, and none that are for traces.
fn filter(level: LogLevel) -> EnvFilter {
    let level = level.as_str();
    EnvFilter::new(format!(
        "{level},h2=info,hyper=info,hyper_util=info,tower=info,tonic=info,rustls=info,shipway::trace=off"
    ))
}

/// Reports to the service manager, if one started the daemon.
pub fn notify(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::debug!(%error, "failed to notify the service manager");
    }
}

/// Waits for SIGTERM or SIGINT.
pub async fn stop_requested() {
    let (Ok(mut term), Ok(mut int)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_of_traces_are_nothing_to_the_log() {
        let log = tracing_subscriber::fmt().with_env_filter(filter(LogLevel::Trace));
        let _guard = tracing::subscriber::set_default(log.with_writer(std::io::sink).finish());
        assert!(tracing::info_span!(target: "shipway::trace", "call").is_disabled());
        assert!(!tracing::info_span!(target: "shipway_task", "task").is_disabled());
    }

    #[test]
    fn levels_have_the_names_that_other_daemons_give_them() {
        for (name, level) in
            [("fatal", LogLevel::Error), ("warning", LogLevel::Warn), ("trace", LogLevel::Trace)]
        {
            assert_eq!(name.parse::<LogLevel>().unwrap(), level, "{name}");
        }
        let fault = "loud".parse::<LogLevel>().unwrap_err();
        assert_eq!(fault.to_string(), "unknown log level \"loud\"");
        assert_eq!(
            "xml".parse::<LogFormat>().unwrap_err().to_string(),
            "unknown log format \"xml\""
        );
    }
}
