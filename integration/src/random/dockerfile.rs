//! A Dockerfile that changes.

use super::Random;
use std::fmt::Write as _;

/// Sources of the context that may match nothing, which is no error.
const SOURCES: &[&str] = &[
    "a.tx*", "b.*", "*.txt", "d*", "d*/", "x/one*", "d/*.txt", "?.md", "run*", ".", "*.tx[t]",
    "d/[e]",
];
/// Those that fail the build while they are missing.
const EXACT: &[&str] = &["a.txt", "b.txt", "d", "d/e/", "x/two", "run.sh"];
/// Paths inside the image.
const PATHS: &[&str] = &["/w/a", "/w/b", "/w/d/x", "/w/d/y", "/w/e", "/v/f", "/v/g/h", "/top"];
/// What `COPY` writes to.
const TARGETS: &[&str] = &["/w/", "/w/d/", "/v/", "/v/g/", "/new/dir/", "/w/copy", "rel/"];
const MAX_STAGES: usize = 4;
const MAX_STEPS: usize = 6;

#[derive(Clone, Debug)]
enum Base {
    Image,
    Scratch,
    Stage(usize),
}

#[derive(Clone, Debug)]
enum Step {
    /// Needs a shell in the image.
    Run(String),
    Copy(String),
    /// `COPY --from` of an earlier stage: flags, stage, source, target.
    CopyFrom(String, usize, String, String),
    /// A bind mount of an earlier stage: stage, source, the rest.
    Bind(usize, String),
    Meta(String),
}

#[derive(Clone, Debug)]
struct Stage {
    base: Base,
    steps: Vec<Step>,
}

/// A Dockerfile as stages and steps, and the build arguments it is built with.
#[derive(Clone, Debug)]
pub struct Recipe {
    stages: Vec<Stage>,
    argument: usize,
}

impl Recipe {
    /// One to four stages of a few steps.
    pub fn new(random: &mut Random) -> Self {
        let mut recipe = Self { stages: Vec::new(), argument: 0 };
        for at in 0..=random.below(MAX_STAGES) {
            let base = base(random, at);
            recipe.stages.push(Stage { base, steps: Vec::new() });
            for _ in 0..=random.below(MAX_STEPS) {
                let step = recipe.step(random, at);
                recipe.stages[at].steps.push(step);
            }
        }
        recipe
    }

    /// Changes one thing and says what.
    pub fn change(&mut self, random: &mut Random) -> String {
        let at = random.below(self.stages.len());
        let steps = self.stages[at].steps.len();
        match random.below(8) {
            0 if steps > 1 => {
                let gone = self.stages[at].steps.remove(random.below(steps));
                format!("drop {gone:?} from stage {at}")
            }
            1 | 2 if steps < MAX_STEPS => {
                let (step, place) = (self.step(random, at), random.below(steps + 1));
                let said = format!("add {step:?} to stage {at} at {place}");
                self.stages[at].steps.insert(place, step);
                said
            }
            3 if steps > 1 => {
                let (one, two) = (random.below(steps), random.below(steps));
                self.stages[at].steps.swap(one, two);
                format!("swap steps {one} and {two} of stage {at}")
            }
            4 if self.stages.len() < MAX_STAGES => {
                let at = self.stages.len();
                let base = base(random, at);
                self.stages.push(Stage { base, steps: Vec::new() });
                let step = self.step(random, at);
                self.stages[at].steps.push(step);
                format!("add stage {at}")
            }
            5 => {
                self.argument = random.below(3);
                format!("build with ARGUMENT={}", self.argument)
            }
            _ if steps > 0 => {
                let (step, place) = (self.step(random, at), random.below(steps));
                let said = format!("put {step:?} at {place} of stage {at}");
                self.stages[at].steps[place] = step;
                said
            }
            _ => "change nothing".to_owned(),
        }
    }

    /// The Dockerfile's text.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for (at, stage) in self.stages.iter().enumerate() {
            let base = match &stage.base {
                Base::Image => "busybox".to_owned(),
                Base::Scratch => "scratch".to_owned(),
                Base::Stage(n) => format!("s{n}"),
            };
            writeln!(text, "FROM {base} AS s{at}\nARG ARGUMENT").unwrap();
            // A final stage without any file could not be told from nothing.
            writeln!(text, "WORKDIR /stage{at}").unwrap();
            if matches!(stage.base, Base::Image) {
                writeln!(text, "RUN mkdir -p /w/d /v/g && for f in /w/a /w/b /w/d/x /w/d/y /v/f /top; do echo {at} > $f; done").unwrap();
            }
            for step in &stage.steps {
                match step {
                    // A step may have come to a stage without a shell by a change of its base.
                    Step::Run(_) | Step::Bind(..) if !self.has_shell(at) => {}
                    Step::Run(script) => {
                        writeln!(text, "RUN {{ {script}; }} 2>/dev/null || true").unwrap()
                    }
                    Step::Bind(from, script) => writeln!(
                        text,
                        "RUN --mount=type=bind,from=s{from},target=/m {script} || true"
                    )
                    .unwrap(),
                    Step::Copy(words) => writeln!(text, "COPY {words}").unwrap(),
                    Step::CopyFrom(flags, from, source, target) => {
                        writeln!(text, "COPY {flags}--from=s{from} {source} {target}").unwrap()
                    }
                    Step::Meta(line) => writeln!(text, "{line}").unwrap(),
                }
            }
        }
        text
    }

    /// Arguments of the build command that belong to it.
    pub fn arguments(&self) -> [String; 2] {
        ["--build-arg".to_owned(), format!("ARGUMENT={}", self.argument)]
    }

    fn has_shell(&self, at: usize) -> bool {
        match self.stages[at].base {
            Base::Image => true,
            Base::Scratch => false,
            Base::Stage(n) => self.has_shell(n),
        }
    }

    fn step(&self, random: &mut Random, at: usize) -> Step {
        let from = (at > 0).then(|| random.below(at.max(1)));
        match (random.below(10), from) {
            (0 | 1, Some(from)) => {
                let full = ["/w", "/w/a", "/v", "/w/d", "/w/*", "/top", "/", "/stage*"];
                // Without a shell little is certain to be there.
                let source = if self.has_shell(from) { *random.pick(&full) } else { *random.pick(&["/", "/stage*"]) };
                let flags = *random.pick(&["", "", "--link ", "--chown=7:8 "]);
                Step::CopyFrom(flags.to_owned(), from, source.to_owned(), (*random.pick(TARGETS)).to_owned())
            }
            (2, Some(from)) if self.has_shell(at) => Step::Bind(from, format!("sh -c 'cp -a /m/w /bound; cat /m/w/a > {}'", random.pick(PATHS))),
            (0..=3, _) | (_, _) if !self.has_shell(at) || random.chance(30) => {
                let flags = *random.pick(&["", "", "", "--link ", "--chmod=640 ", "--chown=1000:100 ", "--exclude=b.* ", "--parents "]);
                // Where a build fails, it fails with every cache alike, but then no file is
                // compared.
                let source = if random.chance(15) { *random.pick(EXACT) } else { *random.pick(SOURCES) };
                Step::Copy(format!("{flags}{source} {}", random.pick(TARGETS)))
            }
            (4, _) => Step::Meta((*random.pick(&["ENV K=1", "ENV K=2", "WORKDIR /w", "WORKDIR rel", "LABEL l=1", "USER 0", "CMD [\"x\"]"])).to_owned()),
            (5, _) => Step::Run("mkdir -p /w /v; find /w /v /bound -type f -o -type l | sort | while read f; do echo \"$f $(stat -c %a:%u:%g $f)\"; cat $f; done > /sum".to_owned()),
            _ => Step::Run(format!("mkdir -p /w/d /v/g; {}", script(random))),
        }
    }
}

fn base(random: &mut Random, at: usize) -> Base {
    match random.below(6) {
        0 => Base::Scratch,
        1 | 2 if at > 0 => Base::Stage(random.below(at)),
        _ => Base::Image,
    }
}

/// A command that changes files, and whose outcome depends only on the files that there are.
fn script(random: &mut Random) -> String {
    let (one, two) = (*random.pick(PATHS), *random.pick(PATHS));
    match random.below(14) {
        0 => format!("echo {} > {one}", random.below(4)),
        1 => format!("cat {one} {two} > /w/both; mv /w/both {one}"),
        2 => format!("rm -rf {one}"),
        3 => format!("rm -rf {one}; mkdir -p {one}; echo in > {one}/in"),
        4 => format!("cp -a {one} {two}"),
        5 => format!("ln -f {one} {two}"),
        6 => format!("ln -sfn {one} {two}"),
        7 => format!("chmod {} {one}", random.pick(&["600", "755", "4755", "1777", "444"])),
        8 => format!("chown {} {one}", random.pick(&["0:0", "1000:1000", "7:8"])),
        9 => "rm -rf /w/d; mkdir /w/d; echo new > /w/d/y".to_owned(),
        10 => format!("mv {one} {two}"),
        11 => format!("echo $ARGUMENT > {one}"),
        12 => format!("echo x >> {one}; touch -d @1600000000 {one}"),
        _ => format!("mkfifo {one}; echo {one} > /w/list"),
    }
}
