//! One operation onto the wire, byte for byte as Go's deterministic encoding has it (row
//! `llb.digest`).

use crate::ops::*;
use bytes::Bytes;
use prost::Message;
use shipway_oci::{Digest, Platform};
use shipway_proto::pb;

/// The bytes of an operation. Go writes `oneof` fields after all others; prost by number. So the
/// payload is appended.
pub fn op(
    inputs: &[(Digest, usize)],
    op: &Op,
    platform: Option<&Platform>,
    constraints: &[String],
) -> Bytes {
    let head = pb::Op {
        inputs: inputs
            .iter()
            .map(|(digest, index)| pb::Input { digest: digest.to_string(), index: *index as i64 })
            .collect(),
        op: None,
        platform: platform.map(|p| pb::Platform {
            architecture: p.architecture.clone(),
            os: p.os.clone(),
            variant: p.variant.clone(),
            os_version: p.os_version.clone(),
            os_features: p.os_features.clone(),
        }),
        constraints: Some(pb::WorkerConstraints { filter: constraints.to_vec() }),
    };
    raw(pb::Op { op: Some(payload(op)), ..head })
}

/// The bytes of an operation that came off the wire.
pub fn raw(mut op: pb::Op) -> Bytes {
    let payload = op.op.take();
    let mut bytes = op.encode_to_vec();
    bytes.extend(pb::Op { op: payload, ..pb::Op::default() }.encode_to_vec());
    bytes.into()
}

/// The bytes of the terminal operation (row `llb.terminal`).
pub fn terminal(digest: Digest, index: usize) -> Bytes {
    let input = pb::Input { digest: digest.to_string(), index: index as i64 };
    pb::Op { inputs: vec![input], ..pb::Op::default() }.encode_to_vec().into()
}

fn index(i: Option<usize>) -> i64 {
    i.map_or(-1, |i| i as i64)
}

fn payload(op: &Op) -> pb::op::Op {
    use pb::op::Op as Wire;
    match op {
        Op::Source(s) => {
            Wire::Source(pb::SourceOp { identifier: s.identifier.clone(), attrs: s.attrs.clone() })
        }
        Op::Exec(e) => Wire::Exec(exec(e)),
        Op::File(f) => {
            Wire::File(pb::FileOp { actions: f.actions.iter().map(file_action).collect() })
        }
        Op::Merge(m) => Wire::Merge(pb::MergeOp {
            inputs: m.inputs.iter().map(|&i| pb::MergeInput { input: index(i) }).collect(),
        }),
        Op::Diff(d) => Wire::Diff(pb::DiffOp {
            lower: Some(pb::LowerDiffInput { input: index(d.lower) }),
            upper: Some(pb::UpperDiffInput { input: index(d.upper) }),
        }),
        Op::Build(b) => Wire::Build(pb::BuildOp {
            builder: index(b.builder),
            inputs: b
                .inputs
                .iter()
                .map(|(k, &i)| (k.clone(), pb::BuildInput { input: index(i) }))
                .collect(),
            def: b.definition.as_deref().and_then(|d| pb::Definition::decode(d).ok()),
            attrs: b.attrs.clone(),
        }),
        Op::Passthrough(p) => Wire::Passthrough(pb::PassthroughOp {
            id: p.id.clone(),
            outputs: p.outputs.iter().map(|&i| i as i64).collect(),
        }),
    }
}

fn exec(e: &ExecOp) -> pb::ExecOp {
    let m = &e.meta;
    let meta = pb::Meta {
        args: m.args.clone(),
        env: m.env.clone(),
        cwd: m.cwd.clone(),
        user: m.user.clone(),
        proxy_env: m.proxy.clone().map(|p| pb::ProxyEnv {
            http_proxy: p.http,
            https_proxy: p.https,
            ftp_proxy: p.ftp,
            no_proxy: p.no,
            all_proxy: p.all,
        }),
        extra_hosts: m
            .extra_hosts
            .iter()
            .map(|h| pb::HostIp { host: h.host.clone(), ip: h.ip.clone() })
            .collect(),
        hostname: m.hostname.clone(),
        ulimit: m
            .ulimits
            .iter()
            .map(|u| pb::Ulimit { name: u.name.clone(), soft: u.soft, hard: u.hard })
            .collect(),
        cgroup_parent: m.cgroup_parent.clone(),
        remove_mount_stubs_recursive: m.remove_mount_stubs_recursive,
        valid_exit_codes: m.valid_exit_codes.clone(),
    };
    let network = match e.network {
        NetMode::Unset => pb::NetMode::Unset,
        NetMode::Host => pb::NetMode::Host,
        NetMode::None => pb::NetMode::None,
    };
    let security = match e.security {
        SecurityMode::Sandbox => pb::SecurityMode::Sandbox,
        SecurityMode::Insecure => pb::SecurityMode::Insecure,
    };
    pb::ExecOp {
        meta: Some(meta),
        mounts: e.mounts.iter().map(mount).collect(),
        network: network.into(),
        security: security.into(),
        secretenv: e
            .secret_env
            .iter()
            .map(|s| pb::SecretEnv { id: s.id.clone(), name: s.name.clone(), optional: s.optional })
            .collect(),
        cdi_devices: e
            .devices
            .iter()
            .map(|d| pb::CdiDevice { name: d.name.clone(), optional: d.optional })
            .collect(),
    }
}

fn mount(m: &Mount) -> pb::Mount {
    let content_cache = match m.content_cache {
        ContentCache::Default => pb::MountContentCache::Default,
        ContentCache::On => pb::MountContentCache::On,
        ContentCache::Off => pb::MountContentCache::Off,
    };
    let mut out = pb::Mount {
        input: index(m.input),
        selector: m.selector.clone(),
        dest: m.dest.clone(),
        output: index(m.output),
        readonly: m.readonly,
        content_cache: content_cache.into(),
        result_id: m.result_id.clone(),
        ..pb::Mount::default()
    };
    match &m.kind {
        MountKind::Bind => {}
        MountKind::Secret(s) => {
            // Go's client leaves the output of secrets and agents at 0.
            out.output = 0;
            out.mount_type = pb::MountType::Secret.into();
            out.secret_opt = Some(pb::SecretOpt {
                id: s.id.clone(),
                uid: s.uid,
                gid: s.gid,
                mode: s.mode,
                optional: s.optional,
            });
        }
        MountKind::Ssh(s) => {
            out.output = 0;
            out.mount_type = pb::MountType::Ssh.into();
            out.ssh_opt = Some(pb::SshOpt {
                id: s.id.clone(),
                uid: s.uid,
                gid: s.gid,
                mode: s.mode,
                optional: s.optional,
            });
        }
        MountKind::Cache(c) => {
            let sharing = match c.sharing {
                CacheSharing::Shared => pb::CacheSharingOpt::Shared,
                CacheSharing::Private => pb::CacheSharingOpt::Private,
                CacheSharing::Locked => pb::CacheSharingOpt::Locked,
            };
            out.mount_type = pb::MountType::Cache.into();
            out.cache_opt = Some(pb::CacheOpt { id: c.id.clone(), sharing: sharing.into() });
        }
        MountKind::Tmpfs { size } => {
            out.mount_type = pb::MountType::Tmpfs.into();
            out.tmpfs_opt = Some(pb::TmpfsOpt { size: *size });
        }
    }
    out
}

fn file_action(a: &FileAction) -> pb::FileAction {
    use pb::file_action::Action;
    let time = |t: Option<i64>| t.unwrap_or(-1);
    let action = match &a.kind {
        FileActionKind::Copy(c) => Action::Copy(pb::FileActionCopy {
            src: c.src.clone(),
            dest: c.dest.clone(),
            owner: chown(&c.owner),
            mode: if c.mode_str.is_empty() { c.mode.map_or(-1, |m| m as i32) } else { 0 },
            follow_symlink: c.follow_symlink,
            dir_copy_contents: c.dir_copy_contents,
            attempt_unpack_docker_compatibility: c.attempt_unpack,
            create_dest_path: c.create_dest_path,
            allow_wildcard: c.allow_wildcard,
            allow_empty_wildcard: c.allow_empty_wildcard,
            timestamp: time(c.timestamp),
            include_patterns: c.include_patterns.clone(),
            exclude_patterns: c.exclude_patterns.clone(),
            always_replace_existing_dest_paths: c.always_replace_existing_dest_paths,
            mode_str: c.mode_str.clone(),
            required_paths: c.required_paths.clone(),
        }),
        FileActionKind::Mkfile(m) => Action::Mkfile(pb::FileActionMkFile {
            path: m.path.clone(),
            mode: m.mode as i32,
            data: m.data.to_vec(),
            owner: chown(&m.owner),
            timestamp: time(m.timestamp),
        }),
        FileActionKind::Mkdir(m) => Action::Mkdir(pb::FileActionMkDir {
            path: m.path.clone(),
            mode: m.mode as i32,
            make_parents: m.make_parents,
            owner: chown(&m.owner),
            timestamp: time(m.timestamp),
        }),
        FileActionKind::Rm(r) => Action::Rm(pb::FileActionRm {
            path: r.path.clone(),
            allow_not_found: r.allow_not_found,
            allow_wildcard: r.allow_wildcard,
        }),
        FileActionKind::Symlink(s) => Action::Symlink(pb::FileActionSymlink {
            oldpath: s.oldpath.clone(),
            newpath: s.newpath.clone(),
            owner: chown(&s.owner),
            timestamp: time(s.timestamp),
        }),
    };
    pb::FileAction {
        input: index(a.input),
        secondary_input: index(a.secondary),
        output: index(a.output),
        action: Some(action),
    }
}

fn chown(c: &Option<Chown>) -> Option<pb::ChownOpt> {
    let owner = |o: &Option<Owner>| {
        o.as_ref().map(|o| pb::UserOpt {
            user: Some(match o {
                Owner::Id(id) => pb::user_opt::User::ById(*id),
                Owner::Name { name, input } => pb::user_opt::User::ByName(pb::NamedUserOpt {
                    name: name.clone(),
                    input: index(*input),
                }),
            }),
        })
    };
    c.as_ref().map(|c| pb::ChownOpt { user: owner(&c.user), group: owner(&c.group) })
}
