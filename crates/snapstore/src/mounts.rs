//! What is mounted below our root for the sake of snapshots, and for how long.
//!
//! A mount is wanted while a snapshot that can be written or viewed stands on it ([`Point`]s of the
//! index), and for a while after that. Who is about to use one holds it ([`Mounts::hold`]); what
//! nobody holds or wants is unmounted ([`Mounts::unmount_idle`]).

use crate::{
    LayerId,
    model::{Backing, lock},
};
use parking_lot::{Condvar, Mutex};
use shipway_fault::Result;
use shipway_layermount::MappedIds;
use std::{
    collections::HashMap,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

/// Before something is tried again that could not be unmounted.
const PAUSE: Duration = Duration::from_secs(1);

/// Something that is mounted.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Point {
    /// A layer.
    Layer(LayerId),
    /// A clone in which files have the owners of a user namespace.
    Mapped(Arc<MappedIds>, Tree),
}

/// What a clone is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Tree {
    /// The directories of all snapshots.
    Snapshots,
    Layer(LayerId),
}

impl Point {
    /// What a snapshot with these ids needs that stands on `below`. What something is a clone of
    /// comes before it.
    pub(crate) fn under(ids: Option<&Arc<MappedIds>>, below: &[Backing]) -> Vec<Self> {
        let mut points = Vec::new();
        for place in below {
            let (layer, tree) = match place {
                Backing::Directory(_) => (None, Tree::Snapshots),
                Backing::Layer(layer) => (Some(Self::Layer(*layer)), Tree::Layer(*layer)),
            };
            let clone = ids.map(|ids| Self::Mapped(ids.clone(), tree));
            for point in [layer, clone].into_iter().flatten() {
                if !points.contains(&point) {
                    points.push(point);
                }
            }
        }
        points
    }

    fn is_of(&self, layer: LayerId) -> bool {
        match self {
            Self::Layer(of) | Self::Mapped(_, Tree::Layer(of)) => *of == layer,
            Self::Mapped(_, Tree::Snapshots) => false,
        }
    }
}

struct Entry {
    /// Somebody mounts or unmounts it just now.
    changing: bool,
    mounted: bool,
    holders: usize,
    /// When it was of use last.
    used: Instant,
}

#[derive(Default)]
pub(crate) struct Mounts {
    entries: Mutex<HashMap<Point, Entry>>,
    changed: Condvar,
}

/// Keeps something mounted.
pub(crate) struct Held<'a> {
    mounts: &'a Mounts,
    pub(crate) point: Point,
    pub(crate) path: PathBuf,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut entries = lock(&self.mounts.entries);
        if let Some(entry) = entries.get_mut(&self.point) {
            entry.holders -= 1;
            entry.used = Instant::now();
            if entry.holders == 0 && !entry.mounted {
                entries.remove(&self.point);
            }
        }
        self.mounts.changed.notify_all();
    }
}

/// Ends the time in which only one thread may do something with a mount, however it ends.
struct Changing<'a> {
    mounts: &'a Mounts,
    point: &'a Point,
    /// Whether it is mounted afterwards; unchanged if not known.
    mounted: Option<bool>,
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        let mut entries = lock(&self.mounts.entries);
        if let Some(entry) = entries.get_mut(self.point) {
            entry.changing = false;
            entry.mounted = self.mounted.unwrap_or(entry.mounted);
            entry.used = Instant::now();
            if entry.holders == 0 && !entry.mounted {
                entries.remove(self.point);
            }
        }
        self.mounts.changed.notify_all();
    }
}

impl Mounts {
    fn entry<'a>(entries: &'a mut HashMap<Point, Entry>, point: &Point) -> &'a mut Entry {
        entries.entry(point.clone()).or_insert_with(|| Entry {
            changing: false,
            mounted: false,
            holders: 0,
            used: Instant::now(),
        })
    }

    /// Notes what an earlier life left mounted.
    pub(crate) fn found(&self, point: &Point) {
        Self::entry(&mut lock(&self.entries), point).mounted = true;
    }

    /// Has it mounted by `mount`, which is asked even if it is mounted, and one at a time.
    pub(crate) fn hold(
        &self,
        point: Point,
        mount: impl FnOnce() -> Result<PathBuf>,
    ) -> Result<Held<'_>> {
        let mut entries = lock(&self.entries);
        Self::entry(&mut entries, &point).holders += 1;
        while Self::entry(&mut entries, &point).changing {
            self.changed.wait(&mut entries);
        }
        Self::entry(&mut entries, &point).changing = true;
        drop(entries);
        let mut held = Held { mounts: self, point, path: PathBuf::new() };
        let mut changing = Changing { mounts: self, point: &held.point, mounted: None };
        let path = mount()?;
        changing.mounted = Some(true);
        drop(changing);
        held.path = path;
        Ok(held)
    }

    /// Whoever needed these does not need them any more, from now on.
    pub(crate) fn used(&self, points: &[Point]) {
        let mut entries = lock(&self.entries);
        for point in points {
            if let Some(entry) = entries.get_mut(point) {
                entry.used = Instant::now();
            }
        }
    }

    /// Unmounts what was of no use for `grace`, and returns when there will be more of it.
    pub(crate) fn unmount_idle(
        &self,
        grace: Duration,
        wanted: impl Fn(&Point) -> bool,
        unmount: impl Fn(&Point) -> Result<()>,
    ) -> Option<Instant> {
        let (mut due, mut next) = (Vec::new(), None::<Instant>);
        let now = Instant::now();
        let mut later = |at: Instant| next = Some(next.map_or(at, |next| next.min(at)));
        for (point, entry) in lock(&self.entries).iter() {
            if wanted(point) {
                // Whoever ends that has it looked at again.
                continue;
            }
            match entry.used + grace {
                _ if entry.holders > 0 || entry.changing => later(now + grace.max(PAUSE)),
                at if at <= now => due.push(point.clone()),
                at => later(at),
            }
        }
        for point in due {
            if self.unmount_unless(&point, &wanted, &unmount).is_err() {
                later(Instant::now() + grace.max(PAUSE));
            }
        }
        next
    }

    /// Unmounts one if nobody holds or wants it.
    fn unmount_unless(
        &self,
        point: &Point,
        wanted: impl Fn(&Point) -> bool,
        unmount: impl Fn(&Point) -> Result<()>,
    ) -> Result<()> {
        match lock(&self.entries).get_mut(point) {
            Some(entry) if entry.mounted && !entry.changing && entry.holders == 0 => {
                if wanted(point) {
                    return Ok(());
                }
                entry.changing = true;
            }
            _ => return Ok(()),
        }
        let mut changing = Changing { mounts: self, point, mounted: None };
        unmount(point).inspect_err(|error| {
            tracing::warn!(?point, %error, "something stays mounted");
        })?;
        changing.mounted = Some(false);
        Ok(())
    }

    /// Waits until nobody holds `layer` or a clone of it, and unmounts them unless they are wanted
    /// by then.
    pub(crate) fn retire(
        &self,
        layer: LayerId,
        wanted: impl Fn(&Point) -> bool,
        unmount: impl Fn(&Point) -> Result<()>,
    ) {
        let mut entries = lock(&self.entries);
        while entries.iter().any(|(p, e)| p.is_of(layer) && (e.holders > 0 || e.changing)) {
            self.changed.wait(&mut entries);
        }
        let points: Vec<Point> = entries.keys().filter(|p| p.is_of(layer)).cloned().collect();
        drop(entries);
        for point in points {
            // What fails was told, and is tried again.
            let _ = self.unmount_unless(&point, &wanted, &unmount);
        }
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        lock(&self.entries).values().filter(|e| e.mounted).count()
    }
}
