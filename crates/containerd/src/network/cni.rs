//! Owns the running of CNI plug-ins (specification 0.3 to 1.0): a list of programs, each given its
//! part of the configuration and the result of the one before.

use super::Bridge;
use serde_json::{Value, json};
use shipway_fault::{Class, Code, Fault, Result};
use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};
use tokio::{io::AsyncWriteExt, process::Command};

const LIMIT: Duration = Duration::from_secs(60);
const INTERFACE: &str = "eth0";

/// A network as configured.
#[derive(Debug)]
pub(super) struct CniNetwork {
    name: String,
    version: String,
    plugins: Vec<Value>,
    /// Where its programs are.
    dirs: Vec<PathBuf>,
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

impl CniNetwork {
    /// Reads a configuration and looks for its plug-ins.
    pub(super) fn load(config: &Path, bin: &Path) -> Result<Self> {
        let bytes = std::fs::read(config).map_err(|e| {
            Fault::io(format!("read the CNI configuration {}", config.display()), e)
        })?;
        let network = Self::parse(&bytes, vec![bin.into()])
            .map_err(|e| e.context(format!("CNI configuration {}", config.display())))?;
        network.with_programs()
    }

    /// A bridge of our own (row `so.net`), by the plug-ins that BuildKit ships where they are on
    /// `path`, else by those in `bin`.
    pub(super) fn bridge(bridge: &Bridge, bin: &Path, path: &OsStr) -> Result<Self> {
        let shipped = |kind: &str| {
            let name = format!("buildkit-cni-{kind}");
            let dir = std::env::split_paths(path)
                .find(|dir| dir.is_absolute() && dir.join(&name).is_file())?;
            Some((name, dir))
        };
        let kinds = ["loopback", "bridge", "host-local", "firewall"];
        let shipped: Option<Vec<_>> = kinds.iter().map(|kind| shipped(kind)).collect();
        let (names, dirs): (Vec<String>, Vec<PathBuf>) = match shipped {
            Some(found) => found.into_iter().unzip(),
            None => (kinds.iter().map(|&kind| kind.to_owned()).collect(), vec![bin.into()]),
        };
        let config = json!({
            "cniVersion": "1.0.0",
            "name": "buildkit",
            "plugins": [
                { "type": names[0] },
                {
                    "type": names[1],
                    "bridge": bridge.name,
                    "isDefaultGateway": true,
                    "ipMasq": true,
                    "ipam": { "type": names[2], "ranges": [[{ "subnet": bridge.subnet }]] },
                },
                { "type": names[3], "ingressPolicy": "same-bridge" },
            ],
        });
        Self::parse(config.to_string().as_bytes(), dirs)?.with_programs()
    }

    /// Its name, which its plug-ins know it by.
    #[cfg(test)]
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Itself, if all its programs are there.
    fn with_programs(self) -> Result<Self> {
        let all = self.plugins.iter().flat_map(|p| [text(p, "type"), text(&p["ipam"], "type")]);
        let missing = all
            .filter(|kind| !kind.is_empty())
            .find(|kind| self.program(kind).is_none())
            .map(str::to_owned);
        match missing {
            None => Ok(self),
            Some(kind) => {
                let dirs: Vec<_> = self.dirs.iter().map(|d| d.display().to_string()).collect();
                Err(Fault::not_found(format!("the CNI plug-in {kind} is not in {}", dirs.join(", ")))
                    .with_class(Class::Environment)
                    .hint("install CNI plug-ins (Debian: containernetworking-plugins, in /usr/lib/cni) or set the directory they are in"))
            }
        }
    }

    fn program(&self, kind: &str) -> Option<PathBuf> {
        self.dirs.iter().map(|dir| dir.join(kind)).find(|program| program.exists())
    }

    fn parse(bytes: &[u8], dirs: Vec<PathBuf>) -> Result<Self> {
        let value: Value =
            serde_json::from_slice(bytes).map_err(|e| Fault::invalid(format!("not JSON: {e}")))?;
        let plugins = match value.get("plugins") {
            Some(Value::Array(list)) => list.clone(),
            Some(_) => return Err(Fault::invalid("\"plugins\" is not a list")),
            None => vec![value.clone()],
        };
        let plain = |kind: &str| !kind.is_empty() && !kind.contains('/');
        if plugins.is_empty() || !plugins.iter().all(|p| plain(text(p, "type"))) {
            return Err(Fault::invalid("every plug-in needs a \"type\", the name of its program"));
        }
        let name = text(&value, "name");
        Ok(Self {
            name: if name.is_empty() { "shipway".into() } else { name.into() },
            version: value["cniVersion"].as_str().unwrap_or("0.3.1").into(),
            plugins,
            dirs,
        })
    }

    /// Connects the namespace.
    pub(super) async fn add(&self, id: &str, netns: &Path) -> Result<()> {
        let mut previous = None;
        for plugin in &self.plugins {
            previous = Some(self.call("ADD", plugin, previous.as_ref(), id, netns).await?);
        }
        Ok(())
    }

    /// Disconnects it; all plug-ins are called, whatever one says.
    pub(super) async fn del(&self, id: &str, netns: &Path) -> Result<()> {
        let mut result = Ok(());
        for plugin in self.plugins.iter().rev() {
            let done = self.call("DEL", plugin, None, id, netns).await;
            result = result.and(done.map(drop));
        }
        result
    }

    async fn call(
        &self,
        command: &str,
        plugin: &Value,
        previous: Option<&Value>,
        id: &str,
        netns: &Path,
    ) -> Result<Value> {
        let kind = text(plugin, "type");
        let what = || format!("CNI plug-in {kind} {command}");
        let mut config = plugin.clone();
        config["name"] = json!(self.name);
        config["cniVersion"] = json!(self.version);
        if let Some(result) = previous {
            config["prevResult"] = result.clone();
        }
        let program = self
            .program(kind)
            .ok_or_else(|| Fault::not_found(format!("the CNI plug-in {kind} is gone")))?;
        let path = std::env::join_paths(&self.dirs).unwrap_or_default();
        let mut child = Command::new(program)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .envs([
                ("CNI_COMMAND", command),
                ("CNI_CONTAINERID", id),
                ("CNI_IFNAME", INTERFACE),
                ("CNI_ARGS", "IgnoreUnknown=1"),
            ])
            .env("CNI_NETNS", netns)
            .env("CNI_PATH", path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|e| Fault::io(what(), e))?;
        let talk = async {
            if let Some(mut stdin) = child.stdin.take() {
                stdin.write_all(config.to_string().as_bytes()).await?;
            }
            child.wait_with_output().await
        };
        let output = tokio::time::timeout(LIMIT, talk)
            .await
            .map_err(|_| {
                Fault::new(
                    Code::DeadlineExceeded,
                    format!("{}: no answer within {} s", what(), LIMIT.as_secs()),
                )
            })?
            .map_err(|e| Fault::io(what(), e))?;
        let reply: Value = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
        if output.status.success() {
            return Ok(reply);
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let reason = [text(&reply, "msg"), text(&reply, "details"), said.trim()]
            .into_iter()
            .filter(|s| !s.is_empty())
            .collect::<Vec<_>>();
        Err(Fault::unavailable(format!(
            "{} failed ({}): {}",
            what(),
            output.status,
            reason.join("; ")
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(config: &str, expected: Option<(&str, usize)>) {
        let found = CniNetwork::parse(config.as_bytes(), vec!["/x".into()]).ok();
        assert_eq!(
            found.as_ref().map(|n| (n.name.as_str(), n.plugins.len())),
            expected,
            "{config}"
        );
    }

    #[test]
    fn a_bridge_is_made_by_what_buildkit_ships_or_else_by_the_usual_plug_ins() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let program = |name: &str| {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().expect("a parent")).expect("mkdir");
            std::fs::write(path, "").expect("write");
        };
        let bridge = Bridge { name: "b0".into(), subnet: "10.9.0.0/16".into() };
        let make = || CniNetwork::bridge(&bridge, &dir.path().join("bin"), dir.path().as_os_str());
        assert!(
            make()
                .expect_err("nothing is there")
                .to_string()
                .contains("the CNI plug-in loopback is not in")
        );
        for kind in ["loopback", "bridge", "firewall"] {
            program(&format!("bin/{kind}"));
        }
        assert!(make().expect_err("no addresses").to_string().contains("host-local"));
        program("bin/host-local");
        let kinds = |network: CniNetwork| {
            network.plugins.iter().map(|p| text(p, "type").to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(kinds(make().expect("a network")), ["loopback", "bridge", "firewall"]);
        for kind in ["loopback", "bridge", "host-local", "firewall"] {
            program(&format!("buildkit-cni-{kind}"));
        }
        let network = make().expect("a network");
        assert_eq!(
            (text(&network.plugins[1], "bridge"), text(&network.plugins[1]["ipam"], "type")),
            ("b0", "buildkit-cni-host-local")
        );
        assert_eq!(network.plugins[1]["ipam"]["ranges"][0][0]["subnet"], "10.9.0.0/16");
        assert_eq!(
            kinds(network),
            ["buildkit-cni-loopback", "buildkit-cni-bridge", "buildkit-cni-firewall"]
        );
    }

    #[test]
    fn a_configuration_is_one_plug_in_or_a_list() {
        check(r#"{"cniVersion":"1.0.0","name":"n","type":"bridge"}"#, Some(("n", 1)));
        check(r#"{"name":"n","plugins":[{"type":"bridge"},{"type":"firewall"}]}"#, Some(("n", 2)));
        check(r#"{"plugins":[{"type":"bridge"}]}"#, Some(("shipway", 1)));
        for bad in ["", "{}", r#"{"plugins":[]}"#, r#"{"plugins":{}}"#, r#"{"type":"../x"}"#] {
            check(bad, None);
        }
    }
}
