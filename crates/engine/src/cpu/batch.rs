//! A step plan made ready for the ranks: checked, its tokens in rows one after the other.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use herd_model::{BLOCK_TOKENS, ModelConfig};
use herd_scheduler::{BlockId, LogitRows, Move, StepEntry, StepPlan};

/// The tokens of a step, in rows.
#[derive(Debug)]
pub(crate) struct Batch {
    /// To be done before the rows are computed.
    pub(crate) moves: Vec<Move>,
    pub(crate) tokens: Vec<u32>,
    pub(crate) spans: Vec<Span>,
    /// The same rows, cut by the blocks they are written to.
    pub(crate) pieces: Vec<Piece>,
    /// Rows whose logits are wanted, in the plan's order.
    pub(crate) logit_rows: Vec<usize>,
    /// Of the angles each row is turned by, `[rows, head_dim / 2]`.
    pub(crate) cos: Vec<f32>,
    pub(crate) sin: Vec<f32>,
}

/// The rows of one sequence.
#[derive(Debug)]
pub(crate) struct Span {
    pub(crate) rows: Range<usize>,
    /// Position of the first row.
    pub(crate) start: usize,
    pub(crate) blocks: Arc<[BlockId]>,
}

/// Rows of one sequence that are written to one block.
#[derive(Debug)]
pub(crate) struct Piece {
    pub(crate) rows: Range<usize>,
    pub(crate) block: BlockId,
    /// Where in the block the first of them goes.
    pub(crate) token: usize,
}

impl Span {
    fn pieces(&self) -> impl Iterator<Item = Piece> {
        let Self { rows, start, blocks } = self;
        let end = start + rows.len();
        (start / BLOCK_TOKENS..end.div_ceil(BLOCK_TOKENS)).map(move |at| {
            let first = (at * BLOCK_TOKENS).max(*start);
            let last = ((at + 1) * BLOCK_TOKENS).min(end);
            Piece {
                rows: rows.start + first - start..rows.start + last - start,
                block: blocks[at],
                token: first % BLOCK_TOKENS,
            }
        })
    }
}

impl Batch {
    /// Lays out a plan, or says what of it does not fit this model and its cache of `kv_blocks` and, for moves, `host_blocks`.
    pub(crate) fn new(
        plan: &StepPlan,
        config: &ModelConfig,
        inverse_frequencies: &[f32],
        (kv_blocks, host_blocks): (usize, usize),
    ) -> Result<Self, String> {
        let StepPlan { moves, entries } = plan;
        for Move { from, to, rows } in moves {
            let there = |block: BlockId| (block as usize) < kv_blocks + host_blocks;
            if !there(*from) || !there(*to) || from == to || !(1..=BLOCK_TOKENS).contains(rows) {
                return Err(format!("{rows} rows cannot be moved from block {from} to block {to}"));
            }
        }
        let mut batch = Self {
            moves: moves.clone(),
            tokens: vec![],
            spans: vec![],
            pieces: vec![],
            logit_rows: vec![],
            cos: vec![],
            sin: vec![],
        };
        let mut sequences = HashSet::new();
        // In how many tables each block is.
        let mut tables = vec![0_u8; kv_blocks];
        for block in entries.iter().flat_map(|entry| entry.blocks.iter()) {
            if let Some(count) = tables.get_mut(*block as usize) {
                *count = count.saturating_add(1);
            }
        }
        for StepEntry { sequence, tokens, start, blocks, logits } in entries {
            let refuse = |problem: String| Err(format!("sequence {}: {problem}", sequence.0));
            let end = start.saturating_add(tokens.len());
            if !sequences.insert(sequence) {
                return refuse("has two entries".to_owned());
            }
            if tokens.is_empty() {
                return refuse("has no tokens".to_owned());
            }
            if let Some(token) = tokens.iter().find(|&&token| token as usize >= config.vocab_size) {
                return refuse(format!("token {token} is not below the vocabulary of {}", config.vocab_size));
            }
            if end > config.context_length || end.div_ceil(BLOCK_TOKENS) > blocks.len() {
                let blocks = blocks.len();
                return refuse(format!(
                    "position {} does not fit {blocks} blocks and a context of {}",
                    end - 1,
                    config.context_length
                ));
            }
            if let Some(block) = blocks.iter().find(|&&block| block as usize >= kv_blocks) {
                return refuse(format!("block {block} is not one of {kv_blocks}"));
            }
            if let Some(block) = blocks[start / BLOCK_TOKENS..end.div_ceil(BLOCK_TOKENS)]
                .iter()
                .find(|&&block| tables.get(block as usize) != Some(&1))
            {
                return refuse(format!("block {block} would be written, and is in another table"));
            }
            let rows = batch.tokens.len()..batch.tokens.len() + tokens.len();
            batch.logit_rows.extend(match logits {
                LogitRows::None => rows.end..rows.end,
                LogitRows::Last => rows.end - 1..rows.end,
                LogitRows::All => rows.clone(),
            });
            batch.tokens.extend_from_slice(tokens);
            for position in *start..end {
                for inverse_frequency in inverse_frequencies {
                    // The angle in f32, as published; its sine and cosine rounded once.
                    let angle = f64::from(position as f32 * inverse_frequency);
                    batch.cos.push(angle.cos() as f32);
                    batch.sin.push(angle.sin() as f32);
                }
            }
            let span = Span { rows, start: *start, blocks: Arc::clone(blocks) };
            batch.pieces.extend(span.pieces());
            batch.spans.push(span);
        }
        Ok(batch)
    }

    pub(crate) fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// The same rows in `parts` batches of about the same size, to be run one after the other: a row attends to rows of its
    /// own batch and of those before.
    pub(crate) fn split(self, parts: usize) -> Vec<Self> {
        let rows = self.rows();
        if parts <= 1 || rows == 0 {
            return vec![self];
        }
        let half = self.cos.len() / rows;
        let size = rows.div_ceil(parts);
        let from = (0..rows).step_by(size);
        from.map(|from| from..rows.min(from + size)).map(|part| self.part(part, half)).collect()
    }

    fn part(&self, part: Range<usize>, half: usize) -> Self {
        let Self { moves, tokens, spans, pieces: _, logit_rows, cos, sin } = self;
        let angles = part.start * half..part.end * half;
        let spans = spans.iter().filter_map(|Span { rows, start, blocks }| {
            let own = rows.start.max(part.start)..rows.end.min(part.end);
            (!own.is_empty()).then(|| Span {
                start: start + own.start - rows.start,
                rows: own.start - part.start..own.end - part.start,
                blocks: Arc::clone(blocks),
            })
        });
        let spans: Vec<_> = spans.collect();
        Self {
            moves: if part.start == 0 { moves.clone() } else { Vec::new() },
            tokens: tokens[part.clone()].to_vec(),
            pieces: spans.iter().flat_map(Span::pieces).collect(),
            spans,
            logit_rows: logit_rows
                .iter()
                .filter(|row| part.contains(row))
                .map(|row| row - part.start)
                .collect(),
            cos: cos[angles.clone()].to_vec(),
            sin: sin[angles].to_vec(),
        }
    }
}
