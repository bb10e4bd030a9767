//! What each frontend of a build asked for, so that provenance has for each state the call that led
//! to it and what else that call used.

use super::lazy::LazyState;
use parking_lot::Mutex;
use shipway_attest::{ImageSource, Parameters, RequestProvenance, Sources, filter_args};
use shipway_frontend::FrontendOptions;
use shipway_llb::{Definition, GitRef};
use shipway_oci::Digest;
use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

/// A call of a frontend.
#[derive(Debug, Default)]
pub(crate) struct FrontendCall {
    pub frontend: String,
    pub options: FrontendOptions,
    pub inputs: BTreeMap<String, Definition>,
}

impl FrontendCall {
    fn is_empty(&self) -> bool {
        self.frontend.is_empty() && self.options.is_empty() && self.inputs.is_empty()
    }

    /// The call as provenance has it.
    fn provenance(&self, sources: &Sources, producers: &Producers) -> RequestProvenance {
        let mut request = RequestProvenance::new(
            &self.frontend,
            filter_args(&self.options),
            sources,
            GitRef::formatted,
        );
        if let Some(parameters) = &mut request.request {
            parameters.inputs = producers.of(&self.inputs);
        }
        request
    }
}

/// What one frontend asked for: states, images, and calls of other frontends.
pub(crate) struct CallLog {
    /// The call of the frontend; `None` for the build itself.
    call: Option<Arc<FrontendCall>>,
    /// The first call of which this one is a part.
    root: Option<Arc<FrontendCall>>,
    log: Mutex<Log>,
}

#[derive(Default)]
struct Log {
    states: Vec<Arc<LazyState>>,
    images: Vec<ImageSource>,
    below: Vec<Arc<CallLog>>,
}

impl CallLog {
    /// The log of a build.
    pub fn root(request: FrontendCall) -> Arc<Self> {
        let root = Some(Arc::new(request)).filter(|r| !r.is_empty());
        Arc::new(Self { call: None, root, log: Mutex::default() })
    }

    /// The log of a frontend that is called from here. It counts once it is
    /// [adopted](Self::adopt).
    pub fn nested(&self, request: FrontendCall) -> Arc<Self> {
        let root = self.root.clone().or_else(|| self.call.clone());
        Arc::new(Self { call: Some(Arc::new(request)), root, log: Mutex::default() })
    }

    /// Counts a frontend that succeeded.
    pub fn adopt(&self, below: Arc<CallLog>) {
        self.log.lock().below.push(below);
    }

    pub fn note_state(&self, state: Arc<LazyState>) {
        self.log.lock().states.push(state);
    }

    pub fn note_image(&self, image: ImageSource) {
        self.log.lock().images.push(image);
    }

    /// All states asked for here and below.
    pub fn states(&self) -> Vec<Arc<LazyState>> {
        let log = self.log.lock();
        log.states.iter().cloned().chain(log.below.iter().flat_map(|t| t.states())).collect()
    }

    /// All images resolved here and below.
    pub fn images(&self) -> Vec<ImageSource> {
        let log = self.log.lock();
        log.images.iter().cloned().chain(log.below.iter().flat_map(|t| t.images())).collect()
    }

    /// The request with what it was made for; `None` for the build itself.
    pub fn request(&self, sources: &Sources, producers: &Producers) -> Option<RequestProvenance> {
        let mut request = self.call.as_ref()?.provenance(sources, producers);
        let root = self
            .root
            .as_ref()
            .map(|r| r.provenance(sources, producers))
            .filter(|r| !r.is_empty() && *r != request);
        if let Some(parameters) = &mut request.request {
            parameters.root = root.map(Box::new);
        }
        Some(request)
    }

    /// The request as a predicate starts from it: with all arguments still there.
    pub fn parameters(&self, sources: &Sources, producers: &Producers) -> Parameters {
        let Some(call) = &self.call else { return Parameters::default() };
        let request = self.request(sources, producers).and_then(|r| r.request);
        let request = request.unwrap_or_default();
        Parameters { args: filter_args(&call.options), ..request }
    }
}

/// Which requests made the states that other requests take as inputs, by the digest of the states'
/// definitions.
#[derive(Clone, Default)]
pub(crate) struct Producers(Arc<Mutex<HashMap<Digest, Vec<Arc<RequestProvenance>>>>>);

/// Keeps a producer known.
pub(crate) struct ProducerGuard {
    producers: Producers,
    head: Digest,
    request: Arc<RequestProvenance>,
}

impl Drop for ProducerGuard {
    fn drop(&mut self) {
        let mut all = self.producers.0.lock();
        if let Some(requests) = all.get_mut(&self.head) {
            requests.retain(|r| !Arc::ptr_eq(r, &self.request));
            if requests.is_empty() {
                all.remove(&self.head);
            }
        }
    }
}

impl Producers {
    /// Makes `request` known as the producer of `definition`, while what is returned is held.
    pub fn add(
        &self,
        definition: &Definition,
        request: RequestProvenance,
    ) -> Option<ProducerGuard> {
        let head = definition.head()?;
        let request = Arc::new(request);
        self.0.lock().entry(head).or_default().push(request.clone());
        Some(ProducerGuard { producers: self.clone(), head, request })
    }

    /// The producers of `inputs`, as far as there is one and only one.
    fn of(&self, inputs: &BTreeMap<String, Definition>) -> BTreeMap<String, RequestProvenance> {
        let all = self.0.lock();
        let one = |definition: &Definition| {
            let mut requests = all
                .get(&definition.head()?)?
                .iter()
                .map(|r| RequestProvenance::clone(r).rootless());
            let first = requests.next()?;
            requests.all(|r| r == first).then_some(first)
        };
        inputs
            .iter()
            .filter_map(|(name, definition)| Some((name.clone(), one(definition)?)))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(frontend: &str) -> FrontendCall {
        FrontendCall { frontend: frontend.into(), ..FrontendCall::default() }
    }

    #[test]
    fn a_request_names_the_first_one_of_which_it_is_a_part() {
        let (none, producers) = (Sources::default(), Producers::default());
        let root = CallLog::root(call("a"));
        assert_eq!(root.request(&none, &producers), None);
        let same = root.nested(call("a"));
        assert_eq!(same.request(&none, &producers).unwrap().request.unwrap().root, None);
        let below = same.nested(call("b"));
        let parameters = below.parameters(&none, &producers);
        assert_eq!(
            (
                parameters.frontend.as_str(),
                parameters.root.unwrap().request.unwrap().frontend.as_str()
            ),
            ("b", "a")
        );
        // A build that the client drives has no request of its own.
        let driven = CallLog::root(FrontendCall::default()).nested(call("c")).nested(call("d"));
        assert_eq!(
            driven.parameters(&none, &producers).root.unwrap().request.unwrap().frontend,
            "c"
        );
    }
}
