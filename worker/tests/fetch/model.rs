//! A model in two weight files, and what surrounds a download of it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use herd_worker::fetch::{
    BucketOptions, FetchError, FetchOptions, Fetched, HubOptions, Resolved, Retry, Secret, SourceOptions,
    fetch, resolve,
};
use ring::digest;
use serde_json::json;

use crate::hub::{Hub, HubFile, REPOSITORY, State};

pub(crate) const FIRST: &str = "model-00001-of-00002.safetensors";
pub(crate) const SECOND: &str = "model-00002-of-00002.safetensors";
pub(crate) const WEIGHT_BYTES: usize = 300_000;
pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
pub(crate) const LATER: &str = "89abcdef0123456789abcdef0123456789abcdef";

/// Bytes that differ from place to place.
pub(crate) fn bytes(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed;
    let next = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..length).map(next).collect()
}

/// By name.
pub(crate) fn files(seed: u64) -> BTreeMap<&'static str, Vec<u8>> {
    let index = json!({"weight_map": {
        "model.embed_tokens.weight": FIRST, "model.layers.0.x": FIRST, "model.layers.1.x": SECOND,
        "model.norm.weight": SECOND, "lm_head.weight": SECOND}});
    BTreeMap::from([
        ("config.json", json!({"num_hidden_layers": 2, "seed": seed}).to_string().into_bytes()),
        ("tokenizer.json", bytes(seed + 1, 5000)),
        ("model.safetensors.index.json", index.to_string().into_bytes()),
        (FIRST, bytes(seed + 2, WEIGHT_BYTES)),
        (SECOND, bytes(seed + 3, WEIGHT_BYTES)),
        // Nobody needs these.
        ("README.md", b"a model".to_vec()),
        ("original/consolidated.00.pth", bytes(seed + 4, WEIGHT_BYTES)),
    ])
}

/// Of these that ranks need.
pub(crate) const NEEDED: [&str; 5] =
    ["config.json", FIRST, SECOND, "model.safetensors.index.json", "tokenizer.json"];

fn hex(digest: &digest::Digest) -> String {
    digest.as_ref().iter().fold(String::new(), |mut hex, byte| {
        write!(hex, "{byte:02x}").unwrap();
        hex
    })
}

pub(crate) fn hub_file(name: &str, bytes: Vec<u8>) -> HubFile {
    let is_large = Path::new(name).extension().is_some_and(|end| end == "safetensors" || end == "pth");
    let oid = if is_large {
        hex(&digest::digest(&digest::SHA256, &bytes))
    } else {
        let blob = [format!("blob {}\0", bytes.len()).as_bytes(), &bytes].concat();
        hex(&digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, &blob))
    };
    HubFile { bytes: Arc::new(bytes), oid, is_large }
}

/// A hub whose branch `main` is at [`COMMIT`].
pub(crate) fn state() -> State {
    let commit = |seed| files(seed).into_iter().map(|(name, bytes)| (name.to_owned(), hub_file(name, bytes)));
    State {
        commits: BTreeMap::from([
            (COMMIT.to_owned(), commit(1).collect()),
            (LATER.to_owned(), commit(100).collect()),
        ]),
        branches: [("main".to_owned(), COMMIT.to_owned())].into(),
        ..State::default()
    }
}

/// Tries follow each other at once, and are given up soon.
pub(crate) const RETRY: Retry =
    Retry { first: Duration::from_millis(5), most: Duration::from_millis(20), limit: Duration::from_secs(5) };

pub(crate) fn from_hub(hub: &Hub, token: Option<&str>) -> SourceOptions {
    SourceOptions {
        source: format!("hf://{REPOSITORY}"),
        secret: token.map(|_| "hub-token".to_owned()),
        hub: HubOptions { endpoint: Some(hub.api.url()), token: token.map(|token| Secret(token.to_owned())) },
        bucket: BucketOptions::default(),
        retry: RETRY,
    }
}

/// A node, or a pod with a cache of its own.
pub(crate) struct Node {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) bound: u64,
}

impl Node {
    pub(crate) fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), bound: 1 << 30 }
    }

    pub(crate) fn root(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn options(&self, source: SourceOptions, pin: &str) -> FetchOptions {
        let folder = format!("{}/{pin}", source.source.replace("://", "/"));
        FetchOptions {
            source,
            pin: pin.to_owned(),
            cache: self.root().to_owned(),
            folder,
            bound: self.bound,
            stage: None,
            wait: Duration::from_mins(1),
            grace: Duration::ZERO,
        }
    }

    pub(crate) async fn fetch(&self, source: SourceOptions, pin: &str) -> Result<Fetched, FetchError> {
        fetch(self.options(source, pin)).await
    }

    /// Where its files are then.
    pub(crate) fn model(&self, source: &SourceOptions, pin: &str) -> PathBuf {
        self.root().join(self.options(source.clone(), pin).folder).join("model")
    }
}

pub(crate) async fn pin(source: &SourceOptions) -> String {
    let Resolved { pin, bytes } = resolve(source.clone()).await.unwrap();
    assert!(bytes > 2 * WEIGHT_BYTES as u64);
    pin
}

/// Exactly what is needed, as it was.
pub(crate) fn is_whole(model: &Path, seed: u64) {
    let mut there: Vec<String> =
        fs::read_dir(model).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    there.sort();
    assert_eq!(there, NEEDED);
    let files = files(seed);
    for name in NEEDED {
        assert!(fs::read(model.join(name)).unwrap() == files[name], "{name} is not what it was");
    }
}
