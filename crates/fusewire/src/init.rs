//! The negotiation that begins a connection.

/// There is a second word of flags.
pub(crate) const INIT_EXT: u64 = 1 << 30;
const ASYNC_READ: u64 = 1;
const EXPORT_SUPPORT: u64 = 1 << 4;
const DO_READDIRPLUS: u64 = 1 << 13;
const READDIRPLUS_AUTO: u64 = 1 << 14;
const ASYNC_DIO: u64 = 1 << 15;
const PARALLEL_DIROPS: u64 = 1 << 18;
const POSIX_ACL: u64 = 1 << 20;
const MAX_PAGES: u64 = 1 << 22;
const CACHE_SYMLINKS: u64 = 1 << 23;
const HAS_RESEND: u64 = 1 << 39;
const ALLOW_IDMAP: u64 = 1 << 40;

/// See [`InitOptions::trees`].
const TREES: u64 = EXPORT_SUPPORT | DO_READDIRPLUS | READDIRPLUS_AUTO | POSIX_ACL | CACHE_SYMLINKS;

/// The protocol's version that is spoken here; the kernel adapts to a lower minor number than its
/// own.
const MAJOR: u32 = 7;
const MINOR: u32 = 41;
/// The lowest minor number that is served.
const LOWEST_MINOR: u32 = 31;

/// What the kernel offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InitRequest {
    /// Of the protocol.
    pub major: u32,
    /// Of the protocol.
    pub minor: u32,
    /// Bytes that it reads ahead.
    pub max_readahead: u32,
    /// `FUSE_*` of what it can do.
    pub flags: u64,
}

/// What the server wants, where it is offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InitOptions {
    /// Pages of one read at most. Linux has 256 unless `fs.fuse.max_pages_limit` says otherwise.
    pub max_pages: u16,
    /// Bytes of one write, of which there are none; the buffer for requests has to have room for
    /// them, so this is small.
    pub max_write: u32,
    /// Reads that no process waits for, at most at once.
    pub max_background: u16,
    /// Whether clones of the mount with mapped ids are allowed. The kernel breaks the connection
    /// off if it is not mounted with `default_permissions`.
    pub idmap: bool,
    /// Whether there are trees of files that never change: they are listed with attributes, links
    /// are kept, access control lists count, and `.` and `..` are looked up when a file is found
    /// again by its number, as overlayfs finds what it has copied.
    pub trees: bool,
}

impl Default for InitOptions {
    fn default() -> Self {
        Self { max_pages: 256, max_write: 4096, max_background: 64, idmap: false, trees: false }
    }
}

/// The server's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InitAnswer {
    pub(crate) max_readahead: u32,
    pub(crate) flags: u64,
    pub(crate) wanted: InitOptions,
}

impl InitRequest {
    /// What to answer, or `None` if the kernel speaks an older protocol: that is `EPROTO`.
    pub fn answer(&self, wanted: InitOptions) -> Option<InitAnswer> {
        if self.major != MAJOR || self.minor < LOWEST_MINOR {
            return None;
        }
        let mut flags =
            ASYNC_READ | ASYNC_DIO | PARALLEL_DIROPS | MAX_PAGES | INIT_EXT | HAS_RESEND;
        if wanted.idmap {
            flags |= ALLOW_IDMAP;
        }
        if wanted.trees {
            flags |= TREES;
        }
        Some(InitAnswer { max_readahead: self.max_readahead, flags: flags & self.flags, wanted })
    }
}

impl InitAnswer {
    /// Whether the kernel can be asked to send again what it has no answer to
    /// ([`Reply::resend`](crate::Reply::resend)).
    pub fn can_resend(&self) -> bool {
        self.flags & HAS_RESEND != 0
    }

    /// Whether clones of the mount can have mapped ids.
    pub fn has_idmap(&self) -> bool {
        self.flags & ALLOW_IDMAP != 0
    }

    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        let InitOptions { max_pages, max_write, max_background, .. } = self.wanted;
        for word in [MAJOR, MINOR, self.max_readahead, self.flags as u32] {
            out.extend_from_slice(&word.to_ne_bytes());
        }
        // The congestion threshold is the kernel's own rule: three quarters.
        for half in [max_background, (u32::from(max_background) * 3 / 4) as u16] {
            out.extend_from_slice(&half.to_ne_bytes());
        }
        for word in [max_write, 1] {
            out.extend_from_slice(&word.to_ne_bytes());
        }
        for half in [max_pages, 0] {
            out.extend_from_slice(&half.to_ne_bytes());
        }
        out.extend_from_slice(&((self.flags >> 32) as u32).to_ne_bytes());
        // Stack depth, timeout, and what is not used.
        out.extend_from_slice(&[0; 28]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_offered_is_wanted() {
        let offer = |minor, flags| InitRequest { major: 7, minor, max_readahead: 131_072, flags };
        let all = offer(45, u64::MAX).answer(InitOptions::default()).expect("an answer");
        assert!(all.can_resend() && !all.has_idmap());
        assert_eq!(
            all.flags,
            ASYNC_READ | ASYNC_DIO | PARALLEL_DIROPS | MAX_PAGES | INIT_EXT | HAS_RESEND
        );
        let idmap = InitOptions { idmap: true, ..InitOptions::default() };
        assert!(offer(45, u64::MAX).answer(idmap).expect("an answer").has_idmap());
        assert!(!offer(31, u64::from(u32::MAX)).answer(idmap).expect("an answer").has_idmap());
        let trees = InitOptions { trees: true, ..InitOptions::default() };
        assert_eq!(offer(45, u64::MAX).answer(trees).expect("an answer").flags, all.flags | TREES);
        assert_eq!(offer(30, u64::MAX).answer(idmap), None);
        assert_eq!(InitRequest { major: 8, ..offer(31, 0) }.answer(idmap), None);
        let mut bytes = Vec::new();
        all.write(&mut bytes);
        assert_eq!(bytes.len(), 64);
    }
}
