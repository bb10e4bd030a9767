//! Callers, and the one place where it is decided what they may do.

use crate::{Action, Identity, Policy, identity::unauthenticated};
use shipway_fault::{Code, Fault, Result};
use shipway_telemetry::meter;
use std::sync::Arc;

/// Who asked for something, and what they may do. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Caller {
    /// Nothing where the daemon asks nobody who they are.
    known: Option<Arc<Known>>,
    /// The build that is asked for.
    build: Option<Arc<str>>,
}

#[derive(Debug)]
struct Known {
    identity: Identity,
    name: Arc<str>,
    /// Those that apply.
    policies: Vec<Arc<Policy>>,
}

/// The caller of a daemon without `[auth]`.
impl Default for Caller {
    fn default() -> Self {
        Self::unrestricted()
    }
}

impl Caller {
    /// The caller of a daemon without `[auth]`, who may do everything.
    pub const fn unrestricted() -> Self {
        Self { known: None, build: None }
    }

    /// `identity`, to whom `policies` apply.
    pub(crate) fn new(identity: Identity, policies: Vec<Arc<Policy>>) -> Self {
        let name = identity.name().into();
        Self { known: Some(Arc::new(Known { identity, name, policies })), build: None }
    }

    /// The caller of a request, as the daemon's listener has put it among the request's extensions.
    /// A request without one came by another way, and is refused.
    pub fn of(extensions: &http::Extensions) -> Result<&Self> {
        extensions.get().ok_or_else(|| Fault::internal("a request came without its caller"))
    }

    /// The same, asking for the build `id`.
    #[must_use]
    pub fn in_build(&self, id: &str) -> Self {
        Self { known: self.known.clone(), build: self.known.as_ref().map(|_| id.into()) }
    }

    /// Whether there is anything that the caller may not do.
    pub fn is_restricted(&self) -> bool {
        self.known.is_some()
    }

    /// The name of the identity, which what the caller makes belongs to; none where all is
    /// everybody's.
    pub fn owner(&self) -> Option<&Arc<str>> {
        self.known.as_ref().map(|known| &known.name)
    }

    /// Whether the caller may see what belongs to `owner`: their own, or everything.
    pub fn sees(&self, owner: Option<&str>) -> bool {
        match &self.known {
            None => true,
            Some(known) => {
                owner == Some(&*known.name)
                    || known.policies.iter().any(|p| p.allows(&Action::Administer("")))
            }
        }
    }

    /// Whether the caller is the one that `owner` is the name of.
    pub fn owns(&self, owner: Option<&str>) -> bool {
        self.known.as_ref().is_none_or(|known| owner == Some(&*known.name))
    }

    /// Decides whether the caller may do `action`, notes that in the log and counts it.
    pub fn check(&self, action: Action<'_>) -> Result<()> {
        self.decide(action, false)
    }

    /// [`check`](Self::check) of what is asked again and again, such as each call of a build that
    /// was allowed: in the log only when it is refused, or at level `debug`.
    pub fn check_again(&self, action: Action<'_>) -> Result<()> {
        self.decide(action, true)
    }

    fn decide(&self, action: Action<'_>, again: bool) -> Result<()> {
        let Some(known) = &self.known else { return Ok(()) };
        let (who, kind) = (&*known.name, known.identity.kind().as_str());
        let build = self.build.as_deref();
        let (key, value) = action.wanted();
        if let Some(policy) = known.policies.iter().find(|p| p.allows(&action)) {
            meter::AUTH_ALLOWED.add(1);
            if again {
                tracing::debug!(target: "audit", who, kind, action = key, what = %action, build, policy = policy.name, "allowed");
            } else {
                tracing::info!(target: "audit", who, kind, action = key, what = %action, build, policy = policy.name, "allowed");
            }
            return Ok(());
        }
        let names: Vec<&str> = known.policies.iter().map(|p| p.name.as_str()).collect();
        let names = names.join(", ");
        meter::AUTH_DENIED.add(1);
        tracing::warn!(target: "audit", who, kind, action = key, what = %action, build, policies = names, "denied");
        let fault = Fault::new(Code::PermissionDenied, format!("{who} may not {action}"));
        Err(match known.policies.is_empty() {
            true => fault.hint(format!(
                "no [[auth.policy]] of the daemon's configuration applies to {who}: one with subject = {who:?} would"
            )),
            false => fault.hint(format!(
                "none of the policies that apply ({names}) allows it: `allow` of one of them needs {key} = {value}, or a pattern like it"
            )),
        })
    }
}

/// Notes that somebody was not recognized, and counts it.
pub(crate) fn not_recognized(peer: &str, why: &Fault) {
    meter::AUTH_UNKNOWN.add(1);
    tracing::warn!(target: "audit", peer, why = %why, "not recognized");
}

/// A fault for somebody who shows nothing to be recognized by.
pub(crate) fn nobody(hint: String) -> Fault {
    unauthenticated("this daemon wants to know who calls").hint(hint)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Allow, IdentityKind, Patterns};
    use parking_lot::Mutex;
    use std::collections::BTreeMap;

    fn caller(name: &str, allow: Option<Allow>) -> Caller {
        let identity =
            Identity::new(IdentityKind::Local, name.to_owned(), BTreeMap::new()).unwrap();
        let policy = |allow| {
            let subject = Patterns::new([name]);
            Arc::new(Policy { name: "rule".into(), subject, allow, ..Policy::default() })
        };
        Caller::new(identity, allow.map(policy).into_iter().collect())
    }

    #[test]
    fn a_refusal_names_who_what_and_the_missing_rule() {
        let fault = caller("unix:7", Some(Allow::default()))
            .check(Action::Push("example.org/a:1"))
            .unwrap_err();
        assert_eq!(fault.code(), Code::PermissionDenied);
        assert_eq!(fault.to_string(), "unix:7 may not push the image example.org/a:1");
        let hint = fault.hints().next().unwrap();
        assert!(
            hint.contains("(rule)") && hint.contains(r#"push = ["example.org/a:1"]"#),
            "{hint}"
        );
        let fault = caller("unix:7", None).check(Action::Ask).unwrap_err();
        assert!(fault.hints().any(|h| h.contains(r#"subject = "unix:7""#)), "{fault:?}");
    }

    #[test]
    fn what_belongs_to_others_is_seen_by_administrators() {
        let ann = caller("ann", Some(Allow::default()));
        let admin = caller("root", Some(Allow { admin: true, ..Allow::default() }));
        assert!(ann.sees(Some("ann")) && !ann.sees(Some("bob")) && !ann.sees(None));
        assert!(admin.sees(Some("ann")) && admin.sees(None) && !admin.owns(Some("ann")));
        assert!(ann.owns(Some("ann")) && !ann.owns(Some("bob")) && !ann.owns(None));
        let all = Caller::unrestricted();
        assert!(all.sees(None) && all.sees(Some("ann")) && all.owns(None) && all.owner().is_none());
        all.check(Action::Administer("prune")).unwrap();
        assert_eq!(ann.owner().map(|o| &**o), Some("ann"));
    }

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn every_decision_is_in_the_log() {
        let lines = Lines::default();
        let writer = lines.clone();
        let log = tracing_subscriber::fmt().json().with_writer(move || writer.clone()).finish();
        tracing::subscriber::with_default(log, || {
            let ann = caller("ann", Some(Allow::default())).in_build("b1");
            let (before, denied) = (meter::AUTH_ALLOWED.get(), meter::AUTH_DENIED.get());
            ann.check(Action::Build).unwrap();
            ann.check_again(Action::Build).unwrap();
            ann.check(Action::Push("example.org/a")).unwrap_err();
            Caller::unrestricted().check(Action::Build).unwrap();
            // Other tests count, too.
            assert!(meter::AUTH_ALLOWED.get() >= before + 2 && meter::AUTH_DENIED.get() > denied);
        });
        let text = String::from_utf8(lines.0.lock().clone()).unwrap();
        let lines: Vec<serde_json::Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 2, "{text}");
        let shown = |n: usize, field: &str| lines[n]["fields"][field].as_str().unwrap_or_default();
        assert_eq!(lines[0]["target"], "audit");
        let fields = |n| {
            ["message", "who", "kind", "action", "what", "build", "policy", "policies"]
                .map(|f| shown(n, f))
        };
        assert_eq!(fields(0), ["allowed", "ann", "unix", "build", "build", "b1", "rule", ""]);
        assert_eq!(
            fields(1),
            ["denied", "ann", "unix", "push", "push the image example.org/a", "b1", "", "rule"]
        );
    }
}
