//! One gang's connection: connect, describe, bundle, watch; again with backoff when any of them ends.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use herd_proto::MAX_MESSAGE_BYTES;
use herd_proto::internal::v1::worker_client::WorkerClient;
use herd_proto::internal::v1::{DescribeRequest, DescribeResponse, Role as WireRole, WatchRequest};
use herd_routing::Role;
use tokio::time::{Instant, sleep, timeout};
use tonic::transport::Endpoint;
use tracing::{info, warn};

use super::bundle::BundleError;
use super::{Fault, Shared};

const CONNECT: Duration = Duration::from_secs(5);
const DESCRIBE: Duration = Duration::from_secs(10);
const BUNDLE: Duration = Duration::from_mins(2);
/// A gang says something at least every 5 s.
const SILENCE: Duration = Duration::from_secs(15);
const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const LAST_BACKOFF: Duration = Duration::from_secs(5);
const STREAM_WINDOW: u32 = 1 << 20;

/// What a gang said about itself; constant for one epoch.
#[derive(Clone, Debug)]
pub(crate) struct Description {
    pub(crate) gang_id: String,
    pub(crate) epoch: u64,
    pub(crate) revision: String,
    pub(crate) digest: String,
    pub(crate) kv_fingerprint: String,
    /// Longest prompt and answer together: the model's context, or less where the KV cache is smaller.
    pub(crate) context_length: u32,
    pub(crate) max_sequences: u32,
    /// Tensor ranks.
    pub(crate) ranks: u32,
    pub(crate) kv_blocks: u32,
}

/// A description that cannot be used.
#[derive(Debug, thiserror::Error)]
enum DescribeError {
    #[error("it has no role")]
    NoRole,
    #[error("its {0} is empty")]
    Empty(&'static str),
}

impl Description {
    fn checked(response: DescribeResponse) -> Result<(Self, Role), DescribeError> {
        let role = role(response.role).ok_or(DescribeError::NoRole)?;
        let DescribeResponse {
            gang_id,
            epoch,
            role: _,
            revision,
            model_digest,
            kv_fingerprint,
            tensor,
            context_length,
            vocab_size: _,
            block_tokens,
            kv_blocks,
            max_sequences,
            pipeline,
        } = response;
        let context_length = context_length.min(kv_blocks.saturating_mul(block_tokens));
        for (value, name) in [(context_length, "context"), (max_sequences, "batch")] {
            if value == 0 {
                return Err(DescribeError::Empty(name));
            }
        }
        for (value, name) in [(&model_digest, "model digest"), (&kv_fingerprint, "KV fingerprint")] {
            if value.is_empty() {
                return Err(DescribeError::Empty(name));
            }
        }
        let description = Self {
            gang_id,
            epoch,
            revision,
            digest: model_digest,
            kv_fingerprint,
            context_length,
            max_sequences,
            ranks: tensor.saturating_mul(pipeline.max(1)),
            kv_blocks,
        };
        Ok((description, role))
    }
}

/// The wire's role; `None` for one this gateway does not know.
pub(crate) fn role(role: i32) -> Option<Role> {
    match WireRole::try_from(role) {
        Ok(WireRole::Unified) => Some(Role::Unified),
        Ok(WireRole::Prefill) => Some(Role::Prefill),
        Ok(WireRole::Decode) => Some(Role::Decode),
        Ok(WireRole::Unspecified) | Err(_) => None,
    }
}

/// Why a connection to a gang ended, or did not come about.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error("cannot connect: {0}")]
    Connect(#[from] tonic::transport::Error),
    #[error("{call} failed: {status}")]
    Call { call: &'static str, status: Box<tonic::Status> },
    #[error("{0} took too long")]
    Timeout(&'static str),
    #[error("its description cannot be used: {0}")]
    Describe(#[from] DescribeError),
    #[error("its bundle cannot be used: {0}")]
    Bundle(#[from] BundleError),
    #[error("it closed the connection")]
    Closed,
}

impl SessionError {
    /// Whether the same files would be refused again.
    fn is_permanent(&self) -> bool {
        matches!(self, Self::Bundle(BundleError::Text(_)))
    }
}

/// The error and what caused it, which `tonic`'s leaves out of its own words.
fn with_causes(error: &SessionError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

/// Keeps the gang's entry in the fleet true for as long as this future is polled.
pub(crate) async fn follow(shared: Arc<Shared>, leader: String) {
    let mut backoff = FIRST_BACKOFF;
    loop {
        let begun = Instant::now();
        let Err(reason) = session(&shared, &leader).await;
        let permanent = reason.is_permanent();
        let reason = with_causes(&reason);
        if shared.away(&leader, Fault { reason: reason.clone(), permanent }) {
            warn!(leader, reason, "lost a gang");
        } else {
            tracing::debug!(leader, reason, "cannot reach a gang");
        }
        // A session that held for a while was a good one: start over quickly.
        if begun.elapsed() > LAST_BACKOFF {
            backoff = FIRST_BACKOFF;
        }
        sleep(backoff).await;
        backoff = (backoff * 2).min(LAST_BACKOFF);
    }
}

async fn session(shared: &Arc<Shared>, leader: &str) -> Result<Infallible, SessionError> {
    let channel = endpoint(leader)?.connect().await?;
    let mut client = WorkerClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let described = call("Describe", DESCRIBE, client.describe(DescribeRequest {})).await?;
    let (description, role) = Description::checked(described.into_inner())?;
    let bundle = timeout(BUNDLE, shared.bundles.get(&description.digest, &client)).await;
    let text = bundle.map_err(|_| SessionError::Timeout("GetBundle"))??;
    let mut events = call("Watch", DESCRIBE, client.watch(WatchRequest {})).await?.into_inner();
    info!(leader, gang = description.gang_id, ?role, digest = description.digest, "connected to a gang");
    shared.connected(leader, description, role, text, client);
    while let Some(event) = call("Watch", SILENCE, events.message()).await? {
        shared.report(leader, &event);
    }
    Err(SessionError::Closed)
}

async fn call<T>(
    call: &'static str,
    patience: Duration,
    future: impl Future<Output = Result<T, tonic::Status>>,
) -> Result<T, SessionError> {
    match timeout(patience, future).await {
        Ok(answer) => answer.map_err(|status| SessionError::Call { call, status: Box::new(status) }),
        Err(_) => Err(SessionError::Timeout(call)),
    }
}

fn endpoint(leader: &str) -> Result<Endpoint, tonic::transport::Error> {
    Ok(Endpoint::new(format!("http://{leader}"))?
        .connect_timeout(CONNECT)
        .tcp_nodelay(true)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(4 * STREAM_WINDOW)
        .http2_keep_alive_interval(Duration::from_secs(10))
        .keep_alive_timeout(Duration::from_secs(10))
        .keep_alive_while_idle(true))
}
