//! A worker, from its options to its end.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use herd_engine::{Engine, EngineLimits, Executor};
use herd_proto::MAX_MESSAGE_BYTES;
use herd_proto::internal::v1::Phase;
use herd_proto::internal::v1::worker_server::WorkerServer;
use tokio::sync::watch;
use tokio::task::{self, JoinSet};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::server::NamedService;
use tonic::service::Routes;

use crate::backend::{self, Model};
use crate::drain::Admission;
use crate::error::WorkerError;
use crate::gang::Gang;
use crate::http::{Pages, router};
use crate::identity::{Identity, new_epoch, new_gang_id};
use crate::metrics::Metrics;
use crate::net::{Peers, advertised, bind, serve_grpc, serve_http, serve_kv};
use crate::options::{WorkerLimits, WorkerOptions};
use crate::service::Service;
use crate::transfer::{MAX_FINGERPRINT_BYTES, Receiver, Store, receive};

/// For the tasks of a worker, connections included, to end once they were told to. Reached only where the other end of a
/// connection holds it open.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(3);

/// A gang that serves. Dropped, it ends: requests that run fail.
#[derive(Debug)]
pub struct Worker {
    gang: Arc<Gang>,
    grpc: SocketAddr,
    http: SocketAddr,
    kv: Vec<SocketAddr>,
    tasks: Tasks,
}

/// What a worker runs beside its engine; the names are for the log.
#[derive(Debug, Default)]
struct Tasks {
    set: JoinSet<Result<(), WorkerError>>,
    names: HashMap<task::Id, &'static str>,
}

impl Tasks {
    fn spawn(
        &mut self,
        name: &'static str,
        task: impl Future<Output = Result<(), WorkerError>> + Send + 'static,
    ) {
        let id = self.set.spawn(task).id();
        self.names.insert(id, name);
    }

    /// Waits until all have ended. Safe to cancel.
    async fn ended(&mut self) {
        while let Some(ended) = self.set.join_next_with_id().await {
            let id = ended.map_or_else(|error| error.id(), |(id, _)| id);
            self.names.remove(&id);
        }
    }

    /// Ends those that have not, and names them.
    fn cut(&mut self) -> Vec<&'static str> {
        self.set.abort_all();
        self.names.drain().map(|(_, name)| name).collect()
    }
}

impl Worker {
    /// Loads the model and serves it. Health and metrics are served from the beginning, gRPC once the gang is ready.
    pub async fn start(options: WorkerOptions) -> Result<Self, WorkerError> {
        let WorkerOptions {
            backend,
            grpc,
            http,
            kv,
            advertise,
            advertise_kv,
            limits,
            revision,
            gang_id,
            role,
            drain_deadline,
            lease,
            blocks_deadline,
        } = options;
        let shutdown = CancellationToken::new();
        let metrics = Arc::new(Metrics::new()?);
        let gang_cell = Arc::new(OnceLock::new());
        let mut tasks = Tasks::default();

        let (listener, http) = bind(http, "HTTP").await?;
        let pages = Pages { metrics: Arc::clone(&metrics), gang: Arc::clone(&gang_cell) };
        tasks.spawn("HTTP", serve_http(listener, router(pages), shutdown.clone()));
        // A port that is taken is known before the model is loaded.
        let (grpc_listener, grpc) = bind(grpc, "gRPC").await?;
        let endpoint = advertised(advertise.as_deref(), grpc)?;

        let (executor, model) = task::spawn_blocking(move || backend::load(backend, &limits))
            .await
            .map_err(|error| WorkerError::Internal(format!("loading the model: {error}")))??;
        if model.kv_fingerprint.len() > MAX_FINGERPRINT_BYTES {
            return Err(WorkerError::Internal(format!(
                "kv fingerprint {} is too long",
                model.kv_fingerprint
            )));
        }
        metrics.kv_blocks(model.kv_blocks);
        let engine = start_engine(executor, &model, limits)?;

        let ranks = engine.kv().len();
        let mut kv_listeners = Vec::with_capacity(ranks);
        let mut kv_addresses = Vec::with_capacity(ranks);
        let mut kv_endpoints = Vec::with_capacity(ranks);
        for rank in 0..ranks {
            let (listener, bound) = bind(rank_address(kv, rank)?, "KV").await?;
            kv_endpoints.push(advertised(advertise.as_deref(), bound)?);
            kv_addresses.push(bound);
            kv_listeners.push(listener);
        }
        if let Some(given) = advertise_kv {
            if given.len() != ranks {
                let problem = format!("names {} addresses for {ranks} ranks", given.len());
                return Err(WorkerError::Option { option: "--advertise-kv", problem });
            }
            kv_endpoints = given;
        }

        let capacity = engine.limits().running_sequences() + engine.limits().max_waiting;
        let gang = Arc::new(Gang {
            identity: Identity {
                gang_id: gang_id.unwrap_or_else(new_gang_id),
                epoch: new_epoch(),
                revision,
                model_digest: model.digest.clone(),
            },
            model,
            engine,
            admission: Arc::new(Admission::new(capacity)),
            role: watch::Sender::new(role),
            transfers: Arc::default(),
            peers: Peers::default(),
            metrics,
            endpoint,
            kv_endpoints,
            lease,
            blocks_deadline,
            drain_deadline,
            shutdown: shutdown.clone(),
        });
        for (rank, listener) in kv_listeners.into_iter().enumerate() {
            tasks.spawn("KV", serve_rank(receiver(&gang, rank), listener, shutdown.clone()));
        }
        let (reporter, health) = tonic_health::server::health_reporter();
        reporter.set_serving::<WorkerServer<Service>>().await;
        let server = WorkerServer::new(Service::new(Arc::clone(&gang)))
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let routes = Routes::new(server).add_service(health);
        tasks.spawn("gRPC", serve_grpc(grpc_listener, routes, shutdown));
        tasks.spawn("health", report_draining(Arc::clone(&gang), reporter));
        // The only place that sets it.
        let _ = gang_cell.set(Arc::clone(&gang));
        tracing::info!(
            gang = gang.identity.gang_id,
            epoch = gang.identity.epoch,
            endpoint = gang.endpoint,
            tensor = gang.model.shards.tensor(),
            kv_blocks = gang.model.kv_blocks,
            "ready"
        );
        Ok(Self { gang, grpc, http, kv: kv_addresses, tasks })
    }

    /// Where the internal gRPC service listens.
    pub fn endpoint(&self) -> SocketAddr {
        self.grpc
    }

    /// Where health and metrics are served.
    pub fn http(&self) -> SocketAddr {
        self.http
    }

    /// Where each rank takes KV frames.
    pub fn kv(&self) -> &[SocketAddr] {
        &self.kv
    }

    /// Takes no new request and waits for those that run, for `deadline` or as long as the options say. Returns how many had
    /// to be aborted.
    pub async fn drain(&self, deadline: Option<Duration>) -> usize {
        self.gang.admission.drain(deadline.unwrap_or(self.gang.drain_deadline)).await
    }

    /// `Decode` and `Prefill` calls that are being served.
    pub fn running(&self) -> usize {
        self.gang.admission.running()
    }

    /// Resolves when the worker cannot go on, with the reason.
    pub async fn failed(&mut self) -> WorkerError {
        let stopped = self.gang.engine.stopped();
        tokio::select! {
            reason = stopped => WorkerError::EngineStopped(reason),
            task = self.tasks.set.join_next() => match task {
                Some(Ok(Err(error))) => error,
                Some(Err(error)) => WorkerError::Internal(error.to_string()),
                Some(Ok(Ok(()))) | None => WorkerError::Internal("a server ended".to_owned()),
            },
        }
    }

    /// Ends what runs, closes all connections and waits, for a few seconds at most, until the engine is gone. Returns what
    /// did not end by itself in that time: the names of the servers that had to be cut, none as a rule.
    pub async fn shutdown(mut self) -> Vec<&'static str> {
        self.stop();
        let _ = timeout(SHUTDOWN_DEADLINE, self.tasks.ended()).await;
        let cut = self.tasks.cut();
        if !cut.is_empty() {
            tracing::warn!(servers = ?cut, "cut what did not end within {SHUTDOWN_DEADLINE:?}");
        }
        // The last handle of the engine joins its thread.
        let _ = task::spawn_blocking(move || drop(self)).await;
        cut
    }

    fn stop(&self) {
        self.gang.admission.abort();
        self.gang.shutdown.cancel();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop();
    }
}

fn start_engine(
    executor: Box<dyn Executor>,
    model: &Model,
    limits: WorkerLimits,
) -> Result<Engine, WorkerError> {
    let WorkerLimits { max_step_tokens, max_sequences, max_waiting, context_length } = limits;
    let longest = model.config.context_length;
    let context_length = context_length.unwrap_or(longest);
    if context_length > longest {
        let problem = format!("{context_length} is more than the model's {longest}");
        return Err(WorkerError::Option { option: "--context-length", problem });
    }
    let (kv_blocks, block_tokens) = (model.kv_blocks, model.block_tokens);
    // What the cache cannot hold is no context to promise.
    let context_length = context_length.min(kv_blocks.saturating_mul(block_tokens));
    let limits =
        EngineLimits { context_length, kv_blocks, block_tokens, max_step_tokens, max_sequences, max_waiting };
    Ok(Engine::start(executor, limits))
}

fn rank_address(first: SocketAddr, rank: usize) -> Result<SocketAddr, WorkerError> {
    let port = match first.port() {
        0 => Some(0),
        port => u16::try_from(rank).ok().and_then(|rank| port.checked_add(rank)),
    };
    let problem = || format!("port {} leaves none for rank {rank}", first.port());
    let port = port.ok_or_else(|| WorkerError::Option { option: "--kv-bind", problem: problem() })?;
    Ok(SocketAddr::new(first.ip(), port))
}

fn receiver(gang: &Gang, rank: usize) -> Receiver {
    let Gang { identity, model, engine, transfers, metrics, .. } = gang;
    Receiver {
        rank: rank as u16,
        epoch: identity.epoch,
        fingerprint: model.kv_fingerprint.clone(),
        dtype: model.dtype,
        layers: model.config.layers,
        block_tokens: model.block_tokens,
        store: Store(Arc::clone(&engine.kv()[rank])),
        transfers: Arc::clone(transfers),
        metrics: Arc::clone(metrics),
    }
}

async fn serve_rank(
    receiver: Receiver,
    listener: tokio::net::TcpListener,
    shutdown: CancellationToken,
) -> Result<(), WorkerError> {
    tokio::select! {
        () = serve_kv(listener, move |stream| receive(receiver.clone(), stream)) => {}
        () = shutdown.cancelled() => {}
    }
    Ok(())
}

/// Tells the gRPC health service about a drain, and ends the streams that watch it.
async fn report_draining(
    gang: Arc<Gang>,
    mut reporter: tonic_health::server::HealthReporter,
) -> Result<(), WorkerError> {
    let mut phase = gang.admission.watch_phase();
    tokio::select! {
        _ = phase.wait_for(|phase| *phase == Phase::Draining) => {}
        () = gang.shutdown.cancelled() => {}
    }
    reporter.set_not_serving::<WorkerServer<Service>>().await;
    reporter.set_service_status("", tonic_health::ServingStatus::NotServing).await;
    gang.shutdown.cancelled().await;
    for service in [<WorkerServer<Service> as NamedService>::NAME, ""] {
        reporter.clear_service_status(service).await;
    }
    Ok(())
}
