//! How a sequence gets its first blocks: those it finds in the cache, and new ones.

use super::{Planned, Scheduler, Started};
use crate::sequence::{Budget, Phase, Sequence};
use crate::turn::Turn;
use crate::{BlockId, Limits, Move};

/// What of a sequence's tokens is in blocks already.
struct Found {
    /// Full blocks, to be shared.
    blocks: Vec<BlockId>,
    /// Rows of the block after them, to be copied.
    tail: Option<(BlockId, usize)>,
}

impl Scheduler {
    /// Takes the head of the queue out, if there are a slot, blocks, and tokens in the step for it. Its moves are in the step
    /// then.
    pub(super) fn admit(&mut self, turn: Turn, budget: &Budget, planned: &mut Planned) -> bool {
        let Limits { block_tokens, prefix_cache, .. } = self.limits;
        let Some(mut sequence) = self.waiting.remove(&turn) else { return false };
        if prefix_cache {
            sequence.chain.extend(&sequence.tokens, block_tokens);
        }
        let slot = self.running() < self.limits.running_sequences();
        let tokens = sequence.phase == Phase::Reserved || sequence.most(budget) > 0;
        let admitted = slot && tokens && self.give_blocks(&mut sequence, planned);
        if !admitted {
            self.waiting.insert(turn, sequence);
            return false;
        }
        if !sequence.started {
            sequence.started = true;
            let cached = sequence.computed;
            self.counters.prefix_cached_tokens += cached as u64;
            let blocks = sequence.blocks.clone();
            planned.started.push(Started { sequence: turn.id, blocks, cached });
        }
        self.sequences.insert(turn.id, sequence);
        true
    }

    /// The blocks of all tokens that are known. A start leaves a free block to each sequence that may come to need one: what
    /// has just started is not to be preempted at once.
    fn give_blocks(&mut self, sequence: &mut Sequence, planned: &mut Planned) -> bool {
        let Some(Found { blocks: shared, tail }) = self.find(sequence) else { return false };
        for &block in &shared {
            self.pool.share(block);
        }
        let needed = self.limits.blocks(sequence.first_positions()).saturating_sub(shared.len());
        let spare = self.pool.available().checked_sub(needed);
        let taken = spare.filter(|spare| *spare >= self.growing()).and_then(|_| self.pool.take(needed));
        let Some(taken) = taken else {
            self.pool.release(&shared);
            return false;
        };
        let (from, block_tokens) = (shared.len(), self.limits.block_tokens);
        let moves = &mut planned.step.moves;
        if sequence.swapped.is_empty() {
            let rows = tail.map_or(0, |(_, rows)| rows);
            sequence.computed = from * block_tokens + rows;
            // A cached block that was taken for this keeps its rows.
            if let (Some((block, rows)), Some(&to)) = (tail, taken.first())
                && block != to
            {
                moves.push(Move { from: block, to, rows });
            }
        } else {
            let swapped = sequence.swapped.iter().enumerate().skip(from);
            for ((block, &slot), &to) in swapped.zip(&taken) {
                let rows = sequence.computed.saturating_sub(block * block_tokens).min(block_tokens);
                moves.push(Move { from: slot, to, rows });
            }
            self.host.release(&std::mem::take(&mut sequence.swapped));
        }
        sequence.blocks = shared.into_iter().chain(taken).collect();
        true
    }

    /// What the cache has of a sequence's tokens, the last one apart: its logits are wanted. `None`: a sequence before it in
    /// the order is computing the next block, which it will share.
    fn find(&self, sequence: &Sequence) -> Option<Found> {
        let Limits { block_tokens, prefix_cache, .. } = self.limits;
        let none = Found { blocks: Vec::new(), tail: None };
        if !prefix_cache || sequence.phase == Phase::Reserved || sequence.asked.all_logits {
            return Some(none);
        }
        let last = sequence.tokens.len() - 1;
        // What comes back from the host pool is not copied where it is still here; tokens after it are not looked for.
        let wanted = if sequence.swapped.is_empty() { last } else { sequence.computed.min(last) };
        let names = (0..wanted / block_tokens).map_while(|block| sequence.chain.get(block));
        let blocks: Vec<BlockId> = names.map_while(|name| self.pool.find(name)).collect();
        if !sequence.swapped.is_empty() {
            return Some(Found { blocks, tail: None });
        }
        let next = blocks.len();
        if next < last / block_tokens && self.is_computed_by_another(sequence, next) {
            return None;
        }
        let tail = self.longest_tail(sequence, next);
        Some(Found { blocks, tail })
    }

    /// Whether a sequence that goes first computes the same block now.
    fn is_computed_by_another(&self, sequence: &Sequence, block: usize) -> bool {
        let end = (block + 1) * self.limits.block_tokens;
        self.sequences.values().any(|other| {
            other.turn < sequence.turn
                && other.has_prompt()
                && other.computed < end
                && other.chain.get(block) == sequence.chain.get(block)
        })
    }

    /// A block that begins with the most of the tokens after the first `next` full blocks, all of which it follows; and how many
    /// rows of it are of use.
    fn longest_tail(&self, sequence: &Sequence, next: usize) -> Option<(BlockId, usize)> {
        let block_tokens = self.limits.block_tokens;
        let start = next * block_tokens;
        let tokens = sequence.tokens.get(start..sequence.tokens.len() - 1)?;
        let tokens = &tokens[..tokens.len().min(block_tokens)];
        if tokens.is_empty() {
            return None;
        }
        // All of the last block is cached, and its last token alone is to be computed.
        if let Some(block) = sequence.chain.get(next).and_then(|name| self.pool.find(name)) {
            return Some((block, tokens.len()));
        }
        // Of equals the one that came first: backwards, for the last of the largest is taken.
        let running = self.sequences.values().rev().filter(|other| {
            other.phase != Phase::Reserved && sequence.chain.agrees_up_to(&other.chain, next)
        });
        let tails = running.filter_map(|other| {
            let computed = other.tokens.get(start..other.computed)?;
            let rows = computed.iter().zip(tokens).take_while(|(one, other)| one == other).count();
            Some((*other.blocks.get(next)?, rows))
        });
        tails.max_by_key(|(_, rows)| *rows).filter(|(_, rows)| *rows > 0)
    }

    /// Sequences that may come to need another block.
    pub(super) fn growing(&self) -> usize {
        let most = |positions| self.limits.blocks(positions);
        let grows = |sequence: &&Sequence| {
            let generates = !sequence.asked.prefill_only && sequence.phase != Phase::Held;
            generates && sequence.blocks.len() < most(sequence.positions)
        };
        self.sequences.values().filter(grows).count()
    }
}
