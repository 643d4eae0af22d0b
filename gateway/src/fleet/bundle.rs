//! A model's text files, got from a leader and built once a digest.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use herd_proto::internal::v1::worker_client::WorkerClient;
use herd_proto::internal::v1::{BundleChunk, GetBundleRequest};
use herd_text::{BUNDLE_FILE_NAMES, BundleFiles, TextError, TextModel};
use tokio::sync::OnceCell;
use tonic::transport::Channel;

/// Bytes of all files together; Llama 3's tokenizer has 9 MB.
const MAX_BUNDLE_BYTES: usize = 96 << 20;

/// A bundle that cannot be had or used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BundleError {
    #[error("GetBundle failed: {0}")]
    Call(#[from] Box<tonic::Status>),
    #[error("the bundle has more than {MAX_BUNDLE_BYTES} bytes")]
    TooLarge,
    #[error("the bundle's first chunk names no file")]
    NoName,
    #[error(transparent)]
    Text(#[from] TextError),
    #[error("building the tokenizer was cut short")]
    Cut,
}

type Slot = Arc<OnceCell<Arc<TextModel>>>;

/// Text models by digest, as many as the fleet has digests.
#[derive(Default)]
pub(crate) struct Bundles(Mutex<BTreeMap<String, Slot>>);

impl Bundles {
    /// The text model of a digest; gangs of one digest that ask at the same time cause one call.
    pub(crate) async fn get(
        &self,
        digest: &str,
        client: &WorkerClient<Channel>,
    ) -> Result<Arc<TextModel>, BundleError> {
        let slot = {
            let mut slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(slots.entry(digest.to_owned()).or_default())
        };
        slot.get_or_try_init(|| fetch(client.clone())).await.cloned()
    }

    /// Forgets digests that no gang has any more.
    pub(crate) fn retain(&self, used: &BTreeSet<String>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|digest, _| used.contains(digest));
    }
}

async fn fetch(mut client: WorkerClient<Channel>) -> Result<Arc<TextModel>, BundleError> {
    let mut chunks = client.get_bundle(GetBundleRequest {}).await.map_err(Box::new)?.into_inner();
    let mut files: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let mut current: Option<String> = None;
    let mut total = 0;
    while let Some(BundleChunk { file, data }) = chunks.message().await.map_err(Box::new)? {
        total += data.len();
        if total > MAX_BUNDLE_BYTES {
            return Err(BundleError::TooLarge);
        }
        if !file.is_empty() {
            current = Some(file);
        }
        let name = current.as_ref().ok_or(BundleError::NoName)?;
        if BUNDLE_FILE_NAMES.contains(&name.as_str()) {
            files.entry(name.clone()).or_default().extend_from_slice(&data);
        }
    }
    let files: BundleFiles = files.into_iter().collect();
    let built = tokio::task::spawn_blocking(move || TextModel::from_files(&files)).await;
    Ok(Arc::new(built.map_err(|_| BundleError::Cut)??))
}
