//! An unmodified `dockerd`, where it is, with containerd's image store on our snapshotter: it tells
//! whose layers it pulls, whatever the snapshotter's name.

#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};
use shipway_estargz::Output;
use shipway_integration::{lazy::lazy_layer, on_all};
use shipway_testkit::{BaseImage, Lab, LabOptions, Process, run, wait_for, which};
use std::{process::Command, time::Duration};

#[test]
fn dockerd_pulls_lazily_and_runs() {
    let (Some(dockerd), Some(docker)) = (which("dockerd"), which("docker")) else {
        eprintln!("dockerd or docker is absent");
        return;
    };
    on_all(|flavour| {
        let mut options = LabOptions::new(flavour);
        options.snapshotter = true;
        options.namespace = "moby".into();
        options.lazy_config = "background = false\n".into();
        let mut lab = Lab::start(options);
        lab.start_registry();
        let mut image = BaseImage::busybox();
        image.layers = image.layers.iter().map(|l| lazy_layer(l, Output::Estargz)).collect();
        image.push(&lab.registry(), "whale", "1");
        let image = format!("{}/whale:1", lab.registry());

        let at = |name: &str| lab.dir().join("docker").join(name);
        std::fs::create_dir_all(at("")).unwrap();
        let address = format!("unix://{}", at("docker.sock").display());
        let config = json!({
            "containerd": lab.containerd_socket(),
            "features": {"containerd-snapshotter": true},
            "storage-driver": "shipway",
            "hosts": [address],
            "data-root": at("data"),
            "exec-root": at("exec"),
            "pidfile": at("pid"),
            "bridge": "none",
            "iptables": false,
            "ip6tables": false,
            "ip-forward": false,
            "insecure-registries": [lab.registry()],
        });
        std::fs::write(at("daemon.json"), config.to_string()).unwrap();
        let mut command = Command::new(&dockerd);
        command.env("PATH", lab.path()).arg("--config-file").arg(at("daemon.json"));
        let mut daemon = Process::start("dockerd", &mut command, &at("log"));
        let docker = |arguments: &[&str]| {
            run(Command::new(&docker)
                .env("HOME", at(""))
                .args(["--host", &address])
                .args(arguments))
        };
        wait_for("dockerd to answer", Duration::from_secs(60), || {
            daemon.alive()?;
            let answer = docker(&["version"]);
            if answer.code == Some(0) { Ok(()) } else { Err(answer.all()) }
        });
        docker(&["pull", "--quiet", &image]).ok();
        let said = docker(&["run", "--rm", "--network", "none", &image, "cat", "/etc/group"]);
        assert_eq!(said.ok().stdout, "root:x:0:\nnogroup:x:65534:\n", "{}", daemon.tail(20));
        let status = run(lab.snapshotter_command().args(["status", "--json"])).ok().stdout;
        let status: Value = serde_json::from_str(&status).unwrap();
        assert_eq!(status["lazy"]["layers"].as_array().unwrap().len(), 1, "{status}");
        eprintln!("docker images:\n{}", docker(&["images"]).all());
        assert!(daemon.stop(Duration::from_secs(30)), "{}", daemon.tail(20));
    });
}
