//! Linears as the model uses them: those that read the same input are one, FP8 inputs are quantized per token.

use std::sync::{Mutex, PoisonError};

use herd_model::Dtype;

use super::e4m3;
use super::elementwise::{Largest, RoundToBf16, RoundToE4m3, for_rows, rounded_to_bf16};
use super::isa::{Arithmetic, Isa, Kernel, LANES};
use super::memory::{Aligned, Number};
use super::packed::{Packed, Rows, padded};
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

    /// Outputs of all parts.
    pub(crate) fn outputs(&self) -> usize {
        self.parts().map(|part| part.packed.outputs()).sum()
    }

    /// Multiplies `[rows, inputs]`, row-major. A linear that is split by inputs gives its group: the largest magnitude of a
    /// token is that of all ranks' slices together.
    pub(crate) fn multiply<'a>(
        &'a self,
        numerics: Numerics,
        x: &[f32],
        split_by_inputs: Option<&dyn Collective>,
        work: &'a mut LinearWork,
    ) -> Result<Outputs<'a>, CollectiveError> {
        let Numerics { isa, dtype, activation_scale_ub } = numerics;
        if let Some(kept) = &self.kept_inputs {
            kept.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(x);
        }
        let inputs = self.first.packed.inputs();
        let count = x.len() / inputs;
        let LinearWork { bf16, wide, scales, lanes } = work;
        let panels: usize = self.parts().map(|part| part.packed.panels()).sum();
        let mut rest = lanes.resize(count * panels * LANES);
        if count == 0 {
            // No logits are wanted of this step.
            return Ok(Outputs { projection: self, count, lanes, scales });
        }
        let mut input = Input { isa, x, inputs, bf16, wide, holds: None };
        for Part { packed, format } in self.parts() {
            let rows = match format {
                PartFormat::Bf16 if dtype == Dtype::Bf16 => input.rounded(),
                PartFormat::Bf16 | PartFormat::F32 => input.plain(),
                PartFormat::Fp8 { scales: _, input_scale: Some(scale) } => {
                    self.clipped.add(input.clipped_by(*scale));
                    input.quantized(Scales::Stored(*scale))
                }
                PartFormat::Fp8 { scales: _, input_scale: None } => {
                    if input.holds != Some(Holds::Quantized(None)) {
                        self.clipped.add(find_scales(
                            isa,
                            x,
                            inputs,
                            activation_scale_ub,
                            split_by_inputs,
                            scales,
                        )?);
                    }
                    input.quantized(Scales::PerToken(scales))
                }
            };
            let (own, others) = rest.split_at_mut(count * packed.panels() * LANES);
            packed.multiply(isa, rows, count, own);
            rest = others;
        }
        Ok(Outputs { projection: self, count, lanes, scales })
    }

    /// [`Projection::multiply`] to `[rows, outputs]`.
    pub(crate) fn forward(
        &self,
        numerics: Numerics,
        x: &[f32],
        split_by_inputs: Option<&dyn Collective>,
        work: &mut LinearWork,
        y: &mut Vec<f32>,
    ) -> Result<(), CollectiveError> {
        let outputs = self.multiply(numerics, x, split_by_inputs, work)?;
        let width = self.outputs();
        y.resize(outputs.count * width, 0.0);
        for_rows(y, width, |row, y| outputs.read(numerics.isa, row, y));
        Ok(())
    }
}

/// Memory of a product that the next one uses again.
#[derive(Default)]
pub(crate) struct LinearWork {
    /// Rows of inputs, as bits of bf16.
    bf16: Aligned<u16>,
    /// Rows of inputs, as f32.
    wide: Aligned<f32>,
    /// Of FP8 inputs, one a row.
    scales: Vec<f32>,
    /// `[part, panel, row, lane]`.
    lanes: Aligned<f32>,
}

/// What a product has given.
pub(crate) struct Outputs<'a> {
    projection: &'a Projection,
    count: usize,
    lanes: &'a [f32],
    scales: &'a [f32],
}

impl Outputs<'_> {
    /// Copies the outputs of a row.
    pub(crate) fn read(&self, isa: Isa, row: usize, y: &mut [f32]) {
        let mut lanes = self.lanes;
        let mut y = y;
        for Part { packed, format } in self.projection.parts() {
            let (own, others) = lanes.split_at(self.count * packed.panels() * LANES);
            let (into, left) = y.split_at_mut(packed.outputs());
            let scales = match format {
                PartFormat::Bf16 | PartFormat::F32 => None,
                PartFormat::Fp8 { scales, input_scale } => {
                    let x_scale = input_scale.or_else(|| self.scales.get(row).copied());
                    Some((x_scale.unwrap_or(1.0), scales.as_slice()))
                }
            };
            isa.run(ReadRow { lanes: own, row, count: self.count, scales, y: into });
            (lanes, y) = (others, left);
        }
    }
}

struct ReadRow<'a> {
    /// `[panel, row, lane]`.
    lanes: &'a [f32],
    row: usize,
    count: usize,
    /// Of the row, and of each output.
    scales: Option<(f32, &'a [f32])>,
    y: &'a mut [f32],
}

impl Kernel for ReadRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let Self { lanes, row, count, scales, y } = self;
        let vectors = lanes.as_chunks::<LANES>().0.iter().skip(row).step_by(count);
        match scales {
            None => {
                for (y, vector) in y.chunks_mut(LANES).zip(vectors) {
                    match y.as_mut_array() {
                        Some(y) => *y = *vector,
                        None => y.iter_mut().zip(vector).for_each(|(y, value)| *y = *value),
                    }
                }
            }
            Some((x_scale, scales)) => {
                for ((y, vector), scales) in y.chunks_mut(LANES).zip(vectors).zip(scales.chunks(LANES)) {
                    for ((y, value), scale) in y.iter_mut().zip(vector).zip(scales) {
                        *y = value * x_scale * scale;
                    }
                }
            }
        }
    }
}

/// Rows of a product's inputs, made ready for one part after the other.
struct Input<'a> {
    isa: Isa,
    /// `[rows, inputs]`.
    x: &'a [f32],
    inputs: usize,
    bf16: &'a mut Aligned<u16>,
    wide: &'a mut Aligned<f32>,
    holds: Option<Holds>,
}

/// What the rows that were made last are.
#[derive(Clone, Copy, PartialEq)]
enum Holds {
    Plain,
    Rounded,
    /// By a scale that is stored, or by those of the tokens.
    Quantized(Option<f32>),
}

#[derive(Clone, Copy)]
enum Scales<'a> {
    Stored(f32),
    PerToken(&'a [f32]),
}

impl Input<'_> {
    /// As they are.
    fn plain(&mut self) -> Rows<'_> {
        let Self { x, inputs, .. } = *self;
        self.wide(Holds::Plain, |row, y| y.copy_from_slice(&x[row * inputs..][..inputs]))
    }

    /// Rounded to bf16.
    fn rounded(&mut self) -> Rows<'_> {
        let Self { isa, x, inputs, .. } = *self;
        let of = |row: usize| &x[row * inputs..][..inputs];
        if isa.has_bf16() {
            return self.bf16(Holds::Rounded, |row, y| isa.run(RoundToBf16 { x: of(row), y }));
        }
        self.wide(Holds::Rounded, |row, y| {
            y.iter_mut().zip(of(row)).for_each(|(y, x)| *y = rounded_to_bf16(*x));
        })
    }

    /// As numbers of e4m3.
    fn quantized(&mut self, scales: Scales<'_>) -> Rows<'_> {
        let Self { isa, x, inputs, .. } = *self;
        let of = |row: usize| &x[row * inputs..][..inputs];
        let (holds, scale): (_, &(dyn Fn(usize) -> f32 + Sync)) = match scales {
            Scales::Stored(scale) => (Holds::Quantized(Some(scale)), &move |_| scale),
            Scales::PerToken(scales) => (Holds::Quantized(None), &|row| scales[row]),
        };
        if isa.has_bf16() {
            return self.bf16(holds, |row, y| isa.run(RoundToE4m3 { x: of(row), scale: scale(row), y }));
        }
        self.wide(holds, |row, y| isa.run(RoundToE4m3 { x: of(row), scale: scale(row), y }))
    }

    /// Rows with a magnitude above the largest code times a scale.
    fn clipped_by(&self, scale: f32) -> usize {
        let largest = |row| self.isa.run(Largest(row));
        self.x.chunks_exact(self.inputs).filter(|row| largest(row) > scale * e4m3::MAX).count()
    }

    fn bf16(&mut self, holds: Holds, make: impl Fn(usize, &mut [u16]) + Sync) -> Rows<'_> {
        make_rows(self.bf16, self.x.len() / self.inputs, self.inputs, self.holds == Some(holds), make);
        self.holds = Some(holds);
        Rows::Bf16(self.bf16)
    }

    fn wide(&mut self, holds: Holds, make: impl Fn(usize, &mut [f32]) + Sync) -> Rows<'_> {
        make_rows(self.wide, self.x.len() / self.inputs, self.inputs, self.holds == Some(holds), make);
        self.holds = Some(holds);
        Rows::F32(self.wide)
    }
}

/// Has `make` fill each row, unless they are there already. What is beside the inputs is zero.
fn make_rows<T: Number>(
    rows: &mut Aligned<T>,
    count: usize,
    inputs: usize,
    there: bool,
    make: impl Fn(usize, &mut [T]) + Sync,
) {
    if !there {
        let width = padded(inputs);
        for_rows(rows.resize(count * width), width, |row, numbers| {
            let (numbers, beside) = numbers.split_at_mut(inputs);
            make(row, numbers);
            beside.fill(T::default());
        });
    }
}

/// The scale of each token. Returns how many have a magnitude above the bound.
fn find_scales(
    isa: Isa,
    x: &[f32],
    inputs: usize,
    bound: f32,
    split_by_inputs: Option<&dyn Collective>,
    scales: &mut Vec<f32>,
) -> Result<usize, CollectiveError> {
    scales.clear();
    scales.extend(x.chunks_exact(inputs).map(|row| isa.run(Largest(row))));
    if let Some(group) = split_by_inputs {
        group.all_reduce_max(scales)?;
    }
    let clipped = scales.iter().filter(|largest| **largest > bound).count();
    for scale in scales {
        *scale = activation_scale(*scale, bound);
    }
    Ok(clipped)
}

/// Scale of a token whose largest magnitude is `largest`. Source: FBGEMM's `quantize_fp8_per_row`.
pub(crate) fn activation_scale(largest: f32, bound: f32) -> f32 {
    const SMALLEST: f32 = 1.0 / (e4m3::MAX * 512.0);
    (largest.min(bound) / e4m3::MAX).max(SMALLEST)
}
