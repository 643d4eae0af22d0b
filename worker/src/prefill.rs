//! `Prefill`: computes a prompt, samples position 0, and pushes the KV to the gang that asked.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::TryFutureExt as _;
use futures::future::{self, try_join_all};
use herd_engine::{Event, SampledToken, Sequence};
use herd_model::{KvRoute, Parallelism, ShardPlan, kv_routes};
use herd_proto::internal::v1 as wire;
use herd_proto::internal::v1::prefill_event::Event as WireEvent;
use herd_proto::internal::v1::worker_client::WorkerClient;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::gang::Gang;
use crate::grammars::refused;
use crate::metrics::{Call, Stopwatch};
use crate::options::DEFAULT_BLOCKS_DEADLINE;
use crate::refusal::{no_kv_blocks, refuse};
use crate::request::{ValidatedRequest, Work, prompt_to, token_to};
use crate::stream::{Messages, TaskStream};
use crate::transfer::{Progress, Route, send};

/// For the decode gang to have blocks. It gives up first and says so itself; this ends the wait for one that answers nothing
/// and yet keeps its call open.
const RESERVE_DEADLINE: Duration = DEFAULT_BLOCKS_DEADLINE.saturating_add(Duration::from_mins(1));

/// Renewals a lease: two may be lost.
const RENEWALS_A_LEASE: u32 = 3;

/// The shortest time between two renewals, whatever lease the other gang names.
const SHORTEST_RENEWAL: Duration = Duration::from_millis(10);

/// Starts a prefill, or refuses it before anything was done.
pub(crate) async fn prefill(
    gang: &Arc<Gang>,
    request: wire::PrefillRequest,
    deadline: Option<Instant>,
) -> Result<TaskStream<wire::PrefillEvent>, Status> {
    let stopwatch = Stopwatch::start(&gang.metrics);
    let wire::PrefillRequest {
        context,
        prompt,
        sampling,
        transfer,
        decode_peer,
        decode_epoch,
        kv_fingerprint,
    } = request;
    gang.identity.check(&context.clone().unwrap_or_default())?;
    if kv_fingerprint != gang.model.kv_fingerprint {
        return Err(Status::failed_precondition(format!(
            "kv_fingerprint is {kv_fingerprint}, this gang's is {}",
            gang.model.kv_fingerprint
        )));
    }
    let mut request = ValidatedRequest::new(&gang.engine, context, prompt, sampling, Work::PromptOnly)?;
    let client = gang.peers.client("decode_peer", &decode_peer)?;
    let ticket = gang.admission.enter()?;
    if request.constrain(&gang.model.grammars).await? {
        return Err(refused("the text of the choice is whole: no token can follow"));
    }
    let ValidatedRequest { context, prompt, sampling, grammar: _ } = request;
    let prompt_tokens = prompt.len();
    let sequence = gang.engine.prefill(prompt, sampling).map_err(|error| refuse(&error))?;
    gang.metrics.request(Call::Prefill);
    let decode_gang = DecodeGang {
        // Its revision is not known here.
        context: wire::Context { gang_epoch: decode_epoch, revision: String::new(), ..context },
        peer: decode_peer,
        transfer,
        client,
    };
    let job = Job { gang: Arc::clone(gang), prompt_tokens, decode_gang };
    Ok(TaskStream::spawn(&gang.admission, ticket, deadline, move |messages| {
        job.run(sequence, messages, stopwatch)
    }))
}

/// The gang that asked.
struct DecodeGang {
    peer: String,
    context: wire::Context,
    transfer: u64,
    client: WorkerClient<Channel>,
}

struct Job {
    gang: Arc<Gang>,
    prompt_tokens: usize,
    decode_gang: DecodeGang,
}

impl Job {
    /// The sequence, and with it the blocks that are read, lives as long as anything here does.
    async fn run(
        self,
        mut sequence: Sequence,
        messages: Messages<wire::PrefillEvent>,
        mut stopwatch: Stopwatch,
    ) -> Result<(), Status> {
        messages.send(event(WireEvent::Queued(wire::Queued {}))).await?;
        let blocks = match sequence.next().await {
            Some(Event::Started { blocks }) => blocks,
            other => return Err(ended(other)),
        };
        messages.send(event(WireEvent::Started(wire::Started {}))).await?;
        let (computed, progress) = watch::channel(0);
        let (first, ()) = tokio::try_join!(
            compute(&mut sequence, &computed, &messages, &mut stopwatch),
            self.deliver(blocks, progress)
        )?;
        let first = Some(token_to(first));
        messages.send(event(WireEvent::Done(wire::PrefillDone { first, cached_tokens: 0 }))).await
    }

    /// Reserves blocks and fills them, holding the lease all the while.
    async fn deliver(&self, blocks: Arc<[u32]>, progress: Progress) -> Result<(), Status> {
        let Self { gang, prompt_tokens, decode_gang } = self;
        let wire::ReserveResponse { kv_endpoints, lease_millis, tensor } =
            decode_gang.reserve(*prompt_tokens).await?;
        let model = &gang.model;
        let parallelism = match tensor as usize {
            0 => Parallelism::tensor(kv_endpoints.len()),
            tensor => Parallelism { tensor, pipeline: kv_endpoints.len() / tensor },
        };
        let target = ShardPlan::new(&model.config, parallelism)
            .map_err(|error| decode_gang.failed("Reserve", &error.to_string()))?;
        let to = (decode_gang.transfer, decode_gang.context.gang_epoch);
        let outgoing = model.outgoing(to, *prompt_tokens, blocks);
        let mut here = Vec::new();
        let mut elsewhere: BTreeMap<usize, Vec<Route>> = BTreeMap::new();
        for KvRoute { source_rank, target_rank, layers, heads } in kv_routes(&model.shards, &target) {
            let Some(endpoint) = kv_endpoints.get(target_rank).cloned() else { continue };
            let (from, to) = (source_rank as u16, target_rank as u16);
            let route = Route { endpoint, source_rank: from, target_rank: to, layers, heads };
            match gang.followers.as_ref().and_then(|followers| followers.of_rank(source_rank)) {
                Some(process) => elsewhere.entry(process).or_default().push(route),
                None => here.push(route),
            }
        }
        let here = here.into_iter().filter_map(|route| {
            let store = gang.engine.kv().get(usize::from(route.source_rank))?;
            Some(send(route, &outgoing, &**store, progress.clone(), &gang.metrics))
        });
        let here = try_join_all(here).map_err(|error| Status::unavailable(error.to_string()));
        let elsewhere = gang.followers.iter().flat_map(|followers| {
            let send = |(process, routes): (&usize, &Vec<Route>)| {
                let (process, routes, progress) = (*process, routes.clone(), progress.clone());
                let outgoing = &outgoing;
                async move { followers.send(process, &routes, outgoing, progress).await }
            };
            elsewhere.iter().map(send).collect::<Vec<_>>()
        });
        let elsewhere = try_join_all(elsewhere).map_err(|error| Status::unavailable(error.to_string()));
        tokio::select! {
            sent = future::try_join(here, elsewhere) => sent.map(drop),
            lost = decode_gang.hold_lease(Duration::from_millis(lease_millis.into())) => Err(lost),
        }
    }
}

/// Follows the engine to position 0.
async fn compute(
    sequence: &mut Sequence,
    computed: &watch::Sender<usize>,
    messages: &Messages<wire::PrefillEvent>,
    stopwatch: &mut Stopwatch,
) -> Result<SampledToken, Status> {
    let mut first = None;
    loop {
        match sequence.next().await {
            Some(Event::Computed { computed: positions }) => drop(computed.send_replace(positions)),
            Some(Event::Prompt(tokens)) => messages.send(event(WireEvent::Prompt(prompt_to(tokens)))).await?,
            Some(Event::Token(token)) => {
                stopwatch.token();
                first = Some(token);
            }
            other @ (Some(
                Event::Finished(_) | Event::Started { .. } | Event::Failed(_) | Event::Unsatisfiable(_),
            )
            | None) => {
                return first
                    .take()
                    .filter(|_| matches!(other, Some(Event::Finished(_))))
                    .ok_or_else(|| ended(other));
            }
        }
    }
}

fn ended(event: Option<Event>) -> Status {
    match event {
        Some(Event::Failed(reason)) => Status::unavailable(format!("the engine failed: {reason}")),
        Some(Event::Unsatisfiable(reason)) => refused(reason),
        other => Status::internal(format!("the engine ended a prefill with {other:?}")),
    }
}

fn event(event: WireEvent) -> wire::PrefillEvent {
    wire::PrefillEvent { event: Some(event) }
}

impl DecodeGang {
    fn failed(&self, call: &str, problem: &str) -> Status {
        Status::unavailable(format!("{call} at {}, transfer {}: {problem}", self.peer, self.transfer))
    }

    async fn reserve(&self, prompt_tokens: usize) -> Result<wire::ReserveResponse, Status> {
        let request = wire::ReserveRequest {
            context: Some(self.context.clone()),
            transfer: self.transfer,
            prompt_tokens: prompt_tokens as u32,
        };
        let answer = timeout(RESERVE_DEADLINE, self.client.clone().reserve(request))
            .await
            .map_err(|_| no_kv_blocks(&format!("at {}", self.peer), RESERVE_DEADLINE))?;
        answer.map(tonic::Response::into_inner).map_err(|status| match status.code() {
            Code::ResourceExhausted => status,
            _ => self.failed("Reserve", status.message()),
        })
    }

    /// Renews for as long as it is polled; resolves when the lease is lost.
    async fn hold_lease(&self, lease: Duration) -> Status {
        let period = (lease / RENEWALS_A_LEASE).max(SHORTEST_RENEWAL);
        let mut failures = 0;
        loop {
            tokio::time::sleep(period).await;
            let request = wire::RenewRequest { context: Some(self.context.clone()), transfer: self.transfer };
            match timeout(period, self.client.clone().renew(request)).await {
                Ok(Ok(_)) => failures = 0,
                Ok(Err(status)) if status.code() == Code::NotFound => {
                    return self.failed("Renew", status.message());
                }
                Ok(Err(_)) | Err(_) => failures += 1,
            }
            if failures >= RENEWALS_A_LEASE {
                return self.failed("Renew", "no answer");
            }
        }
    }
}
