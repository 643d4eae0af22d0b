//! A worker, from its options to its end.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use herd_engine::{CpuRanks, Engine, EngineLimits, Executor, Observer};
use herd_proto::MAX_MESSAGE_BYTES;
use herd_proto::internal::v1::Phase;
use herd_proto::internal::v1::rank_server::RankServer;
use herd_proto::internal::v1::worker_server::WorkerServer;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::{self, JoinSet};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::server::NamedService;
use tonic::service::Routes;
use tonic_health::ServingStatus;

use crate::backend::{self, Model};
use crate::drafts::{Drafts, LoadedDrafts};
use crate::error::WorkerError;
use crate::gang::{Current, Gang, Host};
use crate::http::{Pages, Process, router};
use crate::identity::{new_epoch, new_gang_id};
use crate::metrics::Metrics;
use crate::net::{advertised, bind, serve_grpc, serve_http, serve_kv};
use crate::options::{Backend, GangPart, WorkerLimits, WorkerOptions};
use crate::ranks::{Leader, RankService};
use crate::service::Service;
use crate::transfer::{MAX_FINGERPRINT_BYTES, Receiver, receive};

/// For the tasks of a worker, connections included, to end once they were told to. Reached only where the other end of a
/// connection holds it open.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(3);

/// Processes of a gang that call before the leader looks. Each calls again if it has to.
const MAX_CANDIDATES: usize = 256;

/// A gang that serves, or its leader where it is several processes. Dropped, it ends: requests that run fail.
#[derive(Debug)]
pub struct Worker {
    current: Current,
    /// Where the gang is one process and has one epoch.
    only: Option<watch::Sender<Option<Arc<Gang>>>>,
    grpc: SocketAddr,
    http: SocketAddr,
    kv: Vec<SocketAddr>,
    drain_deadline: Duration,
    draining: CancellationToken,
    shutdown: CancellationToken,
    tasks: Tasks,
}

/// What a worker runs beside its engine; the names are for the log.
#[derive(Debug, Default)]
pub(crate) struct Tasks {
    pub(crate) set: JoinSet<Result<(), WorkerError>>,
    names: HashMap<task::Id, &'static str>,
}

impl Tasks {
    pub(crate) fn spawn(
        &mut self,
        name: &'static str,
        task: impl Future<Output = Result<(), WorkerError>> + Send + 'static,
    ) {
        let id = self.set.spawn(task).id();
        self.names.insert(id, name);
    }

    /// Resolves when one of them ends, which none does before it is told to.
    pub(crate) async fn failed(&mut self) -> WorkerError {
        match self.set.join_next().await {
            Some(Ok(Err(error))) => error,
            Some(Err(error)) => WorkerError::Internal(error.to_string()),
            Some(Ok(Ok(()))) | None => WorkerError::Internal("a server ended".to_owned()),
        }
    }

    /// Waits, for a few seconds at most, until those that were told to end have ended; names those that had to be cut.
    pub(crate) async fn end(&mut self) -> Vec<&'static str> {
        let _ = timeout(SHUTDOWN_DEADLINE, self.ended()).await;
        let cut = self.cut();
        if !cut.is_empty() {
            tracing::warn!(servers = ?cut, "cut what did not end within {SHUTDOWN_DEADLINE:?}");
        }
        cut
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
    /// Loads the model and serves it. Health and metrics are served from the beginning, gRPC once the model is loaded. The
    /// leader of a gang of several processes is ready when all of them are there.
    pub async fn start(options: WorkerOptions) -> Result<Self, WorkerError> {
        let WorkerOptions {
            backend,
            grpc,
            http,
            kv,
            advertise,
            advertise_kv,
            limits,
            drafts,
            revision,
            gang_id,
            role,
            part,
            drain_deadline,
            lease,
            blocks_deadline,
            metrics: metric_options,
        } = options;
        let (shutdown, draining) = (CancellationToken::new(), CancellationToken::new());
        let metrics = Arc::new(Metrics::new(metric_options)?);
        let (sender, current) = watch::channel(None);
        let mut tasks = Tasks::default();

        let (listener, http) = bind(http, "HTTP").await?;
        let pages = Pages { metrics: Arc::clone(&metrics), process: Process::Leader(current.clone()) };
        tasks.spawn("HTTP", serve_http(listener, router(pages), shutdown.clone()));
        // A port that is taken is known before the model is loaded.
        let (grpc_listener, grpc) = bind(grpc, "gRPC").await?;
        let endpoint = advertised(advertise.as_deref(), grpc)?;
        let (loaded, model) = load(backend, limits, part, drafts).await?;
        metrics.clipped(model.clipped.clone());
        let host = Host {
            gang_id: gang_id.unwrap_or_else(new_gang_id),
            revision,
            role: Arc::new(watch::Sender::new(role)),
            peers: Arc::default(),
            metrics,
            endpoint,
            lease,
            blocks_deadline,
            drain_deadline,
            shutdown: shutdown.clone(),
        };
        let ranks = match &loaded {
            Loaded::Whole(executor) => executor.kv().len(),
            Loaded::Part(ranks, _) => ranks.kv().len(),
        };
        let (kv_listeners, kv, mut kv_endpoints) = listen_kv(kv, ranks, advertise.as_deref()).await?;
        if let Some(given) = advertise_kv {
            if given.len() != ranks {
                let problem = format!("names {} addresses for {ranks} ranks", given.len());
                return Err(WorkerError::Option { option: "--advertise-kv", problem });
            }
            kv_endpoints = given;
        }
        for (rank, listener) in kv_listeners.into_iter().enumerate() {
            let current = current.clone();
            let receiver = move || current.borrow().as_deref().and_then(|gang| receiver(gang, rank));
            tasks.spawn("KV", serve_rank(listener, receiver, shutdown.clone()));
        }
        let (reporter, health) = tonic_health::server::health_reporter();
        let server = WorkerServer::new(Service::new(current.clone(), Arc::clone(&host.metrics)))
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let mut routes = Routes::new(server).add_service(health);
        let only = match loaded {
            Loaded::Part(ranks, part) => {
                let (listener, bound) = bind(part.bind, "ranks").await?;
                let (candidates, incoming) = mpsc::channel(MAX_CANDIDATES);
                let expected = part.expected(&host, &model);
                routes = routes.add_service(RankServer::new(RankService::new(expected, candidates)));
                let leader = Leader {
                    endpoint: advertised(advertise.as_deref(), bound)?,
                    host,
                    ranks,
                    model,
                    limits,
                    ranks_per_pod: part.ranks_per_pod,
                    listener,
                    kv_endpoints,
                    candidates: incoming,
                    current: sender,
                    draining: draining.clone(),
                };
                tasks.spawn("leader", leader.run());
                None
            }
            Loaded::Whole(executor) => {
                let engine = start_engine(executor, &model, limits, &host.metrics)?;
                let gang = Arc::new(host.gang(new_epoch(), model, engine, kv_endpoints, None));
                tasks.spawn("engine", engine_stops(gang.engine.stopped(), shutdown.clone()));
                sender.send_replace(Some(Arc::clone(&gang)));
                gang.says_ready();
                Some(sender)
            }
        };
        tasks.spawn("health", report_health(current.clone(), reporter, shutdown.clone()));
        tasks.spawn("gRPC", serve_grpc(grpc_listener, routes, shutdown.clone()));
        Ok(Self { current, only, grpc, http, kv, drain_deadline, draining, shutdown, tasks })
    }

    /// Resolves when the gang is whole: for one of several processes, when all are there.
    pub async fn ready(&self) {
        // An error is a leader that has ended: `failed` says so.
        let _ = self.current.clone().wait_for(Option::is_some).await;
    }

    /// Where the internal gRPC service listens.
    pub fn endpoint(&self) -> SocketAddr {
        self.grpc
    }

    /// Where health and metrics are served.
    pub fn http(&self) -> SocketAddr {
        self.http
    }

    /// Where each rank of this process takes KV frames.
    pub fn kv(&self) -> &[SocketAddr] {
        &self.kv
    }

    /// Takes no new request and waits for those that run, for `deadline` or as long as the options say. Returns how many had
    /// to be aborted.
    pub async fn drain(&self, deadline: Option<Duration>) -> usize {
        self.draining.cancel();
        let gang = self.current.borrow().clone();
        match gang {
            Some(gang) => gang.admission.drain(deadline.unwrap_or(self.drain_deadline)).await,
            None => 0,
        }
    }

    /// `Decode` and `Prefill` calls that are being served.
    pub fn running(&self) -> usize {
        self.current.borrow().as_ref().map_or(0, |gang| gang.admission.running())
    }

    /// Resolves when the worker cannot go on, with the reason.
    pub async fn failed(&mut self) -> WorkerError {
        self.tasks.failed().await
    }

    /// Ends what runs, closes all connections and waits, for a few seconds at most, until the engine is gone. Returns what
    /// did not end by itself in that time: the names of the servers that had to be cut, none as a rule.
    pub async fn shutdown(mut self) -> Vec<&'static str> {
        self.stop();
        let cut = self.tasks.end().await;
        let gang = self.only.as_ref().and_then(|only| only.send_replace(None));
        // The last handle of the engine joins its thread.
        let _ = task::spawn_blocking(move || drop((gang, self))).await;
        cut
    }

    fn stop(&self) {
        if let Some(gang) = self.current.borrow().as_ref() {
            gang.admission.abort("the worker shuts down");
        }
        self.shutdown.cancel();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop();
    }
}

/// What runs steps, or will when the gang is whole.
enum Loaded {
    Whole(Box<dyn Executor>),
    Part(Arc<CpuRanks>, GangPart),
}

async fn load(
    backend: Backend,
    limits: WorkerLimits,
    part: Option<GangPart>,
    drafts: Option<Drafts>,
) -> Result<(Loaded, Model), WorkerError> {
    let load = move || {
        let beside = drafts.as_ref().map(|drafts| drafts.beside(&backend)).transpose()?.flatten();
        let (loaded, mut model) = match part {
            None => {
                let (executor, model) = backend::load(backend, &limits)?;
                (Loaded::Whole(executor), model)
            }
            Some(part) => {
                let (ranks, model) = backend::load_part(backend, &limits, &part)?;
                (Loaded::Part(Arc::new(ranks), part), model)
            }
        };
        if let Some(drafts) = &drafts {
            model.drafts = LoadedDrafts::load(drafts, beside, &model)?;
        }
        Ok::<_, WorkerError>((loaded, model))
    };
    let loaded = task::spawn_blocking(load).await;
    let (loaded, model) =
        loaded.map_err(|error| WorkerError::Internal(format!("loading the model: {error}")))??;
    if model.kv_fingerprint.len() > MAX_FINGERPRINT_BYTES {
        return Err(WorkerError::Internal(format!("kv fingerprint {} is too long", model.kv_fingerprint)));
    }
    Ok((loaded, model))
}

/// Listens for KV of each rank of this process; the listeners, where they are bound and how others reach them.
pub(crate) async fn listen_kv(
    first: SocketAddr,
    ranks: usize,
    advertise: Option<&str>,
) -> Result<(Vec<TcpListener>, Vec<SocketAddr>, Vec<String>), WorkerError> {
    let (mut listeners, mut addresses, mut endpoints) = (Vec::new(), Vec::new(), Vec::new());
    for rank in 0..ranks {
        let (listener, bound) = bind(rank_address(first, rank)?, "KV").await?;
        endpoints.push(advertised(advertise, bound)?);
        addresses.push(bound);
        listeners.push(listener);
    }
    Ok((listeners, addresses, endpoints))
}

pub(crate) fn start_engine(
    executor: Box<dyn Executor>,
    model: &Model,
    limits: WorkerLimits,
    metrics: &Arc<Metrics>,
) -> Result<Engine, WorkerError> {
    let WorkerLimits {
        max_step_tokens,
        max_sequences,
        max_waiting,
        context_length,
        prefix_cache,
        kv_host_blocks: _,
    } = limits;
    let longest = model.config.context_length;
    let context_length = context_length.unwrap_or(longest);
    if context_length > longest {
        let problem = format!("{context_length} is more than the model's {longest}");
        return Err(WorkerError::Option { option: "--context-length", problem });
    }
    let (kv_blocks, block_tokens) = (model.kv_blocks, model.block_tokens);
    // What the cache cannot hold is no context to promise.
    let context_length = context_length.min(kv_blocks.saturating_mul(block_tokens));
    let limits = EngineLimits {
        context_length,
        kv_blocks,
        block_tokens,
        max_step_tokens,
        max_sequences,
        max_waiting,
        prefix_cache,
        host_blocks: model.host_blocks,
        draft_tokens: model.drafts.tokens(),
    };
    let observer: Arc<dyn Observer> = Arc::<Metrics>::clone(metrics);
    Ok(Engine::start_with(executor, model.drafts.drafter()?, limits, observer))
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

fn receiver(gang: &Gang, rank: usize) -> Option<Receiver> {
    let Gang { identity, model, engine, transfers, metrics, .. } = gang;
    let store = Arc::clone(engine.kv().get(rank)?);
    Some(model.receiver((rank as u16, rank), identity.epoch, store, transfers, metrics))
}

/// Takes KV for one rank of this process. Without a receiver, between two epochs, nobody is owed an answer.
pub(crate) async fn serve_rank(
    listener: TcpListener,
    receiver: impl Fn() -> Option<Receiver>,
    shutdown: CancellationToken,
) -> Result<(), WorkerError> {
    let take = |stream| {
        let receiver = receiver();
        async move {
            if let Some(receiver) = receiver {
                receive(receiver, stream).await;
            }
        }
    };
    tokio::select! {
        () = serve_kv(listener, take) => {}
        () = shutdown.cancelled() => {}
    }
    Ok(())
}

/// An engine that stops before the worker does is the end of a gang of one process.
async fn engine_stops(
    stopped: impl Future<Output = String>,
    shutdown: CancellationToken,
) -> Result<(), WorkerError> {
    tokio::select! {
        biased;
        () = shutdown.cancelled() => Ok(()),
        reason = stopped => Err(WorkerError::EngineStopped(reason)),
    }
}

/// Tells the gRPC health service whether requests are taken, and ends the streams that watch it.
async fn report_health(
    mut current: Current,
    mut reporter: tonic_health::server::HealthReporter,
    shutdown: CancellationToken,
) -> Result<(), WorkerError> {
    loop {
        let phase = current.borrow_and_update().as_ref().map(|gang| gang.admission.watch_phase());
        let draining = async {
            match phase {
                Some(mut phase) => drop(phase.wait_for(|phase| *phase == Phase::Draining).await),
                None => std::future::pending().await,
            }
        };
        let serves = current.borrow().as_ref().is_some_and(|gang| gang.admission.phase() == Phase::Ready);
        if serves {
            reporter.set_serving::<WorkerServer<Service>>().await;
            reporter.set_service_status("", ServingStatus::Serving).await;
        } else {
            reporter.set_not_serving::<WorkerServer<Service>>().await;
            reporter.set_service_status("", ServingStatus::NotServing).await;
        }
        tokio::select! {
            () = draining, if serves => {}
            changed = current.changed() => if changed.is_err() { break },
            () = shutdown.cancelled() => break,
        }
    }
    shutdown.cancelled().await;
    for service in [<WorkerServer<Service> as NamedService>::NAME, ""] {
        reporter.clear_service_status(service).await;
    }
    Ok(())
}
