//! What is measured: each workload makes its context, builds, and gives the seconds that count.

use shipway_testkit::{Lab, built};
use std::{
    fmt::Write as _,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

type Workload = fn(&Bench, &str, &str) -> Result<f64, String>;

/// Names and functions, in the order they run.
pub const WORKLOADS: &[(&str, Workload)] = &[
    ("noop_s", noop),
    ("step_s", steps),
    ("ctx20k_warm_s", many_files_warm),
    ("ctx20k_cold_s", many_files_cold),
    ("ctx512m_image_s", big_file),
    ("export256m_s", export),
    ("push256m_s", push),
    ("parallel8_s", parallel),
    ("concurrent16_s", concurrent),
];

const IMAGE: &str = "docker.io/library/busybox:latest";

/// Where contexts are, and the client.
pub struct Bench {
    dir: PathBuf,
    client: PathBuf,
    registry: String,
}

enum Output<'a> {
    Nothing,
    Image(&'a str),
    Push(&'a str),
}

/// A text that no run before had.
fn unique() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| d.as_nanos());
    format!("{now:x}-{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Cheap noise: xorshift.
struct Noise(u64);

impl Noise {
    fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            chunk.copy_from_slice(&self.0.to_le_bytes()[..chunk.len()]);
        }
    }

    fn new() -> Self {
        Self(
            std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .map_or(1, |d| d.as_nanos() as u64)
                | 1,
        )
    }
}

fn io<T>(result: std::io::Result<T>) -> Result<T, String> {
    result.map_err(|e| e.to_string())
}

impl Bench {
    pub fn new(lab: &Lab) -> Result<Self, String> {
        let dir = lab.dir().join("bench");
        io(fs::create_dir_all(&dir))?;
        let client = dir.join("buildctl");
        io(std::os::unix::fs::symlink(built("shipway"), &client))?;
        Ok(Self { dir, client, registry: lab.registry() })
    }

    fn context(&self, name: &str, dockerfile: &str) -> Result<PathBuf, String> {
        let dir = self.dir.join(name);
        io(fs::create_dir_all(&dir))?;
        io(fs::write(dir.join("Dockerfile"), dockerfile))?;
        Ok(dir)
    }

    fn start(
        &self,
        address: &str,
        dir: &Path,
        output: &Output<'_>,
        more: &[&str],
    ) -> Result<Child, String> {
        let mut command = Command::new(&self.client);
        command.args([
            "--addr",
            address,
            "build",
            "--progress=plain",
            "--frontend",
            "dockerfile.v0",
        ]);
        command.args([
            "--local",
            &format!("context={}", dir.display()),
            "--local",
            &format!("dockerfile={}", dir.display()),
        ]);
        match output {
            Output::Nothing => {}
            Output::Image(name) => {
                command.args([
                    "--output",
                    &format!("type=image,name=docker.io/library/{name}:latest,unpack=true"),
                ]);
            }
            Output::Push(name) => {
                command.args([
                    "--output",
                    &format!(
                        "type=image,name={}/{name}:latest,push=true,registry.insecure=true",
                        self.registry
                    ),
                ]);
            }
        }
        io(command
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn())
    }

    fn solve(
        &self,
        address: &str,
        dir: &Path,
        output: Output<'_>,
        more: &[&str],
    ) -> Result<f64, String> {
        let start = Instant::now();
        finish(self.start(address, dir, &output, more)?)?;
        Ok(start.elapsed().as_secs_f64())
    }
}

fn finish(child: Child) -> Result<(), String> {
    let output = io(child.wait_with_output())?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(text
        .lines()
        .rev()
        .take(8)
        .collect::<Vec<_>>()
        .into_iter()
        .rev()
        .collect::<Vec<_>>()
        .join("\n"))
}

/// A fully cached build of 11 steps with its image exported again.
fn noop(bench: &Bench, daemon: &str, address: &str) -> Result<f64, String> {
    let mut text = format!("FROM {IMAGE}\nCOPY Dockerfile /a\n");
    for n in 0..10 {
        let _ = writeln!(text, "RUN echo {n} > /f{n}");
    }
    let dir = bench.context("noop", &text)?;
    let name = format!("noop-{daemon}");
    bench.solve(address, &dir, Output::Image(&name), &[])?;
    bench.solve(address, &dir, Output::Image(&name), &[])
}

/// One of thirty trivial steps in a row.
fn steps(bench: &Bench, _: &str, address: &str) -> Result<f64, String> {
    let mut text = format!("FROM {IMAGE}\n");
    for n in 0..30 {
        let _ = writeln!(text, "RUN echo {n} > /f{n}");
    }
    let dir = bench.context("steps", &text)?;
    Ok(bench.solve(address, &dir, Output::Nothing, &["--no-cache"])? / 30.0)
}

fn small_files(dir: &Path) -> Result<(), String> {
    let mut noise = Noise::new();
    for n in 0..20_000 {
        let below = dir.join(format!("pkg{}/d{}", n / 100, n % 10));
        io(fs::create_dir_all(&below))?;
        let mut block = [0u8; 64];
        noise.fill(&mut block);
        let mut bytes = format!("// {n}\n").into_bytes();
        bytes.extend(block.iter().cycle().take(4096).map(|b| b & 0x7f));
        io(fs::write(below.join(format!("f{n}.js")), bytes))?;
    }
    Ok(())
}

/// A context of 20,000 files of which one changed.
fn many_files_warm(bench: &Bench, daemon: &str, address: &str) -> Result<f64, String> {
    let name = format!("warm-{daemon}");
    let made = bench.dir.join(&name).join("pkg0").exists();
    let dir = bench.context(&name, &format!("FROM {IMAGE}\nCOPY . /app\n"))?;
    if !made {
        small_files(&dir)?;
    }
    io(fs::write(dir.join("pkg0/d0/f0.js"), unique()))?;
    bench.solve(address, &dir, Output::Nothing, &[])
}

/// The same, never seen before.
fn many_files_cold(bench: &Bench, _: &str, address: &str) -> Result<f64, String> {
    let dir =
        bench.context(&format!("cold-{}", unique()), &format!("FROM {IMAGE}\nCOPY . /app\n"))?;
    small_files(&dir)?;
    let seconds = bench.solve(address, &dir, Output::Nothing, &[]);
    io(fs::remove_dir_all(dir))?;
    seconds
}

/// A file of 512 MB, half noise and half zeros like many programs, copied and exported.
fn big_file(bench: &Bench, daemon: &str, address: &str) -> Result<f64, String> {
    let dir = bench
        .context(&format!("big-{}", unique()), &format!("FROM {IMAGE}\nCOPY big.bin /big.bin\n"))?;
    let mut file = io(fs::File::create(dir.join("big.bin")))?;
    let (mut noise, mut block) = (Noise::new(), vec![0u8; 1 << 20]);
    for _ in 0..512 {
        noise.fill(&mut block[..1 << 19]);
        io(file.write_all(&block))?;
    }
    drop(file);
    let seconds = bench.solve(address, &dir, Output::Image(&format!("big-{daemon}")), &[]);
    io(fs::remove_dir_all(dir))?;
    seconds
}

fn writes_256_mb() -> String {
    let loops = "i=0; while [ $i -lt 256 ]; do dd if=/dev/urandom bs=512k count=1; dd if=/dev/zero bs=512k count=1; i=$((i+1)); done";
    format!("FROM {IMAGE}\nENV U={}\nRUN {loops} > /out.bin 2>/dev/null\n", unique())
}

/// Export of a 256 MB layer whose step already ran.
fn export(bench: &Bench, daemon: &str, address: &str) -> Result<f64, String> {
    let name = format!("export-{daemon}");
    let dir = bench.context(&name, &writes_256_mb())?;
    bench.solve(address, &dir, Output::Nothing, &[])?;
    bench.solve(address, &dir, Output::Image(&name), &[])
}

/// The same, pushed.
fn push(bench: &Bench, daemon: &str, address: &str) -> Result<f64, String> {
    let name = format!("push-{daemon}");
    let dir = bench.context(&name, &writes_256_mb())?;
    bench.solve(address, &dir, Output::Nothing, &[])?;
    bench.solve(address, &dir, Output::Push(&name), &[])
}

/// Eight stages that each sleep for a second.
fn parallel(bench: &Bench, _: &str, address: &str) -> Result<f64, String> {
    let mut text = String::new();
    for n in 0..8 {
        let _ = writeln!(text, "FROM {IMAGE} AS s{n}\nRUN sleep 1; echo {n} > /o{n}");
    }
    let _ = writeln!(text, "FROM {IMAGE}");
    for n in 0..8 {
        let _ = writeln!(text, "COPY --from=s{n} /o{n} /");
    }
    let dir = bench.context("parallel", &text)?;
    bench.solve(address, &dir, Output::Nothing, &["--no-cache"])
}

/// Sixteen builds at once.
fn concurrent(bench: &Bench, daemon: &str, address: &str) -> Result<f64, String> {
    let mut dirs = Vec::new();
    for n in 0..16 {
        let text = format!(
            "FROM {IMAGE}\nENV I={n}-{}\nCOPY Dockerfile /x\nRUN echo {n} > /y\nRUN cat /y\n",
            unique()
        );
        dirs.push(bench.context(&format!("concurrent{n}"), &text)?);
    }
    let start = Instant::now();
    let names: Vec<String> = (0..16).map(|n| format!("concurrent{n}-{daemon}")).collect();
    let builds: Vec<_> = dirs
        .iter()
        .zip(&names)
        .map(|(dir, name)| bench.start(address, dir, &Output::Image(name), &[]))
        .collect();
    for build in builds {
        finish(build?)?;
    }
    Ok(start.elapsed().as_secs_f64())
}
