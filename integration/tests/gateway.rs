//! The gateway, as debuggers of builds and frontends out of images use it: containers over states,
//! also over those of a step that failed.

#![allow(clippy::unwrap_used)]

use prost::Message as _;
use shipway_fault::Detail;
use shipway_grpc::fault_of;
use shipway_integration::{any, build_text, containers_go, on_each};
use shipway_llb::{
    Definition, ExecDraft, FileDraft, FileMkfile, MarshalOptions, State, VertexOptions,
};
use shipway_oci::Platform;
use shipway_proto::{
    moby::buildkit::v1::{
        self as api,
        control_client::ControlClient,
        frontend::{self as wire, exec_message::Input, llb_bridge_client::LlbBridgeClient},
    },
    pb,
};
use shipway_testkit::{Lab, LabOptions};
use std::{collections::BTreeMap, time::Duration};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Streaming, transport::Channel};

const BUILD: &str = "gateway-test";

/// A request of the build.
fn of_build<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("buildkit-controlapi-buildid", BUILD.parse().unwrap());
    request
}

fn definition(state: &State) -> pb::Definition {
    let options =
        MarshalOptions { platform: Platform::host(), caps: None, local_unique_id: String::new() };
    Definition::to_pb(&state.marshal(&options).unwrap())
}

/// 128 random bits as 25 digits of base 36, which name no build.
fn is_unguessable(id: &str) -> bool {
    id.len() == 25 && id.chars().all(|c| c.is_ascii_digit() || c.is_ascii_lowercase())
}

/// A build that a client drives, until `drive` is done with it.
fn driven<F: Future<Output = ()>>(lab: &Lab, drive: impl FnOnce(LlbBridgeClient<Channel>) -> F) {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let work = async {
        let channel =
            shipway_grpc::dial(&lab.daemon_address().parse().unwrap(), None).await.unwrap();
        let mut control = ControlClient::new(channel.clone());
        let building = shipway_task::spawn("test", async move {
            control.solve(api::SolveRequest { r#ref: BUILD.into(), ..Default::default() }).await
        });
        let mut bridge = LlbBridgeClient::new(channel);
        drive(bridge.clone()).await;
        bridge
            .r#return(of_build(wire::ReturnRequest {
                result: Some(wire::Result::default()),
                error: None,
            }))
            .await
            .unwrap();
        building.await.unwrap().unwrap();
    };
    runtime.block_on(async { tokio::time::timeout(Duration::from_secs(120), work).await }).unwrap();
}

/// A definition whose result is what the graph in the only file of `input` makes.
fn nested(input: &State) -> pb::Definition {
    let mut outer = definition(input);
    let last = pb::Op::decode(&**outer.def.last().unwrap()).unwrap();
    let build = pb::BuildOp {
        builder: -1,
        inputs: [("buildkit.llb.definition".to_owned(), pb::BuildInput { input: 0 })].into(),
        ..Default::default()
    };
    let build = pb::Op { op: Some(pb::op::Op::Build(build)), ..last.clone() }.encode_to_vec();
    let input = pb::Input { digest: shipway_oci::Digest::of(&build).to_string(), index: 0 };
    *outer.def.last_mut().unwrap() = build;
    outer.def.push(pb::Op { inputs: vec![input], ..Default::default() }.encode_to_vec());
    outer
}

/// A state whose only file has `definition`.
fn written(definition: &pb::Definition) -> State {
    let file = FileMkfile {
        path: "/buildkit.llb.definition".into(),
        mode: 0o644,
        data: definition.encode_to_vec().into(),
        ..Default::default()
    };
    State::scratch().file(FileDraft::new().mkfile(file), Default::default())
}

fn solve(definition: pb::Definition) -> Request<wire::SolveRequest> {
    of_build(wire::SolveRequest {
        definition: Some(definition),
        evaluate: true,
        allow_result_return: true,
        ..Default::default()
    })
}

/// A stream of processes.
struct Processes {
    to: mpsc::Sender<wire::ExecMessage>,
    from: Streaming<wire::ExecMessage>,
}

impl Processes {
    async fn open(bridge: &mut LlbBridgeClient<Channel>) -> Self {
        let (to, queue) = mpsc::channel(16);
        let from =
            bridge.exec_process(of_build(ReceiverStream::new(queue))).await.unwrap().into_inner();
        Self { to, from }
    }

    async fn tell(&self, process: &str, input: Input) {
        self.to
            .send(wire::ExecMessage { process_id: process.into(), input: Some(input) })
            .await
            .unwrap();
    }

    async fn start(&self, process: &str, args: &[&str], tty: bool) {
        self.start_in("c", process, args, tty).await;
    }

    async fn start_in(&self, container: &str, process: &str, args: &[&str], tty: bool) {
        let meta = pb::Meta {
            args: args.iter().map(|a| (*a).to_owned()).collect(),
            cwd: "/".into(),
            ..Default::default()
        };
        let init = wire::InitMessage {
            container_id: container.into(),
            meta: Some(meta),
            fds: vec![0, 1, 2],
            tty,
            ..Default::default()
        };
        self.tell(process, Input::Init(init)).await;
    }

    async fn say(&self, process: &str, data: &str, eof: bool) {
        self.tell(process, Input::File(wire::FdMessage { fd: 0, eof, data: data.into() })).await;
    }

    /// What is said until a process has ended: its output, and its exit code.
    async fn end_of(&mut self, process: &str) -> (String, u32) {
        let (mut said, mut code) = (String::new(), None);
        while let Some(message) = self.from.message().await.unwrap() {
            match message.input {
                Some(Input::File(file)) if message.process_id == process => {
                    said.push_str(&String::from_utf8_lossy(&file.data))
                }
                Some(Input::Exit(exit)) if message.process_id == process => code = Some(exit.code),
                Some(Input::Done(_)) if message.process_id == process => break,
                _ => {}
            }
        }
        (said, code.unwrap())
    }
}

async fn enter_a_failed_step(lab: &Lab) {
    let channel = shipway_grpc::dial(&lab.daemon_address().parse().unwrap(), None).await.unwrap();
    let mut control = ControlClient::new(channel.clone());
    let building = shipway_task::spawn("test", async move {
        control.solve(api::SolveRequest { r#ref: BUILD.into(), ..Default::default() }).await
    });
    let mut bridge = LlbBridgeClient::new(channel);

    let busybox =
        State::image("docker.io/library/busybox:latest", "", BTreeMap::new(), Default::default());
    let step = ["sh", "-c", "echo half > /done && exit 9"].map(str::to_owned).to_vec();
    let failing = busybox.run(
        ExecDraft { args: step, ..ExecDraft::default() },
        VertexOptions::named("a step that fails"),
    );
    let solve = wire::SolveRequest {
        definition: Some(definition(&failing)),
        evaluate: true,
        allow_result_return: true,
        ..Default::default()
    };
    let fault = fault_of(&bridge.solve(of_build(solve)).await.unwrap_err());
    let mounts = fault.details().iter().find_map(|d| match d {
        Detail::Solve { mount_ids, .. } => Some(mount_ids.clone()),
        _ => None,
    });
    let [root] = mounts.unwrap().try_into().unwrap();
    assert!(is_unguessable(&root), "{root}");
    let described =
        fault.details().iter().any(|d| matches!(d, Detail::Solve { description, .. } if description.contains_key("llb.customname")));
    assert!(described, "{:?}", fault.details());

    let mount = pb::Mount { dest: "/".into(), result_id: root, ..Default::default() };
    for container in ["c", "d"] {
        let asked = wire::NewContainerRequest {
            container_id: container.into(),
            mounts: vec![mount.clone()],
            ..Default::default()
        };
        bridge.new_container(of_build(asked)).await.unwrap();
    }
    let mut processes = Processes::open(&mut bridge).await;

    // The first process has a terminal, others join it.
    processes.start("shell", &["sh"], true).await;
    processes.start("cat", &["cat", "/done", "-"], false).await;
    processes.say("cat", "and more", true).await;
    assert_eq!(processes.end_of("cat").await, ("half\nand more".into(), 0));
    processes.start("missing", &["no-such-program"], false).await;
    assert_eq!(processes.end_of("missing").await.1, 255);
    processes.tell("shell", Input::Resize(wire::ResizeMessage { rows: 33, cols: 77 })).await;
    processes.start("sleep", &["sleep", "1000"], false).await;
    processes.tell("sleep", Input::Signal(wire::SignalMessage { name: "KILL".into() })).await;
    assert_eq!(processes.end_of("sleep").await.1, 137);
    processes.say("shell", "stty size; test -t 0; exit 5$?\n", false).await;
    let (said, code) = processes.end_of("shell").await;
    assert!(said.contains("33 77"), "{said}");
    assert_eq!(code, 50);

    let read = wire::ReadFileRequest {
        r#ref: "c".into(),
        file_path: "/done".into(),
        ..Default::default()
    };
    assert_eq!(
        bridge.read_file_container(of_build(read)).await.unwrap().into_inner().data,
        b"half\n"
    );
    bridge
        .release_container(of_build(wire::ReleaseContainerRequest { container_id: "c".into() }))
        .await
        .unwrap();
    // A container that still runs something says so when it is given back.
    processes.start_in("d", "left", &["sleep", "1000"], false).await;
    while !matches!(processes.from.message().await.unwrap().unwrap().input, Some(Input::Started(_)))
    {
    }
    let left = bridge
        .release_container(of_build(wire::ReleaseContainerRequest { container_id: "d".into() }))
        .await;
    assert!(fault_of(&left.unwrap_err()).is_cancelled());
    let scratch = wire::ReturnRequest { result: Some(wire::Result::default()), error: None };
    bridge.r#return(of_build(scratch)).await.unwrap();
    building.await.unwrap().unwrap();
}

#[test]
fn a_failed_step_can_be_entered() {
    let lab = Lab::complete(any());
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime
        .block_on(async {
            tokio::time::timeout(Duration::from_secs(60), enter_a_failed_step(&lab)).await
        })
        .unwrap();
    // Nothing stays of the container.
    containers_go(&lab, Duration::from_secs(20));
}

#[test]
fn a_frontend_out_of_an_image_says_why_it_failed() {
    let lab = Lab::complete(any());
    let name = format!("{}/front:1", lab.registry());
    let text = "FROM busybox\nENTRYPOINT [\"sh\", \"-c\", \"echo I am no frontend >&2; exit 4\"]\n";
    let context = lab.context("front", &[("Dockerfile", text)]);
    shipway_integration::build(&lab, &name, &context, &["--push"]).ok();
    let failed =
        build_text(&lab, "with-front:1", &format!("# syntax={name}\nFROM busybox\n")).failed();
    for word in ["run the frontend", "exit code: 4", "I am no frontend"] {
        assert!(failed.all().contains(word), "{word}: {}", failed.all());
    }
}

#[test]
fn a_graph_can_be_built_and_then_solved() {
    on_each(|flavour| {
        let lab = Lab::complete(flavour);
        driven(&lab, async |mut bridge| {
            let busybox = State::image(
                "docker.io/library/busybox:latest",
                "",
                BTreeMap::new(),
                Default::default(),
            );
            let step = ["sh", "-c", "echo inner > /made"].map(str::to_owned).to_vec();
            let inner = definition(
                &busybox.run(ExecDraft { args: step, ..ExecDraft::default() }, Default::default()),
            );
            // Twice, one inside the other.
            let outer = nested(&written(&nested(&written(&inner))));
            let result = bridge.solve(solve(outer)).await.unwrap().into_inner().result.unwrap();
            let Some(wire::result::Result::RefDeprecated(id)) = result.result else {
                panic!("{result:?}")
            };
            assert!(is_unguessable(&id), "{id}");
            let read = |r#ref: &str| {
                of_build(wire::ReadFileRequest {
                    r#ref: r#ref.into(),
                    file_path: "/made".into(),
                    ..Default::default()
                })
            };
            assert_eq!(bridge.read_file(read(&id)).await.unwrap().into_inner().data, b"inner\n");
            assert!(
                fault_of(&bridge.read_file(read(&format!("{BUILD}-0"))).await.unwrap_err())
                    .is_not_found()
            );

            let broken = State::scratch().file(
                FileDraft::new().mkfile(FileMkfile {
                    path: "/buildkit.llb.definition".into(),
                    mode: 0o644,
                    data: "\u{1}x".into(),
                    ..Default::default()
                }),
                Default::default(),
            );
            let fault = fault_of(&bridge.solve(solve(nested(&broken))).await.unwrap_err());
            assert!(
                fault.to_string().contains("read the definition of a build operation"),
                "{fault}"
            );
        });
    });
}

/// A frontend that says what it was told, and fails.
const TELLS: &str = "FROM busybox\nENTRYPOINT [\"sh\", \"-c\", \"echo product $BUILDKIT_EXPORTEDPRODUCT >&2; \
     case $BUILDKIT_WORKERS in *worker.containerd.uuid*) echo labels are told >&2;; esac; \
     echo metadata $(grep -c docker-image /run/config/buildkit/metadata/frontend.bin) >&2; \
     echo x 2>/dev/null > /run/config/buildkit/metadata/x || echo read only >&2; exit 4\"]\n";

#[test]
fn frontends_are_told_what_they_run_on_and_another_may_be_put_in_their_place() {
    let lab = Lab::complete(any());
    let name = format!("{}/front:1", lab.registry());
    let context = lab.context("front", &[("Dockerfile", TELLS)]);
    shipway_integration::build(&lab, &name, &context, &["--push"]).ok();
    let failed = build_text(&lab, "told:1", &format!("# syntax={name}\nFROM busybox\n")).failed();
    for words in ["product buildkit", "labels are told", "metadata 1", "read only"] {
        assert!(failed.all().contains(words), "{words}: {}", failed.all());
    }
    // Also the in-house frontend is replaced where the build says so.
    let context = lab.context(
        "replaced",
        &[("Dockerfile", "# syntax=docker/dockerfile:1\nFROM busybox\nRUN true\n")],
    );
    shipway_integration::build(&lab, "ours:1", &context, &[]).ok();
    let other = format!("docker/dockerfile:1=docker-image://{name}");
    let failed =
        shipway_integration::build(&lab, "replaced:1", &context, &["--build-context", &other])
            .failed();
    assert!(failed.all().contains("product buildkit"), "{}", failed.all());
}

#[test]
fn only_frontends_that_the_configuration_allows_run() {
    let mut lab = Lab::start(LabOptions::new(any()));
    lab.start_registry();
    shipway_testkit::BaseImage::busybox().push(&lab.registry(), "library/busybox", "latest");
    let allowed = format!("{}/allowed", lab.registry());
    lab.configure_daemon(&format!("[frontend.\"gateway.v0\"]\n  allowedRepositories = [\"{allowed}\", \"docker/dockerfile\"]\n"));
    lab.start_daemon();
    let context = lab.context("front", &[("Dockerfile", TELLS)]);
    for name in ["allowed:1", "other:1"] {
        shipway_integration::build(
            &lab,
            &format!("{}/{name}", lab.registry()),
            &context,
            &["--push"],
        )
        .ok();
    }
    let with = |front: &str, more: &[&str]| {
        let name = front.replace([':', '/'], "-");
        let context = lab.context(
            &name,
            &[("Dockerfile", &*format!("# syntax={front}\nFROM busybox\nRUN true\n"))],
        );
        shipway_integration::build(&lab, "app:1", &context, more)
    };
    let other = format!("{}/other:1", lab.registry());
    let refused = format!("'{other}' is not an allowed gateway source");
    assert!(with(&format!("{allowed}:1"), &[]).failed().all().contains("product buildkit"));
    with("docker/dockerfile:1", &[]).ok();
    let failed = with(&other, &[]).failed();
    assert!(failed.all().contains(&refused), "{}", failed.all());
    // What is put in the place of an allowed one must be allowed, too.
    let place = format!("{allowed}:1=docker-image://{other}");
    let failed = with(&format!("{allowed}:1"), &["--build-context", &place]).failed();
    assert!(failed.all().contains(&refused), "{}", failed.all());
}
