//! Credentials that others gave for repositories: kubelet with a pull ([`crate::cri`]), builders
//! for their builds ([`crate::control`]). They are in memory only, wiped when they go, and no log,
//! no message and no `Debug` shows them.
//!
//! kubelet does not pull again because the snapshotter was restarted. So after each change all of
//! them are written into a new file in memory, which another process may hold meanwhile
//! ([`Keyring::keep_with`]), and the next life begins with it ([`Keyring::restore`]).

use parking_lot::Mutex;
use rustix::fs::{MemfdFlags, memfd_create};
use serde::{Deserialize, Serialize};
use shipway_fault::{Fault, Result};
use shipway_oci::ImageName;
use std::{
    collections::HashMap,
    fmt,
    fs::File,
    os::unix::fs::FileExt as _,
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime},
};
use zeroize::Zeroizing;

/// Most repositories that credentials are kept for, times hosts. What was not used for longest
/// goes.
pub const MAX_KEPT: usize = 4096;
/// Largest file in memory that is read, in bytes.
const MAX_MEMORY: u64 = 16 << 20;
/// The names that Docker Hub goes by, in images and in logins.
const HUB: [&str; 3] = ["registry-1.docker.io", "docker.io", "index.docker.io"];

/// A text that is wiped when it goes.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(from = "String")]
pub struct Secret(Zeroizing<String>);

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(Zeroizing::new(text))
    }
}

impl Secret {
    /// The text.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// What opens a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Login {
    /// A name and its password. Without a name it is an identity token.
    Password {
        /// The name.
        username: String,
        /// Its password, or an identity token.
        secret: Secret,
    },
    /// A bearer token for pulls, used as it is.
    Token(Secret),
}

/// Who gave credentials. What the first one in this order gave is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Giver {
    /// A builder, by the control socket.
    Build,
    /// kubelet, with a pull.
    Kubelet,
}

impl fmt::Display for Giver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Build => "a build",
            Self::Kubelet => "kubelet",
        })
    }
}

/// Which hosts may see a login.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Hosts {
    /// The registry itself.
    Own,
    /// The registry and its mirrors. It is the administrator who names those, and containerd gives
    /// them the credentials of a pull, too.
    Any,
    /// One host, with its port if it has one.
    One(String),
}

impl Hosts {
    fn admit(&self, registry: &str, host: &str) -> bool {
        let same = |a: &str, b: &str| a == b || (HUB.contains(&a) && HUB.contains(&b));
        match self {
            Self::Own => same(registry, host),
            Self::Any => true,
            Self::One(one) => same(one, host),
        }
    }
}

/// Credentials for a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Who gave them.
    pub giver: Giver,
    /// Who may see them.
    pub hosts: Hosts,
    /// What opens it.
    pub login: Login,
    /// Until when they are good; for ever if it is not said.
    pub until: Option<SystemTime>,
}

/// A grant that was kept, to be taken back.
#[derive(Debug)]
pub struct Receipt {
    key: Key,
    serial: u64,
    before: Option<Arc<Grant>>,
}

/// What is told of a grant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Known {
    /// `registry/repository`.
    pub repository: String,
    /// Who gave it.
    pub giver: Giver,
}

type Key = (String, Giver, Hosts);

struct Kept {
    grant: Arc<Grant>,
    serial: u64,
    used: u64,
}

#[derive(Default)]
struct State {
    kept: HashMap<Key, Kept>,
    /// Counts whatever happens here.
    clock: u64,
}

/// A grant as it is written into the file in memory.
#[derive(Serialize, Deserialize)]
struct Saved<S> {
    repository: String,
    giver: Giver,
    hosts: Hosts,
    /// `None` for a token.
    username: Option<String>,
    secret: S,
    /// Milliseconds since 1970.
    until: Option<u64>,
}

/// Gets the file in memory after a change.
type Keeper = Box<dyn Fn(File) + Send + Sync>;

/// All that were given.
#[derive(Default)]
pub struct Keyring {
    state: Mutex<State>,
    keeper: OnceLock<Keeper>,
}

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Keyring({} kept)", self.state.lock().kept.len())
    }
}

impl Keyring {
    /// Keeps credentials for the repository of `image`, in place of those that the same giver gave
    /// for it and the same hosts.
    pub fn give(&self, image: &ImageName, grant: Grant) -> Receipt {
        let key = (image.locator(), grant.giver, grant.hosts.clone());
        let mut state = self.state.lock();
        state.clock += 1;
        let serial = state.clock;
        let kept = Kept { grant: Arc::new(grant), serial, used: serial };
        let before = state.kept.insert(key.clone(), kept).map(|kept| kept.grant);
        state.forget(SystemTime::now());
        self.save(&state);
        Receipt { key, serial, before }
    }

    /// What was given last did not open the repository: those before it count again, unless others
    /// came meanwhile.
    pub fn take_back(&self, receipt: Receipt) {
        let mut state = self.state.lock();
        let Some(kept) = state.kept.get_mut(&receipt.key) else { return };
        if kept.serial != receipt.serial {
            return;
        }
        match receipt.before {
            Some(before) => kept.grant = before,
            None => drop(state.kept.remove(&receipt.key)),
        }
        self.save(&state);
    }

    /// Has `keeper` get a file of everything now, and after each change.
    pub fn keep_with(&self, keeper: impl Fn(File) + Send + Sync + 'static) {
        let _ = self.keeper.set(Box::new(keeper));
        let state = self.state.lock();
        if !state.kept.is_empty() {
            self.save(&state);
        }
    }

    fn save(&self, state: &State) {
        let Some(keeper) = self.keeper.get() else { return };
        match state.to_file() {
            Ok(file) => keeper(file),
            Err(fault) => tracing::warn!(%fault, "credentials are lost with this process"),
        }
    }

    /// Takes what an earlier life kept. What was given since counts more.
    pub fn restore(&self, file: &File) -> Result<()> {
        let mut state = self.state.lock();
        for (key, grant) in read(file)? {
            state.clock += 1;
            let clock = state.clock;
            let grant = Arc::new(grant);
            state.kept.entry(key).or_insert(Kept { grant, serial: clock, used: clock });
        }
        state.forget(SystemTime::now());
        Ok(())
    }

    /// The login for `host` that somebody gave for the repository of `image`, and until when it is
    /// good. `wanted` says which will do.
    pub fn find(
        &self,
        image: &ImageName,
        host: &str,
        wanted: impl Fn(&Login) -> bool,
    ) -> Option<Arc<Grant>> {
        let (repository, now) = (image.locator(), SystemTime::now());
        let mut state = self.state.lock();
        state.clock += 1;
        let clock = state.clock;
        let found = state.kept.iter_mut().filter(|((name, ..), kept)| {
            let grant = &kept.grant;
            *name == repository
                && grant.until.is_none_or(|until| now < until)
                && grant.hosts.admit(image.registry(), host)
                && wanted(&grant.login)
        });
        // Who names the host means it most.
        let best = found.min_by_key(|((_, giver, hosts), _)| {
            (*giver, !matches!(hosts, Hosts::One(_)), matches!(hosts, Hosts::Any))
        });
        let (_, kept) = best?;
        kept.used = clock;
        Some(kept.grant.clone())
    }

    /// For which repositories there are credentials.
    pub fn known(&self) -> Vec<Known> {
        let mut state = self.state.lock();
        state.forget(SystemTime::now());
        let mut known: Vec<Known> = state
            .kept
            .keys()
            .map(|(repository, giver, _)| Known { repository: repository.clone(), giver: *giver })
            .collect();
        known.sort_by(|a, b| (&a.repository, a.giver).cmp(&(&b.repository, b.giver)));
        known.dedup();
        known
    }
}

impl State {
    /// Drops what is over, and then what was not used for longest.
    fn forget(&mut self, now: SystemTime) {
        self.kept.retain(|_, kept| kept.grant.until.is_none_or(|until| now < until));
        while self.kept.len() > MAX_KEPT {
            let oldest = self.kept.iter().min_by_key(|(_, kept)| kept.used);
            let Some(oldest) = oldest.map(|(key, _)| key.clone()) else { return };
            self.kept.remove(&oldest);
        }
    }
}

impl State {
    /// All of it in a file in memory.
    fn to_file(&self) -> Result<File> {
        let mut saved: Vec<Saved<&str>> = Vec::with_capacity(self.kept.len());
        // Large enough for all, so that no piece is left where a buffer has grown out of.
        let mut size = 64;
        // In the order of their use, which is what counts of it.
        let mut kept: Vec<_> = self.kept.iter().collect();
        kept.sort_by_key(|(_, kept)| kept.used);
        for ((repository, giver, hosts), kept) in kept {
            let (username, secret) = match &kept.grant.login {
                Login::Password { username, secret } => (Some(username.clone()), secret),
                Login::Token(secret) => (None, secret),
            };
            let since = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH);
            let until = kept.grant.until.map(|until| {
                since(until).map_or(0, |time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX))
            });
            let secret = secret.reveal();
            // A byte takes six at the most.
            size += 512 + 6 * (repository.len() + username.as_ref().map_or(0, String::len));
            size += 6 * secret.len();
            let (repository, giver, hosts) = (repository.clone(), *giver, hosts.clone());
            saved.push(Saved { repository, giver, hosts, username, secret, until });
        }
        let mut bytes = Zeroizing::new(Vec::with_capacity(size));
        serde_json::to_writer(&mut *bytes, &saved)
            .map_err(|e| Fault::internal(format!("encode credentials: {e}")))?;
        let failed = |e| Fault::io("write credentials into memory", e);
        let file: File =
            memfd_create("credentials", MemfdFlags::CLOEXEC).map_err(|e| failed(e.into()))?.into();
        file.write_all_at(&bytes, 0).map_err(failed)?;
        Ok(file)
    }
}

/// What a file in memory has.
fn read(file: &File) -> Result<Vec<(Key, Grant)>> {
    let failed = |e| Fault::io("read credentials from memory", e);
    let size = file.metadata().map_err(failed)?.len();
    if size > MAX_MEMORY {
        return Err(Fault::invalid(format!("the file of credentials has {size} bytes")));
    }
    let mut bytes = Zeroizing::new(vec![0; size as usize]);
    file.read_exact_at(&mut bytes, 0).map_err(failed)?;
    let saved: Vec<Saved<Secret>> = serde_json::from_slice(&bytes)
        .map_err(|e| Fault::invalid(format!("read credentials at column {}", e.column())))?;
    let grant = |saved: Saved<Secret>| {
        let Saved { repository, giver, hosts, username, secret, until } = saved;
        let login = match username {
            Some(username) => Login::Password { username, secret },
            None => Login::Token(secret),
        };
        let until =
            until.and_then(|ms| SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(ms)));
        let grant = Grant { giver, hosts: hosts.clone(), login, until };
        ((repository, giver, hosts), grant)
    };
    Ok(saved.into_iter().map(grant).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(name: &str) -> ImageName {
        name.parse().unwrap()
    }

    fn password(secret: &str) -> Login {
        Login::Password { username: "me".into(), secret: secret.to_owned().into() }
    }

    fn grant(giver: Giver, hosts: Hosts, secret: &str) -> Grant {
        Grant { giver, hosts, login: password(secret), until: None }
    }

    fn found(keyring: &Keyring, name: &str, host: &str) -> Option<String> {
        let grant = keyring.find(&image(name), host, |_| true)?;
        match &grant.login {
            Login::Password { secret, .. } | Login::Token(secret) => {
                Some(secret.reveal().to_owned())
            }
        }
    }

    #[test]
    fn credentials_are_for_their_repository_and_hosts_alone() {
        let keyring = Keyring::default();
        keyring.give(&image("r.example/a/b:1"), grant(Giver::Kubelet, Hosts::Any, "any"));
        keyring.give(&image("r.example/c"), grant(Giver::Kubelet, Hosts::Own, "own"));
        keyring.give(&image("busybox"), grant(Giver::Kubelet, Hosts::Own, "hub"));
        let one = Hosts::One("m.example:5000".into());
        keyring.give(&image("r.example/d"), grant(Giver::Kubelet, one, "one"));
        for (name, host, expected) in [
            ("r.example/a/b:2", "r.example", Some("any")),
            ("r.example/a/b", "mirror.example", Some("any")),
            ("r.example/a", "r.example", None),
            ("r.example/a/b/c", "r.example", None),
            ("other.example/a/b", "other.example", None),
            ("r.example/c", "r.example", Some("own")),
            ("r.example/c", "mirror.example", None),
            ("docker.io/library/busybox", "registry-1.docker.io", Some("hub")),
            ("docker.io/library/busybox", "mirror.example", None),
            ("r.example/d", "r.example", None),
            ("r.example/d", "m.example:5000", Some("one")),
            ("r.example/d", "m.example", None),
        ] {
            assert_eq!(found(&keyring, name, host).as_deref(), expected, "{name} at {host}");
        }
    }

    #[test]
    fn a_build_comes_before_kubelet_and_what_is_over_counts_no_more() {
        let keyring = Keyring::default();
        let name = image("r.example/a");
        keyring.give(&name, grant(Giver::Kubelet, Hosts::Any, "kubelet"));
        let over = SystemTime::now() - Duration::from_secs(1);
        let build = grant(Giver::Build, Hosts::Own, "build");
        keyring.give(&name, Grant { until: Some(over), ..build.clone() });
        assert_eq!(found(&keyring, "r.example/a", "r.example").as_deref(), Some("kubelet"));
        let soon = SystemTime::now() + Duration::from_secs(600);
        keyring.give(&name, Grant { until: Some(soon), ..build });
        assert_eq!(found(&keyring, "r.example/a", "r.example").as_deref(), Some("build"));
        assert_eq!(found(&keyring, "r.example/a", "m.example").as_deref(), Some("kubelet"));
        // Who asks for a token gets no password.
        assert!(keyring.find(&name, "r.example", |l| matches!(l, Login::Token(_))).is_none());
        let known: Vec<_> = keyring.known().into_iter().map(|k| (k.repository, k.giver)).collect();
        let expected = [Giver::Build, Giver::Kubelet].map(|g| ("r.example/a".to_owned(), g));
        assert_eq!(known, expected);
    }

    #[test]
    fn what_opened_nothing_gives_way_to_what_was_there_before() {
        let keyring = Keyring::default();
        let name = image("r.example/a");
        let now = || found(&keyring, "r.example/a", "r.example");
        let first = keyring.give(&name, grant(Giver::Kubelet, Hosts::Any, "wrong"));
        keyring.take_back(first);
        assert_eq!(now(), None);
        keyring.give(&name, grant(Giver::Kubelet, Hosts::Any, "right"));
        let second = keyring.give(&name, grant(Giver::Kubelet, Hosts::Any, "wrong"));
        keyring.take_back(second);
        assert_eq!(now().as_deref(), Some("right"));
        let third = keyring.give(&name, grant(Giver::Kubelet, Hosts::Any, "wrong"));
        keyring.give(&name, grant(Giver::Kubelet, Hosts::Any, "newer"));
        keyring.take_back(third);
        assert_eq!(now().as_deref(), Some("newer"));
    }

    #[test]
    fn the_number_is_bounded_and_what_is_used_stays() {
        let keyring = Keyring::default();
        let used = image("r.example/used");
        keyring.give(&used, grant(Giver::Build, Hosts::Own, "used"));
        for n in 0..MAX_KEPT + 10 {
            assert!(found(&keyring, "r.example/used", "r.example").is_some(), "{n}");
            let name = image(&format!("r.example/x{n}"));
            keyring.give(&name, grant(Giver::Build, Hosts::Own, "x"));
        }
        assert_eq!(keyring.known().len(), MAX_KEPT);
        assert_eq!(found(&keyring, "r.example/x0", "r.example"), None);
    }

    #[test]
    fn the_next_life_begins_with_what_this_one_kept() {
        let kept = Arc::<Mutex<Option<File>>>::default();
        let keyring = Keyring::default();
        let name = image("r.example/a");
        keyring.give(&name, grant(Giver::Kubelet, Hosts::Any, "before \"it\"\u{1}"));
        let sink = kept.clone();
        keyring.keep_with(move |file| *sink.lock() = Some(file));
        let next = || {
            let next = Keyring::default();
            next.restore(kept.lock().as_ref().unwrap()).unwrap();
            next
        };
        let is = |keyring: &Keyring, host: &str| found(keyring, "r.example/a", host);
        assert_eq!(is(&next(), "r.example").as_deref(), Some("before \"it\"\u{1}"));
        let soon = SystemTime::now() + Duration::from_secs(600);
        let token = Login::Token("t0ken".to_owned().into());
        let build = Grant {
            giver: Giver::Build,
            hosts: Hosts::One("m.example".into()),
            login: token,
            until: Some(soon),
        };
        keyring.give(&name, build);
        let second = next();
        assert_eq!(is(&second, "m.example").as_deref(), Some("t0ken"));
        assert_eq!(is(&second, "r.example").as_deref(), Some("before \"it\"\u{1}"));
        assert_eq!(second.known(), keyring.known());
        let left = second.find(&name, "m.example", |_| true).unwrap().until.unwrap();
        assert!(soon.duration_since(left).unwrap() < Duration::from_millis(2));

        // What is over does not come back, what was given meanwhile stays.
        let wrong = keyring.give(&name, grant(Giver::Kubelet, Hosts::Any, "wrong"));
        keyring.take_back(wrong);
        let third = Keyring::default();
        third.give(&name, grant(Giver::Kubelet, Hosts::Any, "newer"));
        third.restore(kept.lock().as_ref().unwrap()).unwrap();
        assert_eq!(is(&third, "r.example").as_deref(), Some("newer"));
        assert_eq!(is(&next(), "r.example").as_deref(), Some("before \"it\"\u{1}"));
    }

    #[test]
    fn a_file_in_memory_that_is_wrong_is_an_error_without_secrets() {
        let file = |size: u64, bytes: &[u8]| {
            let file: File = memfd_create("test", MemfdFlags::CLOEXEC).unwrap().into();
            file.set_len(size).unwrap();
            file.write_all_at(bytes, 0).unwrap();
            file
        };
        for file in [file(0, b""), file(0, br#"[{"secret":"s3cret"}]"#), file(MAX_MEMORY + 1, b"")]
        {
            let error = Keyring::default().restore(&file).unwrap_err().to_string();
            assert!(!error.contains("s3cret"), "{error}");
        }
        let all = Keyring::default();
        for n in 0..MAX_KEPT {
            let secret = "x".repeat(200);
            let grant = grant(Giver::Build, Hosts::Own, &secret);
            all.give(&image(&format!("r.example/x{n}")), grant);
        }
        let file = all.state.lock().to_file().unwrap();
        let next = Keyring::default();
        next.restore(&file).unwrap();
        assert_eq!(next.known().len(), MAX_KEPT);
    }

    #[test]
    fn no_debug_shows_a_secret() {
        let keyring = Keyring::default();
        let grant = grant(Giver::Build, Hosts::Own, "s3cret");
        let shown = format!("{grant:?}{:?}{:?}", keyring.give(&image("a"), grant.clone()), keyring);
        assert!(!shown.contains("s3cret"), "{shown}");
        let receipt = keyring.give(&image("a"), grant);
        assert!(!format!("{receipt:?}").contains("s3cret"));
    }
}
