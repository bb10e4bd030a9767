//! What the processes of a container open.

use rustix::{
    buffer::spare_capacity,
    event::{PollFd, PollFlags, poll},
    fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
    fs::{AtFlags, CWD, FileType, StatxFlags, fstat, readlink, statx},
    io::Errno,
    pipe::{PipeFlags, pipe_with},
};
use shipway_fault::{Code, Fault, Result};
use std::{collections::HashSet, ffi::CString, io, thread::JoinHandle};

/// Most files that are noted of a container; what it opens after them is of no interest.
const MAX_FILES: usize = 1 << 16;
/// Bytes of events that are read at once.
const EVENTS: usize = 16 << 10;
/// Bytes of an event's fixed part (`struct fanotify_event_metadata`), which begins with its length
/// and has its file descriptor at [`FD`].
const EVENT: usize = 24;
const FD: usize = 16;

/// Notes what the processes in a root filesystem open, until it is dropped.
pub struct Opened {
    /// Closed to end the thread.
    stop: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Opened {
    /// Begins to note the regular files that are opened in the root filesystem of the process
    /// `pid`, which has one of its own: each goes to `note` once, as an absolute path in there. A
    /// process that makes a mount namespace of its own is not seen from then on.
    pub fn of(pid: u32, note: impl FnMut(Vec<u8>) + Send + 'static) -> Result<Self> {
        let failed = |e: io::Error| {
            Fault::io("watch which files a process opens", e)
                .hint("it takes a kernel with fanotify, and CAP_SYS_ADMIN")
        };
        let root = format!("/proc/{pid}/root");
        let mount = |path: &str| {
            statx(CWD, path, AtFlags::empty(), StatxFlags::MNT_ID).map(|stat| stat.stx_mnt_id)
        };
        let (its, ours) = (mount(&root), mount("/"));
        if its.map_err(|e| failed(e.into()))? == ours.map_err(|e| failed(e.into()))? {
            return Err(Fault::new(
                Code::FailedPrecondition,
                "a process has no root filesystem of its own, so what it opens is not known",
            ));
        }
        let group = group().map_err(failed)?;
        mark(&group, &root).map_err(failed)?;
        let (stopped, stop) = pipe_with(PipeFlags::CLOEXEC).map_err(|e| failed(e.into()))?;
        let thread = std::thread::Builder::new()
            .name("opened-files".into())
            .spawn(move || watch(&group, &stopped, note))
            .map_err(failed)?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

/// Waits for what was opened before to be noted: that is soon done, but blocks.
impl Drop for Opened {
    fn drop(&mut self) {
        self.stop = None;
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// A group of events whose files are opened for reading, without waiting for the other end of a
/// pipe. rustix has no call for it.
#[allow(unsafe_code)]
fn group() -> io::Result<OwnedFd> {
    let flags = libc::FAN_CLASS_NOTIF | libc::FAN_CLOEXEC | libc::FAN_NONBLOCK;
    let files = libc::O_RDONLY | libc::O_LARGEFILE | libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: takes numbers, touches no memory of this process.
    let fd = unsafe { libc::fanotify_init(flags, (files | libc::O_NOATIME) as u32) };
    match fd {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: the kernel has just opened it for us.
        fd => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
    }
}

/// Has what is opened by way of the mount at `path` reported to `group`.
#[allow(unsafe_code)]
fn mark(group: &OwnedFd, path: &str) -> io::Result<()> {
    let path = CString::new(path)?;
    let flags = libc::FAN_MARK_ADD | libc::FAN_MARK_MOUNT;
    // SAFETY: the path is a string that ends with a zero and outlives the call.
    let done = unsafe {
        let (group, mask) = (group.as_raw_fd(), libc::FAN_OPEN);
        libc::fanotify_mark(group, flags, mask, libc::AT_FDCWD, path.as_ptr())
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The files of the events in `bytes`, in their order. Those that were lost, or cannot be opened,
/// have none.
#[allow(unsafe_code)]
fn files(mut bytes: &[u8]) -> impl Iterator<Item = OwnedFd> {
    std::iter::from_fn(move || {
        loop {
            let event = bytes.first_chunk::<EVENT>()?;
            let len = u32::from_ne_bytes(*event.first_chunk()?) as usize;
            let fd = i32::from_ne_bytes(*event[FD..].first_chunk()?);
            bytes = bytes.get(len.max(EVENT)..).unwrap_or_default();
            if fd >= 0 {
                // SAFETY: the kernel has opened it for whoever reads the event.
                return Some(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
    })
}

fn watch(group: &OwnedFd, stopped: &OwnedFd, mut note: impl FnMut(Vec<u8>)) {
    let (mut seen, mut events) = (HashSet::new(), Vec::with_capacity(EVENTS));
    loop {
        events.clear();
        match rustix::io::read(group, spare_capacity(&mut events)) {
            Err(Errno::INTR) => continue,
            Err(Errno::AGAIN) => {
                let (group, stopped) = (group.as_fd(), stopped.as_fd());
                let mut ends =
                    [group, stopped].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
                match poll(&mut ends, None) {
                    Err(Errno::INTR) => {}
                    // What came before the end is noted.
                    Ok(_) if !ends[0].revents().is_empty() => {}
                    _ => return,
                }
                continue;
            }
            Err(_) | Ok(0) => return,
            Ok(_) => {}
        }
        for file in files(&events) {
            let is_file = |file: &OwnedFd| {
                fstat(file)
                    .is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::RegularFile)
            };
            if seen.len() >= MAX_FILES || !is_file(&file) {
                continue;
            }
            let Ok(path) = readlink(format!("/proc/self/fd/{}", file.as_raw_fd()), Vec::new())
            else {
                continue;
            };
            let path = path.into_bytes();
            if seen.insert(path.clone()) {
                note(path);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::Mutex;
    use std::{
        io::{BufRead as _, BufReader, Write as _},
        process::{Command, Stdio},
        sync::Arc,
    };

    #[test]
    fn files_are_noted_once_in_the_order_of_opening() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["c", "a", "b"] {
            std::fs::write(dir.path().join(name), name).unwrap();
        }
        // A process in a mount namespace of its own, whose root is another mount than ours.
        let script = "echo; read go; cd \"$0\"; true < b; true < a; true < b; true < missing; true < c; exit 0";
        let mut child = Command::new("unshare")
            .args(["--mount", "sh", "-c", script])
            .arg(dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let noted = Arc::new(Mutex::new(Vec::new()));
        let note = noted.clone();
        let opened = Opened::of(child.id(), move |path| note.lock().push(path)).unwrap();
        child.stdin.take().unwrap().write_all(b"\n").unwrap();
        child.wait().unwrap();
        drop(opened);
        let want = ["b", "a", "c"].map(|name| dir.path().join(name).into_os_string());
        let mut noted = std::mem::take(&mut *noted.lock());
        noted.retain(|path| path.starts_with(dir.path().as_os_str().as_encoded_bytes()));
        assert_eq!(noted, want.map(|path| path.into_encoded_bytes()));
    }

    #[test]
    fn our_own_root_is_not_watched() {
        let refused = Opened::of(std::process::id(), |_| {}).err().unwrap();
        assert!(refused.to_string().contains("no root filesystem of its own"), "{refused}");
    }
}
