//! What the gateway adds to a token: from the moment the engine may compute a step to the token at the client, through the
//! gateway and straight from the worker. The fake backend computes nothing to speak of.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use futures::StreamExt as _;
use herd_engine::{FakeControl, FakeOptions};
use herd_gateway::{FixedFleet, GangEndpoint, Gateway, GatewayOptions, ReservedPort};
use herd_proto::internal::v1::worker_client::WorkerClient;
use herd_proto::internal::v1::{self as internal, DecodeRequest, decode_event};
use herd_proto::v1::generate_request::Input;
use herd_proto::v1::inference_client::InferenceClient;
use herd_proto::v1::{GenerateRequest, Sampling, TokenIds, generate_event};
use herd_scheduler::LogitRows;
use herd_worker::{Backend, FakeBackend, Worker, WorkerOptions};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tonic::transport::Channel;

use crate::measure::Samples;

const MODEL: &str = "fake";
const ROUNDS: usize = 3;
/// Tokens of a stream; the first are not counted: connections and caches warm up.
const TOKENS: u32 = 150;
const WARM: usize = 10;
const PATIENCE: Duration = Duration::from_secs(20);

/// When each token of each stream came.
type Arrivals = mpsc::Receiver<Instant>;

pub(crate) async fn run(tokenizer: &Path) -> Result<Value> {
    let options = FakeOptions {
        vocab_size: 1024,
        kv_blocks: 512,
        unlikely: (94..1024).collect(),
        ..FakeOptions::default()
    };
    let backend = FakeBackend::new(options, 4096).with_bundle(tokenizer);
    let control = backend.control();
    let worker = Worker::start(WorkerOptions::loopback(Backend::Fake(Box::new(backend)))).await?;
    let leader = worker.endpoint().to_string();
    let any = || ReservedPort::reserve("127.0.0.1:0".parse()?).context("a free port");
    let gang = GangEndpoint { models: vec![MODEL.to_owned()], leader: leader.clone() };
    let mut options = GatewayOptions::new(Arc::new(FixedFleet::new(vec![gang])), any()?, any()?);
    options.ready_within = Some(PATIENCE);
    let gateway = Gateway::start(options).await?;
    let inference = InferenceClient::connect(format!("http://{}", gateway.addresses().grpc)).await?;
    let straight = WorkerClient::connect(format!("http://{leader}")).await?;

    let mut figures = Vec::new();
    println!("gateway, from a step to its token at the client, µs");
    println!(
        "  {:>7}  {:>17}  {:>17}  {:>17}",
        "streams", "worker p50 p99", "gateway p50 p99", "added p50 p99"
    );
    for streams in [1, 32] {
        let (mut without, mut with) = (Samples::default(), Samples::default());
        for _ in 0..ROUNDS {
            control.close();
            let opened = (0..streams).map(|seed| decode(straight.clone(), seed)).collect();
            without.append(steps(&control, opened).await?);
            control.close();
            let opened = (0..streams).map(|seed| generate(inference.clone(), seed)).collect();
            with.append(steps(&control, opened).await?);
        }
        let [w50, w99, g50, g99] =
            [without.median(), without.quantile(0.99), with.median(), with.quantile(0.99)];
        println!(
            "  {streams:>7}  {w50:>8.0} {w99:>8.0}  {g50:>8.0} {g99:>8.0}  {:>8.0} {:>8.0}",
            g50 - w50,
            g99 - w99
        );
        figures.push(json!({
            "streams": streams,
            "worker_us": {"p50": w50, "p99": w99}, "gateway_us": {"p50": g50, "p99": g99},
            "added_us": {"p50": g50 - w50, "p99": g99 - w99},
        }));
    }
    gateway.shutdown().await;
    worker.shutdown().await;
    Ok(Value::Array(figures))
}

/// Lets one step after another go, each once all streams have the token of the one before.
async fn steps(control: &FakeControl, mut streams: Vec<Arrivals>) -> Result<Samples> {
    let mut samples = Samples::default();
    // Requests come one after another: steps until one has a token for each of them.
    let (mut due, mut came) = (0, 0);
    let mut early = vec![0; streams.len()];
    loop {
        let plan = tokio::time::timeout(PATIENCE, control.pass()).await.context("no step")?;
        let with_token = plan.entries.iter().filter(|entry| entry.logits != LogitRows::None).count();
        due += with_token;
        if with_token == streams.len() {
            break;
        }
    }
    let deadline = Instant::now() + PATIENCE;
    while came < due {
        ensure!(Instant::now() < deadline, "{came} of {due} tokens came");
        for (stream, early) in streams.iter_mut().zip(&mut early) {
            while stream.try_recv().is_ok() {
                (came, *early) = (came + 1, *early + 1);
            }
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let least = TOKENS as usize - early.iter().max().copied().unwrap_or_default();
    for step in 0..least {
        control.held().await;
        let begun = Instant::now();
        control.pass().await;
        for stream in &mut streams {
            let came = tokio::time::timeout(PATIENCE, stream.recv()).await.context("no token")?;
            let came = came.context("a stream ended early")?;
            if step >= WARM {
                samples.add_micros(came - begun);
            }
        }
    }
    control.open();
    for mut stream in streams {
        while tokio::time::timeout(PATIENCE, stream.recv()).await.context("no end")?.is_some() {}
    }
    ensure!(samples.median() > 0.0, "tokens came before their step");
    Ok(samples)
}

fn decode(mut client: WorkerClient<Channel>, seed: u64) -> Arrivals {
    let (sender, arrivals) = mpsc::channel(TOKENS as usize);
    tokio::spawn(async move {
        let request = DecodeRequest {
            prompt: vec![1, 2, 3, 4],
            sampling: Some(internal::Sampling {
                max_tokens: TOKENS,
                temperature: 1.0,
                top_p: 1.0,
                seed,
                ..Default::default()
            }),
            ..DecodeRequest::default()
        };
        let Ok(stream) = client.decode(request).await else { return };
        let mut stream = stream.into_inner();
        while let Some(Ok(event)) = stream.next().await {
            let Some(decode_event::Event::Tokens(tokens)) = event.event else { continue };
            for _ in tokens.tokens {
                if sender.send(Instant::now()).await.is_err() {
                    return;
                }
            }
        }
    });
    arrivals
}

fn generate(mut client: InferenceClient<Channel>, seed: u64) -> Arrivals {
    let (sender, arrivals) = mpsc::channel(TOKENS as usize);
    tokio::spawn(async move {
        let request = GenerateRequest {
            model: MODEL.to_owned(),
            input: Some(Input::Tokens(TokenIds { ids: vec![1, 2, 3, 4] })),
            sampling: Some(Sampling {
                max_tokens: Some(TOKENS),
                temperature: Some(1.0),
                seed: Some(seed),
                ignore_eos: true,
                ..Sampling::default()
            }),
            ..GenerateRequest::default()
        };
        let Ok(stream) = client.generate(request).await else { return };
        let mut stream = stream.into_inner();
        while let Some(Ok(event)) = stream.next().await {
            let Some(generate_event::Event::Delta(delta)) = event.event else { continue };
            for _ in delta.token_ids {
                if sender.send(Instant::now()).await.is_err() {
                    return;
                }
            }
        }
    });
    arrivals
}
