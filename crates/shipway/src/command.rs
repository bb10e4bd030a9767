//! The commands, one file each; both personas pick theirs.

pub(crate) mod bake;
pub(crate) mod build;
pub(crate) mod builders;
pub(crate) mod certs;
pub(crate) mod completion;
pub(crate) mod convert;
pub(crate) mod dap;
pub(crate) mod debug;
pub(crate) mod dial_stdio;
pub(crate) mod doctor;
pub(crate) mod du;
pub(crate) mod history;
pub(crate) mod imagetools;
pub(crate) mod info;
pub(crate) mod prune;
pub(crate) mod solve;
pub(crate) mod store;
pub(crate) mod version;
pub(crate) mod workers;
