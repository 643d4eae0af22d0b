//! Full, draining, broken: who is asked next, and what the client hears.

use std::sync::Mutex;
use std::time::Duration;

use herd_gateway::Limits;
use herd_proto::internal::v1::finished::Reason;
use herd_proto::internal::v1::{DecodeRequest, Phase};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tonic::{Code, Status};

use crate::grpc::text;
use crate::support::http::Answer;
use crate::support::scripted::{
    self, Events, Leader, Scripted, all, finished, leader, says, started, tokens,
};
use crate::support::{Running, gateway, gateway_with, soon};

const COMPLETIONS: &str = "/v1/completions";

async fn ask(running: &Running) -> Answer {
    running.post(COMPLETIONS, &json!({"model": "tiny", "prompt": "x"})).await
}

fn refusing(status: Status) -> Leader {
    leader(move |_| Err(status.clone()))
}

/// Two gangs; the first one is always asked first, the other says "yes".
async fn beside_a_good_one(first: Leader) -> (Scripted, Scripted, Running) {
    let first = first.start().await;
    let good = leader(says("yes")).start().await;
    good.watch.send_modify(|event| event.load.as_mut().unwrap().running = 1);
    let running = gateway(&[&first.address, &good.address]).await;
    (first, good, running)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_gang_refuses_another_answers() {
    let full = Status::resource_exhausted("full");
    let draining = Status::unavailable("draining, not started");
    let other_epoch = Status::failed_precondition("gang_epoch is 7, this gang's is 8");
    for status in [full, draining, other_epoch] {
        let (first, good, running) = beside_a_good_one(refusing(status.clone())).await;
        assert_eq!(ask(&running).await.json()["choices"][0]["text"], "yes", "{status:?}");
        assert_eq!((first.calls().len(), good.calls().len()), (1, 1), "{status:?}");
        assert_eq!(good.calls()[0].context.as_ref().unwrap().attempt, 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gang_that_dies_before_its_first_token_is_replaced() {
    // The stream breaks off after Started.
    let (first, good, running) = beside_a_good_one(leader(|_| Ok(all([Ok(started())])))).await;
    let answer = running.post(COMPLETIONS, &json!({"model": "tiny", "prompt": "x", "stream": true})).await;
    let text: String =
        answer.chunks().iter().filter_map(|c| c["choices"][0]["text"].as_str().map(str::to_owned)).collect();
    assert_eq!(text, "yes");
    assert_eq!((first.calls().len(), good.calls().len()), (1, 1));
    assert!((running.metric("herd_gateway_retries_total{reason=\"unavailable\"}").await - 1.0).abs() < 0.1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gang_that_cannot_be_reached_is_replaced_and_not_asked_for_every_request() {
    let (first, good, running) = beside_a_good_one(refusing(Status::unavailable("transport"))).await;
    for _ in 0..3 {
        assert_eq!(ask(&running).await.status, 200);
    }
    assert_eq!(first.calls().len(), 1, "it failed once and is left alone for a while");
    assert_eq!(good.calls().len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_breaks_at_one_gang_would_break_at_another() {
    for status in [Status::internal("broke"), Status::unknown("broke")] {
        let (first, good, running) = beside_a_good_one(refusing(status)).await;
        ask(&running).await.refusal(500);
        assert_eq!((first.calls().len(), good.calls().len()), (1, 0));
    }
}

/// A gang that says these tokens and is lost.
fn dies_after(said: &'static [u32]) -> Leader {
    leader(move |_: DecodeRequest| Ok(all([Ok(tokens(0, said, 0)), Err(Status::unavailable("gone"))])))
}

#[tokio::test(flavor = "multi_thread")]
async fn after_tokens_another_gang_is_asked_for_what_is_left() {
    let first = dies_after(&[40, 41]).start().await;
    let good = leader(|_| Ok(all([Ok(tokens(2, &[42], 0)), Ok(finished(Reason::Length, 0))]))).start().await;
    good.watch.send_modify(|event| event.load.as_mut().unwrap().running = 1);
    let running = gateway(&[&first.address, &good.address]).await;
    let body = json!({"model": "tiny", "prompt": [7, 8], "max_tokens": 3, "return_token_ids": true});
    let answer = running.post(COMPLETIONS, &body).await.json();
    assert_eq!(answer["choices"][0]["token_ids"], json!([40, 41, 42]));
    assert_eq!(answer["usage"]["completion_tokens"], 3);
    let call = &good.calls()[0];
    let sampling = call.sampling.as_ref().unwrap();
    assert_eq!(call.prompt, [7, 8, 40, 41]);
    assert_eq!((sampling.first_position, sampling.max_tokens), (2, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gang_that_is_lost_after_the_last_token_is_not_replaced() {
    // All that were asked for, or one that ends the text.
    for (said, more, reason) in
        [(&[40, 41][..], json!({"max_tokens": 2}), "length"), (&[40, 1016], json!({"max_tokens": 9}), "stop")]
    {
        let (first, good, running) = beside_a_good_one(dies_after(said)).await;
        let mut body = json!({"model": "tiny", "prompt": "x"});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        assert_eq!(running.post(COMPLETIONS, &body).await.json()["choices"][0]["finish_reason"], reason);
        assert_eq!((first.calls().len(), good.calls().len()), (1, 0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn gangs_that_are_lost_over_and_over_are_not_asked_for_ever() {
    // Says one more token each time it is asked.
    let dies = || {
        leader(|call: DecodeRequest| {
            let at = call.sampling.unwrap().first_position;
            Ok(all([Ok(tokens(at, &[40], 0)), Err(Status::unavailable("gone"))]))
        })
    };
    let (first, second) = (dies().start().await, dies().start().await);
    let limits = Limits { resumes: 1, resume_wait: Duration::ZERO, ..Limits::default() };
    let running = gateway_with(&[&first.address, &second.address], limits).await;
    let (_, message) = ask(&running).await.refusal(500);
    assert!(message.contains("after 2 tokens"), "{message}");
    assert_eq!(first.calls().len() + second.calls().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn all_full_is_429_with_a_hint_and_none_left_is_503_without() {
    let mut full = Status::resource_exhausted("the queue is full");
    full.metadata_mut().insert("retry-after-ms", "2500".parse().unwrap());
    let one = refusing(full.clone()).start().await;
    let two = refusing(full).start().await;
    let running = gateway(&[&one.address, &two.address]).await;
    let answer = ask(&running).await;
    answer.refusal(429);
    assert_eq!(answer.headers["retry-after"], "3", "rounded up to whole seconds");
    assert_eq!((one.calls().len(), two.calls().len()), (1, 1), "each is asked once");
    let status = running.grpc().await.generate(text("x")).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(!status.details().is_empty(), "google.rpc.RetryInfo");

    let draining = refusing(Status::unavailable("draining, not started")).start().await;
    let running = gateway(&[&draining.address]).await;
    let answer = ask(&running).await;
    answer.refusal(503);
    assert!(!answer.headers.contains_key("retry-after"));
    ask(&running).await.refusal(503);
    assert_eq!(draining.calls().len(), 1, "it said that it drains");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fleet_that_reports_itself_full_or_draining_is_not_asked() {
    let worker = leader(says("yes")).start().await;
    let limits = Limits { queue_per_gang: 0, ..Limits::default() };
    let running = gateway_with(&[&worker.address], limits).await;
    let until = async |status: u16| {
        soon(async { while ask(&running).await.status != status {} }).await;
    };
    worker.watch.send_modify(|event| event.load.as_mut().unwrap().waiting = 8);
    until(429).await;
    worker.watch.send_modify(|event| event.load.as_mut().unwrap().waiting = 0);
    until(200).await;
    worker.phase(Phase::Draining);
    until(503).await;
    worker.phase(Phase::Ready);
    until(200).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_gateway_takes_so_many_requests_at_once() {
    let (hold, mut held) = mpsc::unbounded_channel();
    let worker = leader(move |_| {
        let (sender, receiver) = mpsc::channel(4);
        hold.send(sender).unwrap();
        Ok(receiver)
    });
    let worker = worker.start().await;
    let running =
        gateway_with(&[&worker.address], Limits { concurrent_requests: 1, ..Limits::default() }).await;
    let first = ask(&running);
    let (first, ()) = tokio::join!(first, async {
        let sender = soon(held.recv()).await.unwrap();
        let answer = ask(&running).await;
        answer.refusal(429);
        assert_eq!(answer.headers["retry-after"], "1");
        let status = running.grpc().await.generate(text("x")).await.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted);
        sender.send(Ok(tokens(0, &[40], 0))).await.unwrap();
        sender.send(Ok(finished(Reason::Length, 0))).await.unwrap();
    });
    assert_eq!(first.status, 200);
    assert!(
        (running.metric("herd_gateway_requests_total{api=\"completions\",outcome=\"busy\"}").await - 1.0)
            .abs()
            < 0.1
    );
    assert!(running.metric("herd_gateway_requests_in_flight").await.abs() < 0.1, "each ended");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefill_gang_at_fault_is_the_one_that_is_left_alone() {
    let decode = |says: &'static str, bad: Mutex<Option<String>>| {
        let answer = scripted::says(says);
        leader(move |request: DecodeRequest| -> Result<Events, Status> {
            let bad = bad.lock().unwrap().clone();
            match bad {
                Some(bad) if bad == request.prefill_peer => {
                    Err(Status::unavailable(format!("prefill at {bad}: draining, not started (Unavailable)")))
                }
                _ => answer(request),
            }
        })
        .with(|description| description.role = herd_proto::internal::v1::Role::Decode.into())
    };
    let prefill = || {
        leader(scripted::says("never"))
            .with(|description| description.role = herd_proto::internal::v1::Role::Prefill.into())
    };
    let (one, two) = (prefill().start().await, prefill().start().await);
    let decode = decode("yes", Mutex::new(Some(one.address.clone()))).start().await;
    let running = gateway(&[&one.address, &two.address, &decode.address]).await;
    for _ in 0..4 {
        assert_eq!(ask(&running).await.json()["choices"][0]["text"], Value::from("yes"));
    }
    let peers: Vec<_> = decode.calls().into_iter().map(|call| call.prefill_peer).collect();
    assert!(peers.iter().filter(|peer| **peer == one.address).count() <= 1, "{peers:?}");
    assert!(one.calls().is_empty() && two.calls().is_empty(), "only decode gangs are called");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gang_that_refuses_after_started_is_still_a_status_and_blamed_for_nothing() {
    for (said, code, http) in [
        ("prefill at 10.0.0.1:1: the queue is full", Code::ResourceExhausted, 429),
        ("no KV blocks", Code::ResourceExhausted, 429),
        ("aborted: this gang was drained", Code::Unavailable, 503),
    ] {
        let late = move |_: DecodeRequest| {
            let mut status = Status::new(code, said);
            status.metadata_mut().insert("retry-after-ms", "2500".parse().unwrap());
            Ok(all([Ok(started()), Err(status)]))
        };
        let worker = leader(late).start().await;
        for stream in [false, true] {
            let running = gateway(&[&worker.address]).await;
            let body = json!({"model": "tiny", "prompt": "x", "stream": stream});
            let answer = running.post(COMPLETIONS, &body).await;
            answer.refusal(http);
            assert_eq!(answer.headers.get("retry-after").map(String::as_str), (http == 429).then_some("3"));
        }
        let running = gateway(&[&worker.address]).await;
        assert_eq!(running.grpc().await.generate(text("x")).await.unwrap_err().code(), code);

        let (first, good, running) = beside_a_good_one(leader(late)).await;
        for _ in 0..2 {
            assert_eq!(ask(&running).await.json()["choices"][0]["text"], "yes");
        }
        let asked = if http == 429 { 2 } else { 1 };
        assert_eq!((first.calls().len(), good.calls().len()), (asked, 2), "{said}");
    }
}
