//! A process of a gang that does not lead: computes what the leader plans.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::mpsc::{Receiver as Steps, SyncSender, TrySendError, sync_channel};
use std::task::{Context, Poll};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use futures::Stream;
use futures::future::try_join_all;
use herd_engine::{CpuRanks, KvStore, LocalRank, Remote, RunningRanks};
use herd_proto::internal::v1 as wire;
use herd_proto::internal::v1::plan::Plan as Told;
use herd_proto::internal::v1::rank_report::Report;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{self, AbortHandle, JoinSet};
use tokio::time::{Instant, interval, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Streaming};

use super::connect::{Member, connect_all};
use super::mesh::Mesh;
use super::plan::Decoder;
use super::{ALIVE_PERIOD, MESSAGES, SILENCE, span};
use crate::backend::{self, Model};
use crate::error::WorkerError;
use crate::http::{Pages, Process, router};
use crate::lease::Transfers;
use crate::metrics::Metrics;
use crate::net::{self, advertised, bind, serve_http};
use crate::options::{GangPart, WorkerOptions};
use crate::transfer::{Outgoing, Receiver, Route, send};
use crate::worker::{Tasks, listen_kv, serve_rank};

/// For the leader to answer a call.
const JOIN_DEADLINE: Duration = Duration::from_secs(10);

/// Between two calls: the leader may have to start first.
const JOIN_AGAIN: Duration = Duration::from_millis(500);

/// For the ranks of an epoch that is over to end the step they are in.
const END_DEADLINE: Duration = Duration::from_secs(30);

/// Steps that wait for the ranks. The leader sends the next one when the last one is done.
const STEPS_AHEAD: usize = 2;

/// Why an epoch ends that this process leaves by itself.
const SHUTS_DOWN: &str = "the process shuts down";

/// A process of a gang of several whose ranks follow the leader. Dropped, it ends.
#[derive(Debug)]
pub struct Follower {
    joined: watch::Receiver<bool>,
    http: SocketAddr,
    drain_deadline: Duration,
    shutdown: CancellationToken,
    tasks: Tasks,
}

impl Follower {
    /// Loads its ranks, and joins the leader's epochs from then on.
    pub async fn start(options: WorkerOptions, part: GangPart) -> Result<Self, WorkerError> {
        let WorkerOptions {
            backend,
            // Only leaders are called, and only they reserve.
            grpc: _,
            role: _,
            lease: _,
            blocks_deadline: _,
            drafts: _,
            advertise_kv: _,
            part: _,
            http,
            kv,
            advertise,
            limits,
            revision,
            gang_id,
            drain_deadline,
            metrics: metric_options,
        } = options;
        let gang_id = gang_id.ok_or_else(|| WorkerError::Option {
            option: "--gang-id",
            problem: "is needed where a gang is several processes".to_owned(),
        })?;
        let shutdown = CancellationToken::new();
        let metrics = Arc::new(Metrics::new(metric_options)?);
        let transfers = Arc::<Transfers>::default();
        let (ready, joined) = watch::channel(false);
        let mut tasks = Tasks::default();
        let (listener, http) = bind(http, "HTTP").await?;
        let process = Process::Follower(joined.clone(), Arc::clone(&transfers));
        let pages = Pages { metrics: Arc::clone(&metrics), process };
        tasks.spawn("HTTP", serve_http(listener, router(pages), shutdown.clone()));
        let (rank_listener, bound) = bind(part.bind, "ranks").await?;
        let endpoint = advertised(advertise.as_deref(), bound)?;
        let (own, leader) = (part.ranks(), part.leader.clone());
        let (ranks, model) = task::spawn_blocking(move || backend::load_part(backend, &limits, &part))
            .await
            .map_err(|error| WorkerError::Internal(format!("loading the model: {error}")))??;
        metrics.kv(model.kv_blocks, model.block_tokens);
        metrics.clipped(model.clipped.clone());
        let (kv_listeners, _, kv_endpoints) = listen_kv(kv, own.len(), advertise.as_deref()).await?;
        let hello = wire::Hello {
            gang_id,
            revision,
            tensor: model.shards.tensor() as u32,
            pipeline: model.shards.parallelism().pipeline as u32,
            first_rank: own.start as u32,
            ranks: own.len() as u32,
            model_digest: model.digest.clone(),
            kv_fingerprint: model.kv_fingerprint.clone(),
            kv_blocks: model.kv_blocks as u32,
            host_blocks: model.host_blocks as u32,
            endpoint,
            kv_endpoints,
        };
        let (epoch, epochs) = watch::channel(0);
        let member = Arc::new(MemberOf { own, ranks, model, transfers, metrics, ready, epoch });
        for (local, listener) in kv_listeners.into_iter().enumerate() {
            let (member, epochs) = (Arc::clone(&member), epochs.clone());
            let receiver = move || member.receiver(local, *epochs.borrow());
            tasks.spawn("KV", serve_rank(listener, receiver, shutdown.clone()));
        }
        let joining = Joining { leader, hello, listener: rank_listener, member, shutdown: shutdown.clone() };
        tasks.spawn("ranks", joining.run());
        Ok(Self { joined, http, drain_deadline, shutdown, tasks })
    }

    /// Where health and metrics are served.
    pub fn http(&self) -> SocketAddr {
        self.http
    }

    /// Resolves when the process cannot go on, with the reason.
    pub async fn failed(&mut self) -> WorkerError {
        self.tasks.failed().await
    }

    /// Waits until the leader has no more use for it: until the epoch is over, for as long as a drain may take.
    pub async fn drain(&self) {
        let mut joined = self.joined.clone();
        // An error is the epochs' task, which has ended.
        let _ = timeout(self.drain_deadline, joined.wait_for(|joined| !joined)).await;
    }

    /// Ends the epoch it is in, and waits for a few seconds at most. Returns what had to be cut, nothing as a rule.
    pub async fn shutdown(mut self) -> Vec<&'static str> {
        self.shutdown.cancel();
        self.tasks.end().await
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

/// What stays from one epoch to the next.
struct MemberOf {
    own: Range<usize>,
    ranks: CpuRanks,
    model: Model,
    transfers: Arc<Transfers>,
    metrics: Arc<Metrics>,
    ready: watch::Sender<bool>,
    /// 0 between two.
    epoch: watch::Sender<u64>,
}

/// Reports on their way to the leader.
struct Reports(mpsc::Receiver<wire::RankReport>);

impl Stream for Reports {
    type Item = wire::RankReport;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<wire::RankReport>> {
        self.0.poll_recv(context)
    }
}

/// Why a call to the leader ended.
enum Left {
    /// The next call may go better.
    Lost(String),
    /// This process is not what the gang needs.
    Refused(String),
    Fatal(WorkerError),
}

struct Joining {
    leader: String,
    hello: wire::Hello,
    listener: TcpListener,
    member: Arc<MemberOf>,
    shutdown: CancellationToken,
}

impl Joining {
    async fn run(self) -> Result<(), WorkerError> {
        let mut last = String::new();
        loop {
            let left = self.join().await;
            if self.shutdown.is_cancelled() {
                return Ok(());
            }
            match left {
                Left::Lost(reason) => {
                    // A leader that is not there yet is no news each time.
                    if reason != last {
                        tracing::warn!(leader = self.leader, reason, "not in an epoch");
                    }
                    last = reason;
                }
                Left::Refused(reason) => {
                    return Err(WorkerError::Refused { leader: self.leader.clone(), reason });
                }
                Left::Fatal(error) => return Err(error),
            }
            sleep(JOIN_AGAIN).await;
        }
    }

    /// Calls the leader, and follows it for one epoch. Ends soon after the process is told to.
    async fn join(&self) -> Left {
        let (reports, outgoing) = mpsc::channel(MESSAGES);
        let report = wire::RankReport { report: Some(Report::Hello(self.hello.clone())) };
        // There is room.
        let _ = reports.try_send(report);
        let called = tokio::select! {
            called = self.called(Reports(outgoing)) => called,
            () = self.shutdown.cancelled() => return Left::Lost(SHUTS_DOWN.to_owned()),
        };
        let (begin, plans) = match called {
            Ok(called) => called,
            Err(left) => return left,
        };
        match self.epoch(begin, plans, &reports).await {
            Ok(reason) => {
                let failed = Report::Failed(wire::Failed { reason: reason.clone() });
                // The leader may have said it first.
                let _ = reports.try_send(wire::RankReport { report: Some(failed) });
                Left::Lost(reason)
            }
            Err(error) => Left::Fatal(error),
        }
    }

    /// Waits for the next epoch to begin.
    async fn called(&self, reports: Reports) -> Result<(wire::Begin, Plans), Left> {
        let no_answer = |_| Left::Lost(format!("no answer within {JOIN_DEADLINE:?}"));
        let stream = timeout(JOIN_DEADLINE, self.call(reports)).await.map_err(no_answer)??;
        let mut plans = Plans { stream, heard: Instant::now() };
        loop {
            match plans.next().await {
                Ok(Told::Begin(begin)) => return Ok((begin, plans)),
                Ok(_) => {}
                Err(reason) => return Err(Left::Lost(reason)),
            }
        }
    }

    async fn call(&self, reports: Reports) -> Result<Streaming<wire::Plan>, Left> {
        let mut client = net::leader(&self.leader).await.map_err(Left::Lost)?;
        match client.join(reports).await {
            Ok(plans) => Ok(plans.into_inner()),
            Err(status) if status.code() == Code::FailedPrecondition => {
                Err(Left::Refused(status.message().to_owned()))
            }
            Err(status) => Err(Left::Lost(status.message().to_owned())),
        }
    }

    /// One epoch, to its end; why it ended.
    async fn epoch(
        &self,
        begin: wire::Begin,
        mut plans: Plans,
        reports: &mpsc::Sender<wire::RankReport>,
    ) -> Result<String, WorkerError> {
        let wire::Begin { epoch, members, max_values } = begin;
        let members: Vec<Member> = members
            .into_iter()
            .map(|wire::Member { first_rank, ranks: count, endpoint }| Member {
                ranks: span(first_rank, count),
                endpoint,
            })
            .collect();
        let own = &self.member.own;
        let connecting = connect_all(&self.listener, &self.hello.gang_id, epoch, own, &members);
        let links = tokio::select! {
            links = connecting => links,
            reason = plans.only_alive() => return Ok(reason),
            () = self.shutdown.cancelled() => return Ok(SHUTS_DOWN.to_owned()),
        };
        let started = links.map_err(|error| error.to_string()).and_then(|links| {
            let metrics = &self.member.metrics;
            let mesh = Mesh::start(own.clone(), epoch, max_values as usize, links, metrics);
            let mesh = mesh.map_err(|error| error.to_string())?;
            let remote: Arc<dyn Remote> = Arc::<Mesh>::clone(&mesh);
            let local = LocalRank::part(own.clone(), self.member.model.shards.parallelism(), Some(remote));
            let running = self.member.ranks.start(local).map_err(|error| error.to_string())?;
            Stepper::start(running, Arc::clone(&mesh)).map_err(|error| error.to_string())
        });
        let mut stepper = match started {
            Ok(stepper) => stepper,
            Err(reason) => return Ok(reason),
        };
        let mut sends = Sends::default();
        self.member.epoch.send_replace(epoch);
        tracing::info!(epoch, "part of the epoch");
        let mut said = say(reports, Report::Connected(wire::Connected {}));
        self.member.ready.send_replace(true);
        let mut tick = interval(ALIVE_PERIOD);
        let reason = loop {
            if let Err(reason) = said {
                break reason;
            }
            said = tokio::select! {
                told = plans.next() => match told {
                    Ok(told) => match self.member.obey(told, epoch, &mut stepper, &mut sends) {
                        Ok(Some(report)) => say(reports, report),
                        Ok(None) => Ok(()),
                        Err(reason) => Err(reason),
                    },
                    Err(reason) => Err(reason),
                },
                reason = &mut stepper.ended => {
                    Err(reason.unwrap_or_else(|_| "its ranks have ended".to_owned()))
                }
                sent = sends.next() => say(reports, Report::Sent(sent)),
                _ = tick.tick() => say(reports, Report::Alive(wire::Alive {})),
                () = self.shutdown.cancelled() => Err(SHUTS_DOWN.to_owned()),
            };
        };
        self.member.ready.send_replace(false);
        self.member.epoch.send_replace(0);
        self.member.transfers.forget_all();
        drop(sends);
        stepper.end(&reason).await?;
        Ok(reason)
    }
}

fn say(reports: &mpsc::Sender<wire::RankReport>, report: Report) -> Result<(), String> {
    let said = reports.try_send(wire::RankReport { report: Some(report) });
    said.map_err(|_| "the leader takes no reports".to_owned())
}

/// What the leader says.
struct Plans {
    stream: Streaming<wire::Plan>,
    /// When it last said something.
    heard: Instant,
}

impl Plans {
    /// What it says next; an error is why it says nothing more. Safe to cancel: its silence counts on.
    async fn next(&mut self) -> Result<Told, String> {
        let said = timeout_at(self.heard + SILENCE, self.stream.message()).await;
        self.heard = Instant::now();
        match said {
            Ok(Ok(Some(wire::Plan { plan: Some(Told::End(wire::End { reason })) }))) => Err(reason),
            Ok(Ok(Some(wire::Plan { plan: Some(told) }))) => Ok(told),
            Ok(Ok(Some(wire::Plan { plan: None }))) => {
                Err("the leader says what this worker does not know".to_owned())
            }
            Ok(Ok(None)) => Err("the leader has ended".to_owned()),
            Ok(Err(status)) => Err(format!("the leader is lost: {}", status.message())),
            Err(_) => Err(format!("the leader has said nothing for {SILENCE:?}")),
        }
    }

    /// Resolves with a reason when it says anything but that it is there.
    async fn only_alive(&mut self) -> String {
        loop {
            match self.next().await {
                Ok(Told::Alive(_)) => {}
                Ok(_) => return "the leader goes on before all are connected".to_owned(),
                Err(reason) => return reason,
            }
        }
    }
}

impl MemberOf {
    /// Does what the leader says, at once; what has to be reported of it.
    fn obey(
        self: &Arc<Self>,
        told: Told,
        epoch: u64,
        stepper: &mut Stepper,
        sends: &mut Sends,
    ) -> Result<Option<Report>, String> {
        match told {
            Told::Step(step) => stepper.step(step)?,
            Told::Land(wire::LandKv { transfer, prompt_tokens, blocks }) => {
                let model = &self.model;
                self.transfers.adopt(transfer).open(
                    None,
                    blocks.into(),
                    &self.ranks.kv(),
                    prompt_tokens as usize,
                    model.block_tokens,
                );
                return Ok(Some(Report::Landing(wire::KvLanding { transfer })));
            }
            Told::Close(wire::CloseKv { transfer, complete }) => {
                let landing = self.transfers.landing(transfer);
                if complete && landing.is_some_and(|landing| !landing.is_complete()) {
                    return Err(format!("transfer {transfer} ended before all of its kv had come"));
                }
                self.transfers.forget(transfer);
            }
            Told::Send(told) => sends.begin(self, told),
            Told::Progress(wire::KvProgress { id, computed }) => sends.progress(id, computed as usize),
            Told::Cancel(wire::CancelKv { id }) => sends.cancel(id),
            Told::Alive(_) => {}
            Told::Begin(wire::Begin { epoch: other, .. }) => {
                return Err(format!("the leader begins epoch {other} in epoch {epoch}"));
            }
            // Taken out before.
            Told::End(wire::End { reason }) => return Err(reason),
        }
        Ok(None)
    }

    /// Of one of its ranks; none between two epochs.
    fn receiver(&self, local: usize, epoch: u64) -> Option<Receiver> {
        let Self { own, ranks, model, transfers, metrics, ready: _, epoch: _ } = self;
        let store = ranks.kv().get(local).cloned().filter(|_| epoch != 0)?;
        let rank = (own.start + local) as u16;
        Some(model.receiver((rank, local), epoch, store, transfers, metrics))
    }

    async fn send(self: Arc<Self>, told: wire::SendKv, progress: watch::Receiver<usize>) -> wire::KvSent {
        let wire::SendKv { id, transfer, epoch, prompt_tokens, blocks, routes } = told;
        let outgoing = self.model.outgoing((transfer, epoch), prompt_tokens as usize, blocks.into());
        let stores = self.ranks.kv();
        let mut sending = Vec::with_capacity(routes.len());
        for route in routes {
            sending.push(self.send_route(route, &stores, &outgoing, progress.clone()));
        }
        wire::KvSent { id, error: try_join_all(sending).await.err().unwrap_or_default() }
    }

    async fn send_route(
        &self,
        route: wire::KvRoute,
        stores: &[Arc<dyn KvStore>],
        outgoing: &Outgoing,
        progress: watch::Receiver<usize>,
    ) -> Result<(), String> {
        let wire::KvRoute { endpoint, source_rank, target_rank, first_layer, layers, first_head, heads } =
            route;
        let local = (source_rank as usize).checked_sub(self.own.start);
        let store = local.and_then(|local| stores.get(local));
        let store = store.ok_or_else(|| format!("rank {source_rank} is not here"))?;
        let route = Route {
            endpoint,
            source_rank: source_rank as u16,
            target_rank: target_rank as u16,
            layers: span(first_layer, layers),
            heads: span(first_head, heads),
        };
        let sent = send(route, outgoing, &**store, progress, &self.metrics).await;
        sent.map_err(|error| error.to_string())
    }
}

/// KV that leaves from here, by the id that the leader gave it.
#[derive(Default)]
struct Sends {
    running: JoinSet<wire::KvSent>,
    by_id: HashMap<u64, (watch::Sender<usize>, AbortHandle)>,
}

impl Sends {
    fn begin(&mut self, member: &Arc<MemberOf>, told: wire::SendKv) {
        let id = told.id;
        let (computed, progress) = watch::channel(0);
        let handle = self.running.spawn(Arc::clone(member).send(told, progress));
        self.by_id.insert(id, (computed, handle));
    }

    fn progress(&self, id: u64, tokens: usize) {
        if let Some((computed, _)) = self.by_id.get(&id) {
            computed.send_replace(tokens);
        }
    }

    fn cancel(&mut self, id: u64) {
        if let Some((_, handle)) = self.by_id.remove(&id) {
            handle.abort();
        }
    }

    /// The next one that has ended by itself.
    async fn next(&mut self) -> wire::KvSent {
        loop {
            match self.running.join_next().await {
                Some(Ok(sent)) => return sent,
                Some(Err(_)) => {}
                None => std::future::pending().await,
            }
        }
    }
}

/// The thread that takes the ranks of this process through the steps of an epoch.
struct Stepper {
    mesh: Arc<Mesh>,
    decoder: Decoder,
    steps: SyncSender<herd_scheduler::StepPlan>,
    /// Resolves with the reason when a step fails.
    ended: oneshot::Receiver<String>,
    thread: JoinHandle<()>,
}

impl Stepper {
    fn start(running: RunningRanks, mesh: Arc<Mesh>) -> std::io::Result<Self> {
        let (steps, incoming) = sync_channel(STEPS_AHEAD);
        let (ending, ended) = oneshot::channel();
        let of_thread = Arc::clone(&mesh);
        let thread = thread::Builder::new().name("step-loop".to_owned()).spawn(move || {
            let reason = run(running, &of_thread, &incoming);
            of_thread.end(&reason);
            // Nobody listens once the epoch is over.
            let _ = ending.send(reason);
        })?;
        Ok(Self { mesh, decoder: Decoder::default(), steps, ended, thread })
    }

    fn step(&mut self, step: wire::Step) -> Result<(), String> {
        let plan = self.decoder.decode(step).map_err(|error| error.to_string())?;
        // One that is disconnected says why by itself.
        if let Err(TrySendError::Full(_)) = self.steps.try_send(plan) {
            return Err("the leader sends steps before the last one is done".to_owned());
        }
        Ok(())
    }

    /// Waits until nothing computes: the next epoch uses the same KV caches.
    async fn end(self, reason: &str) -> Result<(), WorkerError> {
        let Self { mesh, decoder: _, steps, ended: _, thread } = self;
        mesh.end(reason);
        drop(steps);
        let joined = task::spawn_blocking(move || thread.join());
        match timeout(END_DEADLINE, joined).await {
            Ok(_) => Ok(()),
            Err(_) => Err(WorkerError::Internal(format!(
                "ranks still compute {END_DEADLINE:?} after their epoch: {reason}"
            ))),
        }
    }
}

fn run(mut running: RunningRanks, mesh: &Mesh, steps: &Steps<herd_scheduler::StepPlan>) -> String {
    while let Ok(plan) = steps.recv() {
        let columns = match running.step(&plan) {
            Ok(columns) => columns,
            Err(error) => return error.to_string(),
        };
        if let Err(error) = mesh.give_columns(&columns) {
            return error.to_string();
        }
    }
    "the epoch is over".to_owned()
}
