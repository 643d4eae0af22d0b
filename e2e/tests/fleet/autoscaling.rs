//! The operator scales pools by what Prometheus says, and leaves them to others where it is told to.
//!
//! `cargo xtask e2e` installs the chart with Prometheus's address and short times: see `xtask/src/release.rs`.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use herd_e2e::{Answer, Fleet, Kubectl, Serve, eventually, get, metric, with_fleet};
use herd_proto::v1::generate_request::Input;
use herd_proto::v1::{GenerateRequest, Sampling};
use serde_json::{Value, json};

use crate::objects::{READY_WITHIN, apart, ready, settled, wait_for};

const NAME: &str = "scaled";
/// Sequences that a gang may run at once. Three streams are no load for it, as many as it may run are.
const MAX_SEQUENCES: u64 = 8;
/// For load to be seen, decided on, and a gang to be made; a busy machine computes the prompts meanwhile.
const SCALED_WITHIN: Duration = Duration::from_mins(4);
/// Rounds of the autoscaler that are more than its window.
const ROUNDS: f64 = 40.0;

type Golden = (GenerateRequest, Answer);

fn deployment() -> Value {
    let mut object = apart(NAME);
    object["spec"]["autoscaling"] = json!({"mode": "SLO"});
    object["spec"]["slo"] = json!({"timeToFirstToken": "1s", "interTokenLatency": "500ms"});
    object["spec"]["worker"] = json!({"env": [
        {"name": "HERD_KV_MEMORY", "value": "256MiB"},
        {"name": "HERD_MAX_SEQUENCES", "value": MAX_SEQUENCES.to_string()},
        // The same prompts come again and again, and each is to be a load.
        {"name": "HERD_PREFIX_CACHE", "value": "false"},
    ]});
    object
}

fn request(prompt: &str, max_tokens: u32, seed: u64) -> GenerateRequest {
    GenerateRequest {
        model: NAME.to_owned(),
        input: Some(Input::Text(prompt.to_owned())),
        sampling: Some(Sampling {
            max_tokens: Some(max_tokens),
            temperature: Some(0.8),
            seed: Some(seed),
            ignore_eos: true,
            ..Sampling::default()
        }),
        n: 1,
        ..GenerateRequest::default()
    }
}

fn long_prompts() -> Vec<GenerateRequest> {
    let prompt =
        |seed| format!("{seed}. {}", "The sea was calm, and the ship went on to the north. ".repeat(80));
    (1..=3).map(|seed| request(&prompt(seed), 2, seed)).collect()
}

fn long_answers() -> Vec<GenerateRequest> {
    (1..=MAX_SEQUENCES).map(|seed| request("Once upon a time, by the sea,", 200, seed)).collect()
}

/// With what `herd serve` answers, which has no cluster.
fn golden(fleet: &Fleet, requests: Vec<GenerateRequest>) -> Result<Vec<Golden>> {
    let environment = fleet.environment();
    let model = environment.models.join("smollm2-135m-fbgemm-fp8");
    let serve = Serve::start(&environment.herd, &model, NAME, &["--tensor", "3", "--unified", "1"])?;
    let answered = |request: GenerateRequest| {
        let answer = fleet.ask_at(serve.grpc(), &request)?;
        Ok((request, answer))
    };
    requests.into_iter().map(answered).collect()
}

fn replicas(kubectl: &Kubectl, pool: &str) -> Result<Option<i64>> {
    Ok(kubectl.get(&format!("llamapool/{pool}"))?["spec"]["replicas"].as_i64())
}

/// Waits until the autoscaler wants so many gangs, and they are all there is.
fn scaled(kubectl: &Kubectl, pool: &str, gangs: i64) -> Result<()> {
    kubectl.watch(&format!("llamapool/{pool}"), SCALED_WITHIN, |seen| {
        ensure!(seen["spec"]["replicas"] == gangs, "{}", seen["spec"]);
        Ok(())
    })?;
    settled(kubectl, pool, gangs)
}

fn operator_page(fleet: &Fleet, path: &str) -> Result<String> {
    let pod = fleet.system_pod("operator")?;
    let ip = pod["status"]["podIP"].as_str().context("the operator has no address")?;
    get(&format!("{ip}:8080"), path)
}

/// Waits until the autoscaler has tried so often more.
fn rounds(fleet: &Fleet, outcome: &str) -> Result<()> {
    let count = || {
        let page = operator_page(fleet, "/metrics")?;
        metric(&page, "herd_autoscaler_queries_total", outcome).context("no such metric")
    };
    let until = count()? + ROUNDS;
    eventually("more rounds of the autoscaler", SCALED_WITHIN, || {
        let now = count()?;
        ensure!(now >= until, "{now} of {until}");
        Ok(())
    })
}

/// Prometheus with no replica, until this is dropped.
struct Stopped(Kubectl);

impl Stopped {
    fn stop(fleet: &Fleet) -> Result<Self> {
        let stopped = Self(fleet.kubectl().within("monitoring"));
        stopped.scale(0)?;
        eventually("Prometheus to be gone", READY_WITHIN, || {
            let pods = stopped.0.list("pods", "app.kubernetes.io/name=prometheus")?;
            ensure!(pods.is_empty(), "{} pods", pods.len());
            Ok(())
        })?;
        Ok(stopped)
    }

    fn scale(&self, replicas: u32) -> Result<()> {
        self.0.run(&["scale", "deployment", "prometheus", &format!("--replicas={replicas}")]).map(drop)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        if let Err(error) = self.scale(1) {
            eprintln!("cannot start Prometheus again: {error:#}");
        }
    }
}

/// One after another: a load of long prompts, one of long answers, a light one, and no Prometheus.
#[test]
fn pools_follow_their_load_and_hold_without_prometheus() -> Result<()> {
    with_fleet(|fleet| {
        let (prompts, answers) = (golden(fleet, long_prompts())?, golden(fleet, long_answers())?);
        let namespace = fleet.namespace("e2e-autoscaling")?;
        let kubectl = namespace.kubectl();
        kubectl.apply(&deployment())?;
        ready(kubectl, NAME)?;
        let object = format!("llamadeployment/{NAME}");
        wait_for(kubectl, &object, "MetricsAvailable", "True", None)?;

        let mut traffic = fleet.traffic(prompts.iter().cloned());
        scaled(kubectl, "scaled-prefill", 2)?;
        ensure!(replicas(kubectl, "scaled-decode")? == Some(1), "long prompts made decode grow");
        traffic.answers()?;
        let streams = traffic.finish()?;
        println!("long prompts: {streams} streams, none broken");
        told(kubectl, "ScaledUp", "prefill 1 -> 2: load of ")?;

        // The prefill pool has less to do now, and shrinks under these.
        let mut traffic = fleet.traffic(answers.iter().cloned());
        scaled(kubectl, "scaled-decode", 2)?;
        told(kubectl, "ScaledUp", "decode 1 -> 2: load of ")?;
        scaled(kubectl, "scaled-prefill", 1)?;
        told(kubectl, "ScaledDown", "prefill 2 -> 1: load of ")?;
        last_scale(kubectl, 1, 2)?;
        traffic.answers()?;

        // Full, and then without any load: neither moves anything without Prometheus.
        let before = kubectl.get(&object)?["status"]["lastScale"].clone();
        let stopped = Stopped::stop(fleet)?;
        let why = Some("PrometheusUnreachable");
        wait_for(kubectl, &object, "MetricsAvailable", "False", why)?;
        rounds(fleet, "error")?;
        let streams = traffic.finish()?;
        println!("long answers: {streams} streams, none broken");
        rounds(fleet, "error")?;
        ensure!(kubectl.get(&object)?["status"]["lastScale"] == before, "something was scaled");
        let held = (replicas(kubectl, "scaled-prefill")?, replicas(kubectl, "scaled-decode")?);
        ensure!(held == (Some(1), Some(2)), "{held:?}");
        drop(stopped);
        wait_for(kubectl, &object, "MetricsAvailable", "True", None)?;

        let mut traffic = fleet.traffic(answers.iter().take(2).cloned());
        scaled(kubectl, "scaled-decode", 1)?;
        told(kubectl, "ScaledDown", "decode 2 -> 1: load of ")?;
        last_scale(kubectl, 1, 1)?;
        traffic.answers()?;
        let streams = traffic.finish()?;
        println!("few answers: {streams} streams, none broken");

        let log: Value =
            serde_json::from_str(&operator_page(fleet, &format!("/autoscaler/log/e2e-autoscaling/{NAME}"))?)?;
        let entries = log["entries"].as_array().context("no entries")?;
        ensure!(entries.iter().any(|entry| entry["decision"]["pools"][1]["from"] == 2), "{}", entries.len());
        Ok(())
    })
}

/// Waits until an Event has told of it.
fn told(kubectl: &Kubectl, reason: &str, words: &str) -> Result<()> {
    eventually("an event", READY_WITHIN, || {
        let events = kubectl.list("events.events.k8s.io", "")?;
        let note = |event: &Value| event["note"].as_str().unwrap_or_default().to_owned();
        let told = events.iter().any(|event| event["reason"] == reason && note(event).starts_with(words));
        ensure!(told, "no {reason} {words:?} among {:?}", events.iter().map(note).collect::<Vec<_>>());
        Ok(())
    })
}

/// Waits until the status tells of the last change.
fn last_scale(kubectl: &Kubectl, prefill: i64, decode: i64) -> Result<()> {
    kubectl.watch(&format!("llamadeployment/{NAME}"), READY_WITHIN, |seen| {
        let last = &seen["status"]["lastScale"];
        ensure!(last["prefill"] == prefill && last["decode"] == decode, "{last}");
        ensure!(last["reason"].as_str().is_some_and(|reason| reason.contains("load of ")), "{last}");
        Ok(())
    })
}

/// A real HorizontalPodAutoscaler. It has no metrics here, so that its own bounds are all it goes by.
#[test]
fn a_horizontal_pod_autoscaler_scales_where_the_mode_is_external() -> Result<()> {
    with_fleet(|fleet| {
        let namespace = fleet.namespace("e2e-hpa")?;
        let kubectl = namespace.kubectl();
        let mut object = apart("external");
        object["spec"]["autoscaling"] = json!({"mode": "External"});
        kubectl.apply(&object)?;
        ready(kubectl, "external")?;
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/manifests/hpa.yaml");
        let manifest = manifest.to_str().context("a path that is no text")?;
        kubectl.run(&["apply", "--filename", manifest])?;
        let bounds = |min: i64, max: i64| {
            let patch = json!({"spec": {"minReplicas": min, "maxReplicas": max}}).to_string();
            kubectl.run(&["patch", "hpa", "external-decode", "--type=merge", &format!("--patch={patch}")])
        };
        bounds(2, 2)?;
        scaled(kubectl, "external-decode", 2)?;
        let pool =
            kubectl.run(&["get", "llamapool/external-decode", "--show-managed-fields", "--output=json"])?;
        let pool: Value = serde_json::from_str(&pool)?;
        let managers = pool["metadata"]["managedFields"].as_array().context("no managers")?;
        let scales = |of: &&Value| !of["fieldsV1"]["f:spec"]["f:replicas"].is_null();
        let scalers: Vec<&Value> = managers.iter().filter(scales).collect();
        let by_scale = scalers.iter().all(|of| of["subresource"] == "scale");
        ensure!(by_scale && !scalers.is_empty(), "{managers:?}");
        let wait = ["wait", "--for=condition=AbleToScale", "hpa/external-decode", "--timeout=60s"];
        kubectl.run(&wait)?;
        bounds(1, 1)?;
        scaled(kubectl, "external-decode", 1)?;
        // The operator has nothing to say about it.
        let status = &kubectl.get("llamadeployment/external")?["status"];
        ensure!(condition_is_absent(status, "MetricsAvailable"), "{status}");
        ensure!(status["lastScale"].is_null(), "{status}");
        let overview: Value = serde_json::from_str(&operator_page(fleet, "/autoscaler/log")?)?;
        let listed = overview.as_array().context("no list")?.iter().any(|one| one["name"] == "external");
        ensure!(!listed, "{overview}");
        Ok(())
    })
}

fn condition_is_absent(status: &Value, type_: &str) -> bool {
    status["conditions"].as_array().into_iter().flatten().all(|condition| condition["type"] != type_)
}
