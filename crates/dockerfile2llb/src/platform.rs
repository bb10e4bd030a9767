//! Platforms of a build and the arguments that describe them (rows `df.arg.plat`, `df.arg.tplat`).

use shipway_llb::EnvList;
use shipway_oci::{ImageConfig, Platform};
use std::collections::BTreeMap;

/// Which platforms a conversion is about.
#[derive(Clone, Debug)]
pub struct Platforms {
    pub target: Platform,
    /// Where steps can run natively.
    pub build: Platform,
    /// Whether the target was not asked for, so that a base image may decide it.
    pub implicit: bool,
}

impl Platforms {
    pub fn new(target: Option<&Platform>, build: Platform) -> Self {
        Self {
            target: target.cloned().unwrap_or_else(|| build.clone()),
            build,
            implicit: target.is_none(),
        }
    }

    /// The arguments that exist without `ARG`; build arguments of their names win.
    pub fn default_args(&self, overrides: &BTreeMap<String, String>, stage: &str) -> EnvList {
        let (b, t) = (&self.build, &self.target);
        let mut env = EnvList::default();
        for (name, value) in [
            ("BUILDPLATFORM", b.to_string()),
            ("BUILDOS", b.os.clone()),
            ("BUILDOSVERSION", b.os_version.clone()),
            ("BUILDARCH", b.architecture.clone()),
            ("BUILDVARIANT", b.variant.clone()),
            ("TARGETPLATFORM", full(t)),
            ("TARGETOS", t.os.clone()),
            ("TARGETOSVERSION", t.os_version.clone()),
            ("TARGETARCH", t.architecture.clone()),
            ("TARGETVARIANT", t.variant.clone()),
            ("TARGETSTAGE", if stage.is_empty() { "default".into() } else { stage.into() }),
        ] {
            env.set(name, overrides.get(name).unwrap_or(&value));
        }
        env
    }
}

/// A platform with its operating system's version.
pub fn full(platform: &Platform) -> String {
    if platform.os_version.is_empty() {
        return platform.to_string();
    }
    let text = platform.to_string();
    text.replacen(&platform.os, &format!("{}({})", platform.os, platform.os_version), 1)
}

/// The build platform that an image was made for, where that is not the target.
pub fn detect(image: &ImageConfig, target: &Platform, build: &Platform) -> Platform {
    let same = |p: &Platform| p.os == image.os && p.architecture == image.architecture;
    if !same(target) && same(build) { build.clone() } else { target.clone() }
}
