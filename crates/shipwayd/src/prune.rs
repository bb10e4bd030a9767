//! Usage records and prune options on the wire (rows `ctl.du`, `ctl.prune`, `so.pr.*`).

use crate::filter;
use prost::Message as _;
use shipway_fault::{Fault, Result};
use shipway_host::Disk;
use shipway_proto::moby::buildkit::v1 as wire;
use shipway_refs::{PruneOptions, UsageRecord};
use std::{
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tonic::{
    Response,
    metadata::{MetadataMap, MetadataValue},
};

/// A record on the wire.
pub fn to_wire(r: &UsageRecord) -> wire::UsageRecord {
    wire::UsageRecord {
        id: r.id.to_string(),
        mutable: r.mutable,
        in_use: r.in_use,
        size: r.size as i64,
        created_at: Some(r.created.into()),
        last_used_at: r.last_used.map(Into::into),
        usage_count: r.usage_count as i64,
        description: r.description.clone(),
        record_type: r.record_type.to_string(),
        shared: r.shared,
        parents: r.parents.iter().map(ToString::to_string).collect(),
        ..Default::default()
    }
}

/// Whether a record was not used for `age`, in nanoseconds (row `ctl.du`); nothing or less means
/// that any will do.
pub fn is_older(r: &UsageRecord, age: i64, now: SystemTime) -> bool {
    let age = Duration::from_nanos(u64::try_from(age).unwrap_or(0));
    age.is_zero()
        || r.last_used.is_none_or(|used| now.duration_since(used).is_ok_and(|unused| unused >= age))
}

/// What records can be filtered by.
pub const FIELDS: &[&str] = &[
    "id",
    "parents",
    "parent",
    "description",
    "inuse",
    "mutable",
    "immutable",
    "type",
    "shared",
    "private",
];

/// A field of a record, for filters.
pub fn field(r: &UsageRecord, name: &str) -> Option<String> {
    let flag = |b: bool| Some(b.to_string());
    match name {
        "id" => Some(r.id.to_string()),
        "parents" | "parent" => {
            Some(r.parents.iter().map(ToString::to_string).collect::<Vec<_>>().join(";"))
        }
        "description" => Some(r.description.clone()),
        "inuse" => flag(r.in_use),
        "mutable" => flag(r.mutable),
        "immutable" => flag(!r.mutable),
        "type" => Some(r.record_type.to_string()),
        "shared" => flag(r.shared),
        "private" => flag(!r.shared),
        _ => None,
    }
}

/// With a request for what the build cache holds: an encoded `PruneRequest`, of which only what it
/// would remove is wanted. With the answer: that this is the answer.
const WOULD_PRUNE: &str = "shipway-would-prune-bin";

/// What a request for what the cache holds asks about a prune, if it does.
pub fn wanted(metadata: &MetadataMap) -> Result<Option<wire::PruneRequest>> {
    let Some(value) = metadata.get_bin(WOULD_PRUNE) else { return Ok(None) };
    let bytes = value.to_bytes().ok();
    let request = bytes.and_then(|bytes| wire::PruneRequest::decode(bytes).ok());
    let request =
        request.ok_or_else(|| Fault::invalid(format!("failed to parse {WOULD_PRUNE}")))?;
    Ok(Some(request))
}

/// The answer: what the prune would remove.
pub fn would_remove(records: &[UsageRecord]) -> Response<wire::DiskUsageResponse> {
    let record = records.iter().map(to_wire).collect();
    let mut response = Response::new(wire::DiskUsageResponse { record });
    response.metadata_mut().insert_bin(WOULD_PRUNE, MetadataValue::from_bytes(b"1"));
    response
}

/// Options off the wire; free space is that of the disk that has `disk`.
pub fn options(request: wire::PruneRequest, disk: &Path) -> Result<PruneOptions> {
    let filters = filter::parse_all(&request.filter, FIELDS)?;
    let bytes = |n: i64| u64::try_from(n).unwrap_or(0);
    Ok(PruneOptions {
        all: request.all,
        keep_duration: Duration::from_nanos(bytes(request.keep_duration)),
        reserved: bytes(request.reserved_space),
        max_used: bytes(request.max_used_space),
        min_free: bytes(request.min_free_space),
        free: Disk::of(disk).ok().map(|disk| disk.free),
        filter: (!filters.is_empty()).then(|| {
            Arc::new(move |r: &UsageRecord| filter::any(&filters, &|name| field(r, name))) as _
        }),
        ..PruneOptions::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use shipway_refs::{RecordType, RefId};

    #[test]
    fn a_question_about_a_prune_is_told_from_others_and_from_nonsense() {
        let mut metadata = MetadataMap::new();
        assert_eq!(wanted(&metadata).unwrap(), None);
        let request = wire::PruneRequest { all: true, max_used_space: 7, ..Default::default() };
        metadata.insert_bin(WOULD_PRUNE, MetadataValue::from_bytes(&request.encode_to_vec()));
        assert_eq!(wanted(&metadata).unwrap(), Some(request));
        metadata.insert_bin(WOULD_PRUNE, MetadataValue::from_bytes(&[0xff; 9]));
        assert!(wanted(&metadata).is_err_and(|e| e.to_string().contains(WOULD_PRUNE)));
        assert!(would_remove(&[]).metadata().contains_key(WOULD_PRUNE));
    }

    #[test]
    fn an_age_limit_leaves_out_what_was_used_since() {
        let now = SystemTime::now();
        let used = |seconds: Option<u64>| UsageRecord {
            id: RefId("x".into()),
            record_type: RecordType::Regular,
            description: String::new(),
            size: 0,
            in_use: false,
            mutable: false,
            created: now,
            last_used: seconds.map(|s| now - Duration::from_secs(s)),
            usage_count: 0,
            parents: Vec::new(),
            shared: false,
        };
        let hour = 3600 * 1_000_000_000;
        let older = |seconds| is_older(&used(seconds), hour, now);
        assert_eq!((older(Some(10)), older(Some(7200)), older(None)), (false, true, true));
        assert!(is_older(&used(Some(10)), 0, now) && is_older(&used(Some(10)), -1, now));
    }
}
