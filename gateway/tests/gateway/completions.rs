//! `POST /v1/completions`.

use serde_json::{Value, json};

use crate::support::scripted::{all, finished, leader, says, started, tokens};
use crate::support::{gateway, text_model};
use herd_proto::internal::v1::finished::Reason;
use herd_proto::internal::v1::{Shaping, TokenBias};
use herd_proto::v1;

const COMPLETIONS: &str = "/v1/completions";

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_prompt_is_taken_and_ids_are_taken_verbatim() {
    let worker = leader(says("yes")).start().await;
    let running = gateway(&[&worker.address]).await;
    let model = text_model();
    let (one, two) = (model.encode("one", true).unwrap(), model.encode("two", true).unwrap());
    let cases: [(Value, Vec<Vec<u32>>); 4] = [
        (json!("one"), vec![one.clone()]),
        (json!(["one", "two"]), vec![one, two]),
        // Special ids and a missing begin-of-sequence token included.
        (json!([1020, 5, 6]), vec![vec![1020, 5, 6]]),
        (json!([[5, 6], [7]]), vec![vec![5, 6], vec![7]]),
    ];
    for (prompt, expected) in cases {
        let before = worker.calls().len();
        let body = json!({"model": "tiny", "prompt": prompt, "n": 2, "seed": 3, "return_token_ids": true});
        let answer = running.post(COMPLETIONS, &body).await.json();
        let choices = answer["choices"].as_array().unwrap();
        assert_eq!(choices.len(), 2 * expected.len());
        for (index, choice) in choices.iter().enumerate() {
            assert_eq!(choice["index"], index);
            assert_eq!(choice["text"], "yes");
            assert_eq!(
                choice["prompt_token_ids"],
                json!(expected[index / 2]),
                "choices count across prompts"
            );
        }
        assert_eq!(answer["usage"]["prompt_tokens"], expected.iter().map(Vec::len).sum::<usize>());
        // Each prompt is drawn as if it had come alone.
        let mut keys: Vec<_> = worker.calls()[before..]
            .iter()
            .map(|call| (call.prompt.clone(), call.context.as_ref().unwrap().choice))
            .collect();
        keys.sort();
        let mut wanted: Vec<_> =
            expected.iter().flat_map(|ids| [(ids.clone(), 0), (ids.clone(), 1)]).collect();
        wanted.sort();
        assert_eq!(keys, wanted);
    }
}

/// What is asked of the logits reaches the gang as it was asked, through either door.
#[tokio::test(flavor = "multi_thread")]
async fn both_doors_ask_the_same_of_the_logits() {
    let worker = leader(says("yes")).start().await;
    let running = gateway(&[&worker.address]).await;
    let body = json!({"model": "tiny", "prompt": [5], "top_k": 40, "min_p": 0.25, "repetition_penalty": 1.5,
        "presence_penalty": 0.5, "frequency_penalty": -0.75, "logit_bias": {"7": -100}, "min_tokens": 3});
    assert_eq!(running.post(COMPLETIONS, &body).await.status, 200);
    let sampling = v1::Sampling {
        top_k: 40,
        min_p: 0.25,
        repetition_penalty: Some(1.5),
        presence_penalty: 0.5,
        frequency_penalty: -0.75,
        logit_bias: [(7, -100.0)].into(),
        min_tokens: 3,
        ..v1::Sampling::default()
    };
    let input = v1::generate_request::Input::Tokens(v1::TokenIds { ids: vec![5] });
    let asked = v1::GenerateRequest {
        model: "tiny".to_owned(),
        input: Some(input),
        sampling: Some(sampling),
        ..v1::GenerateRequest::default()
    };
    let mut events = running.grpc().await.generate(asked).await.unwrap().into_inner();
    while events.message().await.unwrap().is_some() {}
    let expected = Shaping {
        bias: vec![TokenBias { id: 7, bias: -100.0 }],
        min_tokens: 3,
        repetition_penalty: Some(1.5),
        presence_penalty: 0.5,
        frequency_penalty: -0.75,
        top_k: 40,
        min_p: 0.25,
    };
    let calls = worker.calls();
    assert_eq!(calls.len(), 2);
    for call in calls {
        assert_eq!(call.sampling.unwrap().shaping.as_ref(), Some(&expected));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn log_probabilities_have_their_four_lists() {
    let worker = leader(says("Hello, world.")).start().await;
    let running = gateway(&[&worker.address]).await;
    let model = text_model();
    let ids = model.encode("Hello, world.", false).unwrap();
    let body = json!({"model": "tiny", "prompt": "x", "logprobs": 2, "ignore_eos": true, "max_tokens": 200});
    let whole = running.post(COMPLETIONS, &body).await.json();
    let logprobs = &whole["choices"][0]["logprobs"];
    let texts: Vec<_> = ids.iter().map(|&id| model.token_text(id).0).collect();
    assert_eq!(logprobs["tokens"], json!(texts));
    let offsets: Vec<_> = texts
        .iter()
        .scan(0, |at, text| {
            let offset = *at;
            *at += text.chars().count();
            Some(offset)
        })
        .collect();
    assert_eq!(logprobs["text_offset"], json!(offsets));
    assert_eq!(logprobs["token_logprobs"][1], -2.0);
    // Two alternatives and the token itself, which is not one of them.
    let top = logprobs["top_logprobs"][1].as_object().unwrap();
    assert_eq!(top.len(), 3);
    assert_eq!(top[&model.token_text(64).0], -0.5);
    assert_eq!(top[&texts[1]], -2.0);
    assert_eq!(worker.calls()[0].sampling.as_ref().unwrap().top_logprobs, Some(2));

    let mut stream = body;
    stream["stream"] = json!(true);
    let chunks = running.post(COMPLETIONS, &stream).await.chunks();
    let streamed: Vec<_> = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["logprobs"]["text_offset"].as_array())
        .flatten()
        .cloned()
        .collect();
    assert_eq!(json!(streamed), logprobs["text_offset"]);
    assert_eq!(chunks[0]["object"], "text_completion");
    assert!(chunks[0]["id"].as_str().unwrap().starts_with("cmpl-"));
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "length");
}

/// A byte that begins a character of several, in the tiny model's byte-level vocabulary.
fn partial() -> (u32, u32) {
    let ids = text_model().encode("é", false).unwrap();
    assert_eq!(ids.len(), 2, "the tiny model has no token for it");
    (ids[0], ids[1])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_that_ends_inside_a_character_does_not_leak_into_the_text() {
    let (first, second) = partial();
    // The model goes on with the second half, then says more.
    let worker = leader(move |_| {
        let ok = text_model().encode("ok", false).unwrap();
        let said = [
            Ok(started()),
            Ok(tokens(0, &[second], 0)),
            Ok(tokens(1, &ok, 0)),
            Ok(finished(Reason::Length, 0)),
        ];
        Ok(all(said))
    });
    let worker = worker.start().await;
    let running = gateway(&[&worker.address]).await;
    let mut prompt = text_model().encode("secret words", true).unwrap();
    prompt.push(first);
    for stream in [false, true] {
        let body = json!({"model": "tiny", "prompt": prompt, "stream": stream});
        let answer = running.post(COMPLETIONS, &body).await;
        let text = if stream {
            answer
                .chunks()
                .iter()
                .filter_map(|chunk| chunk["choices"][0]["text"].as_str().map(str::to_owned))
                .collect()
        } else {
            answer.json()["choices"][0]["text"].as_str().unwrap().to_owned()
        };
        assert_eq!(text, "\u{fffd}ok");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn half_a_character_is_named_by_its_bytes_and_has_its_characters_offset() {
    let (first, second) = partial();
    let worker = leader(move |_| {
        let said = [Ok(tokens(0, &[first], 0)), Ok(tokens(1, &[second], 0)), Ok(finished(Reason::Length, 0))];
        Ok(all(said))
    });
    let worker = worker.start().await;
    let running = gateway(&[&worker.address]).await;
    let body =
        json!({"model": "tiny", "prompt": "x", "logprobs": 0, "stream": true, "return_token_ids": true});
    let chunks = running.post(COMPLETIONS, &body).await.chunks();
    let whole = &chunks[0]["choices"][0];
    assert_eq!(
        (&whole["text"], &whole["token_ids"]),
        (&json!("é"), &json!([first, second])),
        "ids wait for their text"
    );
    assert_eq!(whole["logprobs"]["tokens"], json!(["bytes:\\xc3", "bytes:\\xa9"]));
    assert_eq!(whole["logprobs"]["text_offset"], json!([0, 0]));
}

#[tokio::test(flavor = "multi_thread")]
async fn models_are_listed_with_their_length_and_digest() {
    let worker = leader(says("yes")).start().await;
    let running = gateway(&[&worker.address]).await;
    let list = running.get("/v1/models").await.json();
    assert_eq!(list["object"], "list");
    let model = &list["data"][0];
    assert_eq!((&model["id"], &model["object"]), (&json!("tiny"), &json!("model")));
    assert_eq!((&model["max_model_len"], &model["digest"]), (&json!(512), &json!("digest")));
    assert_eq!(running.get("/v1/models/tiny").await.json(), *model);
    running.get("/v1/models/other").await.refusal(404);
    assert_eq!(running.get("/health").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_offset_after_a_broken_character_counts_what_stands_for_it() {
    let model = text_model();
    let id = |byte: u8| (0..256).find(|&id| model.token_text(id).1 == [byte]).unwrap();
    let ids = [id(0xC3), id(b'A'), id(b'B')];
    let worker = leader(move |_| Ok(all([Ok(tokens(0, &ids, 0)), Ok(finished(Reason::Length, 0))])));
    let worker = worker.start().await;
    let running = gateway(&[&worker.address]).await;
    let answer =
        running.post(COMPLETIONS, &json!({"model": "tiny", "prompt": "x", "logprobs": 0})).await.json();
    let choice = &answer["choices"][0];
    assert_eq!(choice["text"], "\u{FFFD}AB");
    assert_eq!(choice["logprobs"]["text_offset"], json!([0, 1, 2]));
}

#[tokio::test(flavor = "multi_thread")]
async fn log_probabilities_have_the_digits_of_an_f32_everywhere() {
    use herd_proto::internal::v1::{DecodeEvent, Token, Tokens, TopLogprob, decode_event::Event};
    let worker = leader(|_| {
        let logprob = -2.815_276_9;
        let token = Token { id: 40, logprob, top: vec![TopLogprob { id: 64, logprob }] };
        let said = Event::Tokens(Tokens { position: 0, tokens: vec![token] });
        Ok(all([Ok(DecodeEvent { event: Some(said) }), Ok(finished(Reason::Length, 0))]))
    });
    let worker = worker.start().await;
    let running = gateway(&[&worker.address]).await;
    let answer = running.post(COMPLETIONS, &json!({"model": "tiny", "prompt": "x", "logprobs": 1})).await;
    let digits = answer.text().matches("-2.8152769").count();
    assert_eq!(digits, 3, "{}", answer.text());
}
