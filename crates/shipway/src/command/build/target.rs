//! A target of a bake definition as the arguments of a build.

use std::path::Path;

use shipway_bake::Target;
use shipway_client::{Answer, SolveOptions};
use shipway_fault::{Fault, Result};
use shipway_gocompat::path;

use super::{Args, call::Call, context::Input, is_remote, options};

/// A build whose files were found.
pub(crate) struct Prepared {
    /// What to solve.
    pub(crate) options: SolveOptions,
    /// Kept as long as the build may read what it holds.
    input: Input,
    call: Option<Call>,
}

/// A question, to print its answer.
pub(crate) struct Question {
    input: Input,
    call: Call,
}

impl Args {
    /// The arguments that mean the same as `target`.
    pub(crate) fn of_target(target: &Target) -> Self {
        fn texts(list: &Option<Vec<String>>) -> Vec<String> {
            list.clone().unwrap_or_default()
        }
        fn words<T: ToString>(list: &Option<Vec<T>>) -> Vec<String> {
            list.iter().flatten().map(T::to_string).collect()
        }
        let pairs = |map: &std::collections::BTreeMap<String, Option<String>>| {
            let told = map.iter().filter_map(|(k, v)| Some(format!("{k}={}", v.as_ref()?)));
            told.collect::<Vec<_>>()
        };
        let context = target.context.clone().unwrap_or_else(|| ".".into());
        let file = target.dockerfile.clone().unwrap_or_else(|| "Dockerfile".into());
        let file = match file.strip_prefix("cwd://") {
            Some(local) => path::clean(local),
            None if is_remote(&context) || is_remote(&file) || file.starts_with('/') => file,
            None => path::join(&context, &file),
        };
        let is_linked = |value: &str| value.starts_with("target:");
        let local = |value: &str| match value.strip_prefix("cwd://") {
            Some(local) => path::clean(local),
            None => value.to_owned(),
        };
        Self {
            context,
            file: Some(file),
            tags: texts(&target.tags),
            target: target.target.clone(),
            build_args: pairs(&target.args),
            labels: pairs(&target.labels),
            annotations: texts(&target.annotations),
            platforms: target
                .platforms
                .iter()
                .flatten()
                .flat_map(|p| p.split(','))
                .map(str::to_owned)
                .collect(),
            outputs: words(&target.outputs),
            no_cache: target.no_cache == Some(true),
            no_cache_filter: texts(&target.no_cache_filter),
            pull: target.pull,
            secrets: words(&target.secrets),
            ssh: words(&target.ssh),
            network: target.network.clone(),
            add_hosts: pairs(&target.extra_hosts),
            shm_size: target.shm_size.clone(),
            ulimits: texts(&target.ulimits),
            resources: target.resources.iter().map(|(k, v)| format!("{k}={v}")).collect(),
            contexts: target
                .contexts
                .iter()
                .filter(|(_, value)| !is_linked(value))
                .map(|(name, value)| format!("{name}={}", local(value)))
                .collect(),
            cache_from: words(&target.cache_from),
            cache_to: words(&target.cache_to),
            allow: texts(&target.entitlements),
            attests: words(&target.attest),
            call: "build".into(),
            ..Self::default()
        }
    }

    /// Takes the directory `subdir` of a context from elsewhere, where its Dockerfile is, too.
    pub(crate) fn descend(&mut self, subdir: String) {
        self.file = self.file.take().map(|file| path::join(&subdir, &file));
        self.subdir = Some(subdir);
    }

    /// Offers more secrets.
    pub(crate) fn add_secrets(&mut self, secrets: Vec<String>) {
        self.secrets.extend(secrets);
    }

    /// Looks for mistakes that show without building.
    pub(crate) fn check(&self) -> Result<()> {
        options::check(self)
    }

    /// What is asked in place of building.
    pub(crate) fn set_call(&mut self, call: Option<&str>) {
        self.call = call.unwrap_or("build").to_owned();
    }

    /// The Dockerfile, if it is on this machine.
    pub(crate) fn local_dockerfile(&self) -> Option<String> {
        self.file.clone().filter(|file| !is_remote(&self.context) && !is_remote(file))
    }

    /// Finds the files of the build. `inline` is the text of the Dockerfile, if that is no file.
    pub(crate) fn prepare(self, inline: Option<String>) -> Result<Prepared> {
        let input = match inline {
            Some(text) => Input::inline(&self.context, &text, "dockerfile-inline")?,
            None => Input::read(self.dockerfile(), &self.context)?,
        };
        if input.awaited_dockerfile().is_some() {
            let what = "a Dockerfile from a URL for a context from another, in a definition";
            return Err(Fault::unimplemented(what)
                .hint("name a Dockerfile within the context, or write it as dockerfile-inline"));
        }
        let call = Call::of(&self)?;
        let options = options::of(&self, &input, &|name| std::env::var(name).ok())?;
        Ok(Prepared { options, input, call })
    }

    /// The Dockerfile; one by the usual name is looked for under its other names, too.
    fn dockerfile(&self) -> Option<&str> {
        let usual = path::join(&self.context, "Dockerfile");
        let file = self.file.as_deref()?;
        (file != usual || Path::new(file).exists()).then_some(file)
    }
}

impl Prepared {
    /// Whether something is asked in place of building.
    pub(crate) fn is_question(&self) -> bool {
        self.call.is_some()
    }

    /// What to solve, and how to print the answer; `None` if nothing is asked.
    pub(crate) fn into_question(self) -> Option<(Question, SolveOptions)> {
        Some((Question { input: self.input, call: self.call? }, self.options))
    }

    /// The fault, in which the Dockerfile is called what the user calls it.
    pub(crate) fn named(&self, fault: Fault) -> Fault {
        self.input.named(fault)
    }
}

impl Question {
    /// Prints the answer; gives whether what was found is a failure.
    pub(crate) fn print(&self, answer: &Answer) -> Result<bool> {
        self.call.print(answer, &self.input).map_err(|fault| self.input.named(fault))?;
        Ok(self.call.fails(answer))
    }
}
