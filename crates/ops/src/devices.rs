//! Devices of the host in steps (rows `exec.cdi`, `so.cdi`): which a build may use, which a step
//! gets, and what they change.

use crate::{Entitlements, Services};
use shipway_cdi::Devices;
use shipway_executor::Edits;
use shipway_fault::{Code, Context as _, Fault, Result};
use shipway_llb::{CdiDevice, ExecOp};
use std::collections::{BTreeMap, BTreeSet};

/// What a build may use beside the devices that every build may (`device`, `device=<name>`,
/// `device=<name>,alias=<other>`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceGrants {
    all: bool,
    /// By the name that steps use: that device, or the one which the alias stands for.
    names: BTreeMap<String, Option<String>>,
}

impl DeviceGrants {
    /// Adds what was asked for: all devices, or those of a name. Names have no commas or quotes, so
    /// nothing is quoted.
    pub fn add(&mut self, which: Option<&str>) -> Result<()> {
        let Some(which) = which.filter(|w| !w.is_empty()) else {
            self.all = true;
            return Ok(());
        };
        let mut fields = which.split(',');
        let name = fields.next().unwrap_or_default().to_owned();
        let mut alias = None;
        for field in fields {
            alias = match field.split_once('=') {
                Some(("alias", alias)) => Some(alias).filter(|a| !a.is_empty()),
                Some((key, _)) => {
                    return Err(Fault::invalid(format!("unknown device config key {key:?}")));
                }
                None => return Err(Fault::invalid(format!("invalid device config {field:?}"))),
            };
        }
        match alias {
            Some(alias) => self.names.insert(alias.to_owned(), Some(name)),
            None => self.names.insert(name, None),
        };
        Ok(())
    }

    /// What a step that asks for `asked` gets of what is `there`. One that may use everything gets
    /// what it asks for when it runs; for others it is decided here, and by full names, so that it
    /// is these that the step's key is made of.
    fn choose(&self, asked: &[CdiDevice], there: &Devices) -> Result<Vec<CdiDevice>> {
        if self.all {
            return Ok(asked.to_vec());
        }
        let (mut aliased, mut plain) = (Vec::new(), Vec::new());
        for device in asked {
            match self.names.get(&device.name) {
                Some(Some(target)) => aliased.push((target.as_str(), device.optional)),
                _ => plain.push((device.name.as_str(), device.optional)),
            }
        }
        let plain = there.resolve(plain)?;
        let granted: BTreeSet<&str> = self.names.keys().flat_map(|name| there.find(name)).collect();
        let mut forbidden = plain
            .iter()
            .map(String::as_str)
            .filter(|n| !granted.contains(n) && !there.is_auto_allowed(n));
        if let Some(first) = forbidden.next() {
            let all: Vec<&str> = std::iter::once(first).chain(forbidden).collect();
            let (subject, verb) =
                if all.len() == 1 { ("device", "is") } else { ("devices", "are") };
            let refusal = format!(
                "{subject} {} {verb} requested by the build but not allowed",
                all.join(", ")
            );
            return Err(Fault::new(Code::PermissionDenied, refusal).hint(format!(
                "ask for it with `--allow device={first}`, or let every build use it with `autoAllowed` of [cdi] in the daemon's configuration"
            )));
        }
        let mut chosen = there.resolve(aliased)?;
        for name in plain {
            if !chosen.contains(&name) {
                chosen.push(name);
            }
        }
        Ok(chosen.into_iter().map(|name| CdiDevice { name, optional: false }).collect())
    }
}

impl Entitlements {
    /// Puts in the place of the devices that `exec` asks for those that it gets, or refuses.
    pub fn grant_devices(&self, exec: &mut ExecOp, there: &Devices) -> Result<()> {
        exec.devices = self.devices.choose(&exec.devices, there)?;
        Ok(())
    }
}

impl Services {
    /// The devices there are now.
    pub async fn devices(&self) -> Result<Devices> {
        let Some(registry) = self.devices.clone() else {
            return Ok(Devices::none("they are disabled in the daemon's configuration"));
        };
        shipway_task::blocking("read device files", move || Ok(registry.read())).await
    }

    /// What the devices of `exec` change.
    pub(crate) async fn edits(&self, exec: &ExecOp) -> Result<Edits> {
        if exec.devices.is_empty() {
            return Ok(Edits::default());
        }
        let (there, asked) = (self.devices().await?, exec.devices.clone());
        let edits = move || {
            let names = there.resolve(asked.iter().map(|d| (d.name.as_str(), d.optional)))?;
            there.edits(names.iter().map(String::as_str))
        };
        let edits = shipway_task::blocking("look at devices", edits).await;
        edits.context(|| "CDI device injection failed")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shipway_cdi::CdiCatalog;

    const FILE: &str = "
cdiVersion: 0.6.0
kind: v/c
devices:
- {name: a, containerEdits: {env: [A=1]}}
- {name: b, containerEdits: {env: [B=1]}}
- {name: free, annotations: {org.mobyproject.buildkit.device.autoallow: true}, containerEdits: {env: [F=1]}}
";

    fn there() -> Devices {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("x.yaml"), FILE).unwrap();
        CdiCatalog::new([dir.path().to_owned()], []).read()
    }

    /// What a step that asks for `asked` (optional with a `?`) gets where a build was granted
    /// `granted`.
    #[track_caller]
    fn check(granted: &[&str], asked: &[&str], expected: std::result::Result<&[&str], &str>) {
        let mut grants = DeviceGrants::default();
        granted
            .iter()
            .try_for_each(|g| grants.add(g.split_once('=').map(|(_, rest)| rest)))
            .unwrap();
        let devices: Vec<_> = asked
            .iter()
            .map(|a| CdiDevice { name: a.trim_end_matches('?').into(), optional: a.ends_with('?') })
            .collect();
        let shown = |d: &CdiDevice| format!("{}{}", d.name, if d.optional { "?" } else { "" });
        let found = grants
            .choose(&devices, &there())
            .map(|all| all.iter().map(shown).collect::<Vec<_>>())
            .map_err(|f| f.to_string());
        let expected = expected
            .map(|e| e.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>())
            .map_err(str::to_owned);
        assert_eq!(found, expected, "{granted:?} {asked:?}");
    }

    #[test]
    fn a_step_gets_what_its_build_was_granted() {
        check(&[], &["v/c=free"], Ok(&["v/c=free"]));
        check(&[], &["v/c=a"], Err("device v/c=a is requested by the build but not allowed"));
        check(
            &[],
            &["v/c=*"],
            Err("devices v/c=a, v/c=b are requested by the build but not allowed"),
        );
        check(&[], &["v/d=a?"], Ok(&[]));
        check(&[], &["v/d=a"], Err("required device \"v/d=a\" is not registered"));
        check(&["device=v/c=a"], &["v/c"], Ok(&["v/c=a"]));
        check(
            &["device=v/c=a"],
            &["v/c=b", "v/c=a"],
            Err("device v/c=b is requested by the build but not allowed"),
        );
        check(&["device=v/c"], &["v/c=a", "v/c=free"], Ok(&["v/c=a", "v/c=free"]));
        check(&["device=v/c=*"], &["v/c=b?"], Ok(&["v/c=b"]));
        check(&["device=v/c=b,alias=gpu"], &["gpu"], Ok(&["v/c=b"]));
        check(&["device=v/c=b,alias=gpu"], &["v/c=free", "gpu"], Ok(&["v/c=b", "v/c=free"]));
        check(
            &["device=v/c=b,alias=gpu"],
            &["v/c=b"],
            Err("device v/c=b is requested by the build but not allowed"),
        );
        check(&["device=v/c=none"], &["v/c=free"], Ok(&["v/c=free"]));
        check(&["device"], &["v/c", "v/d?"], Ok(&["v/c", "v/d?"]));
        check(&["device=v/c=a", "device"], &["v/c=b"], Ok(&["v/c=b"]));
    }

    #[test]
    fn grants_are_names_and_aliases() {
        let check = |text: &str, why: &str| {
            assert_eq!(DeviceGrants::default().add(Some(text)).unwrap_err().to_string(), why)
        };
        check("v/c=a,alias", "invalid device config \"alias\"");
        check("v/c=a,name=x", "unknown device config key \"name\"");
    }
}
