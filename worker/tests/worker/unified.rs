//! One gang that serves alone.

use crate::gangs::{CONTEXT, Gang, fake, prompt, request};
use herd_proto::internal::v1::finished::Reason;
use herd_proto::internal::v1::{
    Context, DecodeRequest, DescribeRequest, GetBundleRequest, Load, Phase, Role, Sampling, SetRoleRequest,
    WatchRequest,
};
use herd_worker::{Backend, FakeBackend, RETRY_AFTER, Worker, WorkerLimits, WorkerOptions};
use tonic::Code;

#[tokio::test]
async fn describes_itself() {
    let gang = Gang::start_with(fake(2), |options| {
        options.revision = "r1".to_owned();
        options.role = Role::Decode;
    })
    .await;
    let described = gang.client.clone().describe(DescribeRequest {}).await.unwrap().into_inner();
    assert_eq!(described.revision, "r1");
    assert_eq!(described.role, i32::from(Role::Decode));
    assert_eq!((described.tensor, described.kv_blocks, described.block_tokens), (2, 64, 64));
    assert_eq!((described.vocab_size, described.context_length), (1000, CONTEXT as u32));
    assert!(described.model_digest.starts_with("sha256:") && described.kv_fingerprint.starts_with("kv1:"));
    assert_ne!(described.epoch, 0);

    let other = Gang::start(fake(1)).await;
    let theirs = other.client.clone().describe(DescribeRequest {}).await.unwrap().into_inner();
    assert_eq!(theirs.kv_fingerprint, described.kv_fingerprint, "tensor degrees may differ");
    assert_ne!((theirs.gang_id, theirs.epoch), (described.gang_id, described.epoch));
}

#[tokio::test]
async fn generates_the_same_whatever_shares_the_batch() {
    let gang = Gang::start(fake(1)).await;
    let alone = gang.answer(request(prompt(100), 20)).await.unwrap();
    assert!(alone.started);
    assert_eq!((alone.ids.len(), alone.finished), (20, Some(Reason::Length.into())));
    assert!(alone.logprobs.iter().all(|logprobs| logprobs.len() == 4));

    let requests = (0..8).map(|n| gang.answer(request(prompt(100 + n * 30), 20)));
    let together = futures::future::join_all(requests).await;
    assert_eq!(together[0].as_ref().unwrap(), &alone);

    let mut stopping = request(prompt(100), 20);
    let stop = alone.ids[4];
    stopping.sampling.as_mut().unwrap().stop_token_ids = vec![stop];
    let stopped = gang.answer(stopping).await.unwrap();
    let until = alone.ids.iter().position(|&id| id == stop).unwrap();
    assert_eq!((&stopped.ids[..], stopped.finished), (&alone.ids[..=until], Some(Reason::Stop.into())));
    gang.idle().await;
}

#[tokio::test]
async fn refuses_what_it_cannot_run_and_names_the_field() {
    let gang = Gang::start(fake(1)).await;
    let good = request(prompt(10), 5);
    let sampling = good.sampling.clone().unwrap();
    let with = |sampling| DecodeRequest { sampling: Some(sampling), ..good.clone() };
    for (field, bad) in [
        ("prompt", DecodeRequest { prompt: Vec::new(), ..good.clone() }),
        ("prompt[1]", DecodeRequest { prompt: vec![1, 1000], ..good.clone() }),
        ("prompt", request(prompt(CONTEXT), 1)),
        ("sampling", DecodeRequest { sampling: None, ..good.clone() }),
        ("sampling.max_tokens", with(Sampling { max_tokens: 0, ..sampling.clone() })),
        ("sampling.top_p", with(Sampling { top_p: 2.0, ..sampling.clone() })),
        ("prefill_peer", DecodeRequest { prefill_peer: "not a peer".to_owned(), ..good.clone() }),
    ] {
        let status = gang.answer(bad).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        assert!(status.message().starts_with(field), "{field}: {status:?}");
    }
    for (field, context) in [
        ("gang_epoch", Context { gang_epoch: 1, ..Context::default() }),
        ("model_digest", Context { model_digest: "sha256:other".to_owned(), ..Context::default() }),
        ("revision", Context { revision: "other".to_owned(), ..Context::default() }),
    ] {
        let status = gang.answer(DecodeRequest { context: Some(context), ..good.clone() }).await.unwrap_err();
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert!(status.message().contains(field), "{status:?}");
    }
    gang.idle().await;
}

#[tokio::test]
async fn a_full_queue_refuses_with_a_hint() {
    let limits = WorkerLimits { max_sequences: 1, max_waiting: 1, ..WorkerLimits::default() };
    let gang = Gang::start_with(fake(1), |options| options.limits = limits).await;
    gang.control.close();
    let running = gang.decode(request(prompt(10), 5)).await.unwrap();
    gang.held().await;
    let waiting = gang.decode(request(prompt(10), 5)).await.unwrap();
    let status = gang.decode(request(prompt(10), 5)).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.metadata().contains_key(RETRY_AFTER));
    gang.control.open();
    drop((running, waiting));
    gang.idle().await;
}

#[tokio::test]
async fn a_client_that_goes_away_ends_the_work_within_a_step() {
    let gang = Gang::start(fake(1)).await;
    gang.control.close();
    let mut stream = gang.decode(request(prompt(1200), 800)).await.unwrap();
    // In the second of three chunks of the prompt.
    gang.pass().await;
    gang.held().await;
    stream.message().await.unwrap();
    drop(stream);
    // The worker has seen it when the request is not counted as running any more.
    assert_eq!(gang.worker.drain(None).await, 0);
    let before = gang.metric("herd_steps_total").await;
    gang.control.open();
    gang.idle().await;
    assert!(gang.metric("herd_steps_total").await <= before + 1);
}

#[tokio::test]
async fn watches_show_load_role_and_phase() {
    let gang = Gang::start(fake(1)).await;
    let mut events = gang.client.clone().watch(WatchRequest {}).await.unwrap().into_inner();
    let first = events.message().await.unwrap().unwrap();
    assert_eq!((first.sequence, first.phase()), (1, Phase::Ready));
    assert_eq!(first.load, Some(Load::default()));

    gang.control.close();
    let stream = gang.decode(request(prompt(100), 5)).await.unwrap();
    let mut sequence = first.sequence;
    let mut until = async |what: fn(&herd_proto::internal::v1::WatchEvent) -> bool| {
        loop {
            let event = events.message().await.unwrap().unwrap();
            sequence += 1;
            assert_eq!(event.sequence, sequence);
            if what(&event) {
                return;
            }
        }
    };
    until(|event| event.load.unwrap().running == 1 && event.load.unwrap().kv_blocks_used == 2).await;
    gang.client.clone().set_role(SetRoleRequest { role: Role::Prefill.into() }).await.unwrap();
    until(|event| event.role() == Role::Prefill).await;
    gang.control.open();
    drop(stream);
    until(|event| event.load == Some(Load::default())).await;
    gang.worker.drain(None).await;
    until(|event| event.phase() == Phase::Draining).await;

    let status = gang.client.clone().set_role(SetRoleRequest { role: 9 }).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn gives_out_the_bundle() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), "{\"a\": 1}").unwrap();
    let backend = FakeBackend::new(fake(1), CONTEXT).with_bundle(dir.path());
    let worker = Worker::start(WorkerOptions::loopback(Backend::Fake(Box::new(backend)))).await.unwrap();
    let mut client = herd_proto::internal::v1::worker_client::WorkerClient::connect(format!(
        "http://{}",
        worker.endpoint()
    ))
    .await
    .unwrap();
    let mut chunks = client.get_bundle(GetBundleRequest {}).await.unwrap().into_inner();
    let chunk = chunks.message().await.unwrap().unwrap();
    assert_eq!((chunk.file.as_str(), &chunk.data[..]), ("tokenizer.json", &b"{\"a\": 1}"[..]));
    assert_eq!(chunks.message().await.unwrap(), None);

    let none = Gang::start(fake(1)).await;
    let status = none.client.clone().get_bundle(GetBundleRequest {}).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
}
