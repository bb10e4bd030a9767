//! One index of several manifests and indexes; bytes only.
//!
//! What comes out has the bytes that `docker buildx imagetools create` makes of the same sources
//! (row `bx.imagetools.create`), so that both push the same digest.

use crate::{Annotation, Level};
use bytes::Bytes;
use serde_json::Value;
use shipway_fault::{Fault, Result};
use shipway_oci::{Descriptor, Digest, Index, Platform, gojson, media};
use std::collections::{BTreeMap, HashMap};

/// Most entries of an index that is read or made.
const MAX_ENTRIES: usize = 1000;
/// On an entry of an index: the image that it is about (row `at.store`).
const ABOUT: &str = "vnd.docker.reference.digest";

/// A manifest or index to combine.
#[derive(Clone, Debug)]
pub struct Part {
    /// What it is. A manifest's has a platform.
    pub descriptor: Descriptor,
    /// Its bytes.
    pub bytes: Bytes,
}

/// A manifest in what was combined.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The manifest.
    pub descriptor: Descriptor,
    /// Number of the part that it came with.
    pub part: usize,
}

/// What was combined.
#[derive(Clone, Debug)]
pub struct Combined {
    /// The index, or the only manifest.
    pub root: Descriptor,
    /// Its bytes.
    pub bytes: Bytes,
    /// The manifests that the index lists, or the only one.
    pub entries: Vec<Entry>,
}

fn index_of(part: &Part) -> Result<Index> {
    let index: Index = serde_json::from_slice(&part.bytes).map_err(|e| {
        Fault::invalid(format!("the index {} cannot be read: {e}", part.descriptor.digest))
    })?;
    if index.manifests.len() > MAX_ENTRIES {
        return Err(Fault::invalid(format!("an index has more than {MAX_ENTRIES} entries")));
    }
    Ok(index)
}

fn encode(value: &impl serde::Serialize) -> Result<Bytes> {
    gojson::to_string_pretty(value)
        .map(Bytes::from)
        .map_err(|e| Fault::internal(format!("encode an index: {e}")))
}

/// Combines `parts`. A single one stays what it is, unless it gets annotations, or is a manifest
/// and `prefer_index`. `platforms` leave out all others, if there are any.
pub fn combine(
    parts: &[Part],
    annotations: &[Annotation],
    prefer_index: bool,
    platforms: &[Platform],
) -> Result<Combined> {
    let combined = match parts {
        [] => return Err(Fault::invalid("no sources specified")),
        [one] if annotations.is_empty() && media::is_index(&one.descriptor.media_type) => {
            let entry = |descriptor| Entry { descriptor, part: 0 };
            let entries = index_of(one)?.manifests.into_iter().map(entry).collect();
            Combined { root: one.descriptor.clone(), bytes: one.bytes.clone(), entries }
        }
        [one] if annotations.is_empty() && !prefer_index => Combined {
            root: one.descriptor.clone(),
            bytes: one.bytes.clone(),
            entries: vec![Entry { descriptor: one.descriptor.clone(), part: 0 }],
        },
        parts => joined(parts, annotations)?,
    };
    for_platforms(combined, platforms)
}

/// An index of all that the parts have. What several have is listed once, and the last one that
/// names a platform for it counts.
fn joined(parts: &[Part], annotations: &[Annotation]) -> Result<Combined> {
    let mut entries: Vec<Entry> = Vec::new();
    let mut places: HashMap<Digest, usize> = HashMap::new();
    let mut add = |descriptor: Descriptor, part: usize| match places.get(&descriptor.digest) {
        Some(&at) => {
            let Entry { descriptor: old, part: from } = &mut entries[at];
            if descriptor.platform.is_some() {
                old.platform = descriptor.platform;
            }
            old.annotations.extend(descriptor.annotations);
            *from = part;
        }
        None => {
            places.insert(descriptor.digest, entries.len());
            entries.push(Entry { descriptor, part });
        }
    };
    for (n, part) in parts.iter().enumerate() {
        if media::is_index(&part.descriptor.media_type) {
            index_of(part)?.manifests.into_iter().for_each(|descriptor| add(descriptor, n));
        } else {
            add(part.descriptor.clone(), n);
        }
    }
    if entries.len() > MAX_ENTRIES {
        return Err(Fault::invalid(format!("the index has more than {MAX_ENTRIES} entries")));
    }
    let docker = |entry: &Entry| entry.descriptor.media_type.starts_with("application/vnd.docker.");
    // Docker's list has no room for annotations, and is what programs expect of its own manifests.
    let media_type = match entries.iter().all(docker) {
        true => media::DOCKER_LIST,
        false => media::OCI_INDEX,
    };
    let mut on_index = BTreeMap::new();
    if media_type == media::OCI_INDEX {
        annotate(&mut entries, &mut on_index, annotations)?;
    } else if !annotations.is_empty() {
        tracing::warn!(
            "the annotations are left out: all sources are Docker's manifests, and their list has \
             none"
        );
    }
    let index = Index {
        schema_version: 2,
        media_type: Some(media_type.to_owned()),
        manifests: entries.iter().map(|entry| entry.descriptor.clone()).collect(),
        annotations: on_index,
    };
    let bytes = encode(&index)?;
    Ok(Combined { root: Descriptor::of(media_type, &bytes), bytes, entries })
}

fn annotate(
    entries: &mut [Entry],
    on_index: &mut BTreeMap<String, String>,
    annotations: &[Annotation],
) -> Result<()> {
    const HINT: &str = "write it as index:KEY=VALUE or manifest-descriptor[PLATFORM]:KEY=VALUE";
    for Annotation { level, platform, key, value } in annotations {
        match level {
            Some(Level::Index) => _ = on_index.insert(key.clone(), value.clone()),
            Some(Level::ManifestDescriptor) => {
                for Entry { descriptor, .. } in entries.iter_mut() {
                    if platform.is_none() || *platform == descriptor.platform {
                        descriptor.annotations.insert(key.clone(), value.clone());
                    }
                }
            }
            None | Some(Level::Manifest) => {
                let level = level.map_or("", Level::name);
                return Err(Fault::invalid(format!(
                    "{level:?} annotations are not supported: manifests stay what they are"
                ))
                .hint(HINT));
            }
            Some(Level::IndexDescriptor) => {
                return Err(Fault::invalid(
                    "\"index-descriptor\" annotations are invalid while creating an image",
                )
                .hint(HINT));
            }
        }
    }
    Ok(())
}

/// The same with `platforms` only, and with what is said about images of these; everything if none
/// are named.
pub fn for_platforms(combined: Combined, platforms: &[Platform]) -> Result<Combined> {
    if platforms.is_empty() {
        return Ok(combined);
    }
    let wanted: Vec<Platform> = platforms.iter().map(|p| p.clone().normalized()).collect();
    let is_wanted = |descriptor: &Descriptor| {
        descriptor.platform.as_ref().is_none_or(|p| wanted.contains(&p.clone().normalized()))
    };
    let Combined { root, bytes, entries } = combined;
    let has = || {
        let of = |e: &Entry| e.descriptor.platform.as_ref().map(ToString::to_string);
        let all: Vec<String> = entries.iter().filter_map(of).filter(|p| p != UNKNOWN).collect();
        format!("there is {}", all.join(", "))
    };
    if !media::is_index(&root.media_type) {
        return match &root.platform {
            None => Err(Fault::invalid(
                "cannot filter platforms from a manifest without platform information",
            )),
            Some(p) if !wanted.contains(&p.clone().normalized()) => {
                Err(Fault::invalid(format!("the image is for {p}, which is not asked for")))
            }
            Some(_) => Ok(Combined { root, bytes, entries }),
        };
    }
    let about = |entry: &Entry| entry.descriptor.annotations.get(ABOUT)?.parse::<Digest>().ok();
    let stays = |entry: &Entry| match about(entry) {
        Some(image) => {
            let image = entries.iter().find(|e| e.descriptor.digest == image);
            image.is_some_and(|image| is_wanted(&image.descriptor))
        }
        None => is_wanted(&entry.descriptor),
    };
    let kept: Vec<Entry> = entries.iter().filter(|entry| stays(entry)).cloned().collect();
    if kept.is_empty() {
        return Err(
            Fault::invalid("none of the manifests match the provided platforms").hint(has())
        );
    }
    if kept.len() == entries.len() {
        return Ok(Combined { root, bytes, entries });
    }
    // All else that the index says stays as it is.
    let mut index: serde_json::Map<String, Value> = serde_json::from_slice(&bytes)
        .map_err(|e| Fault::invalid(format!("the index {} cannot be read: {e}", root.digest)))?;
    let list: Vec<&Descriptor> = kept.iter().map(|entry| &entry.descriptor).collect();
    let list = serde_json::to_value(list).map_err(|e| Fault::internal(e.to_string()))?;
    index.insert("manifests".to_owned(), list);
    let bytes = encode(&index)?;
    let made = Descriptor::of(root.media_type.clone(), &bytes);
    let root = Descriptor { annotations: root.annotations, ..made };
    Ok(Combined { root, bytes, entries: kept })
}

/// The platform of what is no image.
const UNKNOWN: &str = "unknown/unknown";

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(name: &str, media_type: &str, platform: Option<&str>) -> Part {
        let bytes = Bytes::from(format!("{{\"config\":\"{name}\"}}"));
        let mut descriptor = Descriptor::of(media_type, &bytes);
        descriptor.platform = platform.map(|p| p.parse().unwrap());
        Part { descriptor, bytes }
    }

    fn index(entries: &[&Part]) -> Part {
        let index = Index {
            schema_version: 2,
            media_type: Some(media::OCI_INDEX.to_owned()),
            manifests: entries.iter().map(|p| p.descriptor.clone()).collect(),
            annotations: BTreeMap::new(),
        };
        let bytes = Bytes::from(serde_json::to_string(&index).unwrap());
        Part { descriptor: Descriptor::of(media::OCI_INDEX, &bytes), bytes }
    }

    fn about(part: &Part) -> Part {
        let mut said =
            manifest(&format!("about {}", part.descriptor.digest), media::OCI_MANIFEST, None);
        said.descriptor.platform = Some(Platform::new("unknown", "unknown", ""));
        let digest = part.descriptor.digest.to_string();
        said.descriptor.annotations = [
            (ABOUT.to_owned(), digest),
            ("vnd.docker.reference.type".to_owned(), "attestation-manifest".to_owned()),
        ]
        .into();
        said
    }

    fn annotations(texts: &[&str]) -> Vec<Annotation> {
        texts.iter().flat_map(|t| Annotation::parse(t).unwrap()).collect()
    }

    #[test]
    fn manifests_become_an_index_as_go_writes_it() {
        let amd = manifest("a", media::OCI_MANIFEST, Some("linux/amd64"));
        let arm = manifest("b", media::OCI_MANIFEST, Some("linux/arm/v7"));
        let notes = annotations(&["index:a<b=c&d", "manifest-descriptor[linux/arm/v7]:k=v"]);
        let made = combine(&[amd.clone(), arm.clone()], &notes, true, &[]).unwrap();
        let want = format!(
            r#"{{
  "schemaVersion": 2,
  "mediaType": "application/vnd.oci.image.index.v1+json",
  "manifests": [
    {{
      "mediaType": "application/vnd.oci.image.manifest.v1+json",
      "digest": "{}",
      "size": 14,
      "platform": {{
        "architecture": "amd64",
        "os": "linux"
      }}
    }},
    {{
      "mediaType": "application/vnd.oci.image.manifest.v1+json",
      "digest": "{}",
      "size": 14,
      "annotations": {{
        "k": "v"
      }},
      "platform": {{
        "architecture": "arm",
        "os": "linux",
        "variant": "v7"
      }}
    }}
  ],
  "annotations": {{
    "a\u003cb": "c\u0026d"
  }}
}}"#,
            amd.descriptor.digest, arm.descriptor.digest
        );
        assert_eq!(std::str::from_utf8(&made.bytes).unwrap(), want);
        assert_eq!(made.root, Descriptor::of(media::OCI_INDEX, want.as_bytes()));
        assert_eq!(made.entries.iter().map(|e| e.part).collect::<Vec<_>>(), [0, 1]);
    }

    #[test]
    fn one_source_stays_what_it_is_unless_an_index_is_wanted() {
        let one = manifest("a", media::OCI_MANIFEST, Some("linux/amd64"));
        let whole = index(&[&one, &about(&one)]);
        for prefer in [true, false] {
            let made = combine(std::slice::from_ref(&whole), &[], prefer, &[]).unwrap();
            assert_eq!((made.root, made.bytes), (whole.descriptor.clone(), whole.bytes.clone()));
            assert_eq!(made.entries.len(), 2);
        }
        let same = combine(std::slice::from_ref(&one), &[], false, &[]).unwrap();
        assert_eq!((same.root.digest, same.entries.len()), (one.descriptor.digest, 1));
        let within = combine(std::slice::from_ref(&one), &[], true, &[]).unwrap();
        assert_eq!(within.root.media_type, media::OCI_INDEX);
        assert_eq!(within.entries[0].descriptor, one.descriptor);
    }

    #[test]
    fn what_several_have_is_listed_once() {
        let amd = manifest("a", media::OCI_MANIFEST, Some("linux/amd64"));
        let arm = manifest("b", media::OCI_MANIFEST, Some("linux/arm64"));
        let mut again = amd.clone();
        again.descriptor.platform = Some("linux/amd64/v3".parse().unwrap());
        again.descriptor.annotations = [("k".to_owned(), "v".to_owned())].into();
        let made = combine(&[index(&[&amd, &arm]), again], &[], true, &[]).unwrap();
        let [first, second] = &made.entries[..] else { panic!("{:?}", made.entries) };
        assert_eq!(first.descriptor.platform, Some("linux/amd64/v3".parse().unwrap()));
        assert_eq!((first.descriptor.annotations["k"].as_str(), first.part), ("v", 1));
        assert_eq!((second.descriptor.digest, second.part), (arm.descriptor.digest, 0));
    }

    #[test]
    fn dockers_manifests_have_dockers_list() {
        let docker = manifest("a", media::DOCKER_MANIFEST, Some("linux/amd64"));
        let oci = manifest("b", media::OCI_MANIFEST, Some("linux/arm64"));
        let kind = |parts: &[Part]| combine(parts, &[], true, &[]).unwrap().root.media_type;
        assert_eq!(kind(&[docker.clone(), docker.clone()]), media::DOCKER_LIST);
        assert_eq!(kind(&[docker, oci]), media::OCI_INDEX);
    }

    #[test]
    fn platforms_go_with_what_is_said_about_them() {
        let amd = manifest("a", media::OCI_MANIFEST, Some("linux/amd64"));
        let arm = manifest("b", media::OCI_MANIFEST, Some("linux/arm64"));
        let whole = index(&[&amd, &arm, &about(&amd), &about(&arm)]);
        let only =
            |text: &str| combine(std::slice::from_ref(&whole), &[], true, &[text.parse().unwrap()]);
        let made = only("linux/arm64/v8").unwrap();
        let digests: Vec<Digest> = made.entries.iter().map(|e| e.descriptor.digest).collect();
        assert_eq!(digests, [arm.descriptor.digest, about(&arm).descriptor.digest]);
        assert_eq!(made.root.digest, Digest::of(&made.bytes));
        let read: Index = serde_json::from_slice(&made.bytes).unwrap();
        assert_eq!(read.manifests.len(), 2);
        let refused = only("linux/s390x").unwrap_err();
        assert_eq!(refused.message(), "none of the manifests match the provided platforms");
        assert_eq!(refused.hints().next(), Some("there is linux/amd64, linux/arm64"));
        let single = combine(&[amd], &[], false, &["linux/arm64".parse().unwrap()]).unwrap_err();
        assert_eq!(single.message(), "the image is for linux/amd64, which is not asked for");
    }

    #[test]
    fn annotations_of_what_stays_are_refused() {
        let one = manifest("a", media::OCI_MANIFEST, Some("linux/amd64"));
        for text in ["a=b", "manifest:a=b", "index-descriptor:a=b"] {
            let refused =
                combine(std::slice::from_ref(&one), &annotations(&[text]), true, &[]).unwrap_err();
            assert!(refused.hints().any(|h| h.contains("index:KEY=VALUE")), "{refused}");
        }
    }

    #[test]
    fn indexes_without_end_are_refused() {
        let many: Vec<Part> = (0..MAX_ENTRIES + 1)
            .map(|n| manifest(&n.to_string(), media::OCI_MANIFEST, None))
            .collect();
        let whole = index(&many.iter().collect::<Vec<_>>());
        assert!(combine(&[whole], &[], true, &[]).is_err());
        assert!(combine(&many, &[], true, &[]).is_err());
    }
}
