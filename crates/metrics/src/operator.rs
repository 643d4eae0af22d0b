//! What an operator counts.

use crate::buckets::RECONCILE_SECONDS;
use crate::declaration::{Label, Metric, label};

const CONTROLLER: Label = label("controller", &["deployment", "pool"]);

/// Reconciliations.
pub const RECONCILES: Metric = Metric::counter(
    "herd_operator_reconciles_total",
    "reconciliations",
    "Reconciliations that ended, by controller and outcome.",
)
.by(&[CONTROLLER, label("outcome", &["ok", "error"])]);
/// Their time.
pub const RECONCILE_DURATION: Metric = Metric::histogram(
    "herd_operator_reconcile_seconds",
    "seconds",
    RECONCILE_SECONDS,
    "Time a reconciliation took.",
)
.by(&[CONTROLLER]);
/// Those that failed.
pub const ERRORS: Metric = Metric::counter(
    "herd_operator_errors_total",
    "reconciliations",
    "Reconciliations that failed, by category.",
)
.by(&[
    CONTROLLER,
    label(
        "category",
        &[
            "conflict",
            "forbidden",
            "invalid",
            "api",
            "connection",
            "foreign",
            "unreadable",
            "revision",
            "deadline",
        ],
    ),
]);
/// Whether it leads.
pub const LEADER: Metric = Metric::gauge("herd_operator_leader", "0 or 1", "1 while this operator leads.");
/// Objects.
pub const OBJECTS: Metric =
    Metric::gauge("herd_operator_objects", "objects", "Objects in the operator's care, by kind.")
        .by(&[label("kind", &["LlamaDeployment", "LlamaPool"])]);
/// The autoscaler's decisions.
pub const AUTOSCALER_DECISIONS: Metric = Metric::counter(
    "herd_autoscaler_decisions_total",
    "decisions",
    "Decisions about a pool: more gangs, fewer, or as many.",
)
.by(&[label("direction", &["up", "down", "hold"])]);
/// What it asks.
pub const AUTOSCALER_QUERIES: Metric = Metric::counter(
    "herd_autoscaler_queries_total",
    "rounds",
    "Rounds of queries to Prometheus, by outcome.",
)
.by(&[label("outcome", &["ok", "error"])]);
/// What it wants.
pub const AUTOSCALER_REPLICAS: Metric = Metric::gauge(
    "herd_autoscaler_replicas",
    "gangs",
    "Gangs that the autoscaler wants, of all deployments it scales.",
)
.by(&[label("role", &["prefill", "decode", "unified"])]);

/// All of them, but for those that every process has.
pub const METRICS: &[&Metric] = &[
    &RECONCILES,
    &RECONCILE_DURATION,
    &ERRORS,
    &LEADER,
    &OBJECTS,
    &AUTOSCALER_DECISIONS,
    &AUTOSCALER_QUERIES,
    &AUTOSCALER_REPLICAS,
];
