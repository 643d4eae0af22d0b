//! The same on the CPU backend, with a real checkpoint.

use std::path::{Path, PathBuf};

use herd_engine::Isa;
use herd_model::{Dtype, Parallelism};
use herd_proto::internal::v1::worker_client::WorkerClient;
use herd_proto::internal::v1::{DecodeRequest, GetBundleRequest, Shaping, TokenBias};
use herd_worker::{Backend, CpuBackend, DraftSource, Drafts, KvSize, Worker, WorkerError, WorkerOptions};

use crate::gangs::{Answer, metric, prompt, request};

pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/tiny-llama31").join(name)
}

async fn start(model: &str, tensor: usize, dtype: Dtype) -> Worker {
    start_split(model, Parallelism::tensor(tensor), dtype).await
}

async fn start_split(model: &str, parallelism: Parallelism, dtype: Dtype) -> Worker {
    let (model_dir, threads) = (fixture(model), parallelism.ranks());
    let backend =
        CpuBackend { model_dir, parallelism, dtype, kv: KvSize::Blocks(32), threads, isa: Isa::detect() };
    Worker::start(WorkerOptions::loopback(Backend::Cpu(backend))).await.unwrap()
}

async fn answer(worker: &Worker, asked: DecodeRequest) -> Answer {
    let mut client = WorkerClient::connect(format!("http://{}", worker.endpoint())).await.unwrap();
    let first = asked.sampling.as_ref().unwrap().first_position as usize;
    Answer::read_from(&mut client.decode(asked).await.unwrap().into_inner(), first).await.unwrap()
}

fn apart(asked: &DecodeRequest, prefill: &Worker) -> DecodeRequest {
    DecodeRequest { prefill_peer: prefill.endpoint().to_string(), ..asked.clone() }
}

/// Of the fixtures' vocabulary.
fn asked(temperature: f32) -> DecodeRequest {
    let prompt = prompt(150).into_iter().map(|id| id % 256).collect();
    let mut asked = request(prompt, 24);
    asked.sampling.as_mut().unwrap().temperature = temperature;
    asked
}

#[tokio::test]
async fn apart_equals_together_to_the_bit_at_equal_degree() {
    for (model, dtype) in [
        ("tiny-llama31-bf16", Dtype::F32),
        ("tiny-llama31-bf16", Dtype::Bf16),
        ("tiny-llama31-fbgemm-fp8", Dtype::Bf16),
    ] {
        for tensor in [1, 2] {
            let prefill = start(model, tensor, dtype).await;
            let decode = start(model, tensor, dtype).await;
            for temperature in [0.0, 0.9] {
                let asked = asked(temperature);
                let together = answer(&decode, asked.clone()).await;
                assert_eq!(together.ids.len(), 24);
                assert_eq!(
                    answer(&decode, apart(&asked, &prefill)).await,
                    together,
                    "{model} {dtype} {tensor}"
                );
            }
        }
    }
}

/// Everything that is done to logits at once, and at a temperature.
fn shaped(mut asked: DecodeRequest) -> DecodeRequest {
    asked.sampling.as_mut().unwrap().shaping = Some(Shaping {
        bias: vec![TokenBias { id: 5, bias: 3.0 }],
        min_tokens: 4,
        repetition_penalty: Some(1.2),
        presence_penalty: 0.5,
        frequency_penalty: 0.5,
        top_k: 50,
        min_p: 0.01,
    });
    asked
}

#[tokio::test]
async fn what_has_come_counts_wherever_it_was_computed() {
    let model = "tiny-llama31-bf16";
    let (prefill, decode) = (start(model, 1, Dtype::F32).await, start(model, 1, Dtype::F32).await);
    let asked = shaped(asked(0.9));
    let whole = answer(&decode, asked.clone()).await;
    assert_eq!(whole.ids.len(), 24);
    assert_eq!(answer(&decode, apart(&asked, &prefill)).await, whole);
    // Another gang goes on from what has come, and so from what the penalties count.
    for said in [1, 3, 11] {
        let mut rest = asked.clone();
        rest.prompt.extend(&whole.ids[..said]);
        let sampling = rest.sampling.as_mut().unwrap();
        (sampling.first_position, sampling.max_tokens) = (said as u32, 24 - said as u32);
        for rest in [rest.clone(), apart(&rest, &prefill)] {
            assert_eq!(answer(&decode, rest).await.ids, whole.ids[said..], "after {said}");
        }
    }
}

#[tokio::test]
async fn a_penalty_keeps_tokens_from_coming_again() {
    let worker = start("tiny-llama31-bf16", 1, Dtype::F32).await;
    let with = |shaping: Shaping| {
        let mut asked = asked(0.0);
        asked.sampling.as_mut().unwrap().shaping = Some(shaping);
        answer(&worker, asked)
    };
    let plain = with(Shaping::default()).await.ids;
    let distinct = |ids: &[u32]| ids.iter().collect::<std::collections::HashSet<_>>().len();
    assert!(distinct(&plain) < 24, "{plain:?}");
    let once = with(Shaping { presence_penalty: 1e6, ..Shaping::default() }).await.ids;
    assert_eq!(distinct(&once), 24);
    let bias = vec![TokenBias { id: 77, bias: 1e6 }];
    assert_eq!(with(Shaping { bias, ..Shaping::default() }).await.ids, [77; 24]);
    // The most likely one alone is what greedy takes.
    let mut warm = asked(1.5);
    warm.sampling.as_mut().unwrap().shaping = Some(Shaping { top_k: 1, ..Shaping::default() });
    assert_eq!(answer(&worker, warm).await.ids, plain);
}

#[tokio::test]
async fn stages_may_differ_and_change_no_bit() {
    let model = "tiny-llama31-bf16";
    let together = answer(&start(model, 2, Dtype::Bf16).await, asked(0.9)).await;
    // Over all of the layers, some, and ranges that overlap: 4 layers in 1 to 4 stages.
    for (source, target) in [(1, 2), (2, 1), (3, 2), (4, 3)] {
        let split = |pipeline| start_split(model, Parallelism { tensor: 2, pipeline }, Dtype::Bf16);
        let (prefill, decode) = (split(source).await, split(target).await);
        assert_eq!(answer(&prefill, asked(0.9)).await, together, "pipeline {source}");
        assert_eq!(answer(&decode, apart(&asked(0.9), &prefill)).await, together, "{source} to {target}");
    }
}

#[tokio::test]
async fn degrees_may_differ() {
    let model = "tiny-llama31-bf16";
    for (source, target) in [(1, 2), (2, 1), (4, 8), (8, 2)] {
        let prefill = start(model, source, Dtype::F32).await;
        let decode = start(model, target, Dtype::F32).await;
        let together = answer(&prefill, asked(0.0)).await;
        let apart = answer(&decode, apart(&asked(0.0), &prefill)).await;
        assert_eq!(apart.logprobs[0], together.logprobs[0], "position 0 is the prefill gang's");
        assert_eq!(apart.ids, together.ids, "{source} to {target}");
        for (ours, theirs) in apart.logprobs.iter().zip(&together.logprobs) {
            let (ours, theirs) = (f32::from_bits(ours[0].1), f32::from_bits(theirs[0].1));
            assert!((ours - theirs).abs() < 2e-3, "{source} to {target}: {ours} {theirs}");
        }
    }
}

#[tokio::test]
async fn a_bundle_is_what_the_checkpoint_has() {
    let worker = start("tiny-llama31-bf16", 1, Dtype::F32).await;
    let mut client = WorkerClient::connect(format!("http://{}", worker.endpoint())).await.unwrap();
    let mut chunks = client.get_bundle(GetBundleRequest {}).await.unwrap().into_inner();
    let mut files: Vec<(String, Vec<u8>)> = Vec::new();
    while let Some(chunk) = chunks.message().await.unwrap() {
        if !chunk.file.is_empty() {
            files.push((chunk.file, Vec::new()));
        }
        files.last_mut().unwrap().1.extend_from_slice(&chunk.data);
    }
    assert_eq!(files.len(), 4);
    for (name, data) in files {
        assert_eq!(data, std::fs::read(fixture("tiny-llama31-bf16").join(&name)).unwrap(), "{name}");
    }
}

#[tokio::test]
async fn a_degree_that_does_not_split_the_model_is_refused() {
    let model_dir = fixture("tiny-llama31-bf16");
    for (tensor, pipeline, told) in [(3, 1, "possible degrees"), (1, 5, "the 4 layers")] {
        let (model_dir, parallelism) = (model_dir.clone(), Parallelism { tensor, pipeline });
        let kv = KvSize::Blocks(4);
        let backend =
            CpuBackend { model_dir, parallelism, dtype: Dtype::F32, kv, threads: 1, isa: Isa::detect() };
        let error = Worker::start(WorkerOptions::loopback(Backend::Cpu(backend))).await.unwrap_err();
        assert_eq!(error.reason(), "ImpossibleParallelism");
        assert!(error.to_string().contains(told), "{error}");
    }
}

async fn start_drafting(source: DraftSource) -> Result<Worker, WorkerError> {
    let backend = CpuBackend {
        model_dir: fixture("tiny-llama31-bf16"),
        parallelism: Parallelism::tensor(2),
        dtype: Dtype::Bf16,
        kv: KvSize::Blocks(32),
        threads: 2,
        isa: Isa::detect(),
    };
    let drafts = Some(Drafts { source, tokens: 3 });
    Worker::start(WorkerOptions { drafts, ..WorkerOptions::loopback(Backend::Cpu(backend)) }).await
}

#[tokio::test]
async fn guesses_change_no_bit() {
    let plain = start("tiny-llama31-bf16", 2, Dtype::Bf16).await;
    let sources = [DraftSource::PromptLookup, DraftSource::Model(fixture("tiny-llama31-fbgemm-fp8"))];
    for source in sources {
        let drafting = start_drafting(source.clone()).await.unwrap();
        for temperature in [0.0, 0.9] {
            let asked = shaped(asked(temperature));
            let expected = answer(&plain, asked.clone()).await;
            assert_eq!(answer(&drafting, asked.clone()).await, expected);
            assert_eq!(answer(&drafting, apart(&asked, &plain)).await, expected);
        }
        // What is biased to repeat itself is easily guessed.
        let mut asked = asked(0.0);
        let bias = vec![TokenBias { id: 77, bias: 1e6 }];
        asked.sampling.as_mut().unwrap().shaping = Some(Shaping { bias, ..Shaping::default() });
        assert_eq!(answer(&drafting, apart(&asked, &plain)).await.ids, [77; 24]);
        let drafts = metric(drafting.http(), "herd_draft_tokens_total").await;
        let accepted = metric(drafting.http(), "herd_accepted_draft_tokens_total").await;
        assert!(accepted >= 12 && drafts >= accepted, "{accepted} of {drafts} by {source:?}");
    }
}

#[tokio::test]
async fn a_draft_model_has_to_have_the_same_vocabulary() {
    let dir = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(fixture("tiny-llama31-bf16")).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), dir.path().join(file.file_name())).unwrap();
    }
    let tokenizer = dir.path().join("tokenizer.json");
    let mut other: serde_json::Value = serde_json::from_slice(&std::fs::read(&tokenizer).unwrap()).unwrap();
    let vocab = other["model"]["vocab"].as_object_mut().unwrap();
    let (one, two) = (vocab["a"].clone(), vocab["b"].clone());
    (vocab["a"], vocab["b"]) = (two, one);
    std::fs::write(&tokenizer, other.to_string()).unwrap();
    let error = start_drafting(DraftSource::Model(dir.path().to_owned())).await.unwrap_err();
    assert_eq!(error.reason(), "InvalidOption");
    assert!(error.to_string().starts_with("--draft-model: "), "{error}");
    assert!(error.to_string().contains("has another vocabulary than"), "{error}");
    let error = start_drafting(DraftSource::Model("/nothing/here".into())).await.unwrap_err();
    assert!(error.to_string().starts_with("--draft-model: /nothing/here: "), "{error}");
}
