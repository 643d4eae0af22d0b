//! Downloaded models of a node, which its pods share: a folder for each snapshot of a source, with
//! - `model/`, the checkpoint's files;
//! - `manifest.json`, what the source lists;
//! - `lease`, which who uses the model holds a shared lock of, and whose time says when that was last;
//! - `lock`, which who downloads it holds;
//! - `reserved`, the bytes it will have then.
//!
//! What was used longest ago is removed where there is no room, and never what is in use.

use std::fs::{self, File};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::error::FetchError;
use super::locks::{Share, lock, lock_file, try_lock};
use super::space;

/// For what holds a lock for the blink of an eye, or removes a model.
const SHORT_WAIT: Duration = Duration::from_mins(5);
/// Of folders in the cache.
const MAX_DEPTH: usize = 6;
const LEASE: &str = "lease";
const LOCK: &str = "lock";
const RESERVED: &str = "reserved";
const MODEL: &str = "model";
const MANIFEST: &str = "manifest.json";
/// In use by whom, in a message.
const MAX_NAMED: usize = 5;

/// Of one node, or of one pod.
#[derive(Clone, Debug)]
pub(super) struct Cache {
    pub(super) root: PathBuf,
    /// Bytes of all models.
    pub(super) bound: u64,
    /// A model counts as in use for so long after it was: a process that is started anew finds it again.
    pub(super) grace: Duration,
}

/// One model in it, which stays while this is held.
#[derive(Debug)]
pub(super) struct Snapshot {
    folder: PathBuf,
    lease: File,
}

/// Another model.
struct Other {
    folder: PathBuf,
    used: u64,
    /// What it has, or will have once it is downloaded.
    claimed: u64,
    last_used: SystemTime,
}

/// What room is needed for.
pub(super) struct Wanted<'a> {
    pub(super) what: &'a str,
    /// Bytes still to be downloaded.
    pub(super) needed: u64,
    /// Bytes there are of the model then.
    pub(super) total: u64,
}

impl Cache {
    /// The folder of a model, made where it is not there.
    pub(super) async fn open(&self, folder: &str) -> Result<Snapshot, FetchError> {
        let is_plain = |part: Component<'_>| matches!(part, Component::Normal(_));
        if folder.is_empty() || !Path::new(folder).components().all(is_plain) {
            let problem = format!("{folder:?} is no folder of the cache");
            return Err(FetchError::Option { option: "--folder", problem });
        }
        let folder = self.root.join(folder);
        let model = folder.join(MODEL);
        fs::create_dir_all(&model).map_err(FetchError::io("create", &model))?;
        let path = folder.join(LEASE);
        let lease = lock_file(&path).map_err(FetchError::io("open", &path))?;
        let held = lock(&lease, Share::Shared, SHORT_WAIT, || {}).await;
        if !held.map_err(FetchError::io("lock", &path))? {
            return Err(FetchError::Busy { what: folder.display().to_string(), waited: SHORT_WAIT });
        }
        // It may have been removed before it was held.
        fs::create_dir_all(&model).map_err(FetchError::io("create", &model))?;
        let snapshot = Snapshot { folder, lease };
        snapshot.touch()?;
        Ok(snapshot)
    }

    /// Makes room for a model, and keeps it for it: by removing others, the one first that was used longest ago, unless that
    /// would not be enough.
    pub(super) async fn make_room(&self, own: &Snapshot, wanted: Wanted<'_>) -> Result<(), FetchError> {
        let path = self.root.join(LOCK);
        let file = lock_file(&path).map_err(FetchError::io("open", &path))?;
        let held = lock(&file, Share::Alone, SHORT_WAIT, || {}).await;
        if !held.map_err(FetchError::io("lock", &path))? {
            return Err(FetchError::Busy { what: self.root.display().to_string(), waited: SHORT_WAIT });
        }
        let Wanted { what, needed, total } = wanted;
        let read = |path: &Path| FetchError::io("read", path);
        let own_used = space::used(&own.model()).map_err(read(&own.model()))?;
        let mut others = Vec::new();
        find(&self.root, MAX_DEPTH, &own.folder, &mut others);
        others.sort_by_key(|other| other.last_used);
        let claimed: u64 = others.iter().map(|other| other.claimed).sum();
        let coming: u64 = others.iter().map(|other| other.claimed - other.used).sum();
        let free = space::free(&self.root).map_err(read(&self.root))?.saturating_sub(coming);
        let lacks_bound = (own_used + claimed + needed).saturating_sub(self.bound);
        let lacks_disk = needed.saturating_sub(free);

        let (mut removed, mut freed) = (Vec::new(), 0);
        for other in &others {
            if freed >= lacks_bound.max(lacks_disk) {
                break;
            }
            if let Some(lease) = self.unused(other) {
                freed += other.used;
                removed.push((other, lease));
            }
        }
        if freed < lacks_bound {
            let in_use =
                others.iter().filter(|other| removed.iter().all(|(one, _)| one.folder != other.folder));
            let advice = self.in_use(in_use);
            let used = own_used + claimed - freed;
            return Err(FetchError::CacheFull {
                what: what.to_owned(),
                needed,
                used,
                bound: self.bound,
                advice,
            });
        }
        if freed < lacks_disk {
            let (what, free) = (what.to_owned(), free + freed);
            return Err(FetchError::DiskFull { what, needed, free, cache: self.root.clone() });
        }
        for (other, lease) in removed {
            tracing::info!(model = %self.name(&other.folder), bytes = other.used, "removed to make room");
            remove(&other.folder)?;
            drop(lease);
        }
        let path = own.folder.join(RESERVED);
        fs::write(&path, total.to_string()).map_err(FetchError::io("write", &path))
    }

    /// The lease, alone, of a model that nobody uses and that has something to remove.
    fn unused(&self, other: &Other) -> Option<File> {
        let ago = SystemTime::now().duration_since(other.last_used).unwrap_or_default();
        if other.used == 0 || ago < self.grace {
            return None;
        }
        let lease = lock_file(&other.folder.join(LEASE)).ok()?;
        try_lock(&lease, Share::Alone).ok()?.then_some(lease)
    }

    fn in_use<'a>(&self, others: impl Iterator<Item = &'a Other>) -> String {
        let others: Vec<&Other> = others.filter(|other| other.claimed > 0).collect();
        if others.is_empty() {
            return "make it larger (modelCache.size of the chart)".to_owned();
        }
        let named = others.iter().take(MAX_NAMED).map(|other| self.name(&other.folder));
        let more = others.len().saturating_sub(MAX_NAMED);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        let named = named.collect::<Vec<_>>().join(", ");
        format!("make it larger (modelCache.size of the chart); in use or used just now: {named}{more}")
    }

    fn name(&self, folder: &Path) -> String {
        folder.strip_prefix(&self.root).unwrap_or(folder).display().to_string()
    }
}

impl Snapshot {
    /// Where the checkpoint's files are.
    pub(super) fn model(&self) -> PathBuf {
        self.folder.join(MODEL)
    }

    /// It was used now.
    pub(super) fn touch(&self) -> Result<(), FetchError> {
        let path = self.folder.join(LEASE);
        self.lease.set_modified(SystemTime::now()).map_err(FetchError::io("write the time of", &path))
    }

    /// Waits until nobody else downloads it; what is returned keeps them away.
    pub(super) async fn lock(&self, what: &str, wait: Duration) -> Result<File, FetchError> {
        let path = self.folder.join(LOCK);
        let file = lock_file(&path).map_err(FetchError::io("open", &path))?;
        let waits = || tracing::info!("another process of this node downloads {what}; waiting for it");
        let held = lock(&file, Share::Alone, wait, waits).await;
        if !held.map_err(FetchError::io("lock", &path))? {
            return Err(FetchError::Busy { what: what.to_owned(), waited: wait });
        }
        Ok(file)
    }

    /// What was written by [`Self::write_manifest`].
    pub(super) fn manifest(&self) -> Option<Vec<u8>> {
        fs::read(self.folder.join(MANIFEST)).ok()
    }

    /// Whole, or not at all.
    pub(super) fn write_manifest(&self, json: &[u8]) -> Result<(), FetchError> {
        let (path, fresh) = (self.folder.join(MANIFEST), self.folder.join(format!("{MANIFEST}.part")));
        fs::write(&fresh, json).map_err(FetchError::io("write", &fresh))?;
        fs::rename(&fresh, &path).map_err(FetchError::io("rename to", &path))
    }
}

/// What cannot be looked at is none of ours, or has just gone.
fn find(folder: &Path, depth: usize, own: &Path, found: &mut Vec<Other>) {
    let Some(depth) = depth.checked_sub(1) else { return };
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path == own || !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        match fs::metadata(path.join(LEASE)).and_then(|lease| lease.modified()) {
            Ok(last_used) => {
                let used = space::used(&path.join(MODEL)).unwrap_or(0);
                let claimed = if is_downloading(&path) { reserved(&path).max(used) } else { used };
                found.push(Other { folder: path, used, claimed, last_used });
            }
            Err(_) => find(&path, depth, own, found),
        }
    }
}

fn is_downloading(folder: &Path) -> bool {
    let lock = File::open(folder.join(LOCK));
    lock.is_ok_and(|lock| try_lock(&lock, Share::Alone).is_ok_and(|free| !free))
}

fn reserved(folder: &Path) -> u64 {
    fs::read_to_string(folder.join(RESERVED)).ok().and_then(|bytes| bytes.parse().ok()).unwrap_or(0)
}

/// The empty files that are locked stay: whoever waits for one of them waits for the right one.
fn remove(folder: &Path) -> Result<(), FetchError> {
    for name in [MANIFEST, RESERVED] {
        let path = folder.join(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(FetchError::io("remove", &path)(error));
            }
            _ => {}
        }
    }
    let model = folder.join(MODEL);
    fs::remove_dir_all(&model).map_err(FetchError::io("remove", &model))
}

#[cfg(test)]
mod tests;
