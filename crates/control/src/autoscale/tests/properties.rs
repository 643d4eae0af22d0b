//! What holds whatever comes.

use herd_api::Role;
use proptest::prelude::*;

use super::{POLICY, pool};
use crate::autoscale::{
    Decision, Falling, GangInput, History, Input, PoolHistory, PoolInput, Reading, Rising, Sample, SeenGang,
    Throughput, decide,
};

const NOW: i64 = 1_800_000_000_000;
const SEEN: SeenGang = SeenGang { ready_since_ms: 0, known_ms: None };

fn sample() -> impl Strategy<Value = Sample> {
    let rates = (0..3_000_000_u64, 0..100_000_u64, 0..1_100_u64);
    let gauges = (0..100_000_u64, 0..300_u64, 0..300_u64, 1..300_u64, 1..5_000_u64, 0..5_000_u64);
    (0..60_000_i64, rates, gauges).prop_map(|(age_ms, rates, gauges)| Sample {
        scraped_ms: NOW - age_ms,
        age_ms,
        prompt_tokens_per_1000s: rates.0,
        steps_per_1000s: rates.1,
        busy_ms_per_s: rates.2,
        waiting_prompt_tokens: gauges.0,
        running: gauges.1,
        waiting: gauges.2,
        sequences_limit: gauges.3,
        kv_blocks: gauges.4,
        kv_blocks_used: gauges.5,
    })
}

fn reading() -> impl Strategy<Value = Reading> {
    prop_oneof![
        8 => sample().prop_map(Reading::Sample),
        1 => Just(Reading::Missing { metric: "m".to_owned() }),
        1 => Just(Reading::Invalid { metric: "m".to_owned() }),
    ]
}

fn some_pool(role: Role) -> impl Strategy<Value = PoolInput> {
    let bounds = (1..6_i32, 0..6_i32, 1..9_i64);
    (bounds, 0..12_i32, 0..3_i32, prop::collection::vec(reading(), 0..6), 0..3_i32).prop_map(
        move |((min, more, ranks), replicas, draining, readings, unlisted)| {
            let max = min + more;
            let replicas = replicas.clamp(min, max);
            let gangs: Vec<GangInput> = readings
                .into_iter()
                .enumerate()
                .map(|(gang, reading)| GangInput {
                    id: format!("g{gang}"),
                    revision: "r".to_owned(),
                    reading,
                })
                .collect();
            let ready = gangs.len() as i32 + unlisted / 2;
            PoolInput { ranks, replicas, live: replicas, draining, ready, gangs, ..pool(role, min, max) }
        },
    )
}

/// One in which decisions are due, or not yet.
fn history(pools: &[PoolInput], due: bool, rises: bool, tokens_per_1000s: Option<u64>) -> History {
    let since_ms = if due { NOW - POLICY.down_window_ms } else { NOW - POLICY.interval_ms };
    let rising = Rising {
        since_ms,
        seen_ms: NOW - POLICY.interval_ms,
        least: i32::MAX,
        scraped_ms: NOW - 60_000,
        scrapes: 2,
    };
    let of_pool = |pool: &PoolInput| PoolHistory {
        replicas: pool.replicas,
        rising: rises.then_some(rising),
        falling: Some(Falling { since_ms, seen_ms: NOW - POLICY.interval_ms }),
        throughput: tokens_per_1000s
            .map(|tokens_per_1000s| Throughput { revision: "r".to_owned(), tokens_per_1000s }),
        gangs: pool.gangs.iter().map(|gang| (gang.id.clone(), SEEN)).collect(),
    };
    History {
        last_ms: Some(NOW - POLICY.interval_ms),
        answered_ms: None,
        metrics: None,
        pools: pools.iter().map(|pool| (pool.role, of_pool(pool))).collect(),
    }
}

fn case() -> impl Strategy<Value = (Input, History)> {
    let pools = prop_oneof![
        (some_pool(Role::Prefill), some_pool(Role::Decode))
            .prop_map(|(prefill, decode)| vec![prefill, decode]),
        some_pool(Role::Unified).prop_map(|unified| vec![unified]),
    ];
    let speed = prop::option::of(1_000..5_000_000_u64);
    let trouble = prop::option::weighted(0.1, Just("it is away".to_owned()));
    (pools, prop::option::of(1..100_i64), 1_000..60_000_i64, trouble, any::<(bool, bool)>(), speed).prop_map(
        |(pools, gpu_budget, drain_within_ms, trouble, (due, rises), speed)| {
            let history = history(&pools, due, rises, speed);
            (Input { now_ms: NOW, policy: POLICY, gpu_budget, drain_within_ms, trouble, pools }, history)
        },
    )
}

fn to(decision: &Decision) -> Vec<i32> {
    decision.pools.iter().map(|pool| pool.to).collect()
}

fn is_whole(input: &Input, pool: &PoolInput) -> bool {
    let known =
        |gang: &GangInput| matches!(&gang.reading, Reading::Sample(sample) if sample.age_ms <= 37_500);
    input.trouble.is_none()
        && pool.gangs.iter().all(known)
        && pool.ready as usize == pool.gangs.len()
        && !pool.gangs.is_empty()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn the_bounds_hold_and_no_more_than_one_goes((input, history) in case()) {
        let (decision, after) = decide(&input, &history);
        for (pool, decided) in input.pools.iter().zip(&decision.pools) {
            prop_assert!((pool.min..=pool.max).contains(&decided.to), "{decided:?}");
            prop_assert!(decided.to >= pool.replicas - 1, "{decided:?}");
            prop_assert_eq!(after.pools[&pool.role].replicas, decided.to);
        }
    }

    #[test]
    fn nothing_goes_where_not_all_is_known((input, history) in case()) {
        let (decision, _) = decide(&input, &history);
        for (pool, decided) in input.pools.iter().zip(&decision.pools) {
            prop_assert!(is_whole(&input, pool) || decided.to >= pool.replicas, "{decided:?}");
        }
    }

    #[test]
    fn a_budget_is_not_overdrawn_and_takes_nothing_away((input, history) in case()) {
        let (decision, _) = decide(&input, &history);
        let free = Input { gpu_budget: None, ..input.clone() };
        let wished = decide(&free, &history).0;
        let Some(budget) = input.gpu_budget else { return Ok(()) };
        let (mut held, mut added) = (0, 0);
        for ((pool, decided), wished) in input.pools.iter().zip(&decision.pools).zip(&wished.pools) {
            held += i64::from(pool.replicas + pool.draining) * pool.ranks;
            added += i64::from((decided.to - pool.replicas).max(0)) * pool.ranks;
            prop_assert!(decided.to <= wished.to.max(pool.replicas), "{decided:?} {wished:?}");
            prop_assert!(decided.to >= wished.to.min(pool.replicas), "{decided:?} {wished:?}");
        }
        prop_assert!(added == 0 || held + added <= budget, "{held} + {added} of {budget}");
    }

    #[test]
    fn more_load_never_asks_for_fewer(
        ((input, history), more) in (case(), (0..2_000_000_u64, 0..500_u64, 0..50_000_u64, 0..200_u64, 0..200_u64)),
    ) {
        // A budget is shared: what one has more of another has less.
        let input = Input { gpu_budget: None, ..input };
        let mut loaded = input.clone();
        for gang in loaded.pools.iter_mut().flat_map(|pool| &mut pool.gangs) {
            if let Reading::Sample(sample) = &mut gang.reading {
                sample.prompt_tokens_per_1000s += more.0;
                sample.busy_ms_per_s += more.1;
                sample.waiting_prompt_tokens += more.2;
                sample.running += more.3;
                sample.waiting += more.4;
                sample.kv_blocks_used += more.3;
            }
        }
        let (less, more) = (decide(&input, &history).0, decide(&loaded, &history).0);
        prop_assert!(to(&less).iter().zip(to(&more)).all(|(less, more)| *less <= more), "{less:?} {more:?}");
    }

    #[test]
    fn a_history_that_was_written_and_read_decides_the_same((input, history) in case()) {
        let text = serde_json::to_string(&(&input, &history)).unwrap();
        let (read_input, read_history): (Input, History) = serde_json::from_str(&text).unwrap();
        prop_assert_eq!(decide(&read_input, &read_history), decide(&input, &history));
    }
}
