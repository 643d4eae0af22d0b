//! The seam between the step loop and whatever runs a step: all ranks of a gang on the CPU backend, or the fake one.

use std::sync::Arc;

use herd_scheduler::StepPlan;

use crate::KvStore;

/// Runs step plans, one at a time, on all ranks of a gang.
pub trait Executor: Send {
    /// Runs one step to its end. An error ends the epoch: the KV contents are not to be trusted after it.
    fn step(&mut self, plan: &StepPlan) -> Result<StepOutput, ExecutorError>;

    /// The KV cache of each rank, by rank.
    fn kv(&self) -> Vec<Arc<dyn KvStore>>;

    /// Entries of a logits row.
    fn vocab_size(&self) -> usize;
}

/// What a step computed.
#[derive(Clone, Debug, Default)]
pub struct StepOutput {
    /// Logits in f32, `vocab_size` a row: the rows each entry of the plan asked for, in the plan's order.
    pub logits: Vec<f32>,
}

/// A step that failed; the epoch is over.
#[derive(Debug, thiserror::Error)]
pub enum ExecutorError {
    /// A rank thread is gone.
    #[error("rank {rank} stopped: {message}")]
    RankStopped {
        /// Which one.
        rank: usize,
        /// Its last words.
        message: String,
    },
    /// The plan does not fit this model or its KV cache.
    #[error("step plan refused: {0}")]
    BadPlan(String),
}
