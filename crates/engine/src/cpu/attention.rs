//! Attention of each query over the pages of its sequence. A query is computed by itself, over positions in order, so it
//! does not depend on what else is in the step or on how its prompt was cut.

use std::ops::Range;

use herd_model::BLOCK_TOKENS;
use rayon::prelude::*;

use super::elementwise::{add_lanes, exp};
use super::isa::{Arithmetic, Isa, Kernel, LANES};
use super::pages::KvElement;

/// Multiplications below which threads cost more than they save.
const PARALLEL_FROM: usize = 1 << 18;

/// Keys whose products are computed at once, to hide the latency of additions.
const KEY_TILE: usize = 4;

/// Lanes of the result that are summed at once.
const VALUE_TILE: usize = 4 * LANES;

/// The queries of one sequence in a step and the pages they attend to.
pub(crate) struct Queries<'a, T> {
    /// `[rows, heads, head_dim]`, row `r` starting at `r * row_stride`.
    pub(crate) rows: &'a [f32],
    pub(crate) row_stride: usize,
    /// Position of row 0; row `r` attends to positions `0..=start + r`.
    pub(crate) start: usize,
    /// Of this rank, by block: `[2, kv_heads, BLOCK_TOKENS, head_dim]`.
    pub(crate) blocks: &'a [&'a [T]],
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
}

impl<T: KvElement> Queries<'_, T> {
    /// Writes `[rows, heads, head_dim]`.
    pub(crate) fn attend(&self, isa: Isa, out: &mut [f32]) {
        let Self { heads, head_dim, start, .. } = *self;
        let rows = out.len() / (heads * head_dim);
        let work = |scores: &mut Vec<f32>, (index, out): (usize, &mut [f32])| {
            let (row, head) = (index / heads, index % heads);
            isa.run(self.one(row, head, scores, out));
        };
        let pieces = out.len() * (start + rows);
        if rayon::current_thread_index().is_none()
            || rayon::current_num_threads() == 1
            || pieces < PARALLEL_FROM
        {
            let mut scores = Vec::new();
            out.chunks_exact_mut(head_dim).enumerate().for_each(|item| work(&mut scores, item));
        } else {
            out.par_chunks_exact_mut(head_dim).enumerate().for_each_init(Vec::new, work);
        }
    }

    fn one<'b>(
        &'b self,
        row: usize,
        head: usize,
        scores: &'b mut Vec<f32>,
        out: &'b mut [f32],
    ) -> Attend<'b, T> {
        let kv_head = head / (self.heads / self.kv_heads);
        let slab = BLOCK_TOKENS * self.head_dim;
        Attend {
            query: &self.rows[row * self.row_stride + head * self.head_dim..][..self.head_dim],
            blocks: self.blocks,
            keys: kv_head * slab..(kv_head + 1) * slab,
            values: (self.kv_heads + kv_head) * slab..(self.kv_heads + kv_head + 1) * slab,
            positions: self.start + row + 1,
            scores,
            out,
        }
    }
}

struct Attend<'a, T> {
    query: &'a [f32],
    blocks: &'a [&'a [T]],
    /// Where the head's keys and values lie in a block.
    keys: Range<usize>,
    values: Range<usize>,
    positions: usize,
    scores: &'a mut Vec<f32>,
    out: &'a mut [f32],
}

impl<T: KvElement> Kernel for Attend<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let Self { query, blocks, keys, values, positions, scores, out } = self;
        let head_dim = query.len();
        scores.clear();
        scores.resize(positions, 0.0);
        for (scores, block) in scores.chunks_mut(BLOCK_TOKENS).zip(blocks) {
            let keys = &block[keys.clone()];
            let (tiles, rest) = scores.as_chunks_mut::<KEY_TILE>();
            let tiled = tiles.len() * KEY_TILE;
            for (scores, keys) in tiles.iter_mut().zip(keys.chunks_exact(KEY_TILE * head_dim)) {
                *scores = dots::<A, T, KEY_TILE>(query, keys);
            }
            for (score, key) in rest.iter_mut().zip(keys[tiled * head_dim..].chunks_exact(head_dim)) {
                [*score] = dots::<A, T, 1>(query, key);
            }
        }
        let scale = 1.0 / (head_dim as f32).sqrt();
        let total = softmax_numerators::<A>(scores, scale);
        let values = Values { weights: scores, total, blocks, place: values, head_dim };
        let (tiles, rest) = out.as_chunks_mut::<VALUE_TILE>();
        let first = tiles.len() * VALUE_TILE;
        for (tile, out) in tiles.iter_mut().enumerate() {
            values.mean::<A>(tile * VALUE_TILE, out);
        }
        for (lane, out) in rest.iter_mut().enumerate() {
            *out = values.mean_of_lane::<A>(first + lane);
        }
    }
}

/// Values of a head and the weight of each.
struct Values<'a, T> {
    weights: &'a [f32],
    /// Sum of the weights.
    total: f32,
    blocks: &'a [&'a [T]],
    /// Where the head's values lie in a block.
    place: Range<usize>,
    head_dim: usize,
}

impl<T: KvElement> Values<'_, T> {
    /// The weighted mean of lanes from `first` on.
    #[inline(always)]
    fn mean<A: Arithmetic>(&self, first: usize, out: &mut [f32; VALUE_TILE]) {
        const VECTORS: usize = VALUE_TILE / LANES;
        let mut sums = [A::splat(0.0); VECTORS];
        for (weights, block) in self.weights.chunks(BLOCK_TOKENS).zip(self.blocks) {
            let rows = block[self.place.clone()].chunks_exact(self.head_dim);
            for (weight, row) in weights.iter().zip(rows) {
                let Some(row) = row[first..].as_chunks().0.first_chunk::<VECTORS>() else { continue };
                let weight = A::splat(*weight);
                for vector in 0..VECTORS {
                    sums[vector] = A::mul_add_lanes(weight, T::load::<A>(&row[vector]), sums[vector]);
                }
            }
        }
        for (out, sum) in out.as_chunks_mut::<LANES>().0.iter_mut().zip(sums) {
            *out = A::store(sum);
            for out in out {
                *out /= self.total;
            }
        }
    }

    /// The weighted mean of one lane.
    #[inline(always)]
    fn mean_of_lane<A: Arithmetic>(&self, lane: usize) -> f32 {
        let mut sum = 0.0;
        for (weights, block) in self.weights.chunks(BLOCK_TOKENS).zip(self.blocks) {
            let rows = block[self.place.clone()].chunks_exact(self.head_dim);
            for (weight, row) in weights.iter().zip(rows) {
                sum = A::mul_add(*weight, row[lane].decode(), sum);
            }
        }
        sum / self.total
    }
}

/// Products of a query with `KEYS` keys in a row.
#[inline(always)]
fn dots<A: Arithmetic, T: KvElement, const KEYS: usize>(query: &[f32], keys: &[T]) -> [f32; KEYS] {
    let (vectors, rest) = query.as_chunks::<LANES>();
    let whole = vectors.len() * LANES;
    let keys: [&[T]; KEYS] = std::array::from_fn(|key| &keys[key * query.len()..][..query.len()]);
    let key_vectors = keys.map(|key| &key.as_chunks::<LANES>().0[..vectors.len()]);
    let mut sums = [A::splat(0.0); KEYS];
    for (index, query) in vectors.iter().enumerate() {
        let query = A::load(query);
        for key in 0..KEYS {
            sums[key] = A::mul_add_lanes(query, T::load::<A>(&key_vectors[key][index]), sums[key]);
        }
    }
    let mut dots = [0.0; KEYS];
    for key in 0..KEYS {
        let tail = rest.iter().zip(&keys[key][whole..]);
        dots[key] = tail.fold(add_lanes(A::store(sums[key])), |sum, (q, k)| A::mul_add(*q, k.decode(), sum));
    }
    dots
}

/// Replaces scores by `e^(scale * (score - largest))` and returns their sum.
#[inline(always)]
fn softmax_numerators<A: Arithmetic>(scores: &mut [f32], scale: f32) -> f32 {
    let largest = scores.iter().fold(f32::NEG_INFINITY, |largest, &score| largest.max(score));
    let (vectors, rest) = scores.as_chunks_mut::<LANES>();
    let mut sums = [0.0; LANES];
    for vector in vectors {
        for lane in 0..LANES {
            vector[lane] = exp::<A>(scale * (vector[lane] - largest));
            sums[lane] += vector[lane];
        }
    }
    let mut sum = add_lanes(sums);
    for score in rest {
        *score = exp::<A>(scale * (*score - largest));
        sum += *score;
    }
    sum
}
