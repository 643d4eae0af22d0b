//! Weight files of which a rank needs no weight: what they begin with, which says what they hold, and a hole for the rest. The
//! model digest takes no more of a large file, and a checkpoint opens with all of its files there.
//!
//! An outline has the name and the size of the whole file. Beside it lies an empty `NAME.outline`, from before it is there until
//! the whole file has taken its place.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use futures::StreamExt as _;
use tokio::time::Instant;

use super::download::{Download, Failed};
use super::error::FetchError;
use super::remote::{Opened, RemoteFile};
use super::retry::random;

/// Of a safetensors file: the length of its JSON.
const LENGTH_BYTES: usize = 8;
/// What the format allows.
const MAX_JSON_BYTES: u64 = 100_000_000;

/// Whole, or in outline.
pub(super) fn is_there(folder: &Path, file: &RemoteFile) -> bool {
    fs::metadata(folder.join(&file.name)).is_ok_and(|there| there.len() == file.size)
}

/// What lies beside an outline.
pub(super) fn mark(folder: &Path, file: &RemoteFile) -> PathBuf {
    folder.join(format!("{}.outline", file.name))
}

/// The file is whole from now on.
pub(super) fn unmark(folder: &Path, file: &RemoteFile) -> Result<(), FetchError> {
    let mark = mark(folder, file);
    match fs::remove_file(&mark) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(FetchError::io("remove", &mark)(error))
        }
        _ => Ok(()),
    }
}

/// Makes an outline of what a file begins with.
fn write(folder: &Path, file: &RemoteFile, beginning: &[u8]) -> Result<(), FetchError> {
    let mark = mark(folder, file);
    File::create(&mark).map_err(FetchError::io("create", &mark))?;
    let part = folder.join(format!("{}.outline.part", file.name));
    let written = File::create(&part).and_then(|mut outline| {
        outline.write_all(beginning)?;
        outline.set_len(file.size)?;
        outline.sync_all()
    });
    written.map_err(FetchError::io("write", &part))?;
    let whole = folder.join(&file.name);
    fs::rename(&part, &whole).map_err(FetchError::io("rename to", &whole))
}

impl Download<'_> {
    /// Gets what the file begins with.
    pub(super) async fn outline(&self, file: &RemoteFile) -> Result<(), FetchError> {
        let (began, mut tries) = (Instant::now(), 0);
        while !is_there(self.folder, file) {
            match self.beginning(file).await {
                Ok(beginning) => write(self.folder, file, &beginning)?,
                Err(Failed::Wrong(error) | Failed::Fatal(error)) => return Err(error),
                Err(Failed::Cut(problem)) => {
                    let what = self.remote.what().to_owned();
                    let pause = self.retry.pause(tries, began.elapsed(), None, random());
                    let Some(pause) = pause else { return Err(FetchError::Unreachable { what, problem }) };
                    tracing::warn!(?pause, "{what}: {}: {problem}; once more", file.name);
                    tries += 1;
                    tokio::time::sleep(pause).await;
                }
            }
        }
        Ok(())
    }

    /// The length of the JSON, and the JSON.
    async fn beginning(&self, file: &RemoteFile) -> Result<Vec<u8>, Failed> {
        let content = match self.remote.open(self.pin, file, 0).await? {
            Opened::Content(content) => content,
            Opened::Shorter => return Err(Failed::Wrong(self.wrong_size(file, "ends before that"))),
        };
        let (mut bytes, mut beginning) = (content.bytes, Vec::new());
        loop {
            let needed = match beginning.first_chunk::<LENGTH_BYTES>() {
                None => LENGTH_BYTES,
                Some(length) => match u64::from_le_bytes(*length) {
                    json if json <= MAX_JSON_BYTES.min(file.size.saturating_sub(LENGTH_BYTES as u64)) => {
                        LENGTH_BYTES + json as usize
                    }
                    json => {
                        let problem = format!("{} begins with {json}, the length of no header", file.name);
                        let what = self.remote.what().to_owned();
                        return Err(Failed::Wrong(FetchError::BadAnswer { what, problem }));
                    }
                },
            };
            if beginning.len() >= needed {
                beginning.truncate(needed);
                return Ok(beginning);
            }
            match bytes.next().await {
                Some(Ok(chunk)) => beginning.extend_from_slice(&chunk),
                Some(Err(problem)) => return Err(Failed::Cut(problem)),
                None => return Err(Failed::Cut(format!("ended after {} bytes", beginning.len()))),
            }
        }
    }
}
