//! Builders whose daemons are started for them (rows `bx.drv.docker-container`,
//! `bx.drv.kubernetes`): by stand-ins for `docker` and `kubectl`, which note what they are asked
//! for and lead to a real daemon.

#![allow(clippy::unwrap_used)]

use std::{fs, os::unix::fs::PermissionsExt as _, path::PathBuf, process::Command};

use serde_json::Value;
use shipway_integration::any;
use shipway_testkit::{Finished, Lab, built, run};

/// A container engine of one container, whose state is a file.
const DOCKER: &str = r#"case "$*" in
*"container inspect"*)
  [ -e "$STATE" ] || { echo "Error response from daemon: No such container: x" >&2; exit 1; }
  cat "$STATE" ;;
*"pull --quiet"*) [ -z "$OFFLINE" ] || { echo "no route to host" >&2; exit 1; } ;;
*"image inspect"*) ;;
*" info "*) echo 'cgroupfs ["name=seccomp"]' ;;
*" create "*) echo false > "$STATE" ;;
*" cp "*) for word; do [ -d "$word" ] && cp -r "$word" "$STATE.files"; done; true ;;
*" start "*) echo true > "$STATE" ;;
*" stop "*) echo false > "$STATE" ;;
*" rm --force"*) rm "$STATE" ;;
*" volume rm "*) ;;
*"buildctl debug workers"*) grep -q true "$STATE" ;;
*"buildctl dial-stdio"*) exec "$CLIENT" --addr "$ADDRESS" dial-stdio ;;
*) echo "unexpected: $*" >&2; exit 9 ;;
esac
"#;

/// A cluster of one pod, whose manifest is a file.
const KUBECTL: &str = r#"case "$*" in
*" get deployment "*)
  [ -e "$STATE" ] || { echo 'Error from server (NotFound): deployments.apps "x" not found' >&2; exit 1; }
  echo 1 ;;
*" apply "*) cat > "$STATE" ;;
*" rollout status "*) ;;
*" get pods "*) echo '{"items":[
  {"metadata":{"name":"gone","deletionTimestamp":"x"},"status":{"phase":"Running"}},
  {"metadata":{"name":"pod-1"},"status":{"phase":"Running"}}]}' ;;
*"buildctl dial-stdio"*) exec "$CLIENT" --addr "$ADDRESS" dial-stdio ;;
*" delete "*) rm -f "$STATE" ;;
*) echo "unexpected: $*" >&2; exit 9 ;;
esac
"#;

struct Scene {
    lab: Lab,
    dir: PathBuf,
}

impl Scene {
    fn new(program: &str, script: &str) -> Self {
        let lab = Lab::complete(any());
        let dir = lab.context("drivers", &[]);
        fs::create_dir_all(dir.join("bin")).unwrap();
        let path = dir.join("bin").join(program);
        let log = dir.join("log");
        let log =
            format!("#!/bin/sh\nprintf '%s\\n' \"$*\" >> '{}'\nset -- \"$@\"\n", log.display());
        fs::write(&path, log + script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        Self { lab, dir }
    }

    fn command(&self, program: PathBuf) -> Command {
        let usual = std::env::var_os("PATH").unwrap();
        let all = std::iter::once(self.dir.join("bin")).chain(std::env::split_paths(&usual));
        let mut command = Command::new(program);
        command
            .env("PATH", std::env::join_paths(all).unwrap())
            .env("BUILDX_CONFIG", self.dir.join("buildx"))
            .env("STATE", self.dir.join("state"))
            .env("CLIENT", built("shipway"))
            .env("ADDRESS", self.lab.daemon_address())
            .env("DOCKER_HOST", "unix:///run/other/docker.sock")
            .env("KUBECONFIG", "/home/me/kube config")
            .env_remove("BUILDX_BUILDER")
            .env_remove("SHIPWAY_HOST")
            .env_remove("BUILDKIT_HOST");
        command
    }

    #[track_caller]
    fn ours(&self, arguments: &[&str]) -> Finished {
        run(self.command(built("shipway")).args(arguments))
    }

    /// What the program was asked for since the last time, without questions that are repeated.
    fn asked(&self) -> Vec<String> {
        let log = self.dir.join("log");
        let text = fs::read_to_string(&log).unwrap_or_default();
        let _ = fs::remove_file(log);
        text.lines().map(str::to_owned).collect()
    }

    /// Builds with the builder that is used.
    #[track_caller]
    fn builds(&self) {
        let context =
            self.lab.context("tiny", &[("Dockerfile", "FROM busybox\nRUN echo made > /word\n")]);
        let out = self.dir.join("out");
        let (out, context) = (out.display().to_string(), context.display().to_string());
        self.ours(&["build", "--progress", "plain", "--output", &out, &context]).ok();
        assert_eq!(fs::read_to_string(self.dir.join("out/word")).unwrap(), "made\n");
        fs::remove_dir_all(self.dir.join("out")).unwrap();
    }
}

#[test]
fn a_container_is_started_used_stopped_and_removed() {
    let scene = Scene::new("docker", DOCKER);
    let config = scene.dir.join("b.toml");
    fs::write(&config, "debug = true\n").unwrap();
    let config = config.display().to_string();
    let create = ["create", "--name", "box", "--driver", "docker-container", "--use"];
    let options = ["--driver-opt", "image=r.io/x,env.A=b", "--buildkitd-config", &config];
    let words: Vec<&str> = create.into_iter().chain(options).collect();
    assert_eq!(scene.ours(&words).ok().stdout, "box\n");
    assert!(scene.asked().is_empty(), "nothing is started before it is needed");
    assert!(scene.ours(&["ls"]).ok().stdout.contains("inactive"));
    scene.asked();
    scene.builds();
    let host = "--host unix:///run/other/docker.sock";
    let name = "buildx_buildkit_box0";
    let inspect = format!("{host} container inspect --format {{{{.State.Running}}}} {name}");
    let workers = format!("{host} exec {name} buildctl debug workers");
    let dial = format!("{host} exec -i {name} buildctl dial-stdio");
    let asked = scene.asked();
    let copied = asked.iter().position(|line| line.contains(" cp ")).unwrap();
    assert!(asked[copied].ends_with(&format!("/buildkit {name}:/etc")), "{}", asked[copied]);
    let mut others = asked.clone();
    others.remove(copied);
    let start = format!("{host} start {name}");
    assert_eq!(
        others,
        [
            inspect.clone(),
            format!("{host} pull --quiet r.io/x"),
            format!("{host} info --format {{{{.CgroupDriver}}}} {{{{json .SecurityOptions}}}}"),
            format!(
                "{host} create --name {name} --privileged --init --restart unless-stopped --mount \
                 type=volume,source={name}_state,target=/var/lib/buildkit --cgroup-parent \
                 /docker/buildx --env A=b r.io/x --config /etc/buildkit/buildkitd.toml \
                 --allow-insecure-entitlement=network.host"
            ),
            start.clone(),
            workers.clone(),
            dial.clone(),
        ]
    );
    let given = fs::read_to_string(scene.dir.join("state.files/buildkitd.toml")).unwrap();
    assert_eq!(given.trim(), "debug = true");
    // buildx has the same builder, with the same options.
    if let Some(buildx) = scene.lab.buildx() {
        let program = buildx.get_program().into();
        let shown = run(scene.command(program).args(["inspect", "box"])).all();
        let rows: Vec<Vec<&str>> = shown.lines().map(|l| l.split_whitespace().collect()).collect();
        assert!(rows.contains(&vec!["Driver:", "docker-container"]), "{shown}");
        assert!(rows.contains(&vec!["Endpoint:", "unix:///run/other/docker.sock"]), "{shown}");
    } else {
        eprintln!("docker-buildx is absent");
    }
    let listed = scene.ours(&["ls"]).ok().stdout;
    assert!(listed.lines().any(|l| l.contains("box0") && l.contains("running")), "{listed}");
    scene.asked();
    scene.ours(&["stop"]).ok();
    assert_eq!(scene.asked(), [inspect.clone(), format!("{host} stop {name}")]);
    assert!(scene.ours(&["ls"]).ok().stdout.contains("stopped"));
    scene.asked();
    scene.ours(&["inspect", "--bootstrap"]).ok();
    assert_eq!(scene.asked(), [inspect.clone(), start, workers, dial]);
    scene.ours(&["rm", "box"]).ok();
    let removed =
        [format!("{host} rm --force --volumes {name}"), format!("{host} volume rm {name}_state")];
    assert_eq!(scene.asked(), [inspect, removed[0].clone(), removed[1].clone()]);
    assert!(!scene.ours(&["ls"]).ok().stdout.contains("box"));
}

#[test]
fn pods_are_made_used_and_removed() {
    let scene = Scene::new("kubectl", KUBECTL);
    let create = ["create", "--name", "cluster", "--driver", "kubernetes", "--use"];
    let options = ["--node", "my_node", "--driver-opt", "namespace=ns,replicas=2"];
    let words: Vec<&str> = create.into_iter().chain(options).collect();
    scene.ours(&words).ok();
    scene.builds();
    let before = "--kubeconfig=/home/me/kube config --namespace=ns";
    let get =
        format!("{before} get deployment my-node --output jsonpath={{.status.readyReplicas}}");
    let reach = [
        format!("{before} rollout status deployment/my-node --timeout=120s"),
        format!("{before} get pods --selector app=my-node --output json"),
        format!("{before} exec -i pod-1 --container=buildkitd -- buildctl dial-stdio"),
    ];
    let mut want = vec![get.clone(), format!("{before} apply --filename -")];
    want.extend(reach.clone());
    assert_eq!(scene.asked(), want);
    let made: Value = serde_json::from_slice(&fs::read(scene.dir.join("state")).unwrap()).unwrap();
    assert_eq!(made["items"][0]["spec"]["replicas"], 2);
    assert_eq!(made["items"][0]["metadata"]["name"], "my-node");
    // What is there is not made again.
    scene.builds();
    assert_eq!(scene.asked()[1..], reach);
    scene.ours(&["stop", "cluster"]).ok();
    assert!(scene.asked().is_empty(), "pods stay, as with buildx");
    scene.ours(&["rm", "cluster"]).ok();
    assert_eq!(scene.asked(), [format!("{before} delete --ignore-not-found deployment/my-node")]);
}

#[test]
fn what_is_missing_is_named() {
    let scene = Scene::new("docker", DOCKER);
    scene.ours(&["create", "--name", "box", "--driver", "docker-container", "--use"]).ok();
    let mut command = scene.command(built("shipway"));
    let failed = run(command.env("PATH", "/nonexistent").args(["workers"])).failed().all();
    assert!(failed.contains("docker is not installed"), "{failed}");
    assert!(failed.contains("hint: install Docker's program"), "{failed}");
    // Without a way to the registry, the image that is there does.
    let mut command = scene.command(built("shipway"));
    run(command.env("OFFLINE", "1").args(["workers"])).ok();
    let refused = scene.ours(&["create", "--name", "x", "--driver", "docker"]).failed().all();
    assert!(refused.contains("the driver \"docker\" is not implemented"), "{refused}");
    let bad = ["create", "--driver", "kubernetes", "--driver-opt", "replicas=none"];
    assert!(scene.ours(&bad).failed().all().contains("replicas has the invalid value"));
}
