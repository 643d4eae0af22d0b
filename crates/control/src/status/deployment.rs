//! Of a LlamaDeployment, from its pools.

use herd_api::condition::{self, State, reason};
use herd_api::{
    GangPhase, LastScale, LlamaDeployment, LlamaDeploymentStatus, LlamaPool, LlamaPoolStatus, ModelStatus,
    PoolStatus, Revisions, Role,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use k8s_openapi::jiff::Timestamp;

use super::gangs as count_of;
use crate::Refusal;
use crate::plan::Unresolved;

/// What a deployment's status is made from.
#[derive(Clone, Copy, Debug)]
pub struct DeploymentView<'a> {
    /// As it was read.
    pub deployment: &'a LlamaDeployment,
    /// The pools it has now.
    pub pools: &'a [LlamaPool],
    /// Why nothing was done for it, where nothing was.
    pub refusal: Option<&'a Refusal>,
    /// What its source has is not known yet.
    pub unresolved: Option<&'a Unresolved>,
    /// A served name that an older one has; whether it has any left.
    pub name_taken: Option<(&'a str, bool)>,
    /// What a gang says of the model, once one has loaded it.
    pub model: Option<&'a ModelStatus>,
    /// What the autoscaler says.
    pub scaling: ScalingView<'a>,
    /// For transition times.
    pub now: Timestamp,
}

/// What the autoscaler says.
#[derive(Clone, Copy, Debug, Default)]
pub struct ScalingView<'a> {
    /// Whether it scales this deployment.
    pub scales: bool,
    /// Whether enough is known to. `None`: it has not looked yet, and what stood there stays.
    pub metrics: Option<&'a State>,
    /// What it did last; `None`: nothing since it began, and what stood there stays.
    pub last_scale: Option<&'a LastScale>,
}

/// The status of a deployment.
pub fn deployment_status(view: DeploymentView<'_>) -> LlamaDeploymentStatus {
    let DeploymentView { deployment, pools, refusal, unresolved, name_taken, model, scaling, now } = view;
    let mut pools: Vec<Pool<'_>> = pools.iter().map(Pool::new).collect();
    pools.sort_by_key(|pool| pool.role);
    let mut states = match (refusal, unresolved) {
        (Some(refusal), _) => {
            let Refusal { type_, reason, message } = refusal;
            let told = "nothing is done before the object is changed";
            let progressing = state(condition::PROGRESSING, false, reason, told);
            stopped(&pools, type_, (reason, message), progressing)
        }
        (None, Some(Unresolved { source, trouble: Some(trouble) })) => {
            let told = format!("{source} is asked again, later and later");
            let progressing = state(condition::PROGRESSING, true, reason::RESOLVING, told);
            stopped(&pools, condition::MODEL_AVAILABLE, (&trouble.reason, &trouble.message), progressing)
        }
        (None, Some(Unresolved { source, trouble: None })) => resolving(&pools, source, name_taken),
        (None, None) => accepted(&pools, name_taken),
    };
    let before = deployment.status.as_ref().map_or(&[][..], |status| &status.conditions);
    let last_scale = deployment.status.as_ref().and_then(|status| status.last_scale.as_ref());
    states.extend(metrics_available(scaling, before));
    let generation = deployment.metadata.generation;
    let line = pools.iter().map(|pool| format!("{} {}/{}", pool.role, pool.ready, pool.desired));
    LlamaDeploymentStatus {
        observed_generation: generation,
        conditions: condition::merge(before, &states, generation, now),
        gangs: (!pools.is_empty()).then(|| line.collect::<Vec<_>>().join(", ")),
        model: model.cloned(),
        revisions: pools.iter().filter_map(Pool::revisions).collect(),
        pools: pools.iter().map(Pool::status).collect(),
        last_scale: scaling.last_scale.or(last_scale).cloned(),
    }
}

fn metrics_available(
    ScalingView { scales, metrics, .. }: ScalingView<'_>,
    before: &[Condition],
) -> Option<State> {
    let kept = || {
        let Condition { status, reason, message, .. } =
            before.iter().find(|condition| condition.type_ == condition::METRICS_AVAILABLE)?;
        Some(State::new(condition::METRICS_AVAILABLE, known(status), reason, message))
    };
    if scales { metrics.cloned().or_else(kept) } else { None }
}

fn known(status: &str) -> Option<bool> {
    match status {
        "True" => Some(true),
        "False" => Some(false),
        _ => None,
    }
}

/// A pool, as far as its deployment's status goes.
struct Pool<'a> {
    role: Role,
    desired: i32,
    ready: i32,
    draining: i32,
    /// Its status is about its spec as it is.
    current: bool,
    target: Option<&'a str>,
    status: Option<&'a LlamaPoolStatus>,
}

impl<'a> Pool<'a> {
    fn new(pool: &'a LlamaPool) -> Self {
        let status = pool.status.as_ref();
        Self {
            role: pool.spec.role,
            desired: pool.spec.targets.iter().map(|target| target.replicas).sum(),
            ready: status.map_or(0, |status| status.ready_replicas),
            draining: status.map_or(0, |status| status.draining_replicas),
            current: status.is_some_and(|status| status.observed_generation >= pool.metadata.generation),
            target: pool.spec.targets.last().map(|target| target.revision.as_str()),
            status,
        }
    }

    fn condition(&self, type_: &str) -> Option<&'a Condition> {
        self.status?.conditions.iter().find(|condition| condition.type_ == type_)
    }

    fn status(&self) -> PoolStatus {
        PoolStatus { role: self.role, desired: self.desired, ready: self.ready, draining: self.draining }
    }

    /// The target serves as soon as one gang of it is Ready.
    fn revisions(&self) -> Option<Revisions> {
        let target = self.target?.to_owned();
        let ready = self.status.iter().flat_map(|status| &status.gangs);
        let ready = ready.filter(|gang| gang.phase == GangPhase::Ready).map(|gang| &gang.revision);
        let current = ready.max_by_key(|revision| **revision == target).cloned();
        Some(Revisions { role: self.role, current, target })
    }

    fn runs_other_revisions(&self) -> bool {
        let gangs = self.status.iter().flat_map(|status| &status.gangs);
        gangs
            .filter(|gang| gang.phase != GangPhase::Draining)
            .any(|gang| Some(gang.revision.as_str()) != self.target)
    }
}

fn state(type_: &'static str, status: bool, reason: &str, message: impl Into<String>) -> State {
    State::new(type_, Some(status), reason, message)
}

/// What runs goes on; what was asked for is not done.
fn stopped(
    pools: &[Pool<'_>],
    type_: &str,
    (reason, message): (&str, &str),
    progressing: State,
) -> Vec<State> {
    let serves = !pools.is_empty() && pools.iter().all(|pool| pool.ready > 0);
    let ready = if serves {
        let message = format!("what ran before goes on, and the change is not made: {message}");
        state(condition::READY, true, reason::SOME_GANGS_READY, message)
    } else {
        state(condition::READY, false, reason, message)
    };
    let model = if type_ == condition::MODEL_AVAILABLE {
        state(condition::MODEL_AVAILABLE, false, reason, message)
    } else {
        model_available(pools)
    };
    vec![ready, progressing, state(condition::DEGRADED, true, reason, message), scheduled(pools), model]
}

/// What runs goes on, and what is to run is being found out.
fn resolving(pools: &[Pool<'_>], source: &str, name_taken: Option<(&str, bool)>) -> Vec<State> {
    let told = format!("{source} is asked which files it has now");
    let mut states = accepted(pools, name_taken);
    for stated in &mut states {
        let status = match stated.type_ {
            condition::PROGRESSING => Some(true),
            condition::READY if pools.is_empty() => Some(false),
            condition::MODEL_AVAILABLE if stated.status != Some(true) => None,
            _ => continue,
        };
        *stated = State::new(stated.type_, status, reason::RESOLVING, told.clone());
    }
    states
}

fn accepted(pools: &[Pool<'_>], name_taken: Option<(&str, bool)>) -> Vec<State> {
    let mut degraded = first_of(pools, condition::DEGRADED, "True")
        .unwrap_or_else(|| state(condition::DEGRADED, false, reason::AS_EXPECTED, "no gang has failed"));
    let mut ready = is_ready(pools);
    if let Some((message, names_left)) = name_taken {
        if degraded.status != Some(true) {
            degraded = state(condition::DEGRADED, true, reason::SERVED_NAME_TAKEN, message);
        }
        if !names_left {
            ready = state(condition::READY, false, reason::SERVED_NAME_TAKEN, message);
        }
    }
    vec![ready, progressing(pools), degraded, scheduled(pools), model_available(pools)]
}

fn is_ready(pools: &[Pool<'_>]) -> State {
    let not_ready: Vec<&Pool<'_>> = pools.iter().filter(|pool| pool.ready == 0).collect();
    if pools.is_empty() {
        return state(condition::READY, false, reason::NO_GANG_READY, "no gang was made yet");
    }
    if not_ready.is_empty() {
        let missing = pools.iter().any(|pool| pool.ready < pool.desired);
        let reason = if missing { reason::SOME_GANGS_READY } else { reason::ALL_GANGS_READY };
        let parts = pools.iter().map(|pool| format!("{}: {} of {}", pool.role, pool.ready, pool.desired));
        let message = format!("gangs ready: {}", parts.collect::<Vec<_>>().join(", "));
        return state(condition::READY, true, reason, message);
    }
    // A pool that knows why says more than one that waits.
    let said =
        |pool: &&Pool<'_>| pool.condition(condition::READY).filter(|ready| ready.status == "False").cloned();
    let reasons: Vec<(Role, Condition)> =
        not_ready.iter().filter_map(|pool| said(pool).map(|ready| (pool.role, ready))).collect();
    let told = reasons.iter().find(|(_, ready)| ready.reason != reason::NO_GANG_READY).or(reasons.first());
    if let Some((role, ready)) = told {
        let message = format!("{role}: {}", ready.message);
        return state(condition::READY, false, &ready.reason, message);
    }
    let Pool { role, desired, .. } = not_ready[0];
    let message = format!("{role}: none of {} is ready yet", count_of(*desired));
    state(condition::READY, false, reason::NO_GANG_READY, message)
}

fn progressing(pools: &[Pool<'_>]) -> State {
    if let Some(pool) = pools.iter().find(|pool| pool.runs_other_revisions()) {
        let message = format!("{}: gangs of an earlier revision are being replaced", pool.role);
        return state(condition::PROGRESSING, true, reason::REVISION_CHANGING, message);
    }
    let changing = |pool: &&Pool<'_>| !pool.current || pool.ready != pool.desired || pool.draining > 0;
    match pools.iter().find(changing) {
        Some(pool) => {
            let Pool { role, desired, ready, draining, .. } = pool;
            let message = format!("{role}: {ready} of {} ready, {draining} draining", count_of(*desired));
            state(condition::PROGRESSING, true, reason::GANGS_CHANGING, message)
        }
        None if pools.is_empty() => {
            state(condition::PROGRESSING, true, reason::GANGS_CHANGING, "pools are being made")
        }
        None => state(condition::PROGRESSING, false, reason::AS_EXPECTED, "all is as the spec has it"),
    }
}

fn scheduled(pools: &[Pool<'_>]) -> State {
    if let Some(state) = first_of(pools, condition::SCHEDULED, "False") {
        return state;
    }
    let known =
        pools.iter().all(|pool| pool.condition(condition::SCHEDULED).is_some_and(|c| c.status == "True"));
    if known && !pools.is_empty() {
        state(condition::SCHEDULED, true, reason::AS_EXPECTED, "every pod has a node")
    } else {
        State::new(condition::SCHEDULED, None, reason::UNKNOWN, "not every pod has a node yet")
    }
}

fn model_available(pools: &[Pool<'_>]) -> State {
    if pools.iter().any(|pool| pool.ready > 0) {
        return state(condition::MODEL_AVAILABLE, true, reason::LOADED, "a gang has loaded the model");
    }
    first_of(pools, condition::MODEL_AVAILABLE, "False").unwrap_or_else(|| {
        State::new(condition::MODEL_AVAILABLE, None, reason::LOADING, "no gang has loaded the model yet")
    })
}

/// The first pool's condition that has this status, with its role in front.
fn first_of(pools: &[Pool<'_>], type_: &'static str, status: &str) -> Option<State> {
    pools.iter().find_map(|pool| {
        let condition = pool.condition(type_).filter(|condition| condition.status == status)?;
        let message = format!("{}: {}", pool.role, condition.message);
        Some(state(type_, status == "True", &condition.reason, message))
    })
}
