//! Whatever the engine does to fit requests into its cache, and to be done with them sooner: sharing prefixes, chunking,
//! batching, preempting by computing again or by the host pool, guessing, while others are cancelled. Each request gets the
//! tokens and log probabilities, to the bit, that it gets alone.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use herd_engine::{
    CpuRanks, Drafter, Engine, EngineCounters, EngineLimits, Event, Executor, ExecutorError, Isa, KvStore,
    LoadOptions, LocalRank, Observer, RunningRanks, SampledToken, Sampling, Scheduling, Sequence, Shaping,
    StepDone, StepOutput,
};
use herd_model::{BLOCK_TOKENS, Dtype, Parallelism};
use herd_scheduler::StepPlan;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use crate::reference::fixture;

const CASES: u32 = 4;
const LONGEST: usize = 150;
const MOST_TOKENS: usize = 80;
const BLOCKS: usize = 40;
const HOST_BLOCKS: usize = 16;
/// Enough for the longest request alone.
const FEWEST_BLOCKS: usize = (LONGEST + MOST_TOKENS).div_ceil(BLOCK_TOKENS);

/// One choice.
#[derive(Clone, Debug)]
struct Request {
    prompt: Vec<u32>,
    sampling: Sampling,
    scheduling: Scheduling,
    /// It is dropped after so many tokens.
    cancelled: Option<usize>,
}

#[derive(Clone, Debug)]
struct Mix {
    requests: Vec<Request>,
    limits: EngineLimits,
    guesses: Guesses,
}

/// Where [`EngineLimits::draft_tokens`] come from.
#[derive(Clone, Copy, Debug)]
enum Guesses {
    Lookup,
    /// The model itself: all of them are right.
    Model,
    /// Another model: some are.
    Other,
}

struct Models {
    model: Arc<CpuRanks>,
    /// On one rank, as a draft model is.
    same: Arc<CpuRanks>,
    other: Arc<CpuRanks>,
}

/// Prompts of two families: many begin alike, some differ somewhere in the middle.
fn prompts() -> impl Strategy<Value = Vec<u32>> {
    let change = prop::option::weighted(0.3, 0..LONGEST);
    (0..2_usize, 1..=LONGEST, change).prop_map(|(family, length, change)| {
        let mut prompt: Vec<u32> =
            (0..length).map(|at| ((at * 37 + family * 501 + at * at * 3) % 1000) as u32).collect();
        if let Some(token) = change.and_then(|at| prompt.get_mut(at)) {
            *token = (*token + 1) % 1000;
        }
        prompt
    })
}

/// One to three choices of a prompt.
fn requests() -> impl Strategy<Value = Vec<Request>> {
    let temperature = prop_oneof![Just(0.0_f32), Just(0.8), Just(1.3)];
    let cancelled = prop::option::weighted(0.2, 0..MOST_TOKENS);
    let salt = prop_oneof![4 => Just(""), 1 => Just("another")];
    let asked = prop::option::weighted(0.2, 0..3_usize);
    let how = (1..=3_u32, 1..=MOST_TOKENS, temperature, 0..4_u64, asked);
    (prompts(), how, -1..2_i32, salt, cancelled).prop_map(
        |(prompt, (n, max_tokens, temperature, seed, asked), priority, salt, cancelled)| {
            let request = |choice| Request {
                prompt: prompt.clone(),
                sampling: Sampling {
                    max_tokens,
                    temperature,
                    top_p: 1.0,
                    seed,
                    choice,
                    stop_ids: Vec::new(),
                    top_logprobs: 3,
                    first_position: 0,
                    shaping: Shaping::default(),
                    constraint: None,
                    prompt_logprobs: asked.filter(|_| cancelled.is_none()),
                },
                scheduling: Scheduling { priority, cache_salt: salt.to_owned() },
                cancelled: cancelled.filter(|_| choice == 0),
            };
            (0..n).map(request).collect()
        },
    )
}

fn mixes() -> impl Strategy<Value = Mix> {
    let host_blocks = prop_oneof![Just(0_usize), 1..=HOST_BLOCKS];
    let steps = prop_oneof![Just(512_usize), 8..200_usize];
    let requests = prop::collection::vec(requests(), 2..6);
    let guesses = prop_oneof![Just(Guesses::Lookup), Just(Guesses::Model), Just(Guesses::Other)];
    let drafts = (prop_oneof![1 => Just(0_usize), 2 => 1..6_usize], guesses);
    (requests, FEWEST_BLOCKS..12_usize, steps, 2..9_usize, host_blocks, drafts).prop_map(
        |(requests, kv_blocks, max_step_tokens, max_sequences, host_blocks, (draft_tokens, guesses))| Mix {
            requests: requests.concat(),
            guesses,
            limits: EngineLimits {
                context_length: 1024,
                kv_blocks,
                block_tokens: BLOCK_TOKENS,
                max_step_tokens,
                max_sequences,
                max_waiting: 64,
                prefix_cache: true,
                host_blocks,
                draft_tokens,
            },
        },
    )
}

/// Four that start together and do not fit together: of other lengths, so that one is preempted in the middle of a block.
fn crowded(host_blocks: usize, guesses: Guesses, draft_tokens: usize) -> Mix {
    let request = |family: usize| Request {
        prompt: (0..15 * (family + 1)).map(|at| ((at * 37 + family * 101) % 1000) as u32).collect(),
        sampling: Sampling {
            max_tokens: 150,
            temperature: 0.8,
            top_p: 1.0,
            seed: 7,
            choice: family as u32,
            stop_ids: Vec::new(),
            top_logprobs: 3,
            first_position: 0,
            shaping: Shaping::default(),
            constraint: None,
            prompt_logprobs: (family == 2).then_some(1),
        },
        scheduling: Scheduling::default(),
        cancelled: None,
    };
    // The second time each finds its prompt, or a part of it.
    let requests = (0..4).chain(0..2).map(request).collect();
    let limits = EngineLimits {
        context_length: 1024,
        kv_blocks: 8,
        block_tokens: BLOCK_TOKENS,
        max_step_tokens: 512,
        max_sequences: 4,
        max_waiting: 64,
        prefix_cache: true,
        host_blocks,
        draft_tokens,
    };
    Mix { requests, limits, guesses }
}

/// The ranks of a model that several engines run one after another.
struct Ranks {
    loaded: Arc<CpuRanks>,
    running: RunningRanks,
    /// Held, no step is run.
    gate: Arc<Mutex<()>>,
}

impl Executor for Ranks {
    fn step(&mut self, plan: &StepPlan) -> Result<StepOutput, ExecutorError> {
        drop(self.gate.lock().unwrap_or_else(PoisonError::into_inner));
        let columns = self.running.step(plan)?;
        Ok(StepOutput { logits: self.loaded.info().rows_of_logits(&columns)? })
    }

    fn kv(&self) -> Vec<Arc<dyn KvStore>> {
        self.loaded.kv()
    }

    fn vocab_size(&self) -> usize {
        self.loaded.info().config.vocab_size
    }
}

fn executor(loaded: &Arc<CpuRanks>) -> (Box<dyn Executor>, Arc<Mutex<()>>) {
    let gate = Arc::<Mutex<()>>::default();
    let running = loaded.start(LocalRank::gang(loaded.info().shards.parallelism())).unwrap();
    let ranks = Ranks { loaded: Arc::clone(loaded), running, gate: Arc::clone(&gate) };
    (Box::new(ranks), gate)
}

fn start(models: &Models, guesses: Guesses, limits: EngineLimits) -> (Engine, Arc<Mutex<()>>) {
    let Models { model, same, other } = models;
    let drafter = match guesses {
        Guesses::Lookup => Drafter::PromptLookup,
        Guesses::Model => Drafter::Model(executor(same).0),
        Guesses::Other => Drafter::Model(executor(other).0),
    };
    let (ranks, gate) = executor(model);
    (Engine::start_with(ranks, Some(drafter), limits, Arc::new(Nobody)), gate)
}

struct Nobody;

impl Observer for Nobody {
    fn started(&self, _: Duration) {}

    fn stepped(&self, _: StepDone) {}

    fn token(&self, _: Duration) {}
}

fn submit(engine: &Engine, request: &Request) -> Sequence {
    let engine = engine.scheduled(request.scheduling.clone());
    engine.generate(request.prompt.clone(), request.sampling.clone()).unwrap()
}

/// What it tells of its prompt, and its tokens, up to `most` of them.
async fn tokens(mut sequence: Sequence, most: usize) -> Vec<SampledToken> {
    let mut tokens = Vec::new();
    while tokens.len() < most {
        match sequence.next().await {
            Some(Event::Token(token)) => tokens.push(token),
            Some(Event::Prompt(prompt)) => tokens.extend(prompt),
            Some(Event::Failed(reason) | Event::Unsatisfiable(reason)) => panic!("{reason}"),
            Some(Event::Started { .. } | Event::Computed { .. }) => {}
            Some(Event::Finished(_)) | None => break,
        }
    }
    tokens
}

/// The bits of all that is told of a token.
fn bits(tokens: &[SampledToken]) -> Vec<(usize, Vec<(u32, u32)>)> {
    let of = |token: &SampledToken| {
        let all = std::iter::once(&token.token).chain(&token.top);
        (token.position, all.map(|one| (one.id, one.logprob.to_bits())).collect())
    };
    tokens.iter().map(of).collect()
}

/// Runs a mix, compares it with each request alone, and adds up what the engine did.
async fn compare(models: &Models, mix: &Mix, counters: &mut Vec<EngineCounters>) {
    let Mix { requests, limits, guesses } = mix;
    let (engine, gate) = start(models, *guesses, *limits);
    let held = gate.lock().unwrap_or_else(PoisonError::into_inner);
    let sequences: Vec<_> = requests.iter().map(|request| submit(&engine, request)).collect();
    drop(held);
    let running = sequences
        .into_iter()
        .zip(requests)
        .map(|(sequence, request)| tokio::spawn(tokens(sequence, request.cancelled.unwrap_or(usize::MAX))));
    let running: Vec<_> = running.collect();
    let mut together = Vec::new();
    for tokens in running {
        together.push(tokens.await.unwrap());
    }
    counters.push(engine.counters());
    drop(engine);

    let limits = EngineLimits {
        kv_blocks: BLOCKS,
        max_step_tokens: 512,
        max_sequences: 1,
        prefix_cache: false,
        host_blocks: 0,
        draft_tokens: 0,
        ..*limits
    };
    let (engine, _) = start(models, *guesses, limits);
    let mut known = HashMap::new();
    for (request, together) in requests.iter().zip(together) {
        let Request { prompt, sampling, .. } = request;
        // Choices of one prompt without chance are all the same.
        let choice = if sampling.temperature > 0.0 { sampling.choice } else { 0 };
        let key = (
            prompt.clone(),
            sampling.max_tokens,
            sampling.temperature.to_bits(),
            sampling.seed,
            choice,
            sampling.prompt_logprobs,
        );
        let alone = match known.get(&key) {
            Some(alone) => Vec::clone(alone),
            None => tokens(submit(&engine, request), usize::MAX).await,
        };
        let count = request.cancelled.map_or(alone.len(), |most| most.min(alone.len()));
        assert_eq!(bits(&together), bits(&alone[..count]), "{request:?}");
        known.insert(key, alone);
    }
}

fn check(dtype: Dtype, parallelism: Parallelism) {
    let load = |folder: &str, parallelism: Parallelism| {
        let options = LoadOptions {
            parallelism,
            dtype,
            kv_blocks: BLOCKS,
            host_blocks: HOST_BLOCKS,
            threads: 2,
            isa: Isa::detect(),
        };
        Arc::new(CpuRanks::load(&fixture(folder), &options, 0..parallelism.ranks()).unwrap())
    };
    let tiny = "tiny-llama31/tiny-llama31-bf16";
    let models = Models {
        model: load(tiny, parallelism),
        same: load(tiny, Parallelism::tensor(1)),
        other: load("tiny-llama31/tiny-llama31-fbgemm-fp8", Parallelism::tensor(1)),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let counters = std::cell::RefCell::new(Vec::new());
    let config = Config { cases: CASES, failure_persistence: None, ..Config::default() };
    let random = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let result = TestRunner::new_with_rng(config, random).run(&mixes(), |mix| {
        runtime.block_on(compare(&models, &mix, &mut counters.borrow_mut()));
        Ok(())
    });
    result.unwrap_or_else(|failure| panic!("{dtype}: {failure}"));
    let crowds = [
        (0, Guesses::Lookup, 0),
        (HOST_BLOCKS, Guesses::Other, 2),
        (0, Guesses::Model, 4),
        (HOST_BLOCKS, Guesses::Lookup, 3),
    ];
    for (host_blocks, guesses, draft_tokens) in crowds {
        let mix = crowded(host_blocks, guesses, draft_tokens);
        runtime.block_on(compare(&models, &mix, &mut counters.borrow_mut()));
    }
    let sum = |of: fn(&EngineCounters) -> u64| counters.borrow().iter().map(of).sum::<u64>();
    assert!(sum(|counters| counters.preempted_recomputed_tokens) > 0, "nobody was computed again");
    assert!(sum(|counters| counters.swapped_blocks) > 0, "nobody was swapped");
    assert!(sum(|counters| counters.prefix_cached_tokens) > 0, "nothing was shared");
    let (drafts, accepted) =
        (sum(|counters| counters.draft_tokens), sum(|counters| counters.accepted_draft_tokens));
    assert!(accepted > 100 && drafts - accepted > 100, "{accepted} of {drafts} guesses were right");
}

#[test]
fn each_as_if_alone_f32() {
    check(Dtype::F32, Parallelism::tensor(1));
}

#[test]
fn each_as_if_alone_bf16() {
    check(Dtype::Bf16, Parallelism::tensor(1));
}

#[test]
fn each_as_if_alone_over_four_ranks() {
    check(Dtype::Bf16, Parallelism { tensor: 2, pipeline: 2 });
}
