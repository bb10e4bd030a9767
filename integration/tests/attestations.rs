//! What is said of a result is beside it, and the result is what it would be without (rows `at.*`).

#![allow(clippy::unwrap_used)]

use serde_json::Value;
use shipway_integration::{Image, any, blob, build, collect_garbage, ctr_run, on_each};
use shipway_testkit::{Lab, run};

const DOCKERFILE: &str =
    "FROM busybox\nARG SECRETIVE\nRUN echo told > /told\nCMD [\"cat\", \"/told\"]\n";

/// Entries of the index that `name` points at: the image's and what is said of it.
#[track_caller]
fn entries(index: &Value) -> (&Value, &Value) {
    let all = index["manifests"].as_array().unwrap_or_else(|| panic!("no index: {index}"));
    assert_eq!(all.len(), 2, "{index}");
    (&all[0], &all[1])
}

/// The statements beside the image `name`.
#[track_caller]
fn statements(lab: &Lab, name: &str) -> Vec<Value> {
    let index = blob(lab, &Image::of(lab, name).target);
    let (image, said) = entries(&index);
    assert_eq!(said["platform"], serde_json::json!({ "architecture": "unknown", "os": "unknown" }));
    assert_eq!(said["annotations"]["vnd.docker.reference.type"], "attestation-manifest");
    assert_eq!(said["annotations"]["vnd.docker.reference.digest"], image["digest"]);
    let manifest = blob(lab, said["digest"].as_str().unwrap());
    assert_eq!(
        (&manifest["artifactType"], &manifest["subject"]["digest"]),
        (&ATTESTATION.into(), &image["digest"])
    );
    let one = |layer: &Value| {
        let statement = blob(lab, layer["digest"].as_str().unwrap());
        assert_eq!(layer["mediaType"], "application/vnd.in-toto+json");
        assert_eq!(layer["annotations"]["in-toto.io/predicate-type"], statement["predicateType"]);
        statement
    };
    manifest["layers"].as_array().unwrap().iter().map(one).collect()
}

const ATTESTATION: &str = "application/vnd.docker.attestation.manifest.v1+json";

#[test]
fn an_image_with_provenance_runs_and_keeps_it() {
    on_each(|flavour| {
        let lab = Lab::complete(flavour);
        let context = lab.context("prov", &[("Dockerfile", DOCKERFILE)]);
        let name = "docker.io/library/prov:1";
        let max = ["--provenance=mode=max", "--build-arg", "SECRETIVE=no"];
        build(&lab, "prov:1", &context, &max).ok();
        collect_garbage(&lab);
        assert_eq!(ctr_run(&lab, name, &[]).ok().stdout, "told\n");
        let said = statements(&lab, name);
        let predicate = &said[0]["predicate"];
        assert_eq!(said[0]["predicateType"], "https://slsa.dev/provenance/v1");
        assert!(
            said[0]["subject"][0]["name"]
                .as_str()
                .unwrap()
                .starts_with("pkg:docker/prov@1?platform="),
            "{}",
            said[0]
        );
        let definition = &predicate["buildDefinition"];
        assert_eq!(
            definition["externalParameters"]["request"]["args"]["build-arg:SECRETIVE"],
            "no"
        );
        assert!(
            definition["resolvedDependencies"][0]["uri"]
                .as_str()
                .unwrap()
                .contains("busybox@latest"),
            "{definition}"
        );
        assert_eq!(
            definition["internalParameters"]["buildConfig"]["llbDefinition"]
                .as_array()
                .unwrap()
                .len(),
            3
        );
        let layers = &predicate["runDetails"]["metadata"]["buildkit_metadata"]["layers"];
        assert_eq!(layers["step1:0"][0].as_array().map(Vec::len), Some(2), "{layers}");

        // Little is told if little is asked for, and the image does not depend on it.
        let again = build(
            &lab,
            "prov:2",
            &context,
            &["--attest", "type=provenance,mode=min", "--build-arg", "SECRETIVE=no"],
        )
        .ok();
        assert!(again.all().contains("CACHED"), "{}", again.all());
        let min = &statements(&lab, "docker.io/library/prov:2")[0]["predicate"]["buildDefinition"];
        assert!(
            min["externalParameters"]["request"]["args"]["build-arg:SECRETIVE"].is_null(),
            "{min}"
        );
        assert!(min["internalParameters"]["buildConfig"].is_null(), "{min}");
        build(&lab, "prov:3", &context, &["--provenance=false", "--build-arg", "SECRETIVE=no"])
            .ok();
        let plain = Image::of(&lab, "docker.io/library/prov:3");
        assert_eq!(plain.target, plain.digest, "nothing was to be said of it");
        assert_eq!(plain.digest, Image::of(&lab, name).digest);
    });
}

#[test]
fn a_directory_gets_its_provenance_as_a_file() {
    let lab = Lab::complete(any());
    let context =
        lab.context("provdir", &[("Dockerfile", "FROM scratch\nCOPY file /file\n"), ("file", "x")]);
    let dest = lab.dir().join("out");
    let output = format!("type=local,dest={},attestation-prefix=pre-", dest.display());
    let (context, name) =
        (context.to_string_lossy().into_owned(), dest.join("pre-provenance.json"));
    lab.shipway(["build", "--output", &output, "--provenance", &context]).ok();
    let said: Value = serde_json::from_slice(&std::fs::read(&name).unwrap()).unwrap();
    let digest = shipway_oci::Digest::of("x").hex();
    assert_eq!(
        said["subject"],
        serde_json::json!([{ "name": "file", "digest": { "sha256": digest } }])
    );
    assert!(dest.join("file").exists());
}

#[test]
fn a_scanner_looks_at_the_result_and_at_what_else_it_is_told_to() {
    let lab = Lab::complete(any());
    let script = "#!/bin/sh\nset -e\nfor s in $BUILDKIT_SCAN_SOURCE $BUILDKIT_SCAN_SOURCE_EXTRAS/*; do\n  [ -e $s ] || continue\n  \
        files=$(ls $s | sed 's|.*|{\"fileName\":\"/&\"}|' | tr '\\n' ,)\n  \
        echo '{\"predicateType\":\"https://spdx.dev/Document\",\"predicate\":{\"spdxVersion\":\"SPDX-2.3\",\"files\":['${files%,}']}}' \
        > $BUILDKIT_SCAN_DESTINATION/$(basename $s).spdx.json\ndone\n";
    let scanner = lab.context(
        "scanner",
        &[
            ("Dockerfile", "FROM busybox\nCOPY --chmod=755 scan /scan\nCMD [\"/scan\"]\n"),
            ("scan", script),
        ],
    );
    build(&lab, "scanner:1", &scanner, &[]).ok();
    let text = "FROM scratch AS other\nARG BUILDKIT_SBOM_SCAN_STAGE=true\nCOPY <<EOT /beside\nx\nEOT\nFROM scratch\nCOPY --from=other /beside /core\n";
    let context = lab.context("scanned", &[("Dockerfile", text)]);
    build(&lab, "scanned:1", &context, &["--sbom=generator=scanner:1"]).ok();
    let said = statements(&lab, "docker.io/library/scanned:1");
    let layer = format!("layerID: {}", Image::of(&lab, "docker.io/library/scanned:1").layers()[0]);
    let files: Vec<_> = said.iter().map(|s| s["predicate"]["files"].clone()).collect();
    // Only what is in the image itself has a layer there.
    let wanted = [
        serde_json::json!([{ "fileName": "/core", "comment": layer }]),
        serde_json::json!([{ "fileName": "/beside" }]),
    ];
    assert_eq!(files, wanted, "{said:?}");
}

#[test]
fn buildx_gets_the_provenance_that_it_asks_for_unasked() {
    let lab = Lab::complete(any());
    let Some(mut buildx) = lab.buildx() else { return eprintln!("docker-buildx is absent") };
    let context = lab.context("bxprov", &[("Dockerfile", DOCKERFILE)]);
    let tag = format!("{}/bx/prov:1", lab.registry());
    run(buildx.args(["build", "--push", "--tag", &tag]).arg(&context)).ok();
    let (status, body) = lab.registry_get("/v2/bx/prov/manifests/1");
    let index: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(status, 200);
    let (_, said) = entries(&index);
    assert_eq!(
        lab.registry_get(&format!("/v2/bx/prov/manifests/{}", said["digest"].as_str().unwrap())).0,
        200
    );
}
