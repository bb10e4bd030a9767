//! Where spans are sent, by OpenTelemetry's variables (rows `env.otel`, `ob.otlp`, `ob.none`).

use percent_encoding::percent_decode_str;
use shipway_fault::{Fault, Result};
use std::{fmt, path::PathBuf, str::FromStr, time::Duration};

/// How long a collector may take.
const TIMEOUT: Duration = Duration::from_secs(10);
/// How long spans wait for others to go with them.
const DELAY: Duration = Duration::from_secs(5);
/// Path of traces at a collector's HTTP address.
const PATH: &str = "v1/traces";

/// How a collector is spoken to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// gRPC.
    Grpc,
    /// Protobuf in bodies of HTTP/1.1.
    Http,
}

impl FromStr for Protocol {
    type Err = Fault;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "grpc" => Ok(Self::Grpc),
            "http/protobuf" => Ok(Self::Http),
            "http/json" => Err(Fault::unimplemented("OTLP as JSON (http/json)")
                .hint("use http/protobuf, which every collector takes")),
            _ => Err(Fault::invalid(format!("unknown protocol of a collector {text:?}"))
                .hint("want grpc or http/protobuf")),
        }
    }
}

/// A collector.
#[derive(Clone, PartialEq, Eq)]
pub struct ExportSettings {
    /// Its address: `http://`, `https://`, or for gRPC also `unix://`. For HTTP with its path.
    pub endpoint: String,
    /// How it is spoken to.
    pub protocol: Protocol,
    /// Headers of each request; they may be credentials.
    pub headers: Vec<(String, String)>,
    /// How long a request may take.
    pub timeout: Duration,
    /// How long spans wait for others to go with them.
    pub delay: Duration,
    /// PEM file with the authorities that its certificate must come from.
    pub ca: Option<PathBuf>,
    /// PEM files of our certificate and key.
    pub identity: Option<(PathBuf, PathBuf)>,
}

impl fmt::Debug for ExportSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "ExportSettings({} by {:?})",
            shipway_fault::redact(&self.endpoint),
            self.protocol
        )
    }
}

/// Whether `OTEL_SDK_DISABLED` says that there are no traces at all.
pub fn is_disabled(variable: &dyn Fn(&str) -> Option<String>) -> bool {
    variable("OTEL_SDK_DISABLED").is_some_and(|v| v.eq_ignore_ascii_case("true"))
}

impl ExportSettings {
    /// What the variables say, and where they say nothing, `endpoint` and `protocol` of the
    /// configuration; `None` where nothing is to be sent.
    pub fn find(
        variable: &dyn Fn(&str) -> Option<String>,
        endpoint: Option<&str>,
        protocol: Option<&str>,
    ) -> Result<Option<Self>> {
        let get = |name: &str| variable(name).filter(|value| !value.is_empty());
        let of_traces = |name: &str| {
            get(&format!("OTEL_EXPORTER_OTLP_TRACES_{name}"))
                .or_else(|| get(&format!("OTEL_EXPORTER_OTLP_{name}")))
        };
        let asked = match get("OTEL_TRACES_EXPORTER").as_deref() {
            None => false,
            Some("otlp") => true,
            Some("none") => return Ok(None),
            Some(other) => {
                return Err(Fault::invalid(format!("unknown exporter of traces {other:?}"))
                    .context("OTEL_TRACES_EXPORTER")
                    .hint("want otlp or none"));
            }
        };
        let (exact, base) =
            (get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"), get("OTEL_EXPORTER_OTLP_ENDPOINT"));
        if !asked && exact.is_none() && base.is_none() && endpoint.is_none() {
            return Ok(None);
        }
        let wished = of_traces("PROTOCOL");
        // That of the configuration belongs to the address of the configuration.
        let configured =
            protocol.filter(|_| endpoint.is_some() && exact.is_none() && base.is_none());
        let protocol: Protocol = wished.as_deref().or(configured).unwrap_or("grpc").parse()?;
        let endpoint = match (exact, base.as_deref().or(endpoint), protocol) {
            (Some(exact), ..) => exact,
            (None, Some(base), Protocol::Http) => {
                format!("{}/{PATH}", base.trim_end_matches('/'))
            }
            (None, Some(base), Protocol::Grpc) => base.to_owned(),
            (None, None, Protocol::Grpc) => "http://localhost:4317".to_owned(),
            (None, None, Protocol::Http) => format!("http://localhost:4318/{PATH}"),
        };
        let insecure = of_traces("INSECURE").is_some_and(|v| v.eq_ignore_ascii_case("true"));
        let endpoint = checked(endpoint, protocol, insecure)?;
        let milliseconds = |value: Option<String>, default: Duration| {
            value.map_or(Ok(default), |text| {
                text.parse()
                    .map(Duration::from_millis)
                    .map_err(|_| Fault::invalid(format!("{text:?} is not a time in milliseconds")))
            })
        };
        let certificate = of_traces("CLIENT_CERTIFICATE").map(PathBuf::from);
        let identity = certificate.zip(of_traces("CLIENT_KEY").map(PathBuf::from));
        Ok(Some(Self {
            endpoint,
            protocol,
            headers: headers(&of_traces("HEADERS").unwrap_or_default())?,
            timeout: milliseconds(of_traces("TIMEOUT"), TIMEOUT)
                .map_err(|f| f.context("OTEL_EXPORTER_OTLP_TIMEOUT"))?,
            delay: milliseconds(get("OTEL_BSP_SCHEDULE_DELAY"), DELAY)
                .map_err(|f| f.context("OTEL_BSP_SCHEDULE_DELAY"))?,
            ca: of_traces("CERTIFICATE").map(PathBuf::from),
            identity,
        }))
    }
}

fn checked(endpoint: String, protocol: Protocol, insecure: bool) -> Result<String> {
    let schemes: &[&str] = match protocol {
        Protocol::Grpc => &["http", "https", "unix"],
        Protocol::Http => &["http", "https"],
    };
    let Some((scheme, rest)) = endpoint.split_once("://") else {
        // Of gRPC it may be a host and a port alone.
        if protocol == Protocol::Grpc && !endpoint.contains('/') {
            return Ok(format!("{}://{endpoint}", if insecure { "http" } else { "https" }));
        }
        return Err(Fault::invalid(format!("{endpoint:?} is not the address of a collector"))
            .hint("want http://host:4317"));
    };
    if !schemes.contains(&scheme) || rest.is_empty() {
        let shown = shipway_fault::redact(&endpoint);
        return Err(Fault::invalid(format!("{shown:?} is not the address of a collector"))
            .hint(format!("want one that begins with {}://", schemes.join(":// or "))));
    }
    Ok(endpoint)
}

/// `name=value,name=value`, with percent signs where a value has commas.
fn headers(text: &str) -> Result<Vec<(String, String)>> {
    let pairs = text.split(',').map(str::trim).filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| {
            // What is wrong may be a credential, so it is not repeated.
            let wrong =
                || Fault::invalid("OTEL_EXPORTER_OTLP_HEADERS has an entry that is not name=value");
            let (name, value) = pair.split_once('=').ok_or_else(wrong)?;
            let value = percent_decode_str(value.trim()).decode_utf8().map_err(|_| wrong())?;
            let name = name.trim().to_ascii_lowercase();
            let valid = http::HeaderName::from_bytes(name.as_bytes()).is_ok()
                && http::HeaderValue::from_str(&value).is_ok();
            valid.then(|| (name, value.into_owned())).ok_or_else(wrong)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn find(variables: &[(&str, &str)], endpoint: Option<&str>) -> Result<Option<ExportSettings>> {
        let get = |name: &str| {
            variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned())
        };
        ExportSettings::find(&get, endpoint, Some("http/protobuf"))
    }

    #[test]
    fn variables_say_where_spans_go() {
        const EXPORTER: &str = "OTEL_TRACES_EXPORTER";
        const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
        const EXACT: &str = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT";
        const PROTOCOL: &str = "OTEL_EXPORTER_OTLP_PROTOCOL";
        const HTTP: (&str, &str) = (PROTOCOL, "http/protobuf");
        for (variables, configured, expected) in [
            (&[][..], None, None),
            (&[(EXPORTER, "none"), (ENDPOINT, "http://c:1")], Some("http://d:1"), None),
            (&[(EXPORTER, "otlp")], None, Some("http://localhost:4317 Grpc")),
            (&[(EXPORTER, "otlp"), HTTP], None, Some("http://localhost:4318/v1/traces Http")),
            (&[(ENDPOINT, "http://c:1")], None, Some("http://c:1 Grpc")),
            (&[(ENDPOINT, "http://c:1/x/"), HTTP], None, Some("http://c:1/x/v1/traces Http")),
            (&[(EXACT, "http://c:1/x"), HTTP], None, Some("http://c:1/x Http")),
            (&[(EXACT, "unix:///run/c.sock")], None, Some("unix:///run/c.sock Grpc")),
            (&[(ENDPOINT, "c:1")], None, Some("https://c:1 Grpc")),
            (
                &[(ENDPOINT, "c:1"), ("OTEL_EXPORTER_OTLP_INSECURE", "true")],
                None,
                Some("http://c:1 Grpc"),
            ),
            (&[], Some("http://d:1"), Some("http://d:1/v1/traces Http")),
            (&[(ENDPOINT, "http://c:1")], Some("http://d:1"), Some("http://c:1 Grpc")),
        ] {
            let found = find(variables, configured).unwrap();
            let found = found.map(|e| format!("{} {:?}", e.endpoint, e.protocol));
            assert_eq!(found.as_deref(), expected, "{variables:?}");
        }
        for (variables, says) in [
            (&[(EXPORTER, "zipkin")][..], "unknown exporter of traces"),
            (&[(ENDPOINT, "ftp://c")], "not the address of a collector"),
            (&[(ENDPOINT, "unix:///x"), HTTP], "not the address of a collector"),
            (&[(ENDPOINT, "http://c"), (PROTOCOL, "soap")], "unknown protocol"),
            (&[(ENDPOINT, "http://c"), (PROTOCOL, "http/json")], "http/json"),
            (&[(ENDPOINT, "http://c"), ("OTEL_EXPORTER_OTLP_TIMEOUT", "1s")], "OTLP_TIMEOUT"),
        ] {
            let fault = find(variables, None).unwrap_err().to_string();
            assert!(fault.contains(says), "{fault}");
        }
    }

    #[test]
    fn headers_are_read_and_never_shown() {
        let settings = |headers: &str| {
            find(
                &[
                    ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://u:p@c:1"),
                    ("OTEL_EXPORTER_OTLP_HEADERS", headers),
                ],
                None,
            )
        };
        let found = settings("Authorization=Basic%20c2VjcmV0, x=a%2Cb ,").unwrap().unwrap();
        let expected = [("authorization", "Basic c2VjcmV0"), ("x", "a,b")];
        assert_eq!(found.headers, expected.map(|(n, v)| (n.to_owned(), v.to_owned())));
        let shown = format!("{found:?}");
        assert!(!shown.contains("c2VjcmV0") && !shown.contains("u:p"), "{shown}");
        for wrong in ["secret", "a b=secret", "a=secret%0a"] {
            let fault = settings(wrong).unwrap_err().to_string();
            assert!(!fault.contains("secret"), "{fault}");
        }
    }

    #[test]
    fn all_of_it_can_be_turned_off() {
        let is = |value: Option<&str>| is_disabled(&|_| value.map(str::to_owned));
        assert!(is(Some("true")) && is(Some("TRUE")));
        assert!(!is(None) && !is(Some("false")) && !is(Some("1")));
    }
}
