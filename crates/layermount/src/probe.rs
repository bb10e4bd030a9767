//! Which way of reading layers works here: found by doing it.

use crate::{FuseFiles, Tier, io_fault, mount::Detached, sys};
use rustix::{
    fs::CWD,
    mount::{MountFlags, MountPropagationFlags, mount, mount_change},
};
use shipway_erofs::{Attributes, BLOCK, Builder, Form, Inserted, Node, Options, Xattr};
use shipway_fault::{Code, Context as _, Fault, Result};
use std::{
    ffi::CString,
    fs::File,
    io::{BufWriter, Write as _},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

/// Bytes of the file that is read.
const CONTENTS: u64 = 1 << 20;
/// Name of that file, in a directory.
const FILE: &str = "directory/file";
/// Its extended attribute, and the value of that. Overlays rely on those of layers.
const XATTR: (&str, &[u8]) = ("user.shipway", b"probe");

/// The layer that kernels are tried with: one file of a mebibyte.
#[derive(Clone, Debug)]
pub struct ProbeLayer {
    /// Local file of the metadata.
    pub meta: PathBuf,
    /// Local file of the contents. The FUSE server has to serve it as complete.
    pub data: PathBuf,
    /// Blocks of the data file.
    pub data_blocks: u64,
    /// Bytes of the metadata.
    pub meta_bytes: u64,
}

/// The contents: no two blocks are alike.
fn contents() -> Vec<u8> {
    (0..CONTENTS).map(|at| (at ^ at >> 8 ^ (at / BLOCK).wrapping_mul(97)) as u8).collect()
}

impl ProbeLayer {
    /// Writes the files `meta` and `data` in the directory `dir`, where layers will have theirs.
    pub fn write(dir: &Path) -> Result<Self> {
        let invalid = |e| Fault::internal(format!("make the layer of the probe: {e}"));
        let attributes = Attributes { mode: 0o755, ..Attributes::default() };
        let options = Options { uuid: *b"shipway's probe.", ..Options::default() };
        let mut builder = Builder::new(options, &attributes).map_err(invalid)?;
        let xattrs = [Xattr { name: XATTR.0.as_bytes(), value: XATTR.1 }];
        let with_xattr = Attributes { xattrs: &xattrs, ..attributes };
        let inserted = builder
            .insert(FILE.as_bytes(), &with_xattr, Node::File { size: CONTENTS })
            .map_err(invalid)?;
        let Inserted::File(extent) = inserted else {
            return Err(Fault::internal("a file that is inserted is a file"));
        };
        let image = builder.finish().map_err(invalid)?;
        let (meta, data) = (dir.join("meta"), dir.join("data"));
        let failed = |path: &Path, e| io_fault(format!("write {}", path.display()), e);
        let write_meta = || -> std::io::Result<()> {
            let mut file = BufWriter::new(File::create(&meta)?);
            image.write(Form::WithDevice, &mut file)?;
            file.flush()
        };
        write_meta().map_err(|e| failed(&meta, e))?;
        File::create(&data)
            .and_then(|file| file.write_all_at(&contents(), u64::from(extent.block) * BLOCK))
            .map_err(|e| failed(&data, e))?;
        Ok(Self { meta, data, data_blocks: image.data_blocks().into(), meta_bytes: image.bytes() })
    }
}

/// What was found.
#[derive(Clone, Debug)]
pub struct Probe {
    /// The best way.
    pub tier: Tier,
    /// The better ones, and why they are not taken.
    pub passed_over: Vec<(Tier, Fault)>,
}

/// Finds the best way to read layers, or tries the one that is `forced`, in which case it is an
/// error if that does not work.
///
/// `served` are the files of `layer` as the FUSE server has them, or `None` where there is no FUSE.
/// Each way is tried in a mount namespace of its own, so nothing is left whatever happens: the
/// layer is mounted, two overlays are mounted on each other above it, as in a container within a
/// container, and the file is read through them.
pub fn probe(
    layer: &ProbeLayer,
    served: Option<&FuseFiles>,
    forced: Option<Tier>,
) -> Result<Probe> {
    let mut passed_over = Vec::new();
    for tier in Tier::ALL {
        if let Some(forced) = forced
            && forced != tier
        {
            passed_over.push((tier, Fault::invalid(format!("the configuration says {forced}"))));
            continue;
        }
        match attempt(tier, layer, served) {
            Ok(()) => return Ok(Probe { tier, passed_over }),
            Err(why) if forced.is_some() => {
                return Err(Fault::new(
                    Code::FailedPrecondition,
                    format!("layers cannot be read by way of {tier:?} here: {why}"),
                )
                .hint("leave the choice to the snapshotter, or take another one"));
            }
            Err(why) => passed_over.push((tier, why)),
        }
    }
    Err(Fault::internal("layers can always be unpacked"))
}

fn attempt(tier: Tier, layer: &ProbeLayer, served: Option<&FuseFiles>) -> Result<()> {
    if tier == Tier::NotLazy {
        return Ok(());
    }
    let served = served.ok_or_else(|| Fault::unimplemented("reading layers without FUSE"))?;
    let source = tier
        .served(&layer.meta, served)
        .ok_or_else(|| Fault::internal("a way to read layers reads nothing"))?;
    let work = || {
        own_namespace()?;
        let mounted = Detached::new(&source)?;
        if let Some(device) = mounted.loops.iter().find(|device| !device.is_direct()) {
            return Err(Fault::new(
                Code::FailedPrecondition,
                format!("{} does not pass the page cache over", device.path.display()),
            ));
        }
        nested(&mounted)
    };
    // A thread of its own, for the namespace is the thread's.
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("probe".into())
            .spawn_scoped(scope, work)
            .map_err(|e| io_fault("start a thread", e))?
            .join()
            .unwrap_or_else(|_| Err(Fault::internal("the probe panicked")))
    })
    .context(|| format!("try {tier:?}"))
}

/// Gives this thread mounts that no other thread sees, and that go with it.
fn own_namespace() -> Result<()> {
    sys::own_mounts().map_err(|e| io_fault("make a mount namespace", e))?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).map_err(|e| io_fault("make mounts private", e))
}

/// Mounts two overlays on each other above `mounted`, and reads the file through them.
fn nested(mounted: &Detached) -> Result<()> {
    let failed = |what: &'static str| move |e: rustix::io::Errno| io_fault(what, e);
    // Somewhere that is there on every host, and hides nothing that is needed.
    let at = Path::new("/tmp");
    let none = MountFlags::empty();
    mount("tmpfs", at, "tmpfs", none, None).map_err(failed("mount a tmpfs"))?;
    let [layer, empty, inner, outer] = ["layer", "empty", "inner", "outer"].map(|n| at.join(n));
    for path in [&layer, &empty, &inner, &outer] {
        rustix::fs::mkdirat(CWD, path, rustix::fs::Mode::RWXU)
            .map_err(failed("make a directory"))?;
    }
    mounted.attach(&layer, false)?;
    for (lower, to) in [(&layer, &inner), (&inner, &outer)] {
        let options = format!("lowerdir={}:{}", lower.display(), empty.display());
        let options = CString::new(options).map_err(|_| Fault::internal("a path with a zero"))?;
        mount("overlay", to, "overlay", none, options.as_c_str())
            .map_err(failed("mount an overlay"))
            .context(|| format!("on {}", lower.display()))?;
    }
    let read = std::fs::read(outer.join(FILE)).map_err(|e| io_fault("read a file", e))?;
    if read != contents() {
        return Err(Fault::new(Code::DataLoss, "a file has wrong contents"));
    }
    let mut value = [0; 16];
    let length = rustix::fs::getxattr(outer.join(FILE), XATTR.0, &mut value[..])
        .map_err(failed("read an extended attribute"))?;
    if value[..length] != *XATTR.1 {
        return Err(Fault::new(Code::DataLoss, "an extended attribute has a wrong value"));
    }
    // What is left goes with the namespace; this only makes it go now.
    for path in [&outer, &inner, &layer] {
        let _ = crate::unmount(path);
    }
    Ok(())
}
