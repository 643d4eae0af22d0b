use std::io;
use std::path::{Path, PathBuf};

use crate::CheckpointError;

/// Why a conversion failed. Whatever the reason, no output is left behind.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConvertError {
    /// A file or directory could not be read or written.
    #[error("{action} {}: {cause}", path.display())]
    Io {
        /// What was being done: "read", "create" ...
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's answer; it is part of the message, so it is no `source`.
        cause: io::Error,
    },
    /// The output does not fit on its file system.
    #[error("disk full: {action} {}: the unfinished output was removed; free some space and run it again", path.display())]
    DiskFull {
        /// What was being done.
        action: &'static str,
        /// The file being written.
        path: PathBuf,
    },
    /// The input is broken, or is something that the conversion does not know.
    #[error("{}: {what}", file.display())]
    Input {
        /// The input file.
        file: PathBuf,
        /// The key or tensor, and what is wrong with it.
        what: String,
    },
    /// The checkpoint to convert is broken.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The output directory cannot be used.
    #[error("{}: {what}", path.display())]
    Output {
        /// The output directory.
        path: PathBuf,
        /// Why not, and what to do.
        what: String,
    },
    /// An option does not fit the model.
    #[error("{option}: {what}")]
    Option {
        /// The option as the user writes it.
        option: &'static str,
        /// What is wrong with its value.
        what: String,
    },
}

impl ConvertError {
    pub(super) fn input(file: &Path, what: impl Into<String>) -> Self {
        Self::Input { file: file.to_owned(), what: what.into() }
    }

    pub(super) fn output(path: &Path, what: impl Into<String>) -> Self {
        Self::Output { path: path.to_owned(), what: what.into() }
    }

    /// For `map_err`: an IO error with what was being done on what.
    pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |cause| match cause.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull { action, path },
            _ => Self::Io { action, path, cause },
        }
    }
}
