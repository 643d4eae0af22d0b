//! Of a LlamaPool, from its gangs.

use herd_api::condition::{self, State, reason};
use herd_api::{GangFailure, GangPhase, GangStatus, LlamaPool, LlamaPoolSpec, LlamaPoolStatus, labels};
use k8s_openapi::jiff::Timestamp;

use super::gangs as count_of;
use crate::Refusal;
use crate::gang::{Gang, Trouble, TroubleKind};

/// Gangs listed in a status.
const MAX_LISTED: usize = 256;

/// What a pool's status is made from.
#[derive(Clone, Copy, Debug)]
pub struct PoolView<'a> {
    /// As it was read.
    pub pool: &'a LlamaPool,
    /// Its gangs now.
    pub gangs: &'a [Gang],
    /// Why nothing is done for it, where nothing is.
    pub refusal: Option<&'a Refusal>,
    /// The last gang that was given up, see the plan.
    pub last_failure: Option<&'a GangFailure>,
    /// For transition times.
    pub now: Timestamp,
}

/// The status of a pool.
pub fn pool_status(view: PoolView<'_>) -> LlamaPoolStatus {
    let PoolView { pool, gangs, refusal, last_failure, now } = view;
    let LlamaPoolSpec { deployment_ref, role, replicas, min_replicas, max_replicas, targets } = &pool.spec;
    let desired: i32 = targets.iter().map(|target| target.replicas).sum();
    let of_phase = |phase: GangPhase| gangs.iter().filter(|gang| gang.phase == phase).count() as i32;
    let (ready, draining) = (of_phase(GangPhase::Ready), of_phase(GangPhase::Draining));
    // Those of earlier revisions are Ready too, and mean nothing for what is to be made.
    let is_target = |gang: &&Gang| targets.iter().any(|target| target.revision == gang.revision);
    let ready_targets = gangs.iter().filter(|gang| gang.phase == GangPhase::Ready).filter(is_target).count();
    let last_failure = last_failure.filter(|_| (ready_targets as i32) < desired);
    // While nothing runs in its place it is what there is to say.
    let is_live = |gang: &&Gang| !matches!(gang.phase, GangPhase::Draining | GangPhase::Failed);
    let live = gangs.iter().filter(is_target).filter(is_live).count();
    let given_up = last_failure.filter(|_| (live as i32) < desired).map(trouble);
    let troubles = given_up.iter().chain(gangs.iter().filter_map(|gang| gang.trouble.as_ref()));
    let refused = refusal.map(refused);
    let worst = refused.as_ref().or(troubles.min_by_key(|one| one.kind));
    let states = [
        is_ready(desired, ready, worst),
        scheduled(gangs, given_up.as_ref()),
        model_available(ready, worst),
        degraded(worst),
        scaling_limited(*replicas, *min_replicas, *max_replicas),
    ];
    let before = pool.status.as_ref().map_or(&[][..], |status| &status.conditions);
    LlamaPoolStatus {
        observed_generation: pool.metadata.generation,
        replicas: gangs.len() as i32 - draining,
        ready_replicas: ready,
        draining_replicas: draining,
        selector: labels::leader_selector(&deployment_ref.name, *role),
        conditions: condition::merge(before, &states, pool.metadata.generation, now),
        last_failure: last_failure.cloned(),
        gangs: gangs.iter().take(MAX_LISTED).map(listed).collect(),
    }
}

fn listed(gang: &Gang) -> GangStatus {
    let Gang { id, revision, pods: _, phase, created: _, restarts, trouble, address: _ } = gang;
    GangStatus {
        id: id.clone(),
        revision: revision.clone(),
        phase: *phase,
        restarts: *restarts,
        message: trouble.as_ref().map(|trouble| trouble.message.clone()),
    }
}

fn refused(Refusal { type_: _, reason, message }: &Refusal) -> Trouble {
    Trouble { kind: TroubleKind::Lost, reason: (*reason).to_owned(), message: message.clone() }
}

fn trouble(failure: &GangFailure) -> Trouble {
    let GangFailure { revision: _, since: _, time: _, reason, message } = failure;
    let is_scheduling = reason == reason::UNSCHEDULABLE;
    let kind = if is_scheduling { TroubleKind::Scheduling } else { TroubleKind::Lost };
    Trouble { kind, reason: reason.clone(), message: message.clone() }
}

fn is_ready(desired: i32, ready: i32, worst: Option<&Trouble>) -> State {
    let state = |status, reason: &str, message| State::new(condition::READY, Some(status), reason, message);
    match (ready, worst) {
        (0, Some(Trouble { kind: _, reason, message })) => state(false, reason, message.clone()),
        (0, None) => {
            state(false, reason::NO_GANG_READY, format!("none of {} is ready yet", count_of(desired)))
        }
        _ if ready >= desired => state(true, reason::ALL_GANGS_READY, format!("{} ready", count_of(ready))),
        (_, Some(Trouble { kind: _, reason: _, message })) => {
            let message = format!("{ready} of {} ready: {message}", count_of(desired));
            state(true, reason::SOME_GANGS_READY, message)
        }
        _ => state(true, reason::SOME_GANGS_READY, format!("{ready} of {} ready", count_of(desired))),
    }
}

fn scheduled(gangs: &[Gang], given_up: Option<&Trouble>) -> State {
    let state =
        |status, reason: &str, message: &str| State::new(condition::SCHEDULED, status, reason, message);
    let troubles = gangs.iter().filter_map(|gang| gang.trouble.as_ref()).chain(given_up);
    let mut of_scheduling = troubles.filter(|trouble| trouble.kind == TroubleKind::Scheduling);
    if let Some(Trouble { kind: _, reason, message }) = of_scheduling.next() {
        return state(Some(false), reason, message);
    }
    if gangs.is_empty() || gangs.iter().any(|gang| gang.phase == GangPhase::Pending) {
        return state(None, reason::UNKNOWN, "not every pod has a node yet");
    }
    state(Some(true), reason::AS_EXPECTED, "every pod has a node")
}

fn model_available(ready: i32, worst: Option<&Trouble>) -> State {
    let state =
        |status, reason: &str, message: &str| State::new(condition::MODEL_AVAILABLE, status, reason, message);
    match worst {
        _ if ready > 0 => state(Some(true), reason::LOADED, "a gang has loaded the model"),
        Some(Trouble { kind: TroubleKind::Source | TroubleKind::Download, reason, message }) => {
            state(Some(false), reason, message)
        }
        _ => state(None, reason::LOADING, "no gang has loaded the model yet"),
    }
}

fn degraded(worst: Option<&Trouble>) -> State {
    match worst {
        Some(Trouble {
            kind: TroubleKind::Worker | TroubleKind::Source | TroubleKind::Lost,
            reason,
            message,
        }) => State::new(condition::DEGRADED, Some(true), reason, message),
        _ => State::new(condition::DEGRADED, Some(false), reason::AS_EXPECTED, "no gang has failed"),
    }
}

fn scaling_limited(replicas: Option<i32>, min: Option<i32>, max: Option<i32>) -> State {
    let state = |status, reason: &str, message: String| {
        State::new(condition::SCALING_LIMITED, Some(status), reason, message)
    };
    match (replicas, min, max) {
        (Some(replicas), Some(min), _) if replicas < min => state(
            true,
            reason::TOO_FEW_REPLICAS,
            format!("replicas {replicas} is below the minReplicas {min} of the LlamaDeployment: {min} run"),
        ),
        (Some(replicas), _, Some(max)) if replicas > max => state(
            true,
            reason::TOO_MANY_REPLICAS,
            format!("replicas {replicas} is above the maxReplicas {max} of the LlamaDeployment: {max} run"),
        ),
        _ => state(false, reason::WITHIN_BOUNDS, "replicas is within the bounds".to_owned()),
    }
}
