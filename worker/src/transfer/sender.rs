//! The prefill side of a KV connection.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Buf;
use herd_engine::{KvError, KvStore};
use herd_model::Dtype;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedReadHalf;
use tokio::sync::watch;
use tokio::time::timeout;

use super::{
    FIRST_BACKOFF, FRAME_DEADLINE, FrameHeader, HANDSHAKE_DEADLINE, HEADER_BYTES, Hello, MAX_CONNECTIONS,
    REPLY_BYTES, Reject, Reply, WINDOW,
};
use crate::metrics::Metrics;
use crate::net::connect_rank;

/// One transfer, as all its routes see it.
#[derive(Debug)]
pub(crate) struct Outgoing {
    pub(crate) transfer: u64,
    /// Of the receiving gang.
    pub(crate) epoch: u64,
    pub(crate) fingerprint: String,
    pub(crate) dtype: Dtype,
    pub(crate) block_tokens: usize,
    pub(crate) prompt_tokens: usize,
    /// The sequence's own.
    pub(crate) blocks: Arc<[u32]>,
}

/// From one rank to one rank of the other gang.
#[derive(Clone, Debug)]
pub(crate) struct Route {
    pub(crate) endpoint: String,
    pub(crate) source_rank: u16,
    pub(crate) target_rank: u16,
    /// Absolute.
    pub(crate) layers: Range<usize>,
    /// Absolute.
    pub(crate) heads: Range<usize>,
}

/// Prompt tokens whose KV is computed.
pub(crate) type Progress = watch::Receiver<usize>;

/// A route that could not be served to its end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SendError {
    #[error("kv to rank {rank} at {endpoint}: {source}, after {MAX_CONNECTIONS} connections")]
    Broken { rank: u16, endpoint: String, source: ConnectionError },
    #[error("kv to rank {rank} at {endpoint}: {source}")]
    Final { rank: u16, endpoint: String, source: ConnectionError },
}

/// What ends one connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectionError {
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("no progress within {0:?}")]
    Deadline(Duration),
    #[error("closed by the other side")]
    Closed,
    #[error("a damaged reply")]
    BadReply,
    #[error("the other side gave the transfer up")]
    Over,
    #[error("rejected, reason {}", .0.reason())]
    Rejected(Reject),
    #[error("cannot read block: {0}")]
    Read(#[from] KvError),
    #[error("the fingerprint is too long to send")]
    Fingerprint,
    #[error("the prompt ended early")]
    Abandoned,
}

impl ConnectionError {
    /// Whether another connection could do better.
    fn is_transient(&self) -> bool {
        match self {
            Self::Io(_) | Self::Deadline(_) | Self::Closed | Self::BadReply => true,
            Self::Rejected(reject) => reject.is_damage(),
            Self::Over | Self::Read(_) | Self::Fingerprint | Self::Abandoned => false,
        }
    }
}

impl Outgoing {
    /// Of a route that carries this many layers.
    fn frames(&self, layers: usize) -> u64 {
        (self.prompt_tokens.div_ceil(self.block_tokens) * layers) as u64
    }

    /// Frames whose blocks are complete: full, or the last one of a prompt that is computed to its end.
    fn ready(&self, layers: usize, computed: usize) -> u64 {
        if computed >= self.prompt_tokens {
            self.frames(layers)
        } else {
            (computed / self.block_tokens * layers) as u64
        }
    }

    /// Block within the sequence, layer, rows.
    fn frame(&self, layers: &Range<usize>, number: u64) -> (usize, usize, usize) {
        let number = number as usize;
        let (block, layer) = (number / layers.len(), layers.start + number % layers.len());
        let rows = self.prompt_tokens.saturating_sub(block * self.block_tokens).min(self.block_tokens);
        (block, layer, rows)
    }
}

/// Sends what the route carries, as fast as the prompt is computed, until all of it is acknowledged.
pub(crate) async fn send(
    route: Route,
    outgoing: &Outgoing,
    store: &dyn KvStore,
    mut progress: Progress,
    metrics: &Metrics,
) -> Result<(), SendError> {
    let mut acknowledged = 0;
    let mut backoff = FIRST_BACKOFF;
    for attempt in 1.. {
        let connection = connection(&route, outgoing, store, &mut progress, metrics, &mut acknowledged);
        let Err(source) = connection.await else { break };
        let (rank, endpoint) = (route.target_rank, route.endpoint.clone());
        if !source.is_transient() {
            return Err(SendError::Final { rank, endpoint, source });
        }
        if attempt == MAX_CONNECTIONS {
            return Err(SendError::Broken { rank, endpoint, source });
        }
        tracing::warn!(rank, endpoint, error = %source, attempt, acknowledged, "kv connection broke; opening another");
        metrics.kv_reconnected();
        tokio::time::sleep(backoff).await;
        backoff *= 2;
    }
    Ok(())
}

async fn connection(
    route: &Route,
    outgoing: &Outgoing,
    store: &dyn KvStore,
    progress: &mut Progress,
    metrics: &Metrics,
    acknowledged: &mut u64,
) -> Result<(), ConnectionError> {
    let hello = Hello {
        source_rank: route.source_rank,
        target_rank: route.target_rank,
        epoch: outgoing.epoch,
        transfer: outgoing.transfer,
        fingerprint: outgoing.fingerprint.clone(),
    };
    let hello = hello.encode().ok_or(ConnectionError::Fingerprint)?;
    let stream: TcpStream = connect_rank(&route.endpoint).await?;
    let (read, mut write) = stream.into_split();
    let mut replies = Replies { read, buffer: [0; REPLY_BYTES], filled: 0 };
    within(HANDSHAKE_DEADLINE, write.write_all(&hello)).await??;
    within(HANDSHAKE_DEADLINE, replies.next()).await??;

    let before = *acknowledged;
    let mut sent = before;
    let layers = route.layers.len();
    let frames = outgoing.frames(layers);
    while *acknowledged < frames {
        let ready = outgoing.ready(layers, *progress.borrow_and_update());
        if sent < ready && sent - *acknowledged < WINDOW {
            let (header, payload) = read_frame(route, outgoing, store, sent)?;
            let mut bytes = Buf::chain(&header[..], &payload[..]);
            within(FRAME_DEADLINE, write.write_all_buf(&mut bytes)).await??;
            metrics.frame_sent(header.len() + payload.len());
            sent += 1;
            continue;
        }
        let outstanding = sent > *acknowledged;
        tokio::select! {
            reply = replies.next() => {
                let accepted = before.saturating_add(reply?);
                if accepted <= *acknowledged || accepted > sent {
                    return Err(ConnectionError::BadReply);
                }
                *acknowledged = accepted;
            }
            () = tokio::time::sleep(FRAME_DEADLINE), if outstanding => {
                return Err(ConnectionError::Deadline(FRAME_DEADLINE));
            }
            changed = progress.changed(), if sent == ready && ready < frames => {
                changed.map_err(|_| ConnectionError::Abandoned)?;
            }
        }
    }
    Ok(())
}

/// A frame's header, as it goes on the wire, and its payload.
fn read_frame(
    route: &Route,
    outgoing: &Outgoing,
    store: &dyn KvStore,
    number: u64,
) -> Result<([u8; HEADER_BYTES], Vec<u8>), KvError> {
    let (block, layer, rows) = outgoing.frame(&route.layers, number);
    let source = outgoing.blocks.get(block).copied().unwrap_or(u32::MAX);
    let payload = store.read(source, layer, route.heads.clone(), rows)?.bytes;
    let header = FrameHeader {
        transfer: outgoing.transfer,
        epoch: outgoing.epoch,
        dtype: outgoing.dtype,
        layers: layer as u16..layer as u16 + 1,
        heads: route.heads.start as u16..route.heads.end as u16,
        block: block as u32,
        rows: rows as u16,
    };
    Ok((header.encode(&payload), payload))
}

async fn within<T>(deadline: Duration, future: impl Future<Output = T>) -> Result<T, ConnectionError> {
    timeout(deadline, future).await.map_err(|_| ConnectionError::Deadline(deadline))
}

struct Replies {
    read: OwnedReadHalf,
    buffer: [u8; REPLY_BYTES],
    filled: usize,
}

impl Replies {
    /// Frames accepted on this connection. Safe to cancel.
    async fn next(&mut self) -> Result<u64, ConnectionError> {
        while self.filled < REPLY_BYTES {
            match self.read.read(&mut self.buffer[self.filled..]).await? {
                0 => return Err(ConnectionError::Closed),
                more => self.filled += more,
            }
        }
        self.filled = 0;
        match Reply::decode(&self.buffer) {
            Some(Reply::Accepted(accepted)) => Ok(accepted),
            Some(Reply::Rejected(Reject::Over)) => Err(ConnectionError::Over),
            Some(Reply::Rejected(reject)) => Err(ConnectionError::Rejected(reject)),
            None => Err(ConnectionError::BadReply),
        }
    }
}

#[cfg(test)]
mod tests {
    use herd_engine::{Executor as _, FakeModel, FakeOptions};
    use tokio::net::TcpListener;

    use super::super::HELLO_BYTES;
    use super::*;
    use crate::metrics::MetricOptions;

    #[tokio::test]
    async fn a_transfer_that_is_over_is_not_tried_again() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let route = Route {
            endpoint: listener.local_addr().unwrap().to_string(),
            source_rank: 0,
            target_rank: 0,
            layers: 0..1,
            heads: 0..1,
        };
        let outgoing = Outgoing {
            transfer: 1,
            epoch: 2,
            fingerprint: "kv1:test".to_owned(),
            dtype: Dtype::F32,
            block_tokens: 64,
            prompt_tokens: 64,
            blocks: Arc::from([0]),
        };
        let store = Arc::clone(&FakeModel::new(FakeOptions::default()).kv()[0]);
        let (_computed, progress) = watch::channel(0);
        let metrics = Metrics::new(MetricOptions::default()).unwrap();
        let receiver = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.read_exact(&mut [0; HELLO_BYTES]).await.unwrap();
            stream.write_all(&Reply::Accepted(0).encode()).await.unwrap();
            stream.write_all(&Reply::Rejected(Reject::Over).encode()).await.unwrap();
            stream
        };
        let sent = async {
            tokio::select! {
                sent = send(route, &outgoing, &*store, progress, &metrics) => sent.map_err(|error| error.to_string()),
                _ = async { (receiver.await, listener.accept().await) } => panic!("tried again"),
            }
        };
        let error = timeout(Duration::from_secs(25), sent).await.unwrap().unwrap_err();
        assert!(error.contains("gave the transfer up"), "{error}");
        assert!(metrics.render(None, 0).unwrap().contains("herd_kv_reconnects_total 0"));
    }
}
