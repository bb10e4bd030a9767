//! Where the context came from, as git knows it (row `bx.def.vcs`): attributes that end in
//! provenance and in the history, and labels for those who want them.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use shipway_gocompat::parse_bool;

/// What is told, by the variables that buildx knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Wanted {
    /// `vcs:*` attributes (`BUILDX_GIT_INFO`, true unless said otherwise).
    info: bool,
    /// Labels of the image (`BUILDX_GIT_LABELS`).
    labels: bool,
    /// Whether a revision says that files were changed since (`BUILDX_GIT_CHECK_DIRTY`), which has
    /// git look at all of them.
    dirty: bool,
}

impl Wanted {
    fn of(env: super::options::Env<'_>) -> Self {
        let truth = |name: &str| env(name).and_then(|v| parse_bool(&v));
        let full = env("BUILDX_GIT_LABELS").is_some_and(|v| v == "full");
        Self {
            info: truth("BUILDX_GIT_INFO").unwrap_or(true),
            labels: full || truth("BUILDX_GIT_LABELS").unwrap_or(false),
            dirty: truth("BUILDX_GIT_CHECK_DIRTY").unwrap_or(false),
        }
    }
}

/// A work tree.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Tree {
    root: PathBuf,
    /// The commit, with `-dirty` behind it if files were changed and that was asked.
    revision: Option<String>,
    /// The address of its remote, without credentials.
    remote: Option<String>,
}

/// The first lines that git prints in `dir`; none where it fails.
fn git(dir: &Path, arguments: &[&str]) -> Option<String> {
    let mut command = Command::new("git");
    // A repository may not run its own programs because we ask something of it.
    command.args(["-c", "core.fsmonitor=false", "-c", "log.showSignature=false"]);
    let out = command
        .args(arguments)
        .current_dir(dir)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    out.status.success().then(|| String::from_utf8_lossy(&out.stdout).trim().to_owned())
}

impl Tree {
    /// The work tree that `dir` is in.
    fn of(dir: &Path, wanted: Wanted) -> Option<Self> {
        let found = git(dir, &["rev-parse", "--is-inside-work-tree", "--show-toplevel"]);
        let Some(root) = found.as_deref().and_then(|f| f.strip_prefix("true\n")) else {
            if dir.join(".git").is_dir() {
                tracing::warn!(
                    "the commit of {} is not told: git is not installed, or refuses to read the \
                     repository, for example because it belongs to another user",
                    dir.display()
                );
            }
            return None;
        };
        // A repository without commits has none.
        let head = git(dir, &["rev-parse", "HEAD", "--symbolic-full-name", "HEAD"]);
        let mut head = head.iter().flat_map(|head| head.lines());
        let (commit, branch) = (head.next(), head.next());
        let is_dirty = wanted.dirty
            && git(dir, &["status", "--porcelain", "--ignored"]).is_none_or(|out| !out.is_empty());
        let mark = if is_dirty { "-dirty" } else { "" };
        let of_branch = |branch: &str| {
            git(dir, &["for-each-ref", "--format=%(upstream:remotename)", branch])
                .filter(|name| !name.is_empty())
        };
        let names = branch.and_then(of_branch).into_iter();
        let mut names = names.chain(["origin".to_owned(), "upstream".to_owned()]);
        let remote = names
            .find_map(|name| git(dir, &["remote", "get-url", &name]).filter(|url| !url.is_empty()));
        Some(Self {
            root: root.into(),
            revision: commit.map(|commit| format!("{commit}{mark}")),
            remote: remote.map(|url| redacted(&url)),
        })
    }
}

/// An address without user and password. What is no URL, such as `git@host:path`, stays.
fn redacted(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_owned() };
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    match authority.rsplit_once('@') {
        None => url.to_owned(),
        Some((user, host)) => {
            let hidden = if user.contains(':') { "xxxxx:xxxxx" } else { "xxxxx" };
            format!("{scheme}://{hidden}@{host}{path}")
        }
    }
}

/// Where `path` is below `root`; none if it is not.
fn below(root: &Path, path: &Path) -> Option<String> {
    let path = path.canonicalize().ok()?;
    let inside = path.strip_prefix(root.canonicalize().ok()?).ok()?;
    let text = inside.to_string_lossy().into_owned();
    Some(if text.is_empty() { ".".to_owned() } else { text })
}

/// Attributes that tell of the work tree of `context`, in which the directories `dirs` are offered
/// under their names.
pub(super) fn attributes<'a>(
    context: &Path,
    dockerfile: Option<&Path>,
    dirs: impl Iterator<Item = (&'a str, &'a Path)>,
    env: super::options::Env<'_>,
) -> BTreeMap<String, String> {
    let wanted = Wanted::of(env);
    let mut attrs = BTreeMap::new();
    if !wanted.info && !wanted.labels {
        return attrs;
    }
    // Most directories are in no repository, which costs no program to find out.
    let Ok(full) = context.canonicalize() else { return attrs };
    if !full.ancestors().any(|dir| dir.join(".git").exists()) {
        return attrs;
    }
    let Some(tree) = Tree::of(context, wanted) else { return attrs };
    let told = [
        ("vcs:revision", "org.opencontainers.image.revision", &tree.revision),
        ("vcs:source", "org.opencontainers.image.source", &tree.remote),
    ];
    for (attr, label, value) in told {
        let Some(value) = value else { continue };
        if wanted.labels {
            attrs.insert(format!("label:{label}"), value.clone());
        }
        if wanted.info {
            attrs.insert(attr.to_owned(), value.clone());
        }
    }
    if let Some(entry) = dockerfile.filter(|_| wanted.labels).and_then(|f| below(&tree.root, f)) {
        attrs.insert("label:com.docker.image.source.entrypoint".to_owned(), entry);
    }
    if wanted.info {
        let inside = dirs.filter_map(|(name, dir)| Some((name, below(&tree.root, dir)?)));
        attrs.extend(inside.map(|(name, place)| (format!("vcs:localdir:{name}"), place)));
    }
    attrs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn run(dir: &Path, arguments: &[&str]) {
        let identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"];
        let done = Command::new("git")
            .args(identity)
            .args(arguments)
            .current_dir(dir)
            .env("HOME", dir)
            .output()
            .expect("git");
        assert!(done.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    }

    fn attrs(dir: &Path, env: &[(&str, &str)]) -> BTreeMap<String, String> {
        let sub = dir.join("sub");
        let lookup = |name: &str| {
            env.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        };
        let file = sub.join("Dockerfile");
        let dirs =
            [("context", sub.as_path()), ("dockerfile", sub.as_path()), ("other", Path::new("/"))];
        attributes(&sub, Some(&file), dirs.into_iter(), &lookup)
    }

    #[test]
    fn a_work_tree_is_told_as_buildx_tells_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let dir = dir.path();
        std::fs::create_dir(dir.join("sub")).expect("creates");
        assert!(attrs(dir, &[]).is_empty(), "no repository");
        run(dir, &["init", "--quiet", "--initial-branch", "main"]);
        // Without a commit.
        let places = [("vcs:localdir:context", "sub"), ("vcs:localdir:dockerfile", "sub")];
        let places: BTreeMap<String, String> =
            places.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        assert_eq!(attrs(dir, &[]), places);

        std::fs::write(dir.join("sub/Dockerfile"), "FROM scratch\n").expect("writes");
        run(dir, &["add", "."]);
        run(dir, &["commit", "--quiet", "--message", "m"]);
        run(dir, &["remote", "add", "upstream", "https://user:SECRET@example.org/a.git"]);
        let told = attrs(dir, &[]);
        assert_eq!(told["vcs:source"], "https://xxxxx:xxxxx@example.org/a.git");
        let revision = told["vcs:revision"].clone();
        assert_eq!(revision.len(), 40);
        run(dir, &["remote", "add", "mine", "git@example.org:mine.git"]);
        run(dir, &["config", "branch.main.remote", "mine"]);
        run(dir, &["config", "branch.main.merge", "refs/heads/main"]);
        assert_eq!(attrs(dir, &[])["vcs:source"], "git@example.org:mine.git");

        std::fs::write(dir.join("new"), "x").expect("writes");
        let dirty = attrs(dir, &[("BUILDX_GIT_CHECK_DIRTY", "1")]);
        assert_eq!(dirty["vcs:revision"], format!("{revision}-dirty"));
        let labels = attrs(dir, &[("BUILDX_GIT_LABELS", "full"), ("BUILDX_GIT_INFO", "false")]);
        let keys: Vec<&str> = labels.keys().map(String::as_str).collect();
        assert_eq!(
            keys,
            [
                "label:com.docker.image.source.entrypoint",
                "label:org.opencontainers.image.revision",
                "label:org.opencontainers.image.source"
            ]
        );
        assert_eq!(labels["label:com.docker.image.source.entrypoint"], "sub/Dockerfile");
        assert!(attrs(dir, &[("BUILDX_GIT_INFO", "0")]).is_empty());
    }

    #[test]
    fn addresses_lose_their_credentials() {
        for (url, want) in [
            ("https://example.org/a.git", "https://example.org/a.git"),
            ("https://token@example.org/a.git", "https://xxxxx@example.org/a.git"),
            ("https://u:p@x@example.org:1/a", "https://xxxxx:xxxxx@example.org:1/a"),
            ("git@example.org:a.git", "git@example.org:a.git"),
            ("/srv/a.git", "/srv/a.git"),
        ] {
            assert_eq!(redacted(url), want);
        }
    }
}
