//! Why a pass over an object did not end.

use std::time::Duration;

use herd_control::revision::RevisionError;

/// One pass over one object.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReconcileError {
    #[error("failed to {action} {kind} {name}: {source}")]
    Api { action: &'static str, kind: &'static str, name: String, source: Box<kube::Error> },
    #[error("{kind} {name} is there already and is not this object's: rename one of them")]
    Foreign { kind: &'static str, name: String },
    #[error("{kind} {name} cannot be read: {reason}")]
    Invalid { kind: &'static str, name: String, reason: String },
    #[error(transparent)]
    Revision(#[from] RevisionError),
    #[error("revision {name}: {source}")]
    Source { name: String, source: herd_api::SourceError },
    #[error("failed to write revision {name}: {source}")]
    Encode { name: String, source: serde_json::Error },
    #[error("took more than {0:?}")]
    Deadline(Duration),
    /// The status says it.
    #[error(transparent)]
    Told(Box<ReconcileError>),
}

impl ReconcileError {
    /// What the API server says of an object that it does not take; `None` where it may take it if it is asked again at once.
    pub(crate) fn refusal(&self) -> Option<&str> {
        let Self::Api { source, .. } = self else { return None };
        let kube::Error::Api(status) = source.as_ref() else { return None };
        let passes = matches!(status.code, 409 | 429 | 503 | 504);
        let said = if status.message.is_empty() { &status.reason } else { &status.message };
        (!passes).then_some(said)
    }

    /// The bounded label of metrics.
    pub(crate) fn category(&self) -> &'static str {
        match self {
            Self::Api { source, .. } => match source.as_ref() {
                kube::Error::Api(status) if status.is_conflict() => "conflict",
                kube::Error::Api(status) if status.is_forbidden() => "forbidden",
                kube::Error::Api(status) if status.is_invalid() => "invalid",
                kube::Error::Api(_) => "api",
                _ => "connection",
            },
            Self::Foreign { .. } => "foreign",
            Self::Invalid { .. } => "unreadable",
            Self::Revision(_) | Self::Source { .. } | Self::Encode { .. } => "revision",
            Self::Deadline(_) => "deadline",
            Self::Told(error) => error.category(),
        }
    }
}
