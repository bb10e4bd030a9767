//! The operator's certificates in steps (row `exec.ca`): what is trusted, and that nothing is left
//! of it.

#![allow(clippy::unwrap_used)]

use super::proxy_network::{TlsServer, web_image};
use shipway_integration::{Image, any, build, build_text};
use shipway_testkit::{Lab, run};
use std::process::Command;

/// Where the image of these tests has its certificates.
const BUNDLE: &str = "/etc/ssl/certs/ca-certificates.crt";

/// The output of `tar` with `arguments` over a layer.
#[track_caller]
fn of_layer(lab: &Lab, layer: &str, arguments: &str) -> String {
    let ctr = format!(
        "{} --address {} --namespace {}",
        lab.ctr_path().display(),
        lab.containerd_socket().display(),
        lab.namespace()
    );
    let script = format!("{ctr} content get {layer} | gzip -dcf | tar {arguments}");
    run(Command::new("sh").args(["-c", &script]).env("PATH", lab.path())).ok().stdout
}

#[test]
fn steps_trust_the_operators_authorities_and_leave_no_trace_of_them() {
    let mut lab = Lab::on(any());
    let tls = TlsServer::start(lab.dir());
    let bundle = lab.dir().join("corporate.pem");
    std::fs::copy(&tls.root, &bundle).unwrap();
    lab.configure_daemon(&format!("[ca]\n  bundle = \"{}\"\n", bundle.display()));
    lab.start_registry();
    web_image().push(&lab.registry(), "library/web", "latest");
    lab.start_daemon();
    let url = tls.url("/file");
    let text = format!(
        "FROM web\nRUN curl -fsS {url} > /https && test \"$NODE_EXTRA_CA_CERTS\" = {BUNDLE}\n\
         RUN echo '# mine' >> {BUNDLE}\nRUN curl -fsS {url} > /again\n"
    );
    build_text(&lab, "trusting:1", &text).ok();
    let image = Image::of(&lab, "docker.io/library/trusting:1");
    let config = image.config["config"].to_string();
    assert!(!config.contains("CA_CERTS") && !config.contains("SSL_CERT_FILE"), "{config}");
    let layers = image.layers();
    let [first, changed, again] = &layers[layers.len() - 3..] else { panic!("{layers:?}") };
    for (layer, file) in [(first, "https"), (again, "again")] {
        let names = of_layer(&lab, layer, "-t");
        let names: Vec<&str> =
            names.lines().map(|l| l.trim_end_matches('/')).filter(|l| *l != ".").collect();
        assert_eq!(names, [file]);
    }
    assert_eq!(of_layer(&lab, changed, &format!("-xO {}", &BUNDLE[1..])), "# none\n# mine\n");
    // Nor is it in any snapshot, nor in a blob that is not compressed.
    let certificate = std::fs::read_to_string(&bundle).unwrap();
    let line = certificate.lines().nth(1).unwrap();
    let store = lab.dir().join("containerd-root");
    let found = run(Command::new("grep").args(["-rlF", line]).arg(&store));
    assert_eq!((found.code, found.stdout.as_str()), (Some(1), ""), "{}", found.all());

    // The proxy network verifies servers with it, too, and steps trust it beside the proxy.
    let proxied = format!(
        "FROM web\nRUN curl -fsS {url} && test $(grep -c 'BEGIN CERTIFICATE' {BUNDLE}) = 2\n"
    );
    lab.stop_daemon();
    lab.daemon_flag("--proxy-network");
    lab.start_daemon();
    let built = build_text(&lab, "trusting:2", &proxied).ok();
    assert!(built.all().contains(&format!("- GET {url} -> 200")), "{}", built.all());

    // A renewed file counts from the next step on, and a broken one is named.
    let renewed = format!("FROM web\nRUN --network=none grep -q '^# renewed$' {BUNDLE}\n");
    let context = lab.context("renewed", &[("Dockerfile", &*renewed)]);
    build(&lab, "trusting:3", &context, &[]).failed();
    std::fs::write(&bundle, format!("# renewed\n{certificate}")).unwrap();
    build(&lab, "trusting:3", &context, &[]).ok();
    std::fs::write(&bundle, "-----BEGIN PRIVATE KEY-----\n").unwrap();
    let failed = build_text(&lab, "trusting:4", "FROM web\nRUN true\n").failed();
    assert!(failed.all().contains("not a certificate"), "{}", failed.all());
    assert!(failed.all().contains("ca.bundle"), "{}", failed.all());
}
