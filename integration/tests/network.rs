//! Steps on a network of CNI plug-ins, and what is left of it.

#![allow(clippy::unwrap_used)]

use shipway_integration::{any, build, build_text};
use shipway_testkit::{BaseImage, Lab, run};
use std::path::{Path, PathBuf};

/// Where Debian and others put the plug-ins.
const PLUG_INS: [&str; 2] = ["/usr/lib/cni", "/opt/cni/bin"];

/// The link of the host that this process' network has.
fn link() -> String {
    format!("swt{}", std::process::id() % 100_000)
}

/// Deletes the bridge at the end, however the test ends.
pub(crate) struct Bridge;

impl Drop for Bridge {
    fn drop(&mut self) {
        let _ = std::process::Command::new("ip").args(["link", "delete", &link()]).status();
    }
}

/// Where the plug-ins are here.
fn plug_ins() -> &'static str {
    let mut all = PLUG_INS.iter();
    all.find(|d| Path::new(d).join("bridge").exists())
        .expect("no CNI plug-ins; `cargo xtask test` installs them")
}

/// A lab with the configuration of a bridge of its own; with it the directory of the addresses in
/// use.
fn lab_with_a_bridge() -> (Lab, PathBuf, PathBuf) {
    let lab = Lab::on(any());
    let (config, addresses) = (lab.dir().join("cni.json"), lab.dir().join("addresses"));
    let subnet =
        format!("10.{}.{}.0/24", 100 + std::process::id() / 256 % 100, std::process::id() % 256);
    let ipam = format!(
        r#"{{"type":"host-local","dataDir":"{}","subnet":"{subnet}","routes":[{{"dst":"0.0.0.0/0"}}]}}"#,
        addresses.display()
    );
    let bridge =
        format!(r#"{{"type":"bridge","bridge":"{}","isGateway":true,"ipam":{ipam}}}"#, link());
    let plug_ins = format!(
        r#"{{"cniVersion":"1.0.0","name":"swt","plugins":[{{"type":"loopback"}},{bridge}]}}"#
    );
    std::fs::write(&config, plug_ins).unwrap();
    (lab, config, addresses)
}

/// A lab whose steps are on a bridge of their own; with it the directory of the addresses in use.
pub(crate) fn lab_on_a_bridge() -> (Lab, PathBuf) {
    let (mut lab, config, addresses) = lab_with_a_bridge();
    let (config, bin) = (config.display(), plug_ins());
    lab.configure_worker(&format!("networkMode = \"cni\"\ncniConfigPath = \"{config}\"\ncniBinaryPath = \"{bin}\"\ncniPoolSize = 2\n"));
    lab.start_registry();
    BaseImage::busybox().push(&lab.registry(), "library/busybox", "latest");
    lab.start_daemon();
    (lab, addresses)
}

/// What a step does on the bridge of [`lab_with_a_bridge`].
const ON_BRIDGE: &str = "ip -4 addr show eth0 | grep -q 'inet 10[.]1[0-9][0-9][.]'";

#[test]
fn a_network_by_name_is_for_builds_that_are_granted_it() {
    let _bridge = Bridge;
    let (mut lab, config, addresses) = lab_with_a_bridge();
    lab.configure_worker("networkMode = \"host\"\n");
    let (config, bin) = (config.display().to_string(), plug_ins());
    lab.configure_daemon(&format!(
        "[networks.corp]\n  cniConfigPath = \"{config}\"\n  cniBinaryPath = \"{bin}\"\n"
    ));
    lab.start_registry();
    BaseImage::busybox().push(&lab.registry(), "library/busybox", "latest");
    lab.start_daemon();
    let text = format!(
        "FROM busybox\nRUN --network=corp {ON_BRIDGE}\nRUN ! ({ON_BRIDGE})\nRUN --network=none ! ({ON_BRIDGE})\n"
    );
    let context = lab.context("named", &[("Dockerfile", &*text)]);
    let refused = || {
        let refused = build(&lab, "named:1", &context, &[]).failed();
        assert!(refused.all().contains("network.corp is not allowed"), "{}", refused.all());
        assert!(refused.all().contains("--allow network.corp"), "{}", refused.all());
    };
    refused();
    assert_eq!(in_use(&addresses), 0);
    build(&lab, "named:1", &context, &["--allow", "network.corp"]).ok();
    assert_eq!(in_use(&addresses), 1);
    // What is cached needs the permission, too.
    refused();
    // All steps of a build; one that says otherwise is elsewhere.
    let text =
        format!("FROM busybox\nRUN {ON_BRIDGE} && true\nRUN --network=none ! ({ON_BRIDGE})\n");
    let all = lab.context("all", &[("Dockerfile", &*text)]);
    let flags = ["--network", "corp", "--allow", "network.corp"];
    build(&lab, "named:2", &all, &flags).ok();
    assert_eq!(in_use(&addresses), 1, "a clean namespace was not used again");
    let other =
        build_text(&lab, "named:3", "FROM busybox\nRUN --network=corporate true\n").failed();
    assert!(
        other.all().contains("invalid network mode \"corporate\": no such network")
            && other.all().contains("the daemon's configuration has corp"),
        "{}",
        other.all()
    );
    let unknown = build(&lab, "named:4", &all, &["--allow", "network.corporate"]).failed();
    assert!(unknown.all().contains("no such network"), "{}", unknown.all());

    // A killed daemon's successor gives back what it had; this one asks nobody to ask.
    lab.kill_daemon();
    lab.configure_daemon("  autoAllowed = true\n");
    lab.start_daemon();
    assert_eq!(in_use(&addresses), 0);
    build(&lab, "named:5", &all, &["--network", "corp", "--no-cache"]).ok();
    assert!(lab.stop_daemon(), "the daemon had to be killed");
    assert_eq!(in_use(&addresses), 0);
}

#[test]
fn steps_resolve_names_as_the_host_does_at_the_moment() {
    let mut lab = Lab::on(any());
    let resolver = lab.dir().join("resolv.conf");
    let servers = |text: &str| std::fs::write(&resolver, text).unwrap();
    servers("nameserver 192.0.2.1\nsearch one.example\n");
    lab.configure_daemon(&format!("[dns]\n  resolvConf = \"{}\"\n", resolver.display()));
    lab.start_registry();
    BaseImage::busybox().push(&lab.registry(), "library/busybox", "latest");
    lab.start_daemon();
    let seen = |name: &str| {
        let text = format!(
            "FROM busybox\nRUN cat /etc/resolv.conf > /{name}\nFROM scratch\nCOPY --from=0 /{name} /\n"
        );
        let out = lab.dir().join("out");
        let context = lab.context(name, &[("Dockerfile", &*text)]);
        build(&lab, name, &context, &["-o", &out.to_string_lossy()]).ok();
        std::fs::read_to_string(out.join(name)).unwrap()
    };
    assert_eq!(seen("first"), "nameserver 192.0.2.1\nsearch one.example\n");
    servers("nameserver 192.0.2.2\n");
    assert_eq!(seen("second"), "nameserver 192.0.2.2\n");
    std::fs::remove_file(&resolver).unwrap();
    let failed = build_text(&lab, "third", "FROM busybox\nRUN true\n").failed();
    assert!(failed.all().contains("resolv.conf, the resolver's configuration"), "{}", failed.all());
    assert!(failed.all().contains("dns.resolvConf"), "{}", failed.all());
}

pub(crate) fn in_use(addresses: &Path) -> usize {
    let names = std::fs::read_dir(addresses.join("swt"))
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.file_name());
    names.filter(|n| n.to_string_lossy().starts_with("10.")).count()
}

#[test]
fn steps_have_an_address_each_and_nothing_stays() {
    let _bridge = Bridge;
    let (mut lab, addresses) = lab_on_a_bridge();
    let text = "FROM busybox\nRUN ip -4 addr show eth0 | grep -o 'inet 10[.0-9]*' > /address && ip route | grep -q ^default\n\
                RUN --network=none test \"$(ls /sys/class/net)\" = lo\n\
                FROM busybox AS one\nRUN test -e /sys/class/net/eth0 && echo 1 > /one\nFROM busybox AS two\nRUN test -e /sys/class/net/eth0 && echo 2 > /two\n\
                FROM scratch\nCOPY --from=0 /address /\nCOPY --from=one /one /\nCOPY --from=two /two /\n";
    let files = lab.dir().join("out");
    let context = lab.context("net", &[("Dockerfile", text)]);
    build(&lab, "net:1", &context, &["-o", &files.to_string_lossy()]).ok();
    let address = std::fs::read_to_string(files.join("address")).unwrap();
    assert!(address.starts_with("inet 10."), "{address}");
    // Clean namespaces wait for the next step, within the pool's size.
    assert!((1..=2).contains(&in_use(&addresses)), "{} addresses", in_use(&addresses));
    let failed =
        build_text(&lab, "net:2", "FROM busybox\nRUN ping -c 1 -w 1 203.0.113.1\n").failed();
    assert!(failed.all().contains("exit code: 1"), "{}", failed.all());

    // A killed daemon's successor takes back what it had.
    lab.kill_daemon();
    lab.start_daemon();
    assert!(in_use(&addresses) <= 2);
    build_text(&lab, "net:3", "FROM busybox\nRUN test -e /sys/class/net/eth0\n").ok();
    assert!(lab.stop_daemon(), "the daemon had to be killed");
    assert_eq!(in_use(&addresses), 0);
    let links = std::fs::read_dir(format!("/sys/class/net/{}/brif", link())).unwrap().count();
    assert_eq!(links, 0, "links are left on the bridge");
}

#[test]
fn a_proxied_step_goes_out_from_the_network_that_it_would_have_had() {
    let _bridge = Bridge;
    let (mut lab, addresses) = lab_on_a_bridge();
    lab.stop_daemon();
    lab.daemon_flag("--proxy-network");
    lab.start_daemon();
    // Its address on the bridge is known once the first step has made the bridge.
    build_text(
        &lab,
        "proxied:1",
        "FROM busybox\nRUN true\nRUN --network=none test -z \"$HTTP_PROXY\"\n",
    )
    .ok();
    let told =
        run(std::process::Command::new("ip").args(["-4", "-o", "addr", "show", "dev", &link()]))
            .ok()
            .stdout;
    let gateway = told
        .split_whitespace()
        .find(|w| w.starts_with("10."))
        .unwrap()
        .split('/')
        .next()
        .unwrap()
        .to_owned();
    let listener = std::net::TcpListener::bind((gateway.as_str(), 0)).unwrap();
    let loopback = std::net::TcpListener::bind(("127.0.0.2", 0)).unwrap();
    let (port, hidden) =
        (listener.local_addr().unwrap().port(), loopback.local_addr().unwrap().port());
    let peers = std::thread::spawn(move || {
        use std::io::{Read as _, Write as _};
        let (mut stream, peer) = listener.accept().unwrap();
        let _ = stream.read(&mut [0; 4096]);
        stream
            .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nyes")
            .unwrap();
        peer.ip().to_string()
    });
    let text = format!(
        "FROM busybox\nRUN test \"$(ls /sys/class/net)\" = lo && test $(wget -q -O- http://{gateway}:{port}/) = yes\n\
         RUN ! wget -q -O- http://127.0.0.2:{hidden}/\n"
    );
    let built = build_text(&lab, "proxied:2", &text).ok();
    let peer = peers.join().unwrap();
    assert!(peer.starts_with("10.") && peer != gateway, "the proxy went out from {peer}");
    assert!(
        built.all().contains(&format!("- GET http://127.0.0.2:{hidden}/ -> 502")),
        "{}",
        built.all()
    );
    assert!(lab.stop_daemon(), "the daemon had to be killed");
    assert_eq!(in_use(&addresses), 0);
}

#[test]
fn a_bridge_of_the_daemons_own_comes_and_goes_with_it() {
    let bin = plug_ins();
    let name = format!("swo{}", std::process::id() % 100_000);
    let subnet =
        format!("10.{}.{}.0/24", 200 + std::process::id() / 256 % 50, std::process::id() % 256);
    let mut lab = Lab::on(any());
    lab.configure_worker(&format!(
        "networkMode = \"bridge\"\nbridgeName = \"{name}\"\nbridgeSubnet = \"{subnet}\"\ncniBinaryPath = \"{bin}\"\n"
    ));
    lab.start_registry();
    BaseImage::busybox().push(&lab.registry(), "library/busybox", "latest");
    lab.start_daemon();
    let workers = lab.shipway(["workers", "--verbose"]).ok().all();
    assert!(workers.contains("worker.network") && workers.contains("cni"), "{workers}");
    let prefix = subnet.rsplit_once('.').unwrap().0.to_owned();
    let text = format!(
        "FROM busybox\nRUN ip -4 addr show eth0 | grep -q 'inet {prefix}' && ip route | grep -q ^default\n"
    );
    build_text(&lab, "bridge:1", &text).ok();
    let link = Path::new("/sys/class/net").join(&name);
    assert!(link.join("bridge").exists());
    // A successor that finds the bridge of a killed daemon leaves it where it is.
    assert!(lab.stop_daemon(), "the daemon had to be killed");
    assert!(!link.exists(), "the bridge stays behind");
    run(std::process::Command::new("ip").args(["link", "add", &name, "type", "bridge"])).ok();
    lab.start_daemon();
    assert!(lab.stop_daemon());
    let stays = link.exists();
    run(std::process::Command::new("ip").args(["link", "delete", &name])).ok();
    assert!(stays, "a bridge of somebody else's was removed");
}
