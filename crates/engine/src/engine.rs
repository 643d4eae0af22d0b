//! The handle: requests go in, sequences come out.

use std::future::Future;
use std::sync::Arc;
use std::thread::JoinHandle;

use herd_scheduler::{Continuation, Counters, Limits, Load, Scheduling, TooLong, Work};
use tokio::sync::{mpsc, watch};

use crate::draft::Drafting;
use crate::inbox::{Reporter, Shared};
use crate::observer::Unobserved;
use crate::sampler::is_end;
use crate::step_loop::StepLoop;
use crate::{
    ConstraintError, Drafter, Executor, KvStore, Observer, Penalties, Reservation, Reserving, SampledToken,
    Sampling, Sequence, Shaping,
};

/// A request the engine does not take.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SubmitError {
    /// The queue is at its bound: come back later.
    #[error("the queue is full: {waiting} requests are waiting")]
    Full {
        /// Requests in the queue.
        waiting: usize,
    },
    /// It could never run here.
    #[error(transparent)]
    TooLong(#[from] TooLong),
    /// Nothing to compute.
    #[error("the prompt is empty")]
    Empty,
    /// A token id outside the vocabulary.
    #[error("token id {id} is not below the vocabulary size {vocab_size}")]
    BadToken {
        /// The first such id.
        id: u32,
        /// Of the model.
        vocab_size: usize,
    },
    /// A sampling parameter out of its range.
    #[error("{field} {value} is not {expected}")]
    BadSampling {
        /// Of [`Sampling`].
        field: &'static str,
        /// Given.
        value: f64,
        /// What is asked for.
        expected: &'static str,
    },
    /// A token that the constraint does not allow.
    #[error("{0}")]
    Constraint(#[from] ConstraintError),
    /// The engine has ended; with its reason.
    #[error("the engine has stopped: {0}")]
    Stopped(String),
}

/// One gang's engine: a step loop on a thread of its own, which ends and is joined when the last handle is dropped. That
/// takes as long as the step that is running; sequences that still run fail.
///
/// A step that fails ends the engine: every sequence gets [`crate::Event::Failed`], every later call
/// [`SubmitError::Stopped`], and [`Engine::stopped`] resolves.
#[derive(Clone, Debug)]
pub struct Engine {
    inner: Arc<Inner>,
    /// Of what is submitted through this handle.
    scheduling: Scheduling,
}

struct Inner {
    shared: Arc<Shared>,
    limits: Limits,
    vocab_size: usize,
    kv: Vec<Arc<dyn KvStore>>,
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { shared: _, limits, vocab_size, kv, thread: _ } = self;
        f.debug_struct("Engine")
            .field("limits", limits)
            .field("vocab_size", vocab_size)
            .field("ranks", &kv.len())
            .finish_non_exhaustive()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.shared.close();
        if let Some(thread) = self.thread.take() {
            // It catches its own panics.
            let _ = thread.join();
        }
    }
}

impl Engine {
    /// Starts the step loop. Zeros in `limits` count as 1.
    pub fn start(executor: Box<dyn Executor>, limits: Limits) -> Self {
        Self::start_with(executor, None, limits, Arc::new(Unobserved))
    }

    /// [`Engine::start`], which computes what the drafter guesses, and tells `observer` of its work. A draft model has as many
    /// KV blocks and slots of the host pool, and the same vocabulary.
    pub fn start_with(
        executor: Box<dyn Executor>,
        drafter: Option<Drafter>,
        limits: Limits,
        observer: Arc<dyn Observer>,
    ) -> Self {
        let mut limits = limits.at_least_one();
        let drafting = drafter.filter(|_| limits.draft_tokens > 0);
        let drafting = drafting.map(|drafter| Drafting::new(drafter, &limits));
        if drafting.is_none() {
            limits.draft_tokens = 0;
        }
        let shared = Arc::new(Shared::new(limits.max_waiting));
        let (kv, vocab_size) = (executor.kv(), executor.vocab_size());
        let step_loop = StepLoop::new(executor, drafting, limits, Arc::clone(&shared), observer);
        let spawned = std::thread::Builder::new().name("step-loop".to_owned()).spawn(move || step_loop.run());
        let thread = match spawned {
            Ok(thread) => Some(thread),
            Err(error) => {
                drop(shared.stop(&format!("the step loop's thread cannot be started: {error}")));
                None
            }
        };
        let inner = Arc::new(Inner { shared, limits, vocab_size, kv, thread });
        Self { inner, scheduling: Scheduling::default() }
    }

    /// A handle whose requests have this priority and cache salt; those of others have priority 0 and no salt.
    #[must_use]
    pub fn scheduled(&self, scheduling: Scheduling) -> Self {
        Self { inner: Arc::clone(&self.inner), scheduling }
    }

    /// Computes a prompt and generates from it.
    pub fn generate(&self, prompt: Vec<u32>, sampling: Sampling) -> Result<Sequence, SubmitError> {
        self.check_sampling(&sampling)?;
        let (max_tokens, all_logits) = (sampling.max_tokens, sampling.prompt_logprobs.is_some());
        self.submit(Work::Generate { prompt, max_tokens, all_logits }, sampling)
    }

    /// Computes a prompt and samples position 0. The blocks, which cover the prompt alone, are the sequence's until it is
    /// dropped. Finishes with `Stop` if the token is a stop token, else with `Length`.
    pub fn prefill(&self, prompt: Vec<u32>, sampling: Sampling) -> Result<Sequence, SubmitError> {
        self.check_sampling(&sampling)?;
        let all_logits = sampling.prompt_logprobs.is_some();
        self.submit(Work::Prefill { prompt, all_logits }, sampling)
    }

    /// Sets blocks aside for a prompt that another engine computes, and for the token that is sampled there; what is generated
    /// here takes more as it comes. Waits in the same queue as everything else.
    pub fn reserve(&self, prompt_tokens: usize, max_tokens: usize) -> Result<Reserving, SubmitError> {
        if max_tokens == 0 {
            return Err(BAD_MAX_TOKENS);
        }
        let work = Work::Reserve { prompt_tokens, max_tokens };
        self.check_work(&work)?;
        let (sender, events) = mpsc::channel(2);
        let reporter = Reporter { events: sender, sampling: None };
        let ticket = self.inner.shared.submit(work, self.scheduling.clone(), reporter)?;
        Ok(Reserving { events, ticket })
    }

    /// Goes on from the prompt's KV that was written to the reservation's blocks, and from the token that was sampled after
    /// it. Emits what comes after `first`; where nothing does (it is a stop token, or the last one asked for), `Finished`
    /// alone. Prompt and `max_tokens` must be those of the reservation (a smaller `max_tokens` will do).
    pub fn decode(
        &self,
        reservation: Reservation,
        prompt: Vec<u32>,
        first: &SampledToken,
        mut sampling: Sampling,
    ) -> Result<Sequence, SubmitError> {
        self.check_sampling(&sampling)?;
        self.check_tokens(&prompt)?;
        self.check_tokens(&[first.token.id])?;
        let stop = match &mut sampling.constraint {
            Some(constraint) => is_end(&sampling.stop_ids, constraint, first.token.id)?,
            None => sampling.stop_ids.contains(&first.token.id),
        };
        let from = Continuation {
            first: first.token.id,
            generated: first.position.saturating_sub(sampling.first_position).saturating_add(1),
            max_tokens: sampling.max_tokens,
            stop,
            prompt,
        };
        let positions = self.inner.limits.positions(from.prompt.len(), from.max_tokens)?;
        let (sender, events) = mpsc::channel(positions + 2);
        let ticket = reservation.ticket;
        ticket.decode(from, Reporter { events: sender, sampling: Some(sampling) })?;
        Ok(Sequence { events, _ticket: ticket })
    }

    /// Ends it although there are handles: as dropping the last one does, without waiting for the step that runs.
    pub fn stop(&self) {
        self.inner.shared.close();
    }

    /// How busy it is, whenever that changes.
    pub fn load(&self) -> watch::Receiver<Load> {
        self.inner.shared.watch_load()
    }

    /// How busy it is now. Takes no lock, and so never keeps the step loop waiting; each number is the newest one.
    pub fn busy(&self) -> Load {
        self.inner.shared.busy()
    }

    /// What was done since the start. Takes no lock either.
    pub fn counters(&self) -> Counters {
        self.inner.shared.counters()
    }

    /// The KV cache of each rank, by rank.
    pub fn kv(&self) -> &[Arc<dyn KvStore>] {
        &self.inner.kv
    }

    /// The limits it runs within.
    pub fn limits(&self) -> &Limits {
        &self.inner.limits
    }

    /// Token ids are below it.
    pub fn vocab_size(&self) -> usize {
        self.inner.vocab_size
    }

    /// Resolves with the reason once the engine has ended: a step failed, or the last handle was dropped.
    pub fn stopped(&self) -> impl Future<Output = String> + Send + use<> {
        let mut stopped = self.inner.shared.watch_stopped();
        async move {
            match stopped.wait_for(Option::is_some).await {
                Ok(reason) => reason.clone().unwrap_or_default(),
                Err(_) => "the last handle was dropped".to_owned(),
            }
        }
    }

    fn submit(&self, work: Work, sampling: Sampling) -> Result<Sequence, SubmitError> {
        let positions = self.check_work(&work)?;
        // Started, one Computed a prompt token at most (and one Prompt), the tokens (one even of a prefill), and the last one.
        let prompt = if work.all_logits() { work.prompt_tokens() } else { 0 };
        let (sender, events) = mpsc::channel(positions + prompt + 3);
        let reporter = Reporter { events: sender, sampling: Some(sampling) };
        let ticket = self.inner.shared.submit(work, self.scheduling.clone(), reporter)?;
        Ok(Sequence { events, _ticket: ticket })
    }

    /// Returns the positions that the work takes.
    fn check_work(&self, work: &Work) -> Result<usize, SubmitError> {
        let (prompt, max_tokens) = match work {
            Work::Generate { prompt, max_tokens, all_logits: _ } => (prompt.as_slice(), *max_tokens),
            Work::Prefill { prompt, all_logits: _ } => (prompt.as_slice(), 0),
            Work::Reserve { prompt_tokens: _, max_tokens } => (&[][..], *max_tokens),
        };
        if work.prompt_tokens() == 0 {
            return Err(SubmitError::Empty);
        }
        self.check_tokens(prompt)?;
        Ok(self.inner.limits.positions(work.prompt_tokens(), max_tokens)?)
    }

    fn check_tokens(&self, tokens: &[u32]) -> Result<(), SubmitError> {
        let vocab_size = self.inner.vocab_size;
        match tokens.iter().find(|&&id| id as usize >= vocab_size) {
            Some(&id) => Err(SubmitError::BadToken { id, vocab_size }),
            None => Ok(()),
        }
    }

    fn check_sampling(&self, sampling: &Sampling) -> Result<(), SubmitError> {
        let Sampling {
            max_tokens,
            temperature,
            top_p,
            seed: _,
            choice: _,
            stop_ids: _,
            top_logprobs,
            first_position: _,
            shaping: Shaping { bias, min_tokens: _, penalties, top_k: _, min_p },
            constraint: _,
            prompt_logprobs,
        } = sampling;
        let bad = |field, value, expected| Err(SubmitError::BadSampling { field, value, expected });
        if *max_tokens == 0 {
            return Err(BAD_MAX_TOKENS);
        }
        if !(temperature.is_finite() && *temperature >= 0.0) {
            return bad("temperature", f64::from(*temperature), "a number of at least 0");
        }
        if !(*top_p > 0.0 && *top_p <= 1.0) {
            return bad("top_p", f64::from(*top_p), "above 0 and at most 1");
        }
        if *top_logprobs > self.inner.vocab_size {
            return bad("top_logprobs", *top_logprobs as f64, "at most the vocabulary size");
        }
        if let Some(top) = prompt_logprobs.filter(|top| *top > self.inner.vocab_size) {
            return bad("prompt_logprobs", top as f64, "at most the vocabulary size");
        }
        if let Some((id, _)) = bias.iter().find(|(id, _)| *id as usize >= self.inner.vocab_size) {
            return bad("bias", f64::from(*id), "a token of the vocabulary");
        }
        if let Some((_, bias)) = bias.iter().find(|(_, bias)| !bias.is_finite()) {
            return bad("bias", f64::from(*bias), "a number");
        }
        let Penalties { repetition, presence, frequency } = *penalties;
        if !(repetition.is_finite() && repetition > 0.0) {
            return bad("repetition_penalty", f64::from(repetition), "a number above 0");
        }
        for (field, penalty) in [("presence_penalty", presence), ("frequency_penalty", frequency)] {
            if !penalty.is_finite() {
                return bad(field, f64::from(penalty), "a number");
            }
        }
        if !(0.0..=1.0).contains(min_p) {
            return bad("min_p", f64::from(*min_p), "at least 0 and at most 1");
        }
        Ok(())
    }
}

const BAD_MAX_TOKENS: SubmitError =
    SubmitError::BadSampling { field: "max_tokens", value: 0.0, expected: "at least 1" };

#[cfg(test)]
mod tests;
