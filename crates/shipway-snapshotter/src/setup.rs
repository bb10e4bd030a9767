//! containerd's configuration: what it needs to use the snapshotter, and taking it back.
//!
//! Other people's lines stay as they are, byte for byte. Each line of ours ends in a comment that
//! says so, and says what was there before; so taking back needs no file of its own, and works
//! after other people's changes.

mod edit;

use crate::config::Config;
use clap::Args;
use edit::{Edit, Want};
use rustix::fs::Mode;
use shipway_fault::{Code, Context as _, Fault, Result};
use std::{
    io::{ErrorKind, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::Command,
};

/// Largest configuration file that is read, in bytes.
const MAX_FILE: u64 = 4 << 20;
/// The snapshotter that containerd uses when nobody says another one.
const DEFAULT_SNAPSHOTTER: &str = "overlayfs";

/// Which containerd.
#[derive(Args, Clone, Debug)]
pub struct Target {
    /// containerd's program, asked for its version.
    #[arg(long, default_value = "containerd", value_name = "PROGRAM")]
    containerd: PathBuf,
    /// containerd's configuration file.
    #[arg(long, default_value = "/etc/containerd/config.toml", value_name = "FILE")]
    containerd_config: PathBuf,
    /// Name of the snapshotter in containerd.
    #[arg(long, default_value = "shipway", value_name = "NAME")]
    name: String,
    /// Leaves the snapshotter of Kubernetes as it is.
    #[arg(long)]
    no_cri: bool,
}

/// The command `setup`.
#[derive(Args, Clone, Debug)]
pub struct Flags {
    #[command(flatten)]
    target: Target,
    /// Prints the whole file as it would be, and writes nothing.
    #[arg(long)]
    print: bool,
    /// Takes back what was written.
    #[arg(long)]
    undo: bool,
}

/// A version of containerd; what is behind the minor number makes no difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(u32, u32);

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// Runs the command.
pub fn run(config: &Config, flags: &Flags) -> Result<()> {
    let path = &flags.target.containerd_config;
    let before = read(path)?;
    let (after, version) = if flags.undo {
        (
            undone(before.as_deref().unwrap_or_default()).context(|| path.display().to_string())?,
            None,
        )
    } else {
        let version = flags.target.version()?;
        (Some(flags.target.wanted(config, before.as_deref(), version)?), Some(version))
    };
    if flags.print {
        print!("{}", after.unwrap_or_default());
        return Ok(());
    }
    if after == before || (after.is_none() && before.is_none()) {
        println!("{} needs no change", path.display());
        return Ok(());
    }
    match &after {
        Some(text) => write(path, text)?,
        None => std::fs::remove_file(path)
            .map_err(|e| Fault::io(format!("remove {}", path.display()), e))?,
    }
    match version {
        Some(version) => println!("{} is set up for containerd {version}", path.display()),
        None => println!("{} is as it was", path.display()),
    }
    println!("restart containerd to use it: systemctl restart containerd");
    Ok(())
}

impl Target {
    /// The version of the program.
    pub fn version(&self) -> Result<Version> {
        let program = self.containerd.display();
        let output = Command::new(&self.containerd).arg("--version").output().map_err(|e| {
            Fault::io(format!("run {program} --version"), e)
                .hint("say where containerd is with --containerd")
        })?;
        let text = String::from_utf8_lossy(&output.stdout);
        let version = text.split_whitespace().find_map(parse_version);
        version.ok_or_else(|| {
            Fault::invalid(format!("{program} --version says no version: {:?}", text.trim()))
        })
    }

    /// Whether the file has all that it needs.
    pub fn is_set_up(&self, config: &Config) -> Result<bool> {
        let before = read(&self.containerd_config)?;
        Ok(before.as_deref() == Some(&*self.wanted(config, before.as_deref(), self.version()?)?))
    }

    fn wanted(&self, config: &Config, text: Option<&str>, version: Version) -> Result<String> {
        if self.name.is_empty()
            || !self.name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
        {
            return Err(Fault::invalid(format!("{:?} is no name for a snapshotter", self.name)));
        }
        let path = self.containerd_config.display();
        set_up(config, &self.name, text, version, !self.no_cri).context(|| path.to_string())
    }
}

/// `1.6.20~ds1`, `v2.1.9`, …
fn parse_version(word: &str) -> Option<Version> {
    let mut parts = word.strip_prefix('v').unwrap_or(word).splitn(3, '.');
    let (major, minor, _) = (parts.next()?, parts.next()?, parts.next()?);
    Some(Version(major.parse().ok()?, minor.parse().ok()?))
}

/// The file with everything that containerd of this version needs.
fn set_up(
    config: &Config,
    name: &str,
    text: Option<&str>,
    version: Version,
    cri: bool,
) -> Result<String> {
    if version < Version(1, 6) {
        return Err(Fault::new(Code::FailedPrecondition, "containerd before 1.6 is not supported"));
    }
    if let Some(other) = other_name(config, name, text.unwrap_or_default()) {
        return Err(Fault::new(
            Code::FailedPrecondition,
            format!("the snapshotter is there already, as {other:?}"),
        )
        .hint("containerd removes what it does not know under a name, so it may have one name only: take the other back with --undo"));
    }
    let mut edit = Edit::new(text.unwrap_or_default())?;
    if edit.is_empty() {
        edit.set(&[], "version", Want::Integer(if version >= Version(2, 0) { 3 } else { 2 }))?;
    }
    // A file without a version has the first one.
    let format = edit.integer("version").unwrap_or(1);
    if !(1..=4).contains(&format) {
        return Err(Fault::invalid(format!("a configuration of version {format} is not known")));
    }
    let own = ["proxy_plugins", name];
    edit.set(&own, "type", Want::Text("snapshot"))?;
    edit.set(&own, "address", Want::Text(&config.address.to_string_lossy()))?;
    if config.remap_ids && version < Version(2, 0) {
        return Err(Fault::new(
            Code::FailedPrecondition,
            "`remap_ids` needs containerd 2.0: older ones copy layers for user namespaces",
        ));
    }
    // What is told and what is done have to agree: ids would be mapped twice, or not at all.
    if config.remap_ids || edit.has_list(&own, "capabilities") {
        let capabilities: &[&str] = if config.remap_ids { &["remap-ids"] } else { &[] };
        edit.set(&own, "capabilities", Want::Texts(capabilities))?;
    }
    if version >= Version(1, 7) {
        let exports = ["proxy_plugins", name, "exports"];
        edit.set(&exports, "root", Want::Text(&config.root.to_string_lossy()))?;
        edit.set(&exports, "enable_remote_snapshot_annotations", Want::Text("true"))?;
        let unpack = ["plugins", "io.containerd.transfer.v1.local"];
        // The list replaces the one that is built in, which has this entry.
        if !edit.has_list(&unpack, "unpack_config") {
            edit.add(
                &unpack,
                "unpack_config",
                "snapshotter",
                &[
                    ("platform", "linux"),
                    ("snapshotter", DEFAULT_SNAPSHOTTER),
                    ("differ", "walking"),
                ],
            )?;
        }
        edit.add(
            &unpack,
            "unpack_config",
            "snapshotter",
            &[("platform", "linux"), ("snapshotter", name), ("differ", "walking")],
        )?;
    }
    let disabled = edit.texts("disabled_plugins");
    let is_cri = |plugin: &String| {
        ["cri", "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images"]
            .contains(&plugin.as_str())
    };
    if cri && !disabled.iter().any(is_cri) {
        const IMAGES: &[&str] = &["plugins", "io.containerd.cri.v1.images"];
        let images: &[&str] = match format {
            1 => &["plugins", "cri", "containerd"],
            2 => &["plugins", "io.containerd.grpc.v1.cri", "containerd"],
            _ => IMAGES,
        };
        edit.set(images, "snapshotter", Want::Text(name))?;
        if format < 3 && version >= Version(2, 0) {
            // What 2.x makes of an older file has this setting only if the file names runtimes;
            // else it goes by its own place.
            edit.set(IMAGES, "snapshotter", Want::Text(name))?;
        }
        // From 2.1 on the transfer service pulls, and goes by what is exported; this setting would
        // switch it off.
        if version < Version(2, 1) {
            edit.set(images, "disable_snapshot_annotations", Want::Bool(false))?;
        }
    }
    Ok(edit.into_text())
}

/// Another name that containerd knows the same snapshotter by.
fn other_name(config: &Config, name: &str, text: &str) -> Option<String> {
    // What cannot be read is told by who edits it.
    let file: toml::Table = toml::from_str(text).ok()?;
    let address = config.address.to_string_lossy();
    let plugins = file.get("proxy_plugins")?.as_table()?;
    let same = |plugin: &toml::Value| {
        plugin.get("address").and_then(toml::Value::as_str) == Some(&*address)
    };
    plugins.iter().find(|(other, plugin)| *other != name && same(plugin)).map(|(n, _)| n.clone())
}

/// The file without what is ours; nothing if there is nothing else.
fn undone(text: &str) -> Result<Option<String>> {
    let mut edit = Edit::new(text)?;
    edit.undo()?;
    let text = edit.into_text();
    Ok((!text.trim().is_empty()).then_some(text))
}

fn read(path: &Path) -> Result<Option<String>> {
    let failed = |e| Fault::io(format!("read {}", path.display()), e);
    match path.metadata() {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed(e)),
        Ok(m) if m.len() > MAX_FILE => {
            return Err(Fault::invalid(format!(
                "{} has more than {MAX_FILE} bytes",
                path.display()
            )));
        }
        Ok(_) => {}
    }
    std::fs::read_to_string(path).map(Some).map_err(failed)
}

/// Replaces the file, or that which a link leads to, in one step, with the same mode and owner.
fn write(path: &Path, text: &str) -> Result<()> {
    let path = &path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let failed = |e: std::io::Error| Fault::io(format!("write {}", path.display()), e);
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory).map_err(failed)?;
    }
    let fill = |file: &mut std::fs::File| {
        file.write_all(text.as_bytes())?;
        let mode = match path.metadata() {
            Ok(old) => {
                std::os::unix::fs::fchown(&*file, Some(old.uid()), Some(old.gid()))?;
                old.mode() & 0o7777
            }
            Err(_) => 0o644,
        };
        rustix::fs::fchmod(&*file, Mode::from_raw_mode(mode))?;
        file.sync_all()
    };
    shipway_host::replace_file(path, 0o600, fill).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Version; 5] =
        [Version(1, 6), Version(1, 7), Version(2, 0), Version(2, 1), Version(2, 4)];

    fn done(text: Option<&str>, version: Version) -> String {
        set_up(&Config::default(), "shipway", text, version, true).unwrap()
    }

    /// The value at a path, its keys separated by slashes.
    fn value(text: &str, path: &str) -> Option<toml::Value> {
        let mut value = toml::Value::Table(toml::from_str(text).unwrap());
        for key in path.split('/') {
            value = value.get(key)?.clone();
        }
        Some(value)
    }

    fn text(file: &str, path: &str) -> Option<String> {
        value(file, path).map(|v| v.as_str().map_or_else(|| v.to_string(), str::to_owned))
    }

    const DOCKER: &str = "#   Copyright by somebody\n\ndisabled_plugins = [\"cri\"]\n\n#root = \"/var/lib/containerd\"\n#[grpc]\n#  uid = 0\n";
    const KUBERNETES: &str = r#"version = 2
imports = ["/etc/containerd/conf.d/*.toml"]

[plugins]
  [plugins."io.containerd.grpc.v1.cri"]
    sandbox_image = "registry.k8s.io/pause:3.9" # ours

    [plugins."io.containerd.grpc.v1.cri".containerd]
      snapshotter = "overlayfs" # as ever
      disable_snapshot_annotations = true
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
        runtime_type = "io.containerd.runc.v2"

[proxy_plugins]
  [proxy_plugins.stargz]
    type = "snapshot"
    address = "/run/containerd-stargz-grpc/containerd-stargz-grpc.sock"
# the end"#;
    const THIRD: &str = r#"
version = 3
[plugins.'io.containerd.cri.v1.images']
snapshotter = 'overlayfs'

[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
platform = "linux/amd64"
snapshotter = "erofs"
differ = "erofs"
"#;
    const OLD: &str = "[plugins.cri.containerd]\n  snapshotter = \"native\"\n";

    #[test]
    fn each_version_gets_what_it_needs() {
        for version in ALL {
            let file = done(None, version);
            assert_eq!(text(&file, "proxy_plugins/shipway/type").as_deref(), Some("snapshot"));
            assert_eq!(
                text(&file, "proxy_plugins/shipway/address").as_deref(),
                Some("/run/shipway-snapshotter/snapshotter.sock")
            );
            let exports =
                text(&file, "proxy_plugins/shipway/exports/enable_remote_snapshot_annotations");
            assert_eq!(exports.as_deref(), (version >= Version(1, 7)).then_some("true"));
            let cri = if version < Version(2, 0) {
                "plugins/io.containerd.grpc.v1.cri/containerd"
            } else {
                "plugins/io.containerd.cri.v1.images"
            };
            assert_eq!(text(&file, &format!("{cri}/snapshotter")).as_deref(), Some("shipway"));
            let annotations = value(&file, &format!("{cri}/disable_snapshot_annotations"));
            assert_eq!(
                annotations,
                (version < Version(2, 1)).then_some(toml::Value::Boolean(false))
            );
            let unpack = value(&file, "plugins/io.containerd.transfer.v1.local/unpack_config");
            let snapshotters = unpack.map(|list| {
                let entries = list.as_array().unwrap().clone();
                entries
                    .iter()
                    .map(|e| e["snapshotter"].as_str().unwrap().to_owned())
                    .collect::<Vec<_>>()
            });
            assert_eq!(
                snapshotters,
                (version >= Version(1, 7))
                    .then(|| vec!["overlayfs".to_owned(), "shipway".to_owned()])
            );
            assert_eq!(undone(&file).unwrap(), None, "a file that was not there goes:\n{file}");
        }
    }

    #[test]
    fn a_second_name_is_refused() {
        let file = done(None, Version(1, 7));
        let again = |name: &str, text: &str| {
            set_up(&Config::default(), name, Some(text), Version(1, 7), true)
        };
        assert_eq!(again("shipway", &file).unwrap(), file);
        let refused = again("stargz", &file).unwrap_err();
        assert!(refused.to_string().contains("as \"shipway\""), "{refused}");
        assert!(refused.hints().any(|hint| hint.contains("--undo")));
        let back = undone(&file).unwrap().unwrap_or_default();
        assert!(again("stargz", &back).unwrap().contains("[proxy_plugins.stargz]"));
        again("shipway", KUBERNETES).unwrap();
    }

    #[test]
    fn what_others_wrote_stays_and_comes_back_byte_for_byte() {
        for before in [
            "",
            "\n",
            "version = 2",
            "version = 2\n",
            DOCKER,
            KUBERNETES,
            THIRD,
            OLD,
            "# only a remark\n",
        ] {
            for version in ALL {
                let after = done(Some(before), version);
                assert_eq!(done(Some(&after), version), after, "twice is once");
                // Every line is still there, but for those that were changed, and these say what
                // they were.
                for line in before.lines() {
                    let there = after
                        .lines()
                        .any(|l| l == line || l.ends_with(&format!("{WAS}{}", value_part(line))));
                    assert!(there, "{line:?} is gone:\n{after}");
                }
                let back = undone(&after).unwrap().unwrap_or_default();
                assert_eq!(
                    back.trim_end_matches('\n'),
                    before.trim_end_matches('\n'),
                    "{version:?}\n{after}"
                );
                assert_eq!(done(Some(&back), version).trim_end(), after.trim_end());
            }
        }
    }

    const WAS: &str = ", instead of: ";

    fn value_part(line: &str) -> &str {
        line.split_once('=').map_or("\u{1}", |(_, value)| value.trim())
    }

    #[test]
    fn the_tables_go_where_the_version_of_the_file_has_them() {
        let file = done(Some(KUBERNETES), Version(2, 1));
        let cri = "plugins/io.containerd.grpc.v1.cri/containerd";
        assert_eq!(text(&file, &format!("{cri}/snapshotter")).as_deref(), Some("shipway"));
        assert_eq!(
            text(&file, &format!("{cri}/runtimes/runc/runtime_type")).as_deref(),
            Some("io.containerd.runc.v2")
        );
        // From 2.1 on it is not ours to say.
        assert_eq!(
            value(&file, &format!("{cri}/disable_snapshot_annotations")),
            Some(toml::Value::Boolean(true))
        );
        assert!(text(&file, "proxy_plugins/stargz/address").is_some());
        assert_eq!(
            text(&file, "plugins/io.containerd.cri.v1.images/snapshotter").as_deref(),
            Some("shipway"),
            "2.x looks here as well"
        );
        let file = done(Some(KUBERNETES), Version(1, 6));
        assert_eq!(value(&file, "plugins/io.containerd.cri.v1.images"), None);
        assert_eq!(
            value(&file, &format!("{cri}/disable_snapshot_annotations")),
            Some(toml::Value::Boolean(false))
        );
        let file = done(Some(THIRD), Version(2, 1));
        let unpack = value(&file, "plugins/io.containerd.transfer.v1.local/unpack_config").unwrap();
        let names: Vec<&str> =
            unpack.as_array().unwrap().iter().map(|e| e["snapshotter"].as_str().unwrap()).collect();
        assert_eq!(names, ["erofs", "shipway"], "a list of somebody's is added to");
        let file = done(Some(OLD), Version(1, 7));
        assert_eq!(text(&file, "plugins/cri/containerd/snapshotter").as_deref(), Some("shipway"));
        let file = done(Some(DOCKER), Version(1, 7));
        assert!(!file.contains("plugins.cri"), "there is no CRI to be set up:\n{file}");
        let file =
            set_up(&Config::default(), "lazy", Some(KUBERNETES), Version(1, 7), false).unwrap();
        assert_eq!(text(&file, &format!("{cri}/snapshotter")).as_deref(), Some("overlayfs"));
        assert!(text(&file, "proxy_plugins/lazy/address").is_some());
    }

    #[test]
    fn later_changes_of_others_stay_and_ours_are_renewed() {
        let first = done(Some(KUBERNETES), Version(1, 7));
        let changed = first
            .replace("pause:3.9", "pause:3.10")
            .replace("# the end", "[debug]\nlevel = \"debug\"\n");
        let moved = Config { root: "/data/snapshots".into(), ..Config::default() };
        let second = set_up(&moved, "shipway", Some(&changed), Version(1, 7), true).unwrap();
        assert_eq!(
            text(&second, "proxy_plugins/shipway/exports/root").as_deref(),
            Some("/data/snapshots")
        );
        let back = undone(&second).unwrap().unwrap();
        assert_eq!(
            back,
            KUBERNETES
                .replace("pause:3.9", "pause:3.10")
                .replace("# the end", "[debug]\nlevel = \"debug\"\n")
        );
        // What the user has set the same is the user's.
        let own = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd]\nsnapshotter = \"shipway\"\n";
        assert_eq!(undone(&done(Some(own), Version(1, 7))).unwrap().unwrap(), own);
    }

    #[test]
    fn what_cannot_be_edited_line_by_line_is_refused_whole() {
        for (before, says) in [
            ("version = 2\nproxy_plugins = { other = { type = \"snapshot\" } }\n", "proxy_plugins"),
            (
                "version = 2\n[plugins]\n\"io.containerd.grpc.v1.cri\".containerd.snapshotter = \"x\"\n",
                "io.containerd.grpc.v1.cri",
            ),
            ("version = 9\n", "version 9"),
            ("version = [", "TOML parse error"),
            (
                "version = 2\n[proxy_plugins.shipway.type]\n",
                "proxy_plugins.shipway.type is a table",
            ),
            ("version = 2\nplugins = 1\n", "plugins"),
            (
                "version = 2\n[plugins.\"io.containerd.transfer.v1.local\"]\nunpack_config = []\n",
                "unpack_config is no list of tables",
            ),
        ] {
            let error = set_up(&Config::default(), "shipway", Some(before), Version(1, 7), true)
                .unwrap_err();
            assert!(error.to_string().contains(says), "{error}");
        }
        assert!(set_up(&Config::default(), "shipway", None, Version(1, 5), true).is_err());
    }

    #[test]
    fn versions_are_read_as_distributions_write_them() {
        for (line, want) in [
            (
                "containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u3",
                Some(Version(1, 6)),
            ),
            ("containerd github.com/containerd/containerd/v2 v2.1.9 abc", Some(Version(2, 1))),
            (
                "containerd containerd.io 1.7.24 88bf19b2105c8b17560993bee28a01ddc2f97182",
                Some(Version(1, 7)),
            ),
            ("containerd", None),
        ] {
            assert_eq!(line.split_whitespace().find_map(parse_version), want);
        }
    }

    #[test]
    fn ids_are_mapped_by_us_if_containerd_is_told_so() {
        let mapping = Config { remap_ids: true, ..Config::default() };
        let with = |text: Option<&str>, config: &Config| {
            set_up(config, "shipway", text, Version(2, 1), true).unwrap()
        };
        let capabilities = |file: &str| text(file, "proxy_plugins/shipway/capabilities");
        let plain = with(None, &Config::default());
        assert_eq!(capabilities(&plain), None);
        let mapped = with(Some(&plain), &mapping);
        assert_eq!(capabilities(&mapped).as_deref(), Some("[\"remap-ids\"]"));
        assert_eq!(with(Some(&mapped), &mapping), mapped);
        let plain = with(Some(&mapped), &Config::default());
        assert_eq!(capabilities(&plain).as_deref(), Some("[]"));
        assert_eq!(with(Some(&plain), &Config::default()), plain);
        assert_eq!(undone(&mapped).unwrap(), None);
        assert!(set_up(&mapping, "shipway", None, Version(1, 7), true).is_err());
    }

    #[test]
    fn a_file_is_replaced_with_its_mode_through_a_link() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let (real, link) = (dir.path().join("real.toml"), dir.path().join("link.toml"));
        std::fs::write(&real, "old").unwrap();
        std::fs::set_permissions(&real, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        write(&link, "new").unwrap();
        assert_eq!(std::fs::read_to_string(&real).unwrap(), "new");
        assert_eq!(real.metadata().unwrap().mode() & 0o7777, 0o600);
        assert!(link.symlink_metadata().unwrap().is_symlink());
        write(&dir.path().join("a/b.toml"), "x").unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3);
        std::fs::write(&real, vec![b'#'; MAX_FILE as usize + 1]).unwrap();
        assert!(read(&real).is_err());
        assert_eq!(read(&dir.path().join("none")).unwrap(), None);
    }
}
