//! `prune`: make room in the build cache.

use futures::StreamExt;
use shipway_client::{Client, PruneOptions};
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

fn megabytes(number: f64) -> i64 {
    (number * 1e6) as i64
}

pub(crate) async fn run(client: &Client, args: Args) -> Result<()> {
    let options = PruneOptions {
        filter: args.filter,
        all: args.all,
        keep_duration: args.keep_duration,
        reserved_space: megabytes(args.keep_storage_min),
        max_used_space: megabytes(args.keep_storage),
        min_free_space: megabytes(args.free_storage),
    };
    let mut records = client.prune(options).await?;
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
