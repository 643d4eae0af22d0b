//! Steps of a gang of several processes, as its leader runs them.

use std::sync::Arc;

use herd_engine::{Executor, ExecutorError, KvStore, ModelInfo, RunningRanks, StepOutput};
use herd_scheduler::StepPlan;
use tokio::sync::oneshot;

use super::followers::Followers;
use super::mesh::Mesh;
use super::plan::Encoder;

/// Sends each plan to the followers, runs it on the ranks that are here, and waits until it is done everywhere.
pub(super) struct GangExecutor {
    pub(super) info: ModelInfo,
    pub(super) kv: Vec<Arc<dyn KvStore>>,
    pub(super) encoder: Encoder,
    pub(super) followers: Arc<Followers>,
    pub(super) mesh: Arc<Mesh>,
    pub(super) running: RunningRanks,
    /// Dropped last: no rank of this epoch computes any more.
    pub(super) _ended: oneshot::Sender<()>,
}

impl Executor for GangExecutor {
    fn step(&mut self, plan: &StepPlan) -> Result<StepOutput, ExecutorError> {
        self.followers.step(self.encoder.encode(plan));
        let mut columns = self.running.step(plan)?;
        let others = self
            .mesh
            .take_columns()
            .map_err(|error| ExecutorError::RankStopped { rank: 0, message: error.to_string() })?;
        columns.extend(others);
        Ok(StepOutput { logits: self.info.rows_of_logits(&columns)? })
    }

    fn kv(&self) -> Vec<Arc<dyn KvStore>> {
        self.kv.clone()
    }

    fn vocab_size(&self) -> usize {
        self.info.config.vocab_size
    }
}
