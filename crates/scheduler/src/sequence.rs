//! One sequence, from its start to the release of its blocks.

use std::sync::Arc;

use crate::{BlockId, LogitRows, SequenceId, StepEntry};

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
    /// Blocks only; the KV comes from elsewhere.
    Reserved,
    /// The prompt is not computed to its end.
    Prompt,
    /// Everything is computed and the next token is being sampled.
    Sampling,
    /// This token is next.
    Decode(u32),
    /// A prefill that ended and whose blocks are being read.
    Held,
}

#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) phase: Phase,
    pub(crate) blocks: Arc<[BlockId]>,
    /// Empty as long as it is reserved.
    pub(crate) prompt: Vec<u32>,
    /// As told when it was submitted.
    pub(crate) prompt_tokens: usize,
    /// Positions set aside, prompt included.
    pub(crate) positions: usize,
    /// Positions whose KV is in the blocks.
    pub(crate) computed: usize,
    pub(crate) generated: usize,
    /// Ends after position 0 and keeps its blocks.
    pub(crate) prefill_only: bool,
    /// The logits of every prompt token are wanted.
    pub(crate) all_logits: bool,
    /// The prompt's KV was computed elsewhere.
    pub(crate) transferred: bool,
}

impl Sequence {
    pub(crate) fn start(work: Work, positions: usize, blocks: Arc<[BlockId]>) -> Self {
        let (prompt_tokens, all_logits) = (work.prompt_tokens(), work.all_logits());
        let (phase, prompt, prefill_only) = match work {
            Work::Generate { prompt, max_tokens: _, all_logits: _ } => (Phase::Prompt, prompt, false),
            Work::Prefill { prompt, all_logits: _ } => (Phase::Prompt, prompt, true),
            Work::Reserve { .. } => (Phase::Reserved, Vec::new(), false),
        };
        Self {
            phase,
            blocks,
            prompt,
            prompt_tokens,
            positions,
            computed: 0,
            generated: 0,
            prefill_only,
            all_logits,
            transferred: false,
        }
    }

    /// The chunk of the prompt that comes next, `budget` tokens at most, and no more than `rows` where each gives a row of
    /// logits; or the next generated token.
    pub(crate) fn entry(&self, id: SequenceId, budget: usize, rows: usize) -> Option<StepEntry> {
        let budget = if self.wants_rows() { budget.min(rows) } else { budget };
        let tokens = match self.phase {
            Phase::Prompt => {
                let end = self.prompt.len().min(self.computed.saturating_add(budget));
                self.prompt.get(self.computed..end)?.to_vec()
            }
            Phase::Decode(token) if budget > 0 => vec![token],
            Phase::Reserved | Phase::Sampling | Phase::Held | Phase::Decode(_) => return None,
        };
        if tokens.is_empty() {
            return None;
        }
        let logits = if self.wants_rows() {
            LogitRows::All
        } else if self.computed + tokens.len() < self.prompt.len() {
            LogitRows::None
        } else {
            LogitRows::Last
        };
        Some(StepEntry {
            sequence: id,
            tokens,
            start: self.computed,
            blocks: Arc::clone(&self.blocks),
            logits,
        })
    }

    /// Each token that it computes next gives a row of logits.
    fn wants_rows(&self) -> bool {
        self.all_logits && self.phase == Phase::Prompt
    }

    /// The step with this entry is done. Returns how many of its tokens were prompt tokens.
    pub(crate) fn complete(&mut self, entry: &StepEntry) -> usize {
        let end = entry.start + entry.tokens.len();
        let prompt_tokens = end.min(self.prompt.len()).saturating_sub(entry.start);
        self.computed = end;
        self.phase = if end < self.prompt.len() { Phase::Prompt } else { Phase::Sampling };
        prompt_tokens
    }

    /// A token was sampled; with `None` the sequence goes on with it.
    pub(crate) fn sampled(&mut self, token: u32, stop: bool) -> Option<Ended> {
        self.generated += 1;
        self.go_on(token, stop)
    }

    fn go_on(&mut self, token: u32, stop: bool) -> Option<Ended> {
        let ended = if stop {
            Some(Ended::Stop)
        } else if self.prefill_only || self.prompt.len() + self.generated >= self.positions {
            Some(Ended::Length)
        } else {
            None
        };
        self.phase = match ended {
            None => Phase::Decode(token),
            Some(_) => Phase::Held,
        };
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
        self.prompt = prompt;
        self.positions = positions;
        self.generated = generated;
        self.transferred = true;
        Ok(self.go_on(first, stop))
    }
}
