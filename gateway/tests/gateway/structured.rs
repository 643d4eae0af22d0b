//! Structured output through both doors, in front of real workers on the fake backend: what these say is noise, so whatever
//! has a shape has it from the grammar.

use herd_proto::internal::v1::worker_client::WorkerClient;
use herd_proto::internal::v1::{self as internal, DecodeRequest, decode_event, grammar};
use herd_proto::v1::generate_event::Event;
use herd_proto::v1::sampling::StructuredOutput;
use herd_proto::v1::{Choices, GenerateRequest, Sampling, finished};
use herd_worker::Role;
use serde_json::{Value, json};
use tonic::Code;

use crate::grpc;
use crate::support::fleet::{Fleet, fake};
use crate::support::soon;
use crate::workers::lose;

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const RETRIES: &str = "herd_gateway_retries_total{reason=\"unavailable\"}";

/// Whether a text has the shape that was asked for.
type Matches<'a> = &'a dyn Fn(&str) -> bool;

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "kind": {"enum": ["cat", "dog"]},
        },
        "required": ["name", "age", "kind"],
        "additionalProperties": false,
    })
}

fn is_valid(text: &str) -> bool {
    let Ok(Value::Object(value)) = serde_json::from_str(text) else { return false };
    value.len() == 3
        && value["name"].as_str().is_some_and(|name| name.chars().count() <= 6)
        && value["age"].as_u64().is_some_and(|age| age <= 120)
        && ["cat", "dog"].iter().any(|kind| value["kind"] == *kind)
}

fn format() -> Value {
    json!({"type": "json_schema", "json_schema": {"name": "animal", "strict": true, "schema": schema()}})
}

fn asked(more: &Value) -> Value {
    let mut body = json!({
        "model": "tiny", "prompt": "one two three", "n": 3, "seed": 8, "temperature": 1, "max_tokens": 300,
        "logprobs": 2, "return_token_ids": true,
    });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

async fn choices(fleet: &Fleet, more: &Value) -> Vec<Value> {
    let answer = fleet.running.post(COMPLETIONS, &asked(more)).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()["choices"].as_array().unwrap().clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_have_the_shape_that_was_asked_for() {
    let unified = fake(&[Role::Unified]).await;
    let apart = fake(&[Role::Prefill, Role::Decode]).await;
    let lark = "start: \"<\" word (\" \" word){0,3} \">\"\nword: /[a-c]{1,3}/";
    let any: Matches<'_> = &|text| serde_json::from_str::<Value>(text).is_ok_and(|value| value.is_object());
    let words: Matches<'_> = &|text| {
        let inner = text.strip_prefix('<').and_then(|text| text.strip_suffix('>'));
        inner.is_some_and(|inner| {
            inner.split(' ').all(|word| {
                (1..=3).contains(&word.len()) && word.bytes().all(|byte| (b'a'..=b'c').contains(&byte))
            })
        })
    };
    let digits: Matches<'_> =
        &|text| (3..=5).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    let cases: [(Value, Matches<'_>); 6] = [
        (json!({"response_format": format()}), &is_valid),
        (json!({"response_format": {"type": "json_object"}}), any),
        (json!({"structured_outputs": {"json": schema()}}), &is_valid),
        (json!({"structured_outputs": {"regex": "[0-9]{3,5}"}}), digits),
        (json!({"structured_outputs": {"choice": ["yes", "no"]}}), &|text| ["yes", "no"].contains(&text)),
        (json!({"structured_outputs": {"grammar": lark}}), words),
    ];
    for (more, matches) in cases {
        let one = choices(&unified, &more).await;
        let mut ended = 0;
        for choice in &one {
            if choice["finish_reason"] == "stop" {
                ended += 1;
                let text = choice["text"].as_str().unwrap();
                assert!(matches(text), "{text:?} for {more}");
            }
        }
        assert!(ended > 0 || more["response_format"]["type"] == "json_object", "{more}");
        assert_eq!(one, choices(&apart, &more).await, "apart, {more}");
    }
    assert!(apart.metric("herd_prefill_recomputed_tokens_total").await.abs() < 0.1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_is_streamed_in_shape_and_cut_where_max_tokens_cuts_it() {
    let fleet = fake(&[Role::Unified]).await;
    let mut body = json!({
        "model": "tiny", "messages": [{"role": "user", "content": "x"}], "seed": 2, "stream": true,
        "response_format": format(),
    });
    let streamed = fleet.running.post(CHAT, &body).await.chunks();
    let said: String =
        streamed.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    assert!(is_valid(&said), "{said:?}");
    assert_eq!(streamed.last().unwrap()["choices"][0]["finish_reason"], "stop");
    body["stream"] = json!(false);
    let whole = fleet.running.post(CHAT, &body).await.json();
    assert_eq!(whole["choices"][0]["message"]["content"], said);
    body["max_tokens"] = json!(4);
    let cut = fleet.running.post(CHAT, &body).await.json();
    assert_eq!(cut["choices"][0]["finish_reason"], "length");
    assert!(said.starts_with(cut["choices"][0]["message"]["content"].as_str().unwrap()));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_keeps_its_shape_when_its_gangs_are_lost() {
    use Role::{Decode, Prefill, Unified};
    let more = json!({"response_format": format()});
    let undisturbed = choices(&fake(&[Unified]).await, &more).await;
    for choice in &undisturbed {
        assert!(is_valid(choice["text"].as_str().unwrap()));
        assert!(choice["token_ids"].as_array().unwrap().len() > 8, "there is something to lose a gang in");
    }
    for (roles, lost) in
        [(&[Unified, Unified, Unified][..], &[(0, 3), (1, 4)][..]), (&[Prefill, Decode, Decode], &[(1, 6)])]
    {
        let fleet = fake(roles).await;
        for (gang, _) in lost {
            fleet.controls[*gang].close();
        }
        let losing = futures::future::join_all(lost.iter().map(|(gang, steps)| lose(&fleet, *gang, *steps)));
        let (answer, _) = soon(async { tokio::join!(choices(&fleet, &more), losing) }).await;
        assert_eq!(answer, undisturbed, "{roles:?} without {lost:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grammar_that_cannot_be_used_is_the_clients_to_mend() {
    for roles in [&[Role::Unified][..], &[Role::Prefill, Role::Decode]] {
        let fleet = fake(roles).await;
        let schema =
            json!({"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "thing"}}});
        let long = "a".repeat(200_000);
        for (more, field, says) in [
            (json!({"response_format": schema}), "response_format.json_schema.schema", "thing"),
            (json!({"response_format": {"type": "xml"}}), "response_format.type", "xml"),
            (
                json!({"structured_outputs": {"regex": "(a"}}),
                "structured_outputs.regex",
                "regular expression",
            ),
            (json!({"structured_outputs": {"regex": long}}), "structured_outputs.regex", "131072"),
            (json!({"structured_outputs": {"grammar": "begin: x"}}), "structured_outputs.grammar", "grammar"),
            (json!({"structured_outputs": {"choice": []}}), "structured_outputs.choice", "choice is empty"),
        ] {
            let answer = fleet.running.post(COMPLETIONS, &asked(&more)).await;
            let (param, message) = answer.refusal(400);
            assert_eq!(param, field, "{message}");
            assert!(message.contains(field) && message.contains(says), "{message}");
        }
        let bad = Sampling {
            structured_output: Some(StructuredOutput::Regex("[".to_owned())),
            ..Sampling::default()
        };
        let bad = GenerateRequest { sampling: Some(bad), ..grpc::text("x") };
        let status = fleet.running.grpc().await.generate(bad).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().starts_with("sampling.regex: the regular expression"), "{status:?}");
        assert_eq!(fleet.running.metric(RETRIES).await.to_bits(), 0, "no gang is at fault");
        let good = choices(&fleet, &json!({"structured_outputs": {"choice": ["fine"]}})).await;
        assert_eq!(good[0]["text"], "fine", "and serves on");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn grpc_has_every_kind_of_it() {
    let fleet = fake(&[Role::Unified]).await;
    let texts = ["left".to_owned(), "right".to_owned()];
    let is_word = |text: &str| text == "left" || text == "right";
    let cases: [(StructuredOutput, Matches<'_>); 4] = [
        (StructuredOutput::JsonSchema(schema().to_string()), &is_valid),
        (StructuredOutput::Regex("left|right".to_owned()), &is_word),
        (StructuredOutput::Grammar("start: \"left\" | \"right\"".to_owned()), &is_word),
        (StructuredOutput::Choice(Choices { texts: texts.to_vec() }), &is_word),
    ];
    for (output, matches) in cases {
        let sampling = Sampling { seed: Some(4), structured_output: Some(output), ..Sampling::default() };
        let request = GenerateRequest { sampling: Some(sampling), ..grpc::text("x") };
        let mut events = fleet.running.grpc().await.generate(request).await.unwrap().into_inner();
        let (mut said, mut reason) = (String::new(), None);
        while let Some(event) = soon(events.message()).await.unwrap() {
            match event.event {
                Some(Event::Delta(delta)) => said.push_str(&delta.text),
                Some(Event::Finished(finished)) => reason = Some(finished.reason()),
                _ => {}
            }
        }
        assert!(matches(&said), "{said:?}");
        assert_eq!(reason, Some(finished::Reason::Stop));
    }
}

/// What a gang is asked that takes over a choice of which only the word that it is all was lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_text_that_is_whole_is_finished_without_another_token() {
    let fleet = fake(&[Role::Unified]).await;
    let text = crate::support::text_model();
    let ask = async |said: &str| {
        let said = text.encode(said, false).unwrap();
        let kind = grammar::Kind::Regex("[a-z]{4}".to_owned());
        let sampling = internal::Sampling {
            max_tokens: 9,
            top_p: 1.0,
            first_position: said.len() as u32,
            grammar: Some(internal::Grammar { kind: Some(kind) }),
            ..internal::Sampling::default()
        };
        let prompt = [vec![5, 6, 7], said].concat();
        let request = DecodeRequest { prompt, sampling: Some(sampling), ..DecodeRequest::default() };
        let endpoint = format!("http://{}", fleet.workers[0].endpoint());
        let mut events = WorkerClient::connect(endpoint).await.unwrap().decode(request).await?.into_inner();
        let mut tokens = 0;
        loop {
            match soon(events.message()).await?.unwrap().event.unwrap() {
                decode_event::Event::Tokens(more) => tokens += more.tokens.len(),
                decode_event::Event::Finished(finished) => return Ok((tokens, finished.reason())),
                _ => {}
            }
        }
    };
    assert_eq!(ask("left").await.unwrap(), (0, internal::finished::Reason::Stop));
    let (tokens, reason) = ask("lef").await.unwrap();
    assert_eq!((tokens, reason), (1, internal::finished::Reason::Stop));
    let status: tonic::Status = ask("le5").await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().starts_with("sampling.grammar: token "), "{status:?}");
}
