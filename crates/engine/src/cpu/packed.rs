//! Weights of a linear in the order the kernels read them, and the product with any number of rows.

use std::cell::RefCell;

use rayon::prelude::*;

use super::isa::{Isa, LANES, PAIR};
use super::memory::{Aligned, Arena};
use super::product::{Bf16Product, Out, PairProduct, Panels};
use super::stored::Stored;

/// Inputs are stored in multiples of this, the last ones zero: as many as the widest instruction takes at once.
const INPUTS: usize = 32;

/// Pairs of weights that are decoded at once, over all panels: half of the nearest cache.
const DECODED_PAIRS: usize = 512;

/// Rows whose product takes as long as reading the weights: threads are done with equal parts at the same time.
const FEW_ROWS: usize = 16;

/// Of weights that are asked for ahead, bytes at most: a part of the second cache.
const MOST_AHEAD: usize = 256 << 10;

/// Products below which threads cost more than they save.
const PARALLEL_FROM: usize = 1 << 15;

/// A weight matrix `[outputs, inputs]`, in panels: `[panel, pair of inputs]`.
pub(crate) struct Packed {
    outputs: usize,
    inputs: usize,
    weights: Weights,
}

enum Weights {
    Bf16(Aligned<u16>),
    F32(Aligned<f32>),
    /// Codes, none of them NaN.
    E4m3(Aligned<u8>),
}

/// What weights are multiplied with: rows of as many numbers as [`padded`] says, those that are no inputs zero.
#[derive(Clone, Copy)]
pub(crate) enum Rows<'a> {
    F32(&'a [f32]),
    /// Bits.
    Bf16(&'a [u16]),
}

/// Inputs with those that are stored beside them.
pub(crate) fn padded(inputs: usize) -> usize {
    inputs.next_multiple_of(INPUTS)
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
    pub(crate) fn new(outputs: usize, inputs: usize, format: Format, arena: &Arena) -> Self {
        let numbers = outputs.div_ceil(LANES) * LANES * padded(inputs);
        let weights = match format {
            Format::Bf16 => Weights::Bf16(arena.take(numbers)),
            Format::F32 => Weights::F32(arena.take(numbers)),
            Format::E4m3 => Weights::E4m3(arena.take(numbers)),
        };
        Self { packed: Packed { outputs, inputs, weights }, next_output: 0 }
    }

    /// Takes the next output's weights, little endian, in the packer's format.
    pub(crate) fn push(&mut self, row: &[u8]) {
        let (output, inputs) = (self.next_output, self.packed.inputs);
        match &mut self.packed.weights {
            Weights::Bf16(weights) => {
                let row = row.as_chunks().0.iter().map(|bytes| u16::from_le_bytes(*bytes));
                place(weights, output, inputs, row);
            }
            Weights::F32(weights) => {
                let row = row.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
                place(weights, output, inputs, row);
            }
            Weights::E4m3(weights) => place(weights, output, inputs, row.iter().copied()),
        }
        self.next_output += 1;
    }

    /// The weights; outputs not pushed are zero.
    pub(crate) fn finish(self) -> Packed {
        self.packed
    }
}

/// The pairs of the panel that an output is in.
fn panel<W>(weights: &[W], output: usize, inputs: usize) -> &[[W; PAIR]] {
    let size = padded(inputs) * LANES;
    weights[output / LANES * size..][..size].as_chunks().0
}

fn place<W: Stored>(weights: &mut [W], output: usize, inputs: usize, row: impl Iterator<Item = W>) {
    let size = padded(inputs) * LANES;
    let pairs = weights[output / LANES * size..][..size].as_chunks_mut::<PAIR>().0;
    let [first, second] = [0, 1].map(|second| W::place(output % LANES, second));
    let mut row = row;
    for pair in pairs.iter_mut().take(inputs.div_ceil(2)) {
        pair[first] = row.next().unwrap_or_default();
        pair[second] = row.next().unwrap_or_default();
    }
}

impl Packed {
    pub(crate) fn outputs(&self) -> usize {
        self.outputs
    }

    pub(crate) fn inputs(&self) -> usize {
        self.inputs
    }

    pub(crate) fn panels(&self) -> usize {
        self.outputs.div_ceil(LANES)
    }

    pub(crate) fn bytes(&self) -> usize {
        match &self.weights {
            Weights::Bf16(weights) => size_of_val(&**weights),
            Weights::F32(weights) => size_of_val(&**weights),
            Weights::E4m3(weights) => size_of_val(&**weights),
        }
    }

    /// `x W^T` of so many rows, as `[panel, row, lane]`. Rows of bf16 are for weights that are no f32, where the CPU has
    /// products of bf16.
    pub(crate) fn multiply(&self, isa: Isa, rows: Rows<'_>, count: usize, out: &mut [f32]) {
        match &self.weights {
            Weights::Bf16(weights) => self.multiply_panels(isa, weights, rows, count, out),
            Weights::F32(weights) => self.multiply_panels(isa, weights, rows, count, out),
            Weights::E4m3(weights) => self.multiply_panels(isa, weights, rows, count, out),
        }
    }

    fn multiply_panels<W: Weight>(
        &self,
        isa: Isa,
        weights: &[W],
        rows: Rows<'_>,
        count: usize,
        out: &mut [f32],
    ) {
        let inputs = padded(self.inputs);
        let at_once = isa.panels_at_once(count);
        // In this order threads write apart from each other.
        let threads = rayon::current_num_threads();
        let alone = threads == 1
            || rayon::current_thread_index().is_none()
            || count * self.outputs * inputs < PARALLEL_FROM;
        let tasks = if count <= FEW_ROWS { threads } else { 2 * threads };
        let task = if alone { self.panels() } else { self.panels().div_ceil(tasks) };
        let task = task.next_multiple_of(at_once);
        let work = |(weights, out): (&[W], &mut [f32])| {
            let weights = weights.chunks(at_once * inputs * LANES);
            for (weights, out) in weights.zip(out.chunks_mut(at_once * count * LANES)) {
                let weights = Panels {
                    values: weights.as_chunks().0,
                    pair_stride: 1,
                    panel_stride: inputs / 2,
                    count: weights.len() / (inputs * LANES),
                    pairs: inputs / 2,
                };
                let out = Out { values: out, row_stride: LANES, panel_stride: count * LANES };
                match rows {
                    Rows::F32(rows) => isa.run(PairProduct {
                        rows,
                        row_stride: inputs,
                        count,
                        panels: weights,
                        out,
                        add: false,
                    }),
                    Rows::Bf16(rows) => {
                        W::multiply_bf16(isa, weights, Bf16Rows { rows, row_stride: inputs, count }, out);
                    }
                }
            }
        };
        let (task_weights, task_out) = (task * inputs * LANES, task * count * LANES);
        if alone {
            work((weights, out));
        } else {
            weights.par_chunks(task_weights).zip(out.par_chunks_mut(task_out)).for_each(work);
        }
    }

    /// The weights of one output, as f32: a row of an embedding that is also the output head.
    pub(crate) fn read_output(&self, output: usize, into: &mut [f32]) {
        match &self.weights {
            Weights::Bf16(weights) => self.decode(weights, output, into),
            Weights::F32(weights) => self.decode(weights, output, into),
            Weights::E4m3(weights) => self.decode(weights, output, into),
        }
    }

    fn decode<W: Stored>(&self, weights: &[W], output: usize, into: &mut [f32]) {
        let pairs = panel(weights, output, self.inputs);
        for (input, value) in into.iter_mut().enumerate() {
            *value = pairs[input / 2][W::place(output % LANES, input % 2)].decode();
        }
    }
}

/// Rows of bits of bf16.
struct Bf16Rows<'a> {
    rows: &'a [u16],
    row_stride: usize,
    count: usize,
}

/// Weights that rows are multiplied with.
trait Weight: Stored {
    /// The product with rows of bf16, where the CPU has it.
    fn multiply_bf16(isa: Isa, weights: Panels<'_, Self>, rows: Bf16Rows<'_>, out: Out<'_>);
}

impl Weight for u16 {
    fn multiply_bf16(isa: Isa, weights: Panels<'_, u16>, rows: Bf16Rows<'_>, out: Out<'_>) {
        let Bf16Rows { rows, row_stride, count } = rows;
        isa.multiply_bf16(Bf16Product { rows, row_stride, count, panels: weights, out, add: false });
    }
}

impl Weight for u8 {
    /// Some inputs at a time are decoded, for all rows.
    fn multiply_bf16(isa: Isa, weights: Panels<'_, u8>, rows: Bf16Rows<'_>, out: Out<'_>) {
        thread_local! {
            static DECODED: RefCell<Aligned<u16>> = RefCell::default();
        }
        let Bf16Rows { rows, row_stride, count } = rows;
        let at_once = DECODED_PAIRS / weights.count.next_power_of_two();
        // As far as the panels that come after these; of long ones not so far.
        let ahead = (weights.count * weights.pairs * PAIR).min(MOST_AHEAD);
        DECODED.with_borrow_mut(|decoded| {
            let decoded = decoded.resize(DECODED_PAIRS * PAIR);
            for from in (0..weights.pairs).step_by(at_once) {
                let pairs = at_once.min(weights.pairs - from);
                for (panel, into) in (0..weights.count).zip(decoded.chunks_exact_mut(pairs * PAIR)) {
                    isa.widen_e4m3(weights.of(panel)[from..from + pairs].as_flattened(), into, ahead);
                }
                isa.multiply_bf16(Bf16Product {
                    rows: &rows[2 * from..],
                    row_stride,
                    count,
                    panels: Panels {
                        values: decoded.as_chunks().0,
                        pair_stride: 1,
                        panel_stride: pairs,
                        count: weights.count,
                        pairs,
                    },
                    out: Out {
                        values: &mut *out.values,
                        row_stride: out.row_stride,
                        panel_stride: out.panel_stride,
                    },
                    add: from > 0,
                });
            }
        });
    }
}

/// Never asked for: weights of f32 are multiplied with rows of f32.
impl Weight for f32 {
    fn multiply_bf16(isa: Isa, weights: Panels<'_, f32>, rows: Bf16Rows<'_>, out: Out<'_>) {
        let Bf16Rows { rows, row_stride, count } = rows;
        let rows: Vec<f32> = rows.iter().map(|bits| bits.decode()).collect();
        isa.run(PairProduct { rows: &rows, row_stride, count, panels: weights, out, add: false });
    }
}
