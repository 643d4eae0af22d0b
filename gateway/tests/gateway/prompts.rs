//! How likely a prompt is, and prompts that are echoed.

use herd_proto::v1::generate_event::Event;
use herd_proto::v1::{GenerateRequest, Sampling};
use herd_worker::Role;
use serde_json::{Value, json};

use crate::grpc;
use crate::support::fleet::{Fleet, fake};
use crate::support::{soon, text_model};
use crate::workers::lose;

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

async fn choices(fleet: &Fleet, more: &Value) -> Vec<Value> {
    let mut body = json!({
        "model": "tiny", "prompt": "one two three é", "seed": 5, "max_tokens": 6, "logprobs": 2,
        "return_token_ids": true,
    });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let answer = fleet.running.post(COMPLETIONS, &body).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()["choices"].as_array().unwrap().clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_echo_is_the_prompt_and_how_likely_it_is() {
    let fleet = fake(&[Role::Unified]).await;
    let plain = choices(&fleet, &json!({"n": 2, "prompt_logprobs": 2})).await;
    let echoed = choices(&fleet, &json!({"n": 2, "echo": true})).await;
    let prompt: Vec<u32> = serde_json::from_value(plain[0]["prompt_token_ids"].clone()).unwrap();
    let model = text_model();
    assert_eq!(prompt, model.encode("one two three é", true).unwrap());
    for (plain, echoed) in plain.iter().zip(&echoed) {
        let said = plain["text"].as_str().unwrap();
        assert_eq!(echoed["text"], format!("one two three é{said}"));
        assert!(echoed.get("prompt_logprobs").is_none());
        let (with, without) = (&echoed["logprobs"], &plain["logprobs"]);
        let list = |lists: &Value, name: &str| lists[name].as_array().unwrap().clone();
        for name in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
            assert_eq!(list(with, name).len(), prompt.len() + list(without, name).len(), "{name}");
        }
        assert_eq!((&with["token_logprobs"][0], &with["top_logprobs"][0]), (&Value::Null, &Value::Null));
        for (at, id) in prompt.iter().enumerate().skip(1) {
            let told = &plain["prompt_logprobs"][at][id.to_string()];
            assert_eq!(with["token_logprobs"][at], told["logprob"]);
            assert_eq!(told["decoded_token"], model.token_text(*id).0);
            assert!((2..=3).contains(&plain["prompt_logprobs"][at].as_object().unwrap().len()));
        }
        assert_eq!(
            with["token_logprobs"].as_array().unwrap()[prompt.len()..],
            list(without, "token_logprobs")
        );
        let characters = "one two three é".chars().count() as u64;
        let shifted: Vec<Value> =
            list(without, "text_offset").iter().map(|at| json!(at.as_u64().unwrap() + characters)).collect();
        assert_eq!(list(with, "text_offset")[prompt.len()..], shifted);
        assert_eq!(with["text_offset"][0], 0);
    }
    // Without log probabilities nothing more is asked of the gang.
    let bare = choices(&fleet, &json!({"echo": true, "logprobs": null})).await;
    assert_eq!((&bare[0]["text"], &bare[0]["logprobs"]), (&echoed[0]["text"], &Value::Null));
}

#[tokio::test(flavor = "multi_thread")]
async fn prefill_and_decode_apart_and_lost_gangs_tell_the_same() {
    use Role::{Decode, Prefill, Unified};
    let long: Vec<u32> = (0..700).map(|at| (at * 37 + 11) % 1000).collect();
    let other: Vec<u32> = long.iter().rev().copied().collect();
    let more = json!({"prompt": [long, other], "prompt_logprobs": 1, "n": 2});
    let whole = choices(&fake(&[Unified]).await, &more).await;
    assert_eq!(whole[0]["prompt_logprobs"].as_array().unwrap().len(), 700);
    assert_eq!(whole[2]["prompt_logprobs"].as_array().unwrap().len(), 700);
    assert_eq!(whole[0]["prompt_logprobs"], whole[1]["prompt_logprobs"]);
    let apart = fake(&[Prefill, Decode]).await;
    assert_eq!(choices(&apart, &more).await, whole);
    assert!(apart.metric("herd_prefill_recomputed_tokens_total").await.abs() < 0.1);
    for (roles, gang, steps) in [(&[Unified, Unified][..], 0, 5), (&[Prefill, Prefill, Decode], 0, 1)] {
        let fleet = fake(roles).await;
        fleet.controls[gang].close();
        let (answer, ()) =
            soon(async { tokio::join!(choices(&fleet, &more), lose(&fleet, gang, steps)) }).await;
        assert_eq!(answer, whole, "{roles:?} after {steps} steps");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_and_grpc_tell_it_too() {
    let fleet = fake(&[Role::Unified]).await;
    let body = json!({
        "model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "prompt_logprobs": 0,
        "return_token_ids": true,
    });
    let answer = fleet.running.post(CHAT, &body).await.json();
    let ids = answer["prompt_token_ids"].as_array().unwrap();
    let told = answer["prompt_logprobs"].as_array().unwrap();
    assert_eq!(told.len(), ids.len());
    assert!(told[1].as_object().unwrap().contains_key(&ids[1].to_string()));

    let http = choices(&fleet, &json!({"prompt": "one", "prompt_logprobs": 1})).await[0].clone();
    let sampling = Sampling { prompt_logprobs: Some(1), max_tokens: Some(2), ..Sampling::default() };
    let request = GenerateRequest { sampling: Some(sampling), n: 2, ..grpc::text("one") };
    let mut events = fleet.running.grpc().await.generate(request).await.unwrap().into_inner();
    let mut position = 1;
    while let Some(event) = soon(events.message()).await.unwrap() {
        let Some(Event::Prompt(prompt)) = event.event else { continue };
        assert_eq!((event.choice, event.position as usize), (0, position));
        for token in prompt.tokens {
            let told = &http["prompt_logprobs"][position][token.token_id.to_string()]["logprob"];
            assert_eq!(json!(token.logprob), json!(told.as_f64().unwrap() as f32));
            assert_eq!(token.top.len(), 1);
            position += 1;
        }
    }
    assert_eq!(position, http["prompt_logprobs"].as_array().unwrap().len());
}
