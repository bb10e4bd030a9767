//! Real parts: what the system lacks comes from its own package archive; a newer containerd, buildx
//! and the registry are unpacked below `target/lab`, beside the system and not into it
//! (installing them would start or replace services).

use crate::cargo::{root_command, succeed};
use shipway_testkit::{lab_dir, which};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// A program or file that has to be there, and the package that brings it.
const NEEDED: &[(&str, &str)] = &[
    ("containerd", "containerd"),
    ("runc", "runc"),
    ("busybox", "busybox-static"),
    ("iptables", "iptables"),
    ("git", "git"),
    ("openssl", "openssl"),
    ("fsck.erofs", "erofs-utils"),
    ("protoc", "protobuf-compiler"),
    ("/usr/include/google/protobuf/any.proto", "libprotobuf-dev"),
    ("/usr/lib/cni/bridge", "containernetworking-plugins"),
    ("node", "nodejs"),
    ("npm", "npm"),
    ("skopeo", "skopeo"),
];

/// Servers of object stores, which tests of caches start, and the client of GitHub's cache: npm's
/// packages, and their versions.
const STORES: &[(&str, &str)] =
    &[("s3rver", "3.7.1"), ("azurite", "3.35.0"), ("@actions/cache", "4.1.0")];

/// What could not be had; a run says so and goes on without.
#[derive(Debug, Default)]
pub struct Missing(pub Vec<String>);

/// Installs and unpacks what is lacking. An error is something that nothing works without.
pub fn prepare() -> Result<Missing, String> {
    install()?;
    let mut missing = Missing::default();
    if which("docker-registry").is_none() {
        unpack("stable", &own_suite()?, "root", &["docker-registry"])?;
    }
    let newer =
        which("docker-buildx").is_some() && lab_dir().join("root/usr/bin/containerd").exists();
    let fetched =
        if newer { Ok(()) } else { unpack("sid", "sid", "root", &["docker-buildx", "containerd"]) };
    let next = which("ctr-remote").is_some() && lab_dir().join("next/usr/bin/containerd").exists();
    // The snapshotter of the other package is not used, but its writer of lazy images.
    let beside = if next {
        Ok(())
    } else {
        unpack("trixie", "trixie", "next", &["containerd", "stargz-snapshotter"])
    };
    for (fetched, note) in [
        (fetched, "docker-buildx and containerd 2.1 (Debian sid could not be reached)"),
        (beside, "containerd 1.7 and ctr-remote (Debian trixie could not be reached)"),
        (stores(), "servers of object stores (npm's registry could not be reached)"),
    ] {
        if let Err(why) = fetched {
            eprintln!("{note}: {why}");
            missing.0.push(note.into());
        }
    }
    for optional in ["buildctl", "nerdctl", "crictl", "kubectl"] {
        if which(optional).is_none() {
            missing.0.push(format!("{optional} (not on PATH)"));
        }
    }
    Ok(missing)
}

fn there(needed: &str) -> bool {
    if needed.starts_with('/') {
        return Path::new(needed).exists();
    }
    // Root's programs are not on everybody's PATH.
    which(needed).is_some()
        || ["/usr/sbin", "/sbin"].iter().any(|d| Path::new(d).join(needed).exists())
}

fn install() -> Result<(), String> {
    let lacking: Vec<&str> =
        NEEDED.iter().filter(|(needed, _)| !there(needed)).map(|(_, package)| *package).collect();
    if lacking.is_empty() {
        return Ok(());
    }
    println!("installing {} …", lacking.join(" "));
    let apt = || {
        let mut command = root_command("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive").arg("-qq");
        command
    };
    let mut update = apt();
    update.arg("update");
    succeed(update)?;
    let mut install = apt();
    install.args(["install", "--yes", "--no-install-recommends"]).args(&lacking);
    succeed(install)
        .map_err(|e| format!("{e}\ninstall these packages by hand: {}", lacking.join(" ")))
}

/// Unpacks the servers of object stores below `target/lab/node`; no script of theirs is run.
fn stores() -> Result<(), String> {
    let at = lab_dir().join("node");
    let lacking: Vec<String> = STORES
        .iter()
        .filter(|(name, version)| {
            let manifest = at.join("node_modules").join(name).join("package.json");
            let text = fs::read_to_string(manifest).unwrap_or_default();
            !text.contains(&format!("\"version\": \"{version}\""))
        })
        .map(|(name, version)| format!("{name}@{version}"))
        .collect();
    if lacking.is_empty() {
        return Ok(());
    }
    println!("fetching {} …", lacking.join(" "));
    fs::create_dir_all(&at).map_err(|e| format!("{}: {e}", at.display()))?;
    let mut npm = Command::new("npm");
    npm.args(["install", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"])
        .arg("--prefix")
        .arg(&at)
        .args(lacking);
    succeed(npm)
}

fn own_suite() -> Result<String, String> {
    let release =
        fs::read_to_string("/etc/os-release").map_err(|e| format!("read /etc/os-release: {e}"))?;
    let name = release.lines().find_map(|l| l.strip_prefix("VERSION_CODENAME=")).unwrap_or("sid");
    Ok(name.trim_matches('"').to_owned())
}

/// Unpacks `packages` of a Debian suite below `target/lab/<to>`, with apt but without touching the
/// system's state.
fn unpack(name: &str, suite: &str, to: &str, packages: &[&str]) -> Result<(), String> {
    println!("fetching {} of Debian {suite} …", packages.join(" "));
    let apt = lab_dir().join("apt").join(name);
    let io = |e: std::io::Error| format!("{}: {e}", apt.display());
    for dir in ["lists/partial", "cache/archives/partial", "dl"] {
        fs::create_dir_all(apt.join(dir)).map_err(io)?;
    }
    let keyring = "/usr/share/keyrings/debian-archive-keyring.gpg";
    let source = format!("deb [signed-by={keyring}] {} {suite} main\n", mirror()?);
    fs::write(apt.join("sources.list"), source).map_err(io)?;
    let command = || {
        let mut command = Command::new("apt-get");
        command
            .args([
                "-qq",
                "-oDir::Etc::sourceparts=/nonexistent",
                "-oAPT::Sandbox::User=",
                "-oAcquire::Languages=none",
            ])
            .arg(format!("-oDir::Etc::sourcelist={}", apt.join("sources.list").display()))
            .arg(format!("-oDir::State::Lists={}", apt.join("lists").display()))
            .arg(format!("-oDir::Cache={}", apt.join("cache").display()))
            .current_dir(apt.join("dl"));
        command
    };
    let mut update = command();
    update.arg("update");
    succeed(update)?;
    let mut download = command();
    download.arg("download").args(packages);
    succeed(download)?;
    let root = lab_dir().join(to);
    fs::create_dir_all(&root).map_err(io)?;
    let archives: Vec<PathBuf> =
        fs::read_dir(apt.join("dl")).map_err(io)?.flatten().map(|e| e.path()).collect();
    for package in packages {
        let prefix = format!("{package}_");
        let newest = archives
            .iter()
            .filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with(&prefix)))
            .max();
        let mut extract = Command::new("dpkg");
        extract
            .arg("-x")
            .arg(newest.ok_or_else(|| format!("apt-get download {package} left no file"))?)
            .arg(&root);
        succeed(extract)?;
    }
    Ok(())
}

/// The mirror that this machine's own suite comes from.
fn mirror() -> Result<String, String> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    files.extend(
        fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten().flatten().map(|e| e.path()),
    );
    let texts: Vec<String> = files.iter().filter_map(|f| fs::read_to_string(f).ok()).collect();
    let suite = own_suite()?;
    texts
        .iter()
        .find_map(|text| mirror_in(text, &suite))
        .ok_or_else(|| format!("no mirror for {suite} is named below /etc/apt"))
}

/// The URI for `suite` in one of apt's source files, of either format.
fn mirror_in(text: &str, suite: &str) -> Option<String> {
    for line in text.lines().filter(|l| l.trim_start().starts_with("deb ")) {
        let words: Vec<&str> = line
            .split_whitespace()
            .skip(1)
            .skip_while(|w| w.starts_with('[') || w.contains('=') || w.ends_with(']'))
            .collect();
        if words.get(1) == Some(&suite) {
            return Some(words[0].to_owned());
        }
    }
    text.split("\n\n").find_map(|stanza| {
        let field = |name: &str| {
            stanza.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
        };
        let named = field("Suites")?.split_whitespace().any(|s| s == suite);
        if named { field("URIs")?.split_whitespace().next().map(str::to_owned) } else { None }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expected: Option<&str>) {
        assert_eq!(mirror_in(text, "bookworm").as_deref(), expected, "{text}");
    }

    #[test]
    fn the_mirror_is_found_in_both_formats() {
        check("deb http://deb.example/debian bookworm main\n", Some("http://deb.example/debian"));
        check(
            "# deb http://no/ bookworm main\ndeb [arch=amd64 signed-by=/k] http://a/debian bookworm main",
            Some("http://a/debian"),
        );
        check(
            "Types: deb\nURIs: http://b/debian\nSuites: bookworm bookworm-updates\nComponents: main\n",
            Some("http://b/debian"),
        );
        check(
            "deb http://security/ bookworm-security main\n\nTypes: deb\nURIs: http://c\nSuites: nodistro\n",
            None,
        );
    }
}
