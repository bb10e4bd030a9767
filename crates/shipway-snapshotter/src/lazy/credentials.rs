//! Whose credentials layers are fetched with: those that somebody gave for the repository, then
//! those of Docker's configuration file, which is read again each time, and nobody's where there
//! are none.

use crate::keyring::{Grant, Keyring, Login};
use async_trait::async_trait;
use parking_lot::Mutex;
use shipway_dockerconfig::{DockerConfig, Found};
use shipway_fault::Fault;
use shipway_lazyfetch::Credentials as CredentialsOf;
use shipway_oci::ImageName;
use shipway_registry::{CredentialSource, Credentials, Given, Token};
use std::{
    collections::HashMap,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

/// How long an answer of Docker's configuration, which may be that of a credential helper, is used
/// without asking again: a registry that wants a password wants it with each request.
const REMEMBERED: Duration = Duration::from_secs(30);
/// Lifetime of a registry token in Docker's configuration, which does not say it.
const MINUTE: Duration = Duration::from_secs(60);

/// All credentials there are.
#[derive(Clone, Debug)]
pub struct AllCredentials {
    keyring: Arc<Keyring>,
    machine: Arc<Machine>,
}

/// Those of Docker's configuration file, which need not exist.
#[derive(Debug)]
struct Machine {
    config: PathBuf,
    found: Mutex<HashMap<String, (Instant, Remembered)>>,
}

/// A login that no `Debug` shows.
#[derive(Clone)]
struct Remembered(Found);

impl std::fmt::Debug for Remembered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Remembered(…)")
    }
}

impl AllCredentials {
    /// Those in `keyring`, and those in Docker's configuration file `config`.
    pub fn new(keyring: Arc<Keyring>, config: PathBuf) -> Self {
        Self { keyring, machine: Arc::new(Machine { config, found: Mutex::default() }) }
    }
}

impl CredentialsOf for AllCredentials {
    fn of(&self, image: &ImageName) -> Arc<dyn CredentialSource> {
        Arc::new(OfRepository { image: image.clone(), all: self.clone() })
    }
}

impl Machine {
    async fn config(&self) -> Result<DockerConfig, Fault> {
        let path = self.config.clone();
        shipway_task::blocking("read credentials", move || DockerConfig::load(&path)).await
    }

    async fn lookup(&self, host: &str) -> Result<Option<Found>, Fault> {
        {
            let mut found = self.found.lock();
            found.retain(|_, (since, _)| since.elapsed() < REMEMBERED);
            if let Some((_, known)) = found.get(host) {
                return Ok(Some(known.0.clone()));
            }
        }
        let answer = self.config().await?.lookup(host).await?;
        if let Some(answer) = &answer {
            let known = (Instant::now(), Remembered(answer.clone()));
            self.found.lock().insert(host.to_owned(), known);
        }
        Ok(answer)
    }
}

/// Those for one repository.
struct OfRepository {
    image: ImageName,
    all: AllCredentials,
}

impl OfRepository {
    fn given(&self, host: &str, token: bool) -> Option<Arc<Grant>> {
        let wanted = |login: &Login| matches!(login, Login::Token(_)) == token;
        self.all.keyring.find(&self.image, host, wanted)
    }
}

#[async_trait]
impl CredentialSource for OfRepository {
    async fn credentials(&self, host: &str) -> Result<Option<Given<Credentials>>, Fault> {
        let given = self.given(host, false);
        if let Some(Login::Password { username, secret }) = given.as_deref().map(|g| &g.login) {
            let secret = secret.reveal().to_owned();
            return Ok(Some(Given::alone(Credentials { username: username.clone(), secret })));
        }
        let found = self.all.machine.lookup(host).await?;
        Ok(found.map(|(username, secret)| Given::alone(Credentials { username, secret })))
    }

    async fn fetch_token(
        &self,
        _: &str,
        _: &str,
        _: &[String],
        host: &str,
    ) -> Result<Option<Given<Token>>, Fault> {
        let given = self.given(host, true);
        if let Some(Grant { login: Login::Token(token), until, .. }) = given.as_deref() {
            let left = until.map(|until| until.duration_since(SystemTime::now()));
            let expires_in = left.map(Result::unwrap_or_default);
            return Ok(Some(Given::alone(Token { token: token.reveal().to_owned(), expires_in })));
        }
        if self.given(host, false).is_some() {
            return Ok(None);
        }
        let token = self.all.machine.config().await?.registry_token(host);
        Ok(token.map(|token| Given::alone(Token { token, expires_in: Some(MINUTE) })))
    }

    /// Tokens are for a repository, so those of all may be kept together.
    fn identity(&self) -> Option<String> {
        Some("machine".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keyring::{Giver, Hosts};

    /// What is sent to a host: a name and a secret, or a token.
    async fn sent(all: &AllCredentials, image: &str, host: &str) -> Option<(String, String)> {
        let source = all.of(&image.parse().unwrap());
        match source.fetch_token("", "", &[], host).await.unwrap() {
            Some(given) => Some(("token".into(), given.what.token)),
            None => {
                let given = source.credentials(host).await.unwrap()?.what;
                Some((given.username, given.secret))
            }
        }
    }

    #[tokio::test]
    async fn what_was_given_for_a_repository_comes_before_the_machines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        let config = r#"{"auths":{"r.example":{"username":"m","password":"machine"},"t.example":{"registrytoken":"plain"}}}"#;
        std::fs::write(&path, config).unwrap();
        let keyring = Arc::<Keyring>::default();
        let all = AllCredentials::new(keyring.clone(), path.clone());
        let is = |name: &str, secret: &str| Some((name.to_owned(), secret.to_owned()));
        assert_eq!(sent(&all, "r.example/a", "r.example").await, is("m", "machine"));
        assert_eq!(sent(&all, "t.example/a", "t.example").await, is("token", "plain"));
        assert_eq!(sent(&all, "n.example/a", "n.example").await, None);

        let give = |name: &str, login: Login| {
            let until = Some(SystemTime::now() + Duration::from_secs(600));
            let grant = Grant { giver: Giver::Build, hosts: Hosts::Own, login, until };
            keyring.give(&name.parse().unwrap(), grant);
        };
        let secret = "given".to_owned().into();
        give("r.example/a", Login::Password { username: "g".into(), secret });
        give("n.example/a", Login::Token("t0ken".to_owned().into()));
        assert_eq!(sent(&all, "r.example/a", "r.example").await, is("g", "given"));
        assert_eq!(sent(&all, "r.example/b", "r.example").await, is("m", "machine"));
        assert_eq!(sent(&all, "n.example/a", "n.example").await, is("token", "t0ken"));
        let source = all.of(&"n.example/a".parse().unwrap());
        let token = source.fetch_token("", "", &[], "n.example").await.unwrap().unwrap().what;
        assert!(token.expires_in.unwrap() > Duration::from_secs(300));

        // What is not known is looked for again at once, what is known a while later.
        std::fs::write(&path, r#"{"auths":{"n.example":{"username":"m","password":"later"}}}"#)
            .unwrap();
        assert_eq!(sent(&all, "n.example/b", "n.example").await, is("m", "later"));
        assert_eq!(sent(&all, "r.example/b", "r.example").await, is("m", "machine"));
        assert!(!format!("{all:?}").contains("machine\""), "{all:?}");
    }
}
