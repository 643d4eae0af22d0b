//! What a scheduler may hand out, and which requests could never be served within it.

/// Bounds of one gang. Every number but [`Limits::host_blocks`] and [`Limits::draft_tokens`] counts as at least 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Positions a sequence can have: prompt and generated tokens together.
    pub context_length: usize,
    /// KV blocks every rank has.
    pub kv_blocks: usize,
    /// Positions a KV block holds.
    pub block_tokens: usize,
    /// Tokens a step computes at most: the grain of cancelling.
    pub max_step_tokens: usize,
    /// Sequences that run at once, reservations included; see [`Limits::running_sequences`].
    pub max_sequences: usize,
    /// Requests that wait for their start.
    pub max_waiting: usize,
    /// Whether sequences share KV of equal beginnings, and full blocks are kept after their owners.
    pub prefix_cache: bool,
    /// Blocks of the host pool, which KV of preempted sequences is copied to; with 0 it is always computed again.
    pub host_blocks: usize,
    /// Drafts of a sequence that a step has room for; with 0 there are none.
    pub draft_tokens: usize,
}

/// Tokens a step computes at most unless configured otherwise.
pub const DEFAULT_STEP_TOKENS: usize = 512;

/// A request that no amount of waiting would make room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a prompt of {prompt_tokens} tokens with {max_tokens} to generate does not fit: the context holds \
     {context_length} tokens (one of them generated at least), the kv cache {kv_tokens}"
)]
pub struct TooLong {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens asked for.
    pub max_tokens: usize,
    /// Positions of a sequence.
    pub context_length: usize,
    /// Positions of the whole KV cache.
    pub kv_tokens: usize,
}

impl Limits {
    /// The same limits with every zero raised to 1.
    #[must_use]
    pub fn at_least_one(self) -> Self {
        let Self {
            context_length,
            kv_blocks,
            block_tokens,
            max_step_tokens,
            max_sequences,
            max_waiting,
            prefix_cache,
            host_blocks,
            draft_tokens,
        } = self;
        Self {
            context_length: context_length.max(1),
            kv_blocks: kv_blocks.max(1),
            block_tokens: block_tokens.max(1),
            max_step_tokens: max_step_tokens.max(1),
            max_sequences: max_sequences.max(1),
            max_waiting: max_waiting.max(1),
            prefix_cache,
            host_blocks,
            draft_tokens,
        }
    }

    /// Sequences that run at once: never more than a step has tokens, so that each of them can go on in every step and
    /// none starves.
    pub fn running_sequences(&self) -> usize {
        self.max_sequences.min(self.max_step_tokens)
    }

    /// Positions a sequence can come to have: the prompt and what is to be generated, or the context where that is less. A
    /// prompt that leaves no room for a generated token is too long, and so is what all blocks together do not hold.
    pub fn positions(&self, prompt_tokens: usize, max_tokens: usize) -> Result<usize, TooLong> {
        let positions = prompt_tokens.saturating_add(max_tokens).min(self.context_length);
        let fits = prompt_tokens < self.context_length && self.blocks(positions) <= self.kv_blocks;
        if fits {
            Ok(positions)
        } else {
            Err(TooLong {
                prompt_tokens,
                max_tokens,
                context_length: self.context_length,
                kv_tokens: self.kv_blocks.saturating_mul(self.block_tokens),
            })
        }
    }

    /// KV blocks that hold so many positions.
    pub fn blocks(&self, positions: usize) -> usize {
        positions.div_ceil(self.block_tokens.max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        context_length: 100,
        kv_blocks: 4,
        block_tokens: 16,
        max_step_tokens: 8,
        max_sequences: 20,
        max_waiting: 2,
        prefix_cache: true,
        host_blocks: 0,
        draft_tokens: 0,
    };

    #[test]
    fn what_is_generated_ends_with_the_context() {
        let limits = Limits { kv_blocks: 7, ..LIMITS };
        assert_eq!(limits.positions(90, 5), Ok(95));
        assert_eq!(limits.positions(90, usize::MAX), Ok(100));
        assert_eq!(limits.positions(99, 1), Ok(100));
        assert!(limits.positions(100, 1).is_err());
    }

    #[test]
    fn what_the_cache_can_never_hold_is_too_long() {
        assert_eq!(LIMITS.positions(60, 4), Ok(64));
        let error = LIMITS.positions(60, 5).unwrap_err();
        assert_eq!(error, TooLong { prompt_tokens: 60, max_tokens: 5, context_length: 100, kv_tokens: 64 });
    }

    #[test]
    fn a_step_has_a_token_for_every_running_sequence() {
        assert_eq!(LIMITS.running_sequences(), 8);
        assert_eq!(Limits { max_sequences: 3, ..LIMITS }.running_sequences(), 3);
    }
}
