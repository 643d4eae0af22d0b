//! What a cluster says about a failure, bounded.

use std::fmt::Write as _;

use serde_json::Value;

use crate::kubectl::Kubectl;
use crate::release::NAMESPACE;

/// Lines of each command that are shown, from the end.
const LINES: usize = 40;

/// Worker pods whose logs are shown.
const PODS: usize = 6;

const OBJECTS: &str = "llamadeployments.herd.dev,llamapools.herd.dev,pods";

/// Objects, conditions, events and the ends of logs, of these namespaces; with none, of all.
pub(crate) fn collect(kubectl: &Kubectl, namespaces: &[&str]) -> String {
    let mut text = String::new();
    let conditions = r#"-o=go-template={{range .items}}{{$n := .metadata.name}}{{range .status.conditions}}{{$n}}: {{.type}}={{.status}} {{.reason}}: {{.message}}{{"\n"}}{{end}}{{end}}"#;
    let scopes = match namespaces {
        [] => vec!["--all-namespaces".to_owned()],
        some => some.iter().map(|namespace| format!("--namespace={namespace}")).collect(),
    };
    let mut workers = Vec::new();
    for scope in &scopes {
        add(&mut text, kubectl, &["get", OBJECTS, scope, "-o", "wide"]);
        add(&mut text, kubectl, &["get", "llamadeployments.herd.dev", scope, conditions]);
        add(&mut text, kubectl, &["get", "events", scope, "--sort-by=.metadata.creationTimestamp"]);
        workers
            .extend(pods(&kubectl.json(&["get", "pods", scope, "-l", "herd.dev/gang"]).unwrap_or_default()));
    }
    for deployment in ["deployment/herd-operator", "deployment/herd-gateway"] {
        add(&mut text, kubectl, &["-n", NAMESPACE, "logs", deployment, "--tail=40"]);
    }
    for (namespace, name) in workers.into_iter().take(PODS) {
        add(&mut text, kubectl, &["-n", &namespace, "logs", &name, "--tail=15", "--all-containers"]);
    }
    text
}

fn add(text: &mut String, kubectl: &Kubectl, arguments: &[&str]) {
    let shown: Vec<&str> = arguments.iter().copied().filter(|word| !word.starts_with("-o=")).collect();
    let _ = writeln!(text, "$ kubectl {}", shown.join(" "));
    match kubectl.text(&[&["--request-timeout=10s"], arguments].concat()) {
        Ok(output) => text.push_str(&tail(&output)),
        Err(error) => {
            let _ = writeln!(text, "{error:#}");
        }
    }
}

fn tail(output: &str) -> String {
    let lines: Vec<&str> = output.lines().collect();
    let left_out = lines.len().saturating_sub(LINES);
    let mut text = if left_out > 0 { format!("... {left_out} lines before\n") } else { String::new() };
    for line in &lines[left_out..] {
        let _ = writeln!(text, "{line}");
    }
    text
}

/// Namespace and name of each pod.
fn pods(list: &Value) -> Vec<(String, String)> {
    let metadata = |pod: &Value| {
        let of = |field: &str| pod["metadata"][field].as_str().map(str::to_owned);
        Some((of("namespace")?, of("name")?))
    };
    list["items"].as_array().map(|pods| pods.iter().filter_map(metadata).collect()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_long_output_is_shown_from_its_end() {
        let output = (0..50).map(|n| n.to_string()).collect::<Vec<_>>().join("\n");
        let shown = tail(&output);
        assert!(shown.starts_with("... 10 lines before\n10\n") && shown.ends_with("\n49\n"), "{shown}");
        assert_eq!(tail("a\nb\n"), "a\nb\n");
    }

    #[test]
    fn pods_are_known_by_namespace_and_name() {
        let list =
            json!({"items": [{"metadata": {"namespace": "a", "name": "b"}}, {"metadata": {"name": "c"}}]});
        assert_eq!(pods(&list), [("a".to_owned(), "b".to_owned())]);
        assert_eq!(pods(&Value::Null), []);
    }
}
