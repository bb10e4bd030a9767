//! Owns the running of CNI plug-ins (specification 0.3 to 1.0): a list of programs, each given its part of the configuration and the result of
//! the one before.

use serde_json::{Value, json};
use shipway_fault::{Class, Code, Fault, Result};
use std::{
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
    bin: PathBuf,
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

impl CniNetwork {
    /// Reads a configuration and looks for its plug-ins.
    pub(super) fn load(config: &Path, bin: &Path) -> Result<Self> {
        let bytes = std::fs::read(config).map_err(|e| Fault::io(format!("read the CNI configuration {}", config.display()), e))?;
        let network = Self::parse(&bytes, bin).map_err(|e| e.context(format!("CNI configuration {}", config.display())))?;
        for plugin in &network.plugins {
            let program = bin.join(text(plugin, "type"));
            if !program.exists() {
                return Err(Fault::not_found(format!("the CNI plug-in {} does not exist", program.display()))
                    .with_class(Class::Environment)
                    .hint("install CNI plug-ins (Debian: containernetworking-plugins, in /usr/lib/cni) or set the directory they are in"));
            }
        }
        Ok(network)
    }

    fn parse(bytes: &[u8], bin: &Path) -> Result<Self> {
        let value: Value = serde_json::from_slice(bytes).map_err(|e| Fault::invalid(format!("not JSON: {e}")))?;
        let plugins = match value.get("plugins") {
            Some(Value::Array(list)) => list.clone(),
            Some(_) => return Err(Fault::invalid("\"plugins\" is no list")),
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
            bin: bin.into(),
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

    async fn call(&self, command: &str, plugin: &Value, previous: Option<&Value>, id: &str, netns: &Path) -> Result<Value> {
        let kind = text(plugin, "type");
        let what = || format!("CNI plug-in {kind} {command}");
        let mut config = plugin.clone();
        config["name"] = json!(self.name);
        config["cniVersion"] = json!(self.version);
        if let Some(result) = previous {
            config["prevResult"] = result.clone();
        }
        let mut child = Command::new(self.bin.join(kind))
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .envs([("CNI_COMMAND", command), ("CNI_CONTAINERID", id), ("CNI_IFNAME", INTERFACE), ("CNI_ARGS", "IgnoreUnknown=1")])
            .env("CNI_NETNS", netns)
            .env("CNI_PATH", &self.bin)
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
            .map_err(|_| Fault::new(Code::DeadlineExceeded, format!("{}: no answer within {} s", what(), LIMIT.as_secs())))?
            .map_err(|e| Fault::io(what(), e))?;
        let reply: Value = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
        if output.status.success() {
            return Ok(reply);
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let reason = [text(&reply, "msg"), text(&reply, "details"), said.trim()].into_iter().filter(|s| !s.is_empty()).collect::<Vec<_>>();
        Err(Fault::unavailable(format!("{} failed ({}): {}", what(), output.status, reason.join("; "))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(config: &str, expected: Option<(&str, usize)>) {
        let found = CniNetwork::parse(config.as_bytes(), Path::new("/x")).ok();
        assert_eq!(found.as_ref().map(|n| (n.name.as_str(), n.plugins.len())), expected, "{config}");
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
