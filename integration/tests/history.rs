//! What is remembered of builds, and what of containerd the daemon's socket shows: bounded, whole
//! after a restart, and nobody else's.

#![allow(clippy::unwrap_used)]

use shipway_integration::{Image, any, build_text};
use shipway_proto::{
    MAX_MESSAGE,
    containerd::services::content::v1::{self as content, content_client::ContentClient},
    moby::buildkit::v1::{self as api, control_client::ControlClient},
};
use shipway_testkit::Lab;
use std::future::Future;
use tonic::{Code, transport::Channel};

/// Runs `work` with a connection to the lab's daemon.
fn connected<T, F: Future<Output = T>>(lab: &Lab, work: impl FnOnce(Channel) -> F) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        work(shipway_grpc::dial(&lab.daemon_address().parse().unwrap(), None).await.unwrap()).await
    })
}

async fn history(
    channel: Channel,
    filter: &[&str],
) -> Result<Vec<api::BuildHistoryRecord>, tonic::Status> {
    let filter = filter.iter().map(|f| (*f).to_owned()).collect();
    let request = api::BuildHistoryRequest { early_exit: true, filter, ..Default::default() };
    let mut events = ControlClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE)
        .listen_build_history(request)
        .await?
        .into_inner();
    let mut all = Vec::new();
    while let Some(event) = events.message().await? {
        all.extend(event.record);
    }
    Ok(all)
}

#[test]
fn huge_options_neither_fill_the_memory_nor_lose_their_builds() {
    const BUILDS: usize = 24;
    const LARGE: usize = 15 << 20;
    let mut lab = Lab::complete(any());
    let solve = |lab: &Lab, i: usize| {
        connected(lab, async |channel| {
            let arg = ("build-arg:large".to_owned(), "\u{1}".repeat(LARGE));
            let request = api::SolveRequest {
                r#ref: format!("large-{i}"),
                frontend: "dockerfile.v0".into(),
                frontend_attrs: [arg, ("target".to_owned(), "x".to_owned())].into(),
                ..Default::default()
            };
            // It has no session, so it fails; what counts is what is remembered of it.
            ControlClient::new(channel)
                .max_encoding_message_size(MAX_MESSAGE)
                .solve(request)
                .await
                .unwrap_err();
        });
    };
    solve(&lab, 0);
    let before = lab.daemon().memory();
    (1..BUILDS).for_each(|i| solve(&lab, i));
    let grown = lab.daemon().memory().saturating_sub(before);
    assert!(grown < 4 * LARGE as u64, "the daemon grew by {} MiB", grown >> 20);

    assert!(lab.stop_daemon(), "the daemon had to be killed");
    lab.start_daemon();
    let records = connected(&lab, async |channel| history(channel, &[]).await).unwrap();
    assert_eq!(records.len(), BUILDS);
    assert!(records.iter().all(|r| r.frontend_attrs["target"] == "x"
        && r.frontend_attrs["build-arg:large"].len() < 1 << 20));
    let idle = lab.daemon().memory();
    assert!(idle < before + 4 * LARGE as u64, "the history takes {} MiB", (idle - before) >> 20);

    let chosen = |filter: &str| connected(&lab, async |channel| history(channel, &[filter]).await);
    assert_eq!(chosen("startedAt>=1h,status==error").unwrap().len(), BUILDS);
    assert_eq!(chosen("startedAt<1h").unwrap().len(), 0);
    assert_eq!(chosen("ref~=^large-1[0-9]$").unwrap().len(), 10);
    assert_eq!(chosen("size>1").unwrap_err().code(), Code::InvalidArgument);
}

/// Helpers of clients build too, and nobody wants to see it (row `ctl.solve.internal`).
#[test]
fn internal_builds_are_not_remembered() {
    let lab = Lab::complete(any());
    let solve = |id: &str, internal: bool| {
        connected(&lab, async |channel| {
            let definition = Some(Default::default());
            let request =
                api::SolveRequest { r#ref: id.into(), definition, internal, ..Default::default() };
            ControlClient::new(channel).solve(request).await.unwrap();
        });
    };
    solve("seen", false);
    solve("unseen", true);
    let records = connected(&lab, async |channel| history(channel, &[]).await).unwrap();
    assert_eq!(records.iter().map(|r| r.r#ref.as_str()).collect::<Vec<_>>(), ["seen"]);
}

#[test]
fn images_of_others_in_the_namespace_cannot_be_read() {
    let lab = Lab::complete(any());
    // The busybox is pulled by somebody else: containerd has it, and no build has.
    let theirs = format!("{}/library/busybox:latest", lab.registry());
    lab.ctr(["images", "pull", "--plain-http", &theirs]).ok();
    let theirs = Image::of(&lab, &theirs);
    build_text(&lab, "ours:1", "FROM scratch\nCOPY Dockerfile /\n").ok();
    let ours = Image::of(&lab, "docker.io/library/ours:1");
    let read = |digest: &str| {
        connected(&lab, async |channel| {
            let mut client = ContentClient::new(channel);
            let info =
                client.info(content::InfoRequest { digest: digest.to_owned() }).await.map(drop);
            let read = client
                .read(content::ReadContentRequest {
                    digest: digest.to_owned(),
                    ..Default::default()
                })
                .await;
            let read = match read {
                Ok(stream) => stream
                    .into_inner()
                    .message()
                    .await
                    .map(|m| m.is_some_and(|m| !m.data.is_empty())),
                Err(status) => Err(status),
            };
            let code = |s: tonic::Status| s.code();
            (info.map_err(code), read.map_err(code))
        })
    };
    let listed = connected(&lab, async |channel| {
        let mut stream = ContentClient::new(channel)
            .list(content::ListContentRequest::default())
            .await
            .unwrap()
            .into_inner();
        let mut digests = Vec::new();
        while let Some(part) = stream.message().await.unwrap() {
            digests.extend(part.info.into_iter().map(|i| i.digest));
        }
        digests
    });
    let config = |image: &Image| image.manifest["config"]["digest"].as_str().unwrap().to_owned();
    for digest in [theirs.target.clone(), theirs.digest.clone(), config(&theirs)]
        .iter()
        .chain(&theirs.layers())
    {
        assert_eq!(read(digest), (Err(Code::NotFound), Err(Code::NotFound)), "{digest}");
        assert!(!listed.contains(digest), "{digest}");
    }
    for digest in
        [ours.target.clone(), ours.digest.clone(), config(&ours)].iter().chain(&ours.layers())
    {
        assert_eq!(read(digest), (Ok(()), Ok(true)), "{digest}");
        assert!(listed.contains(digest), "{digest}");
    }
}
