//! Why a registry did not do as asked.

use shipway_fault::{Class, Code, Fault};
use shipway_http::HttpError;
use shipway_oci::Digest;
use std::{fmt, time::Duration};

/// A failed request to a registry. `Display` keeps the words that users know from containerd.
#[derive(Clone, Debug)]
pub struct Error(Box<Data>);

#[derive(Clone, Debug)]
struct Data {
    /// The image as asked for, such as `docker.io/library/busybox:latest`.
    image: String,
    /// The host that was asked.
    host: String,
    /// What it was asked for, such as `resolve` or `fetch layer sha256:…`.
    action: String,
    kind: Kind,
    /// What went wrong before, at mirrors.
    earlier: Vec<String>,
}

/// What went wrong.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Kind {
    /// 404.
    NotFound,
    /// 401 with every credential we have.
    Unauthorized {
        /// The server's reason, such as `insufficient_scope`.
        server: String,
        /// Whether credentials were sent.
        with_credentials: bool,
    },
    /// 403.
    Forbidden {
        /// The server's words.
        server: String,
    },
    /// 429 for longer than we wait.
    TooManyRequests {
        /// The server's words.
        server: String,
        /// When to come back, if the server said.
        retry_after: Option<Duration>,
    },
    /// Another status.
    Status {
        /// Number.
        status: u16,
        /// Method and address, without secrets.
        request: String,
        /// The server's words.
        server: String,
    },
    /// No token was to be had.
    Auth {
        /// Why.
        why: String,
        /// Status of the token server, if it answered.
        status: Option<u16>,
    },
    /// No connection.
    Connect {
        /// Why.
        why: String,
    },
    /// The certificate is not one we trust, or TLS failed otherwise.
    Tls {
        /// Why.
        why: String,
    },
    /// No answer, or a trickle.
    TimedOut {
        /// What was waited for.
        waiting_for: &'static str,
        /// For how long.
        after: Duration,
    },
    /// The connection broke.
    Broken {
        /// How.
        why: String,
    },
    /// The bytes are not the ones promised.
    Digest {
        /// Promised.
        expected: Digest,
        /// Received.
        got: Digest,
    },
    /// There are more or fewer bytes than promised.
    Size {
        /// Promised.
        expected: u64,
        /// Received (at least).
        got: u64,
    },
    /// A document larger than we accept.
    TooLarge {
        /// What.
        what: &'static str,
        /// The limit in bytes.
        limit: u64,
    },
    /// An answer that makes no sense.
    Protocol(String),
    /// Our own configuration is wrong.
    Config(String),
    /// The bytes to push, or the credentials, could not be had on our side.
    Local(Fault),
}

impl Error {
    pub(crate) fn new(
        image: impl fmt::Display,
        host: impl Into<String>,
        action: impl Into<String>,
        kind: Kind,
    ) -> Self {
        Self(Box::new(Data {
            image: image.to_string(),
            host: host.into(),
            action: action.into(),
            kind,
            earlier: Vec::new(),
        }))
    }

    pub(crate) fn after(mut self, earlier: Vec<String>) -> Self {
        self.0.earlier.extend(earlier);
        self
    }

    /// What went wrong.
    pub fn kind(&self) -> &Kind {
        &self.0.kind
    }

    /// The host that was asked.
    pub fn host(&self) -> &str {
        &self.0.host
    }

    /// Whether the registry does not have the thing.
    pub fn is_not_found(&self) -> bool {
        matches!(self.0.kind, Kind::NotFound)
    }
}

impl Kind {
    /// Whether the same request may succeed a little later.
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            Kind::Status { status, .. } => matches!(status, 408 | 500 | 502 | 503 | 504),
            Kind::Auth { status, .. } => status.is_some_and(|s| s >= 500),
            Kind::TooManyRequests { .. } | Kind::Broken { .. } | Kind::TimedOut { .. } => true,
            _ => false,
        }
    }
}

/// The action with its object and place.
fn doing(action: &str, image: &str, host: &str) -> String {
    let of = if action == "resolve" { "" } else { " of" };
    format!("{action}{of} {image} at {host}")
}

fn with_reason(f: &mut fmt::Formatter<'_>, server: &str) -> fmt::Result {
    if server.is_empty() { Ok(()) } else { write!(f, ": {server}") }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Data { image, host, action, kind, .. } = &*self.0;
        if !matches!(kind, Kind::NotFound) {
            write!(f, "failed to {}: ", doing(action, image, host))?;
        }
        match kind {
            Kind::NotFound if action == "resolve" => write!(f, "{image}: not found"),
            Kind::NotFound => write!(f, "{image}: not found (to {action} at {host})"),
            Kind::Unauthorized { server, .. } => {
                let way = if action.starts_with("push") { "push" } else { "pull" };
                let server = if server.is_empty() { "authentication required" } else { server };
                write!(
                    f,
                    "{way} access denied, repository does not exist or may require authorization: server message: {server}"
                )
            }
            Kind::Forbidden { server } => {
                write!(f, "403 Forbidden").and_then(|()| with_reason(f, server))
            }
            Kind::TooManyRequests { server, .. } => {
                write!(f, "429 Too Many Requests").and_then(|()| with_reason(f, server))
            }
            Kind::Status { status, request, server } => {
                let reason = http::StatusCode::from_u16(*status)
                    .ok()
                    .and_then(|s| s.canonical_reason())
                    .unwrap_or_default();
                write!(f, "unexpected status from {request}: {status} {reason}")?;
                with_reason(f, server)
            }
            Kind::Auth { why, .. } => write!(f, "failed to authorize: {why}"),
            Kind::Connect { why } => write!(f, "failed to connect: {why}"),
            Kind::Tls { why } => write!(f, "TLS: {why}"),
            Kind::TimedOut { waiting_for, after } => {
                write!(f, "timed out waiting for {waiting_for} (no progress for {after:.0?})")
            }
            Kind::Broken { why } => write!(f, "the connection broke: {why}"),
            Kind::Digest { expected, got } => {
                write!(f, "digest mismatch: expected {expected}, got {got}")
            }
            Kind::Size { expected, got } => {
                write!(f, "size mismatch: expected {expected} bytes, got {got}")
            }
            Kind::TooLarge { what, limit } => write!(f, "{what} is larger than {limit} bytes"),
            Kind::Protocol(why) | Kind::Config(why) => f.write_str(why),
            Kind::Local(fault) => fault.fmt(f),
        }
    }
}

impl std::error::Error for Error {}

impl From<HttpError> for Kind {
    fn from(f: HttpError) -> Self {
        match f {
            HttpError::Connect(why) => Kind::Connect { why },
            HttpError::NotTls(why) | HttpError::Tls(why) => Kind::Tls { why },
            HttpError::TimedOut { waiting_for, after } => Kind::TimedOut { waiting_for, after },
            HttpError::Broken(why) => Kind::Broken { why },
            HttpError::TooLarge(limit) => Kind::TooLarge { what: "the response", limit },
            HttpError::Protocol(why) => Kind::Protocol(why),
            HttpError::Local(fault) => Kind::Local(fault),
        }
    }
}

impl From<Error> for Fault {
    fn from(e: Error) -> Self {
        let message = e.to_string();
        let host = &e.0.host;
        let env = |code| Fault::new(code, message.clone()).with_class(Class::Environment);
        let fault = match &e.0.kind {
            Kind::NotFound => Fault::not_found(message.clone())
                .hint(format!("{host} has no such image; check the name and the tag, and whether it needs `docker login {host}`")),
            Kind::Unauthorized { with_credentials: false, .. } => Fault::new(Code::Unauthenticated, message.clone())
                .hint(format!("no credentials for {host} were sent; if the image is private, log in with `docker login {host}`")),
            Kind::Unauthorized { .. } => Fault::new(Code::PermissionDenied, message.clone())
                .hint(format!("the credentials for {host} were sent and do not allow this; log in again or request for access")),
            Kind::Forbidden { .. } => Fault::new(Code::PermissionDenied, message.clone())
                .hint(format!("{host} knows who asks and refuses; request its administrator for access")),
            Kind::TooManyRequests { retry_after, .. } => env(Code::ResourceExhausted).hint(match retry_after {
                Some(t) => format!("{host} limits its clients and wants to be left alone for {} s; log in or use a mirror", t.as_secs()),
                None => format!("{host} limits its clients; log in, use a mirror, or try again later"),
            }),
            Kind::Status { status, .. } if *status >= 500 => env(Code::Unavailable).hint(format!("{host} is in trouble; try again later")),
            Kind::Status { .. } => Fault::new(Code::Unknown, message.clone()).with_class(Class::Environment),
            Kind::Auth { status, .. } if status.is_some_and(|s| (400..500).contains(&s)) => {
                Fault::new(Code::Unauthenticated, message.clone())
                    .hint(format!("the credentials for {host} may be wrong or expired; log in again with `docker login {host}`"))
            }
            Kind::Auth { .. } => env(Code::Unavailable),
            Kind::Connect { .. } => {
                env(Code::Unavailable).hint(format!("is {host} spelled right, up, and reachable from the daemon's machine (proxy, DNS)?"))
            }
            Kind::Tls { .. } => env(Code::Unavailable)
                .hint(format!("add the authority under [registry.\"{host}\"] ca = […], or set insecure = true or http = true there")),
            Kind::TimedOut { .. } => env(Code::DeadlineExceeded).hint(format!("{host} does not response; try again later or use a mirror")),
            Kind::Broken { .. } => env(Code::Unavailable),
            Kind::Digest { .. } | Kind::Size { .. } => Fault::new(Code::DataLoss, message.clone())
                .with_class(Class::Environment)
                .hint(format!("{host}, or a proxy before it, sent other bytes than the image names; nothing of them was kept")),
            Kind::TooLarge { .. } | Kind::Protocol(_) => env(Code::Unknown),
            Kind::Config(_) => Fault::new(Code::FailedPrecondition, message.clone()).with_class(Class::Environment),
            Kind::Local(fault) => return fault.clone().context(format!("failed to {}", doing(&e.0.action, &e.0.image, host))),
        };
        e.0.earlier.iter().fold(fault, |f, line| f.hint(format!("before that, {line}")))
    }
}
