//! An API server of one namespace, on loopback, that keeps what it is given and writes down what was done.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::extract::{Request, State};
use axum::http::{Method, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router, body};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::context::Context;
use crate::fake_api::{self, refused, selects, serve};

#[derive(Debug, Default)]
pub(super) struct Seen {
    /// By "PLURAL/NAME".
    pub(super) objects: BTreeMap<String, Value>,
    /// "create PLURAL", "apply PLURAL", "status PLURAL", "delete PLURAL".
    pub(super) writes: Vec<String>,
    /// Of these nothing can be created.
    pub(super) refuses: Option<&'static str>,
    /// All that were asked for.
    pub(super) plurals: Vec<String>,
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
    pub(super) async fn start(deployment: Value) -> Self {
        let mut seen = Seen::default();
        seen.objects.insert("llamadeployments/m".to_owned(), deployment);
        let seen = Arc::new(Mutex::new(seen));
        let router = Router::new().fallback(answer).with_state(Arc::clone(&seen));
        let (address, server) = serve(router).await;
        Self { seen, address, _server: server }
    }

    pub(super) fn context(&self) -> Context {
        fake_api::context(self.address, false)
    }

    pub(super) fn seen(&self) -> MutexGuard<'_, Seen> {
        lock(&self.seen)
    }

    /// Since the last look.
    pub(super) fn writes(&self) -> Vec<String> {
        std::mem::take(&mut self.seen().writes)
    }

    /// The only one of its kind.
    pub(super) fn only(&self, plural: &str) -> Option<(String, Value)> {
        let seen = self.seen();
        let mut of_kind = seen.objects.iter().filter(|(name, _)| name.split('/').next() == Some(plural));
        let first = of_kind.next().map(|(name, object)| (name.clone(), object.clone()));
        assert!(of_kind.next().is_none(), "several {plural}");
        first
    }
}

fn lock(seen: &Shared) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn answer(State(seen): State<Shared>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let body = body::to_bytes(body, 1 << 20).await.unwrap();
    let body: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
    let mut words = parts.uri.path().split("/namespaces/n/").nth(1).unwrap_or_default().split('/');
    let plural = words.next().unwrap_or_default().to_owned();
    let (name, sub) = (words.next(), words.next());
    let mut seen = lock(&seen);
    seen.plurals.push(plural.clone());
    let key = |name: &str| format!("{plural}/{name}");
    match (parts.method, name, sub) {
        (Method::POST, None, None) if plural == "events" => Json(body).into_response(),
        (Method::GET, None, None) => {
            let query = parts.uri.query().unwrap_or_default();
            let of_kind = seen.objects.iter().filter(|(name, _)| name.starts_with(&key("")));
            let items: Vec<&Value> =
                of_kind.map(|(_, object)| object).filter(|object| selects(query, object)).collect();
            Json(json!({"apiVersion": "v1", "kind": "List", "metadata": {}, "items": items})).into_response()
        }
        (Method::GET, Some(name), None) => match seen.objects.get(&key(name)) {
            Some(object) => Json(object.clone()).into_response(),
            None => refused(StatusCode::NOT_FOUND, "NotFound"),
        },
        (Method::POST, None, None) => {
            if seen.refuses == Some(plural.as_str()) {
                return refused(StatusCode::FORBIDDEN, "Forbidden");
            }
            let object = stored(&mut seen, body);
            let name = object["metadata"]["name"].as_str().unwrap().to_owned();
            seen.writes.push(format!("create {plural}"));
            seen.objects.insert(key(&name), object.clone());
            (StatusCode::CREATED, Json(object)).into_response()
        }
        (Method::PATCH, Some(name), None) => {
            let mut object = stored(&mut seen, body);
            if let Some(before) = seen.objects.get(&key(name)) {
                object["status"] = before["status"].clone();
            }
            seen.writes.push(format!("apply {plural}"));
            seen.objects.insert(key(name), object.clone());
            Json(object).into_response()
        }
        (Method::PATCH, Some(name), Some("status")) => {
            let object = seen.objects.get_mut(&key(name)).unwrap();
            object["status"] = body["status"].clone();
            let object = object.clone();
            seen.writes.push(format!("status {plural}"));
            Json(object).into_response()
        }
        (Method::DELETE, Some(name), None) => match seen.objects.remove(&key(name)) {
            Some(object) => {
                assert_eq!(body["preconditions"]["uid"], object["metadata"]["uid"]);
                seen.writes.push(format!("delete {plural}"));
                Json(object).into_response()
            }
            None => refused(StatusCode::NOT_FOUND, "NotFound"),
        },
        _ => refused(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed"),
    }
}

fn stored(seen: &mut Seen, mut object: Value) -> Value {
    seen.made += 1;
    object["metadata"]["uid"] = json!(format!("uid-{}", seen.made));
    object["metadata"]["creationTimestamp"] = json!("2026-01-02T00:00:00Z");
    object
}
