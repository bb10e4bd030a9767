//! Names of vertices that have no custom one (row `llb.vname`).

use crate::ops::{FileActionKind, Op};

/// Longest name made of other names; merges of merges would otherwise grow without bound.
const MAX_LEN: usize = 16 << 10;

/// The name of an operation; `input` gives the name of its nth input.
pub fn of<'a>(op: &Op, input: impl Fn(usize) -> &'a str) -> String {
    let side =
        |index: Option<usize>| index.map_or("scratch".to_owned(), |i| format!("({})", input(i)));
    let mut name = match op {
        Op::Source(source) => source.identifier.clone(),
        Op::Exec(exec) => exec.meta.args.join(" "),
        Op::File(file) => {
            file.actions.iter().map(|a| action(&a.kind)).collect::<Vec<_>>().join(", ")
        }
        Op::Build(_) => "build".into(),
        Op::Merge(merge) => {
            let names: Vec<&str> =
                merge.inputs.iter().map(|i| i.map_or("scratch", &input)).collect();
            format!("merge ({})", names.join(", "))
        }
        Op::Diff(diff) => format!("diff {} -> {}", side(diff.lower), side(diff.upper)),
        Op::Passthrough(pass) => format!("passthrough {}", pass.id),
    };
    if name.len() > MAX_LEN && matches!(op, Op::Merge(_) | Op::Diff(_)) {
        name = name.chars().take(MAX_LEN).collect();
    }
    name
}

fn action(kind: &FileActionKind) -> String {
    match kind {
        FileActionKind::Mkdir(a) => format!("mkdir {}", a.path),
        FileActionKind::Mkfile(a) => format!("mkfile {}", a.path),
        FileActionKind::Symlink(a) => format!("symlink {} -> {}", a.newpath, a.oldpath),
        FileActionKind::Rm(a) => format!("rm {}", a.path),
        FileActionKind::Copy(a) => format!("copy {} {}", a.src, a.dest),
    }
}
