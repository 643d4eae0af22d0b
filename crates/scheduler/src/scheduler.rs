//! The queue, the running sequences, and the plan of the next step.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::blocks::{BlockPool, HostPool};
use crate::sequence::{Budget, Done, Phase, Sequence};
use crate::turn::{MAX_PASSED_OVER, Turn};
use crate::{
    BlockId, Continuation, Counters, DraftRoom, Ended, Limits, Load, MAX_PROMPT_ROWS, Move, NotReserved,
    Scheduling, SequenceId, StepPlan, TooLong, Work,
};

mod admission;
mod drafts;

/// A request that is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The queue is at its bound.
    #[error("{waiting} requests are waiting already")]
    Full {
        /// Requests in the queue, preempted sequences apart.
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
    /// Each sequence once, however often it is preempted. A reservation has no entry in the step, and its blocks may be
    /// written only when the step's moves are done; every other one has its first chunk there.
    pub started: Vec<Started>,
    /// Empty when there is nothing to compute.
    pub step: StepPlan,
    /// Where drafts may be added before it is run, see [`crate::StepEntry::draft`].
    pub rooms: Vec<DraftRoom>,
}

/// A sequence that left the queue for the first time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Started {
    /// Which one.
    pub sequence: SequenceId,
    /// Those of its prompt, and of a reservation room for one token more. They stay its own until it ends or is released,
    /// unless it generates and is preempted.
    pub blocks: Arc<[BlockId]>,
    /// Tokens of the prompt whose KV was there.
    pub cached: usize,
}

/// Continuous batching over a paged KV cache.
///
/// A turn is: [`Scheduler::plan`], add drafts, run the step, [`Scheduler::complete`], then [`Scheduler::sampled`] for every
/// entry that asked for logits: of one with drafts once more after every draft that was sampled. Between turns sequences are
/// submitted, continued and released.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    pool: BlockPool,
    host: HostPool,
    /// In the order of turns. No blocks are theirs.
    waiting: BTreeMap<Turn, Sequence>,
    /// With blocks.
    sequences: BTreeMap<SequenceId, Sequence>,
    last_id: Option<SequenceId>,
    /// Starts of younger sequences while the oldest one without a step waited, since the last one that aged.
    passed_over: usize,
    counters: Counters,
}

impl Scheduler {
    /// With all KV blocks free. Zeros in `limits` count as 1, but for the host pool's.
    pub fn new(limits: Limits) -> Self {
        let limits = limits.at_least_one();
        Self {
            limits,
            pool: BlockPool::new(limits.kv_blocks),
            host: HostPool::new(limits.kv_blocks, limits.host_blocks),
            waiting: BTreeMap::new(),
            sequences: BTreeMap::new(),
            last_id: None,
            passed_over: 0,
            counters: Counters::default(),
        }
    }

    /// Puts a request into the queue.
    pub fn submit(&mut self, id: SequenceId, work: Work, scheduling: &Scheduling) -> Result<(), Refused> {
        if self.last_id >= Some(id) {
            return Err(Refused::IdReused(id));
        }
        if work.prompt_tokens() == 0 {
            return Err(Refused::Empty);
        }
        let positions = self.limits.positions(work.prompt_tokens(), work.generated_tokens())?;
        let waiting = self.waiting.values().filter(|sequence| !sequence.started).count();
        if waiting >= self.limits.max_waiting {
            return Err(Refused::Full { waiting });
        }
        self.last_id = Some(id);
        let sequence = Sequence::new(id, work, scheduling, positions);
        self.waiting.insert(sequence.turn, sequence);
        Ok(())
    }

    /// Goes on from the KV that was written to a reservation's blocks. With `Some` there is nothing left to generate: the
    /// sequence has ended and its blocks are free.
    pub fn decode(&mut self, id: SequenceId, from: Continuation) -> Result<Option<Ended>, NotReserved> {
        let refused = NotReserved { prompt_tokens: from.prompt.len(), max_tokens: from.max_tokens };
        let sequence = self.sequences.get_mut(&id).ok_or(refused)?;
        let positions = self.limits.positions(from.prompt.len(), from.max_tokens).map_err(|_| refused)?;
        let ended = sequence.decode(from, positions)?;
        self.name_blocks(id);
        if ended.is_some() {
            self.release(id);
        }
        Ok(ended)
    }

    /// Forgets a sequence wherever it is (in the queue, running, reserved or held) and frees its blocks. Not for use while
    /// its step runs. One that is not known has ended already.
    pub fn release(&mut self, id: SequenceId) {
        if let Some(sequence) = self.sequences.remove(&id) {
            self.pool.release(&sequence.blocks);
        } else if let Some(&turn) = self.waiting.keys().find(|turn| turn.id == id)
            && let Some(sequence) = self.waiting.remove(&turn)
        {
            self.host.release(&sequence.swapped);
        }
    }

    /// Starts whom it can and plans the next step.
    pub fn plan(&mut self) -> Planned {
        let mut planned = Planned::default();
        let mut budget = Budget { tokens: self.limits.max_step_tokens, prompt_rows: MAX_PROMPT_ROWS };
        self.plan_decodes(&mut planned.step, &mut budget);
        let admitted = self.plan_prompts(&mut planned, &mut budget);
        self.age(&planned.step, &admitted);
        planned.rooms = self.plan_drafts(&mut planned.step, &budget);
        planned
    }

    /// The next token of every sequence that generates, in the order of turns. One that needs a block takes it from the last
    /// in that order; where there is none after it, it keeps what it has and waits.
    fn plan_decodes(&mut self, step: &mut StepPlan, budget: &mut Budget) {
        let decodes = self.sequences.values().filter(|sequence| sequence.decodes());
        let mut turns: Vec<Turn> = decodes.map(|sequence| sequence.turn).collect();
        turns.sort_unstable();
        for turn in turns {
            // One that was preempted for another is not there any more.
            let Some(sequence) = self.sequences.get(&turn.id) else { continue };
            if self.limits.blocks(sequence.computed + 1) > sequence.blocks.len() {
                while self.pool.available() == 0 && self.preempt_last(turn, step) {}
                let Some(more) = self.pool.take(1) else { continue };
                if let Some(sequence) = self.sequences.get_mut(&turn.id) {
                    sequence.grow(more);
                }
            }
            let entry = self.sequences.get(&turn.id).and_then(|sequence| sequence.entry(budget));
            if let Some(entry) = entry {
                budget.spend(&entry);
                step.entries.push(entry);
            }
        }
    }

    /// Preempts the last sequence in the order of turns that comes after `turn`, if there is one. None of those has an entry
    /// in this step: decodes come in order, and before prompts.
    fn preempt_last(&mut self, turn: Turn, step: &mut StepPlan) -> bool {
        let preemptible = self.sequences.values().filter(|sequence| sequence.is_preemptible());
        let Some(last) = preemptible.map(|sequence| sequence.turn).max().filter(|last| *last > turn) else {
            return false;
        };
        let Some(mut sequence) = self.sequences.remove(&last.id) else { return false };
        self.pool.release(&sequence.blocks);
        let kept = self.limits.blocks(sequence.computed);
        // Without a block that comes free there may be nobody to compute, and no moves are done.
        let swaps = kept > 0 && self.pool.available() > 0;
        let slots = if swaps { self.host.take(kept) } else { None };
        for (block, (&from, &to)) in sequence.blocks.iter().zip(slots.iter().flatten()).enumerate() {
            let rows = self.rows_of(block, sequence.computed);
            step.moves.push(Move { from, to, rows });
            self.counters.swapped_blocks += 1;
        }
        self.counters.preemptions += 1;
        sequence.preempt(slots);
        self.waiting.insert(sequence.turn, sequence);
        true
    }

    /// Rows of a block of a table that hold the first `positions` positions.
    fn rows_of(&self, block: usize, positions: usize) -> usize {
        let block_tokens = self.limits.block_tokens;
        positions.saturating_sub(block * block_tokens).min(block_tokens)
    }

    /// Chunks of prompts, and those who start with them, in the order of turns. Returns who left the queue.
    fn plan_prompts(&mut self, planned: &mut Planned, budget: &mut Budget) -> Vec<SequenceId> {
        let prompts = self.sequences.values().filter(|sequence| sequence.has_prompt());
        let mut prompts: Vec<Turn> = prompts.map(|sequence| sequence.turn).collect();
        prompts.sort_unstable();
        let mut prompts = prompts.into_iter().peekable();
        let mut admitted = Vec::new();
        loop {
            let next = self.waiting.first_key_value().map(|(&turn, _)| turn);
            let turn = match (prompts.peek().copied(), next) {
                (Some(prompt), next) if next.is_none_or(|next| prompt < next) => {
                    prompts.next();
                    prompt
                }
                // Nobody overtakes the head of the queue: it would wait for ever behind smaller ones.
                (_, Some(next)) if self.admit(next, budget, planned) => {
                    admitted.push(next.id);
                    next
                }
                (Some(prompt), _) => {
                    // The head has to wait; those that run go on.
                    for turn in std::iter::once(prompt).chain(prompts.skip(1)) {
                        self.plan_chunk(turn.id, &mut planned.step, budget);
                    }
                    return admitted;
                }
                (None, _) => return admitted,
            };
            self.plan_chunk(turn.id, &mut planned.step, budget);
        }
    }

    fn plan_chunk(&self, id: SequenceId, step: &mut StepPlan, budget: &mut Budget) {
        if let Some(entry) = self.sequences.get(&id).and_then(|sequence| sequence.entry(budget)) {
            budget.spend(&entry);
            step.entries.push(entry);
        }
    }

    /// Where younger ones have started [`MAX_PASSED_OVER`] times while the oldest one got no step, it comes first from now on.
    fn age(&mut self, step: &StepPlan, admitted: &[SequenceId]) {
        let computes = |id| step.entries.iter().any(|entry| entry.sequence == id);
        let prompts = self.sequences.values().filter(|sequence| sequence.has_prompt());
        let prompts = prompts.map(|sequence| sequence.turn).filter(|turn| !computes(turn.id));
        let passed = self.waiting.keys().copied().chain(prompts);
        let Some(oldest) = passed.min_by_key(|turn| turn.id).filter(|turn| !turn.is_aged()) else { return };
        self.passed_over += admitted.iter().filter(|id| **id > oldest.id).count();
        if self.passed_over < MAX_PASSED_OVER {
            return;
        }
        self.passed_over = 0;
        if let Some(mut sequence) = self.waiting.remove(&oldest) {
            sequence.turn = oldest.aged();
            self.waiting.insert(sequence.turn, sequence);
        } else if let Some(sequence) = self.sequences.get_mut(&oldest.id) {
            sequence.turn = oldest.aged();
        }
    }

    /// Prompt and generated tokens of a sequence that has blocks; none of one that is reserved.
    pub fn tokens(&self, id: SequenceId) -> &[u32] {
        self.sequences.get(&id).map_or(&[], |sequence| &sequence.tokens)
    }

    /// The step is done: its KV is in the blocks.
    pub fn complete(&mut self, step: &StepPlan) {
        self.counters.steps += 1;
        for entry in &step.entries {
            let Some(sequence) = self.sequences.get_mut(&entry.sequence) else { continue };
            let Done { prompt, recomputed, drafts } = sequence.complete(entry);
            self.counters.draft_tokens += drafts as u64;
            self.counters.prompt_tokens += prompt as u64;
            self.counters.preempted_recomputed_tokens += recomputed as u64;
            if sequence.transferred {
                self.counters.prefill_recomputed_tokens += prompt as u64;
            }
            self.name_blocks(entry.sequence);
        }
    }

    /// Names the blocks of a sequence that have become full.
    fn name_blocks(&mut self, id: SequenceId) {
        let Limits { block_tokens, prefix_cache, .. } = self.limits;
        let Some(sequence) = self.sequences.get_mut(&id).filter(|_| prefix_cache) else { return };
        let full = sequence.computed / block_tokens;
        if full <= sequence.named {
            return;
        }
        sequence.chain.extend(&sequence.tokens, block_tokens);
        for block in sequence.named..full {
            if let (Some(&id), Some(name)) = (sequence.blocks.get(block), sequence.chain.get(block)) {
                self.pool.name(id, name);
            }
        }
        sequence.named = full;
    }

    /// A token was sampled from the last row of the sequence's entry, or, where that has drafts, from the row of its last token
    /// or of a draft that was sampled. With `None` the sequence goes on with it. With `Some` it has ended, and its blocks are
    /// free, or, of a prefill, held until [`Scheduler::release`].
    pub fn sampled(&mut self, id: SequenceId, token: u32, stop: bool) -> Option<Ended> {
        let sequence = self.sequences.get_mut(&id)?;
        self.counters.output_tokens += 1;
        let (ended, accepted) = sequence.sampled(token, stop);
        let held = sequence.asked.prefill_only;
        self.counters.accepted_draft_tokens += u64::from(accepted);
        if ended.is_none() {
            self.name_blocks(id);
        } else if !held {
            self.release(id);
        }
        ended
    }

    /// How busy it is now.
    pub fn load(&self) -> Load {
        Load {
            running: self.running(),
            waiting: self.waiting.len(),
            waiting_prompt_tokens: self.waiting.values().map(Sequence::left).sum(),
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
