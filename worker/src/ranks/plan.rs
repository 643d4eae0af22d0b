//! Step plans on their way from the leader to the other processes: only what is new of a block table is sent. Pure.

use std::collections::HashMap;
use std::sync::Arc;

use herd_proto::internal::v1 as wire;
use herd_scheduler::{BlockId, LogitRows, Move, SequenceId, StepEntry, StepPlan};

/// Block tables of the step before.
type Tables = HashMap<SequenceId, Arc<[BlockId]>>;

/// The leader's side.
#[derive(Debug, Default)]
pub(super) struct Encoder {
    steps: u64,
    tables: Tables,
}

/// A follower's side.
#[derive(Debug, Default)]
pub(super) struct Decoder {
    steps: u64,
    tables: Tables,
}

/// A step that does not follow from the ones before.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum PlanError {
    #[error("step {given} came instead of step {expected}")]
    Order { given: u64, expected: u64 },
    #[error("sequence {0} goes on from a block table that it does not have")]
    Table(u64),
    #[error("sequence {0} wants logits in a way this worker does not know")]
    Logits(u64),
}

impl Encoder {
    pub(super) fn encode(&mut self, plan: &StepPlan) -> wire::Step {
        let mut tables = Tables::with_capacity(plan.entries.len());
        let entries = plan.entries.iter().map(|StepEntry { sequence, tokens, start, blocks, logits }| {
            let known = self.tables.get(sequence).map_or(0, |table| {
                table.iter().zip(blocks.iter()).take_while(|(known, block)| known == block).count()
            });
            tables.insert(*sequence, Arc::clone(blocks));
            let logits = match logits {
                LogitRows::None => wire::entry::Logits::None,
                LogitRows::Last => wire::entry::Logits::Last,
                LogitRows::All => wire::entry::Logits::All,
            };
            wire::Entry {
                sequence: sequence.0,
                tokens: tokens.clone(),
                start: *start as u32,
                known_blocks: known as u32,
                blocks: blocks[known..].to_vec(),
                logits: logits.into(),
            }
        });
        let moves =
            plan.moves.iter().map(|&Move { from, to, rows }| wire::Move { from, to, rows: rows as u32 });
        let step = wire::Step { number: self.steps, moves: moves.collect(), entries: entries.collect() };
        self.steps += 1;
        self.tables = tables;
        step
    }
}

impl Decoder {
    pub(super) fn decode(&mut self, step: wire::Step) -> Result<StepPlan, PlanError> {
        let wire::Step { number, moves, entries } = step;
        if number != self.steps {
            return Err(PlanError::Order { given: number, expected: self.steps });
        }
        let mut tables = Tables::with_capacity(entries.len());
        let entries = entries.into_iter().map(|entry| {
            let wire::Entry { sequence, tokens, start, known_blocks, blocks, logits } = entry;
            let logits = match wire::entry::Logits::try_from(logits) {
                Ok(wire::entry::Logits::None) => LogitRows::None,
                Ok(wire::entry::Logits::Last) => LogitRows::Last,
                Ok(wire::entry::Logits::All) => LogitRows::All,
                Err(_) => return Err(PlanError::Logits(sequence)),
            };
            let id = SequenceId(sequence);
            let known = match (known_blocks as usize, self.tables.get(&id)) {
                (0, _) => &[][..],
                (known, Some(table)) if known <= table.len() => &table[..known],
                _ => return Err(PlanError::Table(sequence)),
            };
            let blocks: Arc<[BlockId]> = known.iter().copied().chain(blocks).collect();
            tables.insert(id, Arc::clone(&blocks));
            Ok(StepEntry { sequence: id, tokens, start: start as usize, blocks, logits })
        });
        let entries = entries.collect::<Result<_, _>>()?;
        self.steps += 1;
        self.tables = tables;
        let moves =
            moves.into_iter().map(|wire::Move { from, to, rows }| Move { from, to, rows: rows as usize });
        Ok(StepPlan { moves: moves.collect(), entries })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_entry() -> impl Strategy<Value = StepEntry> {
        let logits = prop_oneof![Just(LogitRows::None), Just(LogitRows::Last), Just(LogitRows::All)];
        let blocks = prop::collection::vec(0_u32..4, 0..6);
        (0_u64..4, prop::collection::vec(any::<u32>(), 1..3), 0_usize..9, blocks, logits).prop_map(
            |(sequence, tokens, start, blocks, logits)| StepEntry {
                sequence: SequenceId(sequence),
                tokens,
                start,
                blocks: blocks.into(),
                logits,
            },
        )
    }

    /// At most one entry a sequence, as the scheduler has it.
    fn any_plan() -> impl Strategy<Value = StepPlan> {
        let moves = (any::<u32>(), any::<u32>(), 0..65_usize);
        let moves = moves.prop_map(|(from, to, rows)| Move { from, to, rows });
        let moves = prop::collection::vec(moves, 0..3);
        (moves, prop::collection::vec(any_entry(), 0..4)).prop_map(|(moves, mut entries)| {
            entries.sort_by_key(|entry| entry.sequence);
            entries.dedup_by_key(|entry| entry.sequence);
            StepPlan { moves, entries }
        })
    }

    proptest! {
        #[test]
        fn plans_arrive_as_they_are(plans in prop::collection::vec(any_plan(), 0..12)) {
            let (mut encoder, mut decoder) = (Encoder::default(), Decoder::default());
            for plan in plans {
                prop_assert_eq!(decoder.decode(encoder.encode(&plan)).unwrap(), plan);
            }
        }
    }

    fn plan(blocks: &[BlockId]) -> StepPlan {
        let entry = StepEntry {
            sequence: SequenceId(1),
            tokens: vec![5],
            start: 0,
            blocks: blocks.into(),
            logits: LogitRows::Last,
        };
        StepPlan { moves: Vec::new(), entries: vec![entry] }
    }

    #[test]
    fn only_new_blocks_are_sent() {
        let mut encoder = Encoder::default();
        assert_eq!(encoder.encode(&plan(&[7, 8])).entries[0].blocks, [7, 8]);
        assert_eq!(encoder.encode(&plan(&[7, 8, 9])).entries[0].blocks, [9]);
        encoder.encode(&StepPlan::default());
        // Forgotten: tables are not kept for sequences that may never come back.
        assert_eq!(encoder.encode(&plan(&[7, 8, 9])).entries[0].blocks, [7, 8, 9]);
    }

    #[test]
    fn a_step_that_is_missing_is_noticed() {
        let (mut encoder, mut decoder) = (Encoder::default(), Decoder::default());
        encoder.encode(&plan(&[1]));
        let second = encoder.encode(&plan(&[1, 2]));
        assert_eq!(decoder.decode(second.clone()), Err(PlanError::Order { given: 1, expected: 0 }));
        assert_eq!(Decoder::default().decode(wire::Step { number: 0, ..second }), Err(PlanError::Table(1)));
    }
}
