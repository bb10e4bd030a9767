//! A build in parts, each on a node of its own: one index of the images that they push (row
//! `bx.o.multinode`).
//!
//! As with buildx, each node pushes its image by digest, and what the tags get is the index of all
//! of them, which is made and pushed from here.

use std::{collections::BTreeMap, sync::Arc};

use base64::{Engine, engine::general_purpose::STANDARD};
use shipway_client::{Client, Export, Outcome, SolveOptions, Status, Target, Uploads};
use shipway_fault::{Code, Context, Fault, Result};
use shipway_gocompat::parse_bool;
use shipway_imagetools::{Annotation, Open, Plan, Request, SourceSpec};
use shipway_oci::{ImageName, gojson};
use tempfile::NamedTempFile;
use tokio::{sync::mpsc, task::JoinSet};
use tokio_util::sync::CancellationToken;

use crate::{
    nodes::{Nodes, Part},
    places::{RegistryArgs, new_name},
    progress::{self, Task},
};

/// What exporters answer of an image.
const DIGEST: &str = "containerimage.digest";
const DESCRIPTOR: &str = "containerimage.descriptor";
const NAMES: &str = "image.name";

/// The index that images of several nodes are pushed as.
#[derive(Debug)]
pub(crate) struct Join {
    names: Vec<ImageName>,
    insecure: bool,
    annotations: Vec<Annotation>,
}

/// What each of several nodes solves of `options`, and what becomes of their images.
pub(crate) fn split(
    options: &SolveOptions,
    parts: &[Part],
) -> Result<(Vec<SolveOptions>, Option<Join>)> {
    if parts.len() < 2 {
        return Ok((vec![options.clone()], None));
    }
    let mut options = options.clone();
    // So that the image of one platform is an index, too, and files have a directory for each.
    options.frontend_attrs.insert("multi-platform".to_owned(), "true".to_owned());
    let mut join = None;
    for export in &mut options.exports {
        check(export)?;
        if export.kind == "image" && is_set(export, "push") && !is_set(export, "push-by-digest") {
            if join.is_some() {
                return Err(Fault::unimplemented(
                    "several images that are pushed from several nodes",
                )
                .hint("push one, and copy it with `shipway imagetools create`"));
            }
            join = Some(Join::of(export)?);
        }
    }
    for cache in options.cache_exports.iter().filter(|c| c.kind != "inline") {
        tracing::warn!(
            "every node writes its cache of type {} to the same place, where the last one stays",
            cache.kind
        );
    }
    let solve = |part: &Part| {
        let mut options = options.clone();
        let platforms: Vec<String> = part.platforms.iter().map(ToString::to_string).collect();
        options.frontend_attrs.insert("platform".to_owned(), platforms.join(","));
        options
    };
    Ok((parts.iter().map(solve).collect(), join))
}

fn is_set(export: &Export, attr: &str) -> bool {
    export.attrs.get(attr).and_then(|value| parse_bool(value)) == Some(true)
}

fn refused(what: String) -> Fault {
    Fault::new(Code::Unimplemented, what)
}

/// Refuses what cannot be put together from parts.
fn check(export: &Export) -> Result<()> {
    match &export.target {
        Target::Dir { delete: true, path } => Err(refused(format!(
            "several nodes cannot write {} and delete what is not theirs",
            path.display()
        ))
        .hint("leave out mode=delete")),
        Target::File(_) | Target::Layout(_) => {
            Err(refused(format!("{} for multi-node builds currently not supported", export.kind))
                .hint("push the image, or write directories with --output type=local,dest=DIR")
                .hint("or build one platform at a time with --platform"))
        }
        Target::Dir { .. } | Target::None => Ok(()),
    }
}

impl Join {
    /// Takes the tags from `export`, which is left with repositories to push to by digest.
    fn of(export: &mut Export) -> Result<Self> {
        let names = export.attrs.get("name").map_or("", String::as_str);
        let names: Vec<ImageName> = names
            .split(',')
            .filter(|name| !name.is_empty())
            .map(new_name)
            .collect::<Result<_>>()
            .context(|| "--output")?;
        if names.is_empty() {
            return Err(Fault::invalid("tag is needed when pushing to registry")
                .hint("name the image with --tag"));
        }
        let insecure = is_set(export, "registry.insecure");
        let annotations = annotations(&export.attrs)?;
        let mut repositories: Vec<String> = Vec::new();
        for name in names.iter().map(ImageName::locator) {
            if !repositories.contains(&name) {
                repositories.push(name);
            }
        }
        export.attrs.insert("name".to_owned(), repositories.join(","));
        export.attrs.insert("push-by-digest".to_owned(), "true".to_owned());
        // A node's part has no name that its store could keep it under.
        export.attrs.entry("store".to_owned()).or_insert_with(|| "false".to_owned());
        export.attrs.insert("unpack".to_owned(), "false".to_owned());
        export.attrs.remove("dangling-name-prefix");
        Ok(Self { names, insecure, annotations })
    }

    /// Pushes the index of what the nodes pushed; gives what an exporter would answer.
    async fn push(
        &self,
        outcomes: &[&Outcome],
        events: &mpsc::Sender<Status>,
    ) -> Result<BTreeMap<String, String>> {
        let all: Vec<String> = self.names.iter().map(ToString::to_string).collect();
        let task = Task::begin(events, &format!("merging manifest list {}", all.join(","))).await;
        let pushed = self.merge(outcomes, &task).await;
        let mut response = task.end(pushed).await?;
        response.insert(NAMES.to_owned(), all.join(","));
        Ok(response)
    }

    async fn merge(&self, outcomes: &[&Outcome], task: &Task) -> Result<BTreeMap<String, String>> {
        let registries = RegistryArgs::usual(self.insecure).open()?;
        let open: Arc<Open> =
            Arc::new(move |name: &ImageName, mode| registries.repository(name, mode));
        let repository = self.names[0].locator();
        let source = |outcome: &&Outcome| {
            let digest = outcome.response.get(DIGEST).ok_or_else(|| {
                Fault::invalid("a node answered no digest of the image that it pushed")
            })?;
            let name = format!("{repository}@{digest}");
            name.parse()
                .map(SourceSpec::Name)
                .map_err(|e| Fault::invalid(format!("{name} is not the name of an image: {e}")))
        };
        let request = Request {
            sources: outcomes.iter().map(source).collect::<Result<_>>()?,
            tags: self.names.clone(),
            annotations: self.annotations.clone(),
            prefer_index: true,
            platforms: Vec::new(),
        };
        let plan = Plan::of(request, &*open).await?;
        for repository in plan.repositories() {
            let note = |text| task.log(text);
            plan.push(&repository, &*open, task.progress(), &note).await?;
        }
        let root = &plan.combined.root;
        let text = gojson::to_string(root)
            .map_err(|e| Fault::internal(format!("encode a descriptor: {e}")))?;
        Ok(BTreeMap::from([
            (DIGEST.to_owned(), root.digest.to_string()),
            (DESCRIPTOR.to_owned(), STANDARD.encode(text)),
        ]))
    }
}

/// What `annotation-index.KEY` and `annotation-manifest-descriptor[PLATFORM].KEY` say of an index;
/// the rest is on manifests, which the nodes make.
fn annotations(attrs: &BTreeMap<String, String>) -> Result<Vec<Annotation>> {
    let mut found = Vec::new();
    for (key, value) in attrs {
        let Some(rest) = key.strip_prefix("annotation-") else { continue };
        // Platforms have no dots.
        let Some((level, key)) = rest.split_once('.') else { continue };
        if ["index", "manifest-descriptor"].contains(&level.split('[').next().unwrap_or(level)) {
            found.extend(Annotation::parse(&format!("{level}:{key}={value}"))?);
        }
    }
    Ok(found)
}

/// A build with its parts, ready to run.
pub(crate) struct Spread {
    shares: Vec<Share>,
    join: Option<Join>,
}

struct Share {
    node: usize,
    name: String,
    client: Client,
    options: SolveOptions,
}

/// A build that went well.
pub(crate) struct Built {
    /// What exporters answered, together.
    pub(crate) response: BTreeMap<String, String>,
    /// Each node's part, with its number, in the order of the parts.
    pub(crate) outcomes: Vec<(usize, Outcome)>,
}

impl Spread {
    /// `options` on the nodes that `parts` name. `stdin` has what was on standard input, if that is
    /// the context and there are several parts.
    pub(crate) async fn of(
        nodes: &Nodes,
        parts: &[Part],
        options: &SolveOptions,
        stdin: Option<&NamedTempFile>,
    ) -> Result<Self> {
        let (all, join) = split(options, parts)?;
        let mut shares = Vec::new();
        for (part, mut options) in parts.iter().zip(all) {
            if let Some(file) = stdin {
                let file = file.reopen().map_err(|e| Fault::io("read the context again", e))?;
                options.uploads = Uploads::default();
                let url = options.uploads.add(tokio::fs::File::from_std(file))?;
                options.frontend_attrs.insert("context".to_owned(), url);
            }
            shares.push(Share {
                node: part.node,
                name: nodes.names(part.node).1.to_owned(),
                client: nodes.client(part.node).await?,
                options,
            });
        }
        Ok(Self { shares, join })
    }

    /// Builds all parts at once. The first that fails ends the others.
    pub(crate) async fn build(
        self,
        events: mpsc::Sender<Status>,
        stop: CancellationToken,
    ) -> Result<Built> {
        let several = self.shares.len() > 1;
        let ours = stop.child_token();
        let mut running = JoinSet::new();
        for (n, share) in self.shares.into_iter().enumerate() {
            let events = match several {
                true => progress::part(&events, &share.name, Some(&share.name)),
                false => events.clone(),
            };
            let stop = ours.clone();
            let task = async move {
                let built = share.client.build(share.options, events, stop).await;
                let at = || format!("node {}", share.name);
                let built = if several { built.context(at) } else { built };
                (n, share.node, built)
            };
            running.spawn(shipway_task::named("build on a node", task));
        }
        let (mut outcomes, mut failure) = (Vec::new(), None);
        while let Some(done) = running.join_next().await {
            match done {
                Ok((n, node, Ok(outcome))) => outcomes.push((n, node, outcome)),
                Ok((_, _, Err(fault))) => _ = failure.get_or_insert(fault),
                Err(error) => {
                    failure.get_or_insert(Fault::internal(format!("build on a node: {error}")));
                }
            }
            if failure.is_some() {
                // What the others say of their end is of no interest.
                ours.cancel();
            }
        }
        if let Some(fault) = failure {
            return Err(fault);
        }
        outcomes.sort_by_key(|(n, ..)| *n);
        let outcomes: Vec<(usize, Outcome)> =
            outcomes.into_iter().map(|(_, node, outcome)| (node, outcome)).collect();
        Built::of(self.join.as_ref(), outcomes, &events, &stop).await
    }
}

impl Built {
    /// What the only part of a build, on `node`, came to.
    pub(crate) fn alone(node: usize, outcome: Outcome) -> Self {
        Self { response: outcome.response.clone(), outcomes: vec![(node, outcome)] }
    }

    /// What `outcomes` of all parts come to, whose images `join` puts together, if there are
    /// several.
    pub(crate) async fn of(
        join: Option<&Join>,
        outcomes: Vec<(usize, Outcome)>,
        events: &mpsc::Sender<Status>,
        stop: &CancellationToken,
    ) -> Result<Self> {
        let response = match join {
            Some(join) => {
                let all: Vec<&Outcome> = outcomes.iter().map(|(_, outcome)| outcome).collect();
                tokio::select! {
                    pushed = join.push(&all, events) => pushed?,
                    () = stop.cancelled() => return Err(Fault::cancelled()),
                }
            }
            None => outcomes.first().map(|(_, o)| o.response.clone()).unwrap_or_default(),
        };
        Ok(Self { response, outcomes })
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use shipway_client::FileTarget;

    use super::*;

    fn export(kind: &str, attrs: &[(&str, &str)], target: Target) -> Export {
        let attrs = attrs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Export { kind: kind.to_owned(), attrs, target }
    }

    /// Two nodes with a platform each.
    fn parts() -> Vec<Part> {
        let part = |node, platform: &str| Part {
            node,
            platforms: vec![platform.parse().expect("a platform")],
        };
        vec![part(1, "linux/arm64"), part(0, "linux/amd64")]
    }

    fn of(export: Export) -> Result<(Vec<SolveOptions>, Option<Join>)> {
        split(&SolveOptions { exports: vec![export], ..SolveOptions::default() }, &parts())
    }

    #[test]
    fn nodes_push_by_digest_and_tags_get_the_index() {
        let attrs = [
            ("name", "r.io/a:1,r.io/a:2,r.io/b:1"),
            ("push", "true"),
            ("unpack", "true"),
            ("registry.insecure", "true"),
            ("annotation-index.org.x", "y"),
            ("annotation-manifest-descriptor[linux/arm64].k", "v"),
            ("annotation-manifest.k", "v"),
        ];
        let (solves, join) = of(export("image", &attrs, Target::None)).expect("right");
        let join = join.expect("an index");
        let names: Vec<String> = join.names.iter().map(ToString::to_string).collect();
        assert_eq!(names, ["r.io/a:1", "r.io/a:2", "r.io/b:1"]);
        assert!(join.insecure);
        let notes: Vec<&str> = join.annotations.iter().map(|a| a.key.as_str()).collect();
        assert_eq!(notes, ["org.x", "k"]);
        let platforms: Vec<&str> =
            solves.iter().map(|s| s.frontend_attrs["platform"].as_str()).collect();
        assert_eq!(platforms, ["linux/arm64", "linux/amd64"]);
        for solve in &solves {
            assert_eq!(solve.frontend_attrs["multi-platform"], "true");
            let attrs = &solve.exports[0].attrs;
            assert_eq!(attrs["name"], "r.io/a,r.io/b");
            assert_eq!((&*attrs["push-by-digest"], &*attrs["store"]), ("true", "false"));
        }
    }

    #[test]
    fn one_part_is_the_whole_build() {
        let options = SolveOptions {
            exports: vec![export("image", &[("push", "true")], Target::None)],
            ..SolveOptions::default()
        };
        let (solves, join) = split(&options, &parts()[..1]).expect("right");
        assert!(join.is_none());
        assert_eq!(solves[0].exports, options.exports);
        assert!(solves[0].frontend_attrs.is_empty());
    }

    #[test]
    fn what_cannot_be_put_together_is_refused() {
        let file = Target::File(FileTarget::Path(PathBuf::from("x.tar")));
        let dir = |delete| Target::Dir { path: PathBuf::from("x"), delete };
        for (export, why) in [
            (export("oci", &[], file), "oci for multi-node builds currently not supported"),
            (export("local", &[], dir(true)), "delete what is not theirs"),
            (export("image", &[("push", "true")], Target::None), "tag is needed when pushing"),
        ] {
            let refused = of(export).expect_err(why);
            assert!(refused.to_string().contains(why), "{refused}");
        }
        assert!(of(export("local", &[], dir(false))).is_ok());
        let digest = [("push", "true"), ("push-by-digest", "true"), ("name", "r.io/a")];
        assert!(of(export("image", &digest, Target::None)).expect("right").1.is_none());
    }
}
