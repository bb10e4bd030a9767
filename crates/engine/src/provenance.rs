//! What a build's results are made of (rows `at.prov.*`): from the states, the requests that led to
//! them, and what the solver knows.

use crate::build::{BuildScope, CallLog, EngineRef, LazyState};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::Value;
use shipway_attest::{
    BuildConfig, BuildStep, Capture, ImageSource, LayerMap, Parameters, Predicate, ProvenanceMode,
    ProvenanceOptions, Source, SourceInfo,
};
use shipway_fault::{Result, redact_text};
use shipway_llb::{Definition, GitRef, json};
use shipway_oci::{Digest, Platform};
use shipway_ops::LlbOp;
use shipway_refs::ImmutableRef;
use shipway_solver::{SolvedVertex, Vertex, VertexId};
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
};

/// The build's vertices as they were solved on.
pub(crate) struct SolvedVertices(HashMap<VertexId, SolvedVertex<LlbOp>>);

/// What is known of one result.
pub(crate) struct ResultProvenance {
    pub state: Arc<EngineRef>,
    pub capture: Capture,
    pub request: Parameters,
    solved: Arc<SolvedVertices>,
}

impl SolvedVertices {
    pub async fn of(scope: &BuildScope) -> Self {
        Self(scope.job.solved_vertices().await.into_iter().map(|k| (k.vertex.id, k)).collect())
    }

    /// What `top` and everything below it used.
    pub fn capture(&self, top: &Arc<Vertex<LlbOp>>) -> Result<Capture> {
        let mut capture = Capture::default();
        let mut seen = HashSet::from([top.id]);
        let mut queue = vec![top];
        while let Some(vertex) = queue.pop() {
            self.0
                .get(&vertex.id)
                .map_or(vertex, |known| &known.vertex)
                .op
                .capture(&mut capture)?;
            queue
                .extend(vertex.inputs.iter().map(|(input, _)| input).filter(|i| seen.insert(i.id)));
        }
        Ok(capture)
    }

    /// The results of the vertices below `top`, and of `top` itself, which came to `result`. What a
    /// cached result was made from is known by the states below it.
    fn states(
        &self,
        top: &Arc<Vertex<LlbOp>>,
        output: usize,
        result: &ImmutableRef,
    ) -> HashMap<(Digest, usize), ImmutableRef> {
        let mut states = HashMap::from([((top.id.digest, output), result.clone())]);
        let mut seen = HashSet::from([top.id]);
        let mut queue = vec![top.clone()];
        while let Some(vertex) = queue.pop() {
            if let Some(known) = self.0.get(&vertex.id) {
                states.extend(
                    known
                        .outputs
                        .iter()
                        .map(|(output, state)| ((vertex.id.digest, *output), state.clone())),
                );
            }
            queue.extend(
                vertex.inputs.iter().map(|(input, _)| input).filter(|i| seen.insert(i.id)).cloned(),
            );
        }
        let (mut vertex, mut state) = (top.clone(), result.clone());
        while let (Some((input, output)), Some(parent)) =
            (vertex.inputs.first().cloned(), state.parent())
        {
            state = states.entry((input.id.digest, output)).or_insert(parent).clone();
            vertex = input;
        }
        states
    }
}

/// Images without those for other platforms, where there is one for each platform of the result.
fn for_platform(
    images: Vec<ImageSource>,
    current: &Platform,
    all: &[Platform],
) -> Vec<ImageSource> {
    let fits = |image: &ImageSource, wanted: &Platform| {
        image.platform.as_ref().is_some_and(|p| p.rank_for(wanted).is_some())
    };
    let everywhere = |name: &ImageSource| {
        all.iter().all(|p| images.iter().any(|i| i.name == name.name && fits(i, p)))
    };
    let kept = images.iter().filter(|image| match &image.platform {
        Some(p) if everywhere(image) => {
            (&p.os, &p.architecture) == (&current.os, &current.architecture)
        }
        _ => true,
    });
    kept.cloned().collect()
}

/// What is known of `state`, a part of a result for `platforms` of which it is `current`; the other
/// states of the result are `others`.
pub(crate) async fn of_state(
    scope: &BuildScope,
    solved: &Arc<SolvedVertices>,
    state: &Arc<EngineRef>,
    others: &HashSet<String>,
    (current, platforms): (&Platform, &[Platform]),
) -> Result<ResultProvenance> {
    let producers = &scope.shared.producers;
    let mut capture = solved.capture(&state.lazy.vertex)?;
    let Some(log) = state.log.upgrade() else {
        return Ok(ResultProvenance {
            state: state.clone(),
            capture: capture.tidied(),
            request: Parameters::default(),
            solved: solved.clone(),
        });
    };
    // The request has the sources of the result alone, as what else it used has other
    // addresses.
    let request = log.parameters(&capture.sources, producers);
    let mut seen = others.clone();
    seen.insert(state.lazy.id.clone());
    for other in log.states() {
        if other.is_solved() && seen.insert(other.id.clone()) {
            capture.merge(solved.capture(&other.vertex)?);
        }
    }
    for image in for_platform(log.images(), current, platforms) {
        capture.add_image(image);
    }
    Ok(ResultProvenance {
        state: state.clone(),
        capture: capture.tidied(),
        request,
        solved: solved.clone(),
    })
}

/// Makes the requests behind `state` known to those who take it as an input.
pub(crate) async fn add_producer(
    scope: &BuildScope,
    log: &CallLog,
    state: &LazyState,
) -> Result<()> {
    let sources = match state.is_solved() {
        true => SolvedVertices::of(scope).await.capture(&state.vertex)?.sources,
        false => Default::default(),
    };
    let producers = &scope.shared.producers;
    if let Some(request) = log.request(&sources, producers)
        && let Some(producer) = producers.add(&state.definition, request)
    {
        scope.hold_producer(producer);
    }
    Ok(())
}

/// An operation without passwords in the addresses it names.
fn redacted(value: Value) -> Value {
    match value {
        Value::String(text) => Value::String(redact_text(&text)),
        Value::Array(all) => Value::Array(all.into_iter().map(redacted).collect()),
        Value::Object(all) => {
            Value::Object(all.into_iter().map(|(key, value)| (key, redacted(value))).collect())
        }
        other => other,
    }
}

fn steps_of(definition: &Definition) -> Result<(BuildConfig, BTreeMap<String, usize>)> {
    let (mut config, mut positions) = (BuildConfig::default(), BTreeMap::new());
    for (position, op) in json::operations(definition)?.into_iter().enumerate() {
        let id = format!("step{position}");
        config.digests.insert(op.digest.to_string(), id.clone());
        positions.insert(op.digest.to_string(), position);
        let inputs =
            op.inputs.iter().map(|(input, output)| format!("step{input}:{output}")).collect();
        config.steps.push(BuildStep { id, op: redacted(op.op), inputs });
    }
    Ok((config, positions))
}

impl ResultProvenance {
    /// The predicate, without what exporting adds to it.
    pub fn predicate(&self, scope: &BuildScope, options: &ProvenanceOptions) -> Result<Predicate> {
        let mut request = self.request.clone();
        request.compatibility_version = scope.compatibility;
        let mut predicate = Predicate::new(
            &self.capture,
            &request,
            options,
            scope.parts.builder.clone(),
            GitRef::formatted,
        )?;
        predicate.metadata.invocation = scope.invocation.clone();
        predicate.metadata.started = Some(scope.started);
        if options.mode == ProvenanceMode::Min {
            return Ok(predicate);
        }
        let definition = &self.state.lazy.definition;
        let (config, positions) = steps_of(definition)?;
        predicate.steps = Some(config);
        if let Some(map) = definition.source.as_ref().filter(|m| !m.files.is_empty()) {
            let mut source = Source::default();
            for file in &map.files {
                let config = match &file.definition {
                    Some(bytes) => steps_of(&Definition::decode(bytes)?)?.0,
                    None => BuildConfig::default(),
                };
                source.infos.push(SourceInfo {
                    filename: file.filename.clone(),
                    language: file.language.clone(),
                    data: BASE64_STANDARD.encode(&file.data),
                    config,
                });
            }
            for (digest, places) in &map.locations {
                if let Some(position) = positions.get(digest) {
                    source.locations.insert(format!("step{position}"), json::locations(places));
                }
            }
            predicate.metadata.source = Some(source);
        }
        Ok(predicate)
    }

    /// The blobs that there are of the results of steps.
    async fn layers(&self) -> Result<LayerMap> {
        let result = self.state.state().await?;
        let (_, positions) = steps_of(&self.state.lazy.definition)?;
        let mut layers = LayerMap::new();
        let LazyState { vertex, output, .. } = &*self.state.lazy;
        for ((digest, output), state) in self.solved.states(vertex, *output, &result) {
            let (Some(position), Some(known)) =
                (positions.get(&digest.to_string()), state.known_layers())
            else {
                continue;
            };
            let blobs: Option<Vec<_>> = known.into_iter().map(|l| l.blob).collect();
            if let Some(mut blobs) = blobs.filter(|b| !b.is_empty()) {
                blobs
                    .iter_mut()
                    .for_each(|b| b.annotations.retain(|k, _| !shipway_exporters::is_internal(k)));
                layers.entry(format!("step{position}:{output}")).or_default().push(blobs);
            }
        }
        Ok(layers)
    }

    /// The predicate as it is written: pretty JSON.
    pub async fn written(&self, scope: &BuildScope, mut predicate: Predicate) -> Result<Vec<u8>> {
        predicate.metadata.finished = Some(scope.finished());
        predicate.metadata.usage = scope.usage();
        if predicate.steps.is_some() {
            predicate.metadata.layers = self.layers().await?;
        }
        serde_json::to_vec_pretty(&predicate.json())
            .map_err(|e| shipway_fault::Fault::internal(format!("encode provenance: {e}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_of_other_platforms_are_left_out_if_there_is_one_for_each() {
        let image = |name: &str, platform: &str| ImageSource {
            name: name.parse().unwrap(),
            platform: Some(platform.parse().unwrap()),
            digest: None,
            local: false,
            stored: None,
        };
        let all: Vec<Platform> = ["linux/amd64", "linux/arm64"].map(|p| p.parse().unwrap()).into();
        let images = vec![
            image("a", "linux/amd64"),
            image("a", "linux/arm64"),
            image("tool", "linux/amd64"),
        ];
        let kept = for_platform(images, &all[1], &all);
        let names: Vec<String> = kept
            .iter()
            .map(|i| format!("{} {}", i.name.familiar(), i.platform.as_ref().unwrap()))
            .collect();
        assert_eq!(names, ["a:latest linux/arm64", "tool:latest linux/amd64"]);
    }
}
