//! Platforms and their matching, as containerd's `platforms` package normalizes them.

use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// An operating system and processor. Always normalized: `amd64` without variant, `arm64` without
/// `v8`, `arm` with one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Platform {
    /// Processor, in Go's words: `amd64`, `arm64`, …
    #[serde(default)]
    pub architecture: String,
    /// Operating system, in Go's words.
    #[serde(default)]
    pub os: String,
    /// Version of the operating system (Windows).
    #[serde(rename = "os.version", default, skip_serializing_if = "String::is_empty")]
    pub os_version: String,
    /// Features of the operating system (Windows).
    #[serde(rename = "os.features", default, skip_serializing_if = "Vec::is_empty")]
    pub os_features: Vec<String>,
    /// Variant of the processor, such as `v7`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub variant: String,
}

/// Why a text is not a valid platform, in the words of containerd's package.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum PlatformError {
    /// It stands for several.
    #[error("{0:?}: wildcards not yet supported: invalid argument")]
    Wildcard(String),
    /// It has too many parts.
    #[error("{0:?}: cannot parse platform specifier: invalid argument")]
    Form(String),
    /// One word that is neither.
    #[error("{0:?}: unknown operating system or architecture: invalid argument")]
    Unknown(String),
    /// The operating system has characters that none has.
    #[error(
        "{part:?} is an invalid OS component of {whole:?}: OSAndVersion specifier component must match {:?}: invalid argument",
        r"^([A-Za-z0-9_-]+)(?:\(([A-Za-z0-9_.%-]*)((?:\+[A-Za-z0-9_.%-]+)*)\))?$"
    )]
    Os { part: String, whole: String },
    /// Another part has.
    #[error(
        "{part:?} is an invalid component of {whole:?}: platform specifier component must match \"^[A-Za-z0-9_.-]+$\": invalid argument"
    )]
    Part { part: String, whole: String },
}

const SYSTEMS: [&str; 17] = [
    "aix",
    "android",
    "darwin",
    "dragonfly",
    "freebsd",
    "hurd",
    "illumos",
    "ios",
    "js",
    "linux",
    "nacl",
    "netbsd",
    "openbsd",
    "plan9",
    "solaris",
    "windows",
    "zos",
];

const PROCESSORS: [&str; 24] = [
    "386",
    "amd64",
    "amd64p32",
    "arm",
    "armbe",
    "arm64",
    "arm64be",
    "ppc64",
    "ppc64le",
    "loong64",
    "mips",
    "mipsle",
    "mips64",
    "mips64le",
    "mips64p32",
    "mips64p32le",
    "ppc",
    "riscv",
    "riscv64",
    "s390",
    "s390x",
    "sparc",
    "sparc64",
    "wasm",
];

impl Platform {
    /// A normalized platform.
    pub fn new(os: &str, architecture: &str, variant: &str) -> Self {
        Self {
            architecture: architecture.into(),
            os: os.into(),
            os_version: String::new(),
            os_features: Vec::new(),
            variant: variant.into(),
        }
        .normalized()
    }

    /// The platform of this machine.
    pub fn host() -> Self {
        Self::new("linux", std::env::consts::ARCH, "")
    }

    /// The same platform in canonical words.
    #[must_use]
    pub fn normalized(mut self) -> Self {
        self.os = self.os.to_lowercase();
        if self.os == "macos" {
            self.os = "darwin".into();
        }
        let (arch, variant) = (self.architecture.to_lowercase(), self.variant.to_lowercase());
        let (arch, variant) = match (arch.as_str(), variant.as_str()) {
            ("i386", _) => ("386", ""),
            ("x86_64" | "x86-64" | "amd64", "v1") => ("amd64", ""),
            ("x86_64" | "x86-64", v) => ("amd64", v),
            ("aarch64" | "arm64", "8" | "v8") => ("arm64", ""),
            ("aarch64", v) => ("arm64", v),
            ("armhf", _) => ("arm", "v7"),
            ("armel", _) => ("arm", "v6"),
            ("arm", "" | "7") => ("arm", "v7"),
            ("arm", "5") => ("arm", "v5"),
            ("arm", "6") => ("arm", "v6"),
            ("arm", "8") => ("arm", "v8"),
            ("riscv64gc", _) => ("riscv64", ""),
            ("powerpc64le", _) => ("ppc64le", ""),
            (a, v) => (a, v),
        };
        (self.architecture, self.variant) = (arch.to_owned(), variant.to_owned());
        self
    }

    /// How well an image for `self` runs where `wanted` is asked for: `None` not at all, smaller is
    /// better.
    pub fn rank_for(&self, wanted: &Platform) -> Option<u32> {
        let (a, w) = (self.clone().normalized(), wanted.clone().normalized());
        if a.os != w.os {
            return None;
        }
        if a.architecture == w.architecture {
            let level = |p: &Platform| {
                p.variant
                    .trim_start_matches('v')
                    .parse::<u32>()
                    .unwrap_or(if p.architecture == "amd64" { 1 } else { 8 })
            };
            let (have, want) = (level(&a), level(&w));
            return match a.architecture.as_str() {
                "amd64" | "arm" | "arm64" if have <= want => Some(want - have),
                _ if a.variant == w.variant => Some(0),
                _ => None,
            };
        }
        match (w.architecture.as_str(), a.architecture.as_str()) {
            ("amd64", "386") => Some(100),
            ("arm64", "arm") => Some(100),
            _ => None,
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if self.variant.is_empty() { Ok(()) } else { write!(f, "/{}", self.variant) }
    }
}

impl FromStr for Platform {
    type Err = PlatformError;

    fn from_str(s: &str) -> Result<Self, PlatformError> {
        let short = |s: &str| s.chars().take(100).collect::<String>();
        if s.contains('*') {
            return Err(PlatformError::Wildcard(short(s)));
        }
        let parts: Vec<&str> = s.splitn(4, '/').collect();
        let system = System::parse(parts[0])
            .ok_or_else(|| PlatformError::Os { part: short(parts[0]), whole: short(s) })?;
        let word = |w: &str| {
            !w.is_empty() && w.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c))
        };
        if let Some(bad) = parts[1..].iter().find(|p| !word(p)) {
            return Err(PlatformError::Part { part: short(bad), whole: short(s) });
        }
        let os = system.name;
        let mut p = match parts.as_slice() {
            [one] => match Platform::new(os, one, "") {
                p if SYSTEMS.contains(&p.os.as_str()) => {
                    Platform::new(os, std::env::consts::ARCH, "")
                }
                p if PROCESSORS.contains(&p.architecture.as_str()) => {
                    Platform::new("linux", one, "")
                }
                _ => return Err(PlatformError::Unknown(short(s))),
            },
            [_, arch] => Platform::new(os, arch, ""),
            [_, arch, variant] => Platform::new(os, arch, variant),
            _ => return Err(PlatformError::Form(short(s))),
        };
        (p.os_version, p.os_features) = (system.version, system.features);
        Ok(p)
    }
}

/// `os(version+feature…)`.
struct System<'a> {
    name: &'a str,
    version: String,
    features: Vec<String>,
}

impl<'a> System<'a> {
    fn parse(text: &'a str) -> Option<Self> {
        let (name, options) = match text.split_once('(') {
            Some((name, rest)) => (name, rest.strip_suffix(')')?),
            None => (text, ""),
        };
        let allowed =
            |t: &str, more: &str| t.chars().all(|c| c.is_ascii_alphanumeric() || more.contains(c));
        let mut options = options.split('+');
        let version = options.next().unwrap_or_default();
        let features: Vec<&str> = options.collect();
        let named = !name.is_empty() && allowed(name, "_-");
        let good = named
            && allowed(version, "_.%-")
            && features.iter().all(|f| !f.is_empty() && allowed(f, "_.%-"));
        good.then(|| Self {
            name,
            version: unescape(version),
            features: features.into_iter().map(unescape).collect(),
        })
    }
}

/// Percent signs with two hexadecimal digits stand for a byte.
fn unescape(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let byte = tail
            .get(..2)
            .filter(|_| first == b'%')
            .and_then(|h| u8::from_str_radix(std::str::from_utf8(h).ok()?, 16).ok());
        out.push(byte.unwrap_or(first));
        rest = if byte.is_some() { &tail[2..] } else { tail };
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_normalized() {
        for (text, want) in [
            ("linux/x86_64", "linux/amd64"),
            ("linux/arm64/v8", "linux/arm64"),
            ("linux/arm", "linux/arm/v7"),
            ("arm64", "linux/arm64"),
            ("Linux/AMD64", "linux/amd64"),
            ("linux/armhf", "linux/arm/v7"),
        ] {
            assert_eq!(text.parse::<Platform>().unwrap().to_string(), want);
        }
        let windows: Platform = "windows(10.0.1%2B2+win32k)/amd64".parse().unwrap();
        assert_eq!(
            (windows.os_version.as_str(), windows.os_features),
            ("10.0.1+2", vec!["win32k".to_owned()])
        );
        for (bad, words) in [
            ("", "\"\" is an invalid OS component"),
            (
                "a.b/c",
                "\"a.b\" is an invalid OS component of \"a.b/c\": OSAndVersion specifier component must match \"^([A-Za-z0-9_-]+)(?:\\\\(",
            ),
            ("a/b/c/d", "\"a/b/c/d\": cannot parse platform specifier: invalid argument"),
            (
                "linux//x",
                "\"\" is an invalid component of \"linux//x\": platform specifier component must match",
            ),
            ("lin ux/amd64", "\"lin ux\" is an invalid OS component"),
            ("linux/*", "\"linux/*\": wildcards not yet supported: invalid argument"),
            ("foo", "\"foo\": unknown operating system or architecture: invalid argument"),
        ] {
            let told = bad.parse::<Platform>().unwrap_err().to_string();
            assert!(told.starts_with(words), "{told}");
        }
    }

    #[test]
    fn lower_variants_run_on_higher_machines_only() {
        let p = |s: &str| s.parse::<Platform>().unwrap();
        assert_eq!(p("linux/arm/v6").rank_for(&p("linux/arm/v7")), Some(1));
        assert_eq!(p("linux/arm/v7").rank_for(&p("linux/arm/v6")), None);
        assert_eq!(p("linux/amd64").rank_for(&p("linux/amd64")), Some(0));
        assert_eq!(p("linux/s390x").rank_for(&p("linux/amd64")), None);
    }
}
