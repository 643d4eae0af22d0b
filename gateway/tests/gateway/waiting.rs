//! A request whose model has no gang at the moment.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use herd_gateway::{Discovery, FleetSnapshot, GangEndpoint, Limits};
use herd_proto::internal::v1::{DecodeRequest, Phase};
use serde_json::json;
use tokio::sync::watch;
use tonic::{Code, Status};

use crate::grpc::text;
use crate::support::http::{Answer, head, send};
use crate::support::scripted::{self, leader, says};
use crate::support::{Running, endpoint, gateway_of, gateway_with, soon};

const COMPLETIONS: &str = "/v1/completions";
const WAITING: &str = "herd_gateway_requests_waiting_for_gang{model=\"tiny\"}";

/// A fleet that serves `tiny`, with gangs or without.
struct Told(watch::Sender<Option<FleetSnapshot>>);

impl Told {
    fn new() -> Self {
        Self(watch::Sender::new(Some(Self::snapshot(Vec::new()))))
    }

    fn snapshot(gangs: Vec<GangEndpoint>) -> FleetSnapshot {
        FleetSnapshot { models: ["tiny".to_owned()].into(), gangs, doubted: Vec::new() }
    }

    fn set(&self, leaders: &[&str]) {
        self.0.send_replace(Some(Self::snapshot(leaders.iter().map(|leader| endpoint(leader)).collect())));
    }
}

impl Discovery for Told {
    fn watch(&self) -> watch::Receiver<Option<FleetSnapshot>> {
        self.0.subscribe()
    }
}

/// Long enough that a test which waits for its end has failed.
fn patient() -> Limits {
    Limits { gang_wait: Duration::from_hours(1), ..Limits::default() }
}

async fn ask<F>(running: &Running<F>) -> Answer {
    running.post(COMPLETIONS, &json!({"model": "tiny", "prompt": "x"})).await
}

async fn ready_gangs<F>(running: &Running<F>) -> serde_json::Value {
    running.get("/v1/models/tiny").await.json()["ready_gangs"].clone()
}

async fn waiting<F>(running: &Running<F>, so_many: f64) {
    counted(running, WAITING, so_many).await;
}

async fn counted<F>(running: &Running<F>, metric: &str, so_many: f64) {
    soon(async { while (running.metric(metric).await - so_many).abs() > 0.1 {} }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_waits_for_a_gang_and_is_answered() {
    let running = gateway_of(Told::new(), patient(), None).await;
    let worker = leader(says("yes")).start().await;
    let (answer, ()) = tokio::join!(ask(&running), async {
        waiting(&running, 1.0).await;
        // A change that brings no gang does not end the wait.
        running.fleet.set(&[]);
        running.fleet.set(&[&worker.address]);
    });
    assert_eq!(answer.json()["choices"][0]["text"], "yes");
    waiting(&running, 0.0).await;
    assert_eq!(
        running.post(COMPLETIONS, &json!({"model": "tin", "prompt": "x"})).await.status,
        404,
        "nobody waits for what does not exist"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fleet_that_is_not_known_yet_is_waited_for() {
    let running = gateway_of(Told(watch::Sender::new(None)), patient(), None).await;
    let unknown = json!({"model": "tin", "prompt": "x"});
    let (answer, ()) = tokio::join!(running.post(COMPLETIONS, &unknown), async {
        // Until the fleet is known, a name is whatever a client says.
        counted(&running, "herd_gateway_requests_waiting_for_gang{model=\"(other)\"}", 1.0).await;
        running.fleet.set(&[]);
    });
    answer.refusal(404);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wait_ends_with_patience_or_the_deadline() {
    let limits = Limits { gang_wait: Duration::from_millis(20), ..Limits::default() };
    let running = gateway_of(Told::new(), limits, None).await;
    let (_, message) = soon(ask(&running)).await.refusal(503);
    assert_eq!(message, "model \"tiny\": no gang is ready");

    let limits = Limits { request_deadline: Duration::from_millis(20), ..patient() };
    let running = gateway_of(Told::new(), limits, None).await;
    soon(ask(&running)).await.refusal(504);
    let status = soon(running.grpc().await.generate(text("x"))).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    waiting(&running, 0.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_stops_waiting_and_a_gateway_that_is_full_takes_no_more() {
    let limits = Limits { concurrent_requests: 1, ..patient() };
    let running = gateway_of(Told::new(), limits, None).await;
    let body = serde_json::to_vec(&json!({"model": "tiny", "prompt": "x"})).unwrap();
    let connection = send(running.gateway.addresses().http, "POST", COMPLETIONS, &[], &body).await;
    waiting(&running, 1.0).await;
    ask(&running).await.refusal(429);
    drop(connection);
    waiting(&running, 0.0).await;
    let connection = send(running.gateway.addresses().http, "POST", COMPLETIONS, &[], &body).await;
    waiting(&running, 1.0).await;
    let worker = leader(says("yes")).start().await;
    running.fleet.set(&[&worker.address]);
    assert_eq!(head(connection).await.rest().await.status, 200, "the slot came back");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_gang_is_not_waited_for() {
    // Full as it reports itself.
    let worker = leader(says("yes")).start().await;
    let running = gateway_with(&[&worker.address], Limits { queue_per_gang: 0, ..patient() }).await;
    worker.watch.send_modify(|event| event.load.as_mut().unwrap().waiting = 8);
    soon(async { while ask(&running).await.status != 429 {} }).await;
    // Full as it says when asked, also where another one is away.
    let full = leader(|_| Err(Status::resource_exhausted("full"))).start().await;
    let broken = leader(|_| Err(Status::unavailable("transport"))).start().await;
    for leaders in [vec![&full.address], vec![&full.address, &broken.address]] {
        let running = gateway_with(&leaders, patient()).await;
        let answer = soon(ask(&running)).await;
        assert!([429, 503].contains(&answer.status), "{}", answer.text());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gang_that_restarts_in_place_is_waited_for() {
    let dying = leader(|_| Err(Status::unavailable("the connection broke"))).start().await;
    let address = dying.address.clone();
    let running = gateway_with(&[&address], patient()).await;
    let (answer, again) = tokio::join!(ask(&running), async {
        waiting(&running, 1.0).await;
        drop(dying);
        soon(async { while ready_gangs(&running).await != 0 {} }).await;
        let again = leader(says("again")).with(|description| description.epoch = 8);
        again.start_at(address.parse().unwrap()).await
    });
    assert_eq!(answer.json()["choices"][0]["text"], "again");
    let context = again.calls()[0].context.clone().unwrap();
    assert_eq!((context.gang_epoch, context.attempt), (8, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn where_every_gang_drains_the_next_one_is_waited_for() {
    let draining = leader(|_| Err(Status::unavailable("draining, not started"))).start().await;
    let next = leader(says("next")).start().await;
    let running = gateway_with(&[&draining.address], patient()).await;
    let (answer, ()) = tokio::join!(ask(&running), async {
        waiting(&running, 1.0).await;
        running.fleet.set(vec![endpoint(&draining.address), endpoint(&next.address)]);
    });
    assert_eq!(answer.json()["choices"][0]["text"], "next");
    // Also before anything was tried.
    next.phase(Phase::Draining);
    soon(async { while ready_gangs(&running).await != 0 {} }).await;
    let (answer, ()) = tokio::join!(ask(&running), async {
        waiting(&running, 1.0).await;
        next.phase(Phase::Ready);
    });
    assert_eq!(answer.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_begun_to_answer_is_not_waited_for() {
    let once = AtomicBool::new(false);
    let dies = leader(move |_: DecodeRequest| {
        assert!(!once.swap(true, Ordering::SeqCst), "it was run again");
        Ok(scripted::all([Ok(scripted::tokens(0, &[40], 0)), Err(Status::unavailable("gone"))]))
    });
    let dies = dies.start().await;
    let limits = Limits { resume_wait: Duration::ZERO, ..patient() };
    let running = gateway_with(&[&dies.address], limits).await;
    let (_, message) = soon(ask(&running)).await.refusal(500);
    assert!(message.contains("after 1 tokens"), "{message}");
}
