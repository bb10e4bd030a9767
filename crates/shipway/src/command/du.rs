//! `du`: what the build cache holds.

use shipway_client::{Client, UsageInfo};
use shipway_fault::{Fault, Result};

use crate::{output, size, table, template};

/// Show how much space the build cache takes
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// Show only records that match, such as type==regular; may be repeated
    #[arg(short, long)]
    filter: Vec<String>,
    /// Show everything that is known of each record
    #[arg(short, long)]
    verbose: bool,
    /// Format the output with a Go template, such as '{{json .}}'
    #[arg(long, value_name = "TEMPLATE")]
    format: Option<String>,
}

pub(crate) async fn run(client: &Client, args: Args) -> Result<()> {
    let filtered = !args.filter.is_empty();
    let records = client.disk_usage(args.filter).await?;
    if let Some(format) = args.format {
        return output::print(&(template::render(&format, &list(&records)?)? + "\n"));
    }
    let mut text = if args.verbose {
        records.iter().map(verbose).collect()
    } else {
        HEADER.to_owned() + &records.iter().map(row).collect::<String>()
    };
    if !filtered {
        text.push_str(&summary(&records));
    }
    output::print(&table::align(&text))
}

/// As Go prints a list: nothing is `null`.
pub(crate) fn list<T: serde::Serialize>(items: &[T]) -> Result<serde_json::Value> {
    if items.is_empty() {
        return Ok(serde_json::Value::Null);
    }
    serde_json::to_value(items).map_err(|e| Fault::internal(format!("format the output: {e}")))
}

pub(crate) const HEADER: &str = "ID\tRECLAIMABLE\tSIZE\tLAST ACCESSED\n";

/// One line about a record.
pub(crate) fn row(record: &UsageInfo) -> String {
    let id = format!("{}{}", record.id, if record.mutable { "*" } else { "" });
    let size = size::bytes(record.size) + if record.shared { "*" } else { "" };
    let last = record.last_used_at.map(|t| age(t.0)).unwrap_or_default();
    format!("{id:<71}\t{:<11}\t{size}\t{last}\n", !record.in_use)
}

/// How long ago, roughly.
fn age(time: std::time::SystemTime) -> String {
    let seconds = time.elapsed().unwrap_or_default().as_secs();
    match seconds {
        0..120 => format!("{seconds} seconds ago"),
        120..7200 => format!("{} minutes ago", seconds / 60),
        7200..172_800 => format!("{} hours ago", seconds / 3600),
        _ => format!("{} days ago", seconds / 86_400),
    }
}

/// Everything about a record.
pub(crate) fn verbose(record: &UsageInfo) -> String {
    let time = |t: std::time::SystemTime| shipway_oci::timestamp::format(t);
    let mut pairs = vec![("ID", record.id.clone())];
    if !record.parents.is_empty() {
        pairs.push(("Parents", record.parents.join(";")));
    }
    pairs.extend([
        ("Created at", time(record.created_at.0)),
        ("Mutable", record.mutable.to_string()),
        ("Reclaimable", (!record.in_use).to_string()),
        ("Shared", record.shared.to_string()),
        ("Size", size::bytes(record.size)),
    ]);
    if !record.description.is_empty() {
        pairs.push(("Description", record.description.clone()));
    }
    pairs.push(("Usage count", record.usage_count.to_string()));
    if let Some(last) = record.last_used_at {
        pairs.push(("Last used", time(last.0)));
    }
    if !record.record_type.is_empty() {
        pairs.push(("Type", record.record_type.clone()));
    }
    pairs.iter().map(|(key, value)| format!("{key}:\t{value}\n")).collect::<String>() + "\n"
}

fn summary(records: &[UsageInfo]) -> String {
    let sum = |wanted: &dyn Fn(&UsageInfo) -> bool| {
        records.iter().filter(|r| r.size > 0 && wanted(r)).map(|r| r.size).sum::<i64>()
    };
    let (total, shared, free) = (sum(&|_| true), sum(&|r| r.shared), sum(&|r| !r.in_use));
    let mut out = String::new();
    if shared > 0 {
        out.push_str(&format!(
            "Shared:\t{}\nPrivate:\t{}\n",
            size::bytes(shared),
            size::bytes(total - shared)
        ));
    }
    out + &format!("Reclaimable:\t{}\nTotal:\t{}\n", size::bytes(free), size::bytes(total))
}
