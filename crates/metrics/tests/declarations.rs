//! What is declared is sound, bounded, and what the documentation says.

use std::collections::BTreeSet;
use std::path::Path;

use herd_metrics::{AliasOf, Kind, Metric, Values, document, gateway, operator, process, worker};

fn all() -> Vec<&'static Metric> {
    [worker::METRICS, gateway::METRICS, operator::METRICS, process::METRICS].concat()
}

/// Run with `UPDATE_GOLDEN=1`, which is what `cargo xtask metrics-doc` does, to write it anew.
#[test]
fn the_documentation_is_what_is_declared() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/metrics.md");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, document()).unwrap();
    }
    let written = std::fs::read_to_string(path).unwrap_or_default();
    assert_eq!(written, document(), "run cargo xtask metrics-doc");
}

#[test]
fn names_are_unique_and_say_what_they_are() {
    let names: BTreeSet<_> = all().iter().map(|metric| metric.name).collect();
    assert_eq!(names.len(), all().len());
    for Metric { name, kind, unit, labels: _, help } in all() {
        assert_eq!(name.ends_with("_total"), *kind == Kind::Counter, "{name}");
        let base = name.trim_end_matches("_total");
        for suffix in ["seconds", "bytes"] {
            assert_eq!(base.ends_with(&format!("_{suffix}")), *unit == suffix, "{name}");
        }
        assert!(help.ends_with('.') && !unit.is_empty(), "{name}");
        if let Kind::Histogram(bounds) = kind {
            assert!(bounds.is_sorted_by(|a, b| a < b) && !bounds.is_empty(), "{name}");
        }
    }
}

#[test]
fn pages_are_small() {
    let lines = |metrics: &[&Metric]| metrics.iter().map(|metric| metric.most_lines()).sum::<usize>();
    let aliases = |alias: &herd_metrics::Alias| match alias.of {
        AliasOf::Same(metric) => metric.most_lines(),
        AliasOf::Info(_) => 1,
    };
    let worker_lines = lines(worker::METRICS) + worker::ALIASES.iter().map(aliases).sum::<usize>();
    assert!(worker_lines < 500, "{worker_lines} lines on a worker's page");
    assert!(lines(operator::METRICS) < 100, "{} lines on an operator's page", lines(operator::METRICS));
    // A model costs its histograms; nothing else grows.
    let (by_model, fixed): (Vec<&Metric>, Vec<&Metric>) = gateway::METRICS
        .iter()
        .copied()
        .partition(|metric| metric.labels.iter().any(|label| label.values == Values::Models));
    assert!(lines(&fixed) < 100, "{} lines on a gateway's page", lines(&fixed));
    let a_model = lines(&by_model) / (herd_metrics::MAX_MODELS + 1);
    assert!(a_model < 100, "{a_model} lines a model");
    assert!(lines(&by_model) < 6000);
}

#[test]
fn only_gateways_name_models() {
    for metric in [worker::METRICS, operator::METRICS, process::METRICS].concat() {
        assert!(metric.labels.iter().all(|label| label.values != Values::Models), "{}", metric.name);
    }
}
