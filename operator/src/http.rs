//! `/healthz`, `/readyz` and `/metrics`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper::server::conn::http1::Builder;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::metrics::Metrics;

/// Probes and scrapers; others wait.
const CONNECTIONS: usize = 64;
/// For the head of a request to arrive.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// Before another try when the system refuses a connection: it has no file descriptor left.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// What the pages are about.
#[derive(Clone, Debug)]
pub(crate) struct Pages {
    /// The API server answers and knows the custom resources. An operator that waits for the lease is ready too.
    pub(crate) ready: Arc<AtomicBool>,
    pub(crate) metrics: Arc<Metrics>,
}

/// Serves until `stop`; connections end with it.
pub(crate) async fn serve(listener: TcpListener, pages: Pages, stop: CancellationToken) {
    let router = router(pages);
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if connections.len() < CONNECTIONS => match accepted {
                Ok((connection, _)) => {
                    connections.spawn(connected(connection, router.clone()));
                }
                Err(error) => {
                    tracing::warn!("cannot accept a connection: {error}");
                    tokio::time::sleep(ACCEPT_AGAIN).await;
                }
            },
        }
    }
}

async fn connected(connection: TcpStream, router: Router) {
    let mut builder = Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
    let served = builder.serve_connection(TokioIo::new(connection), TowerToHyperService::new(router));
    if let Err(error) = served.await {
        tracing::trace!("a connection ended: {error}");
    }
}

fn router(pages: Pages) -> Router {
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(pages)
}

async fn readyz(State(pages): State<Pages>) -> (StatusCode, &'static str) {
    if pages.ready.load(Ordering::Relaxed) {
        (StatusCode::OK, "ready\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "the custom resources cannot be listed yet\n")
    }
}

async fn metrics(State(pages): State<Pages>) -> Response {
    match pages.metrics.render() {
        Ok(text) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_operator_is_ready_when_it_knows_its_resources() {
        let pages = Pages { ready: Arc::default(), metrics: Arc::new(Metrics::new().unwrap()) };
        assert_eq!(readyz(State(pages.clone())).await.0, StatusCode::SERVICE_UNAVAILABLE);
        pages.ready.store(true, Ordering::Relaxed);
        assert_eq!(readyz(State(pages.clone())).await.0, StatusCode::OK);
        assert_eq!(metrics(State(pages)).await.status(), StatusCode::OK);
    }
}
