//! What a person would look at first when a test has failed.

use serde_json::Value;

use crate::Kubectl;

/// Pods whose logs are shown.
const PODS: usize = 12;
/// Lines of each.
const LINES: &str = "--tail=15";
/// Newest last.
const EVENTS: usize = 25;

/// Prints the fleet's objects, the conditions that are not as they should be, events and logs.
pub(crate) fn print(kubectl: &Kubectl) {
    show(kubectl, &["get", "llamadeployments,llamapools,pods", "--all-namespaces", "--output=wide"]);
    for object in listed(kubectl, "llamadeployments,llamapools") {
        for condition in object["status"]["conditions"].as_array().into_iter().flatten() {
            println!(
                "{} {}: {}={} {}: {}",
                text(&object["kind"]),
                text(&object["metadata"]["name"]),
                text(&condition["type"]),
                text(&condition["status"]),
                text(&condition["reason"]),
                text(&condition["message"]),
            );
        }
    }
    let events = output(kubectl, &["get", "events", "--all-namespaces", "--sort-by=.lastTimestamp"]);
    let lines: Vec<&str> = events.lines().collect();
    for line in &lines[lines.len().saturating_sub(EVENTS)..] {
        println!("{line}");
    }
    let herds = listed(kubectl, "pods").into_iter().filter(|pod| {
        let labels = &pod["metadata"]["labels"];
        labels["app.kubernetes.io/name"] == "herd" || text(&pod["metadata"]["namespace"]) == "herd-system"
    });
    for pod in herds.take(PODS) {
        let (namespace, name) = (text(&pod["metadata"]["namespace"]), text(&pod["metadata"]["name"]));
        let kubectl = kubectl.within(namespace);
        show(&kubectl, &["logs", LINES, name]);
        let restarts = pod["status"]["containerStatuses"][0]["restartCount"].as_i64();
        if restarts.is_some_and(|restarts| restarts > 0) {
            show(&kubectl, &["logs", LINES, "--previous", name]);
        }
    }
}

fn listed(kubectl: &Kubectl, kinds: &str) -> Vec<Value> {
    let list: Value =
        serde_json::from_str(&output(kubectl, &["get", kinds, "--all-namespaces", "--output=json"]))
            .unwrap_or_default();
    list["items"].as_array().cloned().unwrap_or_default()
}

fn show(kubectl: &Kubectl, arguments: &[&str]) {
    println!(
        "--- kubectl --namespace {} {}\n{}",
        kubectl.namespace(),
        arguments.join(" "),
        output(kubectl, arguments)
    );
}

fn output(kubectl: &Kubectl, arguments: &[&str]) -> String {
    kubectl.run(arguments).unwrap_or_else(|error| format!("{error:#}"))
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}
