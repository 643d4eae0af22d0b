//! Decisions over time. Each hurt of other autoscalers that could be ours has a test here.

mod data;
mod log;
mod properties;
mod scaling;

use herd_api::Role;

use super::{Decision, GangInput, History, Input, Policy, PoolInput, Reading, Sample, decide};

pub(super) const POLICY: Policy =
    Policy { interval_ms: 5_000, scrape_interval_ms: 15_000, up_after_ms: 15_000, down_window_ms: 300_000 };

/// Nothing to do.
pub(super) const IDLE: Sample = Sample {
    scraped_ms: 0,
    age_ms: 1_000,
    prompt_tokens_per_1000s: 0,
    steps_per_1000s: 0,
    busy_ms_per_s: 0,
    waiting_prompt_tokens: 0,
    running: 0,
    waiting: 0,
    sequences_limit: 100,
    kv_blocks: 1000,
    kv_blocks_used: 0,
};

/// A gang that computes prompts of 1000 tokens a second, so many milliseconds of each second.
pub(super) fn prompts(busy_ms_per_s: u64, waiting_prompt_tokens: u64) -> Sample {
    Sample {
        prompt_tokens_per_1000s: busy_ms_per_s * 1_000,
        steps_per_1000s: busy_ms_per_s * 1_000 / 512,
        busy_ms_per_s,
        waiting_prompt_tokens,
        ..IDLE
    }
}

/// A gang that generates. It is always busy.
pub(super) fn sequences(running: u64, waiting: u64) -> Sample {
    Sample {
        running,
        waiting,
        steps_per_1000s: 50_000,
        busy_ms_per_s: 1_000,
        kv_blocks_used: running,
        ..IDLE
    }
}

pub(super) fn pool(role: Role, min: i32, max: i32) -> PoolInput {
    PoolInput {
        role,
        min,
        max,
        ranks: 1,
        revision: "r".to_owned(),
        replicas: min,
        live: min,
        draining: 0,
        ready: 0,
        gangs: Vec::new(),
    }
}

/// A deployment whose gangs become Ready when told to, and whose pools have what was decided.
pub(super) struct World {
    pub(super) input: Input,
    pub(super) history: History,
    /// By pool, what its Ready gangs say.
    pub(super) load: Vec<Sample>,
    /// Milliseconds until a gang that is wanted is Ready.
    pub(super) start_ms: i64,
    born: Vec<Vec<i64>>,
}

impl World {
    pub(super) fn new(pools: &[PoolInput]) -> Self {
        let input = Input {
            now_ms: 1_800_000_000_000,
            policy: POLICY,
            gpu_budget: None,
            drain_within_ms: 10_000,
            trouble: None,
            pools: pools.to_vec(),
        };
        let born = pools.iter().map(|pool| vec![0; pool.replicas as usize]).collect();
        Self { load: vec![IDLE; pools.len()], input, history: History::default(), start_ms: 0, born }
    }

    pub(super) fn role(&self, index: usize) -> i32 {
        self.input.pools[index].replicas
    }

    pub(super) fn replicas(&self) -> Vec<i32> {
        self.input.pools.iter().map(|pool| pool.replicas).collect()
    }

    /// The input of now: each gang that is Ready has its share of the load, scraped when a scrape was due.
    pub(super) fn look(&mut self) -> Input {
        let Input { now_ms, policy, .. } = self.input;
        for (index, pool) in self.input.pools.iter_mut().enumerate() {
            let born = &mut self.born[index];
            born.truncate(pool.replicas as usize);
            born.resize(pool.replicas as usize, now_ms);
            let ready = born.iter().filter(|born| now_ms - **born >= self.start_ms).count();
            let scraped_ms = now_ms - now_ms % policy.scrape_interval_ms;
            let sample = Sample { scraped_ms, age_ms: now_ms - scraped_ms, ..self.load[index] };
            pool.gangs = (0..ready)
                .map(|gang| GangInput {
                    id: format!("g{gang}"),
                    revision: pool.revision.clone(),
                    reading: Reading::Sample(sample),
                })
                .collect();
            (pool.ready, pool.live) = (ready as i32, pool.replicas);
        }
        self.input.clone()
    }

    pub(super) fn decide(&mut self, input: &Input) -> Decision {
        let (decision, history) = decide(input, &self.history);
        self.history = history;
        for (pool, decided) in self.input.pools.iter_mut().zip(&decision.pools) {
            pool.replicas = decided.to;
        }
        self.input.now_ms += self.input.policy.interval_ms;
        decision
    }

    pub(super) fn tick(&mut self) -> Decision {
        let input = self.look();
        self.decide(&input)
    }

    /// The numbers of gangs that there were, without repetitions.
    pub(super) fn run(&mut self, seconds: i64) -> Vec<Vec<i32>> {
        self.run_with(seconds, |_| {})
    }

    pub(super) fn run_with(&mut self, seconds: i64, mut change: impl FnMut(&mut Self)) -> Vec<Vec<i32>> {
        let mut seen = vec![self.replicas()];
        for _ in 0..seconds * 1_000 / self.input.policy.interval_ms {
            change(self);
            self.tick();
            if seen.last() != Some(&self.replicas()) {
                seen.push(self.replicas());
            }
        }
        seen
    }
}
