//! Calibration: a few prompts run through a checkpoint in bf16 say which layers FP8 does not suit, and where activations are
//! to be bounded.
//!
//! What is measured is what quantizing would change: the inputs of each linear that the layout converts, and its outputs
//! with weights and inputs in FP8 beside those in bf16. Massive activations (a few channels of the first token that are
//! thousands of times larger than all others) show in a handful of layers and are clipped by a bound that suits the rest.

mod choice;
mod prompts;
mod report;

use std::path::Path;

use herd_model::{Linear, ModelConfig};
use serde::Serialize;

pub use choice::{Bound, BoundReason, ByHand, Choice, LARGE_ERROR, Reason, USUAL_BOUND, choose};
pub use prompts::{MAX_PROMPT_TOKENS, MAX_TOKENS, PROMPTS};
pub use report::REPORT_FILE;

use super::quantize::{Layout, Quantization, check_bound};
use super::{ConvertError, Progress};
use crate::checkpoint::Checkpoint;
use crate::cpu::{Measure, MeasureError, SeenLayer, SeenLinear, measure};

/// What prompts have shown, and what follows from it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Calibration {
    /// That were run.
    pub prompts: usize,
    /// Of all prompts.
    pub tokens: usize,
    /// Of every layer, in order.
    pub layers: Vec<LayerMeasurement>,
    /// What follows.
    pub choice: Choice,
}

/// What was measured of a layer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerMeasurement {
    /// Counted from 0.
    pub layer: usize,
    /// That running and measuring it took.
    pub seconds: f64,
    /// Those that the layout converts.
    pub linears: Vec<LinearMeasurement>,
}

/// What was measured of a linear.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LinearMeasurement {
    /// Its module within the layer: `mlp.down_proj`.
    pub linear: String,
    /// Largest magnitude of a weight.
    pub weight_amax: f32,
    /// Largest magnitude of an input.
    pub activation_amax: f32,
    /// Median over the tokens of the largest magnitude of each.
    pub median_token_amax: f32,
    /// Share of tokens that are clipped at the chosen bound.
    pub clipped: f64,
    /// Of the outputs, in FP8 at the chosen bound: root mean square of the difference to bf16's over that of bf16's. None: not
    /// measured, of layers that stay as they are where the bound is not the one that was measured with.
    pub error: Option<f64>,
    /// The same with nothing clipped.
    pub error_unclipped: f64,
}

/// Runs `prompts` (token ids, cut to [`MAX_PROMPT_TOKENS`] each and [`MAX_TOKENS`] in all) through the checkpoint in `model`,
/// which is in bf16, f16 or f32, and chooses for `layout`, whose own bound is not looked at. One layer is in memory at a time,
/// beside the inputs of its linears.
pub fn calibrate(
    model: &Path,
    layout: Layout,
    by_hand: &ByHand,
    prompts: &[Vec<u32>],
    threads: usize,
    progress: &dyn Progress,
) -> Result<Calibration, ConvertError> {
    let checkpoint = Checkpoint::open(model)?;
    let config = checkpoint.config();
    if config.quantization.is_some() {
        let what = "is already quantized: start from what it was made of";
        return Err(ConvertError::input(&model.join("config.json"), what));
    }
    if let Some(bound) = by_hand.bound {
        check_bound(f64::from(bound))?;
    }
    let prompts = prompts::cut(prompts, config.context_length);
    let tokens = prompts.iter().map(Vec::len).sum();
    if tokens == 0 {
        let what = "there is no prompt of at least one token".to_owned();
        return Err(ConvertError::Option { option: "--calibrate", what });
    }
    let bound = match layout {
        Layout::FbgemmFp8 { .. } => by_hand.bound.unwrap_or(USUAL_BOUND),
        Layout::CompressedTensors => f32::INFINITY,
    };
    let layer_bytes = layer_bytes(config);
    progress.stage("calibration", layer_bytes * config.layers as u64);
    let how = Measure { prompts: &prompts, linears: layout.linears(), bound, threads };
    let mut seen = Vec::with_capacity(config.layers);
    let measured = measure(&checkpoint, &how, |layer| {
        seen.push(layer);
        progress.advance(layer_bytes);
    });
    measured.map_err(|error| match error {
        MeasureError::Checkpoint(error) => error.into(),
        MeasureError::Prompt(what) => ConvertError::Option { option: "--calibrate", what },
        error @ (MeasureError::Load(_) | MeasureError::Collective(_) | MeasureError::Threads(_)) => {
            ConvertError::input(model, error.to_string())
        }
    })?;
    let mut layers: Vec<_> = seen.iter().map(LayerMeasurement::new).collect();
    let choice = choose(layout, &layers, by_hand);
    let chosen = choice.bound.map_or(f32::INFINITY, |bound| bound.value);
    for (layer, seen) in layers.iter_mut().zip(&seen) {
        for (linear, seen) in layer.linears.iter_mut().zip(&seen.linears) {
            linear.bound(seen, bound, chosen);
        }
    }
    Ok(Calibration { prompts: prompts.len(), tokens, layers, choice })
}

impl Calibration {
    /// What to make of it, with this report beside the weights.
    pub fn quantization(&self, layout: Layout) -> Quantization {
        let layout = match (layout, self.choice.bound) {
            (Layout::FbgemmFp8 { .. }, Some(Bound { value, reason: _ })) => {
                Layout::FbgemmFp8 { activation_scale_ub: f64::from(value) }
            }
            (other, _) => other,
        };
        let keep_layers = Some(self.choice.kept.keys().copied().collect());
        Quantization { layout, keep_layers, report: Some(self.to_json(layout)) }
    }
}

impl LayerMeasurement {
    fn new(seen: &SeenLayer) -> Self {
        let SeenLayer { layer, seconds, linears } = seen;
        let linears = linears.iter().map(|linear| LinearMeasurement::new(*layer, linear)).collect();
        Self { layer: *layer, seconds: *seconds, linears }
    }
}

impl LinearMeasurement {
    fn new(layer: usize, seen: &SeenLinear) -> Self {
        let SeenLinear { linear, weight_amax, token_amax, error, error_unclipped } = seen;
        let module = linear.module(layer);
        let name = module.strip_prefix(&format!("model.layers.{layer}.")).unwrap_or(&module);
        let mut sorted = token_amax.clone();
        sorted.sort_by(f32::total_cmp);
        Self {
            linear: name.to_owned(),
            weight_amax: *weight_amax,
            activation_amax: sorted.last().copied().unwrap_or(0.0),
            median_token_amax: sorted.get(sorted.len() / 2).copied().unwrap_or(0.0),
            clipped: 0.0,
            error: Some(*error),
            error_unclipped: *error_unclipped,
        }
    }

    /// Makes it what it is at the bound `chosen`; it was measured at `measured`.
    fn bound(&mut self, seen: &SeenLinear, measured: f32, chosen: f32) {
        let clipped = seen.token_amax.iter().filter(|amax| **amax > chosen).count();
        self.clipped = clipped as f64 / seen.token_amax.len().max(1) as f64;
        self.error = if clipped == 0 {
            Some(seen.error_unclipped)
        } else {
            (measured.to_bits() == chosen.to_bits()).then_some(seen.error)
        };
    }

    #[cfg(test)]
    fn even(linear: &str, amax: f32, error: f64) -> Self {
        Self {
            linear: linear.to_owned(),
            weight_amax: 1.0,
            activation_amax: amax,
            median_token_amax: amax,
            clipped: 0.0,
            error: Some(error),
            error_unclipped: error,
        }
    }
}

/// Of its linears in bf16: what progress is told in.
fn layer_bytes(config: &ModelConfig) -> u64 {
    Linear::ALL
        .iter()
        .map(|linear| linear.shape(config))
        .map(|[rows, columns]| 2 * (rows * columns) as u64)
        .sum()
}
