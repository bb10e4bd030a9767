//! Runs the git binary: sealed off from the machine's settings, bounded, and ended with all its
//! helpers when no caller waits.

use rustix::process::{Pid, Signal, kill_process_group};
use shipway_fault::{Class, Code, Fault, Result, redact_text};
use shipway_progress::{LogStream, Reporter};
use std::{any::Any, net::IpAddr, path::Path, process::Stdio, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    process::{Child, Command},
};

/// Most bytes of output that are kept.
const MAX_OUTPUT: usize = 16 << 20;
/// Most bytes of complaints that are kept.
const MAX_COMPLAINT: usize = 16 << 10;
/// How long a git that no caller waits for may take to remove its locks and temporary files.
const GRACE: Duration = Duration::from_secs(10);

/// A git command line in the making. Cheap enough to clone per command.
#[derive(Clone)]
pub(crate) struct Git {
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    /// Settings that are secret: passed by environment, where other users cannot read them.
    settings: Vec<(String, String)>,
    /// What no git may outlive: the directory that it writes to.
    held: Option<Arc<dyn Any + Send + Sync>>,
    reporter: Reporter,
}

/// A git that runs. Dropped before its end, it is asked to end, and killed with its helpers if it
/// does not; whatever it writes to is held until then.
struct Running {
    group: Group,
    child: Option<Child>,
    held: Option<Arc<dyn Any + Send + Sync>>,
}

/// Kills the process group unless the process ended.
struct Group(Option<Pid>);

impl Group {
    fn signal(&self, signal: Signal) {
        if let Some(pid) = self.0 {
            let _ = kill_process_group(pid, signal);
        }
    }

    /// All of it has ended; its number may become another's.
    fn over(self) {
        std::mem::forget(self);
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let (Some(mut child), Ok(runtime)) =
            (self.child.take(), tokio::runtime::Handle::try_current())
        else {
            return;
        };
        if self.group.0.is_none() {
            return;
        }
        let (group, held) = (std::mem::replace(&mut self.group, Group(None)), self.held.take());
        group.signal(Signal::TERM);
        shipway_task::spawn_on(&runtime, "wait for git", async move {
            // Helpers have the same standard error: once it is closed, all have
            // ended.
            let ended = async {
                tokio::join!(drain(child.stdout.as_mut(), 0), drain(child.stderr.as_mut(), 0))
            };
            let _ = tokio::time::timeout(GRACE, ended).await;
            group.signal(Signal::KILL);
            let _ = child.wait().await;
            group.over();
            drop(held);
        });
    }
}

impl Git {
    pub(crate) fn new(reporter: &Reporter) -> Self {
        let mut environment: Vec<(String, String)> = [
            ("GIT_TERMINAL_PROMPT", "0"),
            ("GIT_CONFIG_NOSYSTEM", "1"),
            ("GIT_CONFIG_GLOBAL", "/dev/null"),
            ("HOME", "/dev/null"),
            ("LC_ALL", "C"),
            // A server that sends less than this for so many seconds is given up.
            ("GIT_HTTP_LOW_SPEED_LIMIT", "1000"),
            ("GIT_HTTP_LOW_SPEED_TIME", "30"),
        ]
        .map(|(k, v)| (k.to_owned(), v.to_owned()))
        .into();
        for name in [
            "PATH",
            "HTTP_PROXY",
            "HTTPS_PROXY",
            "NO_PROXY",
            "ALL_PROXY",
            "http_proxy",
            "https_proxy",
            "no_proxy",
            "all_proxy",
        ] {
            environment.extend(std::env::var(name).ok().map(|v| (name.to_owned(), v)));
        }
        // Submodules must not reach into this machine's files.
        // Nothing goes on in the background when a command has ended.
        let arguments =
            ["protocol.file.allow=user", "gc.autoDetach=false", "maintenance.autoDetach=false"];
        let arguments =
            arguments.into_iter().flat_map(|s| ["-c".to_owned(), s.to_owned()]).collect();
        Self {
            arguments,
            environment,
            settings: Vec::new(),
            held: None,
            reporter: reporter.clone(),
        }
    }

    pub(crate) fn env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.environment.push((name.to_owned(), value.into()));
        self
    }

    pub(crate) fn secret_setting(mut self, key: String, value: String) -> Self {
        self.settings.push((key, value));
        self
    }

    /// Keeps `held` until the last process has ended, though no caller waits for it any more.
    pub(crate) fn holding(mut self, held: Arc<dyn Any + Send + Sync>) -> Self {
        self.held = Some(held);
        self
    }

    pub(crate) fn git_dir(mut self, dir: &Path) -> Self {
        self.arguments.push(format!("--git-dir={}", dir.display()));
        self
    }

    pub(crate) fn work_tree(mut self, dir: &Path) -> Self {
        self.arguments.push(format!("--work-tree={}", dir.display()));
        self
    }

    /// Lets downloads connect to these addresses of a host and to no others; git before 2.37 looks
    /// the host up again.
    pub(crate) fn connecting(mut self, host: &str, port: u16, addresses: &[IpAddr]) -> Self {
        if !addresses.is_empty() {
            let shown = |address: &IpAddr| {
                if address.is_ipv6() { format!("[{address}]") } else { address.to_string() }
            };
            let all: Vec<String> = addresses.iter().map(shown).collect();
            self.arguments.extend([
                "-c".to_owned(),
                format!("http.curloptResolve={host}:{port}:{}", all.join(",")),
            ]);
        }
        self
    }

    /// How git reaches other hosts by SSH.
    pub(crate) fn ssh(self, agent: Option<&Path>, known_hosts: Option<&Path>) -> Self {
        let hosts = match known_hosts {
            Some(file) => format!("-o UserKnownHostsFile={}", file.display()),
            None => "-o StrictHostKeyChecking=no".to_owned(),
        };
        let git = self.env(
            "GIT_SSH_COMMAND",
            format!("ssh -F /dev/null -o ConnectTimeout=20 -o ServerAliveInterval=15 {hosts}"),
        );
        match agent {
            Some(socket) => git.env("SSH_AUTH_SOCK", socket.display().to_string()),
            None => git,
        }
    }

    /// Runs a command to its end and gives its output. `dir` is where it runs.
    pub(crate) async fn run(&self, dir: Option<&Path>, arguments: &[&str]) -> Result<String> {
        self.bytes(dir, arguments).await.map(|output| String::from_utf8_lossy(&output).into_owned())
    }

    /// The same for output that need not be text.
    pub(crate) async fn bytes(&self, dir: Option<&Path>, arguments: &[&str]) -> Result<Vec<u8>> {
        let mut command = Command::new("git");
        command
            .args(&self.arguments)
            .args(arguments)
            .env_clear()
            .envs(self.environment.iter().map(|(k, v)| (k, v)));
        command.env("GIT_CONFIG_COUNT", self.settings.len().to_string());
        for (i, (key, value)) in self.settings.iter().enumerate() {
            command
                .env(format!("GIT_CONFIG_KEY_{i}"), key)
                .env(format!("GIT_CONFIG_VALUE_{i}"), value);
        }
        command
            .current_dir(dir.unwrap_or(Path::new("/")))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command.process_group(0).kill_on_drop(true);
        with_usual_umask(&mut command);
        let child = command.spawn().map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => {
                Fault::new(Code::FailedPrecondition, "git is not installed where the daemon runs")
                    .with_class(Class::Environment)
                    .hint("install the package git on the daemon's machine")
            }
            _ => Fault::io("start git", e),
        })?;
        let group = Group(child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw));
        let mut running = Running { group, child: None, held: self.held.clone() };
        let child = running.child.insert(child);
        // The pipes stay with the child: when the caller stops waiting, they show when all helpers
        // have ended.
        let (output, complaint) = tokio::join!(
            drain(child.stdout.as_mut(), MAX_OUTPUT),
            drain(child.stderr.as_mut(), MAX_COMPLAINT)
        );
        let status = child.wait().await.map_err(|e| Fault::io("wait for git", e))?;
        std::mem::replace(&mut running.group, Group(None)).over();
        let complaint = self.shown(&complaint);
        if !complaint.is_empty() {
            self.reporter.log(LogStream::Stderr, complaint.as_bytes());
        }
        match status.code() {
            Some(0) => Ok(output),
            _ => Err(failure(arguments, &complaint)),
        }
    }

    /// Text of git's as it may be shown: without what is secret.
    fn shown(&self, complaint: &[u8]) -> String {
        let mut text = redact_text(&String::from_utf8_lossy(complaint));
        for (_, secret) in self.settings.iter().filter(|(_, secret)| !secret.is_empty()) {
            text = text.replace(secret, "xxxxx");
        }
        text
    }

    /// Whether a command succeeds.
    pub(crate) async fn succeeds(&self, arguments: &[&str]) -> bool {
        self.run(None, arguments).await.is_ok()
    }
}

/// What git says of a repository that is damaged, or locked by a process that has ended.
const DAMAGE: [&str; 17] = [
    "not a git repository",
    "File exists",
    "corrupt",
    "bad object",
    "error in object",
    "index file",
    "packfile",
    "bad config",
    "missing blob",
    "missing tree",
    "missing commit",
    "unable to read",
    "error: Could not read",
    "unable to unpack",
    "is empty",
    "reference broken",
    "shallow file has changed",
];

/// What git checks out becomes part of images, so its modes must not depend on the daemon's umask.
#[allow(unsafe_code)]
fn with_usual_umask(command: &mut Command) {
    let set = || {
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
        Ok(())
    };
    // SAFETY: between fork and exec only async-signal-safe functions may be called; umask(2) is
    // one, and nothing is allocated.
    unsafe { command.pre_exec(set) };
}

/// What git complained about, with the kind of failure as far as its words show.
fn failure(arguments: &[&str], complaint: &str) -> Fault {
    let complaint = complaint.trim();
    let verb = arguments.iter().find(|a| !a.starts_with('-')).copied().unwrap_or("git");
    let has = |words: &[&str]| words.iter().any(|w| complaint.contains(w));
    let message = format!("git {verb} failed: git stderr:\n{complaint}");
    if DAMAGE
        .iter()
        .any(|words| complaint.lines().any(|l| !l.starts_with("remote:") && l.contains(words)))
    {
        return Fault::new(Code::DataLoss, message).with_class(Class::Environment);
    }
    if has(&[
        "could not read Username",
        "could not read Password",
        "Authentication failed",
        "HTTP Basic: Access denied",
        "Permission denied (publickey",
    ]) {
        return Fault::new(Code::Unauthenticated, message).hint(
            "give a token as the secret GIT_AUTH_TOKEN, or for SSH an agent with --ssh default",
        );
    }
    if has(&[
        "Could not resolve host",
        "Connection refused",
        "Connection timed out",
        "timed out",
        "unable to access",
        "too slow",
    ]) {
        return Fault::unavailable(message);
    }
    if has(&["not found", "does not exist"]) {
        return Fault::not_found(message);
    }
    Fault::unknown(message)
}

/// Reads to the end and keeps the first `limit` bytes, so that the process is never held up.
async fn drain(reader: Option<impl AsyncRead + Unpin>, limit: usize) -> Vec<u8> {
    let Some(mut reader) = reader else { return Vec::new() };
    let (mut kept, mut buffer) = (Vec::new(), vec![0; 64 << 10]);
    while let Ok(n) = reader.read(&mut buffer).await {
        if n == 0 {
            break;
        }
        let room = limit.saturating_sub(kept.len()).min(n);
        kept.extend_from_slice(&buffer[..room]);
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use shipway_oci::Digest;

    #[test]
    fn ssh_is_told_hosts_and_agent() {
        let git = || Git::new(&Reporter::new(Digest::of("v"), "v".into(), vec![], None));
        let variable = |git: &Git, name: &str| {
            git.environment.iter().rev().find(|(n, _)| n == name).map(|(_, value)| value.clone())
        };
        let both = git().ssh(Some(Path::new("/a.sock")), Some(Path::new("/hosts")));
        assert_eq!(variable(&both, "SSH_AUTH_SOCK").as_deref(), Some("/a.sock"));
        assert!(
            variable(&both, "GIT_SSH_COMMAND")
                .is_some_and(|c| c.ends_with("-o UserKnownHostsFile=/hosts"))
        );
        // Without hosts to compare with there is nothing to check; the machine's own settings never
        // count.
        let neither = git().ssh(None, None);
        assert_eq!(variable(&neither, "SSH_AUTH_SOCK"), None);
        let command = variable(&neither, "GIT_SSH_COMMAND").unwrap_or_default();
        assert!(
            command.starts_with("ssh -F /dev/null ")
                && command.ends_with("-o StrictHostKeyChecking=no"),
            "{command}"
        );
    }
}
