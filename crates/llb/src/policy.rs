//! Rules that allow, deny or change sources (rows `so.pol*`): matching and rewriting, nothing else.
//!
//! Within one policy the last matching `ALLOW` or `DENY` wins, and the first rule that changes
//! something starts everything over with what it made. Expressions are Go's; the crate `regex`
//! speaks the same language and, as Go's, needs no more than linear time.

use crate::ops::SourceOp;
use regex::{Regex, RegexBuilder};
use shipway_fault::{Code, Fault};
use shipway_proto::moby::buildkit::v1::sourcepolicy as wire;
use std::{
    collections::BTreeMap,
    sync::{Arc, OnceLock},
};

/// A source that was changed this often is going in a circle.
const MAX_CHANGES: usize = 20;
/// More rules than this in one policy are refused.
const MAX_RULES: usize = 10_000;
/// More patterns than this in one policy are refused: each takes memory when it is compiled, and
/// the time of that.
const MAX_PATTERNS: usize = 1000;
/// Longest identifier that a rule changes, or makes. Each round of changes could double it.
const MAX_IDENTIFIER: usize = 8 << 10;
/// Memory of one compiled pattern; what takes more is refused.
const MAX_PATTERN: usize = 256 << 10;

/// Rules in the order in which they are tried. Clones share what was compiled.
#[derive(Clone, Debug, Default)]
pub struct SourcePolicy {
    rules: Arc<[Rule]>,
}

#[derive(Clone, Debug)]
struct Rule {
    action: Action,
    selector: Selector,
    constraints: Vec<Constraint>,
}

#[derive(Clone, Debug)]
enum Action {
    Allow,
    Deny,
    /// To this identifier, empty for the selector's, with these attributes.
    Convert(Option<(String, BTreeMap<String, String>)>),
}

#[derive(Clone, Debug)]
struct Selector {
    text: String,
    kind: wire::MatchType,
    pattern: OnceLock<Result<Regex, Fault>>,
}

#[derive(Clone, Debug)]
struct Constraint {
    key: String,
    value: String,
    condition: wire::AttrMatch,
    pattern: OnceLock<Result<Regex, Fault>>,
}

impl SourcePolicy {
    /// Takes a policy off the wire.
    pub fn from_pb(pb: wire::Policy) -> Result<Self, Fault> {
        if pb.rules.len() > MAX_RULES {
            return Err(Fault::invalid(format!(
                "a source policy of {} rules: at most {MAX_RULES} are accepted",
                pb.rules.len()
            )));
        }
        let rules: Arc<[Rule]> =
            pb.rules.into_iter().map(Rule::from_pb).collect::<Result<_, _>>()?;
        let patterns: usize = rules.iter().map(Rule::patterns).sum();
        if patterns > MAX_PATTERNS {
            return Err(Fault::invalid(format!(
                "a source policy of {patterns} patterns: at most {MAX_PATTERNS} are accepted"
            )));
        }
        Ok(Self { rules })
    }

    /// Whether it has nothing to say.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// Judges `source` once; whether it was changed.
    fn judge(&self, source: &mut SourceOp) -> Result<bool, Fault> {
        let mut denied = false;
        for rule in self.rules.iter() {
            if !rule.matches(source)? {
                continue;
            }
            match &rule.action {
                Action::Allow => denied = false,
                Action::Deny => denied = true,
                Action::Convert(None) => {
                    return Err(Fault::invalid(
                        "error mutating source policy: missing destination for convert rule",
                    ));
                }
                Action::Convert(Some((identifier, attrs))) => {
                    if rule.selector.convert(source, identifier, attrs)? {
                        return Ok(true);
                    }
                }
            }
        }
        if denied {
            return Err(Fault::new(
                Code::PermissionDenied,
                format!("source {:?} denied by policy: source denied by policy", source.identifier),
            ));
        }
        Ok(false)
    }
}

/// Judges `source` by all policies, changing it where they say so; whether it was changed.
pub fn evaluate(policies: &[SourcePolicy], source: &mut SourceOp) -> Result<bool, Fault> {
    let mut changes = 0;
    'again: loop {
        for policy in policies {
            if policy.judge(source)? {
                changes += 1;
                if changes > MAX_CHANGES {
                    return Err(Fault::invalid(
                        "too many mutations on a single source: too many operations",
                    ));
                }
                continue 'again;
            }
        }
        return Ok(changes > 0);
    }
}

impl Rule {
    fn from_pb(pb: wire::Rule) -> Result<Self, Fault> {
        let unknown = |what: &str, n: i32| {
            Fault::invalid(format!("invalid source policy: unknown {what} {n}"))
        };
        let selector =
            pb.selector.ok_or_else(|| Fault::invalid("invalid nil selector in policy"))?;
        let action = match wire::PolicyAction::try_from(pb.action)
            .map_err(|_| unknown("type", pb.action))?
        {
            wire::PolicyAction::Allow => Action::Allow,
            wire::PolicyAction::Deny => Action::Deny,
            wire::PolicyAction::Convert => {
                Action::Convert(pb.updates.map(|u| (u.identifier, u.attrs)))
            }
        };
        let constraint = |c: wire::AttrConstraint| {
            let condition = wire::AttrMatch::try_from(c.condition)
                .map_err(|_| unknown("attr condition", c.condition))?;
            Ok(Constraint { key: c.key, value: c.value, condition, pattern: OnceLock::new() })
        };
        Ok(Self {
            action,
            constraints: selector
                .constraints
                .into_iter()
                .map(constraint)
                .collect::<Result<_, Fault>>()?,
            selector: Selector {
                text: selector.identifier,
                kind: wire::MatchType::try_from(selector.match_type)
                    .map_err(|_| unknown("match type", selector.match_type))?,
                pattern: OnceLock::new(),
            },
        })
    }

    /// How many patterns it may have to compile.
    fn patterns(&self) -> usize {
        let own = match self.selector.kind {
            wire::MatchType::Exact => false,
            wire::MatchType::Wildcard => self.selector.text.contains('*'),
            wire::MatchType::Regex => true,
        };
        usize::from(own)
            + self.constraints.iter().filter(|c| c.condition == wire::AttrMatch::Matches).count()
    }

    fn matches(&self, source: &SourceOp) -> Result<bool, Fault> {
        for c in &self.constraints {
            let value = source.attrs.get(&c.key).map(String::as_str).unwrap_or_default();
            let holds = match c.condition {
                wire::AttrMatch::Equal => value == c.value,
                wire::AttrMatch::Notequal => value != c.value,
                wire::AttrMatch::Matches => c.pattern()?.is_match(value),
            };
            if !holds {
                return Ok(false);
            }
        }
        if self.selector.text == source.identifier {
            return Ok(true);
        }
        match self.selector.kind {
            wire::MatchType::Exact => Ok(false),
            // Without a star it is a name like any other.
            wire::MatchType::Wildcard if !self.selector.text.contains('*') => Ok(false),
            wire::MatchType::Regex | wire::MatchType::Wildcard => {
                Ok(self.selector.pattern()?.is_match(&source.identifier))
            }
        }
    }
}

fn compile(pattern: &str) -> Result<Regex, Fault> {
    let built =
        RegexBuilder::new(pattern).size_limit(MAX_PATTERN).dfa_size_limit(MAX_PATTERN).build();
    built.map_err(|e| {
        Fault::invalid(format!("error matching source policy: invalid regex {pattern:?}: {e}"))
    })
}

impl Constraint {
    fn pattern(&self) -> Result<&Regex, Fault> {
        self.pattern.get_or_init(|| compile(&self.value)).as_ref().map_err(Clone::clone)
    }
}

impl Selector {
    fn pattern(&self) -> Result<&Regex, Fault> {
        let made = self.pattern.get_or_init(|| match self.kind {
            wire::MatchType::Wildcard if self.text.contains("**") => Err(Fault::invalid(format!(
                "error matching source policy: failed to translate wildcard {:?} to regexp: invalid wildcard: \"**\"",
                self.text
            ))),
            wire::MatchType::Wildcard => compile(&format!("^{}$", regex::escape(&self.text).replace("\\*", "(.*)"))),
            _ => compile(&self.text),
        });
        made.as_ref().map_err(Clone::clone)
    }

    fn convert(
        &self,
        source: &mut SourceOp,
        identifier: &str,
        attrs: &BTreeMap<String, String>,
    ) -> Result<bool, Fault> {
        let target = if identifier.is_empty() { &self.text } else { identifier };
        let fits = |text: &str| {
            let too_long = || {
                Fault::invalid(format!(
                    "error mutating source policy: an identifier is longer than {MAX_IDENTIFIER} bytes"
                ))
            };
            if text.len() > MAX_IDENTIFIER { Err(too_long()) } else { Ok(()) }
        };
        fits(target)?;
        fits(&source.identifier)?;
        let to = match self.kind {
            wire::MatchType::Exact => target.to_owned(),
            wire::MatchType::Regex => {
                let (mut to, mut at) = (String::new(), 0);
                for captures in self.pattern()?.captures_iter(&source.identifier) {
                    let whole = captures.get_match();
                    to.push_str(&source.identifier[at..whole.start()]);
                    captures.expand(target, &mut to);
                    at = whole.end();
                    fits(&to)?;
                }
                to.push_str(&source.identifier[at..]);
                to
            }
            wire::MatchType::Wildcard => match self.pattern()?.captures(&source.identifier) {
                None => source.identifier.clone(),
                Some(captures) => {
                    let mut to = String::new();
                    captures.expand(target, &mut to);
                    to
                }
            },
        };
        fits(&to)?;
        let mut changed = false;
        if !to.is_empty() && source.identifier != to {
            source.identifier = to;
            changed = true;
        }
        for (key, value) in attrs {
            changed |= source.attrs.insert(key.clone(), value.clone()).as_ref() != Some(value);
        }
        Ok(changed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(
        action: wire::PolicyAction,
        kind: wire::MatchType,
        selector: &str,
        to: Option<&str>,
    ) -> wire::Rule {
        wire::Rule {
            action: action as i32,
            selector: Some(wire::Selector {
                identifier: selector.into(),
                match_type: kind as i32,
                constraints: Vec::new(),
            }),
            updates: to.map(|t| wire::Update { identifier: t.into(), attrs: BTreeMap::new() }),
        }
    }

    /// What becomes of `source`: its identifier, or the error.
    #[track_caller]
    fn check(rules: Vec<wire::Rule>, source: &str, expected: Result<&str, &str>) {
        let policy = SourcePolicy::from_pb(wire::Policy { version: 1, rules }).unwrap();
        let mut op = SourceOp { identifier: source.into(), attrs: BTreeMap::new() };
        match (evaluate(&[policy], &mut op), expected) {
            (Ok(_), Ok(identifier)) => assert_eq!(op.identifier, identifier),
            (Err(fault), Err(text)) => assert!(fault.to_string().contains(text), "{fault}"),
            (got, expected) => panic!("{got:?}, expected {expected:?}"),
        }
    }

    use wire::{MatchType::*, PolicyAction::*};

    #[test]
    fn the_last_matching_rule_wins() {
        let all = || rule(Deny, Wildcard, "*", None);
        check(vec![all()], "docker-image://x", Err("source \"docker-image://x\" denied by policy"));
        check(
            vec![all(), rule(Allow, Exact, "docker-image://x", None)],
            "docker-image://x",
            Ok("docker-image://x"),
        );
        check(
            vec![rule(Allow, Exact, "docker-image://x", None), all()],
            "docker-image://x",
            Err("denied"),
        );
        check(
            vec![rule(Deny, Regex, "^https?://.*evil", None)],
            "http://an.evil.host/",
            Err("denied"),
        );
    }

    #[test]
    fn a_change_may_use_what_matched() {
        let golang =
            |to| rule(Convert, Wildcard, "docker-image://docker.io/library/golang:*", Some(to));
        check(
            vec![golang("docker-image://mirror/golang:${1}-alpine")],
            "docker-image://docker.io/library/golang:1.19",
            Ok("docker-image://mirror/golang:1.19-alpine"),
        );
        check(
            vec![rule(Convert, Regex, "x:(.*)", Some("y:$1"))],
            "docker-image://x:3",
            Ok("docker-image://y:3"),
        );
        check(
            vec![rule(Convert, Exact, "a", Some("b")), rule(Deny, Exact, "b", None)],
            "a",
            Err("source \"b\" denied"),
        );
    }

    #[test]
    fn a_rule_may_ask_for_a_signature() {
        let source = "git://h/r.git#v1";
        let mut wanted = rule(Convert, Exact, source, Some(source));
        let signed = [("git.sig.pubkey", "ssh-ed25519 AAAA"), ("git.sig.requiresignedtag", "true")];
        let signed: BTreeMap<_, _> = signed.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        wanted.updates.as_mut().unwrap().attrs = signed.clone();
        let policy =
            SourcePolicy::from_pb(wire::Policy { version: 1, rules: vec![wanted] }).unwrap();
        let mut op = SourceOp {
            identifier: source.into(),
            attrs: [("git.sig.requiresignedtag".into(), "false".into())].into(),
        };
        assert!(evaluate(&[policy], &mut op).unwrap());
        assert_eq!((op.identifier.as_str(), op.attrs), (source, signed));
    }

    #[test]
    fn circles_and_broken_rules_are_errors() {
        check(
            vec![rule(Convert, Exact, "a", Some("b")), rule(Convert, Exact, "b", Some("a"))],
            "a",
            Err("too many mutations"),
        );
        check(vec![rule(Convert, Exact, "a", None)], "a", Err("missing destination"));
        check(vec![rule(Deny, Regex, "(", None)], "a", Err("invalid regex"));
        check(vec![rule(Deny, Wildcard, "a**", None)], "a", Err("invalid wildcard"));
        assert!(
            SourcePolicy::from_pb(wire::Policy { version: 1, rules: vec![wire::Rule::default()] })
                .is_err()
        );
    }

    #[test]
    fn what_a_rule_makes_of_an_identifier_is_limited() {
        let convert = |kind, selector: &str, to: &str| {
            let pb = wire::Policy {
                rules: vec![rule(wire::PolicyAction::Convert, kind, selector, Some(to))],
                ..Default::default()
            };
            let mut source =
                SourceOp { identifier: "docker-image://x".into(), ..Default::default() };
            evaluate(&[SourcePolicy::from_pb(pb).expect("a policy")], &mut source)
                .expect_err("too long")
                .to_string()
        };
        // Each round makes it longer by far.
        assert!(convert(wire::MatchType::Regex, ".*", &"$0".repeat(100)).contains("longer than"));
        assert!(convert(wire::MatchType::Regex, "", &"y".repeat(1000)).contains("longer than"));
    }

    #[test]
    fn patterns_are_limited_in_number_and_size() {
        let rule =
            |identifier: String, kind| rule(wire::PolicyAction::Deny, kind, &identifier, None);
        let policy = |rules| SourcePolicy::from_pb(wire::Policy { rules, ..Default::default() });
        let many = |text: &str, kind| {
            (0..=MAX_PATTERNS).map(|n| rule(format!("{text}{n}"), kind)).collect::<Vec<_>>()
        };
        assert!(
            policy(many("docker-image://a", wire::MatchType::Wildcard)).is_ok(),
            "names are not patterns"
        );
        assert!(policy(many("*", wire::MatchType::Wildcard)).is_err());
        assert!(policy(many("a", wire::MatchType::Regex)).is_err());
        let large = policy(vec![rule("(a{100}){100}{100}".into(), wire::MatchType::Regex)])
            .expect("a policy");
        let mut source = SourceOp { identifier: "docker-image://x".into(), ..Default::default() };
        let failed = evaluate(&[large], &mut source).expect_err("too large");
        assert!(failed.to_string().contains("size limit"), "{failed}");
    }
}
