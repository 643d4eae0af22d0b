//! A source, whatever protocol it speaks.

use std::fmt;

use bytes::Bytes;
use futures::stream::BoxStream;
use herd_model::ModelSource;
use serde::{Deserialize, Serialize};

use super::bucket::{Bucket, BucketOptions};
use super::error::FetchError;
use super::hub::{Hub, HubOptions};
use super::retry::Retry;

/// Where a model comes from, and what is needed to get it from there.
#[derive(Clone, Debug)]
pub struct SourceOptions {
    /// As written.
    pub source: String,
    /// Name of the Secret whose values these are, for messages.
    pub secret: Option<String>,
    /// For `hf://`.
    pub hub: HubOptions,
    /// For `s3://`.
    pub bucket: BucketOptions,
    /// When to try again.
    pub retry: Retry,
}

/// A value that no log shows.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

/// A file that a source lists.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RemoteFile {
    /// In the source's folder.
    pub(super) name: String,
    pub(super) size: u64,
    pub(super) checksum: Checksum,
    /// Of a bucket: asked for with each part of it.
    pub(super) etag: Option<String>,
}

/// What the source says of a file's bytes, in hex.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Checksum {
    Sha256(String),
    /// SHA-1 as git has it.
    GitBlob(String),
    Md5(String),
    /// Nothing but its size.
    None,
}

/// Bytes of a file from some place on.
pub(super) struct Content {
    pub(super) from: u64,
    pub(super) bytes: BoxStream<'static, Result<Bytes, String>>,
}

/// How far a file can be read.
pub(super) enum Opened {
    Content(Content),
    /// It ends before that place.
    Shorter,
}

/// A connected source.
#[derive(Debug)]
pub(super) enum Remote {
    Hub(Hub),
    Bucket(Bucket),
}

impl Remote {
    pub(super) fn new(options: SourceOptions) -> Result<Self, FetchError> {
        let SourceOptions { source, secret, hub, bucket, retry } = options;
        match source.parse()? {
            ModelSource::HuggingFace(model) => Hub::new(source, model, secret, hub, retry).map(Self::Hub),
            ModelSource::Bucket(model) => Bucket::new(source, model, secret, bucket, retry).map(Self::Bucket),
            ModelSource::Image(_) | ModelSource::Claim { .. } => Err(FetchError::Option {
                option: "--source",
                problem: format!("{source} is a volume of the pod and is not downloaded"),
            }),
        }
    }

    /// As written.
    pub(super) fn what(&self) -> &str {
        match self {
            Self::Hub(hub) => hub.what(),
            Self::Bucket(bucket) => bucket.what(),
        }
    }

    /// A name for the files as they are now.
    pub(super) async fn resolve(&self) -> Result<String, FetchError> {
        match self {
            Self::Hub(hub) => hub.resolve().await,
            Self::Bucket(bucket) => bucket.resolve().await,
        }
    }

    /// The files that `pin` is the name of.
    pub(super) async fn list(&self, pin: &str) -> Result<Vec<RemoteFile>, FetchError> {
        match self {
            Self::Hub(hub) => hub.list(pin).await,
            Self::Bucket(bucket) => bucket.list(pin).await,
        }
    }

    /// Reads one of them, from a place before its end. The source may begin earlier.
    pub(super) async fn open(&self, pin: &str, file: &RemoteFile, from: u64) -> Result<Opened, FetchError> {
        match self {
            Self::Hub(hub) => hub.open(pin, file, from).await,
            Self::Bucket(bucket) => bucket.open(file, from).await,
        }
    }

    /// Whether what is listed as the file's checksum is one.
    pub(super) fn is_checksum(&self, checksum: &Checksum) -> bool {
        match (self, checksum) {
            (_, Checksum::None) => false,
            (Self::Bucket(bucket), Checksum::Md5(_)) => bucket.etags_are_checksums(),
            _ => true,
        }
    }
}
