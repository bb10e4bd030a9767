//! Debian's binary packages, as `deb(5)` describes them: an `ar` of a version, the tar of what dpkg
//! reads and runs, and the tar of the files.

use super::{Compression, tree::Tree};
use md5::{Digest as _, Md5};

/// What dpkg is told of a package.
pub struct Control<'a> {
    pub package: &'a str,
    pub version: &'a str,
    pub architecture: &'a str,
    pub depends: String,
    /// Further fields, each a line.
    pub fields: &'a [&'a str],
    /// One line.
    pub summary: &'a str,
    /// Lines of the long description.
    pub description: &'a str,
    /// `postinst` and the other scripts, by name.
    pub scripts: Vec<(&'static str, String)>,
}

/// The package's bytes.
pub fn deb(
    control: &Control<'_>,
    files: &Tree,
    compression: Compression,
    epoch: u64,
) -> Result<Vec<u8>, String> {
    let failed = |e: std::io::Error| format!("pack {}: {e}", control.package);
    let mut members = vec![("debian-binary".to_owned(), b"2.0\n".to_vec())];
    let control = control_tree(control, files).tar("./", epoch).map_err(failed)?;
    let data = files.tar("./", epoch).map_err(failed)?;
    for (name, tar) in [("control.tar", control), ("data.tar", data)] {
        let name = format!("{name}{}", compression.extension());
        members.push((name, compression.of(tar).map_err(failed)?));
    }
    Ok(ar(&members, epoch))
}

fn control_tree(control: &Control<'_>, files: &Tree) -> Tree {
    let size: usize = files.files().map(|(_, contents)| contents.len().div_ceil(1024)).sum();
    let mut text = format!(
        "Package: {}\nVersion: {}\nArchitecture: {}\nMaintainer: The Shipway developers <shipway@localhost>\n\
         Installed-Size: {size}\nDepends: {}\nSection: admin\nPriority: optional\n",
        control.package, control.version, control.architecture, control.depends
    );
    for field in control.fields {
        text += field;
        text.push('\n');
    }
    text += &format!("Description: {}\n", control.summary);
    for line in control.description.lines() {
        text += &format!(" {line}\n");
    }
    let mut tree = Tree::default();
    tree.file("control", 0o644, text);
    let configuration: String = files
        .files()
        .filter(|(path, _)| path.starts_with("etc/"))
        .map(|(path, _)| format!("/{path}\n"))
        .collect();
    tree.file("conffiles", 0o644, configuration);
    let sums: String = files
        .files()
        .filter(|(path, _)| !path.starts_with("etc/"))
        .map(|(path, contents)| format!("{}  {path}\n", hex::encode(Md5::digest(contents))))
        .collect();
    tree.file("md5sums", 0o644, sums);
    for (name, script) in &control.scripts {
        tree.file(name, 0o755, script.as_str());
    }
    tree
}

/// An archive of `ar`, in its common form.
fn ar(members: &[(String, Vec<u8>)], epoch: u64) -> Vec<u8> {
    let mut bytes = b"!<arch>\n".to_vec();
    for (name, contents) in members {
        let header = format!(
            "{name:<16}{epoch:<12}{:<6}{:<6}{:<8}{:<10}`\n",
            0,
            0,
            "100644",
            contents.len()
        );
        bytes.extend(header.as_bytes());
        bytes.extend(contents);
        if contents.len() % 2 == 1 {
            bytes.push(b'\n');
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_begin_at_even_places_with_headers_of_sixty_bytes() {
        let bytes = ar(&[("a".into(), b"odd".to_vec()), ("b".into(), b"even".to_vec())], 7);
        assert_eq!(&bytes[..8], b"!<arch>\n");
        assert_eq!(&bytes[8..8 + 60][..16], b"a               ");
        assert_eq!(&bytes[8 + 58..8 + 64], b"`\nodd\n");
        assert_eq!(&bytes[72..88], b"b               ");
        assert_eq!(bytes.len(), 8 + 2 * (60 + 4));
    }

    #[test]
    fn what_is_below_etc_is_configuration() {
        let mut files = Tree::default();
        files.file("etc/shipway/x.toml", 0o644, "a = 1\n");
        files.file("usr/bin/x", 0o755, "x");
        let control = Control {
            package: "x",
            version: "1",
            architecture: "all",
            depends: "libc6".into(),
            fields: &[],
            summary: "Summary",
            description: "Lines\nof it",
            scripts: vec![("postinst", "#!/bin/sh\n".into())],
        };
        let tree = control_tree(&control, &files);
        let text: Vec<(&str, String)> = tree
            .files()
            .map(|(path, contents)| (path, String::from_utf8(contents.to_vec()).unwrap()))
            .collect();
        assert_eq!(
            text.iter().map(|(path, _)| *path).collect::<Vec<_>>(),
            ["conffiles", "control", "md5sums", "postinst"]
        );
        assert_eq!(text[0].1, "/etc/shipway/x.toml\n");
        assert!(text[1].1.ends_with("Description: Summary\n Lines\n of it\n"), "{}", text[1].1);
        assert!(text[1].1.contains("\nInstalled-Size: 2\n"), "{}", text[1].1);
        assert_eq!(text[2].1, "9dd4e461268c8034f5c8564e155c67a6  usr/bin/x\n");
    }
}
