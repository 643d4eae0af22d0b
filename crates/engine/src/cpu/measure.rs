//! Runs prompts through a checkpoint in bf16, and measures what FP8 would make of each linear. One layer is in memory at a
//! time, then one linear of it in both formats.

use std::time::Instant;

use herd_model::{BLOCK_TOKENS, Dtype, Linear, Parallelism, RankShard, ShardPlan};
use herd_scheduler::{LogitRows, SequenceId, StepEntry, StepPlan};
use rayon::ThreadPoolBuilder;

use super::batch::Batch;
use super::isa::Isa;
use super::linear::{LinearWork, Numerics, Projection};
use super::load::{EMBEDDING, Loader, PLAIN, to_f32};
use super::memory::Arena;
use super::model::LoadError;
use super::rank::{LayerWeights, Rank, Weights, Work};
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::clipped::RowsClipped;
use crate::collective::{CollectiveError, LocalRank};

/// Rows of a step, but for a prompt that alone has more.
const STEP_ROWS: usize = 512;
/// Rows that go through a linear at once when it is measured.
const MEASURED_ROWS: usize = 256;

/// What [`measure`] runs and looks at.
#[derive(Clone, Debug)]
pub(crate) struct Measure<'a> {
    /// Token ids; each prompt is a sequence of its own.
    pub(crate) prompts: &'a [Vec<u32>],
    /// Linears of each layer that are looked at.
    pub(crate) linears: &'a [Linear],
    /// Of a token's amax, in FP8.
    pub(crate) bound: f32,
    /// That compute.
    pub(crate) threads: usize,
}

/// What was seen of a layer.
#[derive(Clone, Debug)]
pub(crate) struct SeenLayer {
    pub(crate) layer: usize,
    pub(crate) seconds: f64,
    pub(crate) linears: Vec<SeenLinear>,
}

/// What was seen of a linear.
#[derive(Clone, Debug)]
pub(crate) struct SeenLinear {
    pub(crate) linear: Linear,
    /// Largest magnitude of a weight.
    pub(crate) weight_amax: f32,
    /// Largest magnitude of an input, by token.
    pub(crate) token_amax: Vec<f32>,
    /// Of the outputs with inputs clipped at the bound: root mean square of the difference to bf16's over that of bf16's.
    pub(crate) error: f64,
    /// The same with nothing clipped.
    pub(crate) error_unclipped: f64,
}

/// A model that cannot be measured.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MeasureError {
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// A prompt that this model cannot run.
    #[error("{0}")]
    Prompt(String),
    #[error("threads do not start: {0}")]
    Threads(#[from] rayon::ThreadPoolBuildError),
}

/// Measures all layers in their order; `each` is given them one by one.
pub(crate) fn measure(
    checkpoint: &Checkpoint,
    how: &Measure<'_>,
    mut each: impl FnMut(SeenLayer) + Send,
) -> Result<(), MeasureError> {
    let config = checkpoint.config();
    let (batches, blocks) = batches(checkpoint, how.prompts)?;
    let plan = ShardPlan::new(config, Parallelism::tensor(1)).map_err(LoadError::from)?;
    let Some(whole) = plan.ranks().first() else { return Ok(()) };
    let numerics = Numerics { isa: Isa::detect(), dtype: Dtype::Bf16, activation_scale_ub: how.bound };
    let mut hidden =
        batches.iter().map(|batch| embed(checkpoint, &batch.tokens)).collect::<Result<Vec<_>, _>>()?;
    let pool = ThreadPoolBuilder::new().num_threads(how.threads).build()?;
    pool.install(|| {
        for layer in 0..config.layers {
            let start = Instant::now();
            let shard = RankShard { layers: layer..layer + 1, ..whole.clone() };
            let clipped = RowsClipped::default();
            let arena = Arena::default();
            let loader = Loader { checkpoint, shard: &shard, clipped: &clipped, arena: &arena };
            let inputs = run_layer(&loader, numerics, blocks, &batches, &mut hidden)?;
            let seen = how.linears.iter().map(|linear| see(&loader, numerics, layer, *linear, &inputs));
            let linears = seen.collect::<Result<_, _>>()?;
            each(SeenLayer { layer, seconds: start.elapsed().as_secs_f64(), linears });
        }
        Ok(())
    })
}

/// Inputs of the linears of a layer, `[rows, inputs]`.
struct Inputs {
    qkv: Vec<f32>,
    output: Vec<f32>,
    gate_up: Vec<f32>,
    down: Vec<f32>,
}

impl Inputs {
    fn of(&self, linear: Linear) -> &[f32] {
        match linear {
            Linear::Query | Linear::Key | Linear::Value => &self.qkv,
            Linear::Output => &self.output,
            Linear::Gate | Linear::Up => &self.gate_up,
            Linear::Down => &self.down,
        }
    }
}

/// Takes the residual streams through the layer of `loader`'s shard.
fn run_layer(
    loader: &Loader<'_>,
    numerics: Numerics,
    blocks: usize,
    batches: &[Batch],
    hidden: &mut [Vec<f32>],
) -> Result<Inputs, MeasureError> {
    let Loader { checkpoint, shard, clipped, arena: _ } = loader;
    let mut weights = loader.layer(shard.layers.start)?;
    let LayerWeights { attention_norm: _, qkv, output, ffn_norm: _, gate_up, down } = &mut weights;
    for projection in [qkv, output, gate_up, down] {
        projection.keep_inputs();
    }
    let weights = Weights { embedding: None, layers: vec![weights], output: None };
    let rank = Rank::new(checkpoint.config(), shard, numerics, (blocks, 0), (*clipped).clone(), weights);
    let group = LocalRank::gang(Parallelism::tensor(1));
    let mut work = Work::default();
    for (batch, hidden) in batches.iter().zip(hidden) {
        for group in &group {
            rank.layer(shard.layers.start, batch, group, &mut work, hidden)?;
        }
    }
    let taken = |projection: fn(&LayerWeights) -> &Projection| {
        rank.weights.layers.first().map_or_else(Vec::new, |layer| projection(layer).take_inputs())
    };
    Ok(Inputs {
        qkv: taken(|layer| &layer.qkv),
        output: taken(|layer| &layer.output),
        gate_up: taken(|layer| &layer.gate_up),
        down: taken(|layer| &layer.down),
    })
}

fn see(
    loader: &Loader<'_>,
    numerics: Numerics,
    layer: usize,
    linear: Linear,
    inputs: &Inputs,
) -> Result<SeenLinear, MeasureError> {
    let [_, width] = linear.shape(loader.checkpoint.config());
    let inputs = inputs.of(linear);
    let amax = |row: &[f32]| row.iter().fold(0.0, |amax: f32, x| amax.max(x.abs()));
    let token_amax: Vec<f32> = inputs.chunks_exact(width).map(amax).collect();
    let plain = loader.plain(layer, linear)?;
    let (fp8, weight_amax) = loader.quantized(layer, linear)?;
    let (mut clipped, mut whole, mut size) = (0.0, 0.0, 0.0);
    let unbounded = Numerics { activation_scale_ub: f32::INFINITY, ..numerics };
    let (mut work, mut expected, mut own) = (LinearWork::default(), Vec::new(), Vec::new());
    for x in inputs.chunks(MEASURED_ROWS * width) {
        plain.forward(numerics, x, None, &mut work, &mut expected)?;
        fp8.forward(unbounded, x, None, &mut work, &mut own)?;
        let without_bound = squared_distance(&own, &expected);
        whole += without_bound;
        clipped += if x.iter().any(|x| x.abs() > numerics.activation_scale_ub) {
            fp8.forward(numerics, x, None, &mut work, &mut own)?;
            squared_distance(&own, &expected)
        } else {
            without_bound
        };
        size += expected.iter().map(|y| f64::from(*y).powi(2)).sum::<f64>();
    }
    let relative = |error: f64| (error / size.max(f64::MIN_POSITIVE)).sqrt();
    let (error, error_unclipped) = (relative(clipped), relative(whole));
    Ok(SeenLinear { linear, weight_amax, token_amax, error, error_unclipped })
}

fn squared_distance(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum()
}

/// Prompts in steps, each in blocks of its own, and how many blocks the largest step takes.
fn batches(checkpoint: &Checkpoint, prompts: &[Vec<u32>]) -> Result<(Vec<Batch>, usize), MeasureError> {
    let config = checkpoint.config();
    let mut plans: Vec<StepPlan> = Vec::new();
    let (mut rows, mut blocks, mut most) = (0, 0, 0);
    for (number, prompt) in (0_u64..).zip(prompts) {
        if plans.is_empty() || rows + prompt.len() > STEP_ROWS {
            plans.push(StepPlan::default());
            (rows, blocks) = (0, 0);
        }
        let own = prompt.len().div_ceil(BLOCK_TOKENS);
        let entry = StepEntry {
            sequence: SequenceId(number),
            tokens: prompt.clone(),
            start: 0,
            blocks: (blocks as u32..(blocks + own) as u32).collect(),
            logits: LogitRows::None,
        };
        rows += prompt.len();
        blocks += own;
        most = most.max(blocks);
        if let Some(plan) = plans.last_mut() {
            plan.entries.push(entry);
        }
    }
    let frequencies = config.rope.inverse_frequencies(config.head_dim);
    let batch = |plan| Batch::new(plan, config, &frequencies, (most, 0)).map_err(MeasureError::Prompt);
    Ok((plans.iter().map(batch).collect::<Result<_, _>>()?, most))
}

/// Rows of the embedding, read one by one.
fn embed(checkpoint: &Checkpoint, tokens: &[u32]) -> Result<Vec<f32>, CheckpointError> {
    let config = checkpoint.config();
    let tensor = checkpoint.tensor(EMBEDDING, &PLAIN, &[config.vocab_size, config.hidden_size])?;
    let mut hidden = Vec::with_capacity(tokens.len() * config.hidden_size);
    let mut bytes = Vec::new();
    for token in tokens {
        let row = *token as usize;
        tensor.read(row..row + 1, 0..config.hidden_size, &mut bytes)?;
        hidden.extend(to_f32(tensor.dtype(), &bytes));
    }
    Ok(hidden)
}
