//! Who a process is: users and groups by name, from the root filesystem's own `/etc/passwd` and
//! `/etc/group` (row `exec.args`).

use crate::RootView;
use shipway_fault::{Fault, Result, nearest};

/// Larger user databases are refused: they are foreign bytes.
const LIMIT: u64 = 10 << 20;

/// A resolved user.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// User.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// All groups, the primary one first.
    pub groups: Vec<u32>,
}

/// A line of `/etc/passwd`.
struct User<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
}

/// A line of `/etc/group`.
struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

fn users(text: &str) -> impl Iterator<Item = User<'_>> {
    text.lines().filter_map(|line| {
        let mut f = line.trim().split(':');
        let (name, _, uid, gid) = (f.next()?, f.next()?, f.next()?, f.next()?);
        // Some tools leave the group out when they cannot make one.
        Some(User { name, uid: uid.parse().ok()?, gid: gid.parse().unwrap_or_default() })
    })
}

fn groups(text: &str) -> impl Iterator<Item = Group<'_>> {
    text.lines().filter_map(|line| {
        let mut f = line.trim().split(':');
        let (name, _, gid) = (f.next()?, f.next()?, f.next()?);
        Some(Group { name, gid: gid.parse().ok()?, members: f.next().unwrap_or_default() })
    })
}

fn text(root: &RootView, path: &str) -> Result<String> {
    Ok(root
        .read_file(path, LIMIT)?
        .map(|b| String::from_utf8_lossy(&b).into_owned())
        .unwrap_or_default())
}

/// The user `name` of `root`: uid and primary gid.
pub fn user_by_name(root: &RootView, name: &str) -> Result<(u32, u32)> {
    let passwd = text(root, "/etc/passwd")?;
    let found = users(&passwd).find(|u| u.name == name).map(|u| (u.uid, u.gid));
    found.ok_or_else(|| unknown("user", name, "/etc/passwd", users(&passwd).map(|u| u.name)))
}

/// The group `name` of `root`.
pub fn group_by_name(root: &RootView, name: &str) -> Result<u32> {
    let database = text(root, "/etc/group")?;
    let found = groups(&database).find(|g| g.name == name).map(|g| g.gid);
    found.ok_or_else(|| unknown("group", name, "/etc/group", groups(&database).map(|g| g.name)))
}

/// Resolves `user` (name, uid, `user:group`; empty is root) in `root`.
///
/// With both ids given as numbers nothing is looked up and there are no further groups. A number
/// without a name is taken as it is; a name that is not there is an error. Further groups are those
/// that list the user, unless a group is given.
pub fn resolve(root: &RootView, user: &str) -> Result<Identity> {
    let (user, group) = match user.split_once(':') {
        Some((u, g)) => (u, Some(g)),
        None => (user, None),
    };
    let number = |s: &str| if s == "root" { Some(0) } else { s.parse::<u32>().ok() };
    if let (Some(uid), Some(gid)) = (number(user), group.and_then(number)) {
        return Ok(Identity { uid, gid, groups: vec![gid] });
    }
    let passwd = text(root, "/etc/passwd")?;
    let wanted = if user.is_empty() { "0" } else { user };
    let id = wanted.parse::<u32>().ok();
    let found = users(&passwd).find(|u| u.name == wanted || id == Some(u.uid));
    let (uid, mut gid, name) = match (found, id) {
        (Some(u), _) => (u.uid, u.gid, u.name.to_owned()),
        (None, Some(uid)) => (uid, 0, String::new()),
        (None, None) if wanted == "root" => (0, 0, "root".to_owned()),
        (None, None) => {
            return Err(unknown("user", wanted, "/etc/passwd", users(&passwd).map(|u| u.name)));
        }
    };
    let database = text(root, "/etc/group")?;
    let mut all = Vec::new();
    match group.filter(|g| !g.is_empty()) {
        Some(g) => {
            gid = match (groups(&database).find(|x| x.name == g), g.parse().ok()) {
                (Some(found), _) => found.gid,
                (None, Some(gid)) => gid,
                (None, None) => {
                    return Err(unknown(
                        "group",
                        g,
                        "/etc/group",
                        groups(&database).map(|g| g.name),
                    ));
                }
            };
        }
        None => all.extend(
            groups(&database)
                .filter(|g| !name.is_empty() && g.members.split(',').any(|m| m == name))
                .map(|g| g.gid),
        ),
    }
    all.retain(|g| *g != gid);
    all.insert(0, gid);
    Ok(Identity { uid, gid, groups: all })
}

fn unknown<'a>(what: &str, name: &str, file: &str, known: impl Iterator<Item = &'a str>) -> Fault {
    let fault = Fault::invalid(format!(
        "unable to find {what} {name}: no matching entries in {file} of the image"
    ));
    match nearest(name, known) {
        Some(near) => fault.hint(format!("did you mean {near}?")),
        None => fault,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(user: &str, expected: Option<(u32, u32, &[u32])>) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        std::fs::create_dir(dir.path().join("etc")).expect("mkdir");
        std::fs::write(
            dir.path().join("etc/passwd"),
            "root:x:0:0::/root:/bin/sh\nbroken\nlone:x:7::\nweb:x:33:34::/:/bin/sh\n",
        )
        .expect("passwd");
        std::fs::write(
            dir.path().join("etc/group"),
            "root:x:0:\nwww:x:34:\nlog:x:50:other,web\nweb:x:60:web\n",
        )
        .expect("group");
        let root = RootView::of_directory(dir.path()).expect("open");
        let found = resolve(&root, user).ok();
        assert_eq!(
            found,
            expected.map(|(uid, gid, groups)| Identity { uid, gid, groups: groups.to_vec() }),
            "{user:?}"
        );
    }

    #[test]
    fn users_are_names_or_numbers_with_or_without_a_group() {
        check("", Some((0, 0, &[0])));
        check("root", Some((0, 0, &[0])));
        check("web", Some((33, 34, &[34, 50, 60])));
        check("33", Some((33, 34, &[34, 50, 60])));
        check("web:log", Some((33, 50, &[50])));
        check("33:34", Some((33, 34, &[34])));
        check("1000", Some((1000, 0, &[0])));
        check("1000:www", Some((1000, 34, &[34])));
        check("lone", Some((7, 0, &[0])));
        check("wep", None);
        check("web:nobody", None);
    }
}
