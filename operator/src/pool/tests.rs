//! Passes over a pool, against an API server.

use axum::http::StatusCode;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use super::fake::FakeApi;
use super::reconcile;
use crate::context::Context;

fn of_three_pods() -> Value {
    json!({"source": "oci://r/m:1", "tensor": 3, "ranksPerPod": 1, "terminationGracePeriodSeconds": 600})
}

async fn pass(context: &Context) -> bool {
    reconcile(context, "n", "m-unified").await.is_ok()
}

fn condition(api: &FakeApi, type_: &str) -> String {
    let pool = api.seen().pool.clone();
    let conditions = pool["status"]["conditions"].as_array().cloned().unwrap_or_default();
    let found = conditions.iter().find(|condition| condition["type"] == type_);
    found.and_then(|condition| condition["message"].as_str()).unwrap_or_default().to_owned()
}

#[tokio::test]
async fn a_gang_is_made_once_and_leader_first() {
    let api = FakeApi::start(of_three_pods()).await;
    let context = api.context(false);
    assert!(pass(&context).await);
    assert_eq!(api.writes(), ["status", "create 0", "create 1", "create 2"]);
    assert!(pass(&context).await);
    assert_eq!(api.writes(), ["status"]);
    assert!(pass(&context).await);
    assert_eq!(api.writes(), [""; 0]);
}

/// Another operator would make them otherwise today.
#[tokio::test]
async fn gangs_of_an_earlier_operator_are_left_as_they_are() {
    let api = FakeApi::start(of_three_pods()).await;
    assert!(pass(&api.context(false)).await);
    for pod in &mut api.seen().pods {
        let spec = pod["spec"].as_object_mut().unwrap();
        assert!(spec.remove("tolerations").is_some());
        let probe = spec["containers"][0]["livenessProbe"].as_object_mut().unwrap();
        assert_eq!(probe.remove("terminationGracePeriodSeconds"), Some(json!(10)));
    }
    assert!(pass(&api.context(false)).await);
    assert_eq!(api.writes(), ["status", "create 0", "create 1", "create 2", "status"]);
    assert!(pass(&api.context(false)).await);
    assert_eq!(api.writes(), [""; 0]);
}

#[tokio::test]
async fn a_gang_of_several_pods_is_a_group_that_goes_with_its_leader() {
    let api = FakeApi::start(of_three_pods()).await;
    assert!(pass(&api.context(true)).await);
    assert_eq!(api.writes(), ["status", "create 0", "group 3", "create 1", "create 2"]);
    let names: Vec<Value> =
        api.seen().pods.iter().map(|pod| pod["spec"]["schedulingGroup"].clone()).collect();
    assert!(names.iter().all(|name| *name == names[0]), "{names:?}");
    let one = json!({"source": "oci://r/m:1", "tensor": 3, "terminationGracePeriodSeconds": 600});
    let api = FakeApi::start(one).await;
    assert!(pass(&api.context(true)).await);
    assert_eq!(api.writes(), ["status", "create 0"]);
}

#[tokio::test]
async fn a_gang_that_goes_goes_leader_first() {
    let api = FakeApi::start(of_three_pods()).await;
    let context = api.context(false);
    assert!(pass(&context).await);
    api.seen().pool["spec"]["targets"][0]["replicas"] = json!(0);
    api.writes();
    assert!(pass(&context).await);
    assert_eq!(api.writes(), ["status", "delete 0"]);
    assert!(pass(&context).await);
    assert_eq!(api.writes(), ["status", "delete 1", "delete 2"]);
    assert!(api.seen().pool["status"]["lastFailure"].is_null());
}

#[tokio::test]
async fn a_gang_that_was_not_made_to_the_end_is_given_up_and_told_of() {
    let api = FakeApi::start(of_three_pods()).await;
    let context = api.context(false);
    api.seen().quota = 2;
    api.seen().refusal = (StatusCode::SERVICE_UNAVAILABLE, "not now");
    assert!(!pass(&context).await);
    assert_eq!(api.writes(), ["status", "create 0", "create 1"]);
    // Nobody would know of it if the status could not be written.
    api.seen().takes_status = false;
    assert!(!pass(&context).await);
    assert_eq!(api.writes(), [""; 0]);
    api.seen().takes_status = true;
    assert!(pass(&context).await);
    assert_eq!(api.writes(), ["status", "delete 0", "delete 1"]);
    let failure = api.seen().pool["status"]["lastFailure"].clone();
    assert_eq!((&failure["reason"], &failure["revision"]), (&json!("GangIncomplete"), &json!("r")));
    // It went wrong for so long that the next one has to wait, and the pool says why there is none.
    api.seen().pool["status"]["lastFailure"]["since"] = json!("2026-01-01T00:00:00Z");
    assert!(pass(&context).await);
    assert_eq!(api.writes(), ["status"]);
    assert_eq!(condition(&api, "Degraded"), "of the 3 pods of a gang there are 2");
}

fn told_of_refusals(api: &FakeApi) -> usize {
    api.seen().events.iter().filter(|reason| *reason == "FailedCreate").count()
}

const QUOTA: &str = "the API server refuses a pod: exceeded quota: q";

#[tokio::test]
async fn a_pod_that_is_refused_is_told_of_once_and_tried_again_later() {
    let api = FakeApi::start(of_three_pods()).await;
    let context = api.context(false);
    api.seen().quota = 2;
    assert!(pass(&context).await);
    assert_eq!(api.writes(), ["status", "create 0", "create 1", "status"]);
    assert_eq!(condition(&api, "Degraded"), QUOTA);
    assert_eq!(condition(&api, "Ready"), QUOTA);
    assert_eq!(told_of_refusals(&api), 1);
    // What there is of the gang goes, and its missing pod does not hide why it is missing.
    assert!(pass(&context).await);
    assert_eq!(api.writes(), ["status", "delete 0", "delete 1"]);
    assert_eq!(condition(&api, "Degraded"), QUOTA);
    // Not before its time.
    api.seen().quota = 0;
    let failed_at = |second: i64| {
        let at = Timestamp::now() - SignedDuration::from_secs(second);
        json!(at.to_string())
    };
    api.seen().pool["status"]["lastFailure"]["since"] = failed_at(120);
    api.seen().pool["status"]["lastFailure"]["time"] = failed_at(1);
    let wait = reconcile(&context, "n", "m-unified").await.unwrap();
    assert!(wait.is_some_and(|wait| wait.as_secs() > 60), "{wait:?}");
    assert_eq!(api.writes(), ["status"]);
    // Still refused: the same words, and no other Event.
    api.seen().pool["status"]["lastFailure"]["time"] = failed_at(600);
    assert!(pass(&context).await);
    assert_eq!(api.writes(), ["status"]);
    let failure = api.seen().pool["status"]["lastFailure"].clone();
    assert_eq!((&failure["reason"], &failure["revision"]), (&json!("FailedCreate"), &json!("r")));
    assert_eq!(told_of_refusals(&api), 1);
    // There is room again.
    api.seen().quota = 3;
    api.seen().pool["status"]["lastFailure"]["since"] = failed_at(600);
    api.seen().pool["status"]["lastFailure"]["time"] = failed_at(590);
    assert!(pass(&context).await);
    assert_eq!(api.writes(), ["create 0", "create 1", "create 2"]);
    assert!(pass(&context).await);
    assert_eq!(condition(&api, "Degraded"), "no gang has failed");
}

#[tokio::test]
async fn a_pool_that_was_made_by_hand_gets_no_gangs() {
    let api = FakeApi::start(of_three_pods()).await;
    let context = api.context(false);
    let made = api.seen().pool["metadata"].as_object_mut().unwrap().remove("ownerReferences").unwrap();
    assert!(pass(&context).await);
    assert_eq!(api.writes(), ["status"]);
    for type_ in ["Ready", "Degraded"] {
        let told = condition(&api, type_);
        assert!(told.starts_with("no LlamaDeployment m made this LlamaPool"), "{told}");
    }
    assert_eq!(api.seen().events, ["NotControlled"]);
    assert!(pass(&context).await);
    assert_eq!(api.writes(), [""; 0]);
    // What was there goes on, once it is orphaned.
    api.seen().pool["metadata"]["ownerReferences"] = made;
    assert!(pass(&context).await);
    api.seen().pool["metadata"].as_object_mut().unwrap().remove("ownerReferences");
    api.writes();
    assert!(pass(&context).await);
    assert_eq!(api.writes(), ["status"]);
    assert_eq!(api.seen().pods.len(), 3);
}

#[tokio::test]
async fn whoever_refuses_a_pod_is_quoted() {
    for (code, message) in [
        (StatusCode::FORBIDDEN, "no PriorityClass with name p was found"),
        (StatusCode::BAD_REQUEST, "admission webhook \"w\" denied the request: no"),
        (StatusCode::INTERNAL_SERVER_ERROR, "failed calling webhook \"w\": connection refused"),
        (StatusCode::UNPROCESSABLE_ENTITY, "Pod \"x\" is invalid"),
    ] {
        let api = FakeApi::start(of_three_pods()).await;
        (api.seen().quota, api.seen().refusal) = (0, (code, message));
        assert!(pass(&api.context(false)).await);
        assert_eq!(condition(&api, "Ready"), format!("the API server refuses a pod: {message}"));
    }
    // That says nothing about the pod.
    let api = FakeApi::start(of_three_pods()).await;
    (api.seen().quota, api.seen().refusal) = (0, (StatusCode::TOO_MANY_REQUESTS, "slow down"));
    assert!(!pass(&api.context(false)).await);
    assert!(api.seen().pool["status"]["lastFailure"].is_null());
}

#[tokio::test]
async fn what_a_gang_lacks_is_told_where_nodes_may_be_read() {
    let spec = json!({"source": "oci://r/m:1", "tensor": 3, "gpu": {}, "terminationGracePeriodSeconds": 600});
    let api = FakeApi::start(spec).await;
    let context = api.context(false);
    assert!(pass(&context).await);
    let waits = json!({"type": "PodScheduled", "status": "False", "message": "0/2 nodes are available"});
    api.seen().pods[0]["status"] = json!({"conditions": [waits]});
    assert!(pass(&context).await);
    assert_eq!(condition(&api, "Scheduled"), "0/2 nodes are available");
    let node = json!({"metadata": {"name": "a"}, "status": {"allocatable": {"nvidia.com/gpu": "2"}}});
    api.seen().nodes = Some(json!([node]));
    assert!(pass(&context).await);
    assert_eq!(
        condition(&api, "Scheduled"),
        "needs 3 nvidia.com/gpu on one node; the best node has 2 (0/2 nodes are available)"
    );
}
