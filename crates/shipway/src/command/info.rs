//! `info`: what the daemon says of itself.

use shipway_client::Client;
use shipway_fault::{Fault, Result};

use crate::{output, template};

/// Show the daemon's version
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// Format the output with a Go template, such as '{{json .}}'
    #[arg(long, value_name = "TEMPLATE")]
    format: Option<String>,
}

pub(crate) async fn run(client: &Client, args: Args) -> Result<()> {
    let info = client.info().await?;
    if let Some(format) = args.format {
        let value = serde_json::to_value(&info)
            .map_err(|e| Fault::internal(format!("format the output: {e}")))?;
        return output::print(&(template::render(&format, &value)? + "\n"));
    }
    let version = info.buildkit_version;
    let mut text =
        format!("BuildKit: {} {} {}\n", version.package, version.version, version.revision);
    if !version.dockerfile_version.is_empty() {
        text = text.replace("BuildKit: ", "BuildKit:   ")
            + &format!("Dockerfile: {}\n", version.dockerfile_version);
    }
    output::print(&text)
}
