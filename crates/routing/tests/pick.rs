//! What may and must be picked, over all fleets.

#![expect(clippy::unwrap_used, reason = "a test that panics has failed")]

use herd_routing::{GangView, Phase, Refusal, Role, Route, pick};
use proptest::prelude::*;

fn gang(role: Role) -> GangView {
    GangView {
        role,
        phase: Phase::Ready,
        kv_fingerprint: "f".to_owned(),
        running: 0,
        waiting: 0,
        waiting_prompt_tokens: 0,
        in_flight: 0,
        in_flight_prompt_tokens: 0,
        capacity: 8,
        avoid: false,
    }
}

/// Sends `requests` to a fleet that reports nothing in between, as within one tick of its load reports.
fn send(gangs: &mut [GangView], requests: u64) -> Vec<Route> {
    (0..requests)
        .map(|turn| {
            let route = pick(gangs, turn).unwrap();
            gangs[route.called()].in_flight += 1;
            if route.prefills() != route.called() {
                gangs[route.prefills()].in_flight += 1;
            }
            gangs[route.prefills()].in_flight_prompt_tokens += 10;
            route
        })
        .collect()
}

#[test]
fn every_decode_gang_gets_work_beside_one_prefill_gang() {
    let mut gangs: Vec<_> = [Role::Prefill].into_iter().chain([Role::Decode; 5]).map(gang).collect();
    gangs[0].capacity = 100;
    send(&mut gangs, 10);
    assert_eq!(gangs[1..].iter().map(|g| g.in_flight).collect::<Vec<_>>(), [2; 5]);
}

#[test]
fn requests_within_one_tick_do_not_follow_the_same_report() {
    let mut gangs = vec![gang(Role::Unified); 4];
    gangs[2].running = 1;
    send(&mut gangs, 7);
    assert_eq!(gangs.iter().map(|g| g.in_flight).collect::<Vec<_>>(), [2, 2, 1, 2]);
}

#[test]
fn an_idle_fleet_is_not_always_answered_by_the_first_gang() {
    let gangs = vec![gang(Role::Unified); 3];
    let picked: Vec<_> = (0..6).map(|turn| pick(&gangs, turn).unwrap().called()).collect();
    assert_eq!(picked, [0, 1, 2, 0, 1, 2]);
}

#[test]
fn a_gang_to_be_avoided_is_the_last_resort() {
    let mut gangs = vec![gang(Role::Unified); 2];
    gangs[0].avoid = true;
    gangs[1].running = 7;
    assert_eq!(pick(&gangs, 0), Ok(Route::Unified { gang: 1 }));
    gangs[1].phase = Phase::Away;
    assert_eq!(pick(&gangs, 0), Ok(Route::Unified { gang: 0 }));
}

#[test]
fn kv_moves_only_between_equal_fingerprints() {
    let mut gangs = vec![gang(Role::Prefill), gang(Role::Decode)];
    gangs[1].kv_fingerprint = "g".to_owned();
    assert_eq!(pick(&gangs, 0), Err(Refusal::NoPrefill));
}

#[test]
fn refusals_are_told_apart() {
    assert_eq!(pick(&[], 0), Err(Refusal::NoGang));
    let with = |role, change: fn(&mut GangView)| {
        let mut gang = gang(role);
        change(&mut gang);
        pick(&[gang], 0)
    };
    assert_eq!(with(Role::Unified, |g| g.phase = Phase::Away), Err(Refusal::NoGang));
    assert_eq!(with(Role::Unified, |g| g.phase = Phase::Draining), Err(Refusal::Draining));
    assert_eq!(with(Role::Unified, |g| g.running = 8), Err(Refusal::Full));
    assert_eq!(with(Role::Unified, |g| g.in_flight = 8), Err(Refusal::Full));
    assert_eq!(with(Role::Prefill, |_| ()), Err(Refusal::NoDecode));
    assert_eq!(with(Role::Decode, |_| ()), Err(Refusal::NoPrefill));
}

fn any_gang() -> impl Strategy<Value = GangView> {
    let role = prop_oneof![Just(Role::Unified), Just(Role::Prefill), Just(Role::Decode)];
    let phase = prop_oneof![3 => Just(Phase::Ready), 1 => Just(Phase::Draining), 1 => Just(Phase::Away)];
    let counts = (0..4u32, 0..4u32, 0..3000u64, 0..4u32, 0..3000u64);
    (role, phase, "[fg]", counts, 4..12u32, any::<bool>()).prop_map(
        |(role, phase, kv_fingerprint, counts, capacity, avoid)| {
            let (running, waiting, waiting_prompt_tokens, in_flight, in_flight_prompt_tokens) = counts;
            GangView {
                role,
                phase,
                kv_fingerprint,
                running,
                waiting,
                waiting_prompt_tokens,
                in_flight,
                in_flight_prompt_tokens,
                capacity,
                avoid,
            }
        },
    )
}

/// All routes that may be taken, by brute force.
fn allowed(gangs: &[GangView]) -> Vec<Route> {
    let open = |index: &usize| {
        let gang = &gangs[*index];
        gang.phase == Phase::Ready && (gang.running + gang.waiting).max(gang.in_flight) < gang.capacity
    };
    let of = |role: Role| (0..gangs.len()).filter(open).filter(move |&i| gangs[i].role == role);
    let pairs = of(Role::Prefill).flat_map(|prefill| of(Role::Decode).map(move |decode| (prefill, decode)));
    let alike = pairs.filter(|&(p, d)| gangs[p].kv_fingerprint == gangs[d].kv_fingerprint);
    of(Role::Unified)
        .map(|gang| Route::Unified { gang })
        .chain(alike.map(|(prefill, decode)| Route::Apart { prefill, decode }))
        .collect()
}

fn rank(gangs: &[GangView], route: Route) -> (u8, u64) {
    let one = |gang: &GangView| {
        let requests = u64::from(gang.running + gang.waiting + gang.in_flight);
        (u8::from(gang.avoid), requests * 512 + gang.waiting_prompt_tokens + gang.in_flight_prompt_tokens)
    };
    let (p, d) = (one(&gangs[route.prefills()]), one(&gangs[route.called()]));
    (if route.prefills() == route.called() { p.0 } else { p.0 + d.0 }, p.1.max(d.1))
}

proptest! {
    #[test]
    fn picks_an_allowed_route_of_least_load(gangs in prop::collection::vec(any_gang(), 0..7), turn in any::<u64>()) {
        let allowed = allowed(&gangs);
        match pick(&gangs, turn) {
            Ok(route) => {
                prop_assert!(allowed.contains(&route));
                let least = allowed.iter().map(|&other| rank(&gangs, other)).min().unwrap();
                prop_assert_eq!(rank(&gangs, route), least);
                prop_assert_eq!(pick(&gangs, turn), Ok(route));
            }
            Err(refusal) => {
                prop_assert!(allowed.is_empty());
                let whole = allowed_when_empty(&gangs);
                prop_assert_eq!(refusal == Refusal::Full, whole);
            }
        }
    }
}

/// Whether the fleet would take the request if nothing ran on it.
fn allowed_when_empty(gangs: &[GangView]) -> bool {
    let empty: Vec<_> =
        gangs.iter().map(|gang| GangView { running: 0, waiting: 0, in_flight: 0, ..gang.clone() }).collect();
    !allowed(&empty).is_empty()
}
