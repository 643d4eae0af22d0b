//! What is planned of a pool at one moment; over time it is in `simulation`.

use herd_api::condition::reason;
use herd_api::{GangFailure, Target};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use super::backoff::{failure, retry_at};
use super::{ObservedPool, PoolPlan, plan_pool};
use crate::gang::{Trouble, gangs};

/// Where a pod stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum At {
    /// The scheduler has not looked at it.
    New,
    /// It found no node for it.
    NoNode,
    Starting,
    Ready,
    Crashing,
    Lost,
}

/// A pod, as far as plans look at it.
#[derive(Clone, Debug)]
pub(super) struct TestPod {
    pub(super) gang: String,
    pub(super) rank: usize,
    /// Pods of its gang.
    pub(super) of: usize,
    pub(super) revision: &'static str,
    pub(super) at: At,
    pub(super) created: i64,
    pub(super) gone_by: Option<i64>,
}

impl TestPod {
    pub(super) fn name(&self) -> String {
        format!("{}-{}", self.gang, self.rank)
    }

    pub(super) fn object(&self) -> Pod {
        let Self { gang, rank, of, revision, at, created, gone_by } = self;
        let time = |second: i64| Time(second_to_time(second));
        let labels =
            json!({"herd.dev/gang": gang, "herd.dev/rank": rank.to_string(), "herd.dev/revision": revision});
        let annotations = if *of > 1 { json!({"herd.dev/pods": of.to_string()}) } else { json!({}) };
        let condition =
            |type_: &str, status: &str| json!({"type": type_, "status": status, "message": "0/2 nodes"});
        let ended = json!({"terminated": {"exitCode": 1}});
        let container = json!({"name": "worker", "image": "w", "imageID": "", "ready": false, "restartCount": 1,
            "lastState": ended});
        let status: Value = match at {
            At::New | At::Starting => json!({}),
            At::NoNode => json!({"conditions": [condition("PodScheduled", "False")]}),
            At::Ready => json!({"conditions": [condition("Ready", "True")]}),
            At::Crashing => json!({"containerStatuses": [container]}),
            At::Lost => {
                json!({"phase": "Failed", "reason": "Evicted", "message": "the node was low on memory"})
            }
        };
        let node = (!matches!(at, At::New | At::NoNode)).then_some("node");
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod", "status": status, "spec": {"containers": [], "nodeName": node},
            "metadata": {"name": self.name(), "uid": format!("uid-{}", self.name()), "labels": labels,
                "annotations": annotations, "creationTimestamp": time(*created),
                "deletionTimestamp": gone_by.map(time)},
        });
        serde_json::from_value(pod).unwrap()
    }
}

pub(super) fn second_to_time(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

/// The pods of a gang, made at second `created`.
pub(super) fn gang(id: usize, revision: &'static str, ats: &[At], created: i64) -> Vec<TestPod> {
    let pod = |(rank, at): (usize, &At)| TestPod {
        gang: format!("g{id}"),
        rank,
        of: ats.len(),
        revision,
        at: *at,
        created,
        gone_by: None,
    };
    ats.iter().enumerate().map(pod).collect()
}

/// A plan for this many gangs of revision "b".
pub(super) fn plan(
    pods: &[TestPod],
    replicas: i32,
    last_failure: Option<&GangFailure>,
    second: i64,
) -> PoolPlan {
    let objects: Vec<Pod> = pods.iter().map(TestPod::object).collect();
    let targets = [Target { revision: "b".to_owned(), replicas }];
    let observed = ObservedPool { uid: "pool", targets: &targets, gangs: &gangs(&objects), last_failure };
    plan_pool(observed, second_to_time(second))
}

/// The pods that go, as names.
fn going(plan: &PoolPlan) -> Vec<&str> {
    let of_gangs = plan.delete.iter().flat_map(|deletion| &deletion.pods);
    of_gangs.chain(&plan.left).map(|pod| pod.name.as_str()).collect()
}

#[test]
fn the_youngest_that_is_ready_goes_after_those_that_are_not() {
    let pods =
        [gang(1, "b", &[At::Ready], 1), gang(2, "b", &[At::Ready], 2), gang(3, "b", &[At::Starting], 0)]
            .concat();
    assert_eq!(going(&plan(&pods, 2, None, 100)), ["g3-0"]);
    assert_eq!(going(&plan(&pods, 1, None, 100)), ["g3-0", "g2-0"]);
}

#[test]
fn what_drains_is_replaced_and_left_alone() {
    let mut pods = gang(1, "b", &[At::Ready], 1);
    pods[0].gone_by = Some(200);
    let plan = plan(&pods, 1, None, 100);
    assert_eq!(plan.create, ["b"]);
    assert!(going(&plan).is_empty());
}

#[test]
fn a_revision_that_serves_stays_until_the_next_one_does() {
    let old = gang(1, "a", &[At::Ready; 2], 1);
    let broken = gang(2, "a", &[At::Ready, At::Crashing], 1);
    let loading = gang(3, "b", &[At::Ready, At::Starting], 2);
    let ready = gang(3, "b", &[At::Ready; 2], 2);
    assert_eq!(going(&plan(&[old.clone(), broken, loading].concat(), 1, None, 100)), ["g2-0"]);
    assert_eq!(going(&plan(&[old, ready].concat(), 1, None, 100)), ["g1-0"]);
}

#[test]
fn the_leader_goes_first_and_the_others_when_it_is_gone() {
    let mut pods = gang(1, "b", &[At::Ready; 3], 1);
    assert_eq!(going(&plan(&pods, 0, None, 100)), ["g1-0"]);
    pods[0].gone_by = Some(700);
    let waits = plan(&pods, 0, None, 100);
    assert!(going(&waits).is_empty());
    assert_eq!(waits.again_in, Some(SignedDuration::from_secs(630)));
    // Its node is away: it would hold the others for ever.
    assert_eq!(going(&plan(&pods, 0, None, 731)), ["g1-1", "g1-2"]);
    let gone = plan(&pods[1..], 0, None, 200);
    assert_eq!(going(&gone), ["g1-1", "g1-2"]);
    // Nothing of it went wrong.
    assert_eq!(gone.last_failure, None);
}

#[test]
fn a_follower_that_is_deleted_takes_its_gang_with_it() {
    let mut pods = gang(1, "b", &[At::Ready; 3], 1);
    pods[1].gone_by = Some(700);
    let first = plan(&pods, 1, None, 100);
    assert_eq!((going(&first), first.create.len()), (vec!["g1-0"], 1));
}

#[test]
fn a_gang_that_lacks_a_pod_is_replaced_as_a_whole() {
    let pods = gang(1, "b", &[At::Ready; 3], 1);
    let now = plan(&[pods[0].clone(), pods[2].clone()], 1, None, 100);
    assert_eq!(going(&now), ["g1-0", "g1-2"]);
    let failure = now.last_failure.clone().unwrap();
    assert_eq!(failure.reason, reason::GANG_INCOMPLETE);
    assert!(failure.message.contains("of the 3 pods of a gang there are 2"), "{}", failure.message);
    // The next one a moment later.
    assert!(now.create.is_empty() && now.again_in <= Some(SignedDuration::from_secs(2)), "{now:?}");
    assert_eq!(plan(&[], 1, Some(&failure), 102).create, ["b"]);
    // A pod that is there and ended is as good as gone.
    let ended = gang(1, "b", &[At::Ready, At::Lost, At::Ready], 1);
    let ended = plan(&ended, 1, None, 100);
    assert_eq!(going(&ended), ["g1-0", "g1-1", "g1-2"]);
    assert_eq!(ended.last_failure.unwrap().message, "the pod of rank 1: the node was low on memory");
}

#[test]
fn a_process_that_starts_anew_replaces_nothing() {
    let pods = gang(1, "b", &[At::Ready, At::Crashing, At::Starting], 1);
    let plan = plan(&pods, 1, None, 10_000);
    assert_eq!(plan, PoolPlan::default());
}

#[test]
fn half_a_gang_gives_up_what_it_holds() {
    let pods = gang(1, "b", &[At::Starting, At::NoNode], 100);
    let early = plan(&pods, 1, None, 130);
    assert!(going(&early).is_empty());
    assert_eq!(early.again_in, Some(SignedDuration::from_secs(30)));
    let late = plan(&pods, 1, None, 160);
    assert_eq!(going(&late), ["g1-0", "g1-1"]);
    let failure = late.last_failure.unwrap();
    assert_eq!(failure.reason, reason::UNSCHEDULABLE);
    assert_eq!(failure.message, "only 1 of the 2 pods of a gang found a node: 0/2 nodes");
    // Others get half a minute.
    assert!(plan_after(&failure, 189).create.is_empty());
    assert_eq!(plan_after(&failure, 206).create, ["b"]);
    // One that holds nothing may wait for ever.
    let waits = plan(&gang(1, "b", &[At::NoNode; 2], 100), 1, None, 10_000);
    assert_eq!(waits, PoolPlan::default());
}

fn plan_after(failure: &GangFailure, second: i64) -> PoolPlan {
    plan(&[], 1, Some(failure), second)
}

#[test]
fn of_several_halves_the_youngest_gives_up_and_the_next_a_minute_later() {
    let half = |id, created| gang(id, "b", &[At::NoNode, At::Starting], created);
    let (first, second) = (half(1, 100), half(2, 101));
    let both = plan(&[first.clone(), second].concat(), 2, None, 200);
    assert_eq!(going(&both), ["g2-0", "g2-1"]);
    let failure = both.last_failure.unwrap();
    assert!(going(&plan(&first, 2, Some(&failure), 259)).is_empty());
    assert_eq!(going(&plan(&first, 2, Some(&failure), 260)), ["g1-0", "g1-1"]);
}

/// It lacks pods since the API server refused them, which is said already.
#[test]
fn a_gang_of_which_a_pod_was_refused_is_removed_and_stays_refused() {
    let refused = GangFailure { message: "quota".to_owned(), ..given_up(0, 90, reason::FAILED_CREATE) };
    let lacks = gang(1, "b", &[At::Starting; 2], 90);
    let removed = plan(&lacks[..1], 1, Some(&refused), 100);
    assert_eq!(going(&removed), ["g1-0"]);
    assert_eq!(removed.last_failure.as_ref(), Some(&refused));
    assert!(removed.create.is_empty() && removed.again_in.is_some());
    let evicted = plan(&gang(1, "b", &[At::Lost], 90), 1, Some(&refused), 100);
    assert_eq!(evicted.last_failure.unwrap().reason, "Evicted");
    let again = failure(Some(&refused), "b", &Trouble::not_created("no"), second_to_time(200));
    assert_eq!((&again.since, again.message.as_str()), (&refused.since, "the API server refuses a pod: no"));
}

fn given_up(since: i64, time: i64, reason: &str) -> GangFailure {
    GangFailure {
        revision: "b".to_owned(),
        since: Time(second_to_time(since)),
        time: Time(second_to_time(time)),
        reason: reason.to_owned(),
        message: "why".to_owned(),
    }
}

#[test]
fn the_pause_is_as_long_as_it_went_wrong() {
    for (lasted, least, most) in [(0, 1, 1), (10, 10, 15), (100, 100, 150), (100_000, 300, 450)] {
        let retry = retry_at(&given_up(0, lasted, reason::GANG_INCOMPLETE), "pool").as_second() - lasted;
        assert!((least..=most).contains(&retry), "{retry} s after {lasted} s");
    }
    let released = given_up(100, 100, reason::UNSCHEDULABLE);
    let times: Vec<i64> =
        (0..20).map(|pool| retry_at(&released, &format!("pool {pool}")).as_second()).collect();
    assert!(times.iter().all(|time| (130..=145).contains(time)), "{times:?}");
    assert!(times.iter().any(|time| *time != times[0]), "all pools at once");
}

#[test]
fn another_revision_does_not_wait_for_one_that_failed() {
    let failure = GangFailure { revision: "a".to_owned(), ..given_up(0, 100, reason::GANG_INCOMPLETE) };
    assert_eq!(plan_after(&failure, 101).create, ["b"]);
    // Nor does what an old one does count against it.
    let lost = plan(&gang(1, "a", &[At::Lost], 1), 1, None, 101);
    assert_eq!((going(&lost), lost.create.len(), &lost.last_failure), (vec!["g1-0"], 1, &None));
}
