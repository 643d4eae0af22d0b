//! Two gangs: one computes prompts, the other goes on from their KV.

use std::time::Duration;

use herd_worker::transfer::{HEADER_BYTES, HELLO_BYTES, REPLY_BYTES};
use herd_worker::{Role, WorkerLimits};
use tonic::Code;

use crate::gangs::{Answer, Gang, fake, prompt, request, soon, split};
use crate::proxy::{Fault, Proxy};

/// Of the fake model's frame of a full block and all heads: keys and values, 6 heads, 64 rows of 8 bytes.
const FRAME_BYTES: usize = HEADER_BYTES + 2 * 6 * 64 * 8;

/// Neither side computed what it should not, and neither holds anything.
async fn clean(prefill: &Gang, decode: &Gang) {
    prefill.idle().await;
    decode.idle().await;
    for gang in [prefill, decode] {
        assert_eq!(gang.metric("herd_prefill_recomputed_tokens_total").await, 0);
    }
}

/// A decode gang of one rank whose KV comes through a proxy.
async fn behind_a_proxy(faults: impl IntoIterator<Item = Fault>) -> (Gang, Proxy) {
    let proxy = Proxy::start(faults).await;
    let address = proxy.address();
    let gang = Gang::start_with(fake(1), |options| options.advertise_kv = Some(vec![address])).await;
    proxy.forward_to(gang.worker.kv()[0]);
    (gang, proxy)
}

async fn apart_equals_together(source: usize, target: usize) {
    let together = Gang::start(fake(1)).await;
    let prefill = Gang::start_with(fake(source), |options| options.role = Role::Prefill).await;
    let decode = Gang::start_with(fake(target), |options| options.role = Role::Decode).await;
    let mut prompt_tokens = 0;
    // A token, the end of a block from both sides, several blocks, and three chunks of 512.
    for length in [1, 63, 64, 65, 200, 1100] {
        prompt_tokens += length as u64;
        let mut asked = request(prompt(length), 12);
        for temperature in [0.0, 1.3] {
            asked.sampling.as_mut().unwrap().temperature = temperature;
            let expected = together.answer(asked.clone()).await.unwrap();
            let answer = decode.answer(split(&prefill, asked.clone())).await.unwrap();
            assert_eq!(answer, expected, "{source} to {target}, {length} tokens");
        }
    }
    clean(&prefill, &decode).await;
    assert_eq!(prefill.metric("herd_prompt_tokens_total").await, 2 * prompt_tokens);
    assert_eq!(decode.metric("herd_prompt_tokens_total").await, 0);
    assert_eq!(decode.metric("herd_kv_transfers_total{outcome=\"completed\"}").await, 12);
    let sent = prefill.metric("herd_kv_frames_sent_total").await;
    assert_eq!(decode.metric("herd_kv_frames_received_total").await, sent);
    // Of 1, 1, 1, 2, 4 and 18 blocks, twice, in two layers.
    assert!(sent >= 27 * 2 * 2);
}

#[tokio::test]
async fn one_rank_to_one() {
    apart_equals_together(1, 1).await;
}

#[tokio::test]
async fn ranks_of_other_numbers() {
    for (source, target) in [(2, 1), (1, 2), (3, 2), (2, 3), (6, 3)] {
        apart_equals_together(source, target).await;
    }
}

#[tokio::test]
async fn ranks_that_share_heads() {
    for (source, target) in [(12, 12), (12, 6), (1, 12), (12, 2)] {
        apart_equals_together(source, target).await;
    }
}

#[tokio::test]
async fn ends_with_the_first_token() {
    let (prefill, decode) = (Gang::start(fake(1)).await, Gang::start(fake(1)).await);
    for (max_tokens, stop) in [(1, false), (9, true)] {
        let mut asked = request(prompt(100), max_tokens);
        if stop {
            let first = prefill.answer(asked.clone()).await.unwrap().ids[0];
            asked.sampling.as_mut().unwrap().stop_token_ids = vec![first];
        }
        let expected = prefill.answer(asked.clone()).await.unwrap();
        assert_eq!(expected.ids.len(), 1);
        assert_eq!(decode.answer(split(&prefill, asked)).await.unwrap(), expected);
    }
    clean(&prefill, &decode).await;
}

#[tokio::test]
async fn many_at_once_do_not_mix() {
    let limits = WorkerLimits { max_sequences: 3, ..WorkerLimits::default() };
    let together = Gang::start(fake(1)).await;
    let prefill = Gang::start_with(fake(2), |options| options.limits = limits).await;
    let decode = Gang::start_with(fake(3), |options| options.limits = limits).await;
    let asked: Vec<_> = (0..12).map(|n| request(prompt(40 * (n + 1)), 10 + n as u32)).collect();
    let apart = asked.iter().map(|asked| decode.answer(split(&prefill, asked.clone())));
    let apart = futures::future::try_join_all(apart).await.unwrap();
    for (asked, answer) in asked.into_iter().zip(apart) {
        assert_eq!(answer, together.answer(asked).await.unwrap());
    }
    clean(&prefill, &decode).await;
}

#[tokio::test]
async fn each_can_prefill_for_the_other() {
    let (one, other) = (Gang::start(fake(1)).await, Gang::start(fake(2)).await);
    let asked = request(prompt(300), 10);
    let (here, there) =
        tokio::join!(one.answer(split(&other, asked.clone())), other.answer(split(&one, asked.clone())));
    let expected = one.answer(asked).await.unwrap();
    assert_eq!(here.unwrap(), expected);
    assert_eq!(there.unwrap(), expected);
    clean(&one, &other).await;
}

#[tokio::test]
async fn a_prompt_waits_for_blocks_of_the_decode_gang() {
    let limits = WorkerLimits { max_sequences: 1, ..WorkerLimits::default() };
    let prefill = Gang::start(fake(1)).await;
    let decode = Gang::start_with(fake(1), |options| options.limits = limits).await;
    let asked = request(prompt(200), 10);
    let expected = prefill.answer(asked.clone()).await.unwrap();
    decode.control.close();
    let mut before = decode.decode(request(prompt(70), 5)).await.unwrap();
    decode.held().await;
    let mut stream = decode.decode(split(&prefill, asked)).await.unwrap();
    soon(async { while decode.metric("herd_requests_waiting").await == 0 {} }).await;
    decode.control.open();
    Answer::read(&mut before).await.unwrap();
    assert_eq!(Answer::read(&mut stream).await.unwrap(), expected);
    clean(&prefill, &decode).await;
}

/// 300 tokens are 5 blocks in 2 layers: 10 frames.
async fn survives(fault: Fault) -> (Gang, Gang, Proxy) {
    let prefill = Gang::start(fake(1)).await;
    let (decode, proxy) = behind_a_proxy([fault]).await;
    let asked = request(prompt(300), 10);
    let expected = prefill.answer(asked.clone()).await.unwrap();
    let answer = decode.answer(split(&prefill, asked)).await.unwrap();
    assert_eq!(answer, expected, "{fault:?}");
    clean(&prefill, &decode).await;
    assert_eq!(proxy.connections(), 2, "{fault:?}: one more connection");
    assert_eq!(prefill.metric("herd_kv_reconnects_total").await, 1);
    (prefill, decode, proxy)
}

#[tokio::test]
async fn a_flipped_bit_is_caught_counted_and_sent_again() {
    let (_prefill, decode, _proxy) =
        survives(Fault::FlipSent { bit: 8 * (HELLO_BYTES + FRAME_BYTES + HEADER_BYTES + 1000) + 3 }).await;
    assert_eq!(decode.rejected("checksum").await, 1);
    assert_eq!(decode.metric("herd_kv_frames_received_total").await, 10);
}

#[tokio::test]
async fn a_flipped_bit_anywhere_is_caught() {
    let second_frame = HELLO_BYTES + FRAME_BYTES;
    for (byte, reason) in [
        (HELLO_BYTES - 100, "checksum"),
        // Its magic, transfer, heads, block and checksum.
        (second_frame, "header"),
        (second_frame + 9, "checksum"),
        (second_frame + 28, "header"),
        (second_frame + 33, "checksum"),
        (second_frame + 45, "checksum"),
        (second_frame + FRAME_BYTES - 1, "checksum"),
    ] {
        let (_prefill, decode, _proxy) = survives(Fault::FlipSent { bit: 8 * byte + 1 }).await;
        assert_eq!(decode.rejected(reason).await, 1, "byte {byte}");
    }
    for byte in [3, REPLY_BYTES + 10, 2 * REPLY_BYTES + 19] {
        survives(Fault::FlipReceived { bit: 8 * byte }).await;
    }
}

#[tokio::test]
async fn a_connection_that_is_cut_is_opened_again() {
    for after in [0, HELLO_BYTES / 2, HELLO_BYTES, HELLO_BYTES + 20, HELLO_BYTES + 3 * FRAME_BYTES + 100] {
        survives(Fault::Cut { after }).await;
    }
}

#[tokio::test]
async fn a_path_that_never_works_ends_the_choice() {
    let prefill = Gang::start(fake(1)).await;
    let (decode, proxy) = behind_a_proxy([Fault::Cut { after: 1000 }; 100]).await;
    let status = decode.answer(split(&prefill, request(prompt(300), 10))).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("after 6 connections"), "{status:?}");
    assert_eq!(proxy.connections(), 6);
    assert_eq!(decode.metric("herd_kv_transfers_total{outcome=\"failed\"}").await, 1);
    clean(&prefill, &decode).await;
}

#[tokio::test]
async fn a_long_prefill_keeps_its_lease() {
    let prefill = Gang::start(fake(1)).await;
    let decode = Gang::start_with(fake(1), |options| options.lease = Duration::from_secs(2)).await;
    let asked = request(prompt(1100), 10);
    let expected = prefill.answer(asked.clone()).await.unwrap();
    prefill.control.close();
    let mut stream = decode.decode(split(&prefill, asked)).await.unwrap();
    prefill.pass().await;
    // One and a third leases.
    soon(async { while decode.metric("herd_kv_lease_renewals_total").await < 4 {} }).await;
    prefill.control.open();
    assert_eq!(Answer::read(&mut stream).await.unwrap(), expected);
    clean(&prefill, &decode).await;
}

#[tokio::test]
async fn a_deadline_ends_the_choice_on_both_sides() {
    let (prefill, decode) = (Gang::start(fake(1)).await, Gang::start(fake(1)).await);
    prefill.control.close();
    let mut asked = tonic::Request::new(split(&prefill, request(prompt(300), 10)));
    asked.metadata_mut().insert("grpc-timeout", "3S".parse().unwrap());
    let mut stream = decode.client.clone().decode(asked).await.unwrap().into_inner();
    prefill.held().await;
    let status = Answer::read(&mut stream).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    assert_eq!(prefill.worker.drain(None).await, 0);
    prefill.control.open();
    clean(&prefill, &decode).await;
}

#[tokio::test]
async fn a_client_that_goes_away_while_prefill_queues_it() {
    let limits = WorkerLimits { max_sequences: 1, ..WorkerLimits::default() };
    let prefill = Gang::start_with(fake(1), |options| options.limits = limits).await;
    let decode = Gang::start(fake(1)).await;
    prefill.control.close();
    let before = prefill.decode(request(prompt(70), 1)).await.unwrap();
    prefill.held().await;
    let stream = decode.decode(split(&prefill, request(prompt(200), 10))).await.unwrap();
    drop(stream);
    assert_eq!(decode.worker.drain(None).await, 0);
    // Prefill has seen it too when only the request before is left.
    drop(before);
    assert_eq!(prefill.worker.drain(None).await, 0);
    prefill.control.open();
    clean(&prefill, &decode).await;
    assert!(prefill.metric("herd_prompt_tokens_total").await <= 70);
}

#[tokio::test]
async fn a_client_that_goes_away_during_prefill() {
    let (prefill, decode) = (Gang::start(fake(2)).await, Gang::start(fake(1)).await);
    prefill.control.close();
    let mut stream = decode.decode(split(&prefill, request(prompt(1200), 10))).await.unwrap();
    // In the second of three chunks.
    prefill.pass().await;
    prefill.held().await;
    stream.message().await.unwrap();
    drop(stream);
    assert_eq!(decode.worker.drain(None).await, 0);
    assert_eq!(prefill.worker.drain(None).await, 0);
    let steps = prefill.metric("herd_steps_total").await;
    prefill.control.open();
    clean(&prefill, &decode).await;
    assert!(prefill.metric("herd_steps_total").await <= steps + 1);
    assert_eq!(decode.metric("herd_steps_total").await, 0);
}

#[tokio::test]
async fn a_client_that_goes_away_while_decode_has_no_blocks() {
    let limits = WorkerLimits { max_sequences: 1, ..WorkerLimits::default() };
    let prefill = Gang::start(fake(1)).await;
    let decode = Gang::start_with(fake(1), |options| options.limits = limits).await;
    decode.control.close();
    let before = decode.decode(request(prompt(70), 5)).await.unwrap();
    decode.held().await;
    let mut stream = decode.decode(split(&prefill, request(prompt(200), 10))).await.unwrap();
    stream.message().await.unwrap();
    drop((stream, before));
    assert_eq!(decode.worker.drain(None).await, 0);
    assert_eq!(prefill.worker.drain(None).await, 0);
    decode.control.open();
    clean(&prefill, &decode).await;
    assert_eq!(decode.metric("herd_kv_frames_received_total").await, 0);
}

#[tokio::test]
async fn a_client_that_goes_away_during_the_transfer() {
    let prefill = Gang::start(fake(1)).await;
    let (decode, mut proxy) = behind_a_proxy([Fault::Stall { after: HELLO_BYTES + FRAME_BYTES }]).await;
    let mut stream = decode.decode(split(&prefill, request(prompt(300), 10))).await.unwrap();
    stream.message().await.unwrap();
    proxy.opened(1).await;
    drop(stream);
    assert_eq!(decode.worker.drain(None).await, 0);
    assert_eq!(prefill.worker.drain(None).await, 0);
    clean(&prefill, &decode).await;
    assert_eq!(decode.metric("herd_steps_total").await, 0);
}

#[tokio::test]
async fn a_client_that_goes_away_during_decode() {
    let (prefill, decode) = (Gang::start(fake(1)).await, Gang::start(fake(2)).await);
    decode.control.close();
    let stream = decode.decode(split(&prefill, request(prompt(300), 500))).await.unwrap();
    decode.pass().await;
    decode.held().await;
    drop(stream);
    assert_eq!(decode.worker.drain(None).await, 0);
    let steps = decode.metric("herd_steps_total").await;
    decode.control.open();
    clean(&prefill, &decode).await;
    assert!(decode.metric("herd_steps_total").await <= steps + 1);
}

#[tokio::test]
async fn a_prefill_gang_that_is_lost_ends_the_choice() {
    let (prefill, decode) = (Gang::start(fake(1)).await, Gang::start(fake(1)).await);
    let line = Proxy::start([]).await;
    line.forward_to(prefill.worker.endpoint());
    prefill.control.close();
    let asked =
        herd_proto::internal::v1::DecodeRequest { prefill_peer: line.address(), ..request(prompt(1200), 10) };
    let mut stream = decode.decode(asked).await.unwrap();
    prefill.pass().await;
    prefill.held().await;
    drop(line);
    let status = Answer::read(&mut stream).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    prefill.control.open();
    clean(&prefill, &decode).await;
}

#[tokio::test]
async fn an_engine_that_fails_ends_the_choice_on_both_sides() {
    let (mut prefill, decode) = (Gang::start(fake(1)).await, Gang::start(fake(1)).await);
    prefill.control.fail("out of paper");
    let status = decode.answer(split(&prefill, request(prompt(300), 10))).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("out of paper"), "{status:?}");
    decode.idle().await;
    assert!(prefill.worker.failed().await.to_string().contains("out of paper"));

    let nobody = herd_proto::internal::v1::DecodeRequest {
        prefill_peer: "127.0.0.1:1".to_owned(),
        ..request(prompt(300), 10)
    };
    let status = decode.answer(nobody).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    decode.idle().await;
}

#[tokio::test]
async fn a_prefill_gang_that_is_full_or_another_refuses() {
    let limits = WorkerLimits { max_sequences: 1, max_waiting: 1, ..WorkerLimits::default() };
    let prefill = Gang::start_with(fake(1), |options| options.limits = limits).await;
    let decode = Gang::start(fake(1)).await;
    prefill.control.close();
    let running = prefill.decode(request(prompt(10), 5)).await.unwrap();
    prefill.held().await;
    let waiting = prefill.decode(request(prompt(10), 5)).await.unwrap();
    let status = decode.decode(split(&prefill, request(prompt(10), 5))).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.metadata().contains_key(herd_worker::RETRY_AFTER));
    prefill.control.open();
    drop((running, waiting));

    let another = Gang::start(herd_engine::FakeOptions { seed: 9, ..fake(1) }).await;
    let status = decode.decode(split(&another, request(prompt(10), 5))).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("model_digest"), "{status:?}");

    let mut stale = split(&another, request(prompt(10), 5));
    stale.prefill_peer = prefill.address();
    stale.prefill_epoch = 5;
    let status = decode.decode(stale).await.unwrap_err();
    assert!(status.message().contains("gang_epoch"), "{status:?}");
    clean(&prefill, &decode).await;
}
