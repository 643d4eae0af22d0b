//! Objects of a bucket that speaks the protocol of S3.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures::{StreamExt as _, TryStreamExt as _};
use herd_model::{BucketModel, SIDE_FILES, is_weights};
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::path::Path;
use object_store::{BackoffConfig, GetOptions, GetRange, ObjectMeta, ObjectStore as _, RetryConfig};
use sha2::{Digest as _, Sha256};

use super::error::FetchError;
use super::http::{Http, chain};
use super::object_http::{ObjectHttp, Seen};
use super::remote::{Checksum, Content, Opened, RemoteFile, Secret};
use super::retry::Retry;

const DEFAULT_REGION: &str = "us-east-1";
/// Hex digits of a listing in a pin.
const LISTING_DIGITS: usize = 40;
/// Names of changed objects in a message.
const MAX_NAMED: usize = 5;

/// For `s3://`.
#[derive(Clone, Debug, Default)]
pub struct BucketOptions {
    /// Of the server; that of AWS unless given.
    pub endpoint: Option<String>,
    /// `us-east-1` unless given.
    pub region: Option<String>,
    /// Who asks; nobody in particular unless both are given.
    pub access_key_id: Option<Secret>,
    /// Signs what is asked.
    pub secret_access_key: Option<Secret>,
    /// Of a key that does not last.
    pub session_token: Option<Secret>,
}

/// A folder of a bucket.
#[derive(Debug)]
pub(super) struct Bucket {
    store: AmazonS3,
    what: String,
    model: BucketModel,
    endpoint: String,
    secret: Option<String>,
    has_key: bool,
    seen: Arc<Seen>,
}

impl Bucket {
    pub(super) fn new(
        what: String,
        model: BucketModel,
        secret: Option<String>,
        options: BucketOptions,
        retry: Retry,
    ) -> Result<Self, FetchError> {
        let BucketOptions { endpoint, region, access_key_id, secret_access_key, session_token } = options;
        let seen = Arc::<Seen>::default();
        let http = ObjectHttp { http: Http::new(&what, retry)?, seen: Arc::clone(&seen) };
        // Tries are ours: they know the pauses that servers ask for.
        let once =
            RetryConfig { max_retries: 0, retry_timeout: retry.limit, backoff: BackoffConfig::default() };
        let mut builder = AmazonS3Builder::new()
            .with_bucket_name(&model.bucket)
            .with_region(region.unwrap_or_else(|| DEFAULT_REGION.to_owned()))
            .with_retry(once)
            .with_http_connector(http);
        if let Some(endpoint) = &endpoint {
            builder = builder.with_allow_http(endpoint.starts_with("http://")).with_endpoint(endpoint);
        }
        let has_key = match (access_key_id, secret_access_key) {
            (Some(Secret(id)), Some(Secret(key))) => {
                builder = builder.with_access_key_id(id.trim()).with_secret_access_key(key.trim());
                if let Some(Secret(token)) = session_token {
                    builder = builder.with_token(token.trim());
                }
                true
            }
            (None, None) => {
                builder = builder.with_skip_signature(true);
                false
            }
            (id, _) => {
                let option = if id.is_some() { "AWS_SECRET_ACCESS_KEY" } else { "AWS_ACCESS_KEY_ID" };
                return Err(FetchError::Option {
                    option,
                    problem: "is missing, and the other is there".to_owned(),
                });
            }
        };
        let store = builder
            .build()
            .map_err(|error| FetchError::Option { option: "AWS_ENDPOINT_URL", problem: chain(&error) })?;
        Ok(Self { store, what, model, endpoint: endpoint.unwrap_or_default(), secret, has_key, seen })
    }

    pub(super) fn what(&self) -> &str {
        &self.what
    }

    /// A digest over what is listed, and when the last of it was written.
    pub(super) async fn resolve(&self) -> Result<String, FetchError> {
        Ok(self.pin(&self.objects().await?))
    }

    pub(super) async fn list(&self, pin: &str) -> Result<Vec<RemoteFile>, FetchError> {
        let objects = self.objects().await?;
        if self.pin(&objects) != pin {
            return Err(self.changed(&objects, pin));
        }
        Ok(objects.into_iter().map(|(name, object)| file(name, object)).collect())
    }

    pub(super) async fn open(&self, file: &RemoteFile, from: u64) -> Result<Opened, FetchError> {
        let options = GetOptions {
            if_match: file.etag.clone(),
            range: (from > 0).then_some(GetRange::Offset(from)),
            ..GetOptions::default()
        };
        match self.store.get_opts(&self.folder().join(file.name.as_str()), options).await {
            Ok(got) => {
                let begins = got.range.start;
                let bytes = got.into_stream().map_err(|error| chain(&error));
                Ok(Opened::Content(Content { from: begins, bytes: bytes.boxed() }))
            }
            Err(object_store::Error::Precondition { .. }) => Err(FetchError::Changed {
                what: self.what.clone(),
                problem: format!("{} was written anew", file.name),
            }),
            Err(error) => {
                Err(self.failed(&error, &format!("{}/{}", self.what.trim_end_matches('/'), file.name)))
            }
        }
    }

    /// Whether an MD5 that is listed is one.
    pub(super) fn etags_are_checksums(&self) -> bool {
        !self.seen.is_encrypted.load(Ordering::Relaxed)
    }

    fn folder(&self) -> Path {
        Path::from(self.model.prefix.as_str())
    }

    /// By name: those that may be of the checkpoint. Others may come and go.
    async fn objects(&self) -> Result<BTreeMap<String, ObjectMeta>, FetchError> {
        let folder = self.folder();
        let listed = self.store.list_with_delimiter(Some(&folder)).await;
        let listed = listed.map_err(|error| self.failed(&error, &self.what))?;
        let named = listed.objects.into_iter().filter_map(|object| {
            let name = object.location.filename()?.to_owned();
            Some((name, object))
        });
        Ok(named.filter(|(name, _)| SIDE_FILES.contains(&name.as_str()) || is_weights(name)).collect())
    }

    fn pin(&self, objects: &BTreeMap<String, ObjectMeta>) -> String {
        let mut hasher = Sha256::new();
        let mut part = |part: &str| {
            // Lengths first, so that no two lists run together to the same bytes.
            hasher.update((part.len() as u64).to_le_bytes());
            hasher.update(part);
        };
        for place in [&self.endpoint, &self.model.bucket, &self.model.prefix] {
            part(place);
        }
        for (name, object) in objects {
            part(name);
            part(&object.size.to_string());
            part(object.e_tag.as_deref().unwrap_or_default());
        }
        let digest = hasher.finalize().iter().fold(String::new(), |mut hex, byte| {
            // Writing to a string cannot fail.
            let _ = write!(hex, "{byte:02x}");
            hex
        });
        format!("{}-{}", &digest[..LISTING_DIGITS], last_written(objects.values()))
    }

    fn changed(&self, objects: &BTreeMap<String, ObjectMeta>, pin: &str) -> FetchError {
        let then: i64 =
            pin.rsplit_once('-').and_then(|(_, seconds)| seconds.parse().ok()).unwrap_or(i64::MAX);
        let newer = objects.iter().filter(|(_, object)| object.last_modified.timestamp() > then);
        let mut names: Vec<&str> = newer.map(|(name, _)| name.as_str()).collect();
        let more = names.len().saturating_sub(MAX_NAMED);
        names.truncate(MAX_NAMED);
        let problem = match (names.is_empty(), more) {
            (true, _) => "objects were removed, or it is another server now".to_owned(),
            (false, 0) => format!("{} written since", names.join(", ")),
            (false, more) => format!("{} and {more} more written since", names.join(", ")),
        };
        FetchError::Changed { what: self.what.clone(), problem }
    }

    fn failed(&self, error: &object_store::Error, what: &str) -> FetchError {
        if let Some(own) = passed_through(error) {
            return own;
        }
        let (what, said) = (what.to_owned(), said(error));
        let key = match &self.secret {
            Some(secret) => format!("the key of Secret {secret}"),
            None => "the key of AWS_ACCESS_KEY_ID".to_owned(),
        };
        let give = "give model.secretRef: {name: SECRET}, a Secret with accessKeyId and secretAccessKey";
        // Of a listing that is refused it says no kind. Listings are asked for one after another.
        let status = match error {
            object_store::Error::Unauthenticated { .. } => 401,
            object_store::Error::PermissionDenied { .. } => 403,
            object_store::Error::NotFound { .. } => 404,
            _ => self.seen.status.load(Ordering::Relaxed),
        };
        match status {
            401 | 403 if !self.has_key => {
                FetchError::Unauthorized { what, advice: format!("{give} ({said})") }
            }
            401 => FetchError::Unauthorized { what, advice: format!("{key} is not valid here ({said})") },
            403 => {
                let advice = format!("{key} is not valid here, or may not list and read it ({said})");
                FetchError::Forbidden { what, advice }
            }
            404 => FetchError::NotFound {
                what,
                advice: format!("is the name right, and the endpoint? ({said})"),
            },
            _ => FetchError::BadAnswer { what, problem: said },
        }
    }
}

fn file(name: String, object: ObjectMeta) -> RemoteFile {
    let ObjectMeta { location: _, last_modified: _, size, e_tag, version: _ } = object;
    let plain = e_tag.as_deref().map(|etag| etag.trim_matches('"').to_ascii_lowercase());
    let is_md5 = |etag: &String| etag.len() == 32 && etag.bytes().all(|byte| byte.is_ascii_hexdigit());
    let checksum = plain.filter(is_md5).map_or(Checksum::None, Checksum::Md5);
    RemoteFile { name, size, checksum, etag: e_tag }
}

fn last_written<'a>(objects: impl Iterator<Item = &'a ObjectMeta>) -> i64 {
    objects.map(|object| object.last_modified.timestamp()).max().unwrap_or(0).max(0)
}

/// What [`Http`] gave up with, under what the client of the protocol put around it.
fn passed_through(error: &object_store::Error) -> Option<FetchError> {
    let mut cause: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = cause {
        match error.downcast_ref::<FetchError>() {
            Some(FetchError::RateLimited { what, asked, limit }) => {
                let (what, asked, limit) = (what.clone(), *asked, *limit);
                return Some(FetchError::RateLimited { what, asked, limit });
            }
            Some(FetchError::Unreachable { what, problem }) => {
                return Some(FetchError::Unreachable { what: what.clone(), problem: problem.clone() });
            }
            _ => cause = error.source(),
        }
    }
    None
}

/// `Code: Message` of an answer of S3, or the error as it is.
fn said(error: &object_store::Error) -> String {
    let text = chain(error);
    let tag = |name: &str| {
        let (_, rest) = text.split_once(&format!("<{name}>"))?;
        Some(rest.split_once(&format!("</{name}>"))?.0.to_owned())
    };
    match (tag("Code"), tag("Message")) {
        (Some(code), Some(message)) => format!("{code}: {message}"),
        (Some(code), None) => code,
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_etags_are_checksums() {
        let checksum = |etag: Option<&str>| {
            let object = ObjectMeta {
                location: Path::from("x"),
                last_modified: std::time::SystemTime::UNIX_EPOCH.into(),
                size: 1,
                e_tag: etag.map(str::to_owned),
                version: None,
            };
            file("x".to_owned(), object).checksum
        };
        let md5 = "d41d8cd98f00b204e9800998ecf8427e";
        assert_eq!(checksum(Some(&format!("\"{md5}\""))), Checksum::Md5(md5.to_owned()));
        assert_eq!(checksum(Some(&format!("\"{md5}-3\""))), Checksum::None);
        assert_eq!(checksum(None), Checksum::None);
    }

    #[test]
    fn half_a_key_is_named() {
        let model = BucketModel { bucket: "b".to_owned(), prefix: String::new() };
        let options =
            BucketOptions { access_key_id: Some(Secret("id".to_owned())), ..BucketOptions::default() };
        let error = Bucket::new("s3://b".to_owned(), model, None, options, Retry::default()).unwrap_err();
        assert!(error.to_string().starts_with("AWS_SECRET_ACCESS_KEY: is missing"), "{error}");
    }
}
