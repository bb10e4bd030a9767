//! `push`, `tag`, `save` and `load`: images in containerd's store, without a daemon and without
//! another program.

use std::{io::IsTerminal as _, path::PathBuf, sync::Arc};

use shipway_convert::{Remote, Source, Stored, Target};
use shipway_fault::{Context as _, Fault, Result};
use shipway_imagetools::{
    Archive, ArchiveKind, ArchiveWriter, Combined, Copier, Entry, Kept, for_platforms, platform_of,
};
use shipway_oci::{Descriptor, ImageName, Index, Platform, media};
use shipway_registry::Mode;
use shipway_storage::{Labels, Storage, built_labels};

use crate::{
    output::{self, NewFile},
    places::{Registries, RegistryArgs, StoreArgs, image_name, new_name},
    progress::{Mode as ProgressMode, Task, Tasks},
    run::until_interrupted,
};

/// What commands that copy have in common.
#[derive(clap::Args, Debug)]
struct Copying {
    /// Platforms to take, instead of all; may be repeated or a list
    #[arg(long = "platform", value_name = "PLATFORM", value_delimiter = ',')]
    platforms: Vec<Platform>,
    /// How to show progress: auto, tty, plain, rawjson, none
    #[arg(long, default_value = "auto", value_name = "MODE")]
    progress: ProgressMode,
    #[command(flatten)]
    store: StoreArgs,
}

/// Push images from containerd's store to their registries
///
/// With attestations, and with layers that are mounted lazily: what is not in the store is passed
/// on from where it came.
#[derive(clap::Args, Debug)]
pub(crate) struct PushArgs {
    /// Images
    #[arg(value_name = "NAME", required = true)]
    names: Vec<String>,
    #[command(flatten)]
    copying: Copying,
    #[command(flatten)]
    registries: RegistryArgs,
}

/// Give an image in containerd's store another name
#[derive(clap::Args, Debug)]
pub(crate) struct TagArgs {
    /// The image
    source: String,
    /// Its new name
    target: String,
    #[command(flatten)]
    store: StoreArgs,
}

/// Write images in containerd's store to an archive
#[derive(clap::Args, Debug)]
pub(crate) struct SaveArgs {
    /// Images
    #[arg(value_name = "NAME", required = true)]
    names: Vec<String>,
    /// The archive, instead of standard output
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// docker, which OCI tools read as well, oci, or oci-gzip
    #[arg(long, default_value = "docker", value_name = "FORMAT")]
    format: ArchiveKind,
    #[command(flatten)]
    copying: Copying,
    #[command(flatten)]
    registries: RegistryArgs,
}

/// Put the images of an archive into containerd's store
///
/// Reads what `docker save`, `shipway save` and OCI tools write, compressed or not. Layers are
/// unpacked when the image first runs.
#[derive(clap::Args, Debug)]
pub(crate) struct LoadArgs {
    /// The archive, instead of standard input
    #[arg(short, long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Name for the image, instead of that in the archive
    #[arg(short, long = "tag", value_name = "NAME[:TAG]")]
    tag: Option<String>,
    #[command(flatten)]
    copying: Copying,
}

/// The name that the store has an image under: as it is written, or in full.
async fn found(storage: &Storage, namespace: &str, text: &str) -> Result<String> {
    let full = image_name(text)?.to_string();
    for name in [full.as_str(), text] {
        match storage.images.get(name).await {
            Ok(_) => return Ok(name.to_owned()),
            Err(e) if e.is_not_found() => {}
            Err(e) => return Err(e),
        }
    }
    Err(Fault::not_found(format!("containerd has no image {full} in the namespace {namespace}"))
        .hint("`ctr namespaces list` shows the namespaces; choose one with --namespace"))
}

/// An image, or what is wanted of it, as one root and what it leads to.
async fn chosen(source: &dyn Source, platforms: &[Platform]) -> Result<Combined> {
    let root = source.root().await?;
    let bytes = source.manifest(&root).await?;
    let entry = |descriptor: Descriptor| Entry { descriptor, part: 0 };
    let entries = if media::is_index(&root.media_type) {
        let index: Index = serde_json::from_slice(&bytes).map_err(|e| {
            Fault::invalid(format!("the index {} cannot be read: {e}", root.digest))
        })?;
        index.manifests.into_iter().map(entry).collect()
    } else {
        let mut only = root.clone();
        if !platforms.is_empty() && only.platform.is_none() {
            only.platform = Some(platform_of(source, &bytes, root.digest).await?);
        }
        return for_platforms(
            Combined { root: only, bytes, entries: vec![entry(root)] },
            platforms,
        );
    };
    for_platforms(Combined { root, bytes, entries }, platforms)
}

/// Copies what was chosen of `source` to `target`, which gets it under its name.
async fn copy(
    source: &Arc<dyn Source>,
    chosen: Combined,
    target: Arc<dyn Target>,
    task: &Task,
) -> Result<Descriptor> {
    let copier = Copier::new(target.clone(), task.progress());
    let Combined { root, bytes, entries } = chosen;
    for Entry { descriptor, .. } in &entries {
        copier.copy(source, descriptor).await?;
    }
    if media::is_index(&root.media_type) {
        let children: Vec<_> = entries.iter().map(|entry| entry.descriptor.digest).collect();
        target.manifest(&root, bytes, &children).await?;
    }
    let root = Descriptor { platform: None, ..root };
    target.finish(&root).await?;
    Ok(root)
}

/// An image in the store, whose missing blobs are streamed.
fn kept(storage: &Storage, name: String, registries: &Registries, task: &Task) -> Arc<dyn Source> {
    let (registries, note) = (registries.clone(), task.clone());
    Arc::new(Kept::new(
        storage.clone(),
        name,
        move |name| registries.repository(name, Mode::Pull),
        move |text| note.log(text),
    ))
}

pub(crate) async fn push(args: PushArgs) -> Result<()> {
    let names: Vec<ImageName> =
        args.names.iter().map(|name| new_name(name)).collect::<Result<_>>()?;
    let copying = &args.copying;
    let storage = copying.store.connect().await?;
    let registries = args.registries.open()?;
    let tasks = Tasks::start(copying.progress, "Pushing")?;
    let (mut pushed, mut result) = (String::new(), Ok(()));
    for (text, name) in args.names.iter().zip(&names) {
        let task = tasks.begin(&format!("pushing {name}")).await;
        let work = async {
            let local = found(&storage, copying.store.namespace(), text).await?;
            let source = kept(&storage, local, &registries, &task);
            let target = Arc::new(Remote::new(registries.repository(name, Mode::Push)));
            let chosen = chosen(&*source, &copying.platforms).await?;
            copy(&source, chosen, target, &task).await
        };
        let done = until_interrupted(work).await;
        match task.clone().end(done).await {
            Ok(root) => pushed.push_str(&format!("{}\n", root.digest)),
            Err(fault) => {
                result = Err(fault.context(format!("push {name}")));
                break;
            }
        }
    }
    tasks.finish().await?;
    output::print(&pushed)?;
    result
}

pub(crate) async fn tag(args: TagArgs) -> Result<()> {
    let target = new_name(&args.target)?.to_string();
    let storage = args.store.connect().await?;
    let source = found(&storage, args.store.namespace(), &args.source).await?;
    let record = storage.images.get(&source).await?;
    // What was built here is so under each of its names.
    let labels: Labels =
        record.built().map(|time| built_labels(&record.target, time)).unwrap_or_default();
    storage.images.put(&target, &record.target, &labels).await.context(|| format!("tag {target}"))
}

pub(crate) async fn save(args: SaveArgs) -> Result<()> {
    let names: Vec<ImageName> =
        args.names.iter().map(|name| new_name(name)).collect::<Result<_>>()?;
    if args.output.is_none() && std::io::stdout().is_terminal() {
        return Err(Fault::invalid("refusing to write an archive to the terminal")
            .hint("name a file with --output, or redirect standard output"));
    }
    let copying = &args.copying;
    let storage = copying.store.connect().await?;
    let registries = args.registries.open()?;
    let out = NewFile::open(args.output.as_deref())?;
    let writer = ArchiveWriter::new(args.format, out.writer()?).await?;
    let tasks = Tasks::start(copying.progress, "Saving")?;
    let mut result = Ok(());
    for (text, name) in args.names.iter().zip(&names) {
        let task = tasks.begin(&format!("saving {name}")).await;
        let work = async {
            let local = found(&storage, copying.store.namespace(), text).await?;
            let source = kept(&storage, local, &registries, &task);
            let chosen = chosen(&*source, &copying.platforms).await?;
            copy(&source, chosen, writer.image(name.clone()), &task).await
        };
        let done = until_interrupted(work).await;
        if let Err(fault) = task.clone().end(done).await {
            result = Err(fault.context(format!("save {name}")));
            break;
        }
    }
    tasks.finish().await?;
    result?;
    until_interrupted(writer.finish()).await?;
    out.keep()
}

/// Copies an image of the archive to the store. An index is put there as it is, with the manifests
/// that the archive has; the store has others like it, which were pulled for one platform.
async fn loading(
    archive: &Arc<Archive>,
    root: &Descriptor,
    target: Arc<Stored>,
    platforms: &[Platform],
    task: &Task,
) -> Result<()> {
    let image = Arc::new(archive.image(root));
    let source: Arc<dyn Source> = image.clone();
    let mut chosen = chosen(&*source, platforms).await?;
    chosen.entries.retain(|Entry { descriptor, .. }| {
        let has = image.has(descriptor);
        if !has {
            let platform = descriptor.platform.as_ref().map(|p| format!(" for {p}"));
            let of = platform.unwrap_or_default();
            task.log(format!("the archive does not have {}{of}\n", descriptor.digest));
        }
        has
    });
    if chosen.entries.is_empty() {
        return Err(Fault::invalid("the archive has none of the image's manifests"));
    }
    copy(&source, chosen, target, task).await.map(drop)
}

pub(crate) async fn load(args: LoadArgs) -> Result<()> {
    let tag = args.tag.as_deref().map(new_name).transpose()?;
    let input = args.input.clone();
    if input.is_none() && std::io::stdin().is_terminal() {
        return Err(Fault::invalid("requested load from stdin, but stdin is a terminal")
            .hint("name the archive with --input, or pipe it in"));
    }
    let archive =
        shipway_task::blocking("read the archive", move || Archive::open(input.as_deref())).await?;
    let archive = Arc::new(archive);
    let mut images: Vec<(ImageName, Descriptor)> = Vec::new();
    let count = archive.images().count();
    for (name, root) in archive.images() {
        let name = match (name, &tag) {
            (_, Some(_)) if count > 1 => {
                return Err(Fault::invalid("--tag: the archive has several images")
                    .hint("load them under their own names, and use `shipway tag`"));
            }
            (_, Some(tag)) => tag.clone(),
            (Some(name), None) => new_name(name).context(|| "read the archive")?,
            (None, None) => {
                let what = format!("the image {} has no name in the archive", root.digest);
                return Err(Fault::invalid(what).hint("give it one with --tag"));
            }
        };
        images.push((name, root.clone()));
    }
    let copying = &args.copying;
    let storage = copying.store.connect().await?;
    let tasks = Tasks::start(copying.progress, "Loading")?;
    let mut result = Ok(());
    let mut loaded = String::new();
    for (name, root) in images {
        let task = tasks.begin(&format!("loading {name}")).await;
        let target = Arc::new(Stored::new(storage.clone(), name.to_string()));
        let work = loading(&archive, &root, target.clone(), &copying.platforms, &task);
        let done = until_interrupted(work).await;
        if done.is_err() {
            target.abandon().await;
        }
        match task.clone().end(done).await {
            Ok(_) => loaded.push_str(&format!("Loaded image: {name}\n")),
            Err(fault) => {
                result = Err(fault.context(format!("load {name}")));
                break;
            }
        }
    }
    tasks.finish().await?;
    output::print(&loaded)?;
    result
}
