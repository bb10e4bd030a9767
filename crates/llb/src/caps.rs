//! Capability names: what a client may ask for (rows `cap.*`). A name stands in one of two lists:
//! what this daemon does, and what BuildKit does and this daemon does not yet. Implementing one
//! means moving its line.

use shipway_fault::Fault;
use std::collections::BTreeSet;

/// LLB, exporter and daemon capabilities that this daemon has (advertised by `Ping`).
pub const LLB: &[&str] = &[
    "source.image",
    "source.image.resolvemode",
    "source.image.layerlimit",
    "source.image.checksum",
    "source.local",
    "source.local.unique",
    "source.local.sessionid",
    "source.local.includepatterns",
    "source.local.followpaths",
    "source.local.excludepatterns",
    "source.local.sharedkeyhint",
    "source.local.differ",
    "source.local.metadatatransfer",
    "source.git",
    "source.git.keepgitdir",
    "source.git.fullurl",
    "source.git.httpauth",
    "source.git.knownsshhosts",
    "source.git.mountsshsock",
    "source.git.subdir",
    "source.git.checksum",
    "source.git.skipsubmodules",
    "source.git.signatureverify",
    "source.git.mtime",
    "source.git.fetchbycommit",
    "source.git.bundle",
    "source.git.checkoutbundle",
    "source.imageblob",
    "source.ocilayout",
    "source.http",
    "source.http.auth",
    "source.http.checksum",
    "source.http.perm",
    // The spelling is the reference's.
    "soruce.http.uidgid",
    "source.http.header",
    "source.http.signatureverify",
    "source.buildop.llbfilename",
    "exec.meta.base",
    "exec.meta.cdi",
    "exec.meta.cgroup.parent",
    "exec.meta.network",
    "exec.meta.network.proxy",
    "exec.meta.proxyenv",
    "exec.meta.security",
    "exec.meta.security.devices.v1",
    "exec.meta.setsdefaultpath",
    "exec.meta.ulimit",
    "exec.meta.linux.resources",
    "exec.mount.bind",
    "exec.mount.bind.readwrite-nooutput",
    "exec.mount.cache",
    "exec.mount.cache.sharing",
    "exec.mount.selector",
    "exec.mount.tmpfs",
    "exec.mount.tmpfs.size",
    "exec.mount.secret",
    "exec.mount.ssh",
    "exec.mount.cache.content",
    "exec.cgroup",
    "exec.secretenv",
    "exec.validexitcode",
    "file.base",
    "file.rm.wildcard",
    "file.copy.includeexcludepatterns",
    "file.copy.requiredpaths",
    "file.rm.nofollowsymlink",
    "file.copy.alwaysreplaceexistingdestpaths",
    "file.symlink.create",
    "constraints",
    "platform",
    "meta.ignorecache",
    "meta.description",
    "meta.exportcache",
    "mergeop",
    "diffop",
    "passthroughop",
    "exporter.image.annotations",
    "exporter.image.attestations",
    "exporter.sourcedateepoch",
    "exporter.multiple",
    "exporter.session",
    "cache.gha",
    "cache.s3",
    "cache.azblob",
    "gc.freespacefilter",
    "history.filter",
    "source.policy",
    "source.policy.session",
];

/// What BuildKit has and this daemon lacks.
pub const LLB_MISSING: &[&str] = &[];

/// Gateway capabilities that this daemon has.
pub const GATEWAY: &[&str] = &[
    "solve.base",
    "solve.inlinereturn",
    "resolveimage",
    "resolveimage.resolvemode",
    "readfile",
    "return",
    "returnmap",
    "readdir",
    "statfile",
    "proto.refarray",
    "reference.output",
    "reference.attestations",
    "frontend.inputs",
    "gateway.solve.metadata",
    "frontend.caps",
    "gateway.solve.evaluate",
    "gateway.evaluate",
    "gateway.warnings",
    "source.metaresolver",
    "source.metaresolver.http.checksumrequest",
    "source.metaresolver.image.attestations",
    "importcaches",
    "gateway.exec",
    "gateway.exec.extrahosts",
    "gateway.exec.secretenv",
    "gateway.exec.signals",
    "gateway.exec.filesystem",
];

/// What BuildKit's gateway has and this daemon's lacks.
pub const GATEWAY_MISSING: &[&str] = &[];

/// A set of capabilities.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Caps(BTreeSet<String>);

impl Caps {
    /// What this daemon does with LLB and results.
    pub fn llb() -> Self {
        LLB.iter().copied().collect()
    }

    /// What this daemon's gateway does.
    pub fn gateway() -> Self {
        GATEWAY.iter().copied().collect()
    }

    /// Whether `name` is in the set.
    pub fn has(&self, name: &str) -> bool {
        self.0.contains(name)
    }

    /// An error in BuildKit's words when `name` is not in the set (row `llb.md.caps`).
    pub fn require(&self, name: &str) -> Result<(), Fault> {
        if self.has(name) {
            return Ok(());
        }
        if LLB_MISSING.contains(&name) || GATEWAY_MISSING.contains(&name) {
            let message = format!(
                "requested experimental feature {name}  is not supported by build server, please update buildkit"
            );
            return Err(Fault::unimplemented(format_args!("{name}")).context(message));
        }
        let shown: String = name.chars().take(100).collect();
        let fault = Fault::invalid(format!("unknown API capability {shown}"));
        Err(match shipway_fault::nearest(&shown, self.iter()) {
            Some(near) => fault.hint(format!("the nearest known one is {near}")),
            None => fault,
        })
    }

    /// The names, sorted.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }
}

impl<S: Into<String>> FromIterator<S> for Caps {
    fn from_iter<I: IntoIterator<Item = S>>(names: I) -> Self {
        Self(names.into_iter().map(Into::into).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shipway_fault::Code;

    #[test]
    fn capabilities_are_known_missing_or_unknown() {
        let all = Caps::llb();
        for known in LLB {
            assert!(all.require(known).is_ok(), "{known}");
        }
        for missing in LLB_MISSING {
            let fault = all.require(missing).unwrap_err();
            assert_eq!(fault.code(), Code::Unimplemented);
            assert!(fault.to_string().contains("is not supported by build server"), "{fault}");
        }
        // BuildKit does what these mean and announces neither; so do we.
        for unregistered in ["exec.meta.removemountstubs.recursive", "file.copy.modestring"] {
            assert!(
                all.require(unregistered)
                    .unwrap_err()
                    .to_string()
                    .contains("unknown API capability")
            );
        }
        let near = all.require("source.imag").unwrap_err();
        assert_eq!(near.code(), Code::InvalidArgument);
        assert_eq!(near.hints().collect::<Vec<_>>(), ["the nearest known one is source.image"]);
    }
}
