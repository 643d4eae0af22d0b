//! When a candidate may write itself into the lease, and how long it leads then. Pure: times are given.
//!
//! No clock of another machine is read: a record is old when it has looked the same for so long on the candidate's own
//! clock. So clocks may differ by any amount, if only they run at about the same rate.

#[cfg(test)]
mod simulation;

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::LeaseSpec;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use tokio::time::Instant;

/// How long a lease lasts and when it is renewed. The deadline is shorter than the duration: who leads knows of its end before
/// another begins.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Timing {
    /// Of whole seconds: it is in the record.
    pub(crate) lease_duration: Duration,
    pub(crate) renew_deadline: Duration,
    pub(crate) retry_period: Duration,
}

impl Default for Timing {
    /// Those of Kubernetes' own components.
    fn default() -> Self {
        Self {
            lease_duration: Duration::from_secs(15),
            renew_deadline: Duration::from_secs(10),
            retry_period: Duration::from_secs(2),
        }
    }
}

impl Timing {
    /// Until when a candidate leads by a record that was written on a request it sent then. Not from the answer on: the others
    /// may have seen the record long before.
    pub(crate) fn leads_until(self, sent: Instant) -> Instant {
        sent + self.renew_deadline
    }
}

/// A record, and since when it has looked like this on the clock of who observes it.
#[derive(Clone, Debug)]
pub(crate) struct Observed {
    pub(crate) spec: LeaseSpec,
    pub(crate) since: Instant,
}

/// What a candidate does about what it observed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is the candidate's: renew it.
    Hold,
    /// It is nobody's: take it.
    Acquire,
    /// It is another's, at least until then.
    Wait { until: Instant },
}

/// `None`: there is no lease yet.
pub(crate) fn evaluate(observed: Option<&Observed>, now: Instant, identity: &str) -> Verdict {
    let Some(Observed { spec, since }) = observed else { return Verdict::Acquire };
    match spec.holder_identity.as_deref() {
        None | Some("") => Verdict::Acquire,
        Some(holder) if holder == identity => Verdict::Hold,
        Some(_) => {
            let seconds = spec.lease_duration_seconds.unwrap_or_default().max(0);
            let until = *since + Duration::from_secs(seconds.unsigned_abs().into());
            if now < until { Verdict::Wait { until } } else { Verdict::Acquire }
        }
    }
}

/// One candidate's view.
#[derive(Clone, Debug)]
pub(crate) struct Election {
    identity: String,
    timing: Timing,
    observed: Option<Observed>,
}

impl Election {
    pub(crate) fn new(identity: String, timing: Timing) -> Self {
        Self { identity, timing, observed: None }
    }

    pub(crate) fn identity(&self) -> &str {
        &self.identity
    }

    pub(crate) fn timing(&self) -> Timing {
        self.timing
    }

    pub(crate) fn holder(&self) -> Option<&str> {
        self.observed.as_ref().and_then(|observed| observed.spec.holder_identity.as_deref())
    }

    /// The lease as the API server has it. `now` is a time after its answer arrived: with an earlier one the record could
    /// seem older than it is.
    pub(crate) fn observe(&mut self, spec: Option<&LeaseSpec>, now: Instant) {
        let unchanged = self.observed.take().filter(|observed| Some(&observed.spec) == spec);
        self.observed = unchanged.or_else(|| Some(Observed { spec: spec?.clone(), since: now }));
    }

    pub(crate) fn verdict(&self, now: Instant) -> Verdict {
        evaluate(self.observed.as_ref(), now, &self.identity)
    }

    /// The record to write where the verdict is not to wait. `wall` is for people to read.
    pub(crate) fn claim(&self, wall: Timestamp) -> LeaseSpec {
        let previous = self.observed.as_ref().map(|observed| &observed.spec);
        let mut spec = previous.cloned().unwrap_or_default();
        if spec.holder_identity.as_deref() != Some(self.identity.as_str()) {
            spec.lease_transitions =
                Some(previous.map_or(0, |spec| spec.lease_transitions.unwrap_or_default().saturating_add(1)));
            spec.acquire_time = Some(MicroTime(wall));
            spec.holder_identity = Some(self.identity.clone());
        }
        spec.renew_time = Some(MicroTime(wall));
        spec.lease_duration_seconds =
            Some(i32::try_from(self.timing.lease_duration.as_secs()).unwrap_or(i32::MAX));
        spec
    }
}

/// The record that gives a lease back: nobody holds it, and whoever counts on its duration waits but a second.
pub(crate) fn released(held: &LeaseSpec, wall: Timestamp) -> LeaseSpec {
    LeaseSpec {
        holder_identity: Some(String::new()),
        lease_duration_seconds: Some(1),
        renew_time: Some(MicroTime(wall)),
        ..held.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(holder: &str) -> LeaseSpec {
        LeaseSpec {
            holder_identity: Some(holder.to_owned()),
            lease_duration_seconds: Some(15),
            ..LeaseSpec::default()
        }
    }

    #[test]
    fn verdicts() {
        let since = Instant::now();
        let verdict =
            |spec, age| evaluate(Some(&Observed { spec, since }), since + Duration::from_millis(age), "a");
        let until = since + Duration::from_secs(15);
        assert_eq!(evaluate(None, since, "a"), Verdict::Acquire);
        assert_eq!(verdict(record("a"), 60_000), Verdict::Hold);
        assert_eq!(verdict(record(""), 0), Verdict::Acquire);
        assert_eq!(verdict(LeaseSpec::default(), 0), Verdict::Acquire);
        assert_eq!(verdict(record("b"), 0), Verdict::Wait { until });
        assert_eq!(verdict(record("b"), 14_999), Verdict::Wait { until });
        assert_eq!(verdict(record("b"), 15_000), Verdict::Acquire);
    }

    #[test]
    fn a_record_is_as_old_as_it_has_looked_the_same() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut election = Election::new("a".to_owned(), Timing::default());
        election.observe(Some(&record("b")), at(0));
        election.observe(Some(&record("b")), at(10));
        assert_eq!(election.verdict(at(14)), Verdict::Wait { until: at(15) });
        let renewed = LeaseSpec { renew_time: Some(MicroTime(Timestamp::UNIX_EPOCH)), ..record("b") };
        election.observe(Some(&renewed), at(14));
        assert_eq!(election.verdict(at(15)), Verdict::Wait { until: at(29) });
        election.observe(None, at(16));
        assert_eq!(election.verdict(at(16)), Verdict::Acquire);
    }

    #[test]
    fn transitions_count_changes_of_the_holder() {
        let (start, wall) = (Instant::now(), Timestamp::UNIX_EPOCH);
        let mut election = Election::new("a".to_owned(), Timing::default());
        let created = election.claim(wall);
        assert_eq!((created.lease_transitions, created.lease_duration_seconds), (Some(0), Some(15)));
        election.observe(Some(&created), start);
        let later = Timestamp::from_second(7).unwrap();
        let renewed = election.claim(later);
        assert_eq!(renewed.lease_transitions, Some(0));
        assert_eq!(
            (renewed.acquire_time, renewed.renew_time),
            (Some(MicroTime(wall)), Some(MicroTime(later)))
        );
        election.observe(Some(&LeaseSpec { lease_transitions: Some(4), ..record("b") }), start);
        let taken = election.claim(later);
        assert_eq!(taken.lease_transitions, Some(5));
        assert_eq!(
            (taken.holder_identity.as_deref(), taken.acquire_time),
            (Some("a"), Some(MicroTime(later)))
        );
    }
}
