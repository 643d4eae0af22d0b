//! Continuous batching: which tokens of which sequences the next step computes, and in which KV blocks. Pure: no clock, no
//! thread, no model.
//!
//! A step has a budget of tokens. Sequences that generate come first, with one token each; what is left goes to prompts, the
//! oldest first, in chunks. Requests start strictly in the order they came, each when all KV blocks it can ever need are
//! free: a started sequence never runs out, and a waiting one pins nothing.

mod blocks;
mod limits;
mod plan;
mod scheduler;
mod sequence;

pub use limits::{DEFAULT_STEP_TOKENS, Limits, TooLong};
pub use plan::{BlockId, LogitRows, MAX_PROMPT_ROWS, SequenceId, StepEntry, StepPlan};
pub use scheduler::{Counters, Load, Planned, Refused, Scheduler, Started};
pub use sequence::{Continuation, Ended, NotReserved, Work};
