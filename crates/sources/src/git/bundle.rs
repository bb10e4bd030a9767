//! Git bundles: a commit with its history in one file, which a source can be made of and can be
//! made into (rows `src.git.bundle`).

use super::{GitSpec, Repo, attrs::is_commit, repo};
use crate::{SourceSpec, blob::BlobAt, clients::ClientServices, http::Shape, memo::Tip};
use shipway_fault::{Context, Fault, Result};
use shipway_registry::Registry;
use std::{os::unix::fs::PermissionsExt as _, path::Path};

/// Name of the file that a source becomes.
const FILE: &str = "bundle";
/// Name of a bundle in the repository that it is brought into.
const INCOMING: &str = "shipway-bundle";

/// Where a bundle is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bundle(pub BlobAt);

impl Bundle {
    /// Reads `docker-image+blob://<name>@<digest>` or `oci-layout+blob://<name>@<digest>`.
    pub(super) fn parse(locator: &str, spec: &SourceSpec) -> Result<Self> {
        let at = BlobAt::parse(locator, spec);
        at.map(Self).map_err(|why| {
            Fault::invalid(format!("failed to parse git.bundle locator {locator:?}: {why}"))
        })
    }
}

impl Repo<'_> {
    /// What is in `bundle`, as `ls-remote` would list it; it is brought into the repository if it
    /// is not there.
    async fn listed(
        &self,
        bundle: &Bundle,
        clients: &dyn ClientServices,
        registry: &Registry,
    ) -> Result<String> {
        let below = format!("refs/shipway/bundles/{}/", bundle.0.digest.hex());
        let git = self.here();
        let list = async || {
            git.run(
                None,
                &["for-each-ref", "--format=%(objectname) %(refname) %(*objectname)", &below],
            )
            .await
        };
        let mut names = list().await?;
        if names.is_empty() {
            let file = self.dir.join(INCOMING);
            // One that a killed daemon left.
            let _ = tokio::fs::remove_file(&file).await;
            let refs = format!("+refs/*:{below}*");
            let path = file.display().to_string();
            let brought = async {
                bundle.0.save(&self.dir, INCOMING, &Shape::default(), clients, registry).await?;
                git.run(
                    None,
                    &["fetch", "--quiet", "--no-tags", "--no-write-fetch-head", "--", &path, &refs],
                )
                .await
                .map(drop)
            };
            let brought =
                brought.await.context(|| format!("failed to fetch git bundle {}", bundle.0.name));
            let _ = tokio::fs::remove_file(&file).await;
            brought?;
            names = list().await?;
        }
        let mut answer = String::new();
        for line in names.lines() {
            let mut words = line.split(' ');
            let (Some(sha), Some(name)) =
                (words.next(), words.next().and_then(|n| n.strip_prefix(&below)))
            else {
                continue;
            };
            answer.push_str(&format!("{sha}\trefs/{name}\n"));
            if let Some(commit) = words.next().filter(|c| !c.is_empty()) {
                answer.push_str(&format!("{commit}\trefs/{name}^{{}}\n"));
            }
        }
        Ok(answer)
    }

    /// Where the reference leads in the bundle.
    pub(super) async fn tip_in(
        &self,
        bundle: &Bundle,
        clients: &dyn ClientServices,
        registry: &Registry,
    ) -> Result<Tip> {
        let answer = self.listed(bundle, clients, registry).await?;
        let reference = &self.spec.reference;
        repo::pick(&answer, reference).ok_or_else(|| {
            Fault::not_found(format!(
                "git bundle {} does not contain ref {reference}",
                bundle.0.name
            ))
        })
    }

    /// Brings the object `sha` into the repository out of the bundle.
    pub(super) async fn unbundle(
        &self,
        sha: &str,
        bundle: &Bundle,
        clients: &dyn ClientServices,
        registry: &Registry,
    ) -> Result<()> {
        if !self.has(sha).await {
            self.listed(bundle, clients, registry).await?;
        }
        if self.has(sha).await {
            Ok(())
        } else {
            Err(Fault::not_found(format!("commit {sha} not found in bundle {}", bundle.0.name)))
        }
    }

    /// Writes the one file that `tip` is as a bundle, with all of its history, into `to`.
    pub(super) async fn bundle(&self, tip: &Tip, to: &Path) -> Result<()> {
        self.deepen(tip).await?;
        let doing = || format!("failed to create git bundle for {}", self.needed(tip));
        // A repository of its own, so that the bundle has the one reference and by its natural
        // name.
        let failed = |e| Fault::io("prepare a repository for a git bundle", e);
        let own = tempfile::Builder::new()
            .prefix("shipway-bundling-")
            .tempdir_in(&self.dir)
            .map_err(failed)?;
        let git = self.git.clone().git_dir(own.path());
        let format =
            if tip.sha.len() == 64 { "--object-format=sha256" } else { "--object-format=sha1" };
        git.run(
            Some(own.path()),
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
        let objects = format!("{}\n", self.dir.join("objects").display());
        tokio::fs::create_dir_all(own.path().join("objects/info")).await.map_err(failed)?;
        tokio::fs::write(own.path().join("objects/info/alternates"), objects)
            .await
            .map_err(failed)?;
        let name = bundled_name(&self.spec.reference);
        git.run(None, &["update-ref", &name, self.needed(tip)]).await.context(doing)?;
        let file = to.join(FILE);
        git.run(None, &["bundle", "create", "--quiet", &file.display().to_string(), &name])
            .await
            .context(doing)?;
        tokio::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644))
            .await
            .map_err(failed)
    }

    /// Fetches the history that shallow fetches left out: a bundle that lacks it is of no
    /// use.
    async fn deepen(&self, tip: &Tip) -> Result<()> {
        let shallow = self.dir.join("shallow");
        let git = self.here();
        let sha = self.needed(tip);
        let by_sha = format!("+{sha}:refs/shipway/tips/{sha}");
        let by_name = format!("+{}:refs/shipway/tips/{sha}", tip.reference);
        for wanted in [by_sha, by_name, "+refs/heads/*:refs/heads/*".to_owned()] {
            if !shallow.exists() {
                return Ok(());
            }
            // By another name than the commit's own it may lead elsewhere by now; the commit is
            // here already, and its history is what counts.
            let _ = git
                .run(
                    None,
                    &["fetch", "--quiet", "--unshallow", "--no-tags", "--force", "origin", &wanted],
                )
                .await;
        }
        if !shallow.exists() {
            return Ok(());
        }
        Err(Fault::invalid(format!(
            "the history of {sha} cannot be had from {}, and without it there is no bundle",
            self.spec.shown()
        )))
    }
}

/// Under which name a bundle has its commit: the reference's, as a branch unless it is a tag by its
/// full name.
pub(super) fn bundled_name(reference: &str) -> String {
    if reference.is_empty() || is_commit(reference) {
        return "refs/heads/main".into();
    }
    if reference.starts_with("refs/tags/") {
        return reference.to_owned();
    }
    let name = reference.strip_prefix("refs/").unwrap_or(reference);
    format!("refs/heads/{}", name.strip_prefix("heads/").unwrap_or(name))
}

impl GitSpec {
    /// Where the reference leads if that can be said without opening the bundle.
    pub(super) fn bundled_tip(&self) -> Option<Tip> {
        let named = !self.reference.is_empty() && !is_commit(&self.reference);
        let sha = if self.reference.is_empty() { &self.checksum } else { &self.reference };
        (!named).then(|| Tip { sha: sha.clone(), reference: sha.clone(), commit: None })
    }
}
