//! A bridge that answers from a text and writes down what it was asked.

use crate::files::Files;
use futures::{FutureExt as _, future::BoxFuture};
use parking_lot::Mutex;
use shipway_dockerfile2llb::DockerfileFrontend;
use shipway_fault::{Detail, Fault, Result, Span};
use shipway_frontend::{
    Bridge, Frontend, FrontendOptions, FrontendResult, SolveRequest, SourceMeta, SourceRequest,
    Warning,
};
use shipway_gocompat::quote;
use shipway_llb::{Definition, GitFacts, ImageFacts, SourceFacts};
use shipway_oci::{Digest, Platform};
use std::{collections::BTreeMap, sync::Arc};

/// Sections of a text by name.
pub struct Case(BTreeMap<String, String>);

impl Case {
    /// Sections begin with `-- name --`.
    pub fn parse(text: &str) -> Self {
        let mut sections: BTreeMap<String, String> = BTreeMap::new();
        let mut current = String::new();
        for line in text.split_inclusive('\n') {
            match line.strip_prefix("-- ").and_then(|l| l.strip_suffix(" --\n")) {
                Some(name) => {
                    current = name.to_owned();
                    sections.insert(current.clone(), String::new());
                }
                None => sections.entry(current.clone()).or_default().push_str(line),
            }
        }
        Self(sections)
    }

    /// What is expected.
    pub fn want(&self) -> &str {
        self.0.get("want").map(String::as_str).unwrap_or_default()
    }

    /// What the frontend does with it.
    pub async fn run(&self, images: &str) -> String {
        let (fake, result) = self.build(images).await;
        let mut blocks = fake.blocks.lock().clone();
        blocks.sort();
        blocks.concat() + &tail(result)
    }

    /// A section's text.
    pub fn section(&self, name: &str) -> &str {
        self.0.get(name).map(String::as_str).unwrap_or_default()
    }

    /// Runs the frontend.
    pub async fn build(&self, images: &str) -> (Arc<Fake>, Result<FrontendResult>) {
        let options = self.0.get("opts").map(String::as_str).unwrap_or_default();
        let options = options
            .lines()
            .filter_map(|l| l.split_once('='))
            .map(|(k, v)| (k.into(), v.into()))
            .collect();
        let fake = Arc::new(Fake {
            options,
            files: Arc::new(self.0.clone()),
            images: serde_json::from_str(images).unwrap(),
            blocks: Mutex::default(),
        });
        let result = DockerfileFrontend.run(fake.clone()).await;
        (fake, result)
    }
}

fn tail(result: Result<FrontendResult>) -> String {
    let mut out = String::new();
    match result {
        Err(fault) => {
            out += &format!("error {fault}\n");
            for detail in fault.details() {
                if let Detail::Source { spans, .. } = detail {
                    out += &format!("  @{}\n", lines(spans));
                }
            }
        }
        Ok(result) => {
            for (key, value) in &result.metadata {
                let text = serde_json::from_slice(value)
                    .map(|v| sorted(&v))
                    .unwrap_or_else(|_| String::from_utf8_lossy(value).trim().into());
                out += &format!("meta {key} {text}\n");
            }
            let refs: Vec<&str> = result.map.keys().map(String::as_str).collect();
            out += &format!("refs [{}] single {}\n", refs.join(" "), result.single.is_some());
        }
    }
    out
}

/// JSON with sorted keys.
fn sorted(value: &serde_json::Value) -> String {
    use serde_json::Value;
    match value {
        Value::Object(map) => {
            let sorted: BTreeMap<_, _> = map.iter().collect();
            let members: Vec<String> = sorted
                .iter()
                .map(|(k, v)| format!("{}:{}", serde_json::to_string(k).unwrap(), self::sorted(v)))
                .collect();
            format!("{{{}}}", members.join(","))
        }
        Value::Array(items) => {
            format!("[{}]", items.iter().map(sorted).collect::<Vec<_>>().join(","))
        }
        other => other.to_string(),
    }
}

fn lines(spans: &[Span]) -> String {
    spans.iter().map(|s| s.start.line.to_string()).collect::<Vec<_>>().join(",")
}

/// The bridge.
pub struct Fake {
    options: FrontendOptions,
    files: Arc<BTreeMap<String, String>>,
    images: BTreeMap<String, Box<serde_json::value::RawValue>>,
    blocks: Mutex<Vec<String>>,
}

impl Fake {
    fn add(&self, block: String) {
        self.blocks.lock().push(block);
    }
}

/// The operations of a definition, one per line.
fn dump(definition: &Definition) -> String {
    let mut out = String::from("solve\n");
    for op in &definition.ops {
        let digest = Digest::of(op).to_string();
        let metadata = definition.metadata.get(&digest).cloned().unwrap_or_default();
        out += &format!("  {}", &digest[7..23]);
        if let Some(name) = metadata.description.get("llb.customname") {
            out += &format!(" {}", quote(name));
        }
        if let Some(command) = metadata.description.get("com.docker.dockerfile.v1.command") {
            out += &format!(" cmd={}", quote(command));
        }
        if metadata.ignore_cache {
            out += " ignore";
        }
        if metadata.resources.is_some() {
            out += " resources";
        }
        for (_, spans) in definition.source.iter().flat_map(|s| s.find(&digest)) {
            out += &format!(" @{}", lines(spans));
        }
        out += &format!(" {}\n", metadata.caps.into_iter().collect::<Vec<_>>().join(" "));
    }
    out
}

impl Bridge for Fake {
    fn options(&self) -> &FrontendOptions {
        &self.options
    }

    fn session(&self) -> &str {
        "sess"
    }

    fn platforms(&self) -> Vec<Platform> {
        vec![Platform::new("linux", "amd64", ""), Platform::new("linux", "386", "")]
    }

    fn solve(&self, request: SolveRequest) -> BoxFuture<'_, Result<FrontendResult>> {
        async move {
            if !request.frontend.is_empty() {
                return Err(Fault::unknown(format!(
                    "frontend {} of {}",
                    request.frontend, request.options["source"]
                )));
            }
            let Some(definition) = request.definition else {
                self.add("solve\n".into());
                return Ok(FrontendResult::of(None));
            };
            self.add(dump(&definition));
            Ok(FrontendResult::of(Some(Files::of(&definition, &self.files)?)))
        }
        .boxed()
    }

    fn resolve_source(&self, request: SourceRequest) -> BoxFuture<'_, Result<SourceMeta>> {
        async move {
            let name = request.identifier.split_once("://").unwrap().1.to_owned();
            if request.options.git_objects {
                self.add(format!("resolve {} {}\n", request.identifier, quote(&request.log_name)));
                let commit_object =
                    "commit 1\0tree 1\ncommitter a b <a@b> 1700000000 +0100\n\nwhy\n".into();
                let git = Some(GitFacts { commit_object, ..Default::default() });
                return Ok(SourceMeta {
                    facts: SourceFacts { git, ..Default::default() },
                    ..Default::default()
                });
            }
            let platform = request.platform.map(|p| p.to_string()).unwrap_or_default();
            self.add(format!("resolve {name} {platform} {}\n", quote(&request.log_name)));
            let config =
                self.images.get(&format!("{name} {platform}")).or_else(|| self.images.get(&name));
            let config = config.ok_or_else(|| Fault::not_found(format!("{name}: not found")))?;
            let image = ImageFacts {
                digest: Digest::of(&name),
                name,
                config: config.get().to_owned().into(),
                attestations: None,
            };
            Ok(SourceMeta {
                facts: SourceFacts { image: Some(image), ..Default::default() },
                ..Default::default()
            })
        }
        .boxed()
    }

    fn inputs(&self) -> BoxFuture<'_, Result<BTreeMap<String, Definition>>> {
        async move { Ok(BTreeMap::new()) }.boxed()
    }

    fn local_names<'a>(
        &'a self,
        local: &'a str,
        session: &'a str,
        dir: &'a str,
    ) -> BoxFuture<'a, Result<Vec<String>>> {
        async move {
            assert_eq!((local, session), ("context", "sess"));
            Ok(self
                .files
                .get(&format!("names {dir}"))
                .map(|n| n.lines().map(str::to_owned).collect())
                .unwrap_or_default())
        }
        .boxed()
    }

    fn warn(&self, warning: Warning) -> BoxFuture<'_, Result<()>> {
        async move {
            self.add(format!("warn {} {} {}\n", warning.short, warning.url, lines(&warning.spans)));
            Ok(())
        }
        .boxed()
    }
}
