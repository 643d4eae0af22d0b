//! Decisions of a whole operator: what it asks, what it writes, what it says.

use std::sync::Arc;
use std::time::Duration;

use herd_api::condition::{self, reason};
use herd_api::{LlamaDeployment, LlamaPool};
use herd_control::autoscale::{Policy, Recording};
use k8s_openapi::jiff::Timestamp;
use kube::core::DeserializeGuard;
use kube::runtime::{reflector, watcher};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::fake::{FakeApi, FakePrometheus, Mode, idle};
use super::prometheus::{Limits, Prometheus};
use super::queries::Queries;
use super::verdicts::Verdict;
use super::{Autoscaler, Logs};
use crate::context::Context;
use crate::controllers::Watched;

/// Longer than any test takes on a busy machine.
const PATIENCE: Duration = Duration::from_mins(1);

const POLICY: Policy =
    Policy { interval_ms: 5_000, scrape_interval_ms: 5_000, up_after_ms: 10_000, down_window_ms: 60_000 };

/// As they are watched.
type Objects = (Vec<Arc<Watched<LlamaDeployment>>>, Vec<Arc<Watched<LlamaPool>>>);

struct World {
    api: FakeApi,
    prometheus: FakePrometheus,
    context: Context,
    autoscaler: Autoscaler,
    heard: mpsc::Receiver<()>,
    second: i64,
}

impl World {
    async fn start() -> Self {
        let (api, prometheus) = (FakeApi::start().await, FakePrometheus::start().await);
        let (autoscaler, heard) = autoscaler(Some(prometheus.client()));
        Self { context: api.context(), api, prometheus, autoscaler, heard, second: 1_800_000_000 }
    }

    /// Gangs that are wanted are Ready, and Prometheus knows them.
    fn settle(&self) {
        let mut pods = Vec::new();
        self.api.change(|seen| {
            for (name, pool) in &mut seen.pools {
                let replicas = pool["spec"]["replicas"].as_i64().unwrap();
                let id = |gang: i64| format!("{}{gang}", &name[2..3]);
                let gang = |gang| json!({"id": id(gang), "revision": "r", "phase": "Ready", "restarts": 0});
                pods.extend((0..replicas).map(|gang| format!("m-{}-0", id(gang))));
                pool["status"] = json!({"replicas": replicas, "readyReplicas": replicas, "draining": 0,
                    "selector": "", "gangs": (0..replicas).map(gang).collect::<Vec<Value>>()});
            }
        });
        let mut known = self.prometheus.known();
        known.pods.retain(|pod, _| pods.contains(pod));
        for pod in pods {
            known.pods.entry(pod).or_insert_with(idle);
        }
    }

    /// A metric of all gangs of a role.
    fn set(&self, role: &str, metric: &'static str, value: &'static str) {
        let prefix = format!("m-{}", &role[..1]);
        let mut known = self.prometheus.known();
        let pods = known.pods.iter_mut().filter(|(pod, _)| pod.starts_with(&prefix));
        for (_, series) in pods {
            series.insert(metric, value);
        }
    }

    async fn tick(&mut self) {
        let (deployments, pools) = self.objects();
        let now = Timestamp::from_second(self.second).unwrap();
        self.prometheus.known().now = self.second as f64;
        self.autoscaler.tick(&self.context, &deployments, &pools, now).await;
        self.second += 5;
    }

    fn objects(&self) -> Objects {
        self.api.look(|seen| {
            let deployment = serde_json::from_value(seen.deployment.clone()).unwrap();
            let pools = seen.pools.values().map(|pool| serde_json::from_value(pool.clone()).unwrap());
            let pools = pools.map(|pool| Arc::new(DeserializeGuard(Ok(pool)))).collect();
            (vec![Arc::new(DeserializeGuard(Ok(deployment)))], pools)
        })
    }

    /// So many seconds, in which gangs that are wanted become Ready.
    async fn run(&mut self, seconds: i64) {
        for _ in 0..seconds / 5 {
            self.settle();
            self.tick().await;
        }
    }

    fn writes(&self) -> Vec<String> {
        let mut writes = Vec::new();
        self.api.change(|seen| writes = std::mem::take(&mut seen.writes));
        writes
    }

    fn verdict(&self) -> Verdict {
        self.context.verdicts.get("u")
    }

    /// Status and reason of the condition.
    fn metrics(&self) -> (Option<bool>, String) {
        let state = self.verdict().metrics.unwrap();
        assert_eq!(state.type_, condition::METRICS_AVAILABLE);
        (state.status, state.reason)
    }

    /// Two decode gangs, of which one is too many; long enough for new gangs to have samples.
    async fn with_a_gang_too_many() -> Self {
        let mut world = Self::start().await;
        world.api.change(|seen| seen.pools.get_mut("m-decode").unwrap()["spec"]["replicas"] = json!(2));
        world.run(50).await;
        assert_eq!(world.writes(), [""; 0]);
        world
    }
}

fn autoscaler(prometheus: Option<Prometheus>) -> (Autoscaler, mpsc::Receiver<()>) {
    let (news, heard) = mpsc::channel(1);
    let queries = Queries::new(None, POLICY.rate_window_ms());
    (Autoscaler { prometheus, queries, policy: POLICY, logs: Logs::default(), news }, heard)
}

#[tokio::test]
async fn load_adds_a_gang_and_says_so_everywhere() {
    let mut world = World::start().await;
    world.settle();
    world.set("decode", "herd_requests_running", "100");
    world.set("decode", "herd_requests_waiting", "20");
    world.run(25).await;
    assert_eq!(world.writes(), ["m-decode 2 by herd-scale"]);
    let last = world.verdict().last_scale.unwrap();
    assert_eq!((last.prefill, last.decode, last.unified), (Some(1), Some(2), None));
    let told = "decode 1 -> 2: load of 1.20 gangs: 100 sequences run and 20 wait, a gang has room for 100";
    assert!(last.reason.starts_with(told), "{}", last.reason);
    let events = world.api.look(|seen| seen.events.clone());
    assert_eq!(events, [("ScaledUp".to_owned(), last.reason)]);
    assert_eq!(world.metrics(), (Some(true), reason::AS_EXPECTED.to_owned()));
    let page = world.context.metrics.render().unwrap();
    for line in [
        "herd_autoscaler_decisions_total{direction=\"up\"} 1",
        "herd_autoscaler_replicas{role=\"decode\"} 2",
        "herd_autoscaler_queries_total{outcome=\"error\"} 0",
    ] {
        assert!(page.contains(line), "{line} is not in {page}");
    }
    assert!(world.heard.try_recv().is_ok());
}

#[tokio::test]
async fn long_prompts_add_prefill_gangs() {
    let mut world = World::start().await;
    world.settle();
    for (metric, value) in [
        ("herd_prompt_tokens_total", "980.5"),
        ("herd_step_seconds_count", "2"),
        ("herd_step_seconds_sum", "0.98"),
    ] {
        world.set("prefill", metric, value);
    }
    world.run(25).await;
    assert_eq!(world.writes(), ["m-prefill 2 by herd-scale"]);
    // Each change is told with its own numbers.
    world.set("decode", "herd_requests_running", "100");
    world.set("decode", "herd_requests_waiting", "20");
    world.run(25).await;
    assert_eq!(world.writes(), ["m-decode 2 by herd-scale"]);
    let events = world.api.look(|seen| seen.events.clone());
    let told = ["prefill 1 -> 2: ", "decode 1 -> 2: "];
    assert_eq!(events.len(), told.len(), "{events:?}");
    for ((reason, note), told) in events.iter().zip(told) {
        assert!(reason == "ScaledUp" && note.starts_with(told), "{events:?}");
    }
}

#[tokio::test]
async fn a_gang_too_many_goes_after_a_window() {
    let mut world = World::with_a_gang_too_many().await;
    world.run(15).await;
    assert_eq!(world.writes(), ["m-decode 1 by herd-scale"]);
    assert_eq!(world.verdict().last_scale.unwrap().decode, Some(1));
    world.run(300).await;
    assert_eq!(world.writes(), [""; 0]);
    // A constant state is no news.
    while world.heard.try_recv().is_ok() {}
    world.run(50).await;
    assert!(world.heard.try_recv().is_err());
}

#[tokio::test]
async fn without_whole_data_nothing_goes() {
    type Spoil = fn(&mut World);
    let unreachable: [(&str, Spoil); 6] = [
        ("answers 503: it starts", |world| world.prometheus.known().mode = Mode::Failing),
        ("answers what is no vector: <html>", |world| world.prometheus.known().mode = Mode::Garbage),
        ("answers what is no vector: ", |world| world.prometheus.known().mode = Mode::Scalar),
        ("answers what is no vector: ", |world| world.prometheus.known().mode = Mode::Broken),
        ("is longer than 4194304 bytes", |world| world.prometheus.known().mode = Mode::Huge),
        ("gave no answer in 20ms", |world| {
            world.prometheus.known().mode = Mode::Silent;
            let limits = Limits { deadline: Duration::from_millis(20), bytes: 1 << 20 };
            world.autoscaler.prometheus = Some(world.prometheus.client().within(limits));
        }),
    ];
    for (message, spoil) in unreachable {
        let mut world = World::with_a_gang_too_many().await;
        spoil(&mut world);
        world.run(120).await;
        assert_eq!(world.writes(), [""; 0], "{message}");
        assert_eq!(world.metrics(), (Some(false), reason::PROMETHEUS_UNREACHABLE.to_owned()));
        let said = world.verdict().metrics.unwrap().message;
        assert!(said.contains(message), "{said}");
    }
    let known: [(&str, Spoil); 8] = [
        (reason::STALE_DATA, |world| world.prometheus.known().age = 13.0),
        (reason::NO_DATA, |world| world.prometheus.known().age = -1.0),
        (reason::NO_DATA, |world| {
            world.prometheus.known().pods.values_mut().for_each(std::collections::BTreeMap::clear);
        }),
        (reason::PARTIAL_DATA, |world| {
            world.prometheus.known().pods.get_mut("m-d1-0").unwrap().remove("herd_step_seconds_sum");
        }),
        (reason::PARTIAL_DATA, |world| world.set("decode", "herd_requests_running", "NaN")),
        (reason::PARTIAL_DATA, |world| world.set("decode", "herd_requests_running", "-1")),
        (reason::PARTIAL_DATA, |world| world.set("decode", "herd_kv_blocks_used", "+Inf")),
        (reason::PARTIAL_DATA, |world| world.set("decode", "herd_waiting_prompt_tokens", "1e300")),
    ];
    for (reason, spoil) in known {
        let mut world = World::with_a_gang_too_many().await;
        spoil(&mut world);
        world.run(120).await;
        assert_eq!(world.writes(), [""; 0], "{reason}");
        assert_eq!(world.metrics(), (Some(false), reason.to_owned()));
    }
    // Nobody listens there any more.
    let mut world = World::with_a_gang_too_many().await;
    world.prometheus = FakePrometheus::start().await;
    let gone = FakePrometheus::start().await.client();
    world.autoscaler.prometheus = Some(gone);
    world.run(120).await;
    assert_eq!(world.writes(), [""; 0]);
    assert_eq!(world.metrics(), (Some(false), reason::PROMETHEUS_UNREACHABLE.to_owned()));
}

#[tokio::test]
async fn others_scale_in_other_modes() {
    for mode in ["External", "Off"] {
        let mut world = World::start().await;
        world.run(5).await;
        world.prometheus.known().queries.clear();
        world.api.change(|seen| seen.deployment["spec"]["autoscaling"] = json!({"mode": mode}));
        world.set("decode", "herd_requests_running", "100");
        world.run(60).await;
        assert_eq!(world.writes(), [""; 0], "{mode}");
        assert!(world.prometheus.known().queries.is_empty());
        assert!(world.verdict().metrics.is_none());
        assert!(world.autoscaler.logs.recording("n", "m").is_none());
        // Back in the operator's hands it begins with a new window: nothing shrinks because a mode was changed.
        world.api.change(|seen| {
            seen.deployment["spec"]["autoscaling"] = json!({"mode": "SLO"});
            seen.pools.get_mut("m-decode").unwrap()["spec"]["replicas"] = json!(4);
        });
        world.set("decode", "herd_requests_running", "0");
        world.run(55).await;
        assert_eq!(world.writes(), [""; 0], "{mode}");
        world.run(15).await;
        assert_eq!(world.writes(), ["m-decode 3 by herd-scale"]);
    }
}

/// Two scalers that write in turn, each over the other.
#[tokio::test]
async fn what_somebody_else_wrote_meanwhile_is_not_written_over() {
    let mut world = World::start().await;
    world.settle();
    world.set("decode", "herd_requests_running", "100");
    world.run(10).await;
    // What the operator watches is older than what there is.
    let (deployments, pools) = world.objects();
    world.api.change(|seen| seen.pools.get_mut("m-decode").unwrap()["spec"]["replicas"] = json!(3));
    for _ in 0..4 {
        let now = Timestamp::from_second(world.second).unwrap();
        world.prometheus.known().now = world.second as f64;
        world.autoscaler.tick(&world.context, &deployments, &pools, now).await;
        world.second += 5;
    }
    assert_eq!(world.writes(), [""; 0]);
    world.api.change(|seen| {
        seen.pools.get_mut("m-decode").unwrap()["spec"]["replicas"] = json!(1);
        seen.deployment["spec"]["autoscaling"] = json!({"mode": "External"});
    });
    for _ in 0..4 {
        let now = Timestamp::from_second(world.second).unwrap();
        world.prometheus.known().now = world.second as f64;
        world.autoscaler.tick(&world.context, &deployments, &pools, now).await;
        world.second += 5;
    }
    assert_eq!(world.writes(), [""; 0]);
    assert!(world.verdict().last_scale.is_none());
    assert!(world.api.look(|seen| seen.events.is_empty()));
}

#[tokio::test]
async fn a_pool_whose_status_changes_all_the_time_is_scaled() {
    let mut world = World::start().await;
    world.settle();
    world.set("decode", "herd_requests_running", "100");
    world.api.change(|seen| seen.meddle = 2);
    world.run(25).await;
    assert_eq!(world.writes(), ["m-decode 2 by herd-scale"]);
    assert_eq!(world.api.look(|seen| seen.meddle), 0);
}

#[tokio::test]
async fn without_prometheus_it_says_so_and_leaves_pools_alone() {
    let mut world = World::start().await;
    (world.autoscaler, world.heard) = autoscaler(None);
    world.run(120).await;
    assert_eq!(world.metrics(), (Some(false), reason::PROMETHEUS_NOT_CONFIGURED.to_owned()));
    assert_eq!(world.writes(), [""; 0]);
    // Not where there is nothing to scale.
    world.api.change(|seen| {
        for role in ["prefill", "decode"] {
            seen.deployment["spec"][role] = json!({"minReplicas": 1});
        }
    });
    world.run(5).await;
    assert!(world.verdict().metrics.is_none());
}

/// Two replicas of an autoscaler disagree: one that has only just begun takes nothing away.
#[tokio::test]
async fn an_operator_that_has_just_begun_waits_a_window() {
    let mut world = World::with_a_gang_too_many().await;
    (world.autoscaler, world.heard) = autoscaler(Some(world.prometheus.client()));
    world.run(60).await;
    assert_eq!(world.writes(), [""; 0]);
    world.run(10).await;
    assert_eq!(world.writes(), ["m-decode 1 by herd-scale"]);
}

#[tokio::test]
async fn the_log_of_an_operator_leads_to_the_same_decisions() {
    let mut world = World::start().await;
    world.settle();
    world.set("decode", "herd_requests_running", "93");
    world.set("prefill", "herd_step_seconds_sum", "0.3333333333333333");
    world.run(40).await;
    world.set("decode", "herd_requests_running", "0");
    world.run(200).await;
    let changes = world.writes().len();
    assert!(changes >= 2, "{changes}");
    let text = world.autoscaler.logs.recording("n", "m").unwrap().unwrap();
    let recording: Recording = serde_json::from_str(&text).unwrap();
    assert_eq!(recording.entries.len(), 48);
    recording.replay().unwrap();
    let overview = world.autoscaler.logs.overview().unwrap();
    assert_eq!((&overview[0]["name"], &overview[0]["entries"]), (&json!("m"), &json!(48)));
    assert_eq!(overview[0]["last"]["pools"][1]["role"], "decode");
}

#[tokio::test]
async fn a_fixed_set_of_queries_is_asked_for_the_whole_fleet() {
    let mut world = World::start().await;
    world.run(5).await;
    let mut asked = std::mem::take(&mut world.prometheus.known().queries);
    asked.sort();
    assert_eq!(
        asked,
        [
            "max by (__name__, namespace, pod) ({__name__=~\"herd_waiting_prompt_tokens|herd_requests_running|\
             herd_requests_waiting|herd_sequences_limit|herd_kv_blocks|herd_kv_blocks_used\",})",
            "max by (namespace, pod) (rate(herd_prompt_tokens_total{}[20000ms]) unless \
             resets(herd_prompt_tokens_total{}[20000ms]) > 0)",
            "max by (namespace, pod) (rate(herd_step_seconds_count{}[20000ms]) unless \
             resets(herd_step_seconds_count{}[20000ms]) > 0)",
            "max by (namespace, pod) (rate(herd_step_seconds_sum{}[20000ms]) unless \
             resets(herd_step_seconds_sum{}[20000ms]) > 0)",
            "max by (namespace, pod) (timestamp(herd_kv_blocks{}))",
        ]
    );
    let of_one = format!("{:?}", Queries::new(Some("team-a"), 1));
    assert_eq!(of_one.matches("namespace=\\\"team-a\\\"").count(), 8, "{of_one}");
}

#[tokio::test]
async fn it_works_on_what_is_watched_until_it_is_stopped() {
    let world = World::start().await;
    world.settle();
    world.set("decode", "herd_requests_running", "100");
    let (deployments, pools) = world.objects();
    let (deployment_store, mut deployment_writer) = reflector::store();
    let (pool_store, mut pool_writer) = reflector::store();
    let stop = CancellationToken::new();
    let World { api, prometheus, context, mut autoscaler, .. } = world;
    autoscaler.policy = Policy { interval_ms: 5, up_after_ms: 1, ..POLICY };
    let run = tokio::spawn({
        let stop = stop.clone();
        async move { autoscaler.run(&context, deployment_store, pool_store, stop).await }
    });
    deployment_writer.apply_watcher_event(&watcher::Event::Init);
    pool_writer.apply_watcher_event(&watcher::Event::Init);
    for object in deployments {
        deployment_writer.apply_watcher_event(&watcher::Event::InitApply(Arc::unwrap_or_clone(object)));
    }
    for object in pools {
        pool_writer.apply_watcher_event(&watcher::Event::InitApply(Arc::unwrap_or_clone(object)));
    }
    assert!(prometheus.known().queries.is_empty(), "it decides before it has seen what there is");
    deployment_writer.apply_watcher_event(&watcher::Event::InitDone);
    pool_writer.apply_watcher_event(&watcher::Event::InitDone);
    let scaled = api.until(|seen| seen.writes == ["m-decode 2 by herd-scale"]);
    // Time passes for Prometheus.
    let driven = async {
        let mut ticks = tokio::time::interval(Duration::from_millis(5));
        loop {
            ticks.tick().await;
            prometheus.known().now += 1.0;
        }
    };
    tokio::select! {
        () = scaled => {}
        () = driven => {}
        () = tokio::time::sleep(PATIENCE) => panic!("nothing is written"),
    }
    stop.cancel();
    timeout(PATIENCE, run).await.expect("it ends").unwrap();
}
