//! Several builds in one view.

use shipway_client::Status;
use shipway_oci::Digest;
use tokio::sync::mpsc;

/// Events waiting to be passed on.
const QUEUE: usize = 64;

/// A sender for the events of one of several builds, whose steps are called by `name`. Steps of
/// builds on several nodes may have the same digest and still be others: with a `node`, they get
/// digests of their own.
pub(crate) fn part(
    events: &mpsc::Sender<Status>,
    name: &str,
    node: Option<&str>,
) -> mpsc::Sender<Status> {
    let (sender, mut queue) = mpsc::channel::<Status>(QUEUE);
    let (name, node) = (name.to_owned(), node.map(str::to_owned));
    let events = events.clone();
    shipway_task::spawn("name the steps of a build", async move {
        while let Some(mut status) = queue.recv().await {
            call(&mut status, &name);
            if let Some(node) = &node {
                tell_apart(&mut status, node);
            }
            if events.send(status).await.is_err() {
                return;
            }
        }
    });
    sender
}

fn call(status: &mut Status, name: &str) {
    for vertex in &mut status.vertexes {
        vertex.name = match vertex.name.strip_prefix('[') {
            Some(rest) => format!("[{name} {rest}"),
            None => format!("[{name}] {}", vertex.name),
        };
    }
}

fn tell_apart(status: &mut Status, node: &str) {
    let change = |digest: &mut String| {
        if !digest.is_empty() {
            *digest = Digest::of(format!("{node}\n{digest}")).to_string();
        }
    };
    for vertex in &mut status.vertexes {
        change(&mut vertex.digest);
        vertex.inputs.iter_mut().for_each(change);
        if let Some(group) = &mut vertex.progress_group {
            change(&mut group.id);
        }
    }
    status.statuses.iter_mut().for_each(|s| change(&mut s.vertex));
    status.logs.iter_mut().for_each(|l| change(&mut l.vertex));
    status.warnings.iter_mut().for_each(|w| change(&mut w.vertex));
}

#[cfg(test)]
mod tests {
    use shipway_client::{Log, Time, Vertex, Warning};

    use super::*;

    fn event(name: &str) -> Status {
        let digest = Digest::of("step").to_string();
        Status {
            vertexes: vec![Vertex {
                digest: digest.clone(),
                inputs: vec![digest.clone()],
                name: name.to_owned(),
                ..Vertex::default()
            }],
            logs: vec![Log {
                vertex: digest.clone(),
                stream: 1,
                data: Vec::new(),
                timestamp: Time::epoch(),
            }],
            warnings: vec![Warning { vertex: digest, ..Warning::default() }],
            ..Status::default()
        }
    }

    #[tokio::test]
    async fn steps_of_several_nodes_are_told_apart() {
        let (events, mut queue) = mpsc::channel(8);
        for node in ["a", "b"] {
            part(&events, node, Some(node)).send(event("[1/2] RUN x")).await.expect("sent");
        }
        part(&events, "app", None).send(event("exporting")).await.expect("sent");
        drop(events);
        let mut shown = Vec::new();
        while let Some(status) = queue.recv().await {
            let vertex = status.vertexes[0].clone();
            // All that belongs to the step follows it.
            assert_eq!(vertex.inputs, std::slice::from_ref(&vertex.digest));
            assert_eq!(status.logs[0].vertex, vertex.digest);
            assert_eq!(status.warnings[0].vertex, vertex.digest);
            assert!(vertex.digest.parse::<Digest>().is_ok());
            shown.push((vertex.name, vertex.digest));
        }
        shown.sort();
        let names: Vec<&str> = shown.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["[a 1/2] RUN x", "[app] exporting", "[b 1/2] RUN x"]);
        assert_ne!(shown[0].1, shown[2].1);
        assert_eq!(shown[1].1, Digest::of("step").to_string());
    }
}
