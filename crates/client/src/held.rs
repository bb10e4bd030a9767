//! Builds whose result other builds go on from: linked targets of bake (row `bx.bake.linked`).
//!
//! The frontend is driven through the gateway, and the build stays open until it is let go, so that
//! its steps are shared with the builds that are given its states.

use std::collections::BTreeMap;

use base64::{Engine, engine::general_purpose::STANDARD};
use shipway_fault::{Context, Fault, Result};
use shipway_grpc::fault_of;
use shipway_proto::moby::buildkit::v1::frontend as wire;
use tokio::sync::mpsc;

use crate::{
    Client, Definition, SolveOptions, Status,
    driven::{self, Driven},
    question::{self, gateway},
    session::{Attached, LocalDirs, Services, Stores, Targets},
};

/// A state of a result, as an input of other builds.
#[derive(Clone, Debug, PartialEq)]
pub struct HeldState {
    /// Its platform; empty if the result has no other.
    pub platform: String,
    /// What makes it.
    pub definition: Definition,
    /// What the option `input-metadata` says of it, if there is something to say.
    pub metadata: Option<String>,
}

/// A build that is open.
pub struct Held {
    states: Vec<HeldState>,
    driven: Driven,
}

/// Directories that several builds read.
pub struct SharedDirs {
    session: Attached,
    names: Vec<String>,
}

impl SharedDirs {
    /// Makes `options` read the directories here in place of offering its own.
    pub fn give(&self, options: &mut SolveOptions) {
        options.dirs = LocalDirs::default();
        for name in &self.names {
            let option = format!("local-sessionid:{name}");
            options.frontend_attrs.insert(option, self.session.id.clone());
        }
    }
}

impl Client {
    /// Offers `dirs` to builds until what is returned is dropped (row `bx.bake.sharedctx`).
    pub async fn share(&self, dirs: LocalDirs, shared_key: &str) -> Result<SharedDirs> {
        let names = dirs.iter().map(|(name, _)| name.to_owned()).collect();
        let services = Services {
            dirs,
            targets: Targets::default(),
            stores: Stores::new(BTreeMap::new()),
            docker: None,
            secrets: Default::default(),
            ssh: Default::default(),
            uploads: Default::default(),
        };
        Ok(SharedDirs { session: services.attach(self, shared_key).await?, names })
    }

    /// Builds with a frontend, exports nothing, and keeps the result for other builds. Events go to
    /// `events` as they come.
    pub async fn hold(
        &self,
        mut options: SolveOptions,
        events: mpsc::Sender<Status>,
    ) -> Result<Held> {
        if options.frontend.is_empty() {
            return Err(Fault::invalid("a build that is held needs a frontend"));
        }
        options.exports.clear();
        options.cache_exports.clear();
        let ask = wire::SolveRequest { evaluate: true, ..driven::ask_frontend(&mut options) };
        let (mut held, result) = self.open(ask, options, events).await?;
        held.states = states(result);
        Ok(held)
    }

    /// What the file `path` of the state that `definition` makes holds, such as a download; there
    /// are at most 16 MiB of it.
    pub async fn read(&self, definition: Definition, path: &str) -> Result<Vec<u8>> {
        let options = SolveOptions::default();
        self.read_files(definition, &[path], None, options)
            .await?
            .pop()
            .unwrap_or_else(|| Err(Fault::internal("a file was not read")))
    }

    /// What the files `paths` of the state that `definition` makes hold, each on its own: the first
    /// `limit` bytes, or at most 16 MiB. `options` have what making the state may ask for.
    pub async fn read_files(
        &self,
        definition: Definition,
        paths: &[&str],
        limit: Option<u64>,
        options: SolveOptions,
    ) -> Result<Vec<Result<Vec<u8>>>> {
        let options = SolveOptions { internal: true, ..options };
        let ask = wire::SolveRequest {
            definition: Some(definition.into_wire()),
            allow_result_return: true,
            allow_result_array_ref: true,
            evaluate: true,
            ..Default::default()
        };
        // Nobody watches.
        let (events, _) = mpsc::channel(1);
        let (held, result) = self.open(ask, options, events).await?;
        let id = match result.result {
            Some(wire::result::Result::Ref(one)) => one.id,
            _ => String::new(),
        };
        let length = limit.map(|limit| i64::try_from(limit).unwrap_or(i64::MAX));
        let range = length.map(|length| wire::FileRange { offset: 0, length });
        let mut gateway = gateway(held.driven.calls.clone());
        let mut files = Vec::new();
        for path in paths {
            let read = wire::ReadFileRequest {
                file_path: (*path).to_owned(),
                r#ref: id.clone(),
                range,
                ..Default::default()
            };
            let read = gateway.read_file(question::of_build(read, &held.driven.id)).await;
            files.push(read.map(|read| read.into_inner().data).map_err(|s| fault_of(&s)));
        }
        held.release().await.map(|()| files)
    }

    /// Begins a build that stays open, and asks the gateway for `ask` in it.
    async fn open(
        &self,
        ask: wire::SolveRequest,
        options: SolveOptions,
        events: mpsc::Sender<Status>,
    ) -> Result<(Held, wire::Result)> {
        let driven = Driven::begin(self, options, events).await?;
        let held = Held { states: Vec::new(), driven };
        match held.driven.solve(ask).await {
            Ok(result) => Ok((held, result)),
            Err(status) => {
                let error =
                    wire::ReturnRequest { result: None, error: Some(question::status_of(&status)) };
                let fault = fault_of(&status);
                // What the build itself says of its failure has more to say.
                Err(held.driven.end(error).await.err().unwrap_or(fault))
                    .context(|| "failed to solve")
            }
        }
    }
}

impl Held {
    /// The states of the result, by platform.
    pub fn states(&self) -> &[HeldState] {
        &self.states
    }

    /// Lets the build go.
    pub async fn release(self) -> Result<()> {
        let done = wire::ReturnRequest { result: Some(wire::Result::default()), error: None };
        self.driven.end(done).await.map(drop)
    }
}

/// The states of a result, with what its metadata says of each.
fn states(result: wire::Result) -> Vec<HeldState> {
    use wire::result::Result as Kind;
    let refs = match result.result {
        Some(Kind::Ref(one)) => vec![(String::new(), one)],
        Some(Kind::Refs(all)) => all.refs.into_iter().collect(),
        _ => Vec::new(),
    };
    refs.into_iter()
        .filter_map(|(platform, state)| {
            let key = match platform.is_empty() {
                true => "containerimage.config".to_owned(),
                false => format!("containerimage.config/{platform}"),
            };
            let config = result.metadata.get(&key).map(|config| {
                let config = BTreeMap::from([("containerimage.config", STANDARD.encode(config))]);
                serde_json::to_string(&config).unwrap_or_default()
            });
            let definition = Definition::of_wire(state.def?);
            Some(HeldState { platform, definition, metadata: config })
        })
        .collect()
}
