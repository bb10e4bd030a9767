//! Traces: what is done for whom, and for how long (rows `ob.*`, `so.h.trace`).
//!
//! - A span of a trace is a span of `tracing` with the target [`TARGET`], so that it passes through
//!   tasks and futures as all spans do. [`TraceLayer`] makes OpenTelemetry's spans of these and of
//!   no others; where it is not installed such a span costs a comparison. [`traced`] runs a future
//!   in one and ends it with the future, [`fail`] and [`set`] say more of it.
//! - [`TraceContext`] is the W3C trace context: read from a request, written into others.
//! - [`Traces`] keeps the spans of running builds, for the history, as the JSON that BuildKit's
//!   clients read ([`stub`]).
//! - [`Outbox`] is the queue to a collector. What sends it is a program's; [`ExportSettings`] says
//!   where to, by OpenTelemetry's own variables.
//! - [`meter`] has counters that are cheap enough to be counted whether or not anybody looks.
//!
//! `opentelemetry_sdk` has the model: ids, samplers, limits, the resource, and their variables.
//! `opentelemetry-proto` has OTLP's messages and service. Two crates that usually go with them do
//! not: `tracing-opentelemetry` makes a span of every span of the log, and finds no parent behind
//! one that it was made to leave out; `opentelemetry-otlp` takes none of the spans that clients
//! send, which are messages already, so there would be two ways to a collector.

mod context;
mod current;
mod export;
mod layer;
pub mod meter;
mod outbox;
pub mod stub;
mod traces;

pub use context::{TraceContext, TraceId};
pub use current::{current, environment};
pub use export::{ExportSettings, Protocol, is_disabled};
pub use layer::{TraceLayer, Tracing, fail, set, traced, traced_result};
pub use outbox::{Outbox, OutboxReader};
pub use traces::{TraceRecording, Traces};

/// OTLP's messages and its service.
pub mod otlp {
    pub use opentelemetry_proto::tonic::{
        collector::trace::v1::{
            ExportTraceServiceRequest, ExportTraceServiceResponse, trace_service_client,
            trace_service_server,
        },
        common::v1::{AnyValue, ArrayValue, InstrumentationScope, KeyValue, any_value},
        resource::v1::Resource,
        trace::v1::{ResourceSpans, ScopeSpans, Span, Status, span, status},
    };
}

/// Target of the spans that traces have. Their fields are attributes, but for `otel.name` (a name
/// that is not known at compile time), `otel.kind` (`client` or `server`), and `traceparent` and
/// `tracestate`, by which a span goes on with another program's trace. A trace begins with a
/// request that is served (`otel.kind = "server"`); any other span outside of a trace is nothing.
pub const TARGET: &str = "shipway::trace";
