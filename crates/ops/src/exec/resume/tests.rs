#![allow(clippy::unwrap_used)]

use super::*;
use shipway_executor::{ExitStatus, Resumable, fake::FakeExecutor};
use shipway_llb::{CacheMount, HostIp, Mount, Op, ProxyEnv, SecretEnv, SecretMount};
use shipway_oci::Platform;
use shipway_refs::{NamedRequest, NoOrigins};
use shipway_storage::fake::FakeStorage;
use std::time::SystemTime;

struct Lab {
    fake: FakeStorage,
    dir: tempfile::TempDir,
}

impl Lab {
    fn new() -> Self {
        Self { fake: FakeStorage::new().unwrap(), dir: tempfile::tempdir().unwrap() }
    }

    /// A run of the daemon after one that left `left`.
    async fn run(&self, executor: &FakeExecutor) -> (RefStore, HeldSteps) {
        let left = LeftSteps::new(executor.sweep().await.unwrap());
        let (storage, root) = (self.fake.storage(), self.dir.path().to_owned());
        let opened = RefStore::open_inheriting(storage, root, &NoOrigins, &left.snapshots()).await;
        let (refs, inherited) = opened.unwrap();
        let held = left.hold(&refs, Arc::new(executor.clone()), inherited).await.unwrap();
        (refs, held)
    }

    async fn has(&self, key: &SnapshotKey) -> bool {
        self.fake.gc();
        self.fake.storage().snapshots.stat(key).await.is_ok()
    }
}

fn executor(left: Vec<LeftProcess>) -> FakeExecutor {
    FakeExecutor::new(|_, _, _, _| Ok(ExitStatus::default())).with_left(left)
}

fn left(id: &str, key: &str, note: &str) -> LeftProcess {
    LeftProcess {
        id: id.into(),
        stored: Resumable { key: Digest::of(key), note: note.into() },
        started: SystemTime::now(),
        ended_unseen: false,
    }
}

fn cache(sharing: Sharing) -> NamedRequest {
    NamedRequest {
        record_type: RecordType::CacheMount,
        key: "cache-dir:c".into(),
        description: "cache".into(),
        sharing,
        parent: None,
    }
}

/// A step with a state and a locked cache, that a killed daemon left; its note, and its snapshot.
async fn killed_step(lab: &Lab) -> (String, SnapshotKey) {
    let (refs, _) = lab.run(&executor(Vec::new())).await;
    let state = refs.mutable(None, "step", RecordType::Regular, None).await.unwrap();
    let (key, sharing) = (cache(Sharing::Locked).key, Sharing::Locked);
    let caches = [HeldCache { key, sharing, state: refs.named(cache(sharing)).await.unwrap() }];
    let written = state.snapshot_key().clone();
    let note = StepNote::new([(0, written.clone())].into_iter(), [].into_iter(), &caches);
    // A killed daemon gives nothing back.
    std::mem::forget((state, caches));
    (note.text().unwrap(), written)
}

#[tokio::test]
async fn a_step_waits_with_all_it_has_for_the_build_that_wants_it() {
    let lab = Lab::new();
    let (note, written) = killed_step(&lab).await;
    let executor = executor(vec![left("a", "it", &note)]);
    let (refs, held) = lab.run(&executor).await;
    assert!(held.outlive() && held.take(Digest::of("another")).is_none());
    assert!(lab.has(&written).await);
    // The cache is locked as it was.
    let other = refs.named(cache(Sharing::Private)).await.unwrap();
    let HeldStep { process, mut states } = held.take(Digest::of("it")).unwrap();
    assert!(held.take(Digest::of("it")).is_none(), "once");
    assert_eq!(process.id, "a");
    let state = states.state(&refs, 0, None, "step".into()).await.unwrap();
    assert_eq!(state.snapshot_key(), &written);
    assert!(states.state(&refs, 1, None, "step".into()).await.is_err());
    let cache = states.cache(&cache(Sharing::Locked).key).unwrap();
    assert_ne!(cache.state.id(), other.id());
    assert_eq!(executor.left().len(), 1, "nobody ended it");
}

#[tokio::test(start_paused = true)]
async fn a_step_that_no_build_wants_is_ended_in_time_and_its_files_go() {
    let lab = Lab::new();
    let (note, written) = killed_step(&lab).await;
    let executor = executor(vec![left("a", "it", &note)]);
    let (refs, held) = lab.run(&executor).await;
    let began = tokio::time::Instant::now();
    held.expire(Duration::from_secs(60)).await;
    assert_eq!(began.elapsed().as_secs(), 60);
    assert!(executor.left().is_empty() && held.take(Digest::of("it")).is_none());
    refs.drained().await;
    assert!(!lab.has(&written).await);
    let _free = refs.named(cache(Sharing::Locked)).await.unwrap();
}

#[tokio::test]
async fn a_step_that_lacks_something_is_ended_at_once() {
    let lab = Lab::new();
    let (note, written) = killed_step(&lab).await;
    let gone = note.replace(&written.0, "shipway-step-gone");
    let unheld = note.replace(r#""id":""#, r#""id":"x"#);
    assert!(gone != note && unheld != note);
    let all = [&*note, &gone, &unheld, "{}x", r#"{"unknown":1}"#];
    let all = all.iter().enumerate().map(|(n, note)| left(&n.to_string(), "it", note)).collect();
    let executor = executor(all);
    let (_refs, held) = lab.run(&executor).await;
    let ids: Vec<String> = executor.left().into_iter().map(|p| p.id).collect();
    assert_eq!(ids, ["0"]);
    assert!(held.take(Digest::of("it")).is_some() && held.take(Digest::of("it")).is_none());
}

#[tokio::test]
async fn a_daemon_that_ends_leaves_what_still_waits() {
    let lab = Lab::new();
    let (note, written) = killed_step(&lab).await;
    let executor = executor(vec![left("a", "it", &note)]);
    let (refs, held) = lab.run(&executor).await;
    held.leave();
    drop(held);
    refs.close().await.unwrap();
    drop(refs);
    assert!(lab.has(&written).await && executor.left().len() == 1);
    let (_refs, held) = lab.run(&executor).await;
    assert!(held.take(Digest::of("it")).is_some());
}

fn base() -> ExecOp {
    let root = Mount { input: Some(0), output: Some(0), dest: "/".into(), ..Default::default() };
    let kind = MountKind::Cache(CacheMount { id: "c".into(), sharing: Default::default() });
    let cache = Mount { dest: "/c".into(), kind, ..Default::default() };
    let mut exec = ExecOp { mounts: vec![root, cache], ..Default::default() };
    exec.meta.args = vec!["true".into()];
    exec
}

fn vertex(exec: &ExecOp, ignore_cache: bool) -> Arc<Vertex> {
    let mut vertex = Vertex {
        digest: Digest::of("v"),
        bytes: Default::default(),
        op: Op::Exec(exec.clone()),
        inputs: vec![],
        platform: Platform::new("linux", "amd64", ""),
        constraints: vec![],
        name: String::new(),
        metadata: Default::default(),
    };
    vertex.metadata.ignore_cache = ignore_cache;
    Arc::new(vertex)
}

#[test]
fn a_changed_step_has_another_key_and_one_that_hangs_on_the_daemon_none() {
    let limits = ResourceLimits::default();
    let of =
        |exec: &ExecOp| key(exec, &vertex(exec, false), &[], &[], (&limits, &Edits::default()));
    let check = |change: fn(&mut ExecOp), known: bool| {
        let mut changed = base();
        change(&mut changed);
        let (before, after) = (of(&base()), of(&changed));
        assert_eq!(after.is_some(), known, "{changed:?}");
        assert!(before.is_some() && before != after, "{changed:?}");
    };
    assert_eq!(of(&base()), of(&base()));
    // What the cache key leaves out as well.
    check(|e| e.meta.args.push("x".into()), true);
    check(|e| e.meta.proxy = Some(ProxyEnv { http: "x".into(), ..Default::default() }), true);
    check(|e| e.meta.extra_hosts = vec![HostIp { host: "h".into(), ip: "1".into() }], true);
    check(|e| e.mounts[0].selector = "/x".into(), true);
    let other = |id: &str, sharing| MountKind::Cache(CacheMount { id: id.into(), sharing });
    let mut changed = base();
    changed.mounts[1].kind = other("d", Default::default());
    assert_ne!(of(&base()), of(&changed));
    changed.mounts[1].kind = other("c", shipway_llb::CacheSharing::Locked);
    assert_ne!(of(&base()), of(&changed));
    check(|e| e.proxied = true, false);
    check(|e| e.secret_env = vec![SecretEnv::default()], false);
    check(|e| e.mounts[1].kind = MountKind::Secret(SecretMount::default()), false);
    check(|e| e.mounts[1].input = Some(0), false);
    let tight = ResourceLimits { memory: Some(1), ..Default::default() };
    let exec = base();
    let limited = key(&exec, &vertex(&exec, false), &[], &[], (&tight, &Edits::default()));
    assert!(limited.is_some() && limited != of(&exec));
    let anew = key(&exec, &vertex(&exec, true), &[], &[], (&limits, &Edits::default()));
    assert!(anew.is_some() && anew != of(&exec));
    // In a build without cache the mount begins empty.
    let options = StepOptions::default();
    let result = shipway_llb::Edge { vertex: 0, output: 0 };
    let vertices = vec![vertex(&exec, true)];
    options.note(&shipway_llb::Graph { vertices, result, source: None });
    let empty = key(&exec, &vertex(&exec, true), &[], &[options], (&limits, &Edits::default()));
    assert!(empty.is_none());
}

#[tokio::test]
async fn a_step_is_known_by_its_inputs() {
    let lab = Lab::new();
    let (refs, _) = lab.run(&executor(Vec::new())).await;
    let state = |name: &'static str| {
        let refs = &refs;
        async move {
            let state = refs.mutable(None, name, RecordType::Regular, None).await.unwrap();
            let mount = state.mount().await.unwrap();
            std::fs::write(mount.path().join(name), name).unwrap();
            mount.unmount().await.unwrap();
            state.commit(name).await.unwrap()
        }
    };
    let exec = base();
    let of = |input: ImmutableRef| {
        let (limits, edits) = (ResourceLimits::default(), Edits::default());
        key(&exec, &vertex(&exec, false), &[input], &[], (&limits, &edits))
    };
    let (one, two) = (state("one").await, state("two").await);
    let keys = [of(one.clone()), of(two), of(refs.scratch().unwrap())];
    assert!(keys.iter().all(Option::is_some), "{keys:?}");
    assert!(keys[0] != keys[1] && keys[1] != keys[2] && keys[0] != keys[2]);
    assert_eq!(of(one), keys[0]);
    // A client's directory changes with the next transfer.
    let directory = refs.named(cache(Sharing::Locked)).await.unwrap();
    assert_eq!(of(directory.freeze("directory").await.unwrap()), None);
}
