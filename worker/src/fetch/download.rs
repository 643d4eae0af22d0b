//! One file: into a part file that grows, whatever happens in between, and that gets the file's name once it is whole and right.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures::StreamExt as _;
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;
use tokio::time::Instant;

use super::checksum::{Hasher, listed};
use super::error::FetchError;
use super::outline;
use super::progress::Progress;
use super::remote::{Content, Opened, Remote, RemoteFile};
use super::retry::{Retry, random};
use super::space;

/// Chunks, of some 16 KiB, that wait to be written.
const WAITING_CHUNKS: usize = 64;
const BUFFER_BYTES: usize = 1 << 20;

/// What the files of one snapshot have in common.
pub(super) struct Download<'a> {
    pub(super) remote: &'a Remote,
    pub(super) pin: &'a str,
    pub(super) folder: &'a Path,
    pub(super) progress: &'a Progress,
    pub(super) retry: Retry,
}

/// How a try ended that did not end well.
pub(super) enum Failed {
    /// The connection did: what came is kept.
    Cut(String),
    /// It is not what it should be.
    Wrong(FetchError),
    Fatal(FetchError),
}

impl From<FetchError> for Failed {
    fn from(error: FetchError) -> Self {
        Self::Fatal(error)
    }
}

/// Bytes of a file that need not come again: all of it where it is whole.
pub(super) fn already_there(folder: &Path, file: &RemoteFile) -> u64 {
    if is_there(folder, file) {
        return file.size;
    }
    let part = fs::metadata(part_of(folder, file)).map_or(0, |part| part.len());
    if part > file.size { 0 } else { part }
}

/// Whole: nothing else has its name but an outline, which says so.
pub(super) fn is_there(folder: &Path, file: &RemoteFile) -> bool {
    outline::is_there(folder, file) && !outline::mark(folder, file).exists()
}

fn part_of(folder: &Path, file: &RemoteFile) -> PathBuf {
    folder.join(format!("{}.part", file.name))
}

impl Download<'_> {
    /// Gets the file, or what is missing of it.
    pub(super) async fn file(&self, file: &RemoteFile) -> Result<(), FetchError> {
        let part = part_of(self.folder, file);
        let (mut progressed, mut tries, mut was_wrong) = (Instant::now(), 0, false);
        while !is_there(self.folder, file) {
            let before = already_there(self.folder, file);
            match self.attempt(file, &part, before).await {
                Ok(()) => {}
                Err(Failed::Fatal(error)) => return Err(error),
                Err(Failed::Wrong(error)) => {
                    self.progress.take_back(fs::metadata(&part).map_or(0, |part| part.len()));
                    let _ = fs::remove_file(&part);
                    if was_wrong {
                        return Err(error);
                    }
                    tracing::warn!("{error}; once more from its beginning");
                    was_wrong = true;
                }
                Err(Failed::Cut(problem)) => {
                    if already_there(self.folder, file) > before {
                        (progressed, tries) = (Instant::now(), 0);
                    }
                    let pause = self.retry.pause(tries, progressed.elapsed(), None, random());
                    let what = self.remote.what().to_owned();
                    let Some(pause) = pause else { return Err(FetchError::Unreachable { what, problem }) };
                    tracing::warn!(?pause, "{what}: {}: {problem}; going on", file.name);
                    tries += 1;
                    tokio::time::sleep(pause).await;
                }
            }
        }
        Ok(())
    }

    async fn attempt(&self, file: &RemoteFile, part: &Path, from: u64) -> Result<(), Failed> {
        let content = if from < file.size {
            match self.remote.open(self.pin, file, from).await? {
                Opened::Content(content) if content.from <= from => content,
                Opened::Content(Content { from: begins, .. }) => {
                    let problem =
                        format!("{} from byte {from} on was asked for, from {begins} on came", file.name);
                    return Err(FetchError::BadAnswer { what: self.remote.what().to_owned(), problem }.into());
                }
                Opened::Shorter => return Err(Failed::Wrong(self.wrong_size(file, "ends before that"))),
            }
        } else {
            Content { from, bytes: futures::stream::empty().boxed() }
        };
        self.progress.take_back(from - content.from);
        let (came, cut, sum) = self.write(file, part, content).await?;
        if let Some(problem) = cut {
            return Err(Failed::Cut(problem));
        }
        if came < file.size {
            return Err(Failed::Cut(format!("ended after {came} of {} bytes", file.size)));
        }
        if came > file.size {
            return Err(Failed::Wrong(self.wrong_size(file, "goes on after that")));
        }
        if let Some((kind, listed)) =
            listed(&file.checksum).filter(|_| self.remote.is_checksum(&file.checksum))
            && sum != listed
        {
            let (what, file, listed) = (self.remote.what().to_owned(), file.name.clone(), listed.to_owned());
            return Err(Failed::Wrong(FetchError::Checksum { what, file, kind, found: sum, listed }));
        }
        let whole = self.folder.join(&file.name);
        fs::rename(part, &whole).map_err(FetchError::io("rename to", &whole))?;
        Ok(outline::unmark(self.folder, file)?)
    }

    /// Bytes that are there then, why no more came, and the checksum of all.
    async fn write(
        &self,
        file: &RemoteFile,
        part: &Path,
        content: Content,
    ) -> Result<(u64, Option<String>, String), Failed> {
        let Content { from, mut bytes } = content;
        let (chunks, waiting) = mpsc::channel(WAITING_CHUNKS);
        let writer = {
            let (part, hasher) = (part.to_owned(), Hasher::new(&file.checksum, file.size));
            spawn_blocking(move || write_part(&part, from, hasher, waiting))
        };
        let (mut came, mut cut) = (from, None);
        while came <= file.size
            && let Some(chunk) = bytes.next().await
        {
            match chunk {
                Ok(chunk) => {
                    let length = chunk.len() as u64;
                    // It has failed, and says how below.
                    if chunks.send(chunk).await.is_err() {
                        break;
                    }
                    came += length;
                    self.progress.add(length);
                }
                Err(problem) => {
                    cut = Some(problem);
                    break;
                }
            }
        }
        drop(chunks);
        let written = writer.await.map_err(|error| FetchError::Internal(error.to_string()))?;
        match written {
            Ok(sum) => Ok((came, cut, sum)),
            Err(error)
                if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) =>
            {
                let (what, cache) = (self.remote.what().to_owned(), self.folder.to_owned());
                let needed = file.size - already_there(self.folder, file);
                Err(FetchError::DiskFull { what, needed, free: space::free(&cache).unwrap_or(0), cache }
                    .into())
            }
            Err(source) => Err(FetchError::Io { action: "write", path: part.to_owned(), source }.into()),
        }
    }

    pub(super) fn wrong_size(&self, file: &RemoteFile, problem: &str) -> FetchError {
        let problem = format!("{} is listed with {} bytes and {problem}", file.name, file.size);
        FetchError::BadAnswer { what: self.remote.what().to_owned(), problem }
    }
}

/// Appends to the first `from` bytes of a part file, which are read for their checksum; ends with the checksum of all of it.
fn write_part(
    path: &Path,
    from: u64,
    mut hasher: Hasher,
    mut chunks: mpsc::Receiver<Bytes>,
) -> io::Result<String> {
    let mut part = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
    part.set_len(from)?;
    hash_start(&mut part, from, &mut hasher)?;
    part.seek(SeekFrom::Start(from))?;
    while let Some(chunk) = chunks.blocking_recv() {
        part.write_all(&chunk)?;
        hasher.update(&chunk);
    }
    // What has its name is on the disk, also after the power fails.
    part.sync_data()?;
    Ok(hasher.finish())
}

fn hash_start(part: &mut File, bytes: u64, hasher: &mut Hasher) -> io::Result<()> {
    if matches!(hasher, Hasher::None) {
        return Ok(());
    }
    let mut start = part.take(bytes);
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        match start.read(&mut buffer)? {
            0 => return Ok(()),
            read => hasher.update(&buffer[..read]),
        }
    }
}
