//! What the tests' API servers have in common: each serves the few paths that its subject asks for, on loopback.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::{Json, Router};
use herd_control::revision::{Defaults, ModelCache};
use kube::{Client, Config};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::context::Context;
use crate::metrics::Metrics;

/// Serves until the set is dropped.
pub(crate) async fn serve(router: Router) -> (SocketAddr, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut server = JoinSet::new();
    server.spawn(async { axum::serve(listener, router).await.unwrap() });
    (address, server)
}

/// An operator's, that talks to the server at `address`.
pub(crate) fn context(address: SocketAddr, pod_groups: bool) -> Context {
    let mut config = Config::new(format!("http://{address}").parse().unwrap());
    config.default_retry = false;
    let defaults = Defaults { worker_image: "w:1".to_owned(), model_cache: ModelCache::default() };
    let metrics = Arc::new(Metrics::new().unwrap());
    Context::new(Client::try_from(config).unwrap(), defaults, pod_groups, metrics, "test".to_owned())
}

/// As an API server refuses.
pub(crate) fn refused(code: StatusCode, reason: &str) -> Response {
    refused_with(code, reason, reason)
}

/// In these words.
pub(crate) fn refused_with(code: StatusCode, reason: &str, message: &str) -> Response {
    let status = json!({"apiVersion": "v1", "kind": "Status", "status": "Failure", "reason": reason,
        "message": message, "code": code.as_u16()});
    (code, Json(status)).into_response()
}

/// Whether a list with this query has it: terms of equality, and of being there.
pub(crate) fn selects(query: &str, object: &Value) -> bool {
    let query = query.replace("%3D", "=").replace("%2C", ",").replace("%2F", "/");
    let selector = query.split('&').find_map(|pair| pair.strip_prefix("labelSelector=")).unwrap_or("");
    let labels = &object["metadata"]["labels"];
    selector.split(',').filter(|term| !term.is_empty()).all(|term| match term.split_once('=') {
        Some((label, value)) => labels[label] == value,
        None => !labels[term].is_null(),
    })
}
