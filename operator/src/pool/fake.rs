//! An API server of one LlamaPool and its pods, on loopback, that writes down what is asked of it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, patch, post};
use axum::{Json, Router};
use herd_control::revision::GangTemplate;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::context::Context;
use crate::fake_api::{self, refused, refused_with, serve};

/// What there is, and what was done about it.
#[derive(Debug)]
pub(super) struct Seen {
    pub(super) pool: Value,
    pub(super) pods: Vec<Value>,
    pub(super) nodes: Option<Value>,
    /// "create POD", "delete POD", "status".
    pub(super) writes: Vec<String>,
    /// Pods that a quota still lets through.
    pub(super) quota: usize,
    /// As which a pod beyond it is refused.
    pub(super) refusal: (StatusCode, &'static str),
    /// Reasons of the Events.
    pub(super) events: Vec<String>,
    pub(super) takes_status: bool,
    template: Value,
    made: usize,
}

type Shared = Arc<Mutex<Seen>>;

/// Stops with its value.
pub(super) struct FakeApi {
    seen: Shared,
    address: std::net::SocketAddr,
    _server: JoinSet<()>,
}

impl FakeApi {
    /// Of a pool that wants one gang of revision "r", made from this.
    pub(super) async fn start(spec: Value) -> Self {
        let target = json!([{"revision": "r", "replicas": 1}]);
        let pool = json!({
            "apiVersion": "herd.dev/v1alpha1", "kind": "LlamaPool",
            "metadata": {"name": "m-unified", "namespace": "n", "uid": "pool", "generation": 1,
                "ownerReferences": [{"apiVersion": "herd.dev/v1alpha1", "kind": "LlamaDeployment", "name": "m",
                    "uid": "u", "controller": true}]},
            "spec": {"deploymentRef": {"name": "m"}, "role": "unified", "targets": target},
        });
        let template = GangTemplate {
            spec: serde_json::from_value(spec).unwrap(),
            image: "w:1".to_owned(),
            download: None,
        };
        let seen = Arc::new(Mutex::new(Seen {
            pool,
            pods: Vec::new(),
            nodes: None,
            writes: Vec::new(),
            quota: usize::MAX,
            refusal: (StatusCode::FORBIDDEN, "exceeded quota: q"),
            events: Vec::new(),
            takes_status: true,
            template: serde_json::to_value(template).unwrap(),
            made: 0,
        }));
        let pools = "/apis/herd.dev/v1alpha1/namespaces/n/llamapools/{name}";
        let router = Router::new()
            .route(pools, get(pool_of))
            .route(&format!("{pools}/status"), patch(write_status))
            .route("/api/v1/namespaces/n/pods", get(list).post(create))
            .route("/api/v1/namespaces/n/pods/{name}", axum::routing::delete(delete))
            .route("/api/v1/nodes", get(nodes))
            .route("/apis/apps/v1/namespaces/n/controllerrevisions/{name}", get(revision))
            .route("/apis/events.k8s.io/v1/namespaces/n/events", post(event))
            .route("/apis/scheduling.k8s.io/v1beta1/namespaces/n/podgroups", post(create_group))
            .with_state(Arc::clone(&seen));
        let (address, server) = serve(router).await;
        Self { seen, address, _server: server }
    }

    pub(super) fn context(&self, pod_groups: bool) -> Context {
        fake_api::context(self.address, pod_groups)
    }

    pub(super) fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was written since the last look, pods without what names their gang.
    pub(super) fn writes(&self) -> Vec<String> {
        let rank = |name: &str| name.rsplit_once('-').map_or(String::new(), |(_, rank)| rank.to_owned());
        let written = std::mem::take(&mut self.seen().writes);
        let short = |write: &String| match write.split_once(' ') {
            Some((what, name)) => format!("{what} {}", rank(name)),
            None => write.clone(),
        };
        written.iter().map(short).collect()
    }
}

fn lock(seen: &Shared) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn pool_of(State(seen): State<Shared>) -> Json<Value> {
    Json(lock(&seen).pool.clone())
}

async fn write_status(State(seen): State<Shared>, body: String) -> Response {
    let mut seen = lock(&seen);
    if !seen.takes_status {
        return refused(StatusCode::INTERNAL_SERVER_ERROR, "InternalError");
    }
    let applied: Value = serde_json::from_str(&body).unwrap();
    seen.pool["status"] = applied["status"].clone();
    seen.writes.push("status".to_owned());
    Json(seen.pool.clone()).into_response()
}

async fn event(State(seen): State<Shared>, Json(event): Json<Value>) -> Json<Value> {
    lock(&seen).events.push(event["reason"].as_str().unwrap().to_owned());
    Json(event)
}

async fn list(State(seen): State<Shared>) -> Json<Value> {
    Json(json!({"apiVersion": "v1", "kind": "PodList", "metadata": {}, "items": lock(&seen).pods}))
}

async fn create(State(seen): State<Shared>, Json(mut pod): Json<Value>) -> Response {
    let mut seen = lock(&seen);
    if seen.quota == 0 {
        let (code, message) = seen.refusal;
        return refused_with(code, "Forbidden", message);
    }
    seen.quota -= 1;
    seen.made += 1;
    pod["metadata"]["uid"] = json!(format!("uid-{}", seen.made));
    pod["metadata"]["creationTimestamp"] = json!("2026-01-02T00:00:00Z");
    let write = format!("create {}", pod["metadata"]["name"].as_str().unwrap());
    seen.writes.push(write);
    seen.pods.push(pod.clone());
    (StatusCode::CREATED, Json(pod)).into_response()
}

async fn create_group(State(seen): State<Shared>, Json(group): Json<Value>) -> Response {
    let mut seen = lock(&seen);
    let leader = &group["metadata"]["ownerReferences"][0]["uid"];
    assert_eq!(*leader, seen.pods[0]["metadata"]["uid"]);
    let (name, count) = (&group["metadata"]["name"], &group["spec"]["schedulingPolicy"]["gang"]["minCount"]);
    assert_eq!(seen.pods[0]["spec"]["schedulingGroup"]["podGroupName"], *name);
    seen.writes.push(format!("group -{count}"));
    (StatusCode::CREATED, Json(group)).into_response()
}

async fn delete(
    State(seen): State<Shared>,
    Path(name): Path<String>,
    Json(options): Json<Value>,
) -> Response {
    let mut seen = lock(&seen);
    let Some(index) = seen.pods.iter().position(|pod| pod["metadata"]["name"] == name) else {
        return refused(StatusCode::NOT_FOUND, "NotFound");
    };
    assert_eq!(options["preconditions"]["uid"], seen.pods[index]["metadata"]["uid"]);
    seen.writes.push(format!("delete {name}"));
    Json(seen.pods.remove(index)).into_response()
}

async fn nodes(State(seen): State<Shared>) -> Response {
    match &lock(&seen).nodes {
        Some(items) => {
            let list = json!({"apiVersion": "v1", "kind": "NodeList", "metadata": {}, "items": items});
            Json(list).into_response()
        }
        None => refused(StatusCode::FORBIDDEN, "Forbidden"),
    }
}

async fn revision(State(seen): State<Shared>, Path(name): Path<String>) -> Json<Value> {
    Json(json!({"apiVersion": "apps/v1", "kind": "ControllerRevision", "metadata": {"name": name},
        "revision": 1, "data": lock(&seen).template}))
}
