//! Random graphs, random caches, random failures and withdrawals: what the solver answers is what
//! computing in order gives.

use async_trait::async_trait;
use futures::FutureExt as _;
use parking_lot::Mutex;
use shipway_fault::{Fault, Result};
use shipway_oci::Digest;
use shipway_progress::{Event, Journal};
use shipway_solver::{
    CacheKey, CacheMap, CacheStore as _, ImportedCache, InputMap, Job, JobId, Limits, OpContext,
    Operation, Solver, Vertex, VertexId, memory::MemoryStore,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

/// A small generator (splitmix64), so that a seed gives the same case everywhere.
#[derive(Clone)]
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % sides
    }
    fn chance(&mut self, one_in: u64) -> bool {
        self.roll(one_in) == 0
    }
}

#[derive(Clone, Debug)]
struct Plan {
    name: String,
    /// Equal for vertices that do the same to the same inputs.
    kind: u64,
    inputs: Vec<(usize, usize, bool)>,
    ephemeral: bool,
    /// Gives another value in each round, and ignores the cache.
    volatile: bool,
    /// Gives its first input on as it is, unread.
    carries: bool,
    fails: bool,
}

/// A result: its value, and which copy of it this is.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Made {
    value: u64,
    copy: u64,
    round: u64,
}

/// Of the copies of earlier rounds, some are lost.
fn is_gone(made: &Made, round: u64) -> bool {
    made.round < round && Digest::of(format!("{} in {round}", made.copy)).as_bytes()[0] < 40
}

fn gone(made: &Made) -> Fault {
    Fault::not_found(format!("copy {} is lost", made.copy))
}

/// What another machine's store holds, as an import; it is read after a while.
struct Elsewhere {
    store: Arc<MemoryStore<Made>>,
    delay: u64,
    given: Arc<AtomicUsize>,
}

fn now<T>(work: impl Future<Output = T>) -> T {
    work.now_or_never().expect("memory does not wait")
}

#[async_trait]
impl ImportedCache<Made> for Elsewhere {
    async fn ready(&self) {
        for _ in 0..self.delay {
            tokio::task::yield_now().await;
        }
    }
    fn primary(&self, key: &CacheKey) -> Option<CacheKey> {
        now(self.store.primaries(&[*key])).expect("found").first().copied()
    }
    fn has_result(&self, key: &CacheKey) -> bool {
        now(self.store.load(&[*key])).expect("found").is_some()
    }
    async fn load(&self, key: &CacheKey) -> Result<Option<Made>> {
        self.given.fetch_add(1, Ordering::SeqCst);
        Ok(self.store.load(&[*key]).await?.map(|(_, made)| made))
    }
}

/// A value, and how it is seen through a narrow reading.
fn narrow(value: u64) -> u64 {
    value % 3
}

fn value(plan: &Plan, output: usize, round: u64, inputs: &[u64]) -> u64 {
    if plan.carries {
        return inputs[0];
    }
    let mut text = format!("{} {output}", plan.kind);
    for ((_, _, content), value) in plan.inputs.iter().zip(inputs) {
        text += &format!(" {}", if *content { narrow(*value) } else { *value });
    }
    if plan.volatile {
        text += &format!(" in round {round}");
    }
    u64::from_le_bytes(Digest::of(text).as_bytes()[..8].try_into().expect("eight bytes"))
}

struct Op {
    plan: Plan,
    round: u64,
    delay: u64,
    runs: Arc<Mutex<BTreeMap<String, usize>>>,
    running: Arc<AtomicUsize>,
    copies: Arc<AtomicU64>,
    losses: Arc<AtomicUsize>,
}

impl Op {
    fn read(&self, made: &Made) -> Result<u64> {
        if is_gone(made, self.round) {
            self.losses.fetch_add(1, Ordering::SeqCst);
            return Err(gone(made));
        }
        Ok(made.value)
    }
}

struct Running<'a>(&'a AtomicUsize);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

const MAX_PARALLEL: usize = 3;

#[async_trait]
impl Operation for Op {
    type Output = Made;
    type Job = ();

    async fn cache_map(&self, cx: &OpContext<()>) -> Result<CacheMap> {
        assert!(!(cx.jobs)().is_empty(), "somebody must be interested");
        for _ in 0..self.delay % 3 {
            tokio::task::yield_now().await;
        }
        let mut keys = vec![Digest::of(format!("kind {} {}", self.plan.kind, self.plan.carries))];
        if self.plan.ephemeral {
            keys = vec![Digest::of(format!("session {} {}", self.plan.name, self.round))];
        } else if self.plan.kind.is_multiple_of(2) {
            keys.insert(
                0,
                Digest::of(format!(
                    "release {} of {} {}",
                    self.round / 2,
                    self.plan.kind,
                    self.plan.carries
                )),
            );
        }
        let input =
            |content: bool| InputMap { selector: content.then(|| Digest::of("narrow")), content };
        Ok(CacheMap {
            keys,
            inputs: self.plan.inputs.iter().map(|i| input(i.2)).collect(),
            ephemeral: self.plan.ephemeral,
            ..CacheMap::default()
        })
    }

    async fn content_key(
        &self,
        _: usize,
        made: &Made,
        _: &OpContext<()>,
    ) -> Result<Option<Digest>> {
        tokio::task::yield_now().await;
        Ok(Some(Digest::of(format!("content {}", narrow(self.read(made)?)))))
    }

    fn is_lost(made: &Made, fault: &Fault) -> bool {
        fault.message() == gone(made).message()
    }

    async fn run(&self, inputs: Vec<Made>, cx: &OpContext<()>) -> Result<Vec<Made>> {
        assert!(!(cx.jobs)().is_empty(), "somebody must be interested");
        *self.runs.lock().entry(self.plan.name.clone()).or_default() += 1;
        assert!(self.running.fetch_add(1, Ordering::SeqCst) < MAX_PARALLEL, "the limit holds");
        let _running = Running(&self.running);
        for _ in 0..self.delay {
            tokio::task::yield_now().await;
        }
        if self.plan.fails {
            return Err(Fault::unknown(format!("{} fails", self.plan.name)));
        }
        if self.plan.carries {
            return Ok(vec![inputs[0]; 2]);
        }
        let inputs = inputs.iter().map(|made| self.read(made)).collect::<Result<Vec<_>>>()?;
        let make = |output| Made {
            value: value(&self.plan, output, self.round, &inputs),
            copy: self.copies.fetch_add(1, Ordering::SeqCst),
            round: self.round,
        };
        Ok((0..2).map(make).collect())
    }
}

fn plans(dice: &mut Dice) -> Vec<Plan> {
    let count = 2 + dice.roll(9) as usize;
    let mut plans: Vec<Plan> = Vec::new();
    for i in 0..count {
        if i > 0 && dice.chance(5) {
            // The same work under another name, as two builds with different sessions define it.
            let mut twin = plans[dice.roll(i as u64) as usize].clone();
            twin.name = format!("v{i}");
            plans.push(twin);
            continue;
        }
        let wanted = if i == 0 { 0 } else { dice.roll(4) };
        let inputs: Vec<_> = (0..wanted)
            .map(|_| (dice.roll(i as u64) as usize, dice.roll(2) as usize, dice.chance(2)))
            .collect();
        let ephemeral = inputs.is_empty() && dice.chance(2);
        let carries = inputs.first().is_some_and(|(_, _, content)| !content) && dice.chance(4);
        let volatile = !carries && dice.chance(8);
        plans.push(Plan {
            name: format!("v{i}"),
            kind: dice.roll(1000),
            inputs,
            ephemeral,
            volatile,
            carries,
            fails: false,
        });
    }
    plans
}

struct World {
    plans: Vec<Plan>,
    vertices: Vec<Arc<Vertex<Op>>>,
    runs: Arc<Mutex<BTreeMap<String, usize>>>,
    losses: Arc<AtomicUsize>,
    round: u64,
}

impl World {
    fn new(
        plans: &[Plan],
        round: u64,
        dice: &mut Dice,
        running: &Arc<AtomicUsize>,
        copies: &Arc<AtomicU64>,
    ) -> Self {
        let runs = Arc::<Mutex<BTreeMap<String, usize>>>::default();
        let losses = Arc::<AtomicUsize>::default();
        let mut vertices: Vec<Arc<Vertex<Op>>> = Vec::new();
        for plan in plans {
            let op = Op {
                plan: plan.clone(),
                round,
                delay: dice.roll(6),
                runs: runs.clone(),
                running: running.clone(),
                copies: copies.clone(),
                losses: losses.clone(),
            };
            vertices.push(Arc::new(Vertex {
                id: VertexId {
                    digest: Digest::of(format!("{plan:?}")),
                    ignore_cache: plan.volatile,
                    variant: 0,
                },
                name: plan.name.clone(),
                group: None,
                inputs: plan
                    .inputs
                    .iter()
                    .map(|(i, output, _)| (vertices[*i].clone(), *output))
                    .collect(),
                op: Arc::new(op),
            }));
        }
        Self { plans: plans.to_vec(), vertices, runs, losses, round }
    }

    fn expected(&self, vertex: usize, output: usize) -> u64 {
        let plan = &self.plans[vertex];
        let inputs: Vec<u64> =
            plan.inputs.iter().map(|(i, output, _)| self.expected(*i, *output)).collect();
        value(plan, output, self.round, &inputs)
    }

    fn may_fail(&self, vertex: usize) -> bool {
        self.plans[vertex].fails
            || self.plans[vertex].inputs.iter().any(|(i, ..)| self.may_fail(*i))
    }
}

async fn ask(world: &World, job: &Job<Op>, vertex: usize, output: usize, patience: Option<u64>) {
    let build = async {
        loop {
            let made = job.build(world.vertices[vertex].clone(), output).await?.0;
            if !is_gone(&made, world.round) {
                return Ok(made.value);
            }
            world.losses.fetch_add(1, Ordering::SeqCst);
            assert!(
                job.lost(world.vertices[vertex].clone(), output, gone(&made)).await,
                "v{vertex}.{output} cannot be made again"
            );
        }
    };
    let answer: Option<Result<u64>> = match patience {
        None => Some(build.await),
        Some(turns) => {
            let patience = async {
                for _ in 0..turns {
                    tokio::task::yield_now().await;
                }
            };
            tokio::select! { answer = build => Some(answer), () = patience => None }
        }
    };
    match answer {
        Some(Ok(value)) => assert_eq!(value, world.expected(vertex, output), "v{vertex}.{output}"),
        Some(Err(fault)) => assert!(world.may_fail(vertex), "v{vertex}.{output}: {fault}"),
        None => {}
    }
}

/// Every vertex that a journal heard of is told of in a sensible order.
#[track_caller]
fn check_journal(journal: &Journal) {
    let mut started: BTreeSet<Digest> = BTreeSet::new();
    for event in journal.events() {
        if let Event::Vertex(v) = event {
            if v.completed.is_some() {
                assert!(v.started.is_some(), "{} ends without a start", v.name);
            }
            if v.started.is_some() {
                started.insert(v.digest);
            }
        }
    }
}

/// How many results were given by imports, and how many were lost.
async fn run_case(seed: u64) -> (usize, usize) {
    let mut dice = Dice(seed);
    let mut plans = plans(&mut dice);
    let (store, elsewhere) =
        (Arc::new(MemoryStore::<Made>::default()), Arc::new(MemoryStore::<Made>::default()));
    let (given, mut lost) = (Arc::<AtomicUsize>::default(), 0);
    let (running, copies) = (Arc::<AtomicUsize>::default(), Arc::<AtomicU64>::default());
    let solver: Solver<Op> =
        Solver::new(store.clone(), Limits { max_parallel: Some(MAX_PARALLEL) });
    let other: Solver<Op> =
        Solver::new(elsewhere.clone(), Limits { max_parallel: Some(MAX_PARALLEL) });
    for round in 0..4 {
        let calm = dice.chance(2);
        for plan in &mut plans {
            plan.fails = !calm && dice.chance(10);
            if plan.ephemeral && dice.chance(2) {
                plan.kind = dice.roll(4);
            }
        }
        let world = World::new(&plans, round, &mut dice, &running, &copies);
        let journal = Journal::new();
        if dice.chance(3) {
            // The other machine builds something of it first.
            let theirs = World::new(&plans, round, &mut dice, &running, &copies);
            let job = other
                .job(JobId(format!("of round {round}")), (), Journal::new())
                .expect("the name is free");
            ask(&theirs, &job, dice.roll(plans.len() as u64) as usize, 0, None).await;
        }
        let jobs: Vec<Job<Op>> = (0..3)
            .map(|n| {
                solver
                    .job(JobId(format!("job {n} of round {round}")), (), journal.clone())
                    .expect("the name is free")
            })
            .collect();
        for job in &jobs {
            if dice.chance(3) {
                job.import(Arc::new(Elsewhere {
                    store: elsewhere.clone(),
                    delay: dice.roll(30),
                    given: given.clone(),
                }));
            }
        }
        let mut asked = Vec::new();
        for _ in 0..1 + dice.roll(5) {
            let (vertex, output) = (dice.roll(plans.len() as u64) as usize, dice.roll(2) as usize);
            let patience = (!calm && dice.chance(3)).then(|| dice.roll(60));
            asked.push(ask(&world, &jobs[dice.roll(2) as usize], vertex, output, patience));
        }
        let mut jobs_to_close = None;
        if !calm && dice.chance(3) {
            jobs_to_close = Some(dice.roll(40));
        }
        let closing = async {
            // A third job comes and goes while the others work.
            let vertex = world.vertices[world.vertices.len() - 1].clone();
            let build = jobs[2].build(vertex, 0);
            if let Some(turns) = jobs_to_close {
                let patience = async {
                    for _ in 0..turns {
                        tokio::task::yield_now().await;
                    }
                };
                tokio::select! { _ = build => {}, () = patience => {} }
            }
        };
        futures::future::join(futures::future::join_all(asked), closing).await;
        if calm && world.losses.load(Ordering::SeqCst) == 0 {
            for (name, runs) in world.runs.lock().iter() {
                assert_eq!(*runs, 1, "{name} ran {runs} times in round {round}");
            }
        }
        drop(jobs);
        check_journal(&journal);
        journal.close();
        store.prune(|_, _| dice.chance(4));
        elsewhere.prune(|_, _| dice.chance(8));
        lost += world.losses.load(Ordering::SeqCst);
    }
    (given.load(Ordering::SeqCst), lost)
}

#[test]
fn the_solver_agrees_with_computing_in_order() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime");
    let (first, count) = match std::env::var("SHIPWAY_FUZZ_SEED") {
        Ok(seed) => (seed.parse().expect("a number"), 1),
        Err(_) => (0, 1000),
    };
    let (mut given, mut lost) = (0, 0);
    for seed in first..first + count {
        let case = async {
            // Time is virtual and moves only when nothing can run: a deadline that passes is a
            // deadlock.
            tokio::time::timeout(std::time::Duration::from_secs(60), run_case(seed))
                .await
                .expect("no deadlock")
        };
        let result =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| runtime.block_on(case)));
        let Ok((by_imports, gone)) = result else {
            panic!("seed {seed} fails: set SHIPWAY_FUZZ_SEED={seed}")
        };
        (given, lost) = (given + by_imports, lost + gone);
    }
    assert!(
        count == 1 || (given > 100 && lost > 100),
        "imports gave {given} results, and {lost} were lost"
    );
}
