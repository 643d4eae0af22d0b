//! A listener that holds at most so many connections; more wait in the kernel's queue. Its connections can all be cut.

use std::io;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::Stream;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Sleep, sleep};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::transport::server::{Connected, TcpConnectInfo};

/// After an error such as too many open files; doubled with each in a row, which also keeps the log short.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LAST_PAUSE: Duration = Duration::from_secs(10);

/// Bytes that every HTTP/2 client begins with. From then on pings tell whether it is there.
const PREFACE_BYTES: usize = 24;

/// A listener that holds at most so many connections.
#[derive(Debug)]
pub struct Bounded {
    listener: TcpListener,
    /// For a client to say that it speaks HTTP/2; `None`: it does not have to.
    preface_timeout: Option<Duration>,
    slots: Arc<Semaphore>,
    cut: CancellationToken,
    /// Failures to accept in a row.
    failures: u32,
}

/// A connection and its slot. Once cut, it fails.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    preface: Option<Preface>,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
    _slot: Option<OwnedSemaphorePermit>,
}

/// What is yet to come of a client's first bytes, and until when.
#[derive(Debug)]
struct Preface {
    bytes: usize,
    deadline: Pin<Box<Sleep>>,
}

/// How long to wait after so many failures in a row.
fn pause(failures: u32) -> Duration {
    FIRST_PAUSE.saturating_mul(1 << failures.min(16)).min(LAST_PAUSE)
}

impl Bounded {
    /// Holds at most `limit` connections, all of which fail once `cut` is cancelled.
    pub fn new(listener: TcpListener, limit: usize, cut: CancellationToken) -> Self {
        Self { listener, preface_timeout: None, slots: Arc::new(Semaphore::new(limit)), cut, failures: 0 }
    }

    /// Of HTTP/2 connections, whose server waits for the first bytes for ever.
    #[must_use]
    pub fn with_preface_within(self, timeout: Duration) -> Self {
        Self { preface_timeout: Some(timeout), ..self }
    }

    /// The next connection. Nothing is lost if it is not awaited to the end.
    pub async fn next(&mut self) -> Connection {
        let slot = Arc::clone(&self.slots).acquire_owned().await.ok();
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    self.failures = 0;
                    // Tokens are small and must not wait for each other.
                    let _ = stream.set_nodelay(true);
                    let cut = Box::pin(self.cut.clone().cancelled_owned());
                    let preface = self
                        .preface_timeout
                        .map(|timeout| Preface { bytes: PREFACE_BYTES, deadline: Box::pin(sleep(timeout)) });
                    return Connection { stream, preface, cut, _slot: slot };
                }
                Err(error) => {
                    let pause = pause(self.failures);
                    self.failures = self.failures.saturating_add(1);
                    tracing::warn!(%error, ?pause, "failed to accept a connection");
                    tokio::time::sleep(pause).await;
                }
            }
        }
    }

    /// The connections, as `tonic` takes them.
    pub fn into_stream(self) -> impl Stream<Item = io::Result<Connection>> {
        futures::stream::unfold(self, |mut this| async move {
            let connection = this.next().await;
            Some((Ok(connection), this))
        })
    }
}

/// Sees a connection's peer close it, also while nobody reads what came before: its own view of the socket.
#[derive(Debug)]
pub struct PeerWatch(TcpStream);

impl PeerWatch {
    /// Fails if no descriptor is left.
    pub fn new(connection: &Connection) -> io::Result<Self> {
        let socket = connection.stream.as_fd().try_clone_to_owned()?;
        TcpStream::from_std(std::net::TcpStream::from(socket)).map(Self)
    }

    /// Waits until the peer sends nothing any more, or the connection is lost.
    pub async fn closed(&self) {
        // Readiness rises anew with everything that arrives; what there is to read is not ours.
        while let Ok(ready) = self.0.ready(Interest::READABLE).await {
            if ready.is_read_closed() {
                return;
            }
            let nothing = || Err::<(), _>(io::ErrorKind::WouldBlock.into());
            let _ = self.0.try_io(Interest::READABLE, nothing);
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.stream.connect_info()
    }
}

impl Connection {
    /// Registers `cx` for the cut.
    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.cut.as_mut().poll(cx) {
            Poll::Ready(()) => Err(io::Error::new(io::ErrorKind::ConnectionAborted, "cut at shutdown")),
            Poll::Pending => Ok(()),
        }
    }

    /// Registers `cx` for the end of the time for the preface, while it is not whole.
    fn check_preface(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let Some(Preface { bytes: _, deadline }) = &mut self.preface else { return Ok(()) };
        match deadline.as_mut().poll(cx) {
            Poll::Ready(()) => Err(io::Error::new(io::ErrorKind::TimedOut, "no HTTP/2 preface in time")),
            Poll::Pending => Ok(()),
        }
    }

    fn have_read(&mut self, bytes: usize) {
        self.preface = self.preface.take().and_then(|Preface { bytes: left, deadline }| {
            left.checked_sub(bytes).filter(|left| *left > 0).map(|bytes| Preface { bytes, deadline })
        });
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(cx)?;
        self.check_preface(cx)?;
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        self.have_read(buf.filled().len() - before);
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::time::timeout;

    use super::*;

    /// Longer than any test takes on a busy machine.
    const PATIENCE: Duration = Duration::from_mins(1);

    async fn bounded(limit: usize) -> (Bounded, std::net::SocketAddr, CancellationToken) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, cut) = (listener.local_addr().unwrap(), CancellationToken::new());
        (Bounded::new(listener, limit, cut.clone()), address, cut)
    }

    #[tokio::test]
    async fn one_connection_more_waits_for_a_slot() {
        let (mut bounded, address, _cut) = bounded(1).await;
        let (_first, _second) =
            (TcpStream::connect(address).await.unwrap(), TcpStream::connect(address).await.unwrap());
        let first = timeout(PATIENCE, bounded.next()).await.unwrap();
        assert!(futures::FutureExt::now_or_never(bounded.next()).is_none());
        drop(first);
        timeout(PATIENCE, bounded.next()).await.unwrap();
    }

    #[tokio::test]
    async fn who_does_not_say_in_time_that_it_speaks_http2_is_left() {
        let (bounded, address, _cut) = bounded(8).await;
        let mut bounded = bounded.with_preface_within(Duration::from_millis(20));
        let mut slow = TcpStream::connect(address).await.unwrap();
        slow.write_all(b"PRI * HTTP/2.0").await.unwrap();
        let mut connection = timeout(PATIENCE, bounded.next()).await.unwrap();
        let mut bytes = Vec::new();
        let ended = timeout(PATIENCE, connection.read_to_end(&mut bytes)).await.unwrap();
        assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::TimedOut);
        // Once it has said so it may be silent.
        let mut whole = TcpStream::connect(address).await.unwrap();
        whole.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        let mut connection = timeout(PATIENCE, bounded.next()).await.unwrap();
        connection.read_exact(&mut [0; PREFACE_BYTES]).await.unwrap();
        assert!(connection.preface.is_none());
    }

    #[tokio::test]
    async fn a_cut_ends_every_connection() {
        let (mut bounded, address, cut) = bounded(8).await;
        let _silent = TcpStream::connect(address).await.unwrap();
        let mut connection = timeout(PATIENCE, bounded.next()).await.unwrap();
        cut.cancel();
        let ended = timeout(PATIENCE, connection.read_u8()).await.unwrap();
        assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
    }

    #[test]
    fn failures_to_accept_are_tried_again_more_and_more_slowly() {
        assert_eq!(pause(0), FIRST_PAUSE);
        assert_eq!(pause(3), 8 * FIRST_PAUSE);
        assert_eq!(pause(u32::MAX), LAST_PAUSE);
    }
}
