//! Objects of all kinds beside each other, as an API server has them.

use clap::Parser;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::fake::{FakeApi, PATIENCE, Seen};
use super::run;
use crate::autoscale::{AutoscalerOptions, Logs};

#[derive(Parser)]
struct Command {
    #[command(flatten)]
    options: AutoscalerOptions,
}

/// Two controllers and the autoscaler, until they are dropped.
fn running(api: &FakeApi) -> (JoinSet<()>, CancellationToken) {
    let (context, stop) = (api.context(), CancellationToken::new());
    let (mut task, stopped) = (JoinSet::new(), stop.clone());
    task.spawn(async move {
        let Command { options } = Command::parse_from(["test"]);
        run(context, None, &options, Logs::default(), stopped).await;
    });
    (task, stop)
}

/// The pool of a deployment of this name; one gang of it is wanted.
fn pool(deployment: &str, role: &str, generation: i64) -> Value {
    let owner = json!({"apiVersion": "herd.dev/v1alpha1", "kind": "LlamaDeployment", "name": deployment, "uid": "u",
        "controller": true});
    json!({
        "apiVersion": "herd.dev/v1alpha1", "kind": "LlamaPool",
        "metadata": {"name": format!("{deployment}-{role}"), "namespace": "n", "uid": deployment,
            "resourceVersion": generation.to_string(), "generation": generation, "ownerReferences": [owner]},
        "spec": {"deploymentRef": {"name": deployment}, "role": role, "targets": [{"revision": "r", "replicas": 1}]},
    })
}

/// One that nothing is made of: its source is refused.
fn deployment(name: &str, generation: i64) -> Value {
    json!({
        "apiVersion": "herd.dev/v1alpha1", "kind": "LlamaDeployment",
        "metadata": {"name": name, "namespace": "n", "uid": name, "resourceVersion": generation.to_string(),
            "generation": generation, "creationTimestamp": "2026-01-02T00:00:00Z"},
        "spec": {"model": {"source": "hf://a"}, "accelerator": {"kind": "CPU"}, "unified": {}},
    })
}

/// As another version of the operator would have written it.
fn unreadable(mut object: Value) -> Value {
    object["spec"]["role"] = json!("embedding");
    object["spec"]["model"] = json!(["of", "another", "version"]);
    object
}

fn is_at(seen: &Seen, object: &str, generation: i64) -> bool {
    seen.statuses.get(object).is_some_and(|status| status["observedGeneration"] == generation)
}

fn is_told(seen: &Seen, object: &str, reason: &str, note: &str) -> bool {
    seen.events.iter().any(|event| event[0] == object && event[1] == reason && event[2].contains(note))
}

#[tokio::test]
async fn an_object_that_cannot_be_read_stops_the_watch_of_no_other() {
    let api = FakeApi::start().await;
    api.put("llamapools", unreadable(pool("a", "unified", 1)));
    api.put("llamapools", pool("m", "unified", 1));
    api.put("llamadeployments", unreadable(deployment("b", 1)));
    api.put("llamadeployments", deployment("w", 1));
    let (mut task, stop) = running(&api);
    api.until("what can be read is worked on", |seen| {
        is_at(seen, "llamapools/m-unified", 1) && is_at(seen, "llamadeployments/w", 1) && seen.pods.len() == 1
    })
    .await;
    api.until("what cannot be read is told", |seen| {
        is_told(seen, "a-unified", "ReconcileFailed", "LlamaPool a-unified")
            && is_told(seen, "b", "ReconcileFailed", "LlamaDeployment b")
    })
    .await;
    // Nor one that comes later.
    api.put("llamapools", unreadable(pool("c", "unified", 2)));
    api.put("llamadeployments", unreadable(deployment("w", 2)));
    api.put("llamapools", pool("m", "unified", 3));
    api.put("llamadeployments", deployment("x", 3));
    api.until("what comes after it is seen", |seen| {
        is_at(seen, "llamapools/m-unified", 3) && is_at(seen, "llamadeployments/x", 3)
    })
    .await;
    api.until("what came later is told as well", |seen| {
        is_told(seen, "c-unified", "ReconcileFailed", "LlamaPool c-unified")
            && is_told(seen, "w", "ReconcileFailed", "LlamaDeployment w")
    })
    .await;
    stop.cancel();
    timeout(PATIENCE, task.join_next()).await.expect("they end").unwrap().unwrap();
}

#[tokio::test]
async fn a_pool_whose_pods_are_refused_keeps_no_other_from_its_own() {
    let api = FakeApi::start().await;
    api.put("llamapools", pool("refused", "unified", 1));
    api.put("llamapools", pool("m", "unified", 1));
    let (_task, _stop) = running(&api);
    api.until("the one has its gang, the other says why not", |seen| {
        let told = is_told(seen, "refused-unified", "FailedCreate", "exceeded quota");
        told && seen.pods.len() == 1 && seen.pods[0].starts_with("m-")
    })
    .await;
    api.put("llamapools", pool("later", "unified", 1));
    api.until("so has one that comes later", |seen| seen.pods.len() == 2).await;
    api.until("nothing else is told", |seen| {
        seen.events
            .iter()
            .filter(|event| event[0] == "refused-unified")
            .all(|event| event[1] == "FailedCreate")
    })
    .await;
}
