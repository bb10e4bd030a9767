//! Owners by number or by name (row `file.owner`).

use super::place::Ids;
use shipway_executor::{RootView, identity};
use shipway_fault::Result;
use shipway_llb::{Chown, Owner};
use std::path::Path;

/// Where names are looked up.
pub(super) struct OwnerRoots<'a> {
    pub(super) user: Option<&'a Path>,
    pub(super) group: Option<&'a Path>,
}

impl OwnerRoots<'_> {
    /// The ids of `owner`. As in BuildKit a name that is not there is root, a user brings its group, and a number is both.
    pub(super) fn resolve(&self, owner: Option<&Chown>) -> Result<Option<Ids>> {
        let Some(owner) = owner else { return Ok(None) };
        let (mut uid, mut gid) = (0, 0);
        match &owner.user {
            Some(Owner::Id(id)) => (uid, gid) = (*id, *id),
            Some(Owner::Name { name, .. }) => {
                if let Some(root) = view(self.user)? {
                    (uid, gid) = identity::user_by_name(&root, name)?.unwrap_or_default();
                }
            }
            None => {}
        }
        match &owner.group {
            Some(Owner::Id(id)) => gid = *id,
            Some(Owner::Name { name, .. }) => {
                if let Some(root) = view(self.group)? {
                    gid = identity::group_by_name(&root, name)?.unwrap_or(gid);
                }
            }
            None => {}
        }
        Ok(Some((uid, gid)))
    }
}

fn view(path: Option<&Path>) -> Result<Option<RootView>> {
    path.map(RootView::of_directory).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> Option<Owner> {
        Some(Owner::Name { name: name.into(), input: Some(0) })
    }

    #[test]
    fn names_are_looked_up_and_numbers_are_taken() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        std::fs::create_dir(dir.path().join("etc")).expect("mkdir");
        std::fs::write(dir.path().join("etc/passwd"), "root:x:0:0::/:/bin/sh\nweb:x:33:34::/:/bin/sh\n").expect("write");
        std::fs::write(dir.path().join("etc/group"), "www:x:50:\n").expect("write");
        let empty = tempfile::tempdir().expect("a temporary directory");
        let check = |at: Option<&Path>, user: Option<Owner>, group: Option<Owner>, expected: Ids| {
            let owners = OwnerRoots { user: at, group: at };
            let chown = Chown { user, group };
            assert_eq!(owners.resolve(Some(&chown)).expect("resolve"), Some(expected), "{chown:?}");
        };
        let there = Some(dir.path());
        check(there, name("web"), None, (33, 34));
        check(there, name("web"), name("www"), (33, 50));
        check(there, name("web"), Some(Owner::Id(7)), (33, 7));
        check(there, Some(Owner::Id(7)), name("www"), (7, 50));
        check(there, Some(Owner::Id(7)), None, (7, 7));
        check(there, name("nobody"), name("nobody"), (0, 0));
        check(there, None, name("www"), (0, 50));
        check(Some(empty.path()), name("web"), name("www"), (0, 0));
        check(None, name("web"), name("www"), (0, 0));
        assert_eq!(OwnerRoots { user: there, group: there }.resolve(None).expect("resolve"), None);
    }
}
