//! One operation off the wire: bytes to plain types, with the structural checks of row
//! `llb.validate`.

use crate::ops::*;
use bytes::Bytes;
use prost::Message;
use shipway_fault::Fault;
use shipway_oci::{NetworkName, Platform};
use shipway_proto::pb;

/// More parts of one operation (mounts, actions, arguments) than this are refused.
const MAX_PARTS: usize = 65_536;

/// An operation with what it says about its surroundings.
pub struct Decoded {
    pub op: Op,
    /// Digest text and output index.
    pub inputs: Vec<(String, i64)>,
    pub platform: Option<Platform>,
    pub constraints: Vec<String>,
}

/// The wire form.
pub fn raw(bytes: &[u8]) -> Result<pb::Op, Fault> {
    pb::Op::decode(bytes).map_err(|e| Fault::invalid(format!("failed to parse llb proto op: {e}")))
}

/// Reads and checks an operation.
pub fn op(bytes: &[u8]) -> Result<Decoded, Fault> {
    let op = raw(bytes)?;
    let inputs: Vec<(String, i64)> = op.inputs.into_iter().map(|i| (i.digest, i.index)).collect();
    if inputs.len() > MAX_PARTS {
        return Err(invalid(format!("op with {} inputs", inputs.len())));
    }
    let n = Inputs(inputs.len());
    use pb::op::Op as Wire;
    let typed = match op.op {
        Some(Wire::Source(s)) => Op::Source(SourceOp { identifier: s.identifier, attrs: s.attrs }),
        Some(Wire::Exec(e)) => Op::Exec(exec(e, n)?),
        Some(Wire::File(f)) => Op::File(file(f, n)?),
        Some(Wire::Merge(m)) => Op::Merge(MergeOp {
            inputs: m
                .inputs
                .iter()
                .map(|i| n.get("merge input", i.input))
                .collect::<Result<_, _>>()?,
        }),
        Some(Wire::Diff(d)) => {
            let (Some(lower), Some(upper)) = (d.lower, d.upper) else {
                return Err(invalid("diff op with nil lower or upper input"));
            };
            Op::Diff(DiffOp {
                lower: n.get("diff input", lower.input)?,
                upper: n.get("diff input", upper.input)?,
            })
        }
        Some(Wire::Build(b)) => Op::Build(BuildOp {
            builder: n.get("builder", b.builder)?,
            inputs: b
                .inputs
                .into_iter()
                .map(|(k, i)| Ok((k, n.get("build input", i.input)?)))
                .collect::<Result<_, Fault>>()?,
            definition: b.def.map(|d| Bytes::from(d.encode_to_vec())),
            attrs: b.attrs,
        }),
        Some(Wire::Passthrough(p)) => passthrough(p, n)?,
        None => return Err(invalid("op with no payload")),
    };
    let constraints = op.constraints.map(|c| c.filter).unwrap_or_default();
    let typed = match typed {
        Op::Exec(e) => Op::Exec(on_network(e, &constraints)?),
        other => other,
    };
    let platform = op.platform.map(|p| Platform {
        architecture: p.architecture,
        os: p.os,
        os_version: p.os_version,
        os_features: p.os_features,
        variant: p.variant,
    });
    Ok(Decoded { op: typed, inputs, platform, constraints })
}

/// The process on the network that its constraints name.
fn on_network(mut exec: ExecOp, constraints: &[String]) -> Result<ExecOp, Fault> {
    for name in constraints.iter().filter_map(|c| NetworkName::of_constraint(c)) {
        let name = name.map_err(invalid)?;
        if exec.network != NetMode::Unset {
            return Err(invalid(format!(
                "exec op with both a network mode and the network {name}"
            )));
        }
        if exec.named_network.replace(name).is_some() {
            return Err(invalid("exec op with more than one network"));
        }
    }
    Ok(exec)
}

fn invalid(what: impl std::fmt::Display) -> Fault {
    Fault::invalid(format!("invalid {what}"))
}

/// How many inputs there are to index.
#[derive(Clone, Copy)]
struct Inputs(usize);

impl Inputs {
    fn get(self, what: &str, index: i64) -> Result<Option<usize>, Fault> {
        match usize::try_from(index) {
            Ok(i) if i < self.0 => Ok(Some(i)),
            Err(_) if index == -1 => Ok(None),
            _ => Err(invalid(format!("{what} index {index}"))),
        }
    }
}

fn output(what: &str, index: i64) -> Result<Option<usize>, Fault> {
    match usize::try_from(index) {
        Ok(i) if i < MAX_PARTS => Ok(Some(i)),
        Err(_) if index == -1 => Ok(None),
        _ => Err(invalid(format!("{what} output index {index}"))),
    }
}

fn exec(e: pb::ExecOp, n: Inputs) -> Result<ExecOp, Fault> {
    let network = NetMode::from_wire(e.network)?;
    let security = SecurityMode::from_wire(e.security)?;
    let meta = e.meta.ok_or_else(|| invalid("exec op with no meta"))?;
    if meta.args.is_empty() {
        return Err(invalid("exec op with no args"));
    }
    if e.mounts.is_empty() {
        return Err(invalid("exec op with no mounts"));
    }
    if e.mounts.len() > MAX_PARTS {
        return Err(invalid(format!("exec op with {} mounts", e.mounts.len())));
    }
    if !e.mounts.iter().any(|m| m.dest == "/") {
        return Err(invalid("exec op with no rootfs"));
    }
    Ok(ExecOp {
        meta: ExecMeta {
            args: meta.args,
            env: meta.env,
            cwd: meta.cwd,
            user: meta.user,
            proxy: meta.proxy_env.map(|p| ProxyEnv {
                http: p.http_proxy,
                https: p.https_proxy,
                ftp: p.ftp_proxy,
                no: p.no_proxy,
                all: p.all_proxy,
            }),
            extra_hosts: meta
                .extra_hosts
                .into_iter()
                .map(|h| HostIp { host: h.host, ip: h.ip })
                .collect(),
            hostname: meta.hostname,
            ulimits: meta
                .ulimit
                .into_iter()
                .map(|u| Ulimit { name: u.name, soft: u.soft, hard: u.hard })
                .collect(),
            cgroup_parent: meta.cgroup_parent,
            remove_mount_stubs_recursive: meta.remove_mount_stubs_recursive,
            valid_exit_codes: meta.valid_exit_codes,
        },
        mounts: e.mounts.into_iter().map(|m| mount(m, n)).collect::<Result<_, _>>()?,
        network,
        security,
        secret_env: e
            .secretenv
            .into_iter()
            .map(|s| SecretEnv { id: s.id, name: s.name, optional: s.optional })
            .collect(),
        devices: e
            .cdi_devices
            .into_iter()
            .map(|d| CdiDevice { name: d.name, optional: d.optional })
            .collect(),
        named_network: None,
        proxied: false,
    })
}

impl NetMode {
    /// The mode with this number.
    pub fn from_wire(number: i32) -> Result<Self, Fault> {
        match pb::NetMode::try_from(number) {
            Ok(pb::NetMode::Unset) => Ok(Self::Unset),
            Ok(pb::NetMode::Host) => Ok(Self::Host),
            Ok(pb::NetMode::None) => Ok(Self::None),
            Err(_) => Err(invalid(format!("network mode {number}"))),
        }
    }
}

impl SecurityMode {
    /// The mode with this number.
    pub fn from_wire(number: i32) -> Result<Self, Fault> {
        match pb::SecurityMode::try_from(number) {
            Ok(pb::SecurityMode::Sandbox) => Ok(Self::Sandbox),
            Ok(pb::SecurityMode::Insecure) => Ok(Self::Insecure),
            Err(_) => Err(invalid(format!("security mode {number}"))),
        }
    }
}

impl Mount {
    /// A mount of a gateway container: it has no inputs and outputs by number.
    pub fn of_container(mount: pb::Mount) -> Result<Self, Fault> {
        self::mount(pb::Mount { input: -1, output: -1, ..mount }, Inputs(0))
    }
}

fn mount(m: pb::Mount, n: Inputs) -> Result<Mount, Fault> {
    let kind = match pb::MountType::try_from(m.mount_type) {
        Ok(pb::MountType::Bind) => MountKind::Bind,
        Ok(pb::MountType::Secret) => {
            let o = m.secret_opt.ok_or_else(|| invalid("secret mount options"))?;
            MountKind::Secret(SecretMount {
                id: o.id,
                uid: o.uid,
                gid: o.gid,
                mode: o.mode,
                optional: o.optional,
            })
        }
        Ok(pb::MountType::Ssh) => {
            let o = m.ssh_opt.ok_or_else(|| invalid("ssh mount options"))?;
            MountKind::Ssh(SshMount {
                id: o.id,
                uid: o.uid,
                gid: o.gid,
                mode: o.mode,
                optional: o.optional,
            })
        }
        Ok(pb::MountType::Cache) => {
            let o =
                m.cache_opt.ok_or_else(|| invalid("cache mount: missing cache mount options"))?;
            let sharing = match pb::CacheSharingOpt::try_from(o.sharing) {
                Ok(pb::CacheSharingOpt::Shared) => CacheSharing::Shared,
                Ok(pb::CacheSharingOpt::Private) => CacheSharing::Private,
                Ok(pb::CacheSharingOpt::Locked) => CacheSharing::Locked,
                Err(_) => return Err(invalid(format!("cache sharing option: {}", o.sharing))),
            };
            MountKind::Cache(CacheMount { id: o.id, sharing })
        }
        Ok(pb::MountType::Tmpfs) => {
            MountKind::Tmpfs { size: m.tmpfs_opt.map(|o| o.size).unwrap_or_default() }
        }
        Err(_) => return Err(invalid(format!("mount type {} of {}", m.mount_type, m.dest))),
    };
    let content_cache = match pb::MountContentCache::try_from(m.content_cache) {
        Ok(pb::MountContentCache::Default) => ContentCache::Default,
        Ok(pb::MountContentCache::On) => ContentCache::On,
        Ok(pb::MountContentCache::Off) => ContentCache::Off,
        Err(_) => return Err(invalid(format!("content cache option {}", m.content_cache))),
    };
    // Secrets and agents have no state; their output is 0 on the wire, which must not be read as an
    // output.
    let stateless = matches!(kind, MountKind::Secret(_) | MountKind::Ssh(_));
    Ok(Mount {
        input: n.get("mount input", m.input)?,
        selector: m.selector,
        output: if stateless { None } else { output("mount", m.output)? },
        dest: m.dest,
        readonly: m.readonly,
        kind,
        content_cache,
        result_id: m.result_id,
    })
}

fn file(f: pb::FileOp, n: Inputs) -> Result<FileOp, Fault> {
    if f.actions.is_empty() {
        return Err(invalid("file op with no actions"));
    }
    if f.actions.len() > MAX_PARTS {
        return Err(invalid(format!("file op with {} actions", f.actions.len())));
    }
    // The results of actions are numbered after the inputs, in any order: circles are refused
    // when they are run.
    let all = Inputs(n.0 + f.actions.len());
    let actions = f.actions.into_iter().map(|a| file_action(a, all)).collect::<Result<_, _>>()?;
    Ok(FileOp { actions })
}

fn file_action(a: pb::FileAction, n: Inputs) -> Result<FileAction, Fault> {
    use pb::file_action::Action;
    let mode = |mode: i32| mode as u32;
    let time = |t: i64| (t != -1).then_some(t);
    let kind = match a.action.ok_or_else(|| invalid("file action with no payload"))? {
        Action::Copy(c) => FileActionKind::Copy(FileCopy {
            src: c.src,
            dest: c.dest,
            owner: chown(c.owner, n)?,
            mode: (c.mode != -1).then(|| mode(c.mode)),
            mode_str: c.mode_str,
            follow_symlink: c.follow_symlink,
            dir_copy_contents: c.dir_copy_contents,
            attempt_unpack: c.attempt_unpack_docker_compatibility,
            create_dest_path: c.create_dest_path,
            allow_wildcard: c.allow_wildcard,
            allow_empty_wildcard: c.allow_empty_wildcard,
            timestamp: time(c.timestamp),
            include_patterns: c.include_patterns,
            exclude_patterns: c.exclude_patterns,
            always_replace_existing_dest_paths: c.always_replace_existing_dest_paths,
            required_paths: c.required_paths,
        }),
        Action::Mkfile(m) => FileActionKind::Mkfile(FileMkfile {
            path: m.path,
            mode: mode(m.mode),
            data: Bytes::from(m.data),
            owner: chown(m.owner, n)?,
            timestamp: time(m.timestamp),
        }),
        Action::Mkdir(m) => FileActionKind::Mkdir(FileMkdir {
            path: m.path,
            mode: mode(m.mode),
            make_parents: m.make_parents,
            owner: chown(m.owner, n)?,
            timestamp: time(m.timestamp),
        }),
        Action::Rm(r) => FileActionKind::Rm(FileRm {
            path: r.path,
            allow_not_found: r.allow_not_found,
            allow_wildcard: r.allow_wildcard,
        }),
        Action::Symlink(s) => FileActionKind::Symlink(FileSymlink {
            oldpath: s.oldpath,
            newpath: s.newpath,
            owner: chown(s.owner, n)?,
            timestamp: time(s.timestamp),
        }),
    };
    Ok(FileAction {
        input: n.get("file action input", a.input)?,
        secondary: n.get("file action secondary input", a.secondary_input)?,
        output: output("file action", a.output)?,
        kind,
    })
}

fn chown(c: Option<pb::ChownOpt>, n: Inputs) -> Result<Option<Chown>, Fault> {
    let owner = |o: Option<pb::UserOpt>| {
        Ok::<_, Fault>(match o.and_then(|o| o.user) {
            None => None,
            Some(pb::user_opt::User::ById(id)) => Some(Owner::Id(id)),
            Some(pb::user_opt::User::ByName(u)) => {
                Some(Owner::Name { name: u.name, input: n.get("owner input", u.input)? })
            }
        })
    };
    c.map(|c| Ok(Chown { user: owner(c.user)?, group: owner(c.group)? })).transpose()
}

fn passthrough(p: pb::PassthroughOp, n: Inputs) -> Result<Op, Fault> {
    if p.id.is_empty() {
        return Err(invalid("passthrough op with no id"));
    }
    if p.outputs.is_empty() {
        return Err(invalid("passthrough op with no outputs"));
    }
    let output = |&index: &i64| match n.get("passthrough output input", index)? {
        Some(i) => Ok(i),
        None => Err(invalid(format!("passthrough output input index {index}"))),
    };
    Ok(Op::Passthrough(PassthroughOp {
        id: p.id,
        outputs: p.outputs.iter().map(output).collect::<Result<_, Fault>>()?,
    }))
}
