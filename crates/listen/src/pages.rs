//! HTTP/1.1 for probes and scrapes: connections are few, short-lived, and cannot keep a process from ending.

use std::collections::VecDeque;
use std::pin::pin;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1::Builder;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

/// Bounds of the server.
#[derive(Clone, Copy, Debug)]
pub struct PageLimits {
    /// One more takes the place of the oldest: if they waited instead, whoever holds this many could keep kubelet's probes out
    /// until it ends the process.
    pub connections: usize,
    /// For the head of a request, from when its connection could have sent it: so idle connections are closed after it too.
    pub header_timeout: Duration,
    /// Of a connection. One that is at work then gets `grace` to end.
    pub lifetime: Duration,
    /// For connections to end at shutdown.
    pub grace: Duration,
    /// After an `accept` that failed, mostly for want of file descriptors: trying again at once would fail as well.
    pub accept_pause: Duration,
}

impl Default for PageLimits {
    fn default() -> Self {
        Self {
            connections: 64,
            header_timeout: Duration::from_secs(10),
            lifetime: Duration::from_mins(5),
            grace: Duration::from_secs(2),
            accept_pause: Duration::from_millis(100),
        }
    }
}

/// Serves until told to shut down and the connections have ended, which they do within [`PageLimits::grace`].
pub async fn serve_pages(
    limits: PageLimits,
    listener: TcpListener,
    router: Router,
    shutdown: CancellationToken,
) {
    let mut connections = JoinSet::new();
    let mut by_age: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        tokio::select! {
            biased;
            () = shutdown.cancelled() => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    by_age.retain(|connection| !connection.is_finished());
                    if by_age.len() >= limits.connections && let Some(oldest) = by_age.pop_front() {
                        oldest.abort();
                    }
                    let connection = connected(limits, stream, router.clone(), shutdown.clone());
                    by_age.push_back(connections.spawn(connection));
                }
                Err(error) => {
                    tracing::warn!(%error, "failed to accept a connection");
                    tokio::select! {
                        () = shutdown.cancelled() => break,
                        () = sleep(limits.accept_pause) => {}
                    }
                }
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

async fn connected(limits: PageLimits, stream: TcpStream, router: Router, shutdown: CancellationToken) {
    let mut builder = Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(limits.header_timeout);
    let service = TowerToHyperService::new(router);
    let mut served = pin!(builder.serve_connection(TokioIo::new(stream), service));
    // How a connection ends is of interest to nobody: clients try again.
    tokio::select! {
        biased;
        _ = served.as_mut() => return,
        () = shutdown.cancelled() => {}
        () = sleep(limits.lifetime) => {}
    }
    served.as_mut().graceful_shutdown();
    let _ = timeout(limits.grace, served).await;
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use axum::routing::get;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    /// Longer than any test takes on a busy machine.
    const PATIENCE: Duration = Duration::from_mins(1);

    struct Server {
        address: SocketAddr,
        shutdown: CancellationToken,
        task: JoinSet<()>,
    }

    async fn start(limits: PageLimits) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, shutdown) = (listener.local_addr().unwrap(), CancellationToken::new());
        let router = Router::new().route("/healthz", get(|| async { "ok\n" }));
        let mut task = JoinSet::new();
        task.spawn(serve_pages(limits, listener, router, shutdown.clone()));
        Server { address, shutdown, task }
    }

    /// All that the server sends on a connection until it closes it.
    async fn rest(stream: &mut TcpStream) -> String {
        let mut text = Vec::new();
        timeout(PATIENCE, stream.read_to_end(&mut text)).await.expect("the server closes").unwrap();
        String::from_utf8(text).unwrap()
    }

    async fn page(server: &Server, path: &str) -> String {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: herd\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        rest(&mut stream).await
    }

    #[tokio::test]
    async fn a_connection_beyond_the_limit_takes_the_place_of_the_oldest() {
        let server =
            start(PageLimits { connections: 2, header_timeout: PATIENCE * 2, ..PageLimits::default() }).await;
        let mut silent = TcpStream::connect(server.address).await.unwrap();
        let mut used = TcpStream::connect(server.address).await.unwrap();
        used.write_all(b"GET /healthz HTTP/1.1\r\nhost: herd\r\n\r\n").await.unwrap();
        assert_eq!(used.read_u8().await.unwrap(), b'H');
        assert!(page(&server, "/healthz").await.starts_with("HTTP/1.1 200"));
        assert_eq!(rest(&mut silent).await, "");
        used.write_all(b"GET /healthz HTTP/1.1\r\nhost: herd\r\nconnection: close\r\n\r\n").await.unwrap();
        assert_eq!(rest(&mut used).await.matches("ok\n").count(), 2);
    }

    #[tokio::test]
    async fn a_connection_without_a_request_is_closed() {
        let server =
            start(PageLimits { header_timeout: Duration::from_millis(20), ..PageLimits::default() }).await;
        let mut silent = TcpStream::connect(server.address).await.unwrap();
        rest(&mut silent).await;
        let mut slow = TcpStream::connect(server.address).await.unwrap();
        slow.write_all(b"GET /healthz HTTP/1.1\r\n").await.unwrap();
        assert!(!rest(&mut slow).await.contains("ok\n"));
    }

    #[tokio::test]
    async fn a_connection_is_closed_at_the_end_of_its_life() {
        let limits = PageLimits {
            header_timeout: PATIENCE * 2,
            lifetime: Duration::from_millis(20),
            ..PageLimits::default()
        };
        let server = start(PageLimits { grace: Duration::from_millis(20), ..limits }).await;
        let mut silent = TcpStream::connect(server.address).await.unwrap();
        silent.write_all(b"GET /").await.unwrap();
        rest(&mut silent).await;
    }

    #[tokio::test]
    async fn a_silent_client_does_not_keep_a_process_from_ending() {
        let limits = PageLimits {
            header_timeout: PATIENCE * 2,
            grace: Duration::from_millis(20),
            ..PageLimits::default()
        };
        let mut server = start(limits).await;
        let mut silent = TcpStream::connect(server.address).await.unwrap();
        silent.write_all(b"GET /healthz HTTP/1.1\r\n").await.unwrap();
        assert!(page(&server, "/healthz").await.starts_with("HTTP/1.1 200"));
        server.shutdown.cancel();
        timeout(PATIENCE, server.task.join_next()).await.expect("the server ends").unwrap().unwrap();
        assert!(TcpStream::connect(server.address).await.is_err());
    }
}
