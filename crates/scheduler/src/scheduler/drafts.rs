//! Room for drafts: guesses at what follows the last token of a sequence that generates, computed in the same step. They take
//! what nobody else wants: tokens of the step that are left, and blocks that no other sequence may come to need.

use std::sync::Arc;

use super::Scheduler;
use crate::sequence::{Budget, Sequence};
use crate::{DraftRoom, MAX_DRAFTS, StepPlan};

impl Scheduler {
    /// In the order of turns, as entries of those that generate are.
    pub(super) fn plan_drafts(&mut self, step: &mut StepPlan, budget: &Budget) -> Vec<DraftRoom> {
        let mut left = budget.tokens.min(MAX_DRAFTS);
        let mut rooms = Vec::new();
        for (index, entry) in step.entries.iter_mut().enumerate() {
            let wanted = self.limits.draft_tokens.min(left);
            let Some(sequence) = self.sequences.get(&entry.sequence).filter(|sequence| sequence.decodes())
            else {
                continue;
            };
            let wanted = wanted.min(sequence.tokens_after_next());
            let table = self.limits.block_tokens * sequence.blocks.len();
            let mut tokens = wanted.min(table - sequence.tokens.len());
            if tokens < wanted
                && self.pool.available() > self.growing()
                && let Some(more) = self.pool.take(1)
                && let Some(sequence) = self.sequences.get_mut(&entry.sequence)
            {
                sequence.grow(more);
                entry.blocks = Arc::clone(&sequence.blocks);
                tokens = wanted.min(table + self.limits.block_tokens - sequence.tokens.len());
            }
            if tokens > 0 {
                left -= tokens;
                rooms.push(DraftRoom { entry: index, tokens });
            }
        }
        rooms
    }
}

impl Sequence {
    /// Tokens it can come to have after the one that is sampled next.
    fn tokens_after_next(&self) -> usize {
        self.positions.saturating_sub(self.prompt_tokens + self.generated + 1)
    }
}
