//! The command `status`.

use super::{Status, ask, ask_now, runtime};
use crate::{
    config::Config,
    keyring::Known,
    lazy::{LayerReport, PullReport, Report},
};
use clap::Args;
use rustix::termios::{isatty, tcgetwinsize};
use shipway_fault::{Fault, Result};
use std::{
    fmt::Write as _,
    io::{self, Write},
    time::Duration,
};

/// How the status is wanted.
#[derive(Args, Clone, Debug)]
pub struct Flags {
    /// As a JSON object.
    #[arg(long)]
    json: bool,
    /// Again and again until Ctrl-C, every second or every so many.
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, require_equals = true, default_missing_value = "1", value_parser = clap::value_parser!(u32).range(1..))]
    watch: Option<u32>,
}

/// Runs the command.
pub fn run(config: &Config, flags: &Flags) -> Result<()> {
    match flags.watch {
        None => {
            let status = ask_now(config)?;
            let text = if flags.json { pretty(&status)? } else { text(&status) };
            print(io::stdout(), &text).map_err(|e| Fault::io("print the status", e))
        }
        Some(seconds) => {
            let every = Duration::from_secs(seconds.into());
            runtime()?.block_on(watch(config, flags.json, every))
        }
    }
}

fn encoding(e: serde_json::Error) -> Fault {
    Fault::internal(format!("encode the status: {e}"))
}

fn pretty(status: &Status) -> Result<String> {
    serde_json::to_string_pretty(status).map(|text| text + "\n").map_err(encoding)
}

/// Prints, and goes on if nobody reads any more: then there is nobody to be told.
fn print(mut to: impl Write, text: &str) -> io::Result<()> {
    match to.write_all(text.as_bytes()).and_then(|()| to.flush()) {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        done => done,
    }
}

/// Shows the status until a signal. A snapshotter that does not answer is told of, and asked again:
/// it may be on its way back.
async fn watch(config: &Config, json: bool, every: Duration) -> Result<()> {
    let screen = (!json && isatty(io::stdout())).then(Screen::enter).transpose();
    let screen = screen.map_err(|e| Fault::io("prepare the terminal", e))?;
    let mut stop = std::pin::pin!(shipway_daemon::stop_requested());
    let mut turns = tokio::time::interval(every);
    turns.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = &mut stop => return Ok(()),
            _ = turns.tick() => {}
        }
        let status = tokio::select! {
            () = &mut stop => return Ok(()),
            status = ask(config) => status,
        };
        let text = match (status, json) {
            (Ok(status), false) => text(&status),
            // One object on each line.
            (Ok(status), true) => serde_json::to_string(&status).map_err(encoding)? + "\n",
            (Err(fault), false) => format!("{fault}\n"),
            (Err(fault), true) => {
                eprintln!("shipway-snapshotter: {fault}");
                continue;
            }
        };
        let shown = match &screen {
            Some(screen) => screen.draw(&text),
            None if json => io::stdout().write_all(text.as_bytes()),
            None => io::stdout().write_all(format!("{text}\n").as_bytes()),
        };
        match shown.and_then(|()| io::stdout().flush()) {
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            shown => shown.map_err(|e| Fault::io("print the status", e))?,
        }
    }
}

/// A terminal's other screen, without a cursor; what was there before comes back at the end.
struct Screen;

impl Screen {
    fn enter() -> io::Result<Self> {
        io::stdout().write_all(b"\x1b[?1049h\x1b[?25l")?;
        Ok(Self)
    }

    fn draw(&self, text: &str) -> io::Result<()> {
        let size = tcgetwinsize(io::stdout()).map(|size| (size.ws_row, size.ws_col));
        // A terminal that does not know its size says zero.
        let (rows, columns) = size.ok().filter(|(rows, _)| *rows > 0).unwrap_or((24, 80));
        io::stdout().write_all(frame(text, rows.into(), columns.into()).as_bytes())
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = io::stdout().write_all(b"\x1b[?25h\x1b[?1049l");
        let _ = io::stdout().flush();
    }
}

/// Draws `text` over what is on a screen, as much of it as there is room for.
fn frame(text: &str, rows: usize, columns: usize) -> String {
    let mut frame = String::from("\x1b[H");
    let lines = text.lines().count();
    let shown = if lines > rows { rows.saturating_sub(1) } else { lines };
    for (n, line) in text.lines().take(shown).enumerate() {
        let line: String = line.chars().take(columns).collect();
        // No newline after the last line, which would scroll.
        let _ = write!(frame, "{}{line}\x1b[K", if n > 0 { "\r\n" } else { "" });
    }
    if shown < lines {
        let _ = write!(frame, "\r\n… {} more lines\x1b[K", lines - shown);
    }
    frame.push_str("\x1b[J");
    frame
}

/// For people.
fn text(status: &Status) -> String {
    let mut text = String::new();
    // Nothing that is written to a string fails.
    let _ = write(&mut text, status);
    text
}

fn write(to: &mut String, status: &Status) -> std::fmt::Result {
    let Status { version, root, sharing, snapshots, disk, lazy, credentials } = status;
    writeln!(to, "version    {version}")?;
    writeln!(to, "root       {}", root.display())?;
    writeln!(to, "sharing    {sharing}")?;
    writeln!(
        to,
        "snapshots  {} active, {} views, {} committed",
        snapshots.active, snapshots.views, snapshots.committed
    )?;
    let more = match disk.uncounted {
        0 => String::new(),
        n => format!(", and {n} not counted yet"),
    };
    writeln!(
        to,
        "disk       {} in {} inodes of {} directories{more}",
        size(disk.bytes),
        disk.inodes,
        disk.directories
    )?;
    if let Some(report) = lazy {
        write_lazy(to, report)?;
    }
    for Known { repository, giver } in credentials {
        writeln!(to, "credentials for {repository}, given by {giver}")?;
    }
    Ok(())
}

fn write_lazy(to: &mut String, report: &Report) -> std::fmt::Result {
    let keeper = if report.keeper { "" } else { ", the keeper does not answer" };
    writeln!(to, "lazy       by way of {}{keeper}", report.tier)?;
    for (tier, why) in &report.passed_over {
        writeln!(to, "           not {tier}: {why}")?;
    }
    let totals = &report.totals;
    writeln!(
        to,
        "fetched    {} in {} requests ({} again, {} wrong); {} reads waited, {} failed",
        size(totals.network),
        totals.requests,
        totals.retries,
        totals.wrong,
        totals.misses,
        totals.failed
    )?;
    writeln!(to, "layers     {}, {} on the disk", report.layers.len(), size(report.bytes))?;
    report.layers.iter().try_for_each(|layer| write_layer(to, layer))?;
    writeln!(to, "pull       {}", report.pull)?;
    for PullReport { digest, image, size: all, received } in &report.pulling {
        let short = digest.get(..19).unwrap_or(digest);
        writeln!(to, "           {short} {} of {}, of {image}", size(*received), size(*all))?;
    }
    if report.waiting > 0 {
        writeln!(to, "plain      {} layers are yet to be made lazy", report.waiting)?;
    }
    for (digest, why) in &report.refused {
        let short = digest.get(..19).unwrap_or(digest);
        writeln!(to, "plain      {short} is not lazy: {why}")?;
    }
    Ok(())
}

fn write_layer(to: &mut String, layer: &LayerReport) -> std::fmt::Result {
    let short = layer.digest.get(..19).unwrap_or(&layer.digest);
    let percent = |part: u64| (part * 100).checked_div(layer.data).unwrap_or(100).min(100);
    let mounted = match (&layer.mounted, &layer.tier) {
        (Some(mounted), Some(tier)) => format!("{mounted} by way of {tier}"),
        _ => "not mounted".to_owned(),
    };
    writeln!(
        to,
        "  {:>4} {short} {}{}, {mounted}: {}, {}% local, {}% verified",
        layer.layer,
        match (layer.plain, layer.soci) {
            (true, _) => "plain, ",
            (false, true) => "SOCI, ",
            (false, false) => "",
        },
        layer.state,
        size(layer.data),
        percent(layer.local),
        percent(layer.verified),
    )?;
    let waits = layer.median.map_or(String::new(), |median| {
        format!(" (half within {}, worst {})", time(median), time(layer.worst))
    });
    writeln!(
        to,
        "       from the network {} in {} requests, from the disk {}; {} reads waited{waits}, {} failed",
        size(layer.network),
        layer.requests,
        size(layer.cache),
        layer.misses,
        layer.failed,
    )?;
    // An image says more than the repository that it is in.
    let names = if layer.images.is_empty() { &layer.repositories } else { &layer.images };
    for name in names {
        writeln!(to, "       of {name}")?;
    }
    if let Some(error) = &layer.error {
        writeln!(to, "       last error: {error}")?;
    }
    Ok(())
}

/// Bytes in a unit that makes them short.
fn size(bytes: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = "bytes";
    for next in units {
        if value < 1024.0 {
            break;
        }
        (value, unit) = (value / 1024.0, next);
    }
    if unit == "bytes" { format!("{bytes} {unit}") } else { format!("{value:.1} {unit}") }
}

/// Seconds in a unit that makes them short.
fn time(seconds: f64) -> String {
    if seconds < 1.0 { format!("{:.0} ms", seconds * 1e3) } else { format!("{seconds:.1} s") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lazy::Totals;

    fn example() -> Status {
        let layer = LayerReport {
            layer: 7,
            digest: format!("sha256:{}", "a".repeat(64)),
            repositories: vec!["r.example/app".into()],
            images: vec!["r.example/app:1".into(), "r.example/app:2".into()],
            data: 200 << 20,
            local: 100 << 20,
            verified: 50 << 20,
            state: "lazy".into(),
            mounted: Some("served".into()),
            tier: Some("file".into()),
            network: 3 << 20,
            requests: 12,
            cache: 512,
            misses: 5,
            median: Some(0.023),
            worst: 1.5,
            error: Some("it rains".into()),
            ..LayerReport::default()
        };
        let plain = LayerReport { layer: 8, plain: true, ..layer.clone() };
        let soci = LayerReport { layer: 9, soci: true, ..layer.clone() };
        let totals = Totals { network: 3 << 20, requests: 12, misses: 5, ..Totals::default() };
        let report = Report {
            tier: "file".into(),
            keeper: true,
            totals,
            layers: vec![layer, plain, soci],
            pull: "fast".into(),
            pulling: vec![PullReport {
                digest: format!("sha256:{}", "c".repeat(64)),
                image: "r.example/next:1".into(),
                size: 9 << 20,
                received: 3 << 19,
            }],
            waiting: 2,
            refused: vec![(format!("sha256:{}", "b".repeat(64)), "it is one frame".into())],
            ..Report::default()
        };
        Status { lazy: Some(report), ..Status::default() }
    }

    #[test]
    fn a_layer_is_told_with_its_images_and_figures() {
        let text = text(&example());
        for words in [
            "lazy       by way of file\n",
            "   7 sha256:aaaaaaaaaaaa lazy, served by way of file: 200.0 MiB, 50% local, 25% verified\n",
            "   8 sha256:aaaaaaaaaaaa plain, lazy, served",
            "   9 sha256:aaaaaaaaaaaa SOCI, lazy, served",
            "pull       fast\n           sha256:cccccccccccc 1.5 MiB of 9.0 MiB, of r.example/next:1\n",
            "plain      2 layers are yet to be made lazy\n",
            "plain      sha256:bbbbbbbbbbbb is not lazy: it is one frame\n",
            "from the network 3.0 MiB in 12 requests, from the disk 512 bytes; 5 reads waited (half within 23 ms, worst 1.5 s), 0 failed\n",
            "of r.example/app:1\n       of r.example/app:2\n",
            "last error: it rains\n",
        ] {
            assert!(text.contains(words), "no {words:?} in\n{text}");
        }
    }

    #[test]
    fn a_frame_fits_the_screen_and_clears_what_was_there() {
        let text = "one\ntwo long line\nthree\n";
        assert_eq!(
            frame(text, 10, 80),
            "\x1b[Hone\x1b[K\r\ntwo long line\x1b[K\r\nthree\x1b[K\x1b[J"
        );
        assert_eq!(frame(text, 3, 5), "\x1b[Hone\x1b[K\r\ntwo l\x1b[K\r\nthree\x1b[K\x1b[J");
        assert_eq!(frame(text, 2, 80), "\x1b[Hone\x1b[K\r\n… 2 more lines\x1b[K\x1b[J");
    }

    #[test]
    fn sizes_are_short() {
        for (bytes, expected) in [
            (0, "0 bytes"),
            (1023, "1023 bytes"),
            (1536, "1.5 KiB"),
            (3 << 40, "3.0 TiB"),
            (5 << 50, "5120.0 TiB"),
        ] {
            assert_eq!(size(bytes), expected);
        }
    }
}
