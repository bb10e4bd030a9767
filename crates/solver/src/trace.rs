//! Text traces of the state machine: what happens on lines with `>`, what it asks for below.

use crate::{
    CacheKey, CacheMap, Completion, ImportedCache, InputMap, JobId, OpContext, Operation, Vertex,
    VertexId,
    event::{Effect, Event, ProbeResult, VertexProgress, Why},
    graph::Graph,
    ids::{EdgeId, JobNo, NodeNo, RequestNo, TaskNo},
    keys::{Candidates, InputKeys, Key},
};
use async_trait::async_trait;
use parking_lot::Mutex;
use shipway_fault::{Fault, Result};
use shipway_oci::Digest;
use shipway_progress::Journal;
use std::{collections::BTreeMap, sync::Arc};

/// A vertex of a trace: `name: input* [flags]`, an input is `name` or `~name` (content matters) or
/// `name.1` (its second output).
struct Named {
    map: CacheMap,
    counts: bool,
}

#[async_trait]
impl Operation for Named {
    type Output = String;
    type Job = ();

    async fn cache_map(&self, _: &OpContext<()>) -> Result<CacheMap> {
        Ok(self.map.clone())
    }
    async fn content_key(&self, _: usize, _: &String, _: &OpContext<()>) -> Result<Option<Digest>> {
        Ok(None)
    }
    async fn run(&self, _: Vec<String>, _: &OpContext<()>) -> Result<Vec<String>> {
        Ok(Vec::new())
    }
    fn takes_slot(&self) -> bool {
        self.counts
    }
    /// What carries on a value has its name in its own.
    fn is_lost(value: &String, fault: &Fault) -> bool {
        fault.message().strip_prefix("lost ").is_some_and(|lost| value.contains(lost))
    }
}

/// An imported cache: what it calls keys, and whether it promises a result.
#[derive(Default)]
struct Elsewhere {
    name: String,
    known: Mutex<BTreeMap<CacheKey, (CacheKey, bool)>>,
}

#[async_trait]
impl ImportedCache<String> for Elsewhere {
    async fn ready(&self) {}
    fn primary(&self, key: &CacheKey) -> Option<CacheKey> {
        self.known.lock().get(key).map(|(primary, _)| *primary)
    }
    fn has_result(&self, key: &CacheKey) -> bool {
        self.known.lock().get(key).is_some_and(|(_, result)| *result)
    }
    async fn load(&self, _: &CacheKey) -> Result<Option<String>> {
        Ok(None)
    }
}

enum Pending {
    Map(TaskNo, NodeNo, Arc<Vertex<Named>>),
    Content(TaskNo, NodeNo, usize),
    Probe(TaskNo, EdgeId),
    Run(TaskNo, NodeNo),
    Save(TaskNo, EdgeId, CacheKey),
    Read(TaskNo, JobNo),
    Fetch(TaskNo, EdgeId, Vec<CacheKey>),
}

impl Pending {
    fn task(&self) -> TaskNo {
        match self {
            Self::Map(t, ..)
            | Self::Content(t, ..)
            | Self::Probe(t, ..)
            | Self::Run(t, ..)
            | Self::Save(t, ..) => *t,
            Self::Read(t, ..) | Self::Fetch(t, ..) => *t,
        }
    }
}

struct Lab {
    graph: Graph<Named>,
    vertices: BTreeMap<String, Arc<Vertex<Named>>>,
    names: BTreeMap<NodeNo, String>,
    pending: BTreeMap<String, Pending>,
    elsewhere: BTreeMap<String, Arc<Elsewhere>>,
    out: Vec<String>,
    /// Whether it is also written why vertices run.
    explain: bool,
}

impl Lab {
    fn new(graph: &str, max_parallel: Option<usize>) -> Self {
        let mut vertices: BTreeMap<String, Arc<Vertex<Named>>> = BTreeMap::new();
        for line in graph.lines().map(str::trim).filter(|l| !l.is_empty()) {
            let (name, rest) = line.split_once(':').expect("name: inputs");
            let mut map = CacheMap {
                keys: vec![Digest::of(name.trim_end_matches('\''))],
                ..CacheMap::default()
            };
            let (mut inputs, mut ignore_cache, mut counts) = (Vec::new(), false, true);
            for word in rest.split_whitespace() {
                match word {
                    "!nocache" => ignore_cache = true,
                    "!ephemeral" => map.ephemeral = true,
                    "!free" => counts = false,
                    _ => {
                        let content = word.starts_with('~');
                        let (input, output) = word
                            .trim_start_matches('~')
                            .split_once('.')
                            .unwrap_or((word.trim_start_matches('~'), "0"));
                        map.inputs.push(InputMap { selector: None, content });
                        inputs.push((vertices[input].clone(), output.parse().expect("an output")));
                    }
                }
            }
            let id = VertexId { digest: Digest::of(name), ignore_cache, variant: 0 };
            let op = Arc::new(Named { map, counts });
            vertices.insert(
                name.into(),
                Arc::new(Vertex { id, name: name.into(), group: None, inputs, op }),
            );
        }
        let mut lab = Self {
            graph: Graph::new(max_parallel),
            vertices,
            names: BTreeMap::new(),
            pending: BTreeMap::new(),
            elsewhere: BTreeMap::new(),
            out: Vec::new(),
            explain: false,
        };
        for job in [1, 2] {
            lab.step(Event::Open { job: JobNo(job), data: (), journal: Journal::new() });
        }
        lab
    }

    /// The key of a vertex by definition; `name(key)` is its key over inputs that have that key.
    fn key(&self, name: &str) -> CacheKey {
        let (name, other) = name
            .trim_end_matches(')')
            .split_once('(')
            .map_or((name, None), |(name, other)| (name, Some(other)));
        let vertex = &self.vertices[name];
        let input = |(v, _): &(Arc<Vertex<Named>>, usize)| InputKeys {
            keys: vec![Key::stored(
                other.map_or_else(|| self.key(&v.name), |other| CacheKey(Digest::of(other))),
            )],
            content: None,
        };
        let inputs: Vec<InputKeys> = vertex.inputs.iter().map(input).collect();
        Candidates::of(&vertex.op.map, false, 0, &inputs).strong[0].key
    }

    fn edge(&self, edge: EdgeId) -> String {
        let name = &self.names[&edge.node];
        if edge.output == 0 { name.clone() } else { format!("{name}.{}", edge.output) }
    }

    fn step(&mut self, event: Event<Named>) {
        let effects = self.graph.step(event);
        for (no, node) in &self.graph.nodes {
            self.names.insert(*no, node.vertex.name.clone());
        }
        for effect in effects {
            let line = self.effect(effect);
            self.out.push(line);
        }
    }

    fn effect(&mut self, effect: Effect<Named>) -> String {
        let (line, pending) = match effect {
            Effect::Map { task, node, vertex, .. } => {
                (format!("map {}", vertex.name), Pending::Map(task, node, vertex))
            }
            Effect::Content { task, node, vertex, input, .. } => {
                (format!("content {} {input}", vertex.name), Pending::Content(task, node, input))
            }
            Effect::Probe { task, edge, load, .. } => (
                format!("{} {}", if load { "load" } else { "look" }, self.edge(edge)),
                Pending::Probe(task, edge),
            ),
            Effect::Run { task, node, vertex, inputs, why, .. } => {
                let line = format!("run {}", vertex.name);
                self.pending.insert(line.clone(), Pending::Run(task, node));
                let why = match why.filter(|_| self.explain) {
                    Some(Why::Known(miss)) => format!(" ({miss:?})"),
                    Some(Why::Unlike(_, names)) => format!(" (unlike, of {})", names.join(" ")),
                    None => String::new(),
                };
                return format!("{line} <- [{}]{why}", inputs.join(" "));
            }
            Effect::Read { task, job, cache } => {
                let name = self
                    .elsewhere
                    .values()
                    .find(|e| Arc::as_ptr(e).cast::<()>() == Arc::as_ptr(&cache).cast())
                    .expect("a cache");
                (format!("read {}", name.name), Pending::Read(task, job))
            }
            Effect::Fetch { task, edge, keys, .. } => {
                (format!("fetch {}", self.edge(edge)), Pending::Fetch(task, edge, keys))
            }
            Effect::Forget { value } => return format!("forget {value}"),
            Effect::Save { task, edge, strong, .. } => {
                (format!("save {}", self.edge(edge)), Pending::Save(task, edge, strong[0]))
            }
            Effect::Alias { keys, .. } => return format!("alias {}", keys.len()),
            Effect::Cancel { task } => {
                let name = self
                    .pending
                    .iter()
                    .find(|(_, p)| p.task() == task)
                    .map(|(n, _)| n.clone())
                    .expect("a task to cancel");
                self.pending.remove(&name);
                return format!("cancel {name}");
            }
            Effect::Report { reporter, what } => {
                return match what {
                    VertexProgress::Started => format!("{} started", reporter.name()),
                    VertexProgress::Cached => format!("{} cached", reporter.name()),
                    VertexProgress::Completed(None) => format!("{} completed", reporter.name()),
                    VertexProgress::Completed(Some(error)) => {
                        format!("{} failed: {error}", reporter.name())
                    }
                };
            }
            Effect::Reply { request, result } => {
                return match result {
                    Ok((value, Completion::Ran)) => format!("reply {}: ran {value}", request.0),
                    Ok((value, Completion::Cached)) => {
                        format!("reply {}: cached {value}", request.0)
                    }
                    Err(fault) => format!("reply {}: error {fault}", request.0),
                };
            }
        };
        assert!(self.pending.insert(line.clone(), pending).is_none(), "{line} asked for twice");
        line
    }

    /// Lets one thing happen: `request <no> <job> <edge>`, `withdraw <no>`, `close <job>`, or the
    /// end of a task by the words it was asked for with, and its result after `=`.
    fn happen(&mut self, line: &str) {
        let (what, result) =
            line.split_once('=').map_or((line.trim(), ""), |(w, r)| (w.trim(), r.trim()));
        let words: Vec<&str> = what.split_whitespace().collect();
        let number = |word: &str| word.parse::<u64>().expect("a number");
        let event = match &words[..] {
            ["request", no, job, edge] => {
                let (name, output) = edge.split_once('.').unwrap_or((edge, "0"));
                let vertex = self.vertices[name].clone();
                Event::Request {
                    request: RequestNo(number(no)),
                    job: JobNo(number(job)),
                    vertex,
                    output: number(output) as usize,
                }
            }
            ["import", job, name] => {
                let cache =
                    Arc::new(Elsewhere { name: (*name).to_owned(), ..Elsewhere::default() });
                self.elsewhere.insert((*name).to_owned(), cache.clone());
                Event::Import { job: JobNo(number(job)), cache }
            }
            ["lost", job, name] => {
                let (answer, mut redone) = tokio::sync::oneshot::channel();
                let (vertex, fault) =
                    (self.vertices[*name].clone(), Fault::not_found(result.to_owned()));
                self.step(Event::Lost {
                    job: JobNo(number(job)),
                    vertex,
                    output: 0,
                    fault,
                    answer,
                });
                self.out.push(format!("again: {}", redone.try_recv().expect("an answer")));
                return;
            }
            ["withdraw", no] => Event::Withdraw { request: RequestNo(number(no)) },
            ["close", job] => Event::Close { job: JobNo(number(job)) },
            _ => {
                let pending = self
                    .pending
                    .remove(what)
                    .unwrap_or_else(|| panic!("{what:?} was not asked for"));
                let fault = match result {
                    "cancelled" => Some(Fault::cancelled()),
                    r => r.strip_prefix("error ").map(|text| Fault::unknown(text.to_owned())),
                };
                let outcome = |value| fault.map_or(Ok(value), Err);
                match pending {
                    Pending::Map(task, node, vertex) => Event::Mapped {
                        task,
                        node,
                        result: outcome(()).map(|()| vertex.op.map.clone()),
                    },
                    Pending::Content(task, node, input) => {
                        let content = (!result.is_empty()).then(|| Digest::of(result));
                        Event::Content { task, node, input, result: outcome(()).map(|()| content) }
                    }
                    Pending::Probe(task, edge) => {
                        let answer = match result.split_once(' ') {
                            Some(("hit", value)) => {
                                ProbeResult::Hit(CacheKey(Digest::of(value)), value.into())
                            }
                            Some(("known", key)) => {
                                ProbeResult::Miss(vec![CacheKey(Digest::of(key))])
                            }
                            _ => ProbeResult::Miss(Vec::new()),
                        };
                        Event::Probed { task, edge, answer }
                    }
                    Pending::Run(task, node) => {
                        let values = result.split_whitespace().map(String::from).collect();
                        Event::Ran { task, node, result: outcome(()).map(|()| values) }
                    }
                    Pending::Save(task, edge, key) => {
                        Event::Saved { task, edge, primary: Some(key) }
                    }
                    // `name` has a result, `name>key` is only known, as `key`.
                    Pending::Read(task, job) => {
                        let cache = &self.elsewhere[words[1]];
                        for word in result.split_whitespace() {
                            let known = match word.split_once('>') {
                                Some((name, primary)) => {
                                    (self.key(name), (CacheKey(Digest::of(primary)), false))
                                }
                                None => (self.key(word), (self.key(word), true)),
                            };
                            cache.known.lock().insert(known.0, known.1);
                        }
                        Event::Imported { task, job }
                    }
                    Pending::Fetch(task, edge, keys) => {
                        let answer = match result.strip_prefix("hit ") {
                            Some(value) => {
                                ProbeResult::Imported(keys.first().copied(), value.to_owned())
                            }
                            None => ProbeResult::Miss(Vec::new()),
                        };
                        Event::Probed { task, edge, answer }
                    }
                }
            }
        };
        self.step(event);
    }
}

fn indent(text: &str) -> String {
    text.lines().map(str::trim).filter(|l| !l.is_empty()).fold(String::new(), |all, line| {
        let line = if line.starts_with('>') { line.to_owned() } else { format!("  {line}") };
        all + &line + "\n"
    })
}

/// Runs the lines of `trace` that begin with `>` and compares everything that is asked for with the
/// lines between them.
#[track_caller]
fn check_limited(graph: &str, max_parallel: Option<usize>, trace: &str) {
    run_trace(Lab::new(graph, max_parallel), trace);
}

#[track_caller]
fn run_trace(mut lab: Lab, trace: &str) {
    for line in trace.lines().filter_map(|l| l.trim().strip_prefix('>')) {
        lab.out.push(format!("> {}", line.trim()));
        lab.happen(line);
    }
    let (got, want) = (indent(&lab.out.join("\n")), indent(trace));
    assert!(got == want, "trace differs; it was:\n{got}");
}

/// The same, with why vertices run.
#[track_caller]
fn check_explained(graph: &str, trace: &str) {
    run_trace(Lab { explain: true, ..Lab::new(graph, None) }, trace);
}

#[track_caller]
fn check(graph: &str, trace: &str) {
    check_limited(graph, None, trace);
}

#[test]
fn job_ids_print_as_they_are() {
    assert_eq!(format!("{:?}", JobId("x".into())), "x");
}

#[test]
fn a_chain_without_cache_runs_in_order() {
    check(
        "a:\nb: a",
        "> request 1 1 b
         map b
         map a
         > map b
         > map a
         look a
         > look a
         load b
         > load b
         load a
         > load a
         a started
         run a <- []
         > run a = A
         a completed
         save a
         > save a
         b started
         run b <- [A]
         > run b = B
         b completed
         save b
         > save b
         reply 1: ran B",
    );
}

#[test]
fn a_hit_loads_nothing_before_it() {
    check(
        "a:\nb: a\nc: b",
        "> request 1 1 c
         map c
         map b
         map a
         > map a
         look a
         > map b
         > map c
         > look a = known A
         look b
         > look b = known B
         load c
         > load c = hit C
         c cached
         b cached
         a cached
         reply 1: cached C",
    );
}

#[test]
fn what_is_read_of_an_input_can_hit_without_the_rest() {
    check(
        "base:\nctx: !ephemeral\ncopy: base ~ctx\nmake: copy",
        "> request 1 1 make
         map make
         map copy
         map base
         map ctx
         > map make
         > map copy
         > map ctx
         > map base
         look base
         > look base = known BASE
         load base
         ctx started
         run ctx <- []
         > load base = known BASE
         > run ctx = CTX
         ctx completed
         content copy 1
         > content copy 1 = checksum
         load copy
         > load copy = hit COPY
         alias 1
         copy cached
         base cached
         load make
         > load make = hit MAKE
         make cached
         reply 1: cached MAKE",
    );
}

#[test]
fn inputs_that_must_run_run_side_by_side() {
    check(
        "a:\nb:\nc:\nab: a ~b\nabc: ab c",
        "> request 1 1 abc
         map abc
         map ab
         map c
         map a
         map b
         > map abc
         > map ab
         > map a
         look a
         > map b
         look b
         > map c
         look c
         > look a
         > look b
         look ab
         > look c
         > look ab
         load abc
         > load abc
         load ab
         load c
         > load ab
         load a
         load b
         > load a
         a started
         run a <- []
         > load c
         c started
         run c <- []
         > load b
         b started
         run b <- []
         > run b = B
         b completed
         save b
         > run a = A
         a completed
         save a
         > save b
         > save a
         content ab 1
         > content ab 1 = sum
         load ab
         > load ab
         ab started
         run ab <- [A B]
         > run c = C
         c completed
         save c",
    );
}

#[test]
fn work_that_ignores_the_cache_is_followed_by_work_that_does_not_look() {
    check(
        "a: !nocache\nb: a\nc: ~b",
        "> request 1 1 c
         map c
         map b
         map a
         > map c
         > map b
         > map a
         a started
         run a <- []
         > run a = A
         a completed
         save a
         > save a
         b started
         run b <- [A]
         > run b = B
         b completed
         save b
         > save b
         content c 0
         > content c 0 = sum
         load c
         > load c = hit C
         alias 2
         c cached
         reply 1: cached C",
    );
}

#[test]
fn equal_work_of_two_jobs_is_done_once() {
    check(
        "x:\nx':",
        "> request 1 1 x
         map x
         > request 2 2 x'
         map x'
         > map x
         load x
         > map x'
         load x'
         > load x
         x started
         run x <- []
         > load x'
         > run x = X
         x completed
         save x
         > save x
         reply 1: ran X
         x' cached
         reply 2: cached X",
    );
}

#[test]
fn a_follower_runs_itself_when_the_first_fails() {
    check(
        "x:\nx':",
        "> request 1 1 x
         map x
         > request 2 2 x'
         map x'
         > map x
         load x
         > map x'
         load x'
         > load x
         x started
         run x <- []
         > load x'
         > run x = error boom
         x failed: boom
         reply 1: error boom
         x' started
         run x' <- []
         > run x' = X
         x' completed
         save x'
         > save x'
         reply 2: ran X",
    );
}

#[test]
fn a_follower_keeps_the_work_alive() {
    check(
        "x:\nx':",
        "> request 1 1 x
         map x
         > request 2 2 x'
         map x'
         > map x
         load x
         > map x'
         load x'
         > load x
         x started
         run x <- []
         > load x'
         > close 1
         reply 1: error context canceled
         > run x = X
         x completed
         save x
         > save x
         x' cached
         reply 2: cached X",
    );
}

#[test]
fn the_first_error_wins_and_the_rest_is_cancelled() {
    check(
        "a:\nb:\nm: a b",
        "> request 1 1 m
         map m
         map a
         map b
         > map m
         > map a
         look a
         > map b
         look b
         > look a
         > look b
         load m
         > load m
         load a
         load b
         > load a
         a started
         run a <- []
         > load b
         b started
         run b <- []
         > run a = error boom
         a failed: boom
         reply 1: error boom
         b failed: context canceled
         cancel run b
         > request 2 1 m
         reply 2: error boom",
    );
}

#[test]
fn a_cancellation_is_not_remembered() {
    check(
        "a:",
        "> request 1 1 a
         map a
         > map a
         load a
         > load a
         a started
         run a <- []
         > run a = cancelled
         a failed: context canceled
         reply 1: error context canceled
         > request 2 1 a
         load a
         > load a
         a started
         run a <- []
         > run a = A
         a completed
         save a",
    );
}

#[test]
fn work_goes_on_for_those_who_still_want_it() {
    check(
        "a:\nb: a",
        "> request 1 1 b
         map b
         map a
         > request 2 2 b
         > map a
         look a
         > map b
         > look a
         load b
         > load b
         load a
         > load a
         a started
         run a <- []
         > withdraw 1
         > run a = A
         a completed
         save a
         > withdraw 2
         > close 2
         > close 1",
    );
}

#[test]
fn closing_a_job_ends_its_work() {
    check(
        "a:",
        "> request 1 1 a
         map a
         > map a
         load a
         > load a
         a started
         run a <- []
         > close 1
         reply 1: error context canceled
         cancel run a
         a failed: context canceled
         > request 2 1 a
         reply 2: error the job has ended: context canceled",
    );
}

#[test]
fn a_vertex_runs_once_for_all_its_outputs() {
    check(
        "a:\nm: a a.1",
        "> request 1 1 m
         map m
         map a
         > map m
         > map a
         look a
         look a.1
         > look a
         > look a.1
         load m
         > load m
         load a
         load a.1
         > load a
         a started
         run a <- []
         > load a.1
         > run a = A0 A1
         a completed
         save a
         save a.1
         > save a
         > save a.1
         m started
         run m <- [A0 A1]",
    );
}

#[test]
fn a_missing_output_is_our_fault() {
    check(
        "a:",
        "> request 1 1 a.2
         map a
         > map a
         load a.2
         > load a.2
         a started
         run a <- []
         > run a = A0 A1
         a completed
         reply 1: error a gave 2 outputs, and number 2 was asked for",
    );
}

#[test]
fn the_limit_holds_back_what_counts() {
    check_limited(
        "a:\nb:\nc: !free\nm: a b c",
        Some(1),
        "> request 1 1 m
         map m
         map a
         map b
         map c
         > map m
         > map a
         look a
         > map b
         look b
         > map c
         look c
         > look a
         > look b
         > look c
         load m
         > load m
         load a
         load b
         load c
         > load a
         a started
         run a <- []
         > load b
         > load c
         c started
         run c <- []
         > run a = A
         a completed
         save a
         b started
         run b <- []
         > run b = B
         b completed
         save b",
    );
}

#[test]
fn work_cancelled_with_a_job_is_tried_for_the_others() {
    check(
        "a:",
        "> request 1 1 a
         map a
         > request 2 2 a
         > map a
         load a
         > load a
         a started
         run a <- []
         > close 1
         reply 1: error context canceled
         > run a = cancelled
         a started
         run a <- []
         > run a = A
         a completed
         save a
         > save a
         reply 2: ran A",
    );
}

#[test]
fn a_content_hit_links_the_definition() {
    check(
        "src:\ncopy: ~src",
        "> request 1 1 copy
         map copy
         map src
         > map copy
         > map src
         look src
         > look src
         load copy
         > load copy
         load src
         > load src = hit SRC
         src cached
         load copy
         > load copy
         content copy 0
         > content copy 0 = sum
         load copy
         > load copy = hit COPY
         alias 2
         copy cached
         reply 1: cached COPY",
    );
}

#[test]
fn an_import_is_waited_for_where_the_store_has_nothing() {
    check(
        "a:\nb: a",
        "> import 1 reg
         read reg
         > request 1 1 b
         map b
         map a
         > map b
         > map a
         look a
         > look a
         load b
         > load b
         > read reg = b
         fetch b
         > fetch b = hit B
         b cached
         a cached
         reply 1: cached B",
    );
}

#[test]
fn what_the_store_has_waits_for_no_import() {
    check(
        "a:\nb: a",
        "> import 1 reg
         read reg
         > request 1 1 b
         map b
         map a
         > map b
         > map a
         look a
         > look a
         load b
         > load b = hit B
         b cached
         a cached
         reply 1: cached B
         > close 1
         cancel read reg",
    );
}

#[test]
fn another_jobs_import_is_not_looked_into() {
    check(
        "a:\nb:",
        "> import 1 reg
         read reg
         > read reg = a b
         > request 1 1 a
         map a
         > request 2 2 b
         map b
         > map b
         load b
         > load b
         b started
         run b <- []
         > map a
         load a
         > load a
         fetch a
         > fetch a = hit A
         a cached
         reply 1: cached A",
    );
}

#[test]
fn a_vertex_of_two_jobs_is_looked_for_in_what_the_later_one_imports() {
    check(
        "a:\nb: a",
        "> request 1 1 b
         map b
         map a
         > map b
         > map a
         look a
         > import 2 reg
         read reg
         > read reg = b
         > look a
         load b
         > request 2 2 b
         > load b
         fetch b
         > fetch b = hit B
         b cached
         a cached
         reply 1: cached B
         reply 2: cached B",
    );
}

#[test]
fn a_job_that_leaves_takes_its_import_along() {
    check(
        "a:",
        "> import 1 reg
         read reg
         > request 1 1 a
         map a
         > request 2 2 a
         > map a
         load a
         > load a
         > close 1
         cancel read reg
         reply 1: error context canceled
         a started
         run a <- []",
    );
}

#[test]
fn what_a_cache_calls_an_input_is_for_asking_that_cache_only() {
    // The cache knows `a` by another name, and `b` by what follows from that. `b` and `c` are
    // stored under what follows from `a` itself.
    check(
        "a:\nb: a\nc: b",
        "> import 1 reg
         read reg
         > read reg = a>A b(A)
         > request 1 1 c
         map c
         map b
         map a
         > map c
         > map b
         > map a
         look a
         > look a
         look b
         > look b
         load c
         > load c
         load b
         > load b
         fetch b
         > fetch b = hit B
         b cached
         a cached
         c started
         run c <- [B]
         > run c = C
         c completed
         save c
         > save c
         reply 1: ran C",
    );
}

#[test]
fn a_lost_input_is_made_again_for_a_checksum() {
    check(
        "a:\nb: ~a",
        "> request 1 1 b
         map b
         map a
         > map b
         > map a
         look a
         > look a = known A
         load b
         > load b
         load a
         > load a = hit A
         a cached
         content b 0
         > content b 0 = error lost A
         forget A
         load a
         > load a
         load b
         a started
         run a <- []
         > run a = A2
         a completed
         save a
         > save a
         > load b
         content b 0
         > content b 0 = sum
         load b
         > load b
         b started
         run b <- [A2]
         > run b = B
         b completed
         save b
         > save b
         reply 1: ran B",
    );
}

#[test]
fn a_lost_input_of_a_merge_is_made_again_with_the_merge() {
    check(
        "a:\nm: a\nr: m",
        "> request 1 1 r
         map r
         map m
         map a
         > map r
         > map m
         > map a
         look a
         > look a = known A
         look m
         > look m
         load r
         > load r
         load m
         > load m
         load a
         > load a = hit A
         a cached
         m started
         run m <- [A]
         > run m = M[A]
         m completed
         save m
         > save m
         r started
         run r <- [M[A]]
         > run r = error lost A
         forget A
         forget M[A]
         r completed
         look a
         > look a
         load m
         > load m
         load a
         load r
         > load r
         > load a
         a started
         run a <- []
         > run a = A2
         a completed
         save a
         > save a
         m started
         run m <- [A2]
         > run m = M[A2]
         m completed
         save m
         > save m
         r started
         run r <- [M[A2]]
         > run r = R
         r completed
         save r
         > save r
         reply 1: ran R",
    );
}

#[test]
fn a_lost_result_is_made_again_when_it_is_read() {
    check(
        "a:",
        "> request 1 1 a
         map a
         > map a
         load a
         > load a = hit A
         a cached
         reply 1: cached A
         > lost 1 a = lost A
         forget A
         again: true
         > request 2 1 a
         load a
         > load a
         a started
         run a <- []
         > run a = A
         a completed
         save a
         > save a
         reply 2: ran A
         > lost 1 a = lost A
         again: false",
    );
}

#[test]
fn a_vertex_that_runs_says_why() {
    // Not stored and asked for without cache, and what follows from that.
    check_explained(
        "ctx: !ephemeral\nuse: ctx",
        "> request 1 1 use
         map use
         map ctx
         > map use
         > map ctx
         ctx started
         run ctx <- [] (Uncacheable { inputs: [] })
         > run ctx = CTX
         ctx completed
         use started
         run use <- [CTX] (Uncacheable { inputs: [\"ctx\"] })",
    );
    check_explained(
        "a: !nocache\nb: a",
        "> request 1 1 b
         map b
         map a
         > map b
         > map a
         a started
         run a <- [] (Ignored { inputs: [] })
         > run a = A
         a completed
         save a
         > save a
         b started
         run b <- [A] (Ignored { inputs: [\"a\"] })",
    );
    // The store knows the key of one and has lost its result; it does not know the other.
    check_explained(
        "a:\nb: a",
        "> request 1 1 b
         map b
         map a
         > map b
         > map a
         look a
         > look a = known A
         load b
         > load b
         load a
         > load a = known A
         a started
         run a <- [] (Gone)
         > run a = A
         a completed
         save a
         > save a
         load b
         > load b
         b started
         run b <- [A] (unlike, of a)",
    );
}
