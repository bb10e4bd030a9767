//! Sends spans to a collector (row `ob.otlp`), by gRPC or by HTTP.

use http::{HeaderValue, Method, StatusCode, Uri, header};
use prost::Message as _;
use shipway_fault::{Code, Fault, Result};
use shipway_grpc::{Address, ClientTls};
use shipway_http::{Client, DeniedNetworks, KeyPair, Timeouts, TlsSettings, full_body};
use shipway_telemetry::{
    ExportSettings, OutboxReader, Protocol,
    otlp::{ExportTraceServiceRequest, trace_service_client::TraceServiceClient},
};
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tonic::{
    metadata::{Ascii, MetadataKey, MetadataValue},
    transport::Channel,
};

/// How often a request is sent while the collector cannot take it.
const TRIES: u32 = 3;
/// Before the second try; twice as long before the third.
const PAUSE: Duration = Duration::from_secs(1);
/// Port of a collector's gRPC service where its address has none.
const PORT: u16 = 4317;

/// Sends what comes out of `outbox` until `stop`, and then what is left.
pub async fn send(mut outbox: OutboxReader, to: ExportSettings, stop: CancellationToken) {
    let delay = to.delay;
    let mut collector = Collector { to, grpc: None, http: None };
    let mut failing = false;
    loop {
        let request = tokio::select! {
            next = outbox.next(delay) => next,
            () = stop.cancelled() => Some(outbox.take_now()),
        };
        let Some(request) = request else { return };
        if !request.resource_spans.is_empty() {
            match collector.send(&request).await {
                Ok(()) if failing => tracing::info!("the collector takes spans again"),
                Ok(()) => {}
                Err(error) => {
                    OutboxReader::lost(&request);
                    // Once: it may be away for long.
                    if !failing {
                        tracing::warn!(%error, "failed to send spans to the collector");
                    }
                    failing = true;
                    continue_unless(&stop).await;
                    if stop.is_cancelled() {
                        return;
                    }
                    continue;
                }
            }
            failing = false;
        }
        if stop.is_cancelled() {
            return;
        }
    }
}

/// A moment for others.
async fn continue_unless(stop: &CancellationToken) {
    let _ = tokio::time::timeout(PAUSE, stop.cancelled()).await;
}

struct Collector {
    to: ExportSettings,
    grpc: Option<TraceServiceClient<Channel>>,
    http: Option<Client>,
}

impl Collector {
    async fn send(&mut self, request: &ExportTraceServiceRequest) -> Result<()> {
        let mut pause = PAUSE;
        for _ in 1..TRIES {
            match self.send_once(request).await {
                Err(fault) if is_transient(&fault) => tokio::time::sleep(pause).await,
                done => return done,
            }
            pause *= 2;
        }
        self.send_once(request).await
    }

    async fn send_once(&mut self, request: &ExportTraceServiceRequest) -> Result<()> {
        let limit = self.to.timeout;
        let sent = async {
            match self.to.protocol {
                Protocol::Grpc => self.by_grpc(request).await,
                Protocol::Http => self.by_http(request).await,
            }
        };
        tokio::time::timeout(limit, sent).await.unwrap_or_else(|_| {
            let text = format!("the collector has not answered within {limit:?}");
            Err(Fault::new(Code::DeadlineExceeded, text))
        })
    }

    async fn by_grpc(&mut self, request: &ExportTraceServiceRequest) -> Result<()> {
        if self.grpc.is_none() {
            let (address, tls) = target(&self.to)?;
            let channel = shipway_grpc::dial(&address, tls.as_ref()).await?;
            self.grpc = Some(TraceServiceClient::new(channel));
        }
        let mut call = tonic::Request::new(request.clone());
        for (name, value) in &self.to.headers {
            // Checked when they were read.
            if let (Ok(name), Ok(value)) =
                (name.parse::<MetadataKey<Ascii>>(), value.parse::<MetadataValue<Ascii>>())
            {
                call.metadata_mut().insert(name, value);
            }
        }
        let Some(client) = &mut self.grpc else { return Ok(()) };
        client.export(call).await.map(drop).map_err(|status| shipway_grpc::fault_of(&status))
    }

    async fn by_http(&mut self, request: &ExportTraceServiceRequest) -> Result<()> {
        if self.http.is_none() {
            let tls = TlsSettings {
                ca: self.to.ca.iter().cloned().collect(),
                keypair: self
                    .to
                    .identity
                    .iter()
                    .map(|(cert, key)| KeyPair { cert: cert.clone(), key: key.clone() })
                    .collect(),
                skip_verify: false,
            };
            // The operator named the collector, wherever that is.
            let make = move || {
                Client::new(&tls, Timeouts::default(), DeniedNetworks(Vec::new()))
                    .map_err(Fault::invalid)
            };
            self.http = Some(shipway_task::blocking("read certificates", make).await?);
        }
        let Some(client) = &self.http else { return Ok(()) };
        let mut post = http::Request::new(full_body(request.encode_to_vec()));
        *post.method_mut() = Method::POST;
        *post.uri_mut() = self.to.endpoint.parse::<Uri>().map_err(|_| {
            Fault::invalid(format!(
                "{} is not an address",
                shipway_fault::redact(&self.to.endpoint)
            ))
        })?;
        let headers = post.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/x-protobuf"));
        for (name, value) in &self.to.headers {
            if let (Ok(name), Ok(value)) =
                (name.parse::<header::HeaderName>(), HeaderValue::from_str(value))
            {
                headers.insert(name, value);
            }
        }
        let response = client.send(post).await?;
        match response.head.status {
            status if status.is_success() => Ok(()),
            status @ (StatusCode::TOO_MANY_REQUESTS
            | StatusCode::BAD_GATEWAY
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::GATEWAY_TIMEOUT) => {
                Err(Fault::unavailable(format!("the collector answered {status}")))
            }
            status => Err(Fault::unknown(format!("the collector answered {status}"))),
        }
    }
}

fn is_transient(fault: &Fault) -> bool {
    matches!(
        fault.code(),
        Code::Unavailable | Code::DeadlineExceeded | Code::ResourceExhausted | Code::Aborted
    )
}

/// What to dial.
fn target(to: &ExportSettings) -> Result<(Address, Option<ClientTls>)> {
    if let Some(path) = to.endpoint.strip_prefix("unix://") {
        return Ok((Address::Unix(path.into()), None));
    }
    let wrong = || {
        let shown = shipway_fault::redact(&to.endpoint);
        Fault::invalid(format!("{shown} is not the address of a collector"))
    };
    let uri: Uri = to.endpoint.parse().map_err(|_| wrong())?;
    let host = uri.host().ok_or_else(wrong)?;
    let address = Address::Tcp(format!("{host}:{}", uri.port_u16().unwrap_or(PORT)));
    let tls = || ClientTls { server_name: None, ca: to.ca.clone(), identity: to.identity.clone() };
    Ok((address, (uri.scheme_str() == Some("https")).then(tls)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_collector_is_dialed_as_its_address_says() {
        let of = |endpoint: &str| {
            let variable =
                |name: &str| (name == "OTEL_EXPORTER_OTLP_ENDPOINT").then(|| endpoint.to_owned());
            let to = ExportSettings::find(&variable, None, None).unwrap().unwrap();
            target(&to).map(|(address, tls)| format!("{address} {}", tls.is_some()))
        };
        for (endpoint, expected) in [
            ("http://c.example", "tcp://c.example:4317 false"),
            ("https://c.example:1/", "tcp://c.example:1 true"),
            ("http://u:p@[::1]:5", "tcp://[::1]:5 false"),
            ("unix:///run/c.sock", "unix:///run/c.sock false"),
        ] {
            assert_eq!(of(endpoint).unwrap(), expected);
        }
        let fault = of("http://u:p@ x").unwrap_err().to_string();
        assert!(!fault.contains("u:p"), "{fault}");
    }
}
