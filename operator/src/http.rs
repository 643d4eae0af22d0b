//! `/healthz`, `/readyz`, `/metrics` and `/autoscaler/log`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::Router;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use herd_listen::{PageLimits, serve_pages};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::autoscale::Logs;
use crate::metrics::Metrics;

/// What the pages are about.
#[derive(Clone, Debug)]
pub(crate) struct Pages {
    pub(crate) metrics: Arc<Metrics>,
    /// Set once the operator can do its work, or stands by to. A follower is ready too.
    pub(crate) ready: Arc<AtomicBool>,
    pub(crate) logs: Logs,
}

/// Serves until told to shut down and the connections have ended, which they do within two seconds.
pub(crate) async fn serve(listener: TcpListener, pages: Pages, shutdown: CancellationToken) {
    serve_pages(PageLimits::default(), listener, router(pages), shutdown).await;
}

fn router(pages: Pages) -> Router {
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/autoscaler/log", get(overview))
        .route("/autoscaler/log/{namespace}/{name}", get(recording))
        .with_state(pages)
}

async fn readyz(State(pages): State<Pages>) -> (StatusCode, &'static str) {
    if pages.ready.load(Ordering::Acquire) {
        (StatusCode::OK, "ready\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "starting\n")
    }
}

async fn metrics(State(pages): State<Pages>) -> Response {
    match pages.metrics.render() {
        Ok(text) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// What was decided last about each deployment.
async fn overview(State(pages): State<Pages>) -> Response {
    json(pages.logs.overview().map(|overview| overview.to_string()))
}

/// The last decisions about one, with all that they were made from.
async fn recording(State(pages): State<Pages>, Path((namespace, name)): Path<(String, String)>) -> Response {
    match pages.logs.recording(&namespace, &name) {
        Some(recording) => json(recording),
        None => (StatusCode::NOT_FOUND, "no such deployment is scaled here\n").into_response(),
    }
}

fn json(text: serde_json::Result<String>) -> Response {
    match text {
        Ok(text) => ([(header::CONTENT_TYPE, "application/json")], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::time::Duration;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;
    use tokio::task::JoinSet;
    use tokio::time::timeout;

    use super::*;

    /// Longer than any test takes on a busy machine.
    const PATIENCE: Duration = Duration::from_mins(1);

    struct Server {
        address: SocketAddr,
        pages: Pages,
        _task: JoinSet<()>,
    }

    async fn start() -> Server {
        let metrics = Arc::new(Metrics::new().unwrap());
        let pages = Pages { metrics, ready: Arc::default(), logs: Logs::default() };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut task = JoinSet::new();
        task.spawn(serve(listener, pages.clone(), CancellationToken::new()));
        Server { address, pages, _task: task }
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
    async fn an_operator_is_ready_when_it_says_so_and_alive_before() {
        let server = start().await;
        assert!(page(&server, "/healthz").await.starts_with("HTTP/1.1 200"));
        assert!(page(&server, "/readyz").await.starts_with("HTTP/1.1 503"));
        server.pages.ready.store(true, Ordering::Release);
        assert!(page(&server, "/readyz").await.starts_with("HTTP/1.1 200"));
        server.pages.metrics.leader(true);
        let metrics = page(&server, "/metrics").await;
        assert!(metrics.contains("content-type: text/plain; version=0.0.4"), "{metrics}");
        assert!(metrics.contains("herd_operator_leader 1"), "{metrics}");
        assert!(page(&server, "/autoscaler/log").await.ends_with("[]"));
        assert!(page(&server, "/autoscaler/log/n/m").await.starts_with("HTTP/1.1 404"));
        assert!(page(&server, "/").await.starts_with("HTTP/1.1 404"));
    }
}
