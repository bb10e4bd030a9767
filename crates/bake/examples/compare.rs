//! Plans of definitions beside those of another program: `compare COMMAND FILE…`, where COMMAND
//! prints the plan of the file that is its last argument, such as `docker-buildx bake --print -f`.
//! Each file is tried as it is and with lines taken away, doubled and changed (`-m N` of these).
//!
//! Says how often both print the same, both refuse, or only one does, and shows the first that
//! differ.

#![allow(clippy::unwrap_used)]

use std::{
    collections::BTreeMap,
    io::{self, Read},
    path::Path,
    process::Command,
    time::SystemTime,
};

use serde_json::Value;
use shipway_bake::{File, Granted, Host, Options};

struct Here;

impl Host for Here {
    fn env(&self, name: &str) -> Option<String> {
        std::env::var(name).ok()
    }

    fn read(&self, path: &str) -> io::Result<Option<Vec<u8>>> {
        match std::fs::read(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            other => other.map(Some),
        }
    }

    fn home(&self) -> Option<String> {
        std::env::var("HOME").ok()
    }

    fn now(&self) -> SystemTime {
        SystemTime::now()
    }

    fn random(&self, bytes: &mut [u8]) -> shipway_fault::Result<()> {
        std::fs::File::open("/dev/urandom").and_then(|mut f| f.read_exact(bytes)).unwrap();
        Ok(())
    }
}

/// Our plan of the file `name`, which is all targets where there is no default.
fn ours(name: &str) -> Result<Value, String> {
    let mut options = Options::default();
    options.builtins.insert("BAKE_CMD_CONTEXT".into(), "cwd://".into());
    options.builtins.insert("BAKE_LOCAL_PLATFORM".into(), "linux/amd64".into());
    let file = File { name: name.to_owned(), data: std::fs::read(name).unwrap() };
    let parsed = shipway_bake::parse(&[file], &Here, &options).map_err(|f| f.to_string())?;
    let plan = parsed
        .config
        .plan(&Here, &["default".to_owned()], &[], &mut Granted::default())
        .map_err(|f| f.to_string())?;
    Ok(serde_json::to_value(plan).unwrap())
}

fn theirs(command: &[&str], name: &str) -> Result<Value, String> {
    let out = Command::new(command[0]).args(&command[1..]).arg(name).output().unwrap();
    match out.status.success() {
        true => Ok(serde_json::from_slice(&out.stdout).unwrap()),
        false => Err(String::from_utf8_lossy(&out.stderr).lines().last().unwrap_or("").to_owned()),
    }
}

/// Without what has no order in the other program, and paths made clean as it does later.
fn settled(mut plan: Value) -> Value {
    for group in plan["group"].as_object_mut().into_iter().flat_map(|g| g.values_mut()) {
        if let Some(targets) = group["targets"].as_array_mut() {
            targets.sort_by_key(|t| t.as_str().unwrap_or_default().to_owned());
        }
    }
    for target in plan["target"].as_object_mut().into_iter().flat_map(|t| t.values_mut()) {
        if let Some(context) = target["context"].as_str() {
            let context = context.strip_prefix("cwd://").unwrap_or(context);
            let is_remote = ["://", "git@", "github.com/"].iter().any(|p| context.contains(p));
            if !is_remote {
                target["context"] = shipway_gocompat::path::clean(context).into();
            }
        }
        if let Some(ulimits) = target["ulimits"].as_array_mut() {
            ulimits.sort_by_key(|t| t.as_str().unwrap_or_default().to_owned());
        }
    }
    plan
}

/// Numbers that look random and are the same each time.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % n.max(1)
    }
}

/// `text` with one thing changed.
fn mutated(text: &str, random: &mut Random) -> String {
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    if lines.is_empty() {
        return String::new();
    }
    let at = random.below(lines.len());
    let line = lines[at].clone();
    match random.below(7) {
        0 => drop(lines.remove(at)),
        1 => lines.insert(at, line),
        2 => {
            let to = random.below(lines.len());
            lines.swap(at, to);
        }
        3 => lines[at] = line.replace('"', ""),
        4 => lines[at] = line.replace(['[', ']', '{', '}'], ""),
        5 => {
            let words: Vec<&str> = line.split_whitespace().collect();
            let word = words.get(random.below(words.len())).copied().unwrap_or_default();
            let with = ["null", "true", "1.5", "\"${x}\"", "[]", "{}", "default", "\"\""];
            lines[at] = line.replacen(word, with[random.below(with.len())], 1);
        }
        _ => {
            let chars: Vec<char> = line.chars().collect();
            let cut = random.below(chars.len());
            lines[at] =
                chars.iter().enumerate().filter(|(n, _)| *n != cut).map(|(_, c)| *c).collect();
        }
    }
    lines.join("\n") + "\n"
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut mutations = 0;
    if words.first() == Some(&"-m") {
        mutations = words[1].parse().unwrap();
        words.drain(..2);
    }
    let command: Vec<&str> = words[0].split_whitespace().collect();
    let mut table: BTreeMap<&str, usize> = BTreeMap::new();
    let mut random = Random(7);
    for path in &words[1..] {
        let (directory, name) = path.rsplit_once('/').unwrap_or((".", path));
        std::env::set_current_dir(directory).unwrap();
        let text = String::from_utf8_lossy(&std::fs::read(name).unwrap()).into_owned();
        for n in 0..=mutations {
            let name = match n {
                0 => name.to_owned(),
                _ => {
                    let extension = Path::new(name).extension().and_then(|e| e.to_str());
                    let name = format!("mutated.{}", extension.unwrap_or("hcl"));
                    std::fs::write(&name, mutated(&text, &mut random)).unwrap();
                    name
                }
            };
            let (our, their) = (ours(&name).map(settled), theirs(&command, &name).map(settled));
            let (kind, differs) = match (&our, &their) {
                (Ok(a), Ok(b)) if a == b => ("equal", false),
                (Ok(_), Ok(_)) => ("different", true),
                (Err(_), Err(_)) => ("both refuse", false),
                (Ok(_), Err(_)) => ("only they refuse", true),
                (Err(_), Ok(_)) => ("only we refuse", true),
            };
            *table.entry(kind).or_default() += 1;
            if differs && table[kind] <= 30 {
                println!("{kind}: {path} {n}");
                let short = |r: &Result<Value, String>| match r {
                    Err(why) => format!("error {why}"),
                    Ok(plan) => plan.to_string(),
                };
                let (a, b) = (short(&our), short(&their));
                let same = a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count();
                let from = a.floor_char_boundary(same.saturating_sub(60));
                let part = |s: &str| {
                    s[s.floor_char_boundary(from.min(s.len()))..]
                        .chars()
                        .take(260)
                        .collect::<String>()
                };
                let (a, b) = match (&our, &their) {
                    (Ok(_), Ok(_)) => (part(&a), part(&b)),
                    _ => (a.chars().take(200).collect(), b.chars().take(200).collect()),
                };
                println!("  ours  {a}\n  their {b}");
                if n > 0 {
                    let kept = format!("kept-{n}-{}", name.replace("mutated.", "x."));
                    let _ = std::fs::copy(&name, kept);
                }
            }
        }
    }
    for (kind, count) in table {
        println!("{kind:18} {count}");
    }
}
