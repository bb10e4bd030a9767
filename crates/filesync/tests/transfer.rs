//! Whole transfers over in-memory streams between directories.

use parking_lot::Mutex;
use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::Path,
    sync::Arc,
};

use futures::StreamExt;
use shipway_fault::{Fault, Result};
use shipway_filesync::*;
use shipway_gocompat::{FileKind, FileMode};
use shipway_proto::fsutil::types::packet::PacketType;

async fn transfer(
    from: &Path,
    to: &Path,
    send: SendOptions,
    receive: ReceiveOptions,
) -> (Result<Sent>, Result<Received>) {
    let (a, b) = PacketStream::pair();
    let sender = shipway_task::spawn("test", Sender::new(from, send).run(a));
    let received = Receiver::new(to, receive).run(b).await;
    (sender.await.expect("no panic"), received)
}

async fn sync(from: &Path, to: &Path, receive: ReceiveOptions) -> (Sent, Received) {
    let (sent, received) = transfer(from, to, SendOptions::default(), receive).await;
    (sent.expect("sends"), received.expect("receives"))
}

/// Everything that a transfer keeps of a tree, as text.
fn listing(dir: &Path) -> Vec<String> {
    let mut out = Vec::new();
    let mut inodes = std::collections::HashMap::new();
    for entry in KnownTree::scan(dir).expect("scan").entries() {
        let full = dir.join(&*entry.path);
        let content = if entry.mode.kind() == FileKind::Regular {
            fs::read_to_string(&full).unwrap_or_default()
        } else {
            String::new()
        };
        let meta = fs::symlink_metadata(&full).expect("stat");
        let first = inodes.entry(meta.ino()).or_insert_with(|| entry.path.clone()).clone();
        out.push(format!(
            "{} {:o} {} {} {content} ={first}",
            entry.path,
            meta.mode(),
            entry.mtime,
            entry.link
        ));
    }
    out
}

fn sample(dir: &Path) {
    fs::create_dir_all(dir.join("d/e")).expect("dirs");
    fs::write(dir.join("d/e/f"), "content of f").expect("file");
    fs::write(dir.join("d-after"), "x").expect("file");
    fs::write(dir.join("empty"), "").expect("file");
    fs::write(dir.join("big"), "0123456789".repeat(100_000)).expect("file");
    fs::hard_link(dir.join("big"), dir.join("d/hard")).expect("link");
    symlink("../outside", dir.join("d/sym")).expect("link");
    fs::create_dir(dir.join("ro")).expect("dir");
    fs::write(dir.join("ro/inner"), "y").expect("file");
    fs::set_permissions(dir.join("ro"), fs::Permissions::from_mode(0o555)).expect("mode");
    fs::set_permissions(dir.join("d/e/f"), fs::Permissions::from_mode(0o4750)).expect("mode");
    let old = std::time::SystemTime::UNIX_EPOCH
        + std::time::Duration::from_nanos(1_234_567_890_123_456_789);
    for path in ["d/e/f", "d/e", "ro"] {
        fs::File::open(dir.join(path)).expect("open").set_modified(old).expect("time");
    }
}

fn kinds(received: &Received) -> Vec<(String, ChangeKind)> {
    received.changes.iter().map(|c| (c.path.to_string(), c.kind)).collect()
}

#[tokio::test]
async fn a_tree_arrives_as_it_is() {
    let (from, to) = (tempfile::tempdir().expect("dir"), tempfile::tempdir().expect("dir"));
    sample(from.path());
    let (sent, received) = sync(from.path(), to.path(), ReceiveOptions::default()).await;
    assert_eq!(listing(to.path()), listing(from.path()));
    assert_eq!((sent.entries, sent.files, sent.bytes), (10, 4, 1_000_014));
    assert_eq!(
        (received.progress.entries, received.progress.files, received.progress.done),
        (10, 4, true)
    );
    assert_eq!(received.tree.entries(), KnownTree::scan(to.path()).expect("scan").entries());
    assert_eq!(received.changes.len(), 10);
}

#[tokio::test]
async fn only_what_changed_moves() {
    let (from, to) = (tempfile::tempdir().expect("dir"), tempfile::tempdir().expect("dir"));
    sample(from.path());
    let (_, first) = sync(from.path(), to.path(), ReceiveOptions::default()).await;
    for known in [None, Some(first.tree.clone())] {
        let (sent, received) =
            sync(from.path(), to.path(), ReceiveOptions { known, ..Default::default() }).await;
        assert_eq!((sent.files, received.changes.len()), (0, 0));
    }

    fs::write(from.path().join("d/e/f"), "new content").expect("write");
    fs::remove_dir_all(from.path().join("ro")).expect("remove");
    fs::write(from.path().join("ro"), "a file now").expect("write");
    fs::remove_file(from.path().join("empty")).expect("remove");
    fs::create_dir(from.path().join("empty")).expect("dir");
    fs::write(from.path().join("new"), "n").expect("write");
    fs::remove_file(from.path().join("d-after")).expect("remove");
    let (sent, received) = sync(
        from.path(),
        to.path(),
        ReceiveOptions { known: Some(first.tree), ..Default::default() },
    )
    .await;
    assert_eq!(sent.files, 3);
    assert_eq!(listing(to.path()), listing(from.path()));
    use ChangeKind::*;
    let expected = [
        ("d/e/f", Modified),
        ("d-after", Deleted),
        ("empty", Modified),
        ("new", Added),
        ("ro", Modified),
    ];
    assert_eq!(kinds(&received), expected.map(|(p, k)| (p.to_owned(), k)));
}

#[tokio::test]
async fn a_changed_file_leaves_its_other_names_alone_or_takes_them_along() {
    let (from, to) = (tempfile::tempdir().expect("dir"), tempfile::tempdir().expect("dir"));
    sample(from.path());
    sync(from.path(), to.path(), ReceiveOptions::default()).await;
    fs::write(from.path().join("big"), "small").expect("write in place: both names change");
    sync(from.path(), to.path(), ReceiveOptions::default()).await;
    assert_eq!(listing(to.path()), listing(from.path()));
    fs::remove_file(from.path().join("big")).expect("remove: the other name stays");
    sync(from.path(), to.path(), ReceiveOptions::default()).await;
    assert_eq!(listing(to.path()), listing(from.path()));
}

#[tokio::test]
async fn filters_and_maps_apply() {
    let (from, to) = (tempfile::tempdir().expect("dir"), tempfile::tempdir().expect("dir"));
    sample(from.path());
    let send = SendOptions {
        include: vec!["d".into(), "ro/inner".into()],
        exclude: vec!["**/e".into()],
        ..Default::default()
    };
    let receive = ReceiveOptions {
        map: Some(Arc::new(|stat: &mut Stat| stat.mode |= 0o4)),
        ..Default::default()
    };
    let (sent, received) = transfer(from.path(), to.path(), send, receive).await;
    sent.expect("sends");
    let paths: Vec<String> =
        received.expect("receives").tree.entries().iter().map(|e| e.path.to_string()).collect();
    // The link's first name was filtered away, so that the second is a file.
    assert_eq!(paths, ["d", "d/hard", "d/sym", "ro", "ro/inner"]);
    assert_eq!(fs::read(to.path().join("d/hard")).expect("read").len(), 1_000_000);

    let to = tempfile::tempdir().expect("dir");
    let send = SendOptions { follow: vec!["d/e/f".into()], ..Default::default() };
    let (_, received) = transfer(from.path(), to.path(), send, ReceiveOptions::default()).await;
    let paths: Vec<String> =
        received.expect("receives").tree.entries().iter().map(|e| e.path.to_string()).collect();
    assert_eq!(paths, ["d", "d/e", "d/e/f"]);
}

#[tokio::test]
async fn a_merge_deletes_nothing_and_replaces_what_is_in_the_way() {
    let (from, to) = (tempfile::tempdir().expect("dir"), tempfile::tempdir().expect("dir"));
    sample(from.path());
    fs::write(to.path().join("mine"), "kept").expect("write");
    fs::create_dir_all(to.path().join("empty/deep")).expect("in the way of a file");
    symlink("/etc", to.path().join("d")).expect("in the way of a directory");
    sync(from.path(), to.path(), ReceiveOptions { merge: true, ..Default::default() }).await;
    assert_eq!(fs::read_to_string(to.path().join("mine")).expect("read"), "kept");
    fs::remove_file(to.path().join("mine")).expect("remove");
    assert_eq!(listing(to.path()), listing(from.path()));
}

#[tokio::test]
async fn several_directories_go_below_their_names() {
    let (from, to) = (tempfile::tempdir().expect("dir"), tempfile::tempdir().expect("dir"));
    sample(from.path());
    symlink("/d", from.path().join("abs")).expect("link");
    let roots = ["linux_amd64", "linux_arm64"]
        .map(|n| SendRoot::under(from.path(), n, SendOptions::default()).expect("root"));
    let (a, b) = PacketStream::pair();
    let sender = shipway_task::spawn("test", Sender::many(roots.to_vec()).expect("names").run(a));
    Receiver::new(to.path(), ReceiveOptions::default()).run(b).await.expect("receives");
    sender.await.expect("no panic").expect("sends");
    assert_eq!(
        fs::read_link(to.path().join("linux_arm64/abs")).expect("link"),
        Path::new("/linux_arm64/d")
    );
    let inode = |p: &str| fs::metadata(to.path().join(p)).expect("stat").ino();
    assert_eq!(inode("linux_arm64/big"), inode("linux_arm64/d/hard"));
    assert!(Sender::many(vec![roots[0].clone(), roots[0].clone()]).is_err());
}

#[tokio::test]
async fn digests_come_with_the_changes() {
    struct Sum;
    struct Adding(u8);
    impl ContentHash for Sum {
        fn start(&self, _: &Stat) -> Box<dyn HashSink> {
            Box::new(Adding(7))
        }
    }
    impl HashSink for Adding {
        fn update(&mut self, data: &[u8]) {
            self.0 = data.iter().fold(self.0, |a, b| a.wrapping_add(*b));
        }
        fn finish(self: Box<Self>) -> [u8; 32] {
            [self.0; 32]
        }
    }
    let (from, to) = (tempfile::tempdir().expect("dir"), tempfile::tempdir().expect("dir"));
    fs::write(from.path().join("a"), [1, 2]).expect("write");
    fs::write(from.path().join("b"), []).expect("write");
    fs::create_dir(from.path().join("c")).expect("dir");
    let (_, received) = sync(
        from.path(),
        to.path(),
        ReceiveOptions { hash: Some(Arc::new(Sum)), ..Default::default() },
    )
    .await;
    let digests: Vec<_> = received.changes.iter().map(|c| c.digest.map(|d| d[0])).collect();
    assert_eq!(digests, [Some(10), Some(7), None]);
}

/// Plays `packets` to a receiver in an empty directory below one with a file `secret`; what it
/// answers and what is left outside.
async fn hostile(packets: Vec<Packet>) -> (Result<Received>, String) {
    let outer = tempfile::tempdir().expect("dir");
    let to = outer.path().join("to");
    fs::create_dir(&to).expect("dir");
    fs::write(outer.path().join("secret"), "secret").expect("file");
    let (sink, stream) = packets_in();
    let (out, mut answers) = shipway_filesync::packets();
    let receiver = shipway_task::spawn("test", async move {
        let options = ReceiveOptions::default();
        Receiver::new(&to, options).run(PacketStream::new(stream.map(Ok::<_, Fault>), out)).await
    });
    let (mut described, mut asked, mut last) = (0, Vec::new(), None);
    for packet in packets {
        described += u32::from(packet.stat.is_some());
        // Content of a file that exists comes when it is asked for; of others it comes unasked.
        while packet.r#type() == PacketType::PacketData
            && packet.id < described
            && !asked.contains(&packet.id)
            && last.is_none()
        {
            let answer = answers.next().await.expect("the receiver asks or ends");
            note(&answer, &mut asked, &mut last);
        }
        let _ = sink.send(packet).await;
    }
    // The receiver answers with an error by itself; an end of the stream is the last resort of the
    // test.
    while last.is_none()
        && let Some(answer) = answers.next().await
    {
        note(&answer, &mut asked, &mut last);
    }
    drop(sink);
    let result = receiver.await.expect("no panic");
    assert_eq!(last == Some(PacketType::PacketErr), result.is_err(), "the sender is told");
    (result, fs::read_to_string(outer.path().join("secret")).expect("still there"))
}

fn note(answer: &Packet, asked: &mut Vec<u32>, last: &mut Option<PacketType>) {
    match answer.r#type() {
        PacketType::PacketReq => asked.push(answer.id),
        kind @ (PacketType::PacketErr | PacketType::PacketFin) => *last = Some(kind),
        _ => {}
    }
}

fn packets_in()
-> (tokio::sync::mpsc::Sender<Packet>, tokio_stream::wrappers::ReceiverStream<Packet>) {
    shipway_filesync::packets()
}

fn stat(path: &str, mode: u32, size: i64, link: &str) -> Packet {
    let stat = Stat { path: path.into(), mode, size, linkname: link.into(), ..Default::default() };
    Packet { r#type: PacketType::PacketStat.into(), stat: Some(stat), ..Default::default() }
}

fn end() -> Packet {
    Packet { r#type: PacketType::PacketStat.into(), ..Default::default() }
}

fn data(id: u32, text: &'static str) -> Packet {
    Packet { r#type: PacketType::PacketData.into(), id, data: text.into(), ..Default::default() }
}

#[tokio::test]
async fn hostile_packets_are_refused() {
    let dir = FileMode::directory(0o755).0;
    let link = FileMode::symlink().0;
    let removed = stat("a", FileMode::from_unix(0o020_644).0, 0, "");
    let large = with_xattrs("a", &[("user.a", vec![0; 1 << 20])]);
    for (packets, expected) in [
        (
            vec![removed],
            "refuse \"a\" from the sender: a character device 0:0 stands for a removed file",
        ),
        (vec![large], "too many extended attributes"),
        (vec![stat("../secret", 0o644, 0, "")], "path leaves the tree"),
        (
            vec![stat("a", link, 1, ".."), stat("a/secret", 0o644, 0, "")],
            "its directory was not sent",
        ),
        (vec![stat("b", 0o644, 0, ""), stat("a", 0o644, 0, "")], "out of order"),
        (vec![stat("a", 0o644, 0, "../secret")], "unknown path"),
        (vec![stat("a", dir, 0, ""), stat("b", 0o644, 0, "a")], "unknown path"),
        (vec![stat("a", link, 1, ".."), stat("b", 0o644, 0, "a")], "unknown path"),
        (vec![stat("a", 0o644, 1, ""), end(), data(7, "x")], "invalid file request 7"),
        (
            vec![stat("a", 0o644, 1, ""), end(), stat("b", 0o644, 1, "")],
            "after it said that all were described",
        ),
        (vec![end(), end()], ""),
        (
            vec![Packet {
                r#type: PacketType::PacketErr.into(),
                data: "broken".into(),
                ..Default::default()
            }],
            "error from sender: broken",
        ),
        (
            vec![Packet { r#type: PacketType::PacketFin.into(), ..Default::default() }],
            "before its files were received",
        ),
        (
            vec![Packet { r#type: PacketType::PacketReq.into(), ..Default::default() }],
            "asks for files",
        ),
    ] {
        let (result, secret) = hostile(packets).await;
        assert_eq!(secret, "secret");
        if !expected.is_empty() {
            let fault = result.expect_err(expected);
            assert!(fault.to_string().contains(expected), "{fault} / {expected}");
        }
    }
}

#[tokio::test]
async fn a_file_that_is_sent_too_long_is_cut_and_one_too_short_is_asked_for_again() {
    let (result, _) = hostile(vec![
        stat("long", 0o644, 2, ""),
        stat("short", 0o644, 5, ""),
        end(),
        data(0, "ab"),
        data(0, "cdef"),
        data(1, "x"),
        data(0, ""),
        data(1, ""),
    ])
    .await;
    let tree = result.expect("receives").tree;
    assert_eq!(tree.get("long").map(|e| e.mtime), Some(0));
    assert_eq!(tree.get("short").map(|e| e.mtime), Some(i64::MIN));
}

#[tokio::test]
async fn failures_reach_the_other_end() {
    let to = tempfile::tempdir().expect("dir");
    let (a, b) = PacketStream::pair();
    let sender = Sender::new("/nonexistent/context", SendOptions::default()).run(a);
    let (sent, received) =
        tokio::join!(sender, Receiver::new(to.path(), ReceiveOptions::default()).run(b));
    assert!(sent.expect_err("no such directory").to_string().contains("/nonexistent/context"));
    assert!(received.is_err());

    let from = tempfile::tempdir().expect("dir");
    sample(from.path());
    let (sent, received) = transfer(
        from.path(),
        Path::new("/nonexistent/dest"),
        SendOptions::default(),
        ReceiveOptions::default(),
    )
    .await;
    assert!(received.expect_err("no such directory").to_string().contains("/nonexistent/dest"));
    assert!(sent.expect_err("told").to_string().contains("error from receiver"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_files_arrive_and_one_changed_file_moves_alone() {
    let (from, to) = (tempfile::tempdir().expect("dir"), tempfile::tempdir().expect("dir"));
    for d in 0..20 {
        fs::create_dir(from.path().join(format!("d{d}"))).expect("dir");
        for f in 0..100 {
            fs::write(from.path().join(format!("d{d}/f{f}")), vec![b'x'; 4096]).expect("file");
        }
    }
    let reports = Arc::new(Mutex::new(Vec::new()));
    let progress: Arc<dyn Fn(Progress) + Send + Sync> = {
        let reports = reports.clone();
        Arc::new(move |p| reports.lock().push(p))
    };
    let started = std::time::Instant::now();
    let (sent, cold) = sync(
        from.path(),
        to.path(),
        ReceiveOptions { progress: Some(progress), ..Default::default() },
    )
    .await;
    eprintln!("cold: {:?}", started.elapsed());
    assert_eq!(sent.files, 2000);
    assert_eq!(listing(to.path()), listing(from.path()));
    assert!(reports.lock().last().is_some_and(|p| p.done && p.files == 2000));

    fs::write(from.path().join("d7/f42"), "changed").expect("write");
    let started = std::time::Instant::now();
    let (sent, warm) = sync(
        from.path(),
        to.path(),
        ReceiveOptions { known: Some(cold.tree), ..Default::default() },
    )
    .await;
    eprintln!("warm: {:?}", started.elapsed());
    assert_eq!((sent.files, sent.bytes), (1, 7));
    assert_eq!(kinds(&warm), [("d7/f42".to_owned(), ChangeKind::Modified)]);
}

#[tokio::test]
async fn a_transfer_that_breaks_off_deletes_nothing() {
    let to = tempfile::tempdir().expect("dir");
    fs::write(to.path().join("x"), "kept").expect("write");
    for failure in [None, Some(Fault::not_found("no access"))] {
        let (out, _answers) = packets();
        let incoming = futures::stream::iter([Ok(stat("a", 0o644, 0, ""))])
            .chain(futures::stream::iter(failure.map(Err)));
        let result = Receiver::new(to.path(), ReceiveOptions::default())
            .run(PacketStream::new(incoming, out))
            .await;
        assert!(result.is_err());
        assert!(to.path().join("x").exists());
    }
}

/// What a listing says: paths and sizes.
fn listed(dir: &Path) -> Vec<(String, i64)> {
    use prost::Message;
    let (bytes, mut at, mut out) = (fs::read(dir.join(LISTING)).expect("a listing"), 0, Vec::new());
    while at < bytes.len() {
        let length = u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes")) as usize;
        let stat = Stat::decode(&bytes[at + 4..at + 4 + length]).expect("a stat");
        out.push((stat.path, stat.size));
        at += 4 + length;
    }
    out
}

#[tokio::test]
async fn a_listed_directory_has_only_what_is_wanted_and_says_what_else_there_is() {
    let (from, to) = (tempfile::tempdir().expect("dir"), tempfile::tempdir().expect("dir"));
    sample(from.path());
    // The sender's own file of that name is not the listing.
    fs::write(from.path().join(LISTING), "forged").expect("file");
    let wanted = Arc::new(PatternMatcher::new(["d/*/f", "ro"]).expect("patterns"));
    let options = ReceiveOptions { listed: Some(wanted), ..Default::default() };
    sync(from.path(), to.path(), options.clone()).await;
    let there = || {
        listing(to.path())
            .iter()
            .filter_map(|l| l.split(' ').next())
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(there(), [LISTING, "d", "d/e", "d/e/f", "ro", "ro/inner"]);
    let paths: Vec<_> = listed(to.path()).into_iter().map(|(path, _)| path).collect();
    assert_eq!(
        paths,
        ["big", "d", "d/e", "d/e/f", "d/hard", "d/sym", "d-after", "empty", "ro", "ro/inner"]
    );
    assert_eq!(fs::read_to_string(to.path().join("d/e/f")).expect("file"), "content of f");

    // Again: what is gone goes, and the listing is a new file.
    let old = fs::metadata(to.path().join(LISTING)).expect("stat").ino();
    let held = fs::File::open(to.path().join(LISTING)).expect("open");
    fs::remove_file(from.path().join("d/e/f")).expect("remove");
    fs::write(from.path().join("empty"), "12").expect("file");
    let (_, received) = sync(from.path(), to.path(), options).await;
    assert_eq!(there(), [LISTING, "ro", "ro/inner"]);
    assert!(listed(to.path()).contains(&("empty".to_owned(), 2)));
    assert_ne!(fs::metadata(to.path().join(LISTING)).expect("stat").ino(), old);
    assert!(
        received.tree.get(LISTING).is_none()
            && received.changes.iter().any(|c| &*c.path == LISTING)
    );
    drop(held);
}

/// A file with one byte, and attributes.
fn with_xattrs(path: &str, xattrs: &[(&str, Vec<u8>)]) -> Packet {
    let mut packet = stat(path, 0o644, 1, "");
    packet.stat.as_mut().expect("a stat").xattrs =
        xattrs.iter().map(|(k, v)| ((*k).to_owned(), v.clone())).collect();
    packet
}

/// Sends `packets`, and then nothing without an end; what the receiver ends with.
async fn receive_under(budget: &Arc<Budget>, packets: Vec<Packet>) -> Result<Received> {
    let to = tempfile::tempdir().expect("dir");
    let stream = futures::stream::iter(packets.into_iter().map(Ok::<_, Fault>))
        .chain(futures::stream::pending());
    let (out, mut answers) = packets_in();
    let options = ReceiveOptions { budget: Some(budget.clone()), ..Default::default() };
    let receiver = Receiver::new(to.path(), options);
    let mut running = std::pin::pin!(receiver.run(PacketStream::new(stream, out)));
    loop {
        tokio::select! {
            received = &mut running => return received,
            Some(_) = answers.next() => {}
        }
    }
}

#[tokio::test]
async fn what_is_described_and_never_sent_has_a_bound() {
    let budget = Budget::new(1 << 20, 1 << 20);
    // Attributes of files whose content never comes.
    let attributes: Vec<Packet> =
        (0..20).map(|n| with_xattrs(&format!("{n:02}"), &[("user.a", vec![0; 60_000])])).collect();
    // Entries without any.
    let entries: Vec<Packet> = (0..5_000).map(|n| stat(&format!("{n:04}"), 0o644, 1, "")).collect();
    // Long names.
    let names: Vec<Packet> = (0..3_000).map(|n| stat(&format!("{n:0200}"), 0o644, 1, "")).collect();
    for packets in [attributes, entries, names] {
        let fault = receive_under(&budget, packets).await.expect_err("too much");
        assert!(fault.to_string().contains("the sender's tree is too large"), "{fault}");
    }
    // What the failed ones took is free again.
    let (from, to) = (tempfile::tempdir().expect("dir"), tempfile::tempdir().expect("dir"));
    (0..2_000).for_each(|n| fs::write(from.path().join(format!("{n:04}")), "x").expect("file"));
    sync(from.path(), to.path(), ReceiveOptions { budget: Some(budget), ..Default::default() })
        .await;
}

#[tokio::test]
async fn all_transfers_together_have_a_bound() {
    let budget = Budget::new(1 << 20, 3 << 19);
    let many = || (0..3_000).map(|n| stat(&format!("{n:04}"), 0o644, 1, "")).collect::<Vec<_>>();
    let to = tempfile::tempdir().expect("dir");
    // One stalls after its descriptions.
    let stalled = futures::stream::iter(many().into_iter().map(Ok::<_, Fault>))
        .chain(futures::stream::pending());
    let (out, mut answers) = packets_in();
    let options = ReceiveOptions { budget: Some(budget.clone()), ..Default::default() };
    let first = shipway_task::spawn("test", {
        let receiver = Receiver::new(to.path(), options);
        async move { receiver.run(PacketStream::new(stalled, out)).await }
    });
    for _ in 0..3_000 {
        answers.next().await.expect("a request");
    }
    let fault = receive_under(&budget, many()).await.expect_err("too much together");
    assert!(fault.to_string().contains("too many large directories"), "{fault}");
    first.abort();
}

#[tokio::test]
async fn attributes_that_belong_to_no_image_are_left_out() {
    let (from, to) = (tempfile::tempdir().expect("dir"), tempfile::tempdir().expect("dir"));
    fs::create_dir(from.path().join("d")).expect("dir");
    fs::write(from.path().join("d/f"), "x").expect("file");
    let set = |path: &str, name: &str| {
        rustix::fs::lsetxattr(from.path().join(path), name, b"y", rustix::fs::XattrFlags::empty())
            .expect(name)
    };
    for path in ["d", "d/f"] {
        ["user.kept", "user.overlay.opaque", "trusted.overlay.opaque", "trusted.other"]
            .iter()
            .for_each(|name| set(path, name));
    }
    sync(from.path(), to.path(), ReceiveOptions::default()).await;
    for path in ["d", "d/f"] {
        let get =
            |name: &str| rustix::fs::lgetxattr(to.path().join(path), name, &mut [0_u8; 8]).is_ok();
        assert!(get("user.kept"), "{path}");
        for name in ["user.overlay.opaque", "trusted.overlay.opaque", "trusted.other"] {
            assert!(!get(name), "{path} {name}");
        }
    }
}

#[tokio::test]
async fn files_of_equal_size_and_time_are_told_apart_by_senders_that_can() {
    let (one, two, to) = (
        tempfile::tempdir().expect("dir"),
        tempfile::tempdir().expect("dir"),
        tempfile::tempdir().expect("dir"),
    );
    let time = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
    for (dir, text) in [(&one, "first"), (&two, "other")] {
        fs::write(dir.path().join("f"), text).expect("file");
        fs::File::options()
            .write(true)
            .open(dir.path().join("f"))
            .expect("open")
            .set_modified(time)
            .expect("time");
    }
    let go = async |from: &Path, identify: bool, known: Option<KnownTree>| {
        let send = SendOptions { identify, ..Default::default() };
        let (sent, received) =
            transfer(from, to.path(), send, ReceiveOptions { known, ..Default::default() }).await;
        let text = fs::read_to_string(to.path().join("f")).expect("file");
        (sent.expect("sends").files, text, received.expect("receives").tree)
    };
    let (files, text, tree) = go(one.path(), true, None).await;
    assert_eq!((files, text.as_str()), (1, "first"));
    let (files, text, tree) = go(two.path(), true, Some(tree)).await;
    assert_eq!((files, text.as_str()), (1, "other"));
    // What did not change stays, also when only the identities are remembered.
    let identities = tree.identities();
    let (files, _, tree) = go(two.path(), true, Some(tree)).await;
    assert_eq!((files, tree.identities() == identities), (0, true));
    let walked = KnownTree::scan_identified(to.path(), &identities).expect("scan");
    assert_eq!(go(two.path(), true, Some(walked)).await.0, 0);
    // Of a directory about which nothing is remembered all is asked for.
    assert_eq!(go(two.path(), true, None).await.0, 1);
    // A sender that cannot tell has size and time, and leaves nothing to trust for one that can.
    let (files, text, tree) = go(one.path(), false, Some(tree)).await;
    assert_eq!((files, text.as_str()), (0, "other"));
    let (files, text, _) = go(one.path(), true, Some(tree)).await;
    assert_eq!((files, text.as_str()), (1, "first"));
    assert!(
        rustix::fs::lgetxattr(to.path().join("f"), "shipway.identity", &mut [0_u8; 8]).is_err()
    );
}

#[test]
fn permissions_are_never_those_of_a_links_target() {
    let dir = tempfile::tempdir().expect("dir");
    fs::write(dir.path().join("target"), "").expect("file");
    fs::set_permissions(dir.path().join("target"), fs::Permissions::from_mode(0o600))
        .expect("mode");
    symlink("target", dir.path().join("link")).expect("link");
    let at = fs::File::open(dir.path()).expect("open");
    let mode = |m| rustix::fs::Mode::from_raw_mode(m);
    assert_eq!(chmod_nofollow(&at, "link", mode(0o777)), Err(rustix::io::Errno::LOOP));
    assert_eq!(fs::metadata(dir.path().join("target")).expect("stat").mode() & 0o7777, 0o600);
    chmod_nofollow(&at, "target", mode(0o4711)).expect("chmod");
    assert_eq!(fs::metadata(dir.path().join("target")).expect("stat").mode() & 0o7777, 0o4711);
}
