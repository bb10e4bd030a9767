//! The small languages of `--output`, `--cache-to`, `--secret`, `--ssh` and their like, common to
//! both personas.

use std::{
    collections::BTreeMap,
    io::IsTerminal,
    path::{Path, PathBuf},
};

use shipway_cachemounts::{Direction, Request};
use shipway_client::{
    AuthTls, CacheEntry, Export, FileTarget, SecretSource, Secrets, SshAgents, Target,
};
use shipway_fault::{Fault, Result, nearest};
use shipway_gocompat::parse_bool;
use shipway_oci::NetworkName;

use crate::csv;

/// Exporters whose names we know; a daemon may know more.
const EXPORTERS: [&str; 5] = ["image", "local", "tar", "oci", "docker"];

/// What a value of `--output` asks for, once it has a type.
pub(crate) fn export(kind: String, mut attrs: BTreeMap<String, String>) -> Result<Export> {
    if let Some(value) = attrs.get("output") {
        return Err(Fault::invalid(format!(
            "output={value} not supported for --output, you meant dest={value}?"
        )));
    }
    let dest = attrs.get("dest").cloned().unwrap_or_default();
    let target =
        target(&kind, &dest, &attrs).map_err(|fault| fault.context("invalid output option"))?;
    if target != Target::None {
        attrs.remove("dest");
    }
    Ok(Export { kind, attrs, target })
}

fn target(kind: &str, dest: &str, attrs: &BTreeMap<String, String>) -> Result<Target> {
    let directory = || {
        let lacking = || {
            Fault::invalid(format!("output directory is required for {kind} exporter"))
                .hint("name it with dest=<path>")
        };
        if dest.is_empty() { Err(lacking()) } else { Ok(PathBuf::from(dest)) }
    };
    match kind {
        "local" => {
            let delete = match attrs.get("mode").map(|m| m.trim().to_lowercase()).as_deref() {
                None | Some("" | "copy") => false,
                Some("delete") => true,
                Some(other) => {
                    return Err(Fault::invalid(format!("invalid local exporter mode {other:?}"))
                        .hint("it is copy or delete"));
                }
            };
            Ok(Target::Dir { path: directory()?, delete })
        }
        "oci" | "docker" if attrs.get("tar").and_then(|v| parse_bool(v)) == Some(false) => {
            Ok(Target::Layout(directory()?))
        }
        "tar" | "oci" | "docker" => file(kind, dest),
        _ if !dest.is_empty() => {
            Err(Fault::invalid(format!("output {dest} is not supported by {kind} exporter")))
        }
        "image" => Ok(Target::None),
        other => match nearest(other, EXPORTERS) {
            Some(near) => Err(Fault::invalid(format!("unknown exporter {other:?}"))
                .hint(format!("did you mean type={near}?"))),
            None => Ok(Target::None),
        },
    }
}

fn file(kind: &str, dest: &str) -> Result<Target> {
    if !dest.is_empty() && dest != "-" {
        if Path::new(dest).is_dir() {
            return Err(Fault::invalid(format!("destination file is a directory: {dest}")));
        }
        return Ok(Target::File(FileTarget::Path(dest.into())));
    }
    if std::io::stdout().is_terminal() {
        return Err(Fault::invalid(format!(
            "output file is required for {kind} exporter. refusing to write to console"
        ))
        .hint("name a file with dest=<path>, or redirect standard output"));
    }
    Ok(Target::File(FileTarget::Stdout))
}

/// A value of `--output` that names its type.
pub(crate) fn typed_output(text: &str) -> Result<Export> {
    let (kind, attrs) = csv::kind(text, "--output")?;
    export(kind, attrs)
}

/// A value of `--export-cache` or `--import-cache`; a bare name is a registry's reference.
pub(crate) fn cache(text: &str, flag: &str, export: bool) -> Result<CacheEntry> {
    let (kind, mut attrs) = typed_or_reference(text, flag)?;
    if kind == "registry" && attrs.get("ref").is_none_or(String::is_empty) {
        return Err(Fault::invalid(format!(
            "{flag}: a cache of type registry requires ref=<name>"
        )));
    }
    if export {
        attrs.entry("mode".to_owned()).or_insert_with(|| "min".to_owned());
    }
    let env = |name: &str| std::env::var(name).ok();
    match kind.as_str() {
        "gha" => github(&mut attrs, env)?,
        "s3" => amazon(&mut attrs, env),
        _ => {}
    }
    Ok(CacheEntry { kind, attrs })
}

/// The keys to a bucket that the environment has, unless some are given; without any, the daemon
/// has its own.
fn amazon(attrs: &mut BTreeMap<String, String>, env: impl Fn(&str) -> Option<String>) {
    let env = |name: &str| env(name).filter(|value| !value.is_empty());
    let named = ["access_key_id", "secret_access_key", "session_token"];
    if named.iter().any(|key| attrs.contains_key(*key)) {
        return;
    }
    // Half of a pair opens nothing, and would keep the daemon from using its own.
    if let (Some(id), Some(secret)) = (env("AWS_ACCESS_KEY_ID"), env("AWS_SECRET_ACCESS_KEY")) {
        attrs.insert("access_key_id".to_owned(), id);
        attrs.insert("secret_access_key".to_owned(), secret);
        if let Some(token) = env("AWS_SESSION_TOKEN") {
            attrs.insert("session_token".to_owned(), token);
        }
    }
}

/// What a GitHub runner's environment says of its cache (row `rc.gha.env`): address, token and
/// version, unless they are given.
fn github(
    attrs: &mut BTreeMap<String, String>,
    env: impl Fn(&str) -> Option<String>,
) -> Result<()> {
    let second = attrs.get("version").map(String::as_str) == Some("2")
        || env("ACTIONS_CACHE_SERVICE_V2").and_then(|v| parse_bool(&v)).unwrap_or(false);
    let mut fill = |key: &str, value: Option<String>| {
        if let Some(value) = value {
            attrs.entry(key.to_owned()).or_insert(value);
        }
    };
    if second {
        fill("url_v2", env("ACTIONS_RESULTS_URL"));
    }
    fill("url", env("ACTIONS_CACHE_URL").or_else(|| env("ACTIONS_RESULTS_URL")));
    fill("token", env("ACTIONS_RUNTIME_TOKEN"));
    if !attrs.contains_key("url") && !attrs.contains_key("url_v2") {
        return Err(Fault::invalid("cache with type gha requires url parameter to be set"));
    }
    if !attrs.contains_key("token") {
        return Err(Fault::invalid(
            "cache with type gha requires token parameter or $ACTIONS_RUNTIME_TOKEN",
        ));
    }
    Ok(())
}

/// A value of `--cache-mount-to` or `--cache-mount-from`; a bare name is a registry's reference.
pub(crate) fn cache_mounts(
    text: &str,
    flag: &str,
    direction: Direction,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<CacheEntry> {
    let (kind, mut attrs) = typed_or_reference(text, flag)?;
    if kind == "s3" {
        amazon(&mut attrs, env);
    }
    Request::of(&kind, &attrs, direction).map_err(|fault| fault.context(flag.to_owned()))?;
    Ok(CacheEntry { kind, attrs })
}

/// A type with attributes; a bare name is the reference of something in a registry.
fn typed_or_reference(text: &str, flag: &str) -> Result<(String, BTreeMap<String, String>)> {
    if text.contains("type=") {
        csv::kind(text, flag)
    } else if text.contains('=') && !text.contains('@') {
        Err(Fault::invalid(format!("{flag} requires type=<type>")))
    } else {
        Ok(("registry".to_owned(), BTreeMap::from([("ref".to_owned(), text.to_owned())])))
    }
}

/// Values of `--secret`.
pub(crate) fn secrets(texts: &[String]) -> Result<Secrets> {
    let mut secrets = Secrets::default();
    for text in texts {
        secret(&mut secrets, text).map_err(|fault| fault.context(format!("--secret {text}")))?;
    }
    Ok(secrets)
}

fn secret(secrets: &mut Secrets, text: &str) -> Result<()> {
    let (mut id, mut file, mut env, mut from_env) = (String::new(), None, None, false);
    for (key, value) in csv::attributes(text)? {
        match key.as_str() {
            "type" if value == "env" => from_env = true,
            "type" if value == "file" => {}
            "type" => {
                return Err(Fault::invalid(format!("unsupported secret type {value:?}"))
                    .hint("it is file or env"));
            }
            "id" => id = value,
            "src" | "source" => file = Some(value),
            "env" => env = Some(value),
            _ => {
                let fault = Fault::invalid(format!("unexpected key '{key}' in '{text}'"));
                return Err(match nearest(&key, ["type", "id", "src", "source", "env"]) {
                    Some(near) => fault.hint(format!("did you mean {near}?")),
                    None => fault,
                });
            }
        }
    }
    if from_env && env.is_none() {
        env = file.take();
    }
    let source = env.filter(|v| !v.is_empty()).map(SecretSource::Env);
    secrets.add(
        &id,
        source.or_else(|| file.filter(|v| !v.is_empty()).map(|f| SecretSource::File(f.into()))),
    )
}

/// Values of `--ssh`: `default`, `<id>`, `<id>=<socket>[,raw=true]`, `<id>=<key>[,<key>]`.
pub(crate) fn ssh(texts: &[String]) -> Result<SshAgents> {
    let mut agents = SshAgents::default();
    for text in texts {
        let (id, rest) = text.split_once('=').unwrap_or((text, ""));
        let (mut paths, mut raw) = (Vec::new(), false);
        for part in rest.split(',').filter(|p| !p.is_empty()) {
            match part.strip_prefix("raw=") {
                Some(value) => {
                    raw = parse_bool(value).ok_or_else(|| {
                        Fault::invalid(format!("invalid value for 'raw': {value}"))
                    })?
                }
                None => paths.push(part.to_owned()),
            }
        }
        agents.add(id, &paths, raw).map_err(|fault| fault.context(format!("--ssh {text}")))?;
    }
    Ok(agents)
}

/// Values of `--registry-auth-tlscontext`, by registry.
pub(crate) fn auth_tls(texts: &[String]) -> Result<BTreeMap<String, AuthTls>> {
    const FLAG: &str = "--registry-auth-tlscontext requires";
    let mut all: BTreeMap<String, AuthTls> = BTreeMap::new();
    for text in texts {
        let (mut host, mut ca, mut cert, mut key, mut insecure) =
            (String::new(), None, None, None, false);
        for field in csv::fields(text)? {
            let (name, value) = field
                .split_once('=')
                .ok_or_else(|| Fault::invalid(format!("invalid value {field}")))?;
            let file = Some(value).filter(|v| !v.is_empty()).map(PathBuf::from);
            match name.to_ascii_lowercase().as_str() {
                "host" => value.clone_into(&mut host),
                "ca" => ca = file,
                "cert" => cert = file,
                "key" => key = file,
                "insecure" => {
                    insecure = parse_bool(value)
                        .ok_or_else(|| Fault::invalid(format!("invalid value {field}")))?
                }
                _ => {
                    return Err(Fault::invalid(format!(
                        "--registry-auth-tlscontext {text}: unexpected key '{name}'"
                    )));
                }
            }
        }
        if host.is_empty() {
            return Err(Fault::invalid(format!("{FLAG} host=<host>")));
        }
        let pair = match (cert, key) {
            (Some(cert), Some(key)) => Some((cert, key)),
            (None, None) if ca.is_some() || insecure => None,
            (None, None) => {
                return Err(Fault::invalid(format!(
                    "{FLAG} ca=<ca> or cert=<cert>,key=<key> or insecure=true"
                )));
            }
            _ => return Err(Fault::invalid(format!("{FLAG} cert=<cert>,key=<key>"))),
        };
        let tls = all.entry(host).or_default();
        tls.insecure |= insecure;
        tls.ca.extend(ca);
        tls.keypairs.extend(pair);
    }
    Ok(all)
}

/// Values of `--allow`.
pub(crate) fn entitlements(texts: &[String]) -> Result<Vec<String>> {
    const KNOWN: [&str; 3] = ["network.host", "security.insecure", "device"];
    for text in texts {
        let name = text.split('=').next().unwrap_or_default();
        let likely_host = |name: &NetworkName| nearest(name.as_str(), ["host"]).is_some();
        if NetworkName::of_entitlement(text).is_some_and(|network| !likely_host(&network)) {
            continue;
        }
        if !KNOWN.contains(&name) || (text.contains('=') && name != "device") {
            let fault = Fault::invalid(format!("unknown entitlement {text}"));
            return Err(match nearest(name, KNOWN) {
                Some(near) => fault.hint(format!("did you mean {near}?")),
                None => {
                    fault.hint(format!("entitlements are {} and network.NAME", KNOWN.join(", ")))
                }
            });
        }
    }
    Ok(texts.to_vec())
}

/// `key=value` words.
pub(crate) fn pairs(texts: &[String]) -> Result<BTreeMap<String, String>> {
    let pair = |text: &String| {
        let (key, value) = text.split_once('=').ok_or_else(|| {
            Fault::invalid(format!("invalid value {text}")).hint("write it as key=value")
        })?;
        Ok((key.to_owned(), value.to_owned()))
    };
    texts.iter().map(pair).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_output(text: &str, expected: &str) {
        let shown = match typed_output(text) {
            Ok(export) => format!("{} {:?} {:?}", export.kind, export.attrs, export.target),
            Err(fault) => format!("error {fault}"),
        };
        assert_eq!(shown, expected, "{text}");
    }

    #[test]
    fn outputs_name_their_targets() {
        check_output("type=image,name=x,push=true", r#"image {"name": "x", "push": "true"} None"#);
        check_output(
            "type=local,dest=out,mode=delete",
            r#"local {"mode": "delete"} Dir { path: "out", delete: true }"#,
        );
        check_output("type=tar,dest=out.tar", r#"tar {} File(Path("out.tar"))"#);
        check_output("type=oci,dest=out,tar=false", r#"oci {"tar": "false"} Layout("out")"#);
        check_output(
            "type=local",
            "error invalid output option: output directory is required for local exporter",
        );
        check_output(
            "type=image,dest=x",
            "error invalid output option: output x is not supported by image exporter",
        );
        check_output("type=imge", "error invalid output option: unknown exporter \"imge\"");
        check_output("name=x", "error --output requires type=<type>");
        check_output(
            "type=tar,output=x",
            "error output=x not supported for --output, you meant dest=x?",
        );
    }

    #[test]
    fn caches_have_a_type_and_a_mode() {
        let shown = |text, export| {
            cache(text, "--cache", export)
                .map(|c| format!("{} {:?}", c.kind, c.attrs))
                .map_err(|f| f.to_string())
        };
        assert_eq!(
            shown("r.example/x:c", true),
            Ok(r#"registry {"mode": "min", "ref": "r.example/x:c"}"#.into())
        );
        assert_eq!(shown("type=local,src=d", false), Ok(r#"local {"src": "d"}"#.into()));
        assert_eq!(
            shown("type=registry,mode=max", true),
            Err("--cache: a cache of type registry requires ref=<name>".into())
        );
        assert_eq!(shown("ref=x", true), Err("--cache requires type=<type>".into()));
    }

    #[test]
    fn a_runner_says_where_its_cache_is() {
        let fill = |given: &[(&str, &str)], environment: &[(&str, &str)]| {
            let mut attrs = given.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
            let env = |name: &str| {
                environment.iter().find(|(k, _)| *k == name).map(|(_, v)| (*v).to_owned())
            };
            github(&mut attrs, env).map(|()| format!("{attrs:?}")).map_err(|f| f.to_string())
        };
        let (url, results, token) = (
            ("ACTIONS_CACHE_URL", "u"),
            ("ACTIONS_RESULTS_URL", "r"),
            ("ACTIONS_RUNTIME_TOKEN", "t"),
        );
        assert_eq!(fill(&[], &[url, results, token]), Ok(r#"{"token": "t", "url": "u"}"#.into()));
        assert_eq!(fill(&[], &[results, token]), Ok(r#"{"token": "t", "url": "r"}"#.into()));
        assert_eq!(
            fill(&[("url", "mine"), ("token", "mine")], &[url, token]),
            Ok(r#"{"token": "mine", "url": "mine"}"#.into())
        );
        let second = Ok(r#"{"token": "t", "url": "u", "url_v2": "r"}"#.to_owned());
        assert_eq!(fill(&[], &[url, results, token, ("ACTIONS_CACHE_SERVICE_V2", "True")]), second);
        assert!(
            fill(&[("version", "2")], &[results, token])
                .is_ok_and(|a| a.contains(r#""url_v2": "r""#))
        );
        assert!(fill(&[], &[token]).is_err_and(|why| why.contains("requires url")));
        assert!(fill(&[], &[url]).is_err_and(|why| why.contains("requires token")));
    }

    #[test]
    fn cache_mounts_are_saved_to_a_place_and_restored_from_one() {
        let shown = |text, direction| {
            cache_mounts(text, "--flag", direction, &|name| {
                name.starts_with("AWS_").then(|| "v".to_owned())
            })
            .map(|c| format!("{} {:?}", c.kind, c.attrs))
            .map_err(|f| f.to_string())
        };
        use Direction::{Restore, Save};
        assert_eq!(shown("r.example/m", Save), Ok(r#"registry {"ref": "r.example/m"}"#.into()));
        assert_eq!(
            shown("type=local,src=d,key=k,fallback=a;b", Restore),
            Ok(r#"local {"fallback": "a;b", "key": "k", "src": "d"}"#.into())
        );
        assert_eq!(
            shown("type=s3,bucket=b", Save),
            Ok(r#"s3 {"access_key_id": "v", "bucket": "b", "secret_access_key": "v", "session_token": "v"}"#.into())
        );
        let wrong = shown("type=local,src=d", Save);
        assert_eq!(wrong, Err("--flag: cache mounts in a directory require dest".into()));
        assert!(shown("key=k", Save).is_err_and(|why| why.contains("requires type=<type>")));
    }

    #[test]
    fn keys_to_buckets_come_from_the_environment() {
        let fill = |given: &[(&str, &str)], set: &[&str]| {
            let mut attrs = given.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
            amazon(&mut attrs, |name| set.contains(&name).then(|| name.to_owned()));
            attrs.into_values().collect::<Vec<_>>().join(" ")
        };
        let all = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"];
        assert_eq!(fill(&[], &all), "AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN");
        assert_eq!(fill(&[], &all[..1]), "");
        assert_eq!(fill(&[("access_key_id", "mine")], &all), "mine");
    }

    #[test]
    fn tls_for_tokens_is_told_by_registry() {
        let read = |texts: &[&str]| {
            auth_tls(&texts.iter().map(|t| (*t).to_owned()).collect::<Vec<_>>())
                .map_err(|f| f.to_string())
        };
        let all =
            read(&["host=a,ca=/ca1", "host=a,ca=/ca2,cert=/c,key=/k", "HOST=b,insecure=true"])
                .expect("settings");
        let a = AuthTls {
            ca: vec!["/ca1".into(), "/ca2".into()],
            keypairs: vec![("/c".into(), "/k".into())],
            insecure: false,
        };
        assert_eq!(
            all,
            BTreeMap::from([
                ("a".into(), a),
                ("b".into(), AuthTls { insecure: true, ..AuthTls::default() })
            ])
        );
        for (text, why) in [
            ("ca=/x", "--registry-auth-tlscontext requires host=<host>"),
            (
                "host=a",
                "--registry-auth-tlscontext requires ca=<ca> or cert=<cert>,key=<key> or insecure=true",
            ),
            ("host=a,ca=/x,cert=/c", "--registry-auth-tlscontext requires cert=<cert>,key=<key>"),
            (
                "host=a,cacert=/x",
                "--registry-auth-tlscontext host=a,cacert=/x: unexpected key 'cacert'",
            ),
        ] {
            assert_eq!(read(&[text]), Err(why.to_owned()));
        }
    }

    #[test]
    fn secrets_and_entitlements_are_checked() {
        assert!(
            !secrets(&["id=a,env=HOME".into(), "type=env,id=b,src=PATH".into()])
                .expect("secrets")
                .is_empty()
        );
        for (text, expected) in [
            ("src=x", "--secret src=x: secret missing ID"),
            ("id=a,sorce=x", "--secret id=a,sorce=x: unexpected key 'sorce' in 'id=a,sorce=x'"),
            ("id=a,src=/no/such", "--secret id=a,src=/no/such: failed to stat /no/such: "),
        ] {
            let fault = secrets(&[text.into()]).expect_err(text).to_string();
            assert!(fault.starts_with(expected), "{fault}");
        }
        assert!(entitlements(&["network.host".into(), "device=x".into()]).is_ok());
        assert!(entitlements(&["network.hosts".into()]).is_err());
        assert!(entitlements(&["network.corp".into()]).is_ok());
        assert!(entitlements(&["network.corp=x".into()]).is_err());
    }
}
