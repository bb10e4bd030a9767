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
    nodes::{Nodes, Part, platforms_of},
    notes::Notes,
    output,
    progress::{self, Mode},
    run,
    spread::{self, Built, Join},
};

/// What became of one target on one node.
enum Done {
    Held(Box<Held>),
    Built(Outcome),
}

/// A target on a node.
type Place = (String, usize);

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
    let nodes = connect.nodes(Persona::Shipway)?;
    let mode = args.progress.unwrap_or(Mode::Auto);
    if prepared.values().any(Prepared::is_question) {
        return ask(&nodes.client(0).await?, prepared, &planned.plan, mode).await;
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
    let work = Work::of(&nodes, links, only_linked, &prepared).await?;
    let (events, view) = progress::start(mode, "Building")?;
    let (built, fault) = work.carry_out(prepared, events).await;
    let shown = view.finish().await?;
    if let (Some(path), None) = (&args.metadata_file, &fault) {
        let notes = Notes::of(|name| std::env::var(name).ok());
        let mut metadata = Map::new();
        for (name, built) in &built {
            let more = notes.of_build(&nodes, &built.outcomes).await?;
            let text = output::metadata(&built.response, more);
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
struct Work<'a> {
    nodes: &'a Nodes,
    /// The parts of each target.
    parts: BTreeMap<String, Vec<Part>>,
    /// What others go on from, on each node.
    needed: BTreeSet<Place>,
    /// What is solved for each of these.
    solves: HashMap<Place, SolveOptions>,
    /// What becomes of targets that several nodes build.
    joins: BTreeMap<String, Join>,
    /// Contexts of each target that are other targets.
    links: BTreeMap<String, Vec<(String, String)>>,
    /// Targets that nobody asked for.
    only_linked: BTreeSet<String>,
}

/// Directories that are offered, by node and by what they are.
type Shared = HashMap<(usize, Vec<(String, PathBuf)>), Arc<SharedDirs>>;

impl<'a> Work<'a> {
    async fn of(
        nodes: &'a Nodes,
        links: BTreeMap<String, Vec<(String, String)>>,
        only_linked: BTreeSet<String>,
        prepared: &BTreeMap<String, Prepared>,
    ) -> Result<Self> {
        let mut parts = BTreeMap::new();
        for (name, one) in prepared {
            let at = |fault: Fault| fault.context(format!("target {name}"));
            let platforms = platforms_of(&one.options.frontend_attrs).map_err(at)?;
            parts.insert(name.clone(), nodes.choose(&platforms).await.map_err(at)?);
        }
        let asked_for = places(&parts).filter(|(name, _)| !only_linked.contains(name));
        let needed = needed(&links, &parts, asked_for)?;
        let (mut solves, mut joins) = (HashMap::new(), BTreeMap::new());
        for (name, parts) in &parts {
            let split = spread::split(&prepared[name].options, parts);
            let (all, join) = split.map_err(|f| f.context(format!("target {name}")))?;
            joins.extend(join.map(|join| (name.clone(), join)));
            solves.extend(parts.iter().zip(all).map(|(p, s)| ((name.clone(), p.node), s)));
        }
        for place in &needed {
            solves.entry(place.clone()).or_insert_with(|| prepared[&place.0].options.clone());
        }
        Ok(Self { nodes, parts, needed, solves, joins, links, only_linked })
    }

    /// Builds everything; what was built, and the first failure.
    async fn carry_out(
        &self,
        prepared: BTreeMap<String, Prepared>,
        events: mpsc::Sender<Status>,
    ) -> (BTreeMap<String, Built>, Option<Fault>) {
        let stop = CancellationToken::new();
        let _signals = AbortOnDropHandle::new(shipway_task::spawn(
            "watch signals",
            run::signals(stop.clone()),
        ));
        let mut held: HashMap<Place, Held> = HashMap::new();
        let mut outcomes = HashMap::new();
        let mut failure = match self.share().await {
            Ok(shared) => {
                let (built, fault) =
                    self.schedule(prepared, &shared, &mut held, &stop, &events).await;
                outcomes = built;
                fault
            }
            Err(fault) => Some(fault),
        };
        let mut built = BTreeMap::new();
        if failure.is_none() {
            match self.join(outcomes, &events, &stop).await {
                Ok(all) => built = all,
                Err(fault) => failure = Some(fault),
            }
        }
        // What others went on from is let go when all are done.
        for ((name, _), one) in held {
            if let Err(fault) = one.release().await {
                failure.get_or_insert(fault.context(format!("target {name}")));
            }
        }
        (built, failure)
    }

    /// Puts together what the nodes built of each target.
    async fn join(
        &self,
        mut outcomes: HashMap<Place, Outcome>,
        events: &mpsc::Sender<Status>,
        stop: &CancellationToken,
    ) -> Result<BTreeMap<String, Built>> {
        let mut built = BTreeMap::new();
        for (name, parts) in self.parts.iter().filter(|(name, _)| self.is_asked_for(name)) {
            let of = |part: &Part| {
                let outcome = outcomes.remove(&(name.clone(), part.node))?;
                Some((part.node, outcome))
            };
            let all: Vec<(usize, Outcome)> = parts.iter().filter_map(of).collect();
            let one = Built::of(self.joins.get(name), all, events, stop).await;
            built.insert(name.clone(), one.map_err(|f| f.context(format!("target {name}")))?);
        }
        Ok(built)
    }

    fn is_asked_for(&self, name: &str) -> bool {
        !self.only_linked.contains(name)
    }

    /// Directories that targets have in common are offered once to each node for all of them.
    async fn share(&self) -> Result<Shared> {
        let mut shared = HashMap::new();
        for ((_, node), options) in self.solves.iter().filter(|(_, s)| !s.dirs.is_empty()) {
            if let Entry::Vacant(place) = shared.entry((*node, dirs(&options.dirs))) {
                let dirs = options.dirs.clone();
                let stable = shared_key(dirs.iter());
                let client = self.nodes.client(*node).await?;
                place.insert(Arc::new(client.share(dirs, &stable).await?));
            }
        }
        Ok(shared)
    }

    async fn schedule(
        &self,
        prepared: BTreeMap<String, Prepared>,
        shared: &Shared,
        held: &mut HashMap<Place, Held>,
        stop: &CancellationToken,
        events: &mpsc::Sender<Status>,
    ) -> (HashMap<Place, Outcome>, Option<Fault>) {
        // What is used is held first, and then built if it was asked for, too.
        let hold = self.needed.iter().map(|place| (place.clone(), true));
        let build = places(&self.parts).filter(|(name, _)| self.is_asked_for(name));
        let mut waiting: Vec<(Place, bool)> =
            hold.chain(build.map(|place| (place, false))).collect();
        let mut running: JoinSet<(Place, Result<Done>)> = JoinSet::new();
        let (mut outcomes, mut failure) = (HashMap::new(), None);
        // Kept to the end: what standard input or a temporary Dockerfile hold is read meanwhile.
        let prepared = prepared;
        loop {
            let ready = |held: &HashMap<Place, Held>, (place, hold): &(Place, bool)| {
                let (name, node) = place;
                self.links[name].iter().all(|(_, other)| held.contains_key(&(other.clone(), *node)))
                    && (*hold || !self.needed.contains(place) || held.contains_key(place))
            };
            let (now, later): (Vec<_>, Vec<_>) =
                waiting.into_iter().partition(|one| failure.is_none() && ready(&*held, one));
            waiting = later;
            for (place, hold) in now {
                let (name, node) = &place;
                let mut options = self.solves[&place].clone();
                if let Some(shared) = shared.get(&(*node, dirs(&options.dirs))) {
                    shared.give(&mut options);
                }
                for (context, other) in &self.links[name] {
                    give(&held[&(other.clone(), *node)], context, &mut options);
                }
                let client = match self.nodes.client(*node).await {
                    Ok(client) => client,
                    Err(fault) => {
                        failure.get_or_insert(fault.context(format!("target {name}")));
                        stop.cancel();
                        break;
                    }
                };
                let events = self.named(&place, events);
                running.spawn(shipway_task::named(
                    "build a target",
                    one(place, hold, client, options, events, stop.clone()),
                ));
            }
            match running.join_next().await {
                None => return (outcomes, failure),
                Some(Ok((place, Ok(Done::Held(one))))) => _ = held.insert(place, *one),
                Some(Ok((place, Ok(Done::Built(outcome))))) => _ = outcomes.insert(place, outcome),
                Some(Ok(((name, node), Err(fault)))) => {
                    // The others are cancelled by the first, and have nothing to add.
                    let fault = match self.parts[&name].len() {
                        1 => fault,
                        _ => fault.context(format!("node {}", self.nodes.names(node).1)),
                    };
                    let fault = prepared[&name].named(fault.context(format!("target {name}")));
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

    /// Events of a target, whose steps are called by its name where there are several, and by that
    /// of the node where it has several.
    fn named(&self, (name, node): &Place, events: &mpsc::Sender<Status>) -> mpsc::Sender<Status> {
        let targets = (self.parts.len() > 1).then_some(name.as_str());
        // A step of one target is another's, too, but not on another node.
        let node = self.nodes.are_several().then(|| self.nodes.names(*node).1);
        let shown = node.filter(|_| self.parts[name].len() > 1);
        let words: Vec<&str> = targets.into_iter().chain(shown).collect();
        match words.is_empty() {
            true => events.clone(),
            false => progress::part(events, &words.join(" "), node),
        }
    }
}

/// All parts of all targets.
fn places(parts: &BTreeMap<String, Vec<Part>>) -> impl Iterator<Item = Place> {
    parts.iter().flat_map(|(name, parts)| parts.iter().map(|part| (name.clone(), part.node)))
}

/// One target on one node.
async fn one(
    place: Place,
    hold: bool,
    client: Client,
    options: SolveOptions,
    events: mpsc::Sender<Status>,
    stop: CancellationToken,
) -> (Place, Result<Done>) {
    let done = match hold {
        true => tokio::select! {
            held = client.hold(options, events) => held.map(|held| Done::Held(Box::new(held))),
            () = stop.cancelled() => Err(Fault::cancelled()),
        },
        false => client.build(options, events, stop).await.map(Done::Built),
    };
    (place, done)
}

/// What targets go on from, on the nodes where these are built: wherever that is if it names no
/// platform, and otherwise its own nodes must do.
fn needed(
    links: &BTreeMap<String, Vec<(String, String)>>,
    parts: &BTreeMap<String, Vec<Part>>,
    asked_for: impl Iterator<Item = Place>,
) -> Result<BTreeSet<Place>> {
    let mut needed = BTreeSet::new();
    let mut open: Vec<Place> = asked_for.collect();
    while let Some((name, node)) = open.pop() {
        for (context, other) in &links[&name] {
            let known = &parts[other];
            let anywhere = known.iter().all(|part| part.platforms.is_empty());
            if !anywhere && known.iter().all(|part| part.node != node) {
                return Err(Fault::invalid(format!(
                    "failed to use {other} as context {context} for {name} because targets build \
                     with different drivers"
                ))
                .hint(format!("give {other} the platforms of {name}")));
            }
            let place = (other.clone(), node);
            if needed.insert(place.clone()) {
                open.push(place);
            }
        }
    }
    Ok(needed)
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
