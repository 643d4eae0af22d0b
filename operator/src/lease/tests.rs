//! Candidates against an API server.

use std::time::Duration;

use futures::FutureExt as _;
use futures::future::{Either, select};

use super::fake::{FakeApi, Mode, soon};
use super::*;

/// A lease nobody waits for, renewed often, with a deadline that a busy machine keeps.
const LONG: Timing = Timing {
    lease_duration: Duration::from_hours(1),
    renew_deadline: Duration::from_mins(30),
    retry_period: Duration::from_millis(5),
};

/// One that is soon lost.
const SHORT: Timing = Timing {
    lease_duration: Duration::from_secs(1),
    renew_deadline: Duration::from_millis(500),
    retry_period: Duration::from_millis(5),
};

fn campaign(
    api: &FakeApi,
    identity: &str,
    timing: Timing,
) -> impl Future<Output = Leadership> + Send + use<> {
    let options = LeaseOptions {
        namespace: "herd-system".to_owned(),
        name: "herd-operator".to_owned(),
        identity: identity.to_owned(),
    };
    Leadership::acquire_within(api.client(), options, timing)
}

#[tokio::test]
async fn of_two_candidates_that_see_no_lease_one_leads() {
    let api = FakeApi::start().await;
    api.pair_reads().await;
    let (a, b) = (Box::pin(campaign(&api, "a", LONG)), Box::pin(campaign(&api, "b", LONG)));
    let (winner, mut loser, name) = match soon("a leader", select(a, b)).await {
        Either::Left((winner, loser)) => (winner, loser, "a"),
        Either::Right((winner, loser)) => (winner, loser, "b"),
    };
    assert_eq!(api.seen().holder(), name);
    assert_eq!(api.seen().spec().lease_transitions, Some(0));
    let reads = api.seen().reads;
    let waited = api.until("the other one looks again", |seen| seen.reads >= reads + 5);
    assert!(matches!(soon("looks", select(Box::pin(waited), &mut loser)).await, Either::Left(_)));
    assert_eq!(api.seen().holder(), name);
    drop(winner);
}

#[tokio::test]
async fn a_leader_that_stops_renewing_is_replaced() {
    let api = FakeApi::start().await;
    let leader = soon("a leads", campaign(&api, "a", SHORT)).await;
    let writes = api.seen().writes;
    api.until("renewals", |seen| seen.writes >= writes + 3).await;
    let standby = campaign(&api, "b", LONG);
    drop(leader);
    let _next = soon("b leads", standby).await;
    let seen = api.seen();
    assert_eq!((seen.holder().as_str(), seen.spec().lease_transitions), ("b", Some(1)));
    assert!(seen.spec().acquire_time.is_some());
}

#[tokio::test]
async fn a_lease_given_back_is_taken_before_it_expires() {
    let api = FakeApi::start().await;
    let leader = soon("a leads", campaign(&api, "a", LONG)).await;
    soon("release", leader.release()).await;
    assert_eq!((api.seen().holder().as_str(), api.seen().spec().lease_duration_seconds), ("", Some(1)));
    let _next = soon("b leads", campaign(&api, "b", LONG)).await;
    assert_eq!((api.seen().holder().as_str(), api.seen().spec().lease_transitions), ("b", Some(1)));
}

#[tokio::test]
async fn leadership_is_lost_when_the_server_fails_or_falls_silent() {
    for mode in [Mode::Failing, Mode::Silent] {
        let api = FakeApi::start().await;
        let mut leader = soon("a leads", campaign(&api, "a", SHORT)).await;
        api.answer(mode);
        soon("lost", leader.lost()).await;
        soon("release", leader.release()).await;
        assert_eq!(api.seen().holder(), "a", "what was lost is not given back");
    }
}

#[tokio::test]
async fn a_lease_that_another_took_is_lost() {
    let api = FakeApi::start().await;
    let mut leader = soon("a leads", campaign(&api, "a", LONG)).await;
    api.meddle(|lease| lease.spec.as_mut().unwrap().holder_identity = Some("b".to_owned()));
    soon("lost", leader.lost()).await;
    soon("release", leader.release()).await;
    assert_eq!(api.seen().holder(), "b");
}

#[tokio::test]
async fn a_leader_goes_on_after_its_lease_was_edited_or_deleted() {
    let api = FakeApi::start().await;
    let mut leader = soon("a leads", campaign(&api, "a", LONG)).await;
    api.meddle(|lease| lease.metadata.labels = Some([("of".to_owned(), "others".to_owned())].into()));
    let edited = api.seen().spec().renew_time;
    let seen = api.until("a renewal", |seen| seen.spec().renew_time > edited).await;
    assert!(seen.lease.is_some_and(|lease| lease.metadata.labels.is_some()), "an edit is kept");
    api.delete();
    api.until("a lease again", |seen| seen.holder() == "a").await;
    assert!(leader.lost().now_or_never().is_none());
}

#[tokio::test]
async fn a_candidate_outlasts_a_server_that_is_away() {
    let api = FakeApi::start().await;
    api.answer(Mode::Failing);
    let mut standby = Box::pin(campaign(&api, "a", SHORT));
    let refused = Box::pin(api.until("tries", |seen| seen.failed >= 3));
    assert!(matches!(soon("tries", select(refused, &mut standby)).await, Either::Left(_)));
    api.answer(Mode::Silent);
    assert!(standby.as_mut().now_or_never().is_none());
    api.answer(Mode::Up);
    let _leader = soon("a leads", standby).await;
    assert_eq!(api.seen().holder(), "a");
}

#[tokio::test]
async fn a_restarted_candidate_knows_its_own_lease() {
    let api = FakeApi::start().await;
    drop(soon("a leads", campaign(&api, "a", LONG)).await);
    let _again = soon("a leads again", campaign(&api, "a", LONG)).await;
    assert_eq!(api.seen().spec().lease_transitions, Some(0));
}
