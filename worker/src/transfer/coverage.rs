//! Which rows of a transfer have arrived. Pure.

use std::ops::Range;

/// What one target rank has received of a prompt's KV: rows of each block, layer and head.
#[derive(Debug)]
pub(crate) struct Coverage {
    layers: Range<usize>,
    heads: Range<usize>,
    prompt_tokens: usize,
    block_tokens: usize,
    /// `[blocks, layers, heads]`.
    rows: Vec<u16>,
    /// Entries whose rows are not all there.
    missing: usize,
}

/// Layers, heads, block or rows that are not part of the transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OutOfBounds;

impl Coverage {
    /// Of a rank that holds these layers and heads (absolute).
    pub(crate) fn new(
        layers: Range<usize>,
        heads: Range<usize>,
        prompt_tokens: usize,
        block_tokens: usize,
    ) -> Self {
        let missing = prompt_tokens.div_ceil(block_tokens) * layers.len() * heads.len();
        Self { layers, heads, prompt_tokens, block_tokens, rows: vec![0; missing], missing }
    }

    /// Rows of a block that the prompt fills.
    fn rows_of(&self, block: usize) -> usize {
        self.prompt_tokens.saturating_sub(block * self.block_tokens).min(self.block_tokens)
    }

    /// Whether these are within the prompt and this rank.
    pub(crate) fn check(
        &self,
        block: usize,
        layers: &Range<usize>,
        heads: &Range<usize>,
        rows: usize,
    ) -> Result<(), OutOfBounds> {
        let within = self.layers.start <= layers.start
            && layers.start < layers.end
            && layers.end <= self.layers.end
            && self.heads.start <= heads.start
            && heads.start < heads.end
            && heads.end <= self.heads.end
            && 0 < rows
            && rows <= self.rows_of(block);
        if within { Ok(()) } else { Err(OutOfBounds) }
    }

    /// Rows `0..rows` are written. Again is fine, fewer than before too.
    pub(crate) fn record(&mut self, block: usize, layers: &Range<usize>, heads: &Range<usize>, rows: usize) {
        if self.check(block, layers, heads, rows).is_err() {
            return;
        }
        let full = self.rows_of(block);
        for layer in layers.clone() {
            for head in heads.clone() {
                let layer = block * self.layers.len() + layer - self.layers.start;
                let at = layer * self.heads.len() + head - self.heads.start;
                let Some(seen) = self.rows.get_mut(at) else { continue };
                if usize::from(*seen) < rows {
                    *seen = rows as u16;
                    self.missing -= usize::from(rows == full);
                }
            }
        }
    }

    /// Whether every row of the prompt is there.
    pub(crate) fn is_complete(&self) -> bool {
        self.missing == 0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_not_of_the_prompt_is_refused() {
        let coverage = Coverage::new(4..6, 3..5, 70, 64);
        assert_eq!(coverage.check(1, &(4..6), &(3..5), 6), Ok(()));
        for (block, layers, heads, rows) in [
            (1, 4..6, 3..5, 7),
            (2, 4..6, 3..5, 1),
            (0, 4..7, 3..5, 64),
            (0, 3..6, 3..5, 64),
            (0, 4..6, 2..5, 64),
            (0, 4..6, 3..6, 64),
            (0, 4..6, 3..5, 65),
            (0, 4..6, 3..5, 0),
            (usize::from(u16::MAX), 4..5, 3..4, 1),
        ] {
            assert_eq!(coverage.check(block, &layers, &heads, rows), Err(OutOfBounds), "{block} {rows}");
        }
    }

    proptest! {
        #[test]
        fn complete_when_everything_came_in_any_order_any_number_of_times(
            prompt_tokens in 1_usize..20,
            seed in prop::collection::vec(any::<prop::sample::Index>(), 200),
        ) {
            let mut coverage = Coverage::new(2..4, 1..3, prompt_tokens, 4);
            let mut left: Vec<_> = (0..prompt_tokens.div_ceil(4))
                .flat_map(|block| (2..4).flat_map(move |layer| (1..3).map(move |head| (block, layer, head))))
                .collect();
            let all = left.clone();
            for index in seed {
                if left.is_empty() { break }
                prop_assert!(!coverage.is_complete());
                let one @ (block, layer, head) = all[index.index(all.len())];
                let rows = coverage.rows_of(block);
                // A part of a block is not the block.
                coverage.record(block, &(layer..layer + 1), &(head..head + 1), rows - 1);
                prop_assert!(!coverage.is_complete());
                coverage.record(block, &(layer..layer + 1), &(head..head + 1), rows);
                left.retain(|&other| other != one);
            }
            prop_assert_eq!(coverage.is_complete(), left.is_empty());
        }
    }
}
