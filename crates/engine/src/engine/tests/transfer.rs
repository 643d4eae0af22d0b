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
            Event::Started { blocks } => table = Some(blocks),
            Event::Token(token) => first = Some(token),
            Event::Finished(_) => return (sequence, table.unwrap(), first.unwrap()),
            Event::Computed { .. } | Event::Prompt(_) => {}
            Event::Failed(reason) | Event::Unsatisfiable(reason) => panic!("{reason}"),
        }
    }
}

fn engine(tensor: usize) -> Engine {
    let (engine, _control) = start_with(FakeOptions { tensor, layers: LAYERS, ..options() }, LIMITS);
    engine
}

/// Runs a request apart; returns all its tokens. The decode engine's blocks are other ones than the prefill engine's.
async fn apart(
    (prefill, decode): (&Engine, &Engine),
    prompt: &[u32],
    sampling: &Sampling,
    lost: Option<usize>,
) -> Vec<SampledToken> {
    let shift = within(decode.reserve(1, 30).unwrap().ready()).await.unwrap();
    let reservation =
        within(decode.reserve(prompt.len(), sampling.max_tokens).unwrap().ready()).await.unwrap();
    let (held, table, first) = prefilled(prefill, prompt.to_vec(), sampling.clone()).await;
    assert!(!table.contains(&reservation.blocks()[0]));
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
