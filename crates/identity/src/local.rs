//! Local users: the peer of a unix socket, as the kernel names it, and the groups of the machine.

use crate::identity::{Identity, IdentityKind};
use shipway_fault::Result;
use std::collections::{BTreeMap, BTreeSet};

/// The user `uid` whose process has the group `gid`.
///
/// Further groups are those of the machine's database (`/etc/passwd` and `/etc/group`), not those
/// that the process has: a process may have gone, or become another program, since it connected.
pub(crate) fn identity(uid: u32, gid: Option<u32>) -> Result<Identity> {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    of_databases(uid, gid, &read("/etc/passwd"), &read("/etc/group"))
}

/// The fields of a database's lines.
fn lines(text: &str) -> impl Iterator<Item = Vec<&str>> {
    text.lines().filter(|line| !line.starts_with('#')).map(|line| line.split(':').collect())
}

fn of_databases(uid: u32, gid: Option<u32>, passwd: &str, groups: &str) -> Result<Identity> {
    let number = uid.to_string();
    let user = lines(passwd).find(|fields| fields.get(2) == Some(&number.as_str()));
    let name = user.as_ref().and_then(|fields| fields.first()).map(|name| (*name).to_owned());
    let mut gids: BTreeSet<String> = gid.iter().map(u32::to_string).collect();
    gids.extend(user.as_ref().and_then(|fields| fields.get(3)).map(|gid| (*gid).to_owned()));
    let mut names = BTreeSet::new();
    for fields in lines(groups) {
        let [group, _, gid, members] = fields[..] else { continue };
        let is_member = name.as_deref().is_some_and(|name| members.split(',').any(|m| m == name));
        if is_member || gids.contains(gid) {
            gids.insert(gid.to_owned());
            names.insert(group.to_owned());
        }
    }
    let claims = BTreeMap::from([
        ("uid".to_owned(), vec![number]),
        ("user".to_owned(), name.into_iter().collect()),
        ("gid".to_owned(), gids.into_iter().collect()),
        ("group".to_owned(), names.into_iter().collect()),
    ]);
    Identity::new(IdentityKind::Local, format!("unix:{uid}"), claims)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_has_the_groups_of_the_process_and_of_the_database() {
        const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nann:x:1000:1000::/home/ann:/bin/sh\n";
        const GROUP: &str = "root:x:0:\nann:x:1000:\nbuild:x:50:bob,ann\nother:x:51:annabel\n\
            # of nobody\nbroken\n";
        let of = |uid, gid| of_databases(uid, gid, PASSWD, GROUP).unwrap();
        let ann = of(1000, Some(1000));
        assert_eq!(ann.name(), "unix:1000");
        assert_eq!(
            (ann.claim("user"), ann.claim("group"), ann.claim("gid")),
            (vec!["ann"], vec!["ann", "build"], vec!["1000", "50"])
        );
        // With another group of its own the process is a member of that, too.
        assert_eq!(of(1000, Some(51)).claim("group"), ["ann", "build", "other"]);
        let nobody = of(7, Some(7));
        assert_eq!((nobody.claim("uid"), nobody.claim("gid")), (vec!["7"], vec!["7"]));
        assert!(nobody.claim("user").is_empty() && nobody.claim("group").is_empty());
    }
}
