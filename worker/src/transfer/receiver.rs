//! The decode side of a KV connection.

use std::sync::Arc;

use herd_engine::KvStore;
use herd_model::Dtype;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::{
    ClaimedHeader, FRAME_DEADLINE, FrameHeader, HANDSHAKE_DEADLINE, HEADER_BYTES, HELLO_BYTES, Hello,
    Landing, Reject, Reply,
};
use crate::lease::Transfers;
use crate::metrics::Metrics;

/// One rank, as KV connections see it.
#[derive(Clone, Debug)]
pub(crate) struct Receiver {
    pub(crate) rank: u16,
    /// Its number in this process.
    pub(crate) local: usize,
    pub(crate) epoch: u64,
    pub(crate) fingerprint: String,
    pub(crate) dtype: Dtype,
    pub(crate) block_tokens: usize,
    pub(crate) store: Store,
    pub(crate) transfers: Arc<Transfers>,
    pub(crate) metrics: Arc<Metrics>,
}

/// A rank's KV cache.
#[derive(Clone)]
pub(crate) struct Store(pub(crate) Arc<dyn KvStore>);

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("heads", &self.0.heads()).finish_non_exhaustive()
    }
}

enum End {
    /// The sender is done, gone or too slow.
    Closed,
    /// The transfer was given up.
    Over,
    Rejected(Reject),
}

impl From<Reject> for End {
    fn from(reject: Reject) -> Self {
        Self::Rejected(reject)
    }
}

impl From<std::io::Error> for End {
    fn from(_: std::io::Error) -> Self {
        Self::Closed
    }
}

/// Serves one connection to its end.
pub(crate) async fn receive(receiver: Receiver, mut stream: TcpStream) {
    let last = match run(&receiver, &mut stream).await {
        Ok(()) | Err(End::Closed) => return,
        Err(End::Over) => Reject::Over,
        Err(End::Rejected(reject)) => {
            receiver.metrics.frame_rejected(reject);
            tracing::warn!(rank = receiver.rank, reason = reject.reason(), "kv connection rejected");
            reject
        }
    };
    // If it does not arrive, the sender tries again in vain.
    let _ = timeout(HANDSHAKE_DEADLINE, say_last(&mut stream, last)).await;
}

/// Tells the sender whether trying again makes sense, and waits until it has closed: to close with its bytes unread would
/// reset the connection, and the reply could be lost.
async fn say_last(stream: &mut TcpStream, reject: Reject) -> std::io::Result<()> {
    stream.write_all(&Reply::Rejected(reject).encode()).await?;
    stream.shutdown().await?;
    let mut unread = vec![0; 1 << 16];
    while stream.read(&mut unread).await? > 0 {}
    Ok(())
}

async fn run(receiver: &Receiver, stream: &mut TcpStream) -> Result<(), End> {
    let mut hello = [0; HELLO_BYTES];
    timeout(HANDSHAKE_DEADLINE, stream.read_exact(&mut hello)).await.map_err(|_| End::Closed)??;
    let hello = Hello::decode(&hello)?;
    let landing = admit(receiver, &hello)?;
    stream.write_all(&Reply::Accepted(0).encode()).await?;
    tokio::select! {
        biased;
        () = landing.closed() => Err(End::Over),
        ended = frames(receiver, stream, &hello, &landing) => ended,
    }
}

async fn frames(
    receiver: &Receiver,
    stream: &mut TcpStream,
    hello: &Hello,
    landing: &Landing,
) -> Result<(), End> {
    let mut accepted = 0;
    loop {
        let mut first = [0];
        // How long the sender may be silent is the lease's business.
        if stream.read(&mut first).await? == 0 {
            return Ok(());
        }
        let frame = timeout(FRAME_DEADLINE, read_frame(receiver, stream, first[0]));
        let (header, payload) = frame.await.map_err(|_| End::Closed)??;
        fence(receiver, hello, &header)?;
        let bytes = HEADER_BYTES + payload.len();
        landing.write(receiver.local, &*receiver.store.0, &header, payload).map_err(
            |reject| match reject {
                // Closed since the frame began.
                Reject::Transfer => End::Over,
                other => End::Rejected(other),
            },
        )?;
        receiver.metrics.frame_received(bytes);
        accepted += 1;
        let reply = Reply::Accepted(accepted).encode();
        timeout(FRAME_DEADLINE, stream.write_all(&reply)).await.map_err(|_| End::Closed)??;
    }
}

fn admit(receiver: &Receiver, hello: &Hello) -> Result<Arc<Landing>, Reject> {
    let Hello { source_rank: _, target_rank, epoch, transfer, fingerprint } = hello;
    if *epoch != receiver.epoch {
        return Err(Reject::Epoch);
    }
    if *fingerprint != receiver.fingerprint {
        return Err(Reject::Fingerprint);
    }
    if *target_rank != receiver.rank {
        return Err(Reject::Rank);
    }
    receiver.transfers.landing(*transfer).filter(|landing| landing.is_open()).ok_or(Reject::Transfer)
}

fn fence(receiver: &Receiver, hello: &Hello, header: &FrameHeader) -> Result<(), Reject> {
    if header.epoch != receiver.epoch {
        return Err(Reject::Epoch);
    }
    if header.transfer != hello.transfer {
        return Err(Reject::Transfer);
    }
    if header.dtype != receiver.dtype {
        return Err(Reject::Fingerprint);
    }
    Ok(())
}

async fn read_frame(
    receiver: &Receiver,
    stream: &mut TcpStream,
    first: u8,
) -> Result<(FrameHeader, Vec<u8>), End> {
    let mut header = [0; HEADER_BYTES];
    header[0] = first;
    stream.read_exact(&mut header[1..]).await?;
    let claimed = ClaimedHeader::parse(&header, receiver.store.0.row_bytes()).map_err(Reject::from)?;
    if claimed.payload_bytes() > receiver.max_payload_bytes() {
        return Err(Reject::Bounds.into());
    }
    let mut payload = vec![0; claimed.payload_bytes()];
    stream.read_exact(&mut payload).await?;
    let header = claimed.verify(&payload).map_err(Reject::from)?;
    Ok((header, payload))
}

impl Receiver {
    /// All layers of one block of this rank.
    fn max_payload_bytes(&self) -> usize {
        2 * self.store.0.layers().len()
            * self.store.0.heads().len()
            * self.block_tokens
            * self.store.0.row_bytes()
    }
}
