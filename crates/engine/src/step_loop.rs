//! The one thread that owns scheduler, executor and sequences, and turns commands into steps and steps into events.

use std::any::Any;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use herd_scheduler::{
    DraftRoom, Ended, Limits, LogitRows, Planned, Scheduler, SequenceId, Started, StepEntry, StepPlan,
};

use crate::draft::{Drafting, Wanted};
use crate::inbox::{Command, Reporter, Shared};
use crate::prompt_logprobs::prompt_logprobs;
use crate::sampler::{SampleError, sample_next};
use crate::{Constraint, Event, Executor, FinishReason, History, Observer, Sampling, StepDone};

pub(crate) struct StepLoop {
    scheduler: Scheduler,
    executor: Box<dyn Executor>,
    drafting: Option<Drafting>,
    vocab_size: usize,
    sequences: HashMap<SequenceId, Running>,
    shared: Arc<Shared>,
    observer: Arc<dyn Observer>,
    /// Of this turn; they go out when load and counters include them.
    events: Vec<(SequenceId, Event)>,
}

struct Running {
    reporter: Reporter,
    prompt_tokens: usize,
    /// Positions whose KV the draft model has, if there is one.
    drafted: usize,
    /// Prompt tokens that were told of as computed; what a preemption costs is not told.
    computed: usize,
    /// Position of the next token.
    position: usize,
    /// In the queue since then, until it has started.
    queued: Option<Instant>,
    /// When there was a token last.
    last_token: Option<Instant>,
    /// Where its sampling asks for it.
    history: Option<History>,
    /// The prompt, where how likely its tokens are is asked for.
    prompt: Vec<u32>,
    /// Of its sampling, after the tokens that have come.
    constraint: Option<Box<dyn Constraint>>,
}

impl StepLoop {
    pub(crate) fn new(
        executor: Box<dyn Executor>,
        drafting: Option<Drafting>,
        limits: Limits,
        shared: Arc<Shared>,
        observer: Arc<dyn Observer>,
    ) -> Self {
        Self {
            scheduler: Scheduler::new(limits),
            vocab_size: executor.vocab_size().max(1),
            executor,
            drafting,
            sequences: HashMap::new(),
            shared,
            observer,
            events: Vec::new(),
        }
    }

    /// Runs until the last handle is gone or a step fails.
    pub(crate) fn run(mut self) {
        let ended = catch_unwind(AssertUnwindSafe(|| self.turns()));
        let reason = match ended {
            Ok(Ok(())) => "the engine was shut down".to_owned(),
            Ok(Err(reason)) => reason,
            Err(panic) => format!("the step loop panicked: {}", message(&*panic)),
        };
        for command in self.shared.stop(&reason) {
            if let Command::Submit(id, work, _, reporter, came) = command {
                self.admit(id, work.prompt_tokens(), work.prompt(), reporter, Some(came));
            } else if let Command::Decode(id, from, reporter) = command {
                self.admit(id, from.prompt.len(), &from.prompt, reporter, None);
            }
        }
        for running in self.sequences.values() {
            running.send(Event::Failed(reason.clone()));
        }
    }

    fn turns(&mut self) -> Result<(), String> {
        let mut idle = false;
        while let Some(commands) = self.shared.take(idle) {
            for command in commands {
                self.obey(command);
            }
            let Planned { started, mut step, rooms } = self.scheduler.plan();
            let mut later = Vec::new();
            for Started { sequence, blocks, cached } in started {
                let Some(running) = self.sequences.get_mut(&sequence) else { continue };
                running.drafted = cached;
                if let Some(came) = running.queued.take() {
                    self.observer.started(came.elapsed());
                }
                let event = (sequence, Event::Started { blocks, cached });
                // KV comes into reserved blocks as soon as they are known; a move may still have to read them.
                let reserved = running.reporter.sampling.is_none();
                let events = if reserved && !step.moves.is_empty() { &mut later } else { &mut self.events };
                events.push(event);
            }
            self.report();
            idle = step.entries.is_empty();
            if !idle {
                let began = Instant::now();
                self.draft(&mut step, &rooms)?;
                let output = self.executor.step(&step).map_err(|error| error.to_string())?;
                self.scheduler.complete(&step);
                self.events.append(&mut later);
                self.sample(&step, &output.logits)?;
                let (tokens, sequences) = (step.tokens(), step.entries.len());
                self.observer.stepped(StepDone { time: began.elapsed(), tokens, sequences });
                self.report();
            }
        }
        Ok(())
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit(id, work, scheduling, reporter, came) => {
                self.admit(id, work.prompt_tokens(), work.prompt(), reporter, Some(came));
                if let Err(refused) = self.scheduler.submit(id, work, &scheduling) {
                    self.events.push((id, Event::Failed(refused.to_string())));
                }
            }
            Command::Decode(id, from, reporter) => {
                let (generated, first) = (from.generated, from.first);
                self.admit(id, from.prompt.len(), &from.prompt, reporter, None);
                if let Some(running) = self.sequences.get_mut(&id) {
                    running.computed = running.prompt_tokens;
                    running.position += generated;
                    if let Some(history) = &mut running.history {
                        history.push(first);
                    }
                    running.last_token = Some(Instant::now());
                }
                match self.scheduler.decode(id, from) {
                    Ok(None) => {}
                    Ok(Some(ended)) => self.events.push((id, Event::Finished(reason(ended)))),
                    Err(refused) => self.fail(id, Event::Failed(refused.to_string())),
                }
            }
            Command::Release(id) => {
                self.scheduler.release(id);
                self.sequences.remove(&id);
            }
        }
    }

    /// `queued`: in the queue since then.
    fn admit(
        &mut self,
        id: SequenceId,
        prompt_tokens: usize,
        prompt: &[u32],
        mut reporter: Reporter,
        queued: Option<Instant>,
    ) {
        let position = reporter.sampling.as_ref().map_or(0, |sampling| sampling.first_position);
        let history = reporter.sampling.as_ref().and_then(|sampling| History::new(sampling, prompt));
        let constraint = reporter.sampling.as_mut().and_then(|sampling| sampling.constraint.take());
        let asked = reporter.sampling.as_ref().is_some_and(|sampling| sampling.prompt_logprobs.is_some());
        let prompt = if asked { prompt.to_vec() } else { Vec::new() };
        let running = Running {
            reporter,
            prompt_tokens,
            drafted: 0,
            computed: 0,
            position,
            queued,
            last_token: None,
            history,
            prompt,
            constraint,
        };
        self.sequences.insert(id, running);
    }

    fn fail(&mut self, id: SequenceId, why: Event) {
        self.scheduler.release(id);
        self.events.push((id, why));
    }

    /// Adds guesses to a step where there is room.
    fn draft(&mut self, step: &mut StepPlan, rooms: &[DraftRoom]) -> Result<(), String> {
        let Some(drafting) = &mut self.drafting else { return Ok(()) };
        let mut rooms = rooms.iter().peekable();
        let wanted = step.entries.iter().enumerate().filter_map(|(index, entry)| {
            let room = rooms.next_if(|room| room.entry == index).map_or(0, |room| room.tokens);
            let running = self.sequences.get(&entry.sequence)?;
            Some(Wanted {
                entry,
                room,
                tokens: self.scheduler.tokens(entry.sequence),
                computed: running.drafted.min(entry.start),
                sampling: running.reporter.sampling.as_ref()?,
                position: running.position,
                history: running.history.as_ref(),
            })
        });
        let wanted: Vec<_> = wanted.collect();
        let drafts = drafting.draft(&step.moves, &wanted);
        let drafts = drafts.map_err(|error| format!("the draft model: {error}"))?;
        let drafts: Vec<_> = wanted.iter().map(|wanted| wanted.entry.sequence).zip(drafts).collect();
        let mut drafts = drafts.into_iter().peekable();
        for entry in &mut step.entries {
            let Some((id, draft)) = drafts.next_if(|(id, _)| *id == entry.sequence) else { continue };
            entry.draft(&draft.tokens);
            if let Some(running) = self.sequences.get_mut(&id) {
                running.drafted = draft.computed;
            }
        }
        Ok(())
    }

    /// Draws a token from every row of logits of a step that is done: of an entry with drafts from the row after each that it
    /// confirms.
    fn sample(&mut self, step: &StepPlan, logits: &[f32]) -> Result<(), String> {
        let wanted: usize = step.entries.iter().map(StepEntry::rows).sum();
        if logits.len() != wanted * self.vocab_size {
            let (got, vocab) = (logits.len(), self.vocab_size);
            return Err(format!("a step returned {got} logits instead of {wanted} rows of {vocab}"));
        }
        let mut rest = logits;
        // One look at the clock a step: its tokens go out together.
        let now = Instant::now();
        for entry in &step.entries {
            let rows;
            (rows, rest) = rest.split_at(entry.rows() * self.vocab_size);
            if self.tell_of_prompt(entry, rows) {
                self.sample_entry(entry, rows, now);
            }
        }
        Ok(())
    }

    /// How much of a prompt is computed, and how likely its tokens are. False: the sequence has failed.
    fn tell_of_prompt(&mut self, entry: &StepEntry, rows: &[f32]) -> bool {
        let (id, end) = (entry.sequence, entry.start + entry.tokens.len());
        let Some(running) = self.sequences.get_mut(&id) else { return false };
        let computed = end.min(running.prompt_tokens);
        if computed > running.computed {
            running.computed = computed;
            self.events.push((id, Event::Computed { computed }));
        }
        if let (LogitRows::All, Some(Sampling { prompt_logprobs: Some(top), .. })) =
            (entry.logits, &running.reporter.sampling)
        {
            match prompt_logprobs(rows, self.vocab_size, entry.start, &running.prompt, *top) {
                Ok(tokens) if tokens.is_empty() => {}
                Ok(tokens) => self.events.push((id, Event::Prompt(tokens))),
                Err(error) => {
                    self.fail(id, Event::Failed(error.to_string()));
                    return false;
                }
            }
        }
        true
    }

    /// Samples from the row of the last token that is known, and from that of a draft if it is the token that was sampled.
    fn sample_entry(&mut self, entry: &StepEntry, rows: &[f32], now: Instant) {
        let (id, end) = (entry.sequence, entry.start + entry.tokens.len());
        let known = end.min(self.scheduler.tokens(id).len());
        let Some(running) = self.sequences.get_mut(&id) else { return };
        let Some(sampling) = running.reporter.sampling.as_ref().filter(|_| known >= running.prompt_tokens)
        else {
            return;
        };
        let mut drafts = entry.tokens[known - entry.start..].iter();
        let rows = rows.chunks_exact(self.vocab_size);
        let before = rows.len().saturating_sub(1 + drafts.len());
        for row in rows.skip(before) {
            let (history, constraint) = (running.history.as_ref(), running.constraint.as_mut());
            match sample_next(row, sampling, running.position, history, constraint) {
                Ok((sampled, stop)) => {
                    running.position += 1;
                    if let Some(last) = running.last_token.replace(now) {
                        self.observer.token(now.saturating_duration_since(last));
                    }
                    let token = sampled.token.id;
                    if let Some(history) = &mut running.history {
                        history.push(token);
                    }
                    self.events.push((id, Event::Token(sampled)));
                    if let Some(ended) = self.scheduler.sampled(id, token, stop) {
                        return self.events.push((id, Event::Finished(reason(ended))));
                    }
                    if drafts.next() != Some(&token) {
                        return;
                    }
                }
                Err(SampleError::Constraint(error)) => {
                    return self.fail(id, Event::Unsatisfiable(error.to_string()));
                }
                Err(error) => return self.fail(id, Event::Failed(error.to_string())),
            }
        }
    }

    /// Publishes load and counters, then sends this turn's events.
    fn report(&mut self) {
        self.shared.publish(self.scheduler.load(), self.scheduler.counters());
        for (id, event) in self.events.drain(..) {
            let last = matches!(event, Event::Finished(_) | Event::Failed(_) | Event::Unsatisfiable(_));
            if let Some(running) = self.sequences.get(&id) {
                running.send(event);
            }
            if last {
                self.sequences.remove(&id);
            }
        }
    }
}

impl Running {
    /// Never fails for want of room: the channel was made for all events the sequence can emit. A reader that is gone has
    /// its release in the inbox.
    fn send(&self, event: Event) {
        let _ = self.reporter.events.try_send(event);
    }
}

fn reason(ended: Ended) -> FinishReason {
    match ended {
        Ended::Stop => FinishReason::Stop,
        Ended::Length => FinishReason::Length,
    }
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}
