//! Which extended attributes belong to an image.

/// Whether a file's attribute `name` is part of an image: capabilities, access control lists, and
/// what users set. Others belong to the machine that the file is on (labels of security modules) or
/// to its file systems (an overlay's own marks), and from strangers they are ways to deceive it.
pub fn is_image_xattr(name: impl AsRef<[u8]>) -> bool {
    match name.as_ref() {
        b"security.capability" | b"system.posix_acl_access" | b"system.posix_acl_default" => true,
        name => name.starts_with(b"user.") && !name.starts_with(b"user.overlay."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_means_something_elsewhere_belongs_to_an_image() {
        for name in [
            "security.capability",
            "system.posix_acl_access",
            "system.posix_acl_default",
            "user.note",
            "user.overlayed",
        ] {
            assert!(is_image_xattr(name), "{name}");
        }
        for name in [
            "trusted.overlay.opaque",
            "user.overlay.opaque",
            "security.selinux",
            "security.ima",
            "trusted.x",
            "system.nfs4_acl",
            "user",
            "",
        ] {
            assert!(!is_image_xattr(name), "{name}");
        }
    }
}
