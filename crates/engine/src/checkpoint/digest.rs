//! One file's part of the model digest.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use herd_model::{FileDigest, LARGE_FILE_BYTES};
use sha2::{Digest as _, Sha256};

use super::CheckpointError;
use super::header::header_length;

pub(super) fn file_digest(path: &Path) -> Result<FileDigest, CheckpointError> {
    let io = |source| CheckpointError::Io { path: path.to_owned(), source };
    let file = File::open(path).map_err(io)?;
    let size = file.metadata().map_err(io)?.len();
    let is_weights = path.extension().is_some_and(|end| end == "safetensors");
    let hashed = if is_weights && size >= LARGE_FILE_BYTES {
        // Eight bytes of length and the JSON; where there is no header, the whole file.
        header_length(&file, size).map_err(io)?.map_or(size, |json| 8 + json)
    } else {
        size
    };
    let mut hasher = Sha256::new();
    let mut rest = file.take(hashed);
    let mut buffer = vec![0; 1 << 16];
    loop {
        match rest.read(&mut buffer).map_err(io)? {
            0 => break,
            read => hasher.update(&buffer[..read]),
        }
    }
    let path = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    Ok(FileDigest { path, size, sha256: hasher.finalize().into() })
}
