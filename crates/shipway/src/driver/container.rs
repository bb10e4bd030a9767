//! The driver `docker-container`: a daemon in a privileged container that Docker's program makes,
//! with its state in a volume. Containers get no GPUs.

use std::{path::Path, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD};
use shipway_client::Location;
use shipway_fault::{Fault, Result};

use super::{IMAGE, State, arguments, option, program::Program, variables};
use crate::builders::Node;

/// Options that are flags of `docker create`, too.
const FLAGS: [&str; 9] = [
    "network",
    "memory",
    "memory-swap",
    "cpu-period",
    "cpu-quota",
    "cpu-shares",
    "cpuset-cpus",
    "cpuset-mems",
    "cgroup-parent",
];
/// All options but variables. Images are not verified, so that there is nothing to allow.
pub(super) const OPTIONS: &[&str] = &[
    "image",
    "restart-policy",
    "default-load",
    "allow-untrusted-image",
    FLAGS[0],
    FLAGS[1],
    FLAGS[2],
    FLAGS[3],
    FLAGS[4],
    FLAGS[5],
    FLAGS[6],
    FLAGS[7],
    FLAGS[8],
];
/// How often a new daemon is asked whether it is ready, each time after a longer pause.
const TRIES: u32 = 15;
/// The first pause.
const PAUSE: Duration = Duration::from_millis(120);

/// `docker`, for the engine or context that the node names.
fn docker(node: &Node) -> Program {
    let before = match node.endpoint.as_str() {
        "" | "default" => Vec::new(),
        host if host.contains("://") => vec!["--host".to_owned(), host.to_owned()],
        context => vec!["--context".to_owned(), context.to_owned()],
    };
    Program::new("docker", "install Docker's program, for example the package docker-cli", before)
}

/// The container's name, as buildx gives it.
fn name(node: &Node) -> String {
    format!("buildx_buildkit_{}", node.name)
}

fn volume(node: &Node) -> String {
    format!("{}_state", name(node))
}

pub(super) async fn state(node: &Node) -> Result<State> {
    let asked = ["container", "inspect", "--format", "{{.State.Running}}", &name(node)];
    let said = docker(node).run(&asked, None).await?;
    if said.failed_with("no such container") {
        return Ok(State::Inactive);
    }
    Ok(match said.ok()?.trim() {
        "true" => State::Running,
        _ => State::Stopped,
    })
}

/// Starts the daemon if it does not run; where to connect to.
pub(super) async fn boot(node: &Node) -> Result<Location> {
    let (docker, name) = (docker(node), name(node));
    match state(node).await? {
        State::Running => {}
        State::Stopped => _ = docker.ok(&["start", &name], None).await?,
        State::Inactive => create(node, &docker).await?,
    }
    let mut tries = 1;
    loop {
        let asked = docker.run(&["exec", &name, "buildctl", "debug", "workers"], None).await?;
        if asked.is_ok() {
            break;
        }
        if tries > TRIES {
            let fault = asked.ok().err().unwrap_or_else(|| Fault::unavailable("no answer"));
            return Err(fault.hint(format!("`docker logs {name}` says what the daemon did")));
        }
        tokio::time::sleep(PAUSE * tries).await;
        tries += 1;
    }
    let argv = docker.argv(&["exec", "-i", &name, "buildctl", "dial-stdio"]);
    Ok(Location::Command { url: format!("docker-container://{name}"), argv })
}

/// The arguments of `docker create`.
fn creation(node: &Node, engine: &str) -> Vec<String> {
    let mount = format!("type=volume,source={},target=/var/lib/buildkit", volume(node));
    let restart = option(node, "restart-policy").unwrap_or("unless-stopped");
    let fixed = ["create", "--name", &name(node), "--privileged", "--init", "--restart", restart]
        .map(str::to_owned);
    let mut words: Vec<String> = fixed.into();
    words.extend(["--mount".to_owned(), mount]);
    let cgroups = engine.contains("cgroupfs").then_some("/docker/buildx");
    for flag in FLAGS {
        // Where cgroups are files, all that builders do is below one, so that it can be limited.
        let value = match (flag, cgroups) {
            ("cgroup-parent", None) => None,
            ("cgroup-parent", usual) => option(node, flag).or(usual),
            _ => option(node, flag),
        };
        words.extend(value.into_iter().flat_map(|v| [format!("--{flag}"), v.to_owned()]));
    }
    if engine.contains("name=userns") {
        words.extend(["--userns".to_owned(), "host".to_owned()]);
    }
    for (key, value) in variables(node) {
        words.extend(["--env".to_owned(), format!("{key}={value}")]);
    }
    words.push(option(node, "image").unwrap_or(IMAGE).to_owned());
    words.extend(arguments(node));
    words
}

async fn create(node: &Node, docker: &Program) -> Result<()> {
    let image = option(node, "image").unwrap_or(IMAGE);
    let pulled = docker.run(&["pull", "--quiet", image], None).await?;
    if !pulled.is_ok() && !docker.run(&["image", "inspect", image], None).await?.is_ok() {
        return pulled.ok().map(drop);
    }
    let asked = ["info", "--format", "{{.CgroupDriver}} {{json .SecurityOptions}}"];
    let engine = docker.ok(&asked, None).await?;
    let words = creation(node, &engine);
    docker.ok(&words.iter().map(String::as_str).collect::<Vec<_>>(), None).await?;
    let name = name(node);
    if node.files.as_ref().is_some_and(|files| !files.is_empty()) {
        let dir = tempfile::Builder::new().prefix("shipway-").tempdir();
        let dir = dir.map_err(|e| Fault::io("make a temporary directory", e))?;
        write(node, dir.path())?;
        let from = dir.path().join("buildkit").display().to_string();
        docker.ok(&["cp", &from, &format!("{name}:/etc")], None).await?;
    }
    docker.ok(&["start", &name], None).await.map(drop)
}

/// Writes the files of the daemon below `buildkit` in `dir`.
fn write(node: &Node, dir: &Path) -> Result<()> {
    for (name, data) in node.files.iter().flatten() {
        let is_inside =
            !name.is_empty() && name.split('/').all(|part| !matches!(part, "" | "." | ".."));
        if !is_inside {
            return Err(Fault::invalid(format!("the builder has a file with the name {name:?}")));
        }
        let data = STANDARD
            .decode(data)
            .map_err(|e| Fault::invalid(format!("the file {name} of the builder: {e}")))?;
        let path = dir.join("buildkit").join(name);
        let failed = |e| Fault::io(format!("write {}", path.display()), e);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(failed)?;
        }
        std::fs::write(&path, data).map_err(failed)?;
    }
    Ok(())
}

pub(super) async fn stop(node: &Node) -> Result<()> {
    match state(node).await? {
        State::Running => docker(node).ok(&["stop", &name(node)], None).await.map(drop),
        State::Stopped | State::Inactive => Ok(()),
    }
}

/// Removes the container, and its volume unless `keep_state`.
pub(super) async fn remove(node: &Node, keep_state: bool) -> Result<()> {
    let (docker, name) = (docker(node), name(node));
    if state(node).await? == State::Inactive {
        return Ok(());
    }
    docker.ok(&["rm", "--force", "--volumes", &name], None).await?;
    if keep_state {
        return Ok(());
    }
    let said = docker.run(&["volume", "rm", &volume(node)], None).await?;
    if said.failed_with("no such volume") { Ok(()) } else { said.ok().map(drop) }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn node(options: &[(&str, &str)]) -> Node {
        let options = options.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        Node {
            name: "b0".to_owned(),
            endpoint: "far".to_owned(),
            driver_opts: Some(options.collect()),
            flags: Some(vec!["--debug".to_owned()]),
            ..Node::default()
        }
    }

    #[test]
    fn containers_are_made_as_buildx_makes_them() {
        let plain = creation(&node(&[]), "systemd [\"name=seccomp\"]");
        assert_eq!(
            plain.join(" "),
            "create --name buildx_buildkit_b0 --privileged --init --restart unless-stopped --mount \
             type=volume,source=buildx_buildkit_b0_state,target=/var/lib/buildkit \
             moby/buildkit:buildx-stable-1 --debug"
        );
        let options = [
            ("network", "host"),
            ("memory", "2g"),
            ("env.A", "b c"),
            ("image", "r.io/x"),
            ("restart-policy", "no"),
        ];
        let full = creation(&node(&options), "cgroupfs [\"name=userns\"]").join(" ");
        for part in [
            "--restart no ",
            "--network host --memory 2g --cgroup-parent /docker/buildx --userns host",
            "--env A=b c r.io/x --debug",
        ] {
            assert!(full.contains(part), "{full} lacks {part:?}");
        }
        let argv = docker(&node(&[])).argv(&["stop", "x"]);
        assert_eq!(argv, ["docker", "--context", "far", "stop", "x"]);
    }

    #[test]
    fn files_stay_inside() {
        let dir = tempfile::tempdir().unwrap();
        let with = |name: &str, data: &str| Node {
            files: Some(BTreeMap::from([(name.to_owned(), data.to_owned())])),
            ..Node::default()
        };
        write(&with("certs/r.io/ca.pem", "YQ=="), dir.path()).unwrap();
        assert_eq!(std::fs::read(dir.path().join("buildkit/certs/r.io/ca.pem")).unwrap(), b"a");
        for name in ["../x", "/x", "a/../../x", ""] {
            assert!(write(&with(name, "YQ=="), dir.path()).is_err(), "{name}");
        }
        assert!(write(&with("x", "not base64"), dir.path()).is_err());
    }
}
