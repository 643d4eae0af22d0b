//! One turn of ours, in a process of its own: loads a model, runs the works it is given, and prints what it measured.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result};
use clap::Args;
use herd_engine::{CpuModel, Executor as _, Isa, LoadOptions};
use herd_model::{BLOCK_TOKENS, Dtype, Parallelism};
use herd_scheduler::{DEFAULT_STEP_TOKENS, LogitRows, SequenceId, StepEntry, StepPlan};
use serde_json::json;

use super::{GENERATED, PROMPT};

#[derive(Debug, Args)]
pub(crate) struct TurnArgs {
    /// Folder of the checkpoint.
    #[arg(long)]
    model: PathBuf,
    #[arg(long)]
    threads: usize,
    /// Instructions that compute.
    #[arg(long)]
    isa: Isa,
    /// Tokens of prompts to compute, one after the other.
    #[arg(long)]
    prefill: Vec<usize>,
    /// Sequences to decode together.
    #[arg(long)]
    decode: Vec<usize>,
}

pub(crate) fn run(arguments: &TurnArgs) -> Result<()> {
    let started = Instant::now();
    let TurnArgs { model, threads, isa, prefill, decode } = arguments;
    let each = (PROMPT + GENERATED).div_ceil(BLOCK_TOKENS);
    let blocks = |tokens: usize| tokens.div_ceil(BLOCK_TOKENS);
    let longest = prefill.iter().copied().max().unwrap_or(1);
    let kv_blocks = blocks(longest).max(decode.iter().copied().max().unwrap_or(0) * each);
    let options = LoadOptions {
        parallelism: Parallelism::tensor(1),
        dtype: Dtype::Bf16,
        kv_blocks,
        host_blocks: 0,
        threads: *threads,
        isa: *isa,
    };
    let mut model = Sequences { model: CpuModel::load(model, &options)?, each };
    let load_s = started.elapsed().as_secs_f64();
    model.prompt(0, 1)?;
    let first_token_s = started.elapsed().as_secs_f64();
    let mut rates = Vec::new();
    for tokens in prefill {
        let started = Instant::now();
        model.prompt(0, *tokens)?;
        rates.push(*tokens as f64 / started.elapsed().as_secs_f64());
    }
    for sequences in decode {
        for sequence in 0..*sequences {
            model.prompt(sequence, PROMPT)?;
        }
        let started = Instant::now();
        for step in 0..GENERATED {
            let entry = |sequence| model.entry(sequence, vec![7], PROMPT + step, LogitRows::Last);
            let entries = (0..*sequences).map(entry).collect();
            model.model.step(&StepPlan { moves: vec![], entries })?;
        }
        rates.push((sequences * GENERATED) as f64 / started.elapsed().as_secs_f64());
    }
    let bytes: u64 = model.model.info().weight_bytes_per_rank.iter().sum();
    let peak = super::peer::peak_bytes("self").context("the peak of memory of this process")?;
    let figures = json!({"rates": rates, "load_s": load_s, "first_token_s": first_token_s,
        "bytes_read": bytes, "peak_bytes": peak});
    println!("{figures}");
    Ok(())
}

struct Sequences {
    model: CpuModel,
    /// Blocks of a sequence.
    each: usize,
}

impl Sequences {
    fn entry(&self, sequence: usize, tokens: Vec<u32>, start: usize, logits: LogitRows) -> StepEntry {
        let first = sequence * self.each;
        let blocks: Arc<[u32]> = (first..first + (start + tokens.len()).div_ceil(BLOCK_TOKENS))
            .map(|block| block as u32)
            .collect();
        StepEntry { sequence: SequenceId(sequence as u64), tokens, start, blocks, logits }
    }

    /// Computes a prompt, as many tokens a step as a worker does.
    fn prompt(&mut self, sequence: usize, tokens: usize) -> Result<()> {
        let vocab = self.model.vocab_size();
        let tokens: Vec<u32> = (0..tokens).map(|token| (token * 7919 % vocab) as u32).collect();
        for (chunk, part) in tokens.chunks(DEFAULT_STEP_TOKENS).enumerate() {
            let start = chunk * DEFAULT_STEP_TOKENS;
            let last = start + part.len() == tokens.len();
            let logits = if last { LogitRows::Last } else { LogitRows::None };
            let entries = vec![self.entry(sequence, part.to_vec(), start, logits)];
            self.model.step(&StepPlan { moves: vec![], entries })?;
        }
        Ok(())
    }
}
