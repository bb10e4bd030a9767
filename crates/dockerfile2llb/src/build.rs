//! One run of the frontend: from options to result (rows `dfr.*`, `df.dir.syntax`, `dfo.request`).

use crate::{
    build_context::{BuildContext, CONTEXT},
    convert::{Converted, convert},
    error::ConvertError,
    explain::Explainer,
    named::NamedContext,
    options::check_caps,
    plan::Scope,
    platform,
    reading::{lint_config, marshal, parse, warn_all},
    subrequest,
};
use serde::Serialize;
use shipway_dockerfile::{Dockerfile, Lines, Linter, Work, directive};
use shipway_fault::{Context as _, Detail, Fault, Result};
use shipway_frontend::{Bridge, FrontendResult, Scan, Scanner, SolveRequest};
use shipway_oci::{ImageName, Platform};
use std::sync::Arc;

/// Subrequests are asked for under this option (row `dfo.request`).
const REQUEST: &str = "requestid";

/// Runs the frontend.
pub async fn run(bridge: Arc<dyn Bridge>, work: Work) -> Result<FrontendResult> {
    let (caps, deferred) = check_caps(bridge.options());
    caps?;
    let cx = BuildContext::open(bridge, work).await.map_err(|f| f.fault)?;
    if let Some((image, cmdline, lines)) = other_frontend(&cx) {
        return forward(&cx, image, cmdline, lines).await;
    }
    if let Some(fault) = deferred {
        return Err(fault);
    }
    if let Some(request) = cx.raw.get(REQUEST) {
        return subrequest::answer(&cx, request).await;
    }
    let mut linter = Linter::new(lint_config(&cx).map_err(|f| cx.fault(f))?);
    match parse(&cx, &mut linter) {
        Ok(file) => build(&cx, &file, linter).await,
        Err(failure) => {
            // What was found before the mistake may be its reason.
            warn_all(&cx, &mut linter).await?;
            Err(cx.fault(failure))
        }
    }
}

/// The frontend image that the build or its Dockerfile asks for instead of this one. Images of
/// docker/dockerfile speak the language that this frontend speaks; they are not needed.
fn other_frontend(cx: &BuildContext) -> Option<(String, String, Option<Lines>)> {
    if cx.raw.contains_key("cmdline") {
        return None;
    }
    let (image, cmdline, lines) = match cx.raw.get("build-arg:BUILDKIT_SYNTAX") {
        Some(cmdline) => {
            (cmdline.trim().split(' ').next().unwrap_or_default().to_owned(), cmdline.clone(), None)
        }
        None => {
            let found = directive::syntax(&cx.file.data)?;
            (found.first_word, found.value, Some(found.lines))
        }
    };
    let ours = image.parse::<ImageName>().is_ok_and(|name| crate::is_official(&name));
    // An image that the build puts in its place speaks a language of its own.
    let ours = ours && !matches!(NamedContext::among(&cx.raw, &image, None), Ok(Some(_)));
    (!ours).then_some((image, cmdline, lines))
}

async fn forward(
    cx: &BuildContext,
    image: String,
    cmdline: String,
    lines: Option<Lines>,
) -> Result<FrontendResult> {
    let mut options = cx.raw.clone();
    options.insert("cmdline".into(), cmdline.clone());
    options.insert("source".into(), image);
    let inputs = cx.bridge.inputs().await.context(|| "failed to get frontend inputs")?;
    let request =
        SolveRequest { frontend: "gateway.v0".into(), options, inputs, ..SolveRequest::default() };
    cx.bridge.solve(request).await.map_err(|fault| {
        if fault.details().iter().any(|d| matches!(d, Detail::Source { .. })) {
            return fault;
        }
        match lines {
            Some(lines) => cx.fault(ConvertError::from(fault).at(lines)),
            None => fault.context(format!("failed with build-arg:BUILDKIT_SYNTAX = {cmdline}")),
        }
    })
}

async fn build(cx: &BuildContext, file: &Dockerfile, mut linter: Linter) -> Result<FrontendResult> {
    let platforms: Vec<Option<&Platform>> = match cx.options.platforms.as_slice() {
        [] => vec![None],
        asked => asked.iter().map(Some).collect(),
    };
    // Warnings are about the file, so those of the first platform are enough.
    let first = async {
        let built = one(cx, file, platforms[0], &mut linter).await;
        warn_all(cx, &mut linter).await?;
        built
    };
    let others = platforms[1..]
        .iter()
        .map(|platform| async move { one(cx, file, *platform, &mut Linter::default()).await });
    let (first, others) =
        futures::future::try_join(first, futures::future::try_join_all(others)).await?;
    result(cx, std::iter::once(first).chain(others).collect()).await
}

/// One platform's part of the result.
struct Part {
    platform: Platform,
    solved: FrontendResult,
    converted: Converted,
}

async fn one(
    cx: &BuildContext,
    file: &Dockerfile,
    platform: Option<&Platform>,
    linter: &mut Linter,
) -> Result<Part> {
    let converted =
        convert(cx, file, platform, Scope::Target, linter).await.map_err(|f| cx.fault(f))?;
    let definition = marshal(cx, &converted)?;
    let definition = (!definition.is_empty()).then_some(definition);
    let cache_imports = cx.options.cache_imports.clone();
    let solved = cx
        .bridge
        .solve(SolveRequest { definition, cache_imports, ..SolveRequest::default() })
        .await?;
    Ok(Part {
        platform: platform.cloned().unwrap_or_else(|| cx.build_platform()).normalized(),
        solved,
        converted,
    })
}

#[derive(Serialize)]
struct Exported {
    #[serde(rename = "Platforms")]
    platforms: Vec<ExportedPlatform>,
}

#[derive(Serialize)]
struct ExportedPlatform {
    #[serde(rename = "ID")]
    id: String,
    #[serde(rename = "Platform")]
    platform: Platform,
}

/// States and metadata as exporters expect them (row `dfr.meta`).
async fn result(cx: &BuildContext, parts: Vec<Part>) -> Result<FrontendResult> {
    let json = |what: &str, value: Result<Vec<u8>, serde_json::Error>| {
        value.map_err(|e| Fault::internal(format!("failed to marshal {what}: {e}")))
    };
    let mut result = FrontendResult::default();
    let mut uses = Vec::new();
    let scanner = match &cx.options.sbom {
        Some(sbom) => Some(
            Scanner::find(&*cx.bridge, sbom, cx.build_platform(), cx.options.resolve_mode).await?,
        ),
        None => None,
    };
    let mut exported = Exported { platforms: Vec::with_capacity(parts.len()) };
    for Part { platform, solved, converted } in parts {
        let id = platform::full(&platform);
        let key = |name: &str| {
            if cx.options.multi_platform { format!("{name}/{id}") } else { name.to_owned() }
        };
        let mut put = |name: &str, value: Vec<u8>| result.metadata.insert(key(name), value);
        put("containerimage.config", json("image config", serde_json::to_vec(&converted.image))?);
        if let Some(base) = &converted.base_image {
            put(
                "containerimage.base.config",
                json("source image config", serde_json::to_vec(base))?,
            );
        }
        if let Some(epoch) = converted.epoch {
            put("source.date.epoch", epoch.to_string().into_bytes());
        }
        uses.extend(converted.uses);
        if let Some(scanner) = &scanner {
            let (core, extras, ignore_cache) =
                (&converted.state, &converted.extras, converted.ignore_cache);
            let scan = Scan { platform: &id, core, extras, ignore_cache };
            let found = scanner.scan(&*cx.bridge, &scan, cx.bridge.session()).await?;
            result.attestations.entry(id.clone()).or_default().push(found);
        }
        let state = solved.single.flatten();
        if cx.options.multi_platform {
            result.map.insert(id.clone(), state);
        } else {
            result.single = Some(state);
        }
        exported.platforms.push(ExportedPlatform { id, platform });
    }
    uses.sort_by_key(|u| u.lines);
    uses.dedup();
    let ignore = cx.ignore().await.ok().flatten().cloned();
    if ignore.is_none() {
        uses.clear();
    }
    let columns = cx.options.columns;
    if columns || !uses.is_empty() {
        result.explain = Some(Arc::new(Explainer {
            columns,
            file: cx.file.clone(),
            ignore,
            ignore_name: cx.ignore_name(),
            session: cx.session(CONTEXT).to_owned(),
            uses,
        }));
    }
    result
        .metadata
        .insert("refs.platforms".into(), json("platforms", serde_json::to_vec(&exported))?);
    Ok(result)
}
