//! The solver with its driver: real tasks, real cancellation, progress.

use async_trait::async_trait;
use parking_lot::Mutex;
use shipway_fault::{Code, Detail, Fault, Result};
use shipway_oci::Digest;
use shipway_progress::{CacheChanges, CacheMiss, Event, Journal};
use shipway_solver::{
    CacheKey, CacheMap, CacheStore as _, Completion, ImportedCache, InputMap, Job, JobId, Limits,
    OpContext, Operation, Solver, Vertex, VertexId, memory::MemoryStore,
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::sync::Semaphore;

/// What the operations of one test share.
#[derive(Default)]
struct Lab {
    runs: AtomicUsize,
    cancelled: AtomicUsize,
}

enum Work {
    /// Joins its inputs.
    Join,
    /// Waits for a permit.
    Gate(Arc<Semaphore>),
    Fail,
    Panic,
}

struct Op {
    key: String,
    work: Work,
    lab: Arc<Lab>,
}

struct OnDrop<'a>(&'a Lab, bool);

impl Drop for OnDrop<'_> {
    fn drop(&mut self) {
        if !self.1 {
            self.0.cancelled.fetch_add(1, Ordering::SeqCst);
        }
    }
}

#[async_trait]
impl Operation for Op {
    type Output = String;
    type Job = &'static str;

    async fn cache_map(&self, _: &OpContext<&'static str>) -> Result<CacheMap> {
        Ok(CacheMap {
            keys: vec![Digest::of(&self.key)],
            inputs: vec![InputMap::default(); 2],
            ..CacheMap::default()
        })
    }

    async fn content_key(
        &self,
        _: usize,
        _: &String,
        _: &OpContext<&'static str>,
    ) -> Result<Option<Digest>> {
        Ok(None)
    }

    async fn run(&self, inputs: Vec<String>, cx: &OpContext<&'static str>) -> Result<Vec<String>> {
        self.lab.runs.fetch_add(1, Ordering::SeqCst);
        let mut guard = OnDrop(&self.lab, false);
        match &self.work {
            Work::Join => {}
            Work::Gate(gate) => gate.acquire().await.expect("an open gate").forget(),
            Work::Fail => {
                guard.1 = true;
                return Err(Fault::not_found("no such thing"));
            }
            Work::Panic => panic!("a bug"),
        }
        guard.1 = true;
        Ok(vec![format!("{}({}) for {}", self.key, inputs.join(","), (cx.jobs)().join("+"))])
    }
}

fn vertex(
    lab: &Arc<Lab>,
    name: &str,
    key: &str,
    work: Work,
    inputs: &[&Arc<Vertex<Op>>],
) -> Arc<Vertex<Op>> {
    Arc::new(Vertex {
        id: VertexId { digest: Digest::of(name), ignore_cache: false, variant: 0 },
        name: name.into(),
        group: None,
        inputs: inputs.iter().map(|v| (Arc::clone(v), 0)).collect(),
        op: Arc::new(Op { key: key.into(), work, lab: lab.clone() }),
    })
}

fn solver() -> Solver<Op> {
    Solver::new(Arc::new(MemoryStore::default()), Limits::default())
}

fn job(solver: &Solver<Op>, name: &'static str) -> Job<Op> {
    solver.job(JobId(name.into()), name, Journal::new()).expect("a free name")
}

async fn until(condition: impl Fn() -> bool) {
    let wait = async {
        while !condition() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), wait).await.expect("it happens in time");
}

#[tokio::test(flavor = "multi_thread")]
async fn equal_work_is_done_once_by_the_first() {
    let (lab, solver, gate) = (Arc::new(Lab::default()), solver(), Arc::new(Semaphore::new(0)));
    let (one, two) = (job(&solver, "one"), job(&solver, "two"));
    let a = vertex(&lab, "a", "same", Work::Gate(gate.clone()), &[]);
    let b = vertex(&lab, "b", "same", Work::Gate(gate.clone()), &[]);
    let first = one.build(a.clone(), 0);
    tokio::pin!(first);
    assert!(futures::poll!(&mut first).is_pending());
    until(|| lab.runs.load(Ordering::SeqCst) == 1).await;
    let again = one.build(a, 0);
    let other = two.build(b, 0);
    let done = async {
        tokio::task::yield_now().await;
        gate.add_permits(1);
    };
    let (first, again, other, ()) = tokio::join!(first, again, other, done);
    assert_eq!(lab.runs.load(Ordering::SeqCst), 1);
    assert_eq!(first.as_ref().map(|r| r.1).ok(), Some(Completion::Ran));
    assert_eq!(again.expect("a result").0, first.expect("a result").0);
    assert_eq!(other.expect("a result").1, Completion::Cached);
}

#[tokio::test(flavor = "multi_thread")]
async fn work_ends_with_the_last_interest() {
    let (lab, solver, gate) = (Arc::new(Lab::default()), solver(), Arc::new(Semaphore::new(0)));
    let (one, two) = (job(&solver, "one"), job(&solver, "two"));
    let a = vertex(&lab, "a", "a", Work::Gate(gate), &[]);
    {
        let (first, second) = (one.build(a.clone(), 0), two.build(a.clone(), 0));
        tokio::pin!(first, second);
        assert!(futures::poll!(&mut first).is_pending());
        assert!(futures::poll!(&mut second).is_pending());
        until(|| lab.runs.load(Ordering::SeqCst) == 1).await;
        drop(two);
        assert!(second.await.is_err_and(|e| e.is_cancelled()));
        assert_eq!(lab.cancelled.load(Ordering::SeqCst), 0);
    }
    until(|| lab.cancelled.load(Ordering::SeqCst) == 1).await;
}

#[tokio::test]
async fn a_job_name_is_taken_while_the_job_lives() {
    let solver = solver();
    let one = job(&solver, "one");
    let taken = solver.job(JobId("one".into()), "other", Journal::new());
    assert!(taken.is_err_and(
        |e| e.code() == Code::AlreadyExists && e.to_string().contains("job ID one exists")
    ));
    one.close();
    job(&solver, "one");
}

#[tokio::test]
async fn a_fault_names_its_vertex_once() {
    let (lab, solver) = (Arc::new(Lab::default()), solver());
    let one = job(&solver, "one");
    let a = vertex(&lab, "a", "a", Work::Fail, &[]);
    let b = vertex(&lab, "b", "b", Work::Join, &[&a]);
    let fault = one.build(b, 0).await.expect_err("a fails");
    assert_eq!(fault.code(), Code::NotFound);
    assert_eq!(fault.details(), [Detail::Vertex(Digest::of("a").to_string())]);
}

#[tokio::test]
async fn a_panic_is_a_fault() {
    let (lab, solver) = (Arc::new(Lab::default()), solver());
    let fault = job(&solver, "one")
        .build(vertex(&lab, "a", "a", Work::Panic, &[]), 0)
        .await
        .expect_err("it panics");
    assert_eq!(fault.code(), Code::Internal);
    assert!(fault.to_string().contains("a bug"));
}

#[tokio::test]
async fn a_second_build_tells_of_cached_vertices() {
    let (lab, solver) = (Arc::new(Lab::default()), solver());
    let a = vertex(&lab, "a", "a", Work::Join, &[]);
    let b = vertex(&lab, "b", "b", Work::Join, &[&a]);
    let first = job(&solver, "one").build(b.clone(), 0).await.expect("a result").0;
    assert_eq!(first, "b(a() for one) for one");
    let journal = Journal::new();
    let two = solver.job(JobId("two".into()), "two", journal.clone()).expect("a free name");
    assert_eq!(two.build(b, 0).await.expect("a result"), (first, Completion::Cached));
    let told = journal.events().into_iter().filter_map(|e| match e {
        Event::Vertex(v) if v.completed.is_some() => {
            Some((v.name.clone(), v.cached, v.started == v.completed))
        }
        _ => None,
    });
    assert_eq!(
        told.collect::<Vec<_>>(),
        [("b".to_owned(), true, true), ("a".to_owned(), true, true)]
    );
    assert_eq!(lab.runs.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_deep_graph_is_no_problem() {
    let (lab, solver) = (Arc::new(Lab::default()), solver());
    let mut top = vertex(&lab, "0", "0", Work::Join, &[]);
    for i in 1..20_000 {
        top = vertex(&lab, &i.to_string(), &i.to_string(), Work::Join, &[&top, &top]);
    }
    // The results double with every vertex; only the depth matters here, so the top is withdrawn
    // once the bottom ran.
    let one = job(&solver, "one");
    let build = one.build(top.clone(), 0);
    tokio::select! {
        _ = build => {}
        () = until(|| lab.runs.load(Ordering::SeqCst) > 2) => {}
    }
}

/// A cache that calls all work by the key of another's, has a result for whatever is asked, and
/// hears which keys there are.
#[derive(Default)]
struct Hostile {
    name: Option<CacheKey>,
    heard: Mutex<Vec<CacheKey>>,
}

#[async_trait]
impl ImportedCache<String> for Hostile {
    async fn ready(&self) {}
    fn primary(&self, key: &CacheKey) -> Option<CacheKey> {
        self.heard.lock().push(*key);
        self.name
    }
    fn has_result(&self, key: &CacheKey) -> bool {
        self.heard.lock().push(*key);
        self.name.is_some()
    }
    async fn load(&self, _: &CacheKey) -> Result<Option<String>> {
        Ok(Some("evil".into()))
    }
}

#[tokio::test]
async fn an_import_reaches_no_key_that_was_not_asked_for() {
    let (lab, store) = (Arc::new(Lab::default()), Arc::new(MemoryStore::default()));
    let solver: Solver<Op> = Solver::new(store.clone(), Limits::default());
    let base = vertex(&lab, "base", "base", Work::Join, &[]);
    let step = vertex(&lab, "step", "step", Work::Join, &[&base]);
    let (one, heard) = (job(&solver, "one"), Arc::new(Hostile::default()));
    one.import(heard.clone());
    let honest = one.build(step.clone(), 0).await.expect("a result").0;
    let keys = heard.heard.lock().clone();
    drop(one);
    // The same step over another base, by somebody whose cache says that this base is the first
    // one.
    for name in keys.iter().copied() {
        let other =
            vertex(&lab, &format!("other {name:?}"), &format!("other {name:?}"), Work::Join, &[]);
        let step = vertex(&lab, &format!("step over {name:?}"), "step", Work::Join, &[&other]);
        let two = job(&solver, "two");
        two.import(Arc::new(Hostile { name: Some(name), ..Hostile::default() }));
        assert_eq!(two.build(step, 0).await.expect("a result").0, "evil");
    }
    for key in keys {
        let found = store.load(&[key]).await.expect("found");
        assert!(found.as_ref().is_none_or(|(_, value)| value != "evil"), "{found:?}");
    }
    let three = job(&solver, "three");
    assert_eq!(three.build(step, 0).await.expect("a result"), (honest, Completion::Cached));
}

/// Why the vertices of a build ran, by name.
fn misses(journal: &Journal) -> Vec<(String, CacheMiss)> {
    let mut all = Vec::new();
    for event in journal.events() {
        if let Event::Vertex(v) = event
            && let Some(miss) = &v.miss
            && v.completed.is_some()
        {
            all.push((v.name.clone(), CacheMiss::clone(miss)));
        }
    }
    all
}

#[tokio::test]
async fn vertices_that_run_report_why() {
    let (lab, store) = (Arc::new(Lab::default()), Arc::new(MemoryStore::<String>::default()));
    let build = async |base: &str, step: &str| {
        let solver: Solver<Op> = Solver::new(store.clone(), Limits::default());
        let journal = Journal::new();
        let job = solver.job(JobId("build".into()), "build", journal.clone()).expect("a free name");
        let base = vertex(&lab, "base", base, Work::Join, &[]);
        let step = vertex(&lab, "step", step, Work::Join, &[&base]);
        job.build(step, 0).await.expect("built");
        misses(&journal)
    };
    let miss = |name: &str, miss: CacheMiss| (name.to_owned(), miss);
    let changed = |operation: Option<Vec<String>>, inputs: &[&str]| {
        let inputs = inputs.iter().map(|i| (*i).to_owned()).collect();
        CacheMiss::Changed(CacheChanges { operation, inputs, contents: Vec::new() })
    };
    let nothing_like_it = [miss("base", CacheMiss::New), miss("step", CacheMiss::New)];
    assert_eq!(build("base 1", "step 1").await, nothing_like_it);
    assert_eq!(build("base 1", "step 1").await, []);
    // The step is compared with the latest of the same operation, the base with the latest of its
    // name.
    let other_base =
        [miss("base", changed(Some(Vec::new()), &[])), miss("step", changed(None, &["base"]))];
    assert_eq!(build("base 2", "step 1").await, other_base);
    assert_eq!(build("base 2", "step 2").await, [miss("step", changed(Some(Vec::new()), &[]))]);
    store.prune(|_, meta| meta.description == "step");
    assert_eq!(build("base 2", "step 2").await, [miss("step", CacheMiss::Gone)]);
}
