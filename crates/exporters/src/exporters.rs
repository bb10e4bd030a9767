//! All exporters, in a table by kind.

use crate::{
    Exporter, LazyBlobs, Publishing,
    archive::{ArchiveExporter, Variant},
    image::ImageExporter,
    services::ExportServices,
    tree::{LocalExporter, TarExporter},
};
use shipway_executor::Executor;
use shipway_fault::{Fault, Result, nearest};
use shipway_refs::RefStore;
use shipway_registry::Registry;
use std::{collections::BTreeMap, sync::Arc};

type Attrs = BTreeMap<String, String>;

/// Makes an exporter of attributes; wrong ones are errors.
type Constructor = fn(Arc<ExportServices>, &Attrs) -> Result<Arc<dyn Exporter>>;

/// The exporters by kind, as clients name it (`type=`).
const KINDS: [(&str, Constructor); 5] = [
    ("image", |inner, attrs| Ok(Arc::new(ImageExporter::new(inner, attrs)?))),
    ("oci", |inner, attrs| Ok(Arc::new(ArchiveExporter::new(inner, Variant::Oci, attrs)?))),
    ("docker", |inner, attrs| Ok(Arc::new(ArchiveExporter::new(inner, Variant::Docker, attrs)?))),
    ("local", |_, attrs| Ok(Arc::new(LocalExporter::new(attrs)?))),
    ("tar", |_, attrs| Ok(Arc::new(TarExporter::new(attrs)?))),
];

/// All exporters. Clones share what they work with.
#[derive(Clone)]
pub struct Exporters {
    inner: Arc<ExportServices>,
}

impl Exporters {
    /// Exporters over these.
    ///
    /// An image that CRI manages and that was not built here keeps its name unless it matches one
    /// of `replaceable`, in which `*` stands for anything. Images in the store go to the namespaces
    /// of `publishing`, too, and get the blobs that they do without when `lazy_blobs` says. Results
    /// that are to be optimized are run by `executor`.
    pub fn new(
        refs: RefStore,
        registry: Registry,
        replaceable: Vec<String>,
        publishing: Publishing,
        lazy_blobs: LazyBlobs,
        executor: Arc<dyn Executor>,
    ) -> Self {
        let inner =
            ExportServices { refs, registry, replaceable, publishing, lazy_blobs, executor };
        Self { inner: Arc::new(inner) }
    }

    /// The exporter of type `kind`; wrong attributes and unknown types are errors here, before
    /// anything is built.
    pub fn resolve(&self, kind: &str, attrs: &Attrs) -> Result<Arc<dyn Exporter>> {
        match KINDS.iter().find(|(name, _)| *name == kind) {
            Some((_, make)) => make(self.inner.clone(), attrs),
            None => Err(unknown(kind)),
        }
    }
}

fn unknown(kind: &str) -> Fault {
    let names = KINDS.map(|(name, _)| name);
    let fault = Fault::invalid(format!("exporter \"{kind}\" could not be found"));
    match nearest(kind, names) {
        Some(near) => fault.hint(format!("did you mean type={near}?")),
        None => fault.hint(format!("use one of type={}", names.join(", "))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_type_is_answered_with_what_there_is() {
        let hint = |kind| unknown(kind).hints().map(str::to_owned).collect::<Vec<_>>().join("; ");
        assert_eq!(hint("locl"), "did you mean type=local?");
        assert_eq!(hint("xyzzy"), "use one of type=image, oci, docker, local, tar");
    }
}
