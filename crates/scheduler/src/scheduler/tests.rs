use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::LogitRows;

const LIMITS: Limits = Limits {
    context_length: 64,
    kv_blocks: 12,
    block_tokens: 4,
    max_step_tokens: 8,
    max_sequences: 4,
    max_waiting: 6,
};

fn id(number: u64) -> SequenceId {
    SequenceId(number)
}

fn generate(prompt: usize, max_tokens: usize) -> Work {
    Work::Generate { prompt: (0..prompt as u32).collect(), max_tokens, all_logits: false }
}

fn prefill(prompt: usize) -> Work {
    Work::Prefill { prompt: (0..prompt as u32).collect(), all_logits: false }
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
    scheduler.complete(&planned.step);
    for entry in planned.step.entries.iter().filter(|entry| entry.logits == LogitRows::Last) {
        scheduler.sampled(entry.sequence, 7, false);
    }
    planned
}

#[test]
fn decode_tokens_come_before_prompts_and_prompts_in_order() {
    let mut scheduler = Scheduler::new(LIMITS);
    scheduler.submit(id(1), generate(3, 4)).unwrap();
    turn(&mut scheduler);
    scheduler.submit(id(2), generate(9, 1)).unwrap();
    scheduler.submit(id(3), generate(5, 1)).unwrap();
    assert_eq!(shape(&turn(&mut scheduler).step), [(1, 3, 1), (2, 0, 7)]);
    let third = turn(&mut scheduler);
    assert_eq!(shape(&third.step), [(1, 4, 1), (2, 7, 2), (3, 0, 5)]);
    assert_eq!(started(&third), [3], "it starts when its first chunk has room, not before");
}

#[test]
fn nobody_overtakes_the_head_of_the_queue() {
    let mut scheduler = Scheduler::new(LIMITS);
    scheduler.submit(id(1), Work::Reserve { prompt_tokens: 28, max_tokens: 8 }).unwrap();
    scheduler.submit(id(2), generate(10, 10)).unwrap();
    scheduler.submit(id(3), generate(1, 1)).unwrap();
    assert_eq!(started(&scheduler.plan()), [1], "9 of 12 blocks are taken; the second needs 5, the third 1");
    assert_eq!(
        scheduler.load(),
        Load { running: 1, waiting: 2, waiting_prompt_tokens: 11, kv_blocks_used: 9 }
    );
    scheduler.release(id(1));
    assert_eq!(started(&scheduler.plan()), [2], "its prompt takes the whole step");
}

#[test]
fn a_reservation_needs_no_room_in_the_step() {
    let mut scheduler = Scheduler::new(LIMITS);
    scheduler.submit(id(1), generate(20, 4)).unwrap();
    scheduler.submit(id(2), Work::Reserve { prompt_tokens: 4, max_tokens: 4 }).unwrap();
    let planned = scheduler.plan();
    assert_eq!(started(&planned), [1, 2]);
    assert_eq!(shape(&planned.step), [(1, 0, 8)]);
}

#[test]
fn held_blocks_of_a_prefill_stay_until_released_but_its_slot_is_free() {
    let mut scheduler = Scheduler::new(Limits { max_sequences: 1, ..LIMITS });
    scheduler.submit(id(1), prefill(5)).unwrap();
    scheduler.submit(id(2), prefill(5)).unwrap();
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
    scheduler.submit(id(1), Work::Reserve { prompt_tokens: 9, max_tokens: 3 }).unwrap();
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
    assert_eq!(
        scheduler.counters(),
        Counters { steps: 3, prompt_tokens: 0, output_tokens: 2, prefill_recomputed_tokens: 0 }
    );
}

#[test]
fn a_continuation_that_has_ended_frees_its_blocks() {
    let ends = [(1, true, Ended::Stop), (1, false, Ended::Length), (4, true, Ended::Stop)];
    for (max_tokens, stop, expected) in ends {
        let mut scheduler = Scheduler::new(LIMITS);
        scheduler.submit(id(1), Work::Reserve { prompt_tokens: 9, max_tokens }).unwrap();
        turn(&mut scheduler);
        let from = Continuation { prompt: vec![5; 9], first: 3, generated: 1, max_tokens, stop };
        assert_eq!(scheduler.decode(id(1), from), Ok(Some(expected)));
        assert_eq!(scheduler.load(), Load::default());
    }
}

#[test]
fn prompt_tokens_computed_again_are_counted() {
    let mut scheduler = Scheduler::new(LIMITS);
    scheduler.submit(id(1), Work::Reserve { prompt_tokens: 9, max_tokens: 3 }).unwrap();
    turn(&mut scheduler);
    let from = Continuation { prompt: vec![5; 9], first: 3, generated: 1, max_tokens: 3, stop: false };
    scheduler.decode(id(1), from).unwrap();
    let sequence = scheduler.sequences.get_mut(&id(1)).unwrap();
    (sequence.computed, sequence.phase) = (4, Phase::Prompt);
    turn(&mut scheduler);
    assert_eq!(scheduler.counters().prefill_recomputed_tokens, 5);
}

#[test]
fn refusals_name_their_cause() {
    let mut scheduler = Scheduler::new(Limits { max_waiting: 1, ..LIMITS });
    assert_eq!(scheduler.submit(id(1), generate(0, 1)), Err(Refused::Empty));
    assert!(matches!(scheduler.submit(id(1), generate(40, 9)), Err(Refused::TooLong(_))));
    assert!(matches!(scheduler.submit(id(1), prefill(64)), Err(Refused::TooLong(_))));
    scheduler.submit(id(1), generate(40, 8)).unwrap();
    assert_eq!(scheduler.submit(id(2), generate(1, 1)), Err(Refused::Full { waiting: 1 }));
    assert_eq!(scheduler.submit(id(1), generate(1, 1)), Err(Refused::IdReused(id(1))));
}

#[test]
fn the_context_ends_a_sequence() {
    let mut scheduler = Scheduler::new(Limits { context_length: 10, ..LIMITS });
    scheduler.submit(id(1), generate(8, 1000)).unwrap();
    let planned = scheduler.plan();
    scheduler.complete(&planned.step);
    assert_eq!(scheduler.sampled(id(1), 7, false), None);
    let planned = scheduler.plan();
    scheduler.complete(&planned.step);
    assert_eq!(scheduler.sampled(id(1), 7, false), Some(Ended::Length));
    assert_eq!(scheduler.load(), Load::default());
}

#[derive(Clone, Debug)]
enum Op {
    Submit(Work),
    /// Releases the n-th known sequence.
    Release(prop::sample::Index),
    /// Continues the n-th granted reservation.
    Decode(prop::sample::Index, bool),
    /// Runs a step; the n-th sampled token is a stop token.
    Step(Option<prop::sample::Index>),
}

fn work() -> impl Strategy<Value = Work> {
    prop_oneof![
        3 => (1..24_usize, 1..24_usize).prop_map(|(prompt, max_tokens)| generate(prompt, max_tokens)),
        1 => (1..40_usize).prop_map(prefill),
        1 => (1..24_usize, 1..24_usize)
            .prop_map(|(prompt_tokens, max_tokens)| Work::Reserve { prompt_tokens, max_tokens }),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => work().prop_map(Op::Submit),
        1 => any::<prop::sample::Index>().prop_map(Op::Release),
        1 => (any::<prop::sample::Index>(), any::<bool>()).prop_map(|(at, stop)| Op::Decode(at, stop)),
        5 => prop::option::weighted(0.1, any::<prop::sample::Index>()).prop_map(Op::Step),
    ]
}

fn limits() -> impl Strategy<Value = Limits> {
    (1..20_usize, 1..12_usize, 1..8_usize, 1..12_usize).prop_map(
        |(kv_blocks, max_step_tokens, max_sequences, max_waiting)| Limits {
            context_length: 48,
            kv_blocks,
            block_tokens: 4,
            max_step_tokens,
            max_sequences,
            max_waiting,
        },
    )
}

/// What the scheduler is expected to do with one sequence.
#[derive(Debug)]
struct Expected {
    work: Work,
    started: bool,
    /// Positions computed.
    computed: usize,
    generated: usize,
    decoding: bool,
}

/// Drives a scheduler and checks everything that must hold after each turn.
struct Model {
    limits: Limits,
    scheduler: Scheduler,
    live: BTreeMap<SequenceId, Expected>,
    /// Prefills that ended.
    held: BTreeSet<SequenceId>,
    /// Submitted and neither started nor released, in order.
    queue: Vec<SequenceId>,
    next_id: u64,
    prompt_tokens: u64,
}

impl Model {
    fn new(limits: Limits) -> Self {
        Self {
            limits,
            scheduler: Scheduler::new(limits),
            live: BTreeMap::new(),
            held: BTreeSet::new(),
            queue: Vec::new(),
            next_id: 0,
            prompt_tokens: 0,
        }
    }

    fn submit(&mut self, work: Work) -> Result<(), TestCaseError> {
        let id = SequenceId(self.next_id);
        match self.scheduler.submit(id, work.clone()) {
            Ok(()) => {
                self.next_id += 1;
                self.queue.push(id);
                self.live.insert(
                    id,
                    Expected { work, started: false, computed: 0, generated: 0, decoding: false },
                );
            }
            Err(Refused::Full { waiting }) => {
                prop_assert_eq!(waiting, self.limits.max_waiting);
                prop_assert_eq!(self.queue.len(), waiting);
            }
            Err(Refused::TooLong(_)) => {
                let tokens = work.prompt_tokens() + work.generated_tokens();
                prop_assert!(
                    tokens.min(48).div_ceil(4) > self.limits.kv_blocks || work.prompt_tokens() >= 48
                );
            }
            Err(other) => prop_assert!(false, "{other}"),
        }
        Ok(())
    }

    fn release(&mut self, id: SequenceId) {
        self.scheduler.release(id);
        self.live.remove(&id);
        self.held.remove(&id);
        self.queue.retain(|&waiting| waiting != id);
    }

    fn reservations(&self) -> Vec<SequenceId> {
        let granted = |expected: &&Expected| {
            expected.started && !expected.decoding && matches!(expected.work, Work::Reserve { .. })
        };
        self.live.iter().filter(|(_, expected)| granted(expected)).map(|(&id, _)| id).collect()
    }

    fn decode(&mut self, id: SequenceId, stop: bool) -> Result<(), TestCaseError> {
        let Some(expected) = self.live.get_mut(&id) else { return Ok(()) };
        let Work::Reserve { prompt_tokens, max_tokens } = expected.work else { return Ok(()) };
        let prompt = (0..prompt_tokens as u32).collect();
        let from = Continuation { prompt, first: 7, generated: 1, max_tokens, stop };
        let ended = self.scheduler.decode(id, from);
        (expected.decoding, expected.computed, expected.generated) = (true, prompt_tokens, 1);
        let done = stop || max_tokens == 1 || prompt_tokens + 1 >= self.limits.context_length;
        prop_assert_eq!(ended.map(|ended| ended.is_some()), Ok(done));
        if done {
            self.live.remove(&id);
        }
        Ok(())
    }

    fn step(&mut self, stop_at: Option<prop::sample::Index>) -> Result<Planned, TestCaseError> {
        let planned = self.scheduler.plan();
        prop_assert!(planned.step.tokens() <= self.limits.max_step_tokens);
        for started in &planned.started {
            prop_assert_eq!(self.queue.remove(0), started.sequence, "not first in, first started");
            let expected = self.live.get_mut(&started.sequence).unwrap();
            expected.started = true;
            let positions = (expected.work.prompt_tokens() + expected.work.generated_tokens()).min(48);
            prop_assert_eq!(started.blocks.len(), positions.div_ceil(4));
            let computes = planned.step.entries.iter().any(|entry| entry.sequence == started.sequence);
            prop_assert_eq!(computes, !matches!(expected.work, Work::Reserve { .. }));
        }
        self.check_entries(&planned.step)?;
        self.scheduler.complete(&planned.step);
        let sampled: Vec<_> = planned
            .step
            .entries
            .iter()
            .filter(|entry| entry.logits == LogitRows::Last)
            .map(|entry| entry.sequence)
            .collect();
        let stop_at = stop_at.filter(|_| !sampled.is_empty()).map(|at| at.index(sampled.len()));
        for (at, id) in sampled.into_iter().enumerate() {
            self.sample(id, stop_at == Some(at))?;
        }
        self.check_blocks()?;
        let counters = self.scheduler.counters();
        prop_assert_eq!(counters.prefill_recomputed_tokens, 0);
        prop_assert_eq!(counters.prompt_tokens, self.prompt_tokens);
        Ok(planned)
    }

    fn check_entries(&mut self, step: &StepPlan) -> Result<(), TestCaseError> {
        let mut seen = BTreeSet::new();
        for entry in &step.entries {
            prop_assert!(seen.insert(entry.sequence), "two entries of {:?}", entry.sequence);
            let expected = self.live.get_mut(&entry.sequence).unwrap();
            prop_assert!(expected.started);
            prop_assert!(!entry.tokens.is_empty());
            prop_assert_eq!(entry.start, expected.computed, "every position once and in order");
            let end = entry.start + entry.tokens.len();
            prop_assert!(end <= entry.blocks.len() * 4);
            let prompt = expected.work.prompt_tokens();
            if entry.start < prompt {
                let tokens: Vec<u32> = (entry.start as u32..end as u32).collect();
                prop_assert_eq!(&entry.tokens, &tokens, "not the prompt's tokens");
                let reserved = matches!(expected.work, Work::Reserve { .. });
                prop_assert!(!reserved, "a prompt computed elsewhere is computed again");
                self.prompt_tokens += tokens.len() as u64;
            } else {
                prop_assert_eq!(&entry.tokens, &vec![7]);
            }
            let last = if end < prompt { LogitRows::None } else { LogitRows::Last };
            prop_assert_eq!(entry.logits, last);
            expected.computed = end;
        }
        for (id, expected) in &self.live {
            let decoding = expected.generated > 0 && !self.held.contains(id);
            prop_assert!(!decoding || seen.contains(id), "{id:?} generates and was left out");
        }
        Ok(())
    }

    fn sample(&mut self, id: SequenceId, stop: bool) -> Result<(), TestCaseError> {
        let expected = self.live.get_mut(&id).unwrap();
        expected.generated += 1;
        let ended = self.scheduler.sampled(id, 7, stop);
        let limit = match expected.work {
            Work::Generate { max_tokens, .. } | Work::Reserve { max_tokens, .. } => max_tokens,
            Work::Prefill { .. } => 1,
        };
        let length = expected.generated >= limit || expected.work.prompt_tokens() + expected.generated >= 48;
        let reason = if stop { Some(Ended::Stop) } else { length.then_some(Ended::Length) };
        prop_assert_eq!(ended, reason);
        if reason.is_some() {
            if matches!(expected.work, Work::Prefill { .. }) {
                self.held.insert(id);
            } else {
                self.live.remove(&id);
            }
        }
        Ok(())
    }

    fn check_blocks(&self) -> Result<(), TestCaseError> {
        let owned: Vec<BlockId> =
            self.scheduler.sequences.values().flat_map(|sequence| sequence.blocks.iter().copied()).collect();
        prop_assert_eq!(self.scheduler.load().kv_blocks_used, owned.len());
        let mut all: Vec<BlockId> = self.scheduler.pool.free().iter().copied().chain(owned).collect();
        all.sort_unstable();
        let blocks: Vec<BlockId> = (0..self.limits.kv_blocks as BlockId).collect();
        prop_assert_eq!(all, blocks, "blocks in use and free ones are not each block once");
        prop_assert_eq!(self.scheduler.sequences.len(), self.live.len() - self.queue.len());
        let load = self.scheduler.load();
        prop_assert_eq!(load.waiting, self.queue.len());
        prop_assert_eq!(load.running, self.live.len() - self.queue.len() - self.held.len());
        prop_assert!(load.running <= self.limits.max_sequences);
        Ok(())
    }

    fn apply(&mut self, op: Op) -> Result<(), TestCaseError> {
        match op {
            Op::Submit(work) => self.submit(work)?,
            Op::Release(at) if !self.live.is_empty() => {
                let ids: Vec<_> = self.live.keys().copied().collect();
                self.release(ids[at.index(ids.len())]);
            }
            Op::Decode(at, stop) => {
                let ids = self.reservations();
                if !ids.is_empty() {
                    self.decode(ids[at.index(ids.len())], stop)?;
                }
            }
            Op::Step(stop_at) => drop(self.step(stop_at)?),
            Op::Release(_) => {}
        }
        self.check_blocks()
    }

    /// Lets everything run to its end; reservations become decodes, held prefills are released.
    fn drain(&mut self) -> Result<(), TestCaseError> {
        // Every turn ends a wait, or computes a position of someone.
        let bound = 2 * (self.next_id as usize + 1) * 48;
        for _ in 0..bound {
            if self.live.is_empty() {
                return self.check_blocks();
            }
            let planned = self.step(None)?;
            let reserved = self.reservations();
            let held = std::mem::take(&mut self.held);
            let moved = planned != Planned::default() || !reserved.is_empty() || !held.is_empty();
            for id in reserved {
                self.decode(id, false)?;
            }
            for id in held {
                self.release(id);
            }
            prop_assert!(moved || self.live.is_empty(), "stuck with {:?}", self.live);
        }
        prop_assert!(self.live.is_empty(), "never ended: {:?}", self.live);
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Blocks are conserved and owned once, steps keep to their budget, requests start in order, every prompt position is
    /// computed once and in order, nobody that generates is left out of a step, and everyone ends.
    #[test]
    fn whatever_happens_the_invariants_hold(limits in limits(), ops in prop::collection::vec(op(), 1..120)) {
        let mut model = Model::new(limits);
        for op in ops {
            model.apply(op)?;
        }
        model.drain()?;
        prop_assert_eq!(model.scheduler.load(), Load::default());
    }
}
