//! What a request asks of the engine and what comes back: token ids only, one choice a request.

use crate::{Constraint, Shaping};

/// How tokens are drawn and when to stop. Random numbers are a function of (seed, choice, position) alone.
#[derive(Clone, Debug)]
pub struct Sampling {
    /// Tokens to generate at most; at least 1.
    pub max_tokens: usize,
    /// 0 is greedy.
    pub temperature: f32,
    /// Nucleus: the smallest set of most likely tokens that reaches this probability; 1 is all.
    pub top_p: f32,
    /// Of the request.
    pub seed: u64,
    /// Which of the request's choices this is.
    pub choice: u32,
    /// Any of these ends the sequence; the token itself is reported.
    pub stop_ids: Vec<u32>,
    /// Alternatives reported with each token.
    pub top_logprobs: usize,
    /// Tokens of the choice that the prompt ends with: a choice that another engine began. Positions go on from there, and
    /// with them the random numbers; `max_tokens` is what is left to generate.
    pub first_position: usize,
    /// What is done to the logits before.
    pub shaping: Shaping,
    /// What the choice has to match, in the state after the `first_position` tokens that it has. Not complete: then there is
    /// nothing to generate.
    pub constraint: Option<Box<dyn Constraint>>,
    /// Present: how likely each token of the prompt is, with this many alternatives. Whoever computes the prompt tells.
    pub prompt_logprobs: Option<usize>,
}

/// A token id and its natural log probability in the distribution before temperature.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub id: u32,
    /// `ln p`.
    pub logprob: f32,
}

/// One generated token.
#[derive(Clone, Debug, PartialEq)]
pub struct SampledToken {
    /// Counted from the first generated token of the choice.
    pub position: usize,
    /// The token.
    pub token: TokenLogprob,
    /// The most likely ones, most likely first, as many as [`Sampling::top_logprobs`] asked for.
    pub top: Vec<TokenLogprob>,
}

/// Why a sequence ended by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// One of [`Sampling::stop_ids`], or a [`Sampling::constraint`] that nothing can follow.
    Stop,
    /// [`Sampling::max_tokens`], or the context is full.
    Length,
}

/// What a running sequence reports, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Its first step is being planned and these blocks are its own until it ends; those of a prefill until its handle is
    /// dropped.
    Started {
        /// Block table; position `p` lies in `blocks[p / block_tokens]`.
        blocks: std::sync::Arc<[u32]>,
    },
    /// KV of positions `0..computed` is complete. Sent after every step that computes prompt tokens.
    Computed {
        /// Positions from the start of the prompt.
        computed: usize,
    },
    /// How likely tokens of the prompt are after those before them; positions are in the prompt. Of each chunk of it as it
    /// is computed, where [`Sampling::prompt_logprobs`] asks. The first token of a prompt has none.
    Prompt(Vec<SampledToken>),
    /// A token.
    Token(SampledToken),
    /// The last event.
    Finished(FinishReason),
    /// The last event: the engine's epoch is over, or this sequence's logits were no numbers.
    Failed(String),
    /// The last event: [`Sampling::constraint`] cannot go on. It would not anywhere else.
    Unsatisfiable(String),
}
