//! `convert`: the same image with layers that can be pulled lazily.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io::{IsTerminal as _, Read as _},
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::Mutex;
use shipway_archive::Compression;
use shipway_convert::{
    First, LayerTarget, Options, Packing, Progress, Remote, SociOptions, Source, Step, Stored,
    convert, with_soci,
};
use shipway_fault::{Fault, Result};
use shipway_lazyfetch::Profile;
use shipway_oci::{Digest, ImageName, Index, Platform, media};
use shipway_registry::Mode;

use crate::{
    output,
    places::{Registries, RegistryArgs, StoreArgs},
    size,
};

/// Most bytes of a list of paths.
const MAX_LIST: u64 = 64 << 20;
/// Most platforms of an image whose profiles are looked for.
const MAX_PLATFORMS: usize = 64;

/// Write an image again with layers that can be pulled lazily
///
/// Reads SRC and writes DST. Both are names in registries, or names in containerd's store with
/// `containerd:` before them, as in `containerd:docker.io/library/app:1`.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The image as it is
    #[arg(value_name = "SRC")]
    source: Place,
    /// The image to write
    #[arg(value_name = "DST")]
    target: Place,
    /// estargz, or zstdchunked for containerd, or zstd:chunked for podman; also gzip, zstd and
    /// uncompressed
    #[arg(long, value_name = "KIND", default_value = "estargz")]
    compression: String,
    /// Level as the algorithm counts it
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    compression_level: Option<String>,
    /// Most bytes of a file that are fetched at once
    #[arg(long, value_name = "BYTES")]
    compression_chunk_size: Option<String>,
    /// Bytes that small files are packed together up to, for snapshotters that know it
    #[arg(long, value_name = "BYTES")]
    compression_min_chunk_size: Option<String>,
    /// Compress layers anew that are of this kind already
    #[arg(long)]
    force_compression: bool,
    /// File with paths in the image, one a line, in the order in which its program reads them:
    /// they come first in their layers and are fetched at once
    #[arg(long, value_name = "FILE", conflicts_with = "profile")]
    read_first: Option<PathBuf>,
    /// What a snapshotter learned of SRC, instead: a file of its directory `profiles`, or the name
    /// of the image in the registry where it was put (with `push_profiles`)
    #[arg(long, value_name = "FILE|IMAGE")]
    profile: Option<String>,
    /// Leave the layers as they are, and put a SOCI index of the large ones beside the image, for
    /// snapshotters that read those
    #[arg(long, conflicts_with_all = [
        "compression", "compression_level", "compression_chunk_size",
        "compression_min_chunk_size", "force_compression", "read_first", "profile",
    ])]
    soci: bool,
    /// Bytes of a layer's tar between places where it can be decompressed from [default: 4194304]
    #[arg(long, value_name = "BYTES", requires = "soci")]
    soci_span_size: Option<u64>,
    /// Layers with fewer bytes are in no SOCI index [default: 10485760]
    #[arg(long, value_name = "BYTES", requires = "soci")]
    soci_min_layer_size: Option<u64>,
    /// Platforms that the new image has, instead of all
    #[arg(long, value_name = "PLATFORM", value_delimiter = ',')]
    platform: Vec<Platform>,
    #[command(flatten)]
    registries: RegistryArgs,
    #[command(flatten)]
    store: StoreArgs,
}

/// Where an image is, or is to be.
#[derive(Clone, Debug)]
enum Place {
    Registry(ImageName),
    Containerd(String),
}

impl std::str::FromStr for Place {
    type Err = Fault;

    fn from_str(text: &str) -> Result<Self> {
        match text.strip_prefix("containerd:") {
            Some("") => Err(Fault::invalid("an image in containerd needs a name")),
            Some(name) => Ok(Self::Containerd(name.to_owned())),
            None => match text.parse() {
                Ok(name) => Ok(Self::Registry(name)),
                Err(e) => Err(Fault::invalid(format!("{e}"))),
            },
        }
    }
}

pub(crate) async fn run(args: Args) -> Result<()> {
    let compression = Compression::take(|key| match key {
        "compression" => Some(args.compression.clone()),
        "compression-level" => args.compression_level.clone(),
        "compression-chunk-size" => args.compression_chunk_size.clone(),
        "compression-min-chunk-size" => args.compression_min_chunk_size.clone(),
        "force-compression" => args.force_compression.then(String::new),
        _ => None,
    })?;
    let registries = args.registries.open()?;
    let source: Arc<dyn Source> = match &args.source {
        Place::Registry(name) => Arc::new(Remote::new(registries.repository(name, Mode::Pull))),
        Place::Containerd(name) => {
            Arc::new(Stored::new(args.store.connect().await?, name.to_owned()))
        }
    };
    let target: Arc<dyn LayerTarget> = match &args.target {
        Place::Registry(name) if name.digest().is_some() => {
            return Err(Fault::invalid(format!(
                "{name} names a digest, which a new image cannot have"
            ))
            .hint("name a tag"));
        }
        Place::Registry(name) => Arc::new(Remote::new(registries.repository(name, Mode::Push))),
        Place::Containerd(name) => {
            Arc::new(Stored::new(args.store.connect().await?, name.to_owned()))
        }
    };
    if args.soci {
        return soci(source, target, &args).await;
    }
    let first = match (&args.read_first, &args.profile) {
        (Some(path), _) => {
            let paths = read_first(path)?;
            (!paths.is_empty()).then(|| ("--read-first", First::Paths(paths.into())))
        }
        (None, Some(profile)) => Some(("--profile", learned(profile, &registries).await?)),
        (None, None) => None,
    };
    if let Some((flag, _)) = first.as_ref().filter(|_| !compression.kind.is_indexed()) {
        return Err(Fault::invalid(format!(
            "{flag} is of no use with --compression {}",
            compression.kind
        ))
        .hint("use estargz or zstdchunked"));
    }
    let packing = Packing { compression, first: first.map(|(_, first)| first) };
    let options = Options { packing, platforms: args.platform.clone() };
    let done = convert(source, target, &options, progress()).await?;
    let bytes = |n: u64| size::bytes(n.try_into().unwrap_or(i64::MAX));
    eprintln!(
        "converted {} layers to {}: {} became {}",
        done.layers,
        compression.kind,
        bytes(done.size.0),
        bytes(done.size.1)
    );
    output::print(&format!("{}\n", done.root.digest))
}

/// The image with SOCI indexes.
async fn soci(source: Arc<dyn Source>, target: Arc<dyn LayerTarget>, args: &Args) -> Result<()> {
    let usual = SociOptions::default();
    let options = SociOptions {
        span: args.soci_span_size.unwrap_or(usual.span),
        min_layer: args.soci_min_layer_size.unwrap_or(usual.min_layer),
        platforms: args.platform.clone(),
    };
    let done = with_soci(source, target, &options, progress()).await?;
    for (layer, why) in &done.skipped {
        eprintln!("no zTOC of {layer}: {why}");
    }
    let size = size::bytes(done.size.try_into().unwrap_or(i64::MAX));
    eprintln!("made the zTOCs of {} layers: {size}", done.layers);
    output::print(&format!("{}\n", done.root.digest))
}

/// The paths in a file of `--read-first`.
fn read_first(path: &Path) -> Result<Vec<Vec<u8>>> {
    let failed = |e| Fault::io(format!("read {}", path.display()), e);
    let mut text = Vec::new();
    File::open(path).and_then(|f| f.take(MAX_LIST).read_to_end(&mut text)).map_err(failed)?;
    let lines = text.split(|b| *b == b'\n').map(|line| line.trim_ascii());
    Ok(lines.filter(|line| !line.is_empty()).map(<[u8]>::to_vec).collect())
}

/// What the profile says that is in the file, or that is beside the image, `at`.
async fn learned(at: &str, registries: &Registries) -> Result<First> {
    let profiles = match Path::new(at).is_file() {
        true => {
            let failed = |e| Fault::io(format!("read {at}"), e);
            let mut text = Vec::new();
            File::open(at).and_then(|f| f.take(MAX_LIST).read_to_end(&mut text)).map_err(failed)?;
            vec![Profile::from_text(&text)?]
        }
        false => beside(at, registries).await?,
    };
    let mut pieces: HashMap<Digest, Vec<Range<u64>>> = HashMap::new();
    for (layer, blocks) in profiles.iter().flat_map(Profile::pieces) {
        pieces.entry(layer).or_default().push(blocks);
    }
    match pieces.is_empty() {
        false => Ok(First::Pieces(pieces.into())),
        true => Err(Fault::not_found(format!("{at} has no profile"))
            .hint("a snapshotter with push_profiles = true puts it there when the image was run")),
    }
}

/// The profiles of an image's platforms that are in its registry.
async fn beside(image: &str, registries: &Registries) -> Result<Vec<Profile>> {
    let name: ImageName = image
        .parse()
        .map_err(|e| Fault::invalid(format!("{image} is neither a file nor an image: {e}")))?;
    let source = Remote::new(registries.repository(&name, Mode::Pull));
    let root = source.root().await?;
    let mut subjects = vec![root.digest];
    if media::is_index(&root.media_type) {
        let index: Index = serde_json::from_slice(&source.manifest(&root).await?)
            .map_err(|e| Fault::invalid(format!("the index of {image} cannot be read: {e}")))?;
        subjects.extend(index.manifests.iter().take(MAX_PLATFORMS).map(|entry| entry.digest));
    }
    let mut found = Vec::new();
    for subject in subjects {
        let repository = registries.repository(&name, Mode::Pull);
        found.extend(Profile::beside(&repository, subject).await?);
    }
    Ok(found)
}

/// Tells on standard error how far layers are: on a terminal all the time, elsewhere when one was
/// read.
fn progress() -> Progress {
    let ended = Mutex::new(HashSet::new());
    let is_terminal = std::io::stderr().is_terminal();
    Arc::new(move |Step { digest, converts, done, size }| {
        let doing = if converts { "converting" } else { "copying" };
        let bytes = |n: u64| size::bytes(n.try_into().unwrap_or(i64::MAX));
        let mut ended = ended.lock();
        let clear = if is_terminal { "\r\x1b[K" } else { "" };
        if done == size && ended.insert(digest) {
            eprintln!("{clear}{doing} {digest} {}", bytes(size));
        } else if done < size && is_terminal {
            eprint!("{clear}{doing} {digest} {} of {}", bytes(done), bytes(size));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_in_a_registry_unless_they_say_otherwise() {
        let place = |text: &str| text.parse::<Place>();
        assert!(
            matches!(place("app:1"), Ok(Place::Registry(n)) if n.to_string() == "docker.io/library/app:1")
        );
        assert!(
            matches!(place("localhost:5000/a"), Ok(Place::Registry(n)) if n.registry() == "localhost:5000")
        );
        let stored = place("containerd:docker.io/library/app:1");
        assert!(matches!(stored, Ok(Place::Containerd(n)) if n == "docker.io/library/app:1"));
        assert!(place("containerd:").is_err() && place("A B").is_err());
    }
}
