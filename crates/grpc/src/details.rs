//! Typed error details as Go clients read them: `Any` messages whose value is JSON.
//!
//! Two dialects are in use. `Solve` is canonical protobuf JSON; every other type is what Go's
//! `encoding/json` makes of the generated struct, which is protobuf JSON with original field names
//! and plain numbers. Both are written from descriptors.

use std::{
    panic::Location,
    sync::{Arc, LazyLock},
};

use prost::Message;
use prost_reflect::{DescriptorPool, DeserializeOptions, DynamicMessage, SerializeOptions};
use prost_types::Any;
use shipway_fault::{Detail, Fault, IncompleteMaterial, Position, SourceFile, Span, Subject};
use shipway_proto::{errdefs, pb};

const PREFIX: &str = "github.com/moby/buildkit/";
const SUFFIX: &str = "+json";
const EXIT: &str = "gatewayapi.ExitMessage";
/// Most frames of a stack that are reported.
const MAX_FRAMES: usize = 64;

static POOL: LazyLock<Option<DescriptorPool>> = LazyLock::new(|| {
    DescriptorPool::decode(&include_bytes!(concat!(env!("OUT_DIR"), "/errdefs.bin"))[..])
        .inspect_err(|error| tracing::error!(%error, "the embedded error descriptors are broken"))
        .ok()
});

/// The message of `detail`, unless it cannot be expressed.
pub(crate) fn encode(detail: &Detail) -> Option<Any> {
    match detail {
        Detail::Vertex(digest) => {
            go_json("errdefs.Vertex", &errdefs::Vertex { digest: digest.clone() })
        }
        Detail::Source { file, spans } => go_json("errdefs.Source", &source(file, spans)),
        Detail::Solve { input_ids, mount_ids, op, subject, description } => {
            let message = errdefs::Solve {
                input_i_ds: input_ids.clone(),
                mount_i_ds: mount_ids.clone(),
                op: if op.is_empty() { None } else { pb::Op::decode(&op[..]).ok() },
                subject: subject.map(|s| match s {
                    Subject::FileAction(index) => {
                        errdefs::solve::Subject::File(errdefs::FileAction { index })
                    }
                    Subject::CacheInput(index) => {
                        errdefs::solve::Subject::Cache(errdefs::ContentCache { index })
                    }
                }),
                description: description.clone(),
            };
            json("errdefs.Solve", &message, &SerializeOptions::new())
        }
        Detail::Frontend { name, source } => go_json(
            "errdefs.Frontend",
            &errdefs::Frontend { name: name.clone(), source: source.clone() },
        ),
        Detail::FrontendCap(name) => {
            go_json("errdefs.FrontendCap", &errdefs::FrontendCap { name: name.clone() })
        }
        Detail::Subrequest(name) => {
            go_json("errdefs.Subrequest", &errdefs::Subrequest { name: name.clone() })
        }
        Detail::IncompleteMaterials(all) => {
            let one = |m: &IncompleteMaterial| errdefs::ProvenanceMaterialIncomplete {
                op: m.op.clone(),
                name: m.name.clone(),
                method: m.method.clone(),
                uri: m.uri.clone(),
                final_uri: m.final_uri.clone(),
                reason: m.reason.clone(),
            };
            let message = errdefs::ProvenanceMaterialsIncomplete {
                incomplete: all.iter().map(one).collect(),
            };
            go_json("errdefs.ProvenanceMaterialsIncomplete", &message)
        }
        Detail::Compatibility { version, feature } => {
            let message =
                errdefs::CompatibilityFeature { version: *version, feature: feature.clone() };
            go_json("errdefs.CompatibilityFeature", &message)
        }
        Detail::Exit(code) => {
            Some(any(EXIT, serde_json::json!({ "Code": code }).to_string().into_bytes()))
        }
        Detail::Opaque { type_url, value } => {
            Some(Any { type_url: type_url.clone(), value: value.clone() })
        }
        _ => None,
    }
}

/// The detail in `any`, if it is of a type we know.
pub(crate) fn decode(any: &Any) -> Option<Detail> {
    let name = any.type_url.strip_prefix(PREFIX)?.strip_suffix(SUFFIX)?;
    let value = &any.value[..];
    Some(match name {
        "errdefs.Vertex" => Detail::Vertex(parse::<errdefs::Vertex>(name, value)?.digest),
        "errdefs.Source" => {
            let message = parse::<errdefs::Source>(name, value)?;
            let info = message.info.unwrap_or_default();
            let file = SourceFile {
                filename: info.filename,
                language: info.language,
                data: info.data,
                definition: info.definition.map(|d| d.encode_to_vec()),
            };
            Detail::Source {
                file: Arc::new(file),
                spans: message.ranges.into_iter().map(span).collect(),
            }
        }
        "errdefs.Solve" => {
            let message = parse::<errdefs::Solve>(name, value)?;
            Detail::Solve {
                input_ids: message.input_i_ds,
                mount_ids: message.mount_i_ds,
                op: message.op.map(|op| op.encode_to_vec()).unwrap_or_default(),
                subject: message.subject.map(|s| match s {
                    errdefs::solve::Subject::File(f) => Subject::FileAction(f.index),
                    errdefs::solve::Subject::Cache(c) => Subject::CacheInput(c.index),
                }),
                description: message.description,
            }
        }
        "errdefs.Frontend" => {
            let message = parse::<errdefs::Frontend>(name, value)?;
            Detail::Frontend { name: message.name, source: message.source }
        }
        "errdefs.FrontendCap" => {
            Detail::FrontendCap(parse::<errdefs::FrontendCap>(name, value)?.name)
        }
        "errdefs.Subrequest" => Detail::Subrequest(parse::<errdefs::Subrequest>(name, value)?.name),
        "errdefs.ProvenanceMaterialsIncomplete" => {
            let message = parse::<errdefs::ProvenanceMaterialsIncomplete>(name, value)?;
            let one = |m: errdefs::ProvenanceMaterialIncomplete| IncompleteMaterial {
                op: m.op,
                name: m.name,
                method: m.method,
                uri: m.uri,
                final_uri: m.final_uri,
                reason: m.reason,
            };
            Detail::IncompleteMaterials(message.incomplete.into_iter().map(one).collect())
        }
        "errdefs.CompatibilityFeature" => {
            let message = parse::<errdefs::CompatibilityFeature>(name, value)?;
            Detail::Compatibility { version: message.version, feature: message.feature }
        }
        EXIT => {
            let value: serde_json::Value = serde_json::from_slice(value).ok()?;
            Detail::Exit(value.get("Code").and_then(|c| c.as_u64()).unwrap_or(0).try_into().ok()?)
        }
        _ => return None,
    })
}

/// The program that stacks in errors name.
#[derive(Clone, Debug, Default)]
pub struct Program {
    /// Its command line.
    pub command: Vec<String>,
    /// Its version.
    pub version: String,
    /// What it was made of.
    pub revision: String,
}

/// Where in this program a fault came from, with the program itself (row `err.stack`): what clients
/// print with `--debug`. The names of frames are those of modules.
pub(crate) fn stack(fault: &Fault, program: &Program) -> Any {
    let frame = |place: &'static Location<'static>| {
        let file = place.file();
        let module = file
            .trim_start_matches("crates/")
            .trim_end_matches(".rs")
            .replace("/src/", "::")
            .replace('/', "::");
        serde_json::json!({ "Name": module, "File": file, "Line": place.line() })
    };
    let frames: Vec<_> = fault.trace().take(MAX_FRAMES).map(frame).collect();
    let stack = serde_json::json!({
        "frames": frames,
        "cmdline": program.command,
        "pid": std::process::id(),
        "version": program.version,
        "revision": program.revision,
    });
    any("stack.Stack", stack.to_string().into_bytes())
}

fn source(file: &SourceFile, spans: &[Span]) -> errdefs::Source {
    let position = |p: Position| Some(pb::Position { line: p.line, character: p.character });
    errdefs::Source {
        info: Some(pb::SourceInfo {
            filename: file.filename.clone(),
            data: file.data.clone(),
            definition: file.definition.as_deref().and_then(|d| pb::Definition::decode(d).ok()),
            language: file.language.clone(),
        }),
        // Clients read both ends of every range without asking whether they are there.
        ranges: spans
            .iter()
            .map(|s| pb::Range { start: position(s.start), end: position(s.end) })
            .collect(),
    }
}

fn span(range: pb::Range) -> Span {
    let position = |p: Option<pb::Position>| {
        p.map_or_else(Position::default, |p| Position { line: p.line, character: p.character })
    };
    Span { start: position(range.start), end: position(range.end) }
}

fn any(name: &str, value: Vec<u8>) -> Any {
    Any { type_url: format!("{PREFIX}{name}{SUFFIX}"), value }
}

fn go_json(name: &str, message: &impl Message) -> Option<Any> {
    let options = SerializeOptions::new()
        .use_proto_field_name(true)
        .stringify_64_bit_integers(false)
        .use_enum_numbers(true);
    json(name, message, &options)
}

fn json(name: &str, message: &impl Message, options: &SerializeOptions) -> Option<Any> {
    let descriptor = POOL.as_ref()?.get_message_by_name(name)?;
    let message = DynamicMessage::decode(descriptor, &message.encode_to_vec()[..]).ok()?;
    let mut serializer = serde_json::Serializer::new(Vec::new());
    message.serialize_with_options(&mut serializer, options).ok()?;
    Some(any(name, serializer.into_inner()))
}

fn parse<M: Message + Default>(name: &str, value: &[u8]) -> Option<M> {
    let descriptor = POOL.as_ref()?.get_message_by_name(name)?;
    let options = DeserializeOptions::new().deny_unknown_fields(false);
    let mut deserializer = serde_json::Deserializer::from_slice(value);
    let message =
        DynamicMessage::deserialize_with_options(descriptor, &mut deserializer, &options).ok()?;
    M::decode(&message.encode_to_vec()[..]).ok()
}
