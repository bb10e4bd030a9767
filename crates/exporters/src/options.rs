//! Attributes that image-like exporters share (rows `ex.c.*`).

use crate::{
    optimize::Optimize,
    port::{ExportInput, base_layers, metadata_of},
};
use shipway_fault::{Detail, Fault, Result};
use shipway_gocompat::parse_bool;
use shipway_oci::{Platform, timestamp};
use shipway_progress::Reporter;
use shipway_refs::{Compression, CompressionKind};
use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// Up to this version of the defaults there is no zstd.
const NO_ZSTD: i64 = 10;
/// From this version on, types are OCI's and attestations are artifacts.
const OCI_TYPES: i64 = 30;

/// Takes attributes out of a map one by one; what stays is metadata (row `ex.img.meta`).
pub(crate) struct Attrs(BTreeMap<String, String>);

impl Attrs {
    pub fn new(attrs: &BTreeMap<String, String>) -> Self {
        Self(attrs.clone())
    }

    pub fn text(&mut self, key: &str) -> Option<String> {
        self.0.remove(key)
    }

    /// A boolean; an empty value is true.
    pub fn flag(&mut self, key: &str) -> Result<Option<bool>> {
        match self.0.remove(key).as_deref() {
            None => Ok(None),
            Some("") => Ok(Some(true)),
            Some(text) => parse_bool(text).map(Some).ok_or_else(|| {
                Fault::invalid(format!("non-bool value specified for {key}: {text:?}"))
                    .hint("use true or false")
            }),
        }
    }

    /// Whole seconds since the epoch (row `ex.c.sde`).
    pub fn epoch(&mut self) -> Result<Epoch> {
        let text = self.0.remove("source-date-epoch");
        text.map_or(Ok(Epoch::Frontend), |text| {
            Ok(Epoch::Given(seconds(&text, "source-date-epoch")?))
        })
    }

    pub fn rest(self) -> BTreeMap<String, Vec<u8>> {
        self.0.into_iter().map(|(k, v)| (k, v.into_bytes())).collect()
    }
}

/// A time in whole seconds since the epoch; an empty text is none.
fn seconds(text: &str, what: &str) -> Result<Option<SystemTime>> {
    if text.is_empty() {
        return Ok(None);
    }
    let seconds: i64 = text.parse().map_err(|_| {
        Fault::invalid(format!("invalid {what}: {text:?} is not a number of seconds"))
    })?;
    Ok(Some(UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0))))
}

/// Which time what is exported has (rows `ex.c.sde`, `df.arg.sde`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Epoch {
    /// What the frontend found.
    #[default]
    Frontend,
    /// What the client says, which may be that there is none.
    Given(Option<SystemTime>),
}

impl Epoch {
    /// The time for the platform `id`.
    pub fn of(self, metadata: &BTreeMap<String, Vec<u8>>, id: &str) -> Result<Option<SystemTime>> {
        match self {
            Self::Given(time) => Ok(time),
            Self::Frontend => match metadata_of(metadata, "source.date.epoch", id) {
                Some(text) => {
                    seconds(&String::from_utf8_lossy(text), "SOURCE_DATE_EPOCH from frontend")
                }
                None => Ok(None),
            },
        }
    }

    /// The time for the whole of `input`.
    pub fn whole(self, input: &ExportInput) -> Result<Option<SystemTime>> {
        self.of(&input.metadata, input.platforms.first().map_or("", |p| &p.id))
    }
}

/// Where an annotation goes (row `ex.c.annot`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    Manifest,
    ManifestDescriptor,
    Index,
    IndexDescriptor,
}

/// An annotation asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Annotation {
    pub level: Level,
    pub platform: Option<Platform>,
    pub key: String,
    pub value: String,
}

impl Annotation {
    /// Reads `annotation[-level][[platform]].key`; `None` for other attributes.
    pub fn parse(attr: &str, value: &str) -> Result<Option<Self>> {
        let Some((level, platform, key)) = parts(attr) else { return Ok(None) };
        let level = match level {
            None | Some("manifest") => Level::Manifest,
            Some("manifest-descriptor") => Level::ManifestDescriptor,
            Some("index") => Level::Index,
            Some("index-descriptor") => Level::IndexDescriptor,
            Some(other) => {
                return Err(Fault::invalid(format!("unrecognized annotation type {other}")));
            }
        };
        let platform = platform
            .map(|p| p.parse::<Platform>().map_err(|e| Fault::invalid(e.to_string())))
            .transpose()?;
        Ok(Some(Self { level, platform, key: key.to_owned(), value: value.to_owned() }))
    }

    /// Whether it is about the index, and so about all platforms.
    fn is_of_index(&self) -> bool {
        matches!(self.level, Level::Index | Level::IndexDescriptor)
    }
}

/// Level, platform and key of an annotation's attribute; `None` for attributes that only look
/// alike.
fn parts(attr: &str) -> Option<(Option<&str>, Option<&str>, &str)> {
    let rest = attr.strip_prefix("annotation")?;
    let (level, rest) = match rest.strip_prefix('-') {
        Some(rest) => {
            let end = rest.find(|c: char| !c.is_ascii_lowercase() && c != '-')?;
            (Some(&rest[..end]).filter(|l| !l.is_empty()), &rest[end..])
        }
        None => (None, rest),
    };
    let (platform, rest) = match rest.strip_prefix('[') {
        Some(rest) => {
            let (platform, rest) = rest.split_once(']')?;
            let is_platform = |c: char| c.is_ascii_alphanumeric() || "_/-".contains(c);
            (
                Some(platform).filter(|p| !p.is_empty() && p.chars().all(is_platform)).map(Some)?,
                rest,
            )
        }
        None => (None, rest),
    };
    let key = rest.strip_prefix('.')?;
    (!key.is_empty() && !key.contains(char::is_whitespace)).then_some((level, platform, key))
}

/// Attributes of an image, checked.
#[derive(Clone, Debug)]
pub(crate) struct ImageOptions {
    /// Names, comma separated, as written.
    pub names: String,
    /// Whether types are OCI's rather than Docker's; without `oci-mediatypes` it depends on the
    /// input.
    pub oci_types: bool,
    /// What `oci-mediatypes` says.
    asked_types: Option<bool>,
    /// Whether attestations are artifacts that name their subject, rather than images of another
    /// platform (row `at.artifact`).
    pub artifact: bool,
    /// What `oci-artifact` says.
    asked_artifact: Option<bool>,
    /// Whether attestations that only images carry make an image an index; the exporter knows if
    /// this does not.
    pub inline: Option<bool>,
    /// Whether layers get no times later than the epoch (row `ex.c.rewrite`).
    pub rewrite: bool,
    /// Whether layers with addresses of their own stay what registries do not keep (row
    /// `ex.c.nondist`).
    pub foreign: bool,
    pub compression: Compression,
    /// How it is learned which files come first in their layers, if that is asked for.
    pub optimize: Option<Optimize>,
    pub epoch: Epoch,
    pub annotations: Vec<Annotation>,
}

impl ImageOptions {
    pub fn take(attrs: &mut Attrs) -> Result<Self> {
        let compression = Compression::take(|key| attrs.text(key))?;
        let optimize = Optimize::take(|key| attrs.text(key), compression)?;
        let asked_types = attrs.flag("oci-mediatypes")?;
        let oci_types = asked_types.unwrap_or(true);
        let rewrite = attrs.flag("rewrite-timestamp")?.unwrap_or(false);
        let asked_artifact = attrs.flag("oci-artifact")?;
        let inline = attrs.flag("attestation-inline")?;
        let foreign = attrs.flag("prefer-nondist-layers")?.unwrap_or(false);
        let epoch = attrs.epoch()?;
        let mut annotations = Vec::new();
        let keys: Vec<String> =
            attrs.0.keys().filter(|k| k.starts_with("annotation")).cloned().collect();
        for key in keys {
            let value = attrs.0[&key].clone();
            if let Some(annotation) = Annotation::parse(&key, &value)? {
                attrs.0.remove(&key);
                annotations.push(annotation);
            }
        }
        let (names, artifact) =
            (attrs.text("name").unwrap_or_default(), asked_artifact.unwrap_or(oci_types));
        let options = Self {
            names,
            oci_types,
            asked_types,
            artifact,
            asked_artifact,
            inline,
            rewrite,
            foreign,
            compression,
            optimize,
            epoch,
            annotations,
        };
        options.check()?;
        Ok(options)
    }

    /// With OCI's types, unless something else is asked for.
    pub fn with_oci_types(mut self) -> Self {
        self.asked_types.get_or_insert(true);
        self
    }

    /// These options for `input`: with the annotations that the frontend gave, which come before
    /// those of the request, and the defaults of the version that the client wants (rows
    /// `ex.c.oci`, `ex.c.artifact`, `cmp.compat`). `kind` is the exporter's type.
    pub fn settled(&self, input: &ExportInput, compatibility: i64, kind: &str) -> Result<Self> {
        let compression = self.compression.kind;
        if compatibility <= NO_ZSTD && compression.algorithm() == CompressionKind::Zstd {
            let feature = format!("{kind} exporter compression={compression}");
            let fault = Fault::invalid(format!(
                "unsupported compatibility-version {compatibility} feature {feature}"
            ));
            return Err(fault.detail(Detail::Compatibility { version: compatibility, feature }));
        }
        let mut all = self.clone();
        let current = compatibility >= OCI_TYPES;
        let needs_oci = compression.is_indexed() || !input.attestations.is_empty();
        all.oci_types = self.asked_types.unwrap_or(current || needs_oci);
        all.artifact = self.asked_artifact.unwrap_or(current && all.oci_types);
        for (key, value) in input.metadata.iter().filter(|(k, _)| k.starts_with("annotation")) {
            all.annotations.extend(Annotation::parse(key, &String::from_utf8_lossy(value))?);
        }
        all.check()?;
        Ok(all)
    }

    fn check(&self) -> Result<()> {
        let compression = self.compression.kind;
        // Docker's manifests have no place for the annotations.
        if compression.is_indexed() && self.asked_types == Some(false) {
            return Err(Fault::invalid(format!(
                "exporter option \"compression={compression}\" conflicts with \"oci-mediatypes=false\""
            ))
            .hint("leave oci-mediatypes=false out"));
        }
        if self.oci_types || self.asked_artifact != Some(true) {
            return Ok(());
        }
        Err(Fault::invalid(
            "exporter option \"oci-artifact=true\" conflicts with \"oci-mediatypes=false\"",
        )
        .hint("leave oci-mediatypes=false out"))
    }

    /// Whether what is exported has a place for every annotation (row `ex.c.annoterr`).
    pub fn check_annotations(&self, input: &ExportInput, is_index: bool) -> Result<()> {
        for annotation in &self.annotations {
            if let Some(platform) = &annotation.platform
                && !input.platforms.iter().any(|p| p.platform == *platform)
            {
                let built = input
                    .platforms
                    .iter()
                    .map(|p| p.platform.to_string())
                    .collect::<Vec<_>>()
                    .join(", ");
                let name = platform.to_string();
                return Err(Fault::invalid(format!(
                    "invalid annotation: no platform {name} found in source"
                ))
                .hint(format!("this build is for {built}")));
            }
            // Docker's manifests have annotations in practice; its lists and descriptors have no
            // place for them.
            if !self.oci_types && annotation.level != Level::Manifest {
                return Err(Fault::invalid(
                    "cannot export annotations with \"oci-mediatypes=false\"",
                )
                .hint("leave oci-mediatypes=false out, or annotate the manifest only"));
            }
            if !is_index && annotation.is_of_index() {
                return Err(Fault::invalid(
                    "index annotations not supported for single platform export",
                ));
            }
        }
        Ok(())
    }

    /// How layers are compressed while the build goes on: in no order that is not known yet.
    pub fn ahead(&self) -> Compression {
        match self.optimize {
            Some(_) => Compression { force: false, ..self.compression.plain() },
            None => self.compression,
        }
    }

    /// The same result without times later than its epoch, if that is asked for (row
    /// `ex.c.rewrite`). Layers of the base image stay.
    pub async fn rewritten(
        &self,
        mut input: ExportInput,
        reporter: &Reporter,
    ) -> Result<ExportInput> {
        if !self.rewrite {
            return Ok(input);
        }
        for p in &mut input.platforms {
            let Some(epoch) = self.epoch.of(&input.metadata, &p.id)? else {
                tracing::warn!(
                    "rewrite-timestamp is specified, but no source-date-epoch was found"
                );
                continue;
            };
            let latest = epoch.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64);
            let status = format!(
                "rewriting layers with source-date-epoch {latest} ({})",
                timestamp::format(epoch)
            );
            reporter.status(status.clone(), 0, 0, false);
            let base = base_layers(&input.metadata, &p.id);
            p.state = p.state.retimed(&base, latest, self.compression, Some(reporter)).await?;
            reporter.status(status, 0, 0, true);
        }
        Ok(input)
    }

    /// Annotations of one level for one platform. Those of the index are for all, whatever platform
    /// they name.
    pub fn annotations(
        &self,
        level: Level,
        platform: Option<&Platform>,
    ) -> BTreeMap<String, String> {
        self.annotations
            .iter()
            .filter(|a| {
                a.level == level
                    && (a.is_of_index() || a.platform.is_none() || a.platform.as_ref() == platform)
            })
            .map(|a| (a.key.clone(), a.value.clone()))
            .collect()
    }

    /// Names to use: `*` takes the frontend's.
    pub fn names(&self, metadata: &BTreeMap<String, Vec<u8>>) -> Vec<String> {
        let text = match (self.names.as_str(), metadata.get("image.name")) {
            ("*", Some(name)) => String::from_utf8_lossy(name).into_owned(),
            (names, _) => names.to_owned(),
        };
        text.split(',').filter(|n| !n.is_empty()).map(str::to_owned).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn annotations_name_their_level_and_platform() {
        for (attr, want) in [
            ("annotation.a.b", Some((Level::Manifest, None, "a.b"))),
            ("annotation-index.k", Some((Level::Index, None, "k"))),
            (
                "annotation-manifest-descriptor[linux/arm64].k",
                Some((Level::ManifestDescriptor, Some("linux/arm64"), "k")),
            ),
            (
                "annotation-manifest-descriptor[linux/arm64/v8].k=[x]",
                Some((Level::ManifestDescriptor, Some("linux/arm64"), "k=[x]")),
            ),
            ("other.k", None),
            ("annotations.k", None),
            ("annotation[linux(1.0)/amd64].k", None),
            ("annotation[].k", None),
            ("annotation.k k", None),
            ("annotation.", None),
        ] {
            let got = Annotation::parse(attr, "v")
                .unwrap()
                .map(|a| (a.level, a.platform.map(|p| p.to_string()), a.key));
            assert_eq!(
                got,
                want.map(|(l, p, k)| (l, p.map(str::to_owned), k.to_owned())),
                "{attr}"
            );
        }
        assert!(Annotation::parse("annotation-nonsense.k", "v").is_err());
    }

    #[test]
    fn annotations_of_the_frontend_come_first() {
        let attrs = |of: &[(&str, &str)]| {
            of.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect::<BTreeMap<_, _>>()
        };
        let options = ImageOptions::take(&mut Attrs::new(&attrs(&[
            ("annotation.a", "asked"),
            ("annotation.b", "asked"),
        ])))
        .unwrap();
        let given = BTreeMap::from([
            ("annotation.a".to_owned(), b"given".to_vec()),
            ("other".to_owned(), vec![]),
        ]);
        let given = input(given);
        let all = options.settled(&given, OCI_TYPES, "image").unwrap();
        assert_eq!(
            all.annotations(Level::Manifest, None),
            attrs(&[("a", "given"), ("b", "asked")])
        );
    }

    #[test]
    fn annotations_without_a_place_are_refused_by_name() {
        let check = |attrs: &[(&str, &str)], is_index: bool| {
            let attrs = attrs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
            let options = ImageOptions::take(&mut Attrs::new(&attrs)).unwrap();
            options.check_annotations(&input(BTreeMap::new()), is_index).map_err(|f| f.to_string())
        };
        let docker = ("oci-mediatypes", "false");
        assert_eq!(check(&[docker, ("annotation.k", "v")], true), Ok(()));
        for level in [
            "annotation-index.k",
            "annotation-index-descriptor.k",
            "annotation-manifest-descriptor.k",
        ] {
            assert_eq!(
                check(&[docker, (level, "v")], true),
                Err("cannot export annotations with \"oci-mediatypes=false\"".to_owned())
            );
            assert_eq!(check(&[(level, "v")], true), Ok(()));
        }
        assert_eq!(
            check(&[("annotation-index.k", "v")], false),
            Err("index annotations not supported for single platform export".to_owned())
        );
        let absent = Err("invalid annotation: no platform linux/arm64 found in source".to_owned());
        assert_eq!(check(&[("annotation[linux/arm64].k", "v")], true), absent);
        assert_eq!(check(&[("annotation-index[linux/arm64].k", "v")], true), absent);
    }

    #[test]
    fn annotations_of_the_index_are_for_all_platforms() {
        let attrs =
            BTreeMap::from([("annotation-index[linux/arm64].k".to_owned(), "v".to_owned())]);
        let options = ImageOptions::take(&mut Attrs::new(&attrs)).unwrap();
        assert_eq!(
            options.annotations(Level::Index, None),
            BTreeMap::from([("k".to_owned(), "v".to_owned())])
        );
    }

    fn input(metadata: BTreeMap<String, Vec<u8>>) -> ExportInput {
        ExportInput {
            platforms: Vec::new(),
            is_map: false,
            metadata,
            attestations: BTreeMap::new(),
        }
    }

    #[test]
    fn defaults_are_those_of_the_version_that_is_asked_for() {
        let of = |attrs: &[(&str, &str)], version: i64, attested: bool| {
            let attrs = attrs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
            let mut input = input(BTreeMap::new());
            if attested {
                input.attestations.insert("p".into(), Vec::new());
            }
            ImageOptions::take(&mut Attrs::new(&attrs))?
                .settled(&input, version, "image")
                .map(|o| (o.oci_types, o.artifact))
        };
        assert_eq!(of(&[], 30, false).unwrap(), (true, true));
        assert_eq!(of(&[], 20, false).unwrap(), (false, false));
        assert_eq!(of(&[], 20, true).unwrap(), (true, false));
        assert_eq!(of(&[("oci-mediatypes", "true")], 10, false).unwrap(), (true, false));
        let zstd = [("compression", "zstd"), ("oci-mediatypes", "true")];
        assert!(of(&zstd, 20, false).is_ok());
        let fault = of(&zstd, 10, false).unwrap_err();
        assert_eq!(
            fault.to_string(),
            "unsupported compatibility-version 10 feature image exporter compression=zstd"
        );
        assert!(
            matches!(&fault.details()[0], Detail::Compatibility { version: 10, feature } if feature == "image exporter compression=zstd")
        );
        // Docker has a type for zstd, too.
        assert!(of(&[("compression", "zstd"), ("oci-mediatypes", "false")], 30, false).is_ok());
    }

    #[test]
    fn attributes_that_mean_nothing_to_an_image_are_metadata() {
        let attrs = [
            ("name", "a"),
            ("containerimage.config", "{}"),
            ("oci-mediatypes", "true"),
            ("annotation.k", "v"),
            ("my.key", ""),
        ];
        let mut attrs = Attrs::new(&attrs.map(|(k, v)| (k.to_owned(), v.to_owned())).into());
        ImageOptions::take(&mut attrs).unwrap();
        assert_eq!(
            attrs.rest(),
            [("containerimage.config", "{}"), ("my.key", "")]
                .map(|(k, v)| (k.to_owned(), v.as_bytes().to_vec()))
                .into()
        );
    }

    #[test]
    fn wrong_flags_are_refused_by_name() {
        let mut attrs = Attrs::new(&BTreeMap::from([("push".to_owned(), "maybe".to_owned())]));
        assert!(attrs.flag("push").unwrap_err().to_string().contains("push"));
    }
}
