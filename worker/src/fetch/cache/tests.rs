use std::path::Path;

use super::*;

const GRACE: Duration = Duration::from_secs(100);

struct Node(tempfile::TempDir);

impl Node {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn cache(&self, bound: u64) -> Cache {
        Cache { root: self.0.path().to_owned(), bound, grace: GRACE }
    }

    /// A model of so many bytes, used so many seconds ago by somebody who has gone.
    async fn holds(&self, folder: &str, bytes: usize, seconds_ago: u64) {
        let snapshot = self.cache(u64::MAX).open(folder).await.unwrap();
        fs::write(snapshot.model().join("model.safetensors"), vec![0; bytes]).unwrap();
        snapshot.write_manifest(b"[]").unwrap();
        snapshot.lease.set_modified(SystemTime::now() - Duration::from_secs(seconds_ago)).unwrap();
    }

    fn has(&self, folder: &str) -> bool {
        let folder = self.0.path().join(folder);
        let parts = [folder.join(MODEL).exists(), folder.join(MANIFEST).exists()];
        assert_eq!(parts[0], parts[1], "{}", folder.display());
        parts[0]
    }

    async fn room(&self, bound: u64, needed: u64) -> Result<(), FetchError> {
        let cache = self.cache(bound);
        let own = cache.open("hf/o/new/c").await.unwrap();
        cache.make_room(&own, Wanted { what: "hf://o/new", needed, total: needed }).await
    }
}

fn long_ago(seconds: u64) -> u64 {
    GRACE.as_secs() + seconds
}

#[tokio::test]
async fn what_was_used_longest_ago_goes_first() {
    let node = Node::new();
    node.holds("hf/o/a/c", 100, long_ago(1)).await;
    node.holds("hf/o/b/c", 100, long_ago(3)).await;
    node.holds("s3/bucket/d", 100, long_ago(2)).await;
    node.room(350, 50).await.unwrap();
    assert!(node.has("hf/o/a/c") && node.has("hf/o/b/c") && node.has("s3/bucket/d"));
    node.room(350, 51).await.unwrap();
    assert!(node.has("hf/o/a/c") && !node.has("hf/o/b/c") && node.has("s3/bucket/d"));
    node.room(350, 300).await.unwrap();
    assert!(!node.has("hf/o/a/c") && !node.has("s3/bucket/d"));
}

#[tokio::test]
async fn what_is_in_use_stays() {
    let node = Node::new();
    node.holds("hf/o/a/c", 100, long_ago(2)).await;
    node.holds("hf/o/b/c", 100, long_ago(1)).await;
    // As the worker of another container has it.
    let lease = File::open(node.0.path().join("hf/o/a/c").join(LEASE)).unwrap();
    assert!(try_lock(&lease, Share::Shared).unwrap());
    node.room(200, 100).await.unwrap();
    assert!(node.has("hf/o/a/c") && !node.has("hf/o/b/c"));
    let error = node.room(200, 101).await.unwrap_err();
    assert_eq!(error.reason(), "ModelCacheFull");
    assert!(error.to_string().contains("in use or used just now: hf/o/a/c"), "{error}");
    drop(lease);
    node.room(200, 101).await.unwrap();
    assert!(!node.has("hf/o/a/c"));
}

#[tokio::test]
async fn what_was_used_just_now_counts_as_in_use() {
    let node = Node::new();
    node.holds("hf/o/a/c", 100, 0).await;
    assert_eq!(node.room(100, 1).await.unwrap_err().reason(), "ModelCacheFull");
    assert!(node.has("hf/o/a/c"));
}

#[tokio::test]
async fn nothing_is_removed_for_a_model_that_does_not_fit_anyway() {
    let node = Node::new();
    node.holds("hf/o/a/c", 100, long_ago(1)).await;
    let error = node.room(200, 201).await.unwrap_err();
    assert!(error.to_string().starts_with("hf://o/new needs 201 bytes more"), "{error}");
    assert!(error.to_string().contains("modelCache.size"), "{error}");
    assert!(node.has("hf/o/a/c"));
    // Far more than any disk has: the bound is not what is missing.
    let free = space::free(node.0.path()).unwrap();
    let error = node.room(u64::MAX / 2, free + (1 << 30)).await.unwrap_err();
    assert_eq!(error.reason(), "DiskFull");
    assert!(node.has("hf/o/a/c"));
}

#[tokio::test]
async fn room_that_another_download_was_given_is_not_given_twice() {
    let node = Node::new();
    let cache = node.cache(200);
    let other = cache.open("hf/o/other/c").await.unwrap();
    let downloads = other.lock("hf://o/other", GRACE).await.unwrap();
    cache.make_room(&other, Wanted { what: "hf://o/other", needed: 150, total: 150 }).await.unwrap();
    assert_eq!(node.room(200, 51).await.unwrap_err().reason(), "ModelCacheFull");
    node.room(200, 50).await.unwrap();
    // It died.
    drop(downloads);
    node.room(200, 51).await.unwrap();
}

#[tokio::test]
async fn a_folder_outside_is_no_folder() {
    let node = Node::new();
    for folder in ["", "../x", "/x", "a/../../x", "."] {
        let error = node.cache(1).open(folder).await.unwrap_err();
        assert_eq!(error.reason(), "InvalidOption", "{folder}");
    }
    assert!(!Path::new("/x").exists());
}
