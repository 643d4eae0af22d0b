//! Listening sockets and what is served on them.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use futures::Stream;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::sleep;
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

/// After an `accept` that failed, mostly for want of file descriptors: trying again at once would fail as well.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

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

/// Serves gRPC until told to shut down and the connections have closed.
pub(crate) async fn serve_grpc(
    listener: TcpListener,
    routes: Routes,
    shutdown: CancellationToken,
) -> Result<(), WorkerError> {
    let serve = Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .http2_max_pending_accept_reset_streams(Some(MAX_PENDING_RESETS))
        .initial_stream_window_size(HTTP2_WINDOW_BYTES)
        .initial_connection_window_size(4 * HTTP2_WINDOW_BYTES)
        .add_routes(routes)
        .serve_with_incoming_shutdown(connections(listener), shutdown.cancelled_owned());
    serve.await.map_err(|error| WorkerError::Internal(format!("gRPC: {error}")))
}

/// Connections as they come. Where one cannot be accepted, `tonic` alone would try again at once, and keep a core busy with it.
fn connections(listener: TcpListener) -> impl Stream<Item = io::Result<TcpStream>> {
    futures::stream::unfold(listener, |listener| async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    // One that is already broken fails at its first read.
                    let _ = stream.set_nodelay(true);
                    return Some((Ok(stream), listener));
                }
                Err(error) => {
                    tracing::warn!(%error, "gRPC connection not accepted");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    })
}

/// Serves HTTP until told to shut down and the connections have closed.
pub(crate) async fn serve_http(
    listener: TcpListener,
    router: Router,
    shutdown: CancellationToken,
) -> Result<(), WorkerError> {
    let serve = axum::serve(listener, router).with_graceful_shutdown(shutdown.cancelled_owned());
    serve.await.map_err(|error| WorkerError::Internal(format!("HTTP: {error}")))
}

#[cfg(test)]
mod tests {
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
}
