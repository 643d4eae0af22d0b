//! Guessing: what comes out is the same, and takes fewer steps where guesses are right.

use herd_scheduler::StepPlan;

use super::transfer::apart;
use super::*;
use crate::{ExecutorError, StepOutput};

/// What guesses, and how well.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    Lookup,
    /// The model itself.
    Same,
    /// The same, but every third row is another one.
    OftenWrong,
    /// A model that has nothing to do with it.
    Other,
    /// Its logits are no numbers.
    Broken,
}

pub(super) fn kinds() -> impl Strategy<Value = Kind> {
    prop_oneof![
        Just(Kind::Lookup),
        Just(Kind::Same),
        Just(Kind::OftenWrong),
        Just(Kind::Other),
        Just(Kind::Broken)
    ]
}

struct Spoiled {
    model: FakeModel,
    kind: Kind,
    rows: usize,
}

impl Executor for Spoiled {
    fn step(&mut self, plan: &StepPlan) -> Result<StepOutput, ExecutorError> {
        let mut output = self.model.step(plan)?;
        for row in output.logits.chunks_exact_mut(self.model.vocab_size()) {
            self.rows += 1;
            match self.kind {
                Kind::OftenWrong if self.rows.is_multiple_of(3) => {
                    for logit in row {
                        *logit = -*logit;
                    }
                }
                Kind::Broken => row.fill(f32::NAN),
                _ => {}
            }
        }
        Ok(output)
    }

    fn kv(&self) -> Vec<Arc<dyn KvStore>> {
        self.model.kv()
    }

    fn vocab_size(&self) -> usize {
        self.model.vocab_size()
    }
}

pub(super) fn drafter(kind: Kind, limits: Limits) -> Drafter {
    let Limits { kv_blocks, host_blocks, .. } = limits;
    let seed = if matches!(kind, Kind::Other) { 77 } else { 0 };
    let model = FakeModel::new(FakeOptions { kv_blocks, host_blocks, seed, ..options() });
    match kind {
        Kind::Lookup => Drafter::PromptLookup,
        _ => Drafter::Model(Box::new(Spoiled { model, kind, rows: 0 })),
    }
}

fn guessing(kind: Kind, limits: Limits) -> Engine {
    let limits = Limits { draft_tokens: 3, ..limits };
    start_drafting(Some(drafter(kind, limits)), limits).0
}

async fn generated(engine: &Engine, prompt: Vec<u32>, sampling: Sampling) -> Vec<SampledToken> {
    tokens(&mut engine.generate(prompt, sampling).unwrap()).await
}

#[tokio::test]
async fn guesses_that_are_right_take_fewer_steps() {
    let (plain, _control) = start(LIMITS);
    for (kind, accepted, steps) in [(Kind::Same, 14, 6), (Kind::Other, 0, 20), (Kind::Broken, 0, 20)] {
        for temperature in [0.0, 1.0] {
            let engine = guessing(kind, LIMITS);
            let sampling = Sampling { temperature, top_logprobs: 2, ..greedy(20) };
            let expected = generated(&plain, prompt(9, 1), sampling.clone()).await;
            assert_eq!(generated(&engine, prompt(9, 1), sampling).await, expected);
            let counters = engine.counters();
            assert_eq!((counters.accepted_draft_tokens, counters.steps), (accepted, steps), "{kind:?}");
            assert_eq!(
                counters.draft_tokens,
                match kind {
                    Kind::Same => accepted,
                    // Up to the last two tokens, after which less is left.
                    Kind::Other => 3 * 16 + 2 + 1,
                    _ => 0,
                }
            );
        }
    }
}

/// Greedy sampling of the fake model soon says nothing new to the lookup; a bias makes it repeat itself.
#[tokio::test]
async fn what_repeats_is_looked_up() {
    let (plain, _control) = start(LIMITS);
    let bias = Shaping { bias: vec![(5, 100.0)], ..Shaping::default() };
    let sampling = Sampling { shaping: bias, ..greedy(20) };
    let expected = generated(&plain, prompt(9, 1), sampling.clone()).await;
    let engine = guessing(Kind::Lookup, LIMITS);
    assert_eq!(generated(&engine, prompt(9, 1), sampling).await, expected);
    assert!(engine.counters().accepted_draft_tokens >= 12, "{:?}", engine.counters());
}

#[tokio::test]
async fn a_draft_may_stop_a_sequence() {
    let (plain, _control) = start(LIMITS);
    let all = ids(&plain, prompt(9, 1), greedy(20)).await;
    for id in &all[1..12] {
        let stop = Sampling { stop_ids: vec![*id], ..greedy(20) };
        let mut expected = plain.generate(prompt(9, 1), stop.clone()).unwrap();
        let engine = guessing(Kind::Same, LIMITS);
        let mut sequence = engine.generate(prompt(9, 1), stop).unwrap();
        let said = |event: &Event| matches!(event, Event::Token(_) | Event::Finished(_));
        let expected: Vec<_> = events(&mut expected).await.into_iter().filter(said).collect();
        assert_eq!(events(&mut sequence).await.into_iter().filter(said).collect::<Vec<_>>(), expected);
    }
}

/// Blocks that are shared are so in the draft model's cache too.
#[tokio::test]
async fn choices_of_one_prompt_are_guessed_alike() {
    let engine = guessing(Kind::Same, LIMITS);
    let choice = |choice| Sampling { temperature: 1.0, choice, ..greedy(20) };
    let mut sequences: Vec<_> =
        (0..3).map(|number| engine.generate(prompt(21, 0), choice(number)).unwrap()).collect();
    for sequence in &mut sequences {
        assert_eq!(tokens(sequence).await.len(), 20);
    }
    let counters = engine.counters();
    assert!(counters.prefix_cached_tokens > 0 && counters.accepted_draft_tokens > 30, "{counters:?}");
    assert_eq!(counters.accepted_draft_tokens, counters.draft_tokens);
}

/// The draft model computes a prompt itself that the model has from elsewhere, 16 tokens a step.
#[tokio::test]
async fn a_prompt_that_another_engine_computed_is_guessed_from_as_well() {
    let limits = Limits { prefix_cache: false, ..LIMITS };
    let (unified, _control) = start(limits);
    for (length, temperature) in [(1, 0.0), (8, 0.0), (21, 1.0), (30, 0.8)] {
        let (prefill, _control) = start(limits);
        let decode = guessing(Kind::Same, limits);
        let sampling = Sampling { temperature, top_logprobs: 2, ..greedy(20) };
        let expected = generated(&unified, prompt(length, 0), sampling.clone()).await;
        assert_eq!(apart((&prefill, &decode), &prompt(length, 0), &sampling, None).await, expected);
        let Counters { prefill_recomputed_tokens, draft_tokens, accepted_draft_tokens, .. } =
            decode.counters();
        assert_eq!((prefill_recomputed_tokens, accepted_draft_tokens), (0, draft_tokens), "{length}");
        assert!(draft_tokens >= 12, "{draft_tokens} of {length}");
    }
}

#[tokio::test]
async fn a_draft_model_that_stops_stops_the_engine() {
    let limits = Limits { draft_tokens: 3, ..LIMITS };
    let model = FakeModel::new(options());
    let control = model.control();
    let (engine, _control) = start_drafting(Some(Drafter::Model(Box::new(model))), limits);
    control.fail("no more memory");
    let mut sequence = engine.generate(prompt(9, 1), greedy(20)).unwrap();
    let reason = within(engine.stopped()).await;
    assert_eq!(reason, "the draft model: rank 0 stopped: no more memory");
    assert_eq!(events(&mut sequence).await.last(), Some(&Event::Failed(reason)));
}
