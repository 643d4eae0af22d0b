//! The logs of all deployments, bounded together.

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use herd_control::autoscale::{Decision, Input, Log};
use serde::Serialize;
use serde_json::Value;

/// Of one deployment: at an interval of five seconds, the last 21 minutes.
const MAX_ENTRIES: usize = 256;
/// Of all logs together, in gangs and pools: some 4 MB.
const MAX_WEIGHT: usize = 20_000;

/// Shared with the page that shows them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Logs(Arc<Mutex<BTreeMap<Name, OfDeployment>>>);

type Name = (String, String);

#[derive(Debug, Default)]
struct OfDeployment {
    uid: String,
    log: Log,
}

/// A line of the overview.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Line<'a> {
    namespace: &'a str,
    name: &'a str,
    entries: usize,
    last: Option<&'a Decision>,
}

impl Logs {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Name, OfDeployment>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next decision about a deployment. One of the same name that was there before is another.
    pub(super) fn decide(&self, namespace: &str, name: &str, uid: &str, input: Input) -> Decision {
        let mut logs = self.lock();
        let of = logs.entry((namespace.to_owned(), name.to_owned())).or_default();
        if of.uid != uid {
            *of = OfDeployment { uid: uid.to_owned(), log: Log::default() };
        }
        let decision = of.log.decide(input);
        if of.log.len() > MAX_ENTRIES {
            of.log.forget_oldest();
        }
        decision
    }

    /// Forgets all others: a deployment that comes back to this autoscaler is a new one to it.
    pub(super) fn keep(&self, uids: &HashSet<String>) {
        self.lock().retain(|_, of| uids.contains(&of.uid));
    }

    /// Cuts them down to what they may have together, the longest first.
    pub(super) fn cut(&self) {
        self.cut_to(MAX_WEIGHT);
    }

    fn cut_to(&self, weight: usize) {
        let mut logs = self.lock();
        while logs.values().map(|of| of.log.weight()).sum::<usize>() > weight {
            let longest = logs.values_mut().max_by_key(|of| of.log.weight());
            let Some(OfDeployment { log, .. }) = longest.filter(|of| !of.log.is_empty()) else { break };
            log.forget_oldest();
        }
    }

    /// What was decided last about each deployment.
    pub(crate) fn overview(&self) -> serde_json::Result<Value> {
        let logs = self.lock();
        let lines = logs.iter().map(|((namespace, name), OfDeployment { uid: _, log })| {
            let last = log.recording().entries.back().map(|entry| &entry.decision);
            Line { namespace, name, entries: log.len(), last }
        });
        serde_json::to_value(lines.collect::<Vec<_>>())
    }

    /// The log of one, to be replayed.
    pub(crate) fn recording(&self, namespace: &str, name: &str) -> Option<serde_json::Result<String>> {
        let logs = self.lock();
        let of = logs.get(&(namespace.to_owned(), name.to_owned()))?;
        Some(serde_json::to_string(of.log.recording()))
    }
}

#[cfg(test)]
mod tests {
    use herd_control::autoscale::{Policy, Recording};

    use super::*;

    fn input(now_ms: i64) -> Input {
        let policy = Policy { interval_ms: 5_000, scrape_interval_ms: 1, up_after_ms: 1, down_window_ms: 1 };
        Input { now_ms, policy, gpu_budget: None, drain_within_ms: 1, trouble: None, pools: Vec::new() }
    }

    fn recording(logs: &Logs, name: &str) -> Recording {
        serde_json::from_str(&logs.recording("n", name).unwrap().unwrap()).unwrap()
    }

    #[test]
    fn logs_are_bounded_each_and_together() {
        let logs = Logs::default();
        for time in 0..300 {
            logs.decide("n", "a", "1", input(time));
            if time % 10 == 0 {
                logs.decide("n", "b", "2", input(time));
            }
        }
        assert_eq!(recording(&logs, "a").entries.len(), MAX_ENTRIES);
        logs.cut_to(100);
        let left = ["a", "b"].map(|name| recording(&logs, name));
        assert_eq!(left.each_ref().map(|of| of.entries.len()), [70, 30]);
        assert_eq!(left[0].entries[69].input.now_ms, 299);
        for of in &left {
            of.replay().unwrap();
        }
    }

    #[test]
    fn another_of_the_same_name_begins_anew() {
        let logs = Logs::default();
        logs.decide("n", "a", "1", input(1));
        logs.decide("n", "a", "2", input(2));
        assert_eq!(recording(&logs, "a").entries.len(), 1);
        logs.keep(&HashSet::new());
        assert!(logs.recording("n", "a").is_none());
    }
}
