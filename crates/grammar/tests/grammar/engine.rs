//! An engine under a grammar: what it says, how it ends.

use std::time::Duration;

use herd_engine::{
    Constraint, Engine, EngineLimits, Event, FakeModel, FakeOptions, FinishReason, SampledToken, Sampling,
    Sequence, Shaping,
};
use herd_grammar::Grammar;

use super::{ARITHMETIC, choices, compile, is_arithmetic, is_person, lark, person, regex, schema, text};

pub(crate) const BLOCK_TOKENS: usize = 8;

/// The model's end of a text.
pub(crate) const EOS: u32 = 1016;

pub(crate) fn fake() -> Engine {
    let options = FakeOptions {
        vocab_size: 1024,
        kv_blocks: 256,
        block_tokens: BLOCK_TOKENS,
        ..FakeOptions::default()
    };
    let limits = EngineLimits {
        context_length: 512,
        kv_blocks: 256,
        block_tokens: BLOCK_TOKENS,
        max_step_tokens: 16,
        max_sequences: 8,
        max_waiting: 32,
        host_blocks: 0,
        draft_tokens: 0,
        prefix_cache: true,
    };
    Engine::start(Box::new(FakeModel::new(options)), limits)
}

pub(crate) fn sampling(grammar: &Grammar, seed: u64) -> Sampling {
    Sampling {
        max_tokens: 300,
        temperature: 1.0,
        top_p: 1.0,
        seed,
        choice: 0,
        stop_ids: vec![EOS],
        top_logprobs: 2,
        first_position: 0,
        shaping: Shaping::default(),
        constraint: Some(constraint(grammar, &[])),
        prompt_logprobs: None,
    }
}

pub(crate) fn constraint(grammar: &Grammar, said: &[u32]) -> Box<dyn Constraint> {
    Box::new(compile(grammar).constraint(said).unwrap())
}

pub(crate) async fn next(sequence: &mut Sequence) -> Option<Event> {
    tokio::time::timeout(Duration::from_secs(30), sequence.next()).await.expect("nothing happened")
}

/// The tokens of a sequence, and its end.
pub(crate) async fn said(mut sequence: Sequence) -> (Vec<SampledToken>, FinishReason) {
    let mut tokens = Vec::new();
    loop {
        match next(&mut sequence).await.unwrap() {
            Event::Started { .. } | Event::Computed { .. } => {}
            Event::Token(token) => tokens.push(token),
            Event::Finished(reason) => return (tokens, reason),
            other => panic!("{other:?}"),
        }
    }
}

pub(crate) fn ids(tokens: &[SampledToken]) -> Vec<u32> {
    tokens.iter().map(|token| token.token.id).collect()
}

async fn answer(engine: &Engine, sampling: Sampling) -> (Vec<u32>, FinishReason) {
    let (tokens, reason) = said(engine.generate(vec![5; 20], sampling).unwrap()).await;
    (ids(&tokens), reason)
}

type Matches<'a> = &'a dyn Fn(&str) -> bool;

#[tokio::test]
async fn whatever_the_model_says_the_answer_matches() {
    let engine = fake();
    let whole = regex::Regex::new("^[a-f]{2,4}(-[0-9]{2})?$").unwrap();
    for seed in 0..12 {
        let cases: [(Grammar, Matches<'_>); 4] = [
            (schema(&person()), &is_person),
            (lark(ARITHMETIC), &is_arithmetic),
            (regex("[a-f]{2,4}(-[0-9]{2})?"), &|text| whole.is_match(text)),
            (choices(&["red", "green"]), &|text| ["red", "green"].contains(&text)),
        ];
        for (grammar, matches) in cases {
            for choice in 0..2 {
                let (ids, reason) = answer(&engine, Sampling { choice, ..sampling(&grammar, seed) }).await;
                if reason == FinishReason::Stop {
                    assert!(matches(&text(&ids)), "{:?} does not match {grammar:?}", text(&ids));
                } else {
                    assert_eq!(ids.len(), 300);
                }
            }
        }
    }
}

#[tokio::test]
async fn choices_of_one_seed_differ() {
    let engine = fake();
    let grammar = schema(&person());
    let mut answers = Vec::new();
    for choice in 0..4 {
        answers.push(answer(&engine, Sampling { choice, ..sampling(&grammar, 9) }).await.0);
    }
    answers.dedup();
    assert_eq!(answers.len(), 4);
}

#[tokio::test]
async fn it_ends_with_the_text_and_no_sooner() {
    let engine = fake();
    // Nothing can follow: no end-of-sequence token is waited for.
    let two = Sampling { temperature: 0.0, ..sampling(&regex("[0-9]{2}"), 0) };
    let (ids, reason) = answer(&engine, two.clone()).await;
    assert_eq!((text(&ids).len(), reason), (2, FinishReason::Stop));
    assert!(!ids.contains(&EOS));
    // Cut is cut.
    let long = Sampling { max_tokens: 7, ..sampling(&regex("[0-9]{50}"), 0) };
    let (ids, reason) = answer(&engine, long).await;
    assert_eq!((ids.len(), reason), (7, FinishReason::Length));
    // However much the model wants to end, and whatever min_tokens says.
    let eager = Shaping { bias: vec![(EOS, 1000.0)], ..Shaping::default() };
    let ended =
        answer(&engine, Sampling { shaping: eager.clone(), ..sampling(&regex("[a-f]{2,9}"), 3) }).await;
    let (ids, reason) = ended;
    assert_eq!((ids.last(), reason), (Some(&EOS), FinishReason::Stop));
    assert!((2..=4).contains(&text(&ids).len()), "as soon as it may: after the token that makes two letters");
    let bound = Shaping { min_tokens: 9, ..eager.clone() };
    let (ids, reason) = answer(&engine, Sampling { shaping: bound, ..two }).await;
    assert_eq!((text(&ids).len(), reason), (2, FinishReason::Stop));
    // min_tokens holds where the grammar has more to say; without stop tokens it says all that it may.
    let more = Shaping { min_tokens: 6, ..eager };
    let (ids, reason) =
        answer(&engine, Sampling { shaping: more, ..sampling(&regex("[0-9a-f ]+"), 3) }).await;
    assert_eq!((ids.len(), ids[6], reason), (7, EOS, FinishReason::Stop));
    let on = Sampling { stop_ids: Vec::new(), max_tokens: 20, ..sampling(&regex("[a-f]+"), 3) };
    let (ids, reason) = answer(&engine, on).await;
    assert_eq!((ids.len(), reason), (20, FinishReason::Length));
}

#[tokio::test]
async fn log_probabilities_are_of_the_logits_that_the_grammar_has_not_touched() {
    let engine = fake();
    let greedy = |constraint| Sampling {
        temperature: 0.0,
        max_tokens: 1,
        constraint,
        top_logprobs: 1024,
        ..sampling(&regex("[0-9]"), 0)
    };
    let prompt = vec![7; 9];
    let free = said(engine.generate(prompt.clone(), greedy(None)).unwrap()).await.0;
    let held = engine.generate(prompt, greedy(Some(constraint(&regex("[0-9]"), &[])))).unwrap();
    let held = said(held).await.0;
    assert_ne!(free[0].token.id, held[0].token.id);
    assert_eq!(free[0].top, held[0].top);
    assert!(free[0].top.contains(&held[0].token));
}
