//! Source policies as files: what a build may use, in the JSON that Go writes of its rules (rows
//! `so.pol*`, `ct.b.policy`).
//!
//! Stricter than Go: an unknown key is an error, as a rule with a mistyped condition would
//! allow what it was to deny.

use serde::Deserialize;
use shipway_fault::{Fault, Result};
use shipway_proto::moby::buildkit::v1::sourcepolicy as wire;
use std::{collections::BTreeMap, path::Path};

/// Largest file that is read.
pub const MAX_POLICY: u64 = 4 << 20;

/// Rules on what a build may use.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy(pub(crate) wire::Policy);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PolicyFile {
    #[serde(default, alias = "Version")]
    version: i64,
    #[serde(default, alias = "Rules")]
    rules: Vec<Rule>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    #[serde(default, alias = "Action")]
    action: Name,
    #[serde(alias = "Selector")]
    selector: Option<Selector>,
    #[serde(alias = "Updates")]
    updates: Option<Update>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Selector {
    #[serde(default, alias = "Identifier")]
    identifier: String,
    #[serde(default, alias = "matchType", alias = "MatchType")]
    match_type: Name,
    #[serde(default, alias = "Constraints")]
    constraints: Vec<Constraint>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Constraint {
    #[serde(default, alias = "Key")]
    key: String,
    #[serde(default, alias = "Value")]
    value: String,
    #[serde(default, alias = "Condition")]
    condition: Name,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Update {
    #[serde(default, alias = "Identifier")]
    identifier: String,
    #[serde(default, alias = "Attrs")]
    attrs: BTreeMap<String, String>,
}

/// One of a list of names, by name or number.
#[derive(Default, Deserialize)]
#[serde(untagged)]
enum Name {
    #[default]
    First,
    Text(String),
    Number(i32),
}

impl Name {
    /// The number by which the wire knows it.
    fn number(
        self,
        what: &str,
        of: impl Fn(&str) -> Option<i32>,
        known: impl Fn(i32) -> bool,
    ) -> Result<i32> {
        let (number, shown) = match self {
            Self::First => (Some(0), String::new()),
            Self::Text(text) => (of(&text), text),
            Self::Number(n) => (Some(n).filter(|n| known(*n)), n.to_string()),
        };
        number.ok_or_else(|| Fault::invalid(format!("invalid {what} value: {shown}")))
    }
}

impl Policy {
    /// Reads the file `path`.
    pub fn load(path: &Path) -> Result<Self> {
        use std::io::Read as _;
        let what = || format!("read the source policy {}", path.display());
        let file = std::fs::File::open(path).map_err(|e| Fault::io(what(), e))?;
        let mut text = Vec::new();
        file.take(MAX_POLICY + 1).read_to_end(&mut text).map_err(|e| Fault::io(what(), e))?;
        if text.len() as u64 > MAX_POLICY {
            return Err(Fault::invalid(format!(
                "{}: it is larger than {MAX_POLICY} bytes",
                what()
            )));
        }
        Self::parse(&text).map_err(|fault| fault.context(what()))
    }

    fn parse(text: &[u8]) -> Result<Self> {
        let file: PolicyFile =
            serde_json::from_slice(text).map_err(|e| Fault::invalid(e.to_string()))?;
        let rules = file.rules.into_iter().map(Rule::wire).collect::<Result<_>>()?;
        Ok(Self(wire::Policy { version: file.version, rules }))
    }
}

impl Rule {
    fn wire(self) -> Result<wire::Rule> {
        use wire::{AttrMatch, MatchType, PolicyAction};
        let constraint = |c: Constraint| {
            let of = |name: &str| AttrMatch::from_str_name(name).map(|v| v as i32);
            let condition =
                c.condition.number("AttrMatch", of, |n| AttrMatch::try_from(n).is_ok())?;
            Ok(wire::AttrConstraint { key: c.key, value: c.value, condition })
        };
        let selector = |s: Selector| {
            let of = |name: &str| MatchType::from_str_name(name).map(|v| v as i32);
            Ok::<_, Fault>(wire::Selector {
                identifier: s.identifier,
                match_type: s
                    .match_type
                    .number("MatchType", of, |n| MatchType::try_from(n).is_ok())?,
                constraints: s.constraints.into_iter().map(constraint).collect::<Result<_>>()?,
            })
        };
        let of = |name: &str| PolicyAction::from_str_name(name).map(|v| v as i32);
        Ok(wire::Rule {
            action: self
                .action
                .number("PolicyAction", of, |n| PolicyAction::try_from(n).is_ok())?,
            selector: self.selector.map(selector).transpose()?,
            updates: self
                .updates
                .map(|u| wire::Update { identifier: u.identifier, attrs: u.attrs }),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_read_as_go_writes_them() {
        let text = br#"{"version": 1, "rules": [
            {"action": "CONVERT", "selector": {"identifier": "a"}, "updates": {"identifier": "b", "attrs": {"k": "v"}}},
            {"selector": {"identifier": "h*", "match_type": 2, "constraints": [{"key": "x", "value": "y", "condition": "NOTEQUAL"}]}, "action": "DENY"},
            {"action": "ALLOW", "selector": {"identifier": "c", "matchType": "REGEX"}}]}"#;
        let policy = Policy::parse(text).expect("a policy").0;
        let actions: Vec<_> = policy
            .rules
            .iter()
            .map(|r| (r.action, r.selector.as_ref().map(|s| s.match_type)))
            .collect();
        let wanted = [
            (wire::PolicyAction::Convert as i32, Some(0)),
            (wire::PolicyAction::Deny as i32, Some(2)),
            (wire::PolicyAction::Allow as i32, Some(wire::MatchType::Regex as i32)),
        ];
        assert_eq!((policy.version, actions), (1, wanted.to_vec()));
        assert_eq!(
            policy.rules[1].selector.as_ref().expect("a selector").constraints[0].condition,
            wire::AttrMatch::Notequal as i32
        );
        assert_eq!(policy.rules[0].updates.as_ref().expect("an update").attrs["k"], "v");
    }

    #[test]
    fn what_nobody_would_read_is_an_error() {
        for (text, why) in [
            (r#"{"rule": []}"#, "unknown field `rule`"),
            (
                r#"{"rules": [{"selector": {"identifier": "a", "match": "REGEX"}}]}"#,
                "unknown field `match`",
            ),
            (r#"{"rules": [{"action": "FORBID"}]}"#, "invalid PolicyAction value: FORBID"),
            (r#"{"rules": [{"action": 9}]}"#, "invalid PolicyAction value: 9"),
            ("", "EOF"),
        ] {
            let fault = Policy::parse(text.as_bytes()).expect_err(text).to_string();
            assert!(fault.contains(why), "{fault}");
        }
        let dir = tempfile::tempdir().expect("a temporary directory");
        let file = dir.path().join("policy.json");
        std::fs::write(&file, vec![b' '; MAX_POLICY as usize + 1]).expect("write");
        assert!(Policy::load(&file).expect_err("too large").to_string().contains("larger than"));
    }
}
