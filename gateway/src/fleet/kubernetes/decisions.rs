//! What the autoscaler decided last, from the status of the LlamaDeployments. For people alone: nothing waits for it, and a
//! gateway that may not read them says so once.

use std::collections::BTreeMap;

use futures::StreamExt;
use herd_api::LlamaDeployment;
use kube::api::{ApiResource, DynamicObject};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, ResourceExt};
use serde_json::Value;
use tokio::sync::watch;
use tracing::warn;

use super::WATCH_SECONDS;
use crate::LastScale;

/// By served name.
pub(super) type Decisions = BTreeMap<String, LastScale>;

/// More than a gateway serves; the rest is not shown.
const MAX_DEPLOYMENTS: usize = 1024;

/// By namespace and name.
type Known = BTreeMap<(String, String), (Vec<String>, LastScale)>;

/// Publishes them, for as long as it is polled. Read as they are: a status of another version of the operator is no error.
pub(super) async fn follow(client: Client, namespace: Option<String>, sender: watch::Sender<Decisions>) {
    let kind = ApiResource::erase::<LlamaDeployment>(&());
    let api: Api<DynamicObject> = match &namespace {
        Some(namespace) => Api::namespaced_with(client, namespace, &kind),
        None => Api::all_with(client, &kind),
    };
    let config = watcher::Config::default().timeout(WATCH_SECONDS);
    let mut events = watcher(api, config).default_backoff().boxed();
    let (mut known, mut listing) = (Known::new(), Known::new());
    let mut told = false;
    while let Some(event) = events.next().await {
        match event {
            Ok(watcher::Event::Init) => listing.clear(),
            Ok(watcher::Event::InitApply(object)) => take(&mut listing, &object),
            Ok(watcher::Event::InitDone) => known = std::mem::take(&mut listing),
            Ok(watcher::Event::Apply(object)) => take(&mut known, &object),
            Ok(watcher::Event::Delete(object)) => {
                known.remove(&key(&object));
            }
            Err(error) => {
                if !std::mem::replace(&mut told, true) {
                    warn!(%error, "failed to watch LlamaDeployments: scaling decisions are not shown until that works");
                }
                continue;
            }
        }
        let named =
            known.values().flat_map(|(names, decision)| names.iter().map(move |name| (name, decision)));
        let decisions = named.map(|(name, decision)| (name.clone(), decision.clone())).collect();
        sender.send_if_modified(|current| std::mem::replace(current, decisions) != *current);
    }
}

fn key(object: &DynamicObject) -> (String, String) {
    (object.namespace().unwrap_or_default(), object.name_any())
}

fn take(known: &mut Known, object: &DynamicObject) {
    let key = key(object);
    match decision(object) {
        Some(decision) if known.contains_key(&key) || known.len() < MAX_DEPLOYMENTS => {
            known.insert(key, (names(object), decision));
        }
        _ => {
            known.remove(&key);
        }
    }
}

/// As the operator names it: what the user says, or the object's name.
fn names(object: &DynamicObject) -> Vec<String> {
    let given = object.data.pointer("/spec/model/servedNames").and_then(Value::as_array);
    let given: Vec<String> =
        given.into_iter().flatten().filter_map(|name| Some(name.as_str()?.to_owned())).collect();
    if given.is_empty() { vec![object.name_any()] } else { given }
}

fn decision(object: &DynamicObject) -> Option<LastScale> {
    serde_json::from_value(object.data.pointer("/status/lastScale")?.clone()).ok()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn object(value: Value) -> DynamicObject {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn a_decision_is_read_as_far_as_it_is_known() {
        let mut known = Known::new();
        let status = json!({"lastScale": {"time": "2026-11-25T10:00:00Z", "prefill": 1, "decode": 3,
            "reason": "busy", "numbers": {"new": true}}});
        let mut told = json!({"apiVersion": "herd.dev/v1alpha1", "kind": "LlamaDeployment",
            "metadata": {"name": "llama", "namespace": "a"},
            "spec": {"model": {"source": "oci://x"}}, "status": status});
        take(&mut known, &object(told.clone()));
        let (names, decision) = known.values().next().unwrap();
        assert_eq!(names, &["llama"]);
        assert_eq!((decision.prefill, decision.decode, decision.unified), (Some(1), Some(3), None));
        assert_eq!(decision.reason, "busy");

        told["spec"]["model"]["servedNames"] = json!(["one", "two"]);
        take(&mut known, &object(told.clone()));
        assert_eq!(known.values().next().unwrap().0, ["one", "two"]);
        told["status"] = json!({});
        take(&mut known, &object(told));
        assert!(known.is_empty());
    }
}
