//! Files as a bridge gives them, for the tests and for the example `answers`.

use bytes::Bytes;
use futures::{FutureExt as _, future::BoxFuture};
use shipway_fault::{Fault, Result};
use shipway_frontend::{BuildRef, FileStat};
use shipway_llb::{Caps, Definition, Graph, Op};
use shipway_oci::Platform;
use std::{collections::BTreeMap, sync::Arc};

/// What a definition leads to: the files below the name of the client's directory that it reads, or
/// those of the context.
pub struct Files {
    files: Arc<BTreeMap<String, String>>,
    prefix: String,
}

impl Files {
    /// Fails if the definition is wrong.
    pub fn of(
        definition: &Definition,
        files: &Arc<BTreeMap<String, String>>,
    ) -> Result<Arc<dyn BuildRef>> {
        let caps: Caps =
            shipway_llb::caps::LLB.iter().chain(shipway_llb::caps::LLB_MISSING).copied().collect();
        let graph = Graph::decode(definition, &caps, &Platform::host())?;
        let local = graph.vertices.iter().find_map(|v| match &v.op {
            Op::Source(s) => s.identifier.strip_prefix("local://"),
            _ => None,
        });
        let prefix = local
            .filter(|l| *l != "context" && *l != "dockerfile")
            .map(|l| format!("{l}/"))
            .unwrap_or_default();
        Ok(Arc::new(Self { files: files.clone(), prefix }))
    }
}

impl BuildRef for Files {
    fn id(&self) -> &str {
        ""
    }

    fn definition(&self) -> Option<&Definition> {
        None
    }

    fn evaluate(&self) -> BoxFuture<'_, Result<()>> {
        async move { Ok(()) }.boxed()
    }

    fn read_file<'a>(
        &'a self,
        path: &'a str,
        range: Option<(u64, u64)>,
    ) -> BoxFuture<'a, Result<Bytes>> {
        async move {
            match self.files.get(&format!("{}{path}", self.prefix)) {
                Some(text) => {
                    let bytes = Bytes::from(text.clone());
                    let (from, length) =
                        range.map_or((0, 0), |(from, length)| (from as usize, length as usize));
                    let from = from.min(bytes.len());
                    let end =
                        if length == 0 { bytes.len() } else { bytes.len().min(from + length) };
                    Ok(bytes.slice(from..end))
                }
                None => Err(Fault::not_found(format!("open {path}: no such file or directory"))),
            }
        }
        .boxed()
    }

    fn read_dir<'a>(
        &'a self,
        _path: &'a str,
        _include: Option<&'a str>,
    ) -> BoxFuture<'a, Result<Vec<FileStat>>> {
        async move { Err(Fault::unimplemented("read_dir")) }.boxed()
    }

    fn stat_file<'a>(&'a self, _path: &'a str) -> BoxFuture<'a, Result<FileStat>> {
        async move { Err(Fault::unimplemented("stat_file")) }.boxed()
    }
}
