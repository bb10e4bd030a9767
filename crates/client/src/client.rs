//! A connection to a daemon, and the questions that have one answer (rows `ctl.*`).

use std::{process::Stdio, sync::Arc, time::Duration};

use futures::{Stream, TryStreamExt};
use prost::Message as _;
use shipway_fault::{Code, Context, Fault, Result};
use shipway_grpc::{Address, ClientTls, TunnelChannel, dial, fault_of};
use shipway_oci::Digest;
use shipway_proto::{
    MAX_MESSAGE,
    containerd::services::content::v1::{self as content, content_client::ContentClient},
    moby::buildkit::v1 as wire,
    moby::buildkit::v1::control_client::ControlClient,
};
use tokio::process::{Child, Command};
use tonic::metadata::MetadataValue;

use crate::{DaemonInfo, Location, Status, TokenSource, UsageInfo, WorkerInfo, token::Calls};

/// How to connect.
#[derive(Clone, Debug, Default)]
pub struct ConnectOptions {
    /// TLS, for `tcp://`.
    pub tls: Option<ClientTls>,
    /// Where the tokens of calls come from. They are sent over TLS, over sockets of this machine,
    /// and by commands that carry a connection, and not otherwise.
    pub token: Option<TokenSource>,
    /// How long connecting may take; forever if not given.
    pub timeout: Option<Duration>,
    /// Try again until the daemon answers or the time is up.
    pub wait: bool,
}

/// With a request for what the build cache holds: an encoded `PruneRequest`, of which only what it
/// would remove is wanted. With the answer: that this is the answer.
const WOULD_PRUNE: &str = "shipway-would-prune-bin";

/// What to prune.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PruneOptions {
    /// Only records that match.
    pub filter: Vec<String>,
    /// Internal records and those of frontends too.
    pub all: bool,
    /// Nanoseconds for which records are kept.
    pub keep_duration: i64,
    /// Bytes that are always allowed.
    pub reserved_space: i64,
    /// Bytes to get below.
    pub max_used_space: i64,
    /// Bytes of the disk to get free.
    pub min_free_space: i64,
}

impl PruneOptions {
    fn to_wire(&self) -> wire::PruneRequest {
        wire::PruneRequest {
            filter: self.filter.clone(),
            all: self.all,
            keep_duration: self.keep_duration,
            reserved_space: self.reserved_space,
            max_used_space: self.max_used_space,
            min_free_space: self.min_free_space,
        }
    }
}

/// A connection to a daemon. Clones share it.
#[derive(Clone)]
pub struct Client {
    calls: Calls,
    /// Keeps the command that carries the connection alive.
    _carrier: Option<Arc<Carrier>>,
}

struct Carrier {
    tunnel: TunnelChannel,
    _child: Child,
}

impl Drop for Carrier {
    fn drop(&mut self) {
        self.tunnel.close();
    }
}

impl Client {
    /// Connects to the daemon at `location`.
    pub async fn connect(location: &Location, options: &ConnectOptions) -> Result<Self> {
        let connecting = async {
            loop {
                let attempt = async {
                    let client = Self::attempt(location, options).await?;
                    if options.wait {
                        client.probe().await?;
                    }
                    Ok::<_, Fault>(client)
                };
                match attempt.await {
                    Err(fault) if options.wait && fault.code() == Code::Unavailable => {
                        tokio::time::sleep(Duration::from_millis(200)).await
                    }
                    done => return done,
                }
            }
        };
        match options.timeout {
            None => connecting.await,
            Some(limit) => tokio::time::timeout(limit, connecting).await.unwrap_or_else(|_| {
                Err(Fault::new(
                    Code::DeadlineExceeded,
                    format!("connect to {location}: no answer within {} seconds", limit.as_secs()),
                )
                .hint("is the daemon running, and is this its address?"))
            }),
        }
    }

    async fn attempt(location: &Location, options: &ConnectOptions) -> Result<Self> {
        let token = options.token.clone();
        let (url, argv) = match location {
            Location::Socket(address) => {
                if token.is_some() && options.tls.is_none() && matches!(address, Address::Tcp(_)) {
                    return Err(Fault::invalid(format!(
                        "a token is not sent to {address} without TLS"
                    ))
                    .hint("name the authority of the daemon's certificate (--tlscacert)"));
                }
                let channel = dial(address, options.tls.as_ref()).await?;
                return Ok(Self { calls: Calls::new(channel, token), _carrier: None });
            }
            Location::Command { url, argv } => (url, argv),
        };
        let (program, arguments) =
            argv.split_first().ok_or_else(|| Fault::internal("an address gave no command"))?;
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .kill_on_drop(true)
            // Ctrl-C is for us: the connection must live until the build's end is known.
            .process_group(0)
            .spawn()
            .map_err(|e| Fault::io(format!("connect to {url}: start {program}"), e))?;
        let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(Fault::internal("a command was started without its streams"));
        };
        let tunnel = TunnelChannel::connect(tokio::io::join(stdout, stdin))
            .await
            .context(|| format!("connect to {url}"))?;
        Ok(Self {
            calls: Calls::new(tunnel.channel(), token),
            _carrier: Some(Arc::new(Carrier { tunnel, _child: child })),
        })
    }

    /// Whether the daemon answers. Old ones do not know the question, which is an answer too.
    async fn probe(&self) -> Result<()> {
        match self.info().await {
            Err(fault) if fault.code() != Code::Unimplemented => Err(fault),
            _ => Ok(()),
        }
    }

    pub(crate) fn control(&self) -> ControlClient<Calls> {
        ControlClient::new(self.calls.clone())
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE)
    }

    pub(crate) fn calls(&self) -> Calls {
        self.calls.clone()
    }

    /// Whether calls connect anew where the connection is lost; one that a command carries ends
    /// with it.
    pub(crate) fn reconnects(&self) -> bool {
        self._carrier.is_none()
    }

    /// What the daemon says of itself.
    pub async fn info(&self) -> Result<DaemonInfo> {
        let answer = self
            .control()
            .info(wire::InfoRequest {})
            .await
            .map_err(|s| fault_of(&s).context("failed to call info"))?;
        Ok(DaemonInfo { buildkit_version: answer.into_inner().buildkit_version.into() })
    }

    /// The workers that match `filter`.
    pub async fn workers(&self, filter: Vec<String>) -> Result<Vec<WorkerInfo>> {
        let request = wire::ListWorkersRequest { filter };
        let answer = self
            .control()
            .list_workers(request)
            .await
            .map_err(|s| fault_of(&s).context("failed to list workers"))?;
        Ok(answer.into_inner().record.into_iter().map(WorkerInfo::from).collect())
    }

    /// The records of the build cache that match `filter`, smallest first.
    pub async fn disk_usage(&self, filter: Vec<String>) -> Result<Vec<UsageInfo>> {
        let request = wire::DiskUsageRequest { filter, age_limit: 0 };
        let answer = self
            .control()
            .disk_usage(request)
            .await
            .map_err(|s| fault_of(&s).context("failed to call diskusage"))?;
        let mut records: Vec<UsageInfo> =
            answer.into_inner().record.into_iter().map(UsageInfo::from).collect();
        records.sort_by(|a, b| a.size.cmp(&b.size).then_with(|| a.id.cmp(&b.id)));
        Ok(records)
    }

    /// Prunes the build cache; gives the records that go, as they go. Dropping the stream ends the
    /// pruning.
    pub async fn prune(
        &self,
        options: PruneOptions,
    ) -> Result<impl Stream<Item = Result<UsageInfo>> + Send + Unpin + use<>> {
        let answer = self
            .control()
            .prune(options.to_wire())
            .await
            .map_err(|s| fault_of(&s).context("failed to call prune"))?;
        Ok(answer
            .into_inner()
            .map_ok(UsageInfo::from)
            .map_err(|s| fault_of(&s).context("failed to prune")))
    }

    /// The records that [`Client::prune`] would remove, in that order. `Unimplemented` from a
    /// daemon that cannot say so, such as buildkitd.
    pub async fn would_prune(&self, options: &PruneOptions) -> Result<Vec<UsageInfo>> {
        // A daemon that does not know the question answers another one, and removes nothing.
        let mut request = tonic::Request::new(wire::DiskUsageRequest::default());
        let prune = MetadataValue::from_bytes(&options.to_wire().encode_to_vec());
        request.metadata_mut().insert_bin(WOULD_PRUNE, prune);
        let answer = self
            .control()
            .disk_usage(request)
            .await
            .map_err(|s| fault_of(&s).context("failed to ask what a prune would remove"))?;
        if !answer.metadata().contains_key(WOULD_PRUNE) {
            return Err(Fault::new(
                Code::Unimplemented,
                "this daemon cannot say what a prune would remove",
            )
            .hint("`du` shows all that could go"));
        }
        Ok(answer.into_inner().record.into_iter().map(UsageInfo::from).collect())
    }

    /// The length of the blob `digest` of a build, if the daemon has it.
    pub async fn blob_size(&self, digest: &str) -> Result<Option<u64>> {
        let request = content::InfoRequest { digest: digest.to_owned() };
        let answer = ContentClient::new(self.calls.clone()).info(request).await;
        match answer.map_err(|s| fault_of(&s)) {
            Ok(answer) => {
                let info = answer.into_inner().info.unwrap_or_default();
                Ok(Some(u64::try_from(info.size).unwrap_or_default()))
            }
            Err(fault) if fault.is_not_found() => Ok(None),
            Err(fault) => Err(fault.context(format!("look for the blob {digest}"))),
        }
    }

    /// The bytes of the blob `digest` of a build, such as what it said, as they come; they are not
    /// checked against the digest.
    pub async fn blob_stream(
        &self,
        digest: &str,
    ) -> Result<impl Stream<Item = Result<Vec<u8>>> + Send + Unpin + use<>> {
        let failed = {
            let digest = digest.to_owned();
            move |s: tonic::Status| fault_of(&s).context(format!("read the blob {digest}"))
        };
        let request =
            content::ReadContentRequest { digest: digest.to_owned(), ..Default::default() };
        let answer = ContentClient::new(self.calls.clone())
            .max_decoding_message_size(MAX_MESSAGE)
            .read(request)
            .await
            .map_err(&failed)?;
        Ok(answer.into_inner().map_ok(|part| part.data).map_err(failed))
    }

    /// All bytes of the blob `digest`, of which there are at most `limit`; checked.
    pub async fn blob(&self, digest: &str, limit: u64) -> Result<Vec<u8>> {
        let mut stream = self.blob_stream(digest).await?;
        let mut bytes = Vec::new();
        while let Some(part) = stream.try_next().await? {
            bytes.extend_from_slice(&part);
            if bytes.len() as u64 > limit {
                return Err(Fault::invalid(format!(
                    "the blob {digest} is larger than {limit} bytes"
                )));
            }
        }
        match Digest::of(&bytes).to_string() == digest {
            true => Ok(bytes),
            false => Err(Fault::new(Code::DataLoss, format!("the blob {digest} is damaged"))),
        }
    }

    /// The events of the build `reference`, from its beginning to its end.
    pub async fn status(
        &self,
        reference: &str,
    ) -> Result<impl Stream<Item = Result<Status>> + Send + Unpin + use<>> {
        let request = wire::StatusRequest { r#ref: reference.to_owned() };
        let answer = self
            .control()
            .status(request)
            .await
            .map_err(|s| fault_of(&s).context("failed to get status"))?;
        Ok(answer
            .into_inner()
            .map_ok(Status::from)
            .map_err(|s| fault_of(&s).context("failed to receive status")))
    }
}
