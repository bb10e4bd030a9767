//! `git://`: a commit's files, through the git binary and a bare repository kept per remote (rows
//! `src.git*`).

mod attrs;
mod bundle;
mod cli;
mod kept;
mod repo;
mod signed;
#[cfg(test)]
mod tests;
mod tree;

use crate::{
    PinnedSource, SourceContext, SourceMemo, SourceSpec,
    clients::{ClientServices, SshAgent},
    keys,
    memo::Tip,
    port::Source,
};
pub(crate) use attrs::GitSpec;
use base64::{Engine, prelude::BASE64_STANDARD};
pub(crate) use bundle::Bundle;
use cli::Git;
use futures::{FutureExt as _, future::BoxFuture};
use repo::Objects;
use repo::Repo;
use serde::Serialize;
use shipway_attest::{self as attest, Capture};
use shipway_fault::{Code, Context as _, Fault, Result};
use shipway_llb::{GitFacts, ResolveOptions, SourceFacts};
use shipway_refs::{ImmutableRef, RecordType, RefStore};
use shipway_registry::Registry;
use std::io::Write;

/// Git repositories.
pub(crate) struct GitSource {
    refs: RefStore,
    /// For bundles.
    registry: Registry,
}

/// git with what it needs to get at a remote; removes that when dropped.
struct Access {
    git: Git,
    _agent: Option<SshAgent>,
    _known_hosts: Option<tempfile::NamedTempFile>,
}

#[derive(Serialize)]
struct GitKey<'a> {
    sha: &'a str,
    /// The kept `.git` names the reference.
    kept: Option<&'a str>,
    subdir: &'a str,
    skip_submodules: bool,
    commit_time: bool,
    /// The one reference of a bundle that is made instead of files.
    #[serde(skip_serializing_if = "Option::is_none")]
    bundle: Option<String>,
}

impl GitSource {
    pub(crate) fn new(refs: RefStore, registry: Registry) -> Self {
        Self { refs, registry }
    }

    /// The commit and the annotated tag, with the signature that is asked for.
    async fn objects(&self, spec: &GitSpec, tip: &Tip, cx: &SourceContext) -> Result<Objects> {
        let access = self.access(spec, cx).await?;
        let sha256 = tip.sha.len() == 64;
        let read = self.in_repository(spec, &access, sha256, |repo| async move {
            self.bring_objects(&repo, tip, cx).await
        });
        read.await
    }

    /// Brings `tip` into the repository, the tag itself included, and verifies the signature that
    /// is asked for.
    async fn bring_objects(
        &self,
        repo: &Repo<'_>,
        tip: &Tip,
        cx: &SourceContext,
    ) -> Result<Objects> {
        match &repo.spec.bundle {
            Some(bundle) => repo.unbundle(&tip.sha, bundle, &*cx.clients, &self.registry).await?,
            None => repo.fetch_object(tip, &tip.sha).await?,
        }
        let objects = repo.objects(tip).await?;
        if let Some(want) = &repo.spec.signed {
            want.verify(&objects)
                .await
                .context(|| format!("load {}#{}", repo.spec.shown(), repo.spec.reference))?;
        }
        Ok(objects)
    }

    async fn check_out(
        &self,
        repo: &Repo<'_>,
        tip: &Tip,
        cx: &SourceContext,
        description: &str,
    ) -> Result<ImmutableRef> {
        match &repo.spec.bundle {
            // Once more, for the tip may be another than the one that was pinned.
            _ if repo.spec.signed.is_some() => drop(self.bring_objects(repo, tip, cx).await?),
            Some(bundle) => {
                repo.unbundle(repo.needed(tip), bundle, &*cx.clients, &self.registry).await?
            }
            None => repo.fetch(tip).await?,
        }
        let state = self.refs.mutable(None, description, RecordType::GitCheckout, None).await?;
        let mount = state.mount().await?;
        if repo.spec.as_bundle {
            repo.bundle(tip, mount.path()).await?;
        } else {
            repo.checkout(tip, mount.path()).await?;
        }
        mount.unmount().await?;
        state.commit(description).await
    }

    async fn tip(&self, spec: &GitSpec, cx: &SourceContext) -> Result<Tip> {
        let tip = match cx.memo.tip(&spec.tip_key()) {
            Some(tip) => tip,
            None => {
                let access = self.access(spec, cx).await?;
                let tip = match &spec.bundle {
                    Some(bundle) => self.tip_in(bundle, spec, &access, cx).await?,
                    None => repo::find_tip(&access.git, spec).await?,
                };
                cx.memo.keep_tip(spec.tip_key(), tip.clone());
                tip
            }
        };
        tip.check(spec)?;
        Ok(tip)
    }

    /// Where the reference leads in a bundle.
    async fn tip_in(
        &self,
        bundle: &Bundle,
        spec: &GitSpec,
        access: &Access,
        cx: &SourceContext,
    ) -> Result<Tip> {
        if let Some(tip) = spec.bundled_tip() {
            return Ok(tip);
        }
        let sha256 = spec.checksum.len() == 64;
        let find = self.in_repository(spec, access, sha256, |repo| async move {
            repo.tip_in(bundle, &*cx.clients, &self.registry).await
        });
        find.await
    }

    async fn access(&self, spec: &GitSpec, cx: &SourceContext) -> Result<Access> {
        let agent = match spec.ssh_agent.as_str() {
            "" => None,
            id => Some(cx.clients.ssh_agent(id).await?),
        };
        let known_hosts = match spec.known_hosts.as_str() {
            "" => None,
            text => Some(known_hosts_file(text)?),
        };
        let (host, port) = spec.endpoint();
        let addresses = self.registry.denied().addresses(host, port).await;
        let addresses = addresses.map_err(|why| {
            Fault::new(Code::PermissionDenied, format!("{}: {why}", spec.shown()))
        })?;
        let mut git = Git::new(&cx.reporter)
            .connecting(host, port, &addresses)
            .ssh(agent.as_ref().map(SshAgent::socket), known_hosts.as_ref().map(|f| f.path()));
        let settings = match auth_header(spec, &*cx.clients).await? {
            Some(header) => Some((token_scope(&spec.remote), header)),
            // What was in the address counts for the whole host, as it does for submodules that are
            // named relative to it.
            None => spec.login.as_ref().map(|login| {
                (host_scope(&spec.remote), format!("Authorization: basic {}", login.0))
            }),
        };
        if let Some((scope, header)) = settings {
            git = git.secret_setting(format!("http.{scope}.extraheader"), header);
        }
        Ok(Access { git, _agent: agent, _known_hosts: known_hosts })
    }
}

impl Source for GitSource {
    fn pin<'a>(
        &'a self,
        spec: &'a SourceSpec,
        cx: &'a SourceContext,
    ) -> BoxFuture<'a, Result<PinnedSource>> {
        async move {
            let spec = GitSpec::parse(spec, spec.locator())?;
            let tip = self.tip(&spec, cx).await?;
            // Files may be cached under the key that no signature was verified for.
            if spec.signed.is_some() {
                self.objects(&spec, &tip, cx).await?;
            }
            // A tag and the branch it was made on share a key where the tag itself leaves no trace.
            let sha = tip.commit.as_ref().filter(|_| !spec.keep_git_dir).unwrap_or(&tip.sha);
            let key = GitKey {
                sha,
                kept: spec.keep_git_dir.then_some(&tip.reference),
                subdir: &spec.subdir,
                skip_submodules: spec.skip_submodules,
                commit_time: spec.commit_time,
                bundle: spec.bundle_name(),
            };
            Ok(PinnedSource {
                keys: vec![keys::digest("git", &key)],
                ephemeral: false,
                digest: Some(tip.sha),
                stored: None,
            })
        }
        .boxed()
    }

    fn fetch<'a>(
        &'a self,
        spec: &'a SourceSpec,
        pin: &'a PinnedSource,
        cx: &'a SourceContext,
    ) -> BoxFuture<'a, Result<ImmutableRef>> {
        async move {
            let spec = GitSpec::parse(spec, spec.locator())?;
            // Another build's memory may know another tip; ours is the one that was pinned.
            let tip = match cx
                .memo
                .tip(&spec.tip_key())
                .filter(|t| Some(&t.sha) == pin.digest.as_ref())
            {
                Some(tip) => tip,
                None => {
                    let unremembered = SourceContext { memo: SourceMemo::default(), ..cx.clone() };
                    self.tip(&spec, &unremembered).await?
                }
            };
            let access = self.access(&spec, cx).await?;
            let (tip, description) =
                (&tip, &*format!("git snapshot for {}#{}", spec.shown(), spec.reference));
            let sha256 = tip.sha.len() == 64;
            let made = self.in_repository(&spec, &access, sha256, |repo| async move {
                self.check_out(&repo, tip, cx, description).await
            });
            made.await
        }
        .boxed()
    }

    fn resolve<'a>(
        &'a self,
        spec: &'a SourceSpec,
        options: &'a ResolveOptions,
        cx: &'a SourceContext,
    ) -> BoxFuture<'a, Result<SourceFacts>> {
        async move {
            let spec = GitSpec::parse(spec, spec.locator())?;
            let tip = self.tip(&spec, cx).await?;
            let mut git = GitFacts {
                checksum: tip.sha.clone(),
                reference: tip.reference.clone(),
                commit_checksum: tip.commit.clone().unwrap_or_default(),
                ..GitFacts::default()
            };
            if options.git_objects || spec.signed.is_some() {
                let found = self.objects(&spec, &tip, cx).await?;
                if found.tag.is_some() {
                    git.commit_checksum = found.commit.name;
                }
                if options.git_objects {
                    git.commit_object = found.commit.text;
                    git.tag_object = found.tag.map(|tag| tag.text).unwrap_or_default();
                }
            }
            Ok(SourceFacts { git: Some(git), ..Default::default() })
        }
        .boxed()
    }

    fn capture(&self, spec: &SourceSpec, pin: &PinnedSource, capture: &mut Capture) -> Result<()> {
        let git = GitSpec::parse(spec, spec.locator())?;
        for secret in [&git.token_secret, &git.header_secret].into_iter().filter(|s| !s.is_empty())
        {
            capture.add_secret(secret, true);
        }
        if !git.ssh_agent.is_empty() {
            capture.add_ssh(&git.ssh_agent, false);
        }
        let reference = Some(&git.reference)
            .filter(|r| !r.is_empty())
            .map(|r| format!("#{r}"))
            .unwrap_or_default();
        let bundle = |b: Bundle| attest::BlobSource { local: b.0.store.is_some(), name: b.0.name };
        capture.add_git(attest::GitSource {
            url: format!("{}{reference}", git.shown()),
            commit: pin.digest.clone().unwrap_or_default(),
            bundle: git.bundle.map(bundle),
        });
        Ok(())
    }
}

fn known_hosts_file(text: &str) -> Result<tempfile::NamedTempFile> {
    let failed = |e| Fault::io("write the known SSH hosts", e);
    let mut file = tempfile::NamedTempFile::new().map_err(failed)?;
    file.write_all(text.as_bytes()).map_err(failed)?;
    Ok(file)
}

/// The header that authenticates us: the secret named for this host first (row `src.git.auth`).
async fn auth_header(spec: &GitSpec, clients: &dyn ClientServices) -> Result<Option<String>> {
    let host = spec.host();
    let names = [
        (format!("{}.{host}", spec.header_secret), false),
        (format!("{}.{host}", spec.token_secret), true),
    ];
    let plain = [(spec.header_secret.clone(), false), (spec.token_secret.clone(), true)];
    for (name, token) in names.into_iter().chain(plain) {
        if name.is_empty() || name.starts_with('.') {
            continue;
        }
        let Some(secret) = clients.secret(&name).await? else { continue };
        let secret = String::from_utf8_lossy(&secret).trim().to_owned();
        let value = if token {
            format!("basic {}", BASE64_STANDARD.encode(format!("x-access-token:{secret}")))
        } else {
            secret
        };
        return Ok(Some(format!("Authorization: {value}")));
    }
    Ok(None)
}

/// Where the header goes: to the remote alone; on GitHub to all of it, so that private submodules
/// work.
fn token_scope(remote: &str) -> &str {
    ["https://github.com/", "https://www.github.com/"]
        .into_iter()
        .find(|p| remote.starts_with(p))
        .unwrap_or(remote)
}

/// The host of a remote, with all its paths.
fn host_scope(remote: &str) -> &str {
    let start = remote.find("://").map_or(0, |at| at + 3);
    remote[start..].find('/').map_or(remote, |at| &remote[..=start + at])
}
