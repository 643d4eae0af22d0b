//! What else is in a step, how prompts are cut, in which order sequences come and which blocks they get, over how many stages
//! the layers are split: none of it changes a bit of the logits.

use std::cell::RefCell;
use std::collections::VecDeque;

use herd_engine::Isa;
use herd_model::{BLOCK_TOKENS, Dtype, Parallelism};
use herd_scheduler::{LogitRows, SequenceId, StepEntry};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::reference::fixture;
use crate::runner::Runner;

const SEQUENCES: usize = 5;
const LONGEST: usize = 150;
const BLOCKS: usize = SEQUENCES * LONGEST.div_ceil(BLOCK_TOKENS);

/// Sequences of random tokens, the order of the blocks they get, and steps that take chunks of them.
#[derive(Debug)]
struct Schedule {
    sequences: Vec<Vec<u32>>,
    blocks: Vec<u32>,
    steps: Vec<Vec<Chunk>>,
}

#[derive(Clone, Debug)]
struct Chunk {
    sequence: usize,
    tokens: usize,
    logits: LogitRows,
}

fn schedules() -> impl Strategy<Value = Schedule> {
    let sequences = prop::collection::vec(prop::collection::vec(0_u32..1024, 1..=LONGEST), 1..=SEQUENCES);
    let blocks = Just((0..BLOCKS as u32).collect::<Vec<_>>()).prop_shuffle();
    let logits = prop_oneof![Just(LogitRows::None), Just(LogitRows::Last), Just(LogitRows::All)];
    let tokens = prop_oneof![Just(1_usize), 1..=LONGEST];
    let chunk = (0..SEQUENCES, tokens, logits).prop_map(|(sequence, tokens, logits)| Chunk {
        sequence,
        tokens,
        logits,
    });
    let steps = prop::collection::vec(prop::collection::vec(chunk, 1..=SEQUENCES), 0..12);
    (sequences, blocks, steps).prop_map(|(sequences, blocks, steps)| Schedule { sequences, blocks, steps })
}

#[test]
fn tiny_bf16() {
    check("tiny-llama31/tiny-llama31-bf16");
}

#[test]
fn tiny_fbgemm_fp8() {
    check("tiny-llama31/tiny-llama31-fbgemm-fp8");
}

#[test]
fn tiny_compressed_tensors() {
    check("tiny-llama31/tiny-llama31-compressed-tensors-fp8");
}

fn check(model: &str) {
    let layouts = [(1, 1), (2, 1), (4, 1), (2, 2), (1, 4)].map(|layout| (layout, Isa::detect()));
    let others = Isa::all().into_iter().filter(|isa| *isa != Isa::detect()).map(|isa| ((1, 1), isa));
    for ((tensor, pipeline), isa) in layouts.into_iter().chain(others) {
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let load = |pipeline| {
                let parallelism = Parallelism { tensor, pipeline };
                Runner::load_with(isa, &fixture(model), parallelism, dtype, BLOCKS)
            };
            let runner = RefCell::new(load(pipeline));
            let mut one_stage = (pipeline > 1).then(|| load(1));
            let mut cases =
                TestRunner::new(Config { cases: 8, failure_persistence: None, ..Config::default() });
            let result = cases.run(&schedules(), |schedule| {
                compare(&mut runner.borrow_mut(), schedule);
                Ok(())
            });
            result.unwrap_or_else(|failure| {
                panic!("{model} tensor {tensor} pipeline {pipeline} {dtype} by {isa}: {failure}")
            });
            if let Some(one_stage) = &mut one_stage {
                // A step that is cut into several batches.
                let tokens: Vec<u32> = (0..300).map(|token| token * 7 % 1024).collect();
                let staged = runner.borrow_mut().logits_of_all(&tokens, 0).concat();
                assert!(same_bits(&staged, &one_stage.logits_of_all(&tokens, 0).concat()), "{model} {dtype}");
            }
        }
    }
}

fn compare(runner: &mut Runner, schedule: Schedule) {
    let Schedule { sequences, blocks, steps } = schedule;
    // One sequence at a time, each in one step. What this leaves in the blocks must not matter below.
    let alone: Vec<_> = sequences.iter().map(|tokens| runner.logits_of_all(tokens, 0)).collect();
    let tables: Vec<_> = blocks.chunks(LONGEST.div_ceil(BLOCK_TOKENS)).collect();
    let mut computed = vec![0; sequences.len()];
    let rest = (0..sequences.len())
        .map(|sequence| vec![Chunk { sequence, tokens: LONGEST, logits: LogitRows::All }]);
    for chunks in steps.into_iter().chain(rest) {
        let mut entries = Vec::new();
        let mut expected = VecDeque::new();
        for Chunk { sequence, tokens, logits } in chunks {
            let Some(all) = sequences.get(sequence) else { continue };
            let start = computed[sequence];
            let end = all.len().min(start + tokens);
            let there = entries.iter().any(|entry: &StepEntry| entry.sequence == SequenceId(sequence as u64));
            if start == end || there {
                continue;
            }
            computed[sequence] = end;
            let rows = match logits {
                LogitRows::None => end..end,
                LogitRows::Last => end - 1..end,
                LogitRows::All => start..end,
            };
            expected.extend(rows.map(|position| (sequence, position)));
            entries.push(StepEntry {
                sequence: SequenceId(sequence as u64),
                tokens: all[start..end].to_vec(),
                start,
                blocks: tables[sequence].into(),
                logits,
            });
        }
        let rows = runner.step(entries);
        assert_eq!(rows.len(), expected.len());
        for (row, (sequence, position)) in rows.iter().zip(expected) {
            assert!(same_bits(row, &alone[sequence][position]), "sequence {sequence} position {position}");
        }
    }
}

fn same_bits(one: &[f32], other: &[f32]) -> bool {
    one.len() == other.len() && one.iter().zip(other).all(|(a, b)| a.to_bits() == b.to_bits())
}
