//! Where requests go.

use herd_proto::internal::v1::Role;
use serde_json::json;

use crate::support::scripted::{leader, says};
use crate::support::{endpoint, gateway, soon};

const COMPLETIONS: &str = "/v1/completions";

#[tokio::test(flavor = "multi_thread")]
async fn a_pair_is_one_call_that_names_the_prefill_gang_and_both_epochs() {
    let prefill = leader(says("no")).with(|d| (d.role, d.epoch) = (Role::Prefill.into(), 21)).start().await;
    let decode = leader(says("yes")).with(|d| (d.role, d.epoch) = (Role::Decode.into(), 42)).start().await;
    let running = gateway(&[&prefill.address, &decode.address]).await;
    let answer = running.post(COMPLETIONS, &json!({"model": "tiny", "prompt": "x"})).await;
    assert_eq!(answer.json()["choices"][0]["text"], "yes");
    let call = &decode.calls()[0];
    assert_eq!((call.prefill_peer.as_str(), call.prefill_epoch), (prefill.address.as_str(), 21));
    assert_eq!(call.context.as_ref().unwrap().gang_epoch, 42);
}

#[tokio::test(flavor = "multi_thread")]
async fn gangs_of_one_kv_fingerprint_pair_up_and_others_do_not() {
    let prefill = leader(says("no")).with(|d| d.role = Role::Prefill.into()).start().await;
    let other = leader(says("no"))
        .with(|d| (d.role, d.kv_fingerprint) = (Role::Decode.into(), "other".to_owned()))
        .start()
        .await;
    let running = gateway(&[&prefill.address, &other.address]).await;
    let (_, message) = running.post(COMPLETIONS, &json!({"model": "tiny", "prompt": "x"})).await.refusal(503);
    assert!(message.contains("no prefill gang is ready"), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_spread_over_idle_gangs() {
    for count in [2, 3] {
        let mut workers = Vec::new();
        for _ in 0..count {
            workers.push(leader(says("yes")).start().await);
        }
        let addresses: Vec<_> = workers.iter().map(|worker| worker.address.clone()).collect();
        let running = gateway(&addresses).await;
        for _ in 0..12 {
            running.post(COMPLETIONS, &json!({"model": "tiny", "prompt": "x"})).await;
            // One after another: nothing in flight tells the gangs apart.
            soon(async { while running.metric("herd_gateway_requests_in_flight").await > 0.0 {} }).await;
        }
        assert!(workers.iter().all(|worker| worker.calls().len() >= 2), "of {count} gangs none is left out");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_role_is_followed() {
    let worker = leader(says("yes")).start().await;
    let running = gateway(&[&worker.address]).await;
    let ask = async || running.post(COMPLETIONS, &json!({"model": "tiny", "prompt": "x"})).await.status;
    assert_eq!(ask().await, 200);
    worker.watch.send_modify(|event| event.role = Role::Prefill.into());
    soon(async { while ask().await != 503 {} }).await;
    worker.watch.send_modify(|event| event.role = Role::Unified.into());
    soon(async { while ask().await != 200 {} }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gang_that_starts_anew_is_found_again_under_its_new_epoch() {
    let worker = leader(says("yes")).start().await;
    let address = worker.address.clone();
    let running = gateway(&[&address]).await;
    let ask = async || running.post(COMPLETIONS, &json!({"model": "tiny", "prompt": "x"})).await.status;
    assert_eq!(ask().await, 200);
    drop(worker);
    soon(async { while ask().await != 503 {} }).await;
    let again = leader(says("yes")).with(|description| description.epoch = 8);
    let again = again.start_at(address.parse().unwrap()).await;
    soon(async { while ask().await != 200 {} }).await;
    assert_eq!(again.calls()[0].context.as_ref().unwrap().gang_epoch, 8);
}

#[tokio::test(flavor = "multi_thread")]
async fn discovery_is_followed() {
    let one = leader(says("one")).start().await;
    let two = leader(says("two")).start().await;
    let running = gateway(&[&one.address]).await;
    let ask = async || {
        let answer = running.post(COMPLETIONS, &json!({"model": "tiny", "prompt": "x"})).await;
        if answer.status == 200 { answer.json()["choices"][0]["text"].clone() } else { json!(answer.status) }
    };
    assert_eq!(ask().await, "one");
    running.fleet.set(vec![endpoint(&two.address)]);
    soon(async { while ask().await != "two" {} }).await;
    running.fleet.set(vec![]);
    soon(async { while ask().await != 404 {} }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_context_is_what_the_smallest_gang_holds() {
    let small = leader(says("yes")).with(|d| d.kv_blocks = 2).start().await;
    let large = leader(says("yes")).start().await;
    let running = gateway(&[&small.address, &large.address]).await;
    let model = running.get("/v1/models/tiny").await.json();
    assert_eq!(model["max_model_len"], 128, "its KV cache, not the model's context");
    let body = json!({"model": "tiny", "prompt": "x", "max_tokens": 200});
    running.post(COMPLETIONS, &body).await.refusal(400);
}
