//! `Decode`: one choice, from a prompt this gang computes or from KV that a prefill gang sends.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use herd_engine::{Event, FinishReason, Reservation, SampledToken, Sequence, SubmitError};
use herd_proto::internal::v1 as wire;
use herd_proto::internal::v1::decode_event::Event as WireEvent;
use herd_proto::internal::v1::prefill_event::Event as PrefillEvent;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout, timeout_at};
use tonic::{Status, Streaming};

use crate::drain::Ticket;
use crate::gang::Gang;
use crate::grammars::refused;
use crate::lease::{Ask, Transfer};
use crate::metrics::{Call, Stopwatch};
use crate::refusal::{no_kv_blocks, prefill_failed, refuse};
use crate::request::{ValidatedRequest, Work, finished_to, prompt_to, sampling_to, token_from, token_to};
use crate::stream::{Messages, TaskStream};

/// For a prefill leader to take or refuse a request, connecting included. It only puts it into its queue.
const PREFILL_ANSWER_DEADLINE: Duration = Duration::from_secs(10);

/// Tokens joined in one message when the client is behind.
const MAX_TOKENS_A_MESSAGE: usize = 64;

/// Starts a choice, or refuses it before anything was done.
pub(crate) async fn decode(
    gang: &Arc<Gang>,
    request: wire::DecodeRequest,
    deadline: Option<Instant>,
) -> Result<TaskStream<wire::DecodeEvent>, Status> {
    let stopwatch = Stopwatch::start(&gang.metrics);
    let wire::DecodeRequest { context, prompt, sampling, prefill_peer, prefill_epoch } = request;
    gang.identity.check(&context.clone().unwrap_or_default())?;
    let mut request = ValidatedRequest::new(&gang.engine, context, prompt, sampling, Work::Whole)?;
    let ticket = gang.admission.enter()?;
    let stream = if request.constrain(&gang.model.grammars).await? {
        whole(gang, ticket)
    } else if prefill_peer.is_empty() {
        unified(gang, ticket, request, deadline, stopwatch)?
    } else {
        split(gang, ticket, request, deadline, (prefill_peer, prefill_epoch), stopwatch).await?
    };
    gang.metrics.request(Call::Decode);
    Ok(stream)
}

/// A choice whose text is whole: only the word that it is all was lost.
fn whole(gang: &Arc<Gang>, ticket: Ticket) -> TaskStream<wire::DecodeEvent> {
    TaskStream::spawn(&gang.admission, ticket, None, async move |messages| {
        let event = Some(WireEvent::Finished(finished_to(FinishReason::Stop)));
        messages.send(wire::DecodeEvent { event }).await
    })
}

fn unified(
    gang: &Arc<Gang>,
    ticket: Ticket,
    request: ValidatedRequest,
    deadline: Option<Instant>,
    stopwatch: Stopwatch,
) -> Result<TaskStream<wire::DecodeEvent>, Status> {
    let ValidatedRequest { context: _, prompt, sampling, grammar: _ } = request;
    let sequence = gang.engine.generate(prompt, sampling).map_err(|error| refuse(&error))?;
    Ok(TaskStream::spawn(&gang.admission, ticket, deadline, move |messages| {
        report(sequence, messages, stopwatch)
    }))
}

async fn split(
    gang: &Arc<Gang>,
    ticket: Ticket,
    request: ValidatedRequest,
    deadline: Option<Instant>,
    (peer, prefill_epoch): (String, u64),
    stopwatch: Stopwatch,
) -> Result<TaskStream<wire::DecodeEvent>, Status> {
    let limits = gang.engine.limits();
    let waiting = gang.engine.load().borrow().waiting;
    if waiting >= limits.max_waiting {
        return Err(refuse(&SubmitError::Full { waiting }));
    }
    // Before the call: the prefill gang may start at once.
    let transfer = gang.transfers.register();
    let mut call = tonic::Request::new(wire::PrefillRequest {
        context: Some(wire::Context {
            gang_epoch: prefill_epoch,
            // The revision is this gang's; while a rollout goes on, the other one's may be another.
            revision: String::new(),
            model_digest: gang.identity.model_digest.clone(),
            ..request.context.clone()
        }),
        prompt: request.prompt.clone(),
        sampling: Some(sampling_to(&request.sampling, request.grammar.as_ref())),
        transfer: transfer.id,
        decode_peer: gang.endpoint.clone(),
        decode_epoch: gang.identity.epoch,
        kv_fingerprint: gang.model.kv_fingerprint.clone(),
    });
    if let Some(deadline) = deadline {
        call.set_timeout(deadline.saturating_duration_since(Instant::now()));
    }
    let mut client = gang.peers.client("prefill_peer", &peer)?;
    let events = timeout(PREFILL_ANSWER_DEADLINE, client.prefill(call))
        .await
        .map_err(|_| prefill_failed(&peer, &Status::deadline_exceeded("no answer")))?
        .map_err(|status| prefill_failed(&peer, &status))?
        .into_inner();
    let owner = Owner { gang: Arc::clone(gang), request, peer, transfer, events, stopwatch };
    Ok(TaskStream::spawn(&gang.admission, ticket, deadline, move |messages| owner.run(messages)))
}

type Reserving = Pin<Box<dyn Future<Output = Result<Reservation, SubmitError>> + Send>>;
type LeaseReply = oneshot::Sender<Result<Duration, Status>>;

/// Owns one transfer, and the choice that goes on from it.
struct Owner {
    gang: Arc<Gang>,
    request: ValidatedRequest,
    peer: String,
    transfer: Transfer,
    /// Dropped, it cancels the prefill.
    events: Streaming<wire::PrefillEvent>,
    stopwatch: Stopwatch,
}

/// How far the blocks are.
enum Blocks {
    NotAsked,
    /// Until then.
    Waiting(Reserving, LeaseReply, Instant),
    /// Until then, unless renewed.
    Leased(Instant),
}

enum Change {
    Reserved(Result<Reservation, SubmitError>),
    /// The wait was too long.
    NoBlocks,
    Expired,
}

impl Blocks {
    /// Resolves when there are blocks or no more time to wait for them, or at the end of the lease.
    async fn change(&mut self) -> Change {
        match self {
            Self::NotAsked => std::future::pending().await,
            Self::Waiting(reserving, _, until) => match timeout_at(*until, reserving).await {
                Ok(reservation) => Change::Reserved(reservation),
                Err(_) => Change::NoBlocks,
            },
            Self::Leased(until) => {
                tokio::time::sleep_until(*until).await;
                Change::Expired
            }
        }
    }
}

impl Owner {
    async fn run(mut self, messages: Messages<wire::DecodeEvent>) -> Result<(), Status> {
        let received = self.receive(&messages).await;
        self.gang.metrics.transfer_ended(received.is_ok());
        if let Err(status) = &received {
            let request = &self.request.context.request_id;
            tracing::warn!(request, transfer = self.transfer.id, "no kv received: {}", status.message());
        }
        let (first, reservation) = received?;
        let Self { gang, request, peer: _, transfer, events, mut stopwatch } = self;
        drop((transfer, events));
        let ValidatedRequest { context: _, prompt, sampling, grammar: _ } = request;
        let sequence =
            gang.engine.decode(reservation, prompt, &first, sampling).map_err(|error| refuse(&error))?;
        stopwatch.token();
        messages.send(tokens(first.position, vec![token_to(first)])).await?;
        report(sequence, messages, stopwatch).await
    }

    /// Serves the transfer until position 0 is sampled and all KV is here.
    async fn receive(
        &mut self,
        messages: &Messages<wire::DecodeEvent>,
    ) -> Result<(SampledToken, Reservation), Status> {
        let mut blocks = Blocks::NotAsked;
        let mut reserved = None;
        let first = loop {
            tokio::select! {
                event = self.events.message() => match self.prefill_event(event)? {
                    PrefillEvent::Queued(_) => {}
                    PrefillEvent::Started(_) => messages.send(started()).await?,
                    PrefillEvent::Prompt(tokens) => messages.send(prompt(tokens)).await?,
                    PrefillEvent::Done(wire::PrefillDone { first, cached_tokens: _ }) => {
                        break first.ok_or_else(|| self.failed("done without a first token"))?;
                    }
                },
                Some(ask) = self.transfer.asks.recv() => self.answer(ask, &mut blocks)?,
                change = blocks.change() => match change {
                    Change::Reserved(reservation) => {
                        self.reserved(reservation, &mut blocks).await?;
                        reserved = Some(Instant::now());
                    }
                    Change::NoBlocks => return Err(no_kv_blocks("here", self.gang.blocks_deadline)),
                    Change::Expired => return Err(self.failed("its lease on kv blocks has expired")),
                },
            }
        };
        if !self.transfer.landing.is_complete() {
            return Err(self.failed("done before all kv had come"));
        }
        if let Some(followers) = &self.gang.followers {
            followers.close(self.transfer.id, true);
        }
        let reservation = self.transfer.landing.close().ok_or_else(|| self.failed("done without a lease"))?;
        if let Some(reserved) = reserved {
            self.gang.metrics.transferred(reserved.elapsed());
        }
        Ok((token_from(self.request.sampling.first_position, first), reservation))
    }

    fn prefill_event(
        &self,
        event: Result<Option<wire::PrefillEvent>, Status>,
    ) -> Result<PrefillEvent, Status> {
        match event {
            Ok(Some(wire::PrefillEvent { event: Some(event) })) => Ok(event),
            Ok(Some(wire::PrefillEvent { event: None })) => {
                Err(self.failed("an event this worker does not know"))
            }
            Ok(None) => Err(self.failed("ended early")),
            Err(status) => Err(prefill_failed(&self.peer, &status)),
        }
    }

    fn failed(&self, problem: &str) -> Status {
        prefill_failed(&self.peer, &Status::unavailable(problem))
    }

    /// An error is this gang's own, and the end of the choice: the prefill gang is not to be blamed for it.
    fn answer(&self, ask: Ask, blocks: &mut Blocks) -> Result<(), Status> {
        let lease = self.gang.lease;
        match ask {
            Ask::Reserve { prompt_tokens, reply } => {
                let ours = self.request.prompt.len();
                if prompt_tokens != ours {
                    let message = format!("prompt_tokens is {prompt_tokens}, the prompt has {ours}");
                    // A caller that is gone hears nothing: also below.
                    let _ = reply.send(Err(Status::invalid_argument(message)));
                    return Ok(());
                }
                match std::mem::replace(blocks, Blocks::NotAsked) {
                    Blocks::NotAsked => {
                        let max_tokens = self.request.sampling.max_tokens;
                        let reserving = self.gang.engine.reserve(prompt_tokens, max_tokens);
                        let reserving = Box::pin(reserving.map_err(|error| refuse(&error))?.ready());
                        *blocks =
                            Blocks::Waiting(reserving, reply, Instant::now() + self.gang.blocks_deadline);
                    }
                    // Asked again: the first answer was lost.
                    Blocks::Waiting(reserving, _, until) => {
                        *blocks = Blocks::Waiting(reserving, reply, until);
                    }
                    Blocks::Leased(_) => {
                        *blocks = Blocks::Leased(Instant::now() + lease);
                        let _ = reply.send(Ok(lease));
                    }
                }
            }
            Ask::Renew { reply } => {
                let answer = if let Blocks::Leased(until) = blocks {
                    self.gang.metrics.lease_renewed();
                    *until = Instant::now() + lease;
                    Ok(lease)
                } else {
                    Err(Status::not_found(format!("transfer {} has no lease yet", self.transfer.id)))
                };
                let _ = reply.send(answer);
            }
        }
        Ok(())
    }

    async fn reserved(
        &self,
        reservation: Result<Reservation, SubmitError>,
        blocks: &mut Blocks,
    ) -> Result<(), Status> {
        let Blocks::Waiting(_, reply, _) = std::mem::replace(blocks, Blocks::NotAsked) else {
            return Ok(());
        };
        let reservation = reservation.map_err(|error| refuse(&error))?;
        let Gang { engine, model, followers, lease, .. } = &*self.gang;
        let prompt_tokens = self.request.prompt.len();
        let (landing, table) = (&self.transfer.landing, Arc::clone(reservation.blocks()));
        landing.open(Some(reservation), Arc::clone(&table), engine.kv(), prompt_tokens, model.block_tokens);
        if let Some(followers) = followers {
            let landed = followers.land(self.transfer.id, prompt_tokens, &table).await;
            landed.map_err(|error| Status::unavailable(error.to_string()))?;
        }
        *blocks = Blocks::Leased(Instant::now() + *lease);
        let _ = reply.send(Ok(*lease));
        Ok(())
    }
}

fn started() -> wire::DecodeEvent {
    wire::DecodeEvent { event: Some(WireEvent::Started(wire::Started {})) }
}

fn prompt(tokens: wire::Tokens) -> wire::DecodeEvent {
    wire::DecodeEvent { event: Some(WireEvent::Prompt(tokens)) }
}

fn tokens(position: usize, tokens: Vec<wire::Token>) -> wire::DecodeEvent {
    wire::DecodeEvent { event: Some(WireEvent::Tokens(wire::Tokens { position: position as u32, tokens })) }
}

/// Passes a sequence's events on. Tokens that have come while the client took its time share a message.
async fn report(
    mut sequence: Sequence,
    messages: Messages<wire::DecodeEvent>,
    mut stopwatch: Stopwatch,
) -> Result<(), Status> {
    let mut next = sequence.next().await;
    loop {
        match next {
            Some(Event::Started { .. }) => messages.send(started()).await?,
            Some(Event::Computed { .. }) => {}
            Some(Event::Prompt(tokens)) => messages.send(prompt(prompt_to(tokens))).await?,
            Some(Event::Token(first)) => {
                stopwatch.token();
                let position = first.position;
                let mut joined = vec![token_to(first)];
                next = None;
                while joined.len() < MAX_TOKENS_A_MESSAGE {
                    match sequence.next().now_or_never() {
                        Some(Some(Event::Token(token))) => joined.push(token_to(token)),
                        Some(other) => {
                            next = other;
                            break;
                        }
                        None => break,
                    }
                }
                messages.send(tokens(position, joined)).await?;
                if next.is_some() {
                    continue;
                }
            }
            Some(Event::Finished(reason)) => {
                drop(sequence);
                stopwatch.answered();
                let event = Some(WireEvent::Finished(finished_to(reason)));
                return messages.send(wire::DecodeEvent { event }).await;
            }
            Some(Event::Failed(reason)) => {
                return Err(Status::unavailable(format!("the engine failed: {reason}")));
            }
            Some(Event::Unsatisfiable(reason)) => return Err(refused(reason)),
            None => return Err(Status::internal("the engine ended a sequence without a word")),
        }
        next = sequence.next().await;
    }
}
