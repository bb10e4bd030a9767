//! `create`: sources found, combined, and pushed (row `bx.imagetools.create`).

use crate::{Annotation, Combined, Copier, Part, combine};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use serde::Deserialize;
use shipway_convert::{Progress, Remote, Source, Target};
use shipway_fault::{Context as _, Fault, Result};
use shipway_oci::{Descriptor, Digest, ImageConfig, ImageName, Manifest, Platform, media};
use shipway_registry::{Mode, Repository};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

/// Sources that are asked for at the same time.
const PARALLEL: usize = 4;

/// Opens a repository.
pub type Open = dyn Fn(&ImageName, Mode) -> Repository + Send + Sync;

/// A source as it is named: a digest in the only repository of the request, a name, or a descriptor
/// as JSON, which may give the platform and annotations.
#[derive(Clone, Debug, PartialEq)]
pub enum SourceSpec {
    /// What is in the repository of the others under this digest.
    Digest(Digest),
    /// An image.
    Name(ImageName),
    /// What is in the repository of the others, described.
    Described(Box<Described>),
}

/// A descriptor of which only the digest must be known.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Described {
    #[serde(default)]
    media_type: String,
    digest: Digest,
    #[serde(default)]
    size: u64,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
    platform: Option<Platform>,
}

impl std::str::FromStr for SourceSpec {
    type Err = Fault;

    fn from_str(text: &str) -> Result<Self> {
        let text = text.trim();
        let failed = |why: String| {
            Fault::invalid(format!(
                "failed to parse source {text:?}, valid sources are digests, references and \
                 descriptors: {why}"
            ))
        };
        if text.starts_with("oci-layout://") {
            return Err(Fault::unimplemented("a source in an OCI layout").hint(
                "load it with `shipway load` and push it with `shipway push`, or name an image in \
                 a registry",
            ));
        }
        if text.starts_with("sha256:") {
            return text.parse().map(Self::Digest).map_err(|e| failed(format!("{e}")));
        }
        if !text.starts_with('{') {
            return text.parse().map(Self::Name).map_err(|e| failed(format!("{e}")));
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Versioned {
            #[serde(default)]
            schema_version: u64,
        }
        let read: Versioned = serde_json::from_str(text).map_err(|e| failed(e.to_string()))?;
        if read.schema_version != 0 {
            return Err(failed(format!(
                "expected an OCI content descriptor, got a manifest or index (schemaVersion {})",
                read.schema_version
            )));
        }
        serde_json::from_str(text).map(Self::Described).map_err(|e| failed(e.to_string()))
    }
}

/// What to make of what.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// What it is made of.
    pub sources: Vec<SourceSpec>,
    /// The names that it gets; may be empty if it is only looked at.
    pub tags: Vec<ImageName>,
    /// What is said on it.
    pub annotations: Vec<Annotation>,
    /// Whether one manifest becomes an index.
    pub prefer_index: bool,
    /// Platforms that it has, instead of all.
    pub platforms: Vec<Platform>,
}

/// An image that is known and not pushed yet.
pub struct Plan {
    /// What is pushed.
    pub combined: Combined,
    sources: Vec<(ImageName, Arc<dyn Source>)>,
    tags: Vec<ImageName>,
}

/// What a source is found under.
fn place(source: &SourceSpec, shared: Option<&ImageName>) -> Result<ImageName> {
    let digest = match source {
        SourceSpec::Name(name) => return Ok(name.clone()),
        SourceSpec::Digest(digest) => *digest,
        SourceSpec::Described(described) => described.digest,
    };
    let shared = shared.ok_or_else(|| {
        Fault::invalid(format!(
            "multiple repositories specified, cannot infer repository for {digest}"
        ))
        .hint("name the source as REPOSITORY@DIGEST")
    })?;
    format!("{}@{digest}", shared.locator())
        .parse()
        .map_err(|e| Fault::invalid(format!("{digest} in {shared}: {e}")))
}

/// The only repository that names lead to.
fn shared<'a>(names: impl Iterator<Item = &'a ImageName> + Clone) -> Result<Option<ImageName>> {
    let repositories: BTreeSet<String> = names.clone().map(ImageName::locator).collect();
    match (repositories.len(), names.clone().next()) {
        (0, _) | (_, None) => Err(Fault::invalid(
            "no repositories specified, please set a reference in tag or source",
        )),
        (1, Some(name)) => Ok(Some(name.clone())),
        _ => Ok(None),
    }
}

/// What is found, with what was said about it.
fn described(found: Descriptor, said: &SourceSpec) -> Result<Descriptor> {
    let SourceSpec::Described(said) = said else { return Ok(found) };
    if said.size != 0 && said.size != found.size {
        return Err(Fault::invalid(format!(
            "invalid size mismatch for {}, {} != {}",
            found.digest, said.size, found.size
        )));
    }
    let mut merged = found;
    if !said.media_type.is_empty() {
        merged.media_type.clone_from(&said.media_type);
    }
    if !said.annotations.is_empty() {
        merged.annotations.clone_from(&said.annotations);
    }
    if said.platform.is_some() {
        merged.platform.clone_from(&said.platform);
    }
    Ok(merged)
}

/// The source as it is combined: a manifest's descriptor gets the platform that its config names,
/// as far as it has none.
async fn part(name: &ImageName, source: &dyn Source, said: &SourceSpec) -> Result<Part> {
    let found = source.root().await?;
    let mut descriptor = described(found, said)?;
    let bytes = source.manifest(&descriptor).await?;
    if media::is_manifest(&descriptor.media_type) {
        let known = descriptor.platform.take();
        let whole = |p: &Platform| !p.os.is_empty() && !p.architecture.is_empty();
        descriptor.platform = match known {
            Some(known) if whole(&known) => Some(known),
            known => Some(completed(known, source, &bytes, descriptor.digest).await?),
        };
    } else if !media::is_index(&descriptor.media_type) {
        return Err(Fault::invalid(format!(
            "{name} is neither a manifest nor an index, but {:?}",
            descriptor.media_type
        )));
    }
    Ok(Part { descriptor, bytes })
}

/// The platform that the config of a manifest names.
pub async fn platform_of(source: &dyn Source, manifest: &[u8], digest: Digest) -> Result<Platform> {
    let manifest: Manifest = serde_json::from_slice(manifest)
        .map_err(|e| Fault::invalid(format!("the manifest {digest} cannot be read: {e}")))?;
    let config = source.config(&manifest.config).await?;
    let config: ImageConfig = serde_json::from_slice(&config)
        .map_err(|e| Fault::invalid(format!("the config of {digest} cannot be read: {e}")))?;
    Ok(config.platform())
}

async fn completed(
    known: Option<Platform>,
    source: &dyn Source,
    manifest: &[u8],
    digest: Digest,
) -> Result<Platform> {
    let of_config = platform_of(source, manifest, digest).await?;
    let mut known = known.unwrap_or_else(|| Platform {
        architecture: String::new(),
        os: String::new(),
        os_version: String::new(),
        os_features: Vec::new(),
        variant: String::new(),
    });
    if known.architecture.is_empty() {
        known.architecture = of_config.architecture;
        if known.variant.is_empty() {
            known.variant = of_config.variant;
        }
    }
    if known.os.is_empty() {
        known.os = of_config.os;
    }
    Ok(known)
}

impl Plan {
    /// Finds the sources of `request` by `open`, and combines them. Nothing is written.
    pub async fn of(request: Request, open: &Open) -> Result<Self> {
        let named = request.sources.iter().filter_map(|source| match source {
            SourceSpec::Name(name) => Some(name),
            _ => None,
        });
        let shared = shared(named.chain(&request.tags))?;
        let found = request.sources.iter().map(|said| {
            let shared = shared.as_ref();
            async move {
                let name = place(said, shared)?;
                let source: Arc<dyn Source> = Arc::new(Remote::new(open(&name, Mode::Pull)));
                let part = part(&name, &*source, said).await?;
                Ok::<_, Fault>((part, (name, source)))
            }
        });
        let found: Vec<futures::future::BoxFuture<'_, _>> =
            found.map(|f| Box::pin(f) as _).collect();
        let found: Vec<_> = stream::iter(found).buffered(PARALLEL).try_collect().await?;
        let (parts, sources): (Vec<Part>, Vec<_>) = found.into_iter().unzip();
        let combined =
            combine(&parts, &request.annotations, request.prefer_index, &request.platforms)?;
        Ok(Self { combined, sources, tags: request.tags })
    }

    /// The repositories that it is pushed to, in order, without tags.
    pub fn repositories(&self) -> Vec<String> {
        let all: BTreeSet<String> = self.tags.iter().map(ImageName::locator).collect();
        all.into_iter().collect()
    }

    /// Pushes it to `repository`, under all of its tags there: first what it leads to, each from
    /// the source that has it, then itself. `note` hears what is done.
    pub async fn push(
        &self,
        repository: &str,
        open: &Open,
        progress: Progress,
        note: &(dyn Fn(String) + Send + Sync),
    ) -> Result<()> {
        let tags: Vec<&ImageName> =
            self.tags.iter().filter(|tag| tag.locator() == repository).collect();
        let Some(first) = tags.first() else { return Ok(()) };
        let target = Arc::new(Remote::new(open(first, Mode::Push)));
        let copier = Copier::new(target, progress);
        for entry in &self.combined.entries {
            let (name, source) = &self.sources[entry.part];
            let digest = entry.descriptor.digest;
            note(format!("copying {digest} from {name} to {repository}\n"));
            let copied = copier.copy(source, &entry.descriptor).await;
            copied.context(|| format!("copy {digest} from {name} to {repository}"))?;
        }
        let Combined { root, bytes, .. } = &self.combined;
        for tag in &tags {
            note(format!("pushing {} to {tag}\n", root.digest));
            let target: &dyn Target = &Remote::new(open(tag, Mode::Push));
            let pushed = async {
                target.manifest(root, bytes.clone(), &[]).await?;
                target.finish(root).await
            };
            pushed.await.context(|| format!("publish {} to {tag}", root.digest))?;
        }
        // An index that is pushed as it was may be signed.
        if let [(_, source)] = &self.sources[..] {
            copier.referrers(source, root.digest).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> ImageName {
        text.parse().unwrap()
    }

    #[test]
    fn sources_are_digests_names_or_descriptors() {
        let digest = Digest::of("x");
        let parse = |text: &str| text.parse::<SourceSpec>();
        assert_eq!(parse(&digest.to_string()).unwrap(), SourceSpec::Digest(digest));
        assert_eq!(parse("a/b:1").unwrap(), SourceSpec::Name(name("docker.io/a/b:1")));
        let json = format!(
            "{{\"digest\":\"{digest}\",\"platform\":{{\"os\":\"linux\",\"architecture\":\"arm64\"}}}}\n"
        );
        let SourceSpec::Described(read) = parse(&json).unwrap() else { panic!("a descriptor") };
        assert_eq!((read.digest, read.size), (digest, 0));
        assert_eq!(read.platform.unwrap().to_string(), "linux/arm64");
        for (text, why) in [
            ("sha256:1", "failed to parse source \"sha256:1\""),
            ("A B", "valid sources are digests, references and descriptors"),
            ("{\"schemaVersion\":2}", "got a manifest or index (schemaVersion 2)"),
            ("{}", "missing field `digest`"),
            ("oci-layout:///x", "not implemented"),
        ] {
            let refused = parse(text).unwrap_err();
            assert!(refused.to_string().contains(why), "{text}: {refused}");
        }
    }

    #[test]
    fn digests_are_of_the_only_repository() {
        let digest = SourceSpec::Digest(Digest::of("x"));
        let (a, b) = (name("r.io/a:1"), name("r.io/b:1"));
        let one = shared([&a, &name("r.io/a:2")].into_iter()).unwrap();
        let found = place(&digest, one.as_ref()).unwrap();
        assert_eq!(found.to_string(), format!("r.io/a@{}", Digest::of("x")));
        assert_eq!(shared([&a, &b].into_iter()).unwrap(), None);
        assert!(place(&digest, None).unwrap_err().message().contains("cannot infer"));
        assert_eq!(place(&SourceSpec::Name(b.clone()), None).unwrap(), b);
        assert!(shared([].into_iter()).is_err());
    }

    #[test]
    fn what_is_said_of_a_source_counts() {
        let found = Descriptor::of(media::OCI_MANIFEST, b"{}");
        let said = |json: &str| -> SourceSpec {
            json.replace('$', &found.digest.to_string()).parse().unwrap()
        };
        let merged = described(
            found.clone(),
            &said(r#"{"digest":"$","size":2,"annotations":{"k":"v"},"platform":{"os":"linux","architecture":"arm"}}"#),
        )
        .unwrap();
        assert_eq!((merged.annotations["k"].as_str(), merged.size), ("v", 2));
        assert_eq!(merged.platform.unwrap().architecture, "arm");
        let wrong = described(found.clone(), &said(r#"{"digest":"$","size":3}"#)).unwrap_err();
        assert!(wrong.message().starts_with("invalid size mismatch for sha256:"), "{wrong}");
    }
}
