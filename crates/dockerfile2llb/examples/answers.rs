//! What the frontend answers, as lines of JSON that can be compared with those of another
//! implementation (`cargo xtask llb`).
//!
//! Reads cases from standard input, one JSON object after another: `name`, `files` (by path;
//! `Dockerfile` is one) and `opts`. The one argument is a file of images: `names` has image configs
//! by full name, with null for images that are not there; any other name has a config of the list
//! `default`, chosen by the sum of the bytes of name and platform. For every case five lines go
//! out, one per request: a build and the subrequests `outline`, `targets`, `lint` and `convertllb`.
#![allow(clippy::unwrap_used)]

#[path = "../tests/it/files.rs"]
mod files;

use base64::Engine as _;
use files::Files;
use futures::{FutureExt as _, future::BoxFuture};
use parking_lot::Mutex;
use serde_json::{Map, Value, json, value::RawValue};
use shipway_dockerfile2llb::DockerfileFrontend;
use shipway_fault::{Detail, Fault, Result, Span};
use shipway_frontend::{
    Bridge, Frontend, FrontendOptions, FrontendResult, SolveRequest, SourceMeta, SourceRequest,
    Warning,
};
use shipway_llb::{Definition, ImageFacts, SourceFacts};
use shipway_oci::{Digest, Platform};
use std::{collections::BTreeMap, io::Write as _, sync::Arc};

const REQUESTS: [&str; 5] = ["build", "outline", "targets", "lint", "convertllb"];

#[derive(serde::Deserialize)]
struct Case {
    name: String,
    files: BTreeMap<String, String>,
    #[serde(default)]
    opts: FrontendOptions,
}

#[derive(serde::Deserialize)]
struct Images {
    default: Vec<Box<RawValue>>,
    names: BTreeMap<String, Option<Box<RawValue>>>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let images = std::env::args().nth(1).expect("the first argument is a file of images");
    let images: Arc<Images> =
        Arc::new(serde_json::from_slice(&std::fs::read(images).unwrap()).unwrap());
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    for case in serde_json::Deserializer::from_reader(std::io::BufReader::new(std::io::stdin()))
        .into_iter::<Case>()
    {
        let case = case.unwrap();
        let files = Arc::new(case.files);
        for request in REQUESTS {
            let mut options = case.opts.clone();
            if request != "build" {
                options.insert("requestid".into(), format!("frontend.{request}"));
            }
            let scene = Arc::new(Scene {
                options,
                files: files.clone(),
                images: images.clone(),
                heard: Mutex::default(),
            });
            let result = DockerfileFrontend.run(scene.clone()).await;
            let mut answer = answer(result);
            let heard = std::mem::take(&mut *scene.heard.lock());
            for (name, list) in
                [("solves", heard.solves), ("warns", heard.warnings), ("asked", heard.asked)]
            {
                if !list.is_empty() {
                    answer.insert(name.into(), list.into());
                }
            }
            answer.insert("name".into(), json!(case.name));
            answer.insert("request".into(), json!(request));
            writeln!(out, "{}", Value::Object(answer)).unwrap();
        }
    }
}

fn answer(result: Result<FrontendResult>) -> Map<String, Value> {
    let mut out = Map::new();
    match result {
        Err(fault) => {
            out.insert("error".into(), json!(fault.to_string()));
            let places = fault.details().iter().filter_map(|d| match d {
                Detail::Source { spans, .. } => Some(ranges(spans)),
                _ => None,
            });
            let places: Vec<Value> = places.collect();
            if !places.is_empty() {
                out.insert("sources".into(), places.into());
            }
        }
        Ok(result) => {
            let text = |v: &Vec<u8>| json!(String::from_utf8_lossy(v));
            out.insert(
                "meta".into(),
                result
                    .metadata
                    .iter()
                    .map(|(k, v)| (k.clone(), text(v)))
                    .collect::<Map<_, _>>()
                    .into(),
            );
            let mut refs: Vec<&str> = result.map.keys().map(String::as_str).collect();
            // Scratch is no reference, but a target of its own.
            refs.extend(result.single.is_some().then_some("single"));
            if !refs.is_empty() {
                out.insert("refs".into(), json!(refs));
            }
        }
    }
    out
}

fn ranges(spans: &[Span]) -> Value {
    spans
        .iter()
        .map(|s| json!([s.start.line, s.start.character, s.end.line, s.end.character]))
        .collect()
}

#[derive(Default)]
struct Heard {
    solves: Vec<Value>,
    warnings: Vec<Value>,
    asked: Vec<Value>,
}

struct Scene {
    options: FrontendOptions,
    files: Arc<BTreeMap<String, String>>,
    images: Arc<Images>,
    heard: Mutex<Heard>,
}

impl Bridge for Scene {
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
            let definition = request.definition.unwrap_or_default();
            self.heard
                .lock()
                .solves
                .push(base64::engine::general_purpose::STANDARD.encode(definition.encode()).into());
            if definition.is_empty() {
                return Ok(FrontendResult::of(None));
            }
            Ok(FrontendResult::of(Some(Files::of(&definition, &self.files)?)))
        }
        .boxed()
    }

    fn resolve_source(&self, request: SourceRequest) -> BoxFuture<'_, Result<SourceMeta>> {
        async move {
            let Some(name) = request
                .identifier
                .strip_prefix("docker-image://")
                .or_else(|| request.identifier.strip_prefix("oci-layout://"))
            else {
                return Err(Fault::unknown("no metadata"));
            };
            let platform = request
                .platform
                .map(|p| Platform { os_version: String::new(), ..p }.to_string())
                .unwrap_or_default();
            self.heard.lock().asked.push(json!(format!("{name} {platform} {}", request.log_name)));
            let key = format!("{name} {platform}");
            let config = match self.images.names.get(name) {
                Some(Some(config)) => config.get(),
                Some(None) => return Err(Fault::not_found(format!("{name}: not found"))),
                None => self.images.default
                    [key.bytes().map(usize::from).sum::<usize>() % self.images.default.len()]
                .get(),
            };
            let image = ImageFacts {
                digest: Digest::of(&key),
                name: name.to_owned(),
                config: config.to_owned().into(),
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

    fn warn(&self, warning: Warning) -> BoxFuture<'_, Result<()>> {
        async move {
        let detail = warning.detail.join("\n");
        let warning = json!({"short": warning.short, "detail": detail, "url": warning.url, "ranges": ranges(&warning.spans)});
        self.heard.lock().warnings.push(warning);
        Ok(())
    }.boxed()
    }
}
