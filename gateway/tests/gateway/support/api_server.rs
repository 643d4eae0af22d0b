//! As much of a Kubernetes API server as a gateway looks at: list and watch of Services, `EndpointSlice`s and LlamaDeployments.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures::StreamExt;
use http::{HeaderMap, StatusCode, Uri};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::soon;

/// The server, in a test's hands.
pub(crate) struct ApiServer {
    pub(crate) address: SocketAddr,
    store: Store,
    serving: Option<Serving>,
}

struct Serving {
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

#[derive(Clone)]
struct Store {
    cluster: Arc<Mutex<Cluster>>,
    /// Rises with every change of the cluster.
    changed: watch::Sender<u64>,
    /// Rises when every watch is to end.
    cut: watch::Sender<u64>,
    /// No watch lasts.
    away: watch::Sender<bool>,
    /// Kinds whose lists are not answered.
    held: watch::Sender<Vec<&'static str>>,
}

#[derive(Default)]
struct Cluster {
    version: u64,
    /// By kind, namespace and name.
    objects: BTreeMap<(&'static str, String, String), Value>,
    log: Vec<(u64, Happened)>,
    /// What happened up to this version is forgotten.
    forgotten: u64,
    /// "list services" and the like.
    answered: Vec<String>,
}

enum Happened {
    Object { event: &'static str, kind: &'static str, object: Value },
    Bookmark,
}

pub(crate) const SERVICES: &str = "services";
pub(crate) const SLICES: &str = "endpointslices";
pub(crate) const DEPLOYMENTS: &str = "llamadeployments";

impl ApiServer {
    pub(crate) async fn start() -> Self {
        let store = Store {
            cluster: Arc::default(),
            changed: watch::Sender::new(0),
            cut: watch::Sender::new(0),
            away: watch::Sender::new(false),
            held: watch::Sender::new(Vec::new()),
        };
        let mut server = Self { address: "127.0.0.1:0".parse().unwrap(), store, serving: None };
        server.back().await;
        server
    }

    pub(crate) fn client(&self) -> kube::Client {
        let config = kube::Config::new(format!("http://{}", self.address).parse().unwrap());
        kube::Client::try_from(config).unwrap()
    }

    /// Closes every connection and listens no more.
    pub(crate) async fn away(&mut self) {
        let Serving { stop, task } = self.serving.take().unwrap();
        self.store.away.send_replace(true);
        stop.send_replace(true);
        soon(task).await.unwrap();
    }

    /// Listens again, at the same address.
    pub(crate) async fn back(&mut self) {
        let listener = tokio::net::TcpListener::bind(self.address).await.unwrap();
        self.address = listener.local_addr().unwrap();
        self.store.away.send_replace(false);
        let router = Router::new()
            .route("/api/v1/services", get(answer_all))
            .route("/api/v1/namespaces/{namespace}/services", get(answer_one))
            .route("/apis/discovery.k8s.io/v1/endpointslices", get(answer_all))
            .route("/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices", get(answer_one))
            .route("/apis/herd.dev/v1alpha1/llamadeployments", get(answer_all))
            .route("/apis/herd.dev/v1alpha1/namespaces/{namespace}/llamadeployments", get(answer_one))
            .with_state(self.store.clone());
        let stop = watch::Sender::new(false);
        let mut stopped = stop.subscribe();
        let task = tokio::spawn(async move {
            let until = async move { drop(stopped.wait_for(|stopped| *stopped).await) };
            axum::serve(listener, router).with_graceful_shutdown(until).await.unwrap();
        });
        self.serving = Some(Serving { stop, task });
    }

    /// A leaders' Service, and beside it one that is not for gateways.
    pub(crate) fn service(&self, namespace: &str, name: &str, names: &[&str]) {
        let ranks = format!("{name}-ranks");
        for (name, names, endpoints) in [(name, names, "leaders"), (&ranks, &["ranks"][..], "ranks")] {
            let mut object = metadata(namespace, name);
            let names = serde_json::to_string(names).unwrap();
            object["metadata"]["annotations"] = json!({"herd.dev/served-names": names, "other": "x"});
            object["metadata"]["labels"]["herd.dev/endpoints"] = json!(endpoints);
            self.store.put(SERVICES, namespace, name, object);
        }
    }

    /// The slice of a Service that holds one leader, ready or not; ports differ here, so each has a slice of its own.
    pub(crate) fn leader(&self, namespace: &str, service: &str, leader: &str, ready: bool) {
        let address: SocketAddr = leader.parse().unwrap();
        let name = slice_name(service, leader);
        let mut object = metadata(namespace, &name);
        object["metadata"]["labels"]["kubernetes.io/service-name"] = json!(service);
        object["addressType"] = json!("IPv4");
        object["ports"] = json!([{"name": "grpc", "port": address.port(), "protocol": "TCP"}]);
        let conditions = json!({"ready": ready, "serving": ready, "terminating": false});
        object["endpoints"] = json!([{"addresses": [address.ip().to_string()], "conditions": conditions}]);
        self.store.put(SLICES, namespace, &name, object);
    }

    /// A LlamaDeployment whose autoscaler said this last.
    pub(crate) fn decided(&self, namespace: &str, name: &str, last_scale: &Value) {
        let mut object = metadata(namespace, name);
        object["spec"] = json!({"model": {"source": "oci://r/m:1"}});
        object["status"] = json!({"lastScale": last_scale});
        self.store.put(DEPLOYMENTS, namespace, name, object);
    }

    pub(crate) fn deployment_gone(&self, namespace: &str, name: &str) {
        self.store.delete(DEPLOYMENTS, namespace, name);
    }

    /// That slice is deleted.
    pub(crate) fn leader_gone(&self, namespace: &str, service: &str, leader: &str) {
        self.store.delete(SLICES, namespace, &slice_name(service, leader));
    }

    pub(crate) fn service_gone(&self, namespace: &str, name: &str) {
        self.store.delete(SERVICES, namespace, name);
    }

    /// Ends every watch, as a connection that breaks does.
    pub(crate) fn cut(&self) {
        self.store.cut.send_modify(|cut| *cut += 1);
    }

    /// Tells every watch how far it is.
    pub(crate) fn bookmark(&self) {
        self.store.happened(|_| Happened::Bookmark);
    }

    /// Forgets what happened, more than any watch has seen: each has to list again.
    pub(crate) fn forget(&self) {
        self.store.happened(|cluster| {
            cluster.forgotten = cluster.version;
            cluster.log.clear();
            Happened::Bookmark
        });
    }

    /// Does not answer lists of these kinds until told otherwise.
    pub(crate) fn hold(&self, kinds: &[&'static str]) {
        self.store.held.send_replace(kinds.to_vec());
    }

    /// How often it answered this, such as "list services".
    pub(crate) fn answered(&self, what: &str) -> usize {
        self.store.lock().answered.iter().filter(|answered| *answered == what).count()
    }

    /// Waits until it has answered this so often.
    pub(crate) async fn until_answered(&self, what: &str, times: usize) {
        let mut changed = self.store.changed.subscribe();
        soon(async {
            while self.answered(what) < times {
                changed.changed().await.unwrap();
            }
        })
        .await;
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        if let Some(Serving { stop: _, task }) = &self.serving {
            task.abort();
        }
    }
}

fn slice_name(service: &str, leader: &str) -> String {
    format!("{service}-{}", leader.replace([':', '.'], "-"))
}

fn metadata(namespace: &str, name: &str) -> Value {
    json!({"metadata": {
        "namespace": namespace,
        "name": name,
        "uid": format!("{namespace}-{name}"),
        "labels": {"herd.dev/endpoints": "leaders"},
        "managedFields": [{"manager": "test", "operation": "Apply"}],
    }})
}

impl Store {
    fn lock(&self) -> MutexGuard<'_, Cluster> {
        self.cluster.lock().unwrap()
    }

    fn happened(&self, what: impl FnOnce(&mut Cluster) -> Happened) {
        let mut cluster = self.lock();
        cluster.version += 1;
        let happened = what(&mut cluster);
        let version = cluster.version;
        cluster.log.push((version, happened));
        drop(cluster);
        self.changed.send_modify(|changed| *changed += 1);
    }

    fn put(&self, kind: &'static str, namespace: &str, name: &str, mut object: Value) {
        self.happened(|cluster| {
            object["metadata"]["resourceVersion"] = json!(cluster.version.to_string());
            let key = (kind, namespace.to_owned(), name.to_owned());
            let before = cluster.objects.insert(key, object.clone());
            let event = if before.is_some() { "MODIFIED" } else { "ADDED" };
            Happened::Object { event, kind, object }
        });
    }

    fn delete(&self, kind: &'static str, namespace: &str, name: &str) {
        self.happened(|cluster| {
            let mut object = cluster.objects.remove(&(kind, namespace.to_owned(), name.to_owned())).unwrap();
            object["metadata"]["resourceVersion"] = json!(cluster.version.to_string());
            Happened::Object { event: "DELETED", kind, object }
        });
    }

    fn answered(&self, what: String) {
        self.lock().answered.push(what);
        self.changed.send_modify(|changed| *changed += 1);
    }
}

/// What a request asks for.
struct Asked {
    kind: &'static str,
    namespace: Option<String>,
    /// key=value.
    selector: Option<(String, String)>,
    version: u64,
    bookmarks: bool,
    metadata_only: bool,
}

async fn answer_all(state: State<Store>, uri: Uri, headers: HeaderMap) -> Response {
    answer(state.0, None, &uri, &headers).await
}

async fn answer_one(state: State<Store>, namespace: Path<String>, uri: Uri, headers: HeaderMap) -> Response {
    answer(state.0, Some(namespace.0), &uri, &headers).await
}

async fn answer(store: Store, namespace: Option<String>, uri: &Uri, headers: &HeaderMap) -> Response {
    let pairs = uri.query().unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
    let decoded = |value: &str| value.replace("%2F", "/").replace("%3D", "=");
    let query: BTreeMap<&str, String> = pairs.map(|(key, value)| (key, decoded(value))).collect();
    let accept = headers.get("accept").and_then(|accept| accept.to_str().ok()).unwrap_or_default();
    let asked = Asked {
        kind: [SERVICES, SLICES, DEPLOYMENTS].into_iter().find(|kind| uri.path().ends_with(kind)).unwrap(),
        namespace,
        selector: query.get("labelSelector").map(|selector| {
            let (key, value) = selector.split_once('=').unwrap();
            (key.to_owned(), value.to_owned())
        }),
        version: query.get("resourceVersion").and_then(|version| version.parse().ok()).unwrap_or(0),
        bookmarks: query.get("allowWatchBookmarks").is_some_and(|value| value == "true"),
        metadata_only: accept.contains("PartialObjectMetadata"),
    };
    if query.get("watch").is_some_and(|value| value == "true" || value == "1") {
        return watching(store, asked);
    }
    let _ = store.held.subscribe().wait_for(|held| !held.contains(&asked.kind)).await;
    let list = {
        let cluster = store.lock();
        let wanted = cluster.objects.iter().filter(|((kind, ..), object)| asked.wants(kind, object));
        let items: Vec<Value> = wanted.map(|(_, object)| asked.shown(object)).collect();
        let version = cluster.version.to_string();
        json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": version}, "items": items})
    };
    store.answered(format!("list {}", asked.kind));
    (StatusCode::OK, [("content-type", "application/json")], list.to_string()).into_response()
}

impl Asked {
    fn wants(&self, kind: &str, object: &Value) -> bool {
        let metadata = &object["metadata"];
        kind == self.kind
            && self.namespace.as_ref().is_none_or(|namespace| metadata["namespace"] == **namespace)
            && self.selector.as_ref().is_none_or(|(key, value)| metadata["labels"][key] == **value)
    }

    fn shown(&self, object: &Value) -> Value {
        let (version, kind) = match (self.metadata_only, self.kind) {
            (true, _) => ("meta.k8s.io/v1", "PartialObjectMetadata"),
            (false, SERVICES) => ("v1", "Service"),
            (false, DEPLOYMENTS) => ("herd.dev/v1alpha1", "LlamaDeployment"),
            (false, _) => ("discovery.k8s.io/v1", "EndpointSlice"),
        };
        let mut shown =
            if self.metadata_only { json!({"metadata": object["metadata"]}) } else { object.clone() };
        shown["apiVersion"] = json!(version);
        shown["kind"] = json!(kind);
        shown
    }

    /// The line of an event, if it is one for this watch.
    fn line(&self, version: u64, happened: &Happened) -> Option<String> {
        let event = match happened {
            Happened::Object { event, kind, object } if self.wants(kind, object) => {
                json!({"type": event, "object": self.shown(object)})
            }
            Happened::Bookmark if self.bookmarks => {
                let object = json!({"metadata": {"resourceVersion": version.to_string()}});
                json!({"type": "BOOKMARK", "object": self.shown(&object)})
            }
            Happened::Object { .. } | Happened::Bookmark => return None,
        };
        Some(format!("{event}\n"))
    }
}

/// The events after the version asked for, until the watches are cut.
fn watching(store: Store, asked: Asked) -> Response {
    let changed = store.changed.subscribe();
    let mut cut = store.cut.subscribe();
    let mut away = store.away.subscribe();
    let end = async move {
        tokio::select! {
            _ = cut.changed() => {}
            _ = away.wait_for(|away| *away) => {}
        }
    };
    store.answered(format!("watch {}", asked.kind));
    let seen = asked.version;
    let lines = futures::stream::unfold(Some((store, asked, changed, seen)), async |state| {
        let (store, asked, mut changed, mut seen) = state?;
        loop {
            changed.borrow_and_update();
            let mut lines = String::new();
            {
                let cluster = store.lock();
                if seen < cluster.forgotten {
                    let gone = json!({"type": "ERROR", "object": {
                        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                        "message": "too old resource version", "reason": "Expired", "code": 410,
                    }});
                    return Some((format!("{gone}\n"), None));
                }
                let news = cluster.log.iter().filter(|(version, _)| *version > seen);
                lines.extend(news.filter_map(|(version, happened)| asked.line(*version, happened)));
                seen = cluster.version;
            }
            if !lines.is_empty() {
                return Some((lines, Some((store, asked, changed, seen))));
            }
            changed.changed().await.ok()?;
        }
    });
    let body = Body::from_stream(lines.take_until(end).map(Ok::<_, Infallible>));
    (StatusCode::OK, [("content-type", "application/json")], body).into_response()
}
