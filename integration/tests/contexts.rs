//! Contexts that are no directory beside the Dockerfile: repositories, downloads, standard input,
//! named ones.

#![allow(clippy::unwrap_used)]

use shipway_integration::{any, git_daemon};
use shipway_testkit::Lab;
use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
};

/// Serves `files` by name until the test ends; gives its address.
fn serve(files: BTreeMap<&'static str, Vec<u8>>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let files = Arc::new(files);
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let files = files.clone();
            std::thread::spawn(move || answer(stream, &files));
        }
    });
    address
}

fn answer(mut stream: TcpStream, files: &BTreeMap<&'static str, Vec<u8>>) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().transpose()?.unwrap_or_default();
    while lines.next().transpose()?.is_some_and(|line| !line.is_empty()) {}
    let mut words = first.split(' ');
    let (method, name) = (
        words.next().unwrap_or_default(),
        words
            .next()
            .unwrap_or_default()
            .split('?')
            .next()
            .unwrap_or_default()
            .trim_start_matches('/'),
    );
    let (status, body) = match files.get(name) {
        Some(body) => ("200 OK", body.as_slice()),
        None => ("404 Not Found", &b""[..]),
    };
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    )?;
    if method == "GET" { stream.write_all(body) } else { Ok(()) }
}

#[track_caller]
fn sh(dir: &Path, script: &str) {
    let done = Command::new("sh")
        .args(["-ec", script])
        .current_dir(dir)
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .output()
        .unwrap();
    assert!(done.status.success(), "{script}: {}", String::from_utf8_lossy(&done.stderr));
}

/// Names and texts of all files below `dir`.
fn tree(dir: &Path) -> String {
    fn walk(root: &Path, dir: &Path, out: &mut BTreeMap<PathBuf, String>) {
        for entry in std::fs::read_dir(dir).unwrap().map(Result::unwrap) {
            let path = entry.path();
            if path.is_dir() {
                walk(root, &path, out);
            } else {
                let mut text = String::new();
                std::fs::File::open(&path).unwrap().read_to_string(&mut text).unwrap();
                out.insert(path.strip_prefix(root).unwrap().to_path_buf(), text.trim().to_owned());
            }
        }
    }
    let mut found = BTreeMap::new();
    walk(dir, dir, &mut found);
    found
        .into_iter()
        .map(|(name, text)| format!("{}={text}", name.display()))
        .collect::<Vec<_>>()
        .join(" ")
}

struct Scene {
    lab: Lab,
    n: u32,
}

impl Scene {
    /// Builds with `arguments`, `stdin` on standard input, and compares the files of the result.
    #[track_caller]
    fn check(&mut self, stdin: Option<&Path>, arguments: &[&str], want: &str) {
        self.n += 1;
        let out = self.lab.context(&format!("out{}", self.n), &[]);
        let mut command = self.lab.shipway_command();
        command.args(["build", "--progress", "plain", "--output"]).arg(&out).args(arguments);
        let input =
            stdin.map_or_else(Stdio::null, |path| std::fs::File::open(path).unwrap().into());
        let done = command.stdin(input).output().unwrap();
        assert!(done.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
        assert_eq!(tree(&out), want, "{arguments:?}");
    }

    /// Builds and expects a failure that says `says`.
    #[track_caller]
    fn fails(&self, arguments: &[&str], says: &str) {
        let failed = self
            .lab
            .shipway(["build", "--progress", "plain"].into_iter().chain(arguments.iter().copied()))
            .failed();
        assert!(
            failed.all().contains(says),
            "{arguments:?} does not say {says:?}: {}",
            failed.all()
        );
    }
}

#[test]
fn contexts_of_every_kind() {
    let lab = Lab::complete(any());
    let files = [
        ("Dockerfile", "FROM scratch\nCOPY file /top\n"),
        ("file", "one"),
        (".dockerignore", "file\n"),
        ("sub/Dockerfile", "FROM scratch\nCOPY . /\n"),
        ("sub/deep/f", "deep"),
    ];
    let repo = lab.context("repo", &files);
    let base = repo.parent().unwrap().to_path_buf();
    sh(&repo, "tar -cf ../c.tar . && gzip -k ../c.tar");
    sh(
        &repo,
        "git init -q -b main . && git config user.email a@b && git config user.name n && git add -f . && git commit -qm 1 \
         && git tag v1 && echo two > file && git commit -qam 2",
    );
    let write = |name: &str, text: &str| {
        std::fs::write(base.join(name), text).unwrap();
        base.join(name).to_str().unwrap().to_owned()
    };
    let plain = write("Plain", "FROM scratch\nCOPY <<EOF /made\nmade\nEOF\n");
    let from_x = write("from-x", "FROM scratch\nCOPY --from=x . /x/\n");
    let stages =
        write("stages", "FROM scratch AS st\nCOPY nothing /\nFROM scratch\nCOPY --from=st . /s/\n");
    let image = write("image", "FROM scratch\nCOPY --from=x /bin/busybox /b/\n");
    let own =
        lab.context("own", &[("Dockerfile", "FROM scratch\nCOPY o.txt /own\n"), ("o.txt", "own")]);
    let other = lab.context("other", &[("o.txt", "o"), ("skip", "s"), (".dockerignore", "skip\n")]);
    let (own, other) = (own.to_str().unwrap().to_owned(), other.to_str().unwrap().to_owned());

    let (_daemon, port) = git_daemon(&base);
    let read = |name: &str| std::fs::read(base.join(name)).unwrap();
    let named = b"FROM scratch\nCOPY o.txt /n\n".to_vec();
    let web = serve(
        [
            ("c.tar.gz", read("c.tar.gz")),
            ("Plain", read("Plain")),
            ("Named", named),
            ("f.txt", b"f".to_vec()),
        ]
        .into(),
    );
    let git = format!("git://127.0.0.1:{port}/repo");
    let (tar, gz) = (base.join("c.tar"), base.join("c.tar.gz"));
    let registry = lab.registry();
    let mut scene = Scene { lab, n: 0 };

    // What a repository or an archive has is all of it; ignore files are for directories of
    // clients.
    let sub = "Dockerfile=FROM scratch\nCOPY . / deep/f=deep";
    scene.check(None, &[&git], "top=two");
    scene.check(None, &[&format!("{git}#v1")], "top=one");
    scene.check(None, &[&format!("{git}#main:sub")], sub);
    scene.check(None, &[&format!("{git}?ref=v1&subdir=sub")], sub);
    scene.check(None, &[&format!("{web}/c.tar.gz")], "top=one");
    scene.check(Some(&tar), &["-"], "top=one");
    scene.check(Some(&gz), &["-"], "top=one");
    scene.fails(&[&format!("{git}#nope")], "does not contain ref nope");
    scene.fails(&[&format!("{git}#main:nope")], "invalid subdir nope");
    scene.fails(&[&format!("{web}/nothing")], "404");

    // A Dockerfile without a context, and one from elsewhere.
    scene.check(None, &[&format!("{web}/Plain")], "made=made");
    scene.check(Some(Path::new(&plain)), &["-"], "made=made");
    scene.check(Some(Path::new(&plain)), &["-f", "-", &own], "made=made");
    scene.check(Some(Path::new(&plain)), &["-f", "-", &git], "made=made");
    scene.check(None, &["-f", &format!("{web}/Named"), &own], "n=own");
    scene.check(None, &["-f", &format!("{web}/Plain"), &git], "made=made");
    scene.fails(&["-f", &format!("{web}/nothing"), &git], "404");
    scene.check(None, &["-f", &plain, &own], "made=made");

    // Named ones.
    let named = |value: &str| format!("x={value}");
    scene.check(
        None,
        &["-f", &from_x, "--build-context", &named(&other), &own],
        "x/.dockerignore=skip x/o.txt=o",
    );
    let all = "x/.dockerignore=file x/Dockerfile=FROM scratch\nCOPY file /top x/file=two x/sub/Dockerfile=FROM scratch\nCOPY . / x/sub/deep/f=deep";
    scene.check(None, &["-f", &from_x, "--build-context", &named(&git), &own], all);
    scene.check(
        None,
        &["-f", &from_x, "--build-context", &named(&format!("{git}#main:sub/deep")), &own],
        "x/f=deep",
    );
    scene.check(
        None,
        &["-f", &from_x, "--build-context", &named(&format!("{web}/f.txt")), &own],
        "x/context=f",
    );
    scene.check(
        None,
        &["-f", &stages, "--build-context", &format!("st={other}"), &own],
        "s/.dockerignore=skip s/o.txt=o",
    );
    // An image's name in its longest form is the same name.
    let replaced = write("replaced", "FROM busybox\nCOPY --from=busybox o.txt /\n");
    scene.check(
        None,
        &[
            "-f",
            &replaced,
            "--build-context",
            &format!("docker.io/library/busybox:latest={other}"),
            &own,
        ],
        ".dockerignore=skip o.txt=o",
    );
    let layout = base.join("layout");
    let pulled = write("pulled", "FROM busybox\n");
    let oci = format!("type=oci,tar=false,dest={}", layout.display());
    scene.lab.shipway(["build", "--output", &oci, "-f", &pulled, &own]).ok();
    for value in [
        "docker-image://busybox".to_owned(),
        format!("docker-image://{registry}/library/busybox"),
        format!("oci-layout://{}", layout.display()),
    ] {
        scene.n += 1;
        let out = scene.lab.context(&format!("out{}", scene.n), &[]);
        scene
            .lab
            .shipway([
                "build",
                "-f",
                &image,
                "--build-context",
                &named(&value),
                "--output",
                out.to_str().unwrap(),
                &own,
            ])
            .ok();
        assert!(out.join("b/busybox").exists(), "{value}");
    }
    scene.fails(&["-f", &from_x, "--build-context", "X Y=.", &own], "invalid context name X Y");
    scene.fails(
        &["-f", &from_x, "--build-context", "x=target:y", &own],
        "unsupported context source target for x",
    );
}

/// Files below `dir` that contain `text`, with what is around it; what vanishes meanwhile is passed
/// over.
fn files_with(dir: &Path, text: &str) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let Ok(kind) = entry.file_type() else { continue };
        if kind.is_dir() {
            found.extend(files_with(&path, text));
        } else if kind.is_file() {
            let bytes = std::fs::read(&path).unwrap_or_default();
            let Some(at) = bytes.windows(text.len()).position(|part| part == text.as_bytes())
            else {
                continue;
            };
            let around = &bytes[at.saturating_sub(80)..(at + text.len() + 40).min(bytes.len())];
            found.push((path, String::from_utf8_lossy(around).into_owned()));
        }
    }
    found
}

#[test]
fn a_login_in_the_address_of_a_context_is_in_no_file_and_no_answer() {
    const TOKEN: &str = "t0k3n-of-nobody";
    let mut lab = Lab::complete(any());
    // A repository that is served as plain files, which is enough for git.
    let repo = lab.context("served", &[("Dockerfile", "FROM scratch\nCOPY Dockerfile /\n")]);
    sh(
        &repo,
        "git init -q -b main . && git config user.email a@b && git config user.name n && git add . && git commit -qm 1 && git update-server-info",
    );
    let mut files: BTreeMap<&'static str, Vec<u8>> = BTreeMap::new();
    let mut all = vec![repo.join(".git")];
    while let Some(path) = all.pop() {
        if path.is_dir() {
            all.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else {
            let name = path.strip_prefix(&repo).unwrap().to_str().unwrap().to_owned();
            files.insert(name.leak(), std::fs::read(&path).unwrap());
        }
    }
    let host = serve(files).trim_start_matches("http://").to_owned();
    let output = "type=image,name=docker.io/library/told:1";
    let build = |path: &str| {
        let address = format!("http://me:{TOKEN}@{host}/{path}#main");
        lab.shipway([
            "build",
            "--progress",
            "plain",
            "--attest",
            "type=provenance,mode=max",
            "--output",
            output,
            &address,
        ])
    };
    let (good, bad) = (build(".git").ok(), build("none.git").failed());
    for said in [
        good.all(),
        bad.all(),
        lab.shipway(["du", "--verbose"]).ok().all(),
        lab.shipway(["history", "ls"]).ok().all(),
    ] {
        assert!(!said.contains(TOKEN), "{said}");
    }
    assert!(lab.stop_daemon());
    // All that the daemon and containerd keep, and what they say in their logs.
    assert_eq!(files_with(lab.dir(), TOKEN), []);
}
