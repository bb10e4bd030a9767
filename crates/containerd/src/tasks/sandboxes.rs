//! Owns records of sandboxes. A container of a sandbox runs in the shim of the task that has the
//! sandbox's name, and containerd (2.0 and newer) neither starts the shim's program for its
//! beginning and its end nor runs the runtime once more to clean up: a third of a trivial step's
//! processor time.

use super::api::{OWNER, TaskApi};
use crate::conn::deadline;
use containerd_client::{
    services::v1::{self as api, sandbox::store_client::StoreClient},
    types,
};
use shipway_fault::{Code, Result};
use shipway_grpc::TracedChannel;
use std::collections::HashMap;

/// Namespace of Kubernetes: in containerd 2.0 its CRI service does not start when it finds a
/// sandbox that it did not make.
const CRI_NAMESPACE: &str = "k8s.io";
/// Runtimes whose shim serves several containers.
const SHARED: &str = ".runc.";

impl TaskApi {
    fn sandboxes(&self) -> StoreClient<TracedChannel> {
        StoreClient::new(self.connection.control())
    }

    /// Whether sandboxes are of use here.
    pub(super) async fn has_sandboxes(&self) -> bool {
        let known = self.sandboxes.get_or_init(|| async {
            if self.namespace() == CRI_NAMESPACE || !self.runtime.name.contains(SHARED) {
                return false;
            }
            let mut client = api::version_client::VersionClient::new(self.connection.control());
            let Ok(request) = self.connection.request(()) else { return false };
            let answer = self
                .connection
                .call(|| "ask for the version".into(), deadline::QUICK, client.version(request))
                .await;
            answer.is_ok_and(|v| major(&v.version) >= 2)
        });
        *known.await
    }

    /// Records a sandbox whose shim is the one of the task of that name.
    pub(super) async fn create_sandbox(&self, id: &str) -> Result<()> {
        let sandbox = types::Sandbox {
            sandbox_id: id.to_owned(),
            runtime: Some(types::sandbox::Runtime {
                name: self.runtime.name.clone(),
                options: None,
            }),
            labels: HashMap::from([(OWNER.to_owned(), self.owner.clone())]),
            ..Default::default()
        };
        let request =
            self.connection.request(api::sandbox::StoreCreateRequest { sandbox: Some(sandbox) })?;
        let mut client = self.sandboxes();
        self.connection
            .call(|| format!("create sandbox {id}"), deadline::QUICK, client.create(request))
            .await
            .map(drop)
    }

    /// Deletes the record of a sandbox. A missing sandbox is not an error.
    pub(super) async fn delete_sandbox(&self, id: &str) -> Result<()> {
        let request = self
            .connection
            .request(api::sandbox::StoreDeleteRequest { sandbox_id: id.to_owned() })?;
        let mut client = self.sandboxes();
        let done = self
            .connection
            .call(|| format!("delete sandbox {id}"), deadline::QUICK, client.delete(request))
            .await;
        done.map(drop).or_else(super::api::gone)
    }

    /// Ids of the sandboxes that carry our label.
    pub(super) async fn our_sandboxes(&self) -> Result<Vec<String>> {
        if !self.has_sandboxes().await {
            return Ok(Vec::new());
        }
        let request =
            self.connection.request(api::sandbox::StoreListRequest { filters: Vec::new() })?;
        let mut client = self.sandboxes();
        let answer = match self
            .connection
            .call(|| "list sandboxes".into(), deadline::QUICK, client.list(request))
            .await
        {
            // The service may be turned off, and then there was never one of ours.
            Err(e) if e.code() == Code::Unimplemented => return Ok(Vec::new()),
            answer => answer?,
        };
        let ours = answer.list.into_iter().filter(|s| s.labels.get(OWNER) == Some(&self.owner));
        Ok(ours.map(|s| s.sandbox_id).collect())
    }
}

/// The first number of a version such as `v2.1.9` or `1.6.20~ds1`; 0 if there is none.
fn major(version: &str) -> u32 {
    let digits = version.trim_start_matches('v');
    digits.split(|c: char| !c.is_ascii_digit()).next().and_then(|n| n.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_begin_with_their_major_number() {
        for (version, number) in
            [("v2.1.9", 2), ("1.6.20~ds1", 1), ("2.0.0-rc.1", 2), ("", 0), ("next", 0)]
        {
            assert_eq!(major(version), number, "{version}");
        }
    }
}
