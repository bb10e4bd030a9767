//! What containers see: the kernel mounts what the store says. As root, in mount namespaces that go
//! with the tests.

use super::*;
use crate::SNAPSHOT_REF;
use rustix::{
    mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount_change},
    thread::{UnshareFlags, unshare_unsafe},
};
use shipway_erofs::{Attributes, BLOCK, Builder, Form, Inserted, Node};
use shipway_layermount::{MappedIds, Source, UserNamespace, clone_mapped, scan};
use std::{
    ffi::CString,
    fs::{self, File},
    os::{
        fd::{AsFd as _, AsRawFd as _},
        unix::fs::{FileExt as _, MetadataExt as _},
    },
    process::Command,
    time::Duration,
};

/// Layers that are EROFS images. Layer n has `layer<n>` of root, `user` of user and group 5, and a
/// directory `both` with `from<n>`.
struct Images {
    root: PathBuf,
}

impl Images {
    fn source(&self, layer: LayerId) -> Source {
        let dir = self.root.join("layers").join(layer.0.to_string());
        Source::Files { meta: dir.join("meta"), data: dir.join("data") }
    }

    fn at(&self, layer: LayerId) -> PathBuf {
        self.root.join("l").join(layer.0.to_string())
    }
}

impl LazyLayers for Images {
    fn restore(&self, layers: &BTreeSet<LayerId>) -> Restored {
        let mounted = scan(&self.root.join("l")).unwrap();
        let found = layers
            .iter()
            .filter(|l| mounted.iter().any(|m| m.at == self.at(**l) && m.reads(&self.source(**l))));
        Restored { mounted: found.copied().collect(), ..Restored::default() }
    }

    fn find(&self, _: &str, labels: &Labels, _: Below) -> Option<LayerId> {
        let number: u64 = labels.get("layer")?.parse().ok()?;
        let Source::Files { meta, data } = self.source(LayerId(number)) else { panic!() };
        fs::create_dir_all(meta.parent().unwrap()).unwrap();
        let directory = Attributes { mode: 0o755, ..Attributes::default() };
        let options = shipway_erofs::Options { uuid: [number as u8; 16], ..Default::default() };
        let mut builder = Builder::new(options, &directory).unwrap();
        builder.insert(b"both", &directory, Node::Directory).unwrap();
        let data = File::create(data).unwrap();
        for (name, owner) in
            [(format!("layer{number}"), 0), ("user".into(), 5), (format!("both/from{number}"), 0)]
        {
            let attributes = Attributes { mode: 0o644, uid: owner, gid: owner, ..directory };
            let size = name.len() as u64;
            let Inserted::File(extent) =
                builder.insert(name.as_bytes(), &attributes, Node::File { size }).unwrap()
            else {
                panic!("a file")
            };
            data.write_all_at(name.as_bytes(), u64::from(extent.block) * BLOCK).unwrap();
            data.set_len(u64::from(extent.block + 1) * BLOCK).unwrap();
        }
        let image = builder.finish().unwrap();
        image.write(Form::WithDevice, &mut File::create(meta).unwrap()).unwrap();
        Some(LayerId(number))
    }

    fn unpacked(&self, _: &str, _: &Labels) {}

    fn mount(&self, layer: LayerId) -> Result<PathBuf> {
        let at = self.at(layer);
        fs::create_dir_all(&at).unwrap();
        if !shipway_layermount::is_mount_point(&at)? {
            shipway_layermount::mount(&self.source(layer), &at)?;
        }
        Ok(at)
    }

    fn unmount(&self, layer: LayerId) -> Result<()> {
        shipway_layermount::unmount(&self.at(layer)).map(drop)
    }

    fn usage(&self, _: LayerId) -> Result<Usage> {
        Ok(Usage::default())
    }

    fn release(&self, _: LayerId) {}
}

struct Lab {
    dir: tempfile::TempDir,
    store: Store,
}

#[allow(unsafe_code)]
fn own_mounts() {
    assert!(
        rustix::process::geteuid().is_root(),
        "mounts need root: run as root, as `cargo xtask test` does"
    );
    // SAFETY: descriptors stay shared.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
}

impl Lab {
    fn new(remap_ids: bool) -> Self {
        own_mounts();
        // On the disk, as the kernel reads no images from tmpfs; and of nobody else's on the way.
        let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/tmp");
        fs::create_dir_all(&target).unwrap();
        let dir = tempfile::tempdir_in(target.canonicalize().unwrap()).unwrap();
        let store = Self::open(dir.path(), remap_ids);
        Self { dir, store }
    }

    fn open(root: &Path, remap_ids: bool) -> Store {
        let images = Arc::new(Images { root: root.to_owned() });
        let options = Options { keep_mounted: Duration::ZERO, remap_ids, ..Options::default() };
        open_with(root, options, images)
    }

    /// A chain of layers, the lowest first: numbers of lazy ones, or 0 for one that is unpacked and
    /// has a file `unpacked`.
    fn chain(&self, layers: &[u64]) -> Name {
        let mut parent: Option<Name> = None;
        for (n, layer) in layers.iter().enumerate() {
            let key = name(&format!("n/{n}/key"));
            let mut asked = labels(&[(SNAPSHOT_REF, &chain(n as u8))]);
            if *layer > 0 {
                asked.insert("layer".into(), layer.to_string());
                self.store.prepare(&key, parent.as_ref(), asked).unwrap_err();
                parent = Some(key);
            } else {
                let mounts = self.store.prepare(&key, parent.as_ref(), asked).unwrap();
                fs::write(Path::new(upper(&mounts)).join("unpacked"), "unpacked").unwrap();
                let committed = name(&format!("n/{n}/committed"));
                self.store.commit(&committed, &key, Labels::new()).unwrap();
                parent = Some(committed);
            }
        }
        parent.unwrap()
    }

    fn mounted(&self) -> Vec<PathBuf> {
        scan(self.dir.path()).unwrap().into_iter().map(|m| m.at).collect()
    }
}

/// Where roots of containers are mounted: others may come here.
const ROOT: &str = "/mnt";

/// Mounts as containerd does, while this lives.
struct Container;

impl Container {
    fn new(mounts: &[Mount]) -> Self {
        let [mount] = mounts else { panic!("{mounts:?}") };
        let none = MountFlags::empty();
        if mount.kind == "overlay" {
            let options = CString::new(mount.options.join(",")).unwrap();
            rustix::mount::mount("overlay", ROOT, "overlay", none, options.as_c_str()).unwrap();
        } else {
            rustix::mount::mount_bind_recursive(&mount.source, ROOT).unwrap();
        }
        Self
    }

    fn owners<const N: usize>(&self, files: [&str; N]) -> [(u32, u32); N] {
        files.map(|file| {
            let found = fs::symlink_metadata(Path::new(ROOT).join(file)).unwrap();
            (found.uid(), found.gid())
        })
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(ROOT, UnmountFlags::DETACH);
    }
}

fn read(file: &str) -> String {
    fs::read_to_string(Path::new(ROOT).join(file)).unwrap()
}

#[test]
fn a_container_of_both_kinds_of_layers_sees_one_file_system() {
    let lab = Lab::new(false);
    // The third one again at the top: overlays refuse the same directory twice.
    let top = lab.chain(&[1, 0, 3, 0, 3]);
    let mounts = lab.store.prepare(&name("n/9/c"), Some(&top), Labels::new()).unwrap();
    let container = Container::new(&mounts);
    let files = ["layer1", "layer3", "unpacked", "both/from1", "both/from3"];
    for file in files {
        assert_eq!(read(file), file);
    }
    let stat = |file: &str| fs::metadata(Path::new(ROOT).join(file)).unwrap();
    let device = stat("").dev();
    assert!(files.iter().all(|file| stat(file).dev() == device), "one device");
    // A file keeps its number when it is written, and lands in the upper directory.
    let before = stat("layer1").ino();
    fs::write(Path::new(ROOT).join("layer1"), "changed").unwrap();
    assert_eq!((stat("layer1").ino(), read("layer1").as_str()), (before, "changed"));
    assert_eq!(fs::read_to_string(Path::new(upper(&mounts)).join("layer1")).unwrap(), "changed");
    assert_eq!(lab.mounted().len(), 2);
    // The container has references of its own.
    lab.store.remove(&name("n/9/c")).unwrap();
    while lab.store.work_once() {}
    assert_eq!(lab.mounted(), [""; 0].map(PathBuf::from));
    assert_eq!(read("both/from3"), "both/from3");
    drop(container);
    // A view of a single layer is that layer.
    let view = lab.store.view(&name("n/9/v"), Some(&name("n/0/key")), Labels::new()).unwrap();
    let container = Container::new(&view);
    assert_eq!(read("both/from1"), "both/from1");
    drop(container);
    lab.store.remove(&name("n/9/v")).unwrap();
    while lab.store.work_once() {}
    assert_eq!(lab.mounted(), [""; 0].map(PathBuf::from));
}

/// Runs a command as root of a user namespace.
#[track_caller]
fn within(namespace: &UserNamespace, command: &str) -> String {
    let file = format!("/proc/{}/fd/{}", std::process::id(), namespace.as_fd().as_raw_fd());
    let output = Command::new("nsenter")
        .arg(format!("--user={file}"))
        .args(["sh", "-c", command])
        .output()
        .expect("nsenter, of the package util-linux");
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command}: {told}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[test]
fn a_container_in_a_user_namespace_owns_what_its_image_says() {
    let lab = Lab::new(true);
    let top = lab.chain(&[1, 0, 3]);
    let mapping = [
        ("containerd.io/snapshot/uidmapping", "0:100000:65536"),
        ("containerd.io/snapshot/gidmapping", "0:200000:65536"),
    ];
    let key = name("n/9/c");
    let mounts = lab.store.prepare(&key, Some(&top), labels(&mapping)).unwrap();
    let container = Container::new(&mounts);
    let files = ["", "layer1", "layer3", "unpacked", "user", "both", "both/from1"];
    let root = (100_000, 200_000);
    assert_eq!(container.owners(files), [root, root, root, root, (100_005, 200_005), root, root]);
    let ids = MappedIds::parse(mapping[0].1, mapping[1].1).unwrap();
    let namespace = UserNamespace::new(&ids).unwrap();
    let seen = within(&namespace, "cd /mnt && stat -c %u:%g . layer1 unpacked user");
    assert_eq!(seen, "0:0\n0:0\n0:0\n5:5");
    // What root writes there is root's there, and the mapped one's on the disk.
    within(&namespace, "cd /mnt && echo new > new && echo more >> layer1 && chown 7 unpacked");
    let seen = within(&namespace, "cd /mnt && stat -c %u:%g new layer1 unpacked");
    assert_eq!(seen, "0:0\n0:0\n7:0");
    let on_disk = |file: &str| {
        let found = fs::metadata(Path::new(upper(&mounts)).join(file)).unwrap();
        (found.uid(), found.gid())
    };
    assert_eq!(["new", "layer1", "unpacked"].map(on_disk), [root, root, (100_007, 200_000)]);
    assert_eq!(read("layer1"), "layer1more\n");
    // Others without a mapping see the same layers as they are.
    let plain = lab.store.view(&name("n/9/v"), Some(&top), Labels::new()).unwrap();
    drop(container);
    let container = Container::new(&plain);
    assert_eq!(container.owners(files), [(0, 0), (0, 0), (0, 0), (0, 0), (5, 5), (0, 0), (0, 0)]);
    drop(container);
    lab.store.remove(&name("n/9/v")).unwrap();
    // The bind mounts: of a single layer, of either kind, and of nothing.
    let single = lab.store.view(&name("n/9/v"), Some(&name("n/0/key")), labels(&mapping)).unwrap();
    let container = Container::new(&single);
    assert_eq!(container.owners(["", "user"]), [root, (100_005, 200_005)]);
    drop(container);
    let nothing = lab.store.prepare(&name("n/9/e"), None, labels(&mapping)).unwrap();
    let container = Container::new(&nothing);
    assert_eq!(container.owners([""]), [root]);
    drop(container);
    // A clone of everything at once shows no layer: each is a mount of its own. So it is for us to
    // make the clones.
    let trap = lab.dir.path().join("trap");
    fs::create_dir(&trap).unwrap();
    clone_mapped(lab.dir.path(), &namespace, &trap).unwrap();
    assert_eq!(fs::read_dir(trap.join("l/1")).unwrap().count(), 0);
    assert!(fs::read_dir(lab.dir.path().join("l/1")).unwrap().count() > 0);
    shipway_layermount::unmount(&trap).unwrap();

    // After a restart all is there again, under the same paths.
    let before = lab.mounted();
    assert_eq!(before.len(), 5, "two layers, a clone of each, and one of the directories");
    drop(lab.store);
    let lab = Lab { store: Lab::open(lab.dir.path(), true), dir: lab.dir };
    let after = lab.mounted();
    assert!(after.len() == 5 && before.iter().all(|path| after.contains(path)), "{after:?}");
    assert_eq!(lab.store.mounts(&key).unwrap(), mounts);
    for gone in ["n/9/v", "n/9/e", "n/9/c"] {
        lab.store.remove(&name(gone)).unwrap();
    }
    while lab.store.work_once() {}
    assert_eq!(lab.mounted(), [""; 0].map(PathBuf::from));
    assert_eq!(fs::read_dir(lab.dir.path().join("m")).unwrap().count(), 0);
    // A mapping that is none is refused, and without the capability nobody looks at it.
    let wrong = labels(&[("containerd.io/snapshot/uidmapping", "0:100000:65536")]);
    let error = lab.store.prepare(&key, Some(&top), wrong.clone()).unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    drop(lab.store);
    let store = Lab::open(lab.dir.path(), false);
    let mounts = store.prepare(&key, Some(&top), wrong).unwrap();
    assert!(!option(&mounts, "lowerdir").unwrap().contains("/m/"));
    store.remove(&key).unwrap();
    while store.work_once() {}
    assert_eq!(scan(lab.dir.path()).unwrap(), []);
}
