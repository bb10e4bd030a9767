//! The order of entries in a layer: first what is read first.

use crate::{TarEntry, TarKind, toc};
use std::collections::HashMap;

/// In which order the entries of a tar are to be written so that what is read first can be fetched
/// at once.
///
/// Each prioritized file comes in the order given, its directories before it, and what a hard link
/// leads to before the link. Then a landmark, then everything else in its own order. Files that
/// formats add ([`TarEntry::is_of_format`]) are left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Order {
    /// Positions of the entries before the landmark.
    pub first: Vec<usize>,
    /// Positions of the entries after it.
    pub rest: Vec<usize>,
    /// Prioritized files that the tar has not, by their position among those given.
    pub missing: Vec<usize>,
}

impl Order {
    /// Plans the order of `entries`, a whole tar, with `prioritized` paths first.
    pub fn new<'a>(
        entries: impl IntoIterator<Item = &'a TarEntry>,
        prioritized: &[impl AsRef<[u8]>],
    ) -> Self {
        let (mut places, mut links, mut all) = (HashMap::new(), HashMap::new(), Vec::new());
        for (at, entry) in entries.into_iter().enumerate() {
            if entry.is_of_format() {
                continue;
            }
            all.push(at);
            let Some(path) = clean(&entry.path) else { continue };
            if let TarKind::HardLink(target) = &entry.kind {
                links.insert(at, clean(target).unwrap_or_default());
            }
            places.insert(path, at);
        }
        let mut picker = Picker {
            places: &places,
            links: &links,
            picked: vec![false; all.last().map_or(0, |at| at + 1)],
            first: Vec::new(),
        };
        let mut missing = Vec::new();
        for (number, path) in prioritized.iter().enumerate() {
            match clean(path.as_ref())
                .and_then(|path| picker.places.get(&path).map(|at| (path, *at)))
            {
                Some((path, at)) => picker.pick(&path, at),
                None => missing.push(number),
            }
        }
        let (first, picked) = (picker.first, picker.picked);
        all.retain(|at| !picked[*at]);
        Self { first, rest: all, missing }
    }
}

fn clean(path: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    toc::clean(path, &mut out).is_ok().then_some(out)
}

struct Picker<'a> {
    places: &'a HashMap<Vec<u8>, usize>,
    /// Targets of hard links.
    links: &'a HashMap<usize, Vec<u8>>,
    picked: Vec<bool>,
    first: Vec<usize>,
}

impl Picker<'_> {
    /// Takes the entry `at`, whose path is `path`, after what must come before it.
    fn pick(&mut self, path: &[u8], at: usize) {
        // Links to links, and their directories, without recursion; what was seen is not looked at
        // again.
        let (mut stack, mut seen) = (Vec::new(), std::collections::HashSet::new());
        let mut next = Some((path.to_vec(), at));
        while let Some((path, at)) = next.take() {
            if self.picked[at] || !seen.insert(at) {
                break;
            }
            if let Some(target) = self.links.get(&at) {
                next = self.places.get(target).map(|to| (target.clone(), *to));
            }
            stack.push((path, at));
        }
        for (path, at) in stack.into_iter().rev() {
            let ends = (0..path.len()).filter(|n| path[*n] == b'/' || *n == 0);
            for end in ends {
                if let Some(dir) = self.places.get(&path[..end]).copied() {
                    self.take(dir);
                }
            }
            self.take(at);
        }
    }

    fn take(&mut self, at: usize) {
        if !std::mem::replace(&mut self.picked[at], true) {
            self.first.push(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Time;

    fn entry(path: &str, kind: TarKind) -> TarEntry {
        TarEntry {
            path: path.into(),
            kind,
            mode: 0,
            uid: 0,
            gid: 0,
            mtime: Time::default(),
            xattrs: Vec::new(),
        }
    }

    #[test]
    fn what_is_needed_comes_first() {
        let link = |to: &str| TarKind::HardLink(to.into());
        let entries = [
            entry("./", TarKind::Directory),
            entry("./bin/", TarKind::Directory),
            entry("./bin/a", TarKind::File(1)),
            entry("./bin/b", TarKind::File(1)),
            entry(".no.prefetch.landmark", TarKind::File(1)),
            entry("./lib/", TarKind::Directory),
            entry("./lib/c", link("/bin/b")),
            entry("./lib/d", link("lib/c")),
            entry("./lib/e", TarKind::File(1)),
            entry("./x", link("y")),
            entry("./y", link("x")),
        ];
        let order = Order::new(&entries, &["/lib/d", "bin/none", "lib/e", "x"]);
        assert_eq!(order.first, [0, 1, 3, 5, 6, 7, 8, 10, 9]);
        assert_eq!((order.rest, order.missing), (vec![2], vec![1]));
        let order = Order::new(&entries, &[] as &[&str]);
        assert_eq!((order.first, order.rest), (vec![], vec![0, 1, 2, 3, 5, 6, 7, 8, 9, 10]));
        assert_eq!(Order::new(&[], &["a"]).missing, [0]);
    }
}
