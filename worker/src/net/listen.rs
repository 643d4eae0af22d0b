//! Listening sockets and what is served on them.

use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use herd_listen::{Bounded, PageLimits, serve_pages};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::Server;

use super::KEEPALIVE;
use crate::error::WorkerError;

/// HTTP/2 windows: a prompt of 128K tokens is half a megabyte and should not wait for window updates.
const HTTP2_WINDOW_BYTES: u32 = 1 << 20;

/// Calls a gateway may take back before they were looked at. The default of 20 is meant for strangers: above it the whole
/// connection is closed, with all other calls on it.
const MAX_PENDING_RESETS: usize = 1024;

/// Bounds of the gRPC listener. Gateways, gangs that send KV and the followers of this one hold a connection each.
#[derive(Clone, Copy)]
struct GrpcLimits {
    /// More wait in the kernel's queue.
    connections: usize,
    /// For a client to say that it speaks HTTP/2; from then on pings tell whether it is there.
    preface: Duration,
}

const GRPC_LIMITS: GrpcLimits = GrpcLimits { connections: 1024, preface: Duration::from_secs(10) };

/// Listens, and says where.
pub(crate) async fn bind(
    address: SocketAddr,
    purpose: &'static str,
) -> Result<(TcpListener, SocketAddr), WorkerError> {
    let failed = |source| WorkerError::Listen { address, purpose, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    Ok((listener, bound))
}

/// "host:port" others reach a bound address at.
pub(crate) fn advertised(host: Option<&str>, bound: SocketAddr) -> Result<String, WorkerError> {
    match host {
        Some(host) if host.contains(':') && !host.starts_with('[') => {
            Ok(format!("[{host}]:{}", bound.port()))
        }
        Some(host) => Ok(format!("{host}:{}", bound.port())),
        None if bound.ip().is_unspecified() => Err(WorkerError::Option {
            option: "--advertise",
            problem: format!("is needed: other gangs cannot reach {bound}; give this host's name or address"),
        }),
        None => Ok(bound.to_string()),
    }
}

/// Serves gRPC until told to shut down and the connections have closed; dropped, it cuts them.
pub(crate) async fn serve_grpc(
    listener: TcpListener,
    routes: Routes,
    shutdown: CancellationToken,
) -> Result<(), WorkerError> {
    serve_grpc_within(GRPC_LIMITS, listener, routes, shutdown).await
}

async fn serve_grpc_within(
    limits: GrpcLimits,
    listener: TcpListener,
    routes: Routes,
    shutdown: CancellationToken,
) -> Result<(), WorkerError> {
    let GrpcLimits { connections, preface } = limits;
    let cut = CancellationToken::new();
    let _cut = cut.clone().drop_guard();
    let connections = Bounded::new(listener, connections, cut).with_preface_within(preface).into_stream();
    let serve = Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .http2_max_pending_accept_reset_streams(Some(MAX_PENDING_RESETS))
        .initial_stream_window_size(HTTP2_WINDOW_BYTES)
        .initial_connection_window_size(4 * HTTP2_WINDOW_BYTES)
        .add_routes(routes)
        .serve_with_incoming_shutdown(connections, shutdown.cancelled_owned());
    serve.await.map_err(|error| WorkerError::Internal(format!("gRPC: {error}")))
}

/// Serves HTTP until told to shut down and the connections have closed. There are few of them, none of which is silent for long.
pub(crate) async fn serve_http(
    listener: TcpListener,
    router: Router,
    shutdown: CancellationToken,
) -> Result<(), WorkerError> {
    serve_pages(PageLimits::default(), listener, router, shutdown).await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;
    use tokio::task::JoinSet;
    use tokio::time::timeout;

    use super::*;

    #[test]
    fn what_is_advertised_can_be_reached() {
        let bound = SocketAddr::from(([127, 0, 0, 1], 7));
        let any = SocketAddr::from(([0, 0, 0, 0], 7));
        assert_eq!(advertised(None, bound).unwrap(), "127.0.0.1:7");
        assert_eq!(advertised(Some("gang-0.pool"), any).unwrap(), "gang-0.pool:7");
        assert_eq!(advertised(Some("fd00::1"), any).unwrap(), "[fd00::1]:7");
        assert!(advertised(None, any).unwrap_err().to_string().starts_with("--advertise: is needed"));
    }

    /// Longer than any test takes on a busy machine.
    const PATIENCE: Duration = Duration::from_mins(1);

    /// What clients of HTTP/2 say first.
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

    /// A gRPC server without services; it ends with the set.
    async fn serving(limits: GrpcLimits) -> (SocketAddr, JoinSet<Result<(), WorkerError>>) {
        let (listener, address) = bind(SocketAddr::from(([127, 0, 0, 1], 0)), "gRPC").await.unwrap();
        let mut task = JoinSet::new();
        task.spawn(serve_grpc_within(limits, listener, Routes::default(), CancellationToken::new()));
        (address, task)
    }

    async fn closed(stream: &mut TcpStream) {
        let mut bytes = Vec::new();
        // A reset is an end as well.
        let _ = timeout(PATIENCE, stream.read_to_end(&mut bytes)).await.expect("the server closes");
    }

    #[tokio::test]
    async fn a_silent_connection_to_grpc_is_closed_and_makes_room() {
        let (address, _task) =
            serving(GrpcLimits { connections: 1, preface: Duration::from_millis(20) }).await;
        let mut silent = TcpStream::connect(address).await.unwrap();
        // It has the only slot until it is closed: the server says nothing before that.
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(PREFACE).await.unwrap();
        timeout(PATIENCE, client.read_u8()).await.expect("there is room").unwrap();
        closed(&mut silent).await;
    }

    #[tokio::test]
    async fn what_is_dropped_cuts_its_connections() {
        let (address, task) = serving(GRPC_LIMITS).await;
        let mut silent = TcpStream::connect(address).await.unwrap();
        silent.write_all(PREFACE).await.unwrap();
        // The server's settings: it has taken the connection.
        silent.read_u8().await.unwrap();
        drop(task);
        closed(&mut silent).await;
    }

    #[tokio::test]
    async fn more_connections_to_http_than_there_may_be_leave_room_for_probes() {
        let (listener, address) = bind(SocketAddr::from(([127, 0, 0, 1], 0)), "HTTP").await.unwrap();
        let router = Router::new().route("/healthz", axum::routing::get(|| async { "ok\n" }));
        let mut task = JoinSet::new();
        task.spawn(serve_http(listener, router, CancellationToken::new()));
        let mut silent = Vec::new();
        for _ in 0..2 * PageLimits::default().connections {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        let mut probe = TcpStream::connect(address).await.unwrap();
        probe.write_all(b"GET /healthz HTTP/1.1\r\nhost: herd\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        timeout(PATIENCE, probe.read_to_string(&mut answer)).await.expect("it answers").unwrap();
        assert!(answer.ends_with("ok\n"), "{answer}");
        closed(&mut silent[0]).await;
    }
}
