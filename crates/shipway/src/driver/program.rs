//! Programs that drivers run.

use std::process::{ExitStatus, Stdio};

use shipway_fault::{Code, Fault, Result};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    process::Command,
};

/// Bytes of a program's output, at most; what is said of all pods of a builder is much less.
const MAX_OUTPUT: u64 = 4 << 20;

/// A program with the arguments that every call has.
pub(super) struct Program {
    name: &'static str,
    /// What to do where it is missing.
    install: &'static str,
    before: Vec<String>,
}

/// What a program said.
pub(super) struct Said {
    status: ExitStatus,
    pub(super) stdout: String,
    stderr: String,
    what: String,
}

impl Program {
    pub(super) fn new(name: &'static str, install: &'static str, before: Vec<String>) -> Self {
        Self { name, install, before }
    }

    /// Name and arguments.
    pub(super) fn argv(&self, arguments: &[&str]) -> Vec<String> {
        let after = arguments.iter().map(|a| (*a).to_owned());
        [self.name.to_owned()].into_iter().chain(self.before.iter().cloned()).chain(after).collect()
    }

    /// Runs it to its end, whatever that is.
    pub(super) async fn run(&self, arguments: &[&str], stdin: Option<&str>) -> Result<Said> {
        let argv = self.argv(arguments);
        let what = argv.iter().take(6).map(String::as_str).collect::<Vec<_>>().join(" ");
        let failed = |e| Fault::io(format!("run {what}"), e);
        let started = Command::new(&argv[0])
            .args(&argv[1..])
            .stdin(if stdin.is_some() { Stdio::piped() } else { Stdio::null() })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn();
        let mut child = match started {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(Fault::new(
                    Code::FailedPrecondition,
                    format!("{} is not installed, and the driver works by it", self.name),
                )
                .hint(self.install)
                .hint("or start the daemon yourself, and use it with --driver remote"));
            }
            started => started.map_err(failed)?,
        };
        let input = child.stdin.take();
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let feed = async {
            if let (Some(mut input), Some(text)) = (input, stdin) {
                // A program that ends without reading says why itself.
                let _ = input.write_all(text.as_bytes()).await;
            }
        };
        let ((), stdout, stderr) = tokio::join!(feed, all(stdout), all(stderr));
        let status = child.wait().await.map_err(failed)?;
        Ok(Said { status, stdout: stdout.map_err(failed)?, stderr: stderr.map_err(failed)?, what })
    }

    /// Runs it; what it said, if that went well.
    pub(super) async fn ok(&self, arguments: &[&str], stdin: Option<&str>) -> Result<String> {
        self.run(arguments, stdin).await?.ok()
    }
}

async fn all(from: Option<impl AsyncRead + Unpin>) -> std::io::Result<String> {
    let Some(from) = from else { return Ok(String::new()) };
    let mut data = Vec::new();
    from.take(MAX_OUTPUT).read_to_end(&mut data).await?;
    Ok(String::from_utf8_lossy(&data).into_owned())
}

impl Said {
    /// Whether it went well.
    pub(super) fn is_ok(&self) -> bool {
        self.status.success()
    }

    /// Whether it failed and said so in words that have `text`, in any case of letters.
    pub(super) fn failed_with(&self, text: &str) -> bool {
        !self.is_ok() && self.stderr.to_lowercase().contains(&text.to_lowercase())
    }

    /// What it said, if it went well.
    pub(super) fn ok(self) -> Result<String> {
        if self.is_ok() {
            return Ok(self.stdout);
        }
        let said = match self.stderr.trim() {
            "" => self.status.to_string(),
            text => text.to_owned(),
        };
        Err(Fault::unavailable(format!("{}: {said}", self.what)))
    }
}
