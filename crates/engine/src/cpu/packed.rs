//! Weights of a linear in the order the kernels read them, and the product with any number of rows.
//!
//! Outputs are grouped into panels of [`PANEL`] lanes; a panel holds, for each input in turn, that input's weight of every
//! lane. Each output is one chain of additions over the inputs in order, by the same instructions whatever the number of
//! rows: one row or many give the same bits.

use rayon::prelude::*;

use super::isa::{Arithmetic, Isa, Kernel, LANES, Stored};

/// Outputs of a panel: two vectors.
pub(crate) const PANEL: usize = VECTORS * LANES;
const VECTORS: usize = 2;

/// Rows that are multiplied at once with one panel: 12 accumulators of 8 lanes, two vectors of weights and one input fill
/// the 16 registers of AVX2.
const ROW_TILE: usize = 6;

/// Panels that are multiplied at once with one row, to hide the latency of its additions.
const PANEL_TILE: usize = 4;

/// Weights below which threads cost more than they save.
const PARALLEL_FROM: usize = 1 << 15;

/// A weight matrix `[outputs, inputs]`, in panels.
pub(crate) struct Packed {
    outputs: usize,
    inputs: usize,
    weights: Weights,
}

enum Weights {
    Bf16(Vec<[u16; PANEL]>),
    F32(Vec<[f32; PANEL]>),
    /// Codes, none of them NaN.
    E4m3(Vec<[u8; PANEL]>),
}

/// A format of stored weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Bf16,
    F32,
    E4m3,
}

/// Fills panels from rows of weights as they come.
pub(crate) struct Packer {
    packed: Packed,
    next_output: usize,
}

impl Packer {
    pub(crate) fn new(outputs: usize, inputs: usize, format: Format) -> Self {
        let vectors = outputs.div_ceil(PANEL) * inputs;
        let weights = match format {
            Format::Bf16 => Weights::Bf16(vec![[0; PANEL]; vectors]),
            Format::F32 => Weights::F32(vec![[0.0; PANEL]; vectors]),
            Format::E4m3 => Weights::E4m3(vec![[0; PANEL]; vectors]),
        };
        Self { packed: Packed { outputs, inputs, weights }, next_output: 0 }
    }

    /// Takes the next output's weights, little endian, in the packer's format.
    pub(crate) fn push(&mut self, row: &[u8]) {
        let (panel, lane) = (self.next_output / PANEL, self.next_output % PANEL);
        let inputs = self.packed.inputs;
        let vectors = panel * inputs..(panel + 1) * inputs;
        match &mut self.packed.weights {
            Weights::Bf16(weights) => {
                for (vector, bytes) in weights[vectors].iter_mut().zip(row.as_chunks().0) {
                    vector[lane] = u16::from_le_bytes(*bytes);
                }
            }
            Weights::F32(weights) => {
                for (vector, bytes) in weights[vectors].iter_mut().zip(row.as_chunks().0) {
                    vector[lane] = f32::from_le_bytes(*bytes);
                }
            }
            Weights::E4m3(weights) => {
                for (vector, code) in weights[vectors].iter_mut().zip(row) {
                    vector[lane] = *code;
                }
            }
        }
        self.next_output += 1;
    }

    /// The weights; outputs not pushed are zero.
    pub(crate) fn finish(self) -> Packed {
        self.packed
    }
}

impl Packed {
    pub(crate) fn outputs(&self) -> usize {
        self.outputs
    }

    pub(crate) fn inputs(&self) -> usize {
        self.inputs
    }

    pub(crate) fn bytes(&self) -> usize {
        match &self.weights {
            Weights::Bf16(weights) => size_of_val(weights.as_slice()),
            Weights::F32(weights) => size_of_val(weights.as_slice()),
            Weights::E4m3(weights) => size_of_val(weights.as_slice()),
        }
    }

    /// `x W^T`: `x` is `[rows, inputs]`, row-major, the result is `[panel, row, lane]`.
    pub(crate) fn multiply(&self, isa: Isa, x: &[f32]) -> Vec<[f32; PANEL]> {
        match &self.weights {
            Weights::Bf16(weights) => self.multiply_panels(isa, weights, x),
            Weights::F32(weights) => self.multiply_panels(isa, weights, x),
            Weights::E4m3(weights) => self.multiply_panels(isa, weights, x),
        }
    }

    fn multiply_panels<W: Stored>(&self, isa: Isa, weights: &[[W; PANEL]], x: &[f32]) -> Vec<[f32; PANEL]> {
        let rows = x.len() / self.inputs;
        let panels = self.outputs.div_ceil(PANEL);
        // In this order threads write apart from each other.
        let mut lanes = vec![[0.0; PANEL]; panels * rows];
        let threads = rayon::current_num_threads();
        let alone = threads == 1
            || rayon::current_thread_index().is_none()
            || rows * self.outputs * self.inputs < PARALLEL_FROM;
        let task = if alone { panels } else { panels.div_ceil(4 * threads).next_multiple_of(PANEL_TILE) };
        let work = |(weights, out): (&[[W; PANEL]], &mut [[f32; PANEL]])| {
            isa.run(Multiply { weights, x, inputs: self.inputs, out });
        };
        if alone {
            work((weights, &mut lanes));
        } else {
            weights.par_chunks(task * self.inputs).zip(lanes.par_chunks_mut(task * rows)).for_each(work);
        }
        lanes
    }

    /// The weights of one output, as f32: a row of an embedding that is also the output head.
    pub(crate) fn read_output(&self, output: usize, into: &mut [f32]) {
        let (panel, lane) = (output / PANEL, output % PANEL);
        let vectors = panel * self.inputs..(panel + 1) * self.inputs;
        match &self.weights {
            Weights::Bf16(weights) => decode_lane(&weights[vectors], lane, into),
            Weights::F32(weights) => decode_lane(&weights[vectors], lane, into),
            Weights::E4m3(weights) => decode_lane(&weights[vectors], lane, into),
        }
    }
}

fn decode_lane<W: Stored>(vectors: &[[W; PANEL]], lane: usize, into: &mut [f32]) {
    into.iter_mut().zip(vectors).for_each(|(value, vector)| *value = vector[lane].decode());
}

struct Multiply<'a, W> {
    /// Whole panels.
    weights: &'a [[W; PANEL]],
    x: &'a [f32],
    inputs: usize,
    /// `[panel, row]`.
    out: &'a mut [[f32; PANEL]],
}

impl<W: Stored> Kernel for Multiply<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let Self { weights, x, inputs, out } = self;
        let rows = x.len() / inputs;
        if rows == 1 {
            let tiles = weights.chunks_exact(PANEL_TILE * inputs);
            let rest = tiles.remainder();
            let (whole, last) = out.split_at_mut(out.len() - rest.len() / inputs);
            for (weights, out) in tiles.zip(whole.as_chunks_mut::<PANEL_TILE>().0) {
                *out = row_times_panels::<A, W, PANEL_TILE>(weights, x);
            }
            for (weights, out) in rest.chunks_exact(inputs).zip(last) {
                [*out] = row_times_panels::<A, W, 1>(weights, x);
            }
            return;
        }
        for (weights, out) in weights.chunks_exact(inputs).zip(out.chunks_exact_mut(rows)) {
            let tiles = x.chunks_exact(ROW_TILE * inputs);
            let rest = tiles.remainder();
            let (whole, last) = out.split_at_mut(rows - rest.len() / inputs);
            for (x, out) in tiles.zip(whole.as_chunks_mut::<ROW_TILE>().0) {
                *out = rows_times_panel::<A, W, ROW_TILE>(weights, x);
            }
            match last.len() {
                1 => tail::<A, W, 1>(weights, rest, last),
                2 => tail::<A, W, 2>(weights, rest, last),
                3 => tail::<A, W, 3>(weights, rest, last),
                4 => tail::<A, W, 4>(weights, rest, last),
                5 => tail::<A, W, 5>(weights, rest, last),
                _ => {}
            }
        }
    }
}

#[inline(always)]
fn tail<A: Arithmetic, W: Stored, const ROWS: usize>(
    weights: &[[W; PANEL]],
    x: &[f32],
    out: &mut [[f32; PANEL]],
) {
    for out in out.as_chunks_mut::<ROWS>().0 {
        *out = rows_times_panel::<A, W, ROWS>(weights, x);
    }
}

/// `x` is `[ROWS, inputs]`, `weights` one panel.
#[inline(always)]
fn rows_times_panel<A: Arithmetic, W: Stored, const ROWS: usize>(
    weights: &[[W; PANEL]],
    x: &[f32],
) -> [[f32; PANEL]; ROWS] {
    let inputs = weights.len();
    let x: [&[f32]; ROWS] = std::array::from_fn(|row| &x[row * inputs..][..inputs]);
    let mut sums = [[A::splat(0.0); VECTORS]; ROWS];
    for (input, weights) in weights.iter().enumerate() {
        let weights = decode::<A, W>(weights);
        for row in 0..ROWS {
            let x = A::splat(x[row][input]);
            for vector in 0..VECTORS {
                sums[row][vector] = A::mul_add_lanes(x, weights[vector], sums[row][vector]);
            }
        }
    }
    let mut out = [[0.0; PANEL]; ROWS];
    for row in 0..ROWS {
        out[row] = store::<A>(sums[row]);
    }
    out
}

/// `x` is one row, `weights` are `PANELS` panels.
#[inline(always)]
fn row_times_panels<A: Arithmetic, W: Stored, const PANELS: usize>(
    weights: &[[W; PANEL]],
    x: &[f32],
) -> [[f32; PANEL]; PANELS] {
    let inputs = x.len();
    let panels: [&[[W; PANEL]]; PANELS] = std::array::from_fn(|panel| &weights[panel * inputs..][..inputs]);
    let mut sums = [[A::splat(0.0); VECTORS]; PANELS];
    for (input, &x) in x.iter().enumerate() {
        let x = A::splat(x);
        for panel in 0..PANELS {
            let weights = decode::<A, W>(&panels[panel][input]);
            for vector in 0..VECTORS {
                sums[panel][vector] = A::mul_add_lanes(x, weights[vector], sums[panel][vector]);
            }
        }
    }
    let mut out = [[0.0; PANEL]; PANELS];
    for panel in 0..PANELS {
        out[panel] = store::<A>(sums[panel]);
    }
    out
}

#[inline(always)]
fn decode<A: Arithmetic, W: Stored>(weights: &[W; PANEL]) -> [A::Vector; VECTORS] {
    let (vectors, _) = weights.as_chunks::<LANES>();
    [W::load::<A>(&vectors[0]), W::load::<A>(&vectors[1])]
}

#[inline(always)]
fn store<A: Arithmetic>(sums: [A::Vector; VECTORS]) -> [f32; PANEL] {
    let mut lanes = [0.0; PANEL];
    for (lanes, sum) in lanes.as_chunks_mut::<LANES>().0.iter_mut().zip(sums) {
        *lanes = A::store(sum);
    }
    lanes
}
