//! Up and down, on data that is whole.

use herd_api::Role;

use super::{IDLE, POLICY, World, pool, prompts, sequences};
use crate::autoscale::Sample;

fn apart() -> World {
    World::new(&[pool(Role::Prefill, 1, 8), pool(Role::Decode, 1, 8)])
}

#[test]
fn long_prompts_make_prefill_grow_and_decode_not() {
    let mut world = apart();
    world.load = vec![prompts(1_000, 0), sequences(10, 0)];
    assert_eq!(world.run(30), [[1, 1], [2, 1]]);
    // Two that share what comes have room.
    world.load[0] = prompts(600, 0);
    assert_eq!(world.run(600), [[2, 1]]);
}

#[test]
fn long_answers_make_decode_grow_and_prefill_not() {
    let mut world = apart();
    world.load = vec![prompts(100, 0), sequences(100, 40)];
    assert_eq!(world.run(30), [[1, 1], [1, 2]]);
}

#[test]
fn kv_that_is_full_makes_decode_grow() {
    let mut world = apart();
    world.load[1] = Sample { kv_blocks_used: 900, ..sequences(10, 0) };
    assert_eq!(world.run(30), [[1, 1], [1, 2]]);
}

#[test]
fn prompts_that_wait_are_to_be_computed_in_time() {
    let mut world = apart();
    world.load[0] = prompts(700, 0);
    world.run(120);
    assert_eq!(world.replicas(), [1, 1]);
    // 0.7 gangs for what comes and 2 for what waits, at 80 percent.
    world.load[0] = prompts(700, 20_000);
    assert_eq!(world.run(20), [[1, 1], [4, 1]]);
    // Sooner: more.
    world.load[0] = prompts(175, 5_000);
    world.input.drain_within_ms = 5_000;
    assert_eq!(world.run(20), [[4, 1], [6, 1]]);
}

#[test]
fn how_fast_a_gang_is_is_remembered_while_it_idles() {
    let mut world = apart();
    world.load[0] = prompts(700, 0);
    world.run(120);
    world.load[0] = IDLE;
    world.run(3_600);
    // A burst that nothing was computed of yet.
    world.load[0] = Sample { waiting_prompt_tokens: 20_000, ..IDLE };
    assert_eq!(world.run(30), [[1, 1], [3, 1]]);
}

/// A gang that was slow, with small prompts say, may be fast with others: it is at most as full as it is busy.
#[test]
fn what_comes_is_no_more_than_gangs_are_busy_with() {
    let mut world = apart();
    world.load[0] = Sample { prompt_tokens_per_1000s: 70_000, steps_per_1000s: 1_000, ..prompts(700, 0) };
    world.run(120);
    assert_eq!(world.history.pools[&Role::Prefill].throughput_of("r"), Some(100_000));
    world.load[0] = Sample { prompt_tokens_per_1000s: 900_000, ..prompts(450, 0) };
    assert_eq!(world.run(60), [[1, 1]]);
}

/// Samples from a cold start poison what is known of a gang's speed.
#[test]
fn a_gang_that_has_only_just_begun_says_nothing_of_its_speed() {
    let mut world = apart();
    let slow = Sample { prompt_tokens_per_1000s: 100_000, steps_per_1000s: 500, ..prompts(1_000, 0) };
    world.load[0] = slow;
    world.input.pools[0].max = 1;
    world.run(POLICY.rate_window_ms() / 1_000);
    assert_eq!(world.history.pools[&Role::Prefill].throughput, None);
    world.load[0] = prompts(1_000, 0);
    world.run(10);
    assert_eq!(world.history.pools[&Role::Prefill].throughput_of("r"), Some(1_000_000));
    // Nor does one that is hardly busy, or busy with something else.
    for other in [
        Sample { prompt_tokens_per_1000s: 10_000, ..prompts(400, 0) },
        Sample { prompt_tokens_per_1000s: 10_000, steps_per_1000s: 50_000, ..prompts(1_000, 0) },
    ] {
        world.load[0] = other;
        world.run(60);
        assert_eq!(world.history.pools[&Role::Prefill].throughput_of("r"), Some(1_000_000));
    }
    // What an earlier revision could do is another matter.
    world.input.pools[0].revision = "s".to_owned();
    world.load[0] = IDLE;
    world.tick();
    assert_eq!(world.history.pools[&Role::Prefill].throughput_of("s"), None);
}

#[test]
fn one_scrape_alone_asks_for_nothing() {
    let mut world = apart();
    world.load[1] = sequences(100, 100);
    // Read three times, and gone in the next scrape.
    world.input.now_ms -= world.input.now_ms % 15_000;
    let mut seen = Vec::new();
    for _ in 0..3 {
        seen.push(world.tick().pools[1].to);
    }
    world.load[1] = sequences(10, 0);
    seen.push(world.tick().pools[1].to);
    assert_eq!(seen, [1; 4]);
    // Nor does one that has been the newest for long, because no other came.
    world.load[1] = sequences(100, 100);
    let stuck = Sample { scraped_ms: 1, ..sequences(100, 100) };
    for _ in 0..60 {
        let mut input = world.look();
        input.pools[1].gangs[0].reading = crate::autoscale::Reading::Sample(stuck);
        assert_eq!(world.decide(&input).pools[1].to, 1);
    }
}

#[test]
fn down_goes_one_gang_a_window() {
    let mut world = apart();
    for pool in &mut world.input.pools {
        pool.replicas = 4;
    }
    let seen = world.run(299);
    assert_eq!(seen, [[4, 4]]);
    assert_eq!(world.run(20), [[4, 4], [3, 3]]);
    assert_eq!(world.run(280), [[3, 3]]);
    assert_eq!(world.run(1_200), [[3, 3], [2, 2], [1, 1]]);
}

#[test]
fn load_that_comes_back_within_the_window_takes_nothing_away() {
    let mut world = apart();
    world.input.pools[1].replicas = 2;
    let mut quiet = 0;
    let seen = world.run_with(3_000, |world| {
        quiet += 1;
        // Every 250 seconds two gangs are needed for a moment.
        world.load[1] = if quiet % 50 == 0 { sequences(45, 0) } else { IDLE };
    });
    assert_eq!(seen, [[1, 2]]);
}

/// A load between what asks for more and what asks for fewer moves nothing (2 and 1 in turn at a constant load).
#[test]
fn a_constant_load_settles() {
    for all in (1..800_u64).step_by(7) {
        let mut world = apart();
        let share = |world: &mut World| {
            let (prefill, decode) = (world.role(0) as u64, world.role(1) as u64);
            // 1000 gangs' worth is 1000 ms; what one gang cannot do waits.
            world.load = vec![
                prompts((all * 10 / prefill).min(1_000), 0),
                sequences((all / decode).min(100), (all / decode).saturating_sub(100)),
            ];
        };
        let before = world.run_with(1_200, share);
        assert!(before.windows(2).all(|two| two[0] <= two[1]), "{all}: {before:?}");
        let settled = world.run_with(3_600, share);
        assert_eq!(settled.len(), 1, "{all}: {settled:?}");
    }
}

/// Scales up on each reconciliation without any load.
#[test]
fn gangs_that_are_coming_are_capacity() {
    let mut world = apart();
    world.start_ms = 600_000;
    world.load[1] = sequences(100, 20);
    // Asked once: the load asks for two, and the second one is on its way.
    assert_eq!(world.run(600), [[1, 1], [1, 2]]);
    let mut idle = apart();
    idle.start_ms = i64::MAX;
    assert_eq!(idle.run(3_600), [[1, 1]]);
}

/// One gang that is never Ready freezes scaling.
#[test]
fn gangs_that_never_come_do_not_keep_a_pool_large() {
    let mut world = apart();
    world.start_ms = 3_600_000;
    world.input.pools[1].replicas = 3;
    let seen = world.run(900);
    assert_eq!(seen, [[1, 3], [1, 2], [1, 1]]);
}

/// A rate of nothing is a number, whatever a gang's speed is.
#[test]
fn without_any_request_a_pool_comes_down_to_its_least() {
    let mut world = apart();
    world.input.pools[0].replicas = 7;
    assert_eq!(world.run(3_000).last(), Some(&vec![1, 1]));
}

#[test]
fn what_somebody_else_has_changed_stays_for_a_window() {
    let mut world = apart();
    world.input.pools[1].replicas = 3;
    assert_eq!(world.run(290), [[1, 3]]);
    world.input.pools[1].replicas = 2;
    assert_eq!(world.run(295), [[1, 2]]);
    assert_eq!(world.run(30), [[1, 2], [1, 1]]);
    // The same for more: what was asked for before the change is over.
    world.load[1] = sequences(300, 0);
    world.run(10);
    world.input.pools[1].replicas = 2;
    assert_eq!(world.run(15), [[1, 2]]);
}

#[test]
fn a_gang_that_decodes_all_the_time_is_not_full_of_prompts() {
    let mut world = World::new(&[pool(Role::Unified, 1, 8)]);
    let chat = Sample { prompt_tokens_per_1000s: 200_000, ..sequences(10, 0) };
    world.load[0] = chat;
    assert_eq!(world.run(600), [[1]]);
    // By the larger of both.
    world.load[0] = sequences(90, 0);
    assert_eq!(world.run(30), [[1], [2]]);
    world.load[0] = prompts(700, 0);
    assert_eq!(world.run(90), [[2]]);
    world.load[0] = prompts(700, 20_000);
    assert_eq!(world.run(20), [[2], [7]]);
}

#[test]
fn the_bounds_hold() {
    let mut world = World::new(&[pool(Role::Prefill, 2, 3), pool(Role::Decode, 1, 1)]);
    world.load = vec![prompts(1_000, 1_000_000), sequences(100, 1_000)];
    assert_eq!(world.run(600), [[2, 1], [3, 1]]);
    world.load = vec![IDLE, IDLE];
    assert_eq!(world.run(1_000), [[3, 1], [2, 1]]);
}

#[test]
fn a_budget_is_shared_and_nothing_that_runs_goes_for_it() {
    let mut world = apart();
    for pool in &mut world.input.pools {
        pool.ranks = 8;
    }
    world.input.gpu_budget = Some(32);
    world.load = vec![prompts(1_000, 20_000), sequences(100, 200)];
    // Prefill would have 2 and decode 4 in all; there is room for two more.
    let decision = loop {
        let decision = world.tick();
        if world.replicas() != [1, 1] {
            break decision;
        }
    };
    assert_eq!(world.replicas().iter().sum::<i32>(), 4, "{decision:?}");
    assert!(decision.pools[1].why.contains("of the budget of 32 16 are left"), "{decision:?}");
    // A budget that is less than what runs takes nothing away.
    world.input.gpu_budget = Some(8);
    let seen = world.run(900);
    assert_eq!(seen.len(), 1, "{seen:?}");
}

/// Gangs that end what they run, and those of an earlier revision, have their GPUs until they are gone.
#[test]
fn what_drains_holds_its_part_of_the_budget() {
    let mut world = apart();
    world.input.gpu_budget = Some(4);
    world.load[1] = sequences(100, 100);
    for _ in 0..20 {
        let mut input = world.look();
        input.pools[0].live = 2;
        input.pools[1].draining = 1;
        world.decide(&input);
    }
    assert_eq!(world.replicas(), [1, 1]);
    for _ in 0..20 {
        let mut input = world.look();
        input.pools[1].draining = 1;
        world.decide(&input);
    }
    assert_eq!(world.replicas(), [1, 2]);
}

#[test]
fn a_restart_begins_a_new_window() {
    let mut world = apart();
    world.input.pools[1].replicas = 2;
    world.run(290);
    world.history = crate::autoscale::History::default();
    assert_eq!(world.run(295), [[1, 2]]);
    // So does a time without any decision, and a clock that was set back.
    world.input.now_ms += 200_000;
    assert_eq!(world.run(295), [[1, 2]]);
    world.input.now_ms -= 3_600_000;
    assert_eq!(world.run(295), [[1, 2]]);
    assert_eq!(world.run(30), [[1, 2], [1, 1]]);
}
