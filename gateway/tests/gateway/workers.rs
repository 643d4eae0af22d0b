//! In front of real workers on the fake backend.

use herd_proto::internal::v1::Load;
use herd_worker::{Role, WorkerLimits};
use serde_json::{Value, json};
use tonic::Code;

use crate::grpc;
use crate::support::fleet::{Fleet, fake, fake_with};
use crate::support::http::send;
use crate::support::soon;

const COMPLETIONS: &str = "/v1/completions";

fn idle(load: &Load) -> bool {
    let Load { running, waiting, waiting_prompt_tokens, kv_blocks_used } = *load;
    (running, waiting, waiting_prompt_tokens, kv_blocks_used) == (0, 0, 0, 0)
}

async fn choices(fleet: &Fleet, more: &Value) -> Value {
    let mut body = json!({
        "model": "tiny", "prompt": ["one two three", "four"], "n": 2, "seed": 5, "max_tokens": 40,
        "logprobs": 3, "return_token_ids": true
    });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let answer = fleet.running.post(COMPLETIONS, &body).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()["choices"].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn prefill_and_decode_apart_answer_as_one_gang_does() {
    let unified = fake(&[Role::Unified]).await;
    let apart = fake(&[Role::Prefill, Role::Decode]).await;
    for sampling in [json!({"temperature": 0}), json!({"temperature": 1, "top_p": 0.9})] {
        let one = choices(&unified, &sampling).await;
        assert_eq!(one.as_array().unwrap().len(), 4);
        assert_eq!(one, choices(&apart, &sampling).await, "{sampling}");
        assert_eq!(one, choices(&apart, &sampling).await, "and the same again");
    }
    let drawn = choices(&unified, &json!({"temperature": 1})).await;
    assert_ne!(drawn[0]["token_ids"], drawn[1]["token_ids"], "choices of one seed differ");
    assert!(apart.metric("herd_prefill_recomputed_tokens_total").await.abs() < 0.1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_of_prompts_is_answered_as_each_alone() {
    let fleet = fake(&[Role::Unified]).await;
    let all = choices(&fleet, &json!({})).await;
    for (index, prompt) in ["one two three", "four"].iter().enumerate() {
        let alone = choices(&fleet, &json!({"prompt": prompt})).await;
        for choice in 0..2 {
            assert_eq!(alone[choice]["token_ids"], all[2 * index + choice]["token_ids"]);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn streamed_and_whole_and_grpc_say_the_same() {
    let fleet = fake(&[Role::Unified]).await;
    let whole = choices(&fleet, &json!({"prompt": "one", "n": 1})).await[0].clone();
    let body = json!({
        "model": "tiny", "prompt": "one", "seed": 5, "max_tokens": 40, "logprobs": 3, "stream": true,
        "return_token_ids": true
    });
    let chunks = fleet.running.post(COMPLETIONS, &body).await.chunks();
    let text: String = chunks.iter().map(|chunk| chunk["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(text, whole["text"].as_str().unwrap());
    let join = |path: &str| -> Vec<Value> {
        chunks
            .iter()
            .filter_map(|chunk| chunk["choices"][0].pointer(path)?.as_array())
            .flatten()
            .cloned()
            .collect()
    };
    assert_eq!(json!(join("/token_ids")), whole["token_ids"]);
    for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(json!(join(&format!("/logprobs/{list}"))), whole["logprobs"][list], "{list}");
    }
    let sampling = herd_proto::v1::Sampling { seed: Some(5), max_tokens: Some(40), ..Default::default() };
    let request = herd_proto::v1::GenerateRequest { sampling: Some(sampling), ..grpc::text("one") };
    let mut events = fleet.running.grpc().await.generate(request).await.unwrap().into_inner();
    let (mut ids, mut said) = (Vec::new(), String::new());
    while let Some(event) = soon(events.message()).await.unwrap() {
        if let Some(herd_proto::v1::generate_event::Event::Delta(delta)) = event.event {
            ids.extend(delta.token_ids);
            said.push_str(&delta.text);
        }
    }
    assert_eq!((json!(ids), said), (whole["token_ids"].clone(), text));
}

/// Lets a gang compute some steps, and ends it in the next one.
pub(crate) async fn lose(fleet: &Fleet, gang: usize, steps: usize) {
    let control = &fleet.controls[gang];
    for _ in 0..steps {
        control.pass().await;
    }
    control.held().await;
    control.fail("lost");
    control.open();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_text_goes_on_elsewhere_when_the_gang_that_was_at_it_is_lost() {
    use Role::{Decode, Prefill, Unified};
    let sampling = json!({"temperature": 1, "top_p": 0.9});
    let undisturbed = choices(&fake(&[Unified]).await, &sampling).await;
    // Which gangs are lost, and after how many steps.
    for (roles, lost) in [
        (&[Unified, Unified, Unified][..], &[(0, 5), (1, 17)][..]),
        (&[Prefill, Decode, Decode], &[(1, 9)]),
        (&[Prefill, Prefill, Decode], &[(0, 0)]),
        (&[Prefill, Prefill, Decode, Decode], &[(1, 0), (2, 30)]),
    ] {
        let fleet = fake(roles).await;
        for (gang, _) in lost {
            fleet.controls[*gang].close();
        }
        let losing = futures::future::join_all(lost.iter().map(|(gang, steps)| lose(&fleet, *gang, *steps)));
        let (answer, _) = soon(async { tokio::join!(choices(&fleet, &sampling), losing) }).await;
        assert_eq!(answer, undisturbed, "{roles:?} without {lost:?}");
        let retries = "herd_gateway_retries_total{reason=\"unavailable\"}";
        assert!(fleet.running.metric(retries).await >= 1.0, "{roles:?} without {lost:?}");
    }
}

/// Three steps of prompt, so that cancelling within one is seen.
fn long() -> Vec<u8> {
    serde_json::to_vec(&json!({"model": "tiny", "prompt": vec![5; 1500], "max_tokens": 100})).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_during_prefill_stops_it_within_one_step() {
    for roles in [&[Role::Unified][..], &[Role::Prefill, Role::Decode]] {
        let fleet = fake(roles).await;
        let control = &fleet.controls[0];
        control.close();
        let connection =
            send(fleet.running.gateway.addresses().http, "POST", COMPLETIONS, &[], &long()).await;
        let plan = soon(control.held()).await;
        assert_eq!(
            plan.entries.iter().map(|entry| entry.tokens.len()).sum::<usize>(),
            512,
            "the first of three"
        );
        drop(connection);
        let cancelled = "herd_gateway_requests_total{api=\"completions\",outcome=\"cancelled\"}";
        soon(async { while fleet.running.metric(cancelled).await < 1.0 {} }).await;
        if roles.len() == 2 {
            // The decode gang held blocks and computed nothing; it is free before the step is over.
            fleet.load(1, idle).await;
        }
        // No second step is let through, so nothing but cancelling makes the gang idle.
        soon(control.pass()).await;
        fleet.load(0, idle).await;
        control.open();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_while_queued_leaves_the_queue() {
    let limits = WorkerLimits { max_sequences: 1, ..WorkerLimits::default() };
    let fleet = fake_with(&[Role::Unified], limits).await;
    let control = &fleet.controls[0];
    control.close();
    let address = fleet.running.gateway.addresses().http;
    let first = send(address, "POST", COMPLETIONS, &[], &long()).await;
    soon(control.held()).await;
    let second = send(address, "POST", COMPLETIONS, &[], &long()).await;
    fleet.load(0, |load| load.waiting == 1).await;
    drop(second);
    let cancelled = "herd_gateway_requests_total{api=\"completions\",outcome=\"cancelled\"}";
    soon(async { while fleet.running.metric(cancelled).await < 1.0 {} }).await;
    // The step loop takes note between steps.
    soon(control.pass()).await;
    fleet.load(0, |load| load.waiting == 0 && load.running == 1).await;
    drop(first);
    control.open();
    fleet.load(0, idle).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_gang_is_429_through_both_doors() {
    let limits = WorkerLimits { max_sequences: 1, max_waiting: 1, ..WorkerLimits::default() };
    let fleet = fake_with(&[Role::Unified], limits).await;
    let control = &fleet.controls[0];
    control.close();
    let address = fleet.running.gateway.addresses().http;
    let _first = send(address, "POST", COMPLETIONS, &[], &long()).await;
    soon(control.held()).await;
    let _second = send(address, "POST", COMPLETIONS, &[], &long()).await;
    fleet.load(0, |load| load.waiting == 1).await;
    let answer = fleet.running.post(COMPLETIONS, &json!({"model": "tiny", "prompt": "x"})).await;
    answer.refusal(429);
    assert_eq!(answer.headers["retry-after"], "1");
    let status = fleet.running.grpc().await.generate(grpc::text("x")).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(!status.details().is_empty());
    control.open();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_draining_gang_is_503_and_what_runs_ends_well() {
    let fleet = fake(&[Role::Unified]).await;
    let control = &fleet.controls[0];
    control.close();
    let address = fleet.running.gateway.addresses().http;
    let first = send(address, "POST", COMPLETIONS, &[], &long()).await;
    soon(control.held()).await;
    let (drained, ()) = tokio::join!(fleet.workers[0].drain(None), async {
        let refused = async {
            while fleet.running.post(COMPLETIONS, &json!({"model": "tiny", "prompt": "x"})).await.status
                != 503
            {}
        };
        soon(refused).await;
        control.open();
    });
    assert_eq!(drained, 0);
    let answer = crate::support::http::head(first).await.rest().await;
    assert_eq!(answer.json()["choices"][0]["finish_reason"], "length");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gang_that_fails_within_a_stream_is_an_error_in_the_stream() {
    let fleet = fake(&[Role::Unified]).await;
    let control = &fleet.controls[0];
    control.close();
    let body = json!({"model": "tiny", "prompt": "x", "stream": true, "max_tokens": 50});
    let address = fleet.running.gateway.addresses().http;
    let connection = send(address, "POST", COMPLETIONS, &[], &serde_json::to_vec(&body).unwrap()).await;
    for _ in 0..5 {
        soon(control.pass()).await;
    }
    control.fail("out of luck");
    control.open();
    let answer = crate::support::http::head(connection).await.rest().await;
    let events = answer.events();
    assert!(events.last().unwrap().contains("out of luck"), "{events:?}");
    assert!(!events.contains(&"[DONE]".to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_says_what_was_cached() {
    for roles in [&[Role::Unified][..], &[Role::Prefill, Role::Decode]] {
        let fleet = fake(roles).await;
        let prompt: Vec<u32> = (0..200).map(|token| token % 90).collect();
        let cached = async |more: Value| {
            let mut body = json!({"model": "tiny", "prompt": prompt, "max_tokens": 3, "ignore_eos": true});
            body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            let usage = fleet.running.post(COMPLETIONS, &body).await.json()["usage"].clone();
            assert_eq!(usage["prompt_tokens"], 200);
            usage["prompt_tokens_details"]["cached_tokens"].clone()
        };
        assert_eq!(cached(json!({"n": 3})).await, 0, "one of the choices computed all of it");
        assert_eq!(cached(json!({})).await, 192);
        assert_eq!(cached(json!({"stop": "a"})).await, 192);
        assert_eq!(cached(json!({"cache_salt": "mine", "priority": -3})).await, 0);
        assert_eq!(cached(json!({"cache_salt": "mine", "n": 2})).await, 192);

        let mut client = fleet.running.grpc().await;
        let input =
            herd_proto::v1::generate_request::Input::Tokens(herd_proto::v1::TokenIds { ids: prompt.clone() });
        for (cache_salt, expected) in [("", 192), ("yours", 0)] {
            let request = herd_proto::v1::GenerateRequest {
                input: Some(input.clone()),
                sampling: Some(herd_proto::v1::Sampling { max_tokens: Some(3), ..Default::default() }),
                cache_salt: cache_salt.to_owned(),
                priority: 3,
                ..grpc::text("")
            };
            let mut stream = client.generate(request).await.unwrap().into_inner();
            let mut usage = None;
            while let Some(event) = stream.message().await.unwrap() {
                if let Some(herd_proto::v1::generate_event::Event::Finished(finished)) = event.event {
                    usage = finished.usage;
                }
            }
            assert_eq!(usage.unwrap().cached_tokens, expected);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_salt_that_is_too_long_and_a_priority_that_is_none_are_refused() {
    let fleet = fake(&[Role::Unified]).await;
    for (field, value) in
        [("cache_salt", json!("x".repeat(257))), ("priority", json!(0.5)), ("priority", json!(1_u64 << 40))]
    {
        let mut body = json!({"model": "tiny", "prompt": "x"});
        body[field] = value;
        let (_, message) = fleet.running.post(COMPLETIONS, &body).await.refusal(400);
        assert!(message.starts_with(field), "{message}");
    }
}
