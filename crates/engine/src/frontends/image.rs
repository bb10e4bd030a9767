//! Frontends out of images (rows `gwctr.*`): the image's process speaks LLBBridge over its standard
//! input and output.

use super::container::EngineContainer;
use crate::build::{Build, BuildScope, CallLog, FrontendCall, SourceQuery};
use parking_lot::Mutex;
use shipway_executor::{ExitStatus, Output, OutputTarget, ProcessIo, Stream};
use shipway_fault::{Context as _, Detail, Fault, Result};
use shipway_frontend::{
    Bridge, BuildRef, Container as _, ContainerMount, ContainerProcess, ContainerRequest,
    FrontendOptions, FrontendResult, Worker,
};
use shipway_gateway::GatewayBuild;
use shipway_gocompat::parse_bool;
use shipway_llb::{
    Definition, FileDraft, FileMkfile, MarshalOptions, Mount, NetMode, SourceOp, State,
    VertexOptions,
};
use shipway_oci::{ImageConfig, ImageName, Platform};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream},
    sync::mpsc,
};

/// Bytes under way between us and a frontend.
const PIPE: usize = 256 << 10;
const CHUNK: usize = 64 << 10;
/// Pieces that wait for a slow frontend.
const QUEUE: usize = 16;
/// How long a frontend that has returned its result may take to end.
const FAREWELL: Duration = Duration::from_secs(5);
/// Lines of its standard error that are shown when it fails.
const LAST_WORDS: usize = 10;

/// Where frontends find what is known of themselves.
const METADATA: &str = "/run/config/buildkit/metadata";

/// An image that is a frontend.
struct FrontendImage {
    name: String,
    config: ImageConfig,
    /// Its files.
    state: State,
    platform: Platform,
}

/// Names in a comma separated list, without what follows a `+`.
fn caps(list: Option<&String>) -> BTreeSet<&str> {
    let names =
        list.map_or("", String::as_str).split(',').map(|c| c.split('+').next().unwrap_or_default());
    names.filter(|c| !c.is_empty()).collect()
}

impl FrontendImage {
    /// What the build puts in the place of the image `source`, if it does that, or the image
    /// itself.
    async fn find(scope: &BuildScope, source: &str, inner: &Arc<dyn Bridge>) -> Result<Self> {
        let parts = &scope.parts;
        let Some(other) = parts.contexts.find(inner.options(), source)? else {
            return Self::resolve(scope, source).await;
        };
        parts.image_frontends.check_override(&other)?;
        let files = parts.contexts.load(inner.clone(), source).await?;
        let (config, platform) = (files.config.unwrap_or_default(), parts.native().clone());
        Ok(Self { name: other, config, state: files.state, platform })
    }

    async fn resolve(scope: &BuildScope, source: &str) -> Result<Self> {
        let name: ImageName = source.parse().map_err(|e| {
            Fault::invalid(format!("{source:?} cannot name a frontend's image: {e}"))
        })?;
        let platform = scope.parts.native().clone();
        let asked =
            SourceOp { identifier: format!("docker-image://{name}"), attrs: BTreeMap::new() };
        let asked = scope.check(asked, Some(&platform), &[]).await?;
        // A policy may have put another in its place, and that may be the client's.
        let found = asked.identifier.strip_prefix("docker-image://").unwrap_or(&asked.identifier);
        scope.parts.image_frontends.check(found)?;
        let query = SourceQuery {
            platform: Some(platform.clone()),
            log_name: String::new(),
            ..SourceQuery::default()
        };
        let meta = scope.resolve(asked, query).await?;
        let image = meta
            .facts
            .image
            .ok_or_else(|| Fault::internal("an image was resolved without its config"))?;
        let config = serde_json::from_slice(&image.config)
            .map_err(|e| Fault::invalid(format!("read the config of {name}: {e}")))?;
        let name = name.with_digest(image.digest).to_string();
        let extra = BTreeMap::from([("image.recordtype".to_owned(), "frontend".to_owned())]);
        let state = State::image(&name, "", extra, Default::default());
        Ok(Self { name, config, state, platform })
    }

    /// The frontend must know what it is asked for (row `gwctr.caperr`).
    fn check_caps(&self, options: &FrontendOptions, has_inputs: bool) -> Result<()> {
        let has = caps(self.config.config.labels.get("moby.buildkit.frontend.caps"));
        let inputs = has_inputs.then_some("moby.buildkit.frontend.inputs");
        match caps(options.get("frontend.caps"))
            .into_iter()
            .chain(inputs)
            .find(|c| !has.contains(c))
        {
            None => Ok(()),
            Some(lacking) => Err(Fault::new(
                shipway_fault::Code::Unimplemented,
                format!("unsupported frontend capability {lacking}"),
            )
            .detail(Detail::FrontendCap(lacking.to_owned()))),
        }
    }

    fn marshal(&self, state: &State) -> Result<Definition> {
        state.marshal(&MarshalOptions {
            platform: self.platform.clone(),
            caps: None,
            local_unique_id: String::new(),
        })
    }

    /// A directory with what the frontend may want to know of itself: the definition of its files
    /// (row `gwctr.meta`).
    fn metadata(&self, definition: &Definition) -> Result<Definition> {
        let file = FileMkfile {
            path: "/frontend.bin".into(),
            mode: 0o400,
            data: definition.encode().into(),
            timestamp: Some(0),
            ..FileMkfile::default()
        };
        let name =
            VertexOptions::named(format!("[internal] metadata of the frontend {}", self.name));
        self.marshal(&State::scratch().file(FileDraft::new().mkfile(file), name))
    }

    fn process(
        &self,
        options: &FrontendOptions,
        session: &str,
        worker: &Worker,
    ) -> Result<ContainerProcess> {
        let config = &self.config.config;
        let mut env = config.env.clone();
        env.extend(
            options
                .iter()
                .enumerate()
                .map(|(i, (k, v))| format!("BUILDKIT_FRONTEND_OPT_{i}={k}={v}")),
        );
        let Worker { id, labels, platforms, package, version, revision } = worker;
        let version =
            serde_json::json!({ "package": package, "version": version, "revision": revision });
        let workers = serde_json::json!([{
            "id": id, "labels": labels, "platforms": platforms, "gcPolicy": null, "buildkitVersion": version, "cdiDevices": null,
        }]);
        env.push(format!("BUILDKIT_SESSION_ID={session}"));
        env.push(format!("BUILDKIT_WORKERS={workers}"));
        env.push("BUILDKIT_EXPORTEDPRODUCT=buildkit".to_owned());
        let args = config
            .entrypoint
            .clone()
            .filter(|e| !e.is_empty())
            .unwrap_or_else(|| vec!["/run".to_owned()]);
        Ok(ContainerProcess {
            args,
            env,
            cwd: config.working_dir.clone(),
            remove_mount_stubs_recursive: true,
            ..ContainerProcess::default()
        })
    }

    fn network(&self) -> NetMode {
        match self
            .config
            .config
            .labels
            .get("moby.buildkit.frontend.network.none")
            .and_then(|v| parse_bool(v))
        {
            Some(true) => NetMode::None,
            _ => NetMode::Unset,
        }
    }
}

/// The last lines of a frontend's standard error.
#[derive(Default)]
struct LastWords(Mutex<VecDeque<String>>);

impl LastWords {
    fn add(&self, bytes: &[u8]) {
        let mut lines = self.0.lock();
        for line in String::from_utf8_lossy(bytes).lines().filter(|l| !l.trim().is_empty()) {
            tracing::debug!("frontend: {line}");
            lines.push_back(line.chars().take(500).collect());
            if lines.len() > LAST_WORDS {
                lines.pop_front();
            }
        }
    }

    fn hint(&self, fault: Fault) -> Fault {
        let lines = self.0.lock();
        lines.iter().fold(fault, |f, line| f.hint(format!("the frontend logged: {line}")))
    }
}

/// Carries bytes between our end of a pipe and a process.
async fn carry(
    ours: DuplexStream,
    to: mpsc::Sender<bytes::Bytes>,
    mut from: mpsc::Receiver<Output>,
    words: &LastWords,
) {
    let (mut read, mut write) = tokio::io::split(ours);
    let there = async {
        let mut buffer = bytes::BytesMut::new();
        loop {
            buffer.reserve(CHUNK);
            match read.read_buf(&mut buffer).await {
                Ok(0) | Err(_) => break,
                Ok(_) if to.send(buffer.split().freeze()).await.is_err() => break,
                Ok(_) => {}
            }
        }
        drop(to);
    };
    let back = async {
        while let Some(Output { stream, bytes }) = from.recv().await {
            match stream {
                Stream::Stdout if write.write_all(&bytes).await.is_err() => break,
                Stream::Stdout => {}
                Stream::Stderr => words.add(&bytes),
            }
        }
        let _ = write.shutdown().await;
    };
    tokio::join!(there, back);
}

/// Runs the frontend in the image `source`, which `log` asks for and which gets `inner` as its
/// bridge.
pub(crate) async fn run(
    build: &Build,
    log: &Arc<CallLog>,
    source: &str,
    inner: Arc<dyn Bridge>,
) -> Result<FrontendResult> {
    let doing = || format!("run the frontend {source}");
    let image = FrontendImage::find(&build.scope, source, &inner).await.context(doing)?;
    image.check_caps(inner.options(), !inner.inputs().await?.is_empty())?;
    let definition = image.marshal(&image.state)?;
    let metadata = build
        .state(image.metadata(&definition)?, &[], &CallLog::root(FrontendCall::default()))
        .await
        .context(doing)?;
    let state = build.state(definition, &[], log).await.context(doing)?;
    let mount = |dest: &str, readonly: bool, state: Arc<dyn BuildRef>| ContainerMount {
        mount: Mount { dest: dest.into(), readonly, ..Mount::default() },
        state: Some(state),
    };
    let asked = ContainerRequest {
        name: format!("frontend {}", image.name),
        mounts: vec![mount("/", false, state), mount(METADATA, true, metadata)],
        network: image.network(),
        ..ContainerRequest::default()
    };
    let container = EngineContainer::new(build, asked).await.context(doing)?;
    let process = image.process(inner.options(), build.scope.session.as_str(), &inner.worker())?;
    let (driven, returned) = GatewayBuild::new(inner);
    let ((theirs, ours), words) = (tokio::io::duplex(PIPE), LastWords::default());
    let (to, input) = mpsc::channel(QUEUE);
    let (output, from) = mpsc::channel(QUEUE);
    let io = ProcessIo {
        input: Some(input),
        output: OutputTarget::Queue(output),
        control: None,
        started: None,
    };
    let end = container.start(process, io);
    let serve = shipway_gateway::serve(driven.clone(), theirs);
    let work = async {
        let (ended, (), _) = tokio::join!(end, carry(ours, to, from, &words), serve);
        ended
    };
    let result = outcome(work, returned).await;
    driven.release_containers().await;
    // One that has returned may still run.
    let _ = container.release().await;
    // What it returned is its own business; that it returned nothing is ours to explain.
    result.map_err(|fault| words.hint(fault).context(doing()))?
}

/// What the frontend returned, or why it returned nothing. One that has returned is not waited for
/// for ever.
async fn outcome(
    work: impl Future<Output = Result<ExitStatus>>,
    mut returned: tokio::sync::oneshot::Receiver<Result<FrontendResult>>,
) -> Result<Result<FrontendResult>> {
    let mut work = std::pin::pin!(work);
    let ended = tokio::select! {
        biased;
        result = &mut returned => {
            let result = result.map_err(|_| Fault::cancelled())?;
            // That it failed afterwards counts more than what it said before, unless it had said
            // that it would.
            return match tokio::time::timeout(FAREWELL, work).await {
                Ok(Err(fault)) if result.is_ok() => Err(fault),
                Ok(Ok(ExitStatus { code, .. })) if result.is_ok() && code != 0 => Err(exited(code)),
                _ => Ok(result),
            };
        }
        ended = &mut work => ended,
    };
    let result = returned.try_recv();
    if let Ok(Err(fault)) = result {
        return Ok(Err(fault));
    }
    match (ended?, result) {
        (ExitStatus { code: 0, .. }, Ok(result)) => Ok(result),
        (ExitStatus { code: 0, .. }, Err(_)) => {
            Err(Fault::unknown("the frontend ended without a result"))
        }
        (ExitStatus { code, .. }, _) => Err(exited(code)),
    }
}

fn exited(code: u32) -> Fault {
    Fault::unknown(format!("exit code: {code}")).detail(Detail::Exit(code))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(labels: &[(&str, &str)]) -> FrontendImage {
        let mut config = ImageConfig::default();
        config.config.labels =
            labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        FrontendImage {
            name: "example.com/front:1".into(),
            config,
            state: State::scratch(),
            platform: Platform::host(),
        }
    }

    #[test]
    fn a_frontend_is_asked_only_for_what_it_knows() {
        let options =
            |caps: &str| FrontendOptions::from([("frontend.caps".to_owned(), caps.to_owned())]);
        let image = image(&[(
            "moby.buildkit.frontend.caps",
            "moby.buildkit.frontend.inputs,moby.buildkit.frontend.contexts+forward",
        )]);
        image.check_caps(&options("moby.buildkit.frontend.contexts"), true).unwrap();
        let lacking =
            image.check_caps(&options("moby.buildkit.frontend.subrequests"), false).unwrap_err();
        assert_eq!(
            lacking.details(),
            [Detail::FrontendCap("moby.buildkit.frontend.subrequests".into())]
        );
    }

    #[test]
    fn a_frontend_is_told_of_everything_in_its_environment() {
        let options = FrontendOptions::from([
            ("a".to_owned(), "1".to_owned()),
            ("b".to_owned(), "x=y".to_owned()),
        ]);
        let labels = [("l".to_owned(), "v".to_owned())].into();
        let worker = Worker {
            id: "w".into(),
            labels,
            platforms: vec![Platform::host()],
            version: "v1".into(),
            ..Worker::default()
        };
        let process = image(&[("moby.buildkit.frontend.network.none", "true")])
            .process(&options, "s", &worker)
            .unwrap();
        assert_eq!(process.args, ["/run"]);
        assert!(
            process.env.contains(&"BUILDKIT_FRONTEND_OPT_1=b=x=y".to_owned()),
            "{:?}",
            process.env
        );
        assert!(process.env.contains(&"BUILDKIT_EXPORTEDPRODUCT=buildkit".to_owned()));
        let workers = process.env.iter().find_map(|e| e.strip_prefix("BUILDKIT_WORKERS=")).unwrap();
        let workers: serde_json::Value = serde_json::from_str(workers).unwrap();
        assert_eq!((&workers[0]["id"], &workers[0]["labels"]["l"]), (&"w".into(), &"v".into()));
        assert_eq!(
            (&workers[0]["platforms"][0]["os"], &workers[0]["buildkitVersion"]["version"]),
            (&"linux".into(), &"v1".into())
        );
    }

    #[tokio::test]
    async fn a_frontend_that_says_nothing_is_an_error() {
        let (_sender, returned) = tokio::sync::oneshot::channel();
        let said = outcome(async { Ok(ExitStatus { code: 3, ..Default::default() }) }, returned)
            .await
            .err()
            .unwrap();
        assert_eq!(said.to_string(), "exit code: 3");
        let (sender, returned) = tokio::sync::oneshot::channel();
        assert!(sender.send(Ok(FrontendResult::of(None))).is_ok());
        assert!(outcome(async { Ok(ExitStatus::default()) }, returned).await.unwrap().is_ok());
        // The end counts more than a result, and a failure that was returned more than both.
        for (returns, want) in [
            (Ok(FrontendResult::of(None)), "exit code: 3"),
            (Err(Fault::unknown("no such file")), "no such file"),
        ] {
            let (sender, returned) = tokio::sync::oneshot::channel();
            assert!(sender.send(returns).is_ok());
            let work = async { Ok(ExitStatus { code: 3, ..Default::default() }) };
            let fault = match outcome(work, returned).await {
                Ok(result) => result.err().unwrap(),
                Err(fault) => fault,
            };
            assert_eq!(fault.to_string(), want);
        }
    }
}
