//! What those are told who ask for columns: the place of every violation and mistake as
//! `line:column text`, and what to do.

use crate::support::Case;
use serde_json::Value;
use shipway_fault::Detail;

/// What a location marks of `text`; the lines alone where it marks no part of one.
fn marked(text: &str, location: &Value) -> String {
    let ranges = location["ranges"].as_array().map(Vec::as_slice).unwrap_or_default();
    let number = |v: &Value| v.as_u64().unwrap_or(0) as usize;
    match ranges.iter().find(|r| number(&r["end"]["character"]) > 0) {
        None => ranges.iter().map(|r| r["start"]["line"].to_string()).collect::<Vec<_>>().join(","),
        Some(range) => {
            let (from, to) =
                (number(&range["start"]["character"]), number(&range["end"]["character"]));
            let line = text.lines().nth(number(&range["start"]["line"]) - 1).unwrap();
            format!(
                "{}:{from} {}",
                range["start"]["line"],
                line.chars().skip(from).take(to - from).collect::<String>()
            )
        }
    }
}

/// The answer to a check of `text`: a line for every violation, then one for every mistake.
async fn answer(text: &str, more: &str) -> Vec<String> {
    let case = Case::parse(&format!(
        "-- opts --\nrequestid=frontend.lint\nsource-columns=true\n-- Dockerfile --\n{text}{more}"
    ));
    let images = r#"{"docker.io/library/busybox:latest": {"os": "linux", "architecture": "amd64"}, "docker.io/library/other:latest": {"os": "linux", "architecture": "s390x", "history": [{"created_by": "x"}]},
        "docker.io/library/triggers:latest": {"os": "linux", "architecture": "amd64", "config": {"OnBuild": ["CMD a", "COPY --from=9 a b"]}}}"#;
    let (_, result) = case.build(images).await;
    let answer: Value = serde_json::from_slice(&result.unwrap().metadata["result.json"]).unwrap();
    let list = |name: &str| answer[name].as_array().cloned().unwrap_or_default();
    let warning = |w: &Value| {
        let replacement =
            w["fix"]["replacement"].as_str().map(|r| format!(" -> {r}")).unwrap_or_default();
        let rule = w["ruleName"].as_str().unwrap();
        format!(
            "{rule} {}{replacement} | {}",
            marked(text, &w["location"]),
            w["fix"]["advice"].as_str().unwrap()
        )
    };
    let error = |e: &Value| {
        format!("error {} | {}", marked(text, &e["location"]), e["message"].as_str().unwrap())
    };
    list("warnings").iter().map(warning).chain(list("errors").iter().map(error)).collect()
}

async fn check(text: &str, want: &[&str]) {
    assert_eq!(answer(&format!("{text}\n"), "").await, want, "for {text:?}");
}

#[tokio::test]
async fn violations_are_pointed_at() {
    check(
        "FROM busybox\nCMD one two",
        &["JSONArgsRecommended 2:4 one two -> [\"one\", \"two\"] | write [\"one\", \"two\"]"],
    )
    .await;
    check(
        "FROM busybox\nENTRYPOINT exec $HOME/x",
        &["JSONArgsRecommended 2:11 exec $HOME/x | write ENTRYPOINT [\"executable\", \"argument\"], or say which shell is meant with SHELL"],
    )
    .await;
    check(
        "FROM busybox\nCMD [\"a\"]\nCMD [\"b\"]",
        &["MultipleInstructionsDisallowed 2:0 CMD | remove it: only the last CMD of a stage counts"],
    )
    .await;
    check(
        "ARG NAME=busybox\nFROM $NMAE",
        &[
            "InvalidDefaultArgInFrom 2:5 $NMAE | give the ARGs in it defaults that make it the name of an image",
            "UndefinedArgInFrom 2:6 NMAE -> NAME | did you mean NAME?",
            "error 2:5 $NMAE | base name ($NMAE) should not be blank",
        ],
    )
    .await;
    check(
        "FROM busybox\nRUN a\nWORKDIR rel",
        &["WorkdirRelativePath 3:8 rel | begin with an absolute path, such as WORKDIR /rel"],
    )
    .await;
    check(
        "FROM busybox\nENV FOO=1\nLABEL a=$OOPS \\\n  b=${FO}",
        &[
            "UndefinedVar 3:9 OOPS | declare it in this stage with ARG OOPS or ENV OOPS=…",
            "UndefinedVar 4:6 FO -> FOO | did you mean FOO?",
        ],
    )
    .await;
    check(
        "FROM busybox\nENV a b c",
        &["LegacyKeyValueFormat 2:4 a b c -> a=\"b c\" | write a=\"b c\""],
    )
    .await;
    check(
        "FROM busybox\nLABEL a $PATH",
        &["LegacyKeyValueFormat 2:6 a $PATH -> a=$PATH | write a=$PATH"],
    )
    .await;
    check(
        "FROM other",
        &["InvalidBaseImagePlatform 1:5 other | take an image for linux/amd64, or write FROM --platform=linux/s390x if that one is meant"],
    )
    .await;
    check(
        "FROM --platform=$TARGETPLATFORM busybox",
        &["RedundantTargetPlatform 1:5 --platform=$TARGETPLATFORM ->  | remove it"],
    )
    .await;
    check(
        "FROM --platform=linux/amd64 busybox",
        &["FromPlatformFlagConstDisallowed 1:5 --platform=linux/amd64 | remove it, or write --platform=$BUILDPLATFORM for a stage that runs where the build does"],
    )
    .await;
    check(
        "FROM busybox\nENV A=1 API_KEY=2",
        &["SecretsUsedInArgOrEnv 2:8 API_KEY | give it to the instructions that need it: RUN --mount=type=secret,id=API_KEY,env=API_KEY …"],
    )
    .await;
    check(
        "FROM busybox\nEXPOSE 80 1.2.3.4:90:91/TCP",
        &[
            "ExposeProtoCasing 2:10 1.2.3.4:90:91/TCP -> 1.2.3.4:90:91/tcp | write 1.2.3.4:90:91/tcp",
            "ExposeInvalidFormat 2:10 1.2.3.4:90:91/TCP -> 91/TCP | write 91/TCP",
        ],
    )
    .await;
    let hidden =
        answer("FROM busybox\nCOPY ok a/secret /\n", "-- .dockerignore --\n# x\n**/secret\n").await;
    assert_eq!(
        hidden,
        [
            "CopyIgnoredFile 2:8 a/secret | do not copy it, or change line 2 of .dockerignore: **/secret"
        ]
    );
    check(
        "ARG V\nFROM busybox:$V\nCMD [\"x\"]",
        &[
            "InvalidDefaultArgInFrom 2:5 busybox:$V | give the ARGs in it defaults that make it the name of an image",
            "error 2:5 busybox:$V | failed to parse stage name \"busybox:\": invalid reference format",
        ],
    )
    .await;
    check(
        "FROM busybox\nRUN a \\\n\n b",
        &["NoEmptyContinuation 4 | remove the empty line, or begin it with #"],
    )
    .await;
}

#[tokio::test]
async fn mistakes_are_pointed_at_all_of_them() {
    check(
        "FROM busybox\nFORM b\nENV x\nRUN ok\nCOPY a",
        &[
            "error 2:0 FORM | dockerfile parse error on line 2: unknown instruction: FORM (did you mean FROM?)",
            "error 3:4 x | ENV must have two arguments",
            "error 5:5 a | dockerfile parse error on line 5: COPY requires at least two arguments, but only one was provided. Destination could not be determined",
        ],
    )
    .await;
    check(
        "FROM busybox\nCOPY --from=9 a b\nCOPY --from=$x a b",
        &[
            "error 2:5 --from=9 | invalid stage index 9",
            "error 3:5 --from=$x | variable expansion is not supported for --from, define a new stage with FROM using ARG from global scope as a workaround",
        ],
    )
    .await;
    check(
        "FROM busybox AS a\nFROM bosybux\nFROM nope",
        &[
            "error 2:5 bosybux | bosybux: docker.io/library/bosybux:latest: not found (did you mean busybox?)",
            "error 3:5 nope | nope: docker.io/library/nope:latest: not found",
        ],
    )
    .await;
    check(
        "FROM busybox\nCOPY --chmod=99 a b\nENV A=${X:?needed}\nEXPOSE 80/tpc\nSTOPSIGNAL SIGNOPE\nADD --checksum=x a b\nCOPY https://x/y /z\nRUN --mount=type=cach true",
        &[
            "UndefinedVar 3:8 X | declare it in this stage with ARG X or ENV X=…",
            "error 2:13 99 | invalid chmod parameter: '99'. it should be octal string and between 0 and 07777",
            "error 3:6 ${X:?needed} | failed to process \"${X:?needed}\": X: needed",
            "error 4:7 80/tpc | invalid port: \"80/tpc\": invalid proto: tpc",
            "error 5:11 SIGNOPE | invalid signal: SIGNOPE",
            "error 6:4 --checksum=x | checksum requires HTTP(S) or Git sources",
            "error 7:5 https://x/y | source can't be a URL for COPY",
            "error 8:17 cach | unsupported mount type \"cach\" (did you mean cache?)",
        ],
    )
    .await;
    check(
        "FROM --platform=a/b/c/d busybox",
        &["error 1:5 --platform=a/b/c/d | failed to parse platform a/b/c/d: \"a/b/c/d\": cannot parse platform specifier: invalid argument"],
    )
    .await;
    // What a base image brings stands nowhere in the file.
    check("FROM triggers", &["error 1:5 triggers | invalid stage index 9"]).await;
}

#[tokio::test]
async fn builds_are_told_columns_too() {
    let case = Case::parse(
        "-- opts --\nsource-columns=true\n-- Dockerfile --\nFROM scratch\nENV A=1 \\\n  oops\n",
    );
    let (_, result) = case.build("{}").await;
    let fault = result.err().unwrap();
    let [Detail::Source { spans, .. }] = fault.details() else { panic!("{fault:?}") };
    let shown: Vec<_> =
        spans.iter().map(|s| (s.start.line, s.start.character, s.end.character)).collect();
    assert_eq!(shown, [(2, 0, 0), (3, 2, 6)]);
    assert_eq!(fault.hints().collect::<Vec<_>>(), ["quote a value that contains blanks"]);
}
