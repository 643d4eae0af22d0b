//! What must hold of a stream whatever the gangs send.

use herd_proto::internal::v1::DecodeRequest;
use herd_proto::internal::v1::finished::Reason;
use serde_json::{Value, json};
use tonic::Status;

use crate::support::scripted::{all, finished, leader, says, started, tokens};
use crate::support::{gateway, text_model};

const COMPLETIONS: &str = "/v1/completions";

/// A leader that says these ids in messages of these sizes, and at the end fails or finishes.
fn in_messages(
    ids: Vec<u32>,
    sizes: Vec<usize>,
    end: Result<Reason, Status>,
) -> impl Fn(DecodeRequest) -> Result<crate::support::scripted::Events, Status> + Send + Sync {
    move |_| {
        let mut events = vec![Ok(started())];
        let mut at = 0;
        for size in &sizes {
            events.push(Ok(tokens(at as u32, &ids[at..at + size], 1)));
            at += size;
        }
        events.push(end.clone().map(|reason| finished(reason, 3)));
        Ok(all(events))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_within_a_stream_is_sent_and_done_is_not() {
    let ids = text_model().encode("Hello", false).unwrap();
    let count = ids.len();
    let worker = leader(in_messages(ids, vec![count], Err(Status::internal("it broke")))).start().await;
    let running = gateway(&[&worker.address]).await;
    let body = json!({"model": "tiny", "prompt": "x", "stream": true});
    let answer = running.post(COMPLETIONS, &body).await;
    assert_eq!(answer.status, 200);
    let events = answer.events();
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!(last["error"]["type"], "server_error");
    assert!(last["error"]["message"].as_str().unwrap().contains("it broke"));
    assert!(last["error"].get("code").is_some() && last["error"].get("param").is_some());
    assert!(events.iter().all(|event| event != "[DONE]"));
    let text: String = events[..events.len() - 1]
        .iter()
        .map(|event| {
            serde_json::from_str::<Value>(event).unwrap()["choices"][0]["text"].as_str().unwrap().to_owned()
        })
        .collect();
    assert_eq!(text, "Hello", "what was generated was sent");
    // Without a stream the status says it, and nothing half is sent.
    let (_, message) = running.post(COMPLETIONS, &json!({"model": "tiny", "prompt": "x"})).await.refusal(500);
    assert!(message.contains("it broke"));
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_past_a_stop_string_is_sent_however_tokens_arrive() {
    let model = text_model();
    let ids = model.encode("one two three four", false).unwrap();
    let until = model.encode("one two three", false).unwrap().len();
    let single = vec![1; ids.len()];
    let at_once = vec![ids.len()];
    let mut texts = Vec::new();
    for sizes in [single, at_once] {
        let worker = leader(in_messages(ids.clone(), sizes, Ok(Reason::Length))).start().await;
        let running = gateway(&[&worker.address]).await;
        let body = json!({
            "model": "tiny", "prompt": [1], "stop": [" three"], "logprobs": 1, "return_token_ids": true
        });
        let answer = running.post(COMPLETIONS, &body).await.json();
        let choice = answer["choices"][0].clone();
        assert_eq!(choice["text"], "one two");
        assert_eq!(choice["finish_reason"], "stop");
        let sent = choice["token_ids"].as_array().unwrap().len();
        assert_eq!(choice["logprobs"]["tokens"].as_array().unwrap().len(), sent, "one a token");
        let sent: Vec<u32> = serde_json::from_value(choice["token_ids"].clone()).unwrap();
        assert_eq!(sent, ids[..sent.len()]);
        assert!(sent.len() < until, "tokens of the stop string alone are not sent");
        assert!(
            answer["usage"]["completion_tokens"].as_u64().unwrap() <= until as u64,
            "nothing past it counts"
        );
        texts.push(choice);
    }
    assert_eq!(texts[0], texts[1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_string_that_does_not_complete_is_sent_after_all() {
    let worker = leader(says("one two")).start().await;
    let running = gateway(&[&worker.address]).await;
    for stream in [false, true] {
        let body = json!({"model": "tiny", "prompt": "x", "stop": "two!", "stream": stream});
        let answer = running.post(COMPLETIONS, &body).await;
        let (text, reason): (String, Value) = if stream {
            let chunks = answer.chunks();
            let text = chunks.iter().map(|chunk| chunk["choices"][0]["text"].as_str().unwrap()).collect();
            (text, chunks.last().unwrap()["choices"][0]["finish_reason"].clone())
        } else {
            let choice = &answer.json()["choices"][0];
            (choice["text"].as_str().unwrap().to_owned(), choice["finish_reason"].clone())
        };
        assert_eq!((text.as_str(), reason), ("one two", json!("stop")));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cached_tokens_are_passed_on() {
    let worker = leader(in_messages(vec![40], vec![1], Ok(Reason::Length))).start().await;
    let running = gateway(&[&worker.address]).await;
    let usage =
        running.post(COMPLETIONS, &json!({"model": "tiny", "prompt": "x"})).await.json()["usage"].clone();
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gap_in_positions_is_an_error_not_an_answer() {
    let worker = leader(|_| {
        Ok(all([Ok(tokens(0, &[40], 0)), Ok(tokens(2, &[41], 0)), Ok(finished(Reason::Length, 0))]))
    });
    let worker = worker.start().await;
    let running = gateway(&[&worker.address]).await;
    let (_, message) = running.post(COMPLETIONS, &json!({"model": "tiny", "prompt": "x"})).await.refusal(500);
    assert!(message.contains("position 2 where 1"), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_without_a_finish_is_an_error_not_an_answer() {
    let worker = leader(|_| Ok(all([Ok(started()), Ok(tokens(0, &[40], 0))]))).start().await;
    let running = gateway(&[&worker.address]).await;
    let (_, message) = running.post(COMPLETIONS, &json!({"model": "tiny", "prompt": "x"})).await.refusal(500);
    assert!(message.contains("after 1 tokens"), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn special_tokens_have_no_text() {
    // <|python_tag|>-like ids in the middle, end-of-sequence ignored.
    let worker = leader(in_messages(vec![40, 1018, 1020, 41], vec![4], Ok(Reason::Length))).start().await;
    let running = gateway(&[&worker.address]).await;
    let body = json!({"model": "tiny", "prompt": "x", "ignore_eos": true, "return_token_ids": true});
    let choice = running.post(COMPLETIONS, &body).await.json()["choices"][0].clone();
    let model = text_model();
    assert_eq!(choice["text"], format!("{}{}", model.token_text(40).0, model.token_text(41).0));
    assert_eq!(choice["token_ids"], json!([40, 1018, 1020, 41]));
}
