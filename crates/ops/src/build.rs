//! Graphs inside graphs: the build operation reads a definition out of a file of its input and
//! solves it (row `op.build`).

use crate::op::{Context, LlbOp, VertexOp, keyed};
use async_trait::async_trait;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use rustix::fs::{Mode, OFlags};
use shipway_attest::Capture;
use shipway_fault::{Context as _, Fault, Result};
use shipway_llb::{BuildOp, Definition};
use shipway_oci::Digest;
use shipway_refs::ImmutableRef;
use shipway_solver::CacheMap;
use std::{
    collections::{HashMap, HashSet},
    io::Read as _,
    os::fd::AsFd as _,
    path::Path,
    sync::{Arc, OnceLock, Weak},
};

/// Input that holds the definition, and the file that it is in if the operation does not say.
const DEFINITION: &str = "buildkit.llb.definition";
/// Attribute that names another file.
const FILENAME: &str = "llbbuild.filename";
/// The largest definition, as large as one that comes in a message.
const MAX_DEFINITION: u64 = 16 << 20;
/// Graphs may be inside graphs this deep.
const MAX_DEPTH: usize = 16;

/// Solves graphs on behalf of a build.
pub trait SolveNested: Send + Sync {
    /// The state that `definition`, which the operation `of` read, results in.
    fn solve_nested(
        &self,
        of: Digest,
        definition: Definition,
    ) -> BoxFuture<'_, Result<ImmutableRef>>;
}

/// How a build's operations reach the build itself, once that is there.
#[derive(Clone, Default)]
pub struct Nested(Arc<OnceLock<Weak<dyn SolveNested>>>);

impl Nested {
    /// Says who solves them.
    pub fn set(&self, solver: Weak<dyn SolveNested>) {
        let _ = self.0.set(solver);
    }

    fn get(&self) -> Result<Arc<dyn SolveNested>> {
        self.0.get().and_then(Weak::upgrade).ok_or_else(Fault::cancelled)
    }
}

struct BuildVertex(BuildOp);

/// The work of `op`.
pub(crate) fn work(op: &BuildOp) -> Box<dyn VertexOp> {
    Box::new(BuildVertex(op.clone()))
}

#[async_trait]
impl VertexOp for BuildVertex {
    async fn cache_map(&self, of: &LlbOp, _cx: &Context) -> Result<CacheMap> {
        let BuildOp { builder, inputs, definition, attrs } = &self.0;
        let parts = (builder, inputs, definition, attrs);
        Ok(keyed("shipway.build.v1", "", &parts, of.vertex.inputs.len()))
    }

    async fn run(
        &self,
        of: &LlbOp,
        inputs: Vec<ImmutableRef>,
        cx: &Context,
    ) -> Result<Vec<ImmutableRef>> {
        let definition = definition(&self.0, &inputs).await?;
        let mut tried = None;
        loop {
            let Some(job) = (cx.jobs)().first().cloned() else { return Err(Fault::cancelled()) };
            if tried.as_ref() == Some(&job.id) {
                return Err(Fault::cancelled());
            }
            let solve = async {
                job.nested.get()?.solve_nested(of.vertex.digest, definition.clone()).await
            };
            match solve.await {
                // The build that was asked ended meanwhile; another one that wants the same may go
                // on with it.
                Err(fault) if fault.is_cancelled() => tried = Some(job.id),
                solved => {
                    let state = solved.context(|| "solve the graph that was built")?;
                    return Ok(vec![state]);
                }
            }
        }
    }

    fn capture(&self, _of: &LlbOp, capture: &mut Capture) -> Result<()> {
        capture.incomplete = true;
        Ok(())
    }

    fn takes_slot(&self) -> bool {
        false
    }
}

async fn definition(op: &BuildOp, inputs: &[ImmutableRef]) -> Result<Definition> {
    if op.builder.is_some() {
        return Err(Fault::invalid("only LLB builder is currently allowed"));
    }
    let input = op
        .inputs
        .get(DEFINITION)
        .ok_or_else(|| Fault::invalid(format!("no llb definition input {DEFINITION} found")))?;
    let state = input
        .and_then(|i| inputs.get(i))
        .ok_or_else(|| Fault::invalid("invalid index of the llb definition input"))?;
    let mount = state.mount().await.context(|| "read the definition of a build operation")?;
    let name = op
        .attrs
        .get(FILENAME)
        .filter(|n| !n.is_empty())
        .map_or(DEFINITION, String::as_str)
        .to_owned();
    let read = move || Definition::decode(&read(mount.path(), &name)?);
    let definition = shipway_task::blocking("read a file", read).await;
    definition.context(|| "read the definition of a build operation")
}

/// A regular file of the user's, inside `root`.
fn read(root: &Path, name: &str) -> Result<Vec<u8>> {
    let failed = |e: std::io::Error| {
        Fault::io(format!("open {name}"), e).with_class(shipway_fault::Class::User)
    };
    let flags = OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC;
    let dir = rustix::fs::open(root, flags, Mode::empty()).map_err(|e| failed(e.into()))?;
    let found = shipway_rootfs::open_in_root(dir.as_fd(), name, OFlags::PATH, Mode::empty());
    let found = found.map_err(|e| failed(e.into()))?;
    let file = shipway_rootfs::reopen_regular(found.as_fd()).map_err(|e| failed(e.into()))?;
    let file = file.ok_or_else(|| Fault::invalid(format!("{name} is not a regular file")))?;
    let mut bytes = Vec::new();
    file.take(MAX_DEFINITION + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_DEFINITION {
        return Err(Fault::invalid(format!(
            "{name} has more than the {MAX_DEFINITION} bytes that a definition may have"
        )));
    }
    Ok(bytes)
}

/// Build operations that are being run, and what is in their graphs. One that needs itself would
/// wait forever, and graphs that make ever new graphs would never end.
#[derive(Clone, Debug, Default)]
pub struct NestedGraphs(Arc<Mutex<Graphs>>);

#[derive(Debug, Default)]
struct Graphs {
    next: u64,
    running: HashMap<u64, Graph>,
}

#[derive(Debug)]
struct Graph {
    of: Digest,
    vertices: HashSet<Digest>,
    depth: usize,
}

/// Keeps a graph known while it is solved.
#[derive(Debug)]
pub struct NestedGraph {
    all: NestedGraphs,
    number: u64,
}

impl NestedGraphs {
    /// Notes that the operation `of` needs `vertices` now.
    pub fn enter(
        &self,
        of: Digest,
        vertices: impl IntoIterator<Item = Digest>,
    ) -> Result<NestedGraph> {
        let mut all = self.0.lock();
        let vertices: HashSet<Digest> = vertices.into_iter().collect();
        let (mut seen, mut waiting) = (HashSet::new(), vec![&vertices]);
        while let Some(set) = waiting.pop() {
            if set.contains(&of) {
                return Err(Fault::invalid(format!(
                    "the build operation {of} needs its own result"
                )));
            }
            let inner = all
                .running
                .iter()
                .filter(|(number, graph)| set.contains(&graph.of) && seen.insert(**number));
            waiting.extend(inner.map(|(_, graph)| &graph.vertices));
        }
        let depth = 1 + all
            .running
            .values()
            .filter(|graph| graph.vertices.contains(&of))
            .map(|graph| graph.depth)
            .max()
            .unwrap_or(0);
        if depth > MAX_DEPTH {
            return Err(Fault::invalid(format!(
                "graphs are inside graphs more than {MAX_DEPTH} deep"
            )));
        }
        let number = all.next;
        all.next += 1;
        all.running.insert(number, Graph { of, vertices, depth });
        drop(all);
        Ok(NestedGraph { all: self.clone(), number })
    }
}

impl Drop for NestedGraph {
    fn drop(&mut self) {
        self.all.0.lock().running.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_graph_that_needs_itself_is_refused_whoever_comes_first() {
        let [a, b, c] = ["a", "b", "c"].map(Digest::of);
        let graphs = NestedGraphs::default();
        assert!(graphs.enter(a, [a]).is_err());
        let first = graphs.enter(a, [b]).unwrap();
        let second = graphs.enter(b, [c]).unwrap();
        assert!(
            graphs
                .enter(c, [Digest::of("d"), a])
                .unwrap_err()
                .to_string()
                .contains("needs its own result")
        );
        drop(second);
        // Nothing waits for what has ended.
        assert!(graphs.enter(c, [a]).is_ok());
        drop(first);
        assert!(graphs.0.lock().running.is_empty());
    }

    #[test]
    fn graphs_are_inside_graphs_so_deep_only() {
        let graphs = NestedGraphs::default();
        let name = |n: usize| Digest::of(n.to_string());
        let held: Vec<_> =
            (0..MAX_DEPTH).map(|n| graphs.enter(name(n), [name(n + 1)]).unwrap()).collect();
        assert!(graphs.enter(name(MAX_DEPTH), []).unwrap_err().to_string().contains("deep"));
        assert!(graphs.enter(Digest::of("beside"), []).is_ok());
        drop(held);
        assert!(graphs.enter(name(MAX_DEPTH), []).is_ok());
    }

    #[test]
    fn definitions_are_regular_files_inside_their_root_and_not_too_large() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir(&root).unwrap();
        std::fs::write(dir.path().join("outside"), "no").unwrap();
        std::fs::write(root.join("file"), "yes").unwrap();
        std::os::unix::fs::symlink("/file", root.join("link")).unwrap();
        std::os::unix::fs::symlink("../outside", root.join("out")).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            root.join("pipe"),
            rustix::fs::FileType::Fifo,
            Mode::RUSR,
            0,
        )
        .unwrap();
        std::fs::File::create(root.join("large")).unwrap().set_len(MAX_DEFINITION + 1).unwrap();
        assert_eq!(read(&root, "/file").unwrap(), b"yes");
        assert_eq!(read(&root, "link").unwrap(), b"yes");
        assert!(read(&root, "out").unwrap_err().is_not_found());
        assert!(read(&root, "pipe").unwrap_err().to_string().contains("is not a regular file"));
        assert!(read(&root, "large").unwrap_err().to_string().contains("more than"));
    }
}
