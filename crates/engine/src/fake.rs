//! A backend without weights, for tests of everything above the engine. What it computes is not language, but it depends on
//! the tokens, on their positions and on the whole KV content, the way a model's output does: a block that is lost, swapped,
//! stale or written twice gives other tokens.
//!
//! A KV row is a hash of the token, the position, layer, head, and the row before it as it stands in the cache. Logits are a
//! hash of all rows of the sequence, read back from every rank's cache through the block table. Neither depends on the tensor
//! degree, on batching or on chunking.

mod cache;
mod control;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use herd_scheduler::{LogitRows, Move, StepEntry, StepPlan};

use self::cache::{FakeCache, absorb, mix};
pub use self::control::FakeControl;
use self::control::Gate;
use crate::{Executor, ExecutorError, KvStore, StepOutput};

/// Shape of a fake model. Every number counts as at least 1.
#[derive(Clone, Debug)]
pub struct FakeOptions {
    /// Token ids are below it.
    pub vocab_size: usize,
    /// Tensor ranks. They split the KV heads evenly, or replicate each where there are more ranks than heads.
    pub tensor: usize,
    /// Layers of the KV cache.
    pub layers: usize,
    /// KV heads of the model.
    pub kv_heads: usize,
    /// Bytes of one row of one head: `head_dim` times the size of the dtype in a model.
    pub row_bytes: usize,
    /// KV blocks of every rank.
    pub kv_blocks: usize,
    /// Slots of every rank's host pool; 0 counts as 0.
    pub host_blocks: usize,
    /// Positions of a block.
    pub block_tokens: usize,
    /// Another model is another seed.
    pub seed: u64,
    /// Tokens that are practically never generated: special ones, say, so that sequences run to `max_tokens`.
    pub unlikely: Vec<u32>,
    /// A token whose logits are no numbers.
    pub nan_token: Option<u32>,
}

impl Default for FakeOptions {
    fn default() -> Self {
        Self {
            vocab_size: 1000,
            tensor: 1,
            layers: 2,
            kv_heads: 4,
            row_bytes: 16,
            kv_blocks: 64,
            host_blocks: 0,
            block_tokens: 64,
            seed: 0,
            unlikely: Vec::new(),
            nan_token: None,
        }
    }
}

/// The fake backend: an [`Executor`] with one KV cache a tensor rank.
#[derive(Debug)]
pub struct FakeModel {
    options: FakeOptions,
    ranks: Vec<Arc<FakeCache>>,
    gate: Arc<Gate>,
}

impl FakeModel {
    /// With zeros in its caches.
    pub fn new(options: FakeOptions) -> Self {
        let FakeOptions { vocab_size, tensor, layers, kv_heads, row_bytes, kv_blocks, block_tokens, .. } =
            options;
        let options = FakeOptions {
            vocab_size: vocab_size.max(1),
            tensor: tensor.max(1),
            layers: layers.max(1),
            kv_heads: kv_heads.max(1),
            row_bytes: row_bytes.max(1),
            kv_blocks: kv_blocks.max(1),
            block_tokens: block_tokens.max(1),
            ..options
        };
        let ranks = (0..options.tensor).map(|rank| Arc::new(FakeCache::new(&options, rank))).collect();
        Self { options, ranks, gate: Arc::default() }
    }

    /// Holds, counts and fails its steps from a test.
    pub fn control(&self) -> FakeControl {
        FakeControl::new(&self.gate)
    }

    fn check(&self, plan: &StepPlan) -> Result<(), String> {
        let StepPlan { moves, entries } = plan;
        let FakeOptions { kv_blocks, host_blocks, block_tokens, vocab_size, .. } = self.options;
        for &Move { from, to, rows } in moves {
            let most = kv_blocks + host_blocks;
            if from as usize >= most || to as usize >= most || from == to || rows == 0 || rows > block_tokens
            {
                return Err(format!("{rows} rows cannot be moved from block {from} to {to} of {most}"));
            }
        }
        let mut sequences = HashSet::new();
        let mut tables: HashMap<u32, usize> = HashMap::new();
        for entry in entries {
            let StepEntry { sequence, tokens, start, blocks: table, logits: _ } = entry;
            if !sequences.insert(*sequence) {
                return Err(format!("{sequence:?} has two entries"));
            }
            if tokens.is_empty() {
                return Err(format!("{sequence:?} has no tokens"));
            }
            if start + tokens.len() > table.len() * block_tokens {
                return Err(format!("{sequence:?} has {} blocks for position {start}", table.len()));
            }
            if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocab_size) {
                return Err(format!("{sequence:?} has token {token}"));
            }
            for &block in table.iter() {
                if block as usize >= kv_blocks {
                    return Err(format!("{sequence:?} has block {block} of {kv_blocks}"));
                }
                *tables.entry(block).or_default() += 1;
            }
        }
        for StepEntry { sequence, tokens, start, blocks: table, logits: _ } in entries {
            let written = start / block_tokens..(start + tokens.len()).div_ceil(block_tokens);
            if let Some(block) = table[written].iter().find(|&block| tables.get(block) != Some(&1)) {
                return Err(format!("block {block} is written by {sequence:?} and in another table"));
            }
        }
        Ok(())
    }

    /// Hash of every row up to and including `position`, of all heads; replicas of a head count once as long as they are
    /// equal.
    fn digest(&self, table: &[u32], position: usize) -> u64 {
        let mut digest = mix(self.options.seed);
        let digest_of = |rank: &FakeCache, head| rank.digest(table, position + 1, head);
        for head in 0..self.options.kv_heads {
            let mut holders = self.ranks.iter().filter(|rank| rank.heads().contains(&head));
            if let Some(first) = holders.next() {
                let expected = digest_of(first, head);
                digest = absorb(digest, expected);
                for replica in holders {
                    digest ^= digest_of(replica, head) ^ expected;
                }
            }
        }
        digest
    }

    fn logits(&self, digest: u64, token: u32, output: &mut Vec<f32>) {
        let nan = self.options.nan_token == Some(token);
        let row = output.len();
        output.extend((0..self.options.vocab_size as u64).map(|id| {
            // In [-4, 4), 24 bits.
            let logit = (mix(digest ^ mix(id)) >> 40) as f32 * (8.0 / (1 << 24) as f32) - 4.0;
            if nan { f32::NAN } else { logit }
        }));
        for &id in &self.options.unlikely {
            if let Some(logit) = output.get_mut(row + id as usize) {
                *logit -= 100.0;
            }
        }
    }
}

impl Executor for FakeModel {
    fn step(&mut self, plan: &StepPlan) -> Result<StepOutput, ExecutorError> {
        self.check(plan).map_err(ExecutorError::BadPlan)?;
        self.gate.pass(plan)?;
        let mut output = StepOutput::default();
        for &Move { from, to, rows } in &plan.moves {
            for rank in &self.ranks {
                rank.copy_rows(from, to, rows);
            }
        }
        for entry in &plan.entries {
            for (offset, &token) in entry.tokens.iter().enumerate() {
                let position = entry.start + offset;
                for rank in &self.ranks {
                    rank.compute(&entry.blocks, position, token, self.options.seed);
                }
                let last = offset + 1 == entry.tokens.len();
                if entry.logits == LogitRows::All || (entry.logits == LogitRows::Last && last) {
                    self.logits(self.digest(&entry.blocks, position), token, &mut output.logits);
                }
            }
        }
        Ok(output)
    }

    fn kv(&self) -> Vec<Arc<dyn KvStore>> {
        self.ranks.iter().map(|rank| Arc::clone(rank) as Arc<dyn KvStore>).collect()
    }

    fn vocab_size(&self) -> usize {
        self.options.vocab_size
    }
}

#[cfg(test)]
mod tests;
