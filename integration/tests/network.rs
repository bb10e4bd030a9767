//! Steps on a network of CNI plug-ins, and what is left of it.

#![allow(clippy::unwrap_used)]

use shipway_integration::{any, build, build_text};
use shipway_testkit::{BaseImage, Lab};
use std::path::{Path, PathBuf};

/// Where Debian and others put the plug-ins.
const PLUG_INS: [&str; 2] = ["/usr/lib/cni", "/opt/cni/bin"];

/// The link of the host that this process' network has.
fn link() -> String {
    format!("swt{}", std::process::id() % 100_000)
}

/// Deletes the bridge at the end, however the test ends.
struct Bridge;

impl Drop for Bridge {
    fn drop(&mut self) {
        let _ = std::process::Command::new("ip").args(["link", "delete", &link()]).status();
    }
}

/// A lab whose steps are on a bridge of their own; with it the directory of the addresses in use.
fn lab_on_a_bridge() -> (Lab, PathBuf) {
    let bin = PLUG_INS.iter().find(|d| Path::new(d).join("bridge").exists()).expect("no CNI plug-ins; `cargo xtask test` installs them");
    let mut lab = Lab::on(any());
    let (config, addresses) = (lab.dir().join("cni.json"), lab.dir().join("addresses"));
    let subnet = format!("10.{}.{}.0/24", 100 + std::process::id() / 256 % 100, std::process::id() % 256);
    let ipam =
        format!(r#"{{"type":"host-local","dataDir":"{}","subnet":"{subnet}","routes":[{{"dst":"0.0.0.0/0"}}]}}"#, addresses.display());
    let bridge = format!(r#"{{"type":"bridge","bridge":"{}","isGateway":true,"ipam":{ipam}}}"#, link());
    let plug_ins = format!(r#"{{"cniVersion":"1.0.0","name":"swt","plugins":[{{"type":"loopback"}},{bridge}]}}"#);
    std::fs::write(&config, plug_ins).unwrap();
    let config = config.display();
    lab.configure_worker(&format!("networkMode = \"cni\"\ncniConfigPath = \"{config}\"\ncniBinaryPath = \"{bin}\"\ncniPoolSize = 2\n"));
    lab.start_registry();
    BaseImage::busybox().push(&lab.registry(), "library/busybox", "latest");
    lab.start_daemon();
    (lab, addresses)
}

fn in_use(addresses: &Path) -> usize {
    let names = std::fs::read_dir(addresses.join("swt")).into_iter().flatten().flatten().map(|e| e.file_name());
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
    let failed = build_text(&lab, "net:2", "FROM busybox\nRUN ping -c 1 -w 1 203.0.113.1\n").failed();
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
