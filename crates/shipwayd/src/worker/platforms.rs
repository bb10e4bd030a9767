//! Which platforms steps can run for (row `so.platforms`): the machine's own, and those whose
//! programs the kernel gives to an emulator.

use parking_lot::Mutex;
use shipway_oci::Platform;
use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

/// Where the kernel lists its handlers of foreign programs.
const BINFMT: &str = "/proc/sys/fs/binfmt_misc";
/// No handler's description is longer.
const MAX_HANDLER: usize = 64 << 10;
/// Bytes of an ELF file's head up to its machine.
const HEAD: usize = 20;

/// The list, looked for again when it is too old: emulators come and go while the daemon runs.
#[derive(Clone)]
pub struct Platforms(Arc<Inner>);

struct Inner {
    /// Those of the configuration, which are never looked for.
    fixed: Vec<Platform>,
    max_age: Option<Duration>,
    found: Mutex<Option<(Instant, Vec<Platform>)>>,
}

impl Platforms {
    /// `fixed` if it names any; else what is found, good for `max_age`, or for ever.
    pub fn new(fixed: Vec<Platform>, max_age: Option<Duration>) -> Self {
        Self(Arc::new(Inner { fixed, max_age, found: Mutex::default() }))
    }

    /// All of them, native first.
    pub fn now(&self) -> Vec<Platform> {
        if !self.0.fixed.is_empty() {
            return self.0.fixed.clone();
        }
        let mut found = self.0.found.lock();
        let good = |since: &Instant| self.0.max_age.is_none_or(|age| since.elapsed() < age);
        match found.as_ref().filter(|(since, _)| good(since)) {
            Some((_, list)) => list.clone(),
            None => found
                .insert((
                    Instant::now(),
                    detect(&Platform::host(), amd64_level(), &emulated(Path::new(BINFMT))),
                ))
                .1
                .clone(),
        }
    }
}

/// The platforms of a `host` whose emulators are for `emulated`.
fn detect(host: &Platform, level: u8, emulated: &[&'static str]) -> Vec<Platform> {
    let linux = |arch: &str, variant: &str| Platform::new("linux", arch, variant);
    let mut all = vec![host.clone()];
    let native = host.architecture.as_str();
    if native == "amd64" {
        all.extend((2..=level).map(|level| linux("amd64", &format!("v{level}"))));
    }
    for arch in [
        "amd64", "arm64", "riscv64", "ppc64", "ppc64le", "s390x", "386", "mips64le", "mips64",
        "loong64",
    ] {
        // A kernel for amd64 runs the programs of its predecessor.
        let runs = emulated.contains(&arch) || (arch == "386" && native == "amd64");
        if arch != native && runs {
            all.push(linux(arch, ""));
        }
    }
    match native {
        "arm" if host.variant.is_empty() || host.variant == "v7" => all.push(linux("arm", "v6")),
        "arm" => {}
        _ if emulated.contains(&"arm") => all.extend([linux("arm", "v7"), linux("arm", "v6")]),
        _ => {}
    }
    all
}

/// Architectures that have an enabled handler, whatever its name.
fn emulated(dir: &Path) -> Vec<&'static str> {
    let handlers = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let texts =
        handlers.filter(|h| !["register", "status"].contains(&&*h.file_name().to_string_lossy()));
    texts
        .filter_map(|h| std::fs::read(h.path()).ok())
        .filter(|t| t.len() <= MAX_HANDLER)
        .filter_map(|t| handled(&String::from_utf8_lossy(&t)))
        .collect()
}

/// The architecture whose programs go to the handler with this description.
fn handled(description: &str) -> Option<&'static str> {
    let field = |name: &str| description.lines().find_map(|l| l.strip_prefix(name)).map(str::trim);
    if !description.starts_with("enabled") || field("offset").is_some_and(|o| o != "0") {
        return None;
    }
    let bytes = |hex: &str| {
        (0..hex.len() / 2)
            .filter_map(|i| hex.get(2 * i..2 * i + 2))
            .map(|b| u8::from_str_radix(b, 16).ok())
            .collect::<Option<Vec<u8>>>()
    };
    let magic = bytes(field("magic")?)?;
    architecture(magic.get(..HEAD)?)
}

/// The architecture of programs that begin like this.
fn architecture(head: &[u8]) -> Option<&'static str> {
    if !head.starts_with(b"\x7fELF") || head.len() < HEAD {
        return None;
    }
    let (wide, little) = (head[4] == 2, head[5] == 1);
    let machine = if little {
        u16::from_le_bytes([head[18], head[19]])
    } else {
        u16::from_be_bytes([head[18], head[19]])
    };
    Some(match (machine, wide, little) {
        (0x03, false, true) => "386",
        (0x3e, true, true) => "amd64",
        (0xb7, true, true) => "arm64",
        (0x28, false, true) => "arm",
        (0xf3, true, true) => "riscv64",
        (0x15, true, true) => "ppc64le",
        (0x15, true, false) => "ppc64",
        (0x16, true, false) => "s390x",
        (0x08, true, true) => "mips64le",
        (0x08, true, false) => "mips64",
        (0x102, true, true) => "loong64",
        _ => return None,
    })
}

/// Which level of amd64 the processor has; 1 elsewhere.
#[cfg(target_arch = "x86_64")]
fn amd64_level() -> u8 {
    macro_rules! all {
        ($($feature:tt),*) => { $(std::arch::is_x86_feature_detected!($feature))&&* };
    }
    let v2 = all!("cmpxchg16b", "popcnt", "sse3", "ssse3", "sse4.1", "sse4.2");
    let v3 = v2 && all!("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "lzcnt", "movbe");
    let v4 = v3 && all!("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl");
    1 + u8::from(v2) + u8::from(v3) + u8::from(v4)
}

/// Which level of amd64 the processor has; 1 elsewhere.
#[cfg(not(target_arch = "x86_64"))]
fn amd64_level() -> u8 {
    1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(all: &[Platform]) -> Vec<String> {
        all.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn native_comes_first_then_its_levels_then_emulators() {
        let amd64 = detect(&Platform::new("linux", "amd64", ""), 3, &["arm", "arm64"]);
        assert_eq!(
            names(&amd64),
            [
                "linux/amd64",
                "linux/amd64/v2",
                "linux/amd64/v3",
                "linux/arm64",
                "linux/386",
                "linux/arm/v7",
                "linux/arm/v6"
            ]
        );
        assert_eq!(
            names(&detect(&Platform::new("linux", "arm64", ""), 1, &["loong64"])),
            ["linux/arm64", "linux/loong64"]
        );
    }

    #[test]
    fn handlers_are_known_by_what_they_match_and_not_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let elf = |class: u8, data: u8, machine: [u8; 2]| {
            let mut head =
                vec![0x7f, b'E', b'L', b'F', class, data, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0];
            head.extend(machine);
            head.iter().map(|b| format!("{b:02x}")).collect::<String>()
        };
        let write = |name: &str, state: &str, magic: String| {
            let text = format!(
                "{state}\ninterpreter /x\nflags: POCF\noffset 0\nmagic {magic}\nmask ffffffff\n"
            );
            std::fs::write(dir.path().join(name), text).unwrap();
        };
        write("rosetta", "enabled", elf(2, 1, [0x3e, 0]));
        write("qemu-s390x", "enabled", elf(2, 2, [0, 0x16]));
        write("qemu-loongarch64", "enabled", elf(2, 1, [2, 1]));
        write("qemu-arm", "disabled", elf(1, 1, [0x28, 0]));
        write("python3", "enabled", "160d0d0a".into());
        write("odd", "enabled", "7f4".into());
        std::fs::write(dir.path().join("status"), "enabled").unwrap();
        let mut found = emulated(dir.path());
        found.sort_unstable();
        assert_eq!(found, ["amd64", "loong64", "s390x"]);
    }

    #[test]
    fn a_list_that_is_too_old_is_looked_for_again() {
        let fresh = Platforms::new(Vec::new(), None);
        let since = |p: &Platforms| p.0.found.lock().as_ref().map(|(since, _)| *since);
        assert!(since(&fresh).is_none());
        assert_eq!(fresh.now()[0], Platform::host());
        let first = since(&fresh);
        fresh.now();
        assert_eq!(since(&fresh), first);
        let always = Platforms::new(Vec::new(), Some(Duration::ZERO));
        always.now();
        let first = since(&always);
        always.now();
        assert_ne!(since(&always), first);
        assert_eq!(Platforms::new(vec![Platform::new("linux", "arm64", "")], None).now().len(), 1);
    }
}
