//! Linears as the model uses them: those that read the same input are one, FP8 inputs are quantized per token.

use std::sync::{Mutex, PoisonError};

use half::bf16;
use herd_model::Dtype;

use super::e4m3;
use super::isa::Isa;
use super::packed::{PANEL, Packed};
use crate::clipped::RowsClipped;
use crate::collective::{Collective, CollectiveError};

/// How numbers are computed, the same for every linear of a model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Numerics {
    pub(crate) isa: Isa,
    /// Of activations that enter bf16 weights.
    pub(crate) dtype: Dtype,
    /// Upper bound on a token's largest magnitude before an FP8 linear.
    pub(crate) activation_scale_ub: f32,
}

/// One or more linears of the same input; their outputs stand one after the other.
pub(crate) struct Projection {
    first: Part,
    others: Vec<Part>,
    /// Counts rows that the bound of FP8 inputs clips.
    clipped: RowsClipped,
    /// All inputs there were, for calibration.
    kept_inputs: Option<Mutex<Vec<f32>>>,
}

/// Outputs in a row that are stored in one format.
pub(crate) struct Part {
    pub(crate) packed: Packed,
    pub(crate) format: PartFormat,
}

pub(crate) enum PartFormat {
    Bf16,
    F32,
    Fp8 {
        /// One an output.
        scales: Vec<f32>,
        /// Of the inputs; none: it follows from each token.
        input_scale: Option<f32>,
    },
}

impl Projection {
    /// All parts have the same number of inputs.
    pub(crate) fn new(first: Part, others: Vec<Part>, clipped: RowsClipped) -> Self {
        Self { first, others, clipped, kept_inputs: None }
    }

    /// From now on, what goes in is kept for [`Projection::take_inputs`].
    pub(crate) fn keep_inputs(&mut self) {
        self.kept_inputs = Some(Mutex::default());
    }

    /// `[rows, inputs]`, of all that went in since.
    pub(crate) fn take_inputs(&self) -> Vec<f32> {
        let kept = self.kept_inputs.as_ref().map(|kept| kept.lock().unwrap_or_else(PoisonError::into_inner));
        kept.map(|mut kept| std::mem::take(&mut *kept)).unwrap_or_default()
    }

    /// Weights of the first part.
    pub(crate) fn first(&self) -> &Packed {
        &self.first.packed
    }

    fn parts(&self) -> impl Iterator<Item = &Part> {
        std::iter::once(&self.first).chain(&self.others)
    }

    pub(crate) fn bytes(&self) -> usize {
        let scales = |part: &Part| match &part.format {
            PartFormat::Fp8 { scales, input_scale: _ } => size_of_val(scales.as_slice()),
            PartFormat::Bf16 | PartFormat::F32 => 0,
        };
        self.parts().map(|part| part.packed.bytes() + scales(part)).sum()
    }

    /// `[rows, inputs]` to `[rows, outputs]`, both row-major. A linear that is split by inputs gives its group: the largest
    /// magnitude of a token is that of all ranks' slices together.
    pub(crate) fn forward(
        &self,
        numerics: Numerics,
        x: &[f32],
        split_by_inputs: Option<&dyn Collective>,
    ) -> Result<Vec<f32>, CollectiveError> {
        let Numerics { isa, dtype, activation_scale_ub } = numerics;
        if let Some(kept) = &self.kept_inputs {
            kept.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(x);
        }
        let inputs = self.first.packed.inputs();
        let rows = x.len() / inputs;
        if rows == 0 {
            // No logits are wanted of this step.
            return Ok(vec![]);
        }
        let width = self.parts().map(|part| part.packed.outputs()).sum();
        let mut y = vec![0.0; rows * width];
        let mut rounded = None;
        // By the scale that is stored, if any: parts with the same one share it.
        let mut quantized: Vec<(Option<u32>, Quantized)> = Vec::new();
        let mut first = 0;
        for Part { packed, format } in self.parts() {
            let lanes = match format {
                PartFormat::Bf16 if dtype == Dtype::Bf16 => {
                    packed.multiply(isa, rounded.get_or_insert_with(|| round_to_bf16(x)))
                }
                PartFormat::Bf16 | PartFormat::F32 => packed.multiply(isa, x),
                PartFormat::Fp8 { scales, input_scale } => {
                    let stored = input_scale.map(f32::to_bits);
                    if quantized.iter().all(|(scale, _)| *scale != stored) {
                        let new = match input_scale {
                            Some(scale) => quantize_by(x, inputs, *scale),
                            None => quantize(x, inputs, activation_scale_ub, split_by_inputs)?,
                        };
                        self.clipped.add(new.clipped);
                        quantized.push((stored, new));
                    }
                    let Some((_, Quantized { values, scales: x_scales, clipped: _ })) =
                        quantized.iter().find(|(scale, _)| *scale == stored)
                    else {
                        continue;
                    };
                    let mut lanes = packed.multiply(isa, values);
                    rescale(&mut lanes, x_scales, scales);
                    lanes
                }
            };
            unpack(&lanes, rows, packed.outputs(), &mut y, width, first);
            first += packed.outputs();
        }
        Ok(y)
    }
}

/// `[panel, row, lane]` to columns `first..first + outputs` of `[rows, width]`.
fn unpack(lanes: &[[f32; PANEL]], rows: usize, outputs: usize, y: &mut [f32], width: usize, first: usize) {
    for (panel, lanes) in lanes.chunks_exact(rows).enumerate() {
        let column = panel * PANEL;
        let count = PANEL.min(outputs - column);
        for (row, lanes) in lanes.iter().enumerate() {
            y[row * width + first + column..][..count].copy_from_slice(&lanes[..count]);
        }
    }
}

fn rescale(lanes: &mut [[f32; PANEL]], x_scales: &[f32], weight_scales: &[f32]) {
    for (lanes, weight_scales) in lanes.chunks_exact_mut(x_scales.len()).zip(weight_scales.chunks(PANEL)) {
        for (lanes, x_scale) in lanes.iter_mut().zip(x_scales) {
            for (value, weight_scale) in lanes.iter_mut().zip(weight_scales) {
                *value = *value * x_scale * weight_scale;
            }
        }
    }
}

fn round_to_bf16(values: &[f32]) -> Vec<f32> {
    values.iter().map(|&value| bf16::from_f32(value).to_f32()).collect()
}

/// Tokens as e4m3 codes, decoded, and the scale of each.
pub(crate) struct Quantized {
    /// `[rows, inputs]`.
    pub(crate) values: Vec<f32>,
    /// One a row.
    pub(crate) scales: Vec<f32>,
    /// Rows whose largest magnitude is above the bound.
    pub(crate) clipped: usize,
}

fn quantize(
    x: &[f32],
    inputs: usize,
    bound: f32,
    split_by_inputs: Option<&dyn Collective>,
) -> Result<Quantized, CollectiveError> {
    let mut largest: Vec<f32> =
        x.chunks_exact(inputs).map(|row| row.iter().fold(0.0, |largest, x| x.abs().max(largest))).collect();
    if let Some(group) = split_by_inputs {
        group.all_reduce_max(&mut largest)?;
    }
    let clipped = largest.iter().filter(|largest| **largest > bound).count();
    let scales: Vec<f32> = largest.into_iter().map(|largest| activation_scale(largest, bound)).collect();
    let mut values = Vec::with_capacity(x.len());
    for (row, scale) in x.chunks_exact(inputs).zip(&scales) {
        values.extend(row.iter().map(|x| e4m3::decode(e4m3::encode(x / scale))));
    }
    Ok(Quantized { values, scales, clipped })
}

/// With one scale for all tokens. What is above the largest code times it is clipped.
fn quantize_by(x: &[f32], inputs: usize, scale: f32) -> Quantized {
    let clips = |row: &[f32]| row.iter().any(|x| x.abs() > scale * e4m3::MAX);
    Quantized {
        values: x.iter().map(|x| e4m3::decode(e4m3::encode(x / scale))).collect(),
        scales: vec![scale; x.len() / inputs],
        clipped: x.chunks_exact(inputs).filter(|row| clips(row)).count(),
    }
}

/// Scale of a token whose largest magnitude is `largest`. Source: FBGEMM's `quantize_fp8_per_row`.
pub(crate) fn activation_scale(largest: f32, bound: f32) -> f32 {
    const SMALLEST: f32 = 1.0 / (e4m3::MAX * 512.0);
    (largest.min(bound) / e4m3::MAX).max(SMALLEST)
}
