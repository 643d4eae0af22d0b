//! What `/metrics` says.

use std::time::Duration;

use prometheus::process_collector::ProcessCollector;
use prometheus::{
    HistogramOpts, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};

/// Seconds of a pass: a read or two, to a deadline.
const PASS_SECONDS: [f64; 9] = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0];

/// All metrics of the operator.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    reconciles: IntCounterVec,
    seconds: HistogramVec,
    errors: IntCounterVec,
    leader: IntGauge,
    objects: IntGaugeVec,
}

impl Metrics {
    /// All at 0.
    pub(crate) fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let metrics = Self {
            reconciles: IntCounterVec::new(
                Opts::new(
                    "herd_operator_reconciles_total",
                    "Passes over an object, by controller and outcome.",
                ),
                &["controller", "outcome"],
            )?,
            seconds: HistogramVec::new(
                HistogramOpts::new("herd_operator_reconcile_seconds", "Seconds a pass took, by controller.")
                    .buckets(PASS_SECONDS.to_vec()),
                &["controller"],
            )?,
            errors: IntCounterVec::new(
                Opts::new("herd_operator_errors_total", "Passes that failed, by controller and category."),
                &["controller", "category"],
            )?,
            leader: IntGauge::new("herd_operator_leader", "1 while this operator works, 0 while it waits.")?,
            objects: IntGaugeVec::new(
                Opts::new("herd_operator_objects", "Objects that are looked after, by kind."),
                &["kind"],
            )?,
            registry,
        };
        let Self { registry, reconciles, seconds, errors, leader, objects } = &metrics;
        registry.register(Box::new(reconciles.clone()))?;
        registry.register(Box::new(seconds.clone()))?;
        registry.register(Box::new(errors.clone()))?;
        registry.register(Box::new(leader.clone()))?;
        registry.register(Box::new(objects.clone()))?;
        registry.register(Box::new(ProcessCollector::for_self()))?;
        Ok(metrics)
    }

    /// A pass ended.
    pub(crate) fn reconciled(&self, controller: &str, outcome: &str, elapsed: Duration) {
        self.reconciles.with_label_values(&[controller, outcome]).inc();
        self.seconds.with_label_values(&[controller]).observe(elapsed.as_secs_f64());
    }

    /// Why it failed.
    pub(crate) fn failed(&self, controller: &str, category: &str) {
        self.errors.with_label_values(&[controller, category]).inc();
    }

    /// Whether this process has the lease.
    pub(crate) fn leader(&self, leads: bool) {
        self.leader.set(i64::from(leads));
    }

    /// Objects of a kind there are.
    pub(crate) fn managed(&self, kind: &str, count: i64) {
        self.objects.with_label_values(&[kind]).set(count);
    }

    /// The text format.
    pub(crate) fn render(&self) -> Result<String, prometheus::Error> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happened_is_told() {
        let metrics = Metrics::new().unwrap();
        metrics.reconciled("pool", "ok", Duration::from_millis(20));
        metrics.failed("pool", "conflict");
        metrics.leader(true);
        metrics.managed("LlamaPool", 2);
        let text = metrics.render().unwrap();
        for line in [
            "herd_operator_reconciles_total{controller=\"pool\",outcome=\"ok\"} 1",
            "herd_operator_reconcile_seconds_count{controller=\"pool\"} 1",
            "herd_operator_errors_total{category=\"conflict\",controller=\"pool\"} 1",
            "herd_operator_leader 1",
            "herd_operator_objects{kind=\"LlamaPool\"} 2",
        ] {
            assert!(text.lines().any(|has| has == line), "{line} is not in\n{text}");
        }
    }
}
