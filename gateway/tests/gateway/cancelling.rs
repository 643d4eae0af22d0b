//! A client that goes away, or does not read.

use std::time::Duration;

use herd_gateway::Limits;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tonic::Status;

use crate::grpc::text;
use crate::support::http::{head, post, send};
use crate::support::scripted::{self, Scripted, leader, says, started, tokens};
use crate::support::{Running, gateway, gateway_with, soon};
use herd_proto::internal::v1::DecodeEvent;

type Sender = mpsc::Sender<Result<DecodeEvent, Status>>;

/// A leader whose streams are in the test's hands.
async fn in_hand(limits: Limits) -> (mpsc::UnboundedReceiver<Sender>, Scripted, Running) {
    let (hand, streams) = mpsc::unbounded_channel();
    let worker = leader(move |_| {
        let (sender, receiver) = mpsc::channel(4);
        hand.send(sender).unwrap();
        Ok(receiver)
    });
    let worker = worker.start().await;
    let running = gateway_with(&[&worker.address], limits).await;
    (streams, worker, running)
}

fn body(stream: bool, n: u32) -> Vec<u8> {
    serde_json::to_vec(&json!({"model": "tiny", "prompt": "x", "stream": stream, "n": n})).unwrap()
}

const COMPLETIONS: &str = "/v1/completions";

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_while_its_request_is_queued_ends_the_work() {
    for stream in [false, true] {
        let (mut streams, _worker, running) = in_hand(Limits::default()).await;
        let connection =
            send(running.gateway.addresses().http, "POST", COMPLETIONS, &[], &body(stream, 2)).await;
        let (one, two) = (soon(streams.recv()).await.unwrap(), soon(streams.recv()).await.unwrap());
        drop(connection);
        soon(one.closed()).await;
        soon(two.closed()).await;
        let cancelled = "herd_gateway_requests_total{api=\"completions\",outcome=\"cancelled\"}";
        soon(async { while running.metric(cancelled).await < 1.0 {} }).await;
        assert!(running.metric("herd_gateway_requests_in_flight").await.abs() < 0.1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_within_its_stream_ends_the_work() {
    let (mut streams, _worker, running) = in_hand(Limits::default()).await;
    let connection = send(running.gateway.addresses().http, "POST", COMPLETIONS, &[], &body(true, 1)).await;
    let stream = soon(streams.recv()).await.unwrap();
    stream.send(Ok(started())).await.unwrap();
    stream.send(Ok(tokens(0, &[40], 0))).await.unwrap();
    let mut reading = head(connection).await;
    assert!(!reading.chunk().await.is_empty());
    drop(reading);
    soon(stream.closed()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grpc_client_that_leaves_ends_the_work_in_every_phase() {
    let (mut streams, _worker, running) = in_hand(Limits::default()).await;
    let mut client = running.grpc().await;
    // Before the first event the call itself is still open.
    let call = tokio::spawn(async move { client.generate(text("x")).await.map(|_| ()) });
    let stream = soon(streams.recv()).await.unwrap();
    call.abort();
    soon(stream.closed()).await;
    // After its first token, the stream.
    let mut client = running.grpc().await;
    let call = tokio::spawn(async move { client.generate(text("x")).await });
    let stream = soon(streams.recv()).await.unwrap();
    stream.send(Ok(started())).await.unwrap();
    stream.send(Ok(tokens(0, &[40], 0))).await.unwrap();
    let answer = soon(call).await.unwrap().unwrap();
    drop(answer);
    soon(stream.closed()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_choice_that_fails_ends_the_others() {
    let (mut streams, _worker, running) = in_hand(Limits::default()).await;
    let connection = send(running.gateway.addresses().http, "POST", COMPLETIONS, &[], &body(false, 2)).await;
    let (one, two) = (soon(streams.recv()).await.unwrap(), soon(streams.recv()).await.unwrap());
    one.send(Err(Status::internal("broke"))).await.unwrap();
    soon(two.closed()).await;
    head(connection).await.rest().await.refusal(500);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_read_is_cut_off_and_buffers_stay_bounded() {
    let limits = Limits { slow_client: Duration::from_millis(50), buffered_events: 2, ..Limits::default() };
    let (mut streams, _worker, running) = in_hand(limits).await;
    let connection = send(running.gateway.addresses().http, "POST", COMPLETIONS, &[], &body(true, 1)).await;
    let stream = soon(streams.recv()).await.unwrap();
    // More than all sockets' buffers hold, if nobody stopped it.
    let endless = async {
        let mut position = 0;
        while stream.send(Ok(tokens(position, &[40; 512], 0))).await.is_ok() {
            position += 512;
        }
        position
    };
    let sent = soon(endless).await;
    assert!(sent > 0, "the stream was cut while it was being written");
    let slow = "herd_gateway_requests_total{api=\"completions\",outcome=\"slow_client\"}";
    let cancelled = "herd_gateway_requests_total{api=\"completions\",outcome=\"cancelled\"}";
    drop(connection);
    soon(async { while running.metric(slow).await + running.metric(cancelled).await < 1.0 {} }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_deadline_of_a_request_ends_it_with_504() {
    let limits = Limits { request_deadline: Duration::from_millis(50), ..Limits::default() };
    let (mut streams, _worker, running) = in_hand(limits).await;
    let connection = send(running.gateway.addresses().http, "POST", COMPLETIONS, &[], &body(true, 1)).await;
    let stream = soon(streams.recv()).await.unwrap();
    soon(stream.closed()).await;
    head(connection).await.rest().await.refusal(504);
}

#[tokio::test(flavor = "multi_thread")]
async fn shutting_down_lets_a_request_end() {
    let (mut streams, worker, running) = in_hand(Limits::default()).await;
    let address = running.gateway.addresses().http;
    let connection = send(address, "POST", COMPLETIONS, &[], &body(false, 1)).await;
    let stream = soon(streams.recv()).await.unwrap();
    let shutdown = tokio::spawn(running.gateway.shutdown());
    let closed = async { while tokio::net::TcpStream::connect(address).await.is_ok() {} };
    soon(closed).await;
    stream.send(Ok(tokens(0, &[40], 0))).await.unwrap();
    let end = herd_proto::internal::v1::finished::Reason::Length;
    stream.send(Ok(crate::support::scripted::finished(end, 0))).await.unwrap();
    assert_eq!(head(connection).await.rest().await.status, 200);
    soon(shutdown).await.unwrap();
    drop(worker);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_waits_for_its_fleet_and_a_taken_port_is_told_at_once() {
    use herd_gateway::{FixedFleet, Gateway, GatewayError, GatewayOptions, ReservedPort};
    let any = "127.0.0.1:0".parse().unwrap();
    let fleet = FixedFleet::new(vec![crate::support::endpoint("127.0.0.1:1")]);
    let (http, grpc) = (ReservedPort::reserve(any).unwrap(), ReservedPort::reserve(any).unwrap());
    let address = http.address();
    assert!(tokio::net::TcpStream::connect(address).await.is_err(), "nobody can connect before it opens");
    let mut options = GatewayOptions::new(std::sync::Arc::new(fleet), http, grpc);
    options.ready_within = Some(Duration::from_millis(20));
    let Err(error) = Gateway::start(options).await else { panic!("there is no such gang") };
    assert!(matches!(error, GatewayError::NotReady { .. }));
    let error = error.to_string();
    assert!(error.contains("gang 127.0.0.1:1: cannot connect"), "{error}");

    let running = gateway::<&str>(&[]).await;
    let taken = ReservedPort::reserve(running.gateway.addresses().http).unwrap_err().to_string();
    assert!(taken.contains("cannot listen on 127.0.0.1:"), "{taken}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bundle_that_cannot_be_used_ends_the_start_at_once_with_its_reason() {
    use herd_gateway::{FixedFleet, Gateway, GatewayError, GatewayOptions, ReservedPort};
    let broken = b"{}".to_vec();
    for (tokenizer, reason) in [(None, "the model has no tokenizer.json"), (Some(broken), "tokenizer.json")] {
        let mut leader = leader(scripted::says("never"));
        leader.bundle.retain(|(name, _)| name != "tokenizer.json");
        leader.bundle.extend(tokenizer.map(|bytes| ("tokenizer.json".to_owned(), bytes)));
        let worker = leader.start().await;
        let any = "127.0.0.1:0".parse().unwrap();
        let (http, grpc) = (ReservedPort::reserve(any).unwrap(), ReservedPort::reserve(any).unwrap());
        let fleet = FixedFleet::new(vec![crate::support::endpoint(&worker.address)]);
        let mut options = GatewayOptions::new(std::sync::Arc::new(fleet), http, grpc);
        options.ready_within = Some(Duration::from_hours(1));
        let Err(error) = soon(Gateway::start(options)).await else { panic!("it started") };
        assert!(matches!(error, GatewayError::Unusable(_)));
        let error = error.to_string();
        assert!(error.contains(reason) && error.contains(&worker.address), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn shutting_down_does_not_wait_for_connections_without_a_request() {
    let limits =
        Limits { drain: Duration::from_hours(1), body_timeout: Duration::from_hours(1), ..Limits::default() };
    let (_streams, _worker, running) = in_hand(limits).await;
    let addresses = running.gateway.addresses();
    let half_body = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{";
    let mut open = Vec::new();
    for (address, bytes) in [
        (addresses.http, ""),
        (addresses.http, "GET /hea"),
        (addresses.http, half_body),
        (addresses.grpc, ""),
        (addresses.grpc, "PRI * HT"),
        (addresses.grpc, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    ] {
        let mut connection = TcpStream::connect(address).await.unwrap();
        connection.write_all(bytes.as_bytes()).await.unwrap();
        open.push(connection);
    }
    // Connections are taken in turn, so once these are answered those are in.
    running.grpc().await.list_models(herd_proto::v1::ListModelsRequest {}).await.unwrap();
    soon(async { while running.metric("herd_gateway_requests_in_flight").await < 1.0 {} }).await;
    soon(running.gateway.shutdown()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_runs_at_the_end_of_the_drain_is_unavailable() {
    let limits = Limits { drain: Duration::from_millis(20), ..Limits::default() };
    let (mut streams, _worker, running) = in_hand(limits).await;
    let address = running.gateway.addresses().http;
    let whole = send(address, "POST", COMPLETIONS, &[], &body(false, 1)).await;
    let held = soon(streams.recv()).await.unwrap();
    let streamed = send(address, "POST", COMPLETIONS, &[], &body(true, 1)).await;
    let stream = soon(streams.recv()).await.unwrap();
    stream.send(Ok(tokens(0, &[40], 0))).await.unwrap();
    let mut streamed = head(streamed).await;
    assert!(!streamed.chunk().await.is_empty());
    let mut client = running.grpc().await;
    let call = tokio::spawn(async move { client.generate(text("x")).await.map(|_| ()) });
    let called = soon(streams.recv()).await.unwrap();
    let shutdown = tokio::spawn(running.gateway.shutdown());
    head(whole).await.rest().await.refusal(503);
    let last = streamed.rest().await.events().pop().unwrap();
    assert!(last.contains("service_unavailable_error"), "{last}");
    assert_eq!(soon(call).await.unwrap().unwrap_err().code(), tonic::Code::Unavailable);
    soon(shutdown).await.unwrap();
    for stream in [held, stream, called] {
        soon(stream.closed()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_sent_more_than_its_request_and_leaves_ends_the_work() {
    for more in ["\r\n", "GET /health HTTP/1.1\r\nhost: x\r\n\r\n"] {
        let (mut streams, _worker, running) = in_hand(Limits::default()).await;
        let address = running.gateway.addresses().http;
        let mut connection = TcpStream::connect(address).await.unwrap();
        let body = String::from_utf8(body(false, 1)).unwrap();
        let request = format!(
            "POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}{more}",
            body.len()
        );
        connection.write_all(request.as_bytes()).await.unwrap();
        let stream = soon(streams.recv()).await.unwrap();
        drop(connection);
        soon(stream.closed()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_connection_and_half_a_header_are_closed() {
    let limits = Limits { header_timeout: Duration::from_millis(20), ..Limits::default() };
    let (_streams, _worker, running) = in_hand(limits).await;
    let address = running.gateway.addresses().http;
    let idle_after_a_request = "GET /health HTTP/1.1\r\nhost: x\r\n\r\n";
    for bytes in ["", "GET /hea", idle_after_a_request] {
        let mut connection = TcpStream::connect(address).await.unwrap();
        connection.write_all(bytes.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        soon(connection.read_to_end(&mut answer)).await.unwrap();
        assert_eq!(answer.starts_with(b"HTTP/1.1 200"), bytes == idle_after_a_request);
    }
    assert_eq!(post(address, "/health", &[], b"").await.status, 405, "and new ones are taken");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grpc_connection_that_says_nothing_is_closed_and_one_that_speaks_http2_is_not() {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    let limits = Limits { header_timeout: Duration::from_millis(20), ..Limits::default() };
    let worker = leader(says("yes")).start().await;
    let running = gateway_with(&[&worker.address], limits).await;
    let address = running.gateway.addresses().grpc;
    let mut speaks = TcpStream::connect(address).await.unwrap();
    speaks.write_all(PREFACE).await.unwrap();
    // The server's settings: it has read the preface.
    soon(speaks.read_exact(&mut [0; 9])).await.unwrap();
    for said in [&b""[..], &PREFACE[..23]] {
        let mut silent = TcpStream::connect(address).await.unwrap();
        silent.write_all(said).await.unwrap();
        let _ = soon(silent.read_to_end(&mut Vec::new())).await;
    }
    // A ping is answered, after longer than the time for the preface.
    speaks.write_all(b"\0\0\x08\x06\0\0\0\0\x0012345678").await.unwrap();
    let mut answer = Vec::new();
    while !answer.windows(8).any(|bytes| bytes == b"12345678") {
        answer.push(soon(speaks.read_u8()).await.unwrap());
    }
}
