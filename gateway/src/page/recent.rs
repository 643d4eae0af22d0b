//! What the last minute was like: the counters as they are now, less what they were then.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prometheus::Histogram;
use prometheus::core::Metric as _;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::metrics::{Metrics, ModelMetrics};

/// Rates and quantiles are of this time.
pub(crate) const WINDOW: Duration = Duration::from_mins(1);

/// Between two looks at the counters.
const PERIOD: Duration = Duration::from_secs(5);

/// Looks that are kept: those of a window, and the one before it.
const KEPT: usize = (WINDOW.as_secs() / PERIOD.as_secs()) as usize + 1;

/// Seconds that half, and all but a hundredth, stayed below.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Quantiles {
    /// The median.
    pub p50: f64,
    /// All but one in a hundred.
    pub p99: f64,
}

/// One model in the window.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Rates {
    pub(crate) requests_per_second: f64,
    pub(crate) output_tokens_per_second: f64,
    pub(crate) time_to_first_token: Option<Quantiles>,
    pub(crate) inter_token_latency: Option<Quantiles>,
}

/// Counters of one model at one moment.
#[derive(Clone, Debug, Default)]
struct Totals {
    requests: u64,
    output_tokens: u64,
    time_to_first_token: Buckets,
    inter_token_latency: Buckets,
}

/// Upper bounds, and how many observations were not above each.
#[derive(Clone, Debug, Default, PartialEq)]
struct Buckets(Vec<(f64, u64)>);

/// All models at one moment.
#[derive(Debug)]
struct Look {
    at: Instant,
    models: BTreeMap<String, Totals>,
}

/// The last looks, oldest first.
#[derive(Debug, Default)]
pub(crate) struct Recent(Mutex<VecDeque<Look>>);

impl Recent {
    /// Looks at the counters again and again, for as long as it is polled.
    pub(crate) async fn follow(self: Arc<Self>, metrics: Arc<Metrics>) {
        let mut ticks = interval(PERIOD);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.keep(look(&metrics, Instant::now()));
        }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Look>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep(&self, look: Look) {
        let mut looks = self.lock();
        if looks.len() == KEPT {
            looks.pop_front();
        }
        looks.push_back(look);
    }

    /// Since the oldest look, and how long that is.
    pub(crate) fn rates(&self, metrics: &Metrics, now: Instant) -> (Duration, BTreeMap<String, Rates>) {
        let now = look(metrics, now);
        let looks = self.lock();
        let Some(before) = looks.front() else { return (Duration::ZERO, BTreeMap::new()) };
        let time = now.at.duration_since(before.at);
        let none = Totals::default();
        let rates = now.models.iter().map(|(name, now)| {
            let before = before.models.get(name).unwrap_or(&none);
            (name.clone(), now.since(before, time))
        });
        (time, rates.collect())
    }
}

fn look(metrics: &Metrics, at: Instant) -> Look {
    let models = metrics.models().into_iter().map(|(name, model)| (name, Totals::of(&model))).collect();
    Look { at, models }
}

impl Totals {
    fn of(model: &ModelMetrics) -> Self {
        let ModelMetrics {
            time_to_first_token,
            inter_token_latency,
            duration,
            prompt_tokens: _,
            output_tokens,
        } = model;
        Self {
            requests: duration.get_sample_count(),
            output_tokens: output_tokens.get(),
            time_to_first_token: Buckets::of(time_to_first_token),
            inter_token_latency: Buckets::of(inter_token_latency),
        }
    }

    fn since(&self, before: &Self, time: Duration) -> Rates {
        let a_second = |now: u64, before: u64| {
            now.saturating_sub(before) as f64 / time.as_secs_f64().max(f64::MIN_POSITIVE)
        };
        Rates {
            requests_per_second: a_second(self.requests, before.requests),
            output_tokens_per_second: a_second(self.output_tokens, before.output_tokens),
            time_to_first_token: self.time_to_first_token.since(&before.time_to_first_token).quantiles(),
            inter_token_latency: self.inter_token_latency.since(&before.inter_token_latency).quantiles(),
        }
    }
}

impl Buckets {
    fn of(histogram: &Histogram) -> Self {
        let metric = histogram.metric();
        let histogram = metric.get_histogram();
        let bounded =
            histogram.get_bucket().iter().map(|bucket| (bucket.upper_bound(), bucket.cumulative_count()));
        Self(bounded.chain([(f64::INFINITY, histogram.get_sample_count())]).collect())
    }

    fn since(&self, before: &Self) -> Self {
        let before = before.0.iter().map(|(_, count)| *count).chain(std::iter::repeat(0));
        let less = |((bound, now), before): (&(f64, u64), u64)| (*bound, now.saturating_sub(before));
        Self(self.0.iter().zip(before).map(less).collect())
    }

    fn quantiles(&self) -> Option<Quantiles> {
        Some(Quantiles { p50: self.quantile(0.5)?, p99: self.quantile(0.99)? })
    }

    /// As Prometheus has it: on a line between the two bounds; the highest bound for what is above them all.
    fn quantile(&self, part: f64) -> Option<f64> {
        let all = self.0.last().map(|(_, count)| *count).filter(|count| *count > 0)?;
        let rank = part * all as f64;
        let (mut lower, mut below) = (0.0, 0);
        for (bound, count) in &self.0 {
            if *count as f64 >= rank {
                if bound.is_infinite() {
                    return Some(lower);
                }
                let inside = (count - below) as f64;
                return Some(lower + (bound - lower) * (rank - below as f64) / inside.max(1.0));
            }
            (lower, below) = (*bound, *count);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn observed(metrics: &Metrics, seconds: &[f64]) {
        let model = metrics.model("m").unwrap();
        for seconds in seconds {
            model.time_to_first_token.observe(*seconds);
            model.duration.observe(*seconds);
            model.output_tokens.inc_by(10);
        }
    }

    #[test]
    fn only_the_window_counts() {
        let metrics = Metrics::new().unwrap();
        let recent = Recent::default();
        observed(&metrics, &[100.0; 50]);
        let mut now = Instant::now();
        for _ in 0..2 * KEPT {
            recent.keep(look(&metrics, now));
            now += PERIOD;
        }
        let (time, rates) = recent.rates(&metrics, now);
        assert_eq!(time, WINDOW + PERIOD);
        assert_eq!(rates["m"], Rates::default(), "what is long past");
        observed(&metrics, &[0.15; 13]);
        let (_, rates) = recent.rates(&metrics, now);
        let Rates { requests_per_second, output_tokens_per_second, time_to_first_token, .. } = &rates["m"];
        assert!((requests_per_second - 0.2).abs() < 1e-9, "{rates:?}");
        assert!((output_tokens_per_second - 2.0).abs() < 1e-9);
        // Between 0.1 and 0.2, as far as its bounds tell.
        let Quantiles { p50, p99 } = time_to_first_token.unwrap();
        assert!((p50 - 0.15).abs() < 1e-9 && (p99 - 0.199).abs() < 1e-9, "{p50} {p99}");
    }

    #[test]
    fn quantiles_are_those_of_prometheus() {
        let buckets =
            |counts: [u64; 4]| Buckets([1.0, 2.0, 4.0, f64::INFINITY].into_iter().zip(counts).collect());
        assert_eq!(buckets([0, 0, 0, 0]).quantiles(), None);
        let close = |found: Option<f64>, expected: f64| {
            assert!((found.unwrap() - expected).abs() < 1e-9, "{found:?}");
        };
        close(buckets([0, 10, 10, 10]).quantile(0.5), 1.5);
        close(buckets([5, 5, 10, 10]).quantile(0.5), 1.0);
        close(buckets([0, 0, 10, 10]).quantile(0.9), 3.8);
        close(buckets([0, 0, 0, 10]).quantile(0.5), 4.0);
    }

    #[test]
    fn counters_that_start_anew_are_no_less_than_nothing() {
        let (before, now) =
            (Buckets(vec![(1.0, 8), (f64::INFINITY, 9)]), Buckets(vec![(1.0, 2), (f64::INFINITY, 2)]));
        assert_eq!(now.since(&before), Buckets(vec![(1.0, 0), (f64::INFINITY, 0)]));
    }
}
