//! What the reader finds in images is what was inserted.

#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use shipway_erofs::*;
use std::collections::{BTreeMap, HashMap};

/// Compares the whole image with the model.
#[track_caller]
fn compare(bytes: &[u8], layer: &Layer) {
    let reader = &Reader::open(bytes).unwrap();
    let model = &layer.model;
    let links = model.links();
    assert_eq!(reader.inodes(), links.len() as u64);
    let mut numbers: HashMap<usize, Nid> = HashMap::new();
    let mut stack = vec![(0, reader.root(), reader.root())];
    while let Some((inode, nid, parent)) = stack.pop() {
        let found = reader.metadata(nid).unwrap();
        assert_stored_agrees(bytes, reader, nid);
        let (attrs, is) = &model.inodes[inode];
        assert_eq!(*numbers.entry(inode).or_insert(nid), nid, "links share their inode");
        assert_eq!(
            (found.mode, found.uid, found.gid, found.mtime),
            (attrs.mode, attrs.uid, attrs.gid, attrs.mtime)
        );
        assert_eq!(found.nlink, links[&inode]);
        let xattrs: BTreeMap<Vec<u8>, Vec<u8>> = reader
            .xattrs(&found)
            .unwrap()
            .into_iter()
            .map(|x| (x.name, x.value.to_vec()))
            .collect();
        assert_eq!(xattrs, attrs.xattrs);
        match (is, found.content) {
            (Is::Directory(children), Content::Directory) => {
                let directory = reader.directory(&found).unwrap();
                let all: Vec<DirEntry<'_>> = directory.entries(0).map(Result::unwrap).collect();
                assert!(all.is_sorted_by(|a, b| a.name < b.name));
                assert_eq!(all.len(), children.len() + 2);
                for (n, entry) in all.iter().enumerate() {
                    assert_eq!(directory.lookup(entry.name).unwrap(), Some(*entry));
                    assert_eq!(
                        directory.entries(entry.next).next().map(Result::unwrap),
                        all.get(n + 1).copied()
                    );
                    let to = match entry.name {
                        b"." => nid,
                        b".." => parent,
                        name => {
                            stack.push((children[name], entry.nid, nid));
                            entry.nid
                        }
                    };
                    assert_eq!(entry.nid, to);
                    let missing = [entry.name, b"\x01"].concat();
                    assert_eq!(
                        directory.lookup(&missing).unwrap().map(|e| e.name),
                        all.iter().map(|e| e.name).find(|n| *n == missing)
                    );
                }
            }
            (Is::Other(Thing::File(contents)), Content::File(extent)) => {
                assert_eq!(found.size, contents.len() as u64);
                let at = extent.block as usize * BLOCK as usize;
                assert_eq!(layer.data[at..at + contents.len()], contents[..]);
            }
            (Is::Other(Thing::Symlink(target)), Content::Symlink) => {
                assert_eq!(reader.target(&found).unwrap(), target)
            }
            (Is::Other(Thing::Char(major, minor)), Content::CharDevice(n)) => {
                assert_eq!((n.major, n.minor), (*major, *minor))
            }
            (Is::Other(Thing::Block(major, minor)), Content::BlockDevice(n)) => {
                assert_eq!((n.major, n.minor), (*major, *minor))
            }
            (Is::Other(Thing::Fifo), Content::Fifo) => {}
            (is, content) => panic!("{is:?} is {content:?}"),
        }
    }
}

#[test]
fn random_layers_are_read_back() {
    for seed in 1..=60 {
        let mut layer = Layer::random(seed, 20 * seed as usize);
        let image = layer.image();
        for form in [Form::WithDevice, Form::Flat] {
            let bytes = bytes(&image, form);
            let reader = Reader::open(&bytes).unwrap();
            assert_eq!(
                (reader.blocks(), reader.data_blocks()),
                (image.blocks(), image.data_blocks())
            );
            assert_eq!(reader.uuid(), layer.options.uuid);
            compare(&bytes, &layer);
        }
    }
}

#[test]
fn the_two_forms_have_one_body_and_equal_layers_equal_bytes() {
    let image = |seed| Layer::random(seed, 500).image();
    let (with, flat) = (bytes(&image(7), Form::WithDevice), bytes(&image(7), Form::Flat));
    assert_eq!(with, bytes(&image(7), Form::WithDevice));
    assert_ne!(with, bytes(&image(8), Form::WithDevice));
    assert_eq!(with[..1024], flat[..1024]);
    assert_ne!(with[1024..1152], flat[1024..1152]);
    assert_eq!(with[1152..], flat[1152..]);
    for image in [&with, &flat] {
        assert_eq!(first_block(image, Form::Flat).unwrap(), flat[..4096]);
        assert_eq!(first_block(image, Form::WithDevice).unwrap(), with[..4096]);
    }
    assert_eq!(first_block(&with[..with.len() - 1], Form::Flat), Err(ReadError::Corrupt));
}

#[test]
fn attributes_are_aligned_wherever_a_piece_of_the_image_ends() {
    let plain = Attributes {
        mode: 0o755,
        uid: 0,
        gid: 0,
        mtime: Time { seconds: 0, nanoseconds: 0 },
        xattrs: &[],
    };
    // Targets of odd lengths lie behind the inodes, so that pieces end anywhere.
    for count in 900..910_usize {
        let mut builder = Builder::new(Options::default(), &plain).unwrap();
        let own = |n: usize| (format!("trusted.own{n}").into_bytes(), vec![b'v'; 3 + n % 5]);
        for n in 0..count {
            let (name, value) = own(n);
            let shared = Xattr { name: b"trusted.shared", value: b"by all of them" };
            let xattrs = [shared, Xattr { name: &name, value: &value }];
            let target = &b"target!"[..1 + n % 7];
            let attributes = Attributes { xattrs: &xattrs, ..plain };
            builder
                .insert(format!("{n}").as_bytes(), &attributes, Node::Symlink { target })
                .unwrap();
        }
        let image = bytes(&builder.finish().unwrap(), Form::Flat);
        let reader = Reader::open(&image).unwrap();
        let root = reader.directory(&reader.metadata(reader.root()).unwrap()).unwrap();
        for n in 0..count {
            let entry = root.lookup(format!("{n}").as_bytes()).unwrap().unwrap();
            let found = reader.xattrs(&reader.metadata(entry.nid).unwrap()).unwrap();
            let found: BTreeMap<_, _> =
                found.into_iter().map(|x| (x.name, x.value.to_vec())).collect();
            let (name, value) = own(n);
            let want =
                [(b"trusted.shared".to_vec(), b"by all of them".to_vec()), (name, value)].into();
            assert!(found == want, "{n} of {count}");
        }
    }
}
