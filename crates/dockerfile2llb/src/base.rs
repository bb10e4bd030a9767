//! Bases of stages: named contexts, images with their configs, nothing at all (row `dfr.basemeta`).

use crate::{
    error::{ConvertError, Result},
    named::{Loaded, NamedContext, parse_config},
    plan::Plan,
    platform,
    stage::{Base, ConvertedStage, Phase, Rootfs, Stage, empty_image},
};
use shipway_dockerfile::{Finding, Lines, Linter, Token};
use shipway_fault::Fault;
use shipway_gocompat::quote;
use shipway_llb::{State, VertexOptions};
use shipway_oci::{ImageConfig, ImageName, NameError, Platform};
use std::collections::BTreeMap;

/// Images people usually mean.
const COMMON: [&str; 7] = ["alpine", "busybox", "centos", "debian", "golang", "ubuntu", "fedora"];

/// What a stage's base turned out to be.
enum ResolvedBase {
    /// The stage itself is replaced.
    Stage(Loaded),
    /// Its base image is.
    Image(Loaded, Platform),
    /// An image of a registry or store.
    Resolved { pinned: ImageName, config: Box<ImageConfig>, platform: Platform },
    /// A stage that is not needed.
    Unneeded,
}

/// Resolves the bases of the stages that are `reachable`, all at once.
pub async fn resolve(plan: &mut Plan<'_>, reachable: &[bool], linter: &mut Linter) -> Result<()> {
    let mut waiting = Vec::new();
    for (i, &needed) in reachable.iter().enumerate() {
        let stage = &mut plan.stages[i];
        match (&stage.base, &stage.phase) {
            (Base::Stage { .. }, _)
            | (_, Phase::Resolved(_) | Phase::Open | Phase::Converted(_)) => {}
            (Base::Scratch, Phase::Waiting) => {
                stage.resolved(i, Rootfs::scratch(&plan.platforms.target));
            }
            (Base::Context { written, .. } | Base::Image(written), Phase::Waiting) => {
                waiting.push((i, written.clone(), needed));
            }
        }
    }
    let plan_ref = &*plan;
    let found = futures::future::join_all(waiting.iter().map(|(i, written, needed)| async move {
        let stage = &plan_ref.stages[*i];
        let token = match &stage.declared {
            Some(_) => Token::Word(0),
            None => Token::Text(written.clone()),
        };
        let found = find(plan_ref, stage, written, *needed).await;
        found.map_err(|e| e.at(stage.lines).about(token))
    }));
    // What is wrong with one base does not hide what is to be said of the others.
    let mut failures = Vec::new();
    for ((i, written, _), base) in waiting.iter().zip(found.await) {
        match base {
            Ok(base) => apply(plan, *i, written, base, linter),
            Err(failure) => failures.push(failure),
        }
    }
    ConvertError::all(failures)
}

async fn find(plan: &Plan<'_>, stage: &Stage, written: &str, needed: bool) -> Result<ResolvedBase> {
    let cx = plan.cx;
    let name: ImageName = written.parse().map_err(|e: NameError| {
        let fault = Fault::unknown(format!("failed to parse stage name {}: {e}", quote(written)));
        ConvertError::from(fault.hint(format!(
            "{} is neither a stage above nor a valid image name: {}",
            quote(written),
            e.why
        )))
    })?;
    if !needed {
        return Ok(ResolvedBase::Unneeded);
    }
    if let Base::Context { named, .. } = &stage.base {
        return Ok(ResolvedBase::Stage(named.load(cx).await?));
    }
    let wanted = stage.platform.clone().unwrap_or_else(|| plan.platforms.target.clone());
    if let Some(named) = NamedContext::find(cx, &name.to_string(), Some(&wanted))? {
        return Ok(ResolvedBase::Image(named.load(cx).await?, wanted));
    }
    let shown = if cx.options.multi_platform {
        format!("{} ", platform::full(&wanted))
    } else {
        String::new()
    };
    let log = format!("[{shown}internal] load metadata for {name}");
    let resolved = cx
        .image(format!("docker-image://{name}"), BTreeMap::new(), &wanted, log)
        .await
        .map_err(|e| {
            let common = COMMON
                .into_iter()
                .map(String::from)
                .chain(COMMON.into_iter().map(|c| format!("{c}:latest")));
            let options: Vec<String> =
                plan.shown_names().into_iter().map(String::from).chain(common).collect();
            ConvertError::from(e)
                .context(written.to_owned())
                .suggest(written, options.iter().map(String::as_str))
        })?;
    let config = parse_config(&resolved)?;
    let pinned: ImageName = resolved.name.parse().map_err(|e| {
        ConvertError::new(format!("failed to parse ref {}: {e}", quote(&resolved.name)))
    })?;
    let platform = match stage.platform {
        None if plan.platforms.implicit => {
            platform::detect(&config, &wanted, &plan.platforms.build)
        }
        _ => wanted,
    };
    Ok(ResolvedBase::Resolved {
        pinned: pinned.with_digest(resolved.digest),
        config: Box::new(config),
        platform,
    })
}

fn apply(plan: &mut Plan<'_>, i: usize, written: &str, found: ResolvedBase, linter: &mut Linter) {
    let multi = plan.cx.options.multi_platform;
    let stage = &mut plan.stages[i];
    match found {
        ResolvedBase::Unneeded => {}
        ResolvedBase::Stage(Loaded { state, image, pending }) => {
            let mut platform = stage.platform.clone();
            let mut image = image.unwrap_or_default();
            image.created = None;
            if !image.architecture.is_empty() && !image.os.is_empty() {
                platform = Some(image.platform());
            }
            let rootfs = Rootfs { state, image, base_image: None, platform };
            stage.phase = Phase::Converted(ConvertedStage::without_steps(i, rootfs));
            plan.pending.extend(pending.map(|p| (i, p)));
        }
        ResolvedBase::Image(Loaded { state, image, pending }, platform) => {
            let base_image = image.unwrap_or_else(|| empty_image(&platform));
            let image = ImageConfig { created: None, ..base_image.clone() };
            let state = state.with_platform(platform.clone());
            let base_image = Some(base_image);
            stage.resolved(i, Rootfs { state, image, base_image, platform: Some(platform) });
            plan.pending.extend(pending.map(|p| (i, p)));
        }
        ResolvedBase::Resolved { pinned, config, platform } => {
            // Old manifests name no layers; their history still does.
            let empty =
                config.rootfs.diff_ids.is_empty() && config.history.iter().all(|h| h.empty_layer);
            let state = if empty {
                State::scratch()
            } else {
                let (mut title, mut source) = (format!("FROM {pinned}"), String::new());
                if let Some(declared) = &mut stage.declared {
                    title = declared.titles.next(false, &title, multi.then_some(&platform), None);
                    source.clone_from(&declared.source);
                }
                let options = VertexOptions::named(title)
                    .describe("com.docker.dockerfile.v1.command", source)
                    .platform(platform.clone())
                    .at(&plan.cx.file, stage.lines.spans());
                lint_platform(linter, written, &platform, &config, stage.lines);
                State::image(
                    &pinned.to_string(),
                    plan.cx.options.resolve_mode.attr(),
                    BTreeMap::new(),
                    options,
                )
            };
            let image = ImageConfig { created: None, ..(*config).clone() };
            let (base_image, platform) = (Some(*config), Some(platform));
            stage.resolved(i, Rootfs { state, image, base_image, platform });
        }
    }
}

/// Lints what a base image says of its platform.
fn lint_platform(
    linter: &mut Linter,
    name: &str,
    expected: &Platform,
    image: &ImageConfig,
    lines: Lines,
) {
    if expected.os == image.os && expected.architecture == image.architecture {
        return;
    }
    let (expected, actual) =
        (platform::full(&expected.clone().normalized()), platform::full(&image.platform()));
    linter.report(
        Finding::InvalidBaseImagePlatform { image: name, expected: &expected, actual: &actual },
        lines,
        &[],
    );
}
