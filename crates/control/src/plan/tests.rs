use herd_api::{GangPhase, Target};
use k8s_openapi::jiff::Timestamp;
use proptest::prelude::*;

use super::{PoolPlan, plan_pool};
use crate::gang::{Gang, PodId};

fn gang(id: usize, revision: &str, phase: GangPhase, created: i64) -> Gang {
    Gang {
        id: format!("g{id}"),
        revision: revision.to_owned(),
        pods: vec![PodId { name: format!("p{id}"), uid: format!("u{id}") }],
        phase,
        created: Timestamp::from_second(created).unwrap(),
        restarts: 0,
        trouble: None,
        address: None,
    }
}

fn targets(replicas: i32) -> Vec<Target> {
    vec![Target { revision: "b".to_owned(), replicas }]
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn deleted(plan: &PoolPlan) -> Vec<&str> {
    plan.delete.iter().map(|deletion| deletion.gang.as_str()).collect()
}

#[test]
fn the_youngest_that_is_ready_goes_after_those_that_are_not() {
    let gangs = [
        gang(1, "b", GangPhase::Ready, 1),
        gang(2, "b", GangPhase::Ready, 2),
        gang(3, "b", GangPhase::Starting, 0),
    ];
    assert_eq!(deleted(&plan_pool(&targets(2), &gangs, at(100))), ["g3"]);
    assert_eq!(deleted(&plan_pool(&targets(1), &gangs, at(100))), ["g3", "g2"]);
}

#[test]
fn what_drains_is_replaced_and_left_alone() {
    let plan = plan_pool(&targets(1), &[gang(1, "b", GangPhase::Draining, 1)], at(100));
    assert_eq!(plan.create, ["b"]);
    assert!(plan.delete.is_empty());
}

#[test]
fn a_lost_gang_is_replaced_but_not_at_once_after_it_was_made() {
    let gangs = [gang(1, "b", GangPhase::Failed, 100)];
    let soon = plan_pool(&targets(1), &gangs, at(103));
    assert!(soon.create.is_empty() && soon.delete.is_empty() && soon.again_in.is_some());
    let later = plan_pool(&targets(1), &gangs, at(110));
    assert_eq!((later.create.len(), deleted(&later)), (1, vec!["g1"]));
}

#[test]
fn a_revision_that_serves_stays_until_the_next_one_does() {
    let old = gang(1, "a", GangPhase::Ready, 1);
    let broken = gang(2, "a", GangPhase::CrashLooping, 1);
    let loading = gang(3, "b", GangPhase::Starting, 2);
    let ready = gang(3, "b", GangPhase::Ready, 2);
    assert_eq!(deleted(&plan_pool(&targets(1), &[old.clone(), broken, loading], at(100))), ["g2"]);
    assert_eq!(deleted(&plan_pool(&targets(1), &[old, ready], at(100))), ["g1"]);
}

fn any_gang() -> impl Strategy<Value = (bool, GangPhase, i64)> {
    let phase = prop_oneof![
        Just(GangPhase::Pending),
        Just(GangPhase::Starting),
        Just(GangPhase::Ready),
        Just(GangPhase::CrashLooping),
        Just(GangPhase::Failed),
        Just(GangPhase::Draining),
    ];
    (any::<bool>(), phase, 0_i64..200)
}

proptest! {
    /// Done over and over, with every new gang becoming Ready, a plan ends with what is wanted, and on the way there are
    /// never fewer Ready gangs than there were, up to what is wanted.
    #[test]
    fn plans_arrive(start in proptest::collection::vec(any_gang(), 0..8), replicas in 0_i32..5) {
        let mut gangs: Vec<Gang> = start
            .into_iter()
            .enumerate()
            .map(|(id, (old, phase, created))| gang(id, if old { "a" } else { "b" }, phase, created))
            .collect();
        let mut next = gangs.len();
        let ready = |gangs: &[Gang]| gangs.iter().filter(|gang| gang.phase == GangPhase::Ready).count();
        for round in 0_i64..8 {
            let before = ready(&gangs).min(replicas as usize);
            let plan = plan_pool(&targets(replicas), &gangs, at(1000 + 20 * round));
            gangs.retain(|gang| plan.delete.iter().all(|deletion| deletion.gang != gang.id));
            prop_assert!(ready(&gangs) >= before);
            gangs.retain(|gang| gang.phase != GangPhase::Draining);
            for gang in &mut gangs {
                if matches!(gang.phase, GangPhase::Starting | GangPhase::Pending | GangPhase::CrashLooping) {
                    gang.phase = GangPhase::Ready;
                }
            }
            for revision in plan.create {
                gangs.push(gang(next, &revision, GangPhase::Starting, 1000 + 20 * round));
                next += 1;
            }
        }
        prop_assert_eq!(gangs.len(), replicas as usize);
        prop_assert!(gangs.iter().all(|gang| gang.revision == "b"));
    }
}
