//! Usage records and prune options on the wire (rows `ctl.du`, `ctl.prune`, `so.pr.*`).

use crate::filter;
use shipway_fault::Result;
use shipway_proto::moby::buildkit::v1 as wire;
use shipway_refs::{PruneOptions, UsageRecord};
use std::{
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
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
        disk: Some(disk.to_owned()),
        filter: (!filters.is_empty()).then(|| {
            Arc::new(move |r: &UsageRecord| filter::any(&filters, &|name| field(r, name))) as _
        }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use shipway_refs::{RecordType, RefId};

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
