//! What can go wrong with a lease.

use std::time::Duration;

/// A request about a lease that failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LeaseError {
    /// Also a connection that stays silent.
    #[error("no answer to {action} of lease {name} within {within:?}")]
    Timeout { action: &'static str, name: String, within: Duration },
    /// Somebody else was first.
    #[error("lease {name} has changed meanwhile")]
    Conflict { name: String },
    /// Refused by the API server, or it was not reached.
    #[error("{action} of lease {name} failed")]
    Api { action: &'static str, name: String, source: Box<kube::Error> },
}
