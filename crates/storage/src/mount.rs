//! What a snapshotter's mounts look like: the only reader of their strings.

use crate::overlay::Marks;
use std::path::{Path, PathBuf};

/// The option that keeps an overlay from writing everything to the disk when it is unmounted.
pub const VOLATILE: &str = "volatile";

/// A mount in containerd's strings, as it goes over the wire, to runtimes and to `mount(2)`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RawMount {
    /// `overlay`, `bind`, `erofs`, …
    pub kind: String,
    /// Source path or device.
    pub source: String,
    /// Subdirectory of the place it is mounted at, usually empty.
    pub target: String,
    /// Options, those of `mount(2)`'s flags included (`ro`, `rbind`, `nosuid`).
    pub options: Vec<String>,
}

/// A mount as the snapshotter hands it out.
///
/// ```
/// # use shipway_storage::{Mount, RawMount};
/// let overlay = Mount::from(RawMount {
///     kind: "overlay".into(),
///     source: "overlay".into(),
///     target: String::new(),
///     options: ["index=off", "workdir=/s/2/work", "upperdir=/s/2/fs", "lowerdir=/s/1/fs"]
///         .map(String::from)
///         .into(),
/// });
/// assert_eq!(overlay.writable_dir(), Some("/s/2/fs".as_ref()));
/// assert_eq!(overlay.read_only().raw().options, ["index=off", "lowerdir=/s/2/fs:/s/1/fs"]);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mount {
    /// Layers over each other.
    Overlay(Overlay),
    /// A directory of the host as it is.
    Bind(Bind),
    /// Anything else, such as a block device or an `erofs` image: it can be mounted, and nothing
    /// is known of what it shows.
    Other(RawMount),
}

/// An overlay and its directories.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overlay {
    /// Where changes go; none in a view.
    pub upper: Option<Upper>,
    /// The layers below, topmost first; at least one.
    pub lower: Vec<PathBuf>,
    /// Whether the mount is read-only in spite of an upper directory.
    pub read_only: bool,
    /// All other options, such as `index=off` or `userxattr`.
    pub options: Vec<String>,
}

/// The writable part of an overlay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upper {
    /// The directory that takes changes.
    pub dir: PathBuf,
    /// The kernel's own directory beside it.
    pub work: PathBuf,
}

/// A directory that is mounted as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bind {
    /// The directory.
    pub source: PathBuf,
    /// Whether nothing can be written through the mount.
    pub read_only: bool,
    /// All other options, `bind` or `rbind` among them.
    pub options: Vec<String>,
}

fn is_bind(option: &String) -> bool {
    option == "bind" || option == "rbind"
}

impl From<RawMount> for Mount {
    fn from(raw: RawMount) -> Self {
        if !raw.target.is_empty() {
            return Self::Other(raw);
        }
        if matches!(raw.kind.as_str(), "bind" | "rbind") || raw.options.iter().any(is_bind) {
            return Self::Bind(Bind::of(&raw));
        }
        match Overlay::of(&raw) {
            Some(overlay) => Self::Overlay(overlay),
            None => Self::Other(raw),
        }
    }
}

impl Mount {
    /// Directory `source` as it is, with what is mounted below it.
    pub fn bind(source: impl Into<PathBuf>, read_only: bool) -> Self {
        Self::Bind(Bind { source: source.into(), read_only, options: vec!["rbind".into()] })
    }

    /// The strings.
    pub fn raw(&self) -> RawMount {
        match self {
            Self::Overlay(overlay) => overlay.raw(),
            Self::Bind(bind) => bind.raw(),
            Self::Other(raw) => raw.clone(),
        }
    }

    /// The kind in strings: `overlay`, `bind`, or another.
    pub fn kind(&self) -> &str {
        match self {
            Self::Overlay(_) => OVERLAY,
            Self::Bind(_) => BIND,
            Self::Other(raw) => &raw.kind,
        }
    }

    /// The same file system for readers only. Of an overlay, the upper directory becomes one more
    /// layer, so that nothing is locked.
    #[must_use]
    pub fn read_only(&self) -> Self {
        match self {
            Self::Overlay(overlay) => Self::Overlay(overlay.frozen()),
            Self::Bind(bind) => Self::Bind(Bind { read_only: true, ..bind.clone() }),
            Self::Other(raw) => {
                let mut raw = raw.clone();
                raw.options.retain(|o| o != "rw" && o != "ro");
                raw.options.push("ro".into());
                Self::Other(raw)
            }
        }
    }

    /// The same file system, without waiting for the disk when it is unmounted, where the kind has
    /// such an option ([`VOLATILE`]).
    #[must_use]
    pub fn unsynced(&self) -> Self {
        let mut mount = self.clone();
        if let Self::Overlay(overlay) = &mut mount
            && overlay.upper.is_some()
        {
            overlay.options.push(VOLATILE.into());
        }
        mount
    }

    /// The directory of the host that takes what is written through the mount; `None` if nothing
    /// can be, or nothing is known of it.
    pub fn writable_dir(&self) -> Option<&Path> {
        match self {
            Self::Overlay(overlay) if overlay.read_only => None,
            Self::Overlay(overlay) => overlay.upper.as_ref().map(|upper| &*upper.dir),
            Self::Bind(bind) => (!bind.read_only).then_some(&*bind.source),
            Self::Other(_) => None,
        }
    }
}

const OVERLAY: &str = "overlay";
const BIND: &str = "bind";

impl Overlay {
    /// `None` for other kinds, and for overlays with directories that are given in another way than
    /// snapshotters do: lower directories without files of their own (`::`), escaped colons.
    fn of(raw: &RawMount) -> Option<Self> {
        let (mut upper, mut work, mut overlay) = (None, None, Self::default());
        for option in &raw.options {
            match option.split_once('=') {
                Some(("lowerdir", dirs)) => {
                    overlay.lower = dirs.split(':').map(PathBuf::from).collect();
                }
                Some(("upperdir", dir)) => upper = Some(PathBuf::from(dir)),
                Some(("workdir", dir)) => work = Some(PathBuf::from(dir)),
                Some(("lowerdir+" | "datadir+", _)) => return None,
                _ if option == "ro" => overlay.read_only = true,
                _ if option == "rw" => {}
                _ => overlay.options.push(option.clone()),
            }
        }
        overlay.upper = match (upper, work) {
            (Some(dir), Some(work)) => Some(Upper { dir, work }),
            (None, _) => None,
            (Some(_), None) => return None,
        };
        let plain =
            |dir: &PathBuf| !dir.as_os_str().is_empty() && !dir.to_string_lossy().contains('\\');
        let understood = !overlay.lower.is_empty() && overlay.lower.iter().all(plain);
        (raw.kind == OVERLAY && understood).then_some(overlay)
    }

    /// Without a writable layer: what was it is the topmost layer below.
    #[must_use]
    pub fn frozen(&self) -> Self {
        let upper = self.upper.iter().map(|upper| upper.dir.clone());
        Self {
            upper: None,
            lower: upper.chain(self.lower.iter().cloned()).collect(),
            read_only: self.read_only,
            options: self.options.iter().filter(|o| *o != VOLATILE).cloned().collect(),
        }
    }

    /// The namespace of its marks.
    pub fn marks(&self) -> Marks {
        let user = self.options.iter().any(|o| o == "userxattr");
        if user { Marks::User } else { Marks::Trusted }
    }

    /// Whether it is mounted with [`VOLATILE`].
    pub fn is_volatile(&self) -> bool {
        self.options.iter().any(|o| o == VOLATILE)
    }

    fn raw(&self) -> RawMount {
        let mut options = self.options.clone();
        if let Some(upper) = &self.upper {
            options.push(format!("workdir={}", upper.work.display()));
            options.push(format!("upperdir={}", upper.dir.display()));
        }
        let lower: Vec<_> = self.lower.iter().map(|dir| dir.to_string_lossy()).collect();
        options.push(format!("lowerdir={}", lower.join(":")));
        if self.read_only {
            options.push("ro".into());
        }
        RawMount { kind: OVERLAY.into(), source: OVERLAY.into(), target: String::new(), options }
    }
}

impl Bind {
    fn of(raw: &RawMount) -> Self {
        let mode = |o: &String| o == "ro" || o == "rw";
        let mut options: Vec<String> = raw.options.iter().filter(|o| !mode(o)).cloned().collect();
        if !options.iter().any(is_bind) {
            options.push("rbind".into());
        }
        let read_only = raw.options.iter().rfind(|o| mode(o)).is_some_and(|o| o == "ro");
        Self { source: PathBuf::from(&raw.source), read_only, options }
    }

    fn raw(&self) -> RawMount {
        let mode = if self.read_only { "ro" } else { "rw" };
        RawMount {
            kind: BIND.into(),
            source: self.source.to_string_lossy().into_owned(),
            target: String::new(),
            options: self.options.iter().cloned().chain([mode.into()]).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(kind: &str, source: &str, options: &[&str]) -> RawMount {
        RawMount {
            kind: kind.into(),
            source: source.into(),
            target: String::new(),
            options: options.iter().map(|o| (*o).to_owned()).collect(),
        }
    }

    /// What is understood of a mount, and that its strings mean the same.
    #[track_caller]
    fn check(kind: &str, source: &str, options: &[&str], want: Mount) {
        let mount = Mount::from(raw(kind, source, options));
        assert_eq!(mount, want);
        assert_eq!(Mount::from(mount.raw()), want, "{:?}", mount.raw());
    }

    #[test]
    fn mounts_of_snapshotters_are_understood() {
        let strings = |all: &[&str]| all.iter().map(|o| (*o).to_owned()).collect::<Vec<_>>();
        let bind = |read_only, options: &[&str]| {
            Mount::Bind(Bind { source: "/s".into(), read_only, options: strings(options) })
        };
        check("bind", "/s", &["ro", "rbind"], bind(true, &["rbind"]));
        check("bind", "/s", &["rbind", "rw", "nosuid"], bind(false, &["rbind", "nosuid"]));
        check("none", "/s", &["bind"], bind(false, &["bind"]));
        check("rbind", "/s", &[], bind(false, &["rbind"]));
        let upper = Upper { dir: "/u".into(), work: "/w".into() };
        let overlay = Overlay {
            upper: Some(upper),
            lower: vec!["/a".into(), "/b".into()],
            read_only: false,
            options: strings(&["index=off", "userxattr"]),
        };
        assert_eq!(overlay.marks(), Marks::User);
        let options = ["index=off", "workdir=/w", "userxattr", "upperdir=/u", "lowerdir=/a:/b"];
        check("overlay", "overlay", &options, Mount::Overlay(overlay));
        let view = Overlay { lower: vec!["/a".into()], ..Overlay::default() };
        check("overlay", "overlay", &["lowerdir=/a", "rw"], Mount::Overlay(view.clone()));
        let read_only = Overlay { read_only: true, ..view };
        check("overlay", "overlay", &["lowerdir=/a", "ro"], Mount::Overlay(read_only));
    }

    #[test]
    fn what_is_not_understood_keeps_its_strings() {
        for (kind, options) in [
            ("erofs", &["ro", "loop"][..]),
            ("ext4", &[]),
            ("format/overlay", &["lowerdir={{ mount 0 }}"]),
            ("overlay", &[]),
            ("overlay", &["upperdir=/u", "workdir=/w"]),
            ("overlay", &["upperdir=/u", "lowerdir=/a"]),
            ("overlay", &["lowerdir=/a::/data"]),
            ("overlay", &[r"lowerdir=/a\:b"]),
            ("overlay", &["lowerdir+=/a"]),
        ] {
            let raw = raw(kind, "/dev/x", options);
            let mount = Mount::from(raw.clone());
            assert_eq!(mount, Mount::Other(raw.clone()));
            assert_eq!((mount.raw(), mount.kind(), mount.writable_dir()), (raw, kind, None));
        }
        let part = RawMount { target: "sub".into(), ..raw("bind", "/s", &["rbind"]) };
        assert_eq!(Mount::from(part.clone()), Mount::Other(part));
    }

    #[test]
    fn a_mount_for_readers_locks_nothing_and_writes_nothing() {
        let options = ["index=off", "volatile", "workdir=/w", "upperdir=/u", "lowerdir=/a:/b"];
        let overlay = Mount::from(raw("overlay", "overlay", &options));
        assert_eq!(overlay.writable_dir(), Some(Path::new("/u")));
        assert_eq!(overlay.read_only().raw().options, ["index=off", "lowerdir=/u:/a:/b"]);
        assert_eq!(overlay.read_only().writable_dir(), None);
        let bind = Mount::bind("/s", false);
        assert_eq!(bind.writable_dir(), Some(Path::new("/s")));
        assert_eq!(bind.read_only(), Mount::bind("/s", true));
        let other = Mount::from(raw("ext4", "/dev/x", &["rw", "discard"]));
        assert_eq!(other.read_only().raw().options, ["discard", "ro"]);
    }

    #[test]
    fn only_what_is_written_to_an_overlay_can_be_left_unsynced() {
        let options = ["workdir=/w", "upperdir=/u", "lowerdir=/a"];
        let written = Mount::from(raw("overlay", "overlay", &options)).unsynced();
        assert!(matches!(&written, Mount::Overlay(o) if o.is_volatile()));
        let view = Mount::from(raw("overlay", "overlay", &["lowerdir=/a"]));
        assert_eq!(view.unsynced(), view);
        assert_eq!(Mount::bind("/s", false).unsynced(), Mount::bind("/s", false));
    }
}
