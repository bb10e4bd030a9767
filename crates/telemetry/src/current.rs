//! Which trace context is current.

use crate::{context::TraceContext, layer::context_of};

/// The context of what is being done; `None` where nothing traces.
pub fn current() -> Option<TraceContext> {
    context_of(&tracing::Span::current())
}

/// The current context as variables of a process (row `env.trace`); none unless the trace is
/// recorded.
pub fn environment() -> Vec<String> {
    let Some(context) = current().filter(TraceContext::is_sampled) else { return Vec::new() };
    let state = Some(context.tracestate()).filter(|state| !state.is_empty());
    [format!("TRACEPARENT={}", context.traceparent())]
        .into_iter()
        .chain(state.map(|state| format!("TRACESTATE={state}")))
        .collect()
}
