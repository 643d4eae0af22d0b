//! What `/metrics` says. Label values are constants of the operator's, never names of objects.

use std::collections::BTreeMap;
use std::time::Duration;

use herd_api::Role;
use herd_metrics::{Family, Page, PageBuilder, PageError, operator as declared};
use prometheus::{Histogram, IntCounter, IntGauge};

/// The metrics of one operator.
#[derive(Debug)]
pub(crate) struct Metrics {
    page: Page,
    reconciles: Family<IntCounter>,
    reconcile_seconds: Family<Histogram>,
    errors: Family<IntCounter>,
    leader: IntGauge,
    objects: Family<IntGauge>,
    autoscaler_decisions: Family<IntCounter>,
    autoscaler_queries: Family<IntCounter>,
    autoscaler_replicas: Family<IntGauge>,
}

impl Metrics {
    /// All at 0, every label value there from the start.
    pub(crate) fn new() -> Result<Self, PageError> {
        let mut page = PageBuilder::new(declared::METRICS)?;
        Ok(Self {
            reconciles: page.counters(&declared::RECONCILES)?,
            reconcile_seconds: page.histograms(&declared::RECONCILE_DURATION)?,
            errors: page.counters(&declared::ERRORS)?,
            leader: page.gauge(&declared::LEADER)?,
            objects: page.gauges(&declared::OBJECTS)?,
            autoscaler_decisions: page.counters(&declared::AUTOSCALER_DECISIONS)?,
            autoscaler_queries: page.counters(&declared::AUTOSCALER_QUERIES)?,
            autoscaler_replicas: page.gauges(&declared::AUTOSCALER_REPLICAS)?,
            page: page.finish()?,
        })
    }

    /// A reconciliation that ended, well or not.
    pub(crate) fn reconciled(&self, controller: &'static str, outcome: &'static str, elapsed: Duration) {
        if let Some(reconciles) = self.reconciles.of(&[controller, outcome]) {
            reconciles.inc();
        }
        if let Some(seconds) = self.reconcile_seconds.of(&[controller]) {
            seconds.observe(elapsed.as_secs_f64());
        }
    }

    /// One that failed.
    pub(crate) fn failed(&self, controller: &'static str, category: &'static str) {
        if let Some(errors) = self.errors.of(&[controller, category]) {
            errors.inc();
        }
    }

    /// Whether this operator leads.
    pub(crate) fn leader(&self, leads: bool) {
        self.leader.set(leads.into());
    }

    /// How many objects of a kind there are.
    pub(crate) fn managed(&self, kind: &'static str, count: i64) {
        if let Some(objects) = self.objects.of(&[kind]) {
            objects.set(count);
        }
    }

    /// A decision about a pool.
    pub(crate) fn decided(&self, direction: &'static str) {
        if let Some(decisions) = self.autoscaler_decisions.of(&[direction]) {
            decisions.inc();
        }
    }

    /// A round of queries to Prometheus.
    pub(crate) fn asked_prometheus(&self, ok: bool) {
        if let Some(queries) = self.autoscaler_queries.of(&[if ok { "ok" } else { "error" }]) {
            queries.inc();
        }
    }

    /// Gangs that the autoscaler wants.
    pub(crate) fn autoscaled(&self, gangs: &BTreeMap<Role, i64>) {
        for role in [Role::Prefill, Role::Decode, Role::Unified] {
            if let Some(replicas) = self.autoscaler_replicas.of(&[role.as_str()]) {
                replicas.set(gangs.get(&role).copied().unwrap_or(0));
            }
        }
    }

    /// The page, in Prometheus's text format.
    pub(crate) fn render(&self) -> Result<String, prometheus::Error> {
        self.page.text("")
    }
}

#[cfg(test)]
mod tests {
    use herd_metrics::check_page;
    use kube::core::Status;

    use super::*;
    use crate::error::ReconcileError;

    #[test]
    fn everything_counted_is_on_the_page() {
        let metrics = Metrics::new().unwrap();
        metrics.reconciled("pool", "ok", Duration::from_millis(30));
        metrics.reconciled("pool", "error", Duration::from_millis(2));
        metrics.failed("deployment", "conflict");
        metrics.leader(true);
        metrics.managed("LlamaPool", 2);
        metrics.managed("LlamaPool", 3);
        let page = metrics.render().unwrap();
        for line in [
            r#"herd_operator_reconciles_total{controller="pool",outcome="ok"} 1"#,
            r#"herd_operator_reconcile_seconds_bucket{controller="pool",le="0.0025"} 1"#,
            r#"herd_operator_reconcile_seconds_count{controller="pool"} 2"#,
            r#"herd_operator_errors_total{category="conflict",controller="deployment"} 1"#,
            "herd_operator_leader 1",
            r#"herd_operator_objects{kind="LlamaPool"} 3"#,
        ] {
            assert!(page.lines().any(|found| found == line), "{line} is not in:\n{page}");
        }
        assert_eq!(check_page(&page, declared::METRICS, &[]), [""; 0]);
        metrics.leader(false);
        assert!(metrics.render().unwrap().contains("herd_operator_leader 0"));
    }

    #[test]
    fn every_category_is_declared() {
        let metrics = Metrics::new().unwrap();
        let (kind, name) = ("Pod", "a".to_owned());
        let failed = |code| {
            let status = Status { code, ..Status::default() };
            let source = Box::new(kube::Error::Api(Box::new(status)));
            ReconcileError::Api { action: "apply", kind, name: "a".to_owned(), source }
        };
        for error in [
            failed(409),
            failed(403),
            failed(422),
            failed(500),
            ReconcileError::Foreign { kind, name: name.clone() },
            ReconcileError::Invalid { kind, name, reason: String::new() },
            ReconcileError::Deadline(Duration::ZERO),
            ReconcileError::Told(Box::new(failed(403))),
        ] {
            let category = error.category();
            assert!(metrics.errors.of(&["pool", category]).is_some(), "{category}");
        }
    }
}
