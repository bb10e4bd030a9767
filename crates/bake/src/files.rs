//! Files of a definition, of whatever form each has.

use shipway_fault::{Fault, Result};

use crate::{
    File, Host, Options, Variable, compose,
    model::BakeConfig,
    resolve::{self, EvalInputs},
    source::{MAX_FILE, Source},
};

/// The names of files that are looked for where none are given, in this order.
pub const DEFAULT_FILES: [&str; 8] = [
    "compose.yaml",
    "compose.yml",
    "docker-compose.yml",
    "docker-compose.yaml",
    "docker-bake.json",
    "docker-bake.hcl",
    "docker-bake.override.json",
    "docker-bake.override.hcl",
];

/// A definition that was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parsed {
    /// Its targets and groups.
    pub config: BakeConfig,
    /// Its variables.
    pub variables: Vec<Variable>,
}

/// Reads and evaluates `files`.
pub fn parse(files: &[File], host: &dyn Host, options: &Options) -> Result<Parsed> {
    let (mut composes, mut sources): (Vec<&File>, Vec<Source>) = (Vec::new(), Vec::new());
    for file in files {
        if file.data.len() > MAX_FILE {
            return Err(Fault::invalid(format!("{} has more than {MAX_FILE} bytes", file.name)));
        }
        let lower = file.name.to_lowercase();
        if lower.ends_with(".yml") || lower.ends_with(".yaml") {
            composes.push(file);
            continue;
        }
        let text = std::str::from_utf8(&file.data)
            .map_err(|e| Fault::invalid(format!("{} is not valid UTF-8: {e}", file.name)))?;
        let number = sources.len();
        let source = if lower.ends_with(".json") {
            Source::json(&file.name, text).map_err(|p| p.into_fault(&[]))
        } else if lower.ends_with(".hcl") {
            hcl(file, text, number)
        } else {
            // Nothing says what it is but its text.
            match compose::parse(&[file], host, options) {
                Ok(_) => {
                    composes.push(file);
                    continue;
                }
                Err(_) => hcl(file, text, number)
                    .or_else(|fault| Source::json(&file.name, text).map_err(|_| fault)),
            }
        };
        sources.push(source?);
    }
    let mut config = BakeConfig::default();
    if !composes.is_empty() {
        config = compose::parse(&composes, host, options)
            .map_err(|f| f.context("failed to parse compose file"))?
            .deduplicated();
    }
    let mut variables = Vec::new();
    if !sources.is_empty() {
        let given = EvalInputs {
            builtins: &options.builtins,
            vars: &options.vars,
            use_env: !options.no_env,
        };
        let evaluated = resolve::resolve(&sources, host, &given, &mut config)
            .map_err(|problem| problem.into_fault(&sources))?;
        variables = evaluated.variables;
        config = config.deduplicated();
    }
    Ok(Parsed { config, variables })
}

/// `number` is the index that the source will have.
fn hcl(file: &File, text: &str, number: usize) -> Result<Source> {
    Source::hcl(&file.name, text, number).map_err(|failed| {
        let (source, mut problem) = *failed;
        // So that the place finds its file.
        if let Some(place) = &mut problem.place {
            place.source = 0;
        }
        Box::new(problem).into_fault(&[source])
    })
}
