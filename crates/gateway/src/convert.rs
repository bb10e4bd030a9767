//! The port's types to and from the wire.

use crate::build::GatewayBuild;
use bytes::Bytes;
use shipway_attest::{Attestation, Kind, SubjectKind, SubjectSpec};
use shipway_fault::{Fault, Position, Result, SourceFile, Span};
use shipway_frontend::{BuildAttestation, BuildRef, FileStat, FrontendResult};
use shipway_grpc::platform_of;
use shipway_llb::{Definition, ResolveMode, SourcePolicy};
use shipway_oci::{ChecksumAlgorithm, Platform};
use shipway_proto::{
    fsutil::types::Stat,
    moby::buildkit::v1::{frontend as wire, sourcepolicy::Policy},
    pb,
};
use std::{collections::BTreeMap, sync::Arc};

pub(crate) fn platform(p: Option<pb::Platform>) -> Option<Platform> {
    p.map(|p| platform_of(p).normalized())
}

pub(crate) fn mode(text: &str) -> Result<ResolveMode> {
    match ResolveMode::parse(text) {
        Some(mode) => Ok(mode),
        None => Err(Fault::invalid(format!("invalid resolvemode: {text}"))
            .hint("want default, pull or local")),
    }
}

pub(crate) fn policies(all: Vec<Policy>) -> Result<Vec<SourcePolicy>> {
    all.into_iter().map(SourcePolicy::from_pb).collect()
}

/// The checksum of a file that is asked for, with what is to follow the file's bytes.
pub(crate) fn checksum(request: wire::ChecksumRequest) -> Result<(ChecksumAlgorithm, Bytes)> {
    use wire::checksum_request::ChecksumAlgo;
    let algorithm = match ChecksumAlgo::try_from(request.algo) {
        Ok(ChecksumAlgo::Sha256) => ChecksumAlgorithm::Sha256,
        Ok(ChecksumAlgo::Sha384) => ChecksumAlgorithm::Sha384,
        Ok(ChecksumAlgo::Sha512) => ChecksumAlgorithm::Sha512,
        Err(_) => {
            return Err(Fault::invalid(format!("unsupported checksum algorithm {}", request.algo)));
        }
    };
    Ok((algorithm, request.suffix.into()))
}

pub(crate) fn definitions(map: BTreeMap<String, pb::Definition>) -> BTreeMap<String, Definition> {
    map.into_iter().map(|(name, def)| (name, Definition::from_pb(def))).collect()
}

/// A range of a file: offset and length.
pub(crate) fn range(range: wire::FileRange) -> Result<(u64, u64)> {
    let offset = u64::try_from(range.offset).map_err(|_| Fault::invalid("negative offset"))?;
    Ok((offset, u64::try_from(range.length).map_err(|_| Fault::invalid("negative length"))?))
}

pub(crate) fn stat(s: FileStat) -> Stat {
    Stat {
        path: s.path,
        mode: s.mode,
        uid: s.uid,
        gid: s.gid,
        size: s.size,
        mod_time: s.mod_time,
        linkname: s.linkname,
        devmajor: s.dev_major,
        devminor: s.dev_minor,
        xattrs: s.xattrs,
    }
}

/// A definition for a client, without what Go's clients trip over: see [`no_empty_places`].
pub(crate) fn definition_to_wire(definition: &Definition) -> pb::Definition {
    let mut wire = definition.to_pb();
    no_empty_places(&mut wire);
    wire
}

/// Leaves operations from nowhere out of the source maps, those of the files' own definitions
/// included: a map's empty message is left out by our encoder, and Go's fast decoder then makes a
/// nil of it that its users trip over.
fn no_empty_places(definition: &mut pb::Definition) {
    let Some(source) = &mut definition.source else { return };
    source.locations.retain(|_, places| !places.locations.is_empty());
    source.infos.iter_mut().filter_map(|info| info.definition.as_mut()).for_each(no_empty_places);
}

/// A result for the client; references are remembered in `build`. `arrays` is the client's
/// `allowResultArrayRef`.
pub(crate) fn result_to_wire(
    build: &GatewayBuild,
    result: &FrontendResult,
    arrays: bool,
) -> Result<wire::Result> {
    for state in result.states() {
        build.keep(state)?;
    }
    let id = |state: &Option<Arc<dyn BuildRef>>| {
        state.as_ref().map(|r| r.id().to_owned()).unwrap_or_default()
    };
    // Scratch has an empty definition rather than none: a map's empty message is left out by our
    // encoder, and Go's fast decoder makes a nil of it.
    let definition = |state: &Option<Arc<dyn BuildRef>>| match state {
        None => Some(pb::Definition::default()),
        Some(r) => r.definition().map(definition_to_wire),
    };
    let full =
        |state: &Option<Arc<dyn BuildRef>>| wire::Ref { id: id(state), def: definition(state) };
    let payload = match (&result.single, arrays) {
        (Some(state), true) => Some(wire::result::Result::Ref(full(state))),
        (Some(state), false) => Some(wire::result::Result::RefDeprecated(id(state))),
        (None, true) => Some(wire::result::Result::Refs(wire::RefMap {
            refs: result.map.iter().map(|(k, v)| (k.clone(), full(v))).collect(),
        })),
        (None, false) => Some(wire::result::Result::RefsDeprecated(wire::RefMapDeprecated {
            refs: result.map.iter().map(|(k, v)| (k.clone(), id(v))).collect(),
        })),
    };
    let one = |a: &BuildAttestation| wire::Attestation {
        kind: if a.kind == Kind::Bundle {
            wire::AttestationKind::Bundle
        } else {
            wire::AttestationKind::InToto
        } as i32,
        metadata: a.metadata.clone(),
        r#ref: a.content.is_some().then(|| full(&a.content)),
        path: a.path.clone(),
        in_toto_predicate_type: a.predicate_type.clone(),
        in_toto_subjects: a.subjects.iter().map(subject_to_wire).collect(),
    };
    let list = |all: &Vec<BuildAttestation>| wire::Attestations {
        attestation: all.iter().map(one).collect(),
    };
    let attestations = result.attestations.iter().map(|(k, all)| (k.clone(), list(all))).collect();
    Ok(wire::Result { result: payload, metadata: result.metadata.clone(), attestations })
}

fn subject_to_wire(s: &SubjectSpec) -> wire::InTotoSubject {
    let kind = if s.kind == SubjectKind::Raw {
        wire::InTotoSubjectKind::Raw
    } else {
        wire::InTotoSubjectKind::Self_
    };
    let digest = s.digests.iter().map(|(algorithm, hex)| format!("{algorithm}:{hex}")).collect();
    wire::InTotoSubject { kind: kind as i32, digest, name: s.name.clone() }
}

fn subject(s: wire::InTotoSubject) -> Result<SubjectSpec> {
    let kind = match wire::InTotoSubjectKind::try_from(s.kind) {
        Ok(wire::InTotoSubjectKind::Self_) => SubjectKind::Itself,
        Ok(wire::InTotoSubjectKind::Raw) => SubjectKind::Raw,
        Err(_) => {
            return Err(Fault::invalid(format!("unknown attestation subject type {}", s.kind)));
        }
    };
    let split = |d: &String| match d.split_once(':') {
        Some((algorithm, hex)) => Ok((algorithm.to_owned(), hex.to_owned())),
        None => Err(Fault::invalid(format!("invalid digest {d:?} of an attestation's subject"))),
    };
    Ok(SubjectSpec {
        kind,
        name: s.name,
        digests: s.digest.iter().map(split).collect::<Result<_>>()?,
    })
}

fn attestation(build: &GatewayBuild, a: wire::Attestation) -> Result<BuildAttestation> {
    let kind = match wire::AttestationKind::try_from(a.kind) {
        Ok(wire::AttestationKind::InToto) => Kind::InToto,
        Ok(wire::AttestationKind::Bundle) => Kind::Bundle,
        Err(_) => return Err(Fault::invalid(format!("unknown attestation kind {}", a.kind))),
    };
    let content = match a.r#ref.filter(|r| !r.id.is_empty()) {
        Some(r) => Some(build.find(&r.id)?),
        None => None,
    };
    Ok(Attestation {
        kind,
        path: a.path,
        metadata: a.metadata,
        predicate_type: a.in_toto_predicate_type,
        subjects: a.in_toto_subjects.into_iter().map(subject).collect::<Result<_>>()?,
        content,
    })
}

/// What the client returned, its references resolved in `build`.
pub(crate) fn result_from_wire(
    build: &GatewayBuild,
    result: wire::Result,
) -> Result<FrontendResult> {
    let find = |id: String| if id.is_empty() { Ok(None) } else { build.find(&id).map(Some) };
    let mut out = FrontendResult { metadata: result.metadata, ..FrontendResult::default() };
    for (platform, all) in result.attestations {
        let all = all
            .attestation
            .into_iter()
            .map(|a| attestation(build, a))
            .collect::<Result<Vec<_>>>()?;
        out.attestations.insert(platform, all);
    }
    match result.result {
        None => out.single = Some(None),
        Some(wire::result::Result::RefDeprecated(id)) => out.single = Some(find(id)?),
        Some(wire::result::Result::Ref(r)) => out.single = Some(find(r.id)?),
        Some(wire::result::Result::RefsDeprecated(m)) => {
            for (k, id) in m.refs {
                out.map.insert(k, find(id)?);
            }
        }
        Some(wire::result::Result::Refs(m)) => {
            for (k, r) in m.refs {
                out.map.insert(k, find(r.id)?);
            }
        }
    }
    Ok(out)
}

pub(crate) fn source_file(info: pb::SourceInfo) -> SourceFile {
    use prost::Message as _;
    SourceFile {
        filename: info.filename,
        language: info.language,
        data: info.data,
        definition: info.definition.map(|d| d.encode_to_vec()),
    }
}

pub(crate) fn spans(ranges: Vec<pb::Range>) -> Vec<Span> {
    let position = |p: Option<pb::Position>| {
        p.map(|p| Position { line: p.line, character: p.character }).unwrap_or_default()
    };
    ranges.into_iter().map(|r| Span { start: position(r.start), end: position(r.end) }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_source_map_has_empty_places_at_any_depth() {
        let with = |definition: Option<pb::Definition>| pb::Definition {
            source: Some(pb::Source {
                locations: [
                    ("a".to_owned(), pb::Locations::default()),
                    ("b".to_owned(), pb::Locations { locations: vec![pb::Location::default()] }),
                ]
                .into(),
                infos: vec![pb::SourceInfo { definition, ..Default::default() }],
            }),
            ..Default::default()
        };
        let wire = definition_to_wire(&Definition::from_pb(with(Some(with(None)))));
        let outer = wire.source.unwrap();
        let inner = outer.infos[0].definition.as_ref().and_then(|d| d.source.as_ref()).unwrap();
        for source in [&outer, inner] {
            assert_eq!(source.locations.keys().collect::<Vec<_>>(), ["b"]);
        }
    }
}
