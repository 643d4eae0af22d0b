//! What keeps a worker from serving.

use std::net::SocketAddr;

use herd_engine::{CheckpointError, CudaError, LoadError};
use herd_model::{ConfigError, ShardError};

/// A worker that cannot start, or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The checkpoint cannot be served.
    #[error(transparent)]
    Model(LoadError),
    /// Its configuration cannot be served.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The tensor degree does not split the model.
    #[error(transparent)]
    Parallelism(#[from] ShardError),
    /// Options that contradict each other.
    #[error("{option}: {problem}")]
    Option {
        /// As on the command line.
        option: &'static str,
        /// What is wrong and what to give instead.
        problem: String,
    },
    /// Nothing to compute on.
    #[error(
        "the cuda backend has no device: {0}; give the pod one (accelerator.kind: GPU), or compute on the CPU \
         (accelerator.kind: CPU)"
    )]
    NoDevice(#[from] CudaError),
    /// Devices, and nothing that computes on them.
    #[error(
        "the cuda backend is not in this version, which computes on CPUs alone (accelerator.kind: CPU); found {devices}"
    )]
    BackendNotSupported {
        /// What the driver reports.
        devices: String,
    },
    /// A port that cannot be listened on.
    #[error("cannot listen on {address} for {purpose}: {source}")]
    Listen {
        /// Asked for.
        address: SocketAddr,
        /// `gRPC`, `HTTP` or `KV`.
        purpose: &'static str,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// The leader of the gang has something else loaded.
    #[error("the leader {leader} does not take this process: {reason}")]
    Refused {
        /// "host:port".
        leader: String,
        /// What differs.
        reason: String,
    },
    /// The engine's epoch is over.
    #[error("the engine has stopped: {0}")]
    EngineStopped(String),
    /// A task of the worker itself ended.
    #[error("internal: {0}")]
    Internal(String),
}

impl WorkerError {
    /// A constant word for conditions and events.
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Model(_) => "ModelLoadFailed",
            Self::Config(_) => "ModelNotSupported",
            Self::Parallelism(_) => "ImpossibleParallelism",
            Self::Option { .. } => "InvalidOption",
            Self::NoDevice(_) => "NoDevice",
            Self::BackendNotSupported { .. } => "BackendNotSupported",
            Self::Listen { .. } => "PortUnavailable",
            Self::Refused { .. } => "GangMismatch",
            Self::EngineStopped(_) => "EngineStopped",
            Self::Internal(_) => "InternalError",
        }
    }
}

impl From<herd_metrics::PageError> for WorkerError {
    fn from(error: herd_metrics::PageError) -> Self {
        Self::Internal(error.to_string())
    }
}

impl From<LoadError> for WorkerError {
    fn from(error: LoadError) -> Self {
        match error {
            LoadError::Shard(error) => Self::Parallelism(error),
            LoadError::Checkpoint(CheckpointError::Config(error)) => Self::Config(error),
            LoadError::Checkpoint(_)
            | LoadError::Option { .. }
            | LoadError::Thread { .. }
            | LoadError::RankEnded { .. } => Self::Model(error),
        }
    }
}
