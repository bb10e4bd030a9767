//! Numbers of what the graph has.

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub(crate) struct $name(pub(crate) u64);
    };
}

number!(
    /// A job.
    JobNo
);
number!(
    /// A call of `Job::build`.
    RequestNo
);
number!(
    /// A node of the graph; never used again.
    NodeNo
);
number!(
    /// A task the driver runs; never used again, so what comes late is known by its number.
    TaskNo
);

number!(
    /// An imported cache of a job.
    ImportNo
);

/// One output of a vertex.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct EdgeId {
    pub(crate) node: NodeNo,
    pub(crate) output: usize,
}
