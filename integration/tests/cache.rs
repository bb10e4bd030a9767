//! The cache: by definition, by content, across restarts, shared by builds at once.

#![allow(clippy::unwrap_used)]

use parking_lot::Mutex;
use prost::Message as _;
use serde_json::Value;
use shipway_integration::{Image, any, build, build_text, ctr_run, remove_everything};
use shipway_llb::{
    Definition, ExecDraft, MarshalOptions, MountDraft, MountSource, State, VertexOptions,
};
use shipway_oci::Platform;
use shipway_testkit::{FaultyRegistry, Lab, RegistryFault, run};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

/// Steps of plain progress that were cached.
fn cached(text: &str) -> usize {
    text.lines().filter(|l| l.ends_with("CACHED")).count()
}

#[test]
fn only_what_reads_a_changed_file_is_built_again() {
    let lab = Lab::complete(any());
    let text = "FROM busybox AS a\nCOPY a /a\nRUN cat /proc/sys/kernel/random/uuid > /stamp-a\nFROM busybox AS b\nCOPY b /b\nRUN cat /proc/sys/kernel/random/uuid > /stamp-b\n\
                FROM busybox\nCOPY --from=a /stamp-a /\nCOPY --from=b /stamp-b /\n";
    let context = lab.context("content", &[("Dockerfile", text), ("a", "1"), ("b", "1")]);
    let stamps = |tag: &str| {
        let out =
            ctr_run(&lab, &format!("docker.io/library/{tag}"), &["cat", "/stamp-a", "/stamp-b"])
                .ok()
                .stdout;
        out.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    build(&lab, "content:1", &context, &[]).ok();
    std::fs::write(context.join("a"), "2").unwrap();
    build(&lab, "content:2", &context, &[]).ok();
    let (first, second) = (stamps("content:1"), stamps("content:2"));
    assert_ne!(first[0], second[0], "the stage whose file changed was not built again");
    assert_eq!(first[1], second[1], "the stage whose file did not change was built again");

    // A file that nothing reads changes nothing; nor does a touched one.
    std::fs::write(context.join("unread"), "new").unwrap();
    std::fs::write(context.join("a"), "2").unwrap();
    build(&lab, "content:3", &context, &[]).ok();
    assert_eq!(stamps("content:3"), second);
    // And back: the first result is still known.
    std::fs::write(context.join("a"), "1").unwrap();
    build(&lab, "content:4", &context, &[]).ok();
    assert_eq!(stamps("content:4"), first);
}

#[test]
fn the_cache_survives_a_restart_of_the_daemon() {
    let mut lab = Lab::complete(any());
    let text = "FROM busybox\nRUN cat /proc/sys/kernel/random/uuid > /stamp\nCOPY Dockerfile /d\n";
    build_text(&lab, "kept:1", text).ok();
    let before = ctr_run(&lab, "docker.io/library/kept:1", &["cat", "/stamp"]).ok().stdout;
    for end in ["asked", "killed"] {
        if end == "asked" {
            assert!(lab.stop_daemon(), "the daemon had to be killed")
        } else {
            lab.kill_daemon()
        }
        lab.start_daemon();
        let again = build_text(&lab, "kept:1", text).ok();
        assert!(cached(&again.all()) >= 2, "{end}:\n{}", again.all());
        assert_eq!(
            ctr_run(&lab, "docker.io/library/kept:1", &["cat", "/stamp"]).ok().stdout,
            before,
            "{end}"
        );
    }
    // So does the history, with what the builds said.
    let history = lab.shipway(["history", "ls"]).ok().stdout;
    let ids: Vec<&str> =
        history.lines().skip(1).filter_map(|l| l.split_whitespace().next()).collect();
    assert_eq!(ids.len(), 3, "{history}");
    for id in ids {
        assert!(
            lab.shipway(["history", "logs", id]).ok().all().contains("RUN cat /proc"),
            "{history}"
        );
    }
}

/// The steps that a build explains, but for those of its base image.
fn explained(text: &str) -> Vec<String> {
    let reasons = text.split_once("Why steps ran:\n").map_or("", |(_, reasons)| reasons);
    let steps = reasons.lines().filter_map(|line| line.strip_prefix(" - ["));
    steps.filter(|step| !step.contains("] FROM ")).map(|step| format!("[{step}")).collect()
}

#[test]
fn a_build_says_why_its_steps_were_not_cached() {
    let lab = Lab::complete(any());
    let text =
        "FROM busybox\nCOPY file /file\nARG VERSION=1\nRUN env > /env\nRUN cat /file /env > /all\n";
    let context = lab.context("why", &[("Dockerfile", text), ("file", "1")]);
    let build = |more: &[&str]| {
        let context = context.display().to_string();
        let fixed = ["build", "--progress", "plain", "--explain-cache", "--tag", "why:1"];
        lab.shipway(fixed.iter().chain(more).copied().chain([&*context])).ok().all()
    };
    let (copy, env) = ("[2/4] COPY file /file", "[3/4] RUN env > /env");
    let all = "[4/4] RUN cat /file /env > /all";
    let check = |text: &str, expected: &[(&str, &str)]| {
        let expected: Vec<String> =
            expected.iter().map(|(step, reason)| format!("{step}: {reason}")).collect();
        assert_eq!(explained(text), expected, "{text}");
    };
    let new = "the cache knows nothing like it";
    check(&build(&[]), &[(copy, new), (env, new), (all, new)]);
    let same = build(&[]);
    assert!(same.contains("No step ran that the cache could have had a result for."), "{same}");

    // Another file: the step that reads it, and what follows from that.
    std::fs::write(context.join("file"), "2").unwrap();
    let file = "not as the last time: other files in [internal] load build context";
    let (after_copy, after_env) = (
        format!("not as the last time: another result of {copy}"),
        format!("not as the last time: another result of {env}"),
    );
    check(&build(&[]), &[(copy, file), (env, &after_copy), (all, &after_env)]);

    // Another argument, which the steps after it have in their environment.
    let env_2 = "not as the last time: other env VERSION";
    let all_2 = format!("{env_2}; another result of {env}");
    check(&build(&["--build-arg", "VERSION=2"]), &[(env, env_2), (all, &all_2)]);

    let none = "the build uses no cache for it";
    check(&build(&["--no-cache"]), &[(copy, none), (env, none), (all, none)]);

    remove_everything(&lab);
    let gone = "the cache had its result, which was pruned or lost";
    let text = build(&[]);
    check(&text, &[(copy, gone), (env, gone), (all, gone)]);

    // The history says the same afterwards.
    let history = lab.shipway(["history", "ls"]).ok().stdout;
    let mut builds = history.lines().skip(1).filter_map(|l| l.split_whitespace().next());
    let told = builds.any(|id| {
        let kept = lab.shipway(["history", "explain", id]).ok().stdout;
        explained(&kept) == explained(&text)
    });
    assert!(told, "no build of these is explained as it was:\n{history}");
}

#[test]
fn equal_work_of_builds_at_once_is_done_once() {
    let lab = Lab::complete(any());
    let text = "FROM busybox\nRUN sleep 2; cat /proc/sys/kernel/random/uuid > /stamp\n";
    let contexts: Vec<_> =
        (0..4).map(|n| lab.context(&format!("once{n}"), &[("Dockerfile", text)])).collect();
    let start = |n: usize| {
        let mut command = lab.shipway_command();
        command
            .args(["build", "--progress", "plain", "--tag", &format!("once:{n}")])
            .arg(&contexts[n]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let builds: Vec<_> = (0..4).map(start).collect();
    for build in builds {
        let output = build.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let stamp = |n: usize| {
        ctr_run(&lab, &format!("docker.io/library/once:{n}"), &["cat", "/stamp"]).ok().stdout
    };
    let first = stamp(0);
    for n in 1..4 {
        assert_eq!(stamp(n), first, "build {n} ran the step again");
    }
}

#[test]
fn no_cache_runs_every_step_again() {
    let lab = Lab::complete(any());
    let context = lab.context(
        "fresh",
        &[("Dockerfile", "FROM busybox\nRUN cat /proc/sys/kernel/random/uuid > /stamp\n")],
    );
    let stamp = |more: &[&str]| {
        build(&lab, "fresh:1", &context, more).ok();
        ctr_run(&lab, "docker.io/library/fresh:1", &["cat", "/stamp"]).ok().stdout
    };
    let first = stamp(&[]);
    assert_eq!(stamp(&[]), first);
    assert_ne!(stamp(&["--no-cache"]), first);
}

#[test]
fn caches_know_the_parts_of_a_merge_and_move_no_layer_in_vain() {
    let lab = Lab::complete(any());
    let text = "FROM busybox AS tool\nRUN cat /proc/sys/kernel/random/uuid > /stamp\nFROM busybox\nCOPY --link a /a\nCOPY --link --from=tool /stamp /stamp\n";
    for kind in ["registry", "inline"] {
        let context = lab.context(&format!("parts-{kind}"), &[("Dockerfile", text), ("a", "1")]);
        let image = format!("{}/parts/{kind}:1", lab.registry());
        let output = format!("type=image,name={image},push=true,store=false");
        let (to, from) = match kind {
            "inline" => ("type=inline".to_owned(), format!("type=registry,ref={image}")),
            _ => [(); 2].map(|()| format!("type=registry,ref={image}-cache")).into(),
        };
        let built = || {
            lab.shipway(["prune", "--all"]).ok();
            let all = [
                "build",
                "--progress",
                "plain",
                "--output",
                &output,
                "--cache-to",
                &to,
                "--cache-from",
                &from,
            ];
            lab.shipway(all.into_iter().chain([&*context.to_string_lossy()])).ok()
        };
        // Layers that are here, by the labels of what was unpacked or packed.
        let layers = || {
            lab.ctr(["content", "list"])
                .ok()
                .lines()
                .filter(|l| l.contains("containerd.io/uncompressed="))
                .count()
        };
        built();
        let again = built();
        assert_eq!((cached(&again.all()), layers()), (4, 0), "{kind}: {}", again.all());
        // Another file: its own layer is made, and nothing else is even fetched.
        std::fs::write(context.join("a"), "2").unwrap();
        let changed = built();
        assert_eq!((cached(&changed.all()), layers()), (2, 1), "{kind}: {}", changed.all());
    }
}

#[test]
fn what_one_client_left_lazy_is_fetched_with_the_next_ones_login() {
    let mut lab = Lab::complete(any());
    let right = Arc::new(Mutex::new(String::new()));
    let private =
        FaultyRegistry::start(&lab.registry(), "/v2/", RegistryFault::Login(right.clone()));
    lab.configure_daemon(&format!("[registry.\"{}\"]\n  http = true\n", private.address()));
    assert!(lab.stop_daemon(), "the daemon had to be killed");
    lab.start_daemon();
    // With a password that is the right one from now on.
    let build_as = |password: &str, more: &[&str]| {
        let text = "FROM busybox AS a\nRUN cat /proc/sys/kernel/random/uuid > /stamp\nFROM scratch\nCOPY --from=a /stamp /\n";
        let context = lab.context(password, &[("Dockerfile", text)]);
        let login =
            serde_json::json!({ "auths": { private.address(): { "auth": password } } }).to_string();
        let home = lab.context(&format!("login-{password}"), &[("config.json", &login)]);
        *right.lock() = format!("Basic {password}");
        let mut command = lab.shipway_command();
        command
            .args(["build", "--progress", "plain"])
            .args(more)
            .arg(&context)
            .env("DOCKER_CONFIG", home);
        run(&mut command).ok();
    };
    let written = |name: &str| {
        (
            format!("type=local,dest={}", lab.dir().join(name).display()),
            lab.dir().join(name).join("stamp"),
        )
    };
    let cache = |host: &str| format!("type=registry,ref={host}/private/cache:1");
    let ((first, made), (second, found)) = (written("made"), written("found"));
    build_as(
        "bWFrZXI6MA==",
        &["--output", &first, "--cache-to", &format!("{},mode=max", cache(&lab.registry()))],
    );
    remove_everything(&lab);
    build_as(
        "Zmlyc3Q6MQ==",
        &["--output", "type=cacheonly", "--cache-from", &cache(&private.address())],
    );
    // The first client has gone, and its password is no longer right.
    build_as("c2Vjb25kOjI=", &["--output", &second]);
    assert_eq!(std::fs::read(found).unwrap(), std::fs::read(made).unwrap());
}

#[test]
fn an_image_made_of_its_own_inline_cache_is_the_same_image() {
    let lab = Lab::complete(any());
    let text = "FROM busybox AS tool\nRUN cat /proc/sys/kernel/random/uuid > /stamp\nRUN echo const > /const\nFROM scratch\nCOPY --from=tool /stamp /\nCOPY --from=tool /const /\n";
    let context = lab.context("inline", &[("Dockerfile", text)]);
    let name = format!("{}/inline:1", lab.registry());
    let built = || {
        remove_everything(&lab);
        let (output, cache) =
            (format!("type=image,name={name},push=true"), format!("type=registry,ref={name}"));
        let all = [
            "build",
            "--progress",
            "plain",
            "--output",
            &output,
            "--cache-to",
            "type=inline",
            "--cache-from",
            &cache,
        ];
        lab.shipway(all.into_iter().chain([&*context.to_string_lossy()])).ok();
        Image::of(&lab, &name)
    };
    let first = built();
    // Somebody looks at it, as an image.
    let text = format!("FROM {name}\n");
    let (looking, out) =
        (lab.context("looking", &[("Dockerfile", &text)]), lab.dir().join("looked"));
    let output = format!("type=local,dest={}", out.display());
    lab.shipway(["build", "--output", &output, &*looking.to_string_lossy()]).ok();
    assert!(out.join("stamp").exists());
    let second = built();
    assert_eq!(first.config, second.config);
    assert_eq!(first.target, second.target);
}

#[test]
fn a_graph_whose_image_is_made_of_its_own_inline_cache_is_the_same_image() {
    let lab = Lab::complete(any());
    let busybox = State::image(
        "docker.io/library/busybox:latest",
        "",
        BTreeMap::new(),
        VertexOptions::default(),
    );
    // No frontend writes a history, so that it is made of what the steps are called.
    let step = |result: State, command: &str| {
        let mount = MountDraft {
            target: "/wd".into(),
            source: MountSource::State(result),
            ..MountDraft::default()
        };
        let args = ["sh", "-c", command].map(str::to_owned).to_vec();
        busybox.run_into(
            ExecDraft { args, mounts: vec![mount], ..ExecDraft::default() },
            "/wd",
            VertexOptions::named(command),
        )
    };
    let state = step(
        step(State::scratch(), "echo a > /wd/const"),
        "cat /proc/sys/kernel/random/uuid > /wd/stamp",
    );
    let options =
        MarshalOptions { platform: Platform::host(), caps: None, local_unique_id: String::new() };
    let graph = lab.dir().join("graph");
    std::fs::write(&graph, Definition::to_pb(&state.marshal(&options).unwrap()).encode_to_vec())
        .unwrap();
    let client = lab.dir().join("buildctl");
    std::os::unix::fs::symlink(shipway_testkit::built("shipway"), &client).unwrap();
    let name = format!("{}/inline:1", lab.registry());
    let built = || {
        remove_everything(&lab);
        let mut build = Command::new(&client);
        build.args([
            "--addr",
            &lab.daemon_address(),
            "build",
            "--progress",
            "plain",
            "--output",
            &format!("type=image,name={name},push=true"),
        ]);
        build.args([
            "--export-cache",
            "type=inline",
            "--import-cache",
            &format!("type=registry,ref={name}"),
        ]);
        let done = build.stdin(std::fs::File::open(&graph).unwrap()).output().unwrap();
        assert!(done.status.success(), "{done:?}");
        Image::of(&lab, &name)
    };
    let (first, second) = (built(), built());
    assert_eq!(first.config, second.config);
    assert_eq!(first.target, second.target);
}

#[test]
fn a_cache_that_lost_a_layer_is_exported_without_it() {
    let lab = Lab::complete(any());
    let text = "FROM busybox AS a\nRUN echo x > /x\nFROM scratch\nCOPY --from=a /x /y\n";
    let context = lab.context("lossy", &[("Dockerfile", text)]);
    let (old, new) = (lab.dir().join("old-cache"), lab.dir().join("new-cache"));
    let built = |more: &[String]| {
        remove_everything(&lab);
        let fixed =
            ["build", "--progress", "plain", "--output", "type=cacheonly"].map(str::to_owned);
        lab.shipway(fixed.iter().chain(more).cloned().chain([context.display().to_string()])).ok()
    };
    let blob = |dir: &Path, digest: &str| {
        dir.join("blobs/sha256").join(digest.trim_start_matches("sha256:"))
    };
    let read =
        |path: PathBuf| serde_json::from_slice::<Value>(&std::fs::read(path).unwrap()).unwrap();
    let config = |dir: &Path| {
        let manifest = read(blob(
            dir,
            read(dir.join("index.json"))["manifests"][0]["digest"].as_str().unwrap(),
        ));
        read(blob(dir, manifest["config"]["digest"].as_str().unwrap()))
    };
    let to = |dir: &Path| {
        format!("--cache-to=type=local,mode=max,image-manifest=true,dest={}", dir.display())
    };
    built(&[to(&old)]);
    let before = config(&old);
    // The layer of the step lies on another one.
    let layers = before["layers"].as_array().unwrap();
    let step = layers.iter().find(|l| l["parent"] != -1).unwrap();
    std::fs::remove_file(blob(&old, step["blob"].as_str().unwrap())).unwrap();
    let again = built(&[format!("--cache-from=type=local,src={}", old.display()), to(&new)]);
    assert_eq!(cached(&again.all()), 3, "{}", again.all());
    let after = config(&new);
    assert_eq!(after["layers"].as_array().unwrap().len(), layers.len() - 1);
    let keys = |config: &Value| {
        config["records"]
            .as_array()
            .unwrap()
            .iter()
            .map(|r| r["digest"].clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(keys(&after), keys(&before));
}

/// `<name>=` of a registry cache.
fn registry_cache(host: &str) -> String {
    format!("type=registry,ref={host}/caches/it:1")
}

#[test]
fn a_cache_that_is_late_is_waited_for_and_one_that_never_comes_is_not_missed() {
    let mut lab = Lab::complete(any());
    let faults = [
        ("late", "/manifests/", RegistryFault::Late(Duration::from_secs(4))),
        ("silent", "/manifests/", RegistryFault::Hang),
        ("broken", "/manifests/", RegistryFault::Status(404, "oh no")),
        ("lying", "/manifests/", RegistryFault::Corrupt),
    ];
    let faults = faults
        .map(|(name, path, fault)| (name, FaultyRegistry::start(&lab.registry(), path, fault)));
    for (_, registry) in &faults {
        lab.configure_daemon(&format!("[registry.\"{}\"]\n  http = true\n", registry.address()));
    }
    lab.configure_daemon("[system]\n  cacheImportTimeout = \"20s\"\n");
    assert!(lab.stop_daemon(), "the daemon had to be killed");
    lab.start_daemon();
    let text = "FROM busybox\nRUN cat /proc/sys/kernel/random/uuid > /stamp\n";
    let context = lab.context("late", &[("Dockerfile", text)]);
    let cache = |host: &str| format!("{},mode=max", registry_cache(host));
    lab.shipway([
        "build",
        "--output",
        "type=cacheonly",
        "--cache-to",
        &cache(&lab.registry()),
        &*context.to_string_lossy(),
    ])
    .ok();
    for (name, registry) in &faults {
        // A client that drives the build itself is not made to wait for that (row `top.1`).
        let from = registry_cache(&registry.address());
        let all =
            ["build", "--progress", "plain", "--cache-from", &from, &*context.to_string_lossy()];
        remove_everything(&lab);
        let built = match lab.buildx() {
            Some(mut command) => run(command.args(all)),
            None => {
                eprintln!("docker-buildx is absent: only our own client is tried");
                lab.shipway(all)
            }
        };
        let built = built.ok();
        remove_everything(&lab);
        let ours = lab.shipway(all).ok();
        for text in [built.all(), ours.all()] {
            assert!(text.contains("importing cache manifest from"), "{name}:\n{text}");
            assert_eq!(cached(&text) > 0, *name == "late", "{name}:\n{text}");
        }
        assert_eq!(
            ours.all().contains("was not imported"),
            *name != "late",
            "{name}:\n{}",
            ours.all()
        );
    }
}

#[test]
fn what_an_import_gave_is_nobody_elses_while_it_is_there() {
    let lab = Lab::complete(any());
    let cache = format!("{},mode=max", registry_cache(&lab.registry()));
    let dockerfile =
        |more: &str| format!("FROM busybox\nRUN cat /proc/sys/kernel/random/uuid > /stamp\n{more}");
    let (context, busy) = (
        lab.context("one", &[("Dockerfile", &dockerfile(""))]),
        lab.context("busy", &[("Dockerfile", "FROM busybox\nRUN sleep 20\n")]),
    );
    let (context, busy) = (context.display().to_string(), busy.display().to_string());
    lab.shipway(["build", "--output", "type=cacheonly", "--cache-to", &cache, &context]).ok();
    remove_everything(&lab);
    // Somebody imports the cache and keeps on building something else.
    let mut other = lab.shipway_command();
    other
        .args(["build", "--progress", "plain", "--cache-from", &cache, &busy])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut other = other.spawn().unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(other.stderr.take().unwrap()));
    // Its step is not looked for in the cache before the cache was read.
    assert!(
        lines.by_ref().map_while(Result::ok).any(|l| l.contains("RUN sleep 20")),
        "the other build does not run"
    );
    let without = lab.shipway(["build", "--progress", "plain", &context]).ok();
    // The base that the other build took from its cache is known now, under the key that it asked
    // with.
    let text = without.all();
    let step = text
        .lines()
        .find(|l| l.contains("RUN cat /proc"))
        .and_then(|l| l.split_whitespace().next())
        .unwrap();
    assert!(!text.lines().any(|l| l == format!("{step} CACHED")), "{text}");
    other.kill().unwrap();
    other.wait().unwrap();
}

#[test]
fn what_a_cache_can_no_longer_give_is_built_again() {
    let mut lab = Lab::complete(any());
    let text =
        "FROM busybox AS s1\nRUN echo 1 > /w\nFROM scratch\nCOPY f /f\nCOPY --from=s1 /w /w\n";
    let dir = lab.dir().join("lost-cache");
    let gone = FaultyRegistry::start(&lab.registry(), "/no such thing/", RegistryFault::Hang);
    lab.configure_daemon(&format!("[registry.\"{}\"]\n  http = true\n", gone.address()));
    assert!(lab.stop_daemon(), "the daemon had to be killed");
    lab.start_daemon();
    let mut gone = Some(gone);
    let local = [
        format!("type=local,mode=max,dest={}", dir.display()),
        format!("type=local,src={}", dir.display()),
    ];
    let registry = [
        format!("{},mode=max", registry_cache(&lab.registry())),
        registry_cache(&gone.as_ref().unwrap().address()),
    ];
    for (kind, [to, from]) in [("local", local), ("registry", registry)] {
        let context = lab.context(kind, &[("Dockerfile", text), ("f", "1")]);
        let out = lab.dir().join(format!("out-{kind}"));
        let output = format!("type=local,dest={}", out.display());
        let built = |more: &[&str]| {
            let fixed = ["build", "--progress", "plain", "--output", &output];
            lab.shipway(
                fixed.into_iter().chain(more.iter().copied()).chain([&*context.to_string_lossy()]),
            )
        };
        built(&["--cache-to", &to]).ok();
        lab.shipway(["prune", "--all"]).ok();
        let again = built(&["--cache-from", &from]).ok();
        assert!(cached(&again.all()) > 0, "{kind}:\n{}", again.all());
        // The client that had the cache is gone, or the registry is.
        if kind == "registry" {
            gone = None;
        }
        std::fs::write(context.join("f"), "2").unwrap();
        let changed = built(&[]).ok();
        let read = |name: &str| std::fs::read_to_string(out.join(name)).unwrap();
        assert_eq!(
            (read("f"), read("w")),
            ("2".into(), "1\n".into()),
            "{kind}:\n{}",
            changed.all()
        );
        assert!(gone.is_some() || kind == "registry");
    }
}
