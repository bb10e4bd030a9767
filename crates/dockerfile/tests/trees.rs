//! One file in, its tree (in canonical text) or its mistake out.

use shipway_dockerfile::{Command, Dockerfile, Lex, Linter, directive, parse_trigger};

/// The canonical text of `body` as a stage of `FROM a`, without that line.
#[track_caller]
fn check(body: &str, expected: &str) {
    let file = Dockerfile::parse(format!("FROM a\n{body}").as_bytes())
        .unwrap_or_else(|e| panic!("{body:?}: {e}"));
    let printed = file.to_string();
    assert_eq!(printed.strip_prefix("\nFROM a\n"), Some(expected), "for {body:?}");
}

/// The mistake in `text`, as `first line-last line: message`.
#[track_caller]
fn fails(text: &str, expected: &str) {
    let error = Dockerfile::parse(text.as_bytes()).expect_err(text);
    let lines =
        error.lines.map_or(String::new(), |l| format!("{}-{}: ", l.start, l.end.max(l.start)));
    assert_eq!(format!("{lines}{}", error.message), expected, "for {text:?}");
}

#[test]
fn lines_join_and_comments_go() {
    check("RUN a \\\n  b", "RUN a   b\n");
    check("RUN a \\  \t\n b", "RUN a  b\n");
    check("RUN a \\\n# gone\n  # gone too\n b", "RUN a  b\n");
    check("RUN a \\\n\n b", "RUN a  b\n");
    check("RUN a \\\\\nRUN b", "RUN a \\\\\nRUN b\n");
    check("RUN a\r\n  RUN b # stays\r\n", "RUN a\nRUN b # stays\n");
    check("\\\nRUN a", "RUN a\n");
    check("RUN a \\", "RUN a\n");
    check("# about a\n\n# more\nRUN a\nRUN b", "# about a\n# more\nRUN a\nRUN b\n");
    check("# about a\n#\nRUN a", "RUN a\n");
    check("run a\nRuN b", "run a\nRuN b\n");
}

#[test]
fn forms_of_commands() {
    check("RUN echo  [ \"a\" ]", "RUN echo  [ \"a\" ]\n");
    check("RUN [ \"a\" , \"b\\u0041\\n\" ]", "RUN [\"a\", \"bA\\u000a\"]\n");
    check("RUN ['a', 'b']", "RUN ['a', 'b']\n");
    check("RUN [\"c:\\windows\"]", "RUN [\"c:\\windows\"]\n");
    check("CMD []\nENTRYPOINT\nRUN", "CMD []\nENTRYPOINT\nRUN\n");
    check("CMD [\"\\ud83d\\ude00\", \"\\ud800\"]", "CMD [\"😀\", \"\u{fffd}\"]\n");
    check("RUN -- --a", "RUN -- --a\n");
    check("SHELL [\"/bin/sh\",\"-c\"]", "SHELL [\"/bin/sh\", \"-c\"]\n");
    check("HEALTHCHECK CMD  curl  x", "HEALTHCHECK CMD curl  x\n");
    check(
        "HEALTHCHECK --interval=1m30s --retries=2 cmd [\"a\"]",
        "HEALTHCHECK --interval=90000000000ns --retries=2 CMD [\"a\"]\n",
    );
    check("HEALTHCHECK none", "HEALTHCHECK NONE\n");
}

#[test]
fn words_of_instructions() {
    check("ENV a=b c='d e' f=g\\ h i=", "ENV a=b c='d e' f=g\\ h i=\n");
    check("ENV a  b  c ", "ENV a b  c\n");
    check("LABEL \"a b\"=c", "LABEL \"a b\"=c\n");
    check("ARG a b=c d='x y'", "ARG a b=c d='x y'\n");
    check("EXPOSE 9 80/tcp\t53", "EXPOSE 53 80/tcp 9\n");
    check("VOLUME /a /b", "VOLUME /a /b\n");
    check("VOLUME [\" /a \", \"/b\"]", "VOLUME /a /b\n");
    check("USER a b", "USER a b\n");
    check("WORKDIR /with blank", "WORKDIR /with blank\n");
    check("STOPSIGNAL --x=y 9", "STOPSIGNAL 9\n");
    check("MAINTAINER me <m@x>", "MAINTAINER me <m@x>\n");
    check("ONBUILD   run  x ", "ONBUILD run  x \n");
}

#[test]
fn files_and_their_flags() {
    check("COPY a b c", "COPY a b c\n");
    check("COPY [\"a b\", \"c\"]", "COPY [\"a b\", \"c\"]\n");
    check("COPY [\"a\", \"c\"]", "COPY a c\n");
    check(
        "COPY --link --from=x --chown=\"a b\":c --exclude=*.md --exclude=\\\"q a b",
        "COPY --from=x --chown=a\" b:c\" --link=true --exclude=*.md --exclude='\"q' a b\n",
    );
    check("COPY --parents=FALSE a b", "COPY a b\n");
    check(
        "ADD --keep-git-dir --unpack=false --checksum=sha256:1 u d",
        "ADD --checksum=sha256:1 --keep-git-dir=true --unpack=false u d\n",
    );
    check("COPY -- --a b", "COPY -- --a b\n");
}

#[test]
fn options_of_run() {
    check(
        "RUN --mount=type=cache,target=/x --mount='type=bind,\"source=a,b\"' --network=host --security=insecure --device=d,required x",
        "RUN --device=name=d,required --mount=type=cache,target=/x --mount=type=bind,'\"source=a,b\"' --network=host --security=insecure x\n",
    );
}

#[test]
fn heredocs() {
    check("RUN <<EOF\na\n b\nEOF\nRUN c", "RUN <<EOF\na\n b\nEOF\nRUN c\n");
    check("RUN 3<<A cat <<-B\n1\nA\n\t2\n\tB", "RUN 3<<A cat <<-B\n1\nA\n\t2\nB\n");
    check("RUN << 'E O'\nx\nE O", "RUN << 'E O'\nx\nE O\n");
    check(
        "COPY <<a.txt <<\"b\" x /d/\n1\na.txt\n2\nb",
        "COPY <<a.txt <<'b' x /d/\n1\na.txt\n2\nb\n",
    );
    check("COPY <<-A /d\n\t1\n\t\t2\nA", "COPY <<A /d\n1\n2\nA\n");
    check("COPY <<A /d\nA", "COPY <<A /d\nA\n");
    check("CMD x <<EOF", "CMD x <<EOF\n");
    check("RUN [\"<<EOF\"]", "RUN [\"<<EOF\"]\n");
    check("RUN echo '<<EOF' \"<<X\"", "RUN echo '<<EOF' \"<<X\"\n");
    check("RUN cat <<<EOF", "RUN cat <<<EOF\n");
    check("ONBUILD RUN <<A\nx\nA", "ONBUILD RUN <<A\nx\nA\n");
}

#[test]
fn directives_and_the_escape() {
    let file = Dockerfile::parse(b"\xef\xbb\xbf#Escape = ` \n# SYNTAX=a/b:1 --flag\n# check=skip=all\n# escape=\\\nFROM a`\n b\n")
        .expect_err("only one");
    assert_eq!(file.to_string(), "only one escape parser directive can be used");
    let file = Dockerfile::parse(b"# escape=`\nFROM `\n a\nRUN x\\\nRUN y").expect("parses");
    assert_eq!((file.escape, file.stages[0].instructions.len()), ('`', 2));
    let file =
        Dockerfile::parse(b"# other=x\n# escape=`\nFROM a").expect("a comment ends the directives");
    assert_eq!((file.escape, file.directives.len()), ('\\', 0));
    let syntax = |text: &str| {
        directive::syntax(text.as_bytes()).map(|f| (f.first_word, f.value, f.lines.start))
    };
    let found = |image: &str, value: &str, line| Some((image.to_owned(), value.to_owned(), line));
    assert_eq!(syntax("# syntax = a b\nFROM x"), found("a", "a b", 1));
    assert_eq!(syntax("#!/bin/x\n# syntax=a"), found("a", "a", 2));
    assert_eq!(syntax("// check=error=true\n//syntax=a\n"), found("a", "a", 2));
    assert_eq!(syntax("{\"x\": [1, {}], \"syntax\": \"a\"}"), found("a", "a", 0));
    assert_eq!(syntax("{\"x\": {\"syntax\": \"a\"}}"), None);
    assert_eq!(syntax("FROM x\n# syntax=a"), None);
}

#[test]
fn stages() {
    let text = "ARG V=1\n# base is the start\nFROM --platform=$P a:$V AS Base\nRUN x\nFROM base\nFROM scratch as b.c-d_1";
    let file = Dockerfile::parse(text.as_bytes()).expect("parses");
    assert_eq!(
        file.to_string(),
        "\nARG V=1\n# base is the start\nFROM --platform=$P a:$V AS base\nRUN x\nFROM base\nFROM scratch AS b.c-d_1\n"
    );
    let base = &file.stages[0];
    assert_eq!(
        (base.description.as_str(), base.source.as_str()),
        ("is the start", "FROM --platform=$P a:$V AS Base")
    );
    assert_eq!(
        (base.lines.start, base.instructions[0].lines.end, file.stage("BASE"), file.stage("x")),
        (3, 4, Some(0), None)
    );
}

#[test]
fn mistakes_of_lines() {
    fails("", "0-0: file with no instructions");
    fails("\u{feff}", "1-1: file with no instructions");
    fails("# a\n\n", "2-2: file with no instructions");
    fails("# escape=x\nFROM a", "0-0: invalid escape token 'x' does not match ` or \\");
    fails("FROM a\nRUN <<EOF\nx", "2-3: unterminated heredoc");
    fails("FROM a\nENV a", "2-2: ENV must have two arguments");
    fails(
        "FROM a\nENV a=b \\\n c",
        "2-3: Syntax error - can't find = in \"c\". Must be of the form: name=value",
    );
    fails(
        "FROM a\nRUN [1]",
        "2-2: when using JSON array syntax, arrays must be comprised of strings only",
    );
    fails(
        "FROM a\nRUN [[\"x\"]]",
        "2-2: when using JSON array syntax, arrays must be comprised of strings only",
    );
    fails("FROM a\nONBUILD LABEL x", "2-2: LABEL must have two arguments");
    let long = format!("FROM a\nRUN {}\n", "x".repeat(70_000));
    fails(&long, "1-1: dockerfile line greater than max allowed size of 65535");
}

#[test]
fn mistakes_of_instructions() {
    let on = |line: i32, message: &str| {
        format!("{line}-{line}: dockerfile parse error on line {line}: {message}")
    };
    let cases = [
        ("FORM a", "unknown instruction: FORM (did you mean FROM?)"),
        ("form a", "unknown instruction: form (did you mean from?)"),
        ("BLAH a", "unknown instruction: BLAH"),
        ("FROM", "FROM requires either one or three arguments"),
        ("FROM a b", "FROM requires either one or three arguments"),
        (
            "FROM a AS 1x",
            "invalid name for build stage: \"1x\", name can't start with a number or contain symbols",
        ),
        ("FROM --plaform=x a", "unknown flag: --plaform (did you mean platform?)"),
        ("FROM --platform a", "missing a value on flag: --platform"),
        (
            "COPY a",
            "COPY requires at least two arguments, but only one was provided. Destination could not be determined",
        ),
        ("COPY --link=x a b", "expecting boolean value for flag --link, not: x"),
        ("COPY --link= a b", "missing a value on flag: --link"),
        ("COPY --from=a --from=b a b", "duplicate flag specified: --from"),
        ("ADD x <<A\nA", "ADD cannot accept a heredoc as a destination"),
        ("ENV", "ENV requires at least one argument"),
        ("ENV =x", "ENV names can not be blank"),
        ("ENV --a b=c", "unknown flag: --a"),
        ("ARG", "ARG requires at least one argument"),
        ("ARG =x", "ARG names can not be blank"),
        ("USER", "USER requires exactly one argument"),
        ("VOLUME [\"\"]", "VOLUME specified can not be an empty string"),
        ("SHELL a b", "SHELL requires the arguments to be in JSON form"),
        ("SHELL []", "SHELL requires at least one argument"),
        ("HEALTHCHECK", "HEALTHCHECK requires at least one argument"),
        ("HEALTHCHECK NONE x", "HEALTHCHECK NONE takes no arguments"),
        ("HEALTHCHECK RUN x", "Unknown type \"RUN\" in HEALTHCHECK (try CMD)"),
        ("HEALTHCHECK CMD", "Missing command after HEALTHCHECK CMD"),
        ("HEALTHCHECK --interval=1 CMD x", "time: missing unit in duration \"1\""),
        ("HEALTHCHECK --interval=1us CMD x", "Interval \"interval\" cannot be less than 1ms"),
        ("HEALTHCHECK --retries=x CMD x", "strconv.ParseInt: parsing \"x\": invalid syntax"),
        ("HEALTHCHECK --retries=-1 CMD x", "--retries cannot be negative (-1)"),
        ("ONBUILD", "ONBUILD requires at least one argument"),
        ("ONBUILD ONBUILD RUN x", "Chaining ONBUILD via `ONBUILD ONBUILD` isn't allowed"),
        ("ONBUILD from x", "FROM isn't allowed as an ONBUILD trigger"),
        (
            "RUN --mount=type=cache,from=$x y",
            "'from' doesn't support variable expansion, define alias stage instead",
        ),
        ("RUN --mount= x", "failed to parse csv mounts: EOF"),
        (
            "RUN --mount=a\\\"b x",
            "failed to parse csv mounts: parse error on line 1, column 2: bare \" in non-quoted-field",
        ),
        ("RUN --network=x.z y", "invalid network mode \"x.z\""),
        ("RUN --security=x y", "security \"x\" is not valid"),
        ("RUN --device=a,b y", "invalid field 'b' must be a key=value pair"),
    ];
    for (text, message) in cases {
        let lines = if text.contains('\n') { "2-3: " } else { "2-2: " };
        fails(&format!("FROM a\n{text}"), &format!("{lines}{}", &on(2, message)[5..]));
    }
    fails("RUN x\nFROM a", "1-1: no build stage in current context");
    fails("ARG a\n\nUNKNOWN", &on(3, "unknown instruction: UNKNOWN"));
}

#[test]
fn all_mistakes_at_once() {
    let (file, mistakes) =
        Dockerfile::diagnose(b"FROM a\nFORM b\nENV x\nRUN ok\nCOPY a", &mut Linter::default());
    let lines: Vec<_> = mistakes.iter().filter_map(|m| m.lines).map(|l| l.start).collect();
    assert_eq!((lines, file.map(|f| f.stages[0].instructions.len())), (vec![2, 3, 5], Some(1)));
}

#[test]
fn mounts() {
    #[track_caller]
    fn mount(raw: &str, expected: &str) {
        let file = Dockerfile::parse(format!("FROM a\nRUN --mount={raw} x").as_bytes()).expect(raw);
        let Command::Run(run) = &file.stages[0].instructions[0].command else {
            panic!("not a RUN")
        };
        let env = [("A".to_owned(), "alpha".to_owned())];
        let mount =
            match run.expand_mounts(&mut |word| Ok(Lex::new('\\').word(word, &env[..])?.text)) {
                Ok(mounts) => format!("{:?}", mounts[0]),
                Err(error) => error.message,
            };
        assert!(mount.contains(expected), "{raw}: {mount}");
    }
    mount("target=/x", "kind: Bind, from: \"\", source: \"\", target: \"/x\", readonly: true");
    mount(
        "type=CACHE,dst=/$A,id=${A:-b},sharing=Locked,mode=0755,uid=1",
        "target: \"/alpha\", readonly: false, size: 0, id: \"alpha\", sharing: Some(Locked)",
    );
    mount("type=bind,rw", "readonly: false");
    mount("type=tmpfs,size=1.5m", "size: 1572864");
    mount("type=secret,id=a,required,env=", "required: true, env: Some(\"\")");
    mount("type=cach", "unsupported mount type \"cach\" (did you mean cache?)");
    mount("type=cache,sharing=all", "unsupported sharing value \"all\"");
    mount("targt=/x", "unexpected key 'targt' in 'targt=/x' (did you mean target?)");
    mount("target", "invalid field 'target' must be a key=value pair");
    mount("required=true", "unexpected key 'required' for mount type 'bind'");
    mount("uid=1", "uid not allowed for \"bind\" type mounts");
    mount("type=secret", "invalid secret mount. one of source, target required");
    mount("type=secret,source=a,id=b", "both source and id can't be set");
    mount("sharing=private", "invalid cache sharing set for bind mount");
    mount("type=cache,mode=9", "invalid value 9 for mode");
    mount("type=tmpfs,size=x", "invalid value for size: x");
}

#[test]
fn triggers() {
    let lines = shipway_dockerfile::Lines { start: 7, end: 7 };
    let copy = parse_trigger("COPY --from=b <<A /x\nhi\nA", lines).expect("parses");
    let Command::Copy(command) = &copy.command else { panic!("not a COPY") };
    assert_eq!((command.files.contents[0].data.as_str(), copy.lines), ("hi\n", lines));
    assert_eq!(
        parse_trigger("RUN a\nRUN b", lines).expect_err("two").message,
        "onbuild trigger should be a single expression"
    );
    assert_eq!(
        parse_trigger("RUNN a", lines).expect_err("unknown").message,
        "unknown instruction: RUNN (did you mean RUN?)"
    );
}
