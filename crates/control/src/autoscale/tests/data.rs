//! Data that is missing, old, partial or impossible.

use herd_api::Role;
use herd_api::condition::reason;

use super::{IDLE, POLICY, World, pool, sequences};
use crate::autoscale::{Decision, Input, Reading, Sample};

/// What is done to an input.
type Spoil<'a> = &'a dyn Fn(&mut Input);

fn two_decode_gangs() -> World {
    let mut world = World::new(&[pool(Role::Prefill, 1, 4), pool(Role::Decode, 1, 4)]);
    world.input.pools[1].replicas = 2;
    // For as long as a new gang may be without a sample.
    world.run(100);
    world
}

fn no_metric() -> Reading {
    Reading::Missing { metric: "herd_kv_blocks".to_owned() }
}

/// Runs on inputs that were spoilt.
fn spoilt(world: &mut World, seconds: i64, spoil: impl Fn(&mut Input)) -> Decision {
    let mut last = None;
    for _ in 0..seconds / 5 {
        let mut input = world.look();
        spoil(&mut input);
        last = Some(world.decide(&input));
    }
    last.unwrap()
}

#[test]
fn whatever_is_wrong_with_the_data_nothing_goes_and_the_condition_says_why() {
    let of_first_decode = |input: &mut Input, reading: Reading| input.pools[1].gangs[0].reading = reading;
    let cases: [(&str, &str, Spoil<'_>); 6] = [
        (reason::PROMETHEUS_UNREACHABLE, "connection refused", &|input| {
            input.trouble = Some("http://p: connection refused".to_owned());
        }),
        (reason::NO_DATA, "of 3 gangs that are ready, 3 are not known", &|input| {
            for gang in input.pools.iter_mut().flat_map(|pool| &mut pool.gangs) {
                gang.reading = no_metric();
            }
        }),
        (reason::STALE_DATA, "1 have samples that are too old: decode g0: 38 s old", &|input| {
            of_first_decode(input, Reading::Sample(Sample { age_ms: 38_000, ..IDLE }));
        }),
        (reason::PARTIAL_DATA, "1 are not known to Prometheus: decode g0: no herd_kv_blocks", &|input| {
            of_first_decode(input, no_metric());
        }),
        (reason::PARTIAL_DATA, "decode g0: herd_kv_blocks cannot be what it says", &|input| {
            of_first_decode(input, Reading::Invalid { metric: "herd_kv_blocks".to_owned() });
        }),
        (reason::PARTIAL_DATA, "decode: 1 more than a pool's status lists", &|input| {
            input.pools[1].ready = 3;
        }),
    ];
    for (reason, message, spoil) in cases {
        let mut world = two_decode_gangs();
        let decision = spoilt(&mut world, 900, spoil);
        assert_eq!(world.replicas(), [1, 2], "{reason} {message}");
        assert_eq!((decision.metrics.status, decision.metrics.reason.as_str()), (Some(false), reason));
        assert!(decision.metrics.message.contains(message), "{}", decision.metrics.message);
        // And when it is whole again, a whole window has to pass.
        assert_eq!(world.run(295), [[1, 2]], "{reason}");
        assert_eq!(world.run(30), [[1, 2], [1, 1]], "{reason}");
        let metrics = world.tick().metrics;
        assert_eq!((metrics.status, metrics.reason.as_str()), (Some(true), reason::AS_EXPECTED));
    }
}

#[test]
fn what_is_known_is_enough_to_scale_up() {
    let mut world = two_decode_gangs();
    world.load[1] = sequences(100, 200);
    spoilt(&mut world, 30, |input| input.pools[1].gangs[0].reading = no_metric());
    // 300 sequences in gangs of 100, at 80 percent.
    assert_eq!(world.replicas(), [1, 4]);
}

#[test]
fn what_is_not_known_is_not_made_up() {
    // Full as far as it is known: if the other one were as full there would have to be more.
    let mut world = two_decode_gangs();
    world.load[1] = sequences(100, 0);
    spoilt(&mut world, 900, |input| input.pools[1].gangs[0].reading = no_metric());
    assert_eq!(world.replicas(), [1, 2]);
}

#[test]
fn an_old_sample_scales_nothing_up() {
    let mut world = two_decode_gangs();
    world.load[1] = sequences(100, 200);
    spoilt(&mut world, 900, |input| {
        for gang in &mut input.pools[1].gangs {
            let Reading::Sample(sample) = &mut gang.reading else { continue };
            sample.age_ms = POLICY.stale_after_ms() + 1;
        }
    });
    assert_eq!(world.replicas(), [1, 2]);
}

#[test]
fn a_gang_that_is_new_need_not_have_a_sample_yet() {
    let mut world = two_decode_gangs();
    world.input.pools[1].replicas = 3;
    let decision = spoilt(&mut world, 60, |input| input.pools[1].gangs[2].reading = no_metric());
    assert_eq!(decision.metrics.status, Some(true));
    let decision = spoilt(&mut world, 60, |input| input.pools[1].gangs[2].reading = no_metric());
    assert_eq!(decision.metrics.reason, reason::PARTIAL_DATA);
    // Where all are new, nothing is wrong yet.
    let mut world = World::new(&[pool(Role::Unified, 1, 2)]);
    let first = spoilt(&mut world, 5, |input| input.pools[0].gangs[0].reading = no_metric());
    assert_eq!((first.metrics.status, first.metrics.reason.as_str()), (None, reason::UNKNOWN));
    let later = spoilt(&mut world, 120, |input| input.pools[0].gangs[0].reading = no_metric());
    assert_eq!(later.metrics.reason, reason::NO_DATA);
}

/// One scrape in many fails: if each of them began a new window, a large pool would never shrink.
#[test]
fn a_scrape_that_fails_now_and_then_is_no_news() {
    let mut world = two_decode_gangs();
    let mut told = Vec::new();
    for step in 0..80 {
        let mut input = world.look();
        match step % 5 {
            0 => input.pools[1].gangs[0].reading = no_metric(),
            1 if step % 2 == 0 => input.trouble = Some("it did not answer once".to_owned()),
            _ => {}
        }
        let decision = world.decide(&input);
        if decision.pools[1].to < decision.pools[1].from {
            assert_eq!(input.trouble, None);
            assert!(matches!(input.pools[1].gangs[0].reading, Reading::Sample(_)));
        }
        told.push(decision.metrics.status);
    }
    assert_eq!(world.replicas(), [1, 1]);
    assert!(told.iter().all(|status| *status == Some(true)), "{told:?}");
    // And load is seen through them.
    world.load[1] = sequences(100, 20);
    for step in 0..8 {
        let mut input = world.look();
        if step % 3 == 1 {
            input.pools[1].gangs[0].reading = no_metric();
        }
        world.decide(&input);
    }
    assert_eq!(world.replicas(), [1, 2]);
}

#[test]
fn without_a_gang_that_is_ready_nothing_is_known_and_nothing_goes() {
    let mut world = two_decode_gangs();
    world.start_ms = i64::MAX;
    let decision = world.tick();
    assert_eq!((decision.metrics.status, decision.metrics.reason.as_str()), (None, reason::UNKNOWN));
    assert_eq!(world.run(1_200), [[1, 2]]);
}
