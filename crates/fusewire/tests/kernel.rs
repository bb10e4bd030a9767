//! A directory of one file, served to the kernel. As root, for only root mounts it like this.
//! Nothing is mounted anywhere: the mount is a file descriptor that goes with the test, and the
//! connection with the server's.

#![allow(clippy::unwrap_used)]

use rustix::{
    fd::{AsFd, AsRawFd, OwnedFd},
    fs::{Mode, OFlags, open},
    io::{Errno, pread, read, write},
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount,
        fsopen,
    },
};
use shipway_fusewire::*;
use std::{
    fs,
    os::unix::fs::{FileExt, MetadataExt},
    path::PathBuf,
    process::Command,
    sync::mpsc::{Receiver, Sender, channel},
};

const FILE: NodeId = NodeId(2);
const SIZE: u64 = 3 * (1 << 20) + 777;

fn byte(at: u64) -> u8 {
    (at ^ at >> 8 ^ at >> 16) as u8
}

fn contents(offset: u64, out: &mut [u8]) -> usize {
    let count = SIZE.saturating_sub(offset).min(out.len() as u64) as usize;
    (0..).zip(&mut out[..count]).for_each(|(n, b)| *b = byte(offset + n));
    count
}

/// The connection, and the mount.
struct Mounted {
    mount: OwnedFd,
}

impl Mounted {
    fn new() -> (OwnedFd, Self) {
        assert!(
            rustix::process::geteuid().is_root(),
            "mounts need root: run as root, as `cargo xtask test` does"
        );
        let device = open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .expect("the kernel has no FUSE");
        let context = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
        let options = [
            ("fd", device.as_raw_fd().to_string()),
            ("rootmode", "40000".into()),
            ("user_id", "0".into()),
            ("group_id", "0".into()),
        ];
        for (key, value) in options {
            fsconfig_set_string(context.as_fd(), key, value).unwrap();
        }
        fsconfig_create(context.as_fd()).unwrap();
        (
            device,
            Self {
                mount: fsmount(
                    context.as_fd(),
                    FsMountFlags::FSMOUNT_CLOEXEC,
                    MountAttrFlags::empty(),
                )
                .unwrap(),
            },
        )
    }

    fn path(&self, name: &str) -> PathBuf {
        format!("/proc/self/fd/{}/{name}", self.mount.as_raw_fd()).into()
    }
}

/// What the server does with a read.
#[derive(Clone, Copy, PartialEq)]
enum Reads {
    Answered,
    /// Parked; tells of it and goes on.
    Parked,
    /// The server ends with the request in its slot, as if it had been killed there, before or just
    /// after it was parked.
    Deadly {
        parked: bool,
    },
}

#[derive(Debug, PartialEq)]
enum Event {
    Began { resend: bool },
    Parked,
    Interrupted,
}

/// Serves until the mount is gone or a read is deadly. It owns its descriptor, so that nobody waits
/// for a server that has failed.
fn serve(device: OwnedFd, slots: &Slots, reads: Reads, direct: bool, events: &Sender<Event>) {
    let device = &device;
    let mut slot = slots.reader(0).unwrap();
    let mut reply = Reply::with_room_for(1 << 20);
    let file = NodeAttributes::new(FILE, 0o100_444, SIZE, 1);
    let root = NodeAttributes::new(NodeId::ROOT, 0o40_555, 0, 2);
    let of = |node| if node == NodeId::ROOT { root } else { file };
    loop {
        slot.clear();
        match read(device, slot.bytes()) {
            Ok(_) => {}
            Err(Errno::INTR | Errno::AGAIN | Errno::NOENT) => continue,
            // Unmounted.
            Err(Errno::NODEV) => return,
            Err(error) => panic!("read a request: {error}"),
        }
        let request = Request::parse(slot.bytes()).unwrap();
        let unique = request.header.unique;
        let answer = match request.operation {
            Operation::Init(offer) => {
                let answer =
                    offer.answer(InitOptions::default()).expect("a protocol of Linux 5.4 or newer");
                events.send(Event::Began { resend: answer.can_resend() }).unwrap();
                reply.init(unique, &answer)
            }
            Operation::Lookup { name: b"file" } if request.header.node == NodeId::ROOT => {
                reply.entry(unique, &file)
            }
            Operation::Lookup { .. } => reply.error(unique, Errno::NOENT),
            Operation::GetAttr => reply.attributes(unique, &of(request.header.node)),
            Operation::Open { .. } => reply.opened(unique, Opened { direct, ..Opened::default() }),
            Operation::OpenDir => {
                reply.opened(unique, Opened { cache_directory: true, ..Opened::default() })
            }
            Operation::ReadDir { offset, size, .. } => reply.data(unique, size as usize, |bytes| {
                let mut buffer = DirBuffer::new(bytes);
                if offset == 0 {
                    buffer.add(FILE.0, file.mode, b"file", 1);
                }
                Ok(buffer.filled())
            }),
            Operation::Read { offset, size, .. } => match reads {
                Reads::Answered => {
                    reply.data(unique, size as usize, |bytes| Ok(contents(offset, bytes)))
                }
                Reads::Deadly { parked: false } => return,
                Reads::Parked | Reads::Deadly { .. } => {
                    slots.park(Parked { unique, node: request.header.node, offset, size }).unwrap();
                    if reads != Reads::Parked {
                        return;
                    }
                    events.send(Event::Parked).unwrap();
                    continue;
                }
            },
            Operation::Interrupt { unique } => {
                events.send(Event::Interrupted).unwrap();
                let Some((id, _)) = slots.parked().find(|(_, parked)| parked.unique == unique)
                else {
                    continue;
                };
                let _ = write(device, reply.error(unique, Errno::INTR));
                slots.unpark(id);
                continue;
            }
            Operation::StatFs => reply.statfs(unique, StatFs { blocks: 1, files: 1 }),
            Operation::Release { .. } | Operation::ReleaseDir { .. } => reply.done(unique),
            Operation::Forget { .. } | Operation::BatchForget(_) | Operation::Destroy => continue,
            _ => reply.error(unique, Errno::NOSYS),
        };
        match write(device, answer) {
            // Whoever asked may be gone.
            Ok(_) | Err(Errno::NOENT) => {}
            Err(error) => panic!("answer: {error}"),
        }
    }
}

/// Answers what a predecessor left.
#[track_caller]
fn replay(device: &OwnedFd, slots: &Slots) -> usize {
    slots.clear_unfinished();
    let mut reply = Reply::default();
    let mut reads: Vec<Parked> = slots.parked().map(|(_, parked)| parked).collect();
    for left in slots.left_in_slots() {
        let request = Request::parse(&left).unwrap();
        if let Operation::Read { offset, size, .. } = request.operation {
            reads.push(Parked {
                unique: request.header.unique,
                node: request.header.node,
                offset,
                size,
            });
        }
    }
    for parked in &reads {
        let answer = reply
            .data(parked.unique, parked.size as usize, |bytes| Ok(contents(parked.offset, bytes)));
        // The second time is one too many, and harmless.
        write(device, answer).unwrap();
        assert_eq!(write(device, answer), Err(Errno::NOENT));
    }
    slots.parked().for_each(|(id, _)| slots.unpark(id));
    reads.len()
}

#[track_caller]
fn started(events: &Receiver<Event>) {
    assert!(matches!(events.recv().unwrap(), Event::Began { .. }));
}

#[test]
fn a_file_is_listed_and_read_by_the_page_cache_and_past_it() {
    for direct in [false, true] {
        let (device, mounted) = Mounted::new();
        let (_fd, slots) = Slots::create().unwrap();
        let (tell, events) = channel();
        let slots = &slots;
        std::thread::scope(move |scope| {
            scope.spawn(move || serve(device, slots, Reads::Answered, direct, &tell));
            started(&events);
            let names: Vec<_> =
                fs::read_dir(mounted.path("")).unwrap().map(|e| e.unwrap().file_name()).collect();
            assert_eq!(names, ["file"]);
            let found = fs::metadata(mounted.path("file")).unwrap();
            assert_eq!((found.len(), found.ino(), found.mode()), (SIZE, FILE.0, 0o100_444));
            assert!(!mounted.path("other").exists());
            let whole = fs::read(mounted.path("file")).unwrap();
            assert!(whole.len() as u64 == SIZE && (0..).zip(&whole).all(|(at, b)| *b == byte(at)));
            let past = open(
                mounted.path("file"),
                OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC,
                Mode::empty(),
            )
            .unwrap();
            let mut bytes = vec![0; 2 << 20];
            let mut count = 0;
            while count < bytes.len() {
                count += pread(&past, &mut bytes[count..], (1 << 20) + count as u64).unwrap();
            }
            assert!((1 << 20..).zip(&bytes).all(|(at, b)| *b == byte(at)));
            assert_eq!(pread(&past, &mut bytes, SIZE).unwrap(), 0);
        });
    }
}

#[test]
fn a_reader_that_is_killed_is_let_go() {
    let (device, mounted) = Mounted::new();
    let (_fd, slots) = Slots::create().unwrap();
    let (tell, events) = channel();
    let shared = &slots;
    std::thread::scope(move |scope| {
        scope.spawn(move || serve(device, shared, Reads::Parked, true, &tell));
        started(&events);
        let file = format!("/proc/{}/fd/{}/file", std::process::id(), mounted.mount.as_raw_fd());
        let mut reader = Command::new("cat").arg(file).spawn().unwrap();
        assert_eq!(events.recv().unwrap(), Event::Parked);
        reader.kill().unwrap();
        assert!(!reader.wait().unwrap().success());
        assert_eq!(events.recv().unwrap(), Event::Interrupted);
    });
    assert_eq!(slots.parked().count(), 0);
}

/// Requests outlive the server that read them, parked or just in its slot, or sent again by the
/// kernel, and whoever asked sees nothing of it.
#[test]
fn a_successor_answers_what_its_predecessor_had_read() {
    for (parked, resend) in [(true, false), (false, false), (false, true)] {
        let (device, mounted) = Mounted::new();
        let (memory, slots) = Slots::create().unwrap();
        let (tell, events) = channel();
        let (next, next_tell) = (Slots::open(&memory).unwrap(), tell.clone());
        let (slots, next) = (&slots, &next);
        std::thread::scope(move |scope| {
            let again = rustix::io::dup(&device).unwrap();
            let first =
                scope.spawn(move || serve(again, slots, Reads::Deadly { parked }, true, &tell));
            let Event::Began { resend: can_resend } = events.recv().unwrap() else {
                panic!("not begun")
            };
            let path = mounted.path("file");
            let reader = scope.spawn(move || {
                let mut bytes = [0; 100];
                fs::File::open(path)?.read_exact_at(&mut bytes, 5000)?;
                std::io::Result::Ok(bytes)
            });
            first.join().unwrap();
            if resend {
                assert!(can_resend, "this needs Linux 6.9 or newer");
                write(&device, Reply::default().resend()).unwrap();
            } else {
                assert_eq!(replay(&device, next), 1);
            }
            scope.spawn(move || serve(device, next, Reads::Answered, true, &next_tell));
            assert!((5000..).zip(reader.join().unwrap().unwrap()).all(|(at, b)| b == byte(at)));
        });
    }
}
