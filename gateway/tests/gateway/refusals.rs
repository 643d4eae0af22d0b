//! What the OpenAI door refuses, and how.

use serde_json::{Value, json};

use crate::support::scripted::{leader, says};
use crate::support::{Running, endpoint, gateway, gateway_with, http};
use herd_gateway::Limits;

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

async fn refused(running: &Running, path: &str, more: &Value) -> (Value, String) {
    let mut body = if path == CHAT {
        json!({"model": "tiny", "messages": [{"role": "user", "content": "x"}]})
    } else {
        json!({"model": "tiny", "prompt": "x"})
    };
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let answer = running.post(path, &body).await;
    assert!(answer.headers.contains_key("x-request-id"));
    answer.refusal(400)
}

#[tokio::test(flavor = "multi_thread")]
#[expect(clippy::too_many_lines, reason = "tables of values")]
async fn bad_values_are_refused_by_name() {
    let worker = leader(says("yes")).start().await;
    let running = gateway(&[&worker.address]).await;
    let both = [
        (json!({"model": ""}), "model"),
        (json!({"model": null}), "model"),
        (json!({"model": 3}), "model"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"max_tokens": 512}), "max_tokens"),
        (json!({"max_tokens": -1}), "max_tokens"),
        (json!({"max_tokens": 1.5}), "max_tokens"),
        (json!({"max_tokens": "ten"}), "max_tokens"),
        (json!({"temperature": 2.1}), "temperature"),
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"top_p": 0}), "top_p"),
        (json!({"top_p": 1.1}), "top_p"),
        (json!({"seed": 1.5}), "seed"),
        (json!({"n": 0}), "n"),
        (json!({"n": 129}), "n"),
        (json!({"n": 5_000_000_000_u64}), "n"),
        (json!({"stop": 3}), "stop"),
        (json!({"stop": ["a", 3]}), "stop"),
        (json!({"stop": ""}), "stop"),
        (json!({"stop": vec!["x"; 17]}), "stop"),
        (json!({"stream": "yes"}), "stream"),
        (json!({"stream_options": {"include_usage": true}}), "stream_options"),
        (json!({"stream": true, "stream_options": {"include_usage": 1}}), "stream_options.include_usage"),
        (json!({"ignore_eos": 1}), "ignore_eos"),
        (json!({"top_k": -2}), "top_k"),
        (json!({"top_k": 1.5}), "top_k"),
        (json!({"min_p": 1.1}), "min_p"),
        (json!({"repetition_penalty": 0}), "repetition_penalty"),
        (json!({"presence_penalty": 2.1}), "presence_penalty"),
        (json!({"frequency_penalty": -2.1}), "frequency_penalty"),
        (json!({"frequency_penalty": "some"}), "frequency_penalty"),
        (json!({"logit_bias": [5, 1]}), "logit_bias"),
        (json!({"logit_bias": {"five": 1}}), "logit_bias"),
        (json!({"logit_bias": {"5": "one"}}), "logit_bias"),
        (json!({"logit_bias": {"5": 100.1}}), "logit_bias"),
        (json!({"logit_bias": {"1024": 1}}), "logit_bias"),
        (json!({"min_tokens": 4, "max_tokens": 3}), "min_tokens"),
        (json!({"stop_token_ids": 5}), "stop_token_ids"),
        (json!({"stop_token_ids": [5, -1]}), "stop_token_ids[1]"),
        (json!({"stop_token_ids": [1024]}), "stop_token_ids"),
        (json!({"stop_token_ids": vec![5; 129]}), "stop_token_ids"),
        (json!({"include_stop_str_in_output": "yes"}), "include_stop_str_in_output"),
        (json!({"prompt_logprobs": -1}), "prompt_logprobs"),
        (json!({"prompt_logprobs": 21}), "prompt_logprobs"),
        (json!({"prompt_logprobs": 1, "stream": true}), "prompt_logprobs"),
        (json!({"response_format": "json"}), "response_format"),
        (json!({"structured_outputs": {"regex": 5}}), "structured_outputs.regex"),
    ];
    for (more, field) in both {
        for path in [CHAT, COMPLETIONS] {
            let (param, message) = refused(&running, path, &more).await;
            assert_eq!(param, field, "{more} {message}");
            assert!(message.contains(field), "{message:?} does not name {field}");
        }
    }
    let chat = [
        (json!({"messages": null}), "messages"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": "hello"}), "messages"),
        (json!({"messages": ["hello"]}), "messages[0]"),
        (json!({"messages": [{"content": "x"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "robot", "content": "x"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "user"}]}), "messages[0].content"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            "messages[0].content[0].type",
        ),
        (
            json!({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}),
            "messages[0].tool_calls",
        ),
        (json!({"max_completion_tokens": 512}), "max_completion_tokens"),
        (json!({"logprobs": 2}), "logprobs"),
        (json!({"top_logprobs": 2}), "top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
    ];
    for (more, field) in chat {
        let (param, message) = refused(&running, CHAT, &more).await;
        assert_eq!(param, field, "{more} {message}");
        assert!(message.contains(field), "{message:?} does not name {field}");
    }
    let completions = [
        (json!({"prompt": null}), "prompt"),
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": {}}), "prompt"),
        (json!({"prompt": [[]]}), "prompt"),
        (json!({"prompt": [5, "x"]}), "prompt[1]"),
        (json!({"prompt": [[5], [-1]]}), "prompt[1][0]"),
        (json!({"prompt": [1024]}), "prompt"),
        (json!({"prompt": vec![5; 512]}), "prompt"),
        (json!({"prompt": vec!["x"; 129]}), "n"),
        (json!({"logprobs": 21}), "logprobs"),
        (json!({"logprobs": true}), "logprobs"),
        (json!({"echo": 1}), "echo"),
        (json!({"echo": true, "stream": true}), "echo"),
        (json!({"best_of": 1, "n": 2}), "best_of"),
        (json!({"best_of": 129}), "best_of"),
        (json!({"best_of": 2, "stream": true}), "best_of"),
    ];
    for (more, field) in completions {
        let (param, _) = refused(&running, COMPLETIONS, &more).await;
        assert_eq!(param, field, "{more}");
    }
    assert!(worker.calls().is_empty(), "none reached the gang");
}

#[tokio::test(flavor = "multi_thread")]
async fn fields_that_are_not_served_yet_are_refused_unless_they_ask_for_nothing() {
    let worker = leader(says("yes")).start().await;
    let running = gateway(&[&worker.address]).await;
    let asking = [
        ("tools", json!([{"type": "function"}])),
        ("tool_choice", json!("required")),
        ("guided_json", json!({})),
        ("suffix", json!("end")),
        ("store", json!(true)),
        ("reasoning_effort", json!("high")),
    ];
    for (field, value) in asking {
        for path in [CHAT, COMPLETIONS] {
            let (param, message) = refused(&running, path, &json!({field: value})).await;
            assert_eq!(param, field);
            assert!(message.contains(field) && message.contains("not served"), "{message}");
        }
    }
    let neutral = json!({
        "model": "tiny", "messages": [{"role": "user", "content": "x", "name": "me"}],
        "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "logit_bias": {},
        "presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1, "top_k": -1, "best_of": 1, "echo": false,
        "suffix": null, "store": false, "user": "me", "metadata": {"a": "b"}, "parallel_tool_calls": true,
        "service_tier": "auto", "cache_salt": "s", "never_heard_of": 1,
    });
    let answer = running.post(CHAT, &neutral).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert!(answer.headers["x-herd-ignored-fields"].contains("never_heard_of"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_model_is_404_and_says_what_there_is() {
    let worker = leader(says("yes")).start().await;
    let running = gateway(&[&worker.address]).await;
    for (path, more) in [
        (CHAT, json!({"messages": [{"role": "user", "content": "x"}]})),
        (COMPLETIONS, json!({"prompt": "x"})),
    ] {
        let mut body = json!({"model": "other"});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let answer = running.post(path, &body).await;
        let (param, message) = answer.refusal(404);
        assert_eq!(param, "model");
        assert!(message.contains("\"other\"") && message.contains("tiny"), "{message}");
        assert_eq!(answer.json()["error"]["code"], "model_not_found");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_are_bounded_and_must_be_json() {
    let worker = leader(says("yes")).start().await;
    let limits = Limits { body_bytes: 4096, ..Limits::default() };
    let running = gateway_with(&[&worker.address], limits).await;
    let address = running.gateway.addresses().http;
    http::post(address, CHAT, &[], &vec![b' '; 5000]).await.refusal(413);
    for bad in ["{", "[]", "nonsense"] {
        http::post(address, CHAT, &[], bad.as_bytes()).await.refusal(400);
    }
    http::post(address, "/v1/nothing", &[], b"{}").await.refusal(404);
    http::get(address, CHAT).await.refusal(405);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_id_is_echoed_if_it_is_fit_to_be_one() {
    let worker = leader(says("yes")).start().await;
    let running = gateway(&[&worker.address]).await;
    let address = running.gateway.addresses().http;
    let body = br#"{"model": "tiny", "prompt": "x"}"#;
    let answer = http::post(address, COMPLETIONS, &[("x-request-id", "mine-1")], body).await;
    assert_eq!(answer.headers["x-request-id"], "mine-1");
    assert_eq!(worker.calls()[0].context.as_ref().unwrap().request_id, "mine-1");
    assert!(!answer.json()["id"].as_str().unwrap().contains("mine"), "an answer's id is never used twice");
    let long = "x".repeat(200);
    for unfit in [long.as_str(), "two words"] {
        let answer = http::post(address, COMPLETIONS, &[("x-request-id", unfit)], body).await;
        assert_eq!(answer.headers["x-request-id"].len(), 32);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_without_a_gang_is_503_not_404_and_not_429() {
    let running = gateway::<&str>(&[]).await;
    // Known to discovery, but nobody is there.
    running.fleet.set(vec![endpoint("127.0.0.1:1")]);
    let listed = async {
        while running.get("/v1/models").await.json()["data"] == json!([]) {
            tokio::task::yield_now().await;
        }
    };
    crate::support::soon(listed).await;
    let answer = running.post(COMPLETIONS, &json!({"model": "tiny", "prompt": "x"})).await;
    let (_, message) = answer.refusal(503);
    assert!(message.contains("no gang is ready"), "{message}");
    assert!(!answer.headers.contains_key("retry-after"));
}

#[tokio::test(flavor = "multi_thread")]
async fn text_that_no_tokens_make_fit_is_refused_before_it_is_tokenized() {
    let worker = leader(says("yes")).start().await;
    let running = gateway(&[&worker.address]).await;
    let digits = "7".repeat(200_000);
    let (param, message) = refused(&running, COMPLETIONS, &json!({"prompt": digits})).await;
    assert_eq!(param, "prompt");
    assert!(message.contains("prompt has 200000 bytes of text"), "{message}");
    let messages = json!({"messages": [{"role": "user", "content": digits}]});
    let (param, message) = refused(&running, CHAT, &messages).await;
    assert_eq!(param, "messages");
    assert!(message.contains("messages has 200000 bytes of text"), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn names_of_ignored_fields_are_cut_to_what_a_header_holds() {
    let worker = leader(says("yes")).start().await;
    let running = gateway(&[&worker.address]).await;
    let mut body = json!({"model": "tiny", "prompt": "x"});
    for (index, letter) in ["a", "é"].into_iter().cycle().take(30).enumerate() {
        body[format!("{index}{}", letter.repeat(70_000))] = json!(1);
    }
    let answer = running.post(COMPLETIONS, &body).await;
    assert_eq!(answer.status, 200);
    let ignored = &answer.headers["x-herd-ignored-fields"];
    assert!(ignored.contains("0aaa") && ignored.contains(", 1???"), "{ignored}");
    assert!(ignored.len() <= 16 * 66, "{}", ignored.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_in_the_path_that_is_not_utf8_is_an_error_of_the_usual_form() {
    let worker = leader(says("yes")).start().await;
    let running = gateway(&[&worker.address]).await;
    assert_eq!(running.get("/v1/models/%ff%fe").await.refusal(400).0, "model");
}
