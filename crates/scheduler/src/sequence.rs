//! One sequence, from its request to the release of its blocks.

use std::sync::Arc;

use crate::names::Chain;
use crate::turn::{MAX_PREEMPTIONS, Turn};
use crate::{BlockId, LogitRows, Scheduling, SequenceId, StepEntry};

/// What a request wants done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Work {
    /// Compute the prompt and generate from it.
    Generate {
        /// Token ids.
        prompt: Vec<u32>,
        /// Tokens to generate at most.
        max_tokens: usize,
        /// The logits of every prompt token are wanted: each has to be computed.
        all_logits: bool,
    },
    /// Compute the prompt and sample position 0. The blocks are held until released, so that they can be sent elsewhere.
    Prefill {
        /// Token ids.
        prompt: Vec<u32>,
        /// The logits of every prompt token are wanted: each has to be computed.
        all_logits: bool,
    },
    /// Set blocks aside for KV that is computed elsewhere; [`crate::Scheduler::decode`] goes on from it.
    Reserve {
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// Tokens to generate at most.
        max_tokens: usize,
    },
}

impl Work {
    /// Tokens of the prompt.
    pub fn prompt_tokens(&self) -> usize {
        match self {
            Self::Generate { prompt, .. } | Self::Prefill { prompt, .. } => prompt.len(),
            Self::Reserve { prompt_tokens, .. } => *prompt_tokens,
        }
    }

    /// The prompt's ids, where they are known.
    pub fn prompt(&self) -> &[u32] {
        match self {
            Self::Generate { prompt, .. } | Self::Prefill { prompt, .. } => prompt,
            Self::Reserve { .. } => &[],
        }
    }

    /// The logits of every prompt token are wanted.
    pub fn all_logits(&self) -> bool {
        matches!(self, Self::Generate { all_logits: true, .. } | Self::Prefill { all_logits: true, .. })
    }

    /// Tokens whose KV may have to be kept beside the prompt's. The one token of a prefill is computed elsewhere.
    pub(crate) fn generated_tokens(&self) -> usize {
        match self {
            Self::Generate { max_tokens, .. } | Self::Reserve { max_tokens, .. } => *max_tokens,
            Self::Prefill { .. } => 0,
        }
    }
}

/// How a reservation goes on once the KV of its prompt is in its blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Continuation {
    /// The whole prompt.
    pub prompt: Vec<u32>,
    /// The token sampled after it.
    pub first: u32,
    /// Tokens generated so far, `first` included.
    pub generated: usize,
    /// Tokens to generate at most, `generated` included.
    pub max_tokens: usize,
    /// `first` is a stop token.
    pub stop: bool,
}

/// A continuation that does not belong to a reservation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no kv blocks are reserved for a prompt of {prompt_tokens} tokens with {max_tokens} to generate")]
pub struct NotReserved {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens to generate.
    pub max_tokens: usize,
}

/// Why a sequence ended by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The token was a stop token.
    Stop,
    /// As many tokens as were asked for, or as the context holds.
    Length,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Blocks only, or none yet; the KV comes from elsewhere.
    Reserved,
    /// Some of its tokens are not computed: of the prompt, the one sampled last, or those of before a preemption.
    Computing,
    /// Everything is computed and the next token is being sampled.
    Sampling,
    /// A prefill that ended and whose blocks are being read.
    Held,
}

/// What a sequence is for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked {
    /// It ends after position 0 and keeps its blocks.
    pub(crate) prefill_only: bool,
    /// The logits of every prompt token are wanted.
    pub(crate) all_logits: bool,
}

/// A sequence in the queue, where it has no blocks, or running.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) turn: Turn,
    pub(crate) phase: Phase,
    pub(crate) blocks: Arc<[BlockId]>,
    /// Slots of the host pool that have the KV of positions `0..computed`, while it is preempted.
    pub(crate) swapped: Vec<BlockId>,
    /// Prompt and generated; empty as long as it is reserved.
    pub(crate) tokens: Vec<u32>,
    pub(crate) chain: Chain,
    /// As told when it was submitted.
    pub(crate) prompt_tokens: usize,
    /// Positions it can come to have, prompt included.
    pub(crate) positions: usize,
    /// Positions whose KV is in the blocks.
    pub(crate) computed: usize,
    /// Blocks that were given their names.
    pub(crate) named: usize,
    pub(crate) generated: usize,
    pub(crate) asked: Asked,
    /// The prompt's KV was computed elsewhere.
    pub(crate) transferred: bool,
    /// It had blocks before.
    pub(crate) started: bool,
    /// Drafts that the last step computed after its tokens and that are not decided yet, the last one first.
    drafts: Vec<u32>,
    /// Positions computed before it was preempted: their tokens are computed again.
    pub(crate) lost: usize,
    preemptions: usize,
}

/// What is left of a step while it is planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Budget {
    pub(crate) tokens: usize,
    /// Rows of logits of prompts whose logits are all wanted.
    pub(crate) prompt_rows: usize,
}

impl Budget {
    pub(crate) fn spend(&mut self, entry: &StepEntry) {
        self.tokens -= entry.tokens.len();
        self.prompt_rows -= entry.prompt_rows();
    }
}

/// Tokens of an entry that is done, by why they were computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Done {
    pub(crate) prompt: usize,
    pub(crate) recomputed: usize,
    pub(crate) drafts: usize,
}

impl Sequence {
    pub(crate) fn new(id: SequenceId, work: Work, scheduling: &Scheduling, positions: usize) -> Self {
        let Scheduling { priority, cache_salt } = scheduling;
        let (prompt_tokens, all_logits) = (work.prompt_tokens(), work.all_logits());
        let (phase, tokens, prefill_only) = match work {
            Work::Generate { prompt, max_tokens: _, all_logits: _ } => (Phase::Computing, prompt, false),
            Work::Prefill { prompt, all_logits: _ } => (Phase::Computing, prompt, true),
            Work::Reserve { .. } => (Phase::Reserved, Vec::new(), false),
        };
        Self {
            turn: Turn::new(id, *priority),
            phase,
            blocks: Arc::default(),
            swapped: Vec::new(),
            tokens,
            chain: Chain::new(cache_salt),
            prompt_tokens,
            positions,
            computed: 0,
            named: 0,
            generated: 0,
            asked: Asked { prefill_only, all_logits },
            transferred: false,
            started: false,
            drafts: Vec::new(),
            lost: 0,
            preemptions: 0,
        }
    }

    /// Tokens to compute before the next one is sampled; of a reservation, those that are computed elsewhere.
    pub(crate) fn left(&self) -> usize {
        if self.phase == Phase::Reserved { self.prompt_tokens } else { self.tokens.len() - self.computed }
    }

    /// The token sampled last is the only one that is not computed.
    pub(crate) fn decodes(&self) -> bool {
        self.phase == Phase::Computing && self.generated > 0 && self.left() == 1
    }

    /// More than that is to be computed.
    pub(crate) fn has_prompt(&self) -> bool {
        self.phase == Phase::Computing && !self.decodes()
    }

    /// Positions that its blocks have to hold when it starts: all that are known. A reservation has room for the token that
    /// comes with its KV too, so that it goes on at once.
    pub(crate) fn first_positions(&self) -> usize {
        match self.phase {
            Phase::Reserved => self.positions.min(self.prompt_tokens + 1),
            Phase::Computing | Phase::Sampling | Phase::Held => self.tokens.len(),
        }
    }

    /// Whether its blocks may go to others: not while anyone outside reads or writes them.
    pub(crate) fn is_preemptible(&self) -> bool {
        self.phase == Phase::Computing && !self.asked.prefill_only
    }

    /// Tokens it may compute next. Where each gives a row of logits, those are bounded too; rows that were given before it
    /// was preempted are not given again.
    pub(crate) fn most(&self, budget: &Budget) -> usize {
        if self.wants_rows() {
            budget.tokens.min(budget.prompt_rows)
        } else if self.asked.all_logits && self.computed < self.lost {
            budget.tokens.min(self.lost - self.computed)
        } else {
            budget.tokens
        }
    }

    /// Each token that it computes next gives a row of logits.
    fn wants_rows(&self) -> bool {
        self.asked.all_logits && (self.lost..self.prompt_tokens).contains(&self.computed)
    }

    /// The tokens that come next, as many as the budget has room for.
    pub(crate) fn entry(&self, budget: &Budget) -> Option<StepEntry> {
        if self.phase != Phase::Computing {
            return None;
        }
        let end = self.tokens.len().min(self.computed.saturating_add(self.most(budget)));
        let tokens = self.tokens.get(self.computed..end)?.to_vec();
        if tokens.is_empty() {
            return None;
        }
        let logits = if self.wants_rows() {
            LogitRows::All
        } else if end < self.tokens.len() {
            LogitRows::None
        } else {
            LogitRows::Last
        };
        Some(StepEntry {
            sequence: self.turn.id,
            tokens,
            start: self.computed,
            blocks: Arc::clone(&self.blocks),
            logits,
        })
    }

    /// The step with this entry is done.
    pub(crate) fn complete(&mut self, entry: &StepEntry) -> Done {
        let (start, end) = (entry.start, self.tokens.len().min(entry.start + entry.tokens.len()));
        self.drafts = entry.tokens[end - start..].iter().rev().copied().collect();
        let again = end.min(self.lost).saturating_sub(start);
        let prompt = end.min(self.prompt_tokens).saturating_sub(start.max(self.lost));
        self.computed = end;
        self.phase = if end < self.tokens.len() { Phase::Computing } else { Phase::Sampling };
        Done { prompt, recomputed: again, drafts: self.drafts.len() }
    }

    /// A token was sampled. Says whether it is the draft that was computed after the one before: then its KV is there, and
    /// the token after it is sampled from the row after.
    pub(crate) fn sampled(&mut self, token: u32, stop: bool) -> (Option<Ended>, bool) {
        self.generated += 1;
        let accepted = self.drafts.pop() == Some(token);
        let ended = self.go_on(token, stop);
        if !accepted || ended.is_some() {
            self.drafts.clear();
        } else {
            self.computed += 1;
            self.phase = Phase::Sampling;
        }
        (ended, accepted)
    }

    /// One more block, or several.
    pub(crate) fn grow(&mut self, more: Vec<BlockId>) {
        self.blocks = self.blocks.iter().copied().chain(more).collect();
    }

    fn go_on(&mut self, token: u32, stop: bool) -> Option<Ended> {
        let ended = if stop {
            Some(Ended::Stop)
        } else if self.asked.prefill_only || self.prompt_tokens + self.generated >= self.positions {
            Some(Ended::Length)
        } else {
            None
        };
        if ended.is_some() {
            self.phase = Phase::Held;
        } else {
            self.phase = Phase::Computing;
            self.tokens.push(token);
        }
        ended
    }

    /// Turns a reservation into a decode.
    pub(crate) fn decode(
        &mut self,
        from: Continuation,
        positions: usize,
    ) -> Result<Option<Ended>, NotReserved> {
        let Continuation { prompt, first, generated, max_tokens, stop } = from;
        let reserved = self.phase == Phase::Reserved
            && prompt.len() == self.prompt_tokens
            && positions <= self.positions
            && generated >= 1;
        if !reserved {
            return Err(NotReserved { prompt_tokens: prompt.len(), max_tokens });
        }
        self.computed = prompt.len();
        self.tokens = prompt;
        self.positions = positions;
        self.generated = generated;
        self.transferred = true;
        Ok(self.go_on(first, stop))
    }

    /// Its blocks go to others. Where no slots of the host pool have its KV, all of it is computed again.
    pub(crate) fn preempt(&mut self, slots: Option<Vec<BlockId>>) {
        self.lost = self.lost.max(self.computed);
        if slots.is_none() {
            self.computed = 0;
        }
        self.swapped = slots.unwrap_or_default();
        self.blocks = Arc::default();
        self.named = 0;
        self.preemptions += 1;
        if self.preemptions >= MAX_PREEMPTIONS {
            self.turn = self.turn.aged();
        }
    }
}
