//! `/healthz`, `/readyz` and `/metrics`.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use herd_proto::internal::v1::Phase;
use tokio::sync::watch;

use crate::gang::Current;
use crate::lease::Transfers;
use crate::metrics::Metrics;

/// What the pages are about.
#[derive(Clone, Debug)]
pub(crate) struct Pages {
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) process: Process,
}

/// Which part of a gang this process is.
#[derive(Clone, Debug)]
pub(crate) enum Process {
    Leader(Current),
    /// Whether it is part of an epoch, and the transfers that its ranks take.
    Follower(watch::Receiver<bool>, Arc<Transfers>),
}

pub(crate) fn router(pages: Pages) -> Router {
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(pages)
}

async fn readyz(State(pages): State<Pages>) -> (StatusCode, &'static str) {
    match &pages.process {
        Process::Leader(gang) => match gang.borrow().as_ref().map(|gang| gang.admission.phase()) {
            Some(Phase::Ready) => (StatusCode::OK, "ready\n"),
            Some(_) => (StatusCode::SERVICE_UNAVAILABLE, "draining\n"),
            None => (StatusCode::SERVICE_UNAVAILABLE, "loading\n"),
        },
        Process::Follower(joined, _) if *joined.borrow() => (StatusCode::OK, "ready\n"),
        Process::Follower(..) => (StatusCode::SERVICE_UNAVAILABLE, "not in an epoch\n"),
    }
}

async fn metrics(State(pages): State<Pages>) -> Response {
    let rendered = match &pages.process {
        Process::Leader(gang) => {
            let gang = gang.borrow().clone();
            let transfers = gang.as_ref().map_or(0, |gang| gang.transfers.count());
            pages.metrics.render(gang.as_deref(), transfers)
        }
        Process::Follower(_, transfers) => pages.metrics.render(None, transfers.count()),
    };
    match rendered {
        Ok(text) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::MetricOptions;

    #[tokio::test]
    async fn a_worker_that_loads_is_alive_and_not_ready() {
        let metrics = Arc::new(Metrics::new(MetricOptions::default()).unwrap());
        let (_sender, none) = watch::channel(None);
        let pages = Pages { metrics: Arc::clone(&metrics), process: Process::Leader(none) };
        assert_eq!(readyz(State(pages.clone())).await, (StatusCode::SERVICE_UNAVAILABLE, "loading\n"));
        assert_eq!(super::metrics(State(pages)).await.status(), StatusCode::OK);
        let (joined, joins) = watch::channel(false);
        let pages = Pages { metrics, process: Process::Follower(joins, Arc::default()) };
        assert_eq!(readyz(State(pages.clone())).await.0, StatusCode::SERVICE_UNAVAILABLE);
        joined.send_replace(true);
        assert_eq!(readyz(State(pages)).await.0, StatusCode::OK);
    }
}
