//! Addresses of git repositories: which texts are one, and the state they mean (rows `dfc.git`,
//! `df.add`).

use crate::{State, VertexOptions, attr};
use shipway_fault::{Fault, Result};
use shipway_gocompat::{Url, parse_bool, path, quote};
use std::collections::BTreeMap;

/// A parsed address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GitRef {
    /// The repository, for git.
    pub remote: String,
    /// Scheme; `ssh` for `git@host:path`.
    pub scheme: String,
    /// With its port, if the address has one.
    pub host: String,
    /// Path of the repository on the host.
    pub path: String,
    /// Branch, tag or commit; empty for the default.
    pub reference: String,
    /// What the commit must begin with; empty for anything.
    pub checksum: String,
    /// Directory within the repository; empty for all of it.
    pub subdir: String,
    /// Whether the text could as well be a local path, such as `github.com/a/b`: only contexts may
    /// be written so.
    pub looks_local: bool,
    /// `keep-git-dir`: whether `.git` is kept.
    pub keep_git_dir: Option<bool>,
    /// `submodules`: whether they are fetched, too.
    pub submodules: Option<bool>,
    /// `mtime`: `checkout` or `commit`; empty for the default.
    pub mtime: String,
    /// `fetch-by-commit`: fetch the commit in `checksum` whatever the reference leads to.
    pub fetch_by_commit: bool,
}

impl GitRef {
    /// Reads an address. `None` when the text is none; an error when it is one with a wrong query.
    pub fn parse(text: &str) -> Result<Option<Self>> {
        let Some((mut git, query, fragment)) = Self::split(text) else { return Ok(None) };
        if !fragment.is_empty() {
            let (reference, subdir) = fragment.split_once(':').unwrap_or((&fragment, ""));
            git.reference = reference.to_owned();
            git.subdir = path::inside(subdir);
        }
        git.load_query(&query)?;
        Ok(Some(git))
    }

    /// `remote#reference[:subdirectory]`, the latter if `subdir` says so; `None` when the text is
    /// no address (row `at.prov.params`).
    pub fn formatted(text: &str, subdir: bool) -> Option<String> {
        let git = Self::parse(text).ok()??;
        let below = if subdir { git.subdir.as_str() } else { "" };
        Some(match (git.reference.as_str(), below) {
            ("", "") => git.remote,
            (reference, "") => format!("{}#{reference}", git.remote),
            (reference, below) => format!("{}#{reference}:{below}", git.remote),
        })
    }

    fn split(text: &str) -> Option<(Self, String, String)> {
        if text.starts_with("./") || text.starts_with("../") {
            return None;
        }
        if text.starts_with("github.com/") {
            let (mut git, query, fragment) = Self::url(&format!("https://{text}"))?;
            git.remote = git.remote.strip_prefix("https://").map(str::to_owned)?;
            git.looks_local = true;
            return Some((git, query, fragment));
        }
        if let Some((scheme, _)) = text.split_once("://") {
            let scheme = scheme.to_ascii_lowercase();
            if !["http", "https", "ssh", "git"].contains(&scheme.as_str()) {
                return None;
            }
            return Self::url(text)
                .filter(|(git, ..)| !scheme.starts_with("http") || git.path.ends_with(".git"));
        }
        let (user, rest) = text.split_once('@')?;
        let (host, rest) = rest.split_once(':')?;
        let word = |t: &str, more: &str| {
            !t.is_empty() && t.chars().all(|c| c.is_ascii_alphanumeric() || more.contains(c))
        };
        if !word(user, "-_") || !word(host, "-.") {
            return None;
        }
        let (rest, fragment) = rest.split_once('#').unwrap_or((rest, ""));
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let git = Self {
            remote: format!("{user}@{host}:{path}"),
            scheme: "ssh".into(),
            host: host.into(),
            path: path.into(),
            ..Self::default()
        };
        Some((git, query.to_owned(), fragment.to_owned()))
    }

    fn url(text: &str) -> Option<(Self, String, String)> {
        let url = Url::parse(text)?;
        let git = Self {
            remote: url.remote(),
            scheme: url.scheme,
            host: url.host,
            path: url.path,
            ..Self::default()
        };
        Some((git, url.query, url.fragment))
    }

    fn load_query(&mut self, query: &str) -> Result<()> {
        let mut seen: BTreeMap<String, Option<String>> = BTreeMap::new();
        for (key, value) in Url::pairs(query) {
            let flag = matches!(key.as_str(), "submodules" | "keep-git-dir" | "fetch-by-commit");
            if value.is_empty() && !flag {
                return Err(Fault::unknown(format!("query {} has no value", quote(&key))));
            }
            if seen.insert(key.clone(), (!value.is_empty()).then_some(value)).is_some() {
                return Err(Fault::unknown(format!("query {} has multiple values", quote(&key))));
            }
        }
        let (mut tag, mut branch) = (None, None);
        for (key, value) in seen {
            let text = value.clone().unwrap_or_default();
            let truth = || match &value {
                None => Ok(true),
                Some(v) => parse_bool(v)
                    .ok_or_else(|| Fault::unknown(format!("invalid {key} value: {}", quote(v)))),
            };
            match key.as_str() {
                "ref" => self.set_reference(text)?,
                "tag" => tag = Some(qualified("refs/tags/", text)),
                "branch" => branch = Some(qualified("refs/heads/", text)),
                "subdir" if !self.subdir.is_empty() && self.subdir != text => {
                    return Err(Fault::unknown(format!(
                        "subdir conflicts: {} vs {}",
                        quote(&self.subdir),
                        quote(&text)
                    )));
                }
                "subdir" => self.subdir = text,
                "checksum" | "commit" => self.checksum = text,
                "keep-git-dir" => self.keep_git_dir = Some(truth()?),
                "submodules" => self.submodules = Some(truth()?),
                "fetch-by-commit" => self.fetch_by_commit = truth()?,
                "mtime" if matches!(text.as_str(), "checkout" | "commit") => self.mtime = text,
                "mtime" => {
                    let message = format!(
                        "invalid mtime value: {} (must be \"checkout\" or \"commit\")",
                        quote(&text)
                    );
                    return Err(Fault::unknown(message));
                }
                _ => return Err(Fault::unknown(format!("unexpected query {}", quote(&key)))),
            }
        }
        match (tag, branch) {
            (Some(_), Some(_)) => Err(Fault::unknown("branch conflicts with tag")),
            (Some(reference), None) | (None, Some(reference)) => self.set_reference(reference),
            (None, None) => Ok(()),
        }
    }

    fn set_reference(&mut self, reference: String) -> Result<()> {
        if !self.reference.is_empty() && self.reference != reference {
            return Err(Fault::unknown(format!(
                "ref conflicts: {} vs {}",
                quote(&self.reference),
                quote(&reference)
            )));
        }
        self.reference = reference;
        Ok(())
    }

    /// The state of the repository.
    pub fn state(&self, options: VertexOptions) -> State {
        let mut id = format!("{}{}", self.host, path::join("/", &self.path));
        if !self.reference.is_empty() || !self.subdir.is_empty() {
            id += &format!("#{}", self.reference);
            if !self.subdir.is_empty() {
                id += &format!(":{}", self.subdir);
            }
        }
        let remote =
            if self.looks_local { format!("https://{}", self.remote) } else { self.remote.clone() };
        let mut attrs = BTreeMap::from([
            (attr::GIT_FULL_URL.to_owned(), remote),
            (attr::GIT_AUTH_TOKEN_SECRET.to_owned(), "GIT_AUTH_TOKEN".to_owned()),
            (attr::GIT_AUTH_HEADER_SECRET.to_owned(), "GIT_AUTH_HEADER".to_owned()),
        ]);
        let mut options = options.cap("source.git").cap("source.git.fullurl");
        if self.scheme == "ssh" {
            attrs.insert(attr::GIT_MOUNT_SSH_SOCK.into(), "default".into());
            options = options.cap("source.git.knownsshhosts").cap("source.git.mountsshsock");
        }
        let truth = |b: bool| if b { "true" } else { "" };
        for (name, value, cap) in [
            (attr::GIT_KEEP_DIR, truth(self.keep_git_dir == Some(true)), "source.git.keepgitdir"),
            (attr::GIT_CHECKSUM, self.checksum.as_str(), "source.git.checksum"),
            (
                attr::GIT_SKIP_SUBMODULES,
                truth(self.submodules == Some(false)),
                "source.git.skipsubmodules",
            ),
            (attr::GIT_MTIME, self.mtime.as_str(), "source.git.mtime"),
            (attr::GIT_FETCH_BY_COMMIT, truth(self.fetch_by_commit), "source.git.fetchbycommit"),
        ] {
            if !value.is_empty() {
                attrs.insert(name.into(), value.into());
                options = options.cap(cap);
            }
        }
        State::source(format!("git://{id}"), attrs, options)
    }
}

fn qualified(prefix: &str, name: String) -> String {
    if name.starts_with(prefix) { name } else { format!("{prefix}{name}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, remote: &str, reference: &str, subdir: &str) {
        let git = GitRef::parse(text).expect("valid").expect("a repository");
        assert_eq!(
            (git.remote.as_str(), git.reference.as_str(), git.subdir.as_str()),
            (remote, reference, subdir),
            "{text}"
        );
    }

    #[test]
    fn addresses_are_told_from_paths() {
        check("https://h.io/a/b.git#baz/q:x/y", "https://h.io/a/b.git", "baz/q", "x/y");
        check("git@h.io:a/b.git#v1", "git@h.io:a/b.git", "v1", "");
        check("ssh://git@h.io/a/b", "ssh://git@h.io/a/b", "", "");
        check("github.com/a/b", "github.com/a/b", "", "");
        check("https://h.io/a.git?tag=v1&subdir=x", "https://h.io/a.git", "refs/tags/v1", "x");
        for no in ["a/b", "./a.git", "https://h.io/a.tgz", "ftp://h.io/a.git", "dir:file", ""] {
            assert_eq!(GitRef::parse(no).expect("valid"), None, "{no}");
        }
    }

    #[test]
    fn wrong_queries_are_errors() {
        for (text, want) in [
            ("https://h.io/a.git?x=1", "unexpected query \"x\""),
            ("https://h.io/a.git?ref=", "query \"ref\" has no value"),
            ("https://h.io/a.git?ref=a&ref=b", "query \"ref\" has multiple values"),
            ("https://h.io/a.git?ref=a#b", "ref conflicts: \"b\" vs \"a\""),
            (
                "https://h.io/a.git?mtime=x",
                "invalid mtime value: \"x\" (must be \"checkout\" or \"commit\")",
            ),
        ] {
            assert_eq!(GitRef::parse(text).expect_err(text).to_string(), want);
        }
    }
}
