//! What is said about a build's results: by its frontends, by a scanner, and by the daemon (rows
//! `at.*`).

mod sbom;

use crate::{
    build::{Build, BuildScope},
    export,
    provenance::{ResultProvenance, SolvedVertices, of_state},
};
use shipway_attest::{
    AttestOptions, Attestation, Kind, ProvenanceMode, ProvenanceOptions, SPDX, SlsaVersion, keys,
    slsa,
};
use shipway_exporters::{Content, ExportAttestation, ExportInput};
use shipway_fault::{Fault, Result};
use shipway_frontend::{FrontendOptions, FrontendResult};
use shipway_oci::Platform;
use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
};

/// What is known of each result: with its platform's id, where there are several.
pub(crate) type Attested = Vec<(Option<String>, Arc<ResultProvenance>)>;

/// Adds what was asked for to `input`, the solved `result`; gives what is known of the result, for
/// the history.
pub(crate) async fn add(
    build: &Arc<Build>,
    wanted: &AttestOptions,
    options: &FrontendOptions,
    result: &FrontendResult,
    input: &mut ExportInput,
) -> Result<Attested> {
    let known = collect(build, result, input).await?;
    input.attestations = given(build, result).await?;
    let scanned = input.attestations.values().flatten().any(|a| a.predicate_type == SPDX);
    if let Some(sbom) = wanted.sbom.as_ref().filter(|_| !scanned) {
        for (platform, found) in sbom::scan(build, sbom, options, &known).await? {
            input.attestations.entry(platform).or_default().push(found);
        }
    }
    if let Some(options) = &wanted.provenance {
        for (platform, known) in &known {
            let made = provenance_of(&build.scope, known, options)?;
            input.attestations.entry(platform.clone()).or_default().push(made);
        }
    }
    let single = result.single.is_some();
    Ok(known.into_iter().map(|(platform, known)| ((!single).then_some(platform), known)).collect())
}

async fn collect(
    build: &Build,
    result: &FrontendResult,
    input: &ExportInput,
) -> Result<BTreeMap<String, Arc<ResultProvenance>>> {
    let (scope, states) = (&build.scope, &build.states);
    let solved = Arc::new(SolvedVertices::of(scope).await);
    let ids: HashSet<String> = result.states().map(|s| s.id().to_owned()).collect();
    let platforms: Vec<Platform> = input.platforms.iter().map(|p| p.platform.clone()).collect();
    // Without a list of platforms nothing is left out for one.
    let platforms =
        if result.metadata.contains_key("refs.platforms") { platforms } else { Vec::new() };
    let mut known = BTreeMap::new();
    for p in &input.platforms {
        let state = result.map.get(&p.id).or(result.single.as_ref()).and_then(Option::as_ref);
        // Scratch is made of nothing.
        if let Some(state) = state.and_then(|state| states.find(state.as_ref())) {
            known.insert(
                p.id.clone(),
                Arc::new(of_state(scope, &solved, &state, &ids, (&p.platform, &platforms)).await?),
            );
        }
    }
    Ok(known)
}

/// What frontends say.
async fn given(
    build: &Build,
    result: &FrontendResult,
) -> Result<BTreeMap<String, Vec<ExportAttestation>>> {
    let mut out: BTreeMap<String, Vec<ExportAttestation>> = BTreeMap::new();
    for (platform, all) in &result.attestations {
        for attestation in all {
            attestation.check()?;
            if attestation.kind == Kind::InToto
                && attestation.predicate_type.starts_with(slsa::PREFIX)
            {
                return Err(Fault::invalid("frontend may not set provenance attestations"));
            }
            if attestation.content.is_none() {
                return Err(Fault::invalid("attestation does not have available content"));
            }
            let state = export::state_of(build, &attestation.content).await?;
            out.entry(platform.clone())
                .or_default()
                .push(attestation.clone().with(Content::State(state)));
        }
    }
    Ok(out)
}

fn provenance_of(
    scope: &Arc<BuildScope>,
    known: &Arc<ResultProvenance>,
    options: &ProvenanceOptions,
) -> Result<ExportAttestation> {
    let predicate = known.predicate(scope, options)?;
    let metadata = BTreeMap::from([
        (keys::REASON.to_owned(), b"provenance".to_vec()),
        (keys::INLINE_ONLY.to_owned(), options.inline_only.to_string().into_bytes()),
    ]);
    let predicate_type = predicate.kind().to_owned();
    let (scope, known) = (scope.clone(), known.clone());
    let make = move || {
        let (scope, known, predicate) = (scope.clone(), known.clone(), predicate.clone());
        Box::pin(async move { known.written(&scope, predicate).await })
            as futures::future::BoxFuture<'static, _>
    };
    Ok(Attestation {
        kind: Kind::InToto,
        path: options.file().to_owned(),
        metadata,
        predicate_type,
        subjects: Vec::new(),
        content: Content::Made(Arc::new(make)),
    })
}

/// Provenance for the history, which has it whether it was asked for or not (row
/// `at.prov.history`).
pub(crate) async fn record(
    scope: &BuildScope,
    wanted: &AttestOptions,
    attested: &Attested,
) -> Result<Vec<(Option<String>, Vec<u8>)>> {
    let builder_id = wanted.provenance.as_ref().map(|p| p.builder_id.clone()).unwrap_or_default();
    let options = ProvenanceOptions {
        mode: ProvenanceMode::Max,
        version: SlsaVersion::V1,
        builder_id,
        ..ProvenanceOptions::default()
    };
    let mut out = Vec::new();
    for (platform, known) in attested {
        out.push((
            platform.clone(),
            known.written(scope, known.predicate(scope, &options)?).await?,
        ));
    }
    Ok(out)
}
