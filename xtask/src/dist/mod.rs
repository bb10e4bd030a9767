//! `dist`: packages for Debian and tarballs, out of programs that are built. The same commit gives
//! the same bytes: times are those of `SOURCE_DATE_EPOCH` or of the commit, owners are root, and
//! nothing else of this machine gets in.
//!
//! Packages are written here and not by `dpkg-deb`: an `ar` of two tars is less than what it takes
//! to give another program a tree with the right owners, modes and times, the tarballs take the
//! same tree, and it works on machines that are no Debian.
//!
//! The builder and the snapshotter are two packages, since neither needs the other: a node of a
//! cluster that only runs images has no use for a builder's socket.
//!
//! `tar`, `liblzma`, `flate2` and `md5` are formats that dpkg reads.

mod deb;
mod tree;

use crate::cargo::{cargo, succeed};
use deb::Control;
use shipway_testkit::{profile_dir, workspace};
use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::Command,
};
use tree::Tree;

/// How tars are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Small; every dpkg reads it.
    Xz,
    /// For tests, whose programs are large and packages short-lived.
    None,
}

impl Compression {
    fn extension(self) -> &'static str {
        match self {
            Self::Xz => ".xz",
            Self::None => "",
        }
    }

    fn of(self, tar: Vec<u8>) -> io::Result<Vec<u8>> {
        match self {
            Self::None => Ok(tar),
            Self::Xz => {
                let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 6);
                encoder.write_all(&tar)?;
                encoder.finish()
            }
        }
    }
}

/// What goes into one package.
struct Package {
    name: &'static str,
    /// Its programs, the first of which has a manual of its flags.
    programs: &'static [&'static str],
    /// Units of systemd.
    units: &'static [&'static str],
    /// Those that are started with the machine, and when the package is installed.
    enabled: &'static str,
    /// Those that an upgrade restarts where they run.
    restarted: &'static str,
    /// System group that may use the socket.
    group: &'static str,
    /// Directory that goes when the package is purged.
    state: &'static str,
    /// Besides libc.
    depends: &'static str,
    fields: &'static [&'static str],
    summary: &'static str,
    description: &'static str,
}

const PACKAGES: [Package; 2] = [
    Package {
        name: "shipway",
        programs: &["shipwayd", "shipway"],
        units: &["shipwayd.service", "shipwayd.socket"],
        // The first client starts the service.
        enabled: "shipwayd.socket",
        restarted: "shipwayd.service",
        group: "shipway",
        state: "/var/lib/shipway",
        depends: "containerd (>= 1.6) | containerd.io, runc | containerd.io, passwd",
        fields: &[
            "Recommends: ca-certificates, git",
            "Suggests: shipway-snapshotter, containernetworking-plugins",
        ],
        summary: "image builder on containerd, with BuildKit's API",
        description: "The daemon shipwayd builds container images with the containerd that is there:\n\
                      what is built is in its image store at once. It serves docker buildx, buildctl,\n\
                      nerdctl build and its own client, shipway.",
    },
    Package {
        name: "shipway-snapshotter",
        programs: &["shipway-snapshotter", "shipway-keeper"],
        units: &[
            "shipway-snapshotter.service",
            "shipway-snapshotter.socket",
            "shipway-snapshotter-keeper.service",
            "shipway-snapshotter-keeper.socket",
        ],
        enabled: "shipway-snapshotter-keeper.socket shipway-snapshotter.socket shipway-snapshotter.service",
        // Containers go on reading while either is replaced.
        restarted: "shipway-snapshotter-keeper.service shipway-snapshotter.service",
        group: "",
        // Its layers are containerd's to remove.
        state: "",
        depends: "containerd (>= 1.6) | containerd.io",
        fields: &["Recommends: ca-certificates"],
        summary: "lazy snapshotter for containerd",
        description: "A plug-in of containerd that mounts layers with a table of contents at once and\n\
                      fetches them as they are read, and has each layer once for all namespaces.\n\
                      \"shipway-snapshotter setup\" makes it known to containerd.",
    },
];

/// What the command line says.
struct Options {
    /// Directory of the programs; built there unless it was given.
    programs: PathBuf,
    out: PathBuf,
    version: String,
    compression: Compression,
}

/// Builds the programs unless `--programs` says where they are, and writes all packages.
pub fn run(arguments: &[&str]) -> Result<(), String> {
    let options = options(arguments)?;
    let epoch = epoch()?;
    fs::create_dir_all(&options.out).map_err(|e| format!("{}: {e}", options.out.display()))?;
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => {
            return Err(format!("Debian's name of the architecture {other} is not known here"));
        }
    };
    let mut all = Tree::default();
    for package in &PACKAGES {
        let files = package.files(&options)?;
        let control = Control {
            package: package.name,
            version: &options.version,
            architecture,
            depends: format!("libc6 (>= {}), {}", libc_of(&files), package.depends),
            fields: package.fields,
            summary: package.summary,
            description: package.description,
            scripts: package.scripts()?,
        };
        let bytes = deb::deb(&control, &files, options.compression, epoch)?;
        let name = format!("{}_{}_{architecture}.deb", package.name, options.version);
        write(&options.out.join(name), &bytes)?;
        for (path, contents) in files.files() {
            let mode = if path.starts_with("usr/bin/") { 0o755 } else { 0o644 };
            all.file(path, mode, contents);
        }
    }
    let top = format!("shipway-{}-linux-{architecture}", options.version);
    let failed = |e: io::Error| format!("pack {top}: {e}");
    let tar = all.below(&top).tar("", epoch).map_err(failed)?;
    let name = format!("{top}.tar{}", options.compression.extension());
    write(&options.out.join(name), &options.compression.of(tar).map_err(failed)?)
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), String> {
    fs::write(path, bytes).map_err(|e| format!("write {}: {e}", path.display()))?;
    println!("{} ({} KiB)", path.display(), bytes.len().div_ceil(1024));
    Ok(())
}

fn options(arguments: &[&str]) -> Result<Options, String> {
    let (mut profile, mut programs, mut out) = ("dist", None, None);
    let (mut version, mut compression) = (env!("CARGO_PKG_VERSION"), Compression::Xz);
    for pair in arguments.chunks(2) {
        match pair {
            ["--profile", name] => profile = name,
            ["--programs", directory] => programs = Some(PathBuf::from(directory)),
            ["--out", directory] => out = Some(PathBuf::from(directory)),
            ["--version", number] => version = number,
            ["--compress", "xz"] => compression = Compression::Xz,
            ["--compress", "none"] => compression = Compression::None,
            other => {
                return Err(format!("unknown argument of dist, or without a value: {other:?}"));
            }
        }
    }
    let digit = version.starts_with(|c: char| c.is_ascii_digit());
    if !digit || !version.chars().all(|c| c.is_ascii_alphanumeric() || ".+~".contains(c)) {
        return Err(format!("{version:?} is not a version of a package: 1.2.3, 1.2.3~rc1"));
    }
    let target = profile_dir().parent().ok_or("the target directory has no parent")?.to_owned();
    let programs = match programs {
        Some(programs) => programs,
        None => {
            build(profile)?;
            target.join(if profile == "dev" { "debug" } else { profile })
        }
    };
    let out = out.unwrap_or_else(|| target.join("packages"));
    Ok(Options { programs, out, version: version.into(), compression })
}

fn build(profile: &str) -> Result<(), String> {
    println!("building ({profile}) …");
    let mut build = cargo();
    build.args(["build", "--profile", profile]);
    build.args(PACKAGES.iter().flat_map(|p| p.programs).flat_map(|name| ["--package", name]));
    succeed(build)
}

/// The time of everything in packages: `SOURCE_DATE_EPOCH`, or that of the commit.
fn epoch() -> Result<u64, String> {
    let text = match std::env::var("SOURCE_DATE_EPOCH") {
        Ok(text) => text,
        Err(_) => {
            let log = Command::new("git")
                .args(["log", "-1", "--format=%ct"])
                .current_dir(workspace())
                .output();
            let log = log.map_err(|e| format!("git log: {e}"))?;
            String::from_utf8_lossy(&log.stdout).into_owned()
        }
    };
    text.trim().parse().map_err(|_| {
        "no time for the packages' files: set SOURCE_DATE_EPOCH, or run in a clone".to_owned()
    })
}

impl Package {
    fn files(&self, options: &Options) -> Result<Tree, String> {
        let mut tree = Tree::default();
        for name in self.programs {
            let path = options.programs.join(name);
            let program = fs::read(&path).map_err(|e| format!("read {}: {e}", path.display()))?;
            tree.file(&format!("usr/bin/{name}"), 0o755, program);
        }
        for unit in self.units {
            let text = installed_unit(&read(&format!("systemd/{unit}"))?, self.group);
            tree.file(&format!("usr/lib/systemd/system/{unit}"), 0o644, text);
        }
        let daemon = self.programs[0];
        let sample = read(&format!("config/{daemon}.toml"))?;
        tree.file(&format!("etc/shipway/{daemon}.toml"), 0o644, sample);
        let copyright = read("config/debian/copyright")?;
        tree.file(&format!("usr/share/doc/{}/copyright", self.name), 0o644, copyright);
        let manual = manual(daemon, self.summary, &help(&options.programs.join(daemon))?);
        tree.file(&format!("usr/share/man/man8/{daemon}.8.gz"), 0o644, gzip(&manual)?);
        if self.programs.contains(&"shipway") {
            client(&mut tree, &options.programs.join("shipway"))?;
        }
        Ok(tree)
    }

    /// Scripts that dpkg runs, with this package's words in them.
    fn scripts(&self) -> Result<Vec<(&'static str, String)>, String> {
        let mut scripts = Vec::new();
        for name in ["postinst", "prerm", "postrm"] {
            let text = read(&format!("config/debian/{name}"))?
                .replace("@UNITS@", &self.units.join(" "))
                .replace("@ENABLED@", self.enabled)
                .replace("@RESTARTED@", self.restarted)
                .replace("@GROUP@", self.group)
                .replace("@STATE@", self.state);
            scripts.push((name, text));
        }
        Ok(scripts)
    }
}

/// A unit with the places and the group of the package.
fn installed_unit(text: &str, group: &str) -> String {
    let text = text.replace("/usr/local/bin/", "/usr/bin/");
    match group {
        "" => text,
        group => text.replace("SocketGroup=root", &format!("SocketGroup={group}")),
    }
}

/// Completions and manuals, as the client writes them itself.
fn client(tree: &mut Tree, shipway: &Path) -> Result<(), String> {
    for (shell, path) in [
        ("bash", "usr/share/bash-completion/completions/shipway"),
        ("zsh", "usr/share/zsh/vendor-completions/_shipway"),
        ("fish", "usr/share/fish/vendor_completions.d/shipway.fish"),
    ] {
        tree.file(path, 0o644, output(shipway, &["completion", shell])?);
    }
    let directory = tempfile::tempdir().map_err(|e| format!("make a directory: {e}"))?;
    output(shipway, &["manuals", &directory.path().display().to_string()])?;
    let failed = |e: io::Error| format!("read the manuals of {}: {e}", shipway.display());
    for entry in fs::read_dir(directory.path()).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let text = fs::read_to_string(&path).map_err(failed)?;
        tree.file(&format!("usr/share/man/man1/{name}.gz"), 0o644, gzip(&text)?);
    }
    Ok(())
}

fn help(program: &Path) -> Result<String, String> {
    let help = output(program, &["--help"])?;
    String::from_utf8(help).map_err(|e| format!("{} --help: {e}", program.display()))
}

fn output(program: &Path, arguments: &[&str]) -> Result<Vec<u8>, String> {
    // Help is as wide as the terminal is, and shows what variables are set to.
    let done = Command::new(program).args(arguments).env_clear().output();
    let done = done.map_err(|e| format!("{}: {e}", program.display()))?;
    match done.status.success() {
        true => Ok(done.stdout),
        false => Err(format!(
            "{} {}: {}",
            program.display(),
            arguments.join(" "),
            String::from_utf8_lossy(&done.stderr)
        )),
    }
}

/// A manual out of a daemon's help.
fn manual(name: &str, summary: &str, help: &str) -> String {
    // roff takes a line that begins with a dot or a quote for a request, and a backslash as an
    // escape.
    let help: String = help
        .lines()
        .map(|line| {
            let line = line.replace('\\', "\\e").replace('-', "\\-");
            if line.starts_with(['.', '\'']) { format!("\\&{line}\n") } else { format!("{line}\n") }
        })
        .collect();
    let upper = name.to_uppercase();
    format!(
        ".TH {upper} 8\n.SH NAME\n{name} \\- {summary}\n.SH OPTIONS\n.nf\n{help}.fi\n.SH FILES\n\
         .TP\n.I /etc/shipway/{name}.toml\nIts configuration, in which every key is explained.\n"
    )
}

fn gzip(text: &str) -> Result<Vec<u8>, String> {
    // Without a name or a time.
    let mut encoder = flate2::GzBuilder::new().write(Vec::new(), flate2::Compression::best());
    encoder
        .write_all(text.as_bytes())
        .and_then(|()| encoder.finish())
        .map_err(|e| format!("compress a manual: {e}"))
}

fn read(name: &str) -> Result<String, String> {
    let path = workspace().join(name);
    fs::read_to_string(&path).map_err(|e| format!("read {}: {e}", path.display()))
}

/// The least libc that the programs run with: the newest version that their symbols name.
fn libc_of(files: &Tree) -> String {
    let programs = files.files().filter(|(path, _)| path.starts_with("usr/bin/"));
    let newest = programs.filter_map(|(_, bytes)| newest_libc(bytes)).max();
    newest.map_or_else(|| "2.34".into(), |(major, minor)| format!("{major}.{minor}"))
}

fn newest_libc(program: &[u8]) -> Option<(u32, u32)> {
    const NAME: &[u8] = b"GLIBC_";
    let versions = program.windows(NAME.len()).enumerate().filter(|(_, word)| *word == NAME);
    let numbers = versions.filter_map(|(at, _)| {
        let rest = &program[at + NAME.len()..];
        let end = rest.iter().position(|b| !b.is_ascii_digit() && *b != b'.')?;
        let (major, minor) = std::str::from_utf8(&rest[..end]).ok()?.split_once('.')?;
        Some((major.parse().ok()?, minor.split('.').next()?.parse().ok()?))
    });
    numbers.max()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_needs_the_newest_libc_that_it_names() {
        let bytes = b"\0GLIBC_2.2.5\0GLIBC_2.34\0GLIBC_2.9\0GLIBC_PRIVATE\0GLIBC_";
        assert_eq!(newest_libc(bytes), Some((2, 34)));
        assert_eq!(newest_libc(b"none"), None);
    }

    #[test]
    fn packages_name_files_that_exist_and_scripts_with_all_words() {
        for package in &PACKAGES {
            for unit in package.units {
                let text =
                    installed_unit(&read(&format!("systemd/{unit}")).unwrap(), package.group);
                assert!(!text.contains("/usr/local"), "{unit}");
                assert!(
                    unit.contains("snapshotter") || !text.contains("SocketGroup=root"),
                    "{unit}"
                );
            }
            for unit in package.enabled.split(' ').chain(package.restarted.split(' ')) {
                assert!(package.units.contains(&unit), "{unit} is not in {}", package.name);
            }
            for (name, script) in package.scripts().unwrap() {
                assert!(!script.contains('@'), "{name}: {script}");
                assert!(script.starts_with("#!/bin/sh\n"), "{name}");
            }
        }
    }

    #[test]
    fn a_manual_keeps_what_roff_would_take_for_requests() {
        let text = manual("x", "does", "Usage: x [OPTIONS]\n.hidden\n  --a\\b\n");
        assert!(text.contains("\n\\&.hidden\n"), "{text}");
        assert!(text.contains("\n  \\-\\-a\\eb\n"), "{text}");
    }

    #[test]
    fn arguments_are_pairs_and_versions_are_debians() {
        let refused = |arguments: &[&str]| options(arguments).err().unwrap_or_default();
        assert!(refused(&["--programs", "/x", "--out"]).contains("without a value"));
        assert!(refused(&["--colour", "red"]).contains("--colour"));
        for version in ["v1", "1_2", "1/../2", ""] {
            assert!(refused(&["--programs", "/x", "--version", version]).contains("version"));
        }
        let good = options(&["--programs", "/x", "--version", "1.2~rc1", "--compress", "none"]);
        let good = good.ok().unwrap();
        assert_eq!((good.version.as_str(), good.compression), ("1.2~rc1", Compression::None));
    }
}
