//! From spans of `tracing` to spans of OpenTelemetry.

use crate::{Outbox, TARGET, TraceContext, Traces, otlp};
use opentelemetry::{
    Context as Parent, KeyValue, Value,
    trace::{
        Span as _, SpanBuilder, SpanContext, SpanKind, Status, TraceContextExt as _, Tracer as _,
        TracerProvider as _,
    },
};
use opentelemetry_proto::transform::common::tonic::ResourceAttributesWithSchema;
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    trace::{SdkTracer, SdkTracerProvider, Span as SdkSpan, SpanData, SpanProcessor},
};
use shipway_fault::redact_text;
use std::{borrow::Cow, fmt, sync::Arc, time::Duration};
use tracing::{
    Instrument as _, Level, Metadata, Span,
    field::{Field, Visit},
    level_filters::LevelFilter,
    span::{Attributes, Id, Record},
};
use tracing_subscriber::{
    Layer, Registry, filter::filter_fn, layer::Context, registry::LookupSpan as _,
};

/// Longest text of an attribute; what is beyond is left out.
const MAX_TEXT: usize = 1024;
/// Name of what makes our spans.
const SCOPE: &str = "shipway";
/// What the service is called unless `OTEL_SERVICE_NAME` says something else.
const SERVICE: &str = "shipwayd";

/// Everything that traces need in a process.
pub struct Tracing {
    /// The layer to install.
    pub layer: TraceLayer,
    /// The traces of running builds, for those that keep them.
    pub traces: Arc<Traces>,
}

impl Tracing {
    /// Spans go to `outbox` if there is one, and to the traces of builds that are recorded.
    /// Samplers, limits and the resource are what OpenTelemetry's variables say.
    pub fn new(outbox: Option<Outbox>) -> Self {
        let resource = Resource::builder();
        let named = |variable: &str| std::env::var_os(variable).is_some_and(|v| !v.is_empty());
        let resource = match named("OTEL_SERVICE_NAME")
            || std::env::var("OTEL_RESOURCE_ATTRIBUTES").is_ok_and(|v| v.contains("service.name"))
        {
            true => resource,
            false => resource.with_service_name(SERVICE),
        };
        let resource = resource.build();
        let traces = Arc::new(Traces::default());
        let wire = ResourceAttributesWithSchema::from(&resource);
        let ended = Ended {
            resource: otlp::Resource { attributes: wire.attributes.0, ..Default::default() },
            traces: traces.clone(),
            outbox,
        };
        let provider =
            SdkTracerProvider::builder().with_span_processor(ended).with_resource(resource).build();
        let layer = TraceLayer { tracer: provider.tracer(SCOPE), _provider: provider };
        Self { layer, traces }
    }
}

/// Where spans go when they end.
struct Ended {
    resource: otlp::Resource,
    traces: Arc<Traces>,
    outbox: Option<Outbox>,
}

impl fmt::Debug for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Ended")
    }
}

impl SpanProcessor for Ended {
    fn on_start(&self, _: &mut SdkSpan, _: &Parent) {}

    fn on_end(&self, span: SpanData) {
        if self.outbox.is_none() && !self.traces.wants(span.span_context.trace_id()) {
            return;
        }
        let span = otlp::Span::from(span);
        self.traces.add(&span, &self.resource, SCOPE);
        if let Some(outbox) = &self.outbox {
            let scope = otlp::InstrumentationScope { name: SCOPE.to_owned(), ..Default::default() };
            outbox.send(otlp::ResourceSpans {
                resource: Some(self.resource.clone()),
                scope_spans: vec![otlp::ScopeSpans {
                    scope: Some(scope),
                    spans: vec![span],
                    ..Default::default()
                }],
                ..Default::default()
            });
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

/// Makes OpenTelemetry's spans of those with the target [`TARGET`].
pub struct TraceLayer {
    tracer: SdkTracer,
    /// Its spans are recorded as long as it lives.
    _provider: SdkTracerProvider,
}

impl TraceLayer {
    /// The layer, for whom only our own spans count: the others are in between.
    pub fn filtered(self) -> impl Layer<Registry> + Send + Sync + 'static {
        fn ours(metadata: &Metadata<'_>) -> bool {
            metadata.is_span()
                && *metadata.level() <= Level::INFO
                && metadata.target().starts_with("shipway")
        }
        self.with_filter(filter_fn(ours).with_max_level_hint(LevelFilter::INFO))
    }
}

/// The span of a trace that a span of `tracing` stands for.
struct Open {
    span: SdkSpan,
    context: SpanContext,
}

/// The fields of a span.
#[derive(Default)]
struct Fields {
    name: Option<String>,
    kind: Option<SpanKind>,
    parent: String,
    state: String,
    attributes: Vec<KeyValue>,
}

/// `text` as traces have it: without credentials, and bounded.
fn clean(text: &str) -> String {
    let mut text = redact_text(text);
    if text.len() > MAX_TEXT {
        text.truncate(text.floor_char_boundary(MAX_TEXT));
        text.push('…');
    }
    text
}

impl Fields {
    fn add(&mut self, field: &Field, value: impl Into<Value>) {
        self.attributes.push(KeyValue::new(field.name(), value));
    }
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "otel.name" => self.name = Some(clean(value)),
            "otel.kind" => {
                self.kind = match value {
                    "client" => Some(SpanKind::Client),
                    "server" => Some(SpanKind::Server),
                    _ => None,
                }
            }
            "traceparent" => self.parent = value.to_owned(),
            "tracestate" => self.state = value.to_owned(),
            _ => self.add(field, clean(value)),
        }
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.add(field, value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.add(field, value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.add(field, i64::try_from(value).unwrap_or(i64::MAX));
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.add(field, value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.record_str(field, &format!("{value:?}"));
    }
}

impl Layer<Registry> for TraceLayer {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, cx: Context<'_, Registry>) {
        if attributes.metadata().target() != TARGET {
            return;
        }
        let Some(span) = cx.span(id) else { return };
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        let parent =
            TraceContext::parse(&fields.parent, &fields.state).map(|c| c.0).or_else(|| {
                let mut above = span.scope().skip(1);
                above.find_map(|s| s.extensions().get::<Open>().map(|open| open.context.clone()))
            });
        // Whatever else is done is done for somebody, or is housekeeping that nobody traces: so
        // sending spans makes none.
        if parent.is_none() && fields.kind != Some(SpanKind::Server) {
            return;
        }
        let name = match fields.name {
            Some(name) => Cow::Owned(name),
            None => Cow::Borrowed(attributes.metadata().name()),
        };
        let builder = SpanBuilder::from_name(name)
            .with_kind(fields.kind.unwrap_or(SpanKind::Internal))
            .with_attributes(fields.attributes);
        let parent = parent.map_or_else(Parent::new, |c| Parent::new().with_remote_span_context(c));
        let open = self.tracer.build_with_context(builder, &parent);
        let context = open.span_context().clone();
        span.extensions_mut().insert(Open { span: open, context });
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, cx: Context<'_, Registry>) {
        let Some(span) = cx.span(id) else { return };
        if let Some(open) = span.extensions_mut().get_mut::<Open>() {
            let mut fields = Fields::default();
            values.record(&mut fields);
            open.span.set_attributes(fields.attributes);
        }
    }

    fn on_close(&self, id: Id, cx: Context<'_, Registry>) {
        let Some(span) = cx.span(&id) else { return };
        if let Some(open) = span.extensions_mut().get_mut::<Open>() {
            open.span.end();
        }
    }
}

/// The context of `span`, or of the nearest one around it that has one.
pub(crate) fn context_of(span: &Span) -> Option<TraceContext> {
    let found = span.with_subscriber(|(id, dispatch)| {
        let registry = dispatch.downcast_ref::<Registry>()?;
        registry.span(id)?.scope().find_map(|s| {
            s.extensions().get::<Open>().map(|open| TraceContext(open.context.clone()))
        })
    });
    found.flatten()
}

fn with_open(span: &Span, change: impl FnOnce(&mut SdkSpan)) {
    span.with_subscriber(|(id, dispatch)| {
        let registry = dispatch.downcast_ref::<Registry>()?;
        change(&mut registry.span(id)?.extensions_mut().get_mut::<Open>()?.span);
        Some(())
    });
}

/// Says that what `span` is about failed, and why.
pub fn fail(span: &Span, why: &dyn fmt::Display) {
    if !span.is_disabled() {
        with_open(span, |open| open.set_status(Status::error(clean(&why.to_string()))));
    }
}

/// Says more of what `span` is about.
pub fn set(span: &Span, name: &'static str, value: i64) {
    if !span.is_disabled() {
        with_open(span, |open| open.set_attribute(KeyValue::new(name, value)));
    }
}

/// Ends a span of a trace, though tasks that it started may go on within it.
struct Ending(Span);

impl Drop for Ending {
    fn drop(&mut self) {
        with_open(&self.0, SdkSpan::end);
    }
}

/// Runs `future` in `span`, which ends with it, or when it is dropped.
pub async fn traced<F: Future>(span: Span, future: F) -> F::Output {
    if span.is_disabled() {
        return future.await;
    }
    let _ending = Ending(span.clone());
    future.instrument(span).await
}

/// [`traced`] of what may fail: then the span says why.
pub async fn traced_result<T>(
    span: Span,
    future: impl Future<Output = shipway_fault::Result<T>>,
) -> shipway_fault::Result<T> {
    let noted = span.clone();
    traced(span, async { future.await.inspect_err(|fault| fail(&noted, fault)) }).await
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use std::collections::BTreeMap;
    use tracing::{info_span, subscriber::DefaultGuard};
    use tracing_subscriber::layer::SubscriberExt as _;

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    /// Spans of this thread while the guard lives, beside a log that wants nothing.
    fn install() -> (crate::OutboxReader, DefaultGuard) {
        let (outbox, reader) = Outbox::new();
        let layer = Tracing::new(Some(outbox)).layer.filtered();
        (reader, tracing::subscriber::set_default(tracing_subscriber::registry().with(layer)))
    }

    fn spans(reader: &mut crate::OutboxReader) -> BTreeMap<String, otlp::Span> {
        let batch = reader.take_now();
        let all = batch.resource_spans.into_iter().flat_map(|r| r.scope_spans);
        all.flat_map(|s| s.spans).map(|s| (s.name.clone(), s)).collect()
    }

    #[tokio::test]
    async fn spans_find_their_parents_through_those_of_the_log() {
        let (mut reader, _guard) = install();
        let request =
            info_span!(target: TARGET, "request", traceparent = PARENT, otel.kind = "server");
        let work = async {
            let log_only = info_span!(target: "shipway_task", "task");
            let call = async { assert!(crate::current().unwrap().is_sampled()) };
            let call = traced(info_span!(target: TARGET, "x", otel.name = "call", n = 3), call);
            call.instrument(log_only).await;
        };
        traced(request, work).await;
        let spans = spans(&mut reader);
        let (request, call) = (&spans["request"], &spans["call"]);
        assert_eq!(spans.len(), 2);
        assert_eq!(hex::encode(&request.trace_id), &PARENT[3..35]);
        assert_eq!(hex::encode(&request.parent_span_id), &PARENT[36..52]);
        assert_eq!((&call.trace_id, &call.parent_span_id), (&request.trace_id, &request.span_id));
        assert_eq!((request.kind, call.kind), (2, 1));
        assert_eq!(call.attributes[0].key, "n");
        assert!(request.end_time_unix_nano >= call.end_time_unix_nano);
    }

    #[tokio::test]
    async fn a_span_ends_with_its_future_and_not_with_what_that_started() {
        let (mut reader, _guard) = install();
        let mut left = None;
        let span = info_span!(target: TARGET, "step", otel.kind = "server");
        traced(span, async { left = Some(Span::current()) }).await;
        assert_eq!(spans(&mut reader).len(), 1);
        // What is left knows where it comes from all the same.
        assert!(context_of(&left.unwrap()).is_some());
    }

    #[test]
    fn failures_and_texts_have_no_credentials_and_an_end() {
        let (mut reader, _guard) = install();
        let span = info_span!(target: TARGET, "pull", otel.kind = "server", from = "https://u:p@r.example/x", long = "é".repeat(MAX_TEXT));
        fail(&span, &"GET https://u:p@r.example/y");
        set(&span, "status", 404);
        drop(span);
        let span = &spans(&mut reader)["pull"];
        let all = format!("{span:?}");
        assert!(!all.contains("u:p") && all.contains("r.example/y"), "{all}");
        assert_eq!(span.status.as_ref().unwrap().code, otlp::status::StatusCode::Error as i32);
        let long = format!("{:?}", span.attributes.iter().find(|a| a.key == "long").unwrap());
        assert!(long.contains('…') && long.len() < 2 * MAX_TEXT, "{}", long.len());
    }

    #[test]
    fn a_trace_that_the_caller_does_not_record_is_passed_on_and_not_recorded() {
        let (mut reader, _guard) = install();
        let parent = PARENT.replace("-01", "-00");
        info_span!(target: TARGET, "request", traceparent = %parent).in_scope(|| {
            let context = crate::current().unwrap();
            assert_eq!(context.trace_id().to_string(), &PARENT[3..35]);
            assert!(!context.is_sampled() && crate::environment().is_empty());
        });
        assert!(spans(&mut reader).is_empty());
    }

    #[tokio::test]
    async fn only_requests_begin_traces() {
        let (mut reader, _guard) = install();
        let span = info_span!(target: TARGET, "call", otel.kind = "client");
        traced(span, async { assert_eq!(crate::current(), None) }).await;
        traced(info_span!(target: TARGET, "work"), async {}).await;
        assert!(spans(&mut reader).is_empty());
    }

    #[test]
    fn without_the_layer_a_span_is_nothing() {
        let log = tracing_subscriber::fmt().with_max_level(LevelFilter::OFF).finish();
        let _guard = tracing::subscriber::set_default(log);
        let made = std::cell::Cell::new(false);
        let value = || {
            made.set(true);
            "value"
        };
        let span = info_span!(target: TARGET, "request", field = value());
        assert!(span.is_disabled() && !made.get());
        assert_eq!(context_of(&span), None);
    }
}
