//! A definition as canonical JSON (row `dfs.convert`): operations and source map as canonical
//! protobuf JSON, metadata as Go's encoder writes its client's struct.

use crate::definition::{Definition, ExportCache, OpMetadata};
use base64::Engine as _;
use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage, MapKey, ReflectMessage, Value as Field};
use serde_json::{Map, Value, json};
use shipway_fault::Fault;
use shipway_oci::Digest;
use std::{collections::BTreeMap, sync::LazyLock};

static POOL: LazyLock<Option<DescriptorPool>> = LazyLock::new(|| {
    DescriptorPool::decode(&include_bytes!(concat!(env!("OUT_DIR"), "/ops.bin"))[..]).ok()
});

impl Definition {
    /// `def` and `metadata` by digest, and `source`. Members have the order that Go gives them.
    pub fn to_json(&self) -> Result<Value, Fault> {
        let ops: BTreeMap<String, Value> = self
            .ops
            .iter()
            .map(|op| Ok((Digest::of(op).to_string(), message("pb.Op", op)?)))
            .collect::<Result<_, Fault>>()?;
        let metadata: Map<String, Value> =
            self.metadata.iter().map(|(digest, m)| (digest.clone(), m.to_json())).collect();
        let source = match self.to_pb().source {
            Some(source) => message("pb.Source", &source.encode_to_vec())?,
            None => json!({}),
        };
        Ok(json!({"def": ops, "metadata": metadata, "source": source}))
    }
}

impl OpMetadata {
    /// The members that say something.
    fn to_json(&self) -> Value {
        let mut out = Map::new();
        let mut put = |name: &str, value: Value| drop(out.insert(name.into(), value));
        if self.ignore_cache {
            put("ignore_cache", true.into());
        }
        if !self.description.is_empty() {
            put("description", json!(self.description));
        }
        if let Some(export) = self.export_cache {
            put(
                "export_cache",
                if export == ExportCache::Yes { json!({"Value": true}) } else { json!({}) },
            );
        }
        if !self.caps.is_empty() {
            put(
                "caps",
                self.caps
                    .iter()
                    .map(|c| (c.clone(), Value::Bool(true)))
                    .collect::<Map<_, _>>()
                    .into(),
            );
        }
        if let Some(group) = &self.progress_group {
            put(
                "progress_group",
                said([
                    ("id", json!(group.id)),
                    ("name", json!(group.name)),
                    ("weak", json!(group.weak)),
                ]),
            );
        }
        if let Some(r) = &self.resources {
            let members = [
                ("memory", json!(r.memory)),
                ("memory_swap", json!(r.memory_swap)),
                ("cpu_shares", json!(r.cpu_shares)),
                ("cpu_period", json!(r.cpu_period)),
                ("cpu_quota", json!(r.cpu_quota)),
                ("cpuset_cpus", json!(r.cpuset_cpus)),
                ("cpuset_mems", json!(r.cpuset_mems)),
            ];
            put("linux_resources", said(members));
        }
        out.into()
    }
}

/// Members that are not their type's zero.
fn said<const N: usize>(members: [(&str, Value); N]) -> Value {
    let zero = |v: &Value| *v == json!("") || *v == json!(0) || *v == json!(false);
    members
        .into_iter()
        .filter(|(_, v)| !zero(v))
        .map(|(k, v)| (k.to_owned(), v))
        .collect::<Map<_, _>>()
        .into()
}

fn message(name: &str, bytes: &[u8]) -> Result<Value, Fault> {
    let descriptor = POOL.as_ref().and_then(|pool| pool.get_message_by_name(name));
    let descriptor =
        descriptor.ok_or_else(|| Fault::internal(format!("no descriptor of {name}")))?;
    let message = DynamicMessage::decode(descriptor, bytes)
        .map_err(|e| Fault::invalid(format!("failed to decode a {name}: {e}")))?;
    Ok(fields(&message))
}

/// The fields that are there, in the order of their declaration.
fn fields(message: &DynamicMessage) -> Value {
    let mut declared: Vec<_> =
        message.descriptor().fields().filter(|f| message.has_field(f)).collect();
    declared.sort_by_key(|f| f.path().last().copied());
    let pairs = declared.iter().map(|field| {
        let kind = field.kind();
        let enumeration = kind.as_enum();
        let single = |value: &Field| match (value, enumeration) {
            (Field::EnumNumber(n), Some(known)) => {
                known.get_value(*n).map_or_else(|| json!(n), |v| json!(v.name()))
            }
            _ => scalar(value),
        };
        let value = match &*message.get_field(field) {
            Field::List(items) => items.iter().map(single).collect(),
            Field::Map(entries) => {
                let mut entries: Vec<(String, Value)> =
                    entries.iter().map(|(k, v)| (key(k), scalar(v))).collect();
                entries.sort_by(|a, b| a.0.cmp(&b.0));
                entries.into_iter().collect::<Map<_, _>>().into()
            }
            value => single(value),
        };
        (field.json_name().to_owned(), value)
    });
    pairs.collect::<Map<_, _>>().into()
}

fn key(key: &MapKey) -> String {
    match key {
        MapKey::Bool(v) => v.to_string(),
        MapKey::I32(v) => v.to_string(),
        MapKey::I64(v) => v.to_string(),
        MapKey::U32(v) => v.to_string(),
        MapKey::U64(v) => v.to_string(),
        MapKey::String(v) => v.clone(),
    }
}

/// 64-bit numbers are text and bytes are base64, as protobuf's JSON has it.
fn scalar(value: &Field) -> Value {
    match value {
        Field::Bool(v) => json!(v),
        Field::I32(v) => json!(v),
        Field::I64(v) => json!(v.to_string()),
        Field::U32(v) => json!(v),
        Field::U64(v) => json!(v.to_string()),
        Field::F32(v) => json!(v),
        Field::F64(v) => json!(v),
        Field::String(v) => json!(v),
        Field::Bytes(v) => json!(base64::engine::general_purpose::STANDARD.encode(v)),
        Field::EnumNumber(v) => json!(v),
        Field::Message(v) => fields(v),
        // Lists and maps do not nest.
        Field::List(_) | Field::Map(_) => Value::Null,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shipway_proto::pb;

    #[test]
    fn operations_as_protobuf_json() {
        let check = |op: pb::Op, want: &str| {
            let bytes = op.encode_to_vec();
            let digest = Digest::of(&bytes).to_string();
            let definition = Definition { ops: vec![bytes.into()], ..Definition::default() };
            assert_eq!(definition.to_json().unwrap()["def"][&digest].to_string(), want);
        };
        let attrs = [("b".to_owned(), "2".to_owned()), ("a".to_owned(), "1".to_owned())].into();
        check(
            pb::Op {
                op: Some(pb::op::Op::Source(pb::SourceOp { identifier: "x".into(), attrs })),
                ..pb::Op::default()
            },
            r#"{"source":{"identifier":"x","attrs":{"a":"1","b":"2"}}}"#,
        );
        let mount = pb::Mount { input: -1, output: 0, mount_type: 3, ..pb::Mount::default() };
        let exec = pb::ExecOp { mounts: vec![mount], network: 1, ..pb::ExecOp::default() };
        check(
            pb::Op {
                op: Some(pb::op::Op::Exec(exec)),
                platform: Some(pb::Platform::default()),
                ..pb::Op::default()
            },
            r#"{"exec":{"mounts":[{"input":"-1","mountType":"CACHE"}],"network":"HOST"},"platform":{}}"#,
        );
    }

    #[test]
    fn metadata_as_go_has_it() {
        let metadata = OpMetadata {
            export_cache: Some(ExportCache::No),
            caps: ["c".to_owned()].into(),
            ..OpMetadata::default()
        };
        assert_eq!(metadata.to_json().to_string(), r#"{"export_cache":{},"caps":{"c":true}}"#);
    }
}
