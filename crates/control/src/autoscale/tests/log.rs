//! Logs lead to the same decisions again.

use herd_api::Role;

use super::{IDLE, POLICY, World, pool, prompts, sequences};
use crate::autoscale::{Log, Recording};

/// A day of load in short, in a log that keeps some entries.
fn recorded(keep: usize) -> (Log, usize) {
    let mut world = World::new(&[pool(Role::Prefill, 1, 4), pool(Role::Decode, 1, 4)]);
    let (mut log, mut changes) = (Log::default(), 0);
    for step in 0..600_u64 {
        world.load = match step {
            40..120 => vec![prompts(990, 7_777), sequences(93, 31)],
            120..160 => vec![prompts(555, 333), sequences(41, 0)],
            _ => vec![IDLE, IDLE],
        };
        let input = world.look();
        let decision = log.decide(input);
        changes += decision.pools.iter().filter(|pool| pool.to != pool.from).count();
        for (pool, decided) in world.input.pools.iter_mut().zip(&decision.pools) {
            pool.replicas = decided.to;
        }
        world.input.now_ms += POLICY.interval_ms;
        if log.len() > keep {
            log.forget_oldest();
        }
    }
    (log, changes)
}

#[test]
fn a_log_that_was_written_and_read_leads_to_the_same_decisions() {
    for keep in [600, 256, 7] {
        let (log, changes) = recorded(keep);
        assert!(changes >= 6, "{changes}");
        let text = serde_json::to_string(log.recording()).unwrap();
        let read: Recording = serde_json::from_str(&text).unwrap();
        assert_eq!((read.entries.len(), &read), (keep, log.recording()));
        read.replay().unwrap();
    }
}

#[test]
fn a_decision_that_would_be_another_one_is_found() {
    let (log, _) = recorded(600);
    let mut changed = log.recording().clone();
    let entry = changed.entries.iter().position(|entry| entry.decision.pools[1].to > 1).unwrap();
    changed.entries[entry].decision.pools[1].to += 1;
    assert_eq!(changed.replay().unwrap_err().index, entry);
    // Also one that is another because of what was remembered.
    let mut changed = log.recording().clone();
    changed.entries.drain(..entry - 1);
    assert!(changed.replay().is_err());
}
