//! The seccomp profile of a sandboxed step: data in `seccomp.txt`, and here the rules that look at
//! arguments.

use serde_json::{Value, json};

const PROFILE: &str = include_str!("seccomp.txt");
/// Flags of `clone` that make namespaces: `CLONE_NEWNS`, `_NEWUTS`, `_NEWIPC`, `_NEWUSER`,
/// `_NEWPID`, `_NEWNET` and `_NEWCGROUP`.
const NAMESPACE_FLAGS: u64 = 0x7E02_0000;
const ENOSYS: u64 = 38;
/// `AF_VSOCK` reaches the hypervisor; 39 sits between it and the families after.
const AF_ALG: u64 = 38;
const AF_VSOCK: u64 = 40;

fn allow(names: &[&str]) -> Value {
    json!({ "names": names, "action": "SCMP_ACT_ALLOW" })
}

fn allow_if(name: &str, index: u32, value: u64, value_two: u64, op: &str) -> Value {
    let mut arg = json!({ "index": index, "value": value, "op": op });
    if value_two != 0 || op == "SCMP_CMP_MASKED_EQ" {
        arg["valueTwo"] = json!(value_two);
    }
    json!({ "names": [name], "action": "SCMP_ACT_ALLOW", "args": [arg] })
}

/// Whether a section's header applies to machine `arch` (Go's name) and a process with `caps`.
fn applies(header: &str, arch: &str, caps: &[&str]) -> bool {
    let mut words = header.split_whitespace();
    match words.next() {
        Some("always") => true,
        Some("arch") => words.any(|w| w == arch),
        Some("cap") => words.any(|w| caps.contains(&w)),
        _ => false,
    }
}

fn architectures(arch: &str) -> &'static [&'static str] {
    match arch {
        // Not x32, which kernels are built without: every architecture costs each step milliseconds
        // of compiling the filter.
        "amd64" => &["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
        "arm64" => &["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"],
        "s390x" => &["SCMP_ARCH_S390X", "SCMP_ARCH_S390"],
        "riscv64" => &["SCMP_ARCH_RISCV64"],
        "ppc64le" => &["SCMP_ARCH_PPC64LE"],
        _ => &[],
    }
}

/// The profile for machine `arch` (Go's name) and a process with capabilities `caps` (row
/// `exec.sandbox`).
pub fn profile(arch: &str, caps: &[&str]) -> Value {
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
    rules.push(allow_if("socket", 0, AF_ALG, 0, "SCMP_CMP_LT"));
    rules.push(allow_if("socket", 0, AF_ALG + 1, 0, "SCMP_CMP_EQ"));
    rules.push(allow_if("socket", 0, AF_VSOCK, 0, "SCMP_CMP_GT"));
    for persona in [0, 0x8, 0x2_0000, 0x2_0008, 0xFFFF_FFFF] {
        rules.push(allow_if("personality", 0, persona, 0, "SCMP_CMP_EQ"));
    }
    if !caps.contains(&"CAP_SYS_ADMIN") {
        let flags_argument = u32::from(arch == "s390x");
        rules.push(allow_if("clone", flags_argument, NAMESPACE_FLAGS, 0, "SCMP_CMP_MASKED_EQ"));
        // C libraries fall back to clone, whose flags can be looked at, only if clone3 does not
        // exist.
        rules.push(json!({ "names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": ENOSYS }));
    }
    json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 1,
        "architectures": architectures(arch),
        "syscalls": rules,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_follow_the_machine_and_the_capabilities() {
        let p = profile("amd64", &["CAP_SYS_CHROOT"]).to_string();
        for (name, expected) in [
            ("chroot", true),
            ("openat2", true),
            ("arch_prctl", true),
            ("mount", false),
            ("bpf", false),
            ("set_tls", false),
        ] {
            assert_eq!(p.contains(&format!("\"{name}\"")), expected, "{name}");
        }
        assert!(profile("amd64", &["CAP_SYS_ADMIN"]).to_string().contains("\"mount\""));
    }
}
