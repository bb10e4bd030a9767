//! Which manifest of an index is meant.

use shipway_oci::{Descriptor, Index, Platform};

/// Annotation on an index entry that is not an image but describes one.
pub(crate) const REFERENCE_TYPE: &str = "vnd.docker.reference.type";

/// The entries of `index` that may be meant by `wanted`, best first. Entries without a platform
/// come last: only their config has it.
pub(crate) fn candidates<'a>(index: &'a Index, wanted: &Platform) -> Vec<&'a Descriptor> {
    let mut ranked: Vec<(u32, &Descriptor)> = index
        .manifests
        .iter()
        .filter(|m| !m.annotations.contains_key(REFERENCE_TYPE))
        .filter_map(|m| match &m.platform {
            Some(p) => Some((p.rank_for(wanted)? + windows_gap(p, wanted)?, m)),
            None => Some((u32::MAX, m)),
        })
        .collect();
    // Stable: among equals, the index's own order decides.
    ranked.sort_by_key(|(rank, _)| *rank);
    ranked.into_iter().map(|(_, m)| m).collect()
}

/// How far an `os.version` is from the one wanted: the same build is best, another build of the
/// same release may do.
fn windows_gap(have: &Platform, wanted: &Platform) -> Option<u32> {
    if wanted.os_version.is_empty()
        || have.os_version.is_empty()
        || have.os_version == wanted.os_version
    {
        return Some(0);
    }
    let build = |v: &str| v.split('.').take(3).map(str::to_owned).collect::<Vec<_>>();
    (build(&have.os_version) == build(&wanted.os_version)).then_some(1)
}

/// The platforms an index offers, for an error that says so.
pub(crate) fn offered(index: &Index) -> String {
    let mut names: Vec<String> = index
        .manifests
        .iter()
        .filter(|m| !m.annotations.contains_key(REFERENCE_TYPE))
        .filter_map(|m| m.platform.as_ref().map(ToString::to_string))
        .collect();
    names.dedup();
    let more = names.len().saturating_sub(20);
    names.truncate(20);
    if more > 0 {
        names.push(format!("and {more} more"));
    }
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use shipway_oci::Digest;

    fn index(platforms: &[&str]) -> Index {
        let entry = |p: &&str| {
            let mut d = Descriptor::new("m", Digest::of(p), 1);
            match *p {
                "attestation" => {
                    d.annotations.insert(REFERENCE_TYPE.into(), "attestation-manifest".into());
                }
                "none" => {}
                p => d.platform = Some(p.parse().unwrap()),
            }
            d
        };
        Index {
            schema_version: 2,
            media_type: None,
            manifests: platforms.iter().map(entry).collect(),
            annotations: Default::default(),
        }
    }

    #[track_caller]
    fn check(platforms: &[&str], wanted: &str, want: &[&str]) {
        let index = index(platforms);
        let got: Vec<Digest> =
            candidates(&index, &wanted.parse().unwrap()).iter().map(|d| d.digest).collect();
        assert_eq!(got, want.iter().map(Digest::of).collect::<Vec<_>>());
    }

    #[test]
    fn the_best_match_comes_first() {
        check(&["linux/arm64", "linux/amd64", "attestation"], "linux/amd64", &["linux/amd64"]);
        check(
            &["linux/arm/v6", "linux/arm/v7", "linux/arm/v5"],
            "linux/arm/v7",
            &["linux/arm/v7", "linux/arm/v6", "linux/arm/v5"],
        );
        check(&["none", "linux/amd64"], "linux/amd64", &["linux/amd64", "none"]);
        check(&["windows(10.0.17763.1)/amd64"], "windows(10.0.20348.1)/amd64", &[]);
        check(&["linux/s390x"], "linux/amd64", &[]);
        assert_eq!(
            offered(&index(&["linux/arm64", "linux/amd64", "attestation"])),
            "linux/arm64, linux/amd64"
        );
    }
}
