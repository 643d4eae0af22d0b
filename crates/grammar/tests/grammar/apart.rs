//! Prefill and decode on one engine, on two, and after any token of the choice on others: the same answer to the bit.

use herd_engine::{Engine, Event, FinishReason, Penalties, SampledToken, Sampling, Shaping};
use herd_grammar::Grammar;
use proptest::prelude::*;

use super::engine::{BLOCK_TOKENS, EOS, constraint, fake, ids, next, said, sampling};
use super::{ARITHMETIC, choices, lark, person, regex, schema};

/// Copies the KV of `tokens` positions, as workers do.
fn carry((from, source): (&Engine, &[u32]), (to, target): (&Engine, &[u32]), tokens: usize) {
    for (at, (source, target)) in source.iter().zip(target).enumerate() {
        let rows = tokens.saturating_sub(at * BLOCK_TOKENS).min(BLOCK_TOKENS);
        for (from, to) in from.kv().iter().zip(to.kv()) {
            for layer in from.layers().filter(|_| rows > 0) {
                to.write(*target, &from.read(*source, layer, from.heads(), rows).unwrap()).unwrap();
            }
        }
    }
}

/// The choice with its prompt computed on the first engine and all that follows on the second.
async fn apart(
    (prefill, decode): (&Engine, &Engine),
    prompt: Vec<u32>,
    sampling: Sampling,
) -> (Vec<SampledToken>, FinishReason) {
    let reservation = decode.reserve(prompt.len(), sampling.max_tokens).unwrap().ready().await.unwrap();
    let mut sequence = prefill.prefill(prompt.clone(), sampling.clone()).unwrap();
    let (mut table, mut first) = (None, None);
    while let Some(event) = next(&mut sequence).await {
        match event {
            Event::Started { blocks, cached: _ } => table = Some(blocks),
            Event::Token(token) => first = Some(token),
            Event::Computed { .. } | Event::Finished(_) => {}
            other => panic!("{other:?}"),
        }
    }
    let first = first.unwrap();
    carry((prefill, &table.unwrap()), (decode, reservation.blocks()), prompt.len());
    drop(sequence);
    let (rest, reason) = said(decode.decode(reservation, prompt, &first, sampling).unwrap()).await;
    (std::iter::once(first).chain(rest).collect(), reason)
}

fn a_grammar() -> impl Strategy<Value = Option<Grammar>> {
    prop_oneof![
        Just(None),
        Just(Some(schema(&person()))),
        Just(Some(lark(ARITHMETIC))),
        Just(Some(regex("([a-f]{1,3} ){2,6}[0-9]+"))),
        Just(Some(choices(&["one", "two three four five", "six"]))),
    ]
}

fn a_shaping() -> impl Strategy<Value = Shaping> {
    let penalties = (0.5_f32..2.0, -2.0_f32..2.0, -2.0_f32..2.0);
    let penalties =
        penalties.prop_map(|(repetition, presence, frequency)| Penalties { repetition, presence, frequency });
    let penalties = prop_oneof![Just(Penalties::default()), penalties];
    let bias = prop::collection::vec((0_u32..1024, -20.0_f32..20.0), 0..4);
    (bias, 0_usize..6, penalties, prop_oneof![Just(0), 1_usize..50], 0.0_f32..0.3).prop_map(
        |(bias, min_tokens, penalties, top_k, min_p)| Shaping { bias, min_tokens, penalties, top_k, min_p },
    )
}

fn with_grammar(grammar: Option<&Grammar>, said: &[u32], asked: &Sampling) -> Sampling {
    let constraint = grammar.map(|grammar| constraint(grammar, said));
    Sampling {
        max_tokens: asked.max_tokens - said.len(),
        first_position: said.len(),
        constraint,
        ..asked.clone()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn apart_and_resumed_it_is_the_same_to_the_bit(
        grammar in a_grammar(),
        shaping in a_shaping(),
        (seed, choice, length) in (any::<u64>(), 0_u32..4, 1_usize..40),
        (temperature, top_p) in (prop_oneof![Just(0.0_f32), 0.2_f32..2.0], 0.3_f32..=1.0),
        max_tokens in 1_usize..40,
        cut: prop::sample::Index,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let prompt: Vec<u32> = (0..length).map(|at| (at * 37 % 1000) as u32).collect();
            let asked = Sampling {
                max_tokens, temperature, top_p, choice, shaping, stop_ids: vec![EOS, 9],
                ..sampling(&regex("x"), seed)
            };
            let whole = with_grammar(grammar.as_ref(), &[], &asked);
            let unified = said(fake().generate(prompt.clone(), whole.clone()).unwrap()).await;
            let split = apart((&fake(), &fake()), prompt.clone(), whole).await;
            prop_assert_eq!(&split, &unified);

            // After any token but the last one, alone and apart.
            let (tokens, reason) = &unified;
            let cut = cut.index(tokens.len());
            let begun = ids(&tokens[..cut]);
            let left = with_grammar(grammar.as_ref(), &begun, &asked);
            let so_far: Vec<u32> = prompt.iter().chain(&begun).copied().collect();
            let rest = (tokens[cut..].to_vec(), *reason);
            prop_assert_eq!(&said(fake().generate(so_far.clone(), left.clone()).unwrap()).await, &rest);
            prop_assert_eq!(&apart((&fake(), &fake()), so_far, left).await, &rest);
            Ok(())
        })?;
    }
}
