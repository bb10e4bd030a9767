//! What a build may use: rules that came with the request, and a client that is asked about every
//! source (rows `so.pol*`, `cb.policy`).

use super::{SourceQuery, heavy::heavy, scope::BuildScope};
use crate::permit;
use futures::future::try_join_all;
use futures::{FutureExt as _, future::BoxFuture};
use shipway_fault::{Context as _, Fault, Result};
use shipway_gocompat::path::inside;
use shipway_llb::{Definition, Graph, Op, SourceFacts, SourceOp, SourcePolicy, policy};
use shipway_oci::{ImageName, Platform};
use shipway_ops::Judge;
use shipway_session::{PolicyAnswer, PolicyQuestion, PolicySubject, Session, denied};
use std::{
    collections::HashMap,
    sync::{Arc, Weak},
};

/// A client that asks more often than this about one source goes in a circle.
const MAX_ROUNDS: usize = 10;

/// The identifier in the form that policies see.
fn normalize(source: &mut SourceOp) {
    if let Some(name) =
        source.identifier.strip_prefix("docker-image://").and_then(|n| n.parse::<ImageName>().ok())
    {
        source.identifier = format!("docker-image://{name}");
    } else if let Some((address, fragment)) = source.identifier.split_once('#')
        && address.starts_with("git://")
        && let Some((reference, subdir)) = fragment.split_once(':')
    {
        // However it is written, a rule must meet the directory that will be taken: crate `sources`
        // finds it by the same function.
        let subdir = inside(subdir);
        let colon = if subdir.is_empty() { "" } else { ":" };
        let fragment = format!("{reference}{colon}{subdir}");
        source.identifier =
            if fragment.is_empty() { address.to_owned() } else { format!("{address}#{fragment}") };
    }
}

impl Judge for BuildScope {
    fn judge(&self, source: SourceOp) -> BoxFuture<'_, Result<SourceOp>> {
        async move { self.check(source, None, &[]).await }.boxed()
    }
}

impl BuildScope {
    /// Whether sources may be used as they are, whatever they are.
    fn takes_all(&self) -> bool {
        self.policy.is_empty() && !self.caller.is_restricted()
    }

    /// Lets the policy decide what steps fetch by themselves.
    pub(crate) fn judge_steps(self: &Arc<Self>) {
        if !self.takes_all() {
            let judge: Weak<dyn Judge> = Arc::downgrade(&(self.clone() as Arc<dyn Judge>));
            self.data.judge.set(judge);
        }
    }

    fn rules(&self, more: &[SourcePolicy]) -> Vec<SourcePolicy> {
        let own = std::iter::once(&self.policy.rules);
        own.chain(more).filter(|p| !p.is_empty()).cloned().collect()
    }

    /// `definition` with the sources that the policies make of its own.
    pub(crate) async fn checked(
        &self,
        definition: Definition,
        graph: &Graph,
        more: &[SourcePolicy],
    ) -> Result<Option<Definition>> {
        if self.takes_all() && more.is_empty() {
            return Ok(None);
        }
        let sources = graph.vertices.iter().filter_map(|v| match &v.op {
            Op::Source(source) => Some((v, source)),
            _ => None,
        });
        let check = sources.map(|(vertex, source)| async move {
            let after = self.check(source.clone(), Some(&vertex.platform), more).await?;
            Ok::<_, Fault>((after != *source).then_some((vertex.digest, after)))
        });
        let changed = try_join_all(check)
            .await
            .context(|| "failed to load LLB: error evaluating the source policy")?;
        let changed: HashMap<_, _> = changed.into_iter().flatten().collect();
        if changed.is_empty() {
            Ok(None)
        } else {
            graph.with_sources(&definition, &changed).map(Some)
        }
    }

    /// The source that the policies make of `source`, or why it is not allowed.
    pub(crate) async fn check(
        &self,
        mut source: SourceOp,
        platform: Option<&Platform>,
        more: &[SourcePolicy],
    ) -> Result<SourceOp> {
        if self.takes_all() && more.is_empty() {
            return Ok(source);
        }
        let rules = self.rules(more);
        let client = match &self.policy.session {
            Some(id) => Some(
                self.data
                    .sessions
                    .hub()
                    .get(id)
                    .await
                    .context(|| "find the client that decides on sources")?,
            ),
            None => None,
        };
        let mut facts = SourceFacts::default();
        for _ in 0..MAX_ROUNDS {
            normalize(&mut source);
            let rules = rules.clone();
            source = heavy(move || policy::evaluate(&rules, &mut source).map(|_| source)).await?;
            // Before the client is asked, which may want to know what is there.
            permit::source(&self.caller, &source)?;
            let Some(client) = &client else { return Ok(source) };
            match self.ask(client, &source, platform, std::mem::take(&mut facts)).await? {
                PolicyAnswer::Allow => return Ok(source),
                PolicyAnswer::Deny(words) => return Err(denied(&source.identifier, &words)),
                PolicyAnswer::Convert(identifier, attrs) => source = SourceOp { identifier, attrs },
                PolicyAnswer::Ask(question) => facts = self.answer(&source, *question).await?,
            }
        }
        Err(Fault::invalid("too many policy requests"))
    }

    async fn ask(
        &self,
        client: &Session,
        source: &SourceOp,
        platform: Option<&Platform>,
        facts: SourceFacts,
    ) -> Result<PolicyAnswer> {
        let subject = PolicySubject {
            identifier: source.identifier.clone(),
            attrs: source.attrs.clone(),
            platform: platform.cloned(),
            facts,
        };
        client.check_policy(&subject).await
    }

    /// What the client wants to know of the source before it decides.
    async fn answer(&self, source: &SourceOp, question: PolicyQuestion) -> Result<SourceFacts> {
        if question.identifier != source.identifier {
            let (asked, about) = (&question.identifier, &source.identifier);
            return Err(Fault::invalid(format!(
                "policy requested different source identifier: {asked:?} != {about:?}"
            )));
        }
        if question.attrs != source.attrs {
            return Err(Fault::invalid("policy requested different source attrs"));
        }
        let query = SourceQuery {
            platform: question.platform.map(Platform::normalized),
            log_name: if question.log_name.is_empty() {
                format!("resolve image config for {}", source.identifier)
            } else {
                question.log_name
            },
            options: question.options,
        };
        let meta = self
            .resolve(source.clone(), query)
            .await
            .context(|| "error resolving source metadata from policy request")?;
        let mut facts = meta.facts;
        if question.no_config {
            facts.image.iter_mut().for_each(|i| i.config.clear());
        }
        Ok(facts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_see_one_name_however_a_source_is_written() {
        let check = |from: &str, to: &str| {
            let mut source = SourceOp { identifier: from.into(), attrs: Default::default() };
            normalize(&mut source);
            assert_eq!(source.identifier, to);
        };
        check("docker-image://busybox", "docker-image://docker.io/library/busybox:latest");
        check("docker-image://localhost:5000/x:1", "docker-image://localhost:5000/x:1");
        check("local://context", "local://context");
        check("git://h/u/r.git#main:../a/./b/", "git://h/u/r.git#main:a/b");
        check("git://h/u/r.git#main:..", "git://h/u/r.git#main");
        check("git://h/u/r.git#main", "git://h/u/r.git#main");
        check("docker-image://NO NAME", "docker-image://NO NAME");
    }
}
