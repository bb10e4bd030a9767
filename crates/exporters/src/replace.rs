//! Which names of images an export may take.

use shipway_fault::{Class, Code, Fault, Result};
use shipway_oci::pattern;
use shipway_storage::ImageRecord;

/// Whether another image may take the name: what CRI manages is what pods are started from, and
/// kubelet does not ask who put it there.
pub(crate) fn may_replace(image: &ImageRecord, replaceable: &[String]) -> Result<()> {
    let name = &image.name;
    if !image.is_cri_managed()
        || image.built().is_some()
        || replaceable.iter().any(|p| pattern::matches(p, name))
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

#[cfg(test)]
mod tests {
    use super::*;
    use shipway_oci::Descriptor;
    use shipway_storage::{Labels, built_labels};
    use std::time::SystemTime;

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
