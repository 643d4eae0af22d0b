//! Plans done over and over, by an operator that may end in the middle of one, on a cluster that has room for so many pods.

use herd_api::{GangFailure, GangPhase, Target};
use k8s_openapi::api::core::v1::Pod;
use proptest::prelude::*;

use super::tests::{At, TestPod, gang, second_to_time};
use super::{ObservedPool, PoolPlan, plan_pool};
use crate::gang::{Gang, PodId, gangs};

/// Seconds between two looks of everybody at everything.
const STEP: i64 = 5;
/// Seconds from SIGTERM to the end of a pod that runs.
const GRACE: i64 = 20;

struct Pool {
    uid: String,
    replicas: i32,
    /// Pods of each new gang.
    pods_per_gang: usize,
    pods: Vec<TestPod>,
    last_failure: Option<GangFailure>,
    made: usize,
}

impl Pool {
    fn new(uid: &str, replicas: i32, pods_per_gang: usize, pods: Vec<TestPod>) -> Self {
        Self { uid: uid.to_owned(), replicas, pods_per_gang, pods, last_failure: None, made: 0 }
    }

    fn gangs(&self) -> Vec<Gang> {
        let objects: Vec<Pod> = self.pods.iter().map(TestPod::object).collect();
        gangs(&objects)
    }

    fn ready(&self) -> usize {
        self.gangs().iter().filter(|gang| gang.phase == GangPhase::Ready).count()
    }

    /// One pass, of which only so many writes are done before the operator ends.
    fn pass(&mut self, second: i64, mut writes: usize) -> PoolPlan {
        let targets = [Target { revision: "b".to_owned(), replicas: self.replicas }];
        let (gangs, uid) = (self.gangs(), self.uid.clone());
        let last_failure = self.last_failure.as_ref();
        let observed = ObservedPool { uid: &uid, targets: &targets, gangs: &gangs, last_failure };
        let plan = plan_pool(observed, second_to_time(second));
        let mut may_write = || {
            writes = writes.saturating_sub(1);
            writes > 0
        };
        if may_write() {
            // As a status does.
            let is_well = |gang: &&Gang| gang.revision == "b" && gang.phase == GangPhase::Ready;
            let all_are = gangs.iter().filter(is_well).count() >= self.replicas as usize;
            self.last_failure = plan.last_failure.clone().filter(|_| !all_are);
        }
        for PodId { name, uid: _ } in plan.delete.iter().flat_map(|gone| &gone.pods).chain(&plan.left) {
            if may_write() {
                self.delete(name, second);
            }
        }
        for _ in &plan.create {
            let id = 1000 + self.made;
            self.made += 1;
            for pod in gang(id, "b", &vec![At::New; self.pods_per_gang], second) {
                if may_write() {
                    self.pods.push(TestPod { gang: format!("{}-{}", self.uid, pod.gang), ..pod });
                }
            }
        }
        plan
    }

    /// A pod that runs has its grace period, any other goes at once.
    fn delete(&mut self, name: &str, second: i64) {
        let runs = |pod: &TestPod| matches!(pod.at, At::Starting | At::Ready | At::Crashing);
        self.pods.retain(|pod| pod.name() != name || runs(pod));
        for pod in self.pods.iter_mut().filter(|pod| pod.name() == name) {
            pod.gone_by.get_or_insert(second + GRACE);
        }
    }
}

/// Pods end, find nodes, and are Ready once all of their gang have one.
fn live(pools: &mut [Pool], room: usize, second: i64) {
    for pool in &mut *pools {
        pool.pods.retain(|pod| pod.gone_by.is_none_or(|time| time > second));
    }
    let mut free =
        room.saturating_sub(pools.iter().flat_map(|pool| &pool.pods).filter(|pod| has_node(pod)).count());
    let mut waiting: Vec<&mut TestPod> = pools.iter_mut().flat_map(|pool| &mut pool.pods).collect();
    waiting.retain(|pod| !has_node(pod) && pod.gone_by.is_none());
    // The worst scheduler: one pod of each gang before the second one of any.
    waiting.sort_by_key(|pod| (pod.rank, pod.gang.clone()));
    for pod in waiting {
        pod.at = if free > 0 { At::Starting } else { At::NoNode };
        free = free.saturating_sub(1);
    }
    for pool in pools {
        let placed: Vec<(String, usize)> =
            pool.pods.iter().filter(|pod| has_node(pod)).map(|pod| (pod.gang.clone(), pod.of)).collect();
        for pod in &mut pool.pods {
            let together = placed.iter().filter(|(gang, _)| *gang == pod.gang).count();
            if matches!(pod.at, At::Starting | At::Crashing) && together >= pod.of {
                pod.at = At::Ready;
            }
        }
    }
}

fn has_node(pod: &TestPod) -> bool {
    matches!(pod.at, At::Starting | At::Ready | At::Crashing)
}

fn any_at() -> impl Strategy<Value = At> {
    prop_oneof![
        Just(At::New),
        Just(At::NoNode),
        Just(At::Starting),
        Just(At::Ready),
        Just(At::Crashing),
        Just(At::Lost)
    ]
}

/// Where a pod stands and when it has to be gone, where there is one.
type AnyPod = Option<(At, Option<i64>)>;
/// Whether it is of the revision before, its pods, and when it was made.
type AnyGang = (bool, Vec<AnyPod>, i64);

/// Some of the pods of a gang, each in whatever state, perhaps deleted.
fn any_gang() -> impl Strategy<Value = AnyGang> {
    let gone_by = proptest::option::weighted(0.2, 900_i64..1020);
    let pod = proptest::option::weighted(0.8, (any_at(), gone_by));
    let whole = (1_usize..4).prop_map(|pods| vec![Some((At::Ready, None)); pods]);
    let pods = prop_oneof![2 => proptest::collection::vec(pod, 1..4), 1 => whole];
    (any::<bool>(), pods, 0_i64..1000)
}

fn some_pods((id, (old, pods, created)): (usize, AnyGang)) -> Vec<TestPod> {
    let all = gang(id, if old { "a" } else { "b" }, &vec![At::New; pods.len()], created);
    let there = all.into_iter().zip(pods);
    there.filter_map(|(pod, there)| there.map(|(at, gone_by)| TestPod { at, gone_by, ..pod })).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// From any state, with an operator that ends in the middle of its first passes, it ends with as many whole gangs as are
    /// wanted and nothing else; and no plan takes a gang that is Ready where fewer would be left than are wanted.
    #[test]
    fn plans_arrive(
        start in proptest::collection::vec(any_gang(), 0..7),
        replicas in 0_i32..4,
        pods_per_gang in 1_usize..4,
        cuts in proptest::collection::vec(0_usize..8, 0..4),
    ) {
        let pods = start.into_iter().enumerate().flat_map(some_pods).collect();
        let mut pools = [Pool::new("p", replicas, pods_per_gang, pods)];
        let mut cuts = cuts.into_iter();
        for second in (1000..3000).step_by(STEP as usize) {
            let before = pools[0].ready().min(replicas as usize);
            pools[0].pass(second, cuts.next().unwrap_or(usize::MAX));
            prop_assert!(pools[0].ready() >= before, "at {second}: {:?}", pools[0].pods);
            live(&mut pools, 100, second);
        }
        let gangs = pools[0].gangs();
        prop_assert_eq!(gangs.len(), replicas as usize, "{:?}", gangs);
        prop_assert!(gangs.iter().all(|gang| gang.revision == "b" && gang.phase == GangPhase::Ready));
        // Nothing is left to do.
        prop_assert_eq!(pools[0].pass(3000, usize::MAX), PoolPlan::default());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// Two pools whose gangs hold half of what the other one needs. That they make their next ones within one step of each
    /// other is less likely each time: an hour is enough for many times.
    #[test]
    fn two_halves_do_not_wait_for_each_other_for_ever(left in "[a-z0-9]{8}", right in "[a-z0-9]{8}") {
        prop_assume!(left != right);
        let mut pools = [Pool::new(&left, 1, 2, Vec::new()), Pool::new(&right, 1, 2, Vec::new())];
        let mut served = false;
        for second in (1000..1000 + 3600).step_by(STEP as usize) {
            for pool in &mut pools {
                pool.pass(second, usize::MAX);
            }
            live(&mut pools, 2, second);
            let ready: usize = pools.iter().map(Pool::ready).sum();
            prop_assert!(ready == 1 || !served, "one that serves was taken at {second}");
            served = ready == 1;
        }
        prop_assert!(served);
    }
}

/// As when every node there is throws out what comes.
#[test]
fn a_gang_that_is_lost_at_once_is_made_more_and_more_seldom() {
    let mut pool = Pool::new("p", 1, 2, Vec::new());
    let mut made = Vec::new();
    for second in 0..7200 {
        if !pool.pass(second, usize::MAX).create.is_empty() {
            made.push(second);
        }
        pool.pods.iter_mut().for_each(|pod| pod.at = At::Lost);
    }
    let within = |seconds: i64| made.iter().filter(|second| **second < seconds).count();
    assert!(within(60) <= 8, "{made:?}");
    assert!((20..40).contains(&made.len()), "{made:?}");
    let longest = made.windows(2).map(|pair| pair[1] - pair[0]).max();
    assert!(longest.is_some_and(|longest| (300..=460).contains(&longest)), "{made:?}");
}

/// Where only part of a gang can be made, a quota, say.
#[test]
fn a_gang_that_cannot_be_made_whole_is_not_tried_all_the_time() {
    let mut pool = Pool::new("p", 1, 3, Vec::new());
    let mut made = 0;
    for second in 0..600 {
        // The status and two pods.
        made += pool.pass(second, 4).create.len();
        live(std::slice::from_mut(&mut pool), 100, second);
    }
    assert!((5..15).contains(&made), "{made} tries in ten minutes");
}
