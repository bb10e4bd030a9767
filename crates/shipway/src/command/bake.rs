//! `shipway bake`: what definitions in HCL, JSON or Compose files say is to be built, with the
//! flags of `docker buildx bake` (rows `bx.bake.*`).
//!
//! `plan` finds files and evaluates them, `remote` fetches those from elsewhere, `permit` says what
//! was not allowed, `build` carries the targets out.

mod build;
mod permit;
mod plan;
mod remote;

use std::{path::PathBuf, process::ExitCode};

use shipway_fault::{Fault, Result, nearest};

use self::{plan::Origin, remote::Elsewhere};
use crate::{Persona, connect::ConnectArgs, csv, output, progress::Mode, table};

/// Build targets that a file defines
#[derive(clap::Args, Debug, Default)]
pub(crate) struct Args {
    /// Targets and groups; patterns match several [default: default]. Before them, the URL of a Git
    /// repository, archive or file with the definition, and that of a context
    #[arg(value_name = "TARGET")]
    targets: Vec<String>,
    /// Definition: HCL, JSON or Compose; - for standard input; may be repeated
    /// [default: compose.yaml, docker-bake.json, docker-bake.hcl and their like]
    #[arg(short, long = "file", value_name = "FILE")]
    files: Vec<String>,
    /// Value of a target, as TARGET.KEY=VALUE, or TARGET.KEY+=VALUE for one more of a list; may be
    /// repeated
    #[arg(long = "set", value_name = "OVERRIDE")]
    sets: Vec<String>,
    /// Value of a variable; may be repeated
    #[arg(long = "var", value_name = "NAME=VALUE")]
    vars: Vec<String>,
    /// Print what would be built, and build nothing
    #[arg(long)]
    print: bool,
    /// List targets or variables: targets, variables, or type=TYPE,format=json
    #[arg(long, value_name = "WHAT")]
    list: Option<String>,
    /// What definitions may do: network.host, security.insecure, ssh, device, fs=PATH,
    /// fs.read=PATH, fs.write=PATH; may be repeated
    #[arg(long)]
    allow: Vec<String>,
    /// Push images to their registries
    #[arg(long)]
    push: bool,
    /// Leave images in containerd's store, which is also the default
    #[arg(long)]
    load: bool,
    /// Use no cache
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    no_cache: Option<bool>,
    /// Ask registries for newer base images
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    pull: Option<bool>,
    /// Short for --set=*.attest=type=provenance
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "MODE")]
    provenance: Option<String>,
    /// Short for --set=*.attest=type=sbom
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "MODE")]
    sbom: Option<String>,
    /// File that gets the metadata of all targets, as JSON
    #[arg(long, value_name = "FILE")]
    metadata_file: Option<PathBuf>,
    /// How to show progress: auto, tty, plain, rawjson, quiet
    #[arg(long, env = "BUILDKIT_PROGRESS", default_value = "auto", hide_env_values = true)]
    progress: Option<Mode>,
    /// Only look for mistakes in the Dockerfiles
    #[arg(long)]
    check: bool,
    /// What to do: build, check, outline, targets; METHOD,format=json prints data
    #[arg(long, value_name = "METHOD")]
    call: Option<String>,
}

pub(crate) async fn run(connect: &ConnectArgs, mut args: Args, debug: bool) -> Result<ExitCode> {
    if args.print && args.list.is_some() {
        return Err(Fault::invalid("--print and --list are mutually exclusive"));
    }
    let (url, context, targets) = remote::addresses(&args.targets);
    args.targets = targets;
    let elsewhere = match url {
        Some(url) => {
            let (names, optional) = plan::remote_names(&args)?;
            let client = connect.connect(Persona::Shipway).await?;
            Some(Elsewhere::fetch(&client, url, &names, optional).await?)
        }
        None => None,
    };
    let origin = Origin { elsewhere, context };
    if let Some(list) = args.list.clone() {
        let list = List::parse(&list)?;
        output::print(&list.show(plan::parse(&args, &origin)?)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    // On this thread, which has nothing else to do: others have memory of their own, which grows a
    // page at a time.
    let planned = plan::plan(&args, &origin)?;
    if args.print {
        let text = shipway_oci::gojson::to_string_pretty(&planned.plan)
            .map_err(|e| Fault::internal(format!("print the plan: {e}")))?;
        output::print(&(text + "\n"))?;
        return Ok(ExitCode::SUCCESS);
    }
    permit::check(&planned)?;
    build::run(connect, &args, planned, debug).await
}

/// What `--list` lists, and how.
struct List {
    variables: bool,
    json: bool,
}

impl List {
    fn parse(text: &str) -> Result<Self> {
        let fields = csv::fields(text)?;
        let (mut what, mut format) = (String::new(), "table".to_owned());
        match fields.as_slice() {
            [one] if !text.starts_with("type=") => what.clone_from(one),
            _ => {
                for field in fields {
                    match field.split_once('=') {
                        Some(("type", value)) => value.clone_into(&mut what),
                        Some(("format", value)) => value.clone_into(&mut format),
                        Some((key, _)) => {
                            return Err(Fault::invalid(format!(
                                "unexpected key '{key}' in '{field}'"
                            )));
                        }
                        None => return Err(Fault::invalid(format!("invalid value {field}"))),
                    }
                }
            }
        }
        let known = |kind: &str, word: &str, words: [&str; 2]| {
            if words.contains(&word) {
                return Ok(());
            }
            let fault = Fault::invalid(format!("invalid list {kind} {word:?}"));
            Err(match nearest(word, words) {
                Some(near) => fault.hint(format!("did you mean {near}?")),
                None => fault.hint(format!("it is {} or {}", words[0], words[1])),
            })
        };
        known("type", &what, ["targets", "variables"])?;
        known("format", &format, ["table", "json"])?;
        Ok(Self { variables: what == "variables", json: format == "json" })
    }

    fn show(&self, parsed: shipway_bake::Parsed) -> Result<String> {
        if self.variables {
            let mut variables = parsed.variables;
            variables.sort_by(|a, b| a.name.cmp(&b.name));
            if self.json {
                return json(&variables);
            }
            let rows = variables.into_iter().map(|v| {
                vec![v.name, v.kind, v.value.unwrap_or_else(|| "<null>".into()), v.description]
            });
            return Ok(table(["VARIABLE", "TYPE", "VALUE", "DESCRIPTION"], rows));
        }
        let config = parsed.config;
        let mut rows: Vec<Row> = config
            .targets
            .into_iter()
            .map(|t| Row { name: t.name, description: t.description, group: false })
            .chain(config.groups.into_iter().map(|g| {
                let mut targets = g.targets;
                targets.sort_unstable();
                let targets = targets.join(", ");
                let description = match (g.description.is_empty(), targets.is_empty()) {
                    (true, _) => targets,
                    (false, true) => g.description,
                    (false, false) => format!("{} ({targets})", g.description),
                };
                Row { name: g.name, description, group: true }
            }))
            // A convention for what is private.
            .filter(|row| !row.name.starts_with('_'))
            .collect();
        rows.sort_by(|a, b| a.name.cmp(&b.name));
        if self.json {
            return json(&rows);
        }
        Ok(table(["TARGET", "DESCRIPTION"], rows.into_iter().map(|r| vec![r.name, r.description])))
    }
}

#[derive(serde::Serialize)]
struct Row {
    name: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    description: String,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    group: bool,
}

fn json(value: &impl serde::Serialize) -> Result<String> {
    let text = shipway_oci::gojson::to_string_pretty(value)
        .map_err(|e| Fault::internal(format!("print the list: {e}")))?;
    Ok(text + "\n")
}

fn table<const N: usize>(head: [&str; N], rows: impl Iterator<Item = Vec<String>>) -> String {
    let head = head.iter().map(|h| (*h).to_owned()).collect();
    let rows: Vec<Vec<String>> = std::iter::once(head).chain(rows).collect();
    let text: String = rows.iter().map(|row| row.join("\t") + "\n").collect();
    table::align(&text)
}
