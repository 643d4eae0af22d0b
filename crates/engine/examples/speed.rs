//! Tokens a second of a model on this machine: `speed MODEL_DIR [TENSOR] [THREADS] [f32|bf16] [ISA]`. Prints, judges nothing.

use std::error::Error;
use std::sync::Arc;
use std::time::Instant;

use herd_engine::{CpuModel, Executor, Isa, LoadOptions};
use herd_model::{BLOCK_TOKENS, Dtype, Parallelism};
use herd_scheduler::{LogitRows, SequenceId, StepEntry, StepPlan};

const PROMPT: usize = 512;
const DECODED: usize = 64;
const BATCHES: [usize; 2] = [1, 8];

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().ok_or("usage: speed MODEL_DIR [TENSOR] [THREADS] [f32|bf16] [ISA]")?;
    let tensor = arguments.next().map_or(Ok(1), |word| word.parse())?;
    let threads = arguments.next().map_or(Ok(2), |word| word.parse())?;
    let dtype: Dtype = arguments.next().map_or(Ok(Dtype::F32), |word| word.parse())?;
    let isa = arguments.next().map_or(Ok(Isa::detect()), |word| word.parse())?;
    let blocks_each = (PROMPT + DECODED).div_ceil(BLOCK_TOKENS);
    let kv_blocks = BATCHES[BATCHES.len() - 1] * blocks_each;

    let started = Instant::now();
    let options = LoadOptions {
        parallelism: Parallelism::tensor(tensor),
        dtype,
        kv_blocks,
        host_blocks: 0,
        threads,
        isa,
    };
    let mut model = CpuModel::load(folder.as_ref(), &options)?;
    let bytes: u64 = model.info().weight_bytes_per_rank.iter().sum();
    println!(
        "{folder} at tensor {tensor}, {threads} threads, {dtype}: {} MB of weights in {:.2} s",
        bytes >> 20,
        started.elapsed().as_secs_f64()
    );
    for sequences in BATCHES {
        let tables: Vec<Arc<[u32]>> = (0..sequences)
            .map(|sequence| {
                ((sequence * blocks_each) as u32..((sequence + 1) * blocks_each) as u32).collect()
            })
            .collect();
        let entry = |sequence: usize, tokens: Vec<u32>, start| StepEntry {
            sequence: SequenceId(sequence as u64),
            tokens,
            start,
            blocks: Arc::clone(&tables[sequence]),
            logits: LogitRows::Last,
        };
        let started = Instant::now();
        for sequence in 0..sequences {
            let tokens = (0..PROMPT as u32).map(|token| token * 7 % model.vocab_size() as u32).collect();
            model.step(&StepPlan { moves: vec![], entries: vec![entry(sequence, tokens, 0)] })?;
        }
        let prefill = (sequences * PROMPT) as f64 / started.elapsed().as_secs_f64();
        let started = Instant::now();
        for step in 0..DECODED {
            let entries = (0..sequences).map(|sequence| entry(sequence, vec![5], PROMPT + step)).collect();
            model.step(&StepPlan { moves: vec![], entries })?;
        }
        let decode = (sequences * DECODED) as f64 / started.elapsed().as_secs_f64();
        println!("{sequences:3} sequences: prefill {prefill:7.1} tokens/s, decode {decode:7.1} tokens/s");
    }
    Ok(())
}
