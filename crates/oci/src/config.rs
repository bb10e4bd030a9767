//! The image config: OCI's fields, Docker's, and whatever else was there.

use crate::{DiffId, Platform};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

fn is_default<T: Default + PartialEq>(t: &T) -> bool {
    *t == T::default()
}

/// Accepts `null` for a value that has a default, as Go's encoder writes empty lists and maps.
fn nullable<'de, D: serde::Deserializer<'de>, T: Default + Deserialize<'de>>(d: D) -> Result<T, D::Error> {
    Ok(Option::<T>::deserialize(d)?.unwrap_or_default())
}

/// Writes no layers as `null`, as Go's encoder does: configs are compared, also by digest.
fn null_if_empty<S: serde::Serializer, T: Serialize>(list: &[T], s: S) -> Result<S::Ok, S::Error> {
    if list.is_empty() { s.serialize_none() } else { list.serialize(s) }
}

/// An image config as stored under its digest. Unknown fields are kept in `extra`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// Creation time, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    /// Author (`MAINTAINER`).
    #[serde(default, skip_serializing_if = "is_default")]
    pub author: String,
    /// Platform's architecture.
    #[serde(default)]
    pub architecture: String,
    /// Platform's variant.
    #[serde(default, skip_serializing_if = "is_default")]
    pub variant: String,
    /// Platform's operating system.
    #[serde(default)]
    pub os: String,
    /// Platform's operating system version.
    #[serde(rename = "os.version", default, skip_serializing_if = "is_default")]
    pub os_version: String,
    /// Platform's operating system features.
    #[serde(rename = "os.features", default, skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub os_features: Vec<String>,
    /// What a container of the image does.
    #[serde(default, deserialize_with = "nullable")]
    pub config: Config,
    /// Layers.
    #[serde(default, deserialize_with = "nullable")]
    pub rootfs: RootFs,
    /// How the image came to be.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub history: Vec<History>,
    /// Fields that we do not know, such as `moby.buildkit.cache.v0`.
    #[serde(flatten)]
    pub extra: BTreeMap<String, serde_json::Value>,
}

impl ImageConfig {
    /// An empty image for `platform`.
    pub fn empty(platform: &Platform) -> Self {
        Self {
            architecture: platform.architecture.clone(),
            os: platform.os.clone(),
            variant: platform.variant.clone(),
            os_version: platform.os_version.clone(),
            os_features: platform.os_features.clone(),
            rootfs: RootFs { kind: "layers".into(), diff_ids: Vec::new() },
            ..Self::default()
        }
    }

    /// The platform the config names.
    pub fn platform(&self) -> Platform {
        Platform {
            architecture: self.architecture.clone(),
            os: self.os.clone(),
            os_version: self.os_version.clone(),
            os_features: self.os_features.clone(),
            variant: self.variant.clone(),
        }
        .normalized()
    }
}

/// The layers of an image, lowest first.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RootFs {
    /// Always `layers`.
    #[serde(rename = "type", default)]
    pub kind: String,
    /// Digests of the uncompressed layers.
    #[serde(default, deserialize_with = "nullable", serialize_with = "null_if_empty")]
    pub diff_ids: Vec<DiffId>,
}

/// One entry of an image's history.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct History {
    /// Creation time, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    /// The instruction.
    #[serde(default, skip_serializing_if = "is_default")]
    pub created_by: String,
    /// Author.
    #[serde(default, skip_serializing_if = "is_default")]
    pub author: String,
    /// The builder's mark.
    #[serde(default, skip_serializing_if = "is_default")]
    pub comment: String,
    /// Whether the entry has no layer.
    #[serde(default, skip_serializing_if = "is_default")]
    pub empty_layer: bool,
}

/// How containers of an image run. Field order follows Docker's, so that configs compare equal as text.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Config {
    /// User, or user:group.
    #[serde(default, skip_serializing_if = "is_default")]
    pub user: String,
    /// Exposed ports, as `80/tcp`.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub exposed_ports: BTreeMap<String, serde_json::Value>,
    /// Environment, as `NAME=value`.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub env: Vec<String>,
    /// Entry point.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entrypoint: Option<Vec<String>>,
    /// Default arguments.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmd: Option<Vec<String>>,
    /// Volumes.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub volumes: BTreeMap<String, serde_json::Value>,
    /// Working directory.
    #[serde(default, skip_serializing_if = "is_default")]
    pub working_dir: String,
    /// Labels.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub labels: BTreeMap<String, String>,
    /// Signal that stops a container.
    #[serde(default, skip_serializing_if = "is_default")]
    pub stop_signal: String,
    /// Whether the command is already escaped (Windows).
    #[serde(default, skip_serializing_if = "is_default")]
    pub args_escaped: bool,
    /// Health check (Docker).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub healthcheck: Option<Healthcheck>,
    /// Triggers (Docker).
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub on_build: Vec<String>,
    /// Seconds to wait for the stop signal (Docker).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_timeout: Option<i64>,
    /// Shell of shell forms (Docker).
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub shell: Vec<String>,
    /// Fields that we do not know.
    #[serde(flatten)]
    pub extra: BTreeMap<String, serde_json::Value>,
}

/// Docker's health check. Durations are in nanoseconds; zero inherits.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Healthcheck {
    /// `NONE`, or `CMD` and arguments, or `CMD-SHELL` and a line.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub test: Vec<String>,
    /// Time between checks.
    #[serde(default, skip_serializing_if = "is_default")]
    pub interval: i64,
    /// Time a check may take.
    #[serde(default, skip_serializing_if = "is_default")]
    pub timeout: i64,
    /// Time before failures count.
    #[serde(default, skip_serializing_if = "is_default")]
    pub start_period: i64,
    /// Time between checks during the start period.
    #[serde(default, skip_serializing_if = "is_default")]
    pub start_interval: i64,
    /// Failures before unhealthy.
    #[serde(default, skip_serializing_if = "is_default")]
    pub retries: i64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_fields_and_go_nulls_survive() {
        let text = r#"{"architecture":"amd64","os":"linux","config":{"Env":null,"Cmd":["sh"],"X":1},"rootfs":{"type":"layers","diff_ids":null},"moby.buildkit.cache.v0":"e30="}"#;
        let c: ImageConfig = serde_json::from_str(text).unwrap();
        assert_eq!(c.config.cmd, Some(vec!["sh".to_owned()]));
        let back = serde_json::to_value(&c).unwrap();
        assert_eq!(back["moby.buildkit.cache.v0"], "e30=");
        assert_eq!(back["config"]["X"], 1);
    }
}
