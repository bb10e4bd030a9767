//! Owners by number or by name (row `file.owner`).

use crate::place::Ids;
use shipway_fault::{Fault, Result};
use shipway_llb::{Chown, Owner};
use shipway_rootfs::{RootView, identity};
use std::path::Path;

/// Root directories in which the names of owners are looked up.
pub struct OwnerRoots<'a> {
    /// The one whose `/etc/passwd` has users.
    pub user: Option<&'a Path>,
    /// The one whose `/etc/group` has groups.
    pub group: Option<&'a Path>,
}

impl OwnerRoots<'_> {
    /// The ids of `owner`. A user brings its group, and a number is both. A name that is not there
    /// is an error: files that silently belong to root are worse than a build that fails.
    pub(crate) fn resolve(&self, owner: Option<&Chown>) -> Result<Option<Ids>> {
        let Some(owner) = owner else { return Ok(None) };
        let (mut uid, mut gid) = (0, 0);
        match &owner.user {
            Some(Owner::Id(id)) => (uid, gid) = (*id, *id),
            Some(Owner::Name { name, .. }) => (uid, gid) = self.user(name)?,
            None => {}
        }
        match &owner.group {
            Some(Owner::Id(id)) => gid = *id,
            Some(Owner::Name { name, .. }) => gid = self.group(name)?,
            None => {}
        }
        Ok(Some((uid, gid)))
    }

    fn user(&self, name: &str) -> Result<Ids> {
        match view(self.user)? {
            _ if name == ROOT => Ok((0, 0)),
            Some(root) => identity::user_by_name(&root, name),
            None => Err(nowhere("user", name)),
        }
    }

    fn group(&self, name: &str) -> Result<u32> {
        match view(self.group)? {
            _ if name == ROOT => Ok(0),
            Some(root) => identity::group_by_name(&root, name),
            None => Err(nowhere("group", name)),
        }
    }
}

/// The name that needs no lookup.
const ROOT: &str = "root";

fn nowhere(what: &str, name: &str) -> Fault {
    let fault = Fault::invalid(format!(
        "unable to find {what} {name}: there is no root filesystem to look the name up in"
    ));
    fault.hint(format!(
        "give the {what} as a number: a stage that is built from scratch has no names"
    ))
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
        std::fs::write(
            dir.path().join("etc/passwd"),
            "root:x:0:0::/:/bin/sh\nweb:x:33:34::/:/bin/sh\n",
        )
        .expect("write");
        std::fs::write(dir.path().join("etc/group"), "www:x:50:\n").expect("write");
        let empty = tempfile::tempdir().expect("a temporary directory");
        let check = |at: Option<&Path>,
                     user: Option<Owner>,
                     group: Option<Owner>,
                     expected: Ids| {
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
        check(there, None, name("www"), (0, 50));
        check(None, name("root"), name("root"), (0, 0));
        check(None, Some(Owner::Id(7)), name("root"), (7, 0));
        let fails =
            |at: Option<&Path>, user: Option<Owner>, group: Option<Owner>, expected: &str| {
                let owners = OwnerRoots { user: at, group: at };
                let failed = owners.resolve(Some(&Chown { user, group })).expect_err(expected);
                assert!(failed.to_string().starts_with(expected), "{failed}");
            };
        let missing = |what: &str, name: &str, file: &str| {
            format!("unable to find {what} {name}: no matching entries in /etc/{file}")
        };
        fails(there, name("nobody"), None, &missing("user", "nobody", "passwd"));
        fails(there, Some(Owner::Id(33)), name("nobody"), &missing("group", "nobody", "group"));
        fails(Some(empty.path()), name("web"), None, &missing("user", "web", "passwd"));
        fails(None, name("web"), None, "unable to find user web: there is no root filesystem");
        fails(
            None,
            Some(Owner::Id(33)),
            name("www"),
            "unable to find group www: there is no root filesystem",
        );
        assert_eq!(OwnerRoots { user: there, group: there }.resolve(None).expect("resolve"), None);
    }
}
