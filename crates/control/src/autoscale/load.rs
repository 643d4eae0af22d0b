//! How many gangs the load of a pool would keep busy.

use herd_api::Role;

use super::history::PoolHistory;
use super::input::{GangInput, Policy, PoolInput, Reading, Sample};

/// A gang is sized for so much of what it can do: the rest is for what comes before another gang is there.
const FULL_PERCENT: f64 = 80.0;
/// Fewer gangs have to be that far below it: load in between moves nothing.
const SPARE_PERCENT: f64 = 70.0;
/// Below this a gang waits for work more than it works, and its speed is that of small batches.
const BUSY_MS_PER_S: u64 = 500;
/// In a step with fewer prompt tokens something else takes the time.
const PROMPT_TOKENS_PER_STEP: u64 = 64;
/// Rounding errors ask for no gang.
const EPSILON: f64 = 1e-9;

/// The load of a pool, as far as it is known.
#[derive(Clone, Debug)]
pub(super) struct Load {
    /// Gangs that the load asks for.
    pub(super) low: i32,
    /// As many are not more than it asks for.
    pub(super) high: i32,
    /// Every gang that is Ready is known.
    pub(super) complete: bool,
    /// The newest of its samples.
    pub(super) scraped_ms: i64,
    /// Prompt tokens that a gang computes in 1000 seconds of steps, where one was busy.
    pub(super) measured: Option<u64>,
    /// The numbers, for people.
    pub(super) words: String,
}

impl Reading {
    /// The sample, unless it is too old.
    pub(super) fn fresh(&self, policy: &Policy) -> Option<&Sample> {
        match self {
            Self::Sample(sample) if !sample.is_stale(policy) => Some(sample),
            _ => None,
        }
    }
}

impl Sample {
    pub(super) fn is_stale(&self, policy: &Policy) -> bool {
        self.age_ms > policy.stale_after_ms()
    }

    /// Prompt tokens in 1000 seconds of steps, where it was busy with prompts.
    fn throughput(&self) -> Option<u64> {
        let busy = self.busy_ms_per_s >= BUSY_MS_PER_S;
        let with_prompts = self.steps_per_1000s > 0
            && self.prompt_tokens_per_1000s / self.steps_per_1000s >= PROMPT_TOKENS_PER_STEP;
        (busy && with_prompts).then(|| {
            let tokens = u128::from(self.prompt_tokens_per_1000s) * 1000 / u128::from(self.busy_ms_per_s);
            u64::try_from(tokens).unwrap_or(u64::MAX)
        })
    }
}

/// `None` where no gang is known: it could be any.
pub(super) fn measure(
    pool: &PoolInput,
    policy: &Policy,
    history: &PoolHistory,
    drain_within_ms: i64,
    now_ms: i64,
) -> Option<Load> {
    let known: Vec<(&GangInput, &Sample)> =
        pool.gangs.iter().filter_map(|gang| Some((gang, gang.reading.fresh(policy)?))).collect();
    let scraped_ms = known.iter().map(|(_, sample)| sample.scraped_ms).max()?;
    let samples: Vec<Sample> = known.iter().map(|(_, sample)| **sample).collect();
    let throughput = history.throughput_of(&pool.revision);
    let prompts = Prompts::of(&samples, throughput, drain_within_ms, pool.role);
    let sequences = Sequences::of(&samples);
    let (load, words) = match pool.role {
        Role::Prefill => (prompts.load(), prompts.words()),
        Role::Decode => (sequences.load(), sequences.words()),
        Role::Unified => {
            (prompts.load().max(sequences.load()), format!("{}, {}", prompts.words(), sequences.words()))
        }
    };
    // A gang that has only just begun says nothing about how fast one is.
    let settled = |gang: &GangInput| {
        let seen = history.gangs.get(&gang.id);
        seen.is_some_and(|seen| now_ms - seen.ready_since_ms >= policy.rate_window_ms())
    };
    let speeds: Vec<u64> = known
        .iter()
        .filter(|(gang, _)| gang.revision == pool.revision && settled(gang))
        .filter_map(|(_, sample)| sample.throughput())
        .collect();
    Some(Load {
        low: gangs(load, FULL_PERCENT).clamp(pool.min, pool.max),
        high: gangs(load, SPARE_PERCENT).clamp(pool.min, pool.max),
        complete: known.len() == pool.gangs.len() && pool.ready <= pool.gangs.len() as i32,
        scraped_ms,
        measured: mean(&speeds),
        words: format!("load of {load:.2} gangs: {words}"),
    })
}

/// Gangs that have room for a load at so many percent of what they can do.
fn gangs(load: f64, percent: f64) -> i32 {
    // The conversion ends at the bounds of the type.
    (load * 100.0 / percent - EPSILON).ceil() as i32
}

fn mean(numbers: &[u64]) -> Option<u64> {
    let count = u128::try_from(numbers.len()).ok().filter(|count| *count > 0)?;
    let sum: u128 = numbers.iter().copied().map(u128::from).sum();
    u64::try_from(sum / count).ok()
}

fn total(samples: &[Sample], of: impl Fn(&Sample) -> u64) -> f64 {
    samples.iter().map(|sample| of(sample) as f64).sum()
}

/// Prompts of a pool.
struct Prompts {
    tokens_per_s: f64,
    waiting_tokens: f64,
    /// Gangs that computed all the time would have been as many.
    busy: f64,
    /// Of a gang, where it is known.
    tokens_per_s_of_a_gang: Option<f64>,
    drain_within_s: f64,
    /// Whether a step that runs is a step for prompts: a gang that decodes too is always busy.
    dedicated: bool,
}

impl Prompts {
    fn of(samples: &[Sample], throughput: Option<u64>, drain_within_ms: i64, role: Role) -> Self {
        Self {
            tokens_per_s: total(samples, |sample| sample.prompt_tokens_per_1000s) / 1000.0,
            waiting_tokens: total(samples, |sample| sample.waiting_prompt_tokens),
            busy: total(samples, |sample| sample.busy_ms_per_s) / 1000.0,
            tokens_per_s_of_a_gang: throughput.map(|tokens| tokens as f64 / 1000.0),
            drain_within_s: drain_within_ms.max(1) as f64 / 1000.0,
            dedicated: role == Role::Prefill,
        }
    }

    /// What comes is never more than gangs were busy with; what waits is to be gone in time.
    fn load(&self) -> f64 {
        match self.tokens_per_s_of_a_gang {
            Some(of_a_gang) => {
                let comes = (self.tokens_per_s / of_a_gang).min(self.busy);
                comes + self.waiting_tokens / (of_a_gang * self.drain_within_s)
            }
            None if self.dedicated => self.busy,
            None => 0.0,
        }
    }

    fn words(&self) -> String {
        let Self { tokens_per_s, waiting_tokens, busy, .. } = self;
        let speed = match self.tokens_per_s_of_a_gang {
            Some(of_a_gang) => format!("a gang computes {of_a_gang:.0} a second"),
            None => "no gang was busy yet".to_owned(),
        };
        format!(
            "{tokens_per_s:.0} prompt tokens a second, {waiting_tokens} wait, {busy:.2} gangs busy, {speed}"
        )
    }
}

/// Sequences of a pool.
struct Sequences {
    running: f64,
    waiting: f64,
    kv_blocks_used: f64,
    /// Of a gang.
    limit: f64,
    kv_blocks: f64,
}

impl Sequences {
    fn of(samples: &[Sample]) -> Self {
        let of_a_gang = |all: f64| (all / samples.len().max(1) as f64).max(1.0);
        Self {
            running: total(samples, |sample| sample.running),
            waiting: total(samples, |sample| sample.waiting),
            kv_blocks_used: total(samples, |sample| sample.kv_blocks_used),
            limit: of_a_gang(total(samples, |sample| sample.sequences_limit)),
            kv_blocks: of_a_gang(total(samples, |sample| sample.kv_blocks)),
        }
    }

    fn load(&self) -> f64 {
        let sequences = (self.running + self.waiting) / self.limit;
        sequences.max(self.kv_blocks_used / self.kv_blocks)
    }

    fn words(&self) -> String {
        let Self { running, waiting, kv_blocks_used, limit, kv_blocks } = self;
        format!(
            "{running} sequences run and {waiting} wait, a gang has room for {limit:.0}; {kv_blocks_used} KV blocks \
             are used, a gang has {kv_blocks:.0}"
        )
    }
}
