//! One decision.

use std::collections::BTreeMap;

use herd_api::Role;
use herd_api::condition::{self, State};
use serde::{Deserialize, Serialize};

use super::availability;
use super::budget::{Ask, share};
use super::history::{Falling, History, PoolHistory, Rising, SeenGang};
use super::input::{Input, Policy, PoolInput};
use super::load::{Load, measure};

/// One scrape alone asks for nothing.
const MIN_SCRAPES: u32 = 2;

/// What is decided about a deployment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Decision {
    /// In the order of the input.
    pub pools: Vec<PoolDecision>,
    /// Whether enough is known.
    pub metrics: Metrics,
}

/// What is decided about a pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PoolDecision {
    /// Whose gangs.
    pub role: Role,
    /// Gangs wanted before.
    pub from: i32,
    /// Gangs wanted from now on.
    pub to: i32,
    /// With the numbers.
    pub why: String,
}

/// The condition `MetricsAvailable`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Metrics {
    /// `None` is Unknown.
    pub status: Option<bool>,
    /// A constant.
    pub reason: String,
    /// A sentence.
    pub message: String,
}

impl Metrics {
    /// As stated.
    pub fn new(status: Option<bool>, reason: &str, message: String) -> Self {
        Self { status, reason: reason.to_owned(), message }
    }

    /// As a condition.
    pub fn state(&self) -> State {
        State::new(condition::METRICS_AVAILABLE, self.status, self.reason.clone(), self.message.clone())
    }
}

/// What a pool comes to by itself, before pools share a budget.
struct Wish {
    to: i32,
    why: String,
    history: PoolHistory,
}

/// Decides, and what to remember for the next decision.
///
/// More gangs: at once where the load has asked for them for a moment and in two scrapes, as far as the budget goes. Fewer: one,
/// where every gang that is Ready is known and the load has asked for fewer for a whole window, in which nobody changed their
/// number. Whatever is not known asks for nothing.
pub fn decide(input: &Input, history: &History) -> (Decision, History) {
    let Input { now_ms, policy, gpu_budget, drain_within_ms: _, trouble, pools } = input;
    let metrics = availability::metrics(input, history);
    let goes_on =
        history.last_ms.is_some_and(|last| (0..=policy.longest_gap_ms()).contains(&(now_ms - last)));
    let mut wishes: Vec<Wish> = pools.iter().map(|pool| wish(pool, input, history, goes_on)).collect();
    if let Some(budget) = gpu_budget {
        keep_within(*budget, pools, &mut wishes);
    }
    let answered_ms = if trouble.is_none() { Some(*now_ms) } else { history.answered_ms };
    let mut after = History {
        last_ms: Some(*now_ms),
        answered_ms,
        metrics: Some(metrics.clone()),
        pools: BTreeMap::new(),
    };
    let mut decided = Vec::with_capacity(pools.len());
    for (pool, Wish { to, why, history: mut of_pool }) in pools.iter().zip(wishes) {
        if to != pool.replicas {
            (of_pool.rising, of_pool.falling) = (None, None);
        }
        of_pool.replicas = to;
        after.pools.insert(pool.role, of_pool);
        decided.push(PoolDecision { role: pool.role, from: pool.replicas, to, why });
    }
    (Decision { pools: decided, metrics }, after)
}

fn wish(pool: &PoolInput, input: &Input, history: &History, goes_on: bool) -> Wish {
    let Input { now_ms, policy, drain_within_ms, trouble, .. } = input;
    let mut before = history.pools.get(&pool.role).cloned().unwrap_or_default();
    if !goes_on || before.replicas != pool.replicas {
        (before.rising, before.falling) = (None, None);
    }
    let load = match trouble {
        Some(_) => None,
        None => measure(pool, policy, &before, *drain_within_ms, *now_ms),
    };
    let seen = pool.gangs.iter().map(|gang| {
        let seen = before.gangs.get(&gang.id).copied();
        let seen = seen.unwrap_or(SeenGang { ready_since_ms: *now_ms, known_ms: None });
        let known_ms = gang.reading.fresh(policy).map(|_| *now_ms).or(seen.known_ms);
        (gang.id.clone(), SeenGang { known_ms, ..seen })
    });
    let mut after = PoolHistory {
        replicas: pool.replicas,
        rising: None,
        falling: None,
        throughput: before.learn(&pool.revision, load.as_ref().and_then(|load| load.measured)),
        gangs: seen.collect(),
    };
    let wish = |to: i32, why: String, history| Wish { to, why, history };
    let hold = |why: String, history| wish(pool.replicas, why, history);
    let lately = |seen_ms: i64| now_ms - seen_ms <= policy.stale_after_ms();
    let Some(load) = load else {
        after.rising = before.rising.filter(|rising| lately(rising.seen_ms));
        after.falling = before.falling.filter(|falling| lately(falling.seen_ms));
        return hold("nothing is known of its load".to_owned(), after);
    };
    let Load { low, high, complete, .. } = load;
    let (more, fewer) = (low > pool.replicas, high < pool.replicas);
    // What is not known for a moment ends nothing, and decides nothing.
    after.rising = if more {
        Some(rising(&load, &before, *now_ms))
    } else {
        before.rising.filter(|rising| !complete && lately(rising.seen_ms))
    };
    after.falling = match (fewer, complete) {
        (true, true) => Some(falling(&before, *now_ms)),
        (true, false) => before.falling.filter(|falling| lately(falling.seen_ms)),
        (false, _) => None,
    };
    let words = load.words;
    match (after.rising, after.falling) {
        (Some(rising), _) if more && rising.asks(policy, *now_ms) => wish(rising.least, words, after),
        (None, Some(falling)) if complete && falling.asks(policy, *now_ms) => {
            let why = format!("{words}; so for {} s", policy.down_window_ms / 1000);
            wish(pool.replicas - 1, why, after)
        }
        _ if !complete => hold(format!("{words}; not every gang is known"), after),
        (Some(_), _) => hold(format!("{words}; more, if it lasts"), after),
        (None, Some(_)) => hold(format!("{words}; fewer, if it lasts"), after),
        (None, None) => hold(words, after),
    }
}

impl Rising {
    fn asks(&self, policy: &Policy, now_ms: i64) -> bool {
        now_ms - self.since_ms >= policy.up_after_ms && self.scrapes >= MIN_SCRAPES
    }
}

impl Falling {
    fn asks(&self, policy: &Policy, now_ms: i64) -> bool {
        now_ms - self.since_ms >= policy.down_window_ms
    }
}

fn rising(load: &Load, before: &PoolHistory, now_ms: i64) -> Rising {
    let Load { low, scraped_ms, .. } = *load;
    match before.rising {
        None => Rising { since_ms: now_ms, seen_ms: now_ms, least: low, scraped_ms, scrapes: 1 },
        Some(Rising { since_ms, seen_ms: _, least, scraped_ms: last, scrapes }) => Rising {
            since_ms,
            seen_ms: now_ms,
            least: least.min(low),
            scraped_ms: last.max(scraped_ms),
            scrapes: scrapes.saturating_add(u32::from(scraped_ms > last)),
        },
    }
}

fn falling(before: &PoolHistory, now_ms: i64) -> Falling {
    Falling { since_ms: before.falling.map_or(now_ms, |falling| falling.since_ms), seen_ms: now_ms }
}

/// Cuts what is wished for down to what a budget leaves. Nothing that runs goes for it.
fn keep_within(budget: i64, pools: &[PoolInput], wishes: &mut [Wish]) {
    let held = |pool: &PoolInput| i64::from(pool.replicas.max(pool.live)) + i64::from(pool.draining);
    let left = budget - pools.iter().map(|pool| held(pool) * pool.ranks).sum::<i64>();
    let asks: Vec<Ask> = pools
        .iter()
        .zip(wishes.iter())
        .map(|(pool, wish)| Ask {
            role: pool.role,
            gangs: i64::from((wish.to - pool.replicas).max(0)),
            ranks: pool.ranks,
        })
        .collect();
    for (((pool, wish), ask), gets) in pools.iter().zip(wishes).zip(&asks).zip(share(left, &asks)) {
        if gets < ask.gangs {
            let wanted = wish.to;
            wish.to = pool.replicas + i32::try_from(gets).unwrap_or(0);
            wish.why =
                format!("{}; {wanted} gangs wanted, of the budget of {budget} {left} are left", wish.why);
        }
    }
}
