//! What `/metrics` says.

use herd_metrics::{check_page, gateway as declared};
use herd_proto::internal::v1::finished::Reason;
use herd_worker::Role;
use serde_json::json;

use crate::support::scripted::{all, finished, leader, started, tokens};
use crate::support::{fleet, gateway, soon};

#[tokio::test]
async fn all_that_is_declared_is_on_the_page_and_nothing_else() {
    let fleet = fleet::fake(&[Role::Unified]).await;
    let page = async || fleet.running.get("/metrics").await.text();
    assert_eq!(check_page(&page().await, declared::METRICS, &[]), [""; 0], "of one that has done nothing");
    let asked = json!({"model": "tiny", "prompt": "one two", "max_tokens": 4});
    assert_eq!(fleet.running.post("/v1/completions", &asked).await.status, 200);
    for model in ["", "no such model", "\"},x{y=\"z"] {
        let asked = json!({"model": model, "prompt": "one", "max_tokens": 1});
        assert_ne!(fleet.running.post("/v1/completions", &asked).await.status, 200);
    }
    let page = page().await;
    assert_eq!(check_page(&page, declared::METRICS, &[]), [""; 0], "of one that has");
    assert!(!page.contains("no such model"), "names of clients are no labels");
}

#[tokio::test]
async fn tokens_and_their_times_are_counted_by_model() {
    let gang = leader(|_| {
        let messages = [started(), tokens(0, &[65], 0), tokens(1, &[66, 67], 0), tokens(3, &[68], 0)];
        let end = finished(Reason::Length, 0);
        Ok(all(messages.into_iter().chain([end]).map(Ok)))
    });
    let gang = gang.start().await;
    let running = gateway(&[&gang.address]).await;
    let asked = json!({"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 4, "n": 2});
    assert_eq!(running.post("/v1/completions", &asked).await.status, 200);
    let page = running.get("/metrics").await.text();
    for (line, value) in [
        ("herd_gateway_time_to_first_token_seconds_count{model=\"tiny\"}", 1),
        ("herd_gateway_request_duration_seconds_count{model=\"tiny\"}", 1),
        // Of each choice: two tokens that came together, and one.
        ("herd_gateway_inter_token_latency_seconds_count{model=\"tiny\"}", 6),
        // A prompt for both.
        ("herd_gateway_prompt_tokens_total{model=\"tiny\"}", 3),
        ("herd_gateway_output_tokens_total{model=\"tiny\"}", 8),
        ("herd_gateway_requests_waiting_for_gang{model=\"tiny\"}", 0),
        ("herd_gateway_gangs{phase=\"ready\",role=\"unified\"}", 1),
        ("herd_gateway_gangs{phase=\"ready\",role=\"prefill\"}", 0),
    ] {
        assert!(page.contains(&format!("{line} {value}\n")), "{line} {value} is not in\n{page}");
    }
}

#[tokio::test]
async fn models_that_are_gone_leave_the_page() {
    let fleet = fleet::fake(&[Role::Unified]).await;
    let with_tiny = async || fleet.running.get("/metrics").await.text().contains("model=\"tiny\"");
    assert!(with_tiny().await);
    fleet.running.fleet.set(vec![]);
    soon(async { while with_tiny().await {} }).await;
}

#[tokio::test]
async fn refusals_have_reasons() {
    let fleet = fleet::fake(&[Role::Prefill]).await;
    let asked = json!({"model": "tiny", "prompt": "one", "max_tokens": 1});
    assert_eq!(fleet.running.post("/v1/completions", &asked).await.status, 503);
    let refused = fleet.running.metric("herd_gateway_refusals_total{reason=\"no_decode\"}").await;
    assert!((refused - 1.0).abs() < 0.1, "{refused}");
}
