//! Files as a bridge gives them, for the tests and for the example `answers`.

use async_trait::async_trait;
use bytes::Bytes;
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

#[async_trait]
impl BuildRef for Files {
    fn id(&self) -> &str {
        ""
    }

    fn definition(&self) -> Option<&Definition> {
        None
    }

    async fn evaluate(&self) -> Result<()> {
        Ok(())
    }

    async fn read_file(&self, path: &str, range: Option<(u64, u64)>) -> Result<Bytes> {
        match self.files.get(&format!("{}{path}", self.prefix)) {
            Some(text) => {
                let bytes = Bytes::from(text.clone());
                let (from, length) =
                    range.map_or((0, 0), |(from, length)| (from as usize, length as usize));
                let from = from.min(bytes.len());
                let end = if length == 0 { bytes.len() } else { bytes.len().min(from + length) };
                Ok(bytes.slice(from..end))
            }
            None => Err(Fault::not_found(format!("open {path}: no such file or directory"))),
        }
    }

    async fn read_dir(&self, _path: &str, _include: Option<&str>) -> Result<Vec<FileStat>> {
        Err(Fault::unimplemented("read_dir"))
    }

    async fn stat_file(&self, _path: &str) -> Result<FileStat> {
        Err(Fault::unimplemented("stat_file"))
    }
}
