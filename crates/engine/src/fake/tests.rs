use herd_scheduler::{Move, SequenceId};

use super::*;
use crate::KvError;

fn options(tensor: usize) -> FakeOptions {
    FakeOptions { tensor, kv_blocks: 8, block_tokens: 4, ..FakeOptions::default() }
}

fn entry(tokens: &[u32], start: usize, blocks: &[u32], logits: LogitRows) -> StepEntry {
    StepEntry { sequence: SequenceId(0), tokens: tokens.to_vec(), start, blocks: blocks.into(), logits }
}

fn run(model: &mut FakeModel, entries: Vec<StepEntry>) -> Vec<f32> {
    model.step(&StepPlan { moves: vec![], entries }).unwrap().logits
}

const PROMPT: [u32; 6] = [3, 1, 4, 1, 5, 9];

#[test]
fn logits_depend_on_tokens_and_not_on_chunks_blocks_or_tensor_degree() {
    let mut model = FakeModel::new(options(1));
    let whole = run(&mut model, vec![entry(&PROMPT, 0, &[0, 1], LogitRows::Last)]);
    assert_eq!(whole.len(), 1000);
    assert!(whole.iter().all(|logit| (-4.0..4.0).contains(logit)));
    for tensor in [1, 2, 3, 4, 8] {
        let mut model = FakeModel::new(options(tensor));
        assert!(run(&mut model, vec![entry(&PROMPT[..3], 0, &[7, 2], LogitRows::None)]).is_empty());
        let rest = run(&mut model, vec![entry(&PROMPT[3..], 3, &[7, 2], LogitRows::All)]);
        assert_eq!(rest[2000..], whole, "tensor {tensor}");
        assert_ne!(rest[..1000], rest[1000..2000]);
    }
    let mut other = PROMPT;
    other[0] = 2;
    assert_ne!(run(&mut model, vec![entry(&other, 0, &[0, 1], LogitRows::Last)]), whole);
    other = PROMPT;
    other.swap(1, 2);
    assert_ne!(run(&mut model, vec![entry(&other, 0, &[0, 1], LogitRows::Last)]), whole);
    let mut reseeded = FakeModel::new(FakeOptions { seed: 1, ..options(1) });
    assert_ne!(run(&mut reseeded, vec![entry(&PROMPT, 0, &[0, 1], LogitRows::Last)]), whole);
}

/// Any byte of any rank's cache counts, those of replicated heads too.
#[test]
fn one_flipped_bit_changes_the_logits() {
    for tensor in [1, 4, 8] {
        let mut model = FakeModel::new(options(tensor));
        run(&mut model, vec![entry(&PROMPT, 0, &[0, 1], LogitRows::None)]);
        let after = vec![entry(&[2], 6, &[0, 1], LogitRows::Last)];
        let whole = run(&mut model, after.clone());
        for store in model.kv() {
            for (block, layer, at) in [(0, 0, 0), (0, 1, 60), (1, 0, 17)] {
                let right = store.read(block, layer, store.heads(), 2).unwrap();
                let mut wrong = right.clone();
                wrong.bytes[at] ^= 0x10;
                store.write(block, &wrong).unwrap();
                assert_ne!(run(&mut model, after.clone()), whole);
                store.write(block, &right).unwrap();
                assert_eq!(run(&mut model, after.clone()), whole);
            }
        }
    }
}

#[test]
fn rows_that_were_moved_are_as_good_as_those_that_were_computed() {
    for tensor in [1, 8] {
        let mut model = FakeModel::new(FakeOptions { host_blocks: 2, ..options(tensor) });
        run(&mut model, vec![entry(&PROMPT, 0, &[0, 1], LogitRows::None)]);
        let step = |model: &mut FakeModel, moves: &[(u32, u32, usize)], blocks: &[u32]| {
            let moves = moves.iter().map(|&(from, to, rows)| Move { from, to, rows }).collect();
            let entries = vec![entry(&[2], 6, blocks, LogitRows::Last)];
            model
                .step(&StepPlan { moves, entries })
                .map(|output| output.logits)
                .map_err(|error| error.to_string())
        };
        let whole = step(&mut model, &[], &[0, 1]).unwrap();
        // One after the other, through the host pool; the rows after those that are moved do not matter.
        assert_eq!(step(&mut model, &[(1, 9, 2), (9, 5, 2)], &[0, 5]).unwrap(), whole);
        assert_ne!(step(&mut model, &[(1, 6, 1)], &[0, 6]).unwrap(), whole);
        for wrong in [(0, 10, 1), (10, 0, 1), (3, 3, 1), (0, 3, 0), (0, 3, 5)] {
            assert!(
                step(&mut model, &[wrong], &[0, 1]).unwrap_err().contains("cannot be moved"),
                "{wrong:?}"
            );
        }
    }
}

#[test]
fn heads_are_split_or_replicated() {
    let heads =
        |tensor| -> Vec<_> { FakeModel::new(options(tensor)).kv().iter().map(|s| s.heads()).collect() };
    assert_eq!(heads(2), [0..2, 2..4]);
    assert_eq!(heads(8), [0..1, 0..1, 1..2, 1..2, 2..3, 2..3, 3..4, 3..4]);
}

#[test]
fn slabs_are_keys_then_values_head_by_head() {
    let mut model = FakeModel::new(options(2));
    run(&mut model, vec![entry(&PROMPT, 0, &[0, 1], LogitRows::None)]);
    let store = &model.kv()[1];
    let both = store.read(0, 1, 2..4, 3).unwrap();
    let row = store.row_bytes();
    assert_eq!(both.bytes.len(), 2 * 2 * 3 * row);
    let second = store.read(0, 1, 3..4, 3).unwrap();
    assert_eq!(second.bytes[..3 * row], both.bytes[3 * row..6 * row], "keys");
    assert_eq!(second.bytes[3 * row..], both.bytes[9 * row..], "values");
}

#[test]
fn reads_and_writes_name_what_is_not_there() {
    let model = FakeModel::new(options(2));
    let store = &model.kv()[1];
    assert_eq!(store.read(8, 0, 2..3, 1), Err(KvError::NoSuchBlock { block: 8, blocks: 8 }));
    assert_eq!(store.read(0, 2, 2..3, 1), Err(KvError::NoSuchLayer { layer: 2, held: 0..2 }));
    assert_eq!(store.read(0, 0, 1..3, 1), Err(KvError::NoSuchHeads { asked: 1..3, held: 2..4 }));
    assert_eq!(store.read(0, 0, 2..3, 5), Err(KvError::BadLength { bytes: 160 }));
    let mut slab = store.read(0, 0, 2..4, 4).unwrap();
    store.write(7, &slab).unwrap();
    slab.bytes.pop();
    assert_eq!(store.write(7, &slab), Err(KvError::BadLength { bytes: 255 }));
    slab.bytes.resize(320, 0);
    assert_eq!(store.write(7, &slab), Err(KvError::BadLength { bytes: 320 }));
}

#[test]
fn plans_that_no_scheduler_should_make_are_refused() {
    let mut model = FakeModel::new(options(1));
    let good = entry(&[1], 0, &[0], LogitRows::Last);
    let mut other = good.clone();
    other.sequence = SequenceId(1);
    let shares = StepEntry { sequence: SequenceId(1), ..entry(&[1], 4, &[0, 1], LogitRows::Last) };
    for entries in [
        vec![good.clone(), good.clone()],
        vec![good.clone(), other],
        vec![good.clone(), shares],
        vec![entry(&[], 0, &[0], LogitRows::None)],
        vec![entry(&[1], 4, &[0], LogitRows::None)],
        vec![entry(&[1], 0, &[8], LogitRows::None)],
        vec![entry(&[1000], 0, &[0], LogitRows::None)],
    ] {
        let error = model.step(&StepPlan { moves: vec![], entries }).unwrap_err();
        assert!(matches!(error, ExecutorError::BadPlan(_)));
    }
}

#[test]
fn unlikely_tokens_are_never_the_best() {
    let unlikely: Vec<u32> = (0..999).collect();
    let mut model = FakeModel::new(FakeOptions { unlikely, ..options(1) });
    let logits = run(&mut model, vec![entry(&PROMPT, 0, &[0, 1], LogitRows::Last)]);
    assert!(logits[..999].iter().all(|&logit| logit < logits[999]));
}
