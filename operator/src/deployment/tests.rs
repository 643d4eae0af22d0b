//! Passes over a LlamaDeployment whose model pods download.

use serde_json::{Value, json};

use super::fake::FakeApi;
use super::reconcile;
use crate::context::Context;
use crate::error::ReconcileError;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

fn from_hub() -> Value {
    json!({
        "apiVersion": "herd.dev/v1alpha1", "kind": "LlamaDeployment",
        "metadata": {"name": "m", "namespace": "n", "uid": "u", "generation": 1,
            "creationTimestamp": "2026-01-02T00:00:00Z"},
        "spec": {"model": {"source": "hf://a/b", "secretRef": {"name": "hub"}}, "accelerator": {"kind": "CPU"},
            "unified": {}},
    })
}

async fn pass(context: &Context) -> bool {
    reconcile(context, "n", "m", &[]).await.is_ok()
}

fn condition(api: &FakeApi, type_: &str) -> [String; 3] {
    let status = api.only("llamadeployments").unwrap().1["status"].clone();
    let conditions = status["conditions"].as_array().cloned().unwrap_or_default();
    let found = conditions.iter().find(|condition| condition["type"] == type_).unwrap();
    ["status", "reason", "message"].map(|field| found[field].as_str().unwrap().to_owned())
}

/// The pod that asks has ended so.
fn ends(api: &FakeApi, phase: &str, state: &str, terminated: &Value) {
    let (name, _) = api.only("pods").unwrap();
    let container = json!({"name": "resolve", "image": "w", "imageID": "", "ready": false, "restartCount": 1,
        state: {"terminated": terminated}});
    let status = json!({"phase": phase, "containerStatuses": [container]});
    api.seen().objects.get_mut(&name).unwrap()["status"] = status;
}

fn answers(api: &FakeApi) {
    let message = json!({"pin": COMMIT, "bytes": 7}).to_string();
    ends(api, "Succeeded", "state", &json!({"exitCode": 0, "message": message}));
}

#[tokio::test]
async fn a_source_is_asked_before_anything_is_made() {
    let api = FakeApi::start(from_hub()).await;
    let context = api.context();
    assert!(pass(&context).await);
    assert_eq!(api.writes(), ["create pods", "status llamadeployments"]);
    assert_eq!(condition(&api, "Ready")[..2], ["False", "Resolving"]);
    // Nothing changes, and nothing is written.
    assert!(pass(&context).await);
    assert_eq!(api.writes(), [""; 0]);
    answers(&api);
    assert!(pass(&context).await);
    let writes = api.writes();
    let first = ["create controllerrevisions", "apply services", "apply services"];
    assert_eq!(writes[..3], first);
    assert_eq!(writes[writes.len() - 2..], ["delete pods", "status llamadeployments"]);
    let (_, revision) = api.only("controllerrevisions").unwrap();
    assert_eq!(revision["data"]["download"]["pin"], COMMIT);
    let (_, pool) = api.only("llamapools").unwrap();
    let target = pool["spec"]["targets"][0]["revision"].as_str().unwrap();
    assert_eq!(revision["metadata"]["name"], format!("m-{target}"));
    assert!(pass(&context).await);
    assert!(api.only("pods").is_none(), "it was asked again");
    assert!(!api.seen().plurals.iter().any(|plural| plural == "secrets"));
}

#[tokio::test]
async fn an_answer_that_could_not_be_kept_is_not_forgotten() {
    let api = FakeApi::start(from_hub()).await;
    let context = api.context();
    assert!(pass(&context).await);
    answers(&api);
    api.seen().refuses = Some("controllerrevisions");
    assert!(!pass(&context).await);
    assert!(api.only("pods").is_some() && api.only("llamapools").is_none());
    api.seen().refuses = None;
    assert!(pass(&context).await);
    assert!(api.only("pods").is_none() && api.only("llamapools").is_some());
}

#[tokio::test]
async fn a_pod_that_may_not_ask_is_told_of() {
    let api = FakeApi::start(from_hub()).await;
    let context = api.context();
    api.seen().refuses = Some("pods");
    let error = reconcile(&context, "n", "m", &[]).await.unwrap_err();
    // In the status, and so not once more in an Event of its own.
    assert!(matches!(error, ReconcileError::Told(_)), "{error}");
    let quoted = ["False", "FailedCreate", "the API server refuses a pod: Forbidden"];
    assert_eq!(condition(&api, "ModelAvailable"), quoted);
    assert_eq!(condition(&api, "Ready"), quoted);
    api.seen().refuses = None;
    assert!(pass(&context).await);
    assert_eq!(condition(&api, "Ready")[1], "Resolving");
}

#[tokio::test]
async fn why_there_is_no_answer_is_quoted() {
    let api = FakeApi::start(from_hub()).await;
    let context = api.context();
    assert!(pass(&context).await);
    let said = json!({"reason": "SourceForbidden", "message": "hf://a/b is not for us"}).to_string();
    ends(&api, "Running", "lastState", &json!({"exitCode": 1, "message": said}));
    assert!(pass(&context).await);
    let quoted = ["False", "SourceForbidden", "hf://a/b is not for us"];
    assert_eq!(condition(&api, "ModelAvailable"), quoted);
    assert_eq!(condition(&api, "Ready"), quoted);
    assert!(api.only("llamapools").is_none() && api.only("services").is_none());
}
