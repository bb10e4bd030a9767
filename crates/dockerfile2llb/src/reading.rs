//! Reading the Dockerfile, for builds and for questions about it: parsed, linted, and what is found
//! reported.

use crate::{
    build_context::BuildContext,
    convert::Converted,
    error::{ConvertError, Result as Conversion},
};
use shipway_dockerfile::{Dockerfile, Lint, LintConfig, Linter, Source, directive};
use shipway_fault::{Context as _, Result};
use shipway_frontend::Warning;
use shipway_llb::{Definition, MarshalOptions};

/// Parses the Dockerfile; what `linter` heard stays with it also if that fails.
pub fn parse(cx: &BuildContext, linter: &mut Linter) -> Conversion<Dockerfile> {
    if cx.file.data.is_empty() {
        return Err(ConvertError::new("the Dockerfile cannot be empty"));
    }
    parse_any(cx, linter)
}

/// The same, in the parser's words if there is nothing to parse.
pub fn parse_any(cx: &BuildContext, linter: &mut Linter) -> Conversion<Dockerfile> {
    Ok(Dockerfile::parse_with(&cx.file.data, linter)?)
}

/// The build's settings, or the file's own.
pub fn lint_config(cx: &BuildContext) -> Conversion<LintConfig> {
    Ok(match &cx.options.lint {
        Some(config) => config.clone(),
        None => LintConfig::of_file(&cx.file.data).map_err(|error| {
            let failure =
                ConvertError::from(error).hint("write # check=skip=<rule>,<rule>;error=true");
            match directive::find("check", &cx.file.data) {
                Some(directive) => failure.near(directive.lines),
                None => failure,
            }
        })?,
    })
}

/// Shows what was found.
pub async fn warn_all(cx: &BuildContext, linter: &mut Linter) -> Result<()> {
    let source = cx.source();
    for lint in linter.take() {
        warn(cx, lint, source.as_ref()).await?;
    }
    Ok(())
}

async fn warn(cx: &BuildContext, lint: Lint, source: Option<&Source<'_>>) -> Result<()> {
    let warning = Warning {
        vertex: cx.file_vertex,
        level: 1,
        short: lint.short(),
        detail: vec![lint.rule.description().to_owned()],
        url: lint.rule.url().to_owned(),
        file: Some(cx.file.clone()),
        spans: source.map_or_else(|| lint.lines.spans(), |source| lint.spans(source)),
    };
    cx.bridge.warn(warning).await
}

/// The graph of a converted target.
pub fn marshal(cx: &BuildContext, converted: &Converted) -> Result<Definition> {
    let options = MarshalOptions {
        platform: converted.platform.clone(),
        caps: Some(cx.caps.clone()),
        local_unique_id: cx.bridge.session().to_owned(),
    };
    converted.state.marshal(&options).context(|| "failed to marshal LLB definition")
}
