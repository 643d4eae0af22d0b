//! Runs sequences through the executor.

use std::path::Path;
use std::sync::Arc;

use herd_engine::{CpuModel, Executor as _, Isa, LoadOptions};
use herd_model::{BLOCK_TOKENS, Dtype, Parallelism};
use herd_scheduler::{LogitRows, SequenceId, StepEntry, StepPlan};

/// Tokens of a step at most.
const STEP_TOKENS: usize = 512;

pub(crate) struct Runner {
    pub(crate) model: CpuModel,
    kv_blocks: usize,
}

impl Runner {
    pub(crate) fn load(folder: &Path, parallelism: Parallelism, dtype: Dtype, kv_blocks: usize) -> Self {
        Self::load_with(Isa::detect(), folder, parallelism, dtype, kv_blocks)
    }

    pub(crate) fn load_with(
        isa: Isa,
        folder: &Path,
        parallelism: Parallelism,
        dtype: Dtype,
        kv_blocks: usize,
    ) -> Self {
        let options = LoadOptions { parallelism, dtype, kv_blocks, host_blocks: 0, threads: 2, isa };
        Self { model: CpuModel::load(folder, &options).unwrap(), kv_blocks }
    }

    /// Logits of every token of a sequence that starts at block `first`, `[tokens][vocab]`.
    pub(crate) fn logits_of_all(&mut self, tokens: &[u32], first: usize) -> Vec<Vec<f32>> {
        let mut rows = Vec::new();
        for (chunk, tokens) in tokens.chunks(STEP_TOKENS).enumerate() {
            let entry = self.entry(0, tokens, chunk * STEP_TOKENS, first, LogitRows::All);
            rows.extend(self.step(vec![entry]));
        }
        rows
    }

    pub(crate) fn entry(
        &self,
        sequence: usize,
        tokens: &[u32],
        start: usize,
        first: usize,
        logits: LogitRows,
    ) -> StepEntry {
        let end = first + (start + tokens.len()).div_ceil(BLOCK_TOKENS);
        assert!(end <= self.kv_blocks);
        let blocks: Arc<[u32]> = (first as u32..end as u32).collect();
        StepEntry { sequence: SequenceId(sequence as u64), tokens: tokens.to_vec(), start, blocks, logits }
    }

    pub(crate) fn step(&mut self, entries: Vec<StepEntry>) -> Vec<Vec<f32>> {
        let output = self.model.step(&StepPlan { moves: vec![], entries }).unwrap();
        output.logits.chunks_exact(self.model.vocab_size()).map(<[f32]>::to_vec).collect()
    }
}
