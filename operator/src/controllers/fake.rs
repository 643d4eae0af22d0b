//! An API server of all namespaces, on loopback, whose lists are watched, that writes down what becomes of each object.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{Method, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router, body};
use herd_control::revision::GangTemplate;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::context::Context;
use crate::fake_api::{self, refused, selects, serve};

/// Longer than any test takes on a busy machine.
pub(super) const PATIENCE: Duration = Duration::from_mins(1);

#[derive(Debug, Default)]
pub(super) struct Seen {
    /// By "PLURAL/NAME".
    objects: BTreeMap<String, Value>,
    /// Objects that came or changed, in order.
    changes: Vec<(String, Value)>,
    /// Of each object, by "PLURAL/NAME".
    pub(super) statuses: BTreeMap<String, Value>,
    /// Names of pods that were made.
    pub(super) pods: Vec<String>,
    /// Object, reason and note of each Event.
    pub(super) events: Vec<[String; 3]>,
}

type Shared = Arc<watch::Sender<Seen>>;

/// Stops with its value.
pub(super) struct FakeApi {
    seen: Shared,
    address: std::net::SocketAddr,
    _server: JoinSet<()>,
}

impl FakeApi {
    pub(super) async fn start() -> Self {
        let seen: Shared = Arc::default();
        let router = Router::new().fallback(answer).with_state(Arc::clone(&seen));
        let (address, server) = serve(router).await;
        Self { seen, address, _server: server }
    }

    pub(super) fn context(&self) -> Arc<Context> {
        Arc::new(fake_api::context(self.address, false))
    }

    /// There from the beginning, or told to those who watch.
    pub(super) fn put(&self, plural: &str, object: Value) {
        let key = format!("{plural}/{}", object["metadata"]["name"].as_str().unwrap());
        self.seen.send_modify(|seen| {
            seen.changes.push((plural.to_owned(), object.clone()));
            seen.objects.insert(key, object);
        });
    }

    /// Waits until it is so.
    pub(super) async fn until(&self, what: &str, is_so: impl Fn(&Seen) -> bool) {
        let mut seen = self.seen.subscribe();
        let waited = timeout(PATIENCE, seen.wait_for(|seen| is_so(seen))).await.is_ok();
        let Seen { statuses, pods, events, .. } = &*self.seen.borrow();
        assert!(waited, "{what}: {:?} {pods:?} {events:?}", statuses.keys());
    }
}

async fn answer(State(seen): State<Shared>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let query = parts.uri.query().unwrap_or_default().to_owned();
    let body = body::to_bytes(body, 1 << 20).await.unwrap();
    let body: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
    let path = parts.uri.path();
    let (plural, rest) = match path.split_once("/namespaces/n/") {
        Some((_, rest)) => rest.split_once('/').unwrap_or((rest, "")),
        None => (path.rsplit('/').next().unwrap_or_default(), ""),
    };
    let (name, sub) = rest.split_once('/').unwrap_or((rest, ""));
    let key = format!("{plural}/{name}");
    match (parts.method, plural, name) {
        (Method::GET, _, "") if query.contains("watch=true") => {
            Body::from_stream(changes(&seen, plural)).into_response()
        }
        (Method::GET, _, "") => {
            let seen = seen.borrow();
            let of_kind = seen.objects.iter().filter(|(key, _)| key.split('/').next() == Some(plural));
            let items: Vec<&Value> =
                of_kind.map(|(_, object)| object).filter(|object| selects(&query, object)).collect();
            let metadata = json!({"resourceVersion": "1"});
            Json(json!({"apiVersion": "v1", "kind": "List", "metadata": metadata, "items": items}))
                .into_response()
        }
        (Method::GET, "controllerrevisions", _) => {
            let spec = json!({"source": "oci://r/m:1", "tensor": 1, "terminationGracePeriodSeconds": 600});
            let spec = serde_json::from_value(spec).unwrap();
            let template = GangTemplate { spec, image: "w:1".to_owned(), download: None };
            Json(json!({"apiVersion": "apps/v1", "kind": "ControllerRevision", "metadata": {"name": name},
                "revision": 1, "data": serde_json::to_value(template).unwrap()}))
            .into_response()
        }
        (Method::GET, ..) => match seen.borrow().objects.get(&key) {
            Some(object) => Json(object.clone()).into_response(),
            None => refused(StatusCode::NOT_FOUND, "NotFound"),
        },
        (_, "events", _) => {
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let event = [&body["regarding"]["name"], &body["reason"], &body["note"]].map(text);
            seen.send_modify(|seen| seen.events.push(event));
            Json(body).into_response()
        }
        (Method::POST, "pods", _) => {
            let pod = body["metadata"]["name"].as_str().unwrap().to_owned();
            if pod.starts_with("refused-") {
                return refused(StatusCode::FORBIDDEN, "exceeded quota");
            }
            seen.send_modify(|seen| seen.pods.push(pod.clone()));
            let mut made = body;
            made["metadata"]["uid"] = json!(pod);
            made["metadata"]["creationTimestamp"] = json!("2026-01-02T00:00:00Z");
            seen.send_modify(|seen| drop(seen.objects.insert(format!("pods/{pod}"), made.clone())));
            (StatusCode::CREATED, Json(made)).into_response()
        }
        (Method::PATCH, ..) if sub == "status" => {
            let mut object = Value::Null;
            seen.send_modify(|seen| {
                seen.statuses.insert(key.clone(), body["status"].clone());
                let there = seen.objects.get_mut(&key).unwrap();
                there["status"] = body["status"].clone();
                object = there.clone();
            });
            Json(object).into_response()
        }
        _ => refused(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed"),
    }
}

/// What watchers are told of a kind: all that came and changed, and then what comes.
fn changes(
    seen: &Shared,
    plural: &str,
) -> impl futures::Stream<Item = Result<Bytes, std::convert::Infallible>> + use<> {
    let (seen, plural) = (seen.subscribe(), plural.to_owned());
    futures::stream::unfold((seen, plural, 0), |(mut seen, plural, told)| async move {
        let (lines, told) = {
            let seen = seen.wait_for(|seen| seen.changes.len() > told).await.ok()?;
            let of_kind = seen.changes[told..].iter().filter(|(kind, _)| *kind == plural);
            let line = |(_, object): &(String, Value)| {
                format!("{}\n", json!({"type": "MODIFIED", "object": object}))
            };
            (of_kind.map(line).collect::<String>(), seen.changes.len())
        };
        Some((Ok(Bytes::from(lines)), (seen, plural, told)))
    })
}
