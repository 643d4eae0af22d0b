//! What routing knows of a gang.

/// Tokens that one running or waiting request weighs beside prompt tokens still to be computed: one full step.
pub const TOKENS_A_REQUEST: u64 = 512;

/// What is routed to a gang; a policy, not a property of its weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Computes prompts and goes on to decode them.
    Unified,
    /// Computes prompts for decode gangs.
    Prefill,
    /// Decodes from KV that a prefill gang computed.
    Decode,
}

/// Whether a gang takes new requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// It does.
    Ready,
    /// It ends what it has and takes no more.
    Draining,
    /// It cannot be reached, or is not known well enough yet.
    Away,
}

/// One gang as seen at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GangView {
    /// What is routed to it.
    pub role: Role,
    /// Whether it takes requests.
    pub phase: Phase,
    /// KV moves only between gangs where this is equal.
    pub kv_fingerprint: String,
    /// Sequences in its batch, as it reported last.
    pub running: u32,
    /// Sequences in its queue, as it reported last.
    pub waiting: u32,
    /// Prompt tokens not computed yet, as it reported last.
    pub waiting_prompt_tokens: u64,
    /// Requests that this gateway has there now. Added to what the gang reported, so that requests that arrive between two
    /// reports spread out instead of all following the last one.
    pub in_flight: u32,
    /// Prompt tokens of those that have not started.
    pub in_flight_prompt_tokens: u64,
    /// Requests it may hold, running and waiting, before it counts as full.
    pub capacity: u32,
    /// Failed lately, or refused this very request: taken only when nothing else is left.
    pub avoid: bool,
}

impl GangView {
    /// Load in tokens of work.
    pub(crate) fn cost(&self) -> u64 {
        let requests = u64::from(self.running) + u64::from(self.waiting) + u64::from(self.in_flight);
        requests * TOKENS_A_REQUEST + self.waiting_prompt_tokens + self.in_flight_prompt_tokens
    }

    /// The report and the requests in flight count the same requests, so the larger of the two is what is surely there.
    pub(crate) fn full(&self) -> bool {
        (self.running + self.waiting).max(self.in_flight) >= self.capacity
    }
}
