//! Answers of a daemon as plain data. Field names and nulls are those that Go's client prints,
//! because programs read them (row `ctl.*`; `nerdctl` parses workers and pruned records).

use std::collections::BTreeMap;

use serde::{Serialize, Serializer};
use shipway_oci::Platform;
use shipway_proto::{moby::buildkit::v1 as wire, moby::buildkit::v1::types};

use crate::status::Time;

/// Go prints an empty list that was never made as `null`.
fn null_if_empty<T: Serialize, S: Serializer>(
    list: &[T],
    serializer: S,
) -> Result<S::Ok, S::Error> {
    if list.is_empty() { serializer.serialize_none() } else { list.serialize(serializer) }
}

/// Versions of a daemon.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DaemonVersion {
    /// Which program it is.
    pub package: String,
    /// The version of BuildKit's API that it speaks.
    pub version: String,
    /// Its own version.
    pub revision: String,
    /// Version of its Dockerfile frontend.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub dockerfile_version: String,
}

impl From<Option<types::BuildkitVersion>> for DaemonVersion {
    fn from(version: Option<types::BuildkitVersion>) -> Self {
        let v = version.unwrap_or_default();
        Self {
            package: v.package,
            version: v.version,
            revision: v.revision,
            dockerfile_version: v.dockerfile_version,
        }
    }
}

/// What a daemon says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DaemonInfo {
    /// Its versions.
    pub buildkit_version: DaemonVersion,
}

/// One rule of a worker's garbage collection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PruneInfo {
    /// Internal records too.
    pub all: bool,
    /// Which records.
    #[serde(serialize_with = "null_if_empty")]
    pub filter: Vec<String>,
    /// Nanoseconds for which records are kept.
    pub keep_duration: i64,
    /// Bytes that are always allowed.
    pub reserved_space: i64,
    /// Bytes above which records go.
    pub max_used_space: i64,
    /// Bytes of the disk to keep free.
    pub min_free_space: i64,
}

/// A device that steps can ask for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CdiDevice {
    /// Its name.
    pub name: String,
    /// Whether every build may use it.
    pub auto_allow: bool,
    /// More about it.
    pub annotations: BTreeMap<String, String>,
    /// Whether it is set up when first asked for.
    pub on_demand: bool,
}

/// A worker.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkerInfo {
    /// Its id.
    pub id: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// What it builds for.
    pub platforms: Vec<Platform>,
    /// Its garbage collection.
    pub gc_policy: Vec<PruneInfo>,
    /// Its versions.
    pub buildkit_version: DaemonVersion,
    /// Its devices.
    #[serde(serialize_with = "null_if_empty")]
    pub cdi_devices: Vec<CdiDevice>,
}

impl From<types::WorkerRecord> for WorkerInfo {
    fn from(record: types::WorkerRecord) -> Self {
        let platform = |p: shipway_proto::pb::Platform| Platform {
            architecture: p.architecture,
            os: p.os,
            os_version: p.os_version,
            os_features: p.os_features,
            variant: p.variant,
        };
        let rule = |r: types::GcPolicy| PruneInfo {
            all: r.all,
            filter: r.filters,
            keep_duration: r.keep_duration,
            reserved_space: r.reserved_space,
            max_used_space: r.max_used_space,
            min_free_space: r.min_free_space,
        };
        let device = |d: types::CdiDevice| CdiDevice {
            name: d.name,
            auto_allow: d.auto_allow,
            annotations: d.annotations,
            on_demand: d.on_demand,
        };
        Self {
            id: record.id,
            labels: record.labels,
            platforms: record.platforms.into_iter().map(platform).collect(),
            gc_policy: record.gc_policy.into_iter().map(rule).collect(),
            buildkit_version: record.buildkit_version.into(),
            cdi_devices: record.cdi_devices.into_iter().map(device).collect(),
        }
    }
}

/// A record of the build cache.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct UsageInfo {
    /// Its id.
    pub id: String,
    /// Whether it can still change, as cache mounts do.
    pub mutable: bool,
    /// Whether a build holds it.
    pub in_use: bool,
    /// Bytes.
    pub size: i64,
    /// When it was made.
    pub created_at: Time,
    /// When it was last used.
    pub last_used_at: Option<Time>,
    /// How often it was used.
    pub usage_count: i64,
    /// What it is made on.
    #[serde(serialize_with = "null_if_empty")]
    pub parents: Vec<String>,
    /// What made it.
    pub description: String,
    /// What it is, such as `regular` or `source.local`.
    pub record_type: String,
    /// Whether its bytes are shared with other records.
    pub shared: bool,
}

impl From<wire::UsageRecord> for UsageInfo {
    fn from(r: wire::UsageRecord) -> Self {
        Self {
            id: r.id,
            mutable: r.mutable,
            in_use: r.in_use,
            size: r.size,
            created_at: r.created_at.map_or_else(Time::epoch, Time::from),
            last_used_at: r.last_used_at.map(Time::from),
            usage_count: r.usage_count,
            parents: r.parents,
            description: r.description,
            record_type: r.record_type,
            shared: r.shared,
        }
    }
}
