//! What decisions remember: how long the load asks for a change, and how fast a gang was when it was busy.

use std::collections::BTreeMap;

use herd_api::Role;
use serde::{Deserialize, Serialize};

use super::decide::Metrics;

/// Of one deployment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct History {
    /// When it was decided last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_ms: Option<i64>,
    /// When Prometheus answered last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answered_ms: Option<i64>,
    /// What was said of its data last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<Metrics>,
    /// By role.
    #[serde(default)]
    pub pools: BTreeMap<Role, PoolHistory>,
}

/// Of one pool.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PoolHistory {
    /// Gangs wanted, as they were left. If there are others now, somebody else has changed them.
    pub replicas: i32,
    /// While the load asks for more gangs than there are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rising: Option<Rising>,
    /// While the load asks for fewer, and every gang that is Ready is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub falling: Option<Falling>,
    /// Since a gang was busy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub throughput: Option<Throughput>,
    /// Each gang that is Ready.
    #[serde(default)]
    pub gangs: BTreeMap<String, SeenGang>,
}

/// A gang that is Ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SeenGang {
    /// When it was seen to be first.
    pub ready_since_ms: i64,
    /// When its load was known last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub known_ms: Option<i64>,
}

/// The load asks for more gangs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Rising {
    /// Since then.
    pub since_ms: i64,
    /// It was seen to last then.
    pub seen_ms: i64,
    /// The fewest that it asked for.
    pub least: i32,
    /// The newest scrape that said so.
    pub scraped_ms: i64,
    /// Scrapes that said so.
    pub scrapes: u32,
}

/// The load asks for fewer gangs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Falling {
    /// Since then.
    pub since_ms: i64,
    /// It was seen to last then.
    pub seen_ms: i64,
}

/// How fast a gang computes prompts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Throughput {
    /// Of gangs of this revision.
    pub revision: String,
    /// Prompt tokens in 1000 seconds of steps.
    pub tokens_per_1000s: u64,
}

/// A new measurement has this weight, the memory the rest of [`WEIGHTS`].
const NEW_WEIGHT: u128 = 3;
const WEIGHTS: u128 = 10;

impl PoolHistory {
    /// How fast a gang of `revision` was.
    pub fn throughput_of(&self, revision: &str) -> Option<u64> {
        let known = self.throughput.as_ref().filter(|known| known.revision == revision)?;
        (known.tokens_per_1000s > 0).then_some(known.tokens_per_1000s)
    }

    /// With one more measurement.
    pub(super) fn learn(&self, revision: &str, measured: Option<u64>) -> Option<Throughput> {
        let known = self.throughput.as_ref().filter(|known| known.revision == revision);
        let tokens_per_1000s = match (known, measured) {
            (None, None) => return None,
            (Some(known), None) => known.tokens_per_1000s,
            (None, Some(measured)) => measured,
            (Some(known), Some(measured)) => {
                let old = u128::from(known.tokens_per_1000s) * (WEIGHTS - NEW_WEIGHT);
                ((old + u128::from(measured) * NEW_WEIGHT) / WEIGHTS) as u64
            }
        };
        Some(Throughput { revision: revision.to_owned(), tokens_per_1000s })
    }
}
