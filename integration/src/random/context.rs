//! A build context that changes.

use super::Random;
use std::{
    collections::BTreeMap,
    fs::{self, Permissions},
    os::unix::fs::{PermissionsExt as _, symlink},
    path::Path,
    time::{Duration, SystemTime},
};

/// Names of files at the top and in directories. Few, so that changes meet.
const PATHS: &[&str] =
    &["a.txt", "b.txt", "c.md", "d/a.txt", "d/b.txt", "d/e/deep", "x/one", "x/two", "run.sh"];
/// Where links point: to a file, to a directory, nowhere.
const TARGETS: &[&str] = &["a.txt", "d", "missing", "d/e/deep"];
const MODES: &[u32] = &[0o644, 0o755, 0o600, 0o444];

#[derive(Clone, Debug, PartialEq, Eq)]
enum Node {
    File { text: String, mode: u32, mtime: u64 },
    Link(String),
}

/// Files of a build context, by relative path.
#[derive(Clone, Debug, Default)]
pub struct Context {
    nodes: BTreeMap<String, Node>,
}

impl Context {
    /// A few files.
    pub fn new(random: &mut Random) -> Self {
        let mut context = Self::default();
        for path in PATHS {
            if random.chance(85) {
                context.nodes.insert((*path).to_owned(), file(random));
            }
        }
        context
    }

    /// Changes one thing and says what.
    pub fn change(&mut self, random: &mut Random) -> String {
        let there: Vec<String> = self.nodes.keys().cloned().collect();
        if there.is_empty() || random.chance(25) {
            let path = *random.pick(PATHS);
            let node = if random.chance(15) {
                Node::Link((*random.pick(TARGETS)).to_owned())
            } else {
                file(random)
            };
            self.nodes.insert(path.to_owned(), node);
            return format!("write {path}");
        }
        let path = random.pick(&there).clone();
        match random.below(6) {
            0 => {
                self.nodes.remove(&path);
                format!("remove {path}")
            }
            1 => {
                let other = random.pick(&there).clone();
                let (one, two) = (self.nodes[&path].clone(), self.nodes[&other].clone());
                self.nodes.insert(path.clone(), two);
                self.nodes.insert(other.clone(), one);
                format!("swap {path} and {other}")
            }
            2 => {
                if let Some(Node::File { mode, .. }) = self.nodes.get_mut(&path) {
                    *mode = *random.pick(MODES);
                }
                format!("chmod {path}")
            }
            3 => {
                if let Some(Node::File { mtime, .. }) = self.nodes.get_mut(&path) {
                    *mtime += 1;
                }
                format!("touch {path}")
            }
            _ => {
                self.nodes.insert(path.clone(), file(random));
                format!("rewrite {path}")
            }
        }
    }

    /// Makes `dir` hold just these files.
    pub fn write(&self, dir: &Path) {
        if dir.exists() {
            fs::remove_dir_all(dir).unwrap();
        }
        fs::create_dir_all(dir).unwrap();
        for (path, node) in &self.nodes {
            let path = dir.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            match node {
                Node::Link(target) => symlink(target, &path).unwrap(),
                Node::File { text, mode, mtime } => {
                    fs::write(&path, text).unwrap();
                    fs::set_permissions(&path, Permissions::from_mode(*mode)).unwrap();
                    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(*mtime);
                    fs::File::open(&path).unwrap().set_modified(time).unwrap();
                }
            }
        }
    }
}

/// A file whose size or time alone seldom tells it from another: few lengths, few times.
fn file(random: &mut Random) -> Node {
    let word = *random.pick(&["one", "two", "six", "three", "a longer line of text"]);
    Node::File {
        text: format!("{word}\n"),
        mode: *random.pick(MODES),
        mtime: 1_700_000_000 + random.below(2) as u64,
    }
}
