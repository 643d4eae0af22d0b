//! Models of a hub or a bucket, downloaded into the cache of a node or a pod.
//!
//! [`resolve`] names the files that a source has now, once for each revision; [`fetch`] brings exactly those, or fails. What was
//! downloaded is kept over every failure, and the next try goes on from it. The pods of a node download a model once.

mod bucket;
mod cache;
mod checksum;
mod download;
mod error;
mod http;
mod hub;
mod lease;
mod locks;
mod object_http;
mod outline;
mod progress;
mod remote;
mod retry;
mod space;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _};
use herd_model::{FilesError, INDEX_FILE, LARGE_FILE_BYTES, SINGLE_FILE, Stage, is_weights, needed_files};
use serde::{Deserialize, Serialize};

pub use bucket::BucketOptions;
pub use error::FetchError;
pub use hub::HubOptions;
pub use lease::ModelLease;
pub use remote::{Secret, SourceOptions};
pub use retry::Retry;

use cache::{Cache, Snapshot, Wanted};
use download::{Download, already_there, is_there};
use progress::{Progress, size};
use remote::{Remote, RemoteFile};

/// Files that are downloaded at once.
const FILES_AT_ONCE: usize = 4;
/// Of `config.json` and the index.
const MAX_JSON_BYTES: u64 = 256 << 20;

/// What to bring, and where to.
#[derive(Clone, Debug)]
pub struct FetchOptions {
    /// From there.
    pub source: SourceOptions,
    /// What [`resolve`] said.
    pub pin: String,
    /// Folder of all models.
    pub cache: PathBuf,
    /// This one's inside of it.
    pub folder: String,
    /// Bytes of all models.
    pub bound: u64,
    /// Which of how many stages; all of the model unless given.
    pub stage: Option<(usize, usize)>,
    /// For another process that downloads the same.
    pub wait: Duration,
    /// For so long after its last use a model is not removed.
    pub grace: Duration,
}

/// What a source has now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Resolved {
    /// A name for its files: it is of no other ones.
    pub pin: String,
    /// Of the files that may be needed.
    pub bytes: u64,
}

/// What was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fetched {
    /// That the ranks need.
    pub bytes: u64,
    /// Of them downloaded now.
    pub downloaded: u64,
}

/// Asks a source what it has now, and whether that is a checkpoint.
pub async fn resolve(options: SourceOptions) -> Result<Resolved, FetchError> {
    let remote = Remote::new(options)?;
    let pin = remote.resolve().await?;
    let files = remote.list(&pin).await?;
    let names = names(&files);
    let problem = if !names.contains(herd_model::CONFIG_FILE) {
        Some(FilesError::Missing(herd_model::CONFIG_FILE.to_owned()))
    } else if names.contains(SINGLE_FILE) || names.contains(INDEX_FILE) {
        None
    } else {
        Some(FilesError::NoWeights)
    };
    if let Some(problem) = problem {
        return Err(FetchError::Files { what: remote.what().to_owned(), problem });
    }
    let needed = files.iter().filter(|file| is_weights(&file.name) || is_side(&file.name));
    Ok(Resolved { bytes: needed.map(|file| file.size).sum(), pin })
}

/// Brings what is missing of a model.
pub async fn fetch(options: FetchOptions) -> Result<Fetched, FetchError> {
    let FetchOptions { source, pin, cache, folder, bound, stage, wait, grace } = options;
    let retry = source.retry;
    let remote = Remote::new(source)?;
    let cache = Cache { root: cache, bound, grace };
    let snapshot = cache.open(&folder).await?;
    let fetch = Fetch { remote: &remote, pin: &pin, cache: &cache, snapshot: &snapshot, stage, retry };
    if let Some(bytes) = fetch.is_there() {
        tracing::info!(bytes, "{} is in the cache", remote.what());
        return Ok(Fetched { bytes, downloaded: 0 });
    }
    let _alone = snapshot.lock(remote.what(), wait).await?;
    if let Some(bytes) = fetch.is_there() {
        return Ok(Fetched { bytes, downloaded: 0 });
    }
    let fetched = fetch.run().await?;
    snapshot.touch()?;
    Ok(fetched)
}

struct Fetch<'a> {
    remote: &'a Remote,
    pin: &'a str,
    cache: &'a Cache,
    snapshot: &'a Snapshot,
    stage: Option<(usize, usize)>,
    retry: Retry,
}

/// The files of a model, as some ranks need them.
#[derive(Default)]
struct Needed<'a> {
    whole: Vec<&'a RemoteFile>,
    /// Large ones of which they need no weight.
    outline: Vec<&'a RemoteFile>,
}

impl Needed<'_> {
    fn bytes(&self) -> u64 {
        self.whole.iter().map(|file| file.size).sum()
    }

    fn are_there(&self, model: &Path) -> bool {
        let Self { whole, outline } = self;
        whole.iter().all(|file| is_there(model, file))
            && outline.iter().all(|file| outline::is_there(model, file))
    }
}

impl Fetch<'_> {
    /// Bytes of the files that are needed, where all of them are there: then nobody is asked.
    fn is_there(&self) -> Option<u64> {
        let listed: Vec<RemoteFile> = serde_json::from_slice(&self.snapshot.manifest()?).ok()?;
        let needed = self.needed(&listed).ok()?;
        needed.are_there(&self.snapshot.model()).then(|| needed.bytes())
    }

    async fn run(&self) -> Result<Fetched, FetchError> {
        let known = self.snapshot.manifest().and_then(|json| serde_json::from_slice(&json).ok());
        let listed: Vec<RemoteFile> = if let Some(listed) = known {
            listed
        } else {
            let listed = self.remote.list(self.pin).await?;
            let json =
                serde_json::to_vec(&listed).map_err(|error| FetchError::Internal(error.to_string()))?;
            self.snapshot.write_manifest(&json)?;
            listed
        };
        // Which weights are needed stands in one of them.
        let side: Vec<&RemoteFile> = listed.iter().filter(|file| is_side(&file.name)).collect();
        let first = self.download(&Needed { whole: side, ..Needed::default() }).await?;
        let needed = self.needed(&listed)?;
        let rest = self.download(&needed).await?;
        Ok(Fetched { bytes: needed.bytes(), downloaded: first + rest })
    }

    /// Bytes of whole files that came.
    async fn download(&self, files: &Needed<'_>) -> Result<u64, FetchError> {
        let (what, model) = (self.remote.what(), self.snapshot.model());
        if files.are_there(&model) {
            return Ok(0);
        }
        let (total, Needed { whole: files, outline }) = (files.bytes(), files);
        let there: u64 = files.iter().map(|file| already_there(&model, file)).sum();
        let needed = total - there;
        self.cache.make_room(self.snapshot, Wanted { what, needed, total }).await?;
        tracing::info!(
            "{what}: {} files, {}, of which {} are missing",
            files.len(),
            size(total),
            size(needed)
        );
        let progress = Progress::new(total, there);
        let (remote, pin, folder) = (self.remote, self.pin, model.as_path());
        let download = Download { remote, pin, folder, progress: &progress, retry: self.retry };
        let whole = files.iter().map(|file| download.file(file).boxed());
        let outlines = outline.iter().map(|file| download.outline(file).boxed());
        let all =
            futures::stream::iter(whole.chain(outlines)).buffer_unordered(FILES_AT_ONCE).try_collect::<()>();
        progress.told(what, all).await?;
        Ok(needed)
    }

    fn needed<'a>(&self, listed: &'a [RemoteFile]) -> Result<Needed<'a>, FetchError> {
        let wrong = |problem| FetchError::Files { what: self.remote.what().to_owned(), problem };
        let names = names(listed);
        let has_index = names.contains(INDEX_FILE) && !names.contains(SINGLE_FILE);
        let index = has_index.then(|| self.read(INDEX_FILE)).transpose()?;
        let stage = self.stage.filter(|(_, stages)| *stages > 1);
        let stage = stage.map(|(stage, stages)| self.layers_of(stage, stages)).transpose()?;
        let all = needed_files(&names, index.as_deref(), None).map_err(wrong)?;
        let needed = needed_files(&names, index.as_deref(), stage.as_ref()).map_err(wrong)?;
        let is_whole = |file: &&RemoteFile| needed.contains(&file.name) || file.size < LARGE_FILE_BYTES;
        let (whole, outline) = listed.iter().filter(|file| all.contains(&file.name)).partition(is_whole);
        Ok(Needed { whole, outline })
    }

    fn layers_of(&self, stage: usize, stages: usize) -> Result<Stage, FetchError> {
        #[derive(Deserialize)]
        struct Config {
            num_hidden_layers: usize,
        }
        let json = self.read(herd_model::CONFIG_FILE)?;
        let bad = |problem| FetchError::BadAnswer { what: self.remote.what().to_owned(), problem };
        let config: Result<Config, _> = serde_json::from_slice(&json);
        let Config { num_hidden_layers: layers } =
            config.map_err(|error| bad(format!("{}: {error}", herd_model::CONFIG_FILE)))?;
        Stage::new(stage, stages, layers).ok_or_else(|| FetchError::Option {
            option: "--stage",
            problem: format!("there is no stage {stage} of {stages} of {layers} layers"),
        })
    }

    fn read(&self, name: &str) -> Result<Vec<u8>, FetchError> {
        let path = self.snapshot.model().join(name);
        let length = std::fs::metadata(&path).map_err(FetchError::io("read", &path))?.len();
        if length > MAX_JSON_BYTES {
            let problem = format!("{name} has {length} bytes; at most {MAX_JSON_BYTES} make sense");
            return Err(FetchError::BadAnswer { what: self.remote.what().to_owned(), problem });
        }
        std::fs::read(&path).map_err(FetchError::io("read", &path))
    }
}

fn is_side(name: &str) -> bool {
    herd_model::SIDE_FILES.contains(&name)
}

fn names(files: &[RemoteFile]) -> BTreeSet<&str> {
    files.iter().map(|file| file.name.as_str()).collect()
}
