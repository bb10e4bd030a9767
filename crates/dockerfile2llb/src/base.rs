//! Bases of stages: named contexts, images with their configs, nothing at all (row `dfr.basemeta`).

use crate::{
    convert::{Plan, lint_platform, make_scratch},
    failure::{Failure, Result},
    named::{Loaded, NamedContext, parse_config},
    platform,
    stage::{Progress, SCRATCH, Stage, empty_image},
};
use shipway_dockerfile::{Linter, Token};
use shipway_fault::Fault;
use shipway_gocompat::quote;
use shipway_llb::{State, VertexOptions};
use shipway_oci::{ImageConfig, ImageName, NameError, Platform};
use std::collections::BTreeMap;

/// Images people usually mean.
const COMMON: [&str; 7] = ["alpine", "busybox", "centos", "debian", "golang", "ubuntu", "fedora"];

/// What a stage's base turned out to be.
enum Base {
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
        if stage.parent.is_some() || stage.progress > Progress::Declared {
            continue;
        }
        if needed {
            stage.progress = Progress::Resolved;
        }
        if stage.base == SCRATCH && stage.named.is_none() {
            make_scratch(stage, &plan.platforms.target);
        } else {
            waiting.push(i);
        }
    }
    let plan_ref = &*plan;
    let found = futures::future::join_all(waiting.iter().map(|&i| async move {
        let stage = &plan_ref.stages[i];
        let written = if stage.implicit { Token::Text(stage.base.clone()) } else { Token::Word(0) };
        find(plan_ref, stage, reachable[i]).await.map_err(|e| e.at(stage.lines).about(written))
    }));
    // What is wrong with one base does not hide what is to be said of the others.
    let mut failures = Vec::new();
    for (i, base) in waiting.iter().copied().zip(found.await) {
        match base {
            Ok(base) => apply(plan, i, base, linter),
            Err(failure) => failures.push(failure),
        }
    }
    Failure::all(failures)
}

async fn find(plan: &Plan<'_>, stage: &Stage, needed: bool) -> Result<Base> {
    let cx = plan.cx;
    let written = &stage.base;
    let name: ImageName = written.parse().map_err(|e: NameError| {
        let fault = Fault::unknown(format!("failed to parse stage name {}: {e}", quote(written)));
        Failure::from(fault.hint(format!(
            "{} is no stage above and no image name: {}",
            quote(written),
            e.why
        )))
    })?;
    if !needed {
        return Ok(Base::Unneeded);
    }
    if let Some(named) = &stage.named {
        return Ok(Base::Stage(named.load(cx).await?));
    }
    let wanted = stage.platform.clone().unwrap_or_else(|| plan.platforms.target.clone());
    if let Some(named) = NamedContext::find(cx, &name.to_string(), Some(&wanted))? {
        return Ok(Base::Image(named.load(cx).await?, wanted));
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
            Failure::from(e)
                .context(written.clone())
                .suggest(written, options.iter().map(String::as_str))
        })?;
    let config = parse_config(&resolved)?;
    let pinned: ImageName = resolved
        .name
        .parse()
        .map_err(|e| Failure::new(format!("failed to parse ref {}: {e}", quote(&resolved.name))))?;
    let platform = match stage.platform {
        None if plan.platforms.implicit => {
            platform::detect(&config, &wanted, &plan.platforms.build)
        }
        _ => wanted,
    };
    Ok(Base::Resolved {
        pinned: pinned.with_digest(resolved.digest),
        config: Box::new(config),
        platform,
    })
}

fn apply(plan: &mut Plan<'_>, i: usize, base: Base, linter: &mut Linter) {
    let multi = plan.cx.options.multi_platform;
    let stage = &mut plan.stages[i];
    match base {
        Base::Unneeded => {}
        Base::Stage(loaded) => {
            stage.progress = Progress::Converted;
            stage.state = loaded.state;
            if let Some(mut image) = loaded.image {
                image.created = None;
                if !image.architecture.is_empty() && !image.os.is_empty() {
                    stage.platform = Some(image.platform());
                }
                stage.image = image;
            }
            plan.pending.extend(loaded.pending.map(|p| (i, p)));
        }
        Base::Image(loaded, platform) => {
            let mut image = loaded.image.unwrap_or_else(|| empty_image(&platform));
            stage.base_image = Some(image.clone());
            image.created = None;
            stage.image = image;
            stage.state = loaded.state.with_platform(platform.clone());
            stage.platform = Some(platform);
            stage.convert_if_implicit();
            plan.pending.extend(loaded.pending.map(|p| (i, p)));
        }
        Base::Resolved { pinned, config, platform } => {
            let written = std::mem::replace(&mut stage.base, pinned.to_string());
            stage.base_image = Some((*config).clone());
            // Old manifests name no layers; their history still does.
            let empty =
                config.rootfs.diff_ids.is_empty() && config.history.iter().all(|h| h.empty_layer);
            stage.state = if empty {
                State::scratch()
            } else {
                let title =
                    stage.title(&format!("FROM {pinned}"), multi.then_some(&platform), None);
                let options = VertexOptions::named(title)
                    .describe("com.docker.dockerfile.v1.command", stage.source.clone())
                    .platform(platform.clone())
                    .at(&plan.cx.file, stage.lines.spans());
                lint_platform(linter, &written, &platform, &config, stage.lines);
                State::image(
                    &pinned.to_string(),
                    plan.cx.options.resolve_mode.attr(),
                    BTreeMap::new(),
                    options,
                )
            };
            stage.image = *config;
            stage.image.created = None;
            stage.platform = Some(platform);
            stage.convert_if_implicit();
        }
    }
}
