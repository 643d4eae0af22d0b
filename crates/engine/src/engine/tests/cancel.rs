//! A handle that is dropped ends the work within one step, in every phase, and leaves no block behind.

use super::*;

/// Lets the held step end and checks that nothing is left after it, and that no step was needed to find that out.
async fn ends_within_this_step(engine: &Engine, control: &FakeControl) {
    let steps = engine.counters().steps;
    within(control.pass()).await;
    idle(engine).await;
    assert_eq!(engine.counters().steps, steps + 1);
}

#[tokio::test]
async fn in_the_queue() {
    let (engine, control) = start(Limits { max_sequences: 1, ..LIMITS });
    control.close();
    let running = engine.generate(prompt(4, 0), greedy(50)).unwrap();
    within(control.held()).await;
    let waiting = engine.generate(prompt(4, 1), greedy(50)).unwrap();
    let unseen = engine.reserve(4, 1).unwrap();
    assert_eq!(engine.load().borrow().waiting, 2);
    drop((waiting, unseen));
    within(control.pass()).await;
    within(control.held()).await;
    assert_eq!(*engine.load().borrow(), Load { running: 1, kv_blocks_used: 1, ..Load::default() });
    drop(running);
    ends_within_this_step(&engine, &control).await;
}

#[tokio::test]
async fn between_two_chunks_of_a_prompt() {
    let (engine, control) = start(Limits { prefix_cache: false, ..LIMITS });
    control.close();
    for kind in [Engine::generate, Engine::prefill] {
        let mut sequence = kind(&engine, prompt(100, 0), greedy(5)).unwrap();
        within(control.pass()).await;
        assert_eq!(within(control.held()).await.entries[0].start, 16);
        assert!(matches!(next(&mut sequence).await, Event::Started { .. }));
        assert_eq!(next(&mut sequence).await, Event::Computed { computed: 16 });
        drop(sequence);
        ends_within_this_step(&engine, &control).await;
    }
    assert_eq!(engine.counters().prompt_tokens, 2 * 32);
}

#[tokio::test]
async fn while_it_generates() {
    let (engine, control) = start(LIMITS);
    control.close();
    let sequence = engine.generate(prompt(5, 0), greedy(50)).unwrap();
    let other = engine.generate(prompt(5, 1), greedy(50)).unwrap();
    for _ in 0..3 {
        within(control.pass()).await;
    }
    within(control.held()).await;
    drop(sequence);
    within(control.pass()).await;
    let plan = within(control.held()).await;
    assert_eq!(plan.entries.len(), 1, "the other one goes on alone");
    drop(other);
    ends_within_this_step(&engine, &control).await;
}

#[tokio::test]
async fn a_prefill_whose_blocks_are_held() {
    let (engine, _control) = start(LIMITS);
    let mut sequence = engine.prefill(prompt(20, 0), greedy(5)).unwrap();
    while !matches!(next(&mut sequence).await, Event::Finished(_)) {}
    assert_eq!(*engine.load().borrow(), Load { kv_blocks_used: 3, ..Load::default() });
    drop(sequence);
    idle(&engine).await;
}

#[tokio::test]
async fn a_reservation_in_the_queue_granted_and_decoding() {
    let (engine, control) = start(Limits { kv_blocks: 4, ..LIMITS });
    let granted = within(engine.reserve(20, 12).unwrap().ready()).await.unwrap();
    assert_eq!(granted.blocks().len(), 3, "20 positions and one in blocks of 8");
    assert_eq!(*engine.load().borrow(), Load { running: 1, kv_blocks_used: 3, ..Load::default() });
    let waiting = engine.reserve(20, 12).unwrap();
    let mut behind = tokio::spawn(engine.reserve(20, 12).unwrap().ready());
    drop(waiting);
    drop(granted);
    let granted = within(&mut behind).await.unwrap().unwrap();

    control.close();
    let first =
        SampledToken { position: 0, token: crate::TokenLogprob { id: 1, logprob: 0.0 }, top: Vec::new() };
    let decoding = engine.decode(granted, prompt(20, 0), &first, greedy(12)).unwrap();
    within(control.pass()).await;
    within(control.held()).await;
    drop(decoding);
    ends_within_this_step(&engine, &control).await;
    assert_eq!(engine.counters().steps, 2, "reservations computed nothing");
}

#[tokio::test]
async fn a_caller_that_stops_waiting_for_its_reservation() {
    let (engine, _control) = start(Limits { kv_blocks: 4, ..LIMITS });
    let granted = within(engine.reserve(20, 12).unwrap().ready()).await.unwrap();
    let waiting = tokio::spawn(engine.reserve(20, 12).unwrap().ready());
    within(engine.load().wait_for(|load| load.waiting == 1)).await.unwrap();
    waiting.abort();
    within(engine.load().wait_for(|load| load.waiting == 0)).await.unwrap();
    drop(granted);
    idle(&engine).await;
}

#[tokio::test]
async fn blocks_of_a_cancelled_sequence_go_to_the_next() {
    let (engine, control) = start(Limits { kv_blocks: 8, ..LIMITS });
    let expected = ids(&engine, prompt(40, 7), greedy(20)).await;
    control.close();
    let cancelled = engine.generate(prompt(40, 0), greedy(20)).unwrap();
    within(control.held()).await;
    let mut next = engine.generate(prompt(40, 7), greedy(20)).unwrap();
    drop(cancelled);
    control.open();
    let tokens = tokens(&mut next).await;
    assert_eq!(tokens.iter().map(|token| token.token.id).collect::<Vec<_>>(), expected);
}
