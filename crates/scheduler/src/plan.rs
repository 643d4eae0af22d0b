//! What one step computes. The scheduler makes it, every rank of the gang runs it.

use std::sync::Arc;

/// Index of a KV block in every rank's cache. From `kv_blocks` on, in [`Move`]s alone: of a slot of its host pool.
pub type BlockId = u32;

/// A sequence the scheduler holds; never reused within one engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u64);

/// One forward pass over a batch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepPlan {
    /// Done one after the other, before anything is computed: a block may be read by one and written by a later one. A
    /// scheduler makes none without an entry that they are for.
    pub moves: Vec<Move>,
    /// At most one entry a sequence.
    pub entries: Vec<StepEntry>,
}

/// A copy of KV rows from one block to another, in all layers and heads of every rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// Read.
    pub from: BlockId,
    /// Written; another one than `from`.
    pub to: BlockId,
    /// Rows `0..rows` are copied; at least 1, at most as many as a block has.
    pub rows: usize,
}

/// The part of one sequence that a step computes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepEntry {
    /// Whose tokens these are.
    pub sequence: SequenceId,
    /// Token ids to compute, at least one: a chunk of a prompt, or the last sampled token and drafts of those after it.
    pub tokens: Vec<u32>,
    /// Absolute position of `tokens[0]`; KV of all positions before it is in `blocks` already, or moved there by this step.
    pub start: usize,
    /// Block table: position `p` lies in block `blocks[p / block_tokens]`, row `p % block_tokens`. Covers at least
    /// `start + tokens.len()` positions. Blocks from that of `start` on are in no other table; those before may be.
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
    /// Of every token: prompt log probabilities, or drafts, each of which the row before it has to confirm.
    All,
}

/// Rows that a step returns of prompts whose logits are all wanted, over all of them: what bounds their memory, 33 MB with a
/// vocabulary of 128,256.
pub const MAX_PROMPT_ROWS: usize = 64;

/// Drafts that a step computes, over all sequences: what bounds the memory of their rows in the same way.
pub const MAX_DRAFTS: usize = 64;

/// Tokens that may be added to the entry of a sequence that generates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DraftRoom {
    /// Index of its entry.
    pub entry: usize,
    /// At most so many; at least 1.
    pub tokens: usize,
}

impl StepEntry {
    /// Adds guesses at the tokens after the last one, which follow each other.
    pub fn draft(&mut self, drafts: &[u32]) {
        if !drafts.is_empty() {
            self.tokens.extend_from_slice(drafts);
            self.logits = LogitRows::All;
        }
    }

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
