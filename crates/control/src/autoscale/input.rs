//! What a decision is made from.

use herd_api::Role;
use serde::{Deserialize, Serialize};

/// Rates are taken over so many scrapes, and over no less time than this.
const RATE_SCRAPES: i64 = 4;
const SHORTEST_RATE_WINDOW_MS: i64 = 10_000;
/// A sample is too old after two scrapes and a half, and not before this: a busy machine scrapes late.
const SHORTEST_STALE_AFTER_MS: i64 = 5_000;

/// Times that the operator was started with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Policy {
    /// Between two decisions.
    pub interval_ms: i64,
    /// Between two scrapes of Prometheus.
    pub scrape_interval_ms: i64,
    /// Load that asks for more gangs has to last so long.
    pub up_after_ms: i64,
    /// Load that asks for fewer has to last so long, for each gang that goes.
    pub down_window_ms: i64,
}

impl Policy {
    /// Over which Prometheus takes rates.
    pub fn rate_window_ms(&self) -> i64 {
        (RATE_SCRAPES * self.scrape_interval_ms).max(SHORTEST_RATE_WINDOW_MS)
    }

    /// An older sample says nothing.
    pub fn stale_after_ms(&self) -> i64 {
        (self.scrape_interval_ms * 5 / 2).max(SHORTEST_STALE_AFTER_MS)
    }

    /// A gang that became Ready has a rate by then.
    pub(super) fn first_sample_within_ms(&self) -> i64 {
        self.rate_window_ms() + self.stale_after_ms()
    }

    /// After a longer time without a decision nobody knows what was in between.
    pub(super) fn longest_gap_ms(&self) -> i64 {
        3 * self.interval_ms + self.stale_after_ms()
    }
}

/// What is wanted of a deployment, what there is, and what is known of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Input {
    /// Milliseconds since 1970.
    pub now_ms: i64,
    /// Of the operator.
    pub policy: Policy,
    /// Ranks that all gangs together may come to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_budget: Option<i64>,
    /// Prompts that wait are to be computed within this.
    pub drain_within_ms: i64,
    /// Why Prometheus said nothing at all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
    /// Each role once.
    pub pools: Vec<PoolInput>,
}

/// A pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PoolInput {
    /// Whose gangs.
    pub role: Role,
    /// Gangs at least.
    pub min: i32,
    /// Gangs at most.
    pub max: i32,
    /// Ranks of a gang.
    pub ranks: i64,
    /// What new gangs are made from.
    pub revision: String,
    /// Gangs wanted now, within the bounds.
    pub replicas: i32,
    /// Gangs there are, those that drain left out: while a revision is replaced, more than wanted.
    pub live: i32,
    /// Gangs that end what they run.
    pub draining: i32,
    /// Gangs that are Ready.
    pub ready: i32,
    /// Those of them that the operator can name.
    pub gangs: Vec<GangInput>,
}

/// A gang that is Ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GangInput {
    /// Its id.
    pub id: String,
    /// What it was made from.
    pub revision: String,
    /// What Prometheus knows of it.
    pub reading: Reading,
}

/// What Prometheus knows of a gang.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Reading {
    /// All that is needed.
    Sample(Sample),
    /// Not this metric.
    Missing {
        /// Its name.
        metric: String,
    },
    /// This metric has a value that cannot be.
    Invalid {
        /// Its name.
        metric: String,
    },
}

/// The load of a gang.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Sample {
    /// When it was scraped, by Prometheus's clock.
    pub scraped_ms: i64,
    /// How old it was when it was read, by that clock.
    pub age_ms: i64,
    /// Prompt tokens computed in 1000 seconds.
    pub prompt_tokens_per_1000s: u64,
    /// Steps in 1000 seconds.
    pub steps_per_1000s: u64,
    /// Milliseconds of each second in which a step ran.
    pub busy_ms_per_s: u64,
    /// Prompt tokens of requests in the queue.
    pub waiting_prompt_tokens: u64,
    /// Sequences that run.
    pub running: u64,
    /// Requests in the queue.
    pub waiting: u64,
    /// Sequences that may run at once.
    pub sequences_limit: u64,
    /// KV blocks there are.
    pub kv_blocks: u64,
    /// KV blocks that sequences have.
    pub kv_blocks_used: u64,
}
