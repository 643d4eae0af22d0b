//! What `/metrics` says. Label values are constants of the operator's, never names of objects.

use std::collections::BTreeMap;
use std::time::Duration;

use herd_api::Role;
use prometheus::process_collector::ProcessCollector;
use prometheus::{
    HistogramOpts, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};

/// Seconds, from a reconciliation that changes nothing to one that waits for an API server.
const BUCKETS: [f64; 12] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0];

/// The metrics of one operator.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    reconciles: IntCounterVec,
    reconcile_seconds: HistogramVec,
    errors: IntCounterVec,
    leader: IntGauge,
    objects: IntGaugeVec,
    autoscaler_decisions: IntCounterVec,
    autoscaler_queries: IntCounterVec,
    autoscaler_replicas: IntGaugeVec,
}

impl Metrics {
    /// With those of the process: memory, processor time, file descriptors.
    pub(crate) fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let metrics = Self {
            reconciles: IntCounterVec::new(
                Opts::new(
                    "herd_operator_reconciles_total",
                    "Reconciliations that ended, by controller and outcome.",
                ),
                &["controller", "outcome"],
            )?,
            reconcile_seconds: HistogramVec::new(
                HistogramOpts::new("herd_operator_reconcile_seconds", "Time a reconciliation took.")
                    .buckets(BUCKETS.to_vec()),
                &["controller"],
            )?,
            errors: IntCounterVec::new(
                Opts::new("herd_operator_errors_total", "Reconciliations that failed, by category."),
                &["controller", "category"],
            )?,
            leader: IntGauge::new("herd_operator_leader", "1 while this operator leads.")?,
            objects: IntGaugeVec::new(
                Opts::new("herd_operator_objects", "Objects in the operator's care, by kind."),
                &["kind"],
            )?,
            autoscaler_decisions: IntCounterVec::new(
                Opts::new("herd_autoscaler_decisions_total", "Decisions about a pool: up, down or hold."),
                &["direction"],
            )?,
            autoscaler_queries: IntCounterVec::new(
                Opts::new("herd_autoscaler_queries_total", "Rounds of queries to Prometheus, by outcome."),
                &["outcome"],
            )?,
            autoscaler_replicas: IntGaugeVec::new(
                Opts::new("herd_autoscaler_replicas", "Gangs that the autoscaler wants, of all deployments."),
                &["role"],
            )?,
            registry,
        };
        for direction in ["up", "down", "hold"] {
            metrics.autoscaler_decisions.with_label_values(&[direction]);
        }
        for outcome in ["ok", "error"] {
            metrics.autoscaler_queries.with_label_values(&[outcome]);
        }
        let Self {
            registry,
            reconciles,
            reconcile_seconds,
            errors,
            leader,
            objects,
            autoscaler_decisions,
            autoscaler_queries,
            autoscaler_replicas,
        } = &metrics;
        registry.register(Box::new(reconciles.clone()))?;
        registry.register(Box::new(reconcile_seconds.clone()))?;
        registry.register(Box::new(errors.clone()))?;
        registry.register(Box::new(leader.clone()))?;
        registry.register(Box::new(objects.clone()))?;
        registry.register(Box::new(autoscaler_decisions.clone()))?;
        registry.register(Box::new(autoscaler_queries.clone()))?;
        registry.register(Box::new(autoscaler_replicas.clone()))?;
        registry.register(Box::new(ProcessCollector::for_self()))?;
        Ok(metrics)
    }

    /// A reconciliation that ended, well or not.
    pub(crate) fn reconciled(&self, controller: &'static str, outcome: &'static str, elapsed: Duration) {
        self.reconciles.with_label_values(&[controller, outcome]).inc();
        self.reconcile_seconds.with_label_values(&[controller]).observe(elapsed.as_secs_f64());
    }

    /// One that failed.
    pub(crate) fn failed(&self, controller: &'static str, category: &'static str) {
        self.errors.with_label_values(&[controller, category]).inc();
    }

    /// Whether this operator leads.
    pub(crate) fn leader(&self, leads: bool) {
        self.leader.set(leads.into());
    }

    /// How many objects of a kind there are.
    pub(crate) fn managed(&self, kind: &'static str, count: i64) {
        self.objects.with_label_values(&[kind]).set(count);
    }

    /// A decision about a pool.
    pub(crate) fn decided(&self, direction: &'static str) {
        self.autoscaler_decisions.with_label_values(&[direction]).inc();
    }

    /// A round of queries to Prometheus.
    pub(crate) fn asked_prometheus(&self, ok: bool) {
        self.autoscaler_queries.with_label_values(&[if ok { "ok" } else { "error" }]).inc();
    }

    /// Gangs that the autoscaler wants.
    pub(crate) fn autoscaled(&self, gangs: &BTreeMap<Role, i64>) {
        for role in [Role::Prefill, Role::Decode, Role::Unified] {
            let gangs = gangs.get(&role).copied().unwrap_or(0);
            self.autoscaler_replicas.with_label_values(&[role.as_str()]).set(gangs);
        }
    }

    /// The page, in Prometheus's text format.
    pub(crate) fn render(&self) -> Result<String, prometheus::Error> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_counted_is_on_the_page() {
        let metrics = Metrics::new().unwrap();
        metrics.reconciled("pool", "changed", Duration::from_millis(30));
        metrics.reconciled("pool", "unchanged", Duration::from_millis(2));
        metrics.failed("deployment", "conflict");
        metrics.leader(true);
        metrics.managed("LlamaPool", 2);
        metrics.managed("LlamaPool", 3);
        metrics.decided("up");
        metrics.asked_prometheus(false);
        metrics.autoscaled(&BTreeMap::from([(Role::Decode, 3)]));
        let page = metrics.render().unwrap();
        for line in [
            r#"herd_operator_reconciles_total{controller="pool",outcome="changed"} 1"#,
            r#"herd_operator_reconcile_seconds_bucket{controller="pool",le="0.0025"} 1"#,
            r#"herd_operator_reconcile_seconds_count{controller="pool"} 2"#,
            r#"herd_operator_errors_total{category="conflict",controller="deployment"} 1"#,
            "herd_operator_leader 1",
            r#"herd_operator_objects{kind="LlamaPool"} 3"#,
            r#"herd_autoscaler_decisions_total{direction="up"} 1"#,
            r#"herd_autoscaler_decisions_total{direction="down"} 0"#,
            r#"herd_autoscaler_queries_total{outcome="error"} 1"#,
            r#"herd_autoscaler_replicas{role="decode"} 3"#,
            r#"herd_autoscaler_replicas{role="prefill"} 0"#,
        ] {
            assert!(page.lines().any(|found| found == line), "{line} is not in:\n{page}");
        }
        assert!(page.contains("process_resident_memory_bytes "), "{page}");
        metrics.leader(false);
        assert!(metrics.render().unwrap().contains("herd_operator_leader 0"));
    }
}
