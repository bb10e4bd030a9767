//! Mutated Dockerfiles: nothing panics, whatever parses prints and parses to the same tree, and the
//! tolerant reading agrees with the strict one. The seed is fixed, so a failure comes back; its
//! input goes to `corpus/` then.

use std::{
    collections::HashMap,
    fs,
    path::Path,
    time::{Duration, Instant},
};

use shipway_dockerfile::{Command, Dockerfile, Lex, Lines, Linter, Source};
use shipway_testkit::{Dice, Rounds};

/// Rounds when no time is given.
const ROUNDS: usize = 10_000;
/// No text of this size takes this long, however slow the machine.
const HANG: Duration = Duration::from_secs(10);

/// Small pieces that mean something to the parser or the expander.
const TOKENS: &[&str] = &[
    "FROM ",
    "RUN ",
    "COPY ",
    "ADD ",
    "ARG ",
    "ENV ",
    "LABEL ",
    "CMD ",
    "ENTRYPOINT ",
    "ONBUILD ",
    "HEALTHCHECK ",
    "SHELL ",
    "USER ",
    "WORKDIR ",
    "EXPOSE ",
    "VOLUME ",
    "STOPSIGNAL ",
    "MAINTAINER ",
    "from ",
    "<<EOF",
    "<<-EOF",
    "<<'EOF'",
    "3<<X",
    "EOF\n",
    "\n",
    "\\\n",
    "`\n",
    "\\",
    "`",
    "\"",
    "'",
    "$",
    "${",
    "}",
    "${A:-x}",
    "${A%.*}",
    "${A//a/b}",
    "$A",
    "=",
    " -- ",
    "--from=x ",
    "--mount=type=cache,target=/x ",
    "--chown='a b' ",
    "--link ",
    "--network=none ",
    "--device=a,required ",
    " AS x",
    "[",
    "[\"a\", \"b\"]",
    "]",
    ",",
    "#",
    " # c\n",
    "# escape=`\n",
    "# check=skip=all\n",
    "\t",
    " ",
    "\r\n",
    "--interval=5s ",
    "a=b ",
    "é",
    "\u{feff}",
    "<",
    ">",
    "*",
    "?",
    "{\"syntax\":\"x\"}",
    "\0",
    "NONE",
];

/// A place between two characters.
fn place(text: &str, dice: &mut Dice) -> usize {
    let mut at = dice.below(text.len() + 1);
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

fn mutate(text: &mut String, dice: &mut Dice) {
    for _ in 0..=dice.below(5) {
        let at = place(text, dice);
        match dice.below(4) {
            0 => {
                let length = dice.below(20);
                let end = text[at..].char_indices().nth(length).map_or(text.len(), |(n, _)| at + n);
                text.replace_range(at..end, "");
            }
            1 => {
                let end = place(text, dice);
                let piece: String = text[at.min(end)..at.max(end)].chars().take(60).collect();
                let to = place(text, dice);
                text.insert_str(to, &piece);
            }
            _ => text.insert_str(at, TOKENS[dice.below(TOKENS.len())]),
        }
    }
}

/// The tree without what printing does not keep.
fn essence(mut file: Dockerfile) -> Dockerfile {
    file.directives.iter_mut().for_each(|d| d.line = 0);
    let stages = file.stages.iter_mut().flat_map(|s| {
        (s.lines, s.source) = (Lines::default(), String::new());
        s.instructions.iter_mut()
    });
    for instruction in file.global_args.iter_mut().chain(stages) {
        (instruction.lines, instruction.source) = (Lines::default(), String::new());
    }
    file
}

/// Whether the printer's documented exceptions touch `file`.
fn unprintable(file: &Dockerfile) -> bool {
    let commands = file.stages.iter().flat_map(|s| &s.instructions).map(|i| &i.command);
    commands.into_iter().any(|command| match command {
        Command::Add(add) => swallows(&add.files),
        Command::Copy(copy) => swallows(&copy.files),
        Command::Expose(ports) => ports.iter().any(|p| p.trim() != p),
        _ => false,
    })
}

fn swallows(files: &shipway_dockerfile::Files) -> bool {
    let quoted = |s: &String| s.contains(['"', '\'', '\\', '$']);
    let mut names: Vec<&str> = files.contents.iter().map(|c| c.name.as_str()).collect();
    names.sort_unstable();
    !names.is_empty()
        && (names.windows(2).any(|w| w[0] == w[1])
            || files.sources.iter().any(quoted)
            || quoted(&files.dest))
}

#[track_caller]
fn try_one(text: &str) {
    let parsed = Dockerfile::parse(text.as_bytes());
    let mut linter = Linter::default();
    let (file, mistakes) = Dockerfile::diagnose(text.as_bytes(), &mut linter);
    let source = Source::new(text);
    for spans in mistakes
        .iter()
        .map(|m| m.spans(&source))
        .chain(linter.found().iter().map(|l| l.spans(&source)))
    {
        assert!(spans.iter().all(|s| s.start <= s.end), "{spans:?}");
    }
    assert_eq!(
        parsed.is_ok(),
        mistakes.is_empty(),
        "strict and tolerant reading differ: {mistakes:?}"
    );
    let Ok(parsed) = parsed else { return };
    assert_eq!(Some(&parsed), file.as_ref(), "strict and tolerant trees differ");
    let env: HashMap<String, String> = [("A".to_owned(), "alpha/beta".to_owned())].into();
    for instruction in parsed.stages.iter().flat_map(|s| &s.instructions) {
        let lex = Lex::new(parsed.escape);
        let _ = instruction.command.expand(&mut |word| Ok(lex.word(word, &env)?.text));
        let _ = lex.words(&instruction.source, &env);
        if let Command::Run(run) = &instruction.command {
            let _ = run.expand_mounts(&mut |word| Ok(lex.word(word, &env)?.text));
        }
        if let Command::Onbuild(onbuild) = &instruction.command {
            let _ = shipway_dockerfile::parse_trigger(&onbuild.trigger, instruction.lines);
        }
    }
    if unprintable(&parsed) {
        return;
    }
    let printed = parsed.to_string();
    match Dockerfile::parse(printed.as_bytes()) {
        Ok(again) => assert_eq!(essence(again), essence(parsed), "printed as:\n{printed}"),
        Err(error) => panic!("printed text does not parse: {error}\n{printed}"),
    }
}

#[test]
fn mutations_never_break_it() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
    let mut paths: Vec<_> =
        fs::read_dir(directory).expect("corpus").map(|e| e.expect("entry").path()).collect();
    paths.sort();
    let corpus: Vec<String> = paths.iter().map(|p| fs::read_to_string(p).expect("text")).collect();
    corpus.iter().for_each(|text| try_one(text));
    let rounds = Rounds::new(ROUNDS, 1, 0x5eed_d0c5);
    let mut dice = rounds.dice();
    for round in rounds {
        let mut text = corpus[round % corpus.len()].clone();
        mutate(&mut text, &mut dice);
        let begun = Instant::now();
        if let Err(panic) = std::panic::catch_unwind(|| try_one(&text)) {
            println!("round {round}, input:\n{text:?}");
            std::panic::resume_unwind(panic);
        }
        assert!(
            begun.elapsed() < HANG,
            "round {round} took {:?}, input:\n{text:?}",
            begun.elapsed()
        );
    }
}

/// Twice the text takes about twice the time, whatever it is made of; what grows with the square
/// would take four times as much.
#[test]
fn time_grows_with_the_text() {
    for piece in [
        "RUN a \\\n",
        "ENV A=${A:-${A:-x}}\n",
        "COPY <<a <<b /\nx\na\ny\nb\n",
        "# c\n",
        "${A:-",
        "RUN [\"a\",",
        "ARG x=\"'\\\n\n",
    ] {
        let took = |times: usize| {
            let text = format!("FROM a\n{}", piece.repeat(times));
            let once = || {
                let started = Instant::now();
                let _ = Dockerfile::diagnose(text.as_bytes(), &mut Linter::default());
                let _ = Lex::new('\\').word(&text, &HashMap::<String, String>::new());
                started.elapsed()
            };
            // The shortest of some is the least disturbed one.
            (0..5).map(|_| once()).min().unwrap_or_default()
        };
        let (short, long) = (took(2_000), took(32_000));
        assert!(
            long < short * 16 * 5 + Duration::from_millis(100),
            "{piece:?}: {short:?} became {long:?} with sixteen times the text"
        );
    }
}
