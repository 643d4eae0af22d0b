//! Conditions: their types, their reasons, and how a list of them is brought up to date.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;

/// Requests can be served: every role has a ready gang.
pub const READY: &str = "Ready";
/// Something is still to be done for what the spec asks.
pub const PROGRESSING: &str = "Progressing";
/// Something is wrong that does not mend itself.
pub const DEGRADED: &str = "Degraded";
/// Every pod has a node.
pub const SCHEDULED: &str = "Scheduled";
/// The source can be read.
pub const MODEL_AVAILABLE: &str = "ModelAvailable";
/// `spec.replicas` of a pool is out of the deployment's bounds.
pub const SCALING_LIMITED: &str = "ScalingLimited";
/// The autoscaler knows the load of every gang that is ready. Where it does not, it takes none away.
pub const METRICS_AVAILABLE: &str = "MetricsAvailable";

/// Reasons are constant words: they are matched, counted and alerted on.
pub mod reason {
    /// All is as it should be.
    pub const AS_EXPECTED: &str = "AsExpected";
    /// Every wanted gang is ready.
    pub const ALL_GANGS_READY: &str = "AllGangsReady";
    /// Requests are served, by fewer gangs than wanted.
    pub const SOME_GANGS_READY: &str = "SomeGangsReady";
    /// A role has no ready gang.
    pub const NO_GANG_READY: &str = "NoGangReady";
    /// Gangs are being made, loaded or drained.
    pub const GANGS_CHANGING: &str = "GangsChanging";
    /// Gangs of an earlier revision still run.
    pub const REVISION_CHANGING: &str = "RevisionChanging";
    /// The scheduler finds no node.
    pub const UNSCHEDULABLE: &str = "Unschedulable";
    /// Not all pods have been looked at by the scheduler, or there are none.
    pub const UNKNOWN: &str = "Unknown";
    /// A pod asks the source what it has now.
    pub const RESOLVING: &str = "Resolving";
    /// A pod downloads the model.
    pub const DOWNLOADING: &str = "Downloading";
    /// A Secret for a source that asks for none.
    pub const SECRET_NOT_NEEDED: &str = "SecretNotNeeded";
    /// The source says nothing that could be read.
    pub const SOURCE_INVALID: &str = "SourceInvalid";
    /// The image, of the model or the worker, cannot be pulled.
    pub const IMAGE_PULL_FAILED: &str = "ImagePullFailed";
    /// A gang has loaded the model.
    pub const LOADED: &str = "Loaded";
    /// Gangs have not loaded it yet.
    pub const LOADING: &str = "Loading";
    /// Ranks that no number of pods holds evenly.
    pub const PARALLELISM_INVALID: &str = "ParallelismInvalid";
    /// The API server refuses a pod: a quota, an admission webhook, a priority class that is not there.
    pub const FAILED_CREATE: &str = "FailedCreate";
    /// A LlamaPool that no LlamaDeployment made.
    pub const NOT_CONTROLLED: &str = "NotControlled";
    /// A gang lacks a pod.
    pub const GANG_INCOMPLETE: &str = "GangIncomplete";
    /// Fields of the accelerator that contradict each other, or the resources of the worker.
    pub const ACCELERATOR_INVALID: &str = "AcceleratorInvalid";
    /// A served name with characters that cannot be seen.
    pub const SERVED_NAME_INVALID: &str = "ServedNameInvalid";
    /// An older LlamaDeployment has this served name.
    pub const SERVED_NAME_TAKEN: &str = "ServedNameTaken";
    /// Neither prefill and decode nor unified, or bounds that contradict each other.
    pub const POOLS_INVALID: &str = "PoolsInvalid";
    /// A variable that the operator sets from other fields.
    pub const ENV_NOT_ALLOWED: &str = "EnvNotAllowed";
    /// The worker ended, and said nothing that could be quoted.
    pub const WORKER_FAILED: &str = "WorkerFailed";
    /// Fewer replicas wanted than minReplicas.
    pub const TOO_FEW_REPLICAS: &str = "TooFewReplicas";
    /// More replicas wanted than maxReplicas.
    pub const TOO_MANY_REPLICAS: &str = "TooManyReplicas";
    /// Within the bounds.
    pub const WITHIN_BOUNDS: &str = "WithinBounds";
    /// Times or a budget that mean nothing.
    pub const SCALING_INVALID: &str = "ScalingInvalid";
    /// The operator was not told where Prometheus is.
    pub const PROMETHEUS_NOT_CONFIGURED: &str = "PrometheusNotConfigured";
    /// Prometheus gives no answer that could be read.
    pub const PROMETHEUS_UNREACHABLE: &str = "PrometheusUnreachable";
    /// Prometheus knows none of the gangs that are ready.
    pub const NO_DATA: &str = "NoData";
    /// What Prometheus knows of some gangs is too old.
    pub const STALE_DATA: &str = "StaleData";
    /// Prometheus does not know all of the gangs that are ready, or not all of their metrics.
    pub const PARTIAL_DATA: &str = "PartialData";
}

/// A condition as a planner states it, without times.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// [`READY`] and the like.
    pub type_: &'static str,
    /// `None` is Unknown.
    pub status: Option<bool>,
    /// A constant, or the reason that a worker gave.
    pub reason: String,
    /// A sentence.
    pub message: String,
}

impl State {
    /// As stated.
    pub fn new(
        type_: &'static str,
        status: Option<bool>,
        reason: impl Into<String>,
        message: impl Into<String>,
    ) -> Self {
        Self { type_, status, reason: reason.into(), message: message.into() }
    }

    /// "True", "False" or "Unknown".
    pub fn status_word(&self) -> &'static str {
        match self.status {
            Some(true) => "True",
            Some(false) => "False",
            None => "Unknown",
        }
    }
}

/// `stated` as conditions: the time of one whose status is what it was stays.
pub fn merge(
    before: &[Condition],
    stated: &[State],
    generation: Option<i64>,
    now: Timestamp,
) -> Vec<Condition> {
    stated
        .iter()
        .map(|state| {
            let status = state.status_word();
            let same =
                before.iter().find(|condition| condition.type_ == state.type_ && condition.status == status);
            Condition {
                type_: state.type_.to_owned(),
                status: status.to_owned(),
                reason: state.reason.clone(),
                message: state.message.clone(),
                observed_generation: generation,
                last_transition_time: same
                    .map_or(Time(now), |condition| condition.last_transition_time.clone()),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_changes_with_the_status_alone() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let first = merge(&[], &[State::new(READY, Some(false), "A", "a")], Some(1), at(1));
        assert_eq!(first[0].last_transition_time, Time(at(1)));
        let second = merge(&first, &[State::new(READY, Some(false), "B", "b")], Some(2), at(2));
        assert_eq!((second[0].reason.as_str(), second[0].observed_generation), ("B", Some(2)));
        assert_eq!(second[0].last_transition_time, Time(at(1)));
        let third = merge(&second, &[State::new(READY, Some(true), "C", "c")], Some(2), at(3));
        assert_eq!(third[0].last_transition_time, Time(at(3)));
    }
}
