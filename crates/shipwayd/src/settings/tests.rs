use super::*;
use clap::{CommandFactory as _, Parser as _};

/// A value for every key of the file that changes something, and what else has to be in the file
/// for that. A key that is not listed fails the test.
const KEYS: &[(&str, &str, &str)] = &[
    ("debug", "true", ""),
    ("trace", "true", ""),
    ("root", "'/r'", ""),
    ("insecure-entitlements", "['network.host']", ""),
    ("proxyNetwork", "true", ""),
    ("deniedNetworks", r#"["10.0.0.0/8"]"#, ""),
    ("provenanceEnvDir", "'/p'", ""),
    ("log.format", "'json'", ""),
    ("log.level", "'warn'", ""),
    ("grpc.address", "['unix:///x']", ""),
    ("grpc.debugAddress", "'127.0.0.1:6060'", ""),
    ("grpc.uid", "1", ""),
    ("grpc.gid", "'docker'", ""),
    ("grpc.securityDescriptor", "'x'", ""),
    ("grpc.tls.cert", "'other'", "grpc.tls.cert = 'c'\ngrpc.tls.key = 'k'"),
    ("grpc.tls.key", "'other'", "grpc.tls.cert = 'c'\ngrpc.tls.key = 'k'"),
    ("grpc.tls.ca", "'ca'", "grpc.tls.cert = 'c'\ngrpc.tls.key = 'k'"),
    ("auth.oidc", "[{ name = 'a', issuer = 'https://a', audience = ['x'] }]", "auth.policy = []"),
    ("auth.kubernetes.server", "'https://k'", "auth.kubernetes.audience = ['x']"),
    ("auth.kubernetes.ca", "'/c'", "auth.kubernetes.audience = ['x']"),
    ("auth.kubernetes.tokenFile", "'/t'", "auth.kubernetes.audience = ['x']"),
    ("auth.kubernetes.audience", "['y']", "auth.kubernetes.server = 'https://k'"),
    ("auth.policy", "[{ name = 'p', subject = '*' }]", "auth.oidc = []"),
    ("otel.endpoint", "'http://x:1'", ""),
    ("otel.protocol", "'http/protobuf'", "otel.endpoint = 'http://x:1'"),
    ("otel.history", "false", ""),
    ("otel.socketPath", "'/x'", ""),
    ("cdi.disabled", "true", ""),
    ("cdi.specDirs", "['/x']", ""),
    ("cdi.autoAllowed", "['x']", ""),
    ("worker.containerd.enabled", "false", ""),
    ("worker.containerd.address", "'/x'", ""),
    ("worker.containerd.namespace", "'x'", ""),
    ("worker.containerd.snapshotter", "'native'", ""),
    ("worker.containerd.labels", "{ a = 'b' }", ""),
    ("worker.containerd.platforms", "['linux/arm64']", ""),
    ("worker.containerd.runtime.name", "'io.containerd.x.v1'", ""),
    ("worker.containerd.runtime.path", "'crun'", ""),
    ("worker.containerd.runtime.options", "{ SystemdCgroup = true }", ""),
    ("worker.containerd.rootless", "true", ""),
    ("worker.containerd.apparmor-profile", "'p'", ""),
    ("worker.containerd.selinux", "true", ""),
    ("worker.containerd.max-parallelism", "3", ""),
    ("worker.containerd.defaultCgroupParent", "'/x'", ""),
    ("worker.containerd.networkMode", "'host'", ""),
    ("worker.containerd.cniConfigPath", "'/x'", ""),
    ("worker.containerd.cniBinaryPath", "'/x'", ""),
    ("worker.containerd.cniPoolSize", "3", ""),
    ("worker.containerd.bridgeName", "'x'", "worker.containerd.networkMode = 'bridge'"),
    ("worker.containerd.bridgeSubnet", "'10.1.0.0/16'", "worker.containerd.networkMode = 'bridge'"),
    ("worker.containerd.preferLocalImages", "'always'", ""),
    ("worker.containerd.replaceManagedImages", "['x']", ""),
    ("worker.containerd.publishNamespaces", "['k8s.io']", ""),
    ("worker.containerd.gc", "false", ""),
    ("worker.containerd.gckeepstorage", "7", ""),
    ("worker.containerd.reservedSpace", "'7GB'", ""),
    ("worker.containerd.maxUsedSpace", "'7%'", ""),
    ("worker.containerd.minFreeSpace", "7", ""),
    ("worker.containerd.gcpolicy.all", "true", ""),
    ("worker.containerd.gcpolicy.filters", "['type==regular']", ""),
    ("worker.containerd.gcpolicy.keepDuration", "'1h'", ""),
    ("worker.containerd.gcpolicy.keepBytes", "7", ""),
    ("worker.containerd.gcpolicy.reservedSpace", "7", ""),
    ("worker.containerd.gcpolicy.maxUsedSpace", "7", ""),
    ("worker.containerd.gcpolicy.minFreeSpace", "7", ""),
    ("worker.oci.enabled", "true", ""),
    ("worker.oci.labels", "{ a = 'b' }", OCI),
    ("worker.oci.platforms", "['linux/arm64']", OCI),
    ("worker.oci.snapshotter", "'native'", OCI),
    ("worker.oci.rootless", "true", OCI),
    ("worker.oci.noProcessSandbox", "true", OCI),
    ("worker.oci.gc", "false", OCI),
    ("worker.oci.gckeepstorage", "7", OCI),
    ("worker.oci.reservedSpace", "7", OCI),
    ("worker.oci.maxUsedSpace", "7", OCI),
    ("worker.oci.minFreeSpace", "7", OCI),
    ("worker.oci.gcpolicy", "[{ all = true }]", OCI),
    ("worker.oci.networkMode", "'host'", OCI),
    ("worker.oci.cniConfigPath", "'/x'", OCI),
    ("worker.oci.cniBinaryPath", "'/x'", OCI),
    ("worker.oci.cniPoolSize", "3", OCI),
    (
        "worker.oci.bridgeName",
        "'x'",
        "worker.oci.enabled = true\nworker.oci.networkMode = 'bridge'",
    ),
    (
        "worker.oci.bridgeSubnet",
        "'10.1.0.0/16'",
        "worker.oci.enabled = true\nworker.oci.networkMode = 'bridge'",
    ),
    ("worker.oci.userRemapUnsupported", "'x'", OCI),
    ("worker.oci.binary", "'crun'", OCI),
    ("worker.oci.proxySnapshotterPath", "'/x'", OCI),
    ("worker.oci.defaultCgroupParent", "'/x'", OCI),
    ("worker.oci.stargzSnapshotter", "{ a = 1 }", OCI),
    ("worker.oci.apparmor-profile", "'p'", OCI),
    ("worker.oci.selinux", "true", OCI),
    ("worker.oci.max-parallelism", "3", OCI),
    ("registry.\"x\".mirrors", "['m']", ""),
    ("registry.\"x\".http", "true", ""),
    ("registry.\"x\".insecure", "true", ""),
    ("registry.\"x\".ca", "['c']", ""),
    ("registry.\"x\".keypair", "[{ key = 'k', cert = 'c' }]", ""),
    ("registry.\"x\".tlsconfigdir", "['/d']", ""),
    ("dns.nameservers", "['1.1.1.1']", ""),
    ("dns.options", "['o']", ""),
    ("dns.searchDomains", "['d']", ""),
    ("dns.resolvConf", "'/r'", ""),
    ("networks.x.cniConfigPath", "'/p'", ""),
    ("networks.x.cniBinaryPath", "'/b'", "networks.x.cniConfigPath = '/p'"),
    ("networks.x.autoAllowed", "true", "networks.x.cniConfigPath = '/p'"),
    ("ca.bundle", "'/c.pem'", ""),
    ("egress.allow", "['a']", ""),
    ("egress.deny", "['10.0.0.0/8']", ""),
    ("history.maxAge", "'1h'", ""),
    ("history.maxEntries", "3", ""),
    ("history.maxUsedSpace", "'1MB'", ""),
    ("frontend.\"dockerfile.v0\".enabled", "false", ""),
    ("frontend.\"gateway.v0\".enabled", "false", ""),
    ("frontend.\"gateway.v0\".allowedRepositories", "['x']", ""),
    ("lazy.blobs", "'now'", ""),
    ("lazy.snapshotterControl", "'/x'", ""),
    ("system.platformsCacheMaxAge", "-1", ""),
    ("system.maxRegistryConcurrency", "9", ""),
    ("system.cacheImportTimeout", "'7s'", ""),
    ("system.keepFailedSteps", "3", ""),
    ("system.keepFailedStepsFor", "'7s'", ""),
    ("system.drainTimeout", "'7m'", ""),
    ("system.adoptTimeout", "'7m'", ""),
    ("cache", "{ gha = { sign = {} } }", ""),
];

const OCI: &str = "worker.oci.enabled = true";

/// The same for flags.
const FLAGS: &[(&str, &str, &[&str])] = &[
    ("root", "/r", &[]),
    ("addr", "unix:///x", &[]),
    ("group", "g", &[]),
    ("debug", "", &[]),
    ("trace", "", &[]),
    ("log-level", "error", &[]),
    ("log-format", "json", &[]),
    ("debugaddr", "127.0.0.1:6060", &[]),
    ("tlscert", "other", &["--tlscert=c", "--tlskey=k"]),
    ("tlskey", "other", &["--tlscert=c", "--tlskey=k"]),
    ("tlscacert", "ca", &["--tlscert=c", "--tlskey=k"]),
    ("allow-insecure-entitlement", "network.host", &[]),
    ("cdi-disabled", "", &[]),
    ("cdi-spec-dir", "/x", &[]),
    ("rootless", "", &[]),
    ("proxy-network", "", &[]),
    ("otel-socket-path", "/x", &[]),
    ("save-cache-debug", "", &[]),
    ("containerd-worker", "false", &[]),
    ("containerd-worker-addr", "/x", &[]),
    ("containerd-worker-labels", "a=b", &[]),
    ("containerd-worker-platform", "linux/arm64", &[]),
    ("containerd-worker-namespace", "n", &[]),
    ("containerd-worker-runtime", "r", &[]),
    ("containerd-worker-net", "host", &[]),
    ("containerd-cni-config-path", "/x", &[]),
    ("containerd-cni-binary-dir", "/x", &[]),
    ("containerd-cni-pool-size", "3", &[]),
    ("containerd-worker-snapshotter", "native", &[]),
    ("containerd-worker-apparmor-profile", "p", &[]),
    ("containerd-worker-selinux", "", &[]),
    ("containerd-max-parallelism", "3", &[]),
    ("containerd-worker-rootless", "", &[]),
    ("prefer-local-images", "always", &[]),
    ("lazy-blobs", "now", &[]),
    ("drain-timeout", "7m", &[]),
    ("adopt-timeout", "7m", &[]),
    ("containerd-worker-gc", "false", &[]),
    ("containerd-worker-gc-keepstorage", "1,20%,3", &[]),
    ("oci-worker", "true", &[]),
    ("oci-worker-labels", "a=b", STANDING_IN),
    ("oci-worker-snapshotter", "native", STANDING_IN),
    ("oci-worker-proxy-snapshotter-path", "/x", STANDING_IN),
    ("oci-worker-platform", "linux/arm64", STANDING_IN),
    ("oci-worker-net", "host", STANDING_IN),
    ("oci-cni-config-path", "/x", STANDING_IN),
    ("oci-cni-binary-dir", "/x", STANDING_IN),
    ("oci-cni-pool-size", "3", STANDING_IN),
    ("oci-worker-binary", "crun", STANDING_IN),
    ("oci-worker-apparmor-profile", "p", STANDING_IN),
    ("oci-worker-selinux", "", STANDING_IN),
    ("oci-max-parallelism", "3", STANDING_IN),
    ("oci-worker-rootless", "", STANDING_IN),
    ("oci-worker-no-process-sandbox", "", STANDING_IN),
    ("oci-worker-gc", "false", STANDING_IN),
    ("oci-worker-gc-keepstorage", "9000,20%,30000", STANDING_IN),
];

const STANDING_IN: &[&str] = &["--oci-worker=true"];

/// Flags that are not settings: the file to read, and what to print.
const OTHERS: [&str; 2] = ["config", "version"];

fn load(flags: &[&str], file: &str) -> Result<Settings> {
    let flags = Flags::try_parse_from(["x"].iter().chain(flags))
        .map_err(|e| Fault::invalid(e.to_string()))?;
    Settings::of(flags, Config::parse(file, "x.toml")?, Persona::Buildkitd)
}

/// Everything but the notes.
fn essence(settings: &mut Settings) -> String {
    settings.notes.clear();
    format!("{settings:?}")
}

/// Whether what is called `name` works, is refused by name, or is logged by name.
#[track_caller]
fn has_effect(name: &str, before: Result<Settings>, after: Result<Settings>) -> bool {
    let mut before = before.unwrap_or_else(|e| panic!("{name}: what it needs is refused: {e}"));
    match after {
        Err(fault) => fault.to_string().contains(name),
        Ok(mut after) => {
            after.notes.iter().any(|n| n.contains(name))
                || essence(&mut before) != essence(&mut after)
        }
    }
}

/// The keys of the table at `path`, as the parser knows them.
#[track_caller]
fn keys_of(path: &str) -> Vec<String> {
    let text = match path {
        "" => "nothing = 1".to_owned(),
        path if path.ends_with("gcpolicy") => format!("{path} = [{{ nothing = 1 }}]"),
        path => format!("{path}.nothing = 1"),
    };
    let said = Config::parse(&text, "x.toml").unwrap_err().to_string();
    let (_, list) = said
        .split_once("unknown field `nothing`, expected")
        .unwrap_or_else(|| panic!("{path} is no table: {said}"));
    list.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

fn line(path: &str, value: &str) -> String {
    match path.rsplit_once("gcpolicy.") {
        Some((table, key)) => format!("{table}gcpolicy = [{{ {key} = {value} }}]"),
        None => format!("{path} = {value}"),
    }
}

#[test]
fn every_key_of_the_file_works_or_is_refused_or_told_by_name() {
    let mut seen = 0;
    let mut tables = vec![String::new()];
    while let Some(table) = tables.pop() {
        for key in keys_of(&table) {
            let key = if key.contains('.') { format!("\"{key}\"") } else { key };
            let path = if table.is_empty() { key.clone() } else { format!("{table}.{key}") };
            if path == "registry" {
                tables.push("registry.\"x\"".into());
                continue;
            }
            if path == "networks" {
                tables.push("networks.x".into());
                continue;
            }
            let Some((_, value, needs)) = KEYS.iter().find(|(known, ..)| *known == path) else {
                let below = format!("{path}.");
                assert!(
                    KEYS.iter().any(|(known, ..)| known.starts_with(&below)),
                    "what does {path} do? add it to the list"
                );
                tables.push(path);
                continue;
            };
            // The last of two lines for one key is an error in TOML.
            let kept: Vec<&str> =
                needs.lines().filter(|l| !l.starts_with(&format!("{path} "))).collect();
            let after = format!("{}\n{}", kept.join("\n"), line(&path, value));
            let before = if path.contains("gcpolicy.") {
                line(&path[..path.len() - key.len()].replace("gcpolicy.", "gcpolicy.filters"), "[]")
            } else {
                (*needs).into()
            };
            assert!(
                has_effect(&key, load(&[], &before), load(&[], &after)),
                "{path} = {value} is swallowed"
            );
            seen += 1;
        }
    }
    assert_eq!(seen, KEYS.len(), "the list has keys that the file has not");
}

#[test]
fn a_network_has_a_plain_name_and_a_configuration() {
    for (text, says) in [
        ("networks.host.cniConfigPath = '/p'", "\"host\" is not a valid name of a network"),
        ("networks.\"a b\".cniConfigPath = '/p'", "\"a b\" is not a valid name"),
        ("networks.a.autoAllowed = true", "networks.a needs cniConfigPath"),
    ] {
        let said = load(&[], text).unwrap_err().to_string();
        assert!(said.contains(says), "{said}");
    }
    let text = "networks.a.cniConfigPath = '/a'\nworker.containerd.cniBinaryPath = '/b'\n\
                networks.c = { cniConfigPath = '/c', cniBinaryPath = '/d', autoAllowed = true }";
    let s = load(&[], text).unwrap();
    let named = &s.tasks.network.named;
    let of = |name: &str| &named[&name.parse().unwrap()];
    assert_eq!(of("a").cni_bin.to_str(), Some("/b"));
    assert_eq!(of("c").cni_bin.to_str(), Some("/d"));
    let names = |all: &std::collections::BTreeSet<shipway_oci::NetworkName>| {
        all.iter().map(|n| n.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(
        (names(&s.networks.configured), names(&s.networks.allowed)),
        (vec!["a".into(), "c".into()], vec!["c".into()])
    );
}

#[test]
fn every_flag_works_or_is_refused_or_told_by_name() {
    let command = Flags::command();
    let flags: Vec<&str> = command
        .get_arguments()
        .filter_map(clap::Arg::get_long)
        .filter(|f| !OTHERS.contains(f) && *f != "help")
        .collect();
    for flag in &flags {
        let (_, value, needs) = FLAGS
            .iter()
            .find(|(known, ..)| known == flag)
            .unwrap_or_else(|| panic!("what does --{flag} do? add it to the list"));
        let given =
            if value.is_empty() { format!("--{flag}") } else { format!("--{flag}={value}") };
        let same = format!("--{flag}=");
        let kept = needs.iter().filter(|n| !n.starts_with(&same)).copied();
        let after: Vec<&str> = kept.chain([given.as_str()]).collect();
        assert!(has_effect(flag, load(needs, ""), load(&after, "")), "{given} is swallowed");
    }
    assert_eq!(flags.len(), FLAGS.len(), "the list has flags that the program has not");
}

#[test]
fn settings_of_a_worker_that_is_not_run_are_told() {
    for (path, value, _) in KEYS
        .iter()
        .filter(|(path, ..)| path.starts_with("worker.oci.") && !path.ends_with("enabled"))
    {
        let notes = load(&[], &line(path, value)).unwrap().notes;
        assert!(notes.iter().any(|n| n.contains(path)), "{path}: {notes:?}");
    }
    for (flag, value, _) in
        FLAGS.iter().filter(|(flag, ..)| flag.starts_with("oci-") && *flag != "oci-worker")
    {
        let given =
            if value.is_empty() { format!("--{flag}") } else { format!("--{flag}={value}") };
        if ["oci-worker-selinux", "oci-worker-rootless"].contains(flag) {
            continue;
        }
        let notes = load(&[&given], "").unwrap().notes;
        assert!(notes.iter().any(|n| n.contains(flag)), "{flag}: {notes:?}");
    }
}

#[test]
fn called_as_buildkitd_it_takes_that_programs_defaults() {
    for (argv0, root, namespace) in [
        ("/usr/bin/buildkitd", "/var/lib/buildkit", "buildkit"),
        ("shipwayd", "/var/lib/shipway", "default"),
    ] {
        let s = Settings::of(Flags::default(), Config::default(), Persona::of(argv0)).unwrap();
        assert_eq!((s.root.to_str().unwrap(), s.namespace.as_str()), (root, namespace));
    }
}

#[test]
fn flags_for_what_is_absent_are_accepted_or_refused_by_name() {
    for fine in [
        "--rootless=false",
        "--containerd-worker-selinux=false",
        "--oci-worker-no-process-sandbox=false",
    ] {
        assert!(load(&[fine], "").is_ok(), "{fine}");
    }
    for (flag, what) in [
        ("--rootless", "rootless"),
        ("--containerd-worker-selinux", "SELinux"),
        ("--oci-worker=maybe", "--oci-worker"),
    ] {
        let fault = load(&[flag], "").unwrap_err();
        assert!(fault.to_string().contains(what) && fault.hints().count() > 0, "{flag}");
    }
}

#[test]
fn the_flag_for_the_proxy_network_wins_over_the_file() {
    let proxied = |flags: &[&str], file: &str| load(flags, file).unwrap().proxied;
    assert!(proxied(&[], "proxyNetwork = true") && proxied(&["--proxy-network"], ""));
    assert!(!proxied(&["--proxy-network=false"], "proxyNetwork = true") && !proxied(&[], ""));
}

#[test]
fn levels_of_buildkitd_are_understood() {
    for (name, level) in [
        ("warning", LogLevel::Warn),
        ("fatal", LogLevel::Error),
        ("panic", LogLevel::Error),
        ("trace", LogLevel::Trace),
    ] {
        assert_eq!(load(&["--log-level", name], "").unwrap().logging.level, level);
    }
    assert!(load(&["--log-level=loud"], "").is_err());
}

#[test]
fn limits_of_garbage_collection_go_together() {
    let mb = |n: u64| Some(DiskSpace::Bytes(n * 1_000_000));
    let gc = |flags: &[&str], file: &str| load(flags, file).unwrap().gc;
    let limits = |reserved, max_used, min_free| GcSettings::Limits { reserved, max_used, min_free };
    assert_eq!(
        gc(&["--containerd-worker-gc-keepstorage=9"], "worker.containerd.minFreeSpace = 7"),
        limits(mb(9), None, None)
    );
    assert_eq!(
        gc(&["--containerd-worker-gc-keepstorage=9,20%,30"], ""),
        limits(mb(9), mb(30), Some(DiskSpace::Percent(20)))
    );
    assert_eq!(
        gc(&[], "worker.containerd.gckeepstorage = 7\nworker.containerd.reservedSpace = 0"),
        limits(Some(DiskSpace::Bytes(7)), None, None)
    );
    let wrong = "worker.containerd.gcpolicy = [{ filters = ['nothing==x'] }]";
    assert!(load(&[], wrong).unwrap_err().to_string().contains("no field \"nothing\""));
}

#[test]
fn devices_are_for_steps_unless_they_are_disabled() {
    let check = |flags: &[&str], allowed: bool, dirs: &[&str]| {
        let s = load(flags, "").unwrap();
        assert_eq!(
            (s.entitlements.contains(&"device".to_owned()), s.cdi.spec_dirs),
            (allowed, dirs.iter().map(|d| (*d).into()).collect())
        );
    };
    let usual = shipway_cdi::DEFAULT_DIRS;
    check(&[], true, &usual);
    check(&["--cdi-disabled=false", "--cdi-spec-dir=/a", "--cdi-spec-dir=/b"], true, &["/a", "/b"]);
    check(&["--cdi-disabled", "--allow-insecure-entitlement=device"], false, &usual);
}

#[test]
fn the_suite_of_buildkit_starts_us_with_these_flags() {
    let flags = Flags::parse_from([
        "buildkitd",
        "--oci-worker=false",
        "--containerd-worker-gc=false",
        "--containerd-worker=true",
        "--containerd-worker-addr",
        "/x.sock",
        "--containerd-worker-labels=org.mobyproject.buildkit.worker.sandbox=true",
        "--config=/nonexistent/x.toml",
        "--root",
        "/r",
        "--addr",
        "unix:///y.sock",
        "--debug",
    ]);
    let s = Settings::load(flags, Persona::Buildkitd).unwrap();
    assert_eq!(
        (s.containerd.as_str(), s.listening.addresses[0].as_str(), s.gc),
        ("/x.sock", "unix:///y.sock", GcSettings::Off)
    );
    assert_eq!(s.logging.level, LogLevel::Debug);
}

#[test]
fn told_to_run_an_oci_worker_it_runs_on_containerd() {
    let flags = [
        "--oci-worker=true",
        "--containerd-worker=false",
        "--oci-worker-gc=false",
        "--oci-worker-labels=a=b",
        "--root",
        "/r",
    ];
    let s = load(&flags, "worker.oci.max-parallelism = 3").unwrap();
    assert!(s.namespace.starts_with("buildkit-"), "{}", s.namespace);
    assert_eq!(
        (s.gc, s.labels["a"].as_str(), s.max_parallelism, s.notes.len()),
        (GcSettings::Off, "b", Some(3), 1)
    );
}

#[test]
fn platforms_are_looked_for_again_after_a_while_or_never() {
    let age = |value: &str| {
        load(&[], &format!("system.platformsCacheMaxAge = {value}")).unwrap().platforms_max_age
    };
    assert_eq!(
        (age("'1m'"), age("5"), age("-1"), age("'-1s'")),
        (Some(Duration::from_secs(60)), Some(Duration::from_secs(5)), None, None)
    );
    assert!(Config::parse("system.platformsCacheMaxAge = 'x'", "x.toml").is_err());
}

#[test]
fn limits_of_the_output_of_steps_come_from_the_environment() {
    let of = |size: &str, speed: &str| {
        let variables =
            [("BUILDKIT_STEP_LOG_MAX_SIZE", size), ("BUILDKIT_STEP_LOG_MAX_SPEED", speed)];
        log_limits(|name| variables.iter().find(|(n, _)| *n == name).unwrap().1.to_owned())
    };
    assert_eq!(of("", ""), (LogLimits::default(), vec![]));
    assert_eq!(of("-1", "1000"), (LogLimits { size: None, speed: Some(1000) }, vec![]));
    let (limits, notes) = of("2MiB", "-1");
    assert_eq!(limits, LogLimits { speed: None, ..LogLimits::default() });
    assert!(
        notes.len() == 1
            && notes[0].starts_with("BUILDKIT_STEP_LOG_MAX_SIZE=\"2MiB\" has no effect"),
        "{notes:?}"
    );
}

#[test]
fn signatures_of_githubs_cache_are_refused_rather_than_passed_over() {
    let say = |file: &str| load(&[], file).map(drop).map_err(|f| f.to_string());
    assert_eq!(say("[cache.gha]"), Ok(()));
    for (file, words) in [
        ("[cache.gha.sign]\ncommand = ['cosign']", "cache.gha.sign: signatures of indexes"),
        ("[cache.gha.verify]\nrequired = true", "cache.gha.verify: signatures of indexes"),
        ("[cache.gha.x]", "unknown field `cache.gha.x`"),
        ("[cache.s3]", "unknown field `cache.s3`"),
    ] {
        assert!(say(file).is_err_and(|why| why.contains(words)), "{file}: {:?}", say(file));
    }
}
