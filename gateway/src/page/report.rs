//! The fleet in one object: what the page shows and `herd status` prints.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::recent::{Quantiles, Rates, Recent};
use crate::fleet::{Fleet, ListedModel};
use crate::metrics::Metrics;

/// More than a screen shows, and a bound on what a viewer costs.
const MAX_GANGS: usize = 512;

/// Models that are listed.
const MAX_MODELS: usize = 64;

/// A fleet as one gateway sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FleetReport {
    /// Of the gateway.
    pub version: String,
    /// Requests in work here.
    pub in_flight: i64,
    /// Rates and quantiles are of so many seconds, a minute as a rule.
    pub window_seconds: f64,
    /// By name.
    pub models: Vec<ModelReport>,
    /// By model and id.
    pub gangs: Vec<GangReport>,
    /// Gangs that are not listed.
    pub left_out: usize,
}

/// A served name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelReport {
    /// As clients ask for it.
    pub name: String,
    /// Empty while no gang of it was ever reached.
    pub digest: String,
    /// Tokens of prompt and answer together.
    pub context_length: u32,
    /// Requests, or choices of one, that wait for a gang.
    pub waiting_for_gang: u32,
    /// Answers that ended well.
    pub requests_per_second: f64,
    /// Of finished choices.
    pub output_tokens_per_second: f64,
    /// Seconds; none where nothing was answered.
    pub time_to_first_token: Option<Quantiles>,
    /// Seconds; none where nothing was answered.
    pub inter_token_latency: Option<Quantiles>,
    /// Where a cluster is followed and its autoscaler has decided something.
    pub last_scale: Option<LastScale>,
}

/// The autoscaler's last decision, from the LlamaDeployment's status.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastScale {
    /// When.
    #[serde(default)]
    pub time: String,
    /// Gangs wanted.
    #[serde(default)]
    pub prefill: Option<i64>,
    /// Gangs wanted.
    #[serde(default)]
    pub decode: Option<i64>,
    /// Gangs wanted.
    #[serde(default)]
    pub unified: Option<i64>,
    /// Why.
    #[serde(default)]
    pub reason: String,
}

/// A gang.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GangReport {
    /// Empty while it was never reached.
    pub id: String,
    /// Names it serves.
    pub models: Vec<String>,
    /// `prefill`, `decode`, `unified` or `unknown`.
    pub role: String,
    /// `ready`, `draining` or `away`.
    pub phase: String,
    /// Of the LlamaDeployment.
    pub revision: String,
    /// As text: it has 64 bits.
    pub epoch: String,
    /// Tensor ranks.
    pub ranks: u32,
    /// KV blocks of each rank.
    pub kv_blocks: u32,
    /// Those that are owned.
    pub kv_blocks_used: u32,
    /// Sequences in its batch.
    pub running: u32,
    /// Requests in its queue.
    pub waiting: u32,
    /// Their prompt tokens.
    pub waiting_prompt_tokens: u32,
    /// Sequences that may run.
    pub max_sequences: u32,
}

impl FleetReport {
    pub(crate) fn new(
        fleet: &Fleet,
        metrics: &Metrics,
        recent: &Recent,
        decisions: &BTreeMap<String, LastScale>,
    ) -> Self {
        let (window, mut rates) = recent.rates(metrics, Instant::now());
        let waiting = fleet.waiting();
        let models = fleet.models().into_iter().take(MAX_MODELS).map(|model| {
            let ListedModel { name, digest, context_length, ready_gangs: _ } = model;
            let Rates {
                requests_per_second,
                output_tokens_per_second,
                time_to_first_token,
                inter_token_latency,
            } = rates.remove(&name).unwrap_or_default();
            ModelReport {
                waiting_for_gang: waiting.get(&name).copied().unwrap_or(0),
                last_scale: decisions.get(&name).cloned(),
                name,
                digest,
                context_length,
                requests_per_second,
                output_tokens_per_second,
                time_to_first_token,
                inter_token_latency,
            }
        });
        let models = models.collect();
        let mut gangs = fleet.gangs();
        gangs.sort_by(|a, b| (&a.models, &a.id).cmp(&(&b.models, &b.id)));
        let left_out = gangs.len().saturating_sub(MAX_GANGS);
        gangs.truncate(MAX_GANGS);
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            in_flight: metrics.in_flight.get(),
            window_seconds: window.as_secs_f64(),
            models,
            gangs,
            left_out,
        }
    }
}
