//! A process on the proxy network (row `exec.proxynet`): its proxy, what the builds that want it
//! allow, and what it fetched.

use crate::{JobData, Services};
use async_trait::async_trait;
use shipway_attest::{HttpSource, MissingFetch};
use shipway_executor::Proxied;
use shipway_fault::{Fault, Result};
use shipway_llb::SourceOp;
use shipway_netproxy::{Authority, Capture, Policy, Proxy};
use std::{collections::BTreeMap, fmt::Write as _, sync::Arc};

/// Why nothing is known of what a step fetched that did not run.
const CACHED: &str = "cached_result";

/// All builds that want the process at the moment have to agree.
struct AllJobs(Arc<dyn Fn() -> Vec<JobData> + Send + Sync>);

#[async_trait]
impl Policy for AllJobs {
    async fn check(&self, url: &str) -> Result<String> {
        let mut source = SourceOp { identifier: url.to_owned(), attrs: BTreeMap::new() };
        for job in (self.0)() {
            source = job.judge.judge(source).await?;
        }
        if !source.attrs.is_empty() {
            return Err(Fault::invalid(format!(
                "source policy converted proxy request {url:?} with attrs, but proxy conversion only supports URL updates"
            )));
        }
        Ok(source.identifier)
    }
}

impl Services {
    /// A proxy that asks the builds of `jobs` and notes in `capture`.
    pub(crate) async fn proxy(
        &self,
        jobs: Arc<dyn Fn() -> Vec<JobData> + Send + Sync>,
        capture: Capture,
    ) -> Result<Proxied> {
        let make = || async {
            let ca = self.ca.clone();
            let make = move || {
                let more = ca.map(|bundle| bundle.read()).transpose()?.unwrap_or_default();
                Authority::new(&more).map(Arc::new)
            };
            shipway_task::blocking("make the certificate of the proxy network", make).await
        };
        let authority = self.authority.get_or_try_init(make).await?.clone();
        let proxy = Proxy::new(authority, Some(Arc::new(AllJobs(jobs))), capture);
        Ok(Proxied(Arc::new(proxy.within(self.egress.clone()))))
    }
}

/// What is said of the requests in the step's output, in the reference's words.
pub(super) fn summary(capture: &Capture) -> Option<String> {
    let requests = capture.requests();
    if requests.is_empty() {
        return None;
    }
    let mut text = String::from("proxy network requests:\n");
    for r in requests {
        let _ = writeln!(text, "- {} {} -> {}", r.method, r.url, r.status);
    }
    Some(text)
}

/// Adds what a step fetched to what is known of its build; nothing is known of one that did not
/// run.
pub(crate) fn record(
    fetched: Option<&Capture>,
    op: &str,
    name: &str,
    capture: &mut shipway_attest::Capture,
) {
    capture.proxied = true;
    let mut missing = |method: String, url: String, reason: String| {
        capture.add_missing(MissingFetch {
            op: op.to_owned(),
            name: name.to_owned(),
            method,
            url,
            reason,
        });
    };
    let Some(fetched) = fetched else {
        return missing(String::new(), String::new(), CACHED.into());
    };
    for request in fetched.incomplete_requests() {
        missing(request.method, request.url, request.reason);
    }
    for material in fetched.materials() {
        capture.add_http(HttpSource { url: material.url, digest: material.digest });
    }
}
