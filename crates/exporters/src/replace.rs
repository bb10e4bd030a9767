//! Which names of images an export may take.

use shipway_fault::{Class, Code, Fault, Result};
use shipway_storage::ImageRecord;

/// Whether another image may take the name: what CRI manages is what pods are started from, and
/// kubelet does not ask who put it there.
pub(crate) fn may_replace(image: &ImageRecord, replaceable: &[String]) -> Result<()> {
    let name = &image.name;
    if !image.is_cri_managed()
        || image.built().is_some()
        || replaceable.iter().any(|pattern| matches(pattern, name))
    {
        return Ok(());
    }
    let fault = Fault::new(
        Code::FailedPrecondition,
        format!("image {name} is managed by Kubernetes (CRI) and was not built here"),
    );
    let fault = fault.with_class(Class::User);
    Err(fault
        .hint(format!("choose another name, or add {name:?} to replaceManagedImages of [worker.containerd] in the daemon's configuration")))
}

/// Whether `name` is what `pattern` says; `*` stands for anything, slashes included, unlike in Go's
/// `path.Match`: these are patterns of ours.
fn matches(pattern: &str, name: &str) -> bool {
    let Some((first, rest)) = pattern.split_once('*') else { return pattern == name };
    let Some(mut name) = name.strip_prefix(first) else { return false };
    let mut parts: Vec<&str> = rest.split('*').collect();
    let last = parts.pop().unwrap_or_default();
    for part in parts {
        match name.find(part) {
            Some(at) => name = &name[at + part.len()..],
            None => return false,
        }
    }
    name.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use shipway_oci::Descriptor;
    use shipway_storage::{Labels, built_labels};
    use std::time::SystemTime;

    #[test]
    fn names_match_patterns() {
        for (pattern, name, want) in [
            ("a/b:1", "a/b:1", true),
            ("a/b:1", "a/b:2", false),
            ("*", "anything", true),
            ("registry.local/*", "registry.local/a/b:1", true),
            ("registry.local/*", "registry.local.evil/a", false),
            ("*/app:*", "h/team/app:1", true),
            ("*/app:*-dev", "h/team/app:1", false),
            ("a*a", "a", false),
            ("", "a", false),
        ] {
            assert_eq!(matches(pattern, name), want, "{pattern} {name}");
        }
    }

    #[test]
    fn what_cri_manages_is_replaced_if_it_is_ours_or_allowed() {
        let target = Descriptor::of("m", b"x");
        let managed = Labels::from([("io.cri-containerd.image".to_owned(), "managed".to_owned())]);
        let ours = built_labels(&target, SystemTime::now());
        let check = |labels: &[&Labels], replaceable: &[&str]| {
            let labels =
                labels.iter().flat_map(|l| l.iter()).map(|(k, v)| (k.clone(), v.clone())).collect();
            let image = ImageRecord {
                name: "registry.k8s.io/pause:3.9".into(),
                target: target.clone(),
                labels,
                updated: None,
            };
            may_replace(&image, &replaceable.iter().map(|p| (*p).to_owned()).collect::<Vec<_>>())
        };
        assert!(check(&[], &[]).is_ok());
        assert!(check(&[&managed, &ours], &[]).is_ok());
        assert!(check(&[&managed], &["registry.k8s.io/*"]).is_ok());
        // The label of a build whose name another program has pointed elsewhere since.
        let stale = built_labels(&Descriptor::of("m", b"y"), SystemTime::now());
        for labels in [&[&managed][..], &[&managed, &stale]] {
            let fault = check(labels, &["other/*"]).unwrap_err();
            assert!(fault.to_string().contains("registry.k8s.io/pause:3.9"), "{fault}");
            assert!(fault.hints().any(|h| h.contains("replaceManagedImages")), "{fault:?}");
        }
    }
}
