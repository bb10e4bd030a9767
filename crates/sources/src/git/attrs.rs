//! A git source's identifier and attributes (rows `src.git.*`).

use super::{
    bundle::{self, Bundle},
    signed::WantSigned,
};
use crate::{
    SourceSpec, keys,
    login::{Login, split_login},
};
use shipway_fault::{Fault, Result, redact};
use shipway_gocompat::path::inside;
use shipway_oci::Digest;

/// Where SSH servers listen.
const SSH_PORT: u16 = 22;

/// A parsed git source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct GitSpec {
    /// Address that git is given, without what is secret in it.
    pub remote: String,
    /// User and password in the address, as an `Authorization` header has them.
    pub login: Option<Login>,
    /// The address as it may be shown.
    shown: String,
    /// Branch, tag or commit; empty for the default branch.
    pub reference: String,
    /// Directory within the repository, without slashes at its ends; empty for all.
    pub subdir: String,
    pub keep_git_dir: bool,
    pub header_secret: String,
    pub token_secret: String,
    /// Id of the client's SSH agent; empty for none.
    pub ssh_agent: String,
    pub known_hosts: String,
    /// What the commit or tag must begin with.
    pub checksum: String,
    pub skip_submodules: bool,
    /// HttpSource get the commit's time.
    pub commit_time: bool,
    /// Fetch the commit in `checksum` whatever the reference leads to.
    pub by_commit: bool,
    /// Where commits come from instead of the remote.
    pub bundle: Option<Bundle>,
    /// Make a bundle and no files.
    pub as_bundle: bool,
    /// Whose signature the commit or tag must have.
    pub signed: Option<WantSigned>,
}

impl GitSpec {
    pub(crate) fn parse(spec: &SourceSpec, locator: &str) -> Result<Self> {
        let (address, fragment) = locator.split_once('#').unwrap_or((locator, ""));
        let (reference, subdir) = fragment.split_once(':').unwrap_or((fragment, ""));
        let mut git =
            Self { reference: reference.into(), subdir: inside(subdir), ..Default::default() };
        git.set_remote(address)?;
        for (key, value) in &spec.attrs {
            let yes = value == "true";
            match key.as_str() {
                "git.keepgitdir" => git.keep_git_dir = yes,
                "git.fullurl" => git.set_remote(value.split('#').next().unwrap_or_default())?,
                "git.authheadersecret" => git.header_secret.clone_from(value),
                "git.authtokensecret" => git.token_secret.clone_from(value),
                "git.knownsshhosts" => git.known_hosts.clone_from(value),
                "git.mountsshsock" => git.ssh_agent.clone_from(value),
                "git.checksum" => git.checksum.clone_from(value),
                "git.skipsubmodules" => git.skip_submodules = yes,
                "git.mtime" => {
                    git.commit_time = match value.as_str() {
                        "" | "checkout" => false,
                        "commit" => true,
                        _ => {
                            return Err(Fault::invalid(format!(
                                "{key}={value:?} is wrong: want checkout or commit"
                            )));
                        }
                    }
                }
                "git.fetchbycommit" => git.by_commit = yes,
                "git.bundle" => git.bundle = Some(Bundle::parse(value, spec)?),
                "git.checkoutbundle" => git.as_bundle = yes,
                k => {
                    if let Some(what) = k.strip_prefix("git.sig.") {
                        git.signed.get_or_insert_default().take(what, value)?;
                    }
                }
            }
        }
        if git.reference.starts_with('-') || git.reference.chars().any(char::is_control) {
            return Err(Fault::invalid(format!("invalid git ref {:?}", git.reference)));
        }
        if !git.checksum.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(Fault::invalid(format!(
                "invalid git checksum {:?}: want hex characters",
                git.checksum
            )));
        }
        git.checksum.make_ascii_lowercase();
        if git.by_commit && !is_commit(&git.checksum) {
            return Err(Fault::invalid("git.fetchbycommit needs a whole commit in git.checksum"));
        }
        git.check_bundles()?;
        git.signed.as_ref().map_or(Ok(()), WantSigned::check)?;
        Ok(git)
    }

    /// Takes the remote's address apart.
    fn set_remote(&mut self, address: &str) -> Result<()> {
        let address = remote(address)?;
        self.shown = redact(&address);
        (self.remote, self.login) = split_login(&address);
        Ok(())
    }

    fn check_bundles(&self) -> Result<()> {
        if self.bundle.is_some() {
            if self.checksum.is_empty() {
                return Err(Fault::invalid("git.bundle requires git.checksum to be set"));
            }
            if self.reference.is_empty() && !is_commit(&self.checksum) {
                return Err(Fault::invalid(
                    "git.bundle without a reference needs a whole commit in git.checksum",
                ));
            }
        }
        for (bad, what) in
            [(self.keep_git_dir, "git.keepgitdir"), (!self.subdir.is_empty(), "git.subdir")]
        {
            if self.as_bundle && bad {
                return Err(Fault::invalid(format!(
                    "git.checkoutbundle is incompatible with {what}"
                )));
            }
        }
        Ok(())
    }

    /// The name of the one reference of the bundle that is to be made.
    pub(crate) fn bundle_name(&self) -> Option<String> {
        self.as_bundle.then(|| bundle::bundled_name(&self.reference))
    }

    /// The address as it may be shown.
    pub(crate) fn shown(&self) -> &str {
        &self.shown
    }

    /// Host and port that git connects to.
    pub(crate) fn endpoint(&self) -> (&str, u16) {
        let Some((scheme, rest)) = self.remote.split_once("://") else {
            let host = self.remote.split(':').next().unwrap_or_default();
            return (host.rsplit('@').next().unwrap_or_default(), SSH_PORT);
        };
        let authority = rest.split('/').next().unwrap_or_default();
        let host = authority.rsplit('@').next().unwrap_or_default();
        let usual = match scheme.to_lowercase().as_str() {
            "http" => 80,
            "git" => 9418,
            "ssh" => SSH_PORT,
            _ => 443,
        };
        match host.rsplit_once(':') {
            Some((name, port)) if !port.contains(']') => (name, port.parse().unwrap_or(usual)),
            _ => (host, usual),
        }
    }

    /// Host (and port) of the remote.
    pub(crate) fn host(&self) -> &str {
        let rest = self.remote.split_once("://").map_or(self.remote.as_str(), |(_, r)| r);
        let authority = rest.split('/').next().unwrap_or_default();
        authority.rsplit('@').next().unwrap_or_default()
    }

    /// Identity of what the remote is asked: where its reference leads, whatever is then made of
    /// it.
    pub(crate) fn tip_key(&self) -> Digest {
        if let Some(bundle) = &self.bundle {
            return keys::digest(
                "git.bundle.tip",
                &(&self.remote, &self.reference, &self.checksum, &bundle.0.digest),
            );
        }
        let commit = if self.by_commit { self.checksum.as_str() } else { "" };
        keys::digest("git.tip", &(&self.remote, &self.reference, commit))
    }
}

/// Whether `text` is a whole object name.
pub(crate) fn is_commit(text: &str) -> bool {
    matches!(text.len(), 40 | 64)
        && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// The address for git: with a scheme that is fit for strangers' addresses, or in the form
/// `user@host:path`.
fn remote(text: &str) -> Result<String> {
    let bad = |why: &str| Err(Fault::invalid(format!("invalid git remote: {why}")));
    if text.is_empty() || text.starts_with('-') || text.chars().any(|c| c.is_control() || c == ' ')
    {
        return bad("it is empty, or has characters that addresses cannot have");
    }
    match text.split_once("://") {
        Some((scheme, _))
            if matches!(scheme.to_lowercase().as_str(), "http" | "https" | "ssh" | "git") =>
        {
            Ok(text.to_owned())
        }
        Some((scheme, _)) => {
            bad(&format!("the scheme {scheme:?} is not one of http, https, ssh, git"))
        }
        None if is_scp(text) => Ok(text.to_owned()),
        None => Ok(format!("https://{text}")),
    }
}

/// `user@host:path`.
fn is_scp(text: &str) -> bool {
    let Some((user, rest)) = text.split_once('@') else { return false };
    let name = |s: &str| {
        !s.is_empty()
            && !s.starts_with('-')
            && s.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
    };
    name(user) && rest.split_once(':').is_some_and(|(host, path)| name(host) && !path.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use shipway_oci::Platform;
    use shipway_signing::Validity;

    fn parse(locator: &str, attrs: &[(&str, &str)]) -> Result<GitSpec> {
        let attrs = attrs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        GitSpec::parse(
            &SourceSpec {
                identifier: format!("git://{locator}"),
                attrs,
                platform: Platform::host(),
            },
            locator,
        )
    }

    #[test]
    fn locators_are_taken_apart() {
        for (locator, remote, reference, subdir, host) in [
            (
                "github.com/a/b.git#main:/x/../y/",
                "https://github.com/a/b.git",
                "main",
                "y",
                "github.com",
            ),
            ("https://u:p@h:8/a.git", "https://h:8/a.git", "", "", "h:8"),
            ("git@github.com:a/b.git#v1", "git@github.com:a/b.git", "v1", "", "github.com:a"),
            ("ssh://git@h/a#:sub", "ssh://git@h/a", "", "sub", "h"),
        ] {
            let git = parse(locator, &[]).unwrap();
            assert_eq!(
                (git.remote.as_str(), git.reference.as_str(), git.subdir.as_str()),
                (remote, reference, subdir),
                "{locator}"
            );
            assert!(git.host().starts_with(host.split(':').next().unwrap()), "{locator}");
        }
        for (locator, remote, login, shown) in [
            (
                "https://u:p%40@h/a.git",
                "https://h/a.git",
                Some("u:p@"),
                "https://xxxxx:xxxxx@h/a.git",
            ),
            ("https://t0k3n@h", "https://h", Some("t0k3n:"), "https://xxxxx@h"),
            ("u:p@h/a.git", "https://h/a.git", Some("u:p"), "https://xxxxx:xxxxx@h/a.git"),
            ("ssh://git:p@h/a", "ssh://git@h/a", None, "ssh://xxxxx:xxxxx@h/a"),
            ("https://h/a@b", "https://h/a@b", None, "https://h/a@b"),
        ] {
            let git = parse(locator, &[]).unwrap();
            let login =
                login.map(|l| Login(base64::Engine::encode(&base64::prelude::BASE64_STANDARD, l)));
            assert_eq!(
                (git.remote.as_str(), &git.login, git.shown()),
                (remote, &login, shown),
                "{locator}"
            );
            assert!(!format!("{git:?}").contains("t0k3n"), "{git:?}");
        }
        assert_eq!(parse("x", &[("git.fullurl", "http://h/a")]).unwrap().remote, "http://h/a");
        for (locator, endpoint) in [
            ("github.com/a/b.git#main", ("github.com", 443)),
            ("http://u:p@h:8/a.git", ("h", 8)),
            ("git@github.com:a/b.git", ("github.com", 22)),
            ("ssh://git@h/a", ("h", 22)),
            ("git://[::1]/a", ("[::1]", 9418)),
            ("https://[::1]:80/a", ("[::1]", 80)),
        ] {
            assert_eq!(parse(locator, &[]).unwrap().endpoint(), endpoint, "{locator}");
        }
    }

    #[test]
    fn what_could_turn_on_us_is_refused() {
        for bad in ["file:///etc", "ext::sh -c x", "--upload-pack=x", "h/a#-x", "https://h/a\n"] {
            assert!(parse(bad, &[]).is_err(), "{bad}");
        }
        assert!(parse("h/a", &[("git.fetchbycommit", "true"), ("git.checksum", "abc")]).is_err());
        assert!(parse("h/a", &[("git.checksum", "xyz")]).is_err());
    }

    #[test]
    fn signatures_are_wanted_with_a_key() {
        let parsed = |attrs: &[(&str, &str)]| parse("h/a#v1", attrs).map(|git| git.signed);
        assert_eq!(parsed(&[]).unwrap(), None);
        let want = parsed(&[
            ("git.sig.pubkey", "k"),
            ("git.sig.rejectexpired", "true"),
            ("git.sig.requiresignedtag", "true"),
        ])
        .unwrap();
        let expected = WantSigned {
            keys: "k".into(),
            validity: Validity::Now,
            require_tag: true,
            ignore_tag: false,
        };
        assert_eq!(want, Some(expected.clone()));
        let want = parsed(&[
            ("git.sig.pubkey", "k"),
            ("git.sig.rejectexpired", "false"),
            ("git.sig.ignoresignedtag", "true"),
        ])
        .unwrap();
        assert_eq!(
            want,
            Some(WantSigned {
                validity: Validity::AtSigning,
                require_tag: false,
                ignore_tag: true,
                ..expected
            })
        );
        for (attr, why) in [
            ("git.sig.requiresignedtag", "needs git.sig.pubkey"),
            ("git.sig.pubkeys", "git.sig.pubkeys"),
        ] {
            let fault = parsed(&[(attr, "true")]).unwrap_err();
            assert!(fault.to_string().contains(why), "{fault}");
        }
    }

    #[test]
    fn bundles_have_a_place_and_a_checksum() {
        let sha = "a".repeat(40);
        let blob = format!("127.0.0.1:5/foo/bundle@{}", Digest::of("x"));
        let check = |locator: &str, attrs: &[(&str, &str)], expected: &str| {
            let found = parse(locator, attrs);
            match found {
                Ok(git) => assert_eq!(
                    (git.bundle.map(|b| format!("{} {:?}", b.0.name, b.0.store)))
                        .unwrap_or_default(),
                    expected
                ),
                Err(fault) => {
                    assert!(fault.to_string().contains(expected) && !expected.is_empty(), "{fault}")
                }
            }
        };
        let (image, layout) = (
            format!("docker-image+blob://{blob}"),
            format!("oci-layout+blob://not/real@{}", Digest::of("x")),
        );
        check(
            "h/a#main",
            &[("git.bundle", &image), ("git.checksum", &sha)],
            &format!("{blob} None"),
        );
        let named = format!("docker.io/not/real@{} ", Digest::of("x"));
        check(
            "h/a",
            &[("git.bundle", &layout), ("git.checksum", &sha)],
            &format!("{named}Some((\"not/real\", None))"),
        );
        let more = [
            ("git.bundle", layout.as_str()),
            ("git.checksum", &sha),
            ("oci.store", "s"),
            ("oci.session", "i"),
        ];
        check("h/a", &more, &format!("{named}Some((\"s\", Some(SessionId(\"i\"))))"));
        check("h/a#main", &[("git.bundle", &image)], "git.bundle requires git.checksum to be set");
        check("h/a", &[("git.bundle", &image), ("git.checksum", "abc")], "needs a whole commit");
        check(
            "h/a#main",
            &[("git.bundle", "docker-image+blob://h/a:1"), ("git.checksum", &sha)],
            "invalid digest",
        );
        check(
            "h/a#main",
            &[("git.bundle", &format!("http://{blob}")), ("git.checksum", &sha)],
            "scheme \"http\" is not supported",
        );
        check("h/a#main", &[("git.bundle", &blob), ("git.checksum", &sha)], "missing scheme");
        check(
            "h/a#main",
            &[("git.checkoutbundle", "true"), ("git.keepgitdir", "true")],
            "incompatible with git.keepgitdir",
        );
        check("h/a#main:x", &[("git.checkoutbundle", "true")], "incompatible with git.subdir");
        for (reference, name) in [
            ("", "main"),
            (&*sha, "main"),
            ("v1", "v1"),
            ("refs/heads/x", "x"),
            ("heads/x/y", "x/y"),
        ] {
            let git =
                parse(&format!("h/a#{reference}"), &[("git.checkoutbundle", "true")]).unwrap();
            assert_eq!(git.bundle_name(), Some(format!("refs/heads/{name}")));
        }
        assert_eq!(
            parse("h/a#refs/tags/v1", &[("git.checkoutbundle", "true")])
                .unwrap()
                .bundle_name()
                .as_deref(),
            Some("refs/tags/v1")
        );
    }
}
