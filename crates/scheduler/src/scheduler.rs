//! The queue, the running sequences, and the plan of the next step.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use crate::blocks::BlockPool;
use crate::sequence::{Phase, Sequence};
use crate::{
    BlockId, Continuation, Ended, Limits, MAX_PROMPT_ROWS, NotReserved, SequenceId, StepPlan, TooLong, Work,
};

/// A request that is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The queue is at its bound.
    #[error("{waiting} requests are waiting already")]
    Full {
        /// Requests in the queue.
        waiting: usize,
    },
    /// It could never start.
    #[error(transparent)]
    TooLong(#[from] TooLong),
    /// Nothing to compute.
    #[error("the prompt is empty")]
    Empty,
    /// Identifiers rise, so that none is ever used twice and the order of identifiers is the order of requests.
    #[error("sequence {0:?} does not come after the one submitted before it")]
    IdReused(SequenceId),
}

/// What the next step computes, and who starts with it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Planned {
    /// In the order they were submitted. A reservation has no entry in the step; every other one has its first chunk there.
    pub started: Vec<Started>,
    /// Empty when there is nothing to compute.
    pub step: StepPlan,
}

/// A sequence that left the queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Started {
    /// Which one.
    pub sequence: SequenceId,
    /// Its own until it ends or is released.
    pub blocks: Arc<[BlockId]>,
}

/// How busy a gang is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Sequences that started and have not ended, reservations included. A prefill that ended and whose blocks are being
    /// read is not running any more.
    pub running: usize,
    /// Requests in the queue.
    pub waiting: usize,
    /// Their prompt tokens.
    pub waiting_prompt_tokens: usize,
    /// KV blocks that are owned.
    pub kv_blocks_used: usize,
}

/// What was done since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Steps completed.
    pub steps: u64,
    /// Prompt tokens computed.
    pub prompt_tokens: u64,
    /// Tokens sampled.
    pub output_tokens: u64,
    /// Prompt tokens computed in sequences whose prompt KV had been computed elsewhere. Counted from the plans that were
    /// run; anything but 0 is a mistake.
    pub prefill_recomputed_tokens: u64,
}

#[derive(Debug)]
struct Waiting {
    id: SequenceId,
    work: Work,
    positions: usize,
}

/// Continuous batching over a paged KV cache.
///
/// A turn is: [`Scheduler::plan`], run the step, [`Scheduler::complete`], then [`Scheduler::sampled`] for every entry that
/// asked for logits. Between turns sequences are submitted, continued and released.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    pool: BlockPool,
    waiting: VecDeque<Waiting>,
    /// By identifier, which is the order of arrival.
    sequences: BTreeMap<SequenceId, Sequence>,
    last_id: Option<SequenceId>,
    counters: Counters,
}

impl Scheduler {
    /// With all KV blocks free. Zeros in `limits` count as 1.
    pub fn new(limits: Limits) -> Self {
        let limits = limits.at_least_one();
        Self {
            limits,
            pool: BlockPool::new(limits.kv_blocks),
            waiting: VecDeque::new(),
            sequences: BTreeMap::new(),
            last_id: None,
            counters: Counters::default(),
        }
    }

    /// Puts a request at the end of the queue.
    pub fn submit(&mut self, id: SequenceId, work: Work) -> Result<(), Refused> {
        if self.last_id >= Some(id) {
            return Err(Refused::IdReused(id));
        }
        if work.prompt_tokens() == 0 {
            return Err(Refused::Empty);
        }
        let positions = self.limits.positions(work.prompt_tokens(), work.generated_tokens())?;
        if self.waiting.len() >= self.limits.max_waiting {
            return Err(Refused::Full { waiting: self.waiting.len() });
        }
        self.last_id = Some(id);
        self.waiting.push_back(Waiting { id, work, positions });
        Ok(())
    }

    /// Goes on from the KV that was written to a reservation's blocks. With `Some` there is nothing left to generate: the
    /// sequence has ended and its blocks are free.
    pub fn decode(&mut self, id: SequenceId, from: Continuation) -> Result<Option<Ended>, NotReserved> {
        let refused = NotReserved { prompt_tokens: from.prompt.len(), max_tokens: from.max_tokens };
        let sequence = self.sequences.get_mut(&id).ok_or(refused)?;
        let positions = self.limits.positions(from.prompt.len(), from.max_tokens).map_err(|_| refused)?;
        let ended = sequence.decode(from, positions)?;
        if ended.is_some() {
            self.release(id);
        }
        Ok(ended)
    }

    /// Forgets a sequence wherever it is (in the queue, running, reserved or held) and frees its blocks. Not for use while
    /// its step runs. One that is not known has ended already.
    pub fn release(&mut self, id: SequenceId) {
        if let Some(sequence) = self.sequences.remove(&id) {
            self.pool.give_back(&sequence.blocks);
        } else if let Ok(at) = self.waiting.binary_search_by_key(&id, |waiting| waiting.id) {
            self.waiting.remove(at);
        }
    }

    /// Starts whom it can and plans the next step.
    pub fn plan(&mut self) -> Planned {
        let (mut budget, mut rows) = (self.limits.max_step_tokens, MAX_PROMPT_ROWS);
        let mut step = StepPlan::default();
        let decoding =
            self.sequences.iter().filter(|(_, sequence)| matches!(sequence.phase, Phase::Decode(_)));
        let prompts = self.sequences.iter().filter(|(_, sequence)| sequence.phase == Phase::Prompt);
        for (&id, sequence) in decoding.chain(prompts) {
            if let Some(entry) = sequence.entry(id, budget, rows) {
                budget -= entry.tokens.len();
                rows -= entry.prompt_rows();
                step.entries.push(entry);
            }
        }

        let mut started = Vec::new();
        let mut slots = self.limits.running_sequences().saturating_sub(self.running());
        // Nobody overtakes the head of the queue: it would wait for ever behind smaller ones.
        while slots > 0
            && let Some(next) = self.waiting.front()
            && (budget > 0 || matches!(next.work, Work::Reserve { .. }))
            && (rows > 0 || !next.work.all_logits())
            && let Some(blocks) = self.pool.take(self.limits.blocks(next.positions))
            && let Some(Waiting { id, work, positions }) = self.waiting.pop_front()
        {
            slots -= 1;
            let sequence = Sequence::start(work, positions, Arc::clone(&blocks));
            if let Some(entry) = sequence.entry(id, budget, rows) {
                budget -= entry.tokens.len();
                rows -= entry.prompt_rows();
                step.entries.push(entry);
            }
            self.sequences.insert(id, sequence);
            started.push(Started { sequence: id, blocks });
        }
        Planned { started, step }
    }

    /// The step is done: its KV is in the blocks.
    pub fn complete(&mut self, step: &StepPlan) {
        self.counters.steps += 1;
        for entry in &step.entries {
            let Some(sequence) = self.sequences.get_mut(&entry.sequence) else { continue };
            let prompt_tokens = sequence.complete(entry) as u64;
            self.counters.prompt_tokens += prompt_tokens;
            if sequence.transferred {
                self.counters.prefill_recomputed_tokens += prompt_tokens;
            }
        }
    }

    /// A token was sampled from the last row of the sequence's entry. With `None` the sequence goes on with it. With `Some`
    /// it has ended, and its blocks are free, or, of a prefill, held until [`Scheduler::release`].
    pub fn sampled(&mut self, id: SequenceId, token: u32, stop: bool) -> Option<Ended> {
        let sequence = self.sequences.get_mut(&id)?;
        self.counters.output_tokens += 1;
        let ended = sequence.sampled(token, stop);
        if ended.is_some() && !sequence.prefill_only {
            self.release(id);
        }
        ended
    }

    /// How busy it is now.
    pub fn load(&self) -> Load {
        Load {
            running: self.running(),
            waiting: self.waiting.len(),
            waiting_prompt_tokens: self.waiting.iter().map(|waiting| waiting.work.prompt_tokens()).sum(),
            kv_blocks_used: self.pool.used(),
        }
    }

    /// What was done since the start.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    fn running(&self) -> usize {
        self.sequences.values().filter(|sequence| sequence.phase != Phase::Held).count()
    }
}

#[cfg(test)]
mod tests;
