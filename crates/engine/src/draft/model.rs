//! A draft model: it runs beside the model, over the same block tables with a KV cache of its own, so that blocks which are
//! shared, moved or swapped are so for both.

use std::sync::Arc;

use herd_scheduler::{Limits, LogitRows, Move, StepEntry, StepPlan};

use super::{Draft, Wanted};
use crate::sampler::choose;
use crate::{Executor, ExecutorError};

pub(crate) struct DraftModel {
    executor: Box<dyn Executor>,
    block_tokens: usize,
    step_tokens: usize,
}

impl DraftModel {
    pub(super) fn new(executor: Box<dyn Executor>, limits: &Limits) -> Self {
        let Limits { block_tokens, max_step_tokens, .. } = *limits;
        Self { executor, block_tokens, step_tokens: max_step_tokens }
    }

    /// Computes what the step computes, and goes on from there, a token a step. Tokens are drawn as the model's are, with the same
    /// random numbers: where the two distributions are alike the same ones come out.
    pub(super) fn draft(
        &mut self,
        moves: &[Move],
        wanted: &[Wanted<'_>],
    ) -> Result<Vec<Draft>, ExecutorError> {
        let mut moves = moves.to_vec();
        let mut drafts: Vec<Draft> =
            wanted.iter().map(|wanted| Draft { tokens: Vec::new(), computed: wanted.computed }).collect();
        self.catch_up(&mut moves, wanted, &mut drafts)?;
        let mut round: Vec<usize> =
            (0..wanted.len()).filter(|&index| self.behind(&wanted[index], &drafts[index]) == 0).collect();
        let mut entries = Vec::with_capacity(round.len());
        for &index in &round {
            let (Wanted { entry, room, tokens, .. }, Draft { computed, .. }) =
                (&wanted[index], &mut drafts[index]);
            let end = entry.start + entry.tokens.len();
            let logits = if *room > 0 { LogitRows::Last } else { LogitRows::None };
            entries.push(part(entry, *computed, tokens[*computed..end].to_vec(), logits));
            *computed = end;
        }
        loop {
            if !(entries.is_empty() && moves.is_empty()) {
                let step = StepPlan { moves: std::mem::take(&mut moves), entries };
                let rows = self.executor.step(&step)?.logits;
                let mut rows = rows.chunks_exact(self.executor.vocab_size());
                round.retain(|&index| {
                    let (Wanted { room, sampling, position, history, .. }, draft) =
                        (&wanted[index], &mut drafts[index]);
                    let row = if *room > 0 { rows.next() } else { None };
                    let drawn =
                        row.map(|row| choose(row, sampling, position + draft.tokens.len(), *history, None));
                    // No numbers, no guess.
                    if let Some(Ok((token, _))) = drawn {
                        draft.tokens.push(token);
                    }
                    matches!(drawn, Some(Ok(_))) && draft.tokens.len() < *room
                });
            }
            if round.is_empty() {
                return Ok(drafts);
            }
            entries = Vec::with_capacity(round.len());
            for &index in &round {
                let Draft { tokens, computed } = &mut drafts[index];
                entries.push(part(
                    wanted[index].entry,
                    *computed,
                    tokens.last().copied().into_iter().collect(),
                    LogitRows::Last,
                ));
                *computed += 1;
            }
        }
    }

    /// Computes what the model had from elsewhere, as far as one step goes: a prompt that another gang computed. Each by
    /// itself: blocks may be in other tables too, whose rows are the same.
    fn catch_up(
        &mut self,
        moves: &mut Vec<Move>,
        wanted: &[Wanted<'_>],
        drafts: &mut [Draft],
    ) -> Result<(), ExecutorError> {
        let mut left = self.step_tokens;
        for (wanted, draft) in wanted.iter().zip(drafts) {
            let behind = self.behind(wanted, draft).min(left);
            if behind > 0 {
                let end = draft.computed + behind;
                let tokens = wanted.tokens[draft.computed..end].to_vec();
                let entries = vec![part(wanted.entry, draft.computed, tokens, LogitRows::None)];
                self.executor.step(&StepPlan { moves: std::mem::take(moves), entries })?;
                left -= behind;
                draft.computed = end;
            }
        }
        Ok(())
    }

    /// Tokens that the draft model has not computed and that are before the blocks which only this sequence has. Those after
    /// them, like the one that is left by a draft which was sampled to its end, go with the tokens of the step.
    fn behind(&self, wanted: &Wanted<'_>, draft: &Draft) -> usize {
        let own = wanted.entry.start / self.block_tokens * self.block_tokens;
        own.saturating_sub(draft.computed)
    }
}

/// Tokens of the same sequence, from `start` on.
fn part(entry: &StepEntry, start: usize, tokens: Vec<u32>, logits: LogitRows) -> StepEntry {
    let StepEntry { sequence, blocks, .. } = entry;
    StepEntry { sequence: *sequence, tokens, start, blocks: Arc::clone(blocks), logits }
}
