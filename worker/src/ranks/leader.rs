//! The leader's loop: gathers the processes of the gang, and runs one epoch after the other.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use herd_engine::{CpuRanks, Engine, LocalRank, Remote};
use herd_proto::internal::v1 as wire;
use herd_proto::internal::v1::plan::Plan as Told;
use herd_proto::internal::v1::rank_report::Report;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{interval, timeout};
use tokio_util::sync::CancellationToken;
use tonic::Streaming;

use super::connect::{Member, connect_all};
use super::executor::GangExecutor;
use super::followers::{Followers, Outbox};
use super::join::Candidate;
use super::mesh::Mesh;
use super::plan::Encoder;
use super::{ALIVE_PERIOD, SILENCE, max_values};
use crate::backend::Model;
use crate::error::WorkerError;
use crate::gang::{Gang, Host};
use crate::identity::new_epoch;
use crate::options::WorkerLimits;
use crate::worker::start_engine;

/// For all processes to be connected to each other once the epoch has begun.
const BEGIN_DEADLINE: Duration = Duration::from_secs(20);

/// For the ranks of an epoch that is over to end the step they are in.
const END_DEADLINE: Duration = Duration::from_secs(30);

/// The leader of a gang of several processes.
pub(crate) struct Leader {
    pub(crate) host: Host,
    pub(crate) ranks: Arc<CpuRanks>,
    pub(crate) model: Model,
    pub(crate) limits: WorkerLimits,
    pub(crate) ranks_per_pod: usize,
    pub(crate) listener: TcpListener,
    /// "host:port" of `listener`, as the other processes reach it.
    pub(crate) endpoint: String,
    /// Of its own ranks.
    pub(crate) kv_endpoints: Vec<String>,
    pub(crate) candidates: mpsc::Receiver<Candidate>,
    pub(crate) current: watch::Sender<Option<Arc<Gang>>>,
    /// No epoch is begun after it.
    pub(crate) draining: CancellationToken,
}

/// An epoch that serves.
struct Epoch {
    gang: Arc<Gang>,
    mesh: Arc<Mesh>,
    /// Resolves when no rank of it computes any more.
    ended: oneshot::Receiver<()>,
}

impl Leader {
    /// Until the worker shuts down.
    pub(crate) async fn run(mut self) -> Result<(), WorkerError> {
        let shutdown = self.host.shutdown.clone();
        loop {
            let candidates = tokio::select! {
                candidates = self.gather() => candidates,
                () = shutdown.cancelled() => return Ok(()),
            };
            if self.draining.is_cancelled() {
                shutdown.cancelled().await;
                return Ok(());
            }
            let reason = self.epoch(candidates).await?;
            if !shutdown.is_cancelled() {
                tracing::warn!(reason, "the epoch is over");
            }
        }
    }

    /// Waits until every other process of the gang is there.
    async fn gather(&mut self) -> Vec<Candidate> {
        let others = self.model.shards.parallelism().ranks() / self.ranks_per_pod - 1;
        let mut found: BTreeMap<usize, Candidate> = BTreeMap::new();
        let mut tick = interval(ALIVE_PERIOD);
        while found.len() < others {
            tokio::select! {
                Some(candidate) = self.candidates.recv() => {
                    tracing::info!(first_rank = candidate.ranks.start, "joins");
                    // One that calls again has given its first call up.
                    found.insert(candidate.ranks.start, candidate);
                }
                _ = tick.tick() => found.retain(|_, candidate| {
                    let alive = wire::Plan { plan: Some(Told::Alive(wire::Alive {})) };
                    candidate.plans.try_send(alive).is_ok()
                }),
            }
        }
        found.into_values().collect()
    }

    /// One epoch, from its beginning to its end; why it ended.
    async fn epoch(&mut self, candidates: Vec<Candidate>) -> Result<String, WorkerError> {
        let epoch = new_epoch();
        let own = 0..self.ranks_per_pod;
        let mut members = vec![Member { ranks: own.clone(), endpoint: self.endpoint.clone() }];
        let mut kv_endpoints = self.kv_endpoints.clone();
        let (mut kv_blocks, mut host_blocks) = (self.model.kv_blocks, self.model.host_blocks);
        let (mut outboxes, mut reports) = (Vec::new(), Vec::new());
        for candidate in candidates {
            let Candidate {
                ranks,
                kv_blocks: blocks,
                host_blocks: slots,
                endpoint,
                kv_endpoints: theirs,
                plans,
                reports: stream,
            } = candidate;
            // In the order of ranks.
            kv_endpoints.extend(theirs);
            kv_blocks = kv_blocks.min(blocks);
            host_blocks = host_blocks.min(slots);
            reports.push((ranks.start, stream));
            members.push(Member { ranks: ranks.clone(), endpoint });
            outboxes.push(Outbox { ranks, plans });
        }
        let followers = Arc::new(Followers::new(outboxes));
        let model = Model { kv_blocks, host_blocks, ..self.model.clone() };
        let max_values = max_values(&model.config, &model.shards, self.limits.max_step_tokens);
        let connected = watch::Sender::new(0);
        let mut listening = JoinSet::new();
        for (first_rank, stream) in reports {
            listening.spawn(listen(first_rank, stream, Arc::clone(&followers), connected.clone()));
        }
        listening.spawn(say_alive(Arc::clone(&followers)));
        followers.tell(&Told::Begin(wire::Begin {
            epoch,
            members: members.iter().map(member).collect(),
            max_values: max_values as u32,
        }));
        let begun = tokio::select! {
            begun = timeout(BEGIN_DEADLINE, self.begin(epoch, &model, &members, max_values, &followers, connected)) => {
                begun.unwrap_or_else(|_| Err(format!("not connected within {BEGIN_DEADLINE:?}")))
            }
            reason = followers.ended() => Err(reason),
            () = self.host.shutdown.cancelled() => Err("the worker shuts down".to_owned()),
        };
        let (mesh, engine, ended) = match begun {
            Ok(begun) => begun,
            Err(reason) => {
                followers.end(&reason);
                return Ok(reason);
            }
        };
        let gang = Arc::new(self.host.gang(epoch, model, engine, kv_endpoints, Some(Arc::clone(&followers))));
        self.current.send_replace(Some(Arc::clone(&gang)));
        gang.says_ready();
        let stopped = gang.engine.stopped();
        let reason = tokio::select! {
            reason = followers.ended() => reason,
            reason = stopped => reason,
            () = self.host.shutdown.cancelled() => "the worker shuts down".to_owned(),
        };
        self.current.send_replace(None);
        followers.end(&reason);
        Epoch { gang, mesh, ended }.end(&reason).await?;
        Ok(reason)
    }

    /// Connects everyone and starts the engine.
    async fn begin(
        &self,
        epoch: u64,
        model: &Model,
        members: &[Member],
        max_values: usize,
        followers: &Arc<Followers>,
        connected: watch::Sender<usize>,
    ) -> Result<(Arc<Mesh>, Engine, oneshot::Receiver<()>), String> {
        let Self { host, ranks, limits, listener, ranks_per_pod, .. } = self;
        let own = 0..*ranks_per_pod;
        let links = connect_all(listener, &host.gang_id, epoch, &own, members);
        let links = links.await.map_err(|error| error.to_string())?;
        let mesh = Mesh::start(own.clone(), epoch, max_values, links, &host.metrics);
        let mesh = mesh.map_err(|error| error.to_string())?;
        let others = members.len() - 1;
        let mut connected = connected.subscribe();
        // An error is listeners that have ended, and with them the epoch.
        let _ = connected.wait_for(|connected| *connected == others).await;
        let remote: Arc<dyn Remote> = Arc::<Mesh>::clone(&mesh);
        let local = LocalRank::part(own, model.shards.parallelism(), Some(remote));
        let running = ranks.start(local).map_err(|error| error.to_string())?;
        let (ending, ended) = oneshot::channel();
        let executor = GangExecutor {
            info: ranks.info().clone(),
            kv: ranks.kv(),
            encoder: Encoder::default(),
            followers: Arc::clone(followers),
            mesh: Arc::clone(&mesh),
            running,
            _ended: ending,
        };
        let engine = start_engine(Box::new(executor), model, *limits, &host.metrics);
        let engine = engine.map_err(|error| error.to_string())?;
        Ok((mesh, engine, ended))
    }
}

impl Epoch {
    /// Ends all that runs in it, and waits until nothing computes: the next one uses the same KV caches.
    async fn end(self, reason: &str) -> Result<(), WorkerError> {
        let Self { gang, mesh, ended } = self;
        mesh.end(reason);
        gang.metrics.epoch_ended(gang.engine.counters());
        gang.admission.abort("the epoch of this gang is over");
        gang.over.cancel();
        gang.engine.stop();
        drop((gang, mesh));
        // An error is the sender dropped, which is what is waited for.
        timeout(END_DEADLINE, ended).await.map(drop).map_err(|_| {
            WorkerError::Internal(format!("ranks still compute {END_DEADLINE:?} after their epoch: {reason}"))
        })
    }
}

/// Takes in what one process reports. Its silence ends the epoch.
async fn listen(
    first_rank: usize,
    mut reports: Streaming<wire::RankReport>,
    followers: Arc<Followers>,
    connected: watch::Sender<usize>,
) {
    let reason = loop {
        match timeout(SILENCE, reports.message()).await {
            Ok(Ok(Some(wire::RankReport { report: Some(Report::Connected(_)) }))) => {
                connected.send_modify(|connected| *connected += 1);
            }
            Ok(Ok(Some(wire::RankReport { report: Some(report) }))) => {
                followers.answered(first_rank, report);
            }
            Ok(Ok(Some(wire::RankReport { report: None }))) => {
                break "says what this worker does not know".to_owned();
            }
            Ok(Ok(None)) => break "has ended".to_owned(),
            Ok(Err(status)) => break format!("is lost: {}", status.message()),
            Err(_) => break format!("has said nothing for {SILENCE:?}"),
        }
    };
    followers.end(&format!("rank {first_rank} {reason}"));
}

async fn say_alive(followers: Arc<Followers>) {
    let mut tick = interval(ALIVE_PERIOD);
    loop {
        tick.tick().await;
        followers.tell(&Told::Alive(wire::Alive {}));
    }
}

fn member(member: &Member) -> wire::Member {
    let Member { ranks, endpoint } = member;
    wire::Member { first_rank: ranks.start as u32, ranks: ranks.len() as u32, endpoint: endpoint.clone() }
}
