//! `s3://`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use herd_worker::fetch::{BucketOptions, FetchError, HubOptions, Secret, SourceOptions, resolve};
use md5::{Digest as _, Md5};

use crate::bucket::{BUCKET, Bucket, Object, State};
use crate::model::{FIRST, Node, RETRY, SECOND, WEIGHT_BYTES, bytes, files, is_whole, pin};
use crate::server::{End, Request, Response};

const PREFIX: &str = "llama/8b";
const KEY: &str = "AKIAHERD";
const WRITTEN: &str = "2026-11-25T12:00:00.000Z";

fn md5(bytes: &[u8]) -> String {
    Md5::digest(bytes).iter().fold(String::new(), |mut hex, byte| {
        write!(hex, "{byte:02x}").unwrap();
        hex
    })
}

fn object(bytes: Vec<u8>, modified: &'static str) -> Object {
    Object { etag: format!("\"{}\"", md5(&bytes)), bytes: Arc::new(bytes), modified }
}

fn state() -> State {
    let objects =
        files(1).into_iter().map(|(name, bytes)| (format!("{PREFIX}/{name}"), object(bytes, WRITTEN)));
    let mut objects: BTreeMap<String, Object> = objects.collect();
    objects.insert("other/config.json".to_owned(), object(b"{}".to_vec(), WRITTEN));
    State { objects, ..State::default() }
}

fn source(bucket: &Bucket, key: Option<&str>) -> SourceOptions {
    SourceOptions {
        source: format!("s3://{BUCKET}/{PREFIX}/"),
        secret: key.map(|_| "bucket-key".to_owned()),
        hub: HubOptions::default(),
        bucket: BucketOptions {
            endpoint: Some(bucket.server.url()),
            region: key.map(|_| "eu-central-1".to_owned()),
            access_key_id: key.map(|key| Secret(key.to_owned())),
            secret_access_key: key.map(|_| Secret("very secret".to_owned())),
            session_token: key.map(|_| Secret("session".to_owned())),
        },
        retry: RETRY,
    }
}

fn key(name: &str) -> String {
    format!("{PREFIX}/{name}")
}

#[tokio::test]
async fn ranks_get_the_objects_they_need_once() {
    let bucket = Bucket::start(State { access_key: Some(KEY), page: Some(2), ..state() }).await;
    let (node, source) = (Node::new(), source(&bucket, Some(KEY)));
    let pin = pin(&source).await;
    let fetched = node.fetch(source.clone(), &pin).await.unwrap();
    is_whole(&node.model(&source, &pin), 1);
    assert_eq!(fetched.bytes, fetched.downloaded);
    assert!(bucket.server.asked_for("README.md").is_empty() && bucket.server.asked_for(".pth").is_empty());
    for request in bucket.server.seen() {
        let signed = &request.headers["authorization"];
        assert!(
            signed.contains("/eu-central-1/s3/aws4_request") && signed.contains("Signature="),
            "{signed}"
        );
        assert_eq!(request.headers["x-amz-security-token"], "session");
    }
    let asked = bucket.server.seen().len();
    assert_eq!(node.fetch(source, &pin).await.unwrap().downloaded, 0);
    assert_eq!(bucket.server.seen().len(), asked);
}

#[tokio::test]
async fn a_bucket_for_everybody_needs_no_key() {
    let bucket = Bucket::start(state()).await;
    let (node, source) = (Node::new(), source(&bucket, None));
    let pin = pin(&source).await;
    node.fetch(source.clone(), &pin).await.unwrap();
    is_whole(&node.model(&source, &pin), 1);
    assert!(bucket.server.seen().iter().all(|request| !request.headers.contains_key("authorization")));
}

#[tokio::test]
async fn a_cut_connection_goes_on_where_it_ended() {
    let bucket = Bucket::start(state()).await;
    let (node, source) = (Node::new(), source(&bucket, None));
    let pin = pin(&source).await;
    bucket.state.lock().unwrap().ends.insert(key(FIRST), End::Cut(70_000));
    node.fetch(source.clone(), &pin).await.unwrap();
    is_whole(&node.model(&source, &pin), 1);
    let asked = bucket.server.asked_for(FIRST);
    assert_eq!(asked.iter().map(Request::from).collect::<Vec<_>>(), [None, Some(70_000)]);
    let etag = format!("\"{}\"", md5(&files(1)[FIRST]));
    assert!(asked.iter().all(|request| request.headers["if-match"] == etag));
}

#[tokio::test]
async fn a_busy_server_is_asked_again() {
    let bucket = Bucket::start(state()).await;
    let busy = || Response::new(503, "<Error><Code>SlowDown</Code></Error>").with("retry-after", "0");
    let state = || bucket.state.lock().unwrap();
    state().instead.insert(String::new(), vec![busy(), Response::new(429, "")]);
    state().instead.insert(key(FIRST), vec![busy(), Response::new(500, "")]);
    let (node, source) = (Node::new(), source(&bucket, None));
    let pin = pin(&source).await;
    node.fetch(source.clone(), &pin).await.unwrap();
    is_whole(&node.model(&source, &pin), 1);
    assert_eq!(bucket.server.asked_for(FIRST).len(), 3);

    state().instead.insert(String::new(), vec![Response::new(503, "").with("retry-after", "86400")]);
    let error = resolve(source).await.unwrap_err();
    assert_eq!(error.reason(), "SourceRateLimited", "{error}");
}

#[tokio::test]
async fn an_object_that_changes_is_named() {
    let bucket = Bucket::start(state()).await;
    let source = source(&bucket, None);
    let before = pin(&source).await;
    // What no rank needs may change.
    let written = |name: &str, bytes: Vec<u8>| {
        let object = object(bytes, "2026-11-25T13:00:00.000Z");
        bucket.state.lock().unwrap().objects.insert(key(name), object);
    };
    written("README.md", b"changed".to_vec());
    assert_eq!(pin(&source).await, before);

    written(SECOND, bytes(77, WEIGHT_BYTES));
    let error = Node::new().fetch(source.clone(), &before).await.unwrap_err();
    assert_eq!(error.reason(), "SourceChanged");
    assert!(error.to_string().contains(&format!("{SECOND} written since")), "{error}");
    let after = pin(&source).await;
    assert_ne!(after, before);

    bucket.state.lock().unwrap().objects.remove(&key(SECOND));
    let error = Node::new().fetch(source, &after).await.unwrap_err();
    assert!(error.to_string().contains("objects were removed"), "{error}");
}

#[tokio::test]
async fn an_object_that_changes_in_the_middle_is_named() {
    let bucket = Bucket::start(state()).await;
    let (node, source) = (Node::new(), source(&bucket, None));
    let pin = pin(&source).await;
    let failed = Response::new(412, "<Error><Code>PreconditionFailed</Code></Error>");
    bucket.state.lock().unwrap().instead.insert(key(FIRST), vec![failed]);
    let error = node.fetch(source, &pin).await.unwrap_err();
    assert_eq!(error.reason(), "SourceChanged");
    assert!(error.to_string().contains(&format!("{FIRST} was written anew")), "{error}");
}

#[tokio::test]
async fn a_wrong_checksum_is_found_where_there_is_one() {
    let bucket = Bucket::start(state()).await;
    let etag = |etag: &str| {
        let mut state = bucket.state.lock().unwrap();
        state.objects.get_mut(&key(FIRST)).unwrap().etag = etag.to_owned();
    };
    let source = source(&bucket, None);
    let wrong = format!("\"{}\"", "0".repeat(32));
    etag(&wrong);
    let first = pin(&source).await;
    let error = Node::new().fetch(source.clone(), &first).await.unwrap_err();
    assert_eq!(error.reason(), "ChecksumMismatch");
    assert!(error.to_string().contains(FIRST) && error.to_string().contains("MD5"), "{error}");
    // Of an object in parts the ETag is no checksum, nor of one that is encrypted with a key of its own.
    etag(&format!("\"{}-2\"", "0".repeat(32)));
    let parts = pin(&source).await;
    Node::new().fetch(source.clone(), &parts).await.unwrap();
    etag(&wrong);
    bucket.state.lock().unwrap().is_encrypted = true;
    Node::new().fetch(source, &first).await.unwrap();
}

async fn refused(bucket: &Bucket, key: Option<&str>, place: &str) -> FetchError {
    let mut options = source(bucket, key);
    options.source = format!("s3://{place}");
    resolve(options).await.unwrap_err()
}

#[tokio::test]
async fn what_is_refused_is_told() {
    let bucket = Bucket::start(State { access_key: Some(KEY), ..state() }).await;
    let error = refused(&bucket, None, BUCKET).await;
    assert_eq!(error.reason(), "SourceUnauthorized");
    assert!(error.to_string().contains("model.secretRef"), "{error}");
    let error = refused(&bucket, Some("AKIAOTHER"), BUCKET).await;
    assert_eq!(error.reason(), "SourceForbidden");
    let said = error.to_string();
    assert!(said.contains("the key of Secret bucket-key") && said.contains("InvalidAccessKeyId"), "{said}");
    assert!(!said.contains("very secret") && !said.contains('\n'), "{said}");
    let error = refused(&bucket, Some(KEY), "nowhere/x").await;
    assert_eq!(error.reason(), "SourceNotFound");
    assert!(error.to_string().contains("NoSuchBucket"), "{error}");
    let error = refused(&bucket, Some(KEY), &format!("{BUCKET}/empty")).await;
    assert_eq!(error.reason(), "ModelFilesMissing", "{error}");
}
