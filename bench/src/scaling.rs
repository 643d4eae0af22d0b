//! How long a fleet takes to follow its load: from the moment a gang's metrics cross the autoscaler's bound to the first token of
//! the gang that is made for it, on a cluster with Herd and Prometheus in it.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use herd_control::autoscale::{Entry, Reading, Recording};
use herd_e2e::{Deadline, Inference, Kubectl, Namespace, get, metric};
use herd_proto::v1::generate_request::Input;
use herd_proto::v1::{GenerateRequest, Sampling};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::measure::Samples;

const SYSTEM: &str = "herd-system";
const NAMESPACE: &str = "bench-scaling";
const NAME: &str = "scaling";
const POOL: &str = "llamapool/scaling-unified";
const MODEL: &str = "oci://lk.local/smollm2-135m-fbgemm-fp8:1";
const ROUNDS: usize = 3;

/// Sequences that a gang may run, and streams that go on: more than the 80 percent that the autoscaler leaves a gang.
const SEQUENCES: u64 = 8;
const STREAMS: u64 = 7;
const BOUND: f64 = 0.8;

/// Between two looks at a page.
const LOOK: Duration = Duration::from_millis(25);
const PATIENCE: Duration = Duration::from_mins(4);

/// Parts of the time, in the order they follow each other.
const PARTS: [&str; 5] = ["scrape", "decision", "pod_start", "model_load", "first_token"];

pub(crate) async fn run(kubectl: &Path) -> Result<Value> {
    let kubectl = Kubectl::new(kubectl.to_owned());
    let gateway = address(&kubectl.within(SYSTEM).get("service/herd-gateway")?["spec"], "clusterIP")?;
    let inference = Inference::at(&format!("{gateway}:8081"))?;
    let namespace = Namespace::create(&kubectl, NAMESPACE)?;
    let kubectl = namespace.kubectl();
    kubectl.apply(&deployment())?;

    println!("scaling, from a metric over its bound to the first token of the gang made for it, s");
    println!(
        "  {:>8}  {:>8}  {:>9}  {:>10}  {:>11}  {:>6}",
        PARTS[0], PARTS[1], PARTS[2], PARTS[3], PARTS[4], "total"
    );
    let mut rounds = Vec::new();
    for _ in 0..ROUNDS {
        let first = alone(kubectl).await?;
        known(kubectl).await?;
        let round = round(kubectl, &inference, &first).await?;
        println!("{}", line(&round));
        rounds.push(round);
        kubectl.run(&["scale", POOL, "--replicas=1"])?;
    }
    let median: Vec<f64> = (0..=PARTS.len())
        .map(|part| {
            let mut samples = Samples::default();
            for round in &rounds {
                samples.add(round[part]);
            }
            samples.median()
        })
        .collect();
    println!("{}  median of each", line(&median));
    let rounds: Vec<Value> = rounds.iter().map(|round| figures(round)).collect();
    let policy = &last(kubectl)?.input.policy;
    Ok(json!({
        "scrape_interval_s": policy.scrape_interval_ms as f64 / 1e3,
        "up_after_s": policy.up_after_ms as f64 / 1e3,
        "rounds_s": rounds, "median_s": figures(&median),
    }))
}

fn figures(round: &[f64]) -> Value {
    let names = PARTS.into_iter().chain(["total"]);
    Value::Object(names.zip(round).map(|(name, seconds)| (name.to_owned(), rounded(*seconds))).collect())
}

fn rounded(seconds: f64) -> Value {
    json!((seconds * 1e3).round() / 1e3)
}

fn line(round: &[f64]) -> String {
    let [scrape, decision, pod_start, model_load, first_token, total] = round else { return String::new() };
    format!(
        "  {scrape:>8.2}  {decision:>8.2}  {pod_start:>9.2}  {model_load:>10.2}  {first_token:>11.2}  {total:>6.2}"
    )
}

fn deployment() -> Value {
    json!({
        "apiVersion": "herd.dev/v1alpha1", "kind": "LlamaDeployment", "metadata": {"name": NAME},
        "spec": {
            "model": {"source": MODEL},
            "parallelism": {"tensor": 1},
            "accelerator": {"kind": "CPU"},
            "unified": {"minReplicas": 1, "maxReplicas": 2},
            "autoscaling": {"mode": "SLO"},
            "worker": {"env": [
                {"name": "HERD_KV_MEMORY", "value": "256MiB"},
                {"name": "HERD_MAX_SEQUENCES", "value": SEQUENCES.to_string()},
                {"name": "HERD_PREFIX_CACHE", "value": "false"},
            ]},
        },
    })
}

/// One round, part by part and in all, in seconds.
async fn round(kubectl: &Kubectl, inference: &Inference, first: &str) -> Result<Vec<f64>> {
    let mut load = JoinSet::new();
    for seed in 0..STREAMS {
        load.spawn(ask_on(inference.clone(), 400, seed));
    }
    let crossed = until("a load over the bound", || {
        let page = get(&format!("{first}:9001"), "/metrics")?;
        let value = |name| metric(&page, name, "").with_context(|| format!("no {name}"));
        let busy = value("herd_requests_running")? + value("herd_requests_waiting")?;
        ensure!(busy > BOUND * value("herd_sequences_limit")?, "{busy} sequences");
        Ok(now())
    })
    .await?;
    let second = until("a second gang", || {
        let pods = kubectl.list("pods", &format!("herd.dev/deployment={NAME}"))?;
        let addresses = pods.iter().filter_map(|pod| pod["status"]["podIP"].as_str());
        addresses.filter(|other| *other != first).map(str::to_owned).next().context("there is none")
    })
    .await?;
    let page = || get(&format!("{second}:9001"), "/metrics");
    let started = until("its process", || {
        let page = page()?;
        Ok(metric(&page, "process_start_time_seconds", "").context("no start time")? * 1e3)
    })
    .await?;
    let loaded = until("its model", || get(&format!("{second}:9001"), "/readyz").map(|_| now())).await?;
    // Something for it to do as soon as the gateway knows it.
    load.spawn(ask_on(inference.clone(), 1, STREAMS));
    let token = until("its first token", || {
        let tokens = metric(&page()?, "herd_output_tokens_total", "").context("no tokens")?;
        ensure!(tokens > 0.0, "none");
        Ok(now())
    })
    .await?;
    load.shutdown().await;
    let (scraped, decided) = decision(kubectl, crossed)?;
    let times = [crossed, scraped, decided, started, loaded, token];
    // What looks at pages comes a little late: no part took less than nothing.
    let mut round: Vec<f64> = times.windows(2).map(|of| ((of[1] - of[0]) / 1e3).max(0.0)).collect();
    round.push((token - crossed) / 1e3);
    Ok(round)
}

/// One stream after another.
async fn ask_on(inference: Inference, max_tokens: u32, seed: u64) {
    let request = GenerateRequest {
        model: NAME.to_owned(),
        input: Some(Input::Text("Once upon a time, by the sea,".to_owned())),
        sampling: Some(Sampling {
            max_tokens: Some(max_tokens),
            temperature: Some(0.8),
            seed: Some(seed),
            ignore_eos: true,
            ..Sampling::default()
        }),
        n: 1,
        ..GenerateRequest::default()
    };
    loop {
        if inference.ask(&request).await.is_err() {
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// When Prometheus had the sample that crossed the bound, and when the operator decided, in milliseconds.
fn decision(kubectl: &Kubectl, crossed: f64) -> Result<(f64, f64)> {
    let entries = recording(kubectl)?.entries;
    // The clock of the sample that is looked for is this machine's too.
    let since: Vec<&Entry> = entries.iter().filter(|entry| entry.input.now_ms as f64 >= crossed).collect();
    let over =
        since.iter().find_map(|entry| scraped_over(entry)).context("no decision was made on such a load")?;
    let grew = since.iter().find(|entry| entry.decision.pools.iter().any(|pool| pool.to > pool.from));
    Ok((over, grew.context("the log has no decision for more gangs")?.input.now_ms as f64))
}

/// Time of the sample, where one is over the bound.
fn scraped_over(entry: &Entry) -> Option<f64> {
    let gangs = entry.input.pools.iter().flat_map(|pool| &pool.gangs);
    gangs.into_iter().find_map(|gang| match &gang.reading {
        Reading::Sample(sample)
            if (sample.running + sample.waiting) as f64 > BOUND * sample.sequences_limit as f64 =>
        {
            Some(sample.scraped_ms as f64)
        }
        _ => None,
    })
}

fn recording(kubectl: &Kubectl) -> Result<Recording> {
    let pods = kubectl.within(SYSTEM).list("pods", "app.kubernetes.io/component=operator")?;
    let operator = address(&pods.first().context("no operator")?["status"], "podIP")?;
    let text = get(&format!("{operator}:8080"), &format!("/autoscaler/log/{NAMESPACE}/{NAME}"))?;
    serde_json::from_str(&text).context("the log of decisions")
}

fn last(kubectl: &Kubectl) -> Result<Entry> {
    recording(kubectl)?.entries.pop_back().context("no decision yet")
}

/// Waits until there is one gang, which takes requests; its address.
async fn alone(kubectl: &Kubectl) -> Result<String> {
    until("one gang that is Ready", || {
        let status = &kubectl.get(POOL)?["status"];
        ensure!(
            status["readyReplicas"] == 1 && status["replicas"] == 1 && status["drainingReplicas"] == 0,
            "{status}"
        );
        let pods = kubectl.list("pods", &format!("herd.dev/deployment={NAME}"))?;
        match &pods[..] {
            [pod] => address(&pod["status"], "podIP"),
            pods => bail!("{} pods", pods.len()),
        }
    })
    .await
}

/// Waits until the autoscaler knows of the gang that it has nothing to do.
async fn known(kubectl: &Kubectl) -> Result<()> {
    until("an idle gang that the autoscaler knows", || {
        let entry = last(kubectl)?;
        let [pool] = &entry.input.pools[..] else { bail!("{} pools", entry.input.pools.len()) };
        let idle = |reading: &Reading| matches!(reading, Reading::Sample(sample) if sample.running + sample.waiting == 0);
        ensure!(pool.gangs.len() == 1 && pool.gangs.iter().all(|gang| idle(&gang.reading)), "{:?}", pool.gangs);
        Ok(())
    })
    .await
}

async fn until<T>(what: &str, mut look: impl FnMut() -> Result<T>) -> Result<T> {
    let deadline = Deadline::after(PATIENCE);
    loop {
        match look() {
            Ok(seen) => return Ok(seen),
            Err(error) if deadline.is_over() => {
                bail!("waited {} s for {what}; last: {error:#}", PATIENCE.as_secs())
            }
            Err(_) => tokio::time::sleep(LOOK).await,
        }
    }
}

fn address(of: &Value, field: &str) -> Result<String> {
    Ok(of[field].as_str().with_context(|| format!("no {field}: {of}"))?.to_owned())
}

/// Milliseconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64() * 1e3
}
