//! An API server of one lease, on loopback.

#![expect(clippy::result_large_err, reason = "an error is a whole response here")]

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use kube::{Client, Config};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::{Barrier, Mutex, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

/// Longer than any test takes on a busy machine.
const PATIENCE: Duration = Duration::from_mins(1);

/// How the server answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Up,
    /// An error to every request.
    Failing,
    /// No answer at all.
    Silent,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    pub(super) lease: Option<Lease>,
    pub(super) reads: usize,
    pub(super) writes: usize,
    /// Requests answered with an error because the server fails.
    pub(super) failed: usize,
    version: u64,
}

impl Seen {
    pub(super) fn spec(&self) -> LeaseSpec {
        self.lease.as_ref().and_then(|lease| lease.spec.clone()).unwrap_or_default()
    }

    pub(super) fn holder(&self) -> String {
        self.spec().holder_identity.unwrap_or_default()
    }

    fn put(&mut self, mut lease: Lease) -> Lease {
        self.version += 1;
        lease.metadata.resource_version = Some(self.version.to_string());
        self.lease = Some(lease.clone());
        lease
    }
}

struct Shared {
    seen: watch::Sender<Seen>,
    mode: watch::Sender<Mode>,
    /// Holds the first reads until so many have come.
    gate: Mutex<Option<Arc<Barrier>>>,
}

/// Stops with its value.
pub(super) struct FakeApi {
    shared: Arc<Shared>,
    address: std::net::SocketAddr,
    _server: JoinSet<()>,
}

impl FakeApi {
    pub(super) async fn start() -> Self {
        let shared = Arc::new(Shared {
            seen: watch::Sender::new(Seen::default()),
            mode: watch::Sender::new(Mode::Up),
            gate: Mutex::default(),
        });
        let leases = "/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases";
        let router = Router::new()
            .route(leases, post(create))
            .route(&format!("{leases}/{{name}}"), get(read).put(replace))
            .with_state(Arc::clone(&shared));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut server = JoinSet::new();
        server.spawn(async { axum::serve(listener, router).await.unwrap() });
        Self { shared, address, _server: server }
    }

    pub(super) fn client(&self) -> Client {
        let mut config = Config::new(format!("http://{}", self.address).parse().unwrap());
        config.default_retry = false;
        Client::try_from(config).unwrap()
    }

    pub(super) fn answer(&self, mode: Mode) {
        self.shared.mode.send_replace(mode);
    }

    /// The next two reads are answered together.
    pub(super) async fn pair_reads(&self) {
        *self.shared.gate.lock().await = Some(Arc::new(Barrier::new(2)));
    }

    pub(super) fn seen(&self) -> Seen {
        self.shared.seen.borrow().clone()
    }

    /// Changes the lease as somebody else would.
    pub(super) fn meddle(&self, change: impl FnOnce(&mut Lease)) {
        self.shared.seen.send_modify(|seen| {
            let mut lease = seen.lease.clone().unwrap();
            change(&mut lease);
            seen.put(lease);
        });
    }

    pub(super) fn delete(&self) {
        self.shared.seen.send_modify(|seen| seen.lease = None);
    }

    pub(super) async fn until(&self, what: &str, condition: impl FnMut(&Seen) -> bool) -> Seen {
        let mut receiver = self.shared.seen.subscribe();
        let seen = timeout(PATIENCE, receiver.wait_for(condition)).await;
        seen.unwrap_or_else(|_| panic!("never seen: {what}")).unwrap().clone()
    }
}

/// Waits for what must come.
pub(super) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("never: {what}"))
}

fn refuse(code: StatusCode, reason: &str) -> Response {
    let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": reason,
        "reason": reason, "code": code.as_u16()});
    (code, Json(status)).into_response()
}

/// `Err` unless the server is up; while it is silent, nothing.
async fn available(shared: &Shared) -> Result<(), Response> {
    let mut mode = shared.mode.subscribe();
    let mode = *mode.wait_for(|mode| *mode != Mode::Silent).await.unwrap();
    if mode == Mode::Up {
        return Ok(());
    }
    shared.seen.send_modify(|seen| seen.failed += 1);
    Err(refuse(StatusCode::INTERNAL_SERVER_ERROR, "InternalError"))
}

async fn read(State(shared): State<Arc<Shared>>) -> Result<Response, Response> {
    available(&shared).await?;
    let lease = shared.seen.borrow().lease.clone();
    let gate = shared.gate.lock().await.clone();
    if let Some(gate) = gate {
        gate.wait().await;
        *shared.gate.lock().await = None;
    }
    shared.seen.send_modify(|seen| seen.reads += 1);
    lease.map(|lease| Json(lease).into_response()).ok_or_else(|| refuse(StatusCode::NOT_FOUND, "NotFound"))
}

async fn create(State(shared): State<Arc<Shared>>, Json(lease): Json<Lease>) -> Result<Response, Response> {
    available(&shared).await?;
    write(&shared, |seen| match seen.lease {
        Some(_) => Err(refuse(StatusCode::CONFLICT, "AlreadyExists")),
        None => Ok(seen.put(lease)),
    })
}

async fn replace(
    State(shared): State<Arc<Shared>>,
    Path((_, name)): Path<(String, String)>,
    Json(lease): Json<Lease>,
) -> Result<Response, Response> {
    available(&shared).await?;
    write(&shared, |seen| match &seen.lease {
        None => Err(refuse(StatusCode::NOT_FOUND, "NotFound")),
        Some(_) if lease.metadata.name.as_ref() != Some(&name) => {
            Err(refuse(StatusCode::BAD_REQUEST, "BadRequest"))
        }
        Some(old) if old.metadata.resource_version != lease.metadata.resource_version => {
            Err(refuse(StatusCode::CONFLICT, "Conflict"))
        }
        Some(_) => Ok(seen.put(lease)),
    })
}

fn write(
    shared: &Shared,
    change: impl FnOnce(&mut Seen) -> Result<Lease, Response>,
) -> Result<Response, Response> {
    let mut answer = Err(StatusCode::INTERNAL_SERVER_ERROR.into_response());
    shared.seen.send_modify(|seen| {
        seen.writes += 1;
        answer = change(seen);
    });
    answer.map(|lease| Json(lease).into_response())
}
