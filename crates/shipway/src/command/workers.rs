//! `workers`: who does the building.

use std::fmt::Write;

use shipway_client::{Client, PruneInfo, WorkerInfo};
use shipway_fault::Result;
use shipway_gocompat::GoDuration;

use super::du;
use crate::{output, size, table, template};

/// List workers
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// Show only workers that match; may be repeated
    #[arg(short, long)]
    filter: Vec<String>,
    /// Show everything that is known of each worker
    #[arg(short, long)]
    verbose: bool,
    /// Format the output with a Go template, such as '{{json .}}'
    #[arg(long, value_name = "TEMPLATE")]
    format: Option<String>,
}

pub(crate) async fn run(client: &Client, args: Args) -> Result<()> {
    let workers = client.workers(args.filter).await?;
    if let Some(format) = args.format {
        return output::print(&(template::render(&format, &du::list(&workers)?)? + "\n"));
    }
    let text = if args.verbose {
        workers.iter().map(verbose).collect()
    } else {
        let row = |w: &WorkerInfo| format!("{}\t{}\n", w.id, platforms(w));
        "ID\tPLATFORMS\n".to_owned() + &workers.iter().map(row).collect::<String>()
    };
    output::print(&table::align(&text))
}

fn platforms(worker: &WorkerInfo) -> String {
    worker
        .platforms
        .iter()
        .map(|p| p.clone().normalized().to_string())
        .collect::<Vec<_>>()
        .join(",")
}

fn verbose(worker: &WorkerInfo) -> String {
    let version = &worker.buildkit_version;
    let mut out = format!("ID:\t{}\nPlatforms:\t{}\n", worker.id, platforms(worker));
    let _ =
        writeln!(out, "BuildKit:\t{} {} {}", version.package, version.version, version.revision);
    if !version.dockerfile_version.is_empty() {
        let _ = writeln!(out, "Dockerfile:\t{}", version.dockerfile_version);
    }
    out.push_str("Labels:\n");
    for (key, value) in &worker.labels {
        let _ = writeln!(out, "\t{key}:\t{value}");
    }
    if !worker.cdi_devices.is_empty() {
        out.push_str("Devices:\n");
        for device in &worker.cdi_devices {
            let _ = writeln!(out, "\tName:\t{}", device.name);
            let _ = if device.on_demand {
                writeln!(out, "\tOnDemand:\ttrue")
            } else {
                writeln!(out, "\tAutoAllow:\t{}", device.auto_allow)
            };
            for (key, value) in &device.annotations {
                let _ = writeln!(out, "\tAnnotations:\t{key}:\t{value}");
            }
        }
        out.push('\n');
    }
    for (i, rule) in worker.gc_policy.iter().enumerate() {
        let _ = writeln!(out, "GC Policy rule#{i}:");
        out.push_str(&policy(rule));
    }
    out + "\n"
}

fn policy(rule: &PruneInfo) -> String {
    let mut out = format!("\tAll:\t{}\n", rule.all);
    if !rule.filter.is_empty() {
        let _ = writeln!(out, "\tFilters:\t{}", rule.filter.join(" "));
    }
    if rule.keep_duration > 0 {
        let _ = writeln!(out, "\tKeep duration:\t{}", GoDuration(rule.keep_duration));
    }
    for (name, bytes) in [
        ("Reserved space", rule.reserved_space),
        ("Minimum free space", rule.min_free_space),
        ("Maximum used space", rule.max_used_space),
    ] {
        if bytes > 0 {
            let _ = writeln!(out, "\t{name}:\t{}", size::exact_bytes(bytes));
        }
    }
    out
}
