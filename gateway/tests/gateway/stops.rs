//! What ends an answer: stop strings, stop tokens, and what is left of them in the text.

use herd_proto::internal::v1::DecodeRequest;
use herd_proto::internal::v1::finished::Reason;
use herd_proto::v1;
use herd_worker::Role;
use serde_json::{Value, json};
use tonic::Status;

use crate::support::fleet::fake;
use crate::support::scripted::{Events, all, finished, leader, tokens};
use crate::support::{gateway, soon, text_model};

const COMPLETIONS: &str = "/v1/completions";

/// Says these ids as a gang does: up to a stop token.
fn gang(ids: Vec<u32>) -> impl Fn(DecodeRequest) -> Result<Events, Status> + Send + Sync {
    move |request| {
        let sampling = request.sampling.unwrap();
        let stops = |id: &u32| sampling.stop_token_ids.contains(id);
        let end = ids.iter().position(stops);
        let (said, reason) = match end {
            Some(end) => (&ids[..=end], Reason::Stop),
            None => (&ids[..], Reason::Length),
        };
        let each = said.iter().zip(0..).map(|(&id, position)| Ok(tokens(position, &[id], 0)));
        Ok(all(each.chain([Ok(finished(reason, 0))])))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_token_ends_the_answer_and_its_text_is_there_only_if_asked_for() {
    let model = text_model();
    let ids = model.encode("one two three", false).unwrap();
    let last = *ids.last().unwrap();
    let last_text = model.token_text(last).0;
    let cut = ids.iter().position(|id| *id == last).unwrap();
    let before = model.token_text(ids[0]).0.len();
    assert!(before > 0 && !last_text.is_empty());
    let worker = leader(gang(ids.clone())).start().await;
    let running = gateway(&[&worker.address]).await;
    let text: String = ids[..cut].iter().map(|id| model.token_text(*id).0).collect();
    for (more, expected) in [
        (json!({}), text.clone()),
        (json!({"ignore_eos": true}), text.clone()),
        (json!({"include_stop_str_in_output": true}), format!("{text}{last_text}")),
    ] {
        let mut body =
            json!({"model": "tiny", "prompt": "x", "stop_token_ids": [last], "return_token_ids": true});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let choice = running.post(COMPLETIONS, &body).await.json()["choices"][0].clone();
        assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!(expected), &json!("stop")), "{more}");
        assert_eq!(
            choice["token_ids"],
            json!(ids[..=cut]),
            "the token itself is told, as an end-of-sequence token is"
        );
    }
    let eos = model.stop_ids().to_vec();
    let asked: Vec<Vec<u32>> =
        worker.calls().into_iter().map(|call| call.sampling.unwrap().stop_token_ids).collect();
    assert_eq!(asked[0], [&eos[..], &[last]].concat());
    assert_eq!(asked[1], [last], "ignore_eos is about the model's own");

    let sampling = v1::Sampling {
        stop_token_ids: vec![last],
        include_stop_str_in_output: true,
        ..v1::Sampling::default()
    };
    let request = v1::GenerateRequest { sampling: Some(sampling), ..crate::grpc::text("x") };
    let mut events = running.grpc().await.generate(request).await.unwrap().into_inner();
    let mut said = String::new();
    while let Some(event) = soon(events.message()).await.unwrap() {
        if let Some(v1::generate_event::Event::Delta(delta)) = event.event {
            said.push_str(&delta.text);
        }
    }
    assert_eq!(said, format!("{text}{last_text}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn stop_strings_are_held_back_by_min_tokens_and_kept_if_asked_for() {
    let model = text_model();
    let ids = model.encode("one two one two", false).unwrap();
    let first = model.encode("one", false).unwrap().len() as u64;
    let worker = leader(gang(ids)).start().await;
    let running = gateway(&[&worker.address]).await;
    for (more, text, reason) in [
        (json!({}), "", "stop"),
        (json!({"include_stop_str_in_output": true}), "one", "stop"),
        (json!({"min_tokens": first}), "one two ", "stop"),
        (json!({"min_tokens": first, "include_stop_str_in_output": true}), "one two one", "stop"),
        (json!({"min_tokens": 200}), "one two one two", "length"),
    ] {
        for stream in [false, true] {
            let mut body = json!({"model": "tiny", "prompt": "x", "stop": "one", "stream": stream});
            body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            let answer = running.post(COMPLETIONS, &body).await;
            let chunks = if stream { answer.chunks() } else { vec![answer.json()] };
            let said: String =
                chunks.iter().filter_map(|chunk| chunk["choices"][0]["text"].as_str()).collect();
            assert_eq!(said, text, "{more} streamed {stream}");
            assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], reason);
        }
    }
}

/// Of what the model would say by itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_real_gang_draws_no_stop_token_before_min_tokens() {
    let fleet = fake(&[Role::Unified]).await;
    let ask = async |more: Value| -> Value {
        let mut body = json!({
            "model": "tiny", "prompt": "x", "temperature": 0, "max_tokens": 30, "return_token_ids": true
        });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        fleet.running.post(COMPLETIONS, &body).await.json()["choices"][0].clone()
    };
    let free = ask(json!({})).await["token_ids"].clone();
    let stop = free[5].clone();
    let first = free.as_array().unwrap().iter().position(|id| *id == stop).unwrap();
    let stopped = ask(json!({"stop_token_ids": [stop]})).await;
    assert_eq!(stopped["finish_reason"], "stop");
    assert_eq!(stopped["token_ids"].as_array().unwrap().len(), first + 1);
    let later = ask(json!({"stop_token_ids": [stop], "min_tokens": 12})).await;
    let ids = later["token_ids"].as_array().unwrap();
    assert!(ids.len() > 12 && !ids[..12].contains(&stop), "{ids:?}");
}
