//! Sockets and services: bound early, served until a signal, ended in order.

use crate::{
    content::ContentService, control::ControlService, gc, parts::Parts, settings::Listening,
};
use shipway_fault::{Fault, Result};
use shipway_gateway::BridgeService;
use shipway_grpc::{Address, HealthService, ListenOptions, Listener};
use shipway_history::History;
use shipway_proto::{
    MAX_MESSAGE,
    containerd::services::content::v1::content_server::ContentServer,
    grpc::health::v1::health_server::HealthServer,
    moby::buildkit::v1::{
        control_server::ControlServer, frontend::llb_bridge_server::LlbBridgeServer,
    },
};
use std::{sync::Arc, time::Duration};
use tokio::signal::unix::{SignalKind, signal};
use tracing::Instrument as _;

/// Between two looks at which builds to forget.
const FORGET: Duration = Duration::from_secs(120);
/// How long running builds get to end after the first signal.
const DRAIN: Duration = Duration::from_secs(10);

/// Binds all addresses.
pub async fn bind(listening: &Listening) -> Result<Vec<Listener>> {
    let Listening { addresses, uid, group, tls } = listening;
    let gid = group.as_deref().map(group_id).transpose()?;
    let options = ListenOptions { uid: *uid, gid, tls: tls.clone(), ..ListenOptions::default() };
    let mut all = Vec::new();
    for address in addresses {
        all.extend(Listener::bind(&address.parse::<Address>()?, &options).await?);
    }
    Ok(all)
}

/// The number of a group given by name or number.
fn group_id(group: &str) -> Result<u32> {
    if let Ok(id) = group.parse() {
        return Ok(id);
    }
    let text =
        std::fs::read_to_string("/etc/group").map_err(|e| Fault::io("read /etc/group", e))?;
    let found = text.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(group))
            .then(|| fields.nth(1).and_then(|id| id.parse().ok()))
            .flatten()
    });
    found.ok_or_else(|| Fault::not_found(format!("no group {group:?} on this machine")))
}

/// Serves until SIGTERM or SIGINT, then lets builds end for a while.
pub async fn run(parts: Parts, listeners: Vec<Listener>) -> Result<()> {
    let trigger = gc::Trigger::default();
    let engine = parts.engine.clone();
    let worker = parts.worker.clone();
    let collector = tokio::spawn(
        gc::run(
            engine.parts().caches.clone(),
            parts.worker.gc.clone(),
            parts.worker.disk.clone(),
            trigger.clone(),
        )
        .instrument(tracing::info_span!("gc")),
    );
    let remembered = tokio::spawn(
        forget(engine.parts().history.clone()).instrument(tracing::info_span!("history")),
    );
    let control = ControlService { engine: engine.clone(), worker: worker.clone(), gc: trigger };
    let bridge =
        BridgeService::new(engine.parts().builds.clone(), Arc::new(move || vec![worker.record()]));
    let content = ContentService::new(
        parts.storage.clone(),
        engine.parts().services.refs.clone(),
        engine.parts().history.clone(),
    );
    let routes = tonic::service::Routes::new(
        ControlServer::new(control)
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE),
    )
    .add_service(
        LlbBridgeServer::new(bridge)
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE),
    )
    .add_service(
        ContentServer::new(content)
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE),
    )
    .add_service(HealthServer::new(HealthService));
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let mut servers = tokio::task::JoinSet::new();
    for listener in listeners {
        let address = listener.address();
        tracing::info!(%address, "listening");
        let mut stopped = stopped.clone();
        let ended = async move {
            let _ = stopped.wait_for(|s| *s).await;
        };
        let server = shipway_grpc::server()
            .add_routes(routes.clone())
            .serve_with_incoming_shutdown(listener.incoming(), ended);
        servers.spawn(server.instrument(tracing::info_span!("serve", %address)));
    }
    notify(sd_notify::NotifyState::Ready);
    let mut failed = None;
    tokio::select! {
        () = asked_to_stop() => tracing::info!("stopping"),
        ended = servers.join_next() => failed = ended.map(|e| format!("{e:?}")),
    }
    notify(sd_notify::NotifyState::Stopping);
    let _ = stop.send(true);
    let all = async { while servers.join_next().await.is_some() {} };
    tokio::select! {
        _ = tokio::time::timeout(DRAIN, all) => {}
        () = asked_to_stop() => tracing::warn!("stopping at once"),
    }
    servers.shutdown().await;
    collector.abort();
    remembered.abort();
    let services = &engine.parts().services;
    let clean = async {
        services.executor.drained().await;
        if let Err(error) = services.refs.close().await {
            tracing::warn!(%error, "what was built last is not known to be on the disk");
        }
    };
    let _ = tokio::time::timeout(DRAIN, clean).await;
    match failed {
        Some(what) => Err(Fault::internal(format!("a listener ended by itself: {what}"))),
        None => Ok(()),
    }
}

/// Forgets builds that ended long ago, from time to time (row `so.h.gc`).
async fn forget(history: Arc<History>) {
    let mut timer = tokio::time::interval(FORGET);
    timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        timer.tick().await;
        let history = history.clone();
        let _ = tokio::task::spawn_blocking(move || history.trim()).await;
    }
}

fn notify(state: sd_notify::NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::debug!(%error, "the service manager was not told");
    }
}

async fn asked_to_stop() {
    let (Ok(mut term), Ok(mut int)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_has_a_name_or_a_number() {
        assert_eq!((group_id("root").unwrap(), group_id("1234").unwrap()), (0, 1234));
        assert!(
            group_id("no such group")
                .unwrap_err()
                .to_string()
                .contains("no group \"no such group\"")
        );
    }
}
