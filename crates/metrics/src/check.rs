//! Whether a page that was served says what is declared.

use std::collections::{BTreeMap, BTreeSet};

use crate::alias::{Alias, AliasOf};
use crate::declaration::{Kind, Label, Metric, Values};
use crate::process;

/// Names what of a page in the text format is missing, not declared, or not what it is declared to be.
pub fn check_page(page: &str, declared: &[&Metric], aliases: &[Alias]) -> Vec<String> {
    let mut expected: BTreeMap<&str, (Kind, Vec<Label>)> = BTreeMap::new();
    for metric in declared.iter().chain(process::METRICS) {
        expected.insert(metric.name, (metric.kind, metric.labels.to_vec()));
    }
    for alias in aliases {
        let mut labels = vec![Label { name: "model_name", values: Values::Models }];
        match alias.of {
            AliasOf::Same(metric) => labels.extend(metric.labels),
            AliasOf::Info(gauges) => {
                labels.extend(gauges.iter().map(|(name, _)| Label { name, values: Values::Models }));
            }
        }
        expected.insert(alias.name, (alias.kind(), labels));
    }
    let mut problems = Vec::new();
    let mut said = BTreeSet::new();
    for line in page.lines() {
        if let Some(line) = line.strip_prefix("# TYPE ") {
            let (name, kind) = line.split_once(' ').unwrap_or((line, ""));
            match expected.get(name) {
                None => problems.push(format!("{name} is not declared")),
                Some((declared, _)) if declared.word() != kind => {
                    problems.push(format!("{name} is a {kind}, declared as a {}", declared.word()));
                }
                Some(_) => {
                    said.insert(name);
                }
            }
        } else if !line.starts_with('#') && !line.is_empty() {
            let (name, labels) = sample(line);
            let family = ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|end| name.strip_suffix(end).filter(|name| expected.contains_key(name)))
                .unwrap_or(name);
            let Some((_, declared)) = expected.get(family) else {
                problems.push(format!("{name} is not declared"));
                continue;
            };
            let labels: Vec<_> = labels.into_iter().filter(|(label, _)| *label != "le").collect();
            if labels.len() != declared.len() {
                problems.push(format!("{name} has {} labels, {} declared", labels.len(), declared.len()));
            }
            for (label, value) in labels {
                let values =
                    declared.iter().find(|declared| declared.name == label).map(|label| label.values);
                let known = match values {
                    None => false,
                    Some(Values::Models) => true,
                    Some(Values::Of(values)) => values.contains(&value),
                };
                if !known {
                    problems.push(format!("{name} has {label}={value:?}, which is not declared"));
                }
            }
        }
    }
    problems.extend(
        expected.keys().filter(|name| !said.contains(*name)).map(|name| format!("{name} is missing")),
    );
    problems
}

/// Name and labels of a line. Values of labels that hold quotation marks or commas are not what we have.
fn sample(line: &str) -> (&str, Vec<(&str, &str)>) {
    let Some((name, rest)) = line.split_once('{') else {
        return (line.split(' ').next().unwrap_or(line), vec![]);
    };
    let labels = rest.rsplit_once('}').map_or("", |(labels, _)| labels);
    let pairs = labels.split(',').filter_map(|pair| pair.split_once('='));
    (name, pairs.map(|(label, value)| (label, value.trim_matches('"'))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::declaration::label;

    const CALLS: Metric = Metric::counter("calls_total", "calls", "").by(&[label("reason", &["a", "b"])]);
    const TIME: Metric = Metric::histogram("time_seconds", "seconds", &[1.0], "");

    fn problems(page: &str) -> Vec<String> {
        let mut problems = check_page(page, &[&CALLS, &TIME], &[]);
        problems.retain(|problem| !problem.starts_with("process_"));
        problems
    }

    const GOOD: &str = "# HELP calls_total x\n# TYPE calls_total counter\ncalls_total{reason=\"a\"} 1\n\
                        # TYPE time_seconds histogram\ntime_seconds_bucket{le=\"1\"} 0\ntime_seconds_sum 0\n";

    #[test]
    fn a_page_as_declared_has_no_problems() {
        assert_eq!(problems(GOOD), [""; 0]);
        assert_eq!(check_page(GOOD, &[&CALLS, &TIME], &[]).len(), process::METRICS.len());
    }

    #[test]
    fn every_difference_is_named() {
        for (was, is, problem) in [
            ("reason=\"a\"", "reason=\"c\"", "calls_total has reason=\"c\", which is not declared"),
            ("reason=\"a\"", "reason=\"a\",x=\"y\"", "calls_total has 2 labels, 1 declared"),
            ("calls_total counter", "calls_total gauge", "calls_total is a gauge, declared as a counter"),
            ("# TYPE time_seconds histogram", "", "time_seconds is missing"),
            ("time_seconds_sum", "other", "other is not declared"),
        ] {
            let found = problems(&GOOD.replace(was, is));
            assert!(found.contains(&problem.to_owned()), "{problem}: {found:?}");
        }
    }
}
