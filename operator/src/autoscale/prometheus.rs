//! Instant queries to Prometheus's HTTP API, each bounded in time and size.

use std::net::SocketAddr;
use std::pin::pin;
use std::time::Duration;

use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::http::uri::Scheme;
use hyper::{Method, Request, Uri, header};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;

/// For an answer, from before the connection is opened.
const DEADLINE: Duration = Duration::from_secs(3);
/// Of an answer: some 25,000 series.
const MAX_BYTES: usize = 4 << 20;
/// Of an error that is quoted.
const MAX_QUOTE: usize = 200;

/// Where it is.
#[derive(Clone, Debug)]
pub(crate) struct Prometheus {
    host: String,
    port: u16,
    /// Of the Host header.
    authority: String,
    /// Of instant queries.
    path: String,
    limits: Limits,
}

/// Bounds of a query.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) deadline: Duration,
    pub(super) bytes: usize,
}

const LIMITS: Limits = Limits { deadline: DEADLINE, bytes: MAX_BYTES };

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PrometheusError {
    #[error("{0:?} is not http://HOST[:PORT][/PATH]")]
    Address(String),
    #[error("failed to find {authority}: {source}")]
    Find { authority: String, source: std::io::Error },
    #[error("failed to connect to {authority}: {source}")]
    Connect { authority: String, source: std::io::Error },
    #[error("failed to ask {authority}: {source}")]
    Ask { authority: String, source: hyper::Error },
    #[error("{authority} gave no answer in {deadline:?}")]
    Deadline { authority: String, deadline: Duration },
    #[error("the answer of {authority} breaks off: {source}")]
    BreaksOff { authority: String, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("the answer of {authority} is longer than {bytes} bytes")]
    TooLong { authority: String, bytes: usize },
    #[error("{authority} answers {status}: {text}")]
    Refused { authority: String, status: u16, text: String },
    #[error("{authority} answers what is no vector: {text}")]
    Unreadable { authority: String, text: String },
}

/// One series at one time.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub(super) struct Point {
    pub(super) metric: Labels,
    /// Seconds, and a number in text.
    value: (f64, String),
}

/// Those that queries keep.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub(super) struct Labels {
    #[serde(rename = "__name__")]
    pub(super) name: Option<String>,
    pub(super) namespace: Option<String>,
    pub(super) pod: Option<String>,
}

impl Point {
    /// When the query was answered, in seconds since 1970.
    pub(super) fn time(&self) -> f64 {
        self.value.0
    }

    /// NaN where it is no number.
    pub(super) fn value(&self) -> f64 {
        self.value.1.parse().unwrap_or(f64::NAN)
    }
}

#[derive(Deserialize)]
struct Answer {
    data: Data,
}

#[derive(Deserialize)]
#[serde(tag = "resultType", content = "result", rename_all = "lowercase")]
enum Data {
    Vector(Vec<Point>),
}

impl Prometheus {
    /// At this URL.
    pub(crate) fn new(url: &str) -> Result<Self, PrometheusError> {
        let wrong = || PrometheusError::Address(url.to_owned());
        let uri: Uri = url.parse().map_err(|_| wrong())?;
        let authority = uri.authority().filter(|_| uri.scheme() == Some(&Scheme::HTTP)).ok_or_else(wrong)?;
        if authority.as_str().contains('@') || uri.query().is_some() {
            return Err(wrong());
        }
        Ok(Self {
            host: authority.host().trim_matches(['[', ']']).to_owned(),
            port: authority.port_u16().unwrap_or(80),
            authority: authority.to_string(),
            path: format!("{}/api/v1/query", uri.path().trim_end_matches('/')),
            limits: LIMITS,
        })
    }

    #[cfg(test)]
    pub(super) fn within(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Its addresses now. A name that nobody answers for holds a thread, so it is asked for once for several queries.
    pub(super) async fn find(&self) -> Result<Vec<SocketAddr>, PrometheusError> {
        let Self { host, port, authority, .. } = self;
        let found = self.in_time(lookup_host((host.as_str(), *port))).await?;
        let found = found.map_err(|source| PrometheusError::Find { authority: authority.clone(), source })?;
        Ok(found.collect())
    }

    async fn in_time<T>(&self, work: impl Future<Output = T>) -> Result<T, PrometheusError> {
        let Limits { deadline, bytes: _ } = self.limits;
        let late = |_| PrometheusError::Deadline { authority: self.authority.clone(), deadline };
        timeout(deadline, work).await.map_err(late)
    }

    /// What `query` gives now, at one of these addresses.
    pub(super) async fn query(&self, at: &[SocketAddr], query: &str) -> Result<Vec<Point>, PrometheusError> {
        let (status, body) = self.in_time(self.ask(at, query)).await??;
        let text = || {
            let text = String::from_utf8_lossy(&body);
            text[..text.floor_char_boundary(MAX_QUOTE)].to_owned()
        };
        let authority = || self.authority.clone();
        if !(200..300).contains(&status) {
            return Err(PrometheusError::Refused { authority: authority(), status, text: text() });
        }
        match serde_json::from_slice(&body) {
            Ok(Answer { data: Data::Vector(points) }) => Ok(points),
            Err(_) => Err(PrometheusError::Unreadable { authority: authority(), text: text() }),
        }
    }

    async fn ask(&self, at: &[SocketAddr], query: &str) -> Result<(u16, Bytes), PrometheusError> {
        let Self { host: _, port: _, authority, path, limits } = self;
        let connect = |source| PrometheusError::Connect { authority: authority.clone(), source };
        let ask = |source| PrometheusError::Ask { authority: authority.clone(), source };
        let stream = TcpStream::connect(at).await.map_err(connect)?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(ask)?;
        let form = format!("query={}&timeout={}ms", encoded(query), limits.deadline.as_millis());
        let mut request = Request::new(Full::new(Bytes::from(form)));
        *request.method_mut() = Method::POST;
        // Both were parts of a URL.
        *request.uri_mut() = path.parse().map_err(|_| PrometheusError::Address(path.clone()))?;
        let host = authority.parse().map_err(|_| PrometheusError::Address(authority.clone()))?;
        request.headers_mut().insert(header::HOST, host);
        let form = header::HeaderValue::from_static("application/x-www-form-urlencoded");
        request.headers_mut().insert(header::CONTENT_TYPE, form);
        let exchange = async {
            let response = sender.send_request(request).await.map_err(ask)?;
            let status = response.status().as_u16();
            let body =
                Limited::new(response.into_body(), limits.bytes).collect().await.map_err(|source| {
                    let authority = authority.clone();
                    if source.is::<LengthLimitError>() {
                        PrometheusError::TooLong { authority, bytes: limits.bytes }
                    } else {
                        PrometheusError::BreaksOff { authority, source }
                    }
                })?;
            Ok((status, body.to_bytes()))
        };
        let mut connection = pin!(connection);
        let mut exchange = pin!(exchange);
        // What the connection has read is still to be taken from it once it has ended.
        tokio::select! {
            answer = &mut exchange => answer,
            _ = &mut connection => exchange.as_mut().await,
        }
    }
}

/// As a value of a form.
fn encoded(text: &str) -> String {
    let mut out = String::with_capacity(text.len() * 2);
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() {
            out.push(char::from(byte));
        } else {
            let digit = |nibble: u8| char::from_digit(u32::from(nibble), 16).unwrap_or('0');
            out.extend(['%', digit(byte >> 4), digit(byte & 15)]);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_url() {
        let at = |url| Prometheus::new(url).map(|there| (there.host, there.port, there.path));
        let path = "/api/v1/query".to_owned();
        assert_eq!(
            at("http://p.monitoring.svc:9090").unwrap(),
            ("p.monitoring.svc".to_owned(), 9090, path.clone())
        );
        assert_eq!(at("http://[::1]:9090/").unwrap(), ("::1".to_owned(), 9090, path));
        assert_eq!(at("http://p/x/").unwrap(), ("p".to_owned(), 80, "/x/api/v1/query".to_owned()));
        for wrong in ["", "p:9090", "https://p", "http://", "http://a:b@p", "http://p/?x=1"] {
            assert!(at(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_query_is_the_value_of_a_form() {
        assert_eq!(encoded("a{b=\"c\"}[5s] é"), "a%7bb%3d%22c%22%7d%5b5s%5d%20%c3%a9");
    }
}
