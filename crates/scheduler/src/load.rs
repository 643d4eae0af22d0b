//! What others are told of a scheduler: how busy it is, and what it has done.

/// How busy a gang is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Sequences that started and have not ended, reservations included. A prefill that ended and whose blocks are being
    /// read is not running any more, a sequence that was preempted not until it goes on.
    pub running: usize,
    /// Requests in the queue, preempted sequences included.
    pub waiting: usize,
    /// Tokens they have to compute first: of their prompts, and of what preempted ones had computed.
    pub waiting_prompt_tokens: usize,
    /// KV blocks that are owned. What the prefix cache alone holds is free to be taken and does not count.
    pub kv_blocks_used: usize,
}

/// What was done since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Steps completed.
    pub steps: u64,
    /// Prompt tokens computed for the first time.
    pub prompt_tokens: u64,
    /// Tokens sampled.
    pub output_tokens: u64,
    /// Prompt tokens computed in sequences whose prompt KV had been computed elsewhere, preemptions apart. Counted from the
    /// plans that were run; anything but 0 is a mistake.
    pub prefill_recomputed_tokens: u64,
    /// Prompt tokens whose KV was there when their sequence started.
    pub prefix_cached_tokens: u64,
    /// Sequences that gave their blocks to others.
    pub preemptions: u64,
    /// Tokens, of prompts or generated, computed again after that.
    pub preempted_recomputed_tokens: u64,
    /// Blocks of preempted sequences that were copied to the host pool.
    pub swapped_blocks: u64,
    /// Drafts computed.
    pub draft_tokens: u64,
    /// Of these, those that were sampled then.
    pub accepted_draft_tokens: u64,
}
