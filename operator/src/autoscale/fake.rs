//! A Prometheus and an API server, on loopback.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::extract::{Path, State};
use axum::http::{StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::prometheus::Prometheus;
use crate::context::Context;
use crate::fake_api::{self, refused, serve};

/// How Prometheus answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Up,
    Failing,
    /// What is no JSON.
    Garbage,
    /// JSON that is no vector.
    Scalar,
    /// An answer that breaks off.
    Broken,
    /// No answer at all.
    Silent,
    /// An answer that is longer than it may be.
    Huge,
}

/// Of a pod.
pub(super) type Series = BTreeMap<&'static str, &'static str>;

/// What it knows.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) mode: Mode,
    /// By pod, all in the namespace "n".
    pub(super) pods: BTreeMap<String, Series>,
    /// Seconds: when it answers, and how old its samples are.
    pub(super) now: f64,
    pub(super) age: f64,
    pub(super) queries: Vec<String>,
}

/// Stops with its value.
pub(super) struct FakePrometheus {
    known: Arc<Mutex<Known>>,
    address: std::net::SocketAddr,
    _server: JoinSet<()>,
}

impl FakePrometheus {
    pub(super) async fn start() -> Self {
        let known = Known { mode: Mode::Up, pods: BTreeMap::new(), now: 0.0, age: 1.0, queries: Vec::new() };
        let known = Arc::new(Mutex::new(known));
        let router = Router::new().route("/api/v1/query", post(query)).with_state(Arc::clone(&known));
        let (address, server) = serve(router).await;
        Self { known, address, _server: server }
    }

    pub(super) fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn client(&self) -> Prometheus {
        Prometheus::new(&format!("http://{}", self.address)).unwrap()
    }
}

/// A gang that does nothing.
pub(super) fn idle() -> Series {
    BTreeMap::from([
        ("herd_prompt_tokens_total", "0"),
        ("herd_step_seconds_count", "0"),
        ("herd_step_seconds_sum", "0"),
        ("herd_waiting_prompt_tokens", "0"),
        ("herd_requests_running", "0"),
        ("herd_requests_waiting", "0"),
        ("herd_sequences_limit", "100"),
        ("herd_kv_blocks", "1000"),
        ("herd_kv_blocks_used", "0"),
    ])
}

async fn query(State(known): State<Arc<Mutex<Known>>>, body: String) -> Response {
    let query = decoded(body.strip_prefix("query=").unwrap().rsplit_once("&timeout=").unwrap().0);
    let (mode, points) = {
        let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
        known.queries.push(query.clone());
        (known.mode, points(&known, &query))
    };
    let answer = json!({"status": "success", "data": {"resultType": "vector", "result": points}});
    match mode {
        Mode::Up => Json(answer).into_response(),
        Mode::Failing => (StatusCode::SERVICE_UNAVAILABLE, "it starts").into_response(),
        Mode::Garbage => "<html>".into_response(),
        Mode::Scalar => {
            Json(json!({"status": "success", "data": {"resultType": "scalar", "result": [1, "2"]}}))
                .into_response()
        }
        Mode::Broken => {
            let text = answer.to_string();
            text[..text.len() / 2].to_owned().into_response()
        }
        Mode::Silent => std::future::pending().await,
        Mode::Huge => " ".repeat(5 << 20).into_response(),
    }
}

fn points(known: &Known, query: &str) -> Vec<Value> {
    let mut points = Vec::new();
    for (pod, series) in &known.pods {
        let mut point = |name: Option<&str>, value: &str| {
            let mut labels = json!({"namespace": "n", "pod": pod});
            if let Some(name) = name {
                labels["__name__"] = json!(name);
            }
            points.push(json!({"metric": labels, "value": [known.now, value]}));
        };
        if query.contains("timestamp(herd_kv_blocks{") {
            point(None, &format!("{:.3}", known.now - known.age));
        } else if query.contains("__name__=~") {
            for (name, value) in series.iter().filter(|(name, _)| query.contains(**name)) {
                point(Some(name), value);
            }
        } else if let Some((name, value)) =
            series.iter().find(|(name, _)| query.contains(&format!("rate({name}{{")))
        {
            assert!(query.contains(&format!("unless resets({name}{{")), "{query}");
            point(None, value);
        }
    }
    points
}

fn decoded(text: &str) -> String {
    let (mut bytes, mut rest) = (Vec::new(), text.as_bytes());
    while let [first, tail @ ..] = rest {
        rest = tail;
        if *first == b'%' {
            let hex = std::str::from_utf8(&tail[..2]).unwrap();
            bytes.push(u8::from_str_radix(hex, 16).unwrap());
            rest = &tail[2..];
        } else {
            bytes.push(*first);
        }
    }
    String::from_utf8(bytes).unwrap()
}

/// What the API server has.
#[derive(Debug)]
pub(super) struct Seen {
    pub(super) deployment: Value,
    pub(super) pools: BTreeMap<String, Value>,
    /// "POOL N by MANAGER".
    pub(super) writes: Vec<String>,
    /// Reason and note of each event.
    pub(super) events: Vec<(String, String)>,
    /// Writes of somebody else's that come between a read and the next write.
    pub(super) meddle: usize,
}

/// Stops with its value.
pub(super) struct FakeApi {
    seen: watch::Sender<Seen>,
    address: std::net::SocketAddr,
    _server: JoinSet<()>,
}

type Shared = watch::Sender<Seen>;

impl FakeApi {
    /// Of a deployment of prefill and decode pools.
    pub(super) async fn start() -> Self {
        let deployment = json!({
            "apiVersion": "herd.dev/v1alpha1", "kind": "LlamaDeployment",
            "metadata": {"name": "m", "namespace": "n", "uid": "u", "generation": 1},
            "spec": {
                "model": {"source": "oci://r/m:1"}, "accelerator": {"kind": "CPU"},
                "prefill": {"minReplicas": 1, "maxReplicas": 4},
                "decode": {"minReplicas": 1, "maxReplicas": 4},
            },
        });
        let pool = |role: &str| {
            let name = format!("m-{role}");
            let pool = json!({
                "apiVersion": "herd.dev/v1alpha1", "kind": "LlamaPool",
                "metadata": {"name": name, "namespace": "n", "uid": name, "resourceVersion": "1",
                    "ownerReferences": [{"apiVersion": "herd.dev/v1alpha1", "kind": "LlamaDeployment",
                        "name": "m", "uid": "u", "controller": true}]},
                "spec": {"deploymentRef": {"name": "m"}, "role": role, "replicas": 1,
                    "targets": [{"revision": "r", "replicas": 1}]},
            });
            (name, pool)
        };
        let seen = watch::Sender::new(Seen {
            deployment,
            pools: ["prefill", "decode"].into_iter().map(pool).collect(),
            writes: Vec::new(),
            events: Vec::new(),
            meddle: 0,
        });
        let of = "/apis/herd.dev/v1alpha1/namespaces/n";
        let router = Router::new()
            .route(&format!("{of}/llamadeployments/m"), get(deployment_of))
            .route(&format!("{of}/llamapools/{{name}}"), get(pool_of).patch(scale))
            .route("/apis/events.k8s.io/v1/namespaces/n/events", post(event))
            .with_state(seen.clone());
        let (address, server) = serve(router).await;
        Self { seen, address, _server: server }
    }

    pub(super) fn context(&self) -> Context {
        fake_api::context(self.address, false)
    }

    pub(super) fn change(&self, change: impl FnOnce(&mut Seen)) {
        self.seen.send_modify(change);
    }

    pub(super) fn look<T>(&self, look: impl FnOnce(&Seen) -> T) -> T {
        look(&self.seen.borrow())
    }

    pub(super) async fn until(&self, condition: impl FnMut(&Seen) -> bool) {
        self.seen.subscribe().wait_for(condition).await.unwrap();
    }
}

async fn deployment_of(State(seen): State<Shared>) -> Json<Value> {
    Json(seen.borrow().deployment.clone())
}

async fn pool_of(State(seen): State<Shared>, Path(name): Path<String>) -> Response {
    let pool = seen.borrow().pools.get(&name).cloned();
    seen.send_modify(|seen| {
        if seen.meddle > 0 {
            seen.meddle -= 1;
            let pool = seen.pools.get_mut(&name).unwrap();
            let version: u64 = pool["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap();
            pool["metadata"]["resourceVersion"] = json!((version + 1).to_string());
        }
    });
    pool.map_or_else(|| refused(StatusCode::NOT_FOUND, "NotFound"), |pool| Json(pool).into_response())
}

async fn scale(State(seen): State<Shared>, Path(name): Path<String>, uri: Uri, body: String) -> Response {
    let patch: Value = serde_json::from_str(&body).unwrap();
    let (_, manager) = uri.query().unwrap().split_once("fieldManager=").unwrap();
    let mut answer = None;
    seen.send_modify(|seen| {
        let pool = seen.pools.get_mut(&name).unwrap();
        if patch["metadata"]["resourceVersion"] != pool["metadata"]["resourceVersion"] {
            answer = Some(refused(StatusCode::CONFLICT, "Conflict"));
            return;
        }
        pool["spec"]["replicas"] = patch["spec"]["replicas"].clone();
        seen.writes.push(format!("{name} {} by {}", patch["spec"]["replicas"], manager));
        answer = Some(Json(pool.clone()).into_response());
    });
    answer.unwrap()
}

async fn event(State(seen): State<Shared>, Json(event): Json<Value>) -> Json<Value> {
    let text = |field: &str| event[field].as_str().unwrap().to_owned();
    seen.send_modify(|seen| seen.events.push((text("reason"), text("note"))));
    Json(event)
}
