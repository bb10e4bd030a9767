//! W3C trace contexts.

use http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::{
    Context,
    propagation::{Extractor, TextMapPropagator as _},
    trace::{SpanContext, TraceContextExt as _},
};
use opentelemetry_sdk::propagation::TraceContextPropagator;

pub use opentelemetry::TraceId;

/// Header and variable of the context.
const PARENT: &str = "traceparent";
/// Header and variable of what vendors add to it.
const STATE: &str = "tracestate";
/// Longest `tracestate` that is passed on (W3C recommends at least 512 characters).
const MAX_STATE: usize = 1024;

/// Where in which trace something is done.
#[derive(Clone, Debug, PartialEq)]
pub struct TraceContext(pub(crate) SpanContext);

struct Pair<'a>(&'a str, &'a str);

impl Extractor for Pair<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        match key {
            PARENT => Some(self.0),
            STATE => Some(self.1).filter(|state| !state.is_empty()),
            _ => None,
        }
    }

    fn keys(&self) -> Vec<&str> {
        vec![PARENT, STATE]
    }
}

impl TraceContext {
    /// The context that another program gave; `None` where it is not a valid one.
    pub fn parse(traceparent: &str, tracestate: &str) -> Option<Self> {
        // The library also takes ids that are too short.
        let lengths = traceparent.split('-').map(str::len).take(4);
        if !lengths.eq([2, 32, 16, 2]) {
            return None;
        }
        let state = if tracestate.len() > MAX_STATE { "" } else { tracestate };
        let found = TraceContextPropagator::new()
            .extract_with_context(&Context::new(), &Pair(traceparent, state));
        let context = found.span().span_context().clone();
        context.is_valid().then_some(Self(context))
    }

    /// Both header values of a request, as [`parse`](Self::parse) takes them.
    pub fn headers(of: &HeaderMap) -> (&str, &str) {
        let text = |name| of.get(name).and_then(|v: &HeaderValue| v.to_str().ok());
        (text(PARENT).unwrap_or_default(), text(STATE).unwrap_or_default())
    }

    /// The trace.
    pub fn trace_id(&self) -> TraceId {
        self.0.trace_id()
    }

    /// Whether the trace is recorded.
    pub fn is_sampled(&self) -> bool {
        self.0.is_sampled()
    }

    /// As the header `traceparent`.
    pub fn traceparent(&self) -> String {
        let flags = u8::from(self.0.is_sampled());
        format!("00-{}-{}-{flags:02x}", self.0.trace_id(), self.0.span_id())
    }

    /// As the header `tracestate`; often empty.
    pub fn tracestate(&self) -> String {
        self.0.trace_state().header()
    }

    /// Adds it to the headers of a request.
    pub fn inject(&self, headers: &mut HeaderMap) {
        if let Ok(value) = HeaderValue::from_str(&self.traceparent()) {
            headers.insert(HeaderName::from_static(PARENT), value);
        }
        let state = self.tracestate();
        if let Ok(value) = HeaderValue::from_str(&state)
            && !state.is_empty()
        {
            headers.insert(HeaderName::from_static(STATE), value);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const VALID: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn contexts_are_read_and_written_as_w3c_has_them() {
        let context = TraceContext::parse(VALID, "a=1,b=2").unwrap();
        assert_eq!((context.traceparent().as_str(), context.is_sampled()), (VALID, true));
        let mut headers = HeaderMap::new();
        context.inject(&mut headers);
        assert_eq!(TraceContext::headers(&headers), (VALID, "a=1,b=2"));
        assert!(!TraceContext::parse(&VALID.replace("-01", "-00"), "").unwrap().is_sampled());
        for nonsense in ["", "00", "00-0-0-01", &VALID.replace('a', "x"), &VALID[..54]] {
            assert_eq!(TraceContext::parse(nonsense, ""), None, "{nonsense}");
        }
        let none = "00-00000000000000000000000000000000-b7ad6b7169203331-01";
        assert_eq!(TraceContext::parse(none, ""), None);
    }

    #[test]
    fn a_tracestate_that_is_too_long_is_left_out() {
        // A vendor's part may have 256 characters.
        let part = |name: char| format!("{name}={}", "x".repeat(200));
        let state = ('a'..='e').map(part).collect::<Vec<_>>().join(",");
        assert_eq!(TraceContext::parse(VALID, &state).unwrap().tracestate(), state);
        let long = format!("{state},{}", part('f'));
        assert!(long.len() > MAX_STATE);
        let context = TraceContext::parse(VALID, &long).unwrap();
        assert_eq!(context.tracestate(), "");
    }
}
