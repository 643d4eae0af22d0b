//! Tokens and log probabilities of the reference, through the gateway: tolerances as `fixtures/README.md` has them.

use herd_proto::v1::generate_event::Event;
use herd_proto::v1::generate_request::Input;
use herd_proto::v1::{GenerateRequest, Sampling, TokenIds};
use herd_text::{BUNDLE_FILE_NAMES, BundleFiles, TextModel};
use herd_worker::Role;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::support::fleet::{Fleet, cpu};
use crate::support::{fixture, soon};

#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    id: u32,
    prompt: Vec<u32>,
    prompt_logprobs_first64: Vec<f64>,
    greedy: Vec<u32>,
    greedy_logprobs: Vec<f64>,
    top5_first8: Vec<Vec<(u32, f64)>>,
    #[serde(rename = "tokens_before_a_gap_below_0.02")]
    before_a_small_gap: usize,
    #[serde(rename = "tokens_before_a_gap_below_0.5")]
    before_a_gap: Option<usize>,
}

/// What is asked of one model.
struct Check {
    model: &'static str,
    golden: &'static str,
    /// Tokens are equal up to the first gap below 0.5 where the golden has it and this is set, else below 0.02.
    wide_gap: bool,
    /// Largest distance of a log probability.
    each: f64,
    /// Mean distance of the greedy tokens' log probabilities, over all cases.
    mean: f64,
}

const CHECKS: [Check; 4] = [
    Check {
        model: "tiny-llama31/tiny-llama31-bf16",
        golden: "tiny-llama31/golden-bf16.json",
        wide_gap: false,
        each: 2e-3,
        mean: 5e-4,
    },
    Check {
        model: "sharp-llama31/sharp-llama31-bf16",
        golden: "sharp-llama31/golden-bf16.json",
        wide_gap: false,
        each: 2e-3,
        mean: 5e-4,
    },
    Check {
        model: "tiny-llama31/tiny-llama31-fbgemm-fp8",
        golden: "tiny-llama31/golden-fbgemm-fp8.json",
        wide_gap: false,
        each: 5e-3,
        mean: 5e-4,
    },
    Check {
        model: "sharp-llama31/sharp-llama31-fbgemm-fp8",
        golden: "sharp-llama31/golden-fbgemm-fp8.json",
        wide_gap: true,
        each: 0.15,
        mean: 5e-4,
    },
];

/// One case's answer: ids, their log probabilities, and by step the alternatives.
struct Answer {
    ids: Vec<u32>,
    logprobs: Vec<f64>,
    tops: Vec<Vec<(String, f64)>>,
}

impl Check {
    async fn run(&self, tensor: usize) {
        let golden: Golden = serde_json::from_slice(&std::fs::read(fixture(self.golden)).unwrap()).unwrap();
        assert_eq!(golden.cases.len(), 8);
        let unified = cpu(self.model, tensor, &[Role::Unified]).await;
        let apart = cpu(self.model, tensor, &[Role::Prefill, Role::Decode]).await;
        let text = text_model(self.model);
        let (mut distance, mut compared) = (0.0, 0);
        let (mut prompt_distance, mut prompt_compared) = (0.0, 0);
        for case in &golden.cases {
            let whole = over_http(&unified, case).await;
            assert_eq!(whole, over_http(&apart, case).await, "{} case {}: apart", self.golden, case.id);
            let (sum, count) = self.compare_prompt(case, &whole);
            prompt_distance += sum;
            prompt_compared += count;
            let http = read_http(&whole);
            let grpc = over_grpc(&apart, case).await;
            assert_eq!((&grpc.ids, &grpc.logprobs), (&http.ids, &http.logprobs), "case {}", case.id);
            for answer in [http, grpc] {
                let (sum, count) = self.compare(case, &answer, &text);
                distance += sum;
                compared += count;
            }
        }
        let mean = prompt_distance / prompt_compared as f64;
        assert!(mean <= self.mean, "{}: mean distance of prompts {mean}", self.golden);
        let mean = distance / compared as f64;
        assert!(mean <= self.mean, "{}: mean distance {mean}", self.golden);
        assert!(apart.metric("herd_prefill_recomputed_tokens_total").await.abs() < 0.1);
    }

    /// The same of the prompt's tokens.
    fn compare_prompt(&self, case: &Case, choice: &Value) -> (f64, usize) {
        let told = choice["prompt_logprobs"].as_array().unwrap();
        assert_eq!(told.len(), case.prompt.len());
        assert_eq!(told[0], Value::Null);
        let mut sum = 0.0;
        for (at, golden) in (1..).zip(&case.prompt_logprobs_first64) {
            let entry = &told[at][case.prompt[at].to_string()];
            let ours = f64::from(entry["logprob"].as_f64().unwrap() as f32);
            assert!(
                (ours - golden).abs() <= self.each,
                "{} case {} at {at}: {ours}, golden {golden}",
                self.golden,
                case.id
            );
            sum += (ours - golden).abs();
        }
        (sum, case.prompt_logprobs_first64.len())
    }

    /// The summed distance of log probabilities and how many there are.
    fn compare(&self, case: &Case, answer: &Answer, text: &TextModel) -> (f64, usize) {
        let name = format!("{} case {}", self.golden, case.id);
        assert_eq!(answer.ids.len(), 64);
        let equal = case.before_a_gap.filter(|_| self.wide_gap).unwrap_or(case.before_a_small_gap);
        assert_eq!(answer.ids[..equal], case.greedy[..equal], "{name}");
        for (step, golden) in case.greedy_logprobs.iter().enumerate().take(equal) {
            let ours = answer.logprobs[step];
            assert!((ours - golden).abs() <= self.each, "{name} step {step}: {ours}, golden {golden}");
        }
        // A step's alternatives follow from the tokens before it.
        for (step, golden) in case.top5_first8.iter().enumerate().take(equal + 1) {
            let ours = &answer.tops[step];
            let least = ours.iter().map(|(_, logprob)| *logprob).fold(f64::INFINITY, f64::min);
            for (id, logprob) in golden {
                let token = self::name(text, *id);
                match ours.iter().find(|(ours, _)| *ours == token) {
                    Some((_, ours)) => {
                        assert!((ours - logprob).abs() <= self.each, "{name} step {step} {token:?}");
                    }
                    None => {
                        assert!((logprob - least).abs() <= self.each, "{name} step {step} lacks {token:?}");
                    }
                }
            }
        }
        let close = case.before_a_small_gap.min(equal);
        let pairs = answer.logprobs.iter().zip(&case.greedy_logprobs).take(close);
        (pairs.map(|(ours, golden)| (ours - golden).abs()).sum(), close)
    }
}

fn text_model(model: &str) -> TextModel {
    let files: BundleFiles = BUNDLE_FILE_NAMES
        .iter()
        .filter_map(|name| Some(((*name).to_owned(), std::fs::read(fixture(model).join(name)).ok()?)))
        .collect();
    TextModel::from_files(&files).unwrap()
}

/// As completions name a token.
fn name(text: &TextModel, id: u32) -> String {
    named(&text.token_text(id).0, &text.token_text(id).1)
}

fn named(text: &str, bytes: &[u8]) -> String {
    if std::str::from_utf8(bytes).is_ok() {
        return text.to_owned();
    }
    bytes.iter().fold("bytes:".to_owned(), |name, byte| name + &format!("\\x{byte:02x}"))
}

async fn over_http(fleet: &Fleet, case: &Case) -> Value {
    let body = json!({
        "model": "tiny", "prompt": case.prompt, "max_tokens": 64, "temperature": 0, "ignore_eos": true,
        "logprobs": 5, "return_token_ids": true, "prompt_logprobs": 1
    });
    let answer = fleet.running.post("/v1/completions", &body).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()["choices"][0].clone()
}

fn read_http(choice: &Value) -> Answer {
    let logprobs = &choice["logprobs"];
    let numbers = |value: &Value| -> Vec<f64> {
        value.as_array().unwrap().iter().map(|number| f64::from(number.as_f64().unwrap() as f32)).collect()
    };
    let tops = logprobs["top_logprobs"].as_array().unwrap().iter().map(|top| {
        let top = top.as_object().unwrap();
        top.iter().map(|(name, logprob)| (name.clone(), logprob.as_f64().unwrap())).collect()
    });
    Answer {
        ids: serde_json::from_value(choice["token_ids"].clone()).unwrap(),
        logprobs: numbers(&logprobs["token_logprobs"]),
        tops: tops.collect(),
    }
}

async fn over_grpc(fleet: &Fleet, case: &Case) -> Answer {
    let request = GenerateRequest {
        model: "tiny".to_owned(),
        input: Some(Input::Tokens(TokenIds { ids: case.prompt.clone() })),
        sampling: Some(Sampling {
            max_tokens: Some(64),
            temperature: Some(0.0),
            logprobs: Some(5),
            ignore_eos: true,
            ..Sampling::default()
        }),
        ..GenerateRequest::default()
    };
    let mut events = fleet.running.grpc().await.generate(request).await.unwrap().into_inner();
    let mut answer = Answer { ids: Vec::new(), logprobs: Vec::new(), tops: Vec::new() };
    while let Some(event) = soon(events.message()).await.unwrap() {
        let Some(Event::Delta(delta)) = event.event else { continue };
        answer.ids.extend(&delta.token_ids);
        for entry in delta.logprobs {
            answer.logprobs.push(f64::from(entry.logprob));
            let top = entry.top.iter().map(|top| (named(&top.token, &top.bytes), f64::from(top.logprob)));
            answer.tops.push(top.collect());
        }
    }
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn tiny_in_bf16() {
    CHECKS[0].run(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sharp_in_bf16() {
    CHECKS[1].run(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tiny_in_fbgemm_fp8() {
    CHECKS[2].run(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sharp_in_fbgemm_fp8() {
    CHECKS[3].run(2).await;
}

/// More than one step of prompt on real weights; the second step reads the first one's KV.
#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_of_two_steps_is_answered_alike_unified_and_apart() {
    const TINY: &str = "tiny-llama31/tiny-llama31-bf16";
    let unified = cpu(TINY, 1, &[Role::Unified]).await;
    let apart = cpu(TINY, 2, &[Role::Prefill, Role::Decode]).await;
    let prompt: Vec<u32> = (0..700).map(|index| (index * 37 + 11) % 1000).collect();
    let body = json!({
        "model": "tiny", "prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": true,
        "logprobs": 1, "return_token_ids": true
    });
    let whole = unified.running.post("/v1/completions", &body).await;
    assert_eq!(whole.status, 200, "{}", whole.text());
    assert_eq!(whole.json()["usage"]["prompt_tokens"], 700);
    let other = apart.running.post("/v1/completions", &body).await;
    assert_eq!(other.status, 200, "{}", other.text());
    let ids = |answer: &Value| answer["choices"][0]["token_ids"].clone();
    assert_eq!(ids(&whole.json()).as_array().unwrap().len(), 24);
    assert_eq!(ids(&whole.json()), ids(&other.json()));
    assert!(apart.metric("herd_prefill_recomputed_tokens_total").await.abs() < 0.1);
}
