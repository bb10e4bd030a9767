//! `history`: builds that ran, and what they said (rows `bx.history.*`).
//!
//! `records` finds builds, `inspect` shows one, `bundle` writes them to a file.

mod bundle;
mod inspect;
mod records;

mod trace;

use futures::StreamExt;
use serde_json::{Value, json};
use shipway_client::{Client, HistoryEvent, HistoryKind, HistoryQuery, Time};
use shipway_fault::{Code, Fault, Result};
use shipway_oci::timestamp;

use crate::{
    builders::{BuildState, Store},
    connect::ConnectArgs,
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
    /// Show what a build said, to its end if it still runs
    Logs(Logs),
    Inspect(inspect::Args),
    /// Say why steps of a build ran that the cache had no result for
    Explain(Explain),
    /// Show what a build's time went to: the spans of its trace
    Trace(Trace),
    /// Forget builds
    Rm(Remove),
    Export(bundle::Args),
    /// Refused: builds are imported by Docker Desktop
    #[command(hide = true)]
    Import(Desktop),
    /// Refused: builds are opened in Docker Desktop
    #[command(hide = true)]
    Open(Desktop),
}

#[derive(clap::Args, Debug)]
struct List {
    /// Format each build with a Go template over .Ref, .Name, .Status, .CreatedAt and .Duration,
    /// as json, or as a table: 'table {{.Ref}}\t{{.Status}}'
    #[arg(long, value_name = "TEMPLATE", default_value = "table")]
    format: String,
    /// Only some builds: ref=TEXT, repository=TEXT, status=completed|error|canceled|running, or
    /// startedAt, completedAt or duration with <, <=, > or >=, such as 'startedAt>1h'; may be
    /// repeated
    #[arg(long = "filter", value_name = "FILTER")]
    filters: Vec<String>,
    /// Print names in full
    #[arg(long)]
    no_trunc: bool,
}

/// As `buildctl debug histories` has them.
#[derive(clap::Args, Debug)]
pub(crate) struct Histories {
    /// Format each event with a Go template, such as '{{json .}}'
    #[arg(long, value_name = "TEMPLATE")]
    format: Option<String>,
}

#[derive(clap::Args, Debug)]
struct Logs {
    /// Id of the build, or ^N for the Nth before the latest [default: the latest]
    #[arg(value_name = "REF")]
    reference: Option<String>,
    /// How to show progress: auto, tty, plain, rawjson
    #[arg(long, default_value = "plain", value_name = "MODE")]
    progress: Mode,
}

#[derive(clap::Args, Debug)]
struct Explain {
    /// Id of the build, or ^N for the Nth before the latest [default: the latest]
    #[arg(value_name = "REF")]
    reference: Option<String>,
}

#[derive(clap::Args, Debug)]
struct Trace {
    /// Id of the build, or ^N for the Nth before the latest [default: the latest]
    #[arg(value_name = "REF")]
    reference: Option<String>,
    /// Print the trace as JSON that Jaeger's viewer reads
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args, Debug)]
struct Remove {
    /// Ids of builds, or ^N for the Nth before the latest
    #[arg(value_name = "REF", required_unless_present = "all", conflicts_with = "all")]
    references: Vec<String>,
    /// All builds that ended
    #[arg(long)]
    all: bool,
}

#[derive(clap::Args, Debug)]
struct Desktop {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    arguments: Vec<String>,
}

/// The builder and node that builds are filed under, and what our client or buildx noted of them.
struct Filed {
    builder: String,
    node: String,
}

impl Filed {
    fn of(connect: &ConnectArgs) -> Result<Self> {
        let (builder, node) = connect.names()?;
        Ok(Self { builder, node })
    }

    /// The store is open for a moment only, since others wait for it.
    fn state(&self, reference: &str) -> Option<BuildState> {
        Store::open_existing().ok()??.build_state(&self.builder, &self.node, reference)
    }
}

pub(crate) async fn run(connect: &ConnectArgs, client: &Client, args: Args) -> Result<()> {
    let refused = |what: &str, hint: &'static str| {
        Err(Fault::new(
            Code::Unimplemented,
            format!("{what} in Docker Desktop, which is not part of Shipway"),
        )
        .hint(hint))
    };
    match args.command {
        Command::Ls(args) => list(connect, client, args).await,
        Command::Logs(args) => {
            let reference = args.reference.unwrap_or_default();
            let found = records::find(client, &reference).await?;
            logs(client, &found.record.reference, args.progress).await
        }
        Command::Inspect(args) => {
            let filed = Filed::of(connect)?;
            inspect::run(client, args, |reference| filed.state(reference)).await
        }
        Command::Explain(args) => explain(client, args).await,
        Command::Trace(args) => trace(client, args).await,
        Command::Rm(args) => remove(client, args).await,
        Command::Export(args) => {
            let filed = Filed::of(connect)?;
            bundle::run(client, args, |reference| filed.state(reference)).await
        }
        Command::Import(_) => refused(
            "build records are imported",
            "a bundle is an OCI layout in a gzipped tar: `tar -xzf FILE` unpacks it",
        ),
        Command::Open(_) => {
            refused("build records are opened", "`shipway history inspect REF` shows the same")
        }
    }
}

/// What a table has where nothing else was asked for.
const TABLE: &str =
    "table {{.Ref}}\t{{.Name}}\t{{.Status}}\t{{.CreatedAt}}\t{{.Duration}}\t{{.Link}}";
/// Most characters of a name in a table.
const NAME: usize = 36;

async fn list(connect: &ConnectArgs, client: &Client, args: List) -> Result<()> {
    let conditions: Vec<String> =
        args.filters.iter().map(|f| records::condition(f)).collect::<Result<_>>()?;
    let filed = Filed::of(connect)?;
    let mut found = records::list(client, "", &conditions).await?;
    // Those that run come first.
    found.sort_by_key(|f| f.record.completed_at.is_some());
    let rows: Vec<Row> = found.iter().map(|f| Row::of(f, &filed)).collect();
    output::print(&printed(&rows, &args.format, args.no_trunc)?)
}

/// A build in a list.
struct Row {
    /// What templates know.
    fields: Value,
    /// What `json` prints.
    json: Value,
}

impl Row {
    fn of(found: &records::Found, filed: &Filed) -> Self {
        let record = &found.record;
        let name = records::name(&record.frontend_attrs, filed.state(&record.reference).as_ref());
        let status = match (&record.error, record.completed_at) {
            (Some(_), Some(_)) => "Error",
            (_, Some(_)) => "Completed",
            (_, None) => "Running",
        };
        let now = Time::now();
        let created = record.created_at.map(|t| records::ago(now.since(t))).unwrap_or_default();
        let running = if record.completed_at.is_none() { "+" } else { "" };
        let duration = found.duration().map(|d| records::duration(d) + running).unwrap_or_default();
        // In the order of their names, as Go prints a map.
        let mut json = serde_json::Map::new();
        json.insert("cached_steps".into(), record.cached_steps.into());
        let time = |time: Option<Time>| time.map(|t| timestamp::format(t.0));
        if let Some(completed) = time(record.completed_at) {
            json.insert("completed_at".into(), completed.into());
        }
        json.insert("completed_steps".into(), record.completed_steps.into());
        json.insert("created_at".into(), time(record.created_at).unwrap_or_default().into());
        json.insert("name".into(), name.as_str().into());
        let (builder, node) = (&filed.builder, &filed.node);
        json.insert("ref".into(), format!("{builder}/{node}/{}", record.reference).into());
        json.insert("status".into(), status.into());
        json.insert("total_steps".into(), record.total_steps.into());
        Self {
            fields: json!({"Ref": record.reference, "Name": name, "Status": status,
                "CreatedAt": created, "Duration": duration, "Link": ""}),
            json: json.into(),
        }
    }
}

/// The end of a name that is too long.
fn shortened(name: &str) -> String {
    let count = name.chars().count();
    match count > NAME {
        true => format!("..{}", name.chars().skip(count - NAME + 2).collect::<String>()),
        false => name.to_owned(),
    }
}

/// Builds as `format` has them: `table`, `table TEMPLATE`, `json`, or a template.
fn printed(rows: &[Row], format: &str, no_trunc: bool) -> Result<String> {
    let format = if matches!(format, "table" | "") { TABLE } else { format };
    let format = format.replace("\\t", "\t").replace("\\n", "\n");
    if matches!(format.replace(' ', "").as_str(), "json" | "{{json.}}") {
        return Ok(rows.iter().map(|row| format!("{}\n", row.json)).collect());
    }
    let Some(columns) = format.strip_prefix("table ") else {
        let line = |row: &Row| Ok(template::render(&format, &row.fields)? + "\n");
        return rows.iter().map(line).collect();
    };
    let header = json!({"Ref": "BUILD ID", "Name": "NAME", "Status": "STATUS",
        "CreatedAt": "CREATED AT", "Duration": "DURATION", "Link": ""});
    let mut text = template::render(columns, &header)? + "\n";
    for row in rows {
        let mut fields = row.fields.clone();
        if !no_trunc {
            fields["Name"] = shortened(fields["Name"].as_str().unwrap_or_default()).into();
        }
        text += &(template::render(columns, &fields)? + "\n");
    }
    Ok(table::align_wide(&text))
}

async fn remove(client: &Client, args: Remove) -> Result<()> {
    let mut references = Vec::new();
    if args.all {
        let (_, mut events) = client.history(HistoryQuery::default()).await?;
        while let Some(event) = events.next().await {
            let event = event?;
            if event.kind == HistoryKind::Complete {
                references.push(event.record.reference);
            }
        }
    } else {
        // All are found before one is gone, for that moves the others.
        for reference in &args.references {
            references.push(records::find(client, reference).await?.record.reference);
        }
    }
    for reference in &references {
        client.delete_history(reference).await?;
    }
    Ok(())
}

/// Header and rows of buildctl's lists of builds.
const EVENTS: &str = "TYPE\tREF\tCREATED\tCOMPLETED\tGENERATION\tPINNED\n";

fn event_row(event: &HistoryEvent) -> String {
    let kind = kind(event.kind);
    let record = &event.record;
    let time = |time: Option<Time>| time.map(|t| timestamp::format(t.0)).unwrap_or_default();
    let pinned = if record.pinned { "*" } else { "" };
    let (created, completed) = (time(record.created_at), time(record.completed_at));
    format!(
        "{kind}\t{}\t{created}\t{completed}\t{}\t{pinned}\n",
        record.reference, record.generation
    )
}

/// What happened, in Go's words.
pub(crate) fn kind(kind: HistoryKind) -> &'static str {
    match kind {
        HistoryKind::Started => "STARTED",
        HistoryKind::Complete => "COMPLETE",
        HistoryKind::Deleted => "DELETED",
    }
}

/// Collects the events of `keep` as buildctl lists them, or prints them as `format` says.
async fn events(
    client: &Client,
    args: &Histories,
    keep: impl AsyncFn(&HistoryEvent) -> Result<bool>,
) -> Result<()> {
    let (_, mut events) = client.history(HistoryQuery::default()).await?;
    let mut text = EVENTS.to_owned();
    while let Some(event) = events.next().await {
        let event = event?;
        if !keep(&event).await? {
            continue;
        }
        match &args.format {
            Some(format) => {
                let value = serde_json::to_value(&event)
                    .map_err(|e| Fault::internal(format!("format the output: {e}")))?;
                output::print(&(template::render(format, &value)? + "\n"))?;
            }
            None => text.push_str(&event_row(&event)),
        }
    }
    if args.format.is_none() { output::print(&table::align(&text)) } else { Ok(()) }
}

/// `debug histories`.
pub(crate) async fn histories(client: &Client, args: Histories) -> Result<()> {
    events(client, &args, async |_| Ok(true)).await
}

/// `prune-histories`: forgets all builds that are not pinned, and lists them.
pub(crate) async fn prune(client: &Client, args: Histories) -> Result<()> {
    events(client, &args, async |event| {
        if event.record.pinned || event.kind == HistoryKind::Deleted {
            return Ok(false);
        }
        match client.delete_history(&event.record.reference).await {
            Ok(()) => Ok(true),
            // One that runs stays.
            Err(fault) => {
                tracing::warn!("{fault}");
                Ok(false)
            }
        }
    })
    .await
}

async fn explain(client: &Client, args: Explain) -> Result<()> {
    let found = records::find(client, &args.reference.unwrap_or_default()).await?;
    let mut events = client.status(&found.record.reference).await?;
    let mut explained = Explained::default();
    while let Some(status) = events.next().await {
        explained.note(&status?);
    }
    output::print(&explained.text())
}

async fn trace(client: &Client, args: Trace) -> Result<()> {
    let found = records::find(client, &args.reference.unwrap_or_default()).await?;
    let trace = client.history_trace(&found.record.reference).await?;
    if args.json {
        return output::print(&(trace::jaeger(&trace)? + "\n"));
    }
    output::print(&trace::tree(&trace)?)
}

/// Shows what the build `reference` said, and goes on until it ends.
pub(crate) async fn logs(client: &Client, reference: &str, mode: Mode) -> Result<()> {
    let mut events = client.status(reference).await?;
    let (sink, view) = progress::start(mode, "Replaying")?;
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

#[cfg(test)]
mod tests {
    use super::*;

    fn row(reference: &str, name: &str) -> Row {
        Row {
            fields: json!({"Ref": reference, "Name": name, "Status": "Completed",
                "CreatedAt": "2 hours ago", "Duration": "1.5s", "Link": ""}),
            json: json!({"name": name, "ref": format!("default/default/{reference}")}),
        }
    }

    #[test]
    fn lists_have_the_forms_of_dockers() {
        let long = "x".repeat(40);
        let rows = [row("abc", "app"), row("def", &long)];
        let print = |format: &str, all| printed(&rows, format, all).expect(format);
        let short = format!("..{}", "x".repeat(34));
        // Wide columns, and a last one that is empty.
        let gap = " ".repeat(36);
        assert_eq!(
            print("table", false),
            format!(
                "BUILD ID   NAME{gap}STATUS      CREATED AT    DURATION   \n\
                 abc        app{gap} Completed   2 hours ago   1.5s       \n\
                 def        {short}   Completed   2 hours ago   1.5s       \n",
                gap = &gap[1..]
            )
        );
        assert!(print("table", true).contains(&long));
        assert_eq!(
            print("json", false).lines().next(),
            Some(r#"{"name":"app","ref":"default/default/abc"}"#)
        );
        assert_eq!(print("{{json .}}", false), print("json", false));
        assert_eq!(print("{{.Ref}} {{.Status}}", false), "abc Completed\ndef Completed\n");
        assert_eq!(
            print(r"table {{.Ref}}\t{{.Duration}}", false),
            "BUILD ID   DURATION\nabc        1.5s\ndef        1.5s\n"
        );
        assert!(printed(&rows, "{{.Nope}}", false).is_err());
    }
}
