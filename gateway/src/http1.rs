//! HTTP/1.1 connections: each is a task that owns its requests' handlers, so that ending it ends them.

use std::pin::pin;
use std::time::Duration;

use axum::Router;
use herd_listen::{Bounded, Connection, PeerWatch};
use hyper::server::conn::http1::Builder;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::sync::watch;
use tokio::task::JoinSet;

/// Serves until `closing` says otherwise, then until the last connection has ended. A connection on which a request's head
/// is awaited for `header_timeout` is closed.
pub(crate) async fn serve(
    mut listener: Bounded,
    router: Router,
    header_timeout: Duration,
    mut closing: watch::Receiver<bool>,
) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            () = closed(&mut closing) => break,
            Some(_) = connections.join_next() => {}
            connection = listener.next() => {
                connections.spawn(connected(connection, router.clone(), header_timeout, closing.clone()));
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

async fn closed(closing: &mut watch::Receiver<bool>) {
    let _ = closing.wait_for(|closing| *closing).await;
}

async fn connected(
    connection: Connection,
    router: Router,
    header_timeout: Duration,
    mut closing: watch::Receiver<bool>,
) {
    let peer = match PeerWatch::new(&connection) {
        Ok(peer) => peer,
        Err(error) => return tracing::debug!(%error, "refused a connection"),
    };
    let mut builder = Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(header_timeout);
    let mut served =
        pin!(builder.serve_connection(TokioIo::new(connection), TowerToHyperService::new(router)));
    let mut draining = false;
    loop {
        tokio::select! {
            // An answer that is there is sent before the peer's end is looked at.
            biased;
            ended = served.as_mut() => {
                if let Err(error) = ended {
                    tracing::trace!(%error, "a connection ended");
                }
                return;
            }
            // hyper does not read on while a request is in work, so behind one more byte it would not see this.
            () = peer.closed() => return,
            () = closed(&mut closing), if !draining => {
                draining = true;
                served.as_mut().graceful_shutdown();
            }
        }
    }
}
