//! Addresses that `ADD` takes: repositories and downloads (rows `df.add*`).

use crate::error::{ConvertError, Result};
use shipway_dockerfile as df;
use shipway_fault::Fault;
use shipway_gocompat::{Url, quote};
use shipway_llb::{GitRef, State, VertexOptions, attr};
use shipway_oci::{Digest, DigestError};
use std::collections::BTreeMap;

/// The repository that `ADD` of `source` takes, if it is one.
pub fn git_of_add(add: &df::Add, source: &str) -> Result<Option<GitRef>> {
    GitRef::parse(source)?
        .filter(|git| !git.looks_local)
        .map(|git| with_flags(git, add))
        .transpose()
}

/// A repository as the flags of `ADD` want it.
pub fn with_flags(mut git: GitRef, add: &df::Add) -> Result<GitRef> {
    if let (Some(flag), Some(query)) = (add.keep_git_dir, git.keep_git_dir)
        && flag != query
    {
        return Err(ConvertError::new("inconsistent keep-git-dir configuration"));
    }
    git.keep_git_dir = git.keep_git_dir.or(add.keep_git_dir);
    // As with the reference, times are a matter of contexts.
    git.mtime.clear();
    if !add.checksum.is_empty() {
        if !git.checksum.is_empty() && git.checksum != add.checksum {
            return Err(ConvertError::new(format!(
                "checksum mismatch {} != {}",
                quote(&add.checksum),
                quote(&git.checksum)
            )));
        }
        git.checksum.clone_from(&add.checksum);
    }
    Ok(git)
}

/// The download that `ADD` of `url` takes, and the name of the file in it.
pub fn from_http(add: &df::Add, url: &str, options: VertexOptions) -> Result<(State, String)> {
    let parsed = Url::parse(url);
    let file = parsed.as_ref().and_then(Url::file_name).unwrap_or("__unnamed__").to_owned();
    let mut attrs = BTreeMap::from([(attr::HTTP_FILENAME.to_owned(), file.clone())]);
    if !add.checksum.is_empty() {
        let digest: Digest = add
            .checksum
            .parse()
            .map_err(|e: DigestError| Fault::unknown(e.words()).hint(e.to_string()))?;
        attrs.insert(attr::HTTP_CHECKSUM.into(), digest.to_string());
    }
    Ok((State::http(url, attrs, options), file))
}
