//! A server of buckets: as much of S3 as reading needs.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::sync::{Arc, Mutex};

use crate::server::{Bytes, End, Request, Response, Server};

pub(crate) struct Object {
    pub(crate) bytes: Bytes,
    /// With its quotes.
    pub(crate) etag: String,
    /// `2026-11-25T12:00:00.000Z`
    pub(crate) modified: &'static str,
}

#[derive(Default)]
pub(crate) struct State {
    /// By key.
    pub(crate) objects: BTreeMap<String, Object>,
    /// Needed for everything.
    pub(crate) access_key: Option<&'static str>,
    /// Objects on a page of a listing; all unless given.
    pub(crate) page: Option<usize>,
    /// By key, or empty for a listing: answers in place of the right ones.
    pub(crate) instead: HashMap<String, Vec<Response>>,
    /// By key: where the next answer ends.
    pub(crate) ends: HashMap<String, End>,
    /// `ETags` are no checksums.
    pub(crate) is_encrypted: bool,
}

/// Name of the only bucket.
pub(crate) const BUCKET: &str = "models";

pub(crate) struct Bucket {
    pub(crate) server: Server,
    pub(crate) state: Arc<Mutex<State>>,
}

impl Bucket {
    pub(crate) async fn start(state: State) -> Self {
        let state = Arc::new(Mutex::new(state));
        let of_server = Arc::clone(&state);
        let server = Server::start(move |request| answer(&mut of_server.lock().unwrap(), request)).await;
        Self { server, state }
    }
}

fn answer(state: &mut State, request: &Request) -> Response {
    let authorization = request.headers.get("authorization").map_or("", String::as_str);
    if let Some(key) = state.access_key
        && !authorization.starts_with(&format!("AWS4-HMAC-SHA256 Credential={key}/"))
    {
        return error(403, "InvalidAccessKeyId", "no such key");
    }
    let path = request.path().trim_start_matches('/');
    let Some(key) = path.strip_prefix(BUCKET) else { return error(404, "NoSuchBucket", "no such bucket") };
    let key = key.trim_start_matches('/');
    if let Some(answers) = state.instead.get_mut(key).filter(|answers| !answers.is_empty()) {
        return answers.remove(0);
    }
    if key.is_empty() {
        return list(state, request);
    }
    let Some(Object { bytes, etag, .. }) = state.objects.get(key) else {
        return error(404, "NoSuchKey", "no such key");
    };
    if request.headers.get("if-match").is_some_and(|wanted| wanted != etag) {
        return error(412, "PreconditionFailed", "another ETag");
    }
    let mut response = Response::file(Arc::clone(bytes), request)
        .with("etag", etag)
        .with("last-modified", "Wed, 25 Nov 2026 12:00:00 GMT");
    response.end = state.ends.remove(key).unwrap_or(End::Whole);
    if state.is_encrypted { response.with("x-amz-server-side-encryption", "aws:kms") } else { response }
}

fn list(state: &State, request: &Request) -> Response {
    assert_eq!((request.query("list-type"), request.query("delimiter")), (Some("2"), Some("%2F")));
    let prefix = request.query("prefix").unwrap_or_default().replace("%2F", "/");
    let below = state
        .objects
        .iter()
        .filter(|(key, _)| key.strip_prefix(&prefix).is_some_and(|name| !name.contains('/')));
    let all: Vec<_> = below.collect();
    let first: usize = request.query("continuation-token").map_or(0, |token| token.parse().unwrap());
    let last = state.page.map_or(all.len(), |page| (first + page).min(all.len()));
    let mut xml = format!(
        "<?xml version=\"1.0\"?><ListBucketResult><Name>{BUCKET}</Name><IsTruncated>{}</IsTruncated>",
        last < all.len()
    );
    for (key, Object { bytes, etag, modified }) in &all[first..last] {
        let etag = etag.replace('"', "&quot;");
        write!(
            xml,
            "<Contents><Key>{key}</Key><LastModified>{modified}</LastModified><ETag>{etag}</ETag><Size>{}</Size></Contents>",
            bytes.len()
        )
        .unwrap();
    }
    if last < all.len() {
        write!(xml, "<NextContinuationToken>{last}</NextContinuationToken>").unwrap();
    }
    Response::new(200, xml + "</ListBucketResult>").with("content-type", "application/xml")
}

fn error(status: u16, code: &str, message: &str) -> Response {
    let xml =
        format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>{message}</Message></Error>");
    Response::new(status, xml).with("content-type", "application/xml")
}
