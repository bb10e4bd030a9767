//! What is noted of a file to be compared or given back later: data that can be stored.

use rustix::fs::{Stat, Timespec, Timestamps};
use serde::{Deserialize, Serialize};

/// A file's owner, permissions, size and times.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Noted {
    mode: u32,
    uid: u32,
    gid: u32,
    /// In bytes.
    pub size: i64,
    /// Seconds and nanoseconds since the epoch.
    modified: (i64, i64),
    accessed: (i64, i64),
}

impl Noted {
    /// What there is to note of a file with this status.
    #[allow(clippy::unnecessary_cast)]
    pub fn of(stat: &Stat) -> Self {
        Self {
            mode: stat.st_mode,
            uid: stat.st_uid,
            gid: stat.st_gid,
            size: stat.st_size,
            modified: (stat.st_mtime, stat.st_mtime_nsec as i64),
            accessed: (stat.st_atime, stat.st_atime_nsec as i64),
        }
    }

    /// Whether it is unchanged since, by its time, owner and permissions.
    pub fn is_same(&self, now: &Stat) -> bool {
        let now = Self::of(now);
        (self.mode, self.uid, self.gid, self.modified) == (now.mode, now.uid, now.gid, now.modified)
    }

    /// The times, to be given back.
    #[allow(clippy::unnecessary_cast)]
    pub fn timestamps(&self) -> Timestamps {
        let time = |(seconds, nanos): (i64, i64)| Timespec { tv_sec: seconds, tv_nsec: nanos as _ };
        Timestamps { last_access: time(self.accessed), last_modification: time(self.modified) }
    }
}

/// When a file was modified, in nanoseconds since the epoch.
#[allow(clippy::unnecessary_cast)]
pub(crate) fn nanos(stat: &Stat) -> i128 {
    i128::from(stat.st_mtime) * 1_000_000_000 + stat.st_mtime_nsec as i128
}

/// The times of a file, to be given back.
pub(crate) fn timestamps(stat: &Stat) -> Timestamps {
    Noted::of(stat).timestamps()
}

/// How the marks of an overlay are stored: whether there are any, and whether they are users'.
pub(crate) mod marks {
    use serde::{Deserialize as _, Deserializer, Serialize as _, Serializer};
    use shipway_storage::overlay::Marks;

    pub(crate) fn serialize<S: Serializer>(
        marks: &Option<Marks>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        marks.map(|marks| marks == Marks::User).serialize(to)
    }

    pub(crate) fn deserialize<'d, D: Deserializer<'d>>(from: D) -> Result<Option<Marks>, D::Error> {
        let user = Option::<bool>::deserialize(from)?;
        Ok(user.map(|user| if user { Marks::User } else { Marks::Trusted }))
    }
}
