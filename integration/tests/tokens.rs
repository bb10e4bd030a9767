//! Registries that want tokens: who fetches them, and for whom they are good.

#![allow(clippy::unwrap_used)]

use parking_lot::Mutex;
use shipway_integration::any;
use shipway_testkit::{FaultyRegistry, Lab, RegistryFault, run};
use std::{process::Command, sync::Arc};

#[test]
fn a_client_fetches_its_tokens_itself_and_shares_them_with_nobody_else() {
    let mut lab = Lab::complete(any());
    let asked: Arc<Mutex<Vec<String>>> = Arc::default();
    let tokens = RegistryFault::Tokens { login: "me:s3cret", asked: asked.clone() };
    let private = FaultyRegistry::start(&lab.registry(), "/v2/", tokens);
    lab.configure_daemon(&format!("[registry.\"{}\"]\n  http = true\n", private.address()));
    assert!(lab.stop_daemon(), "the daemon had to be killed");
    lab.start_daemon();
    let context = lab.context(
        "private",
        &[("Dockerfile", &format!("FROM {}/library/busybox\nRUN true\n", private.address()))],
    );
    let home = |name: &str, login: &str| {
        let login =
            serde_json::json!({ "auths": { private.address(): { "auth": login } } }).to_string();
        lab.context(name, &[("config.json", &login)])
    };
    let build = |mut command: Command, home: &std::path::Path, no_tokens: bool| {
        command.args(["--progress", "plain"]).arg(&context).env("DOCKER_CONFIG", home);
        if no_tokens {
            command.env("BUILDKIT_NO_CLIENT_TOKEN", "1");
        }
        run(&mut command)
    };
    let ours = || {
        let mut command = lab.shipway_command();
        command.args(["build", "--output", "type=cacheonly"]);
        command
    };
    let news = || std::mem::take(&mut *asked.lock());

    let (mine, yours, nobodys) = (
        home("mine", "bWU6czNjcmV0"),
        home("yours", "bWU6czNjcmV0"),
        home("nobodys", "bWU6d3Jvbmc="),
    );
    build(ours(), &mine, false).ok();
    assert_eq!(news(), ["buildkit-client"]);
    // Another session of the same client; and then clients that do not prove to be the same.
    build(ours(), &mine, false).ok();
    assert_eq!(news(), [""; 0]);
    build(ours(), &yours, false).ok();
    assert_eq!(news(), ["buildkit-client"]);
    build(ours(), &nobodys, false).failed();
    assert!(news().iter().all(|a| a == "buildkit-client"));
    build(ours(), &mine, true).ok();
    assert_eq!(news(), ["shipway"]);

    // A client by somebody else does it in the same way, and knows the seeds of ours.
    if let Some(mut command) = lab.buildx() {
        command.args(["build", "--output", "type=cacheonly"]);
        build(command, &mine, false).ok();
        assert_eq!(news(), [""; 0]);
        let mut command = lab.buildx().unwrap();
        command.args(["build", "--output", "type=cacheonly"]);
        build(command, &home("theirs", "bWU6czNjcmV0"), false).ok();
        assert_eq!(news(), ["buildkit-client"]);
    } else {
        eprintln!("docker-buildx is absent: only our own client was tried");
    }
}

#[test]
fn a_token_in_an_address_is_shown_nowhere() {
    const TOKEN: &str = "s3cr3tt0k3n";
    let lab = Lab::complete(any());
    let context =
        format!("http://{TOKEN}@127.0.0.1:{}/repository.git#main", shipway_testkit::free_port());
    let failed = lab.shipway(["build", "--progress", "plain", &context]).failed();
    assert!(
        failed.all().contains("repository.git") && !failed.all().contains(TOKEN),
        "{}",
        failed.all()
    );
    assert!(!lab.shipway(["du", "--verbose"]).all().contains(TOKEN));
    let log = std::fs::read_to_string(lab.dir().join("shipwayd.log")).unwrap();
    assert!(log.contains("repository.git") && !log.contains(TOKEN), "{log}");
}
