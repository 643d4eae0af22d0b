//! Sends the requests of `object_store` as all others are sent, and looks at what answers say of an object's checksum.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};

use async_trait::async_trait;
use http::HeaderMap;
use http_body_util::BodyExt as _;
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpResponseBody,
    HttpService,
};
use reqwest::Request;

use super::http::Http;

const ENCRYPTION: &str = "x-amz-server-side-encryption";
const CUSTOMER_ENCRYPTION: &str = "x-amz-server-side-encryption-customer-algorithm";

/// For one bucket.
#[derive(Clone, Debug)]
pub(super) struct ObjectHttp {
    pub(super) http: Http,
    pub(super) seen: Arc<Seen>,
}

/// What answers said that `object_store` does not pass on.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// `ETags` are no checksums here.
    pub(super) is_encrypted: AtomicBool,
    /// Of the last answer.
    pub(super) status: AtomicU16,
}

impl HttpConnector for ObjectHttp {
    fn connect(&self, _options: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.clone()))
    }
}

#[async_trait]
impl HttpService for ObjectHttp {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let failed = |error| HttpError::new(HttpErrorKind::Unknown, error);
        let (parts, body) = request.into_parts();
        let body = body.collect().await?.to_bytes();
        let is_empty = body.is_empty();
        let mut request = Request::try_from(http::Request::from_parts(parts, body)).map_err(failed)?;
        if is_empty {
            *request.body_mut() = None;
        }
        let response = self.http.send(request).await;
        let response = response.map_err(|error| HttpError::new(HttpErrorKind::Unknown, error))?;
        self.seen.status.store(response.status().as_u16(), Ordering::Relaxed);
        if etags_are_no_checksums(response.headers()) {
            self.seen.is_encrypted.store(true, Ordering::Relaxed);
        }
        let (parts, body) = http::Response::from(response).into_parts();
        let body = body.map_err(|error| HttpError::new(HttpErrorKind::Interrupted, error.without_url()));
        Ok(HttpResponse::from_parts(parts, HttpResponseBody::new(body)))
    }
}

/// Those of objects encrypted with a key of KMS or of a customer are not the MD5 of what is read.
fn etags_are_no_checksums(headers: &HeaderMap) -> bool {
    headers.contains_key(CUSTOMER_ENCRYPTION)
        || headers.get(ENCRYPTION).is_some_and(|by| by.as_bytes().starts_with(b"aws:kms"))
}
