//! The files that say how a model speaks: `GetBundle` for gateways, and the vocabulary for the worker itself.

use std::path::{Path, PathBuf};

use bytes::{Bytes, BytesMut};
use futures::Stream;
use futures::stream::try_unfold;
use herd_proto::internal::v1::BundleChunk;
use herd_text::{BUNDLE_FILE_NAMES, BundleFiles, Vocabulary};
use tokio::fs::File;
use tokio::io::AsyncReadExt as _;
use tonic::Status;

/// Of these, those that are there.
pub(crate) const FILES: [&str; 5] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
];

const CHUNK_BYTES: usize = 1 << 20;

/// The vocabulary of a checkpoint.
pub(crate) fn vocabulary(dir: &Path) -> Result<Vocabulary, String> {
    let mut files = BundleFiles::default();
    for name in BUNDLE_FILE_NAMES {
        match std::fs::read(dir.join(name)) {
            Ok(bytes) => files.insert(name, bytes),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(format!("cannot read {name}: {error}")),
        }
    }
    Vocabulary::from_files(&files).map_err(|error| error.to_string())
}

struct Reading {
    dir: PathBuf,
    /// Index in [`FILES`] of the one that comes next.
    next: usize,
    open: Option<File>,
}

/// The files one after another; an empty file is one empty chunk.
pub(crate) fn chunks(dir: &Path) -> impl Stream<Item = Result<BundleChunk, Status>> + Send + use<> {
    try_unfold(Reading { dir: dir.to_owned(), next: 0, open: None }, |mut reading| async {
        Ok(reading.chunk().await?.map(|chunk| (chunk, reading)))
    })
}

impl Reading {
    async fn chunk(&mut self) -> Result<Option<BundleChunk>, Status> {
        if let Some(file) = &mut self.open {
            let name = FILES[self.next - 1];
            let data = read_chunk(file).await.map_err(|error| unreadable(name, &error))?;
            if !data.is_empty() {
                return Ok(Some(BundleChunk { file: String::new(), data }));
            }
            self.open = None;
        }
        while let Some(&name) = FILES.get(self.next) {
            self.next += 1;
            let mut file = match File::open(self.dir.join(name)).await {
                Ok(file) => file,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => return Err(unreadable(name, &error)),
            };
            let data = read_chunk(&mut file).await.map_err(|error| unreadable(name, &error))?;
            self.open = Some(file);
            return Ok(Some(BundleChunk { file: name.to_owned(), data }));
        }
        Ok(None)
    }
}

/// Up to a chunk; empty at the end.
async fn read_chunk(file: &mut File) -> std::io::Result<Bytes> {
    let mut data = BytesMut::with_capacity(CHUNK_BYTES);
    let mut limited = file.take(CHUNK_BYTES as u64);
    while limited.read_buf(&mut data).await? > 0 {}
    Ok(data.freeze())
}

fn unreadable(name: &str, error: &std::io::Error) -> Status {
    Status::internal(format!("cannot read {name}: {error}"))
}

#[cfg(test)]
mod tests {
    use futures::TryStreamExt as _;

    use super::*;

    #[tokio::test]
    async fn files_come_in_chunks_with_their_names_first() {
        let dir = tempfile::tempdir().unwrap();
        let tokenizer: Vec<u8> = (0..CHUNK_BYTES + 10).map(|i| i as u8).collect();
        std::fs::write(dir.path().join("config.json"), b"{}").unwrap();
        std::fs::write(dir.path().join("tokenizer.json"), &tokenizer).unwrap();
        std::fs::write(dir.path().join("chat_template.jinja"), b"").unwrap();
        std::fs::write(dir.path().join("model.safetensors"), b"not this one").unwrap();

        let chunks: Vec<_> = chunks(dir.path()).try_collect().await.unwrap();
        let names: Vec<_> = chunks.iter().map(|chunk| chunk.file.as_str()).collect();
        assert_eq!(names, ["config.json", "tokenizer.json", "", "chat_template.jinja"]);
        assert_eq!(chunks[0].data, "{}");
        assert_eq!([&chunks[1].data[..], &chunks[2].data[..]].concat(), tokenizer);
        assert!(chunks.iter().all(|chunk| chunk.data.len() <= CHUNK_BYTES));
        assert!(chunks[3].data.is_empty());
    }
}
