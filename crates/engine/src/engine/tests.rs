//! The step loop on the fake backend, through the handle.

mod cancel;
mod drafts;
mod failure;
mod observed;
mod prompt;
mod transfer;

use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::{Event, FakeControl, FakeModel, FakeOptions, FinishReason};

const LIMITS: Limits = Limits {
    context_length: 128,
    kv_blocks: 64,
    block_tokens: 8,
    max_step_tokens: 16,
    max_sequences: 8,
    max_waiting: 32,
    prefix_cache: true,
    host_blocks: 0,
    draft_tokens: 0,
};

fn options() -> FakeOptions {
    FakeOptions { kv_blocks: 64, block_tokens: 8, ..FakeOptions::default() }
}

fn start(limits: Limits) -> (Engine, FakeControl) {
    start_with(options(), limits)
}

fn start_with(options: FakeOptions, limits: Limits) -> (Engine, FakeControl) {
    let model = FakeModel::new(FakeOptions {
        kv_blocks: limits.kv_blocks,
        host_blocks: limits.host_blocks,
        ..options
    });
    let control = model.control();
    (Engine::start(Box::new(model), limits), control)
}

fn start_drafting(drafter: Option<Drafter>, limits: Limits) -> (Engine, FakeControl) {
    let Limits { kv_blocks, host_blocks, .. } = limits;
    let model = FakeModel::new(FakeOptions { kv_blocks, host_blocks, ..options() });
    let control = model.control();
    (Engine::start_with(Box::new(model), drafter, limits, Arc::new(Unobserved)), control)
}

fn greedy(max_tokens: usize) -> Sampling {
    Sampling {
        max_tokens,
        temperature: 0.0,
        top_p: 1.0,
        seed: 0,
        choice: 0,
        stop_ids: Vec::new(),
        top_logprobs: 0,
        first_position: 0,
        shaping: Shaping::default(),
        constraint: None,
        prompt_logprobs: None,
    }
}

fn shaped(shaping: Shaping) -> Sampling {
    Sampling { shaping, ..greedy(1) }
}

fn penalized(penalties: Penalties) -> Sampling {
    shaped(Shaping { penalties, ..Shaping::default() })
}

/// Tokens that look like nothing else's.
fn prompt(length: usize, salt: usize) -> Vec<u32> {
    (0..length).map(|at| ((at * 37 + salt * 101) % 1000) as u32).collect()
}

/// No wait in these tests lasts unless something is broken.
async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(5), future).await.expect("nothing happened for 20 s")
}

async fn next(sequence: &mut Sequence) -> Event {
    within(sequence.next()).await.expect("no event after the last one")
}

async fn events(sequence: &mut Sequence) -> Vec<Event> {
    let mut events = Vec::new();
    while let Some(event) = within(sequence.next()).await {
        events.push(event);
    }
    events
}

async fn tokens(sequence: &mut Sequence) -> Vec<SampledToken> {
    let token = |event| if let Event::Token(token) = event { Some(token) } else { None };
    events(sequence).await.into_iter().filter_map(token).collect()
}

async fn ids(engine: &Engine, prompt: Vec<u32>, sampling: Sampling) -> Vec<u32> {
    let mut sequence = engine.generate(prompt, sampling).unwrap();
    tokens(&mut sequence).await.iter().map(|token| token.token.id).collect()
}

/// Waits until nobody runs or waits and every block is free.
async fn idle(engine: &Engine) {
    let mut load = engine.load();
    let waited = within(load.wait_for(|load| *load == Load::default())).await;
    assert!(waited.is_ok());
}

#[tokio::test]
async fn events_come_in_order() {
    let (engine, _control) = start(LIMITS);
    let mut sequence = engine.generate(prompt(20, 0), greedy(2)).unwrap();
    let Event::Started { blocks, cached: 0 } = next(&mut sequence).await else { panic!("not started first") };
    assert_eq!(blocks.len(), 3, "20 positions in blocks of 8");
    assert_eq!(next(&mut sequence).await, Event::Computed { computed: 16 });
    assert_eq!(next(&mut sequence).await, Event::Computed { computed: 20 });
    for position in 0..2 {
        let Event::Token(token) = next(&mut sequence).await else { panic!("no token") };
        assert_eq!(token.position, position);
    }
    assert_eq!(next(&mut sequence).await, Event::Finished(FinishReason::Length));
    assert_eq!(*engine.load().borrow(), Load::default(), "who hears of the end finds the blocks free");
    assert_eq!(within(sequence.next()).await, None);
    let counters = Counters { steps: 3, prompt_tokens: 20, output_tokens: 2, ..Counters::default() };
    assert_eq!(engine.counters(), counters);
}

#[tokio::test]
async fn a_sequence_ends_at_a_stop_token_at_max_tokens_and_with_the_context() {
    let (engine, _control) = start(LIMITS);
    let all = ids(&engine, prompt(9, 1), greedy(20)).await;
    assert_eq!(all.len(), 20);
    let stop = Sampling { stop_ids: vec![all[4], 5000], ..greedy(20) };
    let mut sequence = engine.generate(prompt(9, 1), stop).unwrap();
    let stopped = events(&mut sequence).await;
    assert_eq!(stopped.last(), Some(&Event::Finished(FinishReason::Stop)));
    let first = all.iter().position(|id| *id == all[4]).unwrap();
    assert_eq!(stopped.iter().filter(|event| matches!(event, Event::Token(_))).count(), first + 1);

    let mut sequence = engine.generate(prompt(120, 1), greedy(usize::MAX)).unwrap();
    let full = events(&mut sequence).await;
    assert_eq!(full.last(), Some(&Event::Finished(FinishReason::Length)));
    assert_eq!(full.iter().filter(|event| matches!(event, Event::Token(_))).count(), 8);
}

#[tokio::test]
async fn bad_requests_are_refused_with_their_cause() {
    let (engine, _control) = start(Limits { kv_blocks: 10, ..LIMITS });
    let refused = |prompt, sampling| engine.generate(prompt, sampling).unwrap_err();
    assert_eq!(refused(Vec::new(), greedy(1)), SubmitError::Empty);
    assert_eq!(engine.reserve(0, 1).unwrap_err(), SubmitError::Empty);
    assert_eq!(refused(vec![1, 1000], greedy(1)), SubmitError::BadToken { id: 1000, vocab_size: 1000 });
    let too_long = TooLong { prompt_tokens: 70, max_tokens: 11, context_length: 128, kv_tokens: 80 };
    assert_eq!(refused(prompt(70, 0), greedy(11)), SubmitError::TooLong(too_long));
    assert!(matches!(engine.reserve(70, 11), Err(SubmitError::TooLong(_))));
    assert!(engine.prefill(prompt(80, 0), greedy(11)).is_ok());
    assert!(matches!(engine.prefill(prompt(81, 0), greedy(1)), Err(SubmitError::TooLong(_))));
    for (sampling, name) in [
        (greedy(0), "max_tokens"),
        (Sampling { temperature: -0.1, ..greedy(1) }, "temperature"),
        (Sampling { temperature: f32::NAN, ..greedy(1) }, "temperature"),
        (Sampling { top_p: 0.0, ..greedy(1) }, "top_p"),
        (Sampling { top_p: 1.1, ..greedy(1) }, "top_p"),
        (Sampling { top_p: f32::NAN, ..greedy(1) }, "top_p"),
        (Sampling { top_logprobs: 1001, ..greedy(1) }, "top_logprobs"),
        (shaped(Shaping { bias: vec![(1000, 0.0)], ..Shaping::default() }), "bias"),
        (shaped(Shaping { bias: vec![(1, f32::NAN)], ..Shaping::default() }), "bias"),
        (shaped(Shaping { min_p: 1.5, ..Shaping::default() }), "min_p"),
        (penalized(Penalties { repetition: 0.0, ..Penalties::default() }), "repetition_penalty"),
        (penalized(Penalties { presence: f32::INFINITY, ..Penalties::default() }), "presence_penalty"),
        (penalized(Penalties { frequency: f32::NAN, ..Penalties::default() }), "frequency_penalty"),
    ] {
        let error = refused(vec![1], sampling);
        assert!(matches!(error, SubmitError::BadSampling { field, .. } if field == name), "{error}");
    }
}

#[tokio::test]
async fn a_full_queue_refuses_at_once() {
    let (engine, control) = start(Limits { max_sequences: 1, max_waiting: 2, ..LIMITS });
    control.close();
    let mut running = engine.generate(prompt(3, 0), greedy(2)).unwrap();
    within(control.held()).await;
    let second = engine.generate(prompt(4, 1), greedy(1)).unwrap();
    let mut third = engine.generate(prompt(5, 2), greedy(1)).unwrap();
    let load = *engine.load().borrow();
    assert_eq!((load.waiting, load.waiting_prompt_tokens), (2, 9), "told before the loop has seen them");
    let error = engine.generate(prompt(6, 3), greedy(1)).unwrap_err();
    assert_eq!(error, SubmitError::Full { waiting: 2 });
    drop(second);
    within(control.pass()).await;
    within(control.held()).await;
    let load = *engine.load().borrow();
    assert_eq!((load.running, load.waiting), (1, 1), "a place in the queue is free within one step");
    let mut fourth = engine.generate(prompt(6, 3), greedy(1)).unwrap();
    control.open();
    assert_eq!(tokens(&mut running).await.len(), 2);
    assert_eq!(tokens(&mut third).await.len(), 1);
    assert_eq!(tokens(&mut fourth).await.len(), 1);
    idle(&engine).await;
}

#[tokio::test]
async fn prompts_run_beside_generation() {
    let (engine, control) = start(LIMITS);
    control.close();
    let _first = engine.generate(prompt(4, 0), greedy(5)).unwrap();
    within(control.pass()).await;
    within(control.held()).await;
    let _second = engine.generate(prompt(30, 1), greedy(5)).unwrap();
    within(control.pass()).await;
    let sizes = |plan: herd_scheduler::StepPlan| -> Vec<usize> {
        plan.entries.iter().map(|entry| entry.tokens.len()).collect()
    };
    assert_eq!(sizes(within(control.pass()).await), [1, 15]);
    assert_eq!(sizes(within(control.pass()).await), [1, 15]);
    control.open();
}

fn shaping(kind: usize) -> Shaping {
    let none = Shaping::default();
    match kind {
        0 => none,
        1 => Shaping { top_k: 7, ..none },
        2 => Shaping { min_p: 0.2, ..none },
        3 => Shaping { penalties: Penalties { repetition: 1.3, presence: 0.5, frequency: 0.5 }, ..none },
        _ => Shaping { bias: vec![(5, 2.0), (6, -3.0)], min_tokens: 4, ..none },
    }
}

/// Requests of all kinds of sampling, most of them longer than a step.
fn requests() -> Vec<(Vec<u32>, Sampling)> {
    let request = |at: usize| {
        let temperature = [0.0, 0.7, 1.0, 1.3][at % 4];
        let top_p = [1.0, 0.9, 0.3][at % 3];
        let sampling = Sampling {
            temperature,
            top_p,
            seed: at as u64 / 2,
            choice: at as u32 % 2,
            top_logprobs: at % 3,
            shaping: shaping(at % 5),
            ..greedy(3 + 5 * (at % 4))
        };
        (prompt(1 + (at * 17) % 61, at / 3), sampling)
    };
    (0..14).map(request).collect()
}

/// The tokens of all [`requests`], submitted in this order while the first step is held.
async fn together(drafter: Option<Drafter>, limits: Limits, order: &[usize]) -> Vec<Vec<SampledToken>> {
    let (engine, control) = start_drafting(drafter, limits);
    control.close();
    let requests = requests();
    let submit = |&at: &usize| {
        let (prompt, sampling) = requests[at].clone();
        (at, engine.generate(prompt, sampling).unwrap())
    };
    let mut sequences: Vec<_> = order.iter().map(submit).collect();
    control.open();
    let mut all = vec![Vec::new(); requests.len()];
    for (at, sequence) in &mut sequences {
        all[*at] = tokens(sequence).await;
    }
    idle(&engine).await;
    all
}

async fn alone() -> Vec<Vec<SampledToken>> {
    let (engine, _control) = start(Limits { max_step_tokens: 512, prefix_cache: false, ..LIMITS });
    let mut alone = Vec::new();
    for (prompt, sampling) in requests() {
        let mut sequence = engine.generate(prompt, sampling).unwrap();
        alone.push(tokens(&mut sequence).await);
    }
    alone
}

#[tokio::test]
async fn a_choice_that_another_engine_began_goes_on_as_if_it_had_not() {
    let (engine, _control) = start(LIMITS);
    for (undisturbed, (prompt, sampling)) in alone().await.into_iter().zip(requests()) {
        for begun in 1..sampling.max_tokens {
            let said = undisturbed[..begun].iter().map(|sampled| sampled.token.id);
            let prompt: Vec<u32> = prompt.iter().copied().chain(said).collect();
            let left = Sampling {
                first_position: begun,
                max_tokens: sampling.max_tokens - begun,
                ..sampling.clone()
            };
            let mut sequence = engine.generate(prompt.clone(), left.clone()).unwrap();
            assert_eq!(tokens(&mut sequence).await, undisturbed[begun..]);
            // The same where the prompt is computed elsewhere.
            let mut prefill = engine.prefill(prompt.clone(), left.clone()).unwrap();
            let first = tokens(&mut prefill).await.remove(0);
            assert_eq!(first, undisturbed[begun]);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn nothing_that_shares_or_moves_the_cache_changes_a_token(
        max_step_tokens in 1..80_usize,
        max_sequences in 1..10_usize,
        kv_blocks in 12..64_usize,
        prefix_cache in any::<bool>(),
        host_blocks in prop_oneof![Just(0_usize), 1..20_usize],
        drafts in prop::option::of((drafts::kinds(), 1..6_usize)),
        order in Just((0..14).collect::<Vec<usize>>()).prop_shuffle(),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let limits =
            Limits { max_step_tokens, max_sequences, kv_blocks, prefix_cache, host_blocks, ..LIMITS };
        let draft_tokens = drafts.map_or(0, |(_, tokens)| tokens);
        let limits = Limits { draft_tokens, ..limits };
        let drafter = drafts.map(|(kind, _)| drafts::drafter(kind, limits));
        let (alone, together) =
            runtime.block_on(async { (alone().await, together(drafter, limits, &order).await) });
        prop_assert_eq!(alone, together);
    }
}

#[tokio::test]
async fn a_reader_that_sleeps_holds_up_nothing_and_misses_nothing() {
    let (engine, _control) = start(LIMITS);
    let mut asleep = engine.generate(prompt(70, 0), greedy(50)).unwrap();
    let mut prefill = engine.prefill(prompt(70, 0), greedy(50)).unwrap();
    let mut load = engine.load();
    within(load.wait_for(|load| load.running == 0 && load.waiting == 0)).await.unwrap();
    let all = events(&mut asleep).await;
    assert!(matches!(all[0], Event::Started { .. }));
    let computed = |event: &&Event| matches!(event, Event::Computed { .. });
    assert_eq!(all.iter().rfind(computed), Some(&Event::Computed { computed: 70 }));
    assert_eq!(all.iter().filter(|event| matches!(event, Event::Token(_))).count(), 50);
    assert_eq!(all.last(), Some(&Event::Finished(FinishReason::Length)));
    let mut prefilled = Vec::new();
    while !matches!(prefilled.last(), Some(Event::Finished(_))) {
        prefilled.push(next(&mut prefill).await);
    }
    assert_eq!(engine.load().borrow().kv_blocks_used, 9, "the prefill's own until it is dropped");
}

/// One event a step of one prompt token is the most a sequence can emit.
#[tokio::test]
async fn the_channel_has_room_for_every_event() {
    let (engine, _control) =
        start(Limits { max_step_tokens: 1, max_sequences: 1, prefix_cache: false, ..LIMITS });
    let mut generated = engine.generate(prompt(30, 0), greedy(20)).unwrap();
    idle(&engine).await;
    assert_eq!(events(&mut generated).await.len(), 1 + 30 + 20 + 1);
    let mut prefilled = engine.prefill(prompt(30, 0), greedy(20)).unwrap();
    within(engine.load().wait_for(|load| load.running + load.waiting == 0)).await.unwrap();
    for _ in 0..32 {
        next(&mut prefilled).await;
    }
    assert_eq!(next(&mut prefilled).await, Event::Finished(FinishReason::Length));
}

#[tokio::test]
async fn an_idle_loop_sleeps() {
    let (engine, _control) = start(Limits { kv_blocks: 2, ..LIMITS });
    let blocker = within(engine.reserve(8, 8).unwrap().ready()).await.unwrap();
    let _starved = engine.generate(prompt(3, 0), greedy(1)).unwrap();
    for _ in 0..100 {
        let waiting = engine.reserve(8, 8).unwrap();
        within(engine.load().wait_for(|load| load.waiting == 2)).await.unwrap();
        drop(waiting);
        within(engine.load().wait_for(|load| load.waiting == 1)).await.unwrap();
    }
    let turns = engine.inner.shared.publications();
    assert!(turns <= 2 + 2 * 100, "{turns} turns for 202 commands");
    drop(blocker);
    idle(&engine).await;
}
