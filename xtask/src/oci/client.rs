//! Requests to a registry, with the rights that it asks for.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use serde_json::Value;
use thiserror::Error;
use ureq::http::{self, HeaderMap, Method, StatusCode, header};
use ureq::tls::{Certificate, RootCerts, TlsConfig};
use ureq::{Agent, SendBody};

use super::challenge::{self, Challenge};
use super::{Credentials, Registry};

const CONNECT: Duration = Duration::from_secs(15);
/// From the last byte sent to the first of the answer: registries hash what they got.
const ANSWER: Duration = Duration::from_mins(2);
/// An upload may take this long, and longer the larger it is.
const UPLOAD: Duration = Duration::from_mins(1);
/// Bytes a second that an upload has to reach.
const SLOWEST: u64 = 256 << 10;

/// Answers that are read; tokens have some kilobytes.
const ANSWER_BYTES: u64 = 1 << 20;
/// Characters of an answer that are shown.
const SHOWN: usize = 300;

/// Why there is no answer, or none that will do.
#[derive(Debug, Error)]
pub(crate) enum Failure {
    #[error("{request}: {source}")]
    Transport { request: String, source: Box<ureq::Error> },
    #[error("{request} answered {status}{text}")]
    Status { request: String, status: StatusCode, text: String, retry_after: Option<Duration> },
    #[error("{request} needs a login: docker login {host}")]
    Login { request: String, host: String },
    #[error("{0}")]
    Answer(String),
}

impl Failure {
    /// Whether the same request may succeed later.
    pub(crate) fn is_passing(&self) -> bool {
        match self {
            Self::Transport { source, .. } => {
                use ureq::Error::{ConnectionFailed, HostNotFound, Io, Protocol, Timeout};
                matches!(**source, ConnectionFailed | HostNotFound | Io(_) | Protocol(_) | Timeout(_))
            }
            Self::Status { status, .. } => status.is_server_error() || matches!(status.as_u16(), 408 | 429),
            Self::Login { .. } | Self::Answer(_) => false,
        }
    }
}

/// What is sent along.
#[derive(Clone, Copy)]
pub(crate) enum Content<'a> {
    Nothing,
    Bytes(&'a [u8]),
    /// A file of so many bytes; it is told how many of them were sent.
    File(&'a Path, u64, &'a dyn Fn(u64)),
}

/// A request.
#[derive(Clone)]
pub(crate) struct Request<'a> {
    pub(crate) method: Method,
    pub(crate) url: String,
    /// The rights it needs.
    pub(crate) scopes: &'a [String],
    pub(crate) headers: &'a [(&'static str, &'a str)],
    pub(crate) content: Content<'a>,
}

/// What came back.
#[derive(Debug)]
pub(crate) struct Answer {
    request: String,
    pub(crate) status: StatusCode,
    headers: HeaderMap,
    text: String,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// A status that was not asked for, as an error.
    pub(crate) fn failure(&self) -> Failure {
        let seconds = self.header("retry-after").and_then(|text| text.parse().ok());
        let shown: String = self.text.trim().chars().take(SHOWN).collect();
        Failure::Status {
            request: self.request.clone(),
            status: self.status,
            text: if shown.is_empty() { shown } else { format!(": {shown}") },
            retry_after: seconds.map(Duration::from_secs),
        }
    }
}

/// A registry's client.
pub(crate) struct Client {
    agent: Agent,
    registry: Registry,
    credentials: Option<Credentials>,
    authorization: Mutex<Option<Authorization>>,
}

#[derive(Clone)]
struct Authorization {
    header: String,
    /// What it is good for; none: everything.
    scopes: Option<Vec<String>>,
}

impl Client {
    /// One that trusts what the system trusts.
    pub(crate) fn new(registry: Registry, credentials: Option<Credentials>) -> Self {
        Self::trusting(registry, credentials, || rustls_native_certs::load_native_certs().certs)
    }

    pub(super) fn trusting(
        registry: Registry,
        credentials: Option<Credentials>,
        roots: impl FnOnce() -> Vec<CertificateDer<'static>>,
    ) -> Self {
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            .user_agent("herd-xtask")
            .timeout_connect(Some(CONNECT))
            .timeout_recv_response(Some(ANSWER))
            .timeout_recv_body(Some(ANSWER));
        if !registry.is_plain() {
            config = config.tls_config(tls(&roots()));
        }
        Self { agent: config.build().new_agent(), registry, credentials, authorization: Mutex::new(None) }
    }

    pub(crate) fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Sends a request, and once more with the rights that the answer asks for.
    pub(crate) fn send(&self, request: &Request<'_>) -> Result<Answer, Failure> {
        let answer = self.once(request, self.authorization_for(request).as_deref())?;
        if answer.status != StatusCode::UNAUTHORIZED {
            return Ok(answer);
        }
        let header = self.authorize(&answer, request.scopes)?;
        self.once(request, Some(&header))
    }

    /// What is known to be asked for, at the registry's own address alone.
    fn authorization_for(&self, request: &Request<'_>) -> Option<String> {
        if authority(&request.url) != authority(&self.registry.url()) {
            return None;
        }
        let authorization = self.authorization.lock().unwrap_or_else(PoisonError::into_inner).clone()?;
        let fits = authorization.scopes.is_none_or(|scopes| scopes == request.scopes);
        fits.then_some(authorization.header)
    }

    fn once(&self, request: &Request<'_>, authorization: Option<&str>) -> Result<Answer, Failure> {
        let Request { method, url, scopes: _, headers, content } = request;
        // A query can hold a secret.
        let shown = format!("{method} {}", url.split('?').next().unwrap_or_default());
        let failed = |source| Failure::Transport { request: shown.clone(), source: Box::new(source) };
        let mut builder = http::Request::builder().method(method.clone()).uri(url);
        for (name, value) in *headers {
            builder = builder.header(*name, *value);
        }
        if let Some(authorization) = authorization {
            builder = builder.header(header::AUTHORIZATION, authorization);
        }
        let response = match content {
            Content::Nothing if *method == Method::POST => self.run(builder, &[][..]),
            Content::Nothing => self.run(builder, ()),
            Content::Bytes(bytes) => self.run(builder, *bytes),
            Content::File(path, size, sent) => self.upload(builder, path, *size, *sent),
        };
        let mut response = response.map_err(failed)?;
        let text = if *method == Method::HEAD {
            String::new()
        } else {
            let body = response.body_mut().with_config().limit(ANSWER_BYTES).lossy_utf8(true);
            body.read_to_string().map_err(failed)?
        };
        let (parts, _) = response.into_parts();
        Ok(Answer { request: shown.clone(), status: parts.status, headers: parts.headers, text })
    }

    fn run(
        &self,
        builder: http::request::Builder,
        body: impl ureq::AsSendBody,
    ) -> Result<http::Response<ureq::Body>, ureq::Error> {
        self.agent.run(builder.body(body)?)
    }

    fn upload(
        &self,
        builder: http::request::Builder,
        path: &Path,
        size: u64,
        sent: &dyn Fn(u64),
    ) -> Result<http::Response<ureq::Body>, ureq::Error> {
        let mut file = Counted { file: File::open(path)?, count: 0, sent };
        let builder = builder.header(header::CONTENT_LENGTH, size);
        let request = builder.body(SendBody::from_reader(&mut file))?;
        let within = UPLOAD + Duration::from_secs(size / SLOWEST);
        self.agent.run(self.agent.configure_request(request).timeout_send_body(Some(within)).build())
    }

    /// The header that a refusal asks for.
    fn authorize(&self, refusal: &Answer, scopes: &[String]) -> Result<String, Failure> {
        let request = &refusal.request;
        let login = || Failure::Login { request: request.clone(), host: self.registry.host().to_owned() };
        let headers = refusal.headers.get_all(header::WWW_AUTHENTICATE).iter();
        let asked = challenge::parse(headers.filter_map(|value| value.to_str().ok()));
        let authorization = match asked.ok_or_else(|| refusal.failure())? {
            Challenge::Basic => {
                let header = self.credentials.as_ref().and_then(Credentials::basic).ok_or_else(login)?;
                Authorization { header, scopes: None }
            }
            Challenge::Bearer { realm, service } => {
                let token = self.token(&realm, service.as_deref(), scopes)?;
                Authorization { header: format!("Bearer {token}"), scopes: Some(scopes.to_vec()) }
            }
        };
        let header = authorization.header.clone();
        *self.authorization.lock().unwrap_or_else(PoisonError::into_inner) = Some(authorization);
        Ok(header)
    }

    /// A token of the service that the registry trusts.
    fn token(&self, realm: &str, service: Option<&str>, scopes: &[String]) -> Result<String, Failure> {
        if !(self.registry.is_plain() || realm.starts_with("https://")) {
            return Err(Failure::Answer(format!(
                "{} has its tokens at {realm}, without TLS: credentials are not sent there",
                self.registry
            )));
        }
        let service = service.map(|service| ("service", service));
        let mut pairs: Vec<(&str, &str)> = service.into_iter().collect();
        let joined = scopes.join(" ");
        let answer = if let Some(Credentials::Identity(token)) = &self.credentials {
            pairs.extend([
                ("grant_type", "refresh_token"),
                ("client_id", "herd-xtask"),
                ("refresh_token", token),
                ("scope", &joined),
            ]);
            let form = encoded(&pairs);
            let request = Request {
                method: Method::POST,
                url: realm.to_owned(),
                scopes: &[],
                headers: &[("content-type", "application/x-www-form-urlencoded")],
                content: Content::Bytes(form.as_bytes()),
            };
            self.once(&request, None)?
        } else {
            pairs.extend(scopes.iter().map(|scope| ("scope", scope.as_str())));
            let separator = if realm.contains('?') { '&' } else { '?' };
            let request = Request {
                method: Method::GET,
                url: format!("{realm}{separator}{}", encoded(&pairs)),
                scopes: &[],
                headers: &[],
                content: Content::Nothing,
            };
            self.once(&request, self.credentials.as_ref().and_then(Credentials::basic).as_deref())?
        };
        match answer.status {
            StatusCode::OK => {}
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if self.credentials.is_none() => {
                return Err(Failure::Login {
                    request: answer.request,
                    host: self.registry.host().to_owned(),
                });
            }
            _ => return Err(answer.failure()),
        }
        let parsed: Value = serde_json::from_str(&answer.text).unwrap_or_default();
        let token = parsed["token"].as_str().or_else(|| parsed["access_token"].as_str());
        token.map(str::to_owned).ok_or_else(|| Failure::Answer(format!("{} gave no token", answer.request)))
    }
}

/// Without any roots, each connection says that its certificate is of an unknown issuer.
fn tls(roots: &[CertificateDer<'_>]) -> TlsConfig {
    let roots: Vec<_> = roots.iter().map(|root| Certificate::from_der(root).to_owned()).collect();
    TlsConfig::builder()
        .root_certs(RootCerts::Specific(Arc::new(roots)))
        .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .build()
}

/// `http://HOST:PORT` of a URL.
pub(crate) fn authority(url: &str) -> &str {
    let Some(start) = url.find("://").map(|at| at + 3) else { return url };
    let end = url[start..].find(['/', '?']).map_or(url.len(), |at| start + at);
    &url[..end]
}

/// `a=b&c=d`
fn encoded(pairs: &[(&str, &str)]) -> String {
    let pairs: Vec<String> = pairs.iter().map(|(name, value)| format!("{name}={}", escaped(value))).collect();
    pairs.join("&")
}

/// As in a URL's query.
pub(crate) fn escaped(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    text.bytes()
        .map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

/// A file that says how far it is read.
struct Counted<'a> {
    file: File,
    count: u64,
    sent: &'a dyn Fn(u64),
}

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(buffer)?;
        self.count += read as u64;
        (self.sent)(self.count);
        Ok(read)
    }
}
