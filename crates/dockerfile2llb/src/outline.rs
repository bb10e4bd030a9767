//! What a build can be given: arguments, secrets, SSH agents of the target and what it needs (row
//! `dfs.outline`).

use shipway_dockerfile::{Lines, Mount, MountKind};
use std::collections::{BTreeMap, BTreeSet};

/// An argument as declared.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ArgInfo {
    pub name: String,
    pub value: String,
    pub description: String,
    pub lines: Lines,
    /// Arguments that its default uses.
    pub deps: BTreeSet<String>,
}

/// A secret or an agent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    pub name: String,
    pub required: bool,
    pub lines: Lines,
}

/// What one stage asks for.
#[derive(Clone, Debug, Default)]
pub struct Outline {
    pub known: BTreeMap<String, ArgInfo>,
    pub used: BTreeSet<String>,
    pub secrets: Vec<Asked>,
    pub ssh: Vec<Asked>,
}

impl Outline {
    /// Notes what a mount asks for; the first one of a name counts.
    pub fn note(&mut self, mount: &Mount, name: &str, lines: Lines) {
        let list = if mount.kind == MountKind::Secret { &mut self.secrets } else { &mut self.ssh };
        if !list.iter().any(|a| a.name == name) {
            list.push(Asked { name: name.to_owned(), required: mount.required, lines });
        }
    }

    /// The arguments used, with those that they are made of.
    fn args(&self) -> impl Iterator<Item = &ArgInfo> {
        let mut used = self.used.clone();
        let mut todo: Vec<&String> = self.used.iter().collect();
        while let Some(name) = todo.pop() {
            let deps = self.known.get(name).into_iter().flat_map(|info| &info.deps);
            todo.extend(deps.filter(|d| used.insert((*d).clone())));
        }
        self.known.values().filter(move |info| used.contains(&info.name))
    }
}

/// Everything that the target and the stages it needs ask for, in the order of the file.
pub fn collect<'a>(
    stages: impl Iterator<Item = &'a Outline>,
) -> (Vec<ArgInfo>, Vec<Asked>, Vec<Asked>) {
    let (mut args, mut secrets, mut ssh) =
        (Vec::<ArgInfo>::new(), Vec::<Asked>::new(), Vec::<Asked>::new());
    for stage in stages {
        for info in stage.args() {
            if !args.iter().any(|a| a.name == info.name) {
                args.push(info.clone());
            }
        }
        for (from, to) in [(&stage.secrets, &mut secrets), (&stage.ssh, &mut ssh)] {
            let new: Vec<Asked> =
                from.iter().filter(|a| !to.iter().any(|t| t.name == a.name)).cloned().collect();
            to.extend(new);
        }
    }
    args.sort_by_key(|a| a.lines);
    secrets.sort_by_key(|a| a.lines);
    ssh.sort_by_key(|a| a.lines);
    (args, secrets, ssh)
}
