//! One choice: a route, a Decode stream, text. Tried again elsewhere only while nothing was generated, and only if the gang
//! refused or could not be reached.

use std::sync::Arc;
use std::time::Duration;

use herd_proto::internal::v1::{self as wire, decode_event};
use herd_routing::Refusal;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout, timeout_at};
use tonic::{Code, Status};
use tracing::debug;

use crate::event::{Delta, EventKind, FinishReason, Finished, GenerationEvent};
use crate::fleet::{Assignment, Fleet, Lesson, Party, RouteKey};
use crate::grpc::status::retry_after;
use crate::metrics::Metrics;
use crate::transcript::Transcript;
use crate::validate::{ValidatedGeneration, ValidatedPrompt};
use crate::{Limits, RequestError};

pub(crate) type EventSender = mpsc::Sender<Result<GenerationEvent, RequestError>>;

/// One choice of a generation, and what running it takes.
pub(crate) struct Choice<'a> {
    pub(crate) generation: &'a ValidatedGeneration,
    /// Over all prompts.
    pub(crate) index: u32,
    pub(crate) fleet: &'a Arc<Fleet>,
    pub(crate) limits: &'a Limits,
    pub(crate) metrics: &'a Metrics,
    pub(crate) events: EventSender,
}

/// How an attempt ended before its time.
enum Attempt {
    /// Nothing was generated, and another gang may do better.
    Again(RequestError),
    /// Final.
    Over(RequestError),
}

/// What came of the attempts so far.
#[derive(Default)]
struct Tried {
    routes: Vec<RouteKey>,
    last: Option<RequestError>,
    /// One of them was refused for want of room.
    full: bool,
}

impl From<RequestError> for Attempt {
    fn from(error: RequestError) -> Self {
        Self::Over(error)
    }
}

impl Choice<'_> {
    /// Runs to the end, sending events.
    pub(crate) async fn run(&self) -> Result<(), RequestError> {
        let mut started = false;
        let mut tried = Tried::default();
        for attempt in 0..self.limits.attempts {
            let assignment = self.assign(&tried).await?;
            tried.routes.push(assignment.key.clone());
            match self.attempt(assignment, attempt, &mut started).await {
                Ok(()) => return Ok(()),
                Err(Attempt::Over(error)) => return Err(error),
                Err(Attempt::Again(error)) => {
                    debug!(request = self.generation.request_id, choice = self.index, %error, "trying elsewhere");
                    self.metrics.retries.with_label_values(&[error.category()]).inc();
                    tried.full |= matches!(error, RequestError::Busy { .. });
                    tried.last = Some(error);
                }
            }
        }
        Err(tried.last.unwrap_or_else(|| RequestError::Failed("no attempt was allowed".to_owned())))
    }

    /// A route that was not tried. Where none is ready, one is waited for, unless what there is is full.
    async fn assign(&self, tried: &Tried) -> Result<Assignment, RequestError> {
        let model = &self.generation.model;
        let prompt_tokens = self.prompt().tokens.len() as u32;
        let mut wait = self.fleet.wait(self.limits.gang_wait);
        loop {
            let refusal = match self.fleet.assign(model, prompt_tokens, &tried.routes) {
                Ok(assignment) if !tried.routes.contains(&assignment.key) => return Ok(assignment),
                Ok(_) => Refusal::NoGang,
                Err(refusal) => refusal,
            };
            let full = tried.full || refusal == Refusal::Full;
            if full || !within(self.generation.deadline, wait.changed()).await? {
                // What a gang said tells more than that there is no other one.
                return Err(tried
                    .last
                    .clone()
                    .unwrap_or_else(|| RequestError::refused(&model.name, refusal)));
            }
        }
    }

    fn prompt(&self) -> &ValidatedPrompt {
        &self.generation.prompts[(self.index / self.generation.n) as usize]
    }

    /// One call of one gang.
    async fn attempt(
        &self,
        mut assignment: Assignment,
        attempt: u32,
        started: &mut bool,
    ) -> Result<(), Attempt> {
        let sampling = &self.generation.sampling;
        let mut transcript =
            Transcript::new(&self.generation.model.text, sampling.stop.clone(), sampling.logprobs.is_some())
                .map_err(|error| RequestError::Failed(error.to_string()))?;
        let mut request = tonic::Request::new(self.decode_request(&assignment, attempt));
        let deadline = self.generation.deadline;
        request.set_timeout(deadline.saturating_duration_since(Instant::now()));
        let mut client = assignment.client.clone();
        let response = within(deadline, client.decode(request)).await?;
        let mut stream = match response {
            Ok(response) => response.into_inner(),
            Err(status) => return Err(Self::judge(&assignment, &status, 0)),
        };
        loop {
            let event = match within(deadline, stream.message()).await? {
                Ok(Some(wire::DecodeEvent { event: Some(event) })) => event,
                // An event this version does not know.
                Ok(Some(wire::DecodeEvent { event: None })) => continue,
                Ok(None) => {
                    let status = Status::unavailable("the gang ended the stream without a finish");
                    return Err(Self::judge(&assignment, &status, transcript.taken()));
                }
                Err(status) => return Err(Self::judge(&assignment, &status, transcript.taken())),
            };
            match event {
                // Not passed on: until there is a token the gang may yet refuse, and a refusal is a status.
                decode_event::Event::Started(wire::Started {}) => {}
                decode_event::Event::Tokens(wire::Tokens { position, tokens }) => {
                    self.send_started(started).await?;
                    if position != transcript.taken() {
                        let taken = transcript.taken();
                        let message = format!("the gang sent position {position} where {taken} comes next");
                        return Err(RequestError::Failed(message).into());
                    }
                    if position == 0 {
                        assignment.prompt_done();
                    }
                    let mut delta = Delta::default();
                    let mut stopped = false;
                    for token in tokens {
                        stopped = transcript.push(token, &mut delta);
                        if stopped {
                            break;
                        }
                    }
                    self.send_delta(delta).await?;
                    if stopped {
                        // Returning drops the stream, which ends the work.
                        return Ok(self.send_finished(FinishReason::Stop, transcript.taken(), 0).await?);
                    }
                }
                decode_event::Event::Finished(wire::Finished { reason, cached_tokens }) => {
                    let reason = match wire::finished::Reason::try_from(reason) {
                        Ok(wire::finished::Reason::Stop) => FinishReason::Stop,
                        Ok(wire::finished::Reason::Length) => FinishReason::Length,
                        Ok(wire::finished::Reason::Unspecified) | Err(_) => {
                            let message = format!("the gang gave finish reason {reason}");
                            return Err(RequestError::Failed(message).into());
                        }
                    };
                    self.send_started(started).await?;
                    let mut delta = Delta::default();
                    transcript.finish(&mut delta);
                    self.send_delta(delta).await?;
                    return Ok(self.send_finished(reason, transcript.taken(), cached_tokens).await?);
                }
            }
        }
    }

    fn decode_request(&self, assignment: &Assignment, attempt: u32) -> wire::DecodeRequest {
        let generation = self.generation;
        let sampling = &generation.sampling;
        let prompt = self.prompt();
        // Each prompt of a request is drawn as if it had come alone.
        let request_id = match self.index / generation.n {
            0 => generation.request_id.clone(),
            prompt => format!("{}-{prompt}", generation.request_id),
        };
        wire::DecodeRequest {
            context: Some(wire::Context {
                request_id,
                choice: self.index % generation.n,
                attempt,
                revision: assignment.revision.clone(),
                model_digest: generation.model.digest.clone(),
                gang_epoch: assignment.epoch,
            }),
            prompt: prompt.tokens.clone(),
            sampling: Some(wire::Sampling {
                max_tokens: prompt.max_tokens,
                temperature: sampling.temperature,
                top_p: sampling.top_p,
                seed: sampling.seed,
                stop_token_ids: sampling.stop_ids.clone(),
                top_logprobs: sampling.logprobs,
            }),
            prefill_peer: assignment.prefill_peer.clone(),
            prefill_epoch: assignment.prefill_epoch,
        }
    }

    /// What a failed call means after `generated` tokens.
    fn judge(assignment: &Assignment, status: &Status, generated: u32) -> Attempt {
        let message = status.message().to_owned();
        let at_fault = if message.starts_with(AT_PREFILL) { Party::Prefill } else { Party::Called };
        // A status with a source was made on this side: the connection failed.
        let connection_failed = std::error::Error::source(status).is_some();
        match status.code() {
            Code::DeadlineExceeded => return Attempt::Over(RequestError::Deadline),
            Code::InvalidArgument => {
                return Attempt::Over(RequestError::invalid("", format!("the gang refused: {message}")));
            }
            // A gang that is full is not broken.
            Code::ResourceExhausted if generated == 0 => {
                let retry_after = retry_after(status).unwrap_or(crate::error::RETRY_AFTER);
                return Attempt::Again(RequestError::Busy { message, retry_after });
            }
            Code::Unavailable if generated == 0 && message.contains(DRAINING) => {
                assignment.learned(at_fault, Lesson::Drains);
                return Attempt::Again(RequestError::Unavailable(message));
            }
            _ => {}
        }
        assignment.learned(at_fault, Lesson::Fails);
        if generated > 0 {
            return Attempt::Over(RequestError::Failed(format!(
                "a gang was lost after {generated} tokens: {message}"
            )));
        }
        match status.code() {
            // FAILED_PRECONDITION: of another epoch or digest than it was picked for, so it started anew.
            Code::Unavailable | Code::FailedPrecondition => {
                Attempt::Again(RequestError::Unavailable(message))
            }
            _ if connection_failed => Attempt::Again(RequestError::Unavailable(message)),
            code => Attempt::Over(RequestError::Failed(format!("the gang failed ({code:?}): {message}"))),
        }
    }

    async fn send_started(&self, started: &mut bool) -> Result<(), RequestError> {
        if std::mem::replace(started, true) {
            return Ok(());
        }
        self.send(EventKind::Started).await
    }

    async fn send_delta(&self, delta: Delta) -> Result<(), RequestError> {
        if delta.token_ids.is_empty() && delta.text.is_empty() {
            return Ok(());
        }
        self.send(EventKind::Delta(delta)).await
    }

    async fn send_finished(
        &self,
        reason: FinishReason,
        tokens: u32,
        cached_tokens: u32,
    ) -> Result<(), RequestError> {
        self.metrics.output_tokens.inc_by(u64::from(tokens));
        self.send(EventKind::Finished(Finished { reason, completion_tokens: tokens, cached_tokens })).await
    }

    async fn send(&self, kind: EventKind) -> Result<(), RequestError> {
        let event = GenerationEvent { choice: self.index, kind };
        let patience = self.limits.slow_client.min(until(self.generation.deadline));
        match timeout(patience, self.events.send(Ok(event))).await {
            Ok(Ok(())) => Ok(()),
            // The receiver is gone, and this task with it.
            Ok(Err(_)) | Err(_) => Err(RequestError::SlowClient),
        }
    }
}

/// In the message of a gang that refuses because it drains: nothing was started.
const DRAINING: &str = "draining, not started";
/// How a called gang begins a message about the prefill gang it was given.
const AT_PREFILL: &str = "prefill at ";

fn until(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

async fn within<T>(deadline: Instant, future: impl Future<Output = T>) -> Result<T, RequestError> {
    timeout_at(deadline, future).await.map_err(|_| RequestError::Deadline)
}
