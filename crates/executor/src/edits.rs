//! What a device of the host changes in a runtime specification (row `exec.cdi`): crate `cdi` reads
//! it from files, the specification's builder makes it.

use oci_spec::runtime::{
    self, Hooks, Linux, LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, LinuxIntelRdt,
    LinuxNetDevice, Mount, Process, User,
};

/// Changes of one or several devices, in the order in which they are made. Those of mounts are made
/// with the process's other mounts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Edits {
    /// Variables, `NAME=value`; they win over the process's own.
    pub env: Vec<String>,
    /// Device nodes, each with its permission to be used.
    pub nodes: Vec<DeviceNode>,
    /// Network interfaces of the host that move into the container: name there, name inside.
    pub interfaces: Vec<(String, String)>,
    /// Mounts; the source is a path of the host.
    pub mounts: Vec<Mount>,
    /// Programs of the host that the runtime runs.
    pub hooks: Vec<Hook>,
    /// Intel's resource director.
    pub rdt: Option<LinuxIntelRdt>,
    /// Additional groups of the process.
    pub groups: Vec<u32>,
}

/// A device node, fully known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceNode {
    /// Absolute path in the container.
    pub path: String,
    /// Block device, character device or FIFO.
    pub kind: LinuxDeviceType,
    /// Major number.
    pub major: i64,
    /// Minor number.
    pub minor: i64,
    /// Permissions; `None` is the runtime's default.
    pub mode: Option<u32>,
    /// Owner; `None` is the process's user.
    pub uid: Option<u32>,
    /// Group; `None` is the process's.
    pub gid: Option<u32>,
    /// What the process may do with it: any of `r`, `w`, `m`.
    pub access: String,
}

/// A program that the runtime runs at some point of the container's life.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hook {
    /// When.
    pub when: HookPoint,
    /// Absolute path on the host.
    pub path: String,
    /// Arguments, the name of the program first.
    pub args: Vec<String>,
    /// Its environment, `NAME=value`.
    pub env: Vec<String>,
    /// Seconds it may take.
    pub timeout: Option<i64>,
}

/// A point of a container's life at which hooks run; what each means is in the runtime
/// specification.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum HookPoint {
    Prestart,
    #[default]
    CreateRuntime,
    CreateContainer,
    StartContainer,
    Poststart,
    Poststop,
}

impl HookPoint {
    /// The point with the specification's name, such as `createContainer`.
    pub fn of(name: &str) -> Option<Self> {
        Some(match name {
            "prestart" => Self::Prestart,
            "createRuntime" => Self::CreateRuntime,
            "createContainer" => Self::CreateContainer,
            "startContainer" => Self::StartContainer,
            "poststart" => Self::Poststart,
            "poststop" => Self::Poststop,
            _ => return None,
        })
    }
}

impl Edits {
    /// Changes of the process itself.
    pub(crate) fn apply_to_process(&self, process: &mut Process) {
        let mut env = process.env().clone().unwrap_or_default();
        self.env.iter().for_each(|variable| set_variable(&mut env, variable));
        process.set_env(Some(env));
        let groups = process.user_mut().additional_gids_mut();
        for group in &self.groups {
            let known = groups.as_ref().is_some_and(|all| all.contains(group));
            if *group != 0 && !known {
                groups.get_or_insert_default().push(*group);
            }
        }
    }

    /// Changes of what surrounds a process that runs as `user`, but for mounts.
    pub(crate) fn apply_to_linux(&self, linux: &mut Linux, user: &User) {
        for node in &self.nodes {
            node.apply(linux, user);
        }
        for (outside, inside) in &self.interfaces {
            let mut device = LinuxNetDevice::default();
            device.set_name(Some(inside.clone()));
            linux.net_devices_mut().get_or_insert_default().insert(outside.clone(), device);
        }
        if let Some(rdt) = &self.rdt {
            linux.set_intel_rdt(Some(rdt.clone()));
        }
    }

    /// All hooks, each list in the given order; `None` if there are none.
    #[allow(deprecated, reason = "prestart hooks are still in files of devices")]
    pub(crate) fn hooks(&self) -> Option<Hooks> {
        let mut hooks = Hooks::default();
        for hook in &self.hooks {
            let list = match hook.when {
                HookPoint::Prestart => hooks.prestart_mut(),
                HookPoint::CreateRuntime => hooks.create_runtime_mut(),
                HookPoint::CreateContainer => hooks.create_container_mut(),
                HookPoint::StartContainer => hooks.start_container_mut(),
                HookPoint::Poststart => hooks.poststart_mut(),
                HookPoint::Poststop => hooks.poststop_mut(),
            };
            list.get_or_insert_default().push(hook.typed());
        }
        (!self.hooks.is_empty()).then_some(hooks)
    }
}

impl Hook {
    fn typed(&self) -> runtime::Hook {
        let mut hook = runtime::Hook::default();
        hook.set_path(self.path.clone().into())
            .set_args(Some(self.args.clone()))
            .set_env(Some(self.env.clone()))
            .set_timeout(self.timeout);
        hook
    }
}

/// Takes the place of the last variable of the same name, or goes to the end.
fn set_variable(env: &mut Vec<String>, variable: &str) {
    let name = variable.split('=').next().unwrap_or_default();
    let same = |v: &String| v.strip_prefix(name).is_some_and(|rest| rest.starts_with('='));
    match env.iter_mut().rev().find(|v| same(v)) {
        Some(old) => *old = variable.to_owned(),
        None => env.push(variable.to_owned()),
    }
}

impl DeviceNode {
    fn apply(&self, linux: &mut Linux, user: &User) {
        let own = |id: u32| (id != 0).then_some(id);
        let mut device = LinuxDevice::default();
        device
            .set_path(self.path.clone().into())
            .set_typ(self.kind)
            .set_major(self.major)
            .set_minor(self.minor)
            .set_file_mode(self.mode)
            .set_uid(self.uid.or(own(user.uid())))
            .set_gid(self.gid.or(own(user.gid())));
        let devices = linux.devices_mut().get_or_insert_default();
        devices.retain(|d| d.path() != device.path());
        devices.push(device);
        if matches!(self.kind, LinuxDeviceType::B | LinuxDeviceType::C) {
            let mut rule = LinuxDeviceCgroup::default();
            rule.set_allow(true)
                .set_typ(Some(self.kind))
                .set_major(Some(self.major))
                .set_minor(Some(self.minor))
                .set_access(Some(self.access.clone()));
            let resources = linux.resources_mut().get_or_insert_default();
            resources.devices_mut().get_or_insert_default().push(rule);
        }
    }
}
