//! Continuous batching: which tokens of which sequences the next step computes, and in which KV blocks. Pure: no clock, no
//! thread, no model.

mod plan;

pub use plan::{BlockId, LogitRows, SequenceId, StepEntry, StepPlan};
