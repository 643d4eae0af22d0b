//! Passes over a pool, against an API server.

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
