//! From a registry's name to the endpoints that may be asked: mirrors first, the origin last.

use crate::{
    HostConfig, RegistryConfig,
    endpoint::{Capabilities, Endpoint, Scheme},
    hosts_toml,
};

/// The endpoints of `registry`, in the order to ask. Reads files: call it where blocking is
/// allowed.
pub(crate) fn endpoints(
    config: &RegistryConfig,
    registry: &str,
    insecure: bool,
) -> Result<Vec<Endpoint>, String> {
    let mut endpoints = match (config.hosts.get(registry), &config.config_path) {
        (Some(host), _) => from_table(config, registry, host)?,
        (None, Some(dir)) => match hosts_toml::load(dir, registry)? {
            Some(found) => found,
            None => vec![Endpoint::origin(registry).with(&HostConfig::default())?],
        },
        (None, None) => vec![Endpoint::origin(registry).with(&HostConfig::default())?],
    };
    for endpoint in &mut endpoints {
        let origin = endpoint.authority == registry
            || (registry == "docker.io" && endpoint.authority == "registry-1.docker.io");
        endpoint.stands_for = (!origin).then(|| registry.to_owned());
        if insecure {
            endpoint.scheme =
                if endpoint.scheme == Scheme::Http { Scheme::Http } else { Scheme::Either };
            endpoint.tls.skip_verify = true;
        }
    }
    Ok(endpoints)
}

fn from_table(
    config: &RegistryConfig,
    registry: &str,
    host: &HostConfig,
) -> Result<Vec<Endpoint>, String> {
    let mut endpoints = Vec::with_capacity(host.mirrors.len() + 1);
    for mirror in &host.mirrors {
        // A mirror is `host` or `host/path`; some write the scheme, too.
        let (scheme, rest) = match mirror.split_once("://") {
            Some((s, rest)) => (Some(s), rest),
            None => (None, mirror.as_str()),
        };
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let path = match path.trim_matches('/') {
            "" | "v2" => "/v2".to_owned(),
            path => format!("/v2/{}", path.strip_prefix("v2/").unwrap_or(path)),
        };
        let own = config.hosts.get(authority).cloned().unwrap_or_default();
        let mut endpoint = Endpoint::at(authority, path, Capabilities::READ).with(&own)?;
        match scheme {
            Some("http") => endpoint.scheme = Scheme::Http,
            Some("https") | None => {}
            Some(other) => {
                return Err(format!(
                    "the mirror {mirror:?} of {registry} has the scheme {other:?}: want http or https"
                ));
            }
        }
        endpoints.push(endpoint);
    }
    endpoints.push(Endpoint::origin(registry).with(host)?);
    Ok(endpoints)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(toml: &str) -> RegistryConfig {
        RegistryConfig { hosts: toml::from_str(toml).unwrap(), ..Default::default() }
    }

    #[track_caller]
    fn check(toml: &str, registry: &str, want: &[&str]) {
        let got: Vec<String> = endpoints(&config(toml), registry, false)
            .unwrap()
            .iter()
            .map(|e| {
                format!(
                    "{:?} {}{} verify={} push={} ns={:?}",
                    e.scheme,
                    e.authority,
                    e.path,
                    !e.tls.skip_verify,
                    e.capabilities.push,
                    e.stands_for
                )
            })
            .collect();
        assert_eq!(got, want);
    }

    #[test]
    fn names_become_endpoints() {
        check("", "docker.io", &["Https registry-1.docker.io/v2 verify=true push=true ns=None"]);
        check("", "localhost:5000", &["Either localhost:5000/v2 verify=false push=true ns=None"]);
        check("", "127.0.0.2:5000", &["Either 127.0.0.2:5000/v2 verify=false push=true ns=None"]);
        check("", "[::1]:5000", &["Either [::1]:5000/v2 verify=false push=true ns=None"]);
        check("", "r.io", &["Https r.io/v2 verify=true push=true ns=None"]);
        check("[\"r.io\"]\nhttp = true", "r.io", &["Http r.io/v2 verify=true push=true ns=None"]);
        check(
            "[\"r.io\"]\ninsecure = true",
            "r.io",
            &["Https r.io/v2 verify=false push=true ns=None"],
        );
        check(
            "[\"r.io\"]\nhttp = true\ninsecure = true",
            "r.io",
            &["Either r.io/v2 verify=false push=true ns=None"],
        );
    }

    #[test]
    fn what_is_called_insecure_may_be_plain_and_is_not_verified() {
        for (toml, scheme) in [("", Scheme::Either), ("[\"r.io\"]\nhttp = true", Scheme::Http)] {
            let all = endpoints(&config(toml), "r.io", true).unwrap();
            assert_eq!(
                (all.len(), all[0].scheme, all[0].tls.skip_verify),
                (1, scheme, true),
                "{toml}"
            );
        }
    }

    #[test]
    fn mirrors_come_first_with_their_own_settings() {
        check(
            "[\"docker.io\"]\nmirrors = [\"m.io\", \"p.io:5/proxy/hub\"]\n[\"m.io\"]\nhttp = true",
            "docker.io",
            &[
                "Http m.io/v2 verify=true push=false ns=Some(\"docker.io\")",
                "Https p.io:5/v2/proxy/hub verify=true push=false ns=Some(\"docker.io\")",
                "Https registry-1.docker.io/v2 verify=true push=true ns=None",
            ],
        );
    }

    #[test]
    fn mistakes_in_the_table_are_refused() {
        assert!(
            toml::from_str::<std::collections::BTreeMap<String, HostConfig>>(
                "[\"r.io\"]\nhtpp = true"
            )
            .is_err()
        );
        assert!(endpoints(&config("[\"r.io\"]\nmirrors = [\"ftp://x\"]"), "r.io", false).is_err());
    }
}
