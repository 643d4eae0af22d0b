//! Whether the load of every gang is known, in the words of a condition.

use herd_api::condition::reason;

use super::decide::Metrics;
use super::history::History;
use super::input::{GangInput, Input, PoolInput, Reading};

/// Gangs named in a message.
const MAX_NAMED: usize = 3;

/// Gangs that are Ready, by what is known of them.
#[derive(Default)]
struct Census {
    ready: i32,
    known: i32,
    /// Nothing is known of them because they have only just become Ready.
    new: i32,
    stale: Vec<String>,
    unknown: Vec<String>,
}

/// What the condition says of this input.
pub(super) fn metrics(input: &Input, history: &History) -> Metrics {
    let Input { now_ms, policy, .. } = input;
    if let Some(trouble) = &input.trouble {
        // One answer that does not come is no news: what it would say is not old yet.
        let lately = history.answered_ms.is_some_and(|answered| now_ms - answered <= policy.stale_after_ms());
        if let (true, Some(metrics)) = (lately, &history.metrics) {
            return metrics.clone();
        }
        return Metrics::new(Some(false), reason::PROMETHEUS_UNREACHABLE, trouble.clone());
    }
    let mut census = Census::default();
    for pool in &input.pools {
        census.add(pool, input, history);
    }
    census.words()
}

impl Census {
    fn add(&mut self, pool: &PoolInput, input: &Input, history: &History) {
        let Input { now_ms, policy, .. } = input;
        let seen = history.pools.get(&pool.role);
        self.ready += pool.ready;
        for GangInput { id, revision: _, reading } in &pool.gangs {
            let seen = seen.and_then(|seen| seen.gangs.get(id)).copied();
            let since = seen.map_or(*now_ms, |seen| seen.ready_since_ms);
            let known = seen.and_then(|seen| seen.known_ms);
            let named = |why: &str| format!("{} {id}: {why}", pool.role);
            match reading {
                Reading::Sample(sample) if sample.is_stale(policy) => {
                    self.stale.push(named(&format!("{} s old", sample.age_ms / 1000)));
                }
                Reading::Sample(_) => self.known += 1,
                // One scrape that fails takes its predecessor away, which is not old yet.
                Reading::Missing { .. } if known.is_some_and(|at| now_ms - at <= policy.stale_after_ms()) => {
                    self.known += 1;
                }
                Reading::Missing { .. } if now_ms - since < policy.first_sample_within_ms() => self.new += 1,
                Reading::Missing { metric } => self.unknown.push(named(&format!("no {metric}"))),
                Reading::Invalid { metric } => {
                    self.unknown.push(named(&format!("{metric} cannot be what it says")));
                }
            }
        }
        let unlisted = pool.ready - i32::try_from(pool.gangs.len()).unwrap_or(i32::MAX);
        if unlisted > 0 {
            self.unknown.push(format!("{}: {unlisted} more than a pool's status lists", pool.role));
        }
    }

    fn words(self) -> Metrics {
        let Self { ready, known, new, stale, unknown } = self;
        if ready == 0 {
            return Metrics::new(None, reason::UNKNOWN, "no gang is ready".to_owned());
        }
        let named = |list: &[String]| list.iter().take(MAX_NAMED).cloned().collect::<Vec<_>>().join("; ");
        let of = |count: usize| format!("of {ready} gangs that are ready, {count}");
        if !stale.is_empty() {
            let message = format!("{} have samples that are too old: {}", of(stale.len()), named(&stale));
            return Metrics::new(Some(false), reason::STALE_DATA, message);
        }
        if !unknown.is_empty() {
            let reason = if known == 0 { reason::NO_DATA } else { reason::PARTIAL_DATA };
            let message = format!("{} are not known to Prometheus: {}", of(unknown.len()), named(&unknown));
            return Metrics::new(Some(false), reason, message);
        }
        if known == 0 {
            let message = format!("waiting for the first samples of {new} gangs");
            return Metrics::new(None, reason::UNKNOWN, message);
        }
        let message = "Prometheus knows the load of every gang that is ready".to_owned();
        Metrics::new(Some(true), reason::AS_EXPECTED, message)
    }
}
