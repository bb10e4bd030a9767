//! What this machine has: connections, and credentials in its environment, its files and the
//! metadata services of the cloud that it may be in.

use bytes::Bytes;
use reqsign_core::{
    CommandExecute, CommandOutput, Context, Error, FileRead, HttpSend, OsEnv, Result as Signed,
};
use shipway_fault::{Class, Fault, Result};
use shipway_http::{Client, DeniedNetworks, Timeouts, TlsSettings, full_body};
use std::{sync::Arc, time::Duration};
use tokio::{io::AsyncReadExt as _, process::Command, sync::OnceCell, time::timeout};

/// Largest answer of a metadata or token service, largest file of credentials, and most output of a
/// program that gives them.
const MAX_DOCUMENT: u64 = 1 << 20;
/// How long a program that gives credentials may take.
const PROGRAM: Duration = Duration::from_secs(60);
/// Metadata services are near, or not there.
const NEAR: Timeouts = Timeouts {
    connect: Duration::from_secs(2),
    response: Duration::from_secs(5),
    stall: Duration::from_secs(5),
    stall_bytes: 1,
};

/// Connections to stores, and where credentials come from. Clones share both.
#[derive(Clone)]
pub(crate) struct Machine {
    /// Its environment, and what asks for credentials there.
    pub context: Context,
    stores: Arc<Connections>,
}

impl Machine {
    pub fn new(denied: DeniedNetworks) -> Self {
        // Only this machine's administrator says where its credentials come from, so networks that
        // are closed to builds are open to this.
        let own = Connections::new(NEAR, DeniedNetworks::default());
        let context = Context::new()
            .with_env(OsEnv)
            .with_file_read(Files)
            .with_command_execute(Programs)
            .with_http_send(Metadata(own));
        Self { context, stores: Arc::new(Connections::new(Timeouts::default(), denied)) }
    }

    /// The pool of connections to stores.
    pub async fn client(&self) -> Result<Client> {
        self.stores.client().await.cloned()
    }

    /// A variable of the environment that is not empty.
    pub fn variable(&self, name: &str) -> Option<String> {
        self.context.env_var(name).filter(|v| !v.is_empty())
    }

    /// The same machine with another environment.
    #[cfg(test)]
    pub fn with_environment(mut self, variables: &[(&str, &str)]) -> Self {
        let envs = variables.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
        self.context = self.context.with_env(reqsign_core::StaticEnv { home_dir: None, envs });
        self
    }
}

/// A pool that is made when it is first needed, for that reads the machine's trust store.
struct Connections {
    timeouts: Timeouts,
    denied: DeniedNetworks,
    client: OnceCell<Client>,
}

impl Connections {
    fn new(timeouts: Timeouts, denied: DeniedNetworks) -> Self {
        Self { timeouts, denied, client: OnceCell::new() }
    }

    async fn client(&self) -> Result<&Client> {
        let (timeouts, denied) = (self.timeouts, self.denied.clone());
        let make = move || {
            Client::new(&TlsSettings::default(), timeouts, denied)
                .map_err(|why| Fault::unknown(why).with_class(Class::Environment))
        };
        self.client.get_or_try_init(|| shipway_task::blocking("read certificates", make)).await
    }
}

struct Metadata(Connections);

impl std::fmt::Debug for Metadata {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Metadata")
    }
}

impl HttpSend for Metadata {
    async fn http_send(&self, request: http::Request<Bytes>) -> Signed<http::Response<Bytes>> {
        let failed = |why: String| Error::unexpected(why).set_retryable(true);
        let client = self.0.client().await.map_err(|f| failed(f.to_string()))?;
        let length = request.body().len() as u64;
        let mut request = request.map(full_body);
        if length > 0 {
            request.headers_mut().insert(http::header::CONTENT_LENGTH, length.into());
        }
        let answer = client.send(request).await.map_err(|e| failed(e.to_string()))?;
        let body = answer.body.collect(MAX_DOCUMENT).await.map_err(|e| failed(e.to_string()))?;
        Ok(http::Response::from_parts(answer.head, body))
    }
}

#[derive(Debug)]
struct Files;

impl FileRead for Files {
    async fn file_read(&self, path: &str) -> Signed<Vec<u8>> {
        let failed = |e: std::io::Error| {
            Error::config_invalid(format!("failed to read {path}")).with_source(e)
        };
        let file = tokio::fs::File::open(path).await.map_err(failed)?;
        let mut bytes = Vec::new();
        file.take(MAX_DOCUMENT + 1).read_to_end(&mut bytes).await.map_err(failed)?;
        if bytes.len() as u64 > MAX_DOCUMENT {
            return Err(Error::config_invalid(format!("{path} is too large")));
        }
        Ok(bytes)
    }
}

/// Programs that an administrator's profile names (`credential_process`).
#[derive(Debug)]
struct Programs;

impl CommandExecute for Programs {
    async fn command_execute<'a>(
        &'a self,
        program: &'a str,
        args: &'a [&'a str],
    ) -> Signed<CommandOutput> {
        let failed = |why: String| Error::unexpected(format!("failed to run {program}: {why}"));
        let mut command = Command::new(program);
        command.args(args).stdin(std::process::Stdio::null()).kill_on_drop(true);
        let output = timeout(PROGRAM, command.output())
            .await
            .map_err(|_| failed(format!("it did not end within {} s", PROGRAM.as_secs())))?
            .map_err(|e| failed(e.to_string()))?;
        if output.stdout.len() as u64 > MAX_DOCUMENT {
            return Err(failed("it said too much".to_owned()));
        }
        Ok(CommandOutput {
            status: output.status.code().unwrap_or(-1),
            stdout: output.stdout,
            stderr: output.stderr,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn files_and_programs_of_credentials_are_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        let read = async || Files.file_read(path.to_str().unwrap()).await.map(|b| b.len() as u64);
        std::fs::write(&path, vec![b'x'; MAX_DOCUMENT as usize]).unwrap();
        assert_eq!(read().await.unwrap(), MAX_DOCUMENT);
        std::fs::write(&path, vec![b'x'; MAX_DOCUMENT as usize + 1]).unwrap();
        assert!(read().await.is_err());
        let said = Programs.command_execute("sh", &["-c", "echo hello"]).await.unwrap();
        assert_eq!((said.status, said.stdout.as_slice()), (0, &b"hello\n"[..]));
        let much = format!("head -c {} /dev/zero", MAX_DOCUMENT + 1);
        assert!(Programs.command_execute("sh", &["-c", &much]).await.is_err());
    }
}
