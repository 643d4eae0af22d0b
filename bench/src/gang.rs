//! A gang of three processes, one rank each, against three ranks that are threads of one process: tokens/s of SmolLM2 in FP8.
//! The processes are parts of this one; they speak over the loopback interface as pods do over theirs.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use futures::StreamExt as _;
use futures::future::try_join_all;
use herd_engine::Isa;
use herd_model::{Dtype, Parallelism};
use herd_proto::internal::v1::worker_client::WorkerClient;
use herd_proto::internal::v1::{DecodeRequest, Sampling, decode_event};
use herd_worker::{Backend, CpuBackend, Follower, GangPart, KvSize, Worker, WorkerOptions};
use serde_json::{Value, json};
use tonic::transport::Channel;

use crate::measure::Samples;

const ROUNDS: usize = 3;
const TENSOR: usize = 3;
const PROMPT: usize = 32;
const TOKENS: u32 = 64;
const PATIENCE: Duration = Duration::from_mins(2);

fn options(model: &Path, threads: usize) -> WorkerOptions {
    let backend = CpuBackend {
        model_dir: model.to_owned(),
        parallelism: Parallelism::tensor(TENSOR),
        dtype: Dtype::Bf16,
        kv: KvSize::Blocks(64),
        threads,
        isa: Isa::detect(),
    };
    let mut options = WorkerOptions::loopback(Backend::Cpu(backend));
    options.gang_id = Some("bench".to_owned());
    options
}

pub(crate) async fn run(model: &Path) -> Result<Value> {
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let whole = Worker::start(options(model, TENSOR)).await?;
    let part = |first_rank, leader: SocketAddr| GangPart {
        first_rank,
        ranks_per_pod: 1,
        leader: leader.to_string(),
        bind: any,
    };
    let mut first = options(model, 1);
    first.part = Some(part(0, any));
    let leader = Worker::start(first).await?;
    let follow = |rank| Follower::start(options(model, 1), part(rank, leader.endpoint()));
    let followers = try_join_all((1..TENSOR).map(follow)).await?;
    tokio::time::timeout(PATIENCE, leader.ready()).await.context("a gang that is whole")?;

    println!("gang of {TENSOR}, SmolLM2 fbgemm_fp8, {TOKENS} tokens a sequence, tokens/s");
    println!("  {:>9}  {:>9}  {:>8}  {:>5}", "sequences", "processes", "threads", "ratio");
    let mut figures = Vec::new();
    for sequences in [1, 8] {
        let (mut processes, mut threads) = (Samples::default(), Samples::default());
        for _ in 0..ROUNDS {
            processes.add(rate(leader.endpoint(), sequences).await?);
            threads.add(rate(whole.endpoint(), sequences).await?);
        }
        let (processes, threads) = (processes.median(), threads.median());
        println!("  {sequences:>9}  {processes:>9.1}  {threads:>8.1}  {:>5.2}", processes / threads);
        figures.push(json!({
            "sequences": sequences, "processes_tokens_s": processes, "threads_tokens_s": threads,
            "ratio": processes / threads,
        }));
    }
    for follower in followers {
        follower.shutdown().await;
    }
    leader.shutdown().await;
    whole.shutdown().await;
    Ok(Value::Array(figures))
}

/// Tokens/s over all sequences, prompts included.
async fn rate(leader: SocketAddr, sequences: u64) -> Result<f64> {
    let client = WorkerClient::connect(format!("http://{leader}")).await?;
    let begun = Instant::now();
    let tokens = try_join_all((0..sequences).map(|seed| decode(client.clone(), seed)));
    let tokens = tokio::time::timeout(PATIENCE, tokens).await.context("no end")??;
    let took = begun.elapsed().as_secs_f64();
    ensure!(tokens.iter().all(|count| *count == TOKENS), "{tokens:?} tokens");
    Ok(f64::from(tokens.iter().sum::<u32>()) / took)
}

async fn decode(mut client: WorkerClient<Channel>, seed: u64) -> Result<u32> {
    let request = DecodeRequest {
        prompt: (100..100 + PROMPT as u32).collect(),
        sampling: Some(Sampling {
            max_tokens: TOKENS,
            temperature: 0.8,
            top_p: 1.0,
            seed,
            ..Sampling::default()
        }),
        ..DecodeRequest::default()
    };
    let mut stream = client.decode(request).await?.into_inner();
    let mut tokens = 0;
    while let Some(event) = stream.next().await {
        if let Some(decode_event::Event::Tokens(more)) = event?.event {
            tokens += more.tokens.len() as u32;
        }
    }
    Ok(tokens)
}
