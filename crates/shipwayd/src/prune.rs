//! Usage records and prune options on the wire (rows `ctl.du`, `ctl.prune`, `so.pr.*`).

use crate::filter;
use shipway_fault::Result;
use shipway_proto::moby::buildkit::v1 as wire;
use shipway_refs::{PruneOptions, UsageRecord};
use std::{sync::Arc, time::Duration};

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

/// A field of a record, for filters.
pub fn field(r: &UsageRecord, name: &str) -> Option<String> {
    let flag = |b: bool| Some(b.to_string());
    match name {
        "id" => Some(r.id.to_string()),
        "parents" => Some(r.parents.iter().map(ToString::to_string).collect::<Vec<_>>().join(";")),
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

/// Options off the wire.
pub fn options(request: wire::PruneRequest) -> Result<PruneOptions> {
    let filters = filter::parse_all(&request.filter)?;
    let bytes = |n: i64| u64::try_from(n).unwrap_or(0);
    Ok(PruneOptions {
        all: request.all,
        keep_duration: Duration::from_nanos(bytes(request.keep_duration)),
        reserved: bytes(request.reserved_space),
        max_used: bytes(request.max_used_space),
        min_free: bytes(request.min_free_space),
        filter: (!filters.is_empty()).then(|| Arc::new(move |r: &UsageRecord| filter::any(&filters, &|name| field(r, name))) as _),
    })
}
