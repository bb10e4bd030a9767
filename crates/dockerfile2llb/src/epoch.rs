//! `SOURCE_DATE_EPOCH`: a number, or the name of a source whose time counts (row `df.arg.sde`).
//!
//! The time of a git source is its commit's, that of an address what its server says, or that of
//! the newest file in it if it is an archive. A stage can name such a source when it is nothing but
//! one `ADD` of it to scratch.

use crate::{
    build_context::{BuildContext, solve},
    error::{ConvertError, Result},
    named::NamedContext,
    remote::{from_http, git_of_add},
    stage::{SCRATCH, Vars},
};
use bytes::{Buf as _, Bytes};
use shipway_dockerfile::{self as df, Command, Dockerfile, Lex};
use shipway_fault::Fault;
use shipway_frontend::SourceRequest;
use shipway_gocompat::quote;
use shipway_llb::{
    Caps, EnvList, Graph, MarshalOptions, Op, ResolveOptions, SourceOp, State, VertexOptions, attr,
};
use std::{
    collections::BTreeMap,
    io::{self, BufRead, Read},
    time::SystemTime,
};
use tokio::sync::mpsc;

const NAME: &str = "SOURCE_DATE_EPOCH";
/// Larger archives are not read for the time of their newest file.
const MAX_ARCHIVE: u64 = 1 << 30;
/// Bytes of it that are in memory at once, and as many on their way.
const PIECE: u64 = 1 << 20;

/// Arguments that the source's address may use.
pub struct Arguments<'a> {
    /// Of the global scope.
    pub globals: &'a EnvList,
    /// As the build gives them.
    pub given: &'a BTreeMap<String, String>,
}

/// The time that `value` means, in seconds. What has no time, such as a local context, means none.
pub async fn resolve(
    cx: &BuildContext,
    file: &Dockerfile,
    args: &Arguments<'_>,
    value: &str,
) -> Result<Option<i64>> {
    if value.is_empty() {
        return Ok(None);
    }
    if let Ok(seconds) = value.parse::<i64>() {
        return Ok(Some(seconds));
    }
    if value == "context" {
        return match cx.remote_context() {
            None => Ok(None),
            Some(state) => {
                time_of(cx, state, "[internal] resolve main build context metadata".into()).await
            }
        };
    }
    if let Some(named) = NamedContext::find(cx, value, None)? {
        let loaded = named.load(cx).await?;
        if loaded.pending.is_some() {
            return Ok(None);
        }
        return time_of(
            cx,
            &loaded.state,
            format!("[internal] resolve {NAME} named context {value}"),
        )
        .await;
    }
    let Some(stage) = file.stages.iter().find(|s| s.name.eq_ignore_ascii_case(value)) else {
        return Err(ConvertError::new(format!("invalid {NAME}: {value}")));
    };
    let state = stage_source(stage, args, &Lex::new(file.escape).part_of(&cx.work))
        .map_err(|e| e.at(stage.lines))?;
    time_of(cx, &state, format!("[internal] resolve {NAME} source stage {}", stage.name)).await
}

/// The one source that a stage adds to scratch.
fn stage_source(stage: &df::Stage, args: &Arguments<'_>, lex: &Lex) -> Result<State> {
    let mut env = args.globals.clone();
    env.remove(NAME);
    let base = lex.word(&stage.base, &Vars(&env)).map_err(|e| {
        ConvertError::from(e)
            .context(format!("failed to process source stage base name {}", quote(&stage.base)))
    })?;
    if base.text != SCRATCH {
        return Err(ConvertError::new(format!("{NAME} stage must use FROM scratch")));
    }
    let mut found = None;
    for instruction in &stage.instructions {
        match &instruction.command {
            Command::Arg(arg) => declare(arg, args.given, lex, &mut env)?,
            Command::Add(_) if found.is_some() => {
                return Err(ConvertError::new(format!(
                    "{NAME} stage must contain exactly one remote ADD"
                )));
            }
            Command::Add(add) => found = Some(add_source(add, lex, &env)?),
            _ => {
                let keyword = instruction.keyword.to_lowercase();
                let message = format!(
                    "{NAME} stage does not meet source-only requirements: unsupported {keyword} instruction"
                );
                return Err(ConvertError::new(message));
            }
        }
    }
    found.ok_or_else(|| {
        ConvertError::new(format!("{NAME} stage must contain exactly one remote ADD"))
    })
}

fn declare(
    arg: &df::Arg,
    given: &BTreeMap<String, String>,
    lex: &Lex,
    env: &mut EnvList,
) -> Result<()> {
    for pair in &arg.args {
        let value = match (given.get(&pair.name), &pair.default) {
            (Some(given), _) => given.clone(),
            (None, Some(default)) => lex.word(default, &Vars(env))?.text,
            (None, None) => continue,
        };
        env.set(&pair.name, value);
    }
    Ok(())
}

fn add_source(add: &df::Add, lex: &Lex, env: &EnvList) -> Result<State> {
    let ([source], []) = (add.files.sources.as_slice(), add.files.contents.as_slice()) else {
        return Err(ConvertError::new(format!(
            "{NAME} stage must contain exactly one remote ADD source"
        )));
    };
    let word = |text: &str| lex.word(text, &Vars(env)).map(|e| e.text);
    let (source, mut add) = (word(source)?, add.clone());
    add.checksum = word(&add.checksum)?;
    if let Some(git) = git_of_add(&add, &source)? {
        return Ok(git.state(VertexOptions::default()));
    }
    if source.starts_with("http://") || source.starts_with("https://") {
        return Ok(from_http(&add, &source, VertexOptions::default())?.0);
    }
    Err(ConvertError::new(format!("{NAME} stage source must be a single HTTP(S) or Git ADD")))
}

/// The time of the source that `state` is made of; none if there are several.
async fn time_of(cx: &BuildContext, state: &State, log_name: String) -> Result<Option<i64>> {
    let platform = cx.build_platform();
    let options = MarshalOptions {
        platform: platform.clone(),
        caps: Some(Caps::llb()),
        local_unique_id: "shipway".into(),
    };
    let definition = state.marshal(&options)?;
    let graph = Graph::decode(&definition, &Caps::llb(), &platform)?;
    let mut sources = graph.vertices.iter().filter_map(|v| match &v.op {
        Op::Source(source) => Some(source),
        _ => None,
    });
    let (Some(source), None) = (sources.next(), sources.next()) else { return Ok(None) };
    let (is_git, is_http) = match source.scheme() {
        Some(("git", _)) => (true, false),
        Some(("http" | "https", _)) => (false, true),
        _ => return Ok(None),
    };
    let request = SourceRequest {
        identifier: source.identifier.clone(),
        attrs: source.attrs.clone(),
        log_name,
        options: ResolveOptions { git_objects: is_git, ..ResolveOptions::default() },
        ..SourceRequest::default()
    };
    let meta = cx.bridge.resolve_source(request).await?;
    if let Some(git) = meta.facts.git.filter(|g| !g.commit_object.is_empty()) {
        return commit_time(&git.commit_object).map(Some);
    }
    if let Some(time) = meta.facts.http.and_then(|h| h.last_modified) {
        return Ok(Some(seconds(time)));
    }
    if is_http { newest_file(cx, source).await } else { Ok(None) }
}

fn seconds(time: SystemTime) -> i64 {
    match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(after) => i64::try_from(after.as_secs()).unwrap_or(i64::MAX),
        Err(before) => -i64::try_from(before.duration().as_secs()).unwrap_or(i64::MAX),
    }
}

/// When a commit was made, from git's own text of it.
fn commit_time(object: &[u8]) -> Result<i64> {
    let text = String::from_utf8_lossy(object);
    let committer =
        text.lines().take_while(|l| !l.is_empty()).find_map(|l| l.strip_prefix("committer "));
    let time = committer.and_then(|c| c.rsplit(' ').nth(1)).and_then(|t| t.parse().ok());
    time.ok_or_else(|| ConvertError::new("the commit object names no committer with a time"))
}

/// The time of the newest file in the archive at an address; none if it is not an archive.
async fn newest_file(cx: &BuildContext, source: &SourceOp) -> Result<Option<i64>> {
    let Some(name) = source.attrs.get(attr::HTTP_FILENAME).filter(|n| !n.is_empty()) else {
        return Ok(None);
    };
    let state =
        State::source(source.identifier.clone(), source.attrs.clone(), VertexOptions::default());
    let (state, ..) = solve(&*cx.bridge, &state, false).await?;
    let (pieces, from) = mpsc::channel(1);
    let look = shipway_task::blocking("read an archive", move || {
        Ok(shipway_archive::newest_file(Pieces { from, piece: Bytes::new() }))
    });
    let mut offset = 0;
    loop {
        let piece = state.read_file(name, Some((offset, PIECE))).await?;
        offset += piece.len() as u64;
        if offset > MAX_ARCHIVE {
            return Err(ConvertError::new(format!(
                "{NAME}: {} is larger than {MAX_ARCHIVE} bytes",
                source.identifier
            )));
        }
        if piece.is_empty() || pieces.send(piece).await.is_err() {
            break;
        }
    }
    drop(pieces);
    // An address need not lead to an archive.
    Ok(look
        .await
        .map_err(|e| Fault::internal(format!("reading an archive failed: {e}")))?
        .unwrap_or(None))
}

/// Reads, on a blocking thread, pieces as they come.
struct Pieces {
    from: mpsc::Receiver<Bytes>,
    piece: Bytes,
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.fill_buf()?.read(buffer)?;
        self.consume(n);
        Ok(n)
    }
}

impl BufRead for Pieces {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.piece.is_empty() {
            self.piece = self.from.blocking_recv().unwrap_or_default();
        }
        Ok(&self.piece)
    }

    fn consume(&mut self, n: usize) {
        self.piece.advance(n);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commit_says_when_it_was_made() {
        let text = b"tree 1\nauthor a <a@b> 5 +0000\ncommitter c d <c@d> 1700000000 +0200\n\ncommitter x <x@y> 7 +0000\n";
        assert_eq!(commit_time(text).expect("a commit"), 1_700_000_000);
        assert!(commit_time(b"tree 1\n\ncommitter x <x@y> 7 +0000\n").is_err());
    }

    #[tokio::test]
    async fn an_archive_is_read_as_it_comes() {
        let (pieces, from) = mpsc::channel(1);
        let look = shipway_task::blocking("read an archive", move || {
            Ok(shipway_archive::newest_file(Pieces { from, piece: Bytes::new() }))
        });
        let archive: &[u8] = include_bytes!("../../archive/tests/corpus/python-pax.tar");
        for piece in archive.chunks(700) {
            // The zeros at the end are not waited for.
            let _ = pieces.send(Bytes::from_static(piece)).await;
        }
        drop(pieces);
        assert_eq!(look.await.expect("no panic").expect("an archive"), Some(1_700_000_000));
        // What is not an archive is not read to its end.
        let (pieces, from) = mpsc::channel(1);
        let look = shipway_task::blocking("read an archive", move || {
            Ok(shipway_archive::newest_file(Pieces { from, piece: Bytes::new() }))
        });
        while pieces.send(Bytes::from_static(&[b'x'; 4096])).await.is_ok() {}
        assert!(look.await.expect("no panic").is_err());
    }
}
