//! What a gang finds in its prefix cache, who may, and who goes first.

use herd_proto::internal::v1::decode_event::Event;
use herd_proto::internal::v1::{Context, DecodeRequest};
use herd_worker::WorkerLimits;
use tonic::Code;

use crate::gangs::{Answer, Gang, fake, prompt, request, soon, split};

async fn caching() -> Gang {
    Gang::start_with(fake(1), |options| options.limits = WorkerLimits::default()).await
}

fn salted(salt: &str, request: DecodeRequest) -> DecodeRequest {
    let context = Context { cache_salt: salt.to_owned(), ..request.context.unwrap() };
    DecodeRequest { context: Some(context), ..request }
}

/// Cached tokens as the beginning and as the end of a stream have them, and the tokens.
async fn cached(gang: &Gang, request: DecodeRequest) -> (u32, Vec<u32>) {
    let mut events = gang.decode(request).await.unwrap();
    let (mut started, mut finished, mut ids) = (None, None, Vec::new());
    while let Some(event) = soon(events.message()).await.unwrap() {
        match event.event.unwrap() {
            Event::Started(event) => started = Some(event.cached_tokens),
            Event::Tokens(tokens) => ids.extend(tokens.tokens.iter().map(|token| token.id)),
            Event::Finished(event) => finished = Some(event.cached_tokens),
            Event::Prompt(_) => panic!("not asked for"),
        }
    }
    assert_eq!(started, finished);
    (finished.unwrap(), ids)
}

#[tokio::test]
async fn a_prompt_that_came_before_is_cached_under_its_salt() {
    let gang = caching().await;
    let (none, first) = cached(&gang, request(prompt(200), 9)).await;
    assert_eq!(none, 0);
    assert_eq!(cached(&gang, request(prompt(200), 9)).await, (192, first.clone()));
    assert_eq!(cached(&gang, salted("a", request(prompt(200), 9))).await, (0, first.clone()));
    assert_eq!(cached(&gang, salted("a", request(prompt(200), 9))).await, (192, first.clone()));
    assert_eq!(cached(&gang, salted("b", request(prompt(200), 9))).await, (0, first));
    assert_eq!(gang.metric("herd_prefix_cached_tokens_total").await, 2 * 192);
    assert_eq!(gang.metric("herd_prompt_tokens_total").await, 3 * 200 + 2 * 8);
    let long = salted(&"x".repeat(257), request(prompt(2), 1));
    let status = gang.decode(long).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().starts_with("context.cache_salt: "), "{status:?}");
    gang.idle().await;
}

/// The salt and what was cached go through the gang that decodes.
#[tokio::test]
async fn a_prefill_gang_sends_what_it_had_cached() {
    let (prefill, decode) = (caching().await, caching().await);
    let asked = || split(&prefill, request(prompt(200), 9));
    let (none, first) = cached(&decode, asked()).await;
    assert_eq!(none, 0);
    assert_eq!(cached(&decode, asked()).await, (192, first.clone()));
    assert_eq!(cached(&decode, salted("a", asked())).await, (0, first.clone()));
    assert_eq!(prefill.metric("herd_prefix_cached_tokens_total").await, 192);
    // What was sent is in the cache of the gang that it was sent to.
    assert_eq!(cached(&decode, request(prompt(200), 9)).await, (192, first.clone()));
    assert_eq!(cached(&decode, salted("a", request(prompt(200), 9))).await, (192, first));
    assert_eq!(decode.metric("herd_prefill_recomputed_tokens_total").await, 0);
    prefill.idle().await;
    decode.idle().await;
}

#[tokio::test]
async fn without_the_cache_nothing_is_cached() {
    let gang = Gang::start(fake(1)).await;
    for _ in 0..2 {
        assert_eq!(cached(&gang, request(prompt(200), 2)).await.0, 0);
    }
}

#[tokio::test]
async fn the_urgent_go_first() {
    let limits = WorkerLimits { max_sequences: 1, ..WorkerLimits::default() };
    let gang = Gang::start_with(fake(1), |options| options.limits = limits).await;
    gang.control.close();
    let running = gang.decode(request(prompt(10), 1)).await.unwrap();
    gang.held().await;
    let mut streams = vec![running];
    for (length, priority) in [(20, -1), (30, 0), (40, 7)] {
        let asked = request(prompt(length), 1);
        let context = Context { priority, ..asked.context.unwrap() };
        streams.push(gang.decode(DecodeRequest { context: Some(context), ..asked }).await.unwrap());
    }
    let mut ends = Vec::new();
    for _ in 0..4 {
        let plan = soon(gang.control.pass()).await;
        ends.push(plan.entries[0].start + plan.entries[0].tokens.len());
    }
    assert_eq!(ends, [10, 40, 30, 20]);
    gang.control.open();
    for mut stream in streams {
        Answer::read(&mut stream).await.unwrap();
    }
}

/// Two answers that do not fit together: one gives its blocks to the other and goes on as if nothing had been.
#[tokio::test]
async fn who_is_preempted_says_the_same() {
    let alone = Gang::start(fake(1)).await;
    for host_blocks in [0, 8] {
        let options = herd_engine::FakeOptions { kv_blocks: 8, host_blocks, ..fake(2) };
        let gang = Gang::start(options).await;
        let asked = [100, 120].map(|length| request(prompt(length), 350));
        gang.control.close();
        let streams = asked.clone().map(|asked| gang.decode(asked));
        let streams = futures::future::try_join_all(streams).await.unwrap();
        gang.held().await;
        gang.control.open();
        let answers = streams.into_iter().map(|mut stream| async move { Answer::read(&mut stream).await });
        let answers = futures::future::try_join_all(answers).await.unwrap();
        for (asked, answer) in asked.into_iter().zip(answers) {
            assert_eq!(answer, alone.answer(asked).await.unwrap());
        }
        assert!(gang.metric("herd_preemptions_total").await > 0);
        assert_eq!(gang.metric("herd_kv_blocks_swapped_total").await > 0, host_blocks > 0);
        assert_eq!(gang.metric("herd_preempted_recomputed_tokens_total").await > 0, host_blocks == 0);
        gang.idle().await;
    }
}
