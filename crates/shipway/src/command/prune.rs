//! `prune`: make room in the build cache.

use futures::{Stream, StreamExt};
use shipway_client::{Client, PruneOptions, UsageInfo};
use shipway_fault::{Fault, Result};
use shipway_gocompat::parse_size;

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
    /// Keep this much cache in any case, such as 2gb
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    reserved_space: Option<i64>,
    /// Keep this much cache at most, such as 20gb
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    max_used_space: Option<i64>,
    /// Make this much of the disk free, such as 10gb
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    min_free_space: Option<i64>,
    /// Do not ask; accepted for compatibility
    #[arg(long, hide = true)]
    force: bool,
    /// Remove only records that match, such as type==regular; or were not used for a time, as
    /// until=24h; may be repeated
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
    let records = client.would_prune(&prune.args.options()?).await?;
    show(&prune.args, futures::stream::iter(records.into_iter().map(Ok))).await
}

/// A size as buildx reads it.
fn bytes(text: &str) -> Result<i64> {
    let size = parse_size(text).filter(|size| *size >= 0);
    size.ok_or_else(|| Fault::invalid(format!("invalid size {text:?}")).hint("write it as 10gb"))
}

/// Conditions as containerd writes them, and how long records are kept: those of Docker's programs
/// have one equals sign, and the time among them.
fn conditions(given: &[String]) -> Result<(Vec<String>, Option<i64>)> {
    let (mut filter, mut time) = (Vec::new(), None);
    for text in given {
        match text.split_once('=') {
            Some(("until" | "unused-for", duration)) => {
                if time.replace(size::parse_duration(duration)?).is_some() {
                    return Err(Fault::invalid("\"until\" filter expects only one value"));
                }
            }
            Some(("id", value)) if !value.starts_with('=') => filter.push(format!("id~={value}")),
            Some((key, value))
                if !value.starts_with('=') && key.chars().all(|c| c.is_ascii_alphanumeric()) =>
            {
                filter.push(format!("{key}=={value}"));
            }
            _ => filter.push(text.clone()),
        }
    }
    Ok((filter, time))
}

fn megabytes(number: f64) -> i64 {
    (number * 1e6) as i64
}

impl Args {
    fn options(&self) -> Result<PruneOptions> {
        let (filter, until) = conditions(&self.filter)?;
        Ok(PruneOptions {
            filter,
            all: self.all,
            keep_duration: until.unwrap_or(self.keep_duration),
            reserved_space: self.reserved_space.unwrap_or(megabytes(self.keep_storage_min)),
            max_used_space: self.max_used_space.unwrap_or(megabytes(self.keep_storage)),
            min_free_space: self.min_free_space.unwrap_or(megabytes(self.free_storage)),
        })
    }
}

pub(crate) async fn run(client: &Client, args: Args) -> Result<()> {
    show(&args, client.prune(args.options()?).await?).await
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_of_dockers_programs_are_understood() {
        let given = ["until=24h", "type=regular", "id=abc", "type==x", "usageCount>2"];
        let (filter, time) = conditions(&given.map(str::to_owned)).expect("right");
        assert_eq!(filter, ["type==regular", "id~=abc", "type==x", "usageCount>2"]);
        assert_eq!(time, Some(24 * 3600 * 1_000_000_000));
        assert!(conditions(&["until=soon".to_owned()]).is_err());
        assert!(conditions(&["until=1h", "unused-for=2h"].map(str::to_owned)).is_err());
        assert_eq!(bytes("2gb").expect("a size"), 2 << 30);
        assert!(bytes("many").is_err());
    }
}
