//! What the pods of a pool say about its gangs.

use std::collections::BTreeMap;

use herd_api::condition::reason;
use herd_api::{GangPhase, labels};
use k8s_openapi::api::core::v1::{ContainerStateTerminated, ContainerStatus, Pod, PodCondition, PodStatus};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt as _;
use serde::Deserialize;

/// A message is shown in conditions and events: a person reads it.
const MAX_MESSAGE: usize = 1024;

/// One copy of the model, as its pods have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gang {
    /// Generated, never used again.
    pub id: String,
    /// What it was made from.
    pub revision: String,
    /// Name and uid of each pod.
    pub pods: Vec<PodId>,
    /// Where it stands.
    pub phase: GangPhase,
    /// When its first pod was made.
    pub created: Timestamp,
    /// Times its processes were started anew in place.
    pub restarts: i32,
    /// Why it is not Ready, where its pods say so.
    pub trouble: Option<Trouble>,
    /// Of the leader, once it has one.
    pub address: Option<String>,
}

/// One pod, and no later one of its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodId {
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: String,
}

/// What keeps a gang from being Ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// What it concerns.
    pub kind: TroubleKind,
    /// A constant, or the worker's own.
    pub reason: String,
    /// A sentence.
    pub message: String,
}

/// What trouble concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TroubleKind {
    /// The scheduler finds no node.
    Scheduling,
    /// An image or volume cannot be had.
    Source,
    /// The worker ended with an error.
    Worker,
    /// The pod is lost.
    Lost,
}

/// What a worker writes before it ends, see `herd-worker`.
#[derive(Deserialize)]
struct LastWords {
    reason: String,
    message: String,
}

/// Groups the pods of one pool into its gangs, by id. Pods without the labels of a gang are none.
pub fn gangs(pods: &[Pod]) -> Vec<Gang> {
    let mut gangs: BTreeMap<String, Gang> = BTreeMap::new();
    for pod in pods {
        let Some(one) = gang_of(pod) else { continue };
        match gangs.get_mut(&one.id) {
            None => {
                gangs.insert(one.id.clone(), one);
            }
            Some(gang) => join(gang, one),
        }
    }
    gangs.into_values().collect()
}

/// A gang is what its worst pod is.
fn join(
    gang: &mut Gang,
    Gang { id: _, revision: _, pods, phase, created, restarts, trouble, address }: Gang,
) {
    gang.pods.extend(pods);
    gang.phase = worst(gang.phase, phase);
    gang.created = gang.created.min(created);
    gang.restarts = gang.restarts.max(restarts);
    gang.trouble = gang.trouble.take().or(trouble);
    gang.address = gang.address.take().or(address);
}

fn worst(left: GangPhase, right: GangPhase) -> GangPhase {
    let order = |phase| match phase {
        GangPhase::Draining => 0,
        GangPhase::Failed => 1,
        GangPhase::CrashLooping => 2,
        GangPhase::Pending => 3,
        GangPhase::Starting => 4,
        GangPhase::Ready => 5,
    };
    if order(left) <= order(right) { left } else { right }
}

fn gang_of(pod: &Pod) -> Option<Gang> {
    let label = |key: &str| pod.labels().get(key).cloned();
    let (id, revision) = (label(labels::GANG)?, label(labels::REVISION)?);
    let status = pod.status.clone().unwrap_or_default();
    let scheduled = pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some());
    let (phase, trouble) = phase(&status, pod.metadata.deletion_timestamp.is_some(), scheduled);
    let restarts = containers(&status).map(|container| container.restart_count).max().unwrap_or(0);
    Some(Gang {
        id,
        revision,
        pods: vec![PodId { name: pod.name_any(), uid: pod.uid().unwrap_or_default() }],
        phase,
        created: pod.creation_timestamp().map_or(Timestamp::MAX, |time| time.0),
        restarts,
        trouble,
        address: if label(labels::RANK).as_deref() == Some("0") { status.pod_ip } else { None },
    })
}

fn containers(status: &PodStatus) -> impl Iterator<Item = &ContainerStatus> {
    status.container_statuses.iter().flatten()
}

fn phase(status: &PodStatus, deleted: bool, scheduled: bool) -> (GangPhase, Option<Trouble>) {
    if deleted {
        return (GangPhase::Draining, None);
    }
    if matches!(status.phase.as_deref(), Some("Failed" | "Succeeded")) {
        return (GangPhase::Failed, Some(lost(status)));
    }
    let condition =
        |type_: &str| status.conditions.iter().flatten().find(|condition| condition.type_ == type_);
    if condition("Ready").is_some_and(|ready| ready.status == "True") {
        return (GangPhase::Ready, None);
    }
    if let Some(trouble) = containers(status).find_map(crash) {
        return (GangPhase::CrashLooping, Some(trouble));
    }
    if !scheduled {
        return (GangPhase::Pending, condition("PodScheduled").and_then(unschedulable));
    }
    (GangPhase::Starting, containers(status).find_map(cannot_start))
}

fn lost(status: &PodStatus) -> Trouble {
    let reason = status.reason.clone().unwrap_or_else(|| "PodFailed".to_owned());
    let message = status.message.clone().unwrap_or_else(|| "the pod ended".to_owned());
    trouble(TroubleKind::Lost, reason, &message)
}

fn unschedulable(condition: &PodCondition) -> Option<Trouble> {
    let message = condition.message.as_deref().unwrap_or("no node fits");
    (condition.status == "False")
        .then(|| trouble(TroubleKind::Scheduling, reason::UNSCHEDULABLE.to_owned(), message))
}

/// The error a container ended with, now or before its last start.
fn crash(container: &ContainerStatus) -> Option<Trouble> {
    let ended = [&container.state, &container.last_state].into_iter().flatten();
    let ended = ended.filter_map(|state| state.terminated.as_ref()).find(|ended| ended.exit_code != 0)?;
    let ContainerStateTerminated { exit_code, message, reason, signal, .. } = ended;
    if let Some(LastWords { reason, message }) =
        message.as_deref().and_then(|words| serde_json::from_str(words).ok())
    {
        return Some(trouble(TroubleKind::Worker, reason, &message));
    }
    let why = match (reason.as_deref(), signal) {
        (Some("OOMKilled"), _) => "it needed more memory than its limit".to_owned(),
        (_, Some(signal)) => format!("signal {signal}"),
        _ => format!("exit code {exit_code}"),
    };
    let said = message.as_deref().map(str::trim).filter(|said| !said.is_empty());
    let message = match said {
        Some(said) => format!("the worker ended with {why}: {said}"),
        None => format!("the worker ended with {why}"),
    };
    Some(trouble(TroubleKind::Worker, reason::WORKER_FAILED.to_owned(), &message))
}

/// Why kubelet does not start a container: reasons of its own that do not pass by waiting alone.
fn cannot_start(container: &ContainerStatus) -> Option<Trouble> {
    let waiting = container.state.as_ref()?.waiting.as_ref()?;
    let kubelet = waiting.reason.as_deref()?;
    let reason = match kubelet {
        "ErrImagePull"
        | "ImagePullBackOff"
        | "ErrImageNeverPull"
        | "InvalidImageName"
        | "ImageInspectError"
        | "RegistryUnavailable" => reason::IMAGE_PULL_FAILED,
        "CreateContainerConfigError" | "CreateContainerError" | "RunContainerError" => kubelet,
        _ => return None,
    };
    let message = waiting.message.as_deref().unwrap_or(kubelet);
    Some(trouble(TroubleKind::Source, reason.to_owned(), message))
}

fn trouble(kind: TroubleKind, reason: String, message: &str) -> Trouble {
    let message = &message[..message.floor_char_boundary(MAX_MESSAGE)];
    Trouble { kind, reason, message: message.to_owned() }
}
