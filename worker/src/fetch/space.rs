//! Room on the disk.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::{fs, io};

/// Bytes that who is not root may still write.
pub(super) fn free(folder: &Path) -> io::Result<u64> {
    let room = rustix::fs::statvfs(folder)?;
    Ok(room.f_bavail.saturating_mul(room.f_frsize))
}

/// Bytes of the files of a folder, which has no folders, without their holes; 0 where it is not there.
pub(super) fn used(folder: &Path) -> io::Result<u64> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error),
    };
    let mut bytes = 0;
    for entry in entries {
        // One that goes in between has no size.
        bytes += entry?.metadata().map_or(0, |file| file.len().min(file.blocks() * 512));
    }
    Ok(bytes)
}
