//! The meaning of a layer's entries, and the bounds on them. Images are looked at through the
//! reader.

#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use shipway_erofs::*;

fn builder() -> Builder {
    Builder::new(Options::default(), &Attributes { mode: 0o755, ..Attributes::default() }).unwrap()
}

fn file(builder: &mut Builder, path: &str) -> Result<Inserted, BuildError> {
    builder.insert(
        path.as_bytes(),
        &Attributes { mode: 0o644, ..Attributes::default() },
        Node::File { size: 1 },
    )
}

fn add(builder: &mut Builder, path: &str, node: Node<'_>) -> Result<Inserted, BuildError> {
    builder.insert(path.as_bytes(), &Attributes { mode: 0o700, ..Attributes::default() }, node)
}

/// Paths, with the kind of each in one letter.
fn shown(builder: Builder) -> Vec<String> {
    let image = bytes(&builder.finish().unwrap(), Form::WithDevice);
    let reader = Reader::open(&image).unwrap();
    let mut lines = Vec::new();
    let mut stack = vec![(reader.root(), String::new())];
    while let Some((nid, path)) = stack.pop() {
        let directory = reader.directory(&reader.metadata(nid).unwrap()).unwrap();
        for entry in
            directory.entries(0).map(Result::unwrap).filter(|e| !matches!(e.name, b"." | b".."))
        {
            let path = format!("{path}/{}", String::from_utf8_lossy(entry.name));
            let found = reader.metadata(entry.nid).unwrap();
            let letter = match found.content {
                Content::Directory
                    if reader
                        .xattrs(&found)
                        .unwrap()
                        .iter()
                        .any(|x| x.name.ends_with(b".opaque") && x.value == b"y") =>
                {
                    'o'
                }
                Content::Directory => 'd',
                Content::File(_) => 'f',
                Content::CharDevice(DeviceNumber { major: 0, minor: 0 }) if found.mode == 0 => 'w',
                Content::Symlink => 'l',
                _ => '?',
            };
            lines.push(format!("{letter} {path}"));
            if matches!(found.content, Content::Directory) {
                stack.push((entry.nid, path));
            }
        }
    }
    lines.sort_by(|a, b| a[2..].cmp(&b[2..]));
    lines
}

#[test]
fn parents_are_implied_and_can_be_told_later() {
    let mut layer = builder();
    file(&mut layer, "a/b/c").unwrap();
    file(&mut layer, "x/y").unwrap();
    add(&mut layer, "x", Node::Directory).unwrap();
    file(&mut layer, "gone/sub/file").unwrap();
    file(&mut layer, "gone").unwrap();
    let implied: Vec<String> =
        layer.implied().unwrap().into_iter().map(|p| String::from_utf8(p).unwrap()).collect();
    assert_eq!(implied, ["a", "a/b"]);
    assert_eq!(layer.len(), 6);
    add(&mut layer, "a/b", Node::Directory).unwrap();
    assert_eq!(layer.implied().unwrap(), [b"a"]);
    assert_eq!(shown(layer), ["d /a", "d /a/b", "f /a/b/c", "f /gone", "d /x", "f /x/y"]);
}

#[test]
fn later_entries_replace_earlier_ones() {
    let mut layer = builder();
    file(&mut layer, "d/old").unwrap();
    add(&mut layer, "d", Node::Directory).unwrap();
    file(&mut layer, "d/new").unwrap();
    file(&mut layer, "f").unwrap();
    add(&mut layer, "f", Node::Directory).unwrap();
    file(&mut layer, "tree/a/b").unwrap();
    add(&mut layer, "tree", Node::Symlink { target: b"d" }).unwrap();
    assert_eq!(shown(layer), ["d /d", "f /d/new", "f /d/old", "d /f", "l /tree"]);
}

#[test]
fn links_of_the_layer_lead_to_parents_inside_the_root() {
    let mut layer = builder();
    add(&mut layer, "usr/lib", Node::Directory).unwrap();
    add(&mut layer, "lib", Node::Symlink { target: b"/usr/lib" }).unwrap();
    add(&mut layer, "usr/up", Node::Symlink { target: b"../../../lib/./more" }).unwrap();
    file(&mut layer, "lib/a").unwrap();
    file(&mut layer, "usr/up/b").unwrap();
    file(&mut layer, "lib/../c").unwrap();
    assert_eq!(
        shown(layer),
        [
            "f /c",
            "l /lib",
            "d /usr",
            "d /usr/lib",
            "f /usr/lib/a",
            "d /usr/lib/more",
            "f /usr/lib/more/b",
            "l /usr/up"
        ]
    );
    let mut layer = builder();
    add(&mut layer, "loop", Node::Symlink { target: b"loop/x" }).unwrap();
    assert_eq!(file(&mut layer, "loop/a"), Err(BuildError::TooManyLinks));
    file(&mut layer, "f").unwrap();
    assert_eq!(file(&mut layer, "f/a"), Err(BuildError::NotDirectory));
}

#[test]
fn whiteouts_are_for_lower_layers() {
    let mut layer = builder();
    let inserted: Vec<Inserted> =
        [".wh.gone", "d/.wh..wh..opq", "here", ".wh.here", ".wh.back", "back"]
            .iter()
            .map(|p| file(&mut layer, p).unwrap())
            .collect();
    use Inserted::*;
    let first = |block| File(Extent { block, blocks: 1 });
    assert_eq!(inserted, [Whiteout, Opaque, first(0), Whiteout, Whiteout, first(1)]);
    for bad in [".wh.", ".wh..", ".wh..."] {
        assert_eq!(file(&mut layer, bad), Err(BuildError::Whiteout), "{bad}");
    }
    assert_eq!(shown(layer), ["f /back", "o /d", "w /gone", "f /here"]);
}

#[test]
fn the_root_is_passed_over() {
    let mut layer = builder();
    for root in ["", "/", "./", "a/.."] {
        assert_eq!(add(&mut layer, root, Node::Directory), Ok(Inserted::Root), "{root}");
    }
    assert!(layer.is_empty());
    let image = bytes(&layer.finish().unwrap(), Form::Flat);
    let reader = Reader::open(&image).unwrap();
    assert_eq!(reader.metadata(reader.root()).unwrap().mode, 0o755);
}

#[test]
fn hard_links_need_what_they_link_to() {
    let mut layer = builder();
    file(&mut layer, "dir/a").unwrap();
    let link = |layer: &mut Builder, path: &str, target: &str| {
        add(layer, path, Node::HardLink { target: target.as_bytes() })
    };
    assert_eq!(link(&mut layer, "b", "none"), Err(BuildError::HardLink));
    assert_eq!(link(&mut layer, "b", "dir"), Err(BuildError::HardLink));
    assert_eq!(link(&mut layer, "b", "/"), Err(BuildError::HardLink));
    assert_eq!(link(&mut layer, "dir/a", "dir/a"), Err(BuildError::HardLink));
    let mut layer = builder();
    file(&mut layer, "dir/a").unwrap();
    assert_eq!(
        link(&mut layer, "dir", "dir/a"),
        Err(BuildError::NotDirectory),
        "it makes room first"
    );
    let mut layer = builder();
    file(&mut layer, "dir/a").unwrap();
    assert_eq!(link(&mut layer, "dir/b", "dir/a"), Ok(Inserted::Entry));
    file(&mut layer, "dir/a").unwrap();
    let image = layer.finish().unwrap();
    assert_eq!(image.inodes(), 4);
}

#[test]
fn names_and_paths_are_bounded() {
    let mut layer = builder();
    let name = "n".repeat(limits::NAME_BYTES);
    file(&mut layer, &name).unwrap();
    file(&mut layer, &format!("{name}d/x")).unwrap_err();
    assert_eq!(file(&mut layer, &format!("{name}n")), Err(BuildError::Path));
    let path = format!("{}x", "d/".repeat(limits::PATH_BYTES / 2));
    assert_eq!(path.len(), limits::PATH_BYTES);
    file(&mut layer, &path).unwrap();
    assert_eq!(file(&mut layer, &format!("{path}x")), Err(BuildError::Path));
    assert_eq!(file(&mut layer, "a\0b"), Err(BuildError::Path));
    let target = vec![b't'; limits::PATH_BYTES + 1];
    add(&mut layer, "l", Node::Symlink { target: &target[1..] }).unwrap();
    assert_eq!(add(&mut layer, "m", Node::Symlink { target: &target }), Err(BuildError::Path));
    assert_eq!(add(&mut layer, "m", Node::Symlink { target: b"" }), Err(BuildError::EmptyTarget));
    assert_eq!(add(&mut layer, "m", Node::HardLink { target: &target }), Err(BuildError::Path));
    let lines = shown(layer);
    assert_eq!(lines.len(), limits::PATH_BYTES / 2 + 1 + 2);
}

#[test]
fn attributes_are_checked() {
    let mut layer = builder();
    let mut with = |attributes: Attributes<'_>| layer.insert(b"f", &attributes, Node::Fifo);
    assert_eq!(with(Attributes { mode: 0o10000, ..Attributes::default() }), Err(BuildError::Mode));
    let mtime = Time { seconds: i64::MIN, nanoseconds: 999_999_999 };
    assert!(with(Attributes { mtime, ..Attributes::default() }).is_ok());
    let mtime = Time { nanoseconds: 1_000_000_000, ..mtime };
    assert_eq!(with(Attributes { mtime, ..Attributes::default() }), Err(BuildError::Time));
}

#[test]
fn links_on_the_way_are_bounded() {
    let chain = |links: usize| {
        let mut layer = builder();
        for n in 0..links {
            add(
                &mut layer,
                &format!("l{n}"),
                Node::Symlink { target: format!("l{}", n + 1).as_bytes() },
            )
            .unwrap();
        }
        file(&mut layer, "l0/x")
    };
    assert!(chain(limits::LINKS).is_ok());
    assert_eq!(chain(limits::LINKS + 1), Err(BuildError::TooManyLinks));
    let mut layer = builder();
    let target = format!("{}d", "./".repeat(2000));
    add(&mut layer, "l", Node::Symlink { target: target.as_bytes() }).unwrap();
    let refused = (0..).find_map(|n| file(&mut layer, "l/x").err().map(|e| (n, e)));
    assert_eq!(refused, Some((limits::LINKED_PATH_BYTES / target.len(), BuildError::TooManyLinks)));
}

#[test]
fn implied_paths_are_bounded() {
    // Each of n directories below the other has a path of two bytes more.
    let depth = 2000;
    let of = |trees: usize| {
        let mut layer = builder();
        (0..trees).for_each(|n| {
            assert!(file(&mut layer, &format!("{n:0>3}/{}x", "d/".repeat(depth))).is_ok())
        });
        layer.implied()
    };
    let each: usize = (0..=depth).map(|n| 3 + 2 * n).sum();
    let most = limits::IMPLIED_BYTES / each;
    assert_eq!(of(most).unwrap().iter().map(Vec::len).sum::<usize>(), most * each);
    assert_eq!(of(most + 1), Err(BuildError::TooMuchText));
}

#[test]
fn text_is_bounded() {
    let mut layer = builder();
    let target = [b't'; limits::PATH_BYTES];
    let refused = (0..).find_map(|n| {
        add(&mut layer, &format!("{n:0>5}"), Node::Symlink { target: &target })
            .err()
            .map(|e| (n, e))
    });
    assert_eq!(
        refused,
        Some((limits::TEXT_BYTES / (limits::PATH_BYTES + 5), BuildError::TooMuchText))
    );
}

#[test]
fn attributes_of_all_entries_are_bounded() {
    let mut layer = builder();
    let mut insert = |path: &str, xattrs: &[Xattr<'_>]| {
        layer
            .insert(
                path.as_bytes(),
                &Attributes { xattrs, ..Attributes::default() },
                Node::Directory,
            )
            .err()
    };
    let mut value = vec![0; limits::XATTR_VALUE_BYTES];
    let refused = (0u32..).find_map(|n| {
        value[..4].copy_from_slice(&n.to_le_bytes());
        insert(&format!("{n}"), &[Xattr { name: b"user.a", value: &value }])
            .map(|e| (n as usize, e))
    });
    assert_eq!(
        refused,
        Some((
            limits::XATTR_TEXT_BYTES / (limits::XATTR_VALUE_BYTES + 1),
            BuildError::TooManyXattrs
        ))
    );
    let mut layer = builder();
    let names: Vec<String> = (0..limits::XATTRS).map(|n| format!("user.{n}")).collect();
    let xattrs: Vec<Xattr<'_>> =
        names.iter().map(|n| Xattr { name: n.as_bytes(), value: b"" }).collect();
    layer
        .insert(b"d", &Attributes { xattrs: &xattrs, ..Attributes::default() }, Node::Directory)
        .unwrap();
    let refused = (1u32..).find_map(|n| {
        let xattrs = [Xattr { name: b"user.0", value: &n.to_le_bytes() }];
        layer
            .insert(b"d", &Attributes { xattrs: &xattrs, ..Attributes::default() }, Node::Directory)
            .err()
            .map(|e| (n as usize, e))
    });
    assert_eq!(refused, Some((limits::XATTR_MEMBERS / limits::XATTRS, BuildError::TooManyXattrs)));
}

#[test]
fn data_is_bounded_with_the_image_before_it() {
    let largest = (limits::BLOCKS - 1) * BLOCK;
    let mut layer = builder();
    assert_eq!(
        add(&mut layer, "f", Node::File { size: largest + 1 }),
        Err(BuildError::TooMuchData)
    );
    assert_eq!(add(&mut layer, "f", Node::File { size: u64::MAX }), Err(BuildError::TooMuchData));
    add(&mut layer, "f", Node::File { size: largest }).unwrap();
    assert_eq!(layer.finish().err(), Some(BuildError::TooMuchData));
    let mut layer = builder();
    add(&mut layer, "f", Node::File { size: largest - BLOCK }).unwrap();
    let image = layer.finish().unwrap();
    assert_eq!((image.blocks(), u64::from(image.data_blocks())), (1, limits::BLOCKS - 2));
}
