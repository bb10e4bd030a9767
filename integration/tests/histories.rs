//! Random histories of builds: a project that changes step by step, built with whatever the cache
//! holds by then, gives file by file what a build without any cache gives on an empty store.

#![allow(clippy::unwrap_used)]

use sha2::{Digest as _, Sha256};
use shipway_integration::{
    any, collect_garbage, nothing_left,
    random::{Context, Random, Recipe},
    remove_everything,
};
use shipway_testkit::{Finished, Lab, run};
use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Read as _,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// Changes of one project.
const LENGTH: usize = 12;
/// How long histories are tried when nothing else is said; the test command says a minute.
const SECONDS: u64 = 10;

/// One file of a result, but for its times, which no two runs of a command share.
#[derive(Debug, PartialEq, Eq)]
struct Entry {
    kind: String,
    mode: u32,
    owner: (u64, u64),
    content: String,
    attributes: Vec<(String, Vec<u8>)>,
}

type Tree = BTreeMap<PathBuf, Entry>;

/// A project, what was done with it, and how it is built.
struct History {
    seed: u64,
    random: Random,
    context: Context,
    recipe: Recipe,
    said: Vec<String>,
    builds: usize,
    /// Builds that a missing file failed, with and without cache.
    failed: usize,
}

/// What a build gave: its files, or that it failed.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Files(Tree),
    Failed,
}

#[test]
fn what_the_cache_gives_is_what_a_build_without_cache_gives() {
    let number = |name: &str| std::env::var(name).ok().and_then(|n| n.parse::<u64>().ok());
    let time = Duration::from_secs(number("SHIPWAY_HISTORY_SECONDS").unwrap_or(SECONDS));
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let first = number("SHIPWAY_HISTORY_SEED").unwrap_or(clock * 1000);
    let mut lab = Lab::complete(any());
    let fresh = Lab::complete(any());
    let (start, mut seed, mut builds, mut failed) = (Instant::now(), first, 0, 0);
    while seed == first || start.elapsed() < time {
        let mut history = History::new(seed);
        history.run(&mut lab, &fresh, || seed > first && start.elapsed() > time);
        builds += history.builds;
        failed += history.failed;
        seed += 1;
    }
    println!(
        "{builds} builds of {} histories from seed {first}; {failed} failed as they should",
        seed - first
    );
    assert!(builds < 10 || failed * 2 < builds, "most builds fail: nothing is compared");
    remove_everything(&lab);
    nothing_left(&lab);
}

impl History {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let (context, recipe) = (Context::new(&mut random), Recipe::new(&mut random));
        Self { seed, random, context, recipe, said: Vec::new(), builds: 0, failed: 0 }
    }

    /// Builds, compares, changes, and so on.
    fn run(&mut self, lab: &mut Lab, fresh: &Lab, over: impl Fn() -> bool) {
        while self.builds < LENGTH && !over() {
            if self.builds > 0 {
                self.disturb(lab);
                for _ in 0..self.random.below(3) {
                    let said = if self.random.chance(50) {
                        self.context.change(&mut self.random)
                    } else {
                        self.recipe.change(&mut self.random)
                    };
                    self.said.push(said);
                }
            }
            self.builds += 1;
            self.compare(lab, fresh);
        }
        // The next history starts without a cache, as a new machine does.
        lab.shipway(["prune", "--all"]).ok();
    }

    /// Something that may happen between builds.
    #[track_caller]
    fn disturb(&mut self, lab: &mut Lab) {
        let what = match self.random.below(12) {
            0 => {
                lab.shipway(["prune", "--all"]).ok();
                "prune"
            }
            1 => {
                lab.kill_daemon();
                lab.start_daemon();
                "kill the daemon"
            }
            2 => {
                assert!(lab.stop_daemon(), "the daemon had to be killed");
                lab.start_daemon();
                "restart the daemon"
            }
            3 => {
                collect_garbage(lab);
                "collect garbage"
            }
            4 => {
                lab.shipway(["prune", "--all"]).ok();
                let _ = fs::remove_dir_all(lab.dir().join("cache"));
                "prune, and lose the local cache"
            }
            _ => return,
        };
        self.said.push(what.to_owned());
    }

    /// Cache options of the next build.
    fn caches(&mut self, lab: &Lab) -> Vec<String> {
        let (local, registry) = (
            lab.dir().join("cache"),
            format!("{}/histories/cache:{}", lab.registry(), self.random.below(2)),
        );
        let mode = *self.random.pick(&["min", "max"]);
        let mut options = Vec::new();
        match self.random.below(5) {
            0 => options.extend([
                "--cache-to".into(),
                format!("type=local,dest={},mode={mode}", local.display()),
            ]),
            1 => options
                .extend(["--cache-to".into(), format!("type=registry,ref={registry},mode={mode}")]),
            _ => {}
        }
        match self.random.below(5) {
            // One that is missing is no failure.
            0 => options
                .extend(["--cache-from".into(), format!("type=local,src={}", local.display())]),
            1 => options.extend(["--cache-from".into(), format!("type=registry,ref={registry}")]),
            _ => {}
        }
        options
    }

    /// Builds here with what is cached, sometimes beside an older form of the project, and without
    /// cache elsewhere.
    #[track_caller]
    fn compare(&mut self, lab: &Lab, fresh: &Lab) {
        let (here, there, other) =
            (lab.dir().join("project"), lab.dir().join("reference"), lab.dir().join("other"));
        for dir in [&here, &there] {
            self.context.write(dir);
            fs::write(dir.join("Dockerfile"), self.recipe.text()).unwrap();
        }
        let caches = self.caches(lab);
        if !caches.is_empty() {
            self.said.push(caches.join(" "));
        }
        let beside = self.random.chance(30).then(|| {
            self.said.push("another form of the project is built beside it".to_owned());
            let (mut context, mut recipe) = (self.context.clone(), self.recipe.clone());
            context.change(&mut self.random);
            recipe.change(&mut self.random);
            context.write(&other);
            fs::write(other.join("Dockerfile"), recipe.text()).unwrap();
            let mut command = lab.shipway_command();
            command
                .args(["build", "--progress", "plain", "--output", "type=cacheonly"])
                .args(recipe.arguments())
                .arg(&other);
            command
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap()
        });
        let (cached, said_here) = self.build(lab, &here, &caches);
        if let Some(mut beside) = beside {
            // Whether it succeeds is its own affair.
            beside.wait().unwrap();
        }
        fresh.shipway(["prune", "--all"]).ok();
        let (clean, said_there) = self.build(fresh, &there, &["--no-cache".to_owned()]);
        if cached == clean {
            self.failed += usize::from(clean == Outcome::Failed);
            return;
        }
        let why = difference(&cached, &clean);
        panic!(
            "build {} of seed {} differs: {why}\n--- history\n{}\n--- Dockerfile\n{}\n--- with what was cached\n{said_here}\n--- without\n{said_there}",
            self.builds,
            self.seed,
            self.said.join("\n"),
            self.recipe.text()
        );
    }

    #[track_caller]
    fn build(&self, lab: &Lab, project: &Path, more: &[String]) -> (Outcome, String) {
        let tar = lab.dir().join("result.tar");
        let _ = fs::remove_file(&tar);
        let output = format!("type=tar,dest={}", tar.display());
        let mut command = lab.shipway_command();
        command
            .args(["build", "--progress", "plain", "--output", &output])
            .args(self.recipe.arguments())
            .args(more)
            .arg(project);
        let Finished { code, stdout, stderr, .. } = run(&mut command);
        let said = format!("{stdout}{stderr}");
        let outcome = if code == Some(0) { Outcome::Files(read(&tar)) } else { Outcome::Failed };
        // Only what a Dockerfile may ask for in vain is a failure that counts; anything else is
        // found here.
        let expected = [
            "not found",
            "no such file",
            "not a directory",
            "is a directory",
            "non-directory",
            "failed to calculate checksum",
        ];
        assert!(
            outcome != Outcome::Failed || expected.iter().any(|e| said.to_lowercase().contains(e)),
            "seed {}: the build failed for a reason of its own\n--- history\n{}\n--- Dockerfile\n{}\n---\n{said}",
            self.seed,
            self.said.join("\n"),
            self.recipe.text()
        );
        (outcome, said)
    }
}

/// Reads an exported archive. Hard links count as the file they are another name of.
fn read(tar: &Path) -> Tree {
    let mut tree = Tree::new();
    let mut archive = tar::Archive::new(File::open(tar).unwrap());
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let mut attributes = Vec::new();
        for record in entry.pax_extensions().unwrap().into_iter().flatten() {
            let record = record.unwrap();
            if let Some(name) = record.key().unwrap().strip_prefix("SCHILY.xattr.") {
                attributes.push((name.to_owned(), record.value_bytes().to_vec()));
            }
        }
        let header = entry.header();
        let (kind, mode) = (format!("{:?}", header.entry_type()), header.mode().unwrap() & 0o7777);
        let owner = (header.uid().unwrap(), header.gid().unwrap());
        let link = entry.link_name().unwrap().map(|l| l.to_string_lossy().into_owned());
        let path = PathBuf::from("/").join(entry.path().unwrap());
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).unwrap();
        let content = match &link {
            Some(link) if kind == "Link" => {
                let first = &tree[&PathBuf::from("/").join(link)];
                first.content.clone()
            }
            Some(link) => link.clone(),
            None => hex::encode(Sha256::digest(&bytes)),
        };
        let kind = if kind == "Link" { "Regular".to_owned() } else { kind };
        tree.insert(path, Entry { kind, mode, owner, content, attributes });
    }
    tree
}

/// The first few files that are not alike.
fn difference(cached: &Outcome, clean: &Outcome) -> String {
    let (Outcome::Files(cached), Outcome::Files(clean)) = (cached, clean) else {
        let failed = |o: &Outcome| if *o == Outcome::Failed { "fails" } else { "succeeds" };
        return format!("the cached build {}, the other one {}", failed(cached), failed(clean));
    };
    let paths: std::collections::BTreeSet<_> = cached.keys().chain(clean.keys()).collect();
    let unlike = paths.into_iter().filter(|p| cached.get(*p) != clean.get(*p)).take(5);
    unlike
        .map(|p| {
            format!("\n{}: {:?} cached, {:?} without", p.display(), cached.get(p), clean.get(p))
        })
        .collect()
}
