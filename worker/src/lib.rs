//! The process in a model pod: gRPC over an engine, KV transfer from rank to rank, drain.
//!
//! A [`Worker`] serves `herd.internal.v1.Worker` for one gang. It knows token ids, and of text only
//! what a grammar asks; engine and KV cache come from
//! [`herd_engine`], what is sent where from [`herd_model`]. Every request is a task owned by its response stream: a client
//! that goes away drops the stream, and with it the sequence, the reservation, the lease and the call to the other gang.

mod backend;
mod bundle;
mod deadline;
mod decode;
mod drafts;
mod drain;
mod error;
pub mod fetch;
mod gang;
mod grammars;
mod http;
mod identity;
mod lease;
mod metrics;
mod net;
mod options;
mod prefill;
mod ranks;
mod refusal;
mod request;
mod service;
mod signals;
mod stream;
mod termination;
pub mod transfer;
mod watch;
mod worker;

pub use drafts::{DEFAULT_DRAFT_TOKENS, DraftSource, Drafts};
pub use error::WorkerError;
pub use herd_proto::internal::v1::Role;
pub use metrics::MetricOptions;
pub use options::{
    Backend, CpuBackend, DEFAULT_BLOCKS_DEADLINE, DEFAULT_DRAIN_DEADLINE, DEFAULT_LEASE, FakeBackend,
    GangPart, KvSize, WorkerLimits, WorkerOptions,
};
pub use ranks::Follower;
pub use refusal::RETRY_AFTER;
pub use signals::StopSignals;
pub use termination::TerminationMessage;
pub use worker::Worker;
