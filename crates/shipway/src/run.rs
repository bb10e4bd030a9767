//! Carrying a build to its end: the view beside it, Ctrl-C, and what is written when it went well.

use std::{io::Write, path::PathBuf};

use shipway_client::{Answer, Client, Outcome, SolveOptions, Status, Warning};
use shipway_fault::{Fault, Result};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use crate::{
    metrics::Metrics,
    progress::{self, Mode, Shown},
};

/// What accompanies a build.
#[derive(Default)]
pub(crate) struct Extras {
    /// File to which every event is added as JSON.
    pub(crate) trace: Option<PathBuf>,
    /// Where it is written what came from the cache.
    pub(crate) metrics: Option<String>,
}

/// Builds; gives the outcome and what the view leaves behind.
pub(crate) async fn build(
    client: &Client,
    options: SolveOptions,
    mode: Mode,
    extras: &Extras,
) -> Result<(Outcome, Shown)> {
    watched(mode, extras, async |events, stop| client.build(options, events, stop).await).await
}

/// Does `work` in a view until Ctrl-C stops it; gives its result and what the view leaves behind.
pub(crate) async fn watched<T>(
    mode: Mode,
    extras: &Extras,
    work: impl AsyncFnOnce(mpsc::Sender<Status>, CancellationToken) -> Result<T>,
) -> Result<(T, Shown)> {
    let stop = CancellationToken::new();
    let _signals =
        AbortOnDropHandle::new(shipway_task::spawn("watch signals", signals(stop.clone())));
    let (events, view) = progress::start(mode, "Building")?;
    let open = |path: &PathBuf| {
        let file = std::fs::OpenOptions::new().append(true).create(true).open(path);
        file.map_err(|e| Fault::io(format!("open the trace file {}", path.display()), e))
    };
    let file = extras.trace.as_ref().map(open).transpose()?;
    let metrics = extras.metrics.as_deref().map(Metrics::start).transpose()?;
    let (events, following) = match file.is_some() || metrics.is_some() {
        true => {
            let (tee, queue) = mpsc::channel(64);
            (
                tee,
                Some(shipway_task::spawn("follow progress", follow(queue, events, file, metrics))),
            )
        }
        false => (events, None),
    };
    let done = work(events, stop).await;
    let metrics = match following {
        Some(following) => following.await.ok().flatten(),
        None => None,
    };
    let shown = view.finish().await?;
    // After everything else, so that it can be found at the end.
    metrics.map(Metrics::write).transpose()?;
    Ok((done?, shown))
}

/// Asks a frontend; gives its answer.
pub(crate) async fn ask(client: &Client, options: SolveOptions, mode: Mode) -> Result<Answer> {
    let stop = CancellationToken::new();
    let _signals =
        AbortOnDropHandle::new(shipway_task::spawn("watch signals", signals(stop.clone())));
    let (events, view) = progress::start(mode, "Checking")?;
    let answer = client.ask(options, events, stop).await;
    view.finish().await?;
    answer
}

/// Looks at events on their way: copies them to a file, counts what they report.
async fn follow(
    mut queue: mpsc::Receiver<Status>,
    events: mpsc::Sender<Status>,
    mut file: Option<std::fs::File>,
    mut metrics: Option<Metrics>,
) -> Option<Metrics> {
    while let Some(status) = queue.recv().await {
        if let Some(file) = &mut file
            && let Ok(line) = serde_json::to_string(&status)
            && let Err(error) = writeln!(file, "{line}")
        {
            tracing::warn!(%error, "failed to write the trace file");
        }
        if let Some(metrics) = &mut metrics {
            metrics.note(&status);
        }
        if events.send(status).await.is_err() {
            break;
        }
    }
    metrics
}

/// The first Ctrl-C cancels the build and waits for its end; the second ends us.
pub(crate) async fn signals(stop: CancellationToken) {
    let (Ok(mut interrupt), Ok(mut terminate)) =
        (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        return;
    };
    loop {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        if stop.is_cancelled() {
            std::process::exit(130);
        }
        stop.cancel();
    }
}

/// Does `work` until the first Ctrl-C, which drops it.
pub(crate) async fn until_interrupted<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let stop = CancellationToken::new();
    let _signals =
        AbortOnDropHandle::new(shipway_task::spawn("watch signals", signals(stop.clone())));
    tokio::select! {
        done = work => done,
        () = stop.cancelled() => Err(Fault::cancelled()),
    }
}

/// Warnings as they are listed below a build.
pub(crate) fn warnings(warnings: &[Warning], debug: bool) -> String {
    if warnings.is_empty() {
        return String::new();
    }
    let count = if warnings.len() == 1 {
        "1 warning".to_owned()
    } else {
        format!("{} warnings", warnings.len())
    };
    let mut out = if debug {
        format!("\n{count} found:\n")
    } else {
        format!("\n{count} found (use --debug to expand):\n")
    };
    for warning in warnings {
        let short = String::from_utf8_lossy(&warning.short);
        out.push_str(&format!(" - {short}"));
        let line = warning.range.first().map(|lines| format!(" (line {})", lines.first_line()));
        // Some frontends say it themselves.
        out.push_str(line.as_deref().filter(|line| !short.ends_with(line)).unwrap_or_default());
        out.push('\n');
        if debug {
            out.push_str(&details(warning));
        }
    }
    out
}

fn details(warning: &Warning) -> String {
    let mut out = String::new();
    for detail in &warning.detail {
        out.push_str(&String::from_utf8_lossy(detail));
        out.push('\n');
    }
    if !warning.url.is_empty() {
        out.push_str(&format!("More info: {}\n", warning.url));
    }
    if let Some(file) = warning.source_file() {
        out.push_str(&crate::failure::excerpt(&file, &warning.spans()));
    }
    out + "\n"
}
