//! The seccomp profile of a sandboxed step: data in `seccomp.txt`, and here the rules that look at
//! arguments.

use oci_spec::runtime::{
    Arch, Capability, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArgBuilder,
    LinuxSeccompOperator, LinuxSyscall,
};

const PROFILE: &str = include_str!("seccomp.txt");
/// Flags of `clone` that make namespaces: `CLONE_NEWNS`, `_NEWUTS`, `_NEWIPC`, `_NEWUSER`,
/// `_NEWPID`, `_NEWNET` and `_NEWCGROUP`.
const NAMESPACE_FLAGS: u64 = 0x7E02_0000;
const ENOSYS: u32 = 38;
const EPERM: u32 = 1;
/// `AF_VSOCK` reaches the hypervisor; 39 sits between it and the families after.
const AF_ALG: u64 = 38;
const AF_VSOCK: u64 = 40;

fn rule(names: &[&str], action: LinuxSeccompAction) -> LinuxSyscall {
    let mut rule = LinuxSyscall::default();
    rule.set_names(names.iter().map(|n| (*n).to_owned()).collect()).set_action(action);
    rule
}

fn allow(names: &[&str]) -> LinuxSyscall {
    rule(names, LinuxSeccompAction::ScmpActAllow)
}

/// Allows call `name` if argument `index` compares to `value` as `op` says.
fn allow_if(name: &str, index: usize, op: LinuxSeccompOperator, value: u64) -> LinuxSyscall {
    let mut arg = LinuxSeccompArgBuilder::default().index(index).op(op).value(value);
    if op == LinuxSeccompOperator::ScmpCmpMaskedEq {
        // For this operator `value` is the mask, and the masked argument has to be zero.
        arg = arg.value_two(0_u64);
    }
    let mut rule = allow(&[name]);
    rule.set_args(Some(vec![arg.build().expect("every field has a default")]));
    rule
}

/// Whether a section's header applies to machine `arch` (Go's name) and a process with `caps`.
fn applies(header: &str, arch: &str, caps: &[Capability]) -> bool {
    let mut words = header.split_whitespace();
    match words.next() {
        Some("always") => true,
        Some("arch") => words.any(|w| w == arch),
        Some("cap") => words.any(|w| caps.iter().any(|c| format!("CAP_{c}") == w)),
        _ => false,
    }
}

fn architectures(arch: &str) -> &'static [Arch] {
    match arch {
        // Not x32, which kernels are built without: every architecture costs each step milliseconds
        // of compiling the filter.
        "amd64" => &[Arch::ScmpArchX86_64, Arch::ScmpArchX86],
        "arm64" => &[Arch::ScmpArchAarch64, Arch::ScmpArchArm],
        "s390x" => &[Arch::ScmpArchS390x, Arch::ScmpArchS390],
        "riscv64" => &[Arch::ScmpArchRiscv64],
        "ppc64le" => &[Arch::ScmpArchPpc64le],
        _ => &[],
    }
}

/// The profile for machine `arch` (Go's name) and a process with capabilities `caps` (row
/// `exec.sandbox`).
pub(super) fn profile(arch: &str, caps: &[Capability]) -> LinuxSeccomp {
    use LinuxSeccompOperator::{ScmpCmpEq, ScmpCmpGt, ScmpCmpLt, ScmpCmpMaskedEq};
    let mut rules = Vec::new();
    let (mut included, mut names) = (false, Vec::new());
    for line in PROFILE.lines().filter(|l| !l.starts_with('#')) {
        if let Some(header) = line.strip_prefix('[') {
            if !names.is_empty() {
                rules.push(allow(&std::mem::take(&mut names)));
            }
            included = applies(header.trim_end_matches(']'), arch, caps);
        } else if included {
            names.extend(line.split_whitespace());
        }
    }
    if !names.is_empty() {
        rules.push(allow(&names));
    }
    rules.push(allow_if("socket", 0, ScmpCmpLt, AF_ALG));
    rules.push(allow_if("socket", 0, ScmpCmpEq, AF_ALG + 1));
    rules.push(allow_if("socket", 0, ScmpCmpGt, AF_VSOCK));
    for persona in [0, 0x8, 0x2_0000, 0x2_0008, 0xFFFF_FFFF] {
        rules.push(allow_if("personality", 0, ScmpCmpEq, persona));
    }
    if !caps.contains(&Capability::SysAdmin) {
        let flags_argument = usize::from(arch == "s390x");
        rules.push(allow_if("clone", flags_argument, ScmpCmpMaskedEq, NAMESPACE_FLAGS));
        // C libraries fall back to clone, whose flags can be looked at, only if clone3 does not
        // exist.
        let mut clone3 = rule(&["clone3"], LinuxSeccompAction::ScmpActErrno);
        clone3.set_errno_ret(Some(ENOSYS));
        rules.push(clone3);
    }
    let mut profile = LinuxSeccomp::default();
    profile
        .set_default_action(LinuxSeccompAction::ScmpActErrno)
        .set_default_errno_ret(Some(EPERM))
        .set_architectures(Some(architectures(arch).to_vec()))
        .set_syscalls(Some(rules));
    profile
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_follow_the_machine_and_the_capabilities() {
        let names = |caps: &[Capability]| -> Vec<String> {
            let rules = profile("amd64", caps).syscalls().clone().unwrap_or_default();
            rules.iter().flat_map(|rule| rule.names().clone()).collect()
        };
        let without = names(&[Capability::SysChroot]);
        for (name, expected) in [
            ("chroot", true),
            ("openat2", true),
            ("arch_prctl", true),
            ("mount", false),
            ("bpf", false),
            ("set_tls", false),
        ] {
            assert_eq!(without.iter().any(|n| n == name), expected, "{name}");
        }
        assert!(names(&[Capability::SysAdmin]).iter().any(|n| n == "mount"));
    }
}
