//! Definitions from elsewhere: in a Git repository, in an archive, or a file behind a URL, which
//! the builder fetches (row `bx.bake.remote`). Contexts of their targets are where they are.

use std::collections::BTreeMap;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use shipway_bake::File;
use shipway_client::{Client, Definition, SolveOptions};
use shipway_fault::{Code, Context as _, Fault, Result};
use shipway_gocompat::path;
use shipway_llb::{FileCopy, FileDraft, GitRef, MarshalOptions, State, VertexOptions, attr};
use shipway_oci::Platform;

use crate::{
    command::build::{is_remote, is_tar},
    spec,
};

/// What stays as it is in a value of a query.
const IN_QUERY: &AsciiSet =
    &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~').remove(b'/');
/// What a download is called on the builder.
const DOWNLOAD: &str = "context";
/// Bytes by which an archive is known.
const HEAD: u64 = 1024;
/// Variables with what a Git server asks for, and the secrets that they become.
const LOGINS: [(&str, &str); 2] = [
    ("BUILDX_BAKE_GIT_AUTH_TOKEN", "GIT_AUTH_TOKEN"),
    ("BUILDX_BAKE_GIT_AUTH_HEADER", "GIT_AUTH_HEADER"),
];

/// What kind of place a definition is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Repository,
    Archive,
    /// Alone: what it names is on this machine.
    Single,
}

/// A definition from elsewhere.
#[derive(Debug)]
pub(super) struct Elsewhere {
    url: String,
    kind: Kind,
    pub(super) files: Vec<File>,
}

/// A context of a target.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Moved {
    /// Its address.
    pub(super) url: String,
    /// The directory there, if the address cannot say it.
    pub(super) subdir: Option<String>,
}

/// The address of the definition, that of what the command line gives as a context, and the targets
/// after them.
pub(super) fn addresses(words: &[String]) -> (Option<String>, String, Vec<String>) {
    let mut rest = words.iter().peekable();
    let url = rest.next_if(|word| is_remote(word)).cloned();
    let context = rest.next_if(|word| url.is_some() && is_remote(word)).cloned();
    (url, context.unwrap_or_else(|| "cwd://".to_owned()), rest.cloned().collect())
}

fn marshalled(state: &State) -> Result<Definition> {
    let options =
        MarshalOptions { platform: Platform::host(), caps: None, local_unique_id: String::new() };
    Definition::read(&state.marshal(&options)?.encode())
}

impl Elsewhere {
    /// Fetches the files `names` of what is at `url`; with `optional`, those that are there.
    pub(super) async fn fetch(
        client: &Client,
        url: String,
        names: &[String],
        optional: bool,
    ) -> Result<Self> {
        let (kind, files) = Self::read(client, &url, names, optional)
            .await
            .context(|| format!("read the definition at {url}"))?;
        Ok(Self { url, kind, files })
    }

    async fn read(
        client: &Client,
        url: &str,
        names: &[String],
        optional: bool,
    ) -> Result<(Kind, Vec<File>)> {
        if let Some(git) = GitRef::parse(url)? {
            let env = |name: &str| std::env::var(name).ok();
            let options = SolveOptions {
                secrets: spec::secrets(&logins(&git.host, &env))?,
                ssh: spec::ssh(&agents(&git.scheme, &env))?,
                ..SolveOptions::default()
            };
            let definition = marshalled(&git.state(VertexOptions::default()))?;
            let files = files(client, definition, names, optional, options).await?;
            return Ok((Kind::Repository, files));
        }
        let attrs = BTreeMap::from([(attr::HTTP_FILENAME.to_owned(), DOWNLOAD.to_owned())]);
        let download = State::http(url, attrs, VertexOptions::default());
        let (alone, options) = (marshalled(&download)?, SolveOptions::default);
        let read = |limit| client.read_files(alone.clone(), &[DOWNLOAD], limit, options());
        let head = read(Some(HEAD)).await?.remove(0)?;
        if is_tar(&head) {
            let copy = FileCopy {
                src: format!("/{DOWNLOAD}"),
                dest: "/".into(),
                attempt_unpack: true,
                ..FileCopy::default()
            };
            let unpacked = State::scratch()
                .file(FileDraft::new().copy(&download, copy), VertexOptions::default());
            let definition = marshalled(&unpacked)?;
            let files = files(client, definition, names, optional, options()).await?;
            return Ok((Kind::Archive, files));
        }
        let data = read(None).await?.remove(0)?;
        Ok((Kind::Single, vec![File { name: url.to_owned(), data }]))
    }

    /// Where the context `given` of a target is; none if it stays what it is.
    pub(super) fn moved(&self, given: &str) -> Result<Option<Moved>> {
        let stays = ["cwd://", "target:", "docker-image:", "oci-layout:"];
        if is_remote(given) || stays.iter().any(|scheme| given.starts_with(scheme)) {
            return Ok(None);
        }
        let directory = path::clean(given);
        Ok(match self.kind {
            Kind::Single => None,
            Kind::Repository => Some(Moved { url: within(&self.url, &directory)?, subdir: None }),
            Kind::Archive => {
                let subdir = (directory != ".").then_some(directory);
                Some(Moved { url: self.url.clone(), subdir })
            }
        })
    }

    /// Secrets for a context at `url`, if that is a repository of the same server.
    pub(super) fn logins(&self, url: &str) -> Result<Vec<String>> {
        let (Some(own), Some(context)) = (GitRef::parse(&self.url)?, GitRef::parse(url)?) else {
            return Ok(Vec::new());
        };
        Ok(match own.host.eq_ignore_ascii_case(&context.host) {
            true => logins(&own.host, &|name| std::env::var(name).ok()),
            false => Vec::new(),
        })
    }
}

async fn files(
    client: &Client,
    definition: Definition,
    names: &[String],
    optional: bool,
    options: SolveOptions,
) -> Result<Vec<File>> {
    let paths: Vec<&str> = names.iter().map(String::as_str).collect();
    let read = client.read_files(definition, &paths, None, options).await?;
    let mut files = Vec::new();
    for (name, data) in names.iter().zip(read) {
        match data {
            Ok(data) => files.push(File { name: name.clone(), data }),
            Err(_) if optional => {}
            Err(fault) => return Err(fault.context(name.clone())),
        }
    }
    Ok(files)
}

/// Secrets for the Git server `host` that the environment has.
fn logins(host: &str, env: &dyn Fn(&str) -> Option<String>) -> Vec<String> {
    let set = LOGINS.iter().filter(|(variable, _)| env(variable).is_some_and(|v| !v.is_empty()));
    set.map(|(variable, id)| format!("id={id}.{host},env={variable}")).collect()
}

/// The agent for a repository that is reached by SSH.
fn agents(scheme: &str, env: &dyn Fn(&str) -> Option<String>) -> Vec<String> {
    match env("BUILDX_BAKE_GIT_SSH").filter(|paths| !paths.is_empty()) {
        Some(paths) => vec![format!("default={paths}")],
        None if scheme == "ssh" => vec!["default".to_owned()],
        None => Vec::new(),
    }
}

/// The address of a directory of a repository: as buildx writes it, in the query where that has one
/// already, and after the reference otherwise.
fn within(url: &str, directory: &str) -> Result<String> {
    if directory == "." {
        return Ok(url.to_owned());
    }
    let repository = GitRef::parse(url)?;
    let below = repository.map(|git| git.subdir).unwrap_or_default();
    let directory = path::clean(&path::join(&below, directory));
    if let (None, Some((base, query))) = (url.find('#'), url.split_once('?'))
        && query.split('&').any(|pair| pair.starts_with("subdir="))
    {
        let pair = |pair: &str| match pair.starts_with("subdir=") {
            true => format!("subdir={}", utf8_percent_encode(&directory, IN_QUERY)),
            false => pair.to_owned(),
        };
        let query: Vec<String> = query.split('&').map(pair).collect();
        return Ok(format!("{base}?{}", query.join("&")));
    }
    let (base, fragment) = url.split_once('#').unwrap_or((url, ""));
    let reference = fragment.split(':').next().unwrap_or_default();
    Ok(format!("{base}#{reference}:{directory}"))
}

/// A context with a name, for which there is no way to say a directory of an archive.
pub(super) fn whole(name: &str, moved: Moved) -> Result<String> {
    match moved.subdir {
        None => Ok(moved.url),
        Some(subdir) => Err(Fault::new(
            Code::Unimplemented,
            format!("the context {name} cannot be the directory {subdir} of an archive"),
        )
        .hint("put the definition into a Git repository, or unpack the archive")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_come_before_targets() {
        let of = |words: &[&str]| {
            let words: Vec<String> = words.iter().map(|w| (*w).to_owned()).collect();
            let (url, context, targets) = addresses(&words);
            format!("{} {context} {}", url.unwrap_or_default(), targets.join("+"))
        };
        assert_eq!(of(&["a", "b"]), " cwd:// a+b");
        assert_eq!(of(&["https://x/y.git", "a"]), "https://x/y.git cwd:// a");
        assert_eq!(
            of(&["https://x/y.git", "https://x/z.git", "a"]),
            "https://x/y.git https://x/z.git a"
        );
    }

    #[test]
    fn contexts_are_where_the_definition_is() {
        let at = |url: &str, kind| Elsewhere { url: url.to_owned(), kind, files: Vec::new() };
        let shown = |elsewhere: &Elsewhere, given: &str| {
            let moved = elsewhere.moved(given).unwrap();
            moved.map(|m| format!("{}|{}", m.url, m.subdir.unwrap_or_default()))
        };
        let git = at("https://x/y.git#main", Kind::Repository);
        assert_eq!(shown(&git, ".").as_deref(), Some("https://x/y.git#main|"));
        assert_eq!(shown(&git, "./a/b").as_deref(), Some("https://x/y.git#main:a/b|"));
        for stays in ["cwd://x", "target:x", "docker-image://x", "https://z"] {
            assert_eq!(shown(&git, stays), None, "{stays}");
        }
        let below = at("https://x/y.git#main:sub", Kind::Repository);
        assert_eq!(shown(&below, "a").as_deref(), Some("https://x/y.git#main:sub/a|"));
        let plain = at("https://x/y.git", Kind::Repository);
        assert_eq!(shown(&plain, "a").as_deref(), Some("https://x/y.git#:a|"));
        let query = at("https://x/y.git?branch=b&subdir=s", Kind::Repository);
        assert_eq!(
            shown(&query, "a b").as_deref(),
            Some("https://x/y.git?branch=b&subdir=s/a%20b|")
        );
        let tar = at("https://x/y.tar", Kind::Archive);
        assert_eq!(shown(&tar, "a").as_deref(), Some("https://x/y.tar|a"));
        assert!(whole("n", tar.moved("a").unwrap().unwrap()).is_err());
        assert_eq!(shown(&at("https://x/y.hcl", Kind::Single), "a"), None);
    }

    #[test]
    fn logins_go_to_their_own_server_only() {
        let set = |name: &str| (name == "BUILDX_BAKE_GIT_AUTH_TOKEN").then(|| "t".to_owned());
        assert_eq!(logins("x.io", &set), ["id=GIT_AUTH_TOKEN.x.io,env=BUILDX_BAKE_GIT_AUTH_TOKEN"]);
        assert_eq!(agents("ssh", &|_| None), ["default"]);
        assert!(agents("https", &|_| None).is_empty());
        assert_eq!(agents("https", &|_| Some("/a".to_owned())), ["default=/a"]);
    }
}
