//! Why a model is not there.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use herd_model::{FilesError, SourceError};

use super::progress::size;

/// A model that could not be downloaded.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// Not what a source looks like, or one that is not downloaded.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// An option that makes no sense.
    #[error("{option}: {problem}")]
    Option {
        /// As on the command line, or the variable.
        option: &'static str,
        /// What is wrong and what to give instead.
        problem: String,
    },
    /// Who asks is not known.
    #[error("{what} asks who we are: {advice}")]
    Unauthorized {
        /// The source.
        what: String,
        /// What to do about it.
        advice: String,
    },
    /// Who asks is known and may not have it.
    #[error("{what} is not for us: {advice}")]
    Forbidden {
        /// The source.
        what: String,
        /// What to do about it.
        advice: String,
    },
    /// Nothing of that name.
    #[error("{what} is not there: {advice}")]
    NotFound {
        /// The source.
        what: String,
        /// What to do about it.
        advice: String,
    },
    /// Too many requests, and a pause that is too long to wait for here.
    #[error(
        "{what} is asked too often and wants a pause of {asked:?}, longer than the {limit:?} that are waited for"
    )]
    RateLimited {
        /// The source.
        what: String,
        /// By the server.
        asked: Duration,
        /// What is left to wait.
        limit: Duration,
    },
    /// No answer, or none that says anything, for as long as it was tried.
    #[error("{what} cannot be reached: {problem}")]
    Unreachable {
        /// The source.
        what: String,
        /// The last try.
        problem: String,
    },
    /// An answer that is none.
    #[error("{what} answers what makes no sense: {problem}")]
    BadAnswer {
        /// The source.
        what: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Other files than when the revision was made.
    #[error(
        "{what} has changed since this revision was made: {problem}; a new revision takes it as it is now"
    )]
    Changed {
        /// The source.
        what: String,
        /// Names what changed.
        problem: String,
    },
    /// Not the bytes that the source lists.
    #[error("{what}: {file} has the {kind} {found} where the source lists {listed}, twice in a row")]
    Checksum {
        /// The source.
        what: String,
        /// Which of its files.
        file: String,
        /// `SHA-256` and the like.
        kind: &'static str,
        /// Of what came.
        found: String,
        /// Of what should have come.
        listed: String,
    },
    /// Files that make no checkpoint.
    #[error("{what}: {problem}")]
    Files {
        /// The source.
        what: String,
        /// What is missing.
        problem: FilesError,
    },
    /// The model does not fit into what the cache may have.
    #[error(
        "{what} needs {} more, of which the model cache ({} of {}) has {}: {advice}",
        size(*.needed), size(*.used), size(*.bound), size(.bound.saturating_sub(*.used))
    )]
    CacheFull {
        /// The source.
        what: String,
        /// Bytes still to be downloaded.
        needed: u64,
        /// Bytes of models that cannot be removed, and of this one so far.
        used: u64,
        /// Bytes of all models.
        bound: u64,
        /// Names what is in use.
        advice: String,
    },
    /// The disk has no room.
    #[error("{what} needs {} more, and the disk of {} has {} free", size(*.needed), .cache.display(), size(*.free))]
    DiskFull {
        /// The source.
        what: String,
        /// Bytes still to be downloaded.
        needed: u64,
        /// Bytes free.
        free: u64,
        /// The cache.
        cache: PathBuf,
    },
    /// A file that cannot be written or read.
    #[error("failed to {action} {}: {source}{}", path.display(), hint(source))]
    Io {
        /// "write" and the like.
        action: &'static str,
        /// Which.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
    /// Another process downloads the same model, for longer than was waited for.
    #[error("another process of this node still downloads {what} after {waited:?}")]
    Busy {
        /// The source.
        what: String,
        /// For so long.
        waited: Duration,
    },
    /// Told to end.
    #[error("told to end; what is there is kept, and the next try goes on from it")]
    Stopped,
    /// A part of this process ended.
    #[error("internal: {0}")]
    Internal(String),
}

fn hint(error: &io::Error) -> &'static str {
    if error.kind() == io::ErrorKind::PermissionDenied {
        " (the chart's DaemonSet herd-model-cache makes the folder of a node one that pods may write to)"
    } else {
        ""
    }
}

impl FetchError {
    pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }

    /// A constant word for conditions and events.
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Source(_) => "SourceInvalid",
            Self::Option { .. } => "InvalidOption",
            Self::Unauthorized { .. } => "SourceUnauthorized",
            Self::Forbidden { .. } => "SourceForbidden",
            Self::NotFound { .. } => "SourceNotFound",
            Self::RateLimited { .. } => "SourceRateLimited",
            Self::Unreachable { .. } => "SourceUnreachable",
            Self::BadAnswer { .. } => "SourceBroken",
            Self::Changed { .. } => "SourceChanged",
            Self::Checksum { .. } => "ChecksumMismatch",
            Self::Files { .. } => "ModelFilesMissing",
            Self::CacheFull { .. } => "ModelCacheFull",
            Self::DiskFull { .. } => "DiskFull",
            Self::Io { .. } => "ModelCacheFailed",
            Self::Busy { .. } => "ModelCacheBusy",
            Self::Stopped => "Stopped",
            Self::Internal(_) => "InternalError",
        }
    }
}
