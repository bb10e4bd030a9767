//! The frontend's options (rows `dfo.*`), read once.

use crate::error::{ConvertError, Result};
use shipway_attest::{AttestOptions, SbomOptions};
use shipway_dockerfile::{LintConfig, csv};
use shipway_fault::{Detail, Fault};
use shipway_frontend::{CacheImport, FrontendOptions};
use shipway_gocompat::parse_bool;
use shipway_llb::{HostIp, LinuxResources, NetMode, ResolveMode, Ulimit};
use shipway_oci::{NetworkName, Platform};
use std::{collections::BTreeMap, net::IpAddr};

/// Capabilities of this frontend (row `dfo.caps`).
const CAPS: [&str; 4] = [
    "moby.buildkit.frontend.inputs",
    "moby.buildkit.frontend.subrequests",
    "moby.buildkit.frontend.contexts",
    "moby.buildkit.frontend.gitquerystring",
];

const ULIMITS: [&str; 15] = [
    "core",
    "cpu",
    "data",
    "fsize",
    "locks",
    "memlock",
    "msgqueue",
    "nice",
    "nofile",
    "nproc",
    "rss",
    "rtprio",
    "rttime",
    "sigpending",
    "stack",
];

/// What a build was asked for.
#[derive(Clone, Debug, Default)]
pub struct BuildOptions {
    pub target: String,
    pub build_args: BTreeMap<String, String>,
    pub labels: BTreeMap<String, String>,
    /// Platforms asked for; empty means the worker's own.
    pub platforms: Vec<Platform>,
    pub multi_platform: bool,
    pub resolve_mode: ResolveMode,
    pub extra_hosts: Vec<HostIp>,
    pub network: NetMode,
    /// The network of all steps that name none, instead of the default one.
    pub named_network: Option<NetworkName>,
    pub shm_size: i64,
    pub ulimits: Vec<Ulimit>,
    pub cgroup_parent: String,
    pub hostname: String,
    pub resources: Option<LinuxResources>,
    pub cache_namespace: String,
    /// Stages to run without cache; `Some` of nothing means all.
    pub no_cache: Option<Vec<String>>,
    pub lint: Option<LintConfig>,
    /// Whether places of warnings and errors have columns too (option `source-columns`, which only
    /// our own client gives).
    pub columns: bool,
    /// Other sessions to take local sources from.
    pub local_sessions: BTreeMap<String, String>,
    /// Caches that may have results (options `cache-imports` and `cache-from`).
    pub cache_imports: Vec<CacheImport>,
    /// The scanner to run over the result.
    pub sbom: Option<SbomOptions>,
}

impl BuildOptions {
    /// Reads the options.
    pub fn parse(options: &FrontendOptions) -> Result<Self> {
        refuse_removed(options)?;
        let get = |key: &str| options.get(key).map(String::as_str).unwrap_or_default();
        let or_arg = |arg: &str, key: &str| match get(&format!("build-arg:{arg}")) {
            "" => get(key).to_owned(),
            value => value.to_owned(),
        };
        let platforms = parse_platforms(get("platform"))?;
        let multi_platform = match or_arg("BUILDKIT_MULTI_PLATFORM", "multi-platform").as_str() {
            "" => platforms.len() > 1,
            text => match parse_bool(text) {
                None => {
                    return Err(ConvertError::new(format!(
                        "invalid boolean value for multi-platform: {text}"
                    )));
                }
                Some(false) if platforms.len() > 1 => {
                    return Err(ConvertError::new(
                        "conflicting config: returning multiple target platforms is not allowed",
                    ));
                }
                Some(yes) => yes,
            },
        };
        let lint = options.get("build-arg:BUILDKIT_DOCKERFILE_CHECK").map(|text| {
            LintConfig::parse(text).map_err(|e| {
                ConvertError::from(e).context("failed to parse build-arg:BUILDKIT_DOCKERFILE_CHECK")
            })
        });
        let no_cache = options.get("no-cache").map(|list| match list.as_str() {
            "" => Vec::new(),
            list => list.split(',').map(str::to_lowercase).collect(),
        });
        let (network, named_network) = match get("force-network-mode") {
            "" | "sandbox" | "default" => (NetMode::Unset, None),
            "none" => (NetMode::None, None),
            "host" => (NetMode::Host, None),
            other => match other.parse() {
                Ok(name) => (NetMode::Unset, Some(name)),
                Err(_) => return Err(ConvertError::new(format!("invalid netmode {other}"))),
            },
        };
        let sbom = AttestOptions::parse(options).map_err(ConvertError::from)?.sbom;
        Ok(Self {
            target: get("target").into(),
            sbom,
            cache_imports: parse_cache_imports(options)?,
            build_args: with_prefix(options, "build-arg:"),
            labels: with_prefix(options, "label:"),
            platforms,
            multi_platform,
            resolve_mode: match ResolveMode::parse(get("image-resolve-mode")) {
                Some(mode) => mode,
                None => {
                    let mode = get("image-resolve-mode");
                    return Err(ConvertError::new(format!("invalid image-resolve-mode: {mode}")));
                }
            },
            extra_hosts: parse_hosts(get("add-hosts"))
                .map_err(|e| e.context("failed to parse additional hosts"))?,
            network,
            named_network,
            shm_size: match get("shm-size") {
                "" => 0,
                text => text.parse().map_err(|_| {
                    ConvertError::new(format!("failed to parse shm size: invalid number {text:?}"))
                })?,
            },
            ulimits: parse_ulimits(get("ulimit"))
                .map_err(|e| e.context("failed to parse ulimit"))?,
            cgroup_parent: get("cgroup-parent").into(),
            hostname: or_arg("BUILDKIT_SANDBOX_HOSTNAME", "hostname"),
            resources: parse_resources(options)
                .map_err(|e| e.context("failed to parse resource limits"))?,
            cache_namespace: get("build-arg:BUILDKIT_CACHE_MOUNT_NS").into(),
            no_cache,
            lint: lint.transpose()?,
            columns: parse_bool(get("source-columns")) == Some(true),
            local_sessions: with_prefix(options, "local-sessionid:"),
        })
    }

    /// Whether the steps of the stage `name` run without cache.
    pub fn is_no_cache(&self, name: &str) -> bool {
        match &self.no_cache {
            None => false,
            Some(stages) => stages.is_empty() || stages.iter().any(|s| *s == name.to_lowercase()),
        }
    }
}

/// Checks `frontend.caps`. The second error is one that another frontend may still cure, so it
/// waits for `# syntax=`.
pub fn check_caps(options: &FrontendOptions) -> (Result<(), Fault>, Option<Fault>) {
    let mut deferred = None;
    for cap in options
        .get("frontend.caps")
        .map(|c| c.split(','))
        .into_iter()
        .flatten()
        .filter(|c| !c.is_empty())
    {
        let (name, extra) = cap.split_once('+').unwrap_or((cap, ""));
        if CAPS.contains(&name) {
            continue;
        }
        let fault = Fault::new(
            shipway_fault::Code::Unimplemented,
            format!("unsupported frontend capability {name}"),
        )
        .detail(Detail::FrontendCap(name.into()));
        if extra != "forward" {
            return (Err(fault), None);
        }
        deferred = Some(fault);
    }
    (Ok(()), deferred)
}

fn refuse_removed(options: &FrontendOptions) -> Result<()> {
    if options.get("override-copy-image").is_some_and(|v| !v.is_empty()) {
        return Err(ConvertError::new(
            "support for \"override-copy-image\" was removed in BuildKit 0.11",
        ));
    }
    if options.get("build-arg:BUILDKIT_DISABLE_FILEOP").and_then(|v| parse_bool(v)) == Some(true) {
        return Err(ConvertError::new(
            "support for \"BUILDKIT_DISABLE_FILEOP\" build-arg was removed in BuildKit 0.11",
        ));
    }
    Ok(())
}

fn with_prefix(options: &FrontendOptions, prefix: &str) -> BTreeMap<String, String> {
    options
        .iter()
        .filter_map(|(k, v)| Some((k.strip_prefix(prefix)?.to_owned(), v.clone())))
        .collect()
}

fn parse_platforms(text: &str) -> Result<Vec<Platform>> {
    if text.is_empty() {
        return Ok(Vec::new());
    }
    text.split(',')
        .map(|p| {
            p.parse()
                .map_err(|e| ConvertError::new(format!("failed to parse target platform {p}: {e}")))
        })
        .collect()
}

/// A cache as Go's encoder writes it.
#[derive(serde::Deserialize)]
struct WrittenImport {
    #[serde(rename = "Type", alias = "type", default)]
    kind: String,
    #[serde(rename = "Attrs", alias = "attrs", default)]
    attrs: BTreeMap<String, String>,
}

/// `cache-imports` is a list in JSON; `cache-from`, which clients said before there was more than
/// registries, comes after it.
fn parse_cache_imports(options: &FrontendOptions) -> Result<Vec<CacheImport>> {
    let in_registry = |name: &str| CacheImport {
        kind: "registry".into(),
        attrs: [("ref".to_owned(), name.to_owned())].into(),
    };
    let mut imports = Vec::new();
    if let Some(json) = options.get("cache-imports").filter(|j| !j.is_empty()) {
        let list: Vec<WrittenImport> = serde_json::from_str(json).map_err(|e| {
            ConvertError::new(format!("failed to unmarshal cache-imports ({json:?}): {e}"))
        })?;
        imports.extend(list.into_iter().map(|w| CacheImport { kind: w.kind, attrs: w.attrs }));
    }
    let names = options.get("cache-from").map(String::as_str).unwrap_or_default();
    imports.extend(names.split(',').filter(|n| !n.is_empty()).map(in_registry));
    Ok(imports)
}

fn parse_hosts(text: &str) -> Result<Vec<HostIp>> {
    if text.is_empty() {
        return Ok(Vec::new());
    }
    let host = |field: String| {
        let field = field.to_lowercase();
        let Some((host, ip)) = field.split_once('=') else {
            return Err(ConvertError::new(format!("invalid key-value pair {field}")));
        };
        let ip: IpAddr =
            ip.parse().map_err(|_| ConvertError::new(format!("failed to parse IP {ip}")))?;
        Ok(HostIp { host: host.into(), ip: ip.to_string() })
    };
    csv(text)?.into_iter().map(host).collect()
}

fn parse_ulimits(text: &str) -> Result<Vec<Ulimit>> {
    if text.is_empty() {
        return Ok(Vec::new());
    }
    let ulimit = |field: String| {
        let bad = || ConvertError::new(format!("invalid ulimit argument: {field}"));
        let (name, limits) = field.split_once('=').ok_or_else(bad)?;
        if !ULIMITS.contains(&name) {
            return Err(
                ConvertError::new(format!("invalid ulimit type: {name}")).suggest(name, ULIMITS)
            );
        }
        let (soft, hard) = limits.split_once(':').unwrap_or((limits, limits));
        let (soft, hard): (i64, i64) =
            (soft.parse().map_err(|_| bad())?, hard.parse().map_err(|_| bad())?);
        if hard != -1 && (soft == -1 || soft > hard) {
            let message = format!(
                "ulimit soft limit must be less than or equal to hard limit: {soft} > {hard}"
            );
            return Err(ConvertError::new(message));
        }
        Ok(Ulimit { name: name.into(), soft, hard })
    };
    csv(text)?.into_iter().map(ulimit).collect()
}

fn parse_resources(options: &FrontendOptions) -> Result<Option<LinuxResources>> {
    let get = |key: &str| options.get(key).map(String::as_str).filter(|v| !v.is_empty());
    let number = |key: &str, least: &str, fits: fn(i64) -> bool| match get(key) {
        None => Ok(0),
        Some(v) => match v.parse::<i64>() {
            Err(_) => Err(ConvertError::new(format!("invalid {key} value: {v}"))),
            Ok(n) if !fits(n) => {
                Err(ConvertError::new(format!("invalid {key} value: {v}: must be {least}")))
            }
            Ok(n) => Ok(n),
        },
    };
    let positive = |key: &str| number(key, "> 0", |n| n > 0);
    let set = |key: &str| match get(key) {
        None => Ok(String::new()),
        Some(v) if is_cpu_set(v) => Ok(v.to_owned()),
        Some(v) => Err(ConvertError::new(format!("invalid {key} value: {v}"))),
    };
    let resources = LinuxResources {
        memory: positive("memory")?,
        memory_swap: number("memswap", "-1 (unlimited) or > 0", |n| n >= -1 && n != 0)?,
        cpu_shares: positive("cpushares")? as u64,
        cpu_period: positive("cpuperiod")? as u64,
        cpu_quota: positive("cpuquota")?,
        cpuset_cpus: set("cpusetcpus")?,
        cpuset_mems: set("cpusetmems")?,
    };
    Ok((resources != LinuxResources::default()).then_some(resources))
}

/// Numbers and ranges, such as `0-3,7`.
fn is_cpu_set(text: &str) -> bool {
    let number = |t: &str| t.parse::<u16>().ok();
    text.split(',').all(|part| match part.split_once('-') {
        Some((a, b)) => matches!((number(a), number(b)), (Some(a), Some(b)) if a <= b),
        None => number(part).is_some(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[(&str, &str)]) -> Result<BuildOptions, String> {
        let options = pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        BuildOptions::parse(&options).map_err(|e| e.fault.to_string())
    }

    #[test]
    fn caches_are_read_in_both_forms() {
        let of = |key: &str, text: &str| {
            let found = parse(&[(key, text)]).map(|o| o.cache_imports);
            found.map(|l| {
                l.into_iter().map(|c| format!("{} {:?}", c.kind, c.attrs)).collect::<Vec<_>>()
            })
        };
        assert_eq!(
            of("cache-from", "a/b:1,c").unwrap(),
            [r#"registry {"ref": "a/b:1"}"#, r#"registry {"ref": "c"}"#]
        );
        assert_eq!(
            of("cache-imports", r#"[{"Type":"local","Attrs":{"src":"x"}},{"Type":"gha"}]"#)
                .unwrap(),
            [r#"local {"src": "x"}"#, "gha {}"]
        );
        let both = parse(&[("cache-from", "a"), ("cache-imports", r#"[{"Type":"local"}]"#)])
            .unwrap()
            .cache_imports;
        assert_eq!(both.iter().map(|c| &*c.kind).collect::<Vec<_>>(), ["local", "registry"]);
        assert!(
            of("cache-imports", "{").unwrap_err().contains("failed to unmarshal cache-imports")
        );
        assert!(of("cache-from", "").unwrap().is_empty());
    }

    #[test]
    fn options_are_read() {
        let o = parse(&[
            ("platform", "linux/amd64,linux/arm64"),
            ("build-arg:A", "1"),
            ("label:l", "2"),
            ("no-cache", "One,two"),
            ("add-hosts", "a=1.2.3.4,b=::1"),
            ("ulimit", "nofile=1:2,core=-1"),
            ("cpusetcpus", "0-3,7"),
        ])
        .expect("valid");
        assert!(o.multi_platform && o.is_no_cache("ONE") && !o.is_no_cache("x"));
        assert_eq!((o.build_args["A"].as_str(), o.labels["l"].as_str()), ("1", "2"));
        assert_eq!(o.extra_hosts[1], HostIp { host: "b".into(), ip: "::1".into() });
        assert_eq!(o.ulimits[1], Ulimit { name: "core".into(), soft: -1, hard: -1 });
        assert!(parse(&[("no-cache", "")]).expect("valid").is_no_cache("any"));
        assert!(parse(&[("attest:sbom", "disabled=true")]).unwrap().sbom.is_none());
    }

    #[test]
    fn wrong_options_are_errors() {
        for (key, value, want) in [
            ("platform", "a/b/c/d", "failed to parse target platform a/b/c/d"),
            ("image-resolve-mode", "x", "invalid image-resolve-mode: x"),
            ("add-hosts", "a", "failed to parse additional hosts: invalid key-value pair a"),
            ("add-hosts", "a=x", "failed to parse IP x"),
            ("ulimit", "nofiles=1", "invalid ulimit type: nofiles (did you mean nofile?)"),
            ("ulimit", "nofile=3:2", "3 > 2"),
            ("force-network-mode", "x.y", "invalid netmode x.y"),
            ("multi-platform", "x", "invalid boolean value for multi-platform: x"),
            (
                "memory",
                "0",
                "failed to parse resource limits: invalid memory value: 0: must be > 0",
            ),
            ("attest:sbom", "generator=", "sbom generator cannot be empty"),
            ("override-copy-image", "x", "support for \"override-copy-image\" was removed"),
            (
                "build-arg:BUILDKIT_DISABLE_FILEOP",
                "1",
                "support for \"BUILDKIT_DISABLE_FILEOP\" build-arg was removed",
            ),
        ] {
            let error = parse(&[(key, value)]).expect_err(key);
            assert!(error.contains(want), "{error:?} lacks {want:?}");
        }
    }
}
