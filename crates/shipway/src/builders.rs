//! Builders as buildx keeps them (rows `bx.state`, `bx.create` and others): below `$BUILDX_CONFIG`,
//! else below `buildx` beside Docker's configuration, so that both programs see the same ones.
//!
//! | file | what |
//! |---|---|
//! | `.lock` | who reads or writes holds it |
//! | `instances/NAME` | a builder: driver, and nodes with endpoint and options |
//! | `current` | which builder is used, and for which endpoint of Docker |
//! | `defaults/HASH` | the builder that is used for an endpoint unless another was chosen |
//! | `activity/NAME` | when it was last used |
//! | `refs/BUILDER/NODE/ID` | where a build's files were |

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use shipway_client::ClientTls;
use shipway_fault::{Context, Fault, Result, nearest};
use shipway_oci::Digest;

use crate::output;

/// Bytes of a file here, at most.
const MAX_FILE: u64 = 4 << 20;
/// Where Docker listens, unless it is told.
const DOCKER: &str = "unix:///var/run/docker.sock";

/// A node of a builder.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) endpoint: String,
    /// What it was told to build for.
    pub(crate) platforms: Option<Vec<shipway_oci::Platform>>,
    pub(crate) driver_opts: Option<BTreeMap<String, String>>,
    /// Flags of the daemon, for drivers that start one.
    pub(crate) flags: Option<Vec<String>>,
    /// Files of the daemon, for drivers that start one, in base64.
    pub(crate) files: Option<BTreeMap<String, String>>,
}

/// A builder.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(crate) struct Builder {
    pub(crate) name: String,
    pub(crate) driver: String,
    pub(crate) nodes: Vec<Node>,
    pub(crate) dynamic: bool,
}

/// Where a build's files were, which the daemon does not know.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(crate) struct BuildState {
    /// The target of a bake definition.
    pub(crate) target: String,
    /// The context: a path in full, or what was said instead.
    pub(crate) local_path: String,
    /// The Dockerfile, likewise.
    pub(crate) dockerfile_path: String,
    /// What the targets of one definition have in common.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) group_ref: String,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Current {
    key: String,
    name: String,
    global: bool,
}

impl Node {
    /// How to connect over TLS, if that was told.
    pub(crate) fn tls(&self) -> Result<Option<ClientTls>> {
        let no_opts = BTreeMap::new();
        let opts = self.driver_opts.as_ref().unwrap_or(&no_opts);
        let path = |key: &str| opts.get(key).filter(|v| !v.is_empty()).map(PathBuf::from);
        let identity = match (path("cert"), path("key")) {
            (Some(cert), Some(key)) => Some((cert, key)),
            (None, None) => None,
            _ => return Err(Fault::invalid("the options cert and key need each other")),
        };
        let ca = path("cacert");
        let wanted = ca.is_some() || identity.is_some();
        let server_name = opts.get("servername").cloned();
        Ok((wanted && self.endpoint.starts_with("tcp://")).then_some(ClientTls {
            server_name,
            ca,
            identity,
        }))
    }
}

/// The state, as long as nobody else may change it.
pub(crate) struct Store {
    dir: PathBuf,
    /// Docker's endpoint, for which a builder is chosen.
    key: String,
    _lock: File,
}

/// A name as files have it.
pub(crate) fn checked(name: &str) -> Result<String> {
    let is_fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    match name.starts_with(|c: char| c.is_ascii_alphabetic()) && name.chars().all(is_fine) {
        true => Ok(name.to_lowercase()),
        false => Err(Fault::invalid(format!(
            "invalid name {name}, name needs to start with a letter and may not contain symbols, except ._-"
        ))),
    }
}

fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    use std::io::Read;
    let failed = |e| Fault::io(format!("read {}", path.display()), e);
    let file = match File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(failed)?,
    };
    let mut data = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut data).map_err(failed)?;
    match data.len() as u64 > MAX_FILE {
        true => Err(Fault::invalid(format!("{} is larger than 4 MB", path.display()))),
        false => Ok(Some(data)),
    }
}

/// The directory, by what the environment says.
fn directory(env: impl Fn(&str) -> Option<String>) -> Option<PathBuf> {
    let set = |name: &str| env(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    set("BUILDX_CONFIG")
        .or_else(|| set("DOCKER_CONFIG").map(|d| d.join("buildx")))
        .or_else(|| set("HOME").map(|d| d.join(".docker/buildx")))
}

/// Docker's endpoint: the context that is chosen, or the address of the default one.
fn docker_endpoint(env: impl Fn(&str) -> Option<String>) -> String {
    let set = |name: &str| env(name).filter(|v| !v.is_empty());
    if let Some(host) = set("DOCKER_HOST") {
        return host;
    }
    let config = set("DOCKER_CONFIG")
        .map(PathBuf::from)
        .or_else(|| set("HOME").map(|h| PathBuf::from(h).join(".docker")));
    let chosen = set("DOCKER_CONTEXT").or_else(|| {
        let text = read(&config?.join("config.json")).ok()??;
        let json: serde_json::Value = serde_json::from_slice(&text).ok()?;
        json["currentContext"].as_str().filter(|c| !c.is_empty()).map(str::to_owned)
    });
    chosen.filter(|c| c != "default").unwrap_or_else(|| DOCKER.to_owned())
}

impl Store {
    /// Where the state of a build is; none for names that files cannot have.
    fn build_path(&self, builder: &str, node: &str, id: &str) -> Option<PathBuf> {
        let is_name = |name: &&str| {
            let is_fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
            !name.is_empty() && !name.starts_with('.') && name.chars().all(is_fine)
        };
        let all = [builder, node, id];
        all.iter().all(is_name).then(|| self.dir.join("refs").join(builder).join(node).join(id))
    }

    /// What was noted of a build; none if there is nothing that can be read.
    pub(crate) fn build_state(&self, builder: &str, node: &str, id: &str) -> Option<BuildState> {
        let path = self.build_path(builder, node, id)?;
        serde_json::from_slice(&read(&path).ok()??).ok()
    }

    /// Notes where the files of a build are.
    pub(crate) fn save_build_state(
        &self,
        (builder, node, id): (&str, &str, &str),
        state: &BuildState,
    ) -> Result<()> {
        let Some(path) = self.build_path(builder, node, id) else { return Ok(()) };
        let failed = |e| Fault::io(format!("write {}", path.display()), e);
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir).map_err(failed)?;
        }
        let text = serde_json::to_vec(state)
            .map_err(|e| Fault::internal(format!("encode the state of a build: {e}")))?;
        output::write_private(&path, &text)
    }

    /// Opens the state of the environment; waits for who holds it.
    pub(crate) fn open() -> Result<Self> {
        let env = |name: &str| std::env::var(name).ok();
        let dir = directory(env).ok_or_else(|| {
            Fault::not_found("there is no home directory for builders").hint("set $BUILDX_CONFIG")
        })?;
        Self::at(dir, docker_endpoint(env))
    }

    /// Opens the state if there is one already.
    pub(crate) fn open_existing() -> Result<Option<Self>> {
        let env = |name: &str| std::env::var(name).ok();
        match directory(env).filter(|dir| dir.join("instances").is_dir()) {
            Some(dir) => Self::at(dir, docker_endpoint(env)).map(Some),
            None => Ok(None),
        }
    }

    fn at(dir: PathBuf, key: String) -> Result<Self> {
        let failed = |e: io::Error| Fault::io(format!("open {}", dir.display()), e);
        for below in ["instances", "defaults", "activity"] {
            use std::os::unix::fs::DirBuilderExt;
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(dir.join(below))
                .map_err(failed)?;
        }
        let mut options = std::fs::OpenOptions::new();
        options.create(true).truncate(false).write(true);
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let lock = options.open(dir.join(".lock")).map_err(failed)?;
        flock(&lock, FlockOperation::LockExclusive).map_err(|e| failed(e.into()))?;
        Ok(Self { dir, key, _lock: lock })
    }

    /// The endpoint of Docker that is used: a context's name, or an address.
    pub(crate) fn docker_endpoint(&self) -> &str {
        &self.key
    }

    /// The builder `name`.
    pub(crate) fn get(&self, name: &str) -> Result<Option<Builder>> {
        let path = self.dir.join("instances").join(checked(name)?);
        let Some(data) = read(&path)? else { return Ok(None) };
        let builder = serde_json::from_slice(&data)
            .map_err(|e| Fault::invalid(format!("{} is no builder: {e}", path.display())))?;
        Ok(Some(builder))
    }

    /// The builder `name`, or what is wrong with that.
    pub(crate) fn need(&self, name: &str) -> Result<Builder> {
        if let Some(builder) = self.get(name)? {
            return Ok(builder);
        }
        let fault = Fault::not_found(format!("no builder {name:?} found"));
        let all = self.list()?;
        Err(match nearest(name, all.iter().map(|b| b.name.as_str())) {
            Some(near) => fault.hint(format!("did you mean {near}?")),
            None => fault.hint("`shipway ls` lists builders"),
        })
    }

    /// All builders, by name.
    pub(crate) fn list(&self) -> Result<Vec<Builder>> {
        let dir = self.dir.join("instances");
        let failed = |e| Fault::io(format!("list {}", dir.display()), e);
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&dir).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            // What others left here while they wrote is no builder.
            names.extend(name.into_string().ok().filter(|n| checked(n).is_ok()));
        }
        names.sort_unstable();
        let each = names.iter().map(|name| self.get(name));
        Ok(each.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
    }

    fn write(&self, path: &str, data: &[u8]) -> Result<()> {
        output::write_private(&self.dir.join(path), data)
    }

    /// Writes a builder, and that it was used now.
    pub(crate) fn save(&self, builder: &Builder) -> Result<()> {
        let name = checked(&builder.name)?;
        let data = shipway_oci::gojson::to_string(builder)
            .map_err(|e| Fault::internal(format!("write the builder {name}: {e}")))?;
        self.touch(&name)?;
        self.write(&format!("instances/{name}"), data.as_bytes())
    }

    /// Notes that a builder is used now.
    pub(crate) fn touch(&self, name: &str) -> Result<()> {
        let now = shipway_oci::timestamp::format_whole(std::time::SystemTime::now());
        self.write(&format!("activity/{}", checked(name)?), now.as_bytes())
    }

    /// Removes a builder and what is known of it.
    pub(crate) fn remove(&self, name: &str) -> Result<()> {
        let name = checked(name)?;
        for path in ["activity", "instances", "refs"].map(|d| self.dir.join(d).join(&name)) {
            let gone = match path.is_dir() {
                true => std::fs::remove_dir_all(&path),
                false => std::fs::remove_file(&path),
            };
            match gone {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(Fault::io(format!("remove {}", path.display()), e));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn default_path(&self) -> String {
        format!("defaults/{}", &Digest::of(self.key.as_bytes()).hex()[..20])
    }

    /// Uses a builder from now on: for Docker's endpoint, or `global`ly; with `default`, also
    /// after another endpoint was chosen meanwhile.
    pub(crate) fn use_builder(&self, name: &str, global: bool, default: bool) -> Result<()> {
        let current = Current { key: self.key.clone(), name: checked(name)?, global };
        let data = serde_json::to_vec(&current)
            .map_err(|e| Fault::internal(format!("write the current builder: {e}")))?;
        self.write("current", &data)?;
        if default {
            return self.write(&self.default_path(), current.name.as_bytes());
        }
        match std::fs::remove_file(self.dir.join(self.default_path())) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(Fault::io("forget the default builder", e))
            }
            _ => Ok(()),
        }
    }

    /// The builder that is used, if one was chosen that is there.
    pub(crate) fn current(&self) -> Result<Option<Builder>> {
        let current: Current = match read(&self.dir.join("current"))? {
            Some(data) => serde_json::from_slice(&data).map_err(|e| {
                Fault::invalid(format!("{}: {e}", self.dir.join("current").display()))
            })?,
            None => Current::default(),
        };
        if !current.name.is_empty()
            && (current.global || current.key == self.key)
            && let Some(builder) = self.get(&current.name)?
        {
            return Ok(Some(builder));
        }
        let Some(name) = read(&self.dir.join(self.default_path()))? else { return Ok(None) };
        let name = String::from_utf8_lossy(&name).into_owned();
        self.get(&name).context(|| "find the default builder")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directory_and_the_endpoint_follow_the_environment() {
        let env = |set: &'static [(&str, &str)]| {
            move |name: &str| set.iter().find(|(k, _)| *k == name).map(|(_, v)| (*v).to_owned())
        };
        let dir = |set| directory(env(set)).map(|d| d.display().to_string());
        assert_eq!(dir(&[("BUILDX_CONFIG", "/a"), ("HOME", "/h")]).as_deref(), Some("/a"));
        assert_eq!(dir(&[("DOCKER_CONFIG", "/d")]).as_deref(), Some("/d/buildx"));
        assert_eq!(dir(&[("HOME", "/h")]).as_deref(), Some("/h/.docker/buildx"));
        assert_eq!(docker_endpoint(env(&[("DOCKER_HOST", "tcp://x")])), "tcp://x");
        assert_eq!(docker_endpoint(env(&[("DOCKER_CONTEXT", "far")])), "far");
        assert_eq!(docker_endpoint(env(&[("DOCKER_CONTEXT", "default")])), DOCKER);
    }

    #[test]
    fn builders_are_kept_used_and_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(dir.path().to_owned(), DOCKER.into()).unwrap();
        let node = Node { name: "b0".into(), endpoint: "unix:///x".into(), ..Node::default() };
        let builder = Builder {
            name: "B".into(),
            driver: "remote".into(),
            nodes: vec![node],
            dynamic: false,
        };
        store.save(&builder).unwrap();
        assert_eq!(store.get("b").unwrap().as_ref(), Some(&builder));
        assert_eq!(store.current().unwrap(), None);
        store.use_builder("b", false, true).unwrap();
        assert_eq!(store.current().unwrap().as_ref(), Some(&builder));
        drop(store);
        // For another endpoint another one may be used.
        let other = Store::at(dir.path().to_owned(), "far".into()).unwrap();
        assert_eq!(other.current().unwrap(), None);
        drop(other);
        let store = Store::at(dir.path().to_owned(), DOCKER.into()).unwrap();
        store.use_builder("b", true, false).unwrap();
        store.remove("b").unwrap();
        assert_eq!((store.list().unwrap(), store.current().unwrap()), (Vec::new(), None));
        assert!(store.get("../x").is_err());
        let hint = |f: Fault| f.hints().next().map(str::to_owned);
        store.save(&builder).unwrap();
        assert_eq!(hint(store.need("c").unwrap_err()).as_deref(), Some("did you mean B?"));
    }

    #[test]
    fn a_large_file_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(dir.path().to_owned(), DOCKER.into()).unwrap();
        let data = vec![b' '; MAX_FILE as usize + 1];
        std::fs::write(dir.path().join("instances/big"), data).unwrap();
        assert!(store.get("big").is_err());
    }
}
