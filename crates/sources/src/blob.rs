//! `docker-image+blob://` and `oci-layout+blob://`: one blob by its digest, as one file (row
//! `src.blob`); and where such a blob is, for other sources that read one.

use crate::{
    PinnedSource, SourceContext, SourceSpec,
    clients::ClientServices,
    http::{Shape, file},
    keys,
    port::Source,
    remote::{BlobStream, ClientRemote, RegistryRemote, Remote},
};
use futures::{FutureExt as _, future::BoxFuture};
use serde::Serialize;
use shipway_attest::{self as attest, Capture};
use shipway_fault::{Context, Fault, Result};
use shipway_oci::{Descriptor, Digest, ImageName};
use shipway_refs::{ImmutableRef, RecordType, RefStore};
use shipway_registry::{Mode, Registry};
use shipway_session::SessionId;
use std::path::Path;

/// Where a blob is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BlobAt {
    /// Its place, with its digest.
    pub name: ImageName,
    pub digest: Digest,
    /// The client's store that has it and perhaps which client; `None` for a registry.
    pub store: Option<(String, Option<SessionId>)>,
}

impl BlobAt {
    /// Reads `<scheme>://<name>@<digest>`; the store of a client is an attribute of `spec`, or
    /// called like the place. The error is the reason alone.
    pub(crate) fn parse(locator: &str, spec: &SourceSpec) -> Result<Self, String> {
        let (scheme, body) = locator.split_once("://").ok_or("missing scheme")?;
        let name: ImageName = body.parse().map_err(|e| format!("{e}"))?;
        let digest = name.digest().ok_or("invalid digest: a blob has no other name")?;
        let attr = |key: &str| spec.attrs.get(key).filter(|v| !v.is_empty()).cloned();
        let store = match scheme {
            "docker-image+blob" => None,
            "oci-layout+blob" => {
                let named = || body.split('@').next().unwrap_or_default().to_owned();
                Some((
                    attr("oci.store").unwrap_or_else(named),
                    attr("oci.session").map(|id| SessionId::new(&id)),
                ))
            }
            _ => {
                return Err(format!(
                    "scheme {scheme:?} is not supported; expected \"docker-image+blob\" or \"oci-layout+blob\""
                ));
            }
        };
        Ok(Self { name, digest, store })
    }

    async fn open(
        &self,
        clients: &dyn ClientServices,
        registry: &Registry,
    ) -> Result<Box<dyn BlobStream>> {
        let remote: Box<dyn Remote> = match &self.store {
            None => Box::new(RegistryRemote(registry.repository(
                &self.name,
                clients.credentials(),
                Mode::Pull,
            ))),
            Some((store, session)) => {
                let store = clients.client_store(session.as_ref(), &format!("oci:{store}")).await?;
                Box::new(ClientRemote { store, name: self.name.to_string() })
            }
        };
        let size = remote.blob_size(self.digest).await?;
        remote.open(&Descriptor::new("application/octet-stream", self.digest, size)).await
    }

    /// Writes it to the new file `name` in `dir`. The place is not trusted: it gives no more bytes
    /// than it announced, and they have to be those of the digest.
    pub(crate) async fn save(
        &self,
        dir: &Path,
        name: &str,
        shape: &Shape,
        clients: &dyn ClientServices,
        registry: &Registry,
    ) -> Result<()> {
        let mut pieces = self.open(clients, registry).await?;
        let mut target = file::create(dir, name, false).await?;
        while let Some(piece) = pieces.next().await? {
            target.write(piece).await?;
        }
        let (expected, got) = (self.digest, target.finish(shape, None).await?);
        if got == expected {
            Ok(())
        } else {
            Err(Fault::invalid(format!("expected checksum to match {expected}, got {got}")))
        }
    }
}

/// Single blobs.
pub(crate) struct BlobSource {
    pub refs: RefStore,
    pub registry: Registry,
}

/// A parsed blob source.
struct BlobSpec {
    at: BlobAt,
    shape: Shape,
    record_type: RecordType,
}

#[derive(Serialize)]
struct BlobKey<'a> {
    digest: Digest,
    filename: &'a str,
    perm: u32,
    uid: u32,
    gid: u32,
}

impl BlobSpec {
    fn parse(spec: &SourceSpec) -> Result<Self> {
        let wrong = |why: &str| {
            Fault::invalid(format!("failed to parse blob {:?}: {why}", spec.identifier))
        };
        let at = BlobAt::parse(&spec.identifier, spec).map_err(|why| wrong(&why))?;
        let (mut shape, mut record_type) = (Shape::default(), RecordType::Regular);
        for (key, value) in &spec.attrs {
            if key == "image.recordtype" && !value.is_empty() {
                let known = value.parse().ok().filter(|t| {
                    matches!(t, RecordType::Regular | RecordType::Internal | RecordType::Frontend)
                });
                record_type =
                    known.ok_or_else(|| wrong(&format!("invalid record type {value}")))?;
            } else {
                shape.take(key, value)?;
            }
        }
        Ok(Self { at, shape, record_type })
    }

    fn filename(&self) -> String {
        if self.shape.filename.is_empty() {
            self.at.digest.hex().to_string()
        } else {
            file::safe(&self.shape.filename)
        }
    }
}

impl Source for BlobSource {
    fn pin<'a>(
        &'a self,
        spec: &'a SourceSpec,
        _cx: &'a SourceContext,
    ) -> BoxFuture<'a, Result<PinnedSource>> {
        async move {
            let blob = BlobSpec::parse(spec)?;
            let Shape { perm, uid, gid, .. } = blob.shape;
            let key =
                BlobKey { digest: blob.at.digest, filename: &blob.filename(), perm, uid, gid };
            Ok(PinnedSource {
                keys: vec![keys::digest("blob", &key)],
                ephemeral: false,
                digest: Some(blob.at.digest.to_string()),
                stored: None,
            })
        }
        .boxed()
    }

    fn fetch<'a>(
        &'a self,
        spec: &'a SourceSpec,
        _pin: &'a PinnedSource,
        cx: &'a SourceContext,
    ) -> BoxFuture<'a, Result<ImmutableRef>> {
        async move {
            let blob = BlobSpec::parse(spec)?;
            let description = format!("blob {}", blob.at.name);
            let state = self.refs.mutable(None, &description, blob.record_type, None).await?;
            let mount = state.mount().await?;
            blob.at
                .save(mount.path(), &blob.filename(), &blob.shape, &*cx.clients, &self.registry)
                .await
                .context(|| description.clone())?;
            mount.unmount().await?;
            state.commit(&description).await
        }
        .boxed()
    }

    fn capture(&self, spec: &SourceSpec, _pin: &PinnedSource, capture: &mut Capture) -> Result<()> {
        let at = BlobSpec::parse(spec)?.at;
        capture.add_blob(attest::BlobSource { local: at.store.is_some(), name: at.name });
        Ok(())
    }
}
