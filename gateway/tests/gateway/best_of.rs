//! `best_of` through both doors.

use herd_proto::v1::generate_event::Event;
use herd_proto::v1::{GenerateRequest, Sampling};
use herd_worker::Role;
use serde_json::{Value, json};

use crate::grpc;
use crate::support::fleet::fake;
use crate::support::soon;

const COMPLETIONS: &str = "/v1/completions";

/// Ids of a choice, and the sum of their log probabilities.
fn scored(choice: &Value) -> (Value, f64) {
    let logprobs = choice["logprobs"]["token_logprobs"].as_array().unwrap();
    let sum = logprobs.iter().map(|logprob| f64::from(logprob.as_f64().unwrap() as f32)).sum();
    (choice["token_ids"].clone(), sum)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_likeliest_of_all_choices_are_the_answer() {
    let fleet = fake(&[Role::Unified]).await;
    let body = |n: u32, best_of: u32| {
        json!({
            "model": "tiny", "prompt": ["one two", "three"], "n": n, "best_of": best_of, "seed": 6, "max_tokens": 12,
            "logprobs": 0, "return_token_ids": true, "prompt_logprobs": 0,
        })
    };
    let all = fleet.running.post(COMPLETIONS, &body(5, 5)).await.json();
    let best = fleet.running.post(COMPLETIONS, &body(2, 5)).await.json();
    assert_eq!(best["choices"].as_array().unwrap().len(), 4);
    for prompt in 0..2 {
        let mut of_prompt: Vec<_> =
            (0..5).map(|choice| scored(&all["choices"][5 * prompt + choice])).collect();
        of_prompt.sort_by(|a, b| b.1.total_cmp(&a.1));
        for choice in 0..2 {
            let kept = &best["choices"][2 * prompt + choice];
            assert_eq!(kept["index"], 2 * prompt + choice);
            assert_eq!(scored(kept), of_prompt[choice]);
            assert_eq!(kept["prompt_logprobs"], all["choices"][5 * prompt]["prompt_logprobs"]);
        }
    }
    assert_eq!(best["usage"], all["usage"], "what was computed was used");

    let sampling = Sampling { seed: Some(6), max_tokens: Some(12), ..Sampling::default() };
    let request = GenerateRequest { sampling: Some(sampling), n: 1, best_of: 5, ..grpc::text("one two") };
    let mut events = fleet.running.grpc().await.generate(request).await.unwrap().into_inner();
    let (mut ids, mut tokens) = (Vec::new(), 0);
    while let Some(event) = soon(events.message()).await.unwrap() {
        assert_eq!(event.choice, 0);
        match event.event {
            Some(Event::Delta(delta)) => ids.extend(delta.token_ids),
            Some(Event::Finished(finished)) => {
                let usage = finished.usage.unwrap();
                tokens += usage.completion_tokens + usage.discarded_tokens;
            }
            _ => {}
        }
    }
    assert_eq!(json!(ids), best["choices"][0]["token_ids"]);
    let all_tokens: usize =
        (0..5).map(|choice| all["choices"][choice]["token_ids"].as_array().unwrap().len()).sum();
    assert_eq!(tokens as usize, all_tokens);
}
