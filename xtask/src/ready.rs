//! Waits until a LlamaDeployment serves, and shows what happens meanwhile.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::kubectl::Kubectl;
use crate::progress;
use crate::stream::{self, Stream};

/// Waits, with a line for each change; `within` is from the first pull to loaded weights.
pub(crate) fn wait(kubectl: &Kubectl, name: &str, within: Duration) -> Result<()> {
    let began = Instant::now();
    let get = ["get", "llamadeployments.herd.dev", name, "--watch", "-o", "json"];
    let mut objects = Stream::start(kubectl.command(&get), within, stream::json)?;
    let mut last = "it has no status".to_owned();
    loop {
        let object = objects.next().with_context(|| format!("{name} did not become Ready: {last}"))?;
        let Some(object) = object else { bail!("the watch of {name} ended: {last}") };
        let line = line(&object);
        if line != last {
            progress::report(&format!("{name}: {line}"), began.elapsed());
            last = line;
        }
        if is_ready(&object) {
            return Ok(());
        }
    }
}

fn condition<'a>(object: &'a Value, kind: &str) -> Option<&'a Value> {
    object["status"]["conditions"].as_array()?.iter().find(|condition| condition["type"] == kind)
}

/// Whether the status is about the spec as it is, and says Ready.
fn is_ready(object: &Value) -> bool {
    let generation = &object["metadata"]["generation"];
    condition(object, "Ready")
        .is_some_and(|ready| ready["status"] == "True" && &ready["observedGeneration"] == generation)
}

/// How far it is: its gangs, and what it says about not being ready.
fn line(object: &Value) -> String {
    if is_ready(object) {
        return "Ready".to_owned();
    }
    let gangs = object["status"]["gangs"].as_str();
    let message = condition(object, "Ready").and_then(|ready| ready["message"].as_str());
    let parts: Vec<&str> = gangs.into_iter().chain(message.filter(|message| !message.is_empty())).collect();
    if parts.is_empty() { "it has no status".to_owned() } else { parts.join("; ") }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn object(status: &str, observed: i64) -> Value {
        json!({
            "metadata": {"generation": 2},
            "status": {
                "gangs": "prefill 1/1, decode 0/1",
                "conditions": [
                    {"type": "Scheduled", "status": "True", "message": "every pod has a node"},
                    {"type": "Ready", "status": status, "observedGeneration": observed, "message": "decode loads"},
                ],
            },
        })
    }

    #[test]
    fn ready_is_about_the_spec_as_it_is() {
        assert!(is_ready(&object("True", 2)));
        assert!(!is_ready(&object("True", 1)));
        assert!(!is_ready(&object("False", 2)));
        assert!(!is_ready(&json!({"metadata": {"generation": 1}})));
    }

    #[test]
    fn a_line_says_how_far_it_is() {
        assert_eq!(line(&object("False", 2)), "prefill 1/1, decode 0/1; decode loads");
        assert_eq!(line(&object("True", 1)), "prefill 1/1, decode 0/1; decode loads");
        assert_eq!(line(&object("True", 2)), "Ready");
        assert_eq!(line(&json!({"metadata": {"generation": 1}})), "it has no status");
        assert_eq!(line(&json!({"status": {"gangs": "unified 0/1"}})), "unified 0/1");
    }
}
