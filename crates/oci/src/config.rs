//! The image config: OCI's fields and Docker's, read and written as Go does. Other fields are not
//! carried over: what a build makes of a base image's config has the same digest as what BuildKit
//! makes of it.

use crate::{DiffId, Platform, gojson};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

fn is_default<T: Default + PartialEq>(t: &T) -> bool {
    *t == T::default()
}

/// Accepts `null` for a value that has a default, as Go's encoder writes empty lists and maps.
pub(crate) fn nullable<'de, D: serde::Deserializer<'de>, T: Default + Deserialize<'de>>(
    d: D,
) -> Result<T, D::Error> {
    Ok(Option::<T>::deserialize(d)?.unwrap_or_default())
}

/// Writes no layers as `null`, as Go's encoder does: configs are compared, also by digest.
pub(crate) fn null_if_empty<S: serde::Serializer, T: Serialize>(
    list: &[T],
    s: S,
) -> Result<S::Ok, S::Error> {
    if list.is_empty() { s.serialize_none() } else { list.serialize(s) }
}

/// Reads a time and writes it again, as Go does. What is not a time stays as it is: callers
/// that need one refuse it.
fn time<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Option<String>, D::Error> {
    Ok(Option::<String>::deserialize(d)?.map(|text| gojson::time(&text).unwrap_or(text)))
}

/// Go leaves empty lists out whether they are there or not.
fn is_empty_list(list: &Option<Vec<String>>) -> bool {
    list.as_ref().is_none_or(Vec::is_empty)
}

/// The value of a set's member: `{}`, whatever was read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Member;

impl Serialize for Member {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        serde::ser::SerializeMap::end(s.serialize_map(Some(0))?)
    }
}

impl<'de> Deserialize<'de> for Member {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        serde::de::IgnoredAny::deserialize(d).map(|_| Self)
    }
}

/// An image config, in the order of Go's fields.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// Creation time, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "time")]
    pub created: Option<String>,
    /// Author (`MAINTAINER`).
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub author: String,
    /// Platform's architecture.
    #[serde(default, deserialize_with = "nullable")]
    pub architecture: String,
    /// Platform's operating system.
    #[serde(default, deserialize_with = "nullable")]
    pub os: String,
    /// Platform's operating system version.
    #[serde(
        rename = "os.version",
        default,
        skip_serializing_if = "is_default",
        deserialize_with = "nullable"
    )]
    pub os_version: String,
    /// Platform's operating system features.
    #[serde(
        rename = "os.features",
        default,
        skip_serializing_if = "is_default",
        deserialize_with = "nullable"
    )]
    pub os_features: Vec<String>,
    /// Platform's variant.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub variant: String,
    /// What a container of the image does.
    #[serde(default, deserialize_with = "nullable")]
    pub config: Config,
    /// Layers.
    #[serde(default, deserialize_with = "nullable")]
    pub rootfs: RootFs,
    /// How the image came to be.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub history: Vec<History>,
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
    #[serde(rename = "type", default, deserialize_with = "nullable")]
    pub kind: String,
    /// Digests of the uncompressed layers.
    #[serde(default, deserialize_with = "nullable", serialize_with = "null_if_empty")]
    pub diff_ids: Vec<DiffId>,
}

/// One entry of an image's history.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct History {
    /// Creation time, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "time")]
    pub created: Option<String>,
    /// The instruction.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub created_by: String,
    /// Author.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub author: String,
    /// The builder's mark.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub comment: String,
    /// Whether the entry has no layer.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub empty_layer: bool,
}

/// How containers of an image run. Field order follows Docker's, so that configs compare equal as
/// text.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Config {
    /// User, or user:group.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub user: String,
    /// Exposed ports, as `80/tcp`.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub exposed_ports: BTreeMap<String, Member>,
    /// Environment, as `NAME=value`.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub env: Vec<String>,
    /// Entry point.
    #[serde(default, skip_serializing_if = "is_empty_list")]
    pub entrypoint: Option<Vec<String>>,
    /// Default arguments.
    #[serde(default, skip_serializing_if = "is_empty_list")]
    pub cmd: Option<Vec<String>>,
    /// Volumes.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub volumes: BTreeMap<String, Member>,
    /// Working directory.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub working_dir: String,
    /// Labels.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub labels: BTreeMap<String, String>,
    /// Signal that stops a container.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub stop_signal: String,
    /// Whether the command is already escaped (Windows).
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub args_escaped: bool,
    /// Health check (Docker).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub healthcheck: Option<Healthcheck>,
    /// Triggers (Docker).
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub on_build: Vec<String>,
    /// Shell of shell forms (Docker).
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub shell: Vec<String>,
}

/// Docker's health check. Durations are in nanoseconds; zero inherits.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Healthcheck {
    /// `NONE`, or `CMD` and arguments, or `CMD-SHELL` and a line.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub test: Vec<String>,
    /// Time between checks.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub interval: i64,
    /// Time a check may take.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub timeout: i64,
    /// Time before failures count.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub start_period: i64,
    /// Time between checks during the start period.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub start_interval: i64,
    /// Failures before unhealthy.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub retries: i64,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What Go's encoder makes of what its decoder read, but for `config`, which it writes behind
    /// the rest.
    #[test]
    fn configs_are_written_as_go_does() {
        let whole = |inner: &str| {
            format!(
                r#"{{"architecture":"amd64","os":"linux","config":{inner},"rootfs":{{"type":"layers","diff_ids":null}}}}"#
            )
        };
        for (given, want) in [
            ("{}", "{}"),
            ("null", "{}"),
            (
                r#"{"Env":null,"Cmd":["sh"],"X":1,"StopTimeout":3,"Hostname":"h"}"#,
                r#"{"Cmd":["sh"]}"#,
            ),
            (
                r#"{"Cmd":[],"Entrypoint":[],"Env":[],"OnBuild":[],"Shell":[],"Labels":{},"Volumes":{}}"#,
                "{}",
            ),
            (
                r#"{"Volumes":{"/b":{"x":1},"/a":null},"ExposedPorts":{"80/tcp":{}}}"#,
                r#"{"ExposedPorts":{"80/tcp":{}},"Volumes":{"/a":{},"/b":{}}}"#,
            ),
            (
                r#"{"Labels":{"b":"<&>","a":"\u003c"},"User":null}"#,
                r#"{"Labels":{"a":"\u003c","b":"\u003c\u0026\u003e"}}"#,
            ),
            (
                r#"{"Shell":["s"],"OnBuild":["RUN x"],"Healthcheck":{"Retries":3,"Test":null,"Interval":1000000000},"ArgsEscaped":true,"User":"u"}"#,
                r#"{"User":"u","ArgsEscaped":true,"Healthcheck":{"Interval":1000000000,"Retries":3},"OnBuild":["RUN x"],"Shell":["s"]}"#,
            ),
        ] {
            let config: ImageConfig = serde_json::from_str(&whole(given)).unwrap();
            assert_eq!(gojson::to_string(&config).unwrap(), whole(want), "{given}");
        }
        let given = r#"{"created":"2020-01-02T03:04:05.500000000+00:00","author":null,"variant":"v8","architecture":"arm64","os":"linux",
            "os.version":"","os.features":["a"],"container":"c","config":{},"rootfs":{"diff_ids":[],"type":null},"moby.buildkit.cache.v0":"e30=",
            "history":[{"empty_layer":false,"created":null,"comment":"c","created_by":"RUN a && b","x":1},{"created":"then","author":"a","empty_layer":true}]}"#;
        let want = concat!(
            r#"{"created":"2020-01-02T03:04:05.5Z","architecture":"arm64","os":"linux","os.features":["a"],"variant":"v8","config":{},"#,
            r#""rootfs":{"type":"","diff_ids":null},"history":[{"created_by":"RUN a \u0026\u0026 b","comment":"c"},"#,
            r#"{"created":"then","author":"a","empty_layer":true}]}"#
        );
        assert_eq!(
            gojson::to_string(&serde_json::from_str::<ImageConfig>(given).unwrap()).unwrap(),
            want
        );
    }
}
