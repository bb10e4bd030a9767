//! `prune`: make room in the build cache.

use futures::{Stream, StreamExt};
use shipway_client::{Client, PruneOptions, UsageInfo};
use shipway_fault::{Fault, Result};

use super::du;
use crate::{output, size, table, template};

/// Remove build cache
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// Keep records used within this time, such as 24h
    #[arg(long, value_name = "DURATION", value_parser = size::parse_duration, default_value = "0", hide_default_value = true)]
    keep_duration: i64,
    /// Keep this much cache, in MB
    #[arg(long, value_name = "MB", default_value_t = 0.0, hide_default_value = true)]
    keep_storage: f64,
    /// Never go below this much cache, in MB
    #[arg(long, value_name = "MB", default_value_t = 0.0, hide_default_value = true)]
    keep_storage_min: f64,
    /// Make this much of the disk free, in MB
    #[arg(long, value_name = "MB", default_value_t = 0.0, hide_default_value = true)]
    free_storage: f64,
    /// Remove only records that match, such as type==regular; may be repeated
    #[arg(short, long)]
    filter: Vec<String>,
    /// Remove internal records and those of frontends too
    #[arg(short, long)]
    all: bool,
    /// Show everything that is known of each record
    #[arg(short, long)]
    verbose: bool,
    /// Format each record with a Go template, such as '{{json .}}'
    #[arg(long, value_name = "TEMPLATE")]
    format: Option<String>,
}

/// `shipway prune`, which has what buildctl has, and more.
#[derive(clap::Args, Debug)]
pub(crate) struct Prune {
    #[command(flatten)]
    args: Args,
    /// Show what would be removed, and remove nothing
    #[arg(long)]
    dry_run: bool,
}

pub(crate) async fn run_or_show(client: &Client, prune: Prune) -> Result<()> {
    if !prune.dry_run {
        return run(client, prune.args).await;
    }
    let records = client.would_prune(&prune.args.options()).await?;
    show(&prune.args, futures::stream::iter(records.into_iter().map(Ok))).await
}

fn megabytes(number: f64) -> i64 {
    (number * 1e6) as i64
}

impl Args {
    fn options(&self) -> PruneOptions {
        PruneOptions {
            filter: self.filter.clone(),
            all: self.all,
            keep_duration: self.keep_duration,
            reserved_space: megabytes(self.keep_storage_min),
            max_used_space: megabytes(self.keep_storage),
            min_free_space: megabytes(self.free_storage),
        }
    }
}

pub(crate) async fn run(client: &Client, args: Args) -> Result<()> {
    show(&args, client.prune(args.options()).await?).await
}

/// Prints records as they come, and what they come to.
async fn show(
    args: &Args,
    mut records: impl Stream<Item = Result<UsageInfo>> + Unpin,
) -> Result<()> {
    let (mut total, mut any) = (0, false);
    while let Some(record) = records.next().await {
        let record = record?;
        total += record.size.max(0);
        let text = match &args.format {
            Some(format) => {
                let value = serde_json::to_value(&record)
                    .map_err(|e| Fault::internal(format!("format the output: {e}")))?;
                template::render(format, &value)? + "\n"
            }
            None if args.verbose => table::align(&du::verbose(&record)),
            None if any => table::align(&du::row(&record)),
            None => table::align(&(du::HEADER.to_owned() + &du::row(&record))),
        };
        any = true;
        output::print(&text)?;
    }
    if args.format.is_none() {
        output::print(&table::align(&format!("Total:\t{}\n", size::bytes(total))))?;
    }
    Ok(())
}
