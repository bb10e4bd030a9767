//! Policies: whom they are about, and what they allow.

use crate::Identity;
use serde::Deserialize;
use shipway_fault::{Fault, Result};
use shipway_oci::{ImageName, pattern};
use std::{collections::BTreeMap, fmt};

/// Patterns, of which one has to match; `*` stands for anything, slashes included.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(from = "OneOrMore")]
pub struct Patterns(Vec<String>);

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    One(String),
    More(Vec<String>),
}

impl From<OneOrMore> for Patterns {
    fn from(patterns: OneOrMore) -> Self {
        match patterns {
            OneOrMore::One(pattern) => Self(vec![pattern]),
            OneOrMore::More(patterns) => Self(patterns),
        }
    }
}

impl Patterns {
    /// These patterns.
    pub fn new<'a>(patterns: impl IntoIterator<Item = &'a str>) -> Self {
        Self(patterns.into_iter().map(str::to_owned).collect())
    }

    fn matches(&self, text: &str) -> bool {
        self.0.iter().any(|p| pattern::matches(p, text))
    }

    /// Whether they match an image by its whole name, or by the name of its repository. A name
    /// that is not one of an image is taken as it is.
    fn match_image(&self, name: &str) -> bool {
        match name.parse::<ImageName>() {
            Ok(image) => self.matches(&image.to_string()) || self.matches(&image.locator()),
            Err(_) => self.matches(name),
        }
    }
}

/// A rule of `[[auth.policy]]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    /// What it is called in the log and in errors.
    pub name: String,
    /// Names of identities.
    pub subject: Patterns,
    /// Claims that identities must have, each with a value that matches.
    pub claims: BTreeMap<String, Patterns>,
    /// What it allows.
    pub allow: Allow,
}

/// What a policy allows.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Allow {
    /// To build, with results for the client's own directories.
    pub build: bool,
    /// To prune, to see what takes disk space, and to see and change the history of others.
    pub admin: bool,
    /// Entitlements that builds may be granted.
    pub entitlements: Patterns,
    /// Images that builds may be made from.
    pub pull: Patterns,
    /// Images that may be pushed.
    pub push: Patterns,
    /// Names of images that may be stored in containerd.
    pub store: Patterns,
    /// Further namespaces that images may be published to.
    pub namespaces: Patterns,
    /// Caches that may be read.
    #[serde(rename = "cacheImport")]
    pub cache_import: Patterns,
    /// Caches that may be written.
    #[serde(rename = "cacheExport")]
    pub cache_export: Patterns,
}

impl Default for Allow {
    fn default() -> Self {
        Self {
            build: true,
            admin: false,
            entitlements: Patterns::default(),
            pull: Patterns::new(["*"]),
            push: Patterns::default(),
            store: Patterns::default(),
            namespaces: Patterns::default(),
            cache_import: Patterns::default(),
            cache_export: Patterns::default(),
        }
    }
}

/// What a caller wants to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action<'a> {
    /// To use the daemon at all: to ask what it is, and about builds of one's own.
    Ask,
    /// To build.
    Build,
    /// To do what concerns others, in words: `prune`.
    Administer(&'a str),
    /// To have builds granted an entitlement.
    Entitlement(&'a str),
    /// To build from an image.
    Pull(&'a str),
    /// To push an image.
    Push(&'a str),
    /// To give an image in containerd a name.
    Store(&'a str),
    /// To publish images to another namespace of containerd.
    Publish(&'a str),
    /// To read a cache, by its kind and place: `registry:example.org/cache:main`.
    ImportCache(&'a str),
    /// To write a cache.
    ExportCache(&'a str),
}

impl Action<'_> {
    /// What allows it, as configured: the key, and the value where there is one.
    pub(crate) fn wanted(&self) -> (&'static str, String) {
        let list = |text: &str| format!("[{text:?}]");
        match self {
            Self::Ask => ("build", "true".to_owned()),
            Self::Build => ("build", "true".to_owned()),
            Self::Administer(_) => ("admin", "true".to_owned()),
            Self::Entitlement(name) => ("entitlements", list(name)),
            Self::Pull(name) => ("pull", list(name)),
            Self::Push(name) => ("push", list(name)),
            Self::Store(name) => ("store", list(name)),
            Self::Publish(name) => ("namespaces", list(name)),
            Self::ImportCache(place) => ("cacheImport", list(place)),
            Self::ExportCache(place) => ("cacheExport", list(place)),
        }
    }
}

impl fmt::Display for Action<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ask => write!(f, "use this daemon"),
            Self::Build => write!(f, "build"),
            Self::Administer(what) => write!(f, "{what}"),
            Self::Entitlement(name) => write!(f, "use the entitlement {name}"),
            Self::Pull(name) => write!(f, "build from the image {name}"),
            Self::Push(name) => write!(f, "push the image {name}"),
            Self::Store(name) => write!(f, "store an image as {name}"),
            Self::Publish(name) => write!(f, "publish images to the namespace {name}"),
            Self::ImportCache(place) => write!(f, "import the cache {place}"),
            Self::ExportCache(place) => write!(f, "export a cache to {place}"),
        }
    }
}

impl Policy {
    /// Refuses one that cannot apply to anybody.
    pub fn check(&self) -> Result<()> {
        if self.name.is_empty() {
            return Err(Fault::invalid("a policy has no name")
                .hint("the log says by it which policy allowed what: name = \"…\""));
        }
        if self.subject.0.is_empty() && self.claims.is_empty() {
            return Err(Fault::invalid(format!("the policy {:?} applies to nobody", self.name))
                .hint("name identities with subject = [\"…\"], or claims that they must have; subject = \"*\" is everybody"));
        }
        Ok(())
    }

    /// Whether it is about `identity`.
    pub(crate) fn applies_to(&self, identity: &Identity) -> bool {
        let has = |(key, patterns): (&String, &Patterns)| {
            identity.claim(key).into_iter().any(|value| patterns.matches(value))
        };
        let named = self.subject.0.is_empty() || self.subject.matches(identity.name());
        let found = !self.subject.0.is_empty() || !self.claims.is_empty();
        found && named && self.claims.iter().all(has)
    }

    pub(crate) fn allows(&self, action: &Action<'_>) -> bool {
        let Allow {
            build,
            admin,
            entitlements,
            pull,
            push,
            store,
            namespaces,
            cache_import,
            cache_export,
        } = &self.allow;
        match action {
            Action::Ask => true,
            Action::Build => *build,
            Action::Administer(_) => *admin,
            Action::Entitlement(name) => entitlements.matches(name),
            Action::Pull(name) => pull.match_image(name),
            Action::Push(name) => push.match_image(name),
            Action::Store(name) => store.match_image(name),
            Action::Publish(name) => namespaces.matches(name),
            Action::ImportCache(place) => cache_import.matches(place),
            Action::ExportCache(place) => cache_export.matches(place),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::IdentityKind;

    fn identity(name: &str, claims: &[(&str, &[&str])]) -> Identity {
        let claims = claims.iter().map(|(key, values)| {
            ((*key).to_owned(), values.iter().map(|v| (*v).to_owned()).collect())
        });
        Identity::new(IdentityKind::Oidc, name.to_owned(), claims.collect()).unwrap()
    }

    fn policy(text: &str) -> Policy {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn a_policy_is_about_those_who_have_the_name_and_all_claims() {
        let both = policy(
            "name = 'p'\nsubject = 'github:*'\nclaims = { repository = ['org/a', 'org/b'], ref = 'refs/heads/*' }",
        );
        let claims: &[(&str, &[&str])] =
            &[("repository", &["org/b"]), ("ref", &["refs/heads/main"])];
        assert!(both.applies_to(&identity("github:x", claims)));
        assert!(!both.applies_to(&identity("gitlab:x", claims)));
        assert!(!both.applies_to(&identity("github:x", &claims[..1])));
        let other: &[(&str, &[&str])] =
            &[("repository", &["org/bb"]), ("ref", &["refs/heads/main"])];
        assert!(!both.applies_to(&identity("github:x", other)));
        let kind = policy("name = 'k'\nclaims = { kind = 'oidc' }");
        assert!(kind.applies_to(&identity("anybody", &[])));
        // Neither a name nor a claim is nobody, and not everybody.
        assert!(!Policy::default().applies_to(&identity("x", &[])));
    }

    #[test]
    fn policies_that_apply_to_nobody_are_refused() {
        policy("name = 'p'\nsubject = '*'").check().unwrap();
        policy("name = 'p'\nclaims = { uid = '0' }").check().unwrap();
        let said = |text| policy(text).check().unwrap_err().to_string();
        assert!(said("name = 'p'").contains("applies to nobody"));
        assert!(said("subject = '*'").contains("no name"));
        assert!(toml::from_str::<Policy>("name = 'p'\nallow = { everything = true }").is_err());
    }

    #[test]
    fn what_is_not_named_is_not_allowed() {
        let none = policy("name = 'p'\nsubject = '*'");
        let all = [
            Action::Administer("prune"),
            Action::Entitlement("network.host"),
            Action::Push("example.org/a"),
            Action::Store("example.org/a"),
            Action::Publish("k8s.io"),
            Action::ImportCache("registry:example.org/c"),
            Action::ExportCache("registry:example.org/c"),
        ];
        for action in all {
            assert!(!none.allows(&action), "{action}");
        }
        for action in [Action::Ask, Action::Build, Action::Pull("busybox")] {
            assert!(none.allows(&action), "{action}");
        }
        let admin = policy("name = 'a'\nsubject = '*'\nallow = { admin = true, build = false }");
        assert!(admin.allows(&Action::Administer("prune")) && !admin.allows(&Action::Build));
        let some = policy(
            "name = 's'\nsubject = '*'\n[allow]\nentitlements = 'network.*'\npush = 'example.org/team/*'\n\
             pull = ['docker.io/library/*', 'example.org/base']\nstore = 'team/*'\ncacheExport = 's3:*/team/*'",
        );
        let check =
            |action: Action<'_>, want: bool| assert_eq!(some.allows(&action), want, "{action}");
        check(Action::Entitlement("network.host"), true);
        check(Action::Entitlement("security.insecure"), false);
        check(Action::Push("example.org/team/app:1"), true);
        check(Action::Push("example.org/teams/app:1"), false);
        // Names are completed before they are compared, as they are when they are used.
        check(Action::Pull("busybox"), true);
        check(Action::Pull("docker.io/other/busybox"), false);
        check(Action::Pull("example.org/base:7"), true);
        check(Action::Pull("example.org/base/x:7"), false);
        check(Action::Store("team/app"), false);
        check(Action::Store("NO NAME"), false);
        check(Action::ExportCache("s3:https://s3.test/bucket/team/main"), true);
        check(Action::ImportCache("s3:https://s3.test/bucket/team/main"), false);
    }
}
