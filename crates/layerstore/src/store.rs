//! All layers below a directory.

use crate::{
    Error, Result,
    about::{ABOUT, About, Changing, Description, Fixed, LayerKey, LayerNumber},
    bits::Bits,
    build,
    digests::{DIGEST, DIGESTS, ENTRIES},
    disk, index,
    layer::{CLAIMS, Common, DATA, DigestOf, INDEX, Layer, META, WHOLE},
    lock,
    spans::SPANS,
    written::Made,
};
use parking_lot::{Condvar, Mutex};
use rustix::{
    fs::{CWD, FallocateFlags, FlockOperation, RenameFlags, fallocate, flock, renameat_with},
    io::Errno,
};
use shipway_erofs::{BLOCK, Form, OpaqueMark};
use shipway_estargz::Toc;
use shipway_oci::Hasher;
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs::{self, File},
    io::{self, Write as _},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Instant, SystemTime},
};

const LAYERS: &str = "layers";
const TRASH: &str = "trash";
/// Boot and next number.
const BOOT: &str = "boot";
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// Most bytes of the file [`BOOT`].
const MAX_BOOT: u64 = 256;
/// Digits of the next number in it.
const NEXT_DIGITS: usize = 10;
/// Prefix of directories that are being made.
const NEW: &str = "new.";

/// What a store is told when it is opened.
#[derive(Clone, Debug)]
pub struct Options {
    /// Most bytes that all layers may take; `None` for as much as there is.
    pub max_bytes: Option<u64>,
    /// Bytes of the file system that others should find free.
    pub min_free: u64,
    /// Whether new layers wait for the disk. Without it a power cut may take them, and never makes
    /// one wrong.
    pub fsync: bool,
    /// How opaque directories are marked in images.
    pub opaque: OpaqueMark,
    /// Name of the machine's present life; `None` for what the kernel says.
    pub boot_id: Option<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            max_bytes: None,
            min_free: 0,
            fsync: true,
            opaque: OpaqueMark::default(),
            boot_id: None,
        }
    }
}

/// A layer that was not as it should be when the store was opened, and is in the trash now.
#[derive(Debug)]
pub struct Damage {
    /// The layer.
    pub layer: LayerNumber,
    /// What is wrong with it.
    pub error: Error,
}

/// Layers on the disk. One process at a time has it; all calls may be made by any thread, and may
/// block.
pub struct LayerStore {
    directory: PathBuf,
    pub(crate) options: Options,
    common: Arc<Common>,
    is_first_of_boot: bool,
    boot: String,
    damaged: Vec<Damage>,
    tables: Mutex<Tables>,
    /// A layer was made, or could not be.
    made: Condvar,
    /// One at a time empties the trash.
    emptying: Mutex<()>,
    /// How often data was written before its layer was made.
    unpacked: AtomicU64,
    /// Holds the lock.
    _lock: File,
}

#[derive(Default)]
struct Tables {
    by_number: BTreeMap<LayerNumber, Arc<Layer>>,
    by_key: HashMap<LayerKey, LayerNumber>,
    making: HashSet<LayerKey>,
    next: u32,
}

impl LayerStore {
    /// Opens the layers below `root`, and makes what is missing there. What an earlier life left
    /// half made goes to the trash, and so does what is damaged ([`LayerStore::damaged`]).
    pub fn open(root: impl AsRef<Path>, options: Options) -> Result<Self> {
        let directory = root.as_ref().join(LAYERS);
        disk::make_directory(&directory)?;
        disk::make_directory(&directory.join(TRASH))?;
        let lock = File::open(&directory).map_err(Error::at("open", &directory))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => return Err(Error::Locked(directory.display().to_string())),
            locked => locked.map_err(Error::at("lock", &directory))?,
        }
        check_holes(&directory)?;
        let boot = match &options.boot_id {
            Some(id) => id.clone(),
            None => fs::read_to_string(BOOT_ID)
                .map_err(Error::at("read", Path::new(BOOT_ID)))?
                .trim()
                .to_owned(),
        };
        let next = last_next(&directory, &boot)?;
        let mut store = Self {
            directory,
            options,
            common: Arc::default(),
            is_first_of_boot: next.is_none(),
            boot,
            damaged: Vec::new(),
            tables: Mutex::default(),
            made: Condvar::new(),
            emptying: Mutex::new(()),
            unpacked: AtomicU64::new(0),
            _lock: lock,
        };
        let mut tables = store.load()?;
        tables.next = tables.next.max(next.unwrap_or(1));
        store.save_next(tables.next)?;
        store.tables = Mutex::new(tables);
        Ok(store)
    }

    /// Reads what is there.
    fn load(&mut self) -> Result<Tables> {
        let mut tables = Tables { next: 1, ..Tables::default() };
        let read = |e| Error::at("read", &self.directory)(e);
        let mut numbers = Vec::new();
        for entry in fs::read_dir(&self.directory).map_err(read)? {
            let name = entry.map_err(read)?.file_name();
            let Some(name) = name.to_str() else { continue };
            if name.starts_with(NEW) {
                self.throw_away(&self.directory.join(name), name)?;
            }
            numbers.extend(number(name));
        }
        // Of two with the same key, which no order of steps leaves, the first is found by it.
        numbers.sort_unstable();
        for number in numbers {
            tables.next = tables.next.max(number.0.saturating_add(1));
            match self.load_layer(number) {
                Ok(layer) => {
                    tables.by_key.entry(layer.key()).or_insert(number);
                    tables.by_number.insert(number, Arc::new(layer));
                }
                // Nothing is wrong with the layer if we have no memory, no descriptors or no right.
                Err(error @ (Error::Damaged { .. } | Error::NoLayer(_))) => {
                    self.throw_away(&self.path(number), &number.to_string())?;
                    self.damaged.push(Damage { layer: number, error });
                }
                Err(error) => return Err(error),
            }
        }
        Ok(tables)
    }

    fn load_layer(&self, number: LayerNumber) -> Result<Layer> {
        let directory = self.path(number);
        let about = match About::load(&directory, number) {
            Err(Error::Io { source, .. })
                if matches!(
                    source.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) =>
            {
                return Err(Error::NoLayer(number));
            }
            about => about?,
        };
        let path = directory.join(ABOUT);
        let used = path.metadata().and_then(|m| m.modified()).map_err(Error::at("stat", &path))?;
        let used = used.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let restorable = !self.is_first_of_boot;
        let layer = Layer::new(directory, about, self.common.clone(), restorable, used);
        layer.check_lengths()?;
        Ok(layer)
    }

    /// Layers that were damaged when the store was opened.
    pub fn damaged(&self) -> &[Damage] {
        &self.damaged
    }

    /// Whether nobody opened the store before since the machine was started: then whatever is said
    /// to be good is of an earlier boot, and wrong.
    pub fn is_first_of_boot(&self) -> bool {
        self.is_first_of_boot
    }

    fn path(&self, number: LayerNumber) -> PathBuf {
        self.directory.join(number.to_string())
    }

    fn save_next(&self, next: u32) -> Result<()> {
        // In its place, for a full disk must not keep anybody from starting. A power cut may take
        // it: numbers begin anew with the boot, after those that are there.
        let text = format!("{}\n{next:0NEXT_DIGITS$}\n", self.boot);
        let path = self.directory.join(BOOT);
        let mut options = File::options();
        let file = options.write(true).create(true).truncate(false).mode(0o600).open(&path);
        let written = file.and_then(|file| {
            file.write_all_at(text.as_bytes(), 0)?;
            file.set_len(text.len() as u64)
        });
        written.map_err(Error::at("write", &path))
    }

    /// The layer with that number.
    pub fn get(&self, number: LayerNumber) -> Option<Arc<Layer>> {
        lock(&self.tables).by_number.get(&number).cloned()
    }

    /// The layer with that key.
    pub fn find(&self, key: &LayerKey) -> Option<Arc<Layer>> {
        let tables = lock(&self.tables);
        tables.by_key.get(key).and_then(|number| tables.by_number.get(number)).cloned()
    }

    /// All layers, by number.
    pub fn layers(&self) -> Vec<Arc<Layer>> {
        lock(&self.tables).by_number.values().cloned().collect()
    }

    /// Makes the layer `key` out of its table of contents, which the caller has checked to be the
    /// one that the key names. If it is there, or another thread is just making it, this is that
    /// layer, which remembers the repository as well, in whatever [`State`](crate::State) it is.
    ///
    /// [`Error::Refused`] if the layer has to be unpacked.
    pub fn create(&self, key: LayerKey, about: &Description, toc: &Toc) -> Result<Arc<Layer>> {
        self.create_with(key, about, toc, Made::Toc)
    }

    /// As [`LayerStore::create`], of what there is besides the table of contents.
    pub(crate) fn create_with(
        &self,
        key: LayerKey,
        about: &Description,
        toc: &Toc,
        of: Made<'_>,
    ) -> Result<Arc<Layer>> {
        let number = {
            let mut tables = lock(&self.tables);
            loop {
                if let Some(layer) =
                    tables.by_key.get(&key).and_then(|number| tables.by_number.get(number))
                {
                    let layer = layer.clone();
                    drop(tables);
                    layer.add_repository(&about.repository)?;
                    return Ok(layer);
                }
                if !tables.making.contains(&key) {
                    break;
                }
                self.made.wait(&mut tables);
            }
            let number = tables.next;
            // Before the number is used, so that it never is again.
            self.save_next(number + 1)?;
            tables.next = number + 1;
            tables.making.insert(key);
            LayerNumber(number)
        };
        let made = self.make(number, key, about, toc, of);
        let mut tables = lock(&self.tables);
        tables.making.remove(&key);
        let made = made.map(Arc::new);
        if let Ok(layer) = &made {
            tables.by_key.insert(key, number);
            tables.by_number.insert(number, layer.clone());
        }
        self.made.notify_all();
        made
    }

    fn make(
        &self,
        number: LayerNumber,
        key: LayerKey,
        about: &Description,
        toc: &Toc,
        of: Made<'_>,
    ) -> Result<Layer> {
        let new = self.directory.join(format!("{NEW}{number}"));
        let made = self.make_in(&new, number, key, about, toc, of).and_then(|about| {
            let path = self.path(number);
            renameat_with(CWD, &new, CWD, &path, RenameFlags::NOREPLACE)
                .map_err(Error::at("rename", &new))?;
            if self.options.fsync {
                disk::sync_directory(&self.directory)?;
            }
            Ok(Layer::new(path, about, self.common.clone(), true, now()))
        });
        if made.is_err() {
            // What cannot be removed now is at the next start.
            _ = fs::remove_dir_all(&new);
        }
        made
    }

    fn make_in(
        &self,
        directory: &Path,
        number: LayerNumber,
        key: LayerKey,
        about: &Description,
        toc: &Toc,
        of: Made<'_>,
    ) -> Result<About> {
        let image = build::image(&key, toc, self.options.opaque)?;
        let mut fixed = Fixed::new(key, number);
        fixed.set(about.codec, toc.landmark(), of.pieces());
        fixed.diff_id = of.diff_id();
        fixed.blob_size = about.blob_size;
        fixed.frames = u32::try_from(toc.frames().count()).unwrap_or(u32::MAX);
        fixed.data_blocks = image.data_blocks().into();
        fixed.meta_bytes = image.bytes();
        let mut changing = Changing::default();
        changing.add(&about.repository)?;
        disk::make_directory(directory)?;
        let mut files = Vec::new();
        let mut file = |name: &str, write: &mut dyn FnMut(&File) -> io::Result<()>| -> Result<()> {
            let path = directory.join(name);
            let file = disk::create(&path)?;
            write(&file).map_err(Error::at("write", &path))?;
            files.push((path, file));
            Ok(())
        };
        let mut digest = DigestOf(Hasher::new(), 0);
        file(META, &mut |file| image.write(Form::WithDevice, &mut Both(&mut digest, file)))?;
        fixed.meta_digest = digest.0.finish();
        drop(image);
        file(INDEX, &mut |file| {
            let mut file = io::BufWriter::with_capacity(64 << 10, file);
            fixed.chunks = index::write(&key, toc.records(), &mut file)?;
            file.flush()
        })?;
        if let Some(spans) = of.spans() {
            file(SPANS, &mut |file| file.write_all_at(spans, 0))?;
        }
        if let Some(entries) = of.entries() {
            file(ENTRIES, &mut |file| file.write_all_at(entries, 0))?;
            // As with claims below.
            let digests = vec![0; fixed.chunks as usize * DIGEST];
            file(DIGESTS, &mut |file| file.write_all_at(&digests, 0))?;
        }
        // Zeros and not a hole: to claim something later needs no space.
        let claims = Bits::bytes(fixed.chunks) as usize;
        let claimed = if of.data().is_some() { u8::MAX } else { 0 };
        file(CLAIMS, &mut |file| file.write_all_at(&vec![claimed; claims], 0))?;
        match of.data() {
            None => file(DATA, &mut |file| file.set_len(fixed.data_blocks * BLOCK))?,
            Some(data) => {
                files.push(data.place(directory, toc, fixed.data_blocks * BLOCK)?);
                let path = directory.join(WHOLE);
                files.push((path.clone(), disk::create(&path)?));
            }
        }
        let about = About { fixed, changing };
        about.save(directory, false)?;
        // Whatever the options say, that data is whole is believed after the next boot.
        if self.options.fsync || of.data().is_some() {
            for name in [ABOUT, ""] {
                let path = directory.join(name);
                files.push((path.clone(), File::open(&path).map_err(Error::at("open", &path))?));
            }
            disk::sync_all(&files)?;
        }
        Ok(about)
    }

    /// Gives up a layer: its key and number find nothing any more. Who has it open keeps it as it
    /// is; its space is free after [`LayerStore::empty_trash`].
    pub fn remove(&self, number: LayerNumber) -> Result<()> {
        let mut tables = lock(&self.tables);
        self.remove_from(&mut tables, number)
    }

    fn remove_from(&self, tables: &mut Tables, number: LayerNumber) -> Result<()> {
        let layer = tables.by_number.get(&number).ok_or(Error::NoLayer(number))?;
        let key = layer.key();
        self.throw_away(layer.directory(), &number.to_string())?;
        tables.by_number.remove(&number);
        if tables.by_key.get(&key) == Some(&number) {
            tables.by_key.remove(&key);
        }
        Ok(())
    }

    /// Removes the layer if nobody has it and `unused` says so; no thread can find it meanwhile.
    pub(crate) fn remove_unused(
        &self,
        number: LayerNumber,
        unused: impl FnOnce() -> bool,
    ) -> Result<bool> {
        let mut tables = lock(&self.tables);
        let is_free = tables.by_number.get(&number).is_some_and(|l| Arc::strong_count(l) == 1);
        if !is_free || !unused() {
            return Ok(false);
        }
        self.remove_from(&mut tables, number)?;
        Ok(true)
    }

    /// A new directory in which something is made; what is left in it goes at the next start.
    pub(crate) fn new_directory(&self) -> Result<PathBuf> {
        let number = self.unpacked.fetch_add(1, Ordering::Relaxed);
        let directory = self.directory.join(format!("{NEW}data.{number}"));
        disk::make_directory(&directory)?;
        Ok(directory)
    }

    fn throw_away(&self, path: &Path, name: &str) -> Result<()> {
        for attempt in 0u32.. {
            let target = self.directory.join(TRASH).join(format!("{name}.{attempt}"));
            match renameat_with(CWD, path, CWD, &target, RenameFlags::NOREPLACE) {
                Ok(()) | Err(Errno::NOENT) => break,
                Err(Errno::EXIST) => {}
                // Not even a name fits. What a kill leaves of it has files too few.
                Err(Errno::NOSPC | Errno::DQUOT) => {
                    return fs::remove_dir_all(path).map_err(Error::at("remove", path));
                }
                Err(error) => return Err(Error::at("rename", path)(error)),
            }
        }
        Ok(())
    }

    /// Removes what is in the trash.
    pub fn empty_trash(&self) -> Result<()> {
        let _one = lock(&self.emptying);
        let trash = self.directory.join(TRASH);
        for entry in fs::read_dir(&trash).map_err(Error::at("read", &trash))? {
            let path = entry.map_err(Error::at("read", &trash))?.path();
            let removed = match path.symlink_metadata() {
                Ok(found) if found.is_dir() => fs::remove_dir_all(&path),
                _ => fs::remove_file(&path),
            };
            match removed {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                removed => removed.map_err(Error::at("remove", &path))?,
            }
        }
        Ok(())
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// The number that a directory's name is.
fn number(name: &str) -> Option<LayerNumber> {
    name.parse().ok().map(LayerNumber).filter(|number| number.to_string() == name)
}

/// The next number as an earlier life of the boot `boot` noted it.
fn last_next(directory: &Path, boot: &str) -> Result<Option<u32>> {
    let path = directory.join(BOOT);
    let text = match disk::read(&path, MAX_BOOT) {
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            return Ok(None);
        }
        read => read?.unwrap_or_default(),
    };
    let text = std::str::from_utf8(&text).unwrap_or_default();
    let mut lines = text.lines();
    let is_same = lines.next() == Some(boot);
    let next = lines.next().filter(|next| is_same && next.len() == NEXT_DIGITS);
    Ok(next.and_then(|next| next.parse().ok()))
}

/// Whether holes can be made: without them nothing can be given up in pieces.
fn check_holes(directory: &Path) -> Result<()> {
    let path = directory.join(format!("{NEW}hole"));
    let file = match disk::create(&path) {
        // Holes are what is needed now, whether they can be made or not.
        Err(Error::NoSpace { .. }) => return Ok(()),
        file => file?,
    };
    file.set_len(BLOCK).map_err(Error::at("write", &path))?;
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let made = fallocate(&file, flags, 0, BLOCK);
    fs::remove_file(&path).map_err(Error::at("remove", &path))?;
    match made {
        Err(Errno::OPNOTSUPP) => Err(Error::NoHoles(directory.display().to_string())),
        made => made.map_err(Error::at("make a hole in", &path)),
    }
}

/// Writes to two.
struct Both<'a, A, B>(&'a mut A, B);

impl<A: io::Write, B: io::Write> io::Write for Both<'_, A, B> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.1.write_all(bytes)?;
        self.0.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.1.flush()
    }
}

impl Default for Common {
    fn default() -> Self {
        Self { pages: Arc::default(), start: Instant::now() }
    }
}
