//! A cache that remembers of every row what its KV follows from, beside a scheduler that is driven at random: whatever a step
//! reads has to be what its sequence alone would have written there.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use proptest::prelude::*;

use super::*;
use crate::{DraftRoom, MAX_DRAFTS, MAX_PREEMPTIONS, StepEntry};

const CONTEXT: usize = 48;
const BLOCK: usize = 4;

/// What a row's KV follows from: the salt and all tokens up to its position, hashed.
type Row = u64;

fn row(salt: &str, tokens: &[u32]) -> Row {
    let mut hasher = DefaultHasher::new();
    (salt, tokens).hash(&mut hasher);
    hasher.finish()
}

/// Guesses at what follows these tokens, of which about every other one is wrong.
fn drafts_after(tokens: &[u32], count: usize) -> Vec<u32> {
    let mut tokens = tokens.to_vec();
    let known = tokens.len();
    for _ in 0..count {
        let wrong = row("draft", &tokens) % 2;
        tokens.push(sampled_after(&tokens) + wrong as u32);
    }
    tokens.split_off(known)
}

/// What is sampled after these tokens: few different ones, so that sequences go on alike.
fn sampled_after(tokens: &[u32]) -> u32 {
    (row("", tokens) % 3) as u32
}

#[derive(Clone, Debug)]
struct Request {
    work: Work,
    /// Of a reservation too.
    prompt: Vec<u32>,
    scheduling: Scheduling,
}

#[derive(Clone, Debug)]
enum Op {
    Submit(Request),
    /// Releases the n-th known sequence.
    Release(prop::sample::Index),
    /// Continues the n-th granted reservation.
    Decode(prop::sample::Index, bool),
    /// Runs a step; the n-th sampled token is a stop token.
    Step(Option<prop::sample::Index>),
}

/// Many begin alike.
fn prompts() -> impl Strategy<Value = Vec<u32>> {
    (0..2_u32, 1..24_usize, prop::option::weighted(0.3, (0..24_usize, 0..2_u32))).prop_map(
        |(family, length, change)| {
            let mut prompt: Vec<u32> = (0..length as u32).map(|token| 100 * family + token).collect();
            if let Some((at, token)) = change
                && at < length
            {
                prompt[at] = token;
            }
            prompt
        },
    )
}

fn requests() -> impl Strategy<Value = Request> {
    let scheduling = (prop_oneof![3 => Just(0), 1 => -2..3_i32], prop_oneof![4 => Just(""), 1 => Just("b")])
        .prop_map(|(priority, salt)| Scheduling { priority, cache_salt: salt.to_owned() });
    (0..7_usize, prompts(), 1..24_usize, scheduling).prop_map(|(kind, prompt, max_tokens, scheduling)| {
        // An all_logits of each kind, and those without.
        let work = match kind {
            0 => Work::Prefill { prompt: prompt.clone(), all_logits: max_tokens % 3 == 0 },
            1 => Work::Reserve { prompt_tokens: prompt.len(), max_tokens },
            _ => Work::Generate { prompt: prompt.clone(), max_tokens, all_logits: kind == 2 },
        };
        Request { work, prompt, scheduling }
    })
}

fn ops() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => requests().prop_map(Op::Submit),
        1 => any::<prop::sample::Index>().prop_map(Op::Release),
        1 => (any::<prop::sample::Index>(), any::<bool>()).prop_map(|(at, stop)| Op::Decode(at, stop)),
        6 => prop::option::weighted(0.1, any::<prop::sample::Index>()).prop_map(Op::Step),
    ]
}

fn limits() -> impl Strategy<Value = Limits> {
    let host_blocks = prop_oneof![Just(0_usize), 1..20_usize];
    let draft_tokens = prop_oneof![Just(0_usize), 1..6_usize];
    let cache = (prop::bool::weighted(0.85), host_blocks, draft_tokens);
    (1..20_usize, 1..16_usize, 1..8_usize, 1..12_usize, cache).prop_map(
        |(
            kv_blocks,
            max_step_tokens,
            max_sequences,
            max_waiting,
            (prefix_cache, host_blocks, draft_tokens),
        )| Limits {
            context_length: CONTEXT,
            kv_blocks,
            block_tokens: BLOCK,
            max_step_tokens,
            max_sequences,
            max_waiting,
            prefix_cache,
            host_blocks,
            draft_tokens,
        },
    )
}

/// What is known of one sequence without looking at the scheduler.
#[derive(Debug)]
struct Expected {
    request: Request,
    /// Prompt and generated.
    tokens: Vec<u32>,
    /// Blocks it was told of.
    started: Option<Arc<[BlockId]>>,
    /// Positions that were computed, or found, at some time.
    high: usize,
    generated: usize,
    decoding: bool,
    /// Requests before it, when it came.
    older: usize,
    /// Starts of younger ones while it waited for its own.
    passed_over: usize,
}

struct Model {
    limits: Limits,
    scheduler: Scheduler,
    /// Of every block and, behind those, every slot of the host pool.
    rows: Vec<[Option<Row>; BLOCK]>,
    live: BTreeMap<SequenceId, Expected>,
    /// Prefills that ended.
    held: BTreeSet<SequenceId>,
    next_id: u64,
    prompt_tokens: u64,
    recomputed_tokens: u64,
    cached_tokens: u64,
    draft_tokens: u64,
    accepted_draft_tokens: u64,
}

impl Model {
    fn new(limits: Limits) -> Self {
        Self {
            limits,
            scheduler: Scheduler::new(limits),
            rows: vec![[None; BLOCK]; limits.kv_blocks + limits.host_blocks],
            live: BTreeMap::new(),
            held: BTreeSet::new(),
            next_id: 0,
            prompt_tokens: 0,
            recomputed_tokens: 0,
            cached_tokens: 0,
            draft_tokens: 0,
            accepted_draft_tokens: 0,
        }
    }

    fn waiting(&self) -> impl Iterator<Item = (SequenceId, &Expected)> {
        let runs = |id: &SequenceId| self.scheduler.sequences.contains_key(id);
        self.live.iter().filter(move |(id, _)| !runs(id)).map(|(&id, expected)| (id, expected))
    }

    fn submit(&mut self, request: Request) -> Result<(), TestCaseError> {
        let id = SequenceId(self.next_id);
        let unstarted = self.waiting().filter(|(_, expected)| expected.started.is_none()).count();
        match self.scheduler.submit(id, request.work.clone(), &request.scheduling) {
            Ok(()) => {
                prop_assert!(unstarted < self.limits.max_waiting);
                self.next_id += 1;
                let expected = Expected {
                    tokens: request.prompt.clone(),
                    request,
                    started: None,
                    high: 0,
                    generated: 0,
                    decoding: false,
                    older: self.live.len(),
                    passed_over: 0,
                };
                self.live.insert(id, expected);
            }
            Err(Refused::Full { waiting }) => {
                prop_assert_eq!((waiting, unstarted), (self.limits.max_waiting, waiting));
            }
            Err(Refused::TooLong(_)) => {
                let tokens = request.work.prompt_tokens() + request.work.generated_tokens();
                let blocks = tokens.min(CONTEXT).div_ceil(BLOCK);
                prop_assert!(blocks > self.limits.kv_blocks || request.prompt.len() >= CONTEXT);
            }
            Err(other) => prop_assert!(false, "{other}"),
        }
        Ok(())
    }

    fn release(&mut self, id: SequenceId) {
        self.scheduler.release(id);
        self.live.remove(&id);
        self.held.remove(&id);
    }

    fn reservations(&self) -> Vec<SequenceId> {
        let granted = |expected: &&Expected| {
            let reserves = matches!(expected.request.work, Work::Reserve { .. });
            reserves && expected.started.is_some() && !expected.decoding
        };
        self.live.iter().filter(|(_, expected)| granted(expected)).map(|(&id, _)| id).collect()
    }

    /// The KV of a reservation's prompt comes, and its decode begins.
    fn decode(&mut self, id: SequenceId, stop: bool) -> Result<(), TestCaseError> {
        let Some(expected) = self.live.get_mut(&id) else { return Ok(()) };
        let Work::Reserve { prompt_tokens, max_tokens } = expected.request.work else { return Ok(()) };
        let (prompt, salt) = (expected.request.prompt.clone(), &expected.request.scheduling.cache_salt);
        let blocks = expected.started.clone().unwrap_or_default();
        prop_assert_eq!(
            &blocks,
            &self.scheduler.sequences[&id].blocks,
            "a reservation's blocks stay its own"
        );
        for at in 0..prompt_tokens {
            self.rows[blocks[at / BLOCK] as usize][at % BLOCK] = Some(row(salt, &prompt[..=at]));
        }
        let first = sampled_after(&prompt);
        let from = Continuation { prompt, first, generated: 1, max_tokens, stop };
        let ended = self.scheduler.decode(id, from);
        (expected.decoding, expected.high, expected.generated) = (true, prompt_tokens, 1);
        expected.tokens.push(first);
        let done = stop || max_tokens == 1 || prompt_tokens + 1 >= CONTEXT;
        prop_assert_eq!(ended.map(|ended| ended.is_some()), Ok(done));
        if done {
            self.live.remove(&id);
        }
        Ok(())
    }

    fn step(&mut self, stop_at: Option<prop::sample::Index>) -> Result<Planned, TestCaseError> {
        let decodes: Vec<Turn> =
            self.scheduler.sequences.values().filter(|one| one.decodes()).map(|one| one.turn).collect();
        let preemptible = self.scheduler.sequences.values().filter(|one| one.is_preemptible());
        let before: Vec<Turn> = preemptible.map(|one| one.turn).collect();
        let mut planned = self.scheduler.plan();
        self.draft(&mut planned)?;
        let step = &planned.step;
        let now = |turn: &Turn| self.scheduler.sequences.get(&turn.id).map(|one| one.turn);
        // One that ages by it may come back at once.
        let last = before.iter().filter(|turn| now(turn) == Some(**turn)).max();
        let lost = before.iter().filter(|turn| now(turn).is_none()).min();
        prop_assert!(lost.is_none() || last < lost, "{lost:?} was preempted, {last:?} was not");
        prop_assert!(step.tokens() <= self.limits.max_step_tokens);
        prop_assert!(step.moves.is_empty() || !step.entries.is_empty(), "moves for nobody");
        self.check_started(&planned)?;
        self.check_decodes(step, &decodes)?;
        self.make(&step.moves)?;
        // From now on a reservation's blocks are written by others, in any order.
        for started in &planned.started {
            if matches!(self.live[&started.sequence].request.work, Work::Reserve { .. }) {
                for &block in &*started.blocks {
                    prop_assert_eq!(
                        self.scheduler.pool.owners(block),
                        1,
                        "a reserved block is another's too"
                    );
                    self.rows[block as usize] = [None; BLOCK];
                }
            }
        }
        self.check_rows()?;
        self.compute(step)?;
        self.scheduler.complete(step);
        let ends =
            |entry: &&StepEntry| entry.start + entry.tokens.len() >= self.live[&entry.sequence].tokens.len();
        let sampled: Vec<_> = step.entries.iter().filter(ends).collect();
        let stop_at = stop_at.filter(|_| !sampled.is_empty()).map(|at| at.index(sampled.len()));
        for (at, entry) in sampled.into_iter().enumerate() {
            let known = self.live[&entry.sequence].tokens.len() - entry.start;
            let mut drafts = entry.tokens[known..].iter();
            self.draft_tokens += drafts.len() as u64;
            loop {
                // It stops in the last row, where it comes so far.
                let (token, ended) = self.sample(entry.sequence, stop_at == Some(at) && drafts.len() == 0)?;
                let accepted = drafts.next() == Some(&token);
                self.accepted_draft_tokens += u64::from(accepted);
                if ended || !accepted {
                    break;
                }
                let expected = self.live.get_mut(&entry.sequence).unwrap();
                expected.high = expected.high.max(expected.tokens.len());
            }
        }
        self.check_blocks()?;
        let counters = self.scheduler.counters();
        prop_assert_eq!(counters.prefill_recomputed_tokens, 0);
        prop_assert_eq!(counters.prompt_tokens, self.prompt_tokens);
        prop_assert_eq!(counters.preempted_recomputed_tokens, self.recomputed_tokens);
        prop_assert_eq!(counters.prefix_cached_tokens, self.cached_tokens);
        prop_assert_eq!(counters.draft_tokens, self.draft_tokens);
        prop_assert_eq!(counters.accepted_draft_tokens, self.accepted_draft_tokens);
        Ok(planned)
    }

    /// Fills the room there is.
    fn draft(&mut self, planned: &mut Planned) -> Result<(), TestCaseError> {
        prop_assert!(planned.rooms.is_sorted_by_key(|room| room.entry));
        for &DraftRoom { entry, tokens } in &planned.rooms {
            let entry = &mut planned.step.entries[entry];
            prop_assert!((1..=self.limits.draft_tokens).contains(&tokens));
            let known = self.scheduler.tokens(entry.sequence);
            prop_assert_eq!((entry.tokens.len(), entry.start + 1), (1, known.len()), "of one that generates");
            entry.draft(&drafts_after(known, tokens));
        }
        prop_assert!(planned.rooms.iter().map(|room| room.tokens).sum::<usize>() <= MAX_DRAFTS);
        Ok(())
    }

    fn check_started(&mut self, planned: &Planned) -> Result<(), TestCaseError> {
        for Started { sequence, blocks, cached } in &planned.started {
            let expected = self.live.get_mut(sequence).unwrap();
            prop_assert!(expected.started.is_none(), "{sequence:?} started twice");
            let reserves = matches!(expected.request.work, Work::Reserve { .. });
            let prompt = expected.request.prompt.len();
            let positions = if reserves { prompt + 1 } else { prompt };
            prop_assert_eq!(blocks.len(), positions.div_ceil(BLOCK));
            let shares = self.limits.prefix_cache && !expected.request.work.all_logits();
            prop_assert!(*cached < prompt && (shares || *cached == 0));
            let computes = planned.step.entries.iter().find(|entry| entry.sequence == *sequence);
            prop_assert_eq!(computes.map(|entry| entry.start), (!reserves).then_some(*cached));
            expected.started = Some(Arc::clone(blocks));
            self.cached_tokens += *cached as u64;
        }
        let first_of = |id: SequenceId| self.live[&id].request.scheduling.priority;
        for started in &planned.started {
            let id = started.sequence;
            // Before an older one that lost its blocks, say.
            if self.scheduler.sequences[&id].turn.is_aged() {
                continue;
            }
            let overtaken = self.waiting().find(|(older, _)| *older < id && first_of(*older) >= first_of(id));
            prop_assert!(overtaken.is_none(), "{id:?} started before {overtaken:?}");
        }
        let waiting: Vec<_> = self.waiting().map(|(id, _)| id).collect();
        for id in waiting {
            let younger = planned.started.iter().filter(|started| started.sequence > id).count();
            let expected = self.live.get_mut(&id).unwrap();
            if expected.started.is_none() {
                expected.passed_over += younger;
            }
            let bound = (MAX_PASSED_OVER + self.limits.max_sequences) * (expected.older + 1);
            prop_assert!(expected.passed_over <= bound, "{id:?} starves");
        }
        Ok(())
    }

    /// Whoever generates is in the step, was preempted, or there is no block to be had from anyone after it.
    fn check_decodes(&self, step: &StepPlan, decodes: &[Turn]) -> Result<(), TestCaseError> {
        for turn in decodes {
            let computes = step.entries.iter().any(|entry| entry.sequence == turn.id);
            let Some(sequence) = self.scheduler.sequences.get(&turn.id).filter(|_| !computes) else {
                continue;
            };
            prop_assert_eq!(self.scheduler.pool.available(), 0, "{:?} was left out", turn);
            prop_assert_eq!(sequence.computed, sequence.blocks.len() * BLOCK);
            let mut others = self.scheduler.sequences.values();
            let after = others.find(|other| other.is_preemptible() && other.turn > *turn);
            prop_assert!(after.is_none(), "{turn:?} waits behind {after:?}");
        }
        Ok(())
    }

    fn make(&mut self, moves: &[Move]) -> Result<(), TestCaseError> {
        for &Move { from, to, rows } in moves {
            prop_assert!(from != to && (1..=BLOCK).contains(&rows));
            let source = self.rows[from as usize];
            prop_assert!(source[..rows].iter().all(Option::is_some), "nothing to move from {from}");
            if let Some(slot) = (to as usize).checked_sub(self.limits.kv_blocks) {
                prop_assert!(slot < self.limits.host_blocks);
            } else {
                prop_assert_eq!(self.scheduler.pool.owners(to), 1, "a block is written that is shared");
            }
            self.rows[to as usize][..rows].copy_from_slice(&source[..rows]);
            self.rows[to as usize][rows..].fill(None);
        }
        Ok(())
    }

    /// The rows of every sequence, and of every one that is swapped out, are those it would have written itself.
    fn check_rows(&self) -> Result<(), TestCaseError> {
        let running = self.scheduler.sequences.values().map(|sequence| (sequence, &*sequence.blocks));
        let swapped = self.scheduler.waiting.values().map(|sequence| (sequence, &sequence.swapped[..]));
        for (sequence, table) in running.chain(swapped) {
            let Expected { request, tokens, .. } = &self.live[&sequence.turn.id];
            for at in 0..sequence.computed {
                let held = self.rows[table[at / BLOCK] as usize][at % BLOCK];
                let own = row(&request.scheduling.cache_salt, &tokens[..=at]);
                prop_assert_eq!(held, Some(own), "position {} of {:?}", at, sequence);
            }
        }
        Ok(())
    }

    fn compute(&mut self, step: &StepPlan) -> Result<(), TestCaseError> {
        let mut seen = BTreeSet::new();
        for entry in &step.entries {
            let StepEntry { sequence, tokens, start, blocks, logits } = entry;
            prop_assert!(seen.insert(*sequence), "two entries of {sequence:?}");
            let expected = self.live.get_mut(sequence).unwrap();
            let end = start + tokens.len();
            prop_assert!(!tokens.is_empty() && end <= blocks.len() * BLOCK);
            // Drafts come after what is known.
            let written = [&expected.tokens[..*start], tokens].concat();
            let known = end.min(expected.tokens.len());
            prop_assert_eq!(&written[*start..known], &expected.tokens[*start..known]);
            prop_assert_eq!(*start, self.scheduler.sequences[sequence].computed);
            let last = if end == expected.tokens.len() { LogitRows::Last } else { LogitRows::None };
            let prompt = expected.request.prompt.len();
            // Of each position of the prompt once, however often it is computed.
            let all = expected.request.work.all_logits() && *start < prompt;
            let rows = all && *start >= expected.high || known < end;
            prop_assert_eq!(*logits, if rows { LogitRows::All } else { last });
            prop_assert!(!all || *start >= expected.high || end <= expected.high);
            if matches!(expected.request.work, Work::Prefill { .. }) {
                prop_assert_eq!(Some(blocks), expected.started.as_ref(), "what is sent is what was told");
            }
            for at in *start..end {
                let block = blocks[at / BLOCK];
                prop_assert_eq!(self.scheduler.pool.owners(block), 1, "a block is written that is shared");
                let own = row(&expected.request.scheduling.cache_salt, &written[..=at]);
                self.rows[block as usize][at % BLOCK] = Some(own);
            }
            let end = known;
            let high = expected.high.max(if expected.high == 0 { *start } else { 0 });
            self.recomputed_tokens += end.min(high).saturating_sub(*start) as u64;
            self.prompt_tokens += end.min(prompt).saturating_sub(high.max(*start)) as u64;
            expected.high = high.max(end);
        }
        Ok(())
    }

    /// The token, and whether the sequence ends with it.
    fn sample(&mut self, id: SequenceId, stop: bool) -> Result<(u32, bool), TestCaseError> {
        let expected = self.live.get_mut(&id).unwrap();
        let token = sampled_after(&expected.tokens);
        expected.generated += 1;
        expected.tokens.push(token);
        let ended = self.scheduler.sampled(id, token, stop);
        let limit = match expected.request.work {
            Work::Generate { max_tokens, .. } | Work::Reserve { max_tokens, .. } => max_tokens,
            Work::Prefill { .. } => 1,
        };
        let length = expected.generated >= limit || expected.tokens.len() >= CONTEXT;
        let reason = if stop { Some(Ended::Stop) } else { length.then_some(Ended::Length) };
        prop_assert_eq!(ended, reason);
        if reason.is_some() {
            if matches!(expected.request.work, Work::Prefill { .. }) {
                self.held.insert(id);
            } else {
                self.live.remove(&id);
            }
        }
        Ok((token, ended.is_some()))
    }

    /// Blocks that are owned, cached and free ones are each block once, and so are slots.
    fn check_blocks(&self) -> Result<(), TestCaseError> {
        let Scheduler { pool, host, waiting, sequences, .. } = &self.scheduler;
        let mut owners: BTreeMap<BlockId, usize> = BTreeMap::new();
        for sequence in sequences.values() {
            let once: BTreeSet<_> = sequence.blocks.iter().collect();
            prop_assert_eq!(once.len(), sequence.blocks.len(), "twice in a table");
            sequence.blocks.iter().for_each(|block| *owners.entry(*block).or_default() += 1);
        }
        for (&block, &count) in &owners {
            prop_assert_eq!(pool.owners(block), count);
        }
        prop_assert_eq!(pool.used(), owners.len());
        let mut all: Vec<_> = owners.into_keys().chain(pool.free()).chain(pool.cached()).collect();
        all.sort_unstable();
        let blocks: Vec<_> = (0..self.limits.kv_blocks as BlockId).collect();
        prop_assert_eq!(all, blocks, "in use, cached and free");
        let swapped = waiting.values().flat_map(|sequence| sequence.swapped.iter());
        let slots: BTreeSet<_> = swapped.chain(host.free()).collect();
        let count =
            waiting.values().map(|sequence| sequence.swapped.len()).sum::<usize>() + host.free().len();
        prop_assert_eq!((slots.len(), count), (self.limits.host_blocks, self.limits.host_blocks));

        prop_assert!(waiting.values().all(|sequence| sequence.blocks.is_empty()));
        prop_assert_eq!(waiting.len() + sequences.len(), self.live.len());
        let load = self.scheduler.load();
        prop_assert_eq!(load.waiting, waiting.len());
        prop_assert_eq!(load.running, sequences.len() - self.held.len());
        prop_assert!(load.running <= self.limits.running_sequences());
        prop_assert_eq!(load.kv_blocks_used, pool.used());
        Ok(())
    }

    fn apply(&mut self, op: Op) -> Result<(), TestCaseError> {
        match op {
            Op::Submit(request) => self.submit(request)?,
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

    /// A step, after which reservations become decodes and held prefills are released.
    fn advance(&mut self) -> Result<(), TestCaseError> {
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
        Ok(())
    }

    /// Lets everything run to its end.
    fn drain(&mut self) -> Result<(), TestCaseError> {
        // Each computes its positions once more for every time it is preempted; more often than so it is by others that end.
        let bound = (self.live.len() + 1) * CONTEXT * (MAX_PREEMPTIONS + 2) * 2;
        for _ in 0..bound {
            if self.live.is_empty() {
                return self.check_blocks();
            }
            self.advance()?;
        }
        prop_assert!(self.live.is_empty(), "never ended: {:?}", self.live);
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases()) })]

    /// Blocks are conserved, no block that is written is another's, everything that is read is right, steps keep to their
    /// budget, requests of one priority start in order, nobody that generates is left out while there is a block, counters
    /// count, and everyone ends.
    #[test]
    fn whatever_happens_the_invariants_hold(limits in limits(), ops in prop::collection::vec(ops(), 1..120)) {
        let mut model = Model::new(limits);
        for op in ops {
            model.apply(op)?;
        }
        model.drain()?;
        prop_assert_eq!(model.scheduler.load(), Load::default());
    }

    /// Under a stream of urgent requests that never ends, those that came before end all the same.
    #[test]
    fn nobody_starves(
        limits in limits(),
        first in prop::collection::vec(requests(), 1..8),
        urgent in prop::collection::vec(requests(), 4..12),
    ) {
        let mut model = Model::new(limits);
        for request in first {
            model.submit(request)?;
        }
        let last = model.next_id;
        let mut stream = urgent.into_iter().map(|mut request| {
            request.scheduling.priority = 10;
            request
        }).cycle();
        // Each of those before it may be passed over so often, by sequences that take so many steps at most; and each may be
        // preempted so often.
        let starts = (last as usize + 1) * (MAX_PASSED_OVER + limits.max_sequences) * (MAX_PREEMPTIONS + 1);
        for _ in 0..starts * CONTEXT {
            if model.live.keys().all(|id| id.0 >= last) {
                break;
            }
            for request in stream.by_ref().take(2) {
                model.submit(request)?;
            }
            model.advance()?;
        }
        prop_assert!(model.live.keys().all(|id| id.0 >= last), "starved: {:?}", model.live.first_key_value());
    }
}

/// As `PROPTEST_CASES` says, or few enough for every test run.
fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(512)
}
