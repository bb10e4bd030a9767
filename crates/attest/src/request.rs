//! What was asked of a frontend, as provenance has it: without what concerns this host alone, and
//! without passwords (row `at.prov.params`).

use crate::{
    Sources,
    capture::{Local, Named},
    intoto::DigestSet,
};
use serde::Serialize;
use shipway_fault::redact;
use std::collections::BTreeMap;

/// A request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs)]
pub struct Parameters {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub frontend: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub args: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<Named>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ssh: Vec<Named>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub locals: Vec<Local>,
    /// Requests that inputs came from.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub inputs: BTreeMap<String, RequestProvenance>,
    /// The request that this one was made for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub root: Option<Box<RequestProvenance>>,
    #[serde(skip_serializing_if = "is_zero")]
    pub compatibility_version: i64,
}

#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_zero(n: &i64) -> bool {
    *n == 0
}

impl Parameters {
    /// Leaves out what `mode=min` does not have; says whether something was.
    pub(crate) fn scrub(&mut self) -> bool {
        let before = self.args.len();
        self.args.retain(|k, _| !k.starts_with("build-arg:") && !k.starts_with("label:"));
        let mut less = self.args.len() < before;
        self.secrets.clear();
        self.ssh.clear();
        for request in self.inputs.values_mut().chain(self.root.as_deref_mut()) {
            less |= request.request.as_mut().is_some_and(Parameters::scrub);
        }
        less
    }
}

/// The build's description: where it was and what file in there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[allow(missing_docs)]
pub struct ConfigSource {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub uri: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub digest: DigestSet,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub path: String,
}

/// A request with where its description was.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs)]
pub struct RequestProvenance {
    pub config_source: ConfigSource,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request: Option<Parameters>,
}

/// Turns the address of a git repository into `remote#reference[:subdirectory]`, the latter if the
/// flag says so; `None` for other texts.
pub type GitAddress = fn(&str, bool) -> Option<String>;

impl RequestProvenance {
    /// The request to `frontend` with `args`, which were [filtered](filter_args).
    pub fn new(
        frontend: &str,
        mut args: BTreeMap<String, String>,
        sources: &Sources,
        git: GitAddress,
    ) -> Self {
        let given = |args: &BTreeMap<String, String>, key: &str| {
            args.get(key).filter(|v| !v.is_empty()).cloned()
        };
        let context = match given(&args, "contextkey") {
            Some(key) => key,
            None if given(&args, "input:context").is_some() => "input:context".into(),
            None => "context".into(),
        };
        let mut source = ConfigSource::default();
        if let Some(uri) = given(&args, &context) {
            (source.uri, source.digest) =
                material(&uri, sources, git).unwrap_or((uri, DigestSet::new()));
            source.uri = redact(&source.uri);
            args.remove(&context);
        }
        if let Some(path) = given(&args, "filename") {
            source.path = path;
            args.remove("filename");
        }
        let request = Parameters { frontend: frontend.to_owned(), args, ..Parameters::default() };
        Self { config_source: source, request: Some(request) }
    }

    /// Without what this was made for.
    #[must_use]
    pub fn rootless(mut self) -> Self {
        if let Some(request) = &mut self.request {
            request.root = None;
        }
        self
    }

    /// Whether it says nothing.
    pub fn is_empty(&self) -> bool {
        self.request
            .as_ref()
            .is_none_or(|r| r.frontend.is_empty() && r.args.is_empty() && r.inputs.is_empty())
    }
}

/// The digests of a commit.
pub(crate) fn commit(commit: &str) -> DigestSet {
    let algorithm = if commit.len() == 64 { "sha256" } else { "sha1" };
    DigestSet::from([(algorithm.to_owned(), commit.to_owned())])
}

/// What the address `uri` led to, if it is among `sources`.
fn material(uri: &str, sources: &Sources, git: GitAddress) -> Option<(String, DigestSet)> {
    let shown = git(uri, true).unwrap_or_else(|| uri.to_owned());
    let plain = git(uri, false).unwrap_or_else(|| uri.to_owned());
    let from_git = sources.git.iter().find(|s| s.url == plain).map(|s| (shown, commit(&s.commit)));
    from_git.or_else(|| {
        let file = sources.http.iter().find(|s| s.url == plain)?;
        Some((file.url.clone(), crate::intoto::digest_set(file.digest)))
    })
}

/// Frontend options without what concerns this host alone, and without passwords in addresses of
/// contexts.
pub fn filter_args(options: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let context =
        options.get("contextkey").filter(|k| !k.is_empty()).map_or("context", String::as_str);
    // How errors are reported says nothing of the result either.
    let host =
        ["cgroup-parent", "image-resolve-mode", "platform", "cache-imports", "source-columns"];
    let kept =
        options.iter().filter(|(k, _)| !host.contains(&k.as_str()) && !k.starts_with("attest:"));
    kept.map(|(k, v)| {
        (k.clone(), if k == context || k.starts_with("context:") { redact(v) } else { v.clone() })
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::GitSource;

    #[test]
    fn the_context_becomes_the_config_source() {
        let args = [
            ("context", "R#main"),
            ("filename", "F"),
            ("attest:sbom", ""),
            ("platform", "x"),
            ("label:a", "b"),
        ];
        let args = args.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let sources = Sources {
            git: vec![GitSource { url: "R#main".into(), commit: "a".repeat(40), bundle: None }],
            ..Sources::default()
        };
        let got =
            RequestProvenance::new("f", filter_args(&args), &sources, |u, _| Some(u.to_owned()));
        assert_eq!(
            (got.config_source.uri.as_str(), got.config_source.path.as_str()),
            ("R#main", "F")
        );
        assert_eq!(got.config_source.digest["sha1"].len(), 40);
        let mut request = got.request.unwrap();
        assert_eq!(request.args.keys().collect::<Vec<_>>(), ["label:a"]);
        assert!(request.scrub() && request.args.is_empty());
    }
}
