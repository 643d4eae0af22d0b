//! What `/metrics` says.

use herd_metrics::{check_page, worker};
use herd_worker::MetricOptions;

use crate::gangs::{Gang, fake, prompt, request, soon, split};

#[tokio::test]
async fn all_that_is_declared_is_on_the_page_and_nothing_else() {
    let gang = Gang::start(fake(1)).await;
    let problems = |page: String| check_page(&page, worker::METRICS, worker::ALIASES);
    assert_eq!(problems(gang.get("/metrics").await.1), [""; 0], "of a worker that has done nothing");
    gang.answer(request(prompt(100), 3)).await.unwrap();
    gang.decode(request(vec![], 3)).await.unwrap_err();
    gang.worker.drain(None).await;
    gang.decode(request(prompt(1), 3)).await.unwrap_err();
    assert_eq!(problems(gang.get("/metrics").await.1), [""; 0], "of one that has");

    let aliases = MetricOptions { aliases: false, model: "m".to_owned() };
    let gang = Gang::start_with(fake(1), |options| options.metrics = aliases).await;
    assert_eq!(check_page(&gang.get("/metrics").await.1, worker::METRICS, &[]), [""; 0]);
}

#[tokio::test]
async fn a_request_is_counted_where_it_passes() {
    let model = MetricOptions { model: "llama".to_owned(), ..MetricOptions::default() };
    let gang = Gang::start_with(fake(1), |options| options.metrics = model).await;
    gang.answer(request(prompt(600), 5)).await.unwrap();
    gang.idle().await;
    for (sample, value) in [
        ("herd_requests_total{call=\"decode\"}", 1),
        ("herd_queue_seconds_count", 1),
        ("herd_time_to_first_token_seconds_count", 1),
        ("herd_inter_token_latency_seconds_count", 4),
        ("herd_request_seconds_count", 1),
        // Two chunks of the prompt, the second of which gives the first token.
        ("herd_steps_total", 6),
        ("herd_step_seconds_count", 6),
        ("herd_step_tokens_sum", 604),
        ("herd_step_tokens_bucket{le=\"1\"}", 4),
        ("herd_step_sequences_sum", 6),
        ("herd_prompt_tokens_total", 600),
        ("herd_output_tokens_total", 5),
        ("herd_sequences_limit", 64),
        ("herd_requests_waiting_limit", 256),
        ("herd_kv_blocks", 64),
        ("herd_kv_block_tokens", 64),
        ("vllm:prompt_tokens_total{model_name=\"llama\"}", 600),
        ("vllm:inter_token_latency_seconds_count{model_name=\"llama\"}", 4),
        ("vllm:cache_config_info{block_size=\"64\",num_gpu_blocks=\"64\",model_name=\"llama\"}", 1),
    ] {
        assert_eq!(gang.metric(sample).await, value, "{sample}");
    }
    assert!(gang.metric("herd_gang_epoch").await > 0);
}

#[tokio::test]
async fn what_runs_and_waits_shows_while_it_does() {
    let gang = Gang::start(fake(1)).await;
    gang.control.close();
    let _running = gang.decode(request(prompt(640), 128)).await.unwrap();
    gang.held().await;
    let _waiting = gang.decode(request(prompt(64), 5)).await.unwrap();
    assert_eq!(gang.metric("herd_requests_running").await, 1);
    assert_eq!(gang.metric("herd_requests_waiting").await, 1);
    assert_eq!(gang.metric("herd_waiting_prompt_tokens").await, 64);
    // 768 positions in blocks of 64, of 64 blocks.
    assert_eq!(gang.metric("herd_kv_blocks_used").await, 10);
    let (_, page) = gang.get("/metrics").await;
    assert!(page.contains("\nherd_kv_usage_ratio 0.15625\n"), "{page}");
    assert!(page.contains("\nvllm:kv_cache_usage_perc{model_name=\"\"} 0.15625\n"), "{page}");
    gang.control.open();
}

#[tokio::test]
async fn refusals_have_reasons() {
    let gang = Gang::start(fake(1)).await;
    gang.decode(request(vec![], 3)).await.unwrap_err();
    let mut stale = request(prompt(1), 1);
    stale.context.as_mut().unwrap().gang_epoch = 1;
    gang.decode(stale).await.unwrap_err();
    gang.decode(split_to_nobody()).await.unwrap_err();
    soon(gang.worker.drain(None)).await;
    for _ in 0..2 {
        gang.decode(request(prompt(1), 1)).await.unwrap_err();
    }
    for (reason, count) in [("invalid", 1), ("stale", 1), ("prefill", 1), ("draining", 2), ("full", 0)] {
        let sample = format!("herd_requests_refused_total{{call=\"decode\",reason=\"{reason}\"}}");
        assert_eq!(gang.metric(&sample).await, count, "{reason}");
    }
    assert_eq!(gang.metric("herd_requests_total{call=\"decode\"}").await, 0, "a refusal is no request");
}

/// With a prefill gang that is not there.
fn split_to_nobody() -> herd_proto::internal::v1::DecodeRequest {
    herd_proto::internal::v1::DecodeRequest {
        prefill_peer: "127.0.0.1:1".to_owned(),
        ..request(prompt(1), 1)
    }
}

#[tokio::test]
async fn a_transfer_is_counted_on_both_sides() {
    let (prefill, decode) = (Gang::start(fake(2)).await, Gang::start(fake(1)).await);
    decode.answer(split(&prefill, request(prompt(200), 4))).await.unwrap();
    decode.idle().await;
    let sent = prefill.metric("herd_kv_sent_bytes_total").await;
    // Keys and values of 200 rows in 2 layers, 6 heads of 8 bytes.
    assert!(sent > 2 * 200 * 2 * 6 * 8, "{sent}");
    assert_eq!(decode.metric("herd_kv_received_bytes_total").await, sent);
    assert_eq!(decode.metric("herd_kv_transfer_seconds_count").await, 1);
    // The decode gang's first token is the prefill gang's.
    assert_eq!(prefill.metric("herd_time_to_first_token_seconds_count").await, 1);
    assert_eq!(decode.metric("herd_time_to_first_token_seconds_count").await, 1);
    assert_eq!(decode.metric("herd_inter_token_latency_seconds_count").await, 3);
    assert_eq!(decode.metric("herd_queue_seconds_count").await, 1, "the reservation");
}
