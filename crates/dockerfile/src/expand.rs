//! Which words of an instruction are expanded, and when (row `df.expand.where`).
//!
//! The caller gives a function that expands one word with the environment of the moment (normally
//! [`crate::Lex::word`]); it sees the unmatched names too, so it can lint them. `ARG` and `RUN` are
//! left alone by [`Command::expand`]: see [`Arg::expand`] and [`Run::expand_mounts`].

use crate::{
    ast::{Add, Arg, ArgPair, Command, Copy, Files, Mount, Pair, Run},
    error::Result,
};

/// Expands one word.
pub type Expander<'a> = dyn FnMut(&str) -> Result<String> + 'a;

impl Command {
    /// The command with its words expanded; `CMD`, `ENTRYPOINT`, `HEALTHCHECK`, `SHELL`, `ONBUILD`,
    /// `MAINTAINER`, `EXPOSE` (whose words split), `ARG` and `RUN` come back as they are.
    pub fn expand(&self, word: &mut Expander<'_>) -> Result<Self> {
        Ok(match self {
            Self::Add(add) => {
                let (chown, chmod, checksum) =
                    (word(&add.files.chown)?, word(&add.files.chmod)?, word(&add.checksum)?);
                Self::Add(Add {
                    files: add.files.expand(chown, chmod, word)?,
                    checksum,
                    ..add.clone()
                })
            }
            Self::Copy(copy) => {
                let (chown, chmod) = (word(&copy.files.chown)?, word(&copy.files.chmod)?);
                Self::Copy(Copy { files: copy.files.expand(chown, chmod, word)?, ..copy.clone() })
            }
            Self::Env(pairs) => Self::Env(expand_pairs(pairs, word)?),
            Self::Label(pairs) => Self::Label(expand_pairs(pairs, word)?),
            Self::StopSignal(signal) => Self::StopSignal(word(signal)?),
            Self::User(user) => Self::User(word(user)?),
            Self::Volume(paths) => {
                Self::Volume(paths.iter().map(|path| word(path)).collect::<Result<_>>()?)
            }
            Self::Workdir(path) => Self::Workdir(word(path)?),
            Self::Arg(_)
            | Self::Cmd(_)
            | Self::Entrypoint(_)
            | Self::Expose(_)
            | Self::Healthcheck(_)
            | Self::Maintainer(_)
            | Self::Onbuild(_)
            | Self::Run(_)
            | Self::Shell(_) => self.clone(),
        })
    }

    /// The command with the texts of its inline files expanded, where their heredoc word was not
    /// quoted. The function must leave quotes alone and escape with `\` whatever the file's escape
    /// character is ([`crate::Lex::for_contents`]).
    pub fn expand_contents(mut self, text: &mut Expander<'_>) -> Result<Self> {
        if let Self::Add(Add { files, .. }) | Self::Copy(Copy { files, .. }) = &mut self {
            for content in files.contents.iter_mut().filter(|c| c.expand) {
                content.data = text(&content.data)?;
            }
        }
        Ok(self)
    }
}

impl Files {
    fn expand(&self, chown: String, chmod: String, word: &mut Expander<'_>) -> Result<Self> {
        let sources = self.sources.iter().map(|source| word(source)).collect::<Result<_>>()?;
        let dest = word(&self.dest)?;
        Ok(Self { sources, dest, chown, chmod, ..self.clone() })
    }
}

impl Arg {
    /// All names and defaults expanded.
    pub fn expand(&self, word: &mut Expander<'_>) -> Result<Self> {
        Ok(Self { args: self.args.iter().map(|arg| arg.expand(word)).collect::<Result<_>>()? })
    }
}

impl ArgPair {
    /// The name and the default expanded.
    pub fn expand(&self, word: &mut Expander<'_>) -> Result<Self> {
        let name = word(&self.name)?;
        let default = self.default.as_deref().map(word).transpose()?;
        Ok(Self { name, default, description: self.description.clone() })
    }
}

impl Run {
    /// The mounts with their options expanded and checked (row `df.run.mount.vars`).
    pub fn expand_mounts(&self, word: &mut Expander<'_>) -> Result<Vec<Mount>> {
        self.mounts.iter().map(|mount| mount.expand(word)).collect()
    }
}

fn expand_pairs(pairs: &[Pair], word: &mut Expander<'_>) -> Result<Vec<Pair>> {
    pairs
        .iter()
        .map(|pair| {
            Ok(Pair { key: word(&pair.key)?, value: word(&pair.value)?, legacy: pair.legacy })
        })
        .collect()
}
