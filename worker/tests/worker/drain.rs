//! Emptying a gang, and what health says meanwhile.

use std::time::Duration;

use herd_proto::internal::v1::{DrainRequest, WatchRequest};
use tonic::Code;

use crate::gangs::{Answer, Gang, fake, prompt, request, split};

async fn health(gang: &Gang) -> i32 {
    let channel = tonic::transport::Endpoint::from_shared(format!("http://{}", gang.worker.endpoint()))
        .unwrap()
        .connect()
        .await
        .unwrap();
    let mut client = tonic_health::pb::health_client::HealthClient::new(channel);
    let request = tonic_health::pb::HealthCheckRequest { service: "herd.internal.v1.Worker".to_owned() };
    client.check(request).await.unwrap().into_inner().status
}

#[tokio::test]
async fn a_drain_refuses_new_requests_and_lets_running_ones_end() {
    let gang = Gang::start(fake(1)).await;
    assert_eq!(gang.get("/healthz").await.0, 200);
    assert_eq!(gang.get("/readyz").await.0, 200);
    assert_eq!(health(&gang).await, i32::from(tonic_health::ServingStatus::Serving as u8));
    let expected = gang.answer(request(prompt(100), 20)).await.unwrap();

    gang.control.close();
    let mut running = gang.decode(request(prompt(100), 20)).await.unwrap();
    gang.held().await;
    let mut client = gang.client.clone();
    let draining = client.drain(DrainRequest { deadline_millis: 0 });
    tokio::pin!(draining);
    // Until the drain has begun.
    while gang.get("/readyz").await.0 == 200 {
        assert!(futures::poll!(&mut draining).is_pending());
    }
    let status = gang.decode(request(prompt(10), 1)).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Unavailable, "draining, not started"));
    assert_eq!(gang.get("/healthz").await.0, 200);
    assert!(futures::poll!(&mut draining).is_pending());
    gang.control.open();
    assert_eq!(Answer::read(&mut running).await.unwrap(), expected);
    assert_eq!(draining.await.unwrap().into_inner().aborted, 0);
    assert_eq!(health(&gang).await, i32::from(tonic_health::ServingStatus::NotServing as u8));
    gang.worker.shutdown().await;
}

#[tokio::test]
async fn a_drain_past_its_deadline_aborts_and_says_how_many() {
    let (prefill, decode) = (Gang::start(fake(1)).await, Gang::start(fake(1)).await);
    decode.control.close();
    let mut one = decode.decode(request(prompt(100), 20)).await.unwrap();
    let mut other = decode.decode(split(&prefill, request(prompt(100), 20))).await.unwrap();
    decode.held().await;
    assert_eq!(decode.worker.drain(Some(Duration::ZERO)).await, 2);
    for stream in [&mut one, &mut other] {
        let status = Answer::read(stream).await.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable);
        assert!(status.message().contains("drained"), "{status:?}");
    }
    decode.control.open();
    decode.idle().await;
    prefill.idle().await;
}

#[tokio::test]
async fn a_prefill_gang_that_drains_is_passed_on() {
    let (prefill, decode) = (Gang::start(fake(1)).await, Gang::start(fake(1)).await);
    prefill.worker.drain(None).await;
    let status = decode.decode(split(&prefill, request(prompt(100), 20))).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("draining, not started"), "{status:?}");
    decode.idle().await;
}

#[tokio::test]
async fn a_shutdown_waits_for_nothing_that_is_idle() {
    let (prefill, decode) = (Gang::start(fake(1)).await, Gang::start(fake(1)).await);
    // Leaves connections between the two.
    decode.answer(split(&prefill, request(prompt(100), 5))).await.unwrap();
    for gang in [decode, prefill] {
        let mut watch = gang.client.clone().watch(WatchRequest {}).await.unwrap().into_inner();
        watch.message().await.unwrap().unwrap();
        let address = format!("http://{}", gang.worker.endpoint());
        let channel = tonic::transport::Endpoint::from_shared(address).unwrap().connect().await.unwrap();
        let mut client = tonic_health::pb::health_client::HealthClient::new(channel);
        let service = "herd.internal.v1.Worker".to_owned();
        let request = tonic_health::pb::HealthCheckRequest { service };
        let mut health = client.watch(request).await.unwrap().into_inner();
        health.message().await.unwrap().unwrap();
        assert_eq!(gang.worker.drain(None).await, 0);
        assert_eq!(gang.worker.shutdown().await, Vec::<&str>::new(), "had to be cut");
    }
}

#[tokio::test]
async fn a_shutdown_closes_every_port() {
    let gang = Gang::start(fake(2)).await;
    let ports: Vec<_> =
        gang.worker.kv().iter().copied().chain([gang.worker.endpoint(), gang.worker.http()]).collect();
    gang.worker.shutdown().await;
    for port in ports {
        assert!(tokio::net::TcpStream::connect(port).await.is_err(), "{port}");
    }
}
