//! Digests of known graphs, as BuildKit's Go client (v0.32-dev, 2026) marshals them (row
//! `llb.digest`).
#![allow(clippy::unwrap_used)]

use shipway_llb::*;
use shipway_oci::{Digest, Platform};
use std::collections::BTreeMap;

fn options() -> MarshalOptions {
    // The reference was asked with all of its capabilities.
    let caps = caps::LLB.iter().chain(caps::LLB_MISSING).copied().collect();
    MarshalOptions {
        platform: Platform::new("linux", "amd64", ""),
        caps: Some(caps),
        local_unique_id: "uid".into(),
    }
}

fn base() -> State {
    State::image(
        "docker.io/library/busybox:latest",
        "",
        BTreeMap::new(),
        VertexOptions::named("base"),
    )
}

fn local() -> State {
    let attrs = [
        (attr::LOCAL_SESSION, "sess"),
        (attr::LOCAL_EXCLUDE_PATTERNS, r#"["a","b"]"#),
        (attr::LOCAL_SHARED_KEY_HINT, "k"),
        (attr::LOCAL_FOLLOW_PATHS, r#"["x"]"#),
    ];
    State::local(
        "context",
        attrs.map(|(k, v)| (k.into(), v.into())).into(),
        VertexOptions::default(),
    )
}

fn run() -> State {
    let mount = |target: &str, source: MountSource| MountDraft {
        target: target.into(),
        source,
        ..MountDraft::default()
    };
    let draft = ExecDraft {
        args: ["sh", "-c", "true"].map(String::from).into(),
        mounts: vec![
            MountDraft {
                readonly: true,
                selector: "/x".into(),
                ..mount("/src", MountSource::State(local()))
            },
            mount(
                "/cache",
                MountSource::Cache {
                    id: "id".into(),
                    sharing: CacheSharing::Locked,
                    base: State::scratch(),
                },
            ),
            mount("/tmp", MountSource::Tmpfs(100)),
            MountDraft { no_output: true, ..mount("/bb", MountSource::State(base())) },
        ],
        secrets: vec![
            SecretDraft {
                id: "s".into(),
                target: Some("/run/secrets/s".into()),
                uid: 1,
                gid: 2,
                mode: 0o400,
                optional: true,
                ..SecretDraft::default()
            },
            SecretDraft {
                id: "e".into(),
                env: Some("E".into()),
                mode: 0o400,
                ..SecretDraft::default()
            },
        ],
        ssh: vec![SshDraft { id: "default".into(), mode: 0o600, ..SshDraft::default() }],
        extra_hosts: vec![HostIp { host: "hh".into(), ip: "1.2.3.4".into() }],
        ulimits: vec![Ulimit { name: "nofile".into(), soft: 1, hard: 2 }],
        cgroup_parent: "cg".into(),
        network: Some(NetMode::Host),
        security: Some(SecurityMode::Insecure),
        proxy: Some(ProxyEnv { http: "p".into(), ..ProxyEnv::default() }),
        ..ExecDraft::default()
    };
    base()
        .add_env("A", "1")
        .add_env("B", "2")
        .add_env("A", "3")
        .with_dir("/w")
        .with_user("me")
        .with_hostname("h")
        .run(draft, VertexOptions::default().ignore_cache())
}

fn files() -> State {
    let draft = FileDraft::new()
        .mkdir(FileMkdir {
            path: "d/e".into(),
            mode: 0o755,
            make_parents: true,
            owner: Some(Chown::parse("me:7")),
            ..FileMkdir::default()
        })
        .mkfile(FileMkfile {
            path: "f".into(),
            mode: 0o600,
            data: "hi".into(),
            timestamp: Some(5_000_000_000),
            ..FileMkfile::default()
        })
        .copy(
            &local(),
            FileCopy {
                src: "a/*".into(),
                dest: "dst/".into(),
                follow_symlink: true,
                dir_copy_contents: true,
                attempt_unpack: true,
                create_dest_path: true,
                allow_wildcard: true,
                allow_empty_wildcard: true,
                exclude_patterns: vec!["z".into()],
                owner: Some(Chown::parse("root")),
                ..FileCopy::default()
            },
        )
        .copy(
            &base(),
            FileCopy {
                src: "/bin".into(),
                dest: "/x".into(),
                mode: Some(0o644),
                ..FileCopy::default()
            },
        )
        .symlink(FileSymlink {
            oldpath: "/a".into(),
            newpath: "/b".into(),
            ..FileSymlink::default()
        })
        .rm(FileRm { path: "gone".into(), allow_not_found: true, ..FileRm::default() });
    run().with_dir("/w").file(draft, VertexOptions::named("files"))
}

#[track_caller]
fn check(name: &str, state: State, vertex: &str, terminal: &str) {
    let definition = state.marshal(&options()).unwrap();
    let digests: Vec<String> = definition.ops.iter().map(|op| Digest::of(op).hex()).collect();
    assert_eq!(digests[digests.len() - 2..], [vertex.to_owned(), terminal.to_owned()], "{name}");
    // What we marshal we also read, and the capabilities are known.
    let graph =
        Graph::decode(&definition, options().caps.as_ref().unwrap(), &options().platform).unwrap();
    assert_eq!(graph.vertex(graph.result).digest.hex(), vertex);
    let back = Definition::decode(&definition.encode()).unwrap();
    assert_eq!(back, definition, "{name}");
}

#[test]
fn graphs_marshal_as_the_reference_does() {
    check(
        "image",
        base(),
        "e1432b8e2054abb034451c15f0a8ad49d07f5892ca266016226fec77e95d20a0",
        "ed184c8ee1441a77d21fb2e07c870c7dca33c5e9b47f5033e4d70507d8c1f8c7",
    );
    check(
        "local",
        local(),
        "94ef5fe43da712abdc46476145011f1fedc533ae35961e1fd17a96b40705f3cf",
        "bed0f43a85c1d1809e307eb181c20861a354906a57efd0bd92706de885bb313a",
    );
    check(
        "local without session",
        State::local("context", BTreeMap::new(), VertexOptions::default()),
        "01b5cda8a67cc22749d42b510b25da0941cf38e65ad73abc6e321851cb2c4b20",
        "05c5a9321f6c2bbc8a536c2850f8cdddc86c3e1213fee3182f39d871d4f70202",
    );
    check(
        "run",
        run(),
        "af4d047255b1df66c2a45a1efa35f77e9e58d2aac72807831a217e0e03036058",
        "e807fa51b51044b5599267da15257900ba24d197445281f7c1dd1fc201cda245",
    );
    check(
        "file",
        files(),
        "d042790d79c51241598e8d96dd53f951066162c336d9f692a1660fb9638c3b3d",
        "5d13f6286a4aa2cbd48011e6d38af58a82566b35c711e57ab1820d5b612f839a",
    );
    let bob = FileMkfile {
        path: "/a".into(),
        mode: 0o644,
        data: "x".into(),
        owner: Some(Chown::parse("bob")),
        ..FileMkfile::default()
    };
    check(
        "file on scratch",
        State::scratch().file(FileDraft::new().mkfile(bob), VertexOptions::default()),
        "284e182ce1e38ac809b083dc7c981ee990a2057ae1cebe895458e5f0b427a353",
        "d02b058a9d3b4909fdefd4d7c6f6e9650e4376bd24a1a2f37dd1bf1431eaac21",
    );
    check(
        "merge",
        State::merge(&[base(), files(), State::scratch()], VertexOptions::default()),
        "c478a02b68ab1e2937a24c109fa30fcf3c5014ebe8a7cd5300e609e5e093db59",
        "aa7171bec2aee5f75c2c1280fb11421a0704f66a325041aaa23d61e8c7c485f1",
    );
    check(
        "diff",
        State::diff(&base(), &files(), VertexOptions::default()),
        "6006b03b7c885a8a6f8b085f0cbdff91e4bce01ad58dd234bae06f75ba195eab",
        "ddc26617aa0ca200e43b6694f7d2278ded5cac8c869eee1965c5c107a4270b5d",
    );
    check(
        "passthrough",
        files().requires("r", &[base()], VertexOptions::default()),
        "92b12fb4428adabf1f316697ef220a7d39001139bb47dd577486461e6135e6b5",
        "0caf89013ad645c83fb6b4271c59e6f973fe61883e64e9ce1beef5cacb244458",
    );
}

#[test]
fn capabilities_and_names_follow_the_reference() {
    let definition = run().marshal(&options()).unwrap();
    let caps = |i: usize| {
        let digest = Digest::of(&definition.ops[i]).to_string();
        definition.metadata[&digest].caps.iter().cloned().collect::<Vec<_>>().join(" ")
    };
    assert_eq!(
        caps(2),
        "exec.meta.base exec.meta.network exec.meta.proxyenv exec.meta.security exec.meta.setsdefaultpath exec.meta.ulimit \
         exec.mount.bind exec.mount.cache exec.mount.cache.sharing exec.mount.secret exec.mount.selector exec.mount.ssh \
         exec.mount.tmpfs exec.mount.tmpfs.size exec.secretenv"
    );
    assert_eq!(caps(3), "constraints meta.description meta.ignorecache platform");
    let graph = Graph::decode(
        &files().marshal(&options()).unwrap(),
        &options().caps.unwrap(),
        &options().platform,
    )
    .unwrap();
    let names: Vec<&str> = graph.vertices.iter().map(|v| v.name.as_str()).collect();
    assert_eq!(names, ["base", "local://context", "sh -c true", "files"]);
}

#[test]
fn deferred_states_are_followed() {
    let context = Deferred::default();
    let copy = FileCopy { src: "/a".into(), dest: "/b".into(), ..FileCopy::default() };
    let state = State::scratch()
        .file(FileDraft::new().copy(&context.state(), copy.clone()), VertexOptions::default());
    assert!(state.marshal(&options()).is_err());
    context.decide(local());
    let direct =
        State::scratch().file(FileDraft::new().copy(&local(), copy), VertexOptions::default());
    assert_eq!(state.marshal(&options()).unwrap().ops, direct.marshal(&options()).unwrap().ops);
}

#[test]
fn long_chains_neither_marshal_nor_drop_by_recursion() {
    let mut state = base();
    for i in 0..50_000 {
        let mkdir = FileMkdir { path: format!("/{i}"), ..FileMkdir::default() };
        state = state.file(FileDraft::new().mkdir(mkdir), VertexOptions::default());
    }
    let definition = state.marshal(&options()).unwrap();
    let graph = Graph::decode(&definition, &options().caps.unwrap(), &options().platform).unwrap();
    assert_eq!(graph.vertices.len(), 50_001);
}

#[test]
fn finished_definitions_keep_their_digests_as_parts_of_others() {
    let part = run().marshal(&options()).unwrap();
    let copy = FileCopy { src: "/a".into(), dest: "/b".into(), ..FileCopy::default() };
    let on = |state: &State| {
        let draft = FileDraft::new().copy(state, copy.clone());
        State::scratch().file(draft, VertexOptions::default()).marshal(&options()).unwrap()
    };
    let (whole, direct) = (on(&State::from_definition(&part).unwrap()), on(&run()));
    assert_eq!(whole, direct);
}
