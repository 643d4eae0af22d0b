//! What one step computes. The scheduler makes it, every rank of the gang runs it.

use std::sync::Arc;

/// Index of a KV block in every rank's cache.
pub type BlockId = u32;

/// A sequence the scheduler holds; never reused within one engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u64);

/// One forward pass over a batch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepPlan {
    /// At most one entry a sequence.
    pub entries: Vec<StepEntry>,
}

/// The part of one sequence that a step computes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepEntry {
    /// Whose tokens these are.
    pub sequence: SequenceId,
    /// Token ids to compute, at least one: a chunk of a prompt, or the last sampled token.
    pub tokens: Vec<u32>,
    /// Absolute position of `tokens[0]`; KV of all positions before it is in `blocks` already.
    pub start: usize,
    /// Block table: position `p` lies in block `blocks[p / block_tokens]`, row `p % block_tokens`. Covers at least
    /// `start + tokens.len()` positions.
    pub blocks: Arc<[BlockId]>,
    /// For which of `tokens` the logits are wanted.
    pub logits: LogitRows,
}

/// Rows of logits a step returns for an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitRows {
    /// None: a chunk in the middle of a prompt.
    None,
    /// Of the last token: it is sampled from.
    Last,
    /// Of every token: prompt log probabilities.
    All,
}

/// Rows that a step returns of prompts whose logits are all wanted, over all of them: what bounds their memory, 33 MB with a
/// vocabulary of 128,256.
pub const MAX_PROMPT_ROWS: usize = 64;

impl StepEntry {
    /// Rows of logits that it returns.
    pub fn rows(&self) -> usize {
        match self.logits {
            LogitRows::None => 0,
            LogitRows::Last => 1,
            LogitRows::All => self.tokens.len(),
        }
    }

    /// Of these, those of prompts whose logits are all wanted.
    pub(crate) fn prompt_rows(&self) -> usize {
        if self.logits == LogitRows::All { self.tokens.len() } else { 0 }
    }
}

impl StepPlan {
    /// Tokens the step computes.
    pub fn tokens(&self) -> usize {
        self.entries.iter().map(|entry| entry.tokens.len()).sum()
    }
}
