//! Attention of each query over the pages of its sequence, block by block. Queries are rows of products with the keys and
//! the values of a block as they lie in the cache. A query goes through the blocks in order, whatever stands beside it: what
//! is masked adds exactly nothing. So it does not depend on what else is in the step or on how its prompt was cut. Source of
//! the running maximum and sum: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.

use std::cell::RefCell;

use herd_model::BLOCK_TOKENS;
use rayon::prelude::*;

use super::elementwise::{RoundToBf16, add_lanes, exp};
use super::isa::{Arithmetic, Isa, Kernel, LANES};
use super::memory::Aligned;
use super::packed::padded;
use super::pages::{KvElement, KvRows, Slab};
use super::product::Out;

/// Multiplications below which threads cost more than they save.
const PARALLEL_FROM: usize = 1 << 16;

/// Rows that are multiplied at once: as many as the widest instructions take.
const ROWS: usize = 32;

/// Tokens of a block that are multiplied at once with their values.
const TOKENS: usize = 32;

/// The queries of one sequence in a step and the pages they attend to.
pub(crate) struct Queries<'a, T> {
    /// `[rows, heads, head_dim]`, row `r` starting at `r * row_stride`.
    pub(crate) rows: &'a [f32],
    pub(crate) row_stride: usize,
    /// Position of row 0; row `r` attends to positions `0..=start + r`.
    pub(crate) start: usize,
    /// Of this rank, in the order of positions.
    pub(crate) blocks: &'a [Slab<'a, T>],
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
}

/// Memory of a thread.
#[derive(Default)]
struct Work {
    /// Rows of queries: `[row, head_dim]`, padded.
    wide: Aligned<f32>,
    bf16: Aligned<u16>,
    /// `[row, token of a block]`: scores, then weights.
    weights: Aligned<f32>,
    weights_bf16: Aligned<u16>,
    /// `[row, head_dim]`, padded: weighted sums of values.
    sums: Aligned<f32>,
    softmax: Vec<Softmax>,
}

impl<T: KvElement> Queries<'_, T> {
    /// Writes `[rows, heads, head_dim]`.
    pub(crate) fn attend(&self, isa: Isa, out: &mut [f32]) {
        thread_local! {
            static WORK: RefCell<Work> = RefCell::default();
        }
        let Self { heads, kv_heads, head_dim, start, .. } = *self;
        let group = heads / kv_heads;
        let rows = out.len() / (heads * head_dim);
        let alone = rayon::current_thread_index().is_none()
            || rayon::current_num_threads() == 1
            || out.len() * (start + rows) < PARALLEL_FROM;
        // Positions that are multiplied at once, with all queries of a KV head. Few are cut by KV heads besides.
        let fair = if alone { rows } else { rows / (2 * rayon::current_num_threads()) };
        let positions = (ROWS / group).min(fair).max(1);
        if positions == 1 {
            let work = |(piece, out): (usize, &mut [f32])| {
                let (row, kv_head) = (piece / kv_heads, piece % kv_heads);
                WORK.with_borrow_mut(|work| self.attend_some(isa, work, row, kv_head, group, out));
            };
            let pieces = group * head_dim;
            if alone {
                out.chunks_exact_mut(pieces).enumerate().for_each(work);
            } else {
                out.par_chunks_exact_mut(pieces).enumerate().for_each(work);
            }
            return;
        }
        let work = |(piece, out): (usize, &mut [f32])| {
            WORK.with_borrow_mut(|work| {
                for kv_head in 0..kv_heads {
                    let out = &mut out[kv_head * group * head_dim..];
                    self.attend_some(isa, work, piece * positions, kv_head, heads, out);
                }
            });
        };
        let pieces = positions * heads * head_dim;
        if alone {
            out.chunks_mut(pieces).enumerate().for_each(work);
        } else {
            out.par_chunks_mut(pieces).enumerate().for_each(work);
        }
    }

    /// Queries of one KV head from row `first` on: as many rows as `out` has, each starting `heads` heads after the one
    /// before.
    fn attend_some(
        &self,
        isa: Isa,
        work: &mut Work,
        first: usize,
        kv_head: usize,
        heads: usize,
        out: &mut [f32],
    ) {
        let Self { rows, row_stride, start, blocks, head_dim, .. } = *self;
        let group = self.heads / self.kv_heads;
        let positions = out.len().div_ceil(heads * head_dim);
        let (count, width) = (positions * group, padded(head_dim));
        let Work { wide, bf16, weights, weights_bf16, sums, softmax } = work;
        let bf16_rows = T::takes_bf16(isa);
        let (wide, bf16) = (wide.resize(count * width), bf16.resize(count * width));
        let (weights, weights_bf16) =
            (weights.resize(count * BLOCK_TOKENS), weights_bf16.resize(count * BLOCK_TOKENS));
        let sums = sums.resize(count * width);
        for row in 0..count {
            let query = (first + row / group) * row_stride + (kv_head * group + row % group) * head_dim;
            let query = &rows[query..][..head_dim];
            let (own, beside) = wide[row * width..][..width].split_at_mut(head_dim);
            own.copy_from_slice(query);
            beside.fill(0.0);
            if bf16_rows {
                let (own, beside) = bf16[row * width..][..width].split_at_mut(head_dim);
                isa.run(RoundToBf16 { x: query, y: own });
                beside.fill(0);
            }
        }
        sums.fill(0.0);
        softmax.clear();
        softmax.resize(count, Softmax::default());
        let scale = 1.0 / (head_dim as f32).sqrt();
        let end = start + first + positions;
        for (block, slab) in (0..end.div_ceil(BLOCK_TOKENS)).zip(blocks) {
            let tokens = (end - block * BLOCK_TOKENS).min(BLOCK_TOKENS);
            let queries = KvRows { wide, bf16, row_stride: width, count };
            let keys = slab.keys(kv_head, tokens.div_ceil(LANES));
            let scores = Out { values: weights, row_stride: BLOCK_TOKENS, panel_stride: LANES };
            T::multiply(isa, queries, keys, scores, false);
            for (row, softmax) in softmax.iter_mut().enumerate() {
                let attended = start + first + row / group + 1;
                let weights = &mut weights[row * BLOCK_TOKENS..][..BLOCK_TOKENS];
                let sums = &mut sums[row * width..][..width];
                let live = attended.saturating_sub(block * BLOCK_TOKENS).min(BLOCK_TOKENS);
                isa.run(Weigh { softmax, weights, live, scale, sums });
                if bf16_rows {
                    let y = &mut weights_bf16[row * BLOCK_TOKENS..][..BLOCK_TOKENS];
                    isa.run(RoundToBf16 { x: weights, y });
                }
            }
            let rows = KvRows { wide: weights, bf16: weights_bf16, row_stride: BLOCK_TOKENS, count };
            let values = slab.values(kv_head, tokens.next_multiple_of(TOKENS) / 2);
            let sums = Out { values: sums, row_stride: width, panel_stride: LANES };
            T::multiply(isa, rows, values, sums, true);
        }
        for (row, softmax) in softmax.iter().enumerate() {
            let sums = &sums[row * width..][..head_dim];
            let out = &mut out[(row / group * heads + row % group) * head_dim..][..head_dim];
            // Adding 0 makes a negative zero a positive one, as masked tokens do.
            out.iter_mut().zip(sums).for_each(|(out, sum)| *out = sum / softmax.total + 0.0);
        }
    }
}

/// Of the tokens a query has seen.
#[derive(Clone, Copy)]
struct Softmax {
    /// The largest score.
    largest: f32,
    /// The sum of `e^(scale * (score - largest))`.
    total: f32,
}

impl Default for Softmax {
    fn default() -> Self {
        Self { largest: f32::NEG_INFINITY, total: 0.0 }
    }
}

/// Takes the scores of a block into a softmax.
struct Weigh<'a> {
    softmax: &'a mut Softmax,
    /// Scores, which become weights.
    weights: &'a mut [f32],
    /// Tokens that the query attends to; the others have no weight, whatever their score.
    live: usize,
    scale: f32,
    /// What was summed with the largest score so far.
    sums: &'a mut [f32],
}

impl Kernel for Weigh<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let Self { softmax, weights, live, scale, sums } = self;
        weights[live..].fill(f32::NEG_INFINITY);
        let (vectors, _) = weights.as_chunks_mut::<LANES>();
        let mut largest = [softmax.largest; LANES];
        for vector in vectors.iter() {
            for lane in 0..LANES {
                largest[lane] = if vector[lane] > largest[lane] { vector[lane] } else { largest[lane] };
            }
        }
        let largest = largest.iter().fold(f32::NEG_INFINITY, |largest, &score| largest.max(score));
        for vector in vectors.iter_mut() {
            for weight in vector {
                *weight = exp::<A>(scale * (*weight - largest));
            }
        }
        weights[live..].fill(0.0);
        let mut totals = [0.0; LANES];
        for vector in weights.as_chunks::<LANES>().0 {
            for lane in 0..LANES {
                totals[lane] += vector[lane];
            }
        }
        let kept = exp::<A>(scale * (softmax.largest - largest));
        softmax.total = softmax.total * kept + add_lanes(totals);
        if softmax.largest.to_bits() != largest.to_bits() {
            for sum in sums {
                *sum *= kept;
            }
        }
        softmax.largest = largest;
    }
}
