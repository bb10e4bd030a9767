//! `history`: builds that ran, and what they said.

use futures::StreamExt;
use shipway_client::{Client, HistoryEvent, HistoryKind};
use shipway_fault::{Fault, Result};

use crate::{
    explain::Explained,
    output,
    progress::{self, Mode},
    table, template,
};

/// Look at builds that ran
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// List builds
    Ls(List),
    /// Show what a build said
    Logs(Logs),
    /// Say why steps of a build ran that the cache had no result for
    Explain(Explain),
    /// Forget builds
    Rm(Remove),
}

#[derive(clap::Args, Debug)]
pub(crate) struct List {
    /// Format each event with a Go template, such as '{{json .}}'
    #[arg(long, value_name = "TEMPLATE")]
    format: Option<String>,
}

#[derive(clap::Args, Debug)]
pub(crate) struct Logs {
    /// Id of the build
    #[arg(value_name = "REF")]
    reference: String,
    /// How to show progress: auto, tty, plain, rawjson
    #[arg(long, default_value = "plain")]
    progress: Mode,
}

#[derive(clap::Args, Debug)]
struct Explain {
    /// Id of the build
    #[arg(value_name = "REF")]
    reference: String,
}

#[derive(clap::Args, Debug)]
struct Remove {
    /// Ids of builds
    #[arg(value_name = "REF", required = true)]
    references: Vec<String>,
}

pub(crate) async fn run(client: &Client, args: Args) -> Result<()> {
    match args.command {
        Command::Ls(args) => list(client, args).await,
        Command::Logs(args) => logs(client, args).await,
        Command::Explain(args) => explain(client, args).await,
        Command::Rm(args) => {
            for reference in &args.references {
                client.delete_history(reference).await?;
            }
            Ok(())
        }
    }
}

async fn list(client: &Client, args: List) -> Result<()> {
    table_of(client, args, "REF\tSTATUS\tSTEPS\tCACHED\tCREATED\tFRONTEND\n", row).await
}

/// As `buildctl debug histories` lists them.
pub(crate) async fn histories(client: &Client, args: List) -> Result<()> {
    table_of(client, args, "TYPE\tREF\tCREATED\tCOMPLETED\tGENERATION\tPINNED\n", |event| {
        let kind = match event.kind {
            HistoryKind::Started => "STARTED",
            HistoryKind::Complete => "COMPLETE",
            HistoryKind::Deleted => "DELETED",
        };
        let record = &event.record;
        let time = |time: Option<shipway_client::Time>| {
            time.map(|t| shipway_oci::timestamp::format(t.0)).unwrap_or_default()
        };
        let pinned = if record.pinned { "*" } else { "" };
        let (created, completed) = (time(record.created_at), time(record.completed_at));
        format!(
            "{kind}\t{}\t{created}\t{completed}\t{}\t{pinned}\n",
            record.reference, record.generation
        )
    })
    .await
}

async fn table_of(
    client: &Client,
    args: List,
    header: &str,
    row: impl Fn(&HistoryEvent) -> String,
) -> Result<()> {
    let mut events = client.history(None, false).await?;
    let mut text = header.to_owned();
    while let Some(event) = events.next().await {
        let event = event?;
        match &args.format {
            Some(format) => {
                let value = serde_json::to_value(&event)
                    .map_err(|e| Fault::internal(format!("format the output: {e}")))?;
                output::print(&(template::render(format, &value)? + "\n"))?;
            }
            None => text.push_str(&row(&event)),
        }
    }
    if args.format.is_none() { output::print(&table::align(&text)) } else { Ok(()) }
}

fn row(event: &HistoryEvent) -> String {
    let record = &event.record;
    let status = match (&record.error, record.completed_at) {
        (Some(_), _) => "failed",
        (None, Some(_)) => "completed",
        (None, None) => "running",
    };
    let created =
        record.created_at.map(|t| shipway_oci::timestamp::format(t.0)).unwrap_or_default();
    let steps = format!("{}/{}", record.completed_steps, record.total_steps);
    format!(
        "{}\t{status}\t{steps}\t{}\t{created}\t{}\n",
        record.reference, record.cached_steps, record.frontend
    )
}

async fn explain(client: &Client, args: Explain) -> Result<()> {
    let mut events = client.status(&args.reference).await?;
    let mut explained = Explained::default();
    while let Some(status) = events.next().await {
        explained.note(&status?);
    }
    output::print(&explained.text())
}

pub(crate) async fn logs(client: &Client, args: Logs) -> Result<()> {
    let mut events = client.status(&args.reference).await?;
    let (sink, view) = progress::start(args.progress, "Replaying")?;
    let mut result = Ok(());
    while let Some(event) = events.next().await {
        match event {
            Ok(status) => _ = sink.send(status).await,
            Err(fault) => {
                result = Err(fault);
                break;
            }
        }
    }
    drop(sink);
    view.finish().await?;
    result
}
