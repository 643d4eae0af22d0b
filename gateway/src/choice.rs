//! One choice: a route, a Decode stream, text. A gang that refuses, cannot be reached or is lost is no end of it: another
//! one goes on from the prompt and the tokens that have come, whose text the client has or is about to get.

use std::sync::Arc;
use std::time::Duration;

use herd_proto::internal::v1::{self as wire, decode_event};
use herd_routing::Refusal;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout, timeout_at};
use tonic::{Code, Status};
use tracing::debug;

use crate::event::{Delta, EventKind, FinishReason, Finished, GenerationEvent, Prompt};
use crate::fleet::{Assignment, Fleet, GangKey, Lesson, Party};
use crate::grpc::status::retry_after;
use crate::metrics::{Metrics, ModelMetrics, Want};
use crate::request::GrammarRequest;
use crate::transcript::{Transcript, detail};
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
    pub(crate) model_metrics: &'a ModelMetrics,
    pub(crate) events: EventSender,
}

/// How an attempt ended before its time.
enum Attempt {
    /// Another gang than this one may do better.
    Again(RequestError, GangKey),
    /// Final.
    Over(RequestError),
}

/// What came of the attempts so far.
#[derive(Default)]
struct Tried {
    /// At fault.
    gangs: Vec<GangKey>,
    /// Since the last token.
    attempts: u32,
    last: Option<RequestError>,
    /// One of them was refused for want of room.
    full: bool,
}

/// What the choice has said.
struct Said {
    started: bool,
    transcript: Transcript,
    /// Position in the prompt of the next token whose log probability is told.
    prompt: u32,
    /// All that came, those included that are held until their text is whole.
    ids: Vec<u32>,
    /// Tokens of the prompt that no gang had to compute.
    cached_tokens: u32,
    /// Of their log probabilities.
    logprob_sum: f64,
    /// When tokens came last.
    last: Option<Instant>,
}

impl From<RequestError> for Attempt {
    fn from(error: RequestError) -> Self {
        Self::Over(error)
    }
}

impl Choice<'_> {
    /// Runs to the end, sending events.
    pub(crate) async fn run(&self) -> Result<(), RequestError> {
        let sampling = &self.generation.sampling;
        let transcript = Transcript::new(&self.generation.model.text, sampling)
            .map_err(|error| RequestError::Failed(error.to_string()))?;
        let mut said = Said {
            started: false,
            transcript,
            prompt: 1,
            ids: Vec::new(),
            cached_tokens: 0,
            logprob_sum: 0.0,
            last: None,
        };
        let mut tried = Tried::default();
        let (mut attempt, mut resumed) = (0, 0);
        loop {
            let assignment = self.assign(&tried, &said).await?;
            let before = said.ids.len();
            let (error, gang) = match self.attempt(assignment, attempt, &mut said).await {
                Ok(()) => return Ok(()),
                Err(Attempt::Over(error)) => return Err(error),
                Err(Attempt::Again(error, gang)) => (error, gang),
            };
            attempt += 1;
            debug!(request = self.generation.request_id, choice = self.index, tokens = said.ids.len(), %error, "trying elsewhere");
            self.metrics.retried(&error);
            if said.ids.is_empty() {
                tried.attempts += 1;
            } else {
                // Its client is in the middle of a text: gangs that are lost one after the other are no reason to end it.
                resumed += 1;
                if resumed > self.limits.resumes {
                    return Err(given_up(&said, error));
                }
            }
            if said.ids.len() > before {
                self.metrics.resumes.inc();
                // Every other gang is as good as new.
                tried = Tried::default();
            }
            tried.gangs.push(gang);
            // Nothing more would come: only the word that it is all was lost.
            if let Some(reason) = self.all_said(&said) {
                return self.finish(&mut said, reason).await;
            }
            if tried.attempts >= self.limits.attempts {
                return Err(given_up(&said, error));
            }
            tried.full |= matches!(error, RequestError::Busy { .. });
            tried.last = Some(error);
        }
    }

    /// A route without a gang that was at fault. Where none is ready, one is waited for, unless what there is is full. A choice that has
    /// begun waits longer, and for room too.
    async fn assign(&self, tried: &Tried, said: &Said) -> Result<Assignment, RequestError> {
        let model = &self.generation.model;
        let prompt_tokens = (self.prompt().tokens.len() + said.ids.len()) as u32;
        let begun = !said.ids.is_empty();
        let patience = if begun { self.limits.resume_wait } else { self.limits.gang_wait };
        let mut wait = self.fleet.wait(&model.name, patience);
        loop {
            let refusal = match self.fleet.assign(model, prompt_tokens, &tried.gangs) {
                Ok(assignment) if !assignment.is_one_of(&tried.gangs) => return Ok(assignment),
                Ok(_) => Refusal::NoGang,
                Err(refusal) => refusal,
            };
            if begun && refusal == Refusal::Full {
                // Room comes without a word.
                let again = tokio::time::sleep(ROOM_AGAIN);
                within(self.generation.deadline, again).await?;
                continue;
            }
            let full = tried.full || refusal == Refusal::Full;
            if full && !begun || !within(self.generation.deadline, wait.changed()).await? {
                // What a gang said tells more than that there is no other one.
                self.metrics.refused(Want::Route(refusal));
                let error = tried.last.clone();
                let error = error.unwrap_or_else(|| RequestError::refused(&model.name, refusal));
                return Err(given_up(said, error));
            }
        }
    }

    /// The reason to finish, where a gang could only repeat what has come.
    fn all_said(&self, said: &Said) -> Option<FinishReason> {
        let last = said.ids.last()?;
        if self.generation.sampling.stop_ids.contains(last) {
            Some(FinishReason::Stop)
        } else if said.ids.len() >= self.prompt().max_tokens as usize {
            Some(FinishReason::Length)
        } else {
            None
        }
    }

    /// The first choice of a prompt tells of it, before its first token.
    fn tells_of_prompt(&self, said: &[u32]) -> bool {
        said.is_empty() && self.index.is_multiple_of(self.generation.best_of)
    }

    fn prompt(&self) -> &ValidatedPrompt {
        &self.generation.prompts[(self.index / self.generation.best_of) as usize]
    }

    /// One call of one gang.
    async fn attempt(
        &self,
        mut assignment: Assignment,
        attempt: u32,
        said: &mut Said,
    ) -> Result<(), Attempt> {
        let mut request = tonic::Request::new(self.decode_request(&assignment, attempt, &said.ids));
        let deadline = self.generation.deadline;
        request.set_timeout(deadline.saturating_duration_since(Instant::now()));
        let mut client = assignment.client.clone();
        let response = within(deadline, client.decode(request)).await?;
        let mut stream = match response {
            Ok(response) => response.into_inner(),
            Err(status) => return Err(self.judge(&assignment, &status, false)),
        };
        let mut works = false;
        // One that goes on finds its own tokens in a cache; those count as they did before.
        let fresh = said.ids.is_empty();
        loop {
            let event = match within(deadline, stream.message()).await? {
                Ok(Some(wire::DecodeEvent { event: Some(event) })) => event,
                // An event this version does not know.
                Ok(Some(wire::DecodeEvent { event: None })) => continue,
                Ok(None) => {
                    let status = Status::unavailable("the gang ended the stream without a finish");
                    return Err(self.judge(&assignment, &status, works));
                }
                Err(status) => return Err(self.judge(&assignment, &status, works)),
            };
            match event {
                // Not passed on: until there is a token the gang may yet refuse, and a refusal is a status.
                decode_event::Event::Started(wire::Started { cached_tokens }) if fresh => {
                    said.cached_tokens = cached_tokens;
                }
                decode_event::Event::Started(_) => {}
                decode_event::Event::Prompt(tokens) => self.send_prompt(said, tokens).await?,
                decode_event::Event::Tokens(wire::Tokens { position, tokens }) => {
                    self.send_started(&mut said.started).await?;
                    if position as usize != said.ids.len() {
                        let taken = said.ids.len();
                        let message = format!("the gang sent position {position} where {taken} comes next");
                        return Err(RequestError::Failed(message).into());
                    }
                    if !std::mem::replace(&mut works, true) {
                        assignment.prompt_done();
                    }
                    self.came(said, tokens.len());
                    let mut delta = Delta::default();
                    let mut stopped = false;
                    for token in tokens {
                        said.ids.push(token.id);
                        said.logprob_sum += f64::from(token.logprob);
                        stopped = said.transcript.push(&token, &mut delta);
                        if stopped {
                            break;
                        }
                    }
                    self.send_delta(delta).await?;
                    if stopped {
                        // Returning drops the stream, which ends the work.
                        return Ok(self.send_finished(FinishReason::Stop, said).await?);
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
                    if fresh {
                        said.cached_tokens = cached_tokens;
                    }
                    return Ok(self.finish(said, reason).await?);
                }
            }
        }
    }

    /// Counts the time that tokens took. Those of one message have come together: each took its part.
    fn came(&self, said: &mut Said, tokens: usize) {
        let now = Instant::now();
        if let Some(last) = said.last.replace(now) {
            let each = now.duration_since(last).as_secs_f64() / tokens.max(1) as f64;
            for _ in 0..tokens {
                self.model_metrics.inter_token_latency.observe(each);
            }
        }
    }

    /// Lets go of what is held, and says that it is all.
    async fn finish(&self, said: &mut Said, reason: FinishReason) -> Result<(), RequestError> {
        self.send_started(&mut said.started).await?;
        let mut delta = Delta::default();
        said.transcript.finish(&mut delta);
        self.send_delta(delta).await?;
        self.send_finished(reason, said).await
    }

    fn decode_request(&self, assignment: &Assignment, attempt: u32, said: &[u32]) -> wire::DecodeRequest {
        let generation = self.generation;
        let sampling = &generation.sampling;
        let prompt = self.prompt();
        // Each prompt of a request is drawn as if it had come alone.
        let request_id = match self.index / generation.best_of {
            0 => generation.request_id.clone(),
            prompt => format!("{}-{prompt}", generation.request_id),
        };
        wire::DecodeRequest {
            context: Some(wire::Context {
                request_id,
                choice: self.index % generation.best_of,
                attempt,
                revision: assignment.revision.clone(),
                model_digest: generation.model.digest.clone(),
                gang_epoch: assignment.epoch,
                cache_salt: generation.scheduling.cache_salt.clone(),
                priority: generation.scheduling.priority,
            }),
            prompt: prompt.tokens.iter().chain(said).copied().collect(),
            sampling: Some(wire::Sampling {
                max_tokens: prompt.max_tokens.saturating_sub(said.len() as u32).max(1),
                temperature: sampling.temperature,
                top_p: sampling.top_p,
                seed: sampling.seed,
                stop_token_ids: sampling.stop_ids.clone(),
                top_logprobs: sampling.logprobs,
                first_position: said.len() as u32,
                shaping: Some(sampling.shaping.clone()),
                grammar: sampling.grammar.as_ref().map(|request| request.grammar.clone()),
                prompt_logprobs: sampling.prompt_logprobs.filter(|_| self.tells_of_prompt(said)),
            }),
            prefill_peer: assignment.prefill_peer.clone(),
            prefill_epoch: assignment.prefill_epoch,
        }
    }

    /// What a failed call means; `works`: tokens had come from it.
    fn judge(&self, assignment: &Assignment, status: &Status, works: bool) -> Attempt {
        let message = status.message().to_owned();
        let at_fault = if message.starts_with(AT_PREFILL) { Party::Prefill } else { Party::Called };
        // A status with a source was made on this side: the connection failed.
        let connection_failed = std::error::Error::source(status).is_some();
        let again = |error| Attempt::Again(error, assignment.gang(at_fault));
        match status.code() {
            Code::DeadlineExceeded => return Attempt::Over(RequestError::Deadline),
            Code::InvalidArgument => {
                let grammar = self.generation.sampling.grammar.as_ref();
                if let (Some(GrammarRequest { field, .. }), Some((_, problem))) =
                    (grammar, message.split_once(AT_GRAMMAR))
                {
                    return Attempt::Over(RequestError::invalid(field, format!("{field}: {problem}")));
                }
                return Attempt::Over(RequestError::invalid("", format!("the gang refused: {message}")));
            }
            // A gang that is full is not broken.
            Code::ResourceExhausted if !works => {
                let retry_after = retry_after(status).unwrap_or(crate::error::RETRY_AFTER);
                return again(RequestError::Busy { message, retry_after });
            }
            Code::Unavailable if !works && message.contains(DRAINING) => {
                assignment.learned(at_fault, Lesson::Drains);
                return again(RequestError::Unavailable(message));
            }
            _ => {}
        }
        assignment.learned(at_fault, Lesson::Fails);
        match status.code() {
            // FAILED_PRECONDITION: of another epoch or digest than it was picked for, so it started anew.
            Code::Unavailable | Code::FailedPrecondition => again(RequestError::Unavailable(message)),
            _ if connection_failed => again(RequestError::Unavailable(message)),
            code => Attempt::Over(RequestError::Failed(format!("the gang failed ({code:?}): {message}"))),
        }
    }

    /// Of a gang that began anew, what the client has is left out: it is the same.
    async fn send_prompt(&self, said: &mut Said, tokens: wire::Tokens) -> Result<(), RequestError> {
        let wire::Tokens { position, tokens } = tokens;
        if position > said.prompt {
            let message =
                format!("the gang sent position {position} of the prompt where {} comes next", said.prompt);
            return Err(RequestError::Failed(message));
        }
        let known = (said.prompt - position) as usize;
        let text = &self.generation.model.text;
        let tokens: Vec<_> = tokens.iter().skip(known).map(|token| detail(text, token)).collect();
        if tokens.is_empty() {
            return Ok(());
        }
        self.send_started(&mut said.started).await?;
        let position = said.prompt;
        said.prompt += tokens.len() as u32;
        self.send(EventKind::Prompt(Prompt { position, tokens })).await
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

    async fn send_finished(&self, reason: FinishReason, said: &Said) -> Result<(), RequestError> {
        let tokens = said.ids.len() as u32;
        self.model_metrics.output_tokens.inc_by(u64::from(tokens));
        let finished = Finished {
            reason,
            completion_tokens: tokens,
            cached_tokens: said.cached_tokens,
            logprob_sum: said.logprob_sum,
            discarded_tokens: 0,
        };
        self.send(EventKind::Finished(finished)).await
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

/// Between two looks for room where all gangs are full.
const ROOM_AGAIN: Duration = Duration::from_millis(250);

/// The end of a choice that no gang takes on: as an error of its own where it has begun.
fn given_up(said: &Said, error: RequestError) -> RequestError {
    if said.ids.is_empty() {
        return error;
    }
    RequestError::Failed(format!("gangs were lost, the last one after {} tokens: {error}", said.ids.len()))
}

/// In the message of a gang that refuses because it drains: nothing was started.
const DRAINING: &str = "draining, not started";
/// How a gang's complaint about a grammar begins, in its message.
const AT_GRAMMAR: &str = "sampling.grammar: ";
/// How a called gang begins a message about the prefill gang it was given.
const AT_PREFILL: &str = "prefill at ";

fn until(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

async fn within<T>(deadline: Instant, future: impl Future<Output = T>) -> Result<T, RequestError> {
    timeout_at(deadline, future).await.map_err(|_| RequestError::Deadline)
}
