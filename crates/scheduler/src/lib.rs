//! Continuous batching: which tokens of which sequences the next step computes, and in which KV blocks. Pure: no clock, no
//! thread, no model.
//!
//! A step has a budget of tokens. Sequences that generate come first, with one token each; what is left goes to prompts in
//! chunks, by priority and age. A sequence starts when there are blocks for its prompt and takes more as it generates. Blocks
//! that are full have a name, which follows from their tokens: sequences that begin alike share them, and they are kept after
//! their owners until they are needed. Where blocks run out, the last in the order gives its own back and goes on later, from
//! the host pool or by computing again. What is left of a step has room for drafts: guesses at tokens to come, of which those are
//! kept that are sampled.

mod blocks;
mod limits;
mod load;
mod names;
mod plan;
mod scheduler;
mod sequence;
mod turn;

pub use limits::{DEFAULT_STEP_TOKENS, Limits, TooLong};
pub use load::{Counters, Load};
pub use plan::{
    BlockId, DraftRoom, LogitRows, MAX_DRAFTS, MAX_PROMPT_ROWS, Move, SequenceId, StepEntry, StepPlan,
};
pub use scheduler::{Planned, Refused, Scheduler, Started};
pub use sequence::{Continuation, Ended, NotReserved, Work};
pub use turn::{MAX_PASSED_OVER, MAX_PREEMPTIONS, Scheduling};
