//! The bare repository that is kept per remote, and checkouts out of it (rows `src.git`,
//! `src.git.sub`).

use super::{
    attrs::{GitSpec, is_commit},
    cli::Git,
    tree,
};
use crate::memo::Tip;
use bytes::Bytes;
use shipway_fault::{Class, Code, Context, Fault, Result};
use std::path::{Path, PathBuf};

impl Tip {
    /// Whether it is what the user expects (row `src.git.sum`).
    pub(crate) fn check(&self, spec: &GitSpec) -> Result<()> {
        if self.sha.starts_with(&spec.checksum)
            || self.commit.as_ref().is_some_and(|c| c.starts_with(&spec.checksum))
        {
            return Ok(());
        }
        let got = self.commit.as_ref().map_or(self.sha.clone(), |c| format!("{} or {c}", self.sha));
        Err(Fault::invalid(format!("expected checksum to match {}, got {got}", spec.checksum))
            .hint("the branch or tag has moved; if that is right, change the checksum"))
    }
}

/// Asks the remote where the reference leads.
pub(crate) async fn find_tip(git: &Git, spec: &GitSpec) -> Result<Tip> {
    if spec.by_commit {
        return Ok(Tip {
            sha: spec.checksum.clone(),
            reference: spec.reference.clone(),
            commit: None,
        });
    }
    if is_commit(&spec.reference) {
        return Ok(Tip {
            sha: spec.reference.clone(),
            reference: spec.reference.clone(),
            commit: None,
        });
    }
    let doing = || format!("failed to fetch remote {}", spec.shown());
    let reference = match spec.reference.as_str() {
        "" => {
            let answer = git
                .run(None, &["ls-remote", "--symref", "--", &spec.remote, "HEAD"])
                .await
                .context(doing)?;
            default_branch(&answer).ok_or_else(|| {
                Fault::not_found(format!(
                    "could not find default branch for repository: {}",
                    spec.shown()
                ))
            })?
        }
        r => r.to_owned(),
    };
    let peeled = format!("{reference}^{{}}");
    let answer = git
        .run(None, &["ls-remote", "--", &spec.remote, &reference, &peeled])
        .await
        .context(doing)?;
    pick(&answer, &reference).ok_or_else(|| {
        Fault::not_found(format!("repository does not contain ref {reference}: {}", spec.shown()))
    })
}

/// The branch that `ls-remote --symref … HEAD` names.
fn default_branch(answer: &str) -> Option<String> {
    let branch = answer
        .lines()
        .find_map(|l| l.strip_prefix("ref: refs/heads/"))?
        .split_whitespace()
        .next()?;
    (!branch.starts_with('-')).then(|| branch.to_owned())
}

/// Which line of `ls-remote` is meant: exactly this name, then a branch, then a tag, as
/// `git checkout` prefers.
pub(super) fn pick(answer: &str, reference: &str) -> Option<Tip> {
    let find = |name: &str| {
        answer
            .lines()
            .filter_map(|l| l.split_once('\t'))
            .find(|(_, n)| *n == name)
            .map(|(sha, _)| sha.to_owned())
    };
    let short =
        |prefix: &str| format!("{prefix}{}", reference.strip_prefix(prefix).unwrap_or(reference));
    let tag = short("refs/tags/");
    let partial = short("refs/");
    let candidates = [partial.as_str(), &short("refs/heads/"), &tag].map(str::to_owned);
    let (sha, name) = candidates.into_iter().find_map(|name| Some((find(&name)?, name)))?;
    if !is_commit(&sha) {
        return None;
    }
    let commit = name
        .starts_with("refs/tags/")
        .then(|| find(&format!("{name}^{{}}")))
        .flatten()
        .filter(|c| is_commit(c));
    Some(Tip { sha, reference: name, commit })
}

/// An object by its name.
pub(crate) struct Object {
    pub name: String,
    pub text: Bytes,
}

/// What a reference leads to, as git has it.
pub(crate) struct Objects {
    pub commit: Object,
    /// The annotated tag that leads to the commit, if there is one.
    pub tag: Option<Object>,
}

/// A bare repository on disk.
pub(crate) struct Repo<'a> {
    pub git: Git,
    pub dir: PathBuf,
    pub spec: &'a GitSpec,
}

impl Repo<'_> {
    pub(super) fn here(&self) -> Git {
        self.git.clone().git_dir(&self.dir)
    }

    pub(super) async fn has(&self, sha: &str) -> bool {
        self.here().succeeds(&["cat-file", "-e", &format!("{sha}^{{commit}}")]).await
    }

    /// Brings `tip` into the repository, as shallow as the server allows.
    pub(crate) async fn fetch(&self, tip: &Tip) -> Result<()> {
        self.fetch_object(tip, self.needed(tip)).await
    }

    /// The same until the object `sha` is there.
    pub(crate) async fn fetch_object(&self, tip: &Tip, sha: &str) -> Result<()> {
        if self.has(sha).await {
            return Ok(());
        }
        let git = self.here();
        let target = format!("+{sha}:refs/shipway/tips/{sha}");
        let mut tries: Vec<Vec<&str>> = Vec::new();
        let by_name = format!("+{}:refs/shipway/tips/{sha}", tip.reference);
        if !is_commit(&tip.reference) && !self.spec.by_commit {
            tries.push(vec!["fetch", "--depth=1", "--no-tags", "origin", &by_name]);
        }
        // The reference may have moved since it was pinned; many servers give out any commit that
        // is asked for by name.
        tries.push(vec!["fetch", "--depth=1", "--no-tags", "origin", &target]);
        let shallow = self.dir.join("shallow").exists();
        let mut all = vec!["fetch", "--tags", "--force"];
        if shallow {
            all.push("--unshallow");
        }
        all.extend(["origin", "+refs/heads/*:refs/heads/*"]);
        tries.push(all);
        let mut last = None;
        for arguments in &tries {
            match git.run(None, arguments).await {
                Ok(_) if self.has(sha).await => return Ok(()),
                Ok(_) => {}
                Err(e) => {
                    let hopeless = matches!(
                        e.code(),
                        shipway_fault::Code::Unauthenticated | shipway_fault::Code::Unavailable
                    );
                    last = Some(e);
                    if hopeless {
                        break;
                    }
                }
            }
        }
        let failed = last.unwrap_or_else(|| {
            Fault::not_found(format!(
                "fetched ref {} does not match expected commit {sha} and commit can not be found in the repository",
                tip.reference
            ))
        });
        Err(failed.context(format!("failed to fetch remote {}", self.spec.shown())))
    }

    /// Checks `tip` out into `to`.
    pub(crate) async fn checkout(&self, tip: &Tip, to: &Path) -> Result<()> {
        let doing = || format!("failed to checkout remote {}", self.spec.shown());
        let keep = self.spec.keep_git_dir && self.spec.subdir.is_empty();
        let work =
            if self.spec.subdir.is_empty() { to.to_owned() } else { to.join(".shipway-checkout") };
        tokio::fs::create_dir_all(&work)
            .await
            .map_err(|e| Fault::io("make a directory for the checkout", e))?;
        let git = if keep {
            self.clone_into(tip, to).await.context(doing)?
        } else {
            self.read_into(tip, &work).await.context(doing)?
        };
        if !self.spec.skip_submodules && work.join(".gitmodules").exists() {
            self.submodules(&git, &work)
                .await
                .context(|| format!("failed to update submodules for {}", self.spec.shown()))?;
        }
        let time = match self.spec.commit_time {
            true => Some(self.commit_time(tip).await?),
            false => None,
        };
        let (subdir, to) = (self.spec.subdir.clone(), to.to_owned());
        let arrange = move || {
            if !subdir.is_empty() {
                tree::lift(&work, &subdir, &to)?;
            }
            time.map_or(Ok(()), |t| tree::set_times(&to, t))
        };
        shipway_task::blocking("arrange files", arrange).await
    }

    /// Writes the files alone; the index goes elsewhere.
    async fn read_into(&self, tip: &Tip, work: &Path) -> Result<Git> {
        let index = self.dir.join("shipway-index");
        let _ = tokio::fs::remove_file(&index).await;
        let git = self.here().work_tree(work).env("GIT_INDEX_FILE", index.display().to_string());
        git.run(Some(work), &["read-tree", "--reset", "-u", self.needed(tip)]).await?;
        Ok(git)
    }

    /// Makes a repository of its own with one commit, under the reference's name.
    async fn clone_into(&self, tip: &Tip, to: &Path) -> Result<Git> {
        let dot_git: PathBuf = to.join(".git");
        let git = self.git.clone().git_dir(&dot_git).work_tree(to);
        let format =
            if tip.sha.len() == 64 { "--object-format=sha256" } else { "--object-format=sha1" };
        git.run(Some(to), &["-c", "init.defaultBranch=master", "init", "--quiet", format]).await?;
        // By address and not by path, because a clone by path has copied more than it should in
        // some versions of git.
        git.run(None, &["remote", "add", "origin", &format!("file://{}", self.dir.display())])
            .await?;
        let held = format!("refs/shipway/checkouts/{}", tip.sha);
        self.here().run(None, &["update-ref", &held, &tip.sha]).await?;
        let named = tip.reference.starts_with("refs/");
        let spec = if named { format!("{held}:{}", tip.reference) } else { held.clone() };
        // Tags that happen to lead here would be fetched as well, and clash with the reference when
        // it is one of them.
        git.run(
            None,
            &[
                "fetch",
                "--quiet",
                "--update-head-ok",
                "--no-tags",
                "--depth=1",
                "--",
                "origin",
                &spec,
            ],
        )
        .await?;
        git.run(Some(to), &["checkout", "--quiet", "FETCH_HEAD"]).await?;
        git.run(None, &["remote", "set-url", "origin", &self.spec.remote]).await?;
        git.run(None, &["reflog", "expire", "--all", "--expire=now"]).await?;
        let _ = tokio::fs::remove_file(dot_git.join("FETCH_HEAD")).await;
        Ok(git)
    }

    async fn submodules(&self, git: &Git, work: &Path) -> Result<()> {
        let shallow = git
            .run(Some(work), &["submodule", "update", "--init", "--recursive", "--depth=1"])
            .await;
        match shallow {
            Ok(_) => Ok(()),
            // Servers that give out no commit by name need the whole history.
            Err(_) => git
                .run(Some(work), &["submodule", "update", "--init", "--recursive"])
                .await
                .map(drop),
        }
    }

    /// The objects of `tip`, which are in the repository.
    pub(super) async fn objects(&self, tip: &Tip) -> Result<Objects> {
        let git = self.here();
        // A name says nothing of the kind.
        let kind = git.run(None, &["cat-file", "-t", &tip.sha]).await?;
        let commit = git
            .run(None, &["rev-parse", "--verify", &format!("{}^{{commit}}", tip.sha)])
            .await?
            .trim()
            .to_owned();
        // What the remote says of a tag is not what the tag says, and that alone is signed.
        if let Some(said) = tip.commit.as_ref().filter(|said| **said != commit) {
            let what = format!(
                "{} says that {} leads to commit {said}, but it leads to {commit}",
                self.spec.shown(),
                tip.reference
            );
            return Err(Fault::new(Code::FailedPrecondition, what)
                .with_class(Class::User)
                .hint("do not trust the server"));
        }
        let tag = match kind.trim() {
            "commit" => None,
            "tag" => Some(self.object("tag", &tip.sha).await?),
            other => {
                return Err(Fault::invalid(format!("expected commit or tag object, got {other}")));
            }
        };
        Ok(Objects { commit: self.object("commit", &commit).await?, tag })
    }

    async fn object(&self, kind: &str, name: &str) -> Result<Object> {
        let text = self.here().bytes(None, &["cat-file", kind, name]).await.map(Bytes::from)?;
        Ok(Object { name: name.to_owned(), text })
    }

    /// What is needed of `tip`: its commit, where the tag itself leaves no trace. A tag that has
    /// moved on is then no obstacle.
    pub(super) fn needed<'t>(&self, tip: &'t Tip) -> &'t str {
        tip.commit.as_deref().filter(|_| !self.spec.keep_git_dir).unwrap_or(&tip.sha)
    }

    async fn commit_time(&self, tip: &Tip) -> Result<i64> {
        let text = self
            .here()
            .run(None, &["show", "-s", "--format=%ct", &format!("{}^{{commit}}", self.needed(tip))])
            .await?;
        text.trim()
            .parse()
            .map_err(|_| Fault::internal(format!("git said {text:?} for the time of a commit")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_found_in_the_order_of_git() {
        let (a, b, c) = ("a".repeat(40), "b".repeat(40), "c".repeat(40));
        let answer = format!(
            "{a}\trefs/heads/x\n{b}\trefs/tags/x\n{c}\trefs/tags/x^{{}}\n{b}\trefs/tags/v1\n{c}\trefs/tags/v1^{{}}\n{a}\trefs/pull/1/head\n"
        );
        for (reference, sha, name, commit) in [
            ("x", &a, "refs/heads/x", None),
            ("refs/tags/x", &b, "refs/tags/x", Some(&c)),
            ("v1", &b, "refs/tags/v1", Some(&c)),
            ("pull/1/head", &a, "refs/pull/1/head", None),
            ("tags/v1", &b, "refs/tags/v1", Some(&c)),
        ] {
            let want = Tip { sha: sha.clone(), reference: name.into(), commit: commit.cloned() };
            assert_eq!(pick(&answer, reference), Some(want), "{reference}");
        }
        assert_eq!(pick(&answer, "none"), None);
        assert_eq!(default_branch("ref: refs/heads/dev\tHEAD\nx\tHEAD\n").as_deref(), Some("dev"));
        assert_eq!(default_branch("x\tHEAD\n"), None);
    }
}
