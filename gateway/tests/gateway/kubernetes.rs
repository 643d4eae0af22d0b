//! Gangs found through the `EndpointSlice`s of a cluster.

use herd_gateway::{KubernetesFleet, Limits};
use herd_proto::internal::v1::Phase;
use herd_proto::internal::v1::finished::Reason;
use herd_proto::v1::ListModelsRequest;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::support::api_server::{ApiServer, SERVICES, SLICES};
use crate::support::http::{head, send};
use crate::support::scripted::{Scripted, finished, leader, says, started, tokens};
use crate::support::{Running, gateway_of, soon};

const COMPLETIONS: &str = "/v1/completions";

async fn front(server: &ApiServer, namespace: Option<&str>) -> Running<KubernetesFleet> {
    gateway_of(KubernetesFleet::start(&server.client(), namespace), Limits::default(), None).await
}

/// An API server with the Service of the model `tiny`, and a gateway that has seen it.
async fn served() -> (ApiServer, Running<KubernetesFleet>) {
    let server = ApiServer::start().await;
    server.service("default", "tiny-leaders", &["tiny"]);
    let running = front(&server, None).await;
    until(&running, "tiny", &json!(503)).await;
    server.until_answered("watch services", 1).await;
    server.until_answered("watch endpointslices", 1).await;
    (server, running)
}

/// The text of the answer, or the status of the refusal.
async fn ask(running: &Running<KubernetesFleet>, model: &str) -> Value {
    let answer = running.post(COMPLETIONS, &json!({"model": model, "prompt": "x"})).await;
    if answer.status == 200 { answer.json()["choices"][0]["text"].clone() } else { json!(answer.status) }
}

async fn until(running: &Running<KubernetesFleet>, model: &str, answer: &Value) {
    soon(async { while ask(running, model).await != *answer {} }).await;
}

async fn saying(text: &'static str) -> Scripted {
    leader(says(text)).start().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gang_that_appears_is_routed_to_and_one_that_vanishes_is_not() {
    let (server, running) = served().await;
    let (one, two) = (saying("one").await, saying("two").await);
    server.leader("default", "tiny-leaders", &one.address, false);
    server.leader("default", "tiny-leaders", &two.address, true);
    until(&running, "tiny", &json!("two")).await;
    assert!(one.calls().is_empty(), "it is not ready");
    server.leader("default", "tiny-leaders", &one.address, true);
    until(&running, "tiny", &json!("one")).await;
    server.leader_gone("default", "tiny-leaders", &one.address);
    server.leader_gone("default", "tiny-leaders", &two.address);
    until(&running, "tiny", &json!(503)).await;
    // Without its Service the name is unknown.
    server.service_gone("default", "tiny-leaders");
    until(&running, "tiny", &json!(404)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_autoscaler_decided_last_is_in_the_report() {
    let (server, running) = served().await;
    let decided = async |expected: &Value| {
        let shown = async || running.get("/fleet.json").await.json()["models"][0]["last_scale"].clone();
        soon(async { while shown().await != *expected {} }).await;
    };
    decided(&Value::Null).await;
    let first =
        json!({"time": "2026-11-25T10:00:00Z", "prefill": 1, "decode": 3, "unified": null, "reason": "busy"});
    server.decided("default", "tiny", &first);
    decided(&first).await;
    let second = json!({"time": "2026-11-25T10:05:00Z", "prefill": 1, "decode": 2, "unified": null, "reason": "quiet"});
    server.decided("default", "tiny", &second);
    server.cut();
    decided(&second).await;
    server.deployment_gone("default", "tiny");
    decided(&Value::Null).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gang_that_is_called_unready_and_says_that_it_is_ready_is_the_last_resort() {
    let (server, running) = served().await;
    let (one, two) = (saying("one").await, saying("two").await);
    server.leader("default", "tiny-leaders", &one.address, true);
    until(&running, "tiny", &json!("one")).await;
    server.leader("default", "tiny-leaders", &two.address, true);
    until(&running, "tiny", &json!("two")).await;
    // Its node is not heard of, say.
    server.leader("default", "tiny-leaders", &one.address, false);
    let last = saying("last").await;
    server.service("default", "seen-leaders", &["seen"]);
    server.leader("default", "seen-leaders", &last.address, true);
    until(&running, "seen", &json!("last")).await;
    let before = one.calls().len();
    for _ in 0..4 {
        assert_eq!(ask(&running, "tiny").await, "two");
    }
    assert_eq!(one.calls().len(), before, "another one is ready");
    // All that there is; what it says of itself counts.
    server.leader_gone("default", "tiny-leaders", &two.address);
    until(&running, "tiny", &json!("one")).await;
    one.phase(Phase::Draining);
    until(&running, "tiny", &json!(503)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_on_a_gang_that_vanishes_goes_on() {
    let (server, running) = served().await;
    let (hand, mut streams) = mpsc::unbounded_channel();
    let worker = leader(move |_| {
        let (sender, receiver) = mpsc::channel(4);
        hand.send(sender).unwrap();
        Ok(receiver)
    });
    let worker = worker.start().await;
    server.leader("default", "tiny-leaders", &worker.address, true);
    let listed = async || running.get("/v1/models/tiny").await.json()["ready_gangs"] == 1;
    soon(async { while !listed().await {} }).await;

    let body = serde_json::to_vec(&json!({"model": "tiny", "prompt": "x", "stream": true})).unwrap();
    let connection = send(running.gateway.addresses().http, "POST", COMPLETIONS, &[], &body).await;
    let stream = soon(streams.recv()).await.unwrap();
    stream.send(Ok(started())).await.unwrap();
    stream.send(Ok(tokens(0, &[40], 0))).await.unwrap();
    let mut reading = head(connection).await;
    assert!(!reading.chunk().await.is_empty());
    server.leader_gone("default", "tiny-leaders", &worker.address);
    until(&running, "tiny", &json!(503)).await;
    stream.send(Ok(tokens(1, &[41], 0))).await.unwrap();
    stream.send(Ok(finished(Reason::Length, 0))).await.unwrap();
    let rest = reading.rest().await.text();
    assert!(rest.contains("\"finish_reason\":\"length\"") && rest.ends_with("data: [DONE]\n\n"), "{rest}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_without_a_gang_is_listed_and_unavailable_and_another_one_is_unknown() {
    let (server, running) = served().await;
    server.service("default", "other-leaders", &["other", "another"]);
    until(&running, "another", &json!(503)).await;
    let (_, message) = running.post(COMPLETIONS, &json!({"model": "tiny", "prompt": "x"})).await.refusal(503);
    assert_eq!(message, "model \"tiny\": no gang is ready");
    let (_, message) = running.post(COMPLETIONS, &json!({"model": "tin", "prompt": "x"})).await.refusal(404);
    assert!(message.ends_with("this gateway serves another, other, tiny"), "{message}");
    let models = running.get("/v1/models").await.json();
    let listed = |model: &Value| (model["id"].clone(), model["ready_gangs"].clone());
    let listed: Vec<_> = models["data"].as_array().unwrap().iter().map(listed).collect();
    assert_eq!(listed, ["another", "other", "tiny"].map(|name| (json!(name), json!(0))));
    let models = running.grpc().await.list_models(ListModelsRequest {}).await.unwrap().into_inner().models;
    let listed: Vec<_> = models.iter().map(|model| (model.name.as_str(), model.ready_gangs)).collect();
    assert_eq!(listed, [("another", 0), ("other", 0), ("tiny", 0)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_goes_on_after_it_was_cut() {
    let (server, running) = served().await;
    let (one, two) = (saying("one").await, saying("two").await);
    server.bookmark();
    server.cut();
    server.leader("default", "tiny-leaders", &one.address, true);
    until(&running, "tiny", &json!("one")).await;
    server.cut();
    server.leader_gone("default", "tiny-leaders", &one.address);
    server.leader("default", "tiny-leaders", &two.address, true);
    until(&running, "tiny", &json!("two")).await;
    assert_eq!(server.answered("list services"), 1, "it went on where it was");
    assert_eq!(server.answered("list endpointslices"), 1, "it went on where it was");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_from_too_long_ago_lists_again() {
    let (server, running) = served().await;
    let (one, two) = (saying("one").await, saying("two").await);
    server.leader("default", "tiny-leaders", &one.address, true);
    until(&running, "tiny", &json!("one")).await;
    server.hold(&[SLICES]);
    // What happens from now on is in no watch: each is told 410 Gone.
    server.forget();
    server.leader_gone("default", "tiny-leaders", &one.address);
    server.leader("default", "tiny-leaders", &two.address, true);
    server.until_answered("list services", 2).await;
    assert_eq!(ask(&running, "tiny").await, "one", "while it lists");
    server.hold(&[]);
    until(&running, "tiny", &json!("two")).await;
    assert_eq!(server.answered("list endpointslices"), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_api_server_is_away_the_fleet_stays_what_it_was() {
    let (mut server, running) = served().await;
    let (one, two) = (saying("one").await, saying("two").await);
    server.leader("default", "tiny-leaders", &one.address, true);
    until(&running, "tiny", &json!("one")).await;
    server.away().await;
    server.leader_gone("default", "tiny-leaders", &one.address);
    server.leader("default", "tiny-leaders", &two.address, true);
    // It is to list anew, too.
    server.forget();
    for _ in 0..3 {
        assert_eq!(ask(&running, "tiny").await, "one");
    }
    assert_eq!(running.get("/readyz").await.status, 200);
    server.hold(&[SERVICES, SLICES]);
    server.back().await;
    server.until_answered("watch endpointslices", 2).await;
    assert_eq!(ask(&running, "tiny").await, "one", "while it lists, too");
    server.hold(&[]);
    until(&running, "tiny", &json!("two")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_known_before_both_kinds_are_listed() {
    for held in [SERVICES, SLICES] {
        let server = ApiServer::start().await;
        let worker = saying("yes").await;
        server.service("default", "tiny-leaders", &["tiny"]);
        server.leader("default", "tiny-leaders", &worker.address, true);
        server.hold(&[held]);
        let running = front(&server, None).await;
        let other = if held == SERVICES { "watch endpointslices" } else { "watch services" };
        server.until_answered(other, 1).await;
        let ready = running.get("/readyz").await;
        assert_eq!((ready.status, ready.text().as_str()), (503, "the fleet is not known yet\n"));
        assert_eq!(running.get("/healthz").await.status, 200, "it is alive");
        assert_eq!(ask(&running, "tiny").await, 503, "nobody knows yet that it does not exist");
        server.hold(&[]);
        until(&running, "tiny", &json!("yes")).await;
        assert_eq!(running.get("/readyz").await.text(), "ready\n");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_of_one_namespace_sees_no_other() {
    let server = ApiServer::start().await;
    let (here, there) = (saying("here").await, saying("there").await);
    for (namespace, worker, own) in [("here", &here, "mine"), ("there", &there, "theirs")] {
        server.service(namespace, "tiny-leaders", &["tiny", own]);
        server.leader(namespace, "tiny-leaders", &worker.address, true);
    }
    let running = front(&server, Some("here")).await;
    until(&running, "mine", &json!("here")).await;
    assert_eq!(ask(&running, "theirs").await, 404);
    for _ in 0..4 {
        assert_eq!(ask(&running, "tiny").await, "here");
    }
    // And one of all namespaces takes what claims a name wherever it is.
    let running = front(&server, None).await;
    until(&running, "tiny", &json!("here")).await;
    until(&running, "tiny", &json!("there")).await;
}
