//! Sockets and services: bound early, served until a signal, ended in order.

use crate::{
    content::ContentService,
    control::ControlService,
    debug,
    drain::Drain,
    gc,
    parts::Parts,
    settings::Listening,
    telemetry::{self, Receiver, Telemetry, collector},
};
use shipway_daemon::NotifyState;
use shipway_engine::Engine;
use shipway_fault::{Fault, Result};
use shipway_gateway::BridgeService;
use shipway_grpc::{Address, HealthService, ListenOptions, Listener, TraceRequests};
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
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

/// Between two looks at which builds to forget.
const FORGET: Duration = Duration::from_secs(120);
/// How long calls get to end when no build runs any more, and then what is left of steps.
const LAST_CALLS: Duration = Duration::from_secs(10);

/// How long the last spans may take.
const LAST_SPANS: Duration = Duration::from_secs(5);

/// Binds all addresses.
pub async fn bind(listening: &Listening) -> Result<Vec<Listener>> {
    let Listening { addresses, uid, group, tls, authenticated } = listening;
    let gid = group.as_deref().map(group_id).transpose()?;
    let (uid, tls, authenticated) = (*uid, tls.clone(), *authenticated);
    let options = ListenOptions { uid, gid, tls, authenticated, ..ListenOptions::default() };
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

/// Serves until SIGTERM or SIGINT, then lets builds end for a while; a second signal ends them.
pub async fn run(parts: Parts, listeners: Vec<Listener>) -> Result<()> {
    let trigger = gc::Trigger::default();
    let engine = parts.engine.clone();
    let worker = parts.worker.clone();
    let quota = engine.parts().services.quota.clone();
    let held = engine.parts().services.held.clone();
    let expire = async move { held.expire(parts.adopt_timeout).await };
    let expiring = shipway_task::spawn("wait for builds of steps that were left", expire);
    let gc = shipway_task::spawn("gc", gc::run(quota, trigger.clone()));
    let remembered = shipway_task::spawn("history", forget(engine.parts().history.clone()));
    let drain = Drain::default();
    let control = ControlService {
        engine: engine.clone(),
        worker: worker.clone(),
        gc: trigger,
        drain: drain.clone(),
    };
    let bridge =
        BridgeService::new(engine.parts().builds.clone(), Arc::new(move || vec![worker.record()]));
    let content = ContentService::new(
        parts.storage.clone(),
        engine.parts().services.refs.clone(),
        engine.parts().history.clone(),
    );
    let Telemetry { traces, outbox, reader } = parts.telemetry;
    let spans = Receiver { traces, outbox };
    let debug = match &parts.debug {
        Some(address) => Some(debug::start(address, engine.clone(), drain.clone()).await?),
        None => None,
    };
    let stop_sending = CancellationToken::new();
    let sending = reader.zip(parts.traces.export).map(|(reader, to)| {
        shipway_task::spawn("send spans", collector::send(reader, to, stop_sending.clone()))
    });
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
    .add_service(HealthServer::new(HealthService::until(drain.begun())))
    .add_service(spans.clone().service());
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
            .layer(TraceRequests)
            .layer(parts.auth.clone())
            .add_routes(routes.clone())
            .serve_with_incoming_shutdown(listener.incoming(), ended);
        let server = server.instrument(tracing::info_span!("serve", %address));
        servers.spawn(shipway_task::named("serve", server));
    }
    // Steps get this one, and nothing but spans is taken there.
    let of_steps = match sending.is_some() {
        true => Some(telemetry::listen(&parts.traces.socket, spans).await?),
        false => None,
    };
    shipway_daemon::notify(NotifyState::Ready);
    let mut failed = None;
    tokio::select! {
        () = shipway_daemon::stop_requested() => tracing::info!("stopping"),
        ended = servers.join_next() => failed = ended.map(|e| format!("{e:?}")),
    }
    shipway_daemon::notify(NotifyState::Stopping);
    if failed.is_none() {
        // The service manager would else kill us in the middle.
        let limit = parts.drain_timeout;
        let whole = (limit + 3 * LAST_CALLS).as_micros();
        let extended = u32::try_from(whole).unwrap_or(u32::MAX);
        shipway_daemon::notify(NotifyState::ExtendTimeoutUsec(extended));
        // Builds go on asking meanwhile, on connections old and new.
        let leave = || leave_steps(&engine);
        drain.finish(limit, shipway_daemon::stop_requested(), leave).await;
    }
    let _ = stop.send(true);
    let all = async { while servers.join_next().await.is_some() {} };
    tokio::select! {
        _ = tokio::time::timeout(LAST_CALLS, all) => {}
        () = shipway_daemon::stop_requested() => tracing::warn!("stopping at once"),
    }
    servers.shutdown().await;
    expiring.abort();
    gc.abort();
    remembered.abort();
    drop((of_steps, debug));
    let services = &engine.parts().services;
    // Those that no build has wanted yet.
    services.held.leave();
    let clean = async {
        engine.finalize_all().await;
        engine.forget_failures().await;
        services.executor.drained().await;
        if let Err(error) = services.refs.close().await {
            tracing::warn!(%error, "failed to sync the last snapshots to disk");
        }
    };
    let _ = tokio::time::timeout(LAST_CALLS, clean).await;
    stop_sending.cancel();
    if let Some(sending) = sending {
        let _ = tokio::time::timeout(LAST_SPANS, sending).await;
    }
    match failed {
        Some(what) => Err(Fault::internal(format!("a listener ended by itself: {what}"))),
        None => Ok(()),
    }
}

/// Lets running steps go on without this daemon, if they may.
fn leave_steps(engine: &Engine) {
    let services = &engine.parts().services;
    if services.held.outlive() {
        services.executor.leave();
    }
}

/// Forgets builds that ended long ago, from time to time (row `so.h.gc`).
async fn forget(history: Arc<History>) {
    let mut timer = tokio::time::interval(FORGET);
    timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        timer.tick().await;
        let history = history.clone();
        let trim = move || {
            history.trim();
            Ok(())
        };
        let _ = shipway_task::blocking("trim the history", trim).await;
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
