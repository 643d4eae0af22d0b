//! What a decode gang takes from others, and for how long.

use std::time::Duration;

use herd_model::Dtype;
use herd_proto::internal::v1::prefill_event::Event;
use herd_proto::internal::v1::{
    DecodeEvent, DecodeRequest, DescribeRequest, PrefillDone, ReserveRequest, Started, Token,
};
use herd_worker::transfer::{FrameHeader, Hello, REPLY_BYTES, Reject, Reply};
use herd_worker::{WorkerLimits, WorkerOptions};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tonic::{Code, Streaming};

use crate::gangs::{Answer, Gang, fake, prompt, request, soon};
use crate::stub::{Call, Stub};

const PROMPT_TOKENS: u32 = 100;

struct Scene {
    decode: Gang,
    call: Call,
    stream: Streaming<DecodeEvent>,
    _stub: Stub,
}

/// A decode gang that waits for a prefill this test is to do.
async fn scene(change: impl FnOnce(&mut WorkerOptions)) -> Scene {
    let decode = Gang::start_with(fake(1), change).await;
    let mut stub = Stub::start().await;
    let asked =
        DecodeRequest { prefill_peer: stub.address.clone(), ..request(prompt(PROMPT_TOKENS as usize), 10) };
    let stream = decode.decode(asked).await.unwrap();
    let call = stub.call().await;
    Scene { decode, call, stream, _stub: stub }
}

fn done() -> Event {
    Event::Done(PrefillDone {
        first: Some(Token { id: 7, logprob: -1.0, top: Vec::new() }),
        cached_tokens: 0,
    })
}

impl Scene {
    async fn reserve(&self) {
        let answer =
            self.decode.client.clone().reserve(self.call.reserve(PROMPT_TOKENS)).await.unwrap().into_inner();
        assert_eq!(answer.kv_endpoints, [self.decode.worker.kv()[0].to_string()]);
    }

    /// The stream's error.
    async fn fails(mut self) -> String {
        let status = Answer::read(&mut self.stream).await.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
        self.call.dropped().await;
        self.decode.idle().await;
        assert_eq!(self.decode.metric("herd_steps_total").await, 0);
        status.message().to_owned()
    }

    async fn hello(&self) -> Hello {
        let described = self.decode.client.clone().describe(DescribeRequest {}).await.unwrap().into_inner();
        Hello {
            source_rank: 0,
            target_rank: 0,
            epoch: described.epoch,
            transfer: self.call.request.transfer,
            fingerprint: described.kv_fingerprint,
        }
    }

    fn frame(&self) -> FrameHeader {
        FrameHeader {
            transfer: self.call.request.transfer,
            epoch: self.call.request.decode_epoch,
            dtype: Dtype::F32,
            layers: 0..1,
            heads: 0..6,
            block: 0,
            rows: 64,
        }
    }

    async fn connect(&self, hello: &Hello) -> (TcpStream, Option<Reply>) {
        let mut stream = TcpStream::connect(self.decode.worker.kv()[0]).await.unwrap();
        stream.write_all(&hello.encode().unwrap()).await.unwrap();
        let reply = reply(&mut stream).await;
        (stream, reply)
    }

    /// Sends a frame on a fresh connection.
    async fn send(&self, header: &FrameHeader) -> Option<Reply> {
        let (mut stream, welcome) = self.connect(&self.hello().await).await;
        assert_eq!(welcome, Some(Reply::Accepted(0)));
        let payload = vec![1; header.payload_bytes(8)];
        stream.write_all(&header.encode(&payload)).await.unwrap();
        // A header that is refused is refused before its payload has come.
        let _ = stream.write_all(&payload).await;
        reply(&mut stream).await
    }
}

/// None: closed, which is all that is left of a refusal when the other side had not read everything.
async fn reply(stream: &mut TcpStream) -> Option<Reply> {
    let mut bytes = [0; REPLY_BYTES];
    soon(stream.read_exact(&mut bytes)).await.ok()?;
    Some(Reply::decode(&bytes).unwrap())
}

#[tokio::test]
async fn a_lease_that_nobody_renews_ends() {
    let scene = scene(|options| options.lease = Duration::ZERO).await;
    scene.call.send(Event::Started(Started::default())).await;
    scene.reserve().await;
    let (hello, renew, mut client) = (scene.hello().await, scene.call.renew(), scene.decode.client.clone());
    let address = scene.decode.worker.kv()[0];
    // Keeps the gang; the scene is consumed.
    let Scene { decode, call, mut stream, _stub } = scene;
    let status = Answer::read(&mut stream).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("lease"), "{status:?}");
    call.dropped().await;
    decode.idle().await;
    assert_eq!(client.renew(renew).await.unwrap_err().code(), Code::NotFound);
    let mut late = TcpStream::connect(address).await.unwrap();
    late.write_all(&hello.encode().unwrap()).await.unwrap();
    assert_eq!(reply(&mut late).await, Some(Reply::Rejected(Reject::Transfer)));
    assert_eq!(decode.rejected("transfer").await, 1);
}

#[tokio::test]
async fn a_wait_for_blocks_that_is_too_long_is_nobodys_fault() {
    let limits = WorkerLimits { max_sequences: 1, ..WorkerLimits::default() };
    let decode = Gang::start_with(fake(1), |options| {
        options.limits = limits;
        options.blocks_deadline = Duration::ZERO;
    })
    .await;
    decode.control.close();
    let before = decode.decode(request(prompt(70), 5)).await.unwrap();
    decode.held().await;
    let mut stub = Stub::start().await;
    let asked = DecodeRequest { prefill_peer: stub.address.clone(), ..request(prompt(100), 10) };
    let mut stream = decode.decode(asked).await.unwrap();
    let call = stub.call().await;
    let mut client = decode.client.clone();
    let ended = soon(client.reserve(call.reserve(PROMPT_TOKENS))).await.unwrap_err();
    assert_eq!(ended.code(), Code::NotFound, "{ended:?}");
    let status = Answer::read(&mut stream).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::ResourceExhausted, "no kv blocks here within 0ns"));
    assert!(status.metadata().contains_key(herd_worker::RETRY_AFTER));
    call.dropped().await;
    decode.control.open();
    drop(before);
    decode.idle().await;
}

#[tokio::test]
async fn a_lease_is_renewed_and_given_again() {
    let scene = scene(|options| options.lease = Duration::from_mins(1)).await;
    let mut client = scene.decode.client.clone();
    assert_eq!(client.renew(scene.call.renew()).await.unwrap_err().code(), Code::NotFound, "not yet");
    scene.reserve().await;
    let used = scene.decode.metric("herd_kv_blocks_used").await;
    assert_eq!(used, 2);
    assert_eq!(client.renew(scene.call.renew()).await.unwrap().into_inner().lease_millis, 60_000);
    // The answer was lost.
    scene.reserve().await;
    assert_eq!(scene.decode.metric("herd_kv_blocks_used").await, used);
    let (mut kv, welcome) = scene.connect(&scene.hello().await).await;
    assert_eq!(welcome, Some(Reply::Accepted(0)));
    let Scene { decode, call, stream, _stub } = scene;
    drop(stream);
    call.dropped().await;
    decode.idle().await;
    assert_eq!(reply(&mut kv).await, Some(Reply::Rejected(Reject::Over)));
    assert_eq!(reply(&mut kv).await, None, "its connections are closed");
    drop(kv);
    for reject in Reject::ALL {
        assert_eq!(decode.rejected(reject.reason()).await, 0, "a transfer that is over is no fault");
    }
}

#[tokio::test]
async fn blocks_go_to_transfers_of_this_epoch_alone() {
    let scene = scene(|_| {}).await;
    let mut client = scene.decode.client.clone();
    let good = scene.call.reserve(PROMPT_TOKENS);
    let mut stale = good.clone();
    stale.context.as_mut().unwrap().gang_epoch -= 1;
    assert_eq!(client.reserve(stale).await.unwrap_err().code(), Code::FailedPrecondition);
    let unknown = ReserveRequest { transfer: good.transfer + 1, ..good.clone() };
    assert_eq!(client.reserve(unknown).await.unwrap_err().code(), Code::NotFound);
    let other = ReserveRequest { prompt_tokens: PROMPT_TOKENS + 1, ..good };
    assert_eq!(client.reserve(other).await.unwrap_err().code(), Code::InvalidArgument);
    assert_eq!(scene.decode.metric("herd_kv_blocks_used").await, 0);
}

#[tokio::test]
async fn hellos_of_others_are_refused_with_a_reason() {
    let scene = scene(|_| {}).await;
    let good = scene.hello().await;
    assert_eq!(scene.connect(&good).await.1, Some(Reply::Rejected(Reject::Transfer)), "not reserved yet");
    scene.reserve().await;
    for (reject, hello) in [
        (Reject::Epoch, Hello { epoch: good.epoch - 1, ..good.clone() }),
        (Reject::Fingerprint, Hello { fingerprint: "kv1:other".to_owned(), ..good.clone() }),
        (Reject::Rank, Hello { target_rank: 1, ..good.clone() }),
        (Reject::Transfer, Hello { transfer: good.transfer + 1, ..good.clone() }),
    ] {
        let before = scene.decode.rejected(reject.reason()).await;
        assert_eq!(scene.connect(&hello).await.1, Some(Reply::Rejected(reject)));
        assert_eq!(scene.decode.rejected(reject.reason()).await, before + 1);
    }
    let mut garbage = TcpStream::connect(scene.decode.worker.kv()[0]).await.unwrap();
    garbage.write_all(&[b'x'; 500]).await.unwrap();
    let mut rest = Vec::new();
    let _ = soon(garbage.read_to_end(&mut rest)).await;
    assert_eq!(scene.decode.rejected("header").await, 1);
}

#[tokio::test]
async fn frames_of_others_are_refused_and_counted() {
    let scene = scene(|_| {}).await;
    scene.reserve().await;
    let good = scene.frame();
    assert_eq!(scene.send(&good).await, Some(Reply::Accepted(1)));
    for (reject, header) in [
        (Reject::Epoch, FrameHeader { epoch: good.epoch - 1, ..good.clone() }),
        (Reject::Transfer, FrameHeader { transfer: good.transfer + 1, ..good.clone() }),
        (Reject::Fingerprint, FrameHeader { dtype: Dtype::Bf16, ..good.clone() }),
        (Reject::Bounds, FrameHeader { layers: 2..3, ..good.clone() }),
        (Reject::Bounds, FrameHeader { heads: 5..7, ..good.clone() }),
        (Reject::Bounds, FrameHeader { block: 2, ..good.clone() }),
        // The prompt fills 36 rows of its second block.
        (Reject::Bounds, FrameHeader { block: 1, rows: 37, ..good.clone() }),
        (Reject::Bounds, FrameHeader { heads: 0..100, ..good.clone() }),
    ] {
        let before = scene.decode.rejected(reject.reason()).await;
        let reply = scene.send(&header).await;
        assert!(matches!(reply, None | Some(Reply::Rejected(_))), "{header:?}: {reply:?}");
        assert_eq!(scene.decode.rejected(reject.reason()).await, before + 1, "{header:?}");
    }
    assert_eq!(scene.send(&good).await, Some(Reply::Accepted(1)), "again is fine");
}

#[tokio::test]
async fn a_prefill_that_is_done_too_early_is_no_answer() {
    let early = scene(|_| {}).await;
    early.call.send(done()).await;
    assert!(early.fails().await.contains("before all kv"));

    let partly = scene(|_| {}).await;
    partly.reserve().await;
    assert_eq!(partly.send(&partly.frame()).await, Some(Reply::Accepted(1)));
    partly.call.send(done()).await;
    assert!(partly.fails().await.contains("before all kv"));
}

#[tokio::test]
async fn a_prefill_that_ends_without_a_word_is_no_answer() {
    let scene = scene(|_| {}).await;
    let Scene { decode, call, mut stream, _stub } = scene;
    drop(call);
    let status = Answer::read(&mut stream).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("ended early"), "{status:?}");
    decode.idle().await;
}
