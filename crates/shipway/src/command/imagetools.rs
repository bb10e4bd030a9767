//! `imagetools`: images in registries, without a daemon (rows `bx.imagetools.*`).

use std::{collections::BTreeMap, io::Read as _, path::PathBuf, sync::Arc};

use futures::future::BoxFuture;
use shipway_convert::Remote;
use shipway_fault::{Fault, Result};
use shipway_imagetools::{Annotation, Inspection, Open, Plan, Request, SourceSpec};
use shipway_oci::{ImageName, Platform, gojson};
use shipway_registry::Mode;

use crate::{
    output,
    places::{Registries, RegistryArgs, image_name, new_name},
    progress::{Mode as ProgressMode, Tasks},
    run::until_interrupted,
    table, template,
};

/// Most bytes of a file with a descriptor.
const MAX_FILE: u64 = 1 << 20;

/// Work on images in registries
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    Create(Create),
    Inspect(Inspect),
}

/// Make an image of images that exist
///
/// A SOURCE is the name of an image, a digest in the repository of the others, or a descriptor as
/// JSON. What it leads to is copied to the repositories of all tags, with attestations and
/// signatures.
#[derive(clap::Args, Debug)]
struct Create {
    #[arg(value_name = "SOURCE")]
    sources: Vec<String>,
    /// Name of the new image; may be repeated
    #[arg(short, long = "tag", value_name = "NAME[:TAG]")]
    tags: Vec<String>,
    /// Add the sources to what the first tag has
    #[arg(long)]
    append: bool,
    /// Print the image instead of pushing it
    #[arg(long)]
    dry_run: bool,
    /// File with a descriptor as JSON, or with another source; may be repeated
    #[arg(short, long = "file", value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Annotation, as index:KEY=VALUE or manifest-descriptor\[PLATFORM\]:KEY=VALUE; may be repeated
    #[arg(long = "annotation", value_name = "ANNOTATION")]
    annotations: Vec<String>,
    /// Platforms that the new image has, instead of all; may be repeated or a list
    #[arg(short, long = "platform", value_name = "PLATFORM", value_delimiter = ',')]
    platforms: Vec<Platform>,
    /// Make an index even of a single manifest
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "true", action = clap::ArgAction::Set, value_name = "BOOL")]
    prefer_index: bool,
    /// File that gets the new image's descriptor and repositories, as JSON
    #[arg(long, value_name = "FILE")]
    metadata_file: Option<PathBuf>,
    /// How to show progress: auto, tty, plain, rawjson, none
    #[arg(long, default_value = "auto", value_name = "MODE")]
    progress: ProgressMode,
    #[command(flatten)]
    registries: RegistryArgs,
}

/// Show an image in a registry
#[derive(clap::Args, Debug)]
struct Inspect {
    /// The image
    name: String,
    /// Format with a Go template over .Name, .Manifest, .Image, .SBOM and .Provenance, such as
    /// '{{json .Image}}'
    #[arg(long, value_name = "TEMPLATE", conflicts_with = "raw")]
    format: Option<String>,
    /// Print the manifest or index byte for byte
    #[arg(long)]
    raw: bool,
    #[command(flatten)]
    registries: RegistryArgs,
}

pub(crate) async fn run(args: Args) -> Result<()> {
    match args.command {
        Command::Create(args) => create(args).await,
        Command::Inspect(args) => inspect(args).await,
    }
}

impl Create {
    /// What is asked for; files are read.
    fn request(&self) -> Result<Request> {
        if self.sources.is_empty() && self.files.is_empty() {
            return Err(Fault::invalid("no sources specified").hint("name an image, or use --file"));
        }
        if self.tags.is_empty() && !self.dry_run {
            return Err(Fault::invalid(
                "can't push with no tags specified, please set --tag or --dry-run",
            ));
        }
        let tags: Vec<ImageName> =
            self.tags.iter().map(|tag| new_name(tag)).collect::<Result<_>>()?;
        let mut sources = Vec::new();
        if self.append {
            sources.extend(tags.first().cloned().map(SourceSpec::Name));
        }
        for path in &self.files {
            let failed = |e| Fault::io(format!("read {}", path.display()), e);
            let file = std::fs::File::open(path).map_err(failed)?;
            let mut text = String::new();
            file.take(MAX_FILE).read_to_string(&mut text).map_err(failed)?;
            let source = text.parse().map_err(|f: Fault| f.context(format!("{}", path.display())));
            sources.push(source?);
        }
        for text in &self.sources {
            sources.push(text.parse()?);
        }
        let annotations = self.annotations.iter().filter(|text| !text.is_empty());
        let annotations: Vec<Vec<Annotation>> =
            annotations.map(|text| Annotation::parse(text)).collect::<Result<_>>()?;
        Ok(Request {
            sources,
            tags,
            annotations: annotations.concat(),
            prefer_index: self.prefer_index,
            platforms: self.platforms.clone(),
        })
    }
}

fn opener(registries: Registries) -> Arc<Open> {
    Arc::new(move |name: &ImageName, mode| registries.repository(name, mode))
}

async fn create(args: Create) -> Result<()> {
    let request = args.request()?;
    let open = opener(args.registries.open()?);
    let plan = until_interrupted(Plan::of(request, &*open)).await?;
    if args.dry_run {
        return output::print(&format!("{}\n", String::from_utf8_lossy(&plan.combined.bytes)));
    }
    let tasks = Tasks::start(args.progress, "Pushing")?;
    let repositories = plan.repositories();
    let push = |repository: &str| {
        let repository = repository.to_owned();
        let (plan, open, tasks) = (&plan, &*open, &tasks);
        async move {
            let task = tasks.begin(&format!("[internal] pushing {repository}")).await;
            let note = task.clone();
            let pushed =
                plan.push(&repository, open, task.progress(), &move |text| note.log(text)).await;
            task.end(pushed).await
        }
    };
    let pushes: Vec<BoxFuture<'_, Result<()>>> =
        repositories.iter().map(|repository| Box::pin(push(repository)) as _).collect();
    let pushed = until_interrupted(futures::future::try_join_all(pushes)).await;
    tasks.finish().await?;
    pushed?;
    if let Some(path) = &args.metadata_file {
        let metadata = BTreeMap::from([
            ("containerimage.descriptor", serde_json::to_value(&plan.combined.root)),
            ("image.name", Ok(repositories.join(",").into())),
        ]);
        let encode = || {
            let values: Result<BTreeMap<_, _>, _> =
                metadata.into_iter().map(|(key, value)| Ok((key, value?))).collect();
            gojson::to_string_pretty(&values?)
        };
        let text = encode().map_err(|e| Fault::internal(format!("encode the metadata: {e}")))?;
        output::write_file(path, text.as_bytes())?;
    }
    Ok(())
}

async fn inspect(args: Inspect) -> Result<()> {
    let name = image_name(&args.name)?;
    let registries = args.registries.open()?;
    let source = Arc::new(Remote::new(registries.repository(&name, Mode::Pull)));
    let image = Inspection::of(source, name).await?;
    if args.raw {
        // No newline, so that the digest can be checked.
        return output::print(&String::from_utf8_lossy(&image.bytes));
    }
    let whole = |format: &str| {
        let inside = format.trim().strip_prefix("{{").and_then(|f| f.strip_suffix("}}"));
        inside.is_some_and(|inside| inside.trim() == ".Manifest")
    };
    match args.format.as_deref().filter(|format| !format.is_empty() && !whole(format)) {
        Some(format) => {
            let mut value = image.value(&args.name).await?;
            // As in Go, what is said of images is no part of all that there is.
            let is_all = format.replace(' ', "") == "{{json.}}";
            if let (true, Some(fields)) = (is_all, value.as_object_mut()) {
                fields.retain(|key, value| {
                    !matches!(key.as_str(), "SBOM" | "Provenance") && !value.is_null()
                });
            }
            output::print(&template::render_indented(format, &value)?)
        }
        None => output::print(&text(&image)),
    }
}

/// What is shown where no format was asked for.
fn text(image: &Inspection) -> String {
    let mut out = table::align_close(&format!(
        "Name:\t{}\nMediaType:\t{}\nDigest:\t{}\n",
        image.name, image.root.media_type, image.root.digest
    ));
    let Some(index) = &image.index else { return out };
    out.push_str(&table::align_close("\t\nManifests:\t\n"));
    let mut rows = String::new();
    for (n, entry) in index.manifests.iter().enumerate() {
        if n > 0 {
            rows.push_str("\t\n");
        }
        let name = image.name.clone().with_digest(entry.digest);
        rows.push_str(&format!("  Name:\t{name}\n  MediaType:\t{}\n", entry.media_type));
        let Some(platform) = &entry.platform else { continue };
        rows.push_str(&format!("  Platform:\t{platform}\n"));
        let mut row = |name: &str, value: &str| {
            if !value.is_empty() {
                rows.push_str(&format!("  {name}:\t{value}\n"));
            }
        };
        row("OSVersion", &platform.os_version);
        row("OSFeatures", &platform.os_features.join(", "));
        row("URLs", &entry.urls.join(", "));
        if !entry.annotations.is_empty() {
            // Annotations have columns of their own, and what follows them new ones.
            rows.push_str("  Annotations:\t\n");
            out.push_str(&table::align_close(&std::mem::take(&mut rows)));
            let pairs = entry.annotations.iter();
            let list: String = pairs.map(|(key, value)| format!("    {key}:\t{value}\n")).collect();
            out.push_str(&table::align_close(&list));
        }
    }
    out + &table::align_close(&rows)
}

#[cfg(test)]
mod tests {
    use async_trait::async_trait;
    use bytes::Bytes;
    use shipway_oci::{Descriptor, Digest, media};

    use super::*;

    fn create(line: &str) -> Result<Request> {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            args: Create,
        }
        let words = ["create"].into_iter().chain(line.split_whitespace());
        let line = <Line as clap::Parser>::try_parse_from(words);
        line.map_err(|e| Fault::invalid(e.to_string()))?.args.request()
    }

    #[test]
    fn arguments_become_a_request() {
        let digest = Digest::of("x");
        let line = format!(
            "a:1 {digest} -t r.io/b:1 -t c --append --annotation index:k=v -p linux/arm64,linux/amd64"
        );
        let request = create(&line).expect("right");
        assert_eq!(
            request.tags.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["r.io/b:1", "docker.io/library/c:latest"]
        );
        let name = |text: &str| SourceSpec::Name(text.parse().expect("a name"));
        assert_eq!(request.sources, [name("r.io/b:1"), name("a:1"), SourceSpec::Digest(digest)]);
        assert_eq!((request.platforms.len(), request.prefer_index), (2, true));
        assert!(!create("a -t b --prefer-index=false").expect("right").prefer_index);
        for (line, why) in [
            ("-t a", "no sources specified"),
            ("a", "can't push with no tags specified, please set --tag or --dry-run"),
            ("a -t b --annotation x", "invalid annotation \"x\", expected key=value"),
        ] {
            assert_eq!(create(line).expect_err(line).message(), why);
        }
        let digested = format!("a -t b@{digest}");
        assert!(create(&digested).expect_err("a digest").message().contains("names a digest"));
        assert!(
            create("-f /no/such/file -t a").expect_err("no file").message().contains("/no/such")
        );
    }

    /// One document, which is the root.
    struct Single(Descriptor, Bytes);

    #[async_trait]
    impl shipway_convert::Source for Single {
        async fn root(&self) -> Result<Descriptor> {
            Ok(self.0.clone())
        }
        async fn manifest(&self, _: &Descriptor) -> Result<Bytes> {
            Ok(self.1.clone())
        }
        async fn config(&self, _: &Descriptor) -> Result<Bytes> {
            Err(Fault::internal("not asked for"))
        }
        async fn blob(&self, _: &Descriptor) -> Result<shipway_registry::BodyStream> {
            Err(Fault::internal("not asked for"))
        }
    }

    #[tokio::test]
    async fn an_index_is_shown_as_buildx_shows_it() {
        let (a, b) = (Digest::of("a"), Digest::of("b"));
        let bytes = Bytes::from(format!(
            r#"{{"schemaVersion":2,"manifests":[
            {{"mediaType":"m","digest":"{a}","size":1,"platform":{{"os":"linux","architecture":"amd64"}}}},
            {{"mediaType":"m","digest":"{b}","size":1,"platform":{{"os":"unknown","architecture":"unknown"}},
              "annotations":{{"vnd.docker.reference.type":"attestation-manifest","a":"b"}}}}]}}"#
        ));
        let root = Descriptor::of(media::OCI_INDEX, &bytes);
        let digest = root.digest;
        let name = "r.io/a:1".parse().expect("a name");
        let image = Inspection::of(Arc::new(Single(root, bytes)), name).await.expect("an index");
        let want = format!(
            "Name:      r.io/a:1\nMediaType: {}\nDigest:    {digest}\n           \nManifests: \n\
             \x20 Name:        r.io/a:1@{a}\n  MediaType:   m\n  Platform:    linux/amd64\n               \n\
             \x20 Name:        r.io/a:1@{b}\n  MediaType:   m\n  Platform:    unknown/unknown\n  Annotations: \n\
             \x20   a:                         b\n    vnd.docker.reference.type: attestation-manifest\n",
            media::OCI_INDEX
        );
        assert_eq!(text(&image), want);
    }
}
