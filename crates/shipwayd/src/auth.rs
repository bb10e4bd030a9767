//! Who calls: each request on the daemon's listeners gets its [`Caller`], and what calls need is
//! decided by their method, before any of them does anything (rows `dp.auth.*`).
//!
//! What depends on the contents of a request (images, caches, entitlements, whose build it is) is
//! asked of the same caller where it is known: by the services and by the engine.

use http::header;
use shipway_fault::Result;
use shipway_grpc::{Peer, status_of};
use shipway_identity::{Action, AuthConfig, Authenticator, Caller};
use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};
use tonic::body::Body;
use tower::{Layer, Service};

/// What a call needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Needs {
    /// Nothing: health checks have no identity.
    Nothing,
    /// To be one who may use the daemon.
    Use,
    /// To build.
    Build,
    /// To go on with a build, which was allowed before.
    GoOn,
    /// To do what concerns others.
    Administer(&'static str),
}

/// What the method at `path` needs. One that is not known here needs the most.
fn needs(path: &str) -> Needs {
    let (service, method) = path.trim_start_matches('/').split_once('/').unwrap_or((path, ""));
    match (service, method) {
        ("grpc.health.v1.Health", _) => Needs::Nothing,
        ("moby.buildkit.v1.Control", method) => match method {
            "Solve" | "Session" => Needs::Build,
            "Status" | "ListWorkers" | "Info" | "ListenBuildHistory" | "UpdateBuildHistory" => {
                Needs::Use
            }
            "Prune" => Needs::Administer("prune"),
            "DiskUsage" => Needs::Administer("see what uses the disk"),
            _ => Needs::Administer("call a method that is not known"),
        },
        ("moby.buildkit.v1.frontend.LLBBridge", _) => Needs::GoOn,
        ("containerd.services.content.v1.Content", _)
        | ("opentelemetry.proto.collector.trace.v1.TraceService", "Export") => Needs::Use,
        _ => Needs::Administer("call a method that is not known"),
    }
}

/// The layer that recognizes callers. Clones share what they know.
#[derive(Clone)]
pub struct Authenticate(Option<Arc<Authenticator>>);

impl Authenticate {
    /// By this configuration; without one everybody may do everything. Reads files.
    pub fn new(config: Option<AuthConfig>) -> Result<Self> {
        Ok(Self(config.map(Authenticator::new).transpose()?.map(Arc::new)))
    }
}

/// The caller of `request`, if the call is allowed.
async fn admit(
    auth: &Authenticator,
    peer: &Peer,
    head: &http::HeaderMap,
    path: &str,
) -> Result<Caller> {
    let needs = needs(path);
    if needs == Needs::Nothing {
        return Ok(Caller::unrestricted());
    }
    let caller = auth.caller(peer, head).await?;
    match needs {
        Needs::Nothing => {}
        Needs::Use => caller.check_again(Action::Ask)?,
        Needs::Build => caller.check(Action::Build)?,
        Needs::GoOn => caller.check_again(Action::Build)?,
        Needs::Administer(what) => caller.check(Action::Administer(what))?,
    }
    Ok(caller)
}

impl<S> Layer<S> for Authenticate {
    type Service = Authenticated<S>;

    fn layer(&self, inner: S) -> Authenticated<S> {
        Authenticated { auth: self.0.clone(), inner }
    }
}

/// A service whose requests have callers.
#[derive(Clone)]
pub struct Authenticated<S> {
    auth: Option<Arc<Authenticator>>,
    inner: S,
}

impl<S> Service<http::Request<Body>> for Authenticated<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>> + Clone + Send + 'static,
    S::Future: Send + 'static,
    S::Error: 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let Some(auth) = self.auth.clone() else {
            request.extensions_mut().insert(Caller::unrestricted());
            return Box::pin(self.inner.call(request));
        };
        // The one that is ready is taken, and another one left.
        let other = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, other);
        Box::pin(async move {
            let peer = request.extensions().get::<Peer>().cloned().unwrap_or_default();
            let path = request.uri().path().to_owned();
            let admitted = admit(&auth, &peer, request.headers(), &path).await;
            // Nobody behind this needs to see it.
            request.headers_mut().remove(header::AUTHORIZATION);
            match admitted {
                Ok(caller) => {
                    request.extensions_mut().insert(caller);
                    inner.call(request).await
                }
                Err(fault) => Ok(status_of(&fault).into_http()),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_need_what_they_do() {
        for (path, want) in [
            ("/grpc.health.v1.Health/Check", Needs::Nothing),
            ("/moby.buildkit.v1.Control/Solve", Needs::Build),
            ("/moby.buildkit.v1.Control/Session", Needs::Build),
            ("/moby.buildkit.v1.Control/Status", Needs::Use),
            ("/moby.buildkit.v1.frontend.LLBBridge/Solve", Needs::GoOn),
            ("/moby.buildkit.v1.Control/Prune", Needs::Administer("prune")),
        ] {
            assert_eq!(needs(path), want, "{path}");
        }
        // What is not known, and what only looks like something that is.
        for path in [
            "",
            "/",
            "/moby.buildkit.v1.Control/Drain",
            "//grpc.health.v1.Health.Check",
            "/grpc.health.v1.Health",
            "/x/grpc.health.v1.Health/Check",
            "/moby.buildkit.v1.Control/solve",
        ] {
            assert!(matches!(needs(path), Needs::Administer(_)), "{path}");
        }
    }
}
