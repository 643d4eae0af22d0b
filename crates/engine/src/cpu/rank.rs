//! The forward pass of one rank.

use std::cell::RefCell;
use std::sync::Arc;

use herd_model::{BLOCK_TOKENS, ModelConfig, RankShard};
use herd_scheduler::Move;
use rayon::prelude::*;

use super::attention::Queries;
use super::batch::{Batch, Piece, Span};
use super::elementwise::{Rotate, SiluGate, add, for_rows, rms_norm};
use super::linear::{LinearWork, Numerics, Projection};
use super::packed::Packed;
use super::pages::{KvElement, Pages};
use crate::KvStore;
use crate::clipped::RowsClipped;
use crate::collective::{Collective, CollectiveError};

/// Weights of one rank.
pub(crate) struct Weights {
    /// `[vocab of this rank, hidden]`; none: not the first stage, or the output head is the embedding.
    pub(crate) embedding: Option<Packed>,
    pub(crate) layers: Vec<LayerWeights>,
    /// Of the last stage.
    pub(crate) output: Option<OutputWeights>,
}

/// What makes logits of hidden states.
pub(crate) struct OutputWeights {
    pub(crate) norm: Vec<f32>,
    /// `[vocab of this rank, hidden]`.
    pub(crate) head: Projection,
}

/// Weights of one decoder layer of one rank.
pub(crate) struct LayerWeights {
    pub(crate) attention_norm: Vec<f32>,
    /// Queries, keys and values.
    pub(crate) qkv: Projection,
    pub(crate) output: Projection,
    pub(crate) ffn_norm: Vec<f32>,
    pub(crate) gate_up: Projection,
    pub(crate) down: Projection,
}

impl Weights {
    /// Bytes they take.
    pub(crate) fn bytes(&self) -> usize {
        let Self { embedding, layers, output } = self;
        let layers = layers.iter().map(|layer| {
            let LayerWeights { attention_norm, qkv, output, ffn_norm, gate_up, down } = layer;
            let norms = size_of_val(attention_norm.as_slice()) + size_of_val(ffn_norm.as_slice());
            norms + qkv.bytes() + output.bytes() + gate_up.bytes() + down.bytes()
        });
        let embedding = embedding.as_ref().map_or(0, Packed::bytes);
        let output = output
            .as_ref()
            .map_or(0, |OutputWeights { norm, head }| size_of_val(norm.as_slice()) + head.bytes());
        embedding + layers.sum::<usize>() + output
    }

    /// `[vocab of this rank, hidden]`; the first stage has one.
    fn embedding(&self) -> Option<&Packed> {
        self.embedding.as_ref().or(self.output.as_ref().map(|output| output.head.first()))
    }
}

/// The cache of one rank.
pub(crate) enum Kv {
    F32(Arc<Pages<f32>>),
    Bf16(Arc<Pages<u16>>),
}

/// One rank: what it holds and how it computes.
pub(crate) struct Rank {
    pub(crate) config: ModelConfig,
    pub(crate) shard: RankShard,
    pub(crate) numerics: Numerics,
    pub(crate) weights: Weights,
    pub(crate) clipped: RowsClipped,
    pub(crate) kv: Kv,
}

/// Memory of a step that the next one uses again.
#[derive(Default)]
pub(crate) struct Work {
    linear: LinearWork,
    /// `[rows, hidden]`.
    normed: Vec<f32>,
    /// `[rows, queries, keys and values of this rank]`.
    qkv: Vec<f32>,
    /// `[rows, query heads of this rank, head_dim]`.
    heads: Vec<f32>,
    /// `[rows, ffn of this rank]`.
    gated: Vec<f32>,
    /// `[rows, hidden]`: what a layer adds.
    sums: Vec<f32>,
}

impl Rank {
    /// Runs a step, cut into batches, and returns this rank's columns of the logits, `[rows wanted, shard.vocab]`: none but on
    /// the last stage.
    pub(crate) fn forward(
        &self,
        batches: &[Batch],
        group: &dyn Collective,
        work: &mut Work,
    ) -> Result<Vec<f32>, CollectiveError> {
        let mut logits = Vec::new();
        for batch in batches {
            self.make(&batch.moves);
            if batch.rows() == 0 {
                continue;
            }
            let mut hidden = match self.shard.stage {
                0 => self.embed(&batch.tokens, group)?,
                _ => self.taken(batch, group)?,
            };
            for layer in self.shard.layers.clone() {
                self.layer(layer, batch, group, work, &mut hidden)?;
            }
            match &self.weights.output {
                Some(output) => self.logits(output, batch, &hidden, work, &mut logits)?,
                None => group.give_next(&hidden)?,
            }
        }
        Ok(logits)
    }

    /// Moves KV between blocks, in order.
    fn make(&self, moves: &[Move]) {
        for &Move { from, to, rows } in moves {
            match &self.kv {
                Kv::F32(pages) => pages.copy_rows(from, to, rows),
                Kv::Bf16(pages) => pages.copy_rows(from, to, rows),
            }
        }
    }

    /// The residual stream as the stage before has left it.
    fn taken(&self, batch: &Batch, group: &dyn Collective) -> Result<Vec<f32>, CollectiveError> {
        let hidden = group.take_previous()?;
        let own = batch.rows() * self.config.hidden_size;
        if hidden.len() != own {
            let RankShard { rank, stage, tensor_rank, .. } = self.shard;
            // As many ranks before this one as a stage has.
            let previous = rank - (rank - tensor_rank) / stage.max(1);
            return Err(CollectiveError::Mismatch { rank: previous, given: hidden.len(), own });
        }
        Ok(hidden.to_vec())
    }

    /// The residual stream before the first layer, `[tokens, hidden]`.
    pub(crate) fn embed(&self, tokens: &[u32], group: &dyn Collective) -> Result<Vec<f32>, CollectiveError> {
        let width = self.config.hidden_size;
        let mut hidden = vec![0.0; tokens.len() * width];
        for (token, row) in tokens.iter().zip(hidden.chunks_exact_mut(width)) {
            let token = *token as usize;
            if self.shard.vocab.contains(&token)
                && let Some(embedding) = self.weights.embedding()
            {
                embedding.read_output(token - self.shard.vocab.start, row);
            }
        }
        group.all_reduce_sum(&mut hidden)?;
        Ok(hidden)
    }

    /// Takes the residual stream through one decoder layer, named by its absolute number.
    pub(crate) fn layer(
        &self,
        layer: usize,
        batch: &Batch,
        group: &dyn Collective,
        work: &mut Work,
        hidden: &mut [f32],
    ) -> Result<(), CollectiveError> {
        let Work { linear, normed, qkv, heads, gated, sums } = work;
        let (numerics, eps) = (self.numerics, self.config.rms_eps);
        let isa = numerics.isa;
        let LayerWeights { attention_norm, qkv: to_qkv, output, ffn_norm, gate_up, down } =
            &self.weights.layers[layer - self.shard.layers.start];

        normed.resize(hidden.len(), 0.0);
        rms_norm(isa, hidden, attention_norm, eps, normed);
        to_qkv.forward(numerics, normed, None, linear, qkv)?;
        match &self.kv {
            Kv::F32(pages) => self.attention(pages, layer, batch, qkv, heads),
            Kv::Bf16(pages) => self.attention(pages, layer, batch, qkv, heads),
        }
        output.forward(numerics, heads, Some(group), linear, sums)?;
        group.all_reduce_sum(sums)?;
        add(hidden, sums);

        rms_norm(isa, hidden, ffn_norm, eps, normed);
        let outputs = gate_up.multiply(numerics, normed, None, linear)?;
        let width = self.shard.ffn.len();
        gated.resize(batch.rows() * width, 0.0);
        for_rows(gated, width, |row, y| {
            thread_local! {
                static GATE_UP: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
            }
            GATE_UP.with_borrow_mut(|gate_up| {
                gate_up.resize(2 * width, 0.0);
                outputs.read(isa, row, gate_up);
                let (gate, up) = gate_up.split_at(width);
                isa.run(SiluGate { gate, up, y });
            });
        });
        down.forward(numerics, gated, Some(group), linear, sums)?;
        group.all_reduce_sum(sums)?;
        add(hidden, sums);
        Ok(())
    }

    /// Adds this rank's columns of the logits of the rows that the batch wants.
    fn logits(
        &self,
        output: &OutputWeights,
        batch: &Batch,
        hidden: &[f32],
        work: &mut Work,
        logits: &mut Vec<f32>,
    ) -> Result<(), CollectiveError> {
        let width = self.config.hidden_size;
        let wanted: Vec<f32> = batch
            .logit_rows
            .iter()
            .flat_map(|row| &hidden[row * width..(row + 1) * width])
            .copied()
            .collect();
        let mut rows = Vec::new();
        output.head.forward(
            self.numerics,
            &self.final_norm(output, &wanted),
            None,
            &mut work.linear,
            &mut rows,
        )?;
        logits.append(&mut rows);
        Ok(())
    }

    /// The norm before the output head.
    pub(crate) fn final_norm(&self, output: &OutputWeights, hidden: &[f32]) -> Vec<f32> {
        let mut normed = vec![0.0; hidden.len()];
        rms_norm(self.numerics.isa, hidden, &output.norm, self.config.rms_eps, &mut normed);
        normed
    }

    /// Rotates queries and keys, stores keys and values, and attends. Rows of `qkv` are queries, keys, values; `out` becomes
    /// `[rows, query heads of this rank, head_dim]`.
    fn attention<T: KvElement>(
        &self,
        pages: &Pages<T>,
        layer: usize,
        batch: &Batch,
        qkv: &mut [f32],
        out: &mut Vec<f32>,
    ) {
        let isa = self.numerics.isa;
        let head_dim = self.config.head_dim;
        let (heads, kv_heads) = (self.shard.query_heads.len(), self.shard.kv_heads.len());
        let (query_width, kv_width) = (heads * head_dim, kv_heads * head_dim);
        let row_stride = query_width + 2 * kv_width;
        let half = head_dim / 2;
        for_rows(qkv, row_stride, |row, numbers| {
            let angles = row * half..(row + 1) * half;
            let heads = &mut numbers[..query_width + kv_width];
            isa.run(Rotate { heads, cos: &batch.cos[angles.clone()], sin: &batch.sin[angles] });
        });
        let store = |Piece { rows, block, token }: &Piece| {
            let mut slab = pages.slab_mut(*block, layer);
            for (token, row) in (*token..).zip(rows.clone()) {
                let row = &qkv[row * row_stride..][..row_stride];
                let (keys, values) = row[query_width..].split_at(kv_width);
                slab.put(token, keys, values);
            }
        };
        if rayon::current_thread_index().is_some() && batch.rows() >= BLOCK_TOKENS {
            batch.pieces.par_iter().for_each(store);
        } else {
            batch.pieces.iter().for_each(store);
        }
        out.resize(batch.rows() * query_width, 0.0);
        let attend = |(span, out): (&Span, &mut [f32])| {
            let Span { rows, start, blocks } = span;
            let used = (start + rows.len()).div_ceil(BLOCK_TOKENS);
            let blocks: Vec<_> = blocks[..used].iter().map(|&block| pages.slab(block, layer)).collect();
            let queries = Queries {
                rows: &qkv[rows.start * row_stride..],
                row_stride,
                start: *start,
                blocks: &blocks,
                heads,
                kv_heads,
                head_dim,
            };
            queries.attend(isa, out);
        };
        // Sequences of one row each stand first, and are cut apart; then each of the others by itself.
        let single = batch.spans.iter().take_while(|span| span.rows.len() == 1).count();
        let (singles, rest) = out.split_at_mut(single * query_width);
        if single > 1 && rayon::current_thread_index().is_some() {
            batch.spans[..single].par_iter().zip(singles.par_chunks_exact_mut(query_width)).for_each(attend);
        } else {
            batch.spans[..single].iter().zip(singles.chunks_exact_mut(query_width)).for_each(attend);
        }
        let mut rest = rest;
        for span in &batch.spans[single..] {
            let (own, others) = rest.split_at_mut(span.rows.len() * query_width);
            attend((span, own));
            rest = others;
        }
    }

    /// This rank's cache, as transfers see it.
    pub(crate) fn kv_store(&self) -> Arc<dyn KvStore> {
        match &self.kv {
            Kv::F32(pages) => Arc::clone(pages) as Arc<dyn KvStore>,
            Kv::Bf16(pages) => Arc::clone(pages) as Arc<dyn KvStore>,
        }
    }
}
