//! Which secrets and settings git gets for a remote.

use super::*;
use crate::clients::ClientDirectory;
use async_trait::async_trait;
use shipway_oci::Platform;
use std::{collections::BTreeMap, sync::Arc};

/// A client with secrets.
struct Secrets(BTreeMap<String, Vec<u8>>);

#[async_trait]
impl ClientServices for Secrets {
    fn credentials(&self) -> Arc<dyn shipway_registry::CredentialSource> {
        Arc::new(shipway_registry::Anonymous)
    }
    async fn secret(&self, id: &str) -> Result<Option<Vec<u8>>> {
        Ok(self.0.get(id).cloned())
    }
    async fn directories(
        &self,
        _: Option<&shipway_session::SessionId>,
    ) -> Result<Vec<Arc<dyn ClientDirectory>>> {
        Ok(Vec::new())
    }
    async fn ssh_agent(&self, _: &str) -> Result<SshAgent> {
        Err(Fault::unimplemented("agents"))
    }
    fn session_id(&self) -> Option<shipway_session::SessionId> {
        None
    }
}

/// The header for `https://example.com/a.git`, if the client has `secrets`.
async fn header(attrs: &[(&str, &str)], secrets: &[(&str, &str)]) -> Option<String> {
    let attrs = attrs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    let source = SourceSpec {
        identifier: "git://https://example.com/a.git".into(),
        attrs,
        platform: Platform::host(),
    };
    let spec = GitSpec::parse(&source, "https://example.com/a.git").unwrap();
    let secrets =
        Secrets(secrets.iter().map(|(k, v)| ((*k).to_owned(), v.as_bytes().to_vec())).collect());
    auth_header(&spec, &secrets).await.unwrap()
}

#[tokio::test]
async fn secrets_of_the_host_come_first_and_headers_before_tokens() {
    let names = [("git.authheadersecret", "HEADER"), ("git.authtokensecret", "TOKEN")];
    let token = |text: &str| {
        format!("Authorization: basic {}", BASE64_STANDARD.encode(format!("x-access-token:{text}")))
    };
    assert_eq!(header(&names, &[]).await, None);
    assert_eq!(header(&names, &[("TOKEN", "t\n")]).await, Some(token("t")));
    let plain = [("TOKEN", "t"), ("HEADER", "basic abc")];
    assert_eq!(header(&names, &plain).await.as_deref(), Some("Authorization: basic abc"));
    let of_host = [("TOKEN.example.com", "h"), ("HEADER", "basic abc"), ("TOKEN.other.org", "o")];
    assert_eq!(header(&names, &of_host).await, Some(token("h")));
    // A secret that the source does not name is not looked for.
    assert_eq!(header(&[], &[("", "x"), (".example.com", "y")]).await, None);
}

#[test]
fn tokens_go_to_the_remote_and_on_github_to_its_submodules_too() {
    assert_eq!(token_scope("https://example.com/a.git"), "https://example.com/a.git");
    assert_eq!(token_scope("https://github.com/a/b.git"), "https://github.com/");
}
