//! What is remembered of builds, and what of containerd the daemon's socket shows: bounded, whole
//! after a restart, and nobody else's.

#![allow(clippy::unwrap_used)]

use shipway_integration::{Image, any, build_text};
use shipway_proto::{
    MAX_MESSAGE,
    containerd::services::content::v1::{self as content, content_client::ContentClient},
    moby::buildkit::v1::{self as api, control_client::ControlClient},
};
use shipway_testkit::{Finished, Lab, run};
use std::{future::Future, process::Command};
use tonic::{Code, transport::Channel};

/// Runs `work` with a connection to the lab's daemon.
fn connected<T, F: Future<Output = T>>(lab: &Lab, work: impl FnOnce(Channel) -> F) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        work(shipway_grpc::dial(&lab.daemon_address().parse().unwrap(), None).await.unwrap()).await
    })
}

async fn history(
    channel: Channel,
    filter: &[&str],
) -> Result<Vec<api::BuildHistoryRecord>, tonic::Status> {
    let filter = filter.iter().map(|f| (*f).to_owned()).collect();
    let request = api::BuildHistoryRequest { early_exit: true, filter, ..Default::default() };
    let mut events = ControlClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE)
        .listen_build_history(request)
        .await?
        .into_inner();
    let mut all = Vec::new();
    while let Some(event) = events.message().await? {
        all.extend(event.record);
    }
    Ok(all)
}

#[test]
fn huge_options_neither_fill_the_memory_nor_lose_their_builds() {
    const BUILDS: usize = 24;
    const LARGE: usize = 15 << 20;
    let mut lab = Lab::complete(any());
    let solve = |lab: &Lab, i: usize| {
        connected(lab, async |channel| {
            let arg = ("build-arg:large".to_owned(), "\u{1}".repeat(LARGE));
            let request = api::SolveRequest {
                r#ref: format!("large-{i}"),
                frontend: "dockerfile.v0".into(),
                frontend_attrs: [arg, ("target".to_owned(), "x".to_owned())].into(),
                ..Default::default()
            };
            // It has no session, so it fails; what counts is what is remembered of it.
            ControlClient::new(channel)
                .max_encoding_message_size(MAX_MESSAGE)
                .solve(request)
                .await
                .unwrap_err();
        });
    };
    solve(&lab, 0);
    let before = lab.daemon().memory();
    (1..BUILDS).for_each(|i| solve(&lab, i));
    let grown = lab.daemon().memory().saturating_sub(before);
    assert!(grown < 4 * LARGE as u64, "the daemon grew by {} MiB", grown >> 20);

    assert!(lab.stop_daemon(), "the daemon had to be killed");
    lab.start_daemon();
    let records = connected(&lab, async |channel| history(channel, &[]).await).unwrap();
    assert_eq!(records.len(), BUILDS);
    assert!(records.iter().all(|r| r.frontend_attrs["target"] == "x"
        && r.frontend_attrs["build-arg:large"].len() < 1 << 20));
    let idle = lab.daemon().memory();
    assert!(idle < before + 4 * LARGE as u64, "the history takes {} MiB", (idle - before) >> 20);

    let chosen = |filter: &str| connected(&lab, async |channel| history(channel, &[filter]).await);
    assert_eq!(chosen("startedAt>=1h,status==error").unwrap().len(), BUILDS);
    assert_eq!(chosen("startedAt<1h").unwrap().len(), 0);
    assert_eq!(chosen("ref~=^large-1[0-9]$").unwrap().len(), 10);
    assert_eq!(chosen("size>1").unwrap_err().code(), Code::InvalidArgument);
}

/// Helpers of clients build too, and nobody wants to see it (row `ctl.solve.internal`).
#[test]
fn internal_builds_are_not_remembered() {
    let lab = Lab::complete(any());
    let solve = |id: &str, internal: bool| {
        connected(&lab, async |channel| {
            let definition = Some(Default::default());
            let request =
                api::SolveRequest { r#ref: id.into(), definition, internal, ..Default::default() };
            ControlClient::new(channel).solve(request).await.unwrap();
        });
    };
    solve("seen", false);
    solve("unseen", true);
    let records = connected(&lab, async |channel| history(channel, &[]).await).unwrap();
    assert_eq!(records.iter().map(|r| r.r#ref.as_str()).collect::<Vec<_>>(), ["seen"]);
}

#[test]
fn images_of_others_in_the_namespace_cannot_be_read() {
    let lab = Lab::complete(any());
    // The busybox is pulled by somebody else: containerd has it, and no build has.
    let theirs = format!("{}/library/busybox:latest", lab.registry());
    lab.ctr(["images", "pull", "--plain-http", &theirs]).ok();
    let theirs = Image::of(&lab, &theirs);
    build_text(&lab, "ours:1", "FROM scratch\nCOPY Dockerfile /\n").ok();
    let ours = Image::of(&lab, "docker.io/library/ours:1");
    let read = |digest: &str| {
        connected(&lab, async |channel| {
            let mut client = ContentClient::new(channel);
            let info =
                client.info(content::InfoRequest { digest: digest.to_owned() }).await.map(drop);
            let read = client
                .read(content::ReadContentRequest {
                    digest: digest.to_owned(),
                    ..Default::default()
                })
                .await;
            let read = match read {
                Ok(stream) => stream
                    .into_inner()
                    .message()
                    .await
                    .map(|m| m.is_some_and(|m| !m.data.is_empty())),
                Err(status) => Err(status),
            };
            let code = |s: tonic::Status| s.code();
            (info.map_err(code), read.map_err(code))
        })
    };
    let listed = connected(&lab, async |channel| {
        let mut stream = ContentClient::new(channel)
            .list(content::ListContentRequest::default())
            .await
            .unwrap()
            .into_inner();
        let mut digests = Vec::new();
        while let Some(part) = stream.message().await.unwrap() {
            digests.extend(part.info.into_iter().map(|i| i.digest));
        }
        digests
    });
    let config = |image: &Image| image.manifest["config"]["digest"].as_str().unwrap().to_owned();
    for digest in [theirs.target.clone(), theirs.digest.clone(), config(&theirs)]
        .iter()
        .chain(&theirs.layers())
    {
        assert_eq!(read(digest), (Err(Code::NotFound), Err(Code::NotFound)), "{digest}");
        assert!(!listed.contains(digest), "{digest}");
    }
    for digest in
        [ours.target.clone(), ours.digest.clone(), config(&ours)].iter().chain(&ours.layers())
    {
        assert_eq!(read(digest), (Ok(()), Ok(true)), "{digest}");
        assert!(listed.contains(digest), "{digest}");
    }
}

/// Our client on buildx's own state, where the daemon is the builder `shipway`; and buildx on the
/// same, if it is installed.
struct Clients {
    lab: Lab,
}

impl Clients {
    #[track_caller]
    fn ours(&self, arguments: &[&str]) -> Finished {
        let home = self.lab.dir().join("buildx");
        let mut command = Command::new(shipway_testkit::built("shipway"));
        command.env("BUILDX_CONFIG", &home).env("DOCKER_CONFIG", &home).env("HOME", &home);
        run(command.env("BUILDX_BUILDER", "shipway").args(arguments))
    }

    fn theirs(&self, arguments: &[&str]) -> Option<Finished> {
        let Some(mut command) = self.lab.buildx() else {
            eprintln!("docker-buildx is absent: nothing was compared with it");
            return None;
        };
        Some(run(command.args(arguments)))
    }

    /// What both print as JSON is the same, but for `unlike`.
    #[track_caller]
    fn compare(&self, arguments: &[&str], unlike: &[&str]) -> serde_json::Value {
        let read = |done: Finished| -> serde_json::Value {
            let text = done.ok().stdout;
            let list: Result<Vec<_>, _> = text.lines().map(serde_json::from_str).collect();
            let value = serde_json::from_str(&text).or_else(|_| list.map(serde_json::Value::Array));
            let mut value = value.unwrap_or_else(|e| panic!("{arguments:?}: {e}: {text}"));
            for key in unlike {
                if let Some(map) = value.as_object_mut() {
                    map.remove(*key);
                }
            }
            value
        };
        let ours = read(self.ours(arguments));
        if let Some(theirs) = self.theirs(arguments) {
            assert_eq!(ours, read(theirs), "{arguments:?}");
        }
        ours
    }
}

#[test]
fn builds_are_listed_shown_exported_and_forgotten() {
    let clients = Clients { lab: Lab::complete(any()) };
    let lab = &clients.lab;
    let home = lab.dir().join("buildx");
    if lab.buildx().is_none() {
        std::fs::create_dir_all(&home).unwrap();
        let create = ["create", "--name", "shipway", "--driver", "remote", &lab.daemon_address()];
        clients.ours(&create).ok();
    }
    let context = lab.context(
        "listed",
        &[
            ("Dockerfile", "FROM busybox AS good\nARG A\nRUN echo said $A\n"),
            ("bad.Dockerfile", "FROM busybox\nRUN echo before && no-such-program\n"),
        ],
    );
    let (context, bad) = (
        context.to_string_lossy().into_owned(),
        context.join("bad.Dockerfile").to_string_lossy().into_owned(),
    );
    let name = format!("{}/listed:1", lab.registry());
    let good = ["build", "--attest", "type=provenance,mode=max", "--build-arg", "A=1"];
    let more = ["--label", "l=2", "--target", "good", "--push", "-t", &name, &context];
    clients.ours(&[&good[..], &more[..]].concat()).ok();
    clients.ours(&["build", "-f", &bad, &context]).failed();

    // Lists.
    let all = clients.compare(&["history", "ls", "--format", "json"], &[]);
    let rows = all.as_array().unwrap();
    let status: Vec<&str> = rows.iter().map(|r| r["status"].as_str().unwrap()).collect();
    assert_eq!(status, ["Error", "Completed"], "{all}");
    assert_eq!(rows[1]["name"], "listed (good)", "{all}");
    let id = |row: &serde_json::Value| {
        row["ref"].as_str().unwrap().strip_prefix("shipway/shipway0/").unwrap().to_owned()
    };
    let (failed, completed) = (id(&rows[0]), id(&rows[1]));
    let chosen = |filter: &str| {
        let done = clients.ours(&["history", "ls", "--format", "{{.Ref}}", "--filter", filter]);
        done.ok().stdout
    };
    assert_eq!(chosen("status=error"), format!("{failed}\n"));
    assert_eq!(chosen(&format!("ref={}", &completed[..8])), format!("{completed}\n"));
    assert_eq!(chosen("startedAt<1h").lines().count(), 0);
    assert_eq!(chosen("startedAt>1h").lines().count(), 2);
    let refused = clients.ours(&["history", "ls", "--filter", "size>1"]).failed().stderr;
    assert!(refused.contains("unsupported filter") && refused.contains("hint: "), "{refused}");
    let table = clients.ours(&["history", "ls"]).ok().stdout;
    if let Some(theirs) = clients.theirs(&["history", "ls"]) {
        let times = |text: &str| text.replace("Less than a second", "1 second");
        let (first, other) = (times(&table), times(&theirs.ok().stdout));
        assert_eq!(first.lines().next(), other.lines().next());
        assert_eq!(first.lines().count(), other.lines().count());
    }

    // What they said, by offset and by id.
    assert!(clients.ours(&["history", "logs"]).ok().all().contains("no-such-program"));
    assert!(clients.ours(&["history", "logs", "^1"]).ok().all().contains("said 1"));
    let full = format!("shipway/shipway0/{completed}");
    let raw = clients.ours(&["history", "logs", &full, "--progress", "rawjson"]).ok().all();
    assert!(raw.lines().all(|line| line.starts_with('{')), "{raw}");
    let none = clients.ours(&["history", "logs", "^7"]).failed().stderr;
    assert!(none.contains("no build found with offset ^7") && none.contains("hint: "), "{none}");

    // What they were.
    let unlike = ["StartedAt", "CompletedAt", "Context"];
    let shown = clients.compare(&["history", "inspect", &completed, "--format", "json"], &unlike);
    assert_eq!(shown["Target"], "good");
    assert_eq!(shown["BuildArgs"][0]["Value"], "1");
    assert!(shown["Materials"][0]["URI"].as_str().unwrap().starts_with("pkg:docker/"), "{shown}");
    let why = clients.ours(&["history", "inspect", "--format", "json"]).ok().stdout;
    let why: serde_json::Value = serde_json::from_str(&why).unwrap();
    assert_eq!(why["Status"], "failed");
    let logs = why["Error"]["Logs"].as_array().unwrap();
    assert!(logs.iter().any(|l| l == "before"), "{why}");
    let pretty = clients.ours(&["history", "inspect"]).ok().stdout;
    for part in ["Error:\t", ">>> RUN echo before", "> before\n", "bad.Dockerfile"] {
        assert!(pretty.contains(part), "{part}: {pretty}");
    }
    let provenance = ["history", "inspect", "attachment", "^1", "--type", "provenance"];
    let provenance = clients.ours(&provenance).ok().stdout;
    let provenance: serde_json::Value = serde_json::from_str(&provenance).unwrap();
    assert!(provenance["buildDefinition"].is_object(), "{provenance}");
    let index = ["history", "inspect", "attachment", &completed, "--type", "index"];
    let index: serde_json::Value = serde_json::from_str(&clients.ours(&index).ok().stdout).unwrap();
    assert_eq!(index["manifests"].as_array().unwrap().len(), 2);
    assert!(clients.ours(&["history", "inspect", "attachment"]).failed().stderr.contains("--type"));

    // As a file.
    let bundle = lab.dir().join("all.dockerbuild");
    let path = bundle.to_string_lossy().into_owned();
    clients.ours(&["history", "export", "--all", "-o", &path]).ok();
    let unpacked = lab.dir().join("unpacked");
    std::fs::create_dir(&unpacked).unwrap();
    run(Command::new("tar").args(["-xzf", &path, "-C"]).arg(&unpacked)).ok();
    let read = |path: &str| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(unpacked.join(path)).unwrap()).unwrap()
    };
    let blob = |entry: &serde_json::Value| {
        let digest = entry["digest"].as_str().unwrap();
        read(&format!("blobs/sha256/{}", digest.strip_prefix("sha256:").unwrap()))
    };
    let root = blob(&read("index.json")["manifests"][0]);
    let records = root["manifests"].as_array().unwrap();
    assert_eq!(records.len(), 2, "{root}");
    for entry in records {
        let manifest = blob(entry);
        let record = blob(&manifest["config"]);
        assert_eq!(record["Ref"], entry["annotations"]["vnd.buildkit.history.reference"]);
        assert_eq!(
            record["FrontendAttrs"]["filename"].as_str().map(|f| f.ends_with("Dockerfile")),
            Some(true)
        );
        let layers = manifest["layers"].as_array().unwrap();
        assert!(layers.iter().any(|l| l["mediaType"] == "application/vnd.buildkit.status.v0"));
        for layer in layers {
            let digest = layer["digest"].as_str().unwrap().strip_prefix("sha256:").unwrap();
            assert!(unpacked.join("blobs/sha256").join(digest).exists(), "{layer}");
        }
    }
    for command in ["import", "open"] {
        let refused = clients.ours(&["history", command, "x"]).failed().stderr;
        assert!(refused.contains("Docker Desktop") && refused.contains("hint: "), "{refused}");
    }

    clients.ours(&["history", "rm", "^1"]).ok();
    assert_eq!(chosen("status!=running"), format!("{failed}\n"));
    clients.ours(&["history", "rm"]).failed();
    clients.ours(&["history", "rm", "--all"]).ok();
    assert_eq!(chosen("status!=running"), "");
    let empty = clients.ours(&["history", "inspect"]).failed().stderr;
    assert!(empty.contains("no records found"), "{empty}");
}

/// What a build of ours notes in the metadata file and sends of the repository it is in, beside
/// buildx.
#[test]
fn metadata_and_repositories_are_told_as_buildx_tells_them() {
    let clients = Clients { lab: Lab::complete(any()) };
    let lab = &clients.lab;
    if lab.buildx().is_none() {
        std::fs::create_dir_all(lab.dir().join("buildx")).unwrap();
        let create = ["create", "--name", "shipway", "--driver", "remote", &lab.daemon_address()];
        clients.ours(&create).ok();
    }
    let dockerfile = "FROM busybox\nMAINTAINER me\nRUN echo x\n";
    let repo = lab.context("repo", &[("sub/Dockerfile", dockerfile)]);
    let git = "git init -q -b main . && git config user.email a@b && git config user.name n && git add . \
               && git commit -qm 1 && git remote add origin https://example.org/r.git";
    run(Command::new("sh").args(["-c", git]).current_dir(&repo)).ok();
    let sub = repo.join("sub").to_string_lossy().into_owned();
    let metadata = |who: &str| lab.dir().join(format!("{who}.json"));
    let build = |who: &str| {
        let path = metadata(who).to_string_lossy().into_owned();
        let name = format!("{}/{who}:1", lab.registry());
        let home = lab.dir().join("buildx");
        let mut command = match who {
            "theirs" => lab.buildx()?,
            _ => Command::new(shipway_testkit::built("shipway")),
        };
        command.env("BUILDX_CONFIG", &home).env("DOCKER_CONFIG", &home).env("HOME", &home);
        command.env("BUILDX_BUILDER", "shipway").env("BUILDX_METADATA_WARNINGS", "1");
        command.env("BUILDX_NO_DEFAULT_ATTESTATIONS", "1");
        run(command.args(["build", "--push", "-t", &name, "--metadata-file", &path, &sub])).ok();
        let text = std::fs::read(metadata(who)).unwrap();
        Some(serde_json::from_slice::<serde_json::Value>(&text).unwrap())
    };
    let ours = build("ours").unwrap();
    let reference = ours["buildx.build.ref"].as_str().unwrap();
    let id = reference.strip_prefix("shipway/shipway0/").unwrap();
    let provenance = &ours["buildx.build.provenance"];
    assert_eq!(provenance["buildType"], "https://mobyproject.org/buildkit@v1", "{ours}");
    assert!(provenance.get("metadata").is_none(), "little is written unless asked");
    assert!(ours["buildx.build.warnings"].as_array().is_some_and(|w| !w.is_empty()), "{ours}");
    let records = |filter: &str| connected(lab, async |channel| history(channel, &[filter]).await);
    let attrs = |id: &str| records(&format!("ref=={id}")).unwrap().remove(0).frontend_attrs;
    let told = attrs(id);
    assert_eq!(told["vcs:source"], "https://example.org/r.git");
    assert_eq!((told["vcs:localdir:context"].as_str(), told["vcs:revision"].len()), ("sub", 40));

    let Some(theirs) = build("theirs") else {
        eprintln!("docker-buildx is absent: nothing was compared with it");
        return;
    };
    let keys = |value: &serde_json::Value| -> Vec<String> {
        value.as_object().unwrap().keys().cloned().collect()
    };
    assert_eq!(keys(&ours), keys(&theirs), "{ours}\n{theirs}");
    for key in ["materials", "builder", "buildType"] {
        assert_eq!(provenance[key], theirs["buildx.build.provenance"][key], "{key}");
    }
    let shorts = |value: &serde_json::Value| -> Vec<serde_json::Value> {
        let list = value["buildx.build.warnings"].as_array().unwrap();
        list.iter().map(|w| w["short"].clone()).collect()
    };
    assert_eq!(shorts(&ours), shorts(&theirs));
    let id = theirs["buildx.build.ref"].as_str().unwrap().rsplit('/').next().unwrap();
    let vcs = |attrs: &std::collections::BTreeMap<String, String>| {
        let vcs = attrs.iter().filter(|(key, _)| key.starts_with("vcs:"));
        vcs.map(|(k, v)| (k.clone(), v.clone())).collect::<Vec<_>>()
    };
    assert_eq!(vcs(&told), vcs(&attrs(id)));
}
