//! Clients that decide on sources themselves (row `cb.policy`).
//!
//! The client is asked about a source as the build names it. It answers with a decision, or with a
//! question of its own: then it is asked again with what resolving the source has found. How often
//! is the caller's business.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use shipway_fault::{Detail, Fault, Result};
use shipway_grpc::{platform_of, platform_to_wire};
use shipway_llb::{ResolveMode, ResolveOptions, SourceFacts, SourceOp};
use shipway_oci::{ChecksumAlgorithm, Platform};
use shipway_proto::moby::buildkit::v1::{
    frontend::{self as wire, checksum_request::ChecksumAlgo},
    sourcepolicy::{
        PolicyAction,
        policysession::{
            CheckPolicyRequest, check_policy_response::Result as Answer,
            policy_verifier_client::PolicyVerifierClient,
        },
    },
};
use tonic::Request;

use crate::{Session, call::client};

/// Policies may ask a registry or verify signatures.
const LIMIT: Duration = Duration::from_secs(120);
/// Name of a refusal's words among the details of an error.
const DENIED: &str = "github.com/moby/buildkit/policysession.DecisionResponse+json";

/// What a client is asked to judge.
#[derive(Clone, Debug, Default)]
#[allow(missing_docs)]
pub struct PolicySubject {
    pub identifier: String,
    pub attrs: BTreeMap<String, String>,
    pub platform: Option<Platform>,
    /// What is known of it so far.
    pub facts: SourceFacts,
}

/// What a client wants to know before it decides.
#[derive(Clone, Debug, Default)]
#[allow(missing_docs)]
pub struct PolicyQuestion {
    pub identifier: String,
    pub attrs: BTreeMap<String, String>,
    pub platform: Option<Platform>,
    pub log_name: String,
    pub options: ResolveOptions,
    /// Whether an image's config is not wanted.
    pub no_config: bool,
}

/// A client's decision on a source.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub enum PolicyAnswer {
    Allow,
    /// With the client's own words, to be shown to it again.
    Deny(Vec<String>),
    /// Use this identifier with these attributes instead.
    Convert(String, BTreeMap<String, String>),
    Ask(Box<PolicyQuestion>),
}

/// The fault of a source that a client refused; the words travel as a detail that the client knows.
pub fn denied(identifier: &str, words: &[String]) -> Fault {
    let fault = Fault::new(
        shipway_fault::Code::PermissionDenied,
        format!("source {identifier:?} not allowed by policy: action DENY"),
    );
    if words.is_empty() {
        return fault;
    }
    // An enum in Go's JSON of this message is its number; DENY is 1.
    let quoted = |w: &String| format!(r#"{{"message":{}}}"#, json_string(w));
    let messages: Vec<String> = words.iter().map(quoted).collect();
    let value = format!(r#"{{"denyMessages":[{}]}}"#, messages.join(","));
    fault.detail(Detail::Opaque { type_url: DENIED.into(), value: value.into_bytes() })
}

fn json_string(text: &str) -> String {
    let mut out = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if u32::from(c) < 0x20 => out.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

fn request(subject: &PolicySubject) -> CheckPolicyRequest {
    let source = SourceOp { identifier: subject.identifier.clone(), attrs: subject.attrs.clone() };
    let source = subject.facts.clone().to_pb(source);
    CheckPolicyRequest {
        platform: subject.platform.as_ref().map(platform_to_wire),
        source: Some(source),
        caps: BTreeMap::new(),
    }
}

fn question(q: wire::ResolveSourceMetaRequest) -> Result<PolicyQuestion> {
    let source =
        q.source.ok_or_else(|| Fault::invalid("the client's policy asked about no source"))?;
    let algorithm = |c: wire::ChecksumRequest| match ChecksumAlgo::try_from(c.algo) {
        Ok(ChecksumAlgo::Sha256) => Ok((ChecksumAlgorithm::Sha256, Bytes::from(c.suffix))),
        Ok(ChecksumAlgo::Sha384) => Ok((ChecksumAlgorithm::Sha384, Bytes::from(c.suffix))),
        Ok(ChecksumAlgo::Sha512) => Ok((ChecksumAlgorithm::Sha512, Bytes::from(c.suffix))),
        Err(_) => Err(Fault::invalid(format!(
            "the client's policy asked for an unsupported checksum algorithm: {}",
            c.algo
        ))),
    };
    Ok(PolicyQuestion {
        identifier: source.identifier,
        attrs: source.attrs,
        platform: q.platform.map(platform_of),
        log_name: q.log_name,
        no_config: q.image.as_ref().is_some_and(|i| i.no_config),
        options: ResolveOptions {
            mode: ResolveMode::parse(&q.resolve_mode).unwrap_or_default(),
            attestations: q
                .image
                .filter(|i| i.attestation_chain || !i.resolve_attestations.is_empty())
                .map(|i| i.resolve_attestations),
            git_objects: q.git.is_some_and(|g| g.return_object),
            http_checksum: q.http.and_then(|h| h.checksum_request).map(algorithm).transpose()?,
        },
    })
}

impl Session {
    /// Asks the client what it thinks of a source.
    pub async fn check_policy(&self, subject: &PolicySubject) -> Result<PolicyAnswer> {
        let what = || format!("ask the client's policy about {}", subject.identifier);
        let mut client = client!(PolicyVerifierClient, self);
        let call = client.check_policy(Request::new(request(subject)));
        let late = |_| {
            Fault::new(
                shipway_fault::Code::DeadlineExceeded,
                format!("the client has not answered within {} s", LIMIT.as_secs()),
            )
        };
        let response = tokio::time::timeout(LIMIT, call)
            .await
            .map_err(late)
            .and_then(|r| r.map_err(|s| shipway_grpc::fault_of(&s)));
        let decision = match response.map_err(|f| f.context(what()))?.into_inner().result {
            Some(Answer::Request(q)) => return Ok(PolicyAnswer::Ask(Box::new(question(q)?))),
            Some(Answer::Decision(decision)) => decision,
            None => return Err(Fault::invalid("no decision in policy response").context(what())),
        };
        Ok(match PolicyAction::try_from(decision.action) {
            Ok(PolicyAction::Allow) => PolicyAnswer::Allow,
            Ok(PolicyAction::Deny) => {
                PolicyAnswer::Deny(decision.deny_messages.into_iter().map(|m| m.message).collect())
            }
            Ok(PolicyAction::Convert) => {
                let to = decision.update.ok_or_else(|| {
                    Fault::invalid("convert action requires updated source").context(what())
                })?;
                PolicyAnswer::Convert(to.identifier, to.attrs)
            }
            Err(_) => {
                return Err(Fault::invalid(format!(
                    "unknown action {} in policy response",
                    decision.action
                ))
                .context(what()));
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_carries_the_clients_words() {
        let fault = denied("docker-image://x", &["no \"x\"\n".into()]);
        assert_eq!(
            fault.to_string(),
            "source \"docker-image://x\" not allowed by policy: action DENY"
        );
        let [Detail::Opaque { value, .. }] = fault.details() else { panic!("{fault:?}") };
        assert_eq!(
            String::from_utf8_lossy(value),
            r#"{"denyMessages":[{"message":"no \"x\"\u000a"}]}"#
        );
        assert!(denied("x", &[]).details().is_empty());
    }
}
