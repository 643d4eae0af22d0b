//! `/healthz`, `/readyz` and `/metrics`.

use std::sync::{Arc, OnceLock};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use herd_proto::internal::v1::Phase;

use crate::gang::Gang;
use crate::metrics::Metrics;

/// What the pages are about; the gang is there once the model is loaded.
#[derive(Clone, Debug)]
pub(crate) struct Pages {
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) gang: Arc<OnceLock<Arc<Gang>>>,
}

pub(crate) fn router(pages: Pages) -> Router {
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(pages)
}

async fn readyz(State(pages): State<Pages>) -> (StatusCode, &'static str) {
    match pages.gang.get().map(|gang| gang.admission.phase()) {
        Some(Phase::Ready) => (StatusCode::OK, "ready\n"),
        Some(_) => (StatusCode::SERVICE_UNAVAILABLE, "draining\n"),
        None => (StatusCode::SERVICE_UNAVAILABLE, "loading\n"),
    }
}

async fn metrics(State(pages): State<Pages>) -> Response {
    let gang = pages.gang.get();
    let transfers = gang.map_or(0, |gang| gang.transfers.count());
    match pages.metrics.render(gang.map(|gang| &gang.engine), transfers) {
        Ok(text) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_worker_that_loads_is_alive_and_not_ready() {
        let pages = Pages { metrics: Arc::new(Metrics::new().unwrap()), gang: Arc::default() };
        assert_eq!(readyz(State(pages.clone())).await, (StatusCode::SERVICE_UNAVAILABLE, "loading\n"));
        assert_eq!(metrics(State(pages)).await.status(), StatusCode::OK);
    }
}
