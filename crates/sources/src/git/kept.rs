//! The bare repository that is kept per remote: ours alone while we have it, and usable or not
//! there at all.
//!
//! It is made beside its place and put there when it is whole. What a killed process left in it is
//! removed by its next user, and one that turns out to be damaged is thrown away.

use super::{GitSource, attrs::GitSpec, repo::Repo};
use crate::git::Access;
use shipway_fault::{Code, Context as _, Fault, Result};
use shipway_refs::{LocalMount, NamedRef, NamedRequest, RecordType, Sharing};
use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

/// Name of the repository in the state that is kept.
const NAME: &str = "repository";
/// Deepest directory that is looked through for what was left.
const MAX_DEPTH: usize = 64;

/// A kept repository. Fields drop in this order.
struct Kept {
    mount: LocalMount,
    named: NamedRef,
}

impl GitSource {
    /// Does `work` in the repository that is kept for the remote. If that is damaged, once more in
    /// a new one.
    pub(super) async fn in_repository<'s, T, F>(
        &self,
        spec: &'s GitSpec,
        access: &Access,
        sha256: bool,
        work: impl Fn(Repo<'s>) -> F,
    ) -> Result<T>
    where
        F: Future<Output = Result<T>>,
    {
        let mut may_repeat = true;
        loop {
            let kept = Arc::new(self.kept(spec).await?);
            let dir = kept.mount.path().join(NAME);
            let repo = Repo { git: access.git.clone().holding(kept.clone()), dir, spec };
            let done = async {
                repo.init(sha256).await?;
                work(repo).await
            };
            let done = done.await;
            // Only processes of git that were given up have it besides, and those keep it until
            // they end.
            let kept = Arc::into_inner(kept);
            match done {
                Err(error) if may_repeat && error.code() == Code::DataLoss => {
                    tracing::warn!(remote = spec.shown(), %error, "stored repository is damaged, cloning it again");
                    may_repeat = false;
                    if let Some(Kept { mount, named }) = kept {
                        named.discard().await?;
                        mount.unmount().await?;
                    }
                }
                done => {
                    if let Some(Kept { mount, .. }) = kept {
                        mount.unmount().await?;
                    }
                    return done;
                }
            }
        }
    }

    async fn kept(&self, spec: &GitSpec) -> Result<Kept> {
        let shown = spec.shown();
        let request = NamedRequest {
            record_type: RecordType::Internal,
            key: format!("git:{}", spec.remote),
            description: format!("shared git repo for {shown}"),
            sharing: Sharing::Locked,
            parent: None,
        };
        let what = || format!("prepare the repository of {shown}");
        let named = self.refs.named(request).await.context(what)?;
        let mount = named.mount().await.context(what)?;
        Ok(Kept { mount, named })
    }
}

impl Repo<'_> {
    /// Makes the repository, or removes what killed processes left in it.
    async fn init(&self, sha256: bool) -> Result<()> {
        let dir = self.dir.clone();
        let Some(new) = blocking(move || prepare(&dir)).await? else { return Ok(()) };
        let git = self.git.clone().git_dir(&new);
        let format = if sha256 { "--object-format=sha256" } else { "--object-format=sha1" };
        git.run(
            Some(&new),
            &[
                "-c",
                "init.defaultBranch=master",
                "init",
                "--quiet",
                "--bare",
                "--template=",
                format,
            ],
        )
        .await?;
        git.run(None, &["remote", "add", "origin", &self.spec.remote]).await?;
        tokio::fs::rename(&new, &self.dir)
            .await
            .map_err(|e| Fault::io("put a new repository in its place", e))
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T> {
    let work = move || work().map_err(|e| Fault::io("prepare a kept repository", e));
    shipway_task::blocking("prepare a kept repository", work).await
}

/// Where to make the repository that belongs at `dir`; `None` if it is there, without anything that
/// is only there while a process is at work.
fn prepare(dir: &Path) -> std::io::Result<Option<PathBuf>> {
    if dir.exists() {
        return remove_left(dir, 0).map(|()| None);
    }
    let above = dir.parent().unwrap_or(dir);
    for entry in fs::read_dir(above)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?
        } else {
            fs::remove_file(entry.path())?
        }
    }
    let new = above.join("new");
    fs::create_dir(&new)?;
    Ok(Some(new))
}

/// Removes the locks and temporary files of processes that were killed. No other process is at work
/// here.
fn remove_left(dir: &Path, depth: usize) -> std::io::Result<()> {
    if depth > MAX_DEPTH {
        return Ok(());
    }
    let objects = dir.file_name().is_some_and(|n| n == "objects");
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let temporary = name.starts_with("tmp_")
            || name.starts_with("shipway-")
            || (objects && name.starts_with("incoming-"));
        if entry.file_type()?.is_dir() {
            match () {
                () if temporary => fs::remove_dir_all(entry.path())?,
                // Loose objects are many, and git looks at no other file there.
                () if objects && name.len() == 2 => {}
                () => remove_left(&entry.path(), depth + 1)?,
            }
        } else if temporary || name.ends_with(".lock") {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repository_is_there_whole_or_made_beside_its_place() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join(NAME);
        // What an older version kept, and one that was never finished.
        for left in ["HEAD", "new/config", "new/objects/pack/x"] {
            let left = root.path().join(left);
            fs::create_dir_all(left.parent().unwrap()).unwrap();
            fs::write(left, "").unwrap();
        }
        let new = prepare(&dir).unwrap().unwrap();
        assert_eq!(
            (fs::read_dir(root.path()).unwrap().count(), fs::read_dir(&new).unwrap().count()),
            (1, 0)
        );
        fs::rename(&new, &dir).unwrap();
        let kept = ["HEAD", "refs/heads/tmp", "objects/ab/cdef", "objects/pack/pack-1.pack"];
        let left = [
            "config.lock",
            "refs/heads/main.lock",
            "objects/pack/tmp_pack_x",
            "objects/incoming-1/p",
            "shipway-index",
        ];
        for name in kept.iter().chain(&left) {
            fs::create_dir_all(dir.join(name).parent().unwrap()).unwrap();
            fs::write(dir.join(name), "").unwrap();
        }
        assert_eq!(prepare(&dir).unwrap(), None);
        assert!(kept.iter().all(|name| dir.join(name).exists()));
        assert!(!left.iter().any(|name| dir.join(name).exists()));
    }
}
