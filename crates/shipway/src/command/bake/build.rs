//! Building the targets of a plan: at once where nothing waits for another, contexts sent once, and
//! linked targets held for those that go on from them (rows `bx.bake.linked`, `bx.bake.sharedctx`).

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, hash_map::Entry},
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
};

use serde_json::Map;
use shipway_client::{
    Client, Held, LocalDirs, Outcome, SharedDirs, SolveOptions, Status, shared_key,
};
use shipway_fault::{Fault, Result};
use tokio::{sync::mpsc, task::JoinSet};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use super::{Args, plan::Planned};
use crate::{
    Persona,
    command::build::{self, Prepared},
    connect::ConnectArgs,
    notes::Notes,
    output, progress,
    progress::Mode,
    run,
};

/// What became of one target.
enum Done {
    Held(Box<Held>),
    Built(Outcome),
}

pub(super) async fn run(
    connect: &ConnectArgs,
    args: &Args,
    planned: Planned,
    debug: bool,
) -> Result<ExitCode> {
    let call = args.call().filter(|call| call != "build");
    let mut prepared = BTreeMap::new();
    for (name, mut build) in planned.builds {
        let target = &planned.plan.targets[&name];
        let own = target.call.clone().filter(|c| c != "build");
        build.set_call(call.clone().or(own).as_deref());
        let inline = target.dockerfile_inline.clone();
        let one = shipway_task::blocking("read the context", move || build.prepare(inline));
        let one = one.await.map_err(|f| f.context(format!("target {name}")))?;
        prepared.insert(name, one);
    }
    let client = connect.connect(Persona::Shipway).await?;
    let mode = args.progress.unwrap_or(Mode::Auto);
    if prepared.values().any(Prepared::is_question) {
        return ask(&client, prepared, &planned.plan, mode).await;
    }
    let links: BTreeMap<String, Vec<(String, String)>> = planned
        .plan
        .targets
        .iter()
        .map(|(name, target)| {
            let linked = target.contexts.iter().filter_map(|(context, value)| {
                Some((context.clone(), value.strip_prefix("target:")?.to_owned()))
            });
            (name.clone(), linked.collect())
        })
        .collect();
    let only_linked: BTreeSet<String> = planned
        .plan
        .targets
        .iter()
        .filter(|(_, t)| t.linked)
        .map(|(name, _)| name.clone())
        .collect();
    let (events, view) = progress::start(mode, "Building")?;
    let work = Work { client: client.clone(), links, only_linked, several: prepared.len() > 1 };
    let built = work.carry_out(prepared, events).await;
    let shown = view.finish().await?;
    let (outcomes, fault) = built;
    if let (Some(path), None) = (&args.metadata_file, &fault) {
        let notes = Notes::of(connect.names()?, |name| std::env::var(name).ok());
        let mut metadata = Map::new();
        for (name, outcome) in &outcomes {
            let more = notes.of_build(&client, outcome).await?;
            let text = output::metadata(&outcome.response, more);
            metadata.insert(name.clone(), serde_json::from_str(&text).unwrap_or_default());
        }
        metadata.extend(notes.of_warnings(&shown.warnings)?);
        let text = serde_json::to_string_pretty(&metadata).unwrap_or_default();
        output::write_file(path, text.as_bytes())?;
    }
    if let Some(fault) = fault {
        return Err(fault);
    }
    if matches!(mode, Mode::Auto | Mode::Tty | Mode::Plain) {
        eprint!("{}", run::warnings(&shown.warnings, debug));
    }
    Ok(ExitCode::SUCCESS)
}

/// Asks the frontend about each target, one after another, and prints the answers.
async fn ask(
    client: &Client,
    prepared: BTreeMap<String, Prepared>,
    plan: &shipway_bake::Plan,
    mode: Mode,
) -> Result<ExitCode> {
    let mut code = ExitCode::SUCCESS;
    let asked = prepared.into_iter().filter_map(|(name, p)| Some((name, p.into_question()?)));
    for (n, (name, (question, options))) in asked.enumerate() {
        let blank = if n > 0 { "\n" } else { "" };
        output::print(&format!("{blank}{name}\n"))?;
        let description = &plan.targets[&name].description;
        if !description.is_empty() {
            output::print(&format!("{description}\n"))?;
        }
        output::print("\n")?;
        let answer = run::ask(client, options, mode)
            .await
            .map_err(|f| f.context(format!("target {name}")))?;
        match question.print(&answer) {
            Ok(false) => {}
            Ok(true) => code = ExitCode::FAILURE,
            Err(fault) => {
                output::print(&format!("error: {fault}\n"))?;
                code = ExitCode::FAILURE;
            }
        }
    }
    Ok(code)
}

/// What is known while targets are built.
struct Work {
    client: Client,
    /// Contexts of each target that are other targets.
    links: BTreeMap<String, Vec<(String, String)>>,
    /// Targets that nobody asked for.
    only_linked: BTreeSet<String>,
    several: bool,
}

impl Work {
    /// Builds everything; the outcomes, and the first failure.
    async fn carry_out(
        &self,
        prepared: BTreeMap<String, Prepared>,
        events: mpsc::Sender<Status>,
    ) -> (BTreeMap<String, Outcome>, Option<Fault>) {
        let stop = CancellationToken::new();
        let _signals = AbortOnDropHandle::new(shipway_task::spawn(
            "watch signals",
            run::signals(stop.clone()),
        ));
        let mut held: HashMap<String, Held> = HashMap::new();
        let mut outcomes = BTreeMap::new();
        let mut failure = match self.share(&prepared).await {
            Ok(shared) => {
                let (built, fault) =
                    self.schedule(prepared, &shared, &mut held, &stop, &events).await;
                outcomes = built;
                fault
            }
            Err(fault) => Some(fault),
        };
        // What others went on from is let go when all are done.
        for (name, one) in held {
            if let Err(fault) = one.release().await {
                failure.get_or_insert(fault.context(format!("target {name}")));
            }
        }
        drop(events);
        (outcomes, failure)
    }

    /// Directories that targets have in common are offered once for all of them.
    async fn share(
        &self,
        prepared: &BTreeMap<String, Prepared>,
    ) -> Result<HashMap<Vec<(String, PathBuf)>, Arc<SharedDirs>>> {
        let mut shared = HashMap::new();
        for one in prepared.values().filter(|p| !p.options.dirs.is_empty()) {
            let key = dirs(&one.options.dirs);
            if let Entry::Vacant(place) = shared.entry(key) {
                let dirs = one.options.dirs.clone();
                let stable = shared_key(dirs.iter());
                place.insert(Arc::new(self.client.share(dirs, &stable).await?));
            }
        }
        Ok(shared)
    }

    async fn schedule(
        &self,
        prepared: BTreeMap<String, Prepared>,
        shared: &HashMap<Vec<(String, PathBuf)>, Arc<SharedDirs>>,
        held: &mut HashMap<String, Held>,
        stop: &CancellationToken,
        events: &mpsc::Sender<Status>,
    ) -> (BTreeMap<String, Outcome>, Option<Fault>) {
        let used: BTreeSet<&str> =
            self.links.values().flatten().map(|(_, target)| target.as_str()).collect();
        // What is used is held first, and then built if it was asked for, too.
        let mut waiting: Vec<(String, bool)> = prepared
            .keys()
            .flat_map(|name| {
                let hold = used.contains(name.as_str()).then(|| (name.clone(), true));
                let build = !self.only_linked.contains(name);
                hold.into_iter().chain(build.then(|| (name.clone(), false)))
            })
            .collect();
        let mut running: JoinSet<(String, Result<Done>)> = JoinSet::new();
        let (mut outcomes, mut failure) = (BTreeMap::new(), None);
        // Kept to the end: what standard input or a temporary Dockerfile hold is read meanwhile.
        let prepared = prepared;
        loop {
            let ready = |held: &HashMap<String, Held>, (name, hold): &(String, bool)| {
                self.links[name].iter().all(|(_, other)| held.contains_key(other))
                    && (*hold || !used.contains(name.as_str()) || held.contains_key(name))
            };
            let (now, later): (Vec<_>, Vec<_>) =
                waiting.into_iter().partition(|one| failure.is_none() && ready(&*held, one));
            waiting = later;
            for (name, hold) in now {
                let mut options = prepared[&name].options.clone();
                if let Some(shared) = shared.get(&dirs(&options.dirs)) {
                    shared.give(&mut options);
                }
                for (context, other) in &self.links[&name] {
                    give(&held[other], context, &mut options);
                }
                let (client, stop) = (self.client.clone(), stop.clone());
                let events = self.named(&name, events);
                let task = async move {
                    let done = match hold {
                        true => tokio::select! {
                            held = client.hold(options, events) => held.map(|held| Done::Held(Box::new(held))),
                            () = stop.cancelled() => Err(Fault::cancelled()),
                        },
                        false => client.build(options, events, stop).await.map(Done::Built),
                    };
                    (name, done)
                };
                running.spawn(shipway_task::named("build a target", task));
            }
            match running.join_next().await {
                None => return (outcomes, failure),
                Some(Ok((name, Ok(Done::Held(one))))) => _ = held.insert(name, *one),
                Some(Ok((name, Ok(Done::Built(outcome))))) => _ = outcomes.insert(name, outcome),
                Some(Ok((name, Err(fault)))) => {
                    // The others are cancelled by the first, and have nothing to add.
                    let fault = fault.context(format!("target {name}"));
                    let fault = prepared[&name].named(fault);
                    failure.get_or_insert(fault);
                    stop.cancel();
                }
                Some(Err(error)) => {
                    failure.get_or_insert(Fault::internal(format!("build a target: {error}")));
                    stop.cancel();
                }
            }
        }
    }

    /// Events of a target, whose steps are called by its name where there are several.
    fn named(&self, name: &str, events: &mpsc::Sender<Status>) -> mpsc::Sender<Status> {
        if !self.several {
            return events.clone();
        }
        let (sender, mut queue) = mpsc::channel::<Status>(64);
        let (name, events) = (name.to_owned(), events.clone());
        shipway_task::spawn("name the steps of a target", async move {
            while let Some(mut status) = queue.recv().await {
                for vertex in &mut status.vertexes {
                    vertex.name = match vertex.name.strip_prefix('[') {
                        Some(rest) => format!("[{name} {rest}"),
                        None => format!("[{name}] {}", vertex.name),
                    };
                }
                if events.send(status).await.is_err() {
                    return;
                }
            }
        });
        sender
    }
}

fn dirs(dirs: &LocalDirs) -> Vec<(String, PathBuf)> {
    dirs.iter().map(|(name, dir)| (name.to_owned(), dir.to_owned())).collect()
}

/// Makes the states of `held` the context `name`.
fn give(held: &Held, name: &str, options: &mut SolveOptions) {
    let name = build::context_name(name).unwrap_or_else(|_| name.to_owned());
    for state in held.states() {
        let full = match state.platform.is_empty() {
            true => name.clone(),
            false => format!("{name}::{}", state.platform),
        };
        options.frontend_attrs.insert(format!("context:{full}"), format!("input:{full}"));
        if let Some(metadata) = &state.metadata {
            options.frontend_attrs.insert(format!("input-metadata:{full}"), metadata.clone());
        }
        options.frontend_inputs.insert(full, state.definition.clone());
    }
}
