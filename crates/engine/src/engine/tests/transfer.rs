//! Prefill on one engine, decode on another, the KV carried over as the worker does it: through `KvStore` alone.

use super::*;
use crate::TokenLogprob;

const LAYERS: usize = 2;

/// Copies the KV of `tokens` positions from every head of the source to every holder of it in the target. Leaves out block
/// `lost` of the table.
fn carry(from: (&Engine, &[u32]), to: (&Engine, &[u32]), tokens: usize, lost: Option<usize>) {
    for (at, (&source_block, &target_block)) in from.1.iter().zip(to.1).enumerate() {
        let rows = tokens.saturating_sub(at * 8).min(8);
        if lost == Some(at) || rows == 0 {
            continue;
        }
        for target in to.0.kv() {
            for head in target.heads() {
                let source = from.0.kv().iter().find(|store| store.heads().contains(&head)).unwrap();
                for layer in 0..LAYERS {
                    let slab = source.read(source_block, layer, head..head + 1, rows).unwrap();
                    target.write(target_block, &slab).unwrap();
                }
            }
        }
    }
}

async fn prefilled(
    engine: &Engine,
    prompt: Vec<u32>,
    sampling: Sampling,
) -> (Sequence, Arc<[u32]>, SampledToken) {
    let mut sequence = engine.prefill(prompt, sampling).unwrap();
    let (mut table, mut first) = (None, None);
    loop {
        match next(&mut sequence).await {
            Event::Started { blocks, cached: _ } => table = Some(blocks),
            Event::Token(token) => first = Some(token),
            Event::Finished(_) => return (sequence, table.unwrap(), first.unwrap()),
            Event::Computed { .. } | Event::Prompt(_) => {}
            Event::Failed(reason) | Event::Unsatisfiable(reason) => panic!("{reason}"),
        }
    }
}

fn engine(tensor: usize) -> Engine {
    engine_with(tensor, Limits { prefix_cache: false, ..LIMITS })
}

fn engine_with(tensor: usize, limits: Limits) -> Engine {
    let (engine, _control) = start_with(FakeOptions { tensor, layers: LAYERS, ..options() }, limits);
    engine
}

/// Runs a request apart; returns all its tokens. The decode engine's blocks are other ones than the prefill engine's.
pub(super) async fn apart(
    (prefill, decode): (&Engine, &Engine),
    prompt: &[u32],
    sampling: &Sampling,
    lost: Option<usize>,
) -> Vec<SampledToken> {
    let shift = within(decode.reserve(30, 1).unwrap().ready()).await.unwrap();
    let reservation =
        within(decode.reserve(prompt.len(), sampling.max_tokens).unwrap().ready()).await.unwrap();
    let (held, table, first) = prefilled(prefill, prompt.to_vec(), sampling.clone()).await;
    assert!(prefill.limits().prefix_cache || !table.contains(&reservation.blocks()[0]));
    carry((prefill, &table), (decode, reservation.blocks()), prompt.len(), lost);
    drop(held);
    let mut sequence = decode.decode(reservation, prompt.to_vec(), &first, sampling.clone()).unwrap();
    let mut all = vec![first];
    all.extend(tokens(&mut sequence).await);
    // Last, so that the next run finds the free blocks in the same order.
    drop(shift);
    idle(prefill).await;
    idle(decode).await;
    all
}

#[tokio::test]
async fn apart_or_together_the_tokens_are_the_same() {
    let unified = engine(1);
    // 4 KV heads: 3 and 8 ranks hold some of them more than once.
    for (from, to) in [(1, 1), (1, 4), (4, 2), (2, 8), (8, 3)] {
        let (prefill, decode) = (engine(from), engine(to));
        for (length, temperature) in [(1, 0.0), (8, 0.0), (21, 1.0), (16, 0.8)] {
            let sampling = Sampling { temperature, seed: 3, top_logprobs: 2, ..greedy(20) };
            let prompt = prompt(length, from);
            let mut together = unified.generate(prompt.clone(), sampling.clone()).unwrap();
            let together = tokens(&mut together).await;
            assert_eq!(together.len(), 20);
            let tokens = apart((&prefill, &decode), &prompt, &sampling, None).await;
            assert_eq!(tokens, together, "tensor {from} to {to}, {length} prompt tokens");
        }
        let counters = decode.counters();
        assert_eq!((counters.prompt_tokens, counters.prefill_recomputed_tokens), (0, 0));
        assert_eq!(counters.output_tokens, 4 * 19);
        assert_eq!(prefill.counters().output_tokens, 4);
    }
}

/// Blocks it shares are sent like those it has computed, and what was sent is shared on the other side.
#[tokio::test]
async fn a_prefill_that_finds_blocks_in_the_cache_sends_them_all_the_same() {
    let (unified, prefill, decode) = (engine(1), engine_with(1, LIMITS), engine_with(2, LIMITS));
    for (length, cached) in [(21, 0), (21, 20), (24, 16), (24, 23), (30, 24)] {
        let sampling = greedy(20);
        let prompt = prompt(length, 0);
        let mut together = unified.generate(prompt.clone(), sampling.clone()).unwrap();
        let together = tokens(&mut together).await;
        let before = prefill.counters().prefix_cached_tokens;
        assert_eq!(apart((&prefill, &decode), &prompt, &sampling, None).await, together);
        // Rows of the last block are of use only while their sequence lives.
        let full = if cached == 20 { 16 } else { cached };
        assert_eq!(prefill.counters().prefix_cached_tokens - before, full, "{length}");
        let mut sequence = decode.generate(prompt, sampling).unwrap();
        let Event::Started { cached, .. } = next(&mut sequence).await else { panic!("not started") };
        assert!(cached >= length / 8 * 8 - 1, "{cached} of {length}");
        assert_eq!(tokens(&mut sequence).await, together);
    }
    assert_eq!(decode.counters().prefill_recomputed_tokens, 0);
}

/// Of a decode whose blocks others needed: from its prompt too, which it had not computed before.
#[tokio::test]
async fn a_decode_that_is_preempted_goes_on_as_if_it_had_not() {
    for host_blocks in [0, 8] {
        let (unified, prefill) = (engine(1), engine(1));
        let limits = Limits { kv_blocks: 8, host_blocks, prefix_cache: false, ..LIMITS };
        let (decode, control) = start_with(FakeOptions { layers: LAYERS, ..options() }, limits);
        let (sampling, prompt) = (greedy(30), prompt(21, 0));
        let mut together = unified.generate(prompt.clone(), sampling.clone()).unwrap();
        let together = tokens(&mut together).await;
        control.close();
        let mut other = decode.generate((0..10).collect(), greedy(50)).unwrap();
        within(control.held()).await;
        let reserving = decode.reserve(21, 30).unwrap();
        within(control.pass()).await;
        let reservation = within(reserving.ready()).await.unwrap();
        let (_held, table, first) = prefilled(&prefill, prompt.clone(), sampling.clone()).await;
        carry((&prefill, &table), (&decode, reservation.blocks()), 21, None);
        let mut sequence = decode.decode(reservation, prompt, &first, sampling).unwrap();
        control.open();
        let events = events(&mut sequence).await;
        assert!(events.iter().all(|event| matches!(event, Event::Token(_) | Event::Finished(_))));
        let ids = events
            .iter()
            .filter_map(|event| if let Event::Token(token) = event { Some(token) } else { None });
        assert!(ids.eq(&together[1..]));
        assert_eq!(tokens(&mut other).await.len(), 50);
        let counters = decode.counters();
        assert!(counters.preemptions > 0 && (counters.swapped_blocks > 0) == (host_blocks > 0));
        assert_eq!((counters.prefill_recomputed_tokens, counters.prompt_tokens), (0, 10));
    }
}

/// The check above is worth something: every block counts.
#[tokio::test]
async fn a_lost_block_changes_the_tokens() {
    let (prefill, decode) = (engine(2), engine(4));
    let sampling = greedy(12);
    let whole = apart((&prefill, &decode), &prompt(21, 0), &sampling, None).await;
    for lost in 0..3 {
        // Other contents first, or the blocks hold the right ones from before.
        apart((&prefill, &decode), &prompt(21, 1), &sampling, None).await;
        let holed = apart((&prefill, &decode), &prompt(21, 0), &sampling, Some(lost)).await;
        assert_eq!(holed[0], whole[0]);
        assert_ne!(holed[1..], whole[1..], "block {lost}");
    }
}

#[tokio::test]
async fn a_first_token_that_is_the_last_one_finishes_at_once() {
    let engine = engine(1);
    let first = SampledToken { position: 0, token: TokenLogprob { id: 5, logprob: 0.0 }, top: Vec::new() };
    let stop = Sampling { stop_ids: vec![4, 5], ..greedy(10) };
    for (length, sampling, reason) in [
        (9, greedy(1), FinishReason::Length),
        (9, stop, FinishReason::Stop),
        (127, greedy(10), FinishReason::Length),
    ] {
        let reservation = within(engine.reserve(length, sampling.max_tokens).unwrap().ready()).await.unwrap();
        let mut sequence = engine.decode(reservation, prompt(length, 0), &first, sampling).unwrap();
        assert_eq!(next(&mut sequence).await, Event::Finished(reason));
        assert_eq!(*engine.load().borrow(), Load::default());
        assert_eq!(within(sequence.next()).await, None);
    }
    assert_eq!(engine.counters(), Counters::default());
}

#[tokio::test]
async fn a_decode_that_was_not_reserved_like_that_fails_and_frees_its_blocks() {
    let engine = engine(1);
    let first = SampledToken { position: 0, token: TokenLogprob { id: 5, logprob: 0.0 }, top: Vec::new() };
    for (length, max_tokens) in [(10, 10), (9, 11)] {
        let reservation = within(engine.reserve(9, 10).unwrap().ready()).await.unwrap();
        let mut sequence = engine.decode(reservation, prompt(length, 0), &first, greedy(max_tokens)).unwrap();
        let expected = format!(
            "no kv blocks are reserved for a prompt of {length} tokens with {max_tokens} to generate"
        );
        assert_eq!(next(&mut sequence).await, Event::Failed(expected));
        idle(&engine).await;
    }
    let reservation = within(engine.reserve(9, 10).unwrap().ready()).await.unwrap();
    let bad = SampledToken { token: TokenLogprob { id: 1000, logprob: 0.0 }, ..first };
    let error = engine.decode(reservation, prompt(9, 0), &bad, greedy(10)).unwrap_err();
    assert_eq!(error, SubmitError::BadToken { id: 1000, vocab_size: 1000 });
    idle(&engine).await;
}
