use super::*;
use crate::{LogitRows, MAX_PASSED_OVER};

mod model;

const LIMITS: Limits = Limits {
    context_length: 64,
    kv_blocks: 12,
    block_tokens: 4,
    max_step_tokens: 8,
    max_sequences: 4,
    max_waiting: 6,
    prefix_cache: true,
    host_blocks: 0,
    draft_tokens: 0,
};

fn id(number: u64) -> SequenceId {
    SequenceId(number)
}

/// Prompts of different salts begin differently.
fn prompt(length: usize, salt: u32) -> Vec<u32> {
    (0..length as u32).map(|token| 1000 * salt + token).collect()
}

fn generate(length: usize, salt: u32, max_tokens: usize) -> Work {
    Work::Generate { prompt: prompt(length, salt), max_tokens, all_logits: false }
}

fn prefill(length: usize, salt: u32) -> Work {
    Work::Prefill { prompt: prompt(length, salt), all_logits: false }
}

fn submit(scheduler: &mut Scheduler, number: u64, work: Work) {
    submit_with(scheduler, number, 0, work);
}

fn submit_with(scheduler: &mut Scheduler, number: u64, priority: i32, work: Work) {
    let scheduling = Scheduling { priority, cache_salt: String::new() };
    scheduler.submit(id(number), work, &scheduling).unwrap();
}

fn started(planned: &Planned) -> Vec<u64> {
    planned.started.iter().map(|started| started.sequence.0).collect()
}

/// (sequence, start, tokens) of each entry.
fn shape(step: &StepPlan) -> Vec<(u64, usize, usize)> {
    step.entries.iter().map(|entry| (entry.sequence.0, entry.start, entry.tokens.len())).collect()
}

/// Runs one step in which token 7 is sampled everywhere; returns its plan.
fn turn(scheduler: &mut Scheduler) -> Planned {
    let planned = scheduler.plan();
    run(scheduler, &planned);
    planned
}

fn run(scheduler: &mut Scheduler, planned: &Planned) {
    scheduler.complete(&planned.step);
    for entry in planned.step.entries.iter().filter(|entry| entry.logits == LogitRows::Last) {
        scheduler.sampled(entry.sequence, 7, false);
    }
}

#[test]
fn decode_tokens_come_before_prompts_and_prompts_in_order() {
    let mut scheduler = Scheduler::new(LIMITS);
    submit(&mut scheduler, 1, generate(3, 1, 4));
    turn(&mut scheduler);
    submit(&mut scheduler, 2, generate(9, 2, 1));
    submit(&mut scheduler, 3, generate(5, 3, 1));
    assert_eq!(shape(&turn(&mut scheduler).step), [(1, 3, 1), (2, 0, 7)]);
    let third = turn(&mut scheduler);
    assert_eq!(shape(&third.step), [(1, 4, 1), (2, 7, 2), (3, 0, 5)]);
    assert_eq!(started(&third), [3], "it starts when its first chunk has room, not before");
}

#[test]
fn a_sequence_takes_the_blocks_of_its_prompt_and_more_as_it_generates() {
    let mut scheduler = Scheduler::new(LIMITS);
    submit(&mut scheduler, 1, generate(7, 1, 6));
    assert_eq!(turn(&mut scheduler).started[0].blocks.len(), 2);
    let tables: Vec<_> = (0..5).map(|_| turn(&mut scheduler).step.entries[0].blocks.len()).collect();
    assert_eq!(tables, [2, 3, 3, 3, 3], "positions 7 to 11");
    assert_eq!(scheduler.load(), Load::default());
}

#[test]
fn nobody_overtakes_the_head_of_the_queue() {
    let mut scheduler = Scheduler::new(LIMITS);
    submit(&mut scheduler, 1, Work::Reserve { prompt_tokens: 28, max_tokens: 8 });
    submit(&mut scheduler, 2, generate(13, 1, 10));
    submit(&mut scheduler, 3, generate(1, 2, 1));
    assert_eq!(
        started(&scheduler.plan()),
        [1],
        "8 of 12 blocks are taken; the second needs 4 and the first may need one more; the third needs 1"
    );
    assert_eq!(
        scheduler.load(),
        Load { running: 1, waiting: 2, waiting_prompt_tokens: 14, kv_blocks_used: 8 }
    );
    scheduler.release(id(1));
    assert_eq!(started(&scheduler.plan()), [2], "its prompt takes the whole step");
}

#[test]
fn a_reservation_needs_no_room_in_the_step() {
    let mut scheduler = Scheduler::new(LIMITS);
    submit(&mut scheduler, 1, generate(20, 1, 4));
    submit(&mut scheduler, 2, Work::Reserve { prompt_tokens: 4, max_tokens: 4 });
    let planned = scheduler.plan();
    assert_eq!(started(&planned), [1, 2]);
    assert_eq!(planned.started[1].blocks.len(), 2, "its prompt and one token");
    assert_eq!(shape(&planned.step), [(1, 0, 8)]);
}

#[test]
fn held_blocks_of_a_prefill_stay_until_released_but_its_slot_is_free() {
    let mut scheduler = Scheduler::new(Limits { max_sequences: 1, ..LIMITS });
    submit(&mut scheduler, 1, prefill(5, 1));
    submit(&mut scheduler, 2, prefill(5, 2));
    let planned = scheduler.plan();
    assert_eq!(planned.started[0].blocks.len(), 2, "no block for generated tokens");
    scheduler.complete(&planned.step);
    assert_eq!(scheduler.sampled(id(1), 7, false), Some(Ended::Length));
    assert_eq!(scheduler.load().kv_blocks_used, 2);
    assert_eq!(started(&scheduler.plan()), [2]);
    scheduler.release(id(1));
    assert_eq!(scheduler.load().kv_blocks_used, 2);
    scheduler.release(id(2));
    assert_eq!(scheduler.load(), Load::default());
}

#[test]
fn a_reservation_goes_on_without_computing_the_prompt() {
    let mut scheduler = Scheduler::new(LIMITS);
    let from = Continuation { prompt: vec![5; 9], first: 3, generated: 1, max_tokens: 3, stop: false };
    submit(&mut scheduler, 1, Work::Reserve { prompt_tokens: 9, max_tokens: 3 });
    assert!(scheduler.decode(id(1), from.clone()).is_err(), "not granted yet");
    turn(&mut scheduler);
    for wrong in [
        Continuation { prompt: vec![5; 8], ..from.clone() },
        Continuation { max_tokens: 4, ..from.clone() },
        Continuation { generated: 0, ..from.clone() },
    ] {
        scheduler.decode(id(1), wrong).unwrap_err();
    }
    assert_eq!(scheduler.decode(id(1), from.clone()), Ok(None));
    assert!(scheduler.decode(id(1), from).is_err(), "only once");
    assert_eq!(shape(&turn(&mut scheduler).step), [(1, 9, 1)]);
    assert_eq!(shape(&turn(&mut scheduler).step), [(1, 10, 1)]);
    assert_eq!(scheduler.load(), Load::default());
    assert_eq!(scheduler.counters(), Counters { steps: 3, output_tokens: 2, ..Counters::default() });
    // Its blocks were named when the decode began.
    submit(&mut scheduler, 2, Work::Generate { prompt: vec![5; 9], max_tokens: 1, all_logits: false });
    assert_eq!(turn(&mut scheduler).started[0].cached, 8);
}

#[test]
fn a_continuation_that_has_ended_frees_its_blocks() {
    let ends = [(1, true, Ended::Stop), (1, false, Ended::Length), (4, true, Ended::Stop)];
    for (max_tokens, stop, expected) in ends {
        let mut scheduler = Scheduler::new(LIMITS);
        submit(&mut scheduler, 1, Work::Reserve { prompt_tokens: 9, max_tokens });
        turn(&mut scheduler);
        let from = Continuation { prompt: vec![5; 9], first: 3, generated: 1, max_tokens, stop };
        assert_eq!(scheduler.decode(id(1), from), Ok(Some(expected)));
        assert_eq!(scheduler.load(), Load::default());
    }
}

#[test]
fn prompt_tokens_computed_again_are_counted() {
    let mut scheduler = Scheduler::new(LIMITS);
    submit(&mut scheduler, 1, Work::Reserve { prompt_tokens: 9, max_tokens: 3 });
    turn(&mut scheduler);
    let from = Continuation { prompt: vec![5; 9], first: 3, generated: 1, max_tokens: 3, stop: false };
    scheduler.decode(id(1), from).unwrap();
    scheduler.sequences.get_mut(&id(1)).unwrap().computed = 4;
    turn(&mut scheduler);
    assert_eq!(scheduler.counters().prefill_recomputed_tokens, 5);
}

#[test]
fn refusals_name_their_cause() {
    let mut scheduler = Scheduler::new(Limits { max_waiting: 1, ..LIMITS });
    let mut submit = |number, work| scheduler.submit(id(number), work, &Scheduling::default());
    assert_eq!(submit(1, generate(0, 1, 1)), Err(Refused::Empty));
    assert!(matches!(submit(1, generate(40, 1, 9)), Err(Refused::TooLong(_))));
    assert!(matches!(submit(1, prefill(64, 1)), Err(Refused::TooLong(_))));
    submit(1, generate(40, 1, 8)).unwrap();
    assert_eq!(submit(2, generate(1, 1, 1)), Err(Refused::Full { waiting: 1 }));
    assert_eq!(submit(1, generate(1, 1, 1)), Err(Refused::IdReused(id(1))));
}

#[test]
fn the_context_ends_a_sequence() {
    let mut scheduler = Scheduler::new(Limits { context_length: 10, ..LIMITS });
    submit(&mut scheduler, 1, generate(8, 1, 1000));
    let planned = scheduler.plan();
    scheduler.complete(&planned.step);
    assert_eq!(scheduler.sampled(id(1), 7, false), None);
    let planned = scheduler.plan();
    scheduler.complete(&planned.step);
    assert_eq!(scheduler.sampled(id(1), 7, false), Some(Ended::Length));
    assert_eq!(scheduler.load(), Load::default());
}

#[test]
fn full_blocks_are_shared_and_kept() {
    let mut scheduler = Scheduler::new(LIMITS);
    submit(&mut scheduler, 1, generate(7, 1, 1));
    let first = turn(&mut scheduler).started[0].blocks.clone();
    assert_eq!(scheduler.load(), Load::default(), "what is cached is not used");
    submit(&mut scheduler, 2, generate(7, 1, 9));
    let second = turn(&mut scheduler);
    assert_eq!(second.started[0].cached, 4);
    assert_eq!(shape(&second.step), [(2, 4, 3)]);
    assert_eq!(second.started[0].blocks[0], first[0]);
    submit(&mut scheduler, 3, generate(6, 1, 9));
    let third = turn(&mut scheduler);
    let (second, third) = (&second.started[0].blocks, &third.started[0]);
    assert_eq!(
        (third.blocks[0], third.cached),
        (second[0], 5),
        "the block, and the row before the last token"
    );
    assert_ne!(third.blocks[1], second[1]);
    assert_eq!(scheduler.counters().prefix_cached_tokens, 9);
    assert_eq!(scheduler.counters().prompt_tokens, 7 + 3 + 1);
}

#[test]
fn another_salt_shares_nothing() {
    let mut scheduler = Scheduler::new(LIMITS);
    for (number, salt) in [(1, "a"), (2, "b"), (3, ""), (4, "a")] {
        let scheduling = Scheduling { priority: 0, cache_salt: salt.to_owned() };
        scheduler.submit(id(number), generate(7, 1, 1), &scheduling).unwrap();
        let cached = turn(&mut scheduler).started[0].cached;
        assert_eq!(cached, if number == 4 { 4 } else { 0 }, "{number}");
    }
}

#[test]
fn a_prompt_that_is_wholly_cached_computes_its_last_token_in_a_block_of_its_own() {
    let mut scheduler = Scheduler::new(LIMITS);
    submit(&mut scheduler, 1, generate(8, 1, 1));
    let first = turn(&mut scheduler).started[0].blocks.clone();
    submit(&mut scheduler, 2, generate(8, 1, 9));
    let second = turn(&mut scheduler);
    let blocks = &second.started[0].blocks;
    assert_eq!(second.step.moves, [Move { from: first[1], to: blocks[1], rows: 3 }]);
    assert_eq!(shape(&second.step), [(2, 7, 1)]);
    assert_eq!((blocks[0], second.started[0].cached), (first[0], 7));
    assert_ne!(blocks[1], first[1]);
}

#[test]
fn a_copy_whose_source_is_the_only_block_left_needs_no_move() {
    let mut scheduler = Scheduler::new(Limits { kv_blocks: 2, ..LIMITS });
    submit(&mut scheduler, 1, prefill(8, 1));
    turn(&mut scheduler);
    scheduler.release(id(1));
    submit(&mut scheduler, 2, prefill(8, 1));
    let second = turn(&mut scheduler);
    assert_eq!((second.step.moves.len(), shape(&second.step)), (0, vec![(2, 7, 1)]));
}

#[test]
fn choices_of_one_prompt_compute_it_once() {
    let mut scheduler = Scheduler::new(LIMITS);
    for number in 1..=3 {
        submit(&mut scheduler, number, generate(7, 1, 5));
    }
    assert_eq!(shape(&turn(&mut scheduler).step), [(1, 0, 7)], "the others wait for what it computes");
    let second = turn(&mut scheduler);
    assert_eq!(shape(&second.step), [(1, 7, 1), (2, 6, 1), (3, 6, 1)]);
    let tables: Vec<_> = second.step.entries.iter().map(|entry| entry.blocks.clone()).collect();
    assert_eq!(
        second.step.moves,
        [2, 1].map(|from| Move { from: tables[0][1], to: tables[3 - from][1], rows: 2 }),
        "the rows of the last block, to a block of each one's own"
    );
}

#[test]
fn without_the_cache_everything_is_computed() {
    let mut scheduler = Scheduler::new(Limits { prefix_cache: false, ..LIMITS });
    for number in 1..=2 {
        submit(&mut scheduler, number, generate(4, 1, 2));
    }
    assert_eq!(shape(&turn(&mut scheduler).step), [(1, 0, 4), (2, 0, 4)]);
    assert_eq!(scheduler.pool.cached(), []);
}

#[test]
fn the_urgent_start_first() {
    let mut scheduler = Scheduler::new(LIMITS);
    submit(&mut scheduler, 1, generate(12, 1, 1));
    turn(&mut scheduler);
    for (number, priority) in [(2, -1), (3, 2), (4, 2)] {
        submit_with(&mut scheduler, number, priority, generate(3, number as u32, 1));
    }
    let planned = turn(&mut scheduler);
    assert_eq!(shape(&planned.step), [(3, 0, 3), (4, 0, 3), (1, 8, 2)], "before the rest of a prompt too");
}

/// One of 8 blocks each for two sequences of 13 tokens and 12 more to come.
fn two_that_do_not_fit(host_blocks: usize) -> Scheduler {
    let limits = Limits { kv_blocks: 8, max_step_tokens: 32, host_blocks, ..LIMITS };
    let mut scheduler = Scheduler::new(limits);
    submit_with(&mut scheduler, 1, 0, generate(11, 1, 12));
    submit_with(&mut scheduler, 2, 1, generate(11, 2, 12));
    for _ in 0..6 {
        turn(&mut scheduler);
    }
    assert_eq!(scheduler.load(), Load { running: 2, kv_blocks_used: 8, ..Load::default() });
    scheduler
}

#[test]
fn the_last_in_the_order_gives_its_blocks_back_and_computes_again() {
    let mut scheduler = two_that_do_not_fit(0);
    let planned = turn(&mut scheduler);
    assert_eq!(shape(&planned.step), [(2, 16, 1)], "the first one came first and has the lower priority");
    assert_eq!(planned.step.moves, []);
    assert_eq!(
        scheduler.load(),
        Load { running: 1, waiting: 1, waiting_prompt_tokens: 17, kv_blocks_used: 5 }
    );
    let resumed =
        std::iter::from_fn(|| Some(turn(&mut scheduler))).find(|turn| turn.step.entries[0].sequence == id(1));
    let resumed = resumed.unwrap();
    assert_eq!(started(&resumed), [], "it is told once");
    assert_eq!(shape(&resumed.step), [(1, 8, 9)], "two of its blocks were not needed meanwhile");
    let tokens: Vec<u32> = prompt(11, 1).into_iter().chain([7; 6]).skip(8).collect();
    assert_eq!(resumed.step.entries[0].tokens, tokens);
    let Counters { preemptions, preempted_recomputed_tokens, swapped_blocks, prompt_tokens, .. } =
        scheduler.counters();
    assert_eq!((preemptions, preempted_recomputed_tokens, swapped_blocks, prompt_tokens), (1, 8, 0, 22));
}

#[test]
fn or_moves_them_to_the_host_pool_and_back() {
    let mut scheduler = two_that_do_not_fit(4);
    let table = scheduler.sequences[&id(1)].blocks.clone();
    let planned = turn(&mut scheduler);
    let slots: Vec<_> = planned.step.moves.iter().map(|made| made.to).collect();
    let out: Vec<_> = planned.step.moves.iter().map(|made| (made.from, made.rows)).collect();
    assert_eq!(out, table.iter().map(|&block| (block, 4)).collect::<Vec<_>>());
    assert!(slots.iter().all(|slot| (8..12).contains(slot)));
    assert_eq!(scheduler.load().waiting_prompt_tokens, 1);
    let resumed =
        std::iter::from_fn(|| Some(turn(&mut scheduler))).find(|turn| turn.step.entries[0].sequence == id(1));
    let step = resumed.unwrap().step;
    assert_eq!(shape(&step), [(1, 16, 1)]);
    let blocks = &step.entries[0].blocks;
    let back = [2, 3].map(|block: usize| Move { from: slots[block], to: blocks[block], rows: 4 });
    assert_eq!(step.moves, back, "two of its blocks were not needed meanwhile");
    let Counters { preemptions, preempted_recomputed_tokens, swapped_blocks, .. } = scheduler.counters();
    assert_eq!((preemptions, preempted_recomputed_tokens, swapped_blocks), (1, 0, 4));
    assert_eq!(scheduler.host.free().len(), 4);
}

#[test]
fn what_others_read_or_write_is_never_preempted() {
    let mut scheduler = Scheduler::new(Limits { kv_blocks: 4, ..LIMITS });
    submit_with(&mut scheduler, 1, 9, generate(3, 1, 9));
    submit_with(&mut scheduler, 2, 0, prefill(3, 2));
    turn(&mut scheduler);
    submit_with(&mut scheduler, 3, 0, Work::Reserve { prompt_tokens: 3, max_tokens: 1 });
    submit_with(&mut scheduler, 4, 0, Work::Reserve { prompt_tokens: 3, max_tokens: 1 });
    assert_eq!(started(&turn(&mut scheduler)), [3], "the one that generates may need the last block");
    for _ in 0..4 {
        turn(&mut scheduler);
    }
    assert_eq!(scheduler.load().kv_blocks_used, 4);
    assert_eq!(shape(&turn(&mut scheduler).step), [], "it waits where it is");
    scheduler.release(id(2));
    assert_eq!(shape(&turn(&mut scheduler).step), [(1, 8, 1)]);
    assert_eq!(scheduler.counters().preemptions, 0);
}

/// A stream of requests of higher priority, each of which takes the only slot.
#[test]
fn the_oldest_starts_after_a_number_of_younger_ones() {
    let mut scheduler = Scheduler::new(Limits { max_sequences: 1, ..LIMITS });
    submit_with(&mut scheduler, 1, -5, generate(3, 1, 1));
    let mut younger = 0;
    for number in 2.. {
        submit_with(&mut scheduler, number, 5, generate(3, number as u32, 1));
        if started(&turn(&mut scheduler)) == [1] {
            break;
        }
        younger += 1;
    }
    assert_eq!(younger, MAX_PASSED_OVER);
}

/// A long prompt of low priority gets no token of a step that urgent ones fill.
#[test]
fn the_rest_of_a_prompt_does_not_wait_for_ever() {
    let mut scheduler = Scheduler::new(Limits { kv_blocks: 100, max_sequences: 3, ..LIMITS });
    submit_with(&mut scheduler, 1, -5, generate(17, 1, 1));
    assert_eq!(shape(&turn(&mut scheduler).step), [(1, 0, 8)]);
    let mut younger = 0;
    for number in 2.. {
        submit_with(&mut scheduler, number, 5, generate(8, number as u32, 1));
        if shape(&turn(&mut scheduler).step) == [(1, 8, 8)] {
            break;
        }
        younger += 1;
    }
    assert_eq!(younger, MAX_PASSED_OVER);
}

#[test]
fn who_was_preempted_too_often_is_preempted_for_the_young_no_more() {
    let mut sequence = Sequence::new(id(3), generate(5, 1, 9), &Scheduling::default(), 14);
    for _ in 0..crate::MAX_PREEMPTIONS {
        assert!(!sequence.turn.is_aged());
        sequence.preempt(None);
    }
    assert!(sequence.turn < Turn::new(id(1), i32::MAX));
}

/// A sequence of 6 tokens, the last of which is the first one generated.
fn drafting(limits: Limits, max_tokens: usize) -> Scheduler {
    let mut scheduler = Scheduler::new(Limits { draft_tokens: 3, ..limits });
    submit(&mut scheduler, 1, generate(5, 1, max_tokens));
    turn(&mut scheduler);
    scheduler
}

/// Runs a step in which the one entry has these drafts, and samples 7 as long as there is a row to sample from.
fn turn_with(scheduler: &mut Scheduler, drafts: &[u32]) -> (StepPlan, usize) {
    let Planned { mut step, rooms, .. } = scheduler.plan();
    assert_eq!(rooms, [DraftRoom { entry: 0, tokens: drafts.len() }]);
    step.entries[0].draft(drafts);
    scheduler.complete(&step);
    let sampled = 1 + drafts.iter().take_while(|draft| **draft == 7).count();
    for _ in 0..sampled {
        scheduler.sampled(id(1), 7, false);
    }
    (step, sampled)
}

#[test]
fn drafts_are_kept_up_to_the_first_that_is_not_sampled() {
    for (drafts, sampled) in [([7, 7, 7], 4), ([7, 7, 8], 3), ([7, 8, 7], 2), ([8, 7, 7], 1)] {
        let mut scheduler = drafting(LIMITS, 40);
        let (step, count) = turn_with(&mut scheduler, &drafts);
        assert_eq!((shape(&step), step.entries[0].logits), (vec![(1, 5, 4)], LogitRows::All));
        assert_eq!(count, sampled);
        assert_eq!(scheduler.tokens(id(1)), [prompt(5, 1), vec![7; 1 + sampled]].concat());
        assert_eq!(
            shape(&scheduler.plan().step),
            [(1, 5 + sampled, 1)],
            "and what follows is computed again"
        );
        let Counters { draft_tokens, accepted_draft_tokens, output_tokens, .. } = scheduler.counters();
        assert_eq!((draft_tokens, accepted_draft_tokens), (3, sampled as u64 - 1));
        assert_eq!(output_tokens, 1 + sampled as u64);
    }
}

#[test]
fn a_draft_that_ends_the_sequence_ends_it() {
    let mut scheduler = drafting(LIMITS, 40);
    let Planned { mut step, .. } = scheduler.plan();
    step.entries[0].draft(&[7, 7, 7]);
    scheduler.complete(&step);
    assert_eq!(scheduler.sampled(id(1), 7, false), None);
    assert_eq!(scheduler.sampled(id(1), 7, true), Some(Ended::Stop));
    assert_eq!(scheduler.load(), Load::default());
    assert_eq!(scheduler.counters().accepted_draft_tokens, 2);
}

#[test]
fn there_is_room_for_no_more_drafts_than_tokens_to_come() {
    for (max_tokens, room) in [(2, None), (3, Some(1)), (4, Some(2)), (9, Some(3))] {
        let mut scheduler = drafting(LIMITS, max_tokens);
        let rooms: Vec<_> = scheduler.plan().rooms.iter().map(|room| room.tokens).collect();
        assert_eq!(rooms, Vec::from_iter(room), "{max_tokens}");
    }
}

#[test]
fn drafts_take_the_tokens_that_a_step_has_left() {
    let mut scheduler = drafting(LIMITS, 40);
    submit(&mut scheduler, 2, generate(6, 2, 9));
    let planned = scheduler.plan();
    assert_eq!(shape(&planned.step), [(1, 5, 1), (2, 0, 6)]);
    assert_eq!(planned.rooms, [DraftRoom { entry: 0, tokens: 1 }]);
}

#[test]
fn drafts_take_no_block_that_another_may_need() {
    // The last of three drafts would be at position 8, in a third block; each of the sequences may grow.
    for (kv_blocks, other, room) in [(3, false, 2), (4, false, 3), (5, true, 2), (6, true, 3)] {
        let mut scheduler = drafting(Limits { kv_blocks, ..LIMITS }, 7);
        if other {
            submit(&mut scheduler, 2, Work::Reserve { prompt_tokens: 3, max_tokens: 5 });
        }
        let planned = scheduler.plan();
        assert_eq!(planned.rooms, [DraftRoom { entry: 0, tokens: room }], "{kv_blocks} {other}");
        assert_eq!(planned.step.entries[0].blocks.len(), room);
    }
}

#[test]
fn a_block_that_drafts_fill_is_named_when_they_are_sampled() {
    for (drafts, cached) in [([7, 7, 7], 8), ([7, 8, 7], 4)] {
        let mut scheduler = drafting(LIMITS, 40);
        turn_with(&mut scheduler, &drafts);
        scheduler.release(id(1));
        let prompt = [prompt(5, 1), vec![7; 5]].concat();
        submit(&mut scheduler, 2, Work::Generate { prompt, max_tokens: 1, all_logits: false });
        assert_eq!(scheduler.plan().started[0].cached, cached);
    }
}
