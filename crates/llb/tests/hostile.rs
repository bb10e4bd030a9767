//! Definitions from outside that must be refused with words, not panics (row `llb.validate`).
#![allow(clippy::unwrap_used)]

use bytes::Bytes;
use shipway_llb::{Caps, Definition, Graph, Op};
use shipway_oci::{Digest, Platform};
use shipway_proto::pb;

use prost::Message;

fn source() -> pb::Op {
    pb::Op {
        op: Some(pb::op::Op::Source(pb::SourceOp {
            identifier: "x://y".into(),
            ..Default::default()
        })),
        ..Default::default()
    }
}

/// A definition of `op` on top of a source, and a terminal.
fn definition(mut op: pb::Op) -> Definition {
    let source = Bytes::from(source().encode_to_vec());
    op.inputs.push(pb::Input { digest: Digest::of(&source).to_string(), index: 0 });
    let op = Bytes::from(op.encode_to_vec());
    let terminal = pb::Op {
        inputs: vec![pb::Input { digest: Digest::of(&op).to_string(), index: 0 }],
        ..Default::default()
    };
    Definition { ops: vec![source, op, terminal.encode_to_vec().into()], ..Default::default() }
}

fn decode(d: &Definition) -> Result<Graph, String> {
    Graph::decode(d, &Caps::llb(), &Platform::new("linux", "amd64", "")).map_err(|e| e.to_string())
}

#[track_caller]
fn refused(op: pb::op::Op, want: &str) {
    let error = decode(&definition(pb::Op { op: Some(op), ..Default::default() })).unwrap_err();
    assert!(error.contains(want), "{error:?} lacks {want:?}");
}

fn exec(f: impl FnOnce(&mut pb::ExecOp)) -> pb::op::Op {
    let mut e = pb::ExecOp {
        meta: Some(pb::Meta { args: vec!["true".into()], cwd: "/".into(), ..Default::default() }),
        mounts: vec![pb::Mount { dest: "/".into(), ..Default::default() }],
        ..Default::default()
    };
    f(&mut e);
    pb::op::Op::Exec(e)
}

fn file(f: impl FnOnce(&mut pb::FileAction)) -> pb::op::Op {
    let rm = pb::FileActionRm { path: "/a".into(), ..Default::default() };
    let mut a = pb::FileAction {
        secondary_input: -1,
        action: Some(pb::file_action::Action::Rm(rm)),
        ..Default::default()
    };
    f(&mut a);
    pb::op::Op::File(pb::FileOp { actions: vec![a] })
}

#[test]
fn sound_operations_pass() {
    for op in [exec(|_| {}), file(|_| {})] {
        assert_eq!(
            decode(&definition(pb::Op { op: Some(op), ..Default::default() }))
                .unwrap()
                .vertices
                .len(),
            2
        );
    }
}

#[test]
fn a_constraint_that_names_a_network_puts_the_process_on_it() {
    let of = |filter: &[&str], network: i32| {
        let filter = filter.iter().map(|f| (*f).to_owned()).collect();
        decode(&definition(pb::Op {
            op: Some(exec(|e| e.network = network)),
            constraints: Some(pb::WorkerConstraints { filter }),
            ..Default::default()
        }))
        .map(|graph| match &graph.vertices[1].op {
            Op::Exec(exec) => exec.named_network.as_ref().map(ToString::to_string),
            other => panic!("{other:?}"),
        })
    };
    assert_eq!(of(&["platform==x", "network==corp"], 0), Ok(Some("corp".into())));
    assert_eq!(of(&["platform==x"], 1), Ok(None));
    for (filter, network, says) in [
        (&["network==corp"][..], 1, "both a network mode and the network corp"),
        (&["network==a", "network==b"], 0, "more than one network"),
        (&["network==a b"], 0, "\"a b\" is not a valid name of a network"),
        (&["network==host"], 0, "\"host\" is not a valid name of a network"),
    ] {
        let error = of(filter, network).unwrap_err();
        assert!(error.contains(says), "{error:?} lacks {says:?}");
    }
}

#[test]
fn broken_operations_are_refused() {
    refused(exec(|e| e.meta = None), "invalid exec op with no meta");
    refused(exec(|e| e.meta.as_mut().unwrap().args.clear()), "invalid exec op with no args");
    refused(exec(|e| e.mounts.clear()), "invalid exec op with no mounts");
    refused(exec(|e| e.mounts[0].dest = "/x".into()), "invalid exec op with no rootfs");
    refused(exec(|e| e.mounts[0].input = 1), "invalid mount input index 1");
    refused(exec(|e| e.mounts[0].input = i64::MIN), "invalid mount input index");
    refused(exec(|e| e.mounts[0].output = i64::MAX), "invalid mount output index");
    refused(exec(|e| e.mounts[0].mount_type = 99), "invalid mount type 99");
    refused(
        exec(|e| e.mounts[0].mount_type = pb::MountType::Cache.into()),
        "missing cache mount options",
    );
    refused(exec(|e| e.network = 7), "invalid network mode 7");
    refused(pb::op::Op::File(pb::FileOp::default()), "invalid file op with no actions");
    refused(file(|a| a.action = None), "invalid file action with no payload");
    refused(file(|a| a.input = 2), "invalid file action input index 2");
    refused(
        pb::op::Op::Diff(pb::DiffOp::default()),
        "invalid diff op with nil lower or upper input",
    );
    refused(
        pb::op::Op::Passthrough(pb::PassthroughOp::default()),
        "invalid passthrough op with no id",
    );
    let pass = pb::PassthroughOp { id: "a".into(), outputs: vec![3] };
    refused(pb::op::Op::Passthrough(pass), "invalid passthrough output input index 3");
}

#[test]
fn broken_containers_are_refused() {
    let sound = || definition(pb::Op { op: Some(exec(|_| {})), ..Default::default() });
    type Spoil = fn(&mut Definition);
    let cases: [(&str, Spoil); 6] = [
        ("invalid empty definition", |d| d.ops.clear()),
        ("invalid LLB with 1 vertexes", |d| drop(d.ops.drain(..2))),
        ("invalid missing input digest", |d| drop(d.ops.remove(0))),
        ("failed to parse llb proto op", |d| d.ops[2] = Bytes::from_static(&[0xff; 9])),
        ("invalid LLB with no inputs on last vertex", |d| d.ops[2] = Bytes::new()),
        ("unknown API capability exec.meta.bass", |d| {
            let digest = Digest::of(&d.ops[1]).to_string();
            d.metadata.entry(digest).or_default().caps.insert("exec.meta.bass".into());
        }),
    ];
    for (want, spoil) in cases {
        let mut d = sound();
        spoil(&mut d);
        let error = decode(&d).unwrap_err();
        assert!(error.contains(want), "{error:?} lacks {want:?}");
    }
}

#[test]
fn random_bytes_never_panic() {
    let seed = definition(pb::Op { op: Some(exec(|_| {})), ..Default::default() });
    let mut x = 0x9e37_79b9_u32;
    for _ in 0..5_000 {
        let mut d = seed.clone();
        let mut op = d.ops[1].to_vec();
        for _ in 0..4 {
            x ^= x << 13;
            x ^= x >> 17;
            x ^= x << 5;
            let at = x as usize % op.len();
            op[at] = (x >> 8) as u8;
        }
        let terminal = pb::Op {
            inputs: vec![pb::Input { digest: Digest::of(&op).to_string(), index: 0 }],
            ..Default::default()
        };
        d.ops[1] = op.into();
        d.ops[2] = terminal.encode_to_vec().into();
        let _ = decode(&d);
    }
}
