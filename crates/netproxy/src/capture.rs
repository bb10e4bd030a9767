//! What a step was seen to ask for (row `at.prov.capture`).

use parking_lot::{Mutex, MutexGuard};
use shipway_oci::Digest;
use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

/// Most requests of one step that are noted; a step that makes more is reported as incomplete.
pub const MAX_RECORDS: usize = 10_000;
/// Most bytes of their addresses together.
const MAX_BYTES: usize = 4 << 20;
/// Why something is missing when there was no room for it.
const TOO_MANY: &str = "too_many_requests";

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct ProxiedRequest {
    pub method: String,
    pub url: String,
    /// Where the answer sent the client.
    pub redirect: Option<String>,
    pub status: u16,
}

/// Something that was fetched whole.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Material {
    pub url: String,
    pub digest: Digest,
}

/// A request whose response has no digest.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Incomplete {
    pub method: String,
    pub url: String,
    /// In the reference's words, such as `upstream_error`.
    pub reason: String,
}

/// Everything that one step asked for. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Capture(Arc<Mutex<Log>>);

#[derive(Debug, Default)]
struct Log {
    requests: Vec<ProxiedRequest>,
    materials: Vec<Material>,
    incomplete: Vec<Incomplete>,
    bytes: usize,
    /// Whether there was no room for something.
    full: bool,
}

impl Log {
    /// Makes room for a record of `bytes` beside `others` of its kind, or notes that there was
    /// none.
    fn admit(&mut self, others: usize, bytes: usize) -> bool {
        let fits = others < MAX_RECORDS && self.bytes + bytes <= MAX_BYTES;
        self.bytes += if fits { bytes } else { 0 };
        if !fits && !std::mem::replace(&mut self.full, true) {
            self.incomplete.push(Incomplete {
                method: String::new(),
                url: String::new(),
                reason: TOO_MANY.into(),
            });
        }
        fits
    }
}

impl Capture {
    fn lock(&self) -> MutexGuard<'_, Log> {
        self.0.lock()
    }

    pub(crate) fn request(&self, request: ProxiedRequest) {
        let mut log = self.lock();
        let bytes = request.url.len() + request.redirect.as_ref().map_or(0, String::len);
        let others = log.requests.len();
        if log.admit(others, bytes) {
            log.requests.push(request);
        }
    }

    pub(crate) fn material(&self, url: String, digest: Digest) {
        let mut log = self.lock();
        let others = log.materials.len();
        if log.admit(others, url.len()) {
            log.materials.push(Material { url, digest });
        }
    }

    pub(crate) fn incomplete(&self, method: String, url: String, reason: &str) {
        let mut log = self.lock();
        let others = log.incomplete.len();
        if log.admit(others, url.len()) {
            log.incomplete.push(Incomplete { method, url, reason: reason.into() });
        }
    }

    /// The requests, in their order.
    pub fn requests(&self) -> Vec<ProxiedRequest> {
        self.lock().requests.clone()
    }

    /// What was fetched: also by the addresses that led there by redirects.
    pub fn materials(&self) -> Vec<Material> {
        let log = self.lock();
        let mut all = log.materials.clone();
        let mut known: HashMap<&str, Digest> =
            log.materials.iter().map(|m| (m.url.as_str(), m.digest)).collect();
        // By target, so that every address is looked at once.
        let mut leading: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for request in &log.requests {
            if let Some(to) = request.redirect.as_deref().filter(|to| *to != request.url) {
                leading.entry(to).or_default().push(&request.url);
            }
        }
        let mut queue: Vec<&str> = log.materials.iter().map(|m| m.url.as_str()).collect();
        while let Some(to) = queue.pop() {
            for from in leading.remove(to).unwrap_or_default() {
                let digest = known[to];
                if !known.contains_key(from) {
                    known.insert(from, digest);
                    all.push(Material { url: from.to_owned(), digest });
                    queue.push(from);
                }
            }
        }
        all
    }

    /// What is missing among them.
    pub fn incomplete_requests(&self) -> Vec<Incomplete> {
        self.lock().incomplete.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(url: &str, redirect: Option<&str>) -> ProxiedRequest {
        ProxiedRequest {
            method: "GET".into(),
            url: url.into(),
            redirect: redirect.map(str::to_owned),
            status: 200,
        }
    }

    #[test]
    fn addresses_that_led_to_a_file_are_told_with_it() {
        let capture = Capture::default();
        for (from, to) in [("a", "b"), ("b", "c"), ("c", "c"), ("x", "y"), ("y", "x")] {
            capture.request(request(from, Some(to)));
        }
        capture.material("c".into(), Digest::of("c"));
        let mut urls: Vec<_> = capture.materials().into_iter().map(|m| (m.url, m.digest)).collect();
        urls.sort();
        assert_eq!(urls, ["a", "b", "c"].map(|u| (u.to_owned(), Digest::of("c"))));
    }

    #[test]
    fn records_are_bounded_in_number_and_size_and_say_so() {
        let capture = Capture::default();
        for n in 0..MAX_RECORDS + 10 {
            capture.request(request(&n.to_string(), None));
        }
        assert_eq!(capture.requests().len(), MAX_RECORDS);
        assert_eq!(
            capture.incomplete_requests().iter().map(|i| i.reason.as_str()).collect::<Vec<_>>(),
            [TOO_MANY]
        );
        let capture = Capture::default();
        for _ in 0..10 {
            capture.material("u".repeat(MAX_BYTES / 4), Digest::of(""));
        }
        assert_eq!(capture.materials().len(), 4);
        assert_eq!(capture.incomplete_requests().len(), 1);
    }
}
