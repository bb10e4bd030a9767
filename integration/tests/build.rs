//! The main job: a multi-stage image is built by our client and run by containerd's, and the second
//! build is cached.

use shipway_integration::{Image, build, ctr_run, on_each};
use shipway_testkit::Lab;

const DOCKERFILE: &str = r#"# syntax is ours
ARG WHO=world

FROM busybox AS first
ARG WHO
WORKDIR /out
RUN --mount=type=cache,target=/cache echo "hello $WHO" > greeting
COPY --chown=65534:65534 --chmod=640 name /out/name

FROM busybox AS second
RUN <<EOT
  mkdir -p /data
  echo heredoc > /data/text
EOT

FROM busybox
LABEL org.example.label="a value"
ENV GREETING=/greeting PORT=80
COPY --from=first /out/greeting /greeting
COPY --from=first /out/name /name
COPY --from=second /data /data
USER nobody
WORKDIR /home
EXPOSE 80/tcp
ENTRYPOINT ["/bin/sh", "-c"]
CMD ["cat /greeting /data/text; stat -c '%u:%g %a' /name; id -u; pwd"]
"#;

#[test]
fn a_multi_stage_image_is_built_and_run_and_rebuilt_from_cache() {
    on_each(|flavour| {
        let lab = Lab::complete(flavour);
        let context = lab.context("app", &[("Dockerfile", DOCKERFILE), ("name", "a name\n")]);
        let first = build(&lab, "app:1", &context, &["--build-arg", "WHO=lab"]).ok();
        assert!(!first.all().contains("CACHED"), "nothing can be cached yet:\n{}", first.all());

        let ran = ctr_run(&lab, "docker.io/library/app:1", &[]).ok();
        assert_eq!(ran.stdout, "hello lab\nheredoc\n65534:65534 640\n65534\n/home\n");
        let image = Image::of(&lab, "docker.io/library/app:1");
        let config = &image.config["config"];
        assert_eq!(config["Labels"]["org.example.label"], "a value");
        assert_eq!(config["ExposedPorts"]["80/tcp"], serde_json::json!({}));
        assert_eq!(config["User"], "nobody");
        assert!(
            config["Env"].as_array().is_some_and(|e| e.iter().any(|v| v == "PORT=80")),
            "{config}"
        );

        // Again: every step is cached and the image is the same, bit for bit.
        let second = build(&lab, "app:1", &context, &["--build-arg", "WHO=lab"]).ok();
        assert!(second.all().contains("CACHED"), "{}", second.all());
        let rebuilt = Image::of(&lab, "docker.io/library/app:1");
        assert_eq!(rebuilt.config, image.config, "{}", second.all());
        assert_eq!(rebuilt.target, image.target);

        // Another argument changes what depends on it and nothing else.
        let third = build(&lab, "app:2", &context, &["--build-arg", "WHO=other"]).ok();
        assert!(third.all().contains("CACHED"), "{}", third.all());
        let ran = ctr_run(&lab, "docker.io/library/app:2", &["cat", "/greeting"]).ok();
        assert_eq!(ran.stdout, "hello other\n");
    });
}

#[test]
fn a_target_stage_alone_is_built() {
    let lab = Lab::complete(shipway_integration::any());
    let text = "FROM busybox AS one\nRUN echo 1 > /one\nFROM one AS two\nRUN exit 7\n";
    let context = lab.context("target", &[("Dockerfile", text)]);
    build(&lab, "target:one", &context, &["--target", "one"]).ok();
    assert_eq!(ctr_run(&lab, "docker.io/library/target:one", &["cat", "/one"]).ok().stdout, "1\n");
}
