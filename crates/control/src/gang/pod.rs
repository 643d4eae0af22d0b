//! What one pod says about its gang.

use herd_api::condition::reason;
use herd_api::{GangPhase, labels};
use k8s_openapi::api::core::v1::{ContainerStateTerminated, ContainerStatus, Pod, PodCondition, PodStatus};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::ResourceExt as _;
use serde::Deserialize;

use super::{PodId, Trouble, TroubleKind, last_words};
use crate::build::download;
use crate::room::Need;

/// A pod of a gang.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Which.
    pub id: PodId,
    /// The first of its ranks.
    pub rank: usize,
    /// Where it stands.
    pub phase: GangPhase,
    /// When it was made.
    pub created: Timestamp,
    /// When it has to be gone, where it is deleted: at once where it was not Ready, and so has nothing to end. So it is with one
    /// whose node is lost, of which its grace period says nothing.
    pub gone_by: Option<Timestamp>,
    /// Whether it takes up room on a node.
    pub has_node: bool,
    /// Times its process was started anew in place.
    pub restarts: i32,
    /// Why it is not Ready, where it says so.
    pub trouble: Option<Trouble>,
    /// Once it has one.
    pub address: Option<String>,
    /// Devices that it asks for.
    pub need: Option<Need>,
}

impl Member {
    /// Deleted, and not gone yet.
    pub fn is_going(&self) -> bool {
        self.gone_by.is_some()
    }
}

/// What a worker writes before it ends, see `herd-worker`.
#[derive(Deserialize)]
struct LastWords {
    reason: String,
    message: String,
}

/// A pod, and the gang it says it belongs to.
pub(super) struct Labelled {
    pub(super) gang: String,
    pub(super) revision: String,
    /// How many the gang should have.
    pub(super) pods: usize,
    pub(super) member: Member,
}

/// `None` where it has not the labels of a gang.
pub(super) fn read(pod: &Pod) -> Option<Labelled> {
    let label = |key: &str| pod.labels().get(key);
    let (gang, revision) = (label(labels::GANG)?.clone(), label(labels::REVISION)?.clone());
    let rank = label(labels::RANK).and_then(|rank| rank.parse().ok()).unwrap_or(0);
    let pods = pod.annotations().get(labels::PODS).and_then(|pods| pods.parse().ok()).unwrap_or(1);
    let status = pod.status.clone().unwrap_or_default();
    let has_node = pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some());
    let gone_by = gone_by(pod, &status);
    let (phase, trouble) = phase(pod, &status, gone_by.is_some(), has_node);
    let member = Member {
        id: PodId { name: pod.name_any(), uid: pod.uid().unwrap_or_default() },
        rank,
        phase,
        created: pod.creation_timestamp().map_or(Timestamp::MAX, |time| time.0),
        gone_by,
        has_node,
        restarts: containers(&status).map(|container| container.restart_count).max().unwrap_or(0),
        trouble,
        address: status.pod_ip,
        need: Need::of(pod),
    };
    Some(Labelled { gang, revision, pods, member })
}

fn gone_by(pod: &Pod, status: &PodStatus) -> Option<Timestamp> {
    let end = pod.metadata.deletion_timestamp.as_ref()?.0;
    let grace = pod.metadata.deletion_grace_period_seconds.unwrap_or(0);
    let deleted = end.saturating_sub(SignedDuration::from_secs(grace)).unwrap_or(end);
    let ready = status.conditions.iter().flatten().find(|one| one.type_ == "Ready");
    let unready_since =
        ready.filter(|ready| ready.status != "True").and_then(|ready| ready.last_transition_time.as_ref());
    Some(if unready_since.is_some_and(|since| since.0 < deleted) { deleted } else { end })
}

fn containers(status: &PodStatus) -> impl Iterator<Item = &ContainerStatus> {
    status.container_statuses.iter().flatten()
}

/// Those that run before the worker, and have not ended well.
fn first_containers(status: &PodStatus) -> impl Iterator<Item = &ContainerStatus> {
    let ended_well = |container: &&ContainerStatus| {
        let state = container.state.as_ref().and_then(|state| state.terminated.as_ref());
        state.is_some_and(|ended| ended.exit_code == 0)
    };
    status.init_container_statuses.iter().flatten().filter(move |container| !ended_well(container))
}

/// What keeps a pod from doing what it is for, as far as its status says.
pub(crate) struct PodTrouble;

impl PodTrouble {
    /// Of one that has ended.
    pub(crate) fn lost(status: &PodStatus) -> Trouble {
        lost(status)
    }

    /// Of one that may still do it.
    pub(crate) fn of(status: &PodStatus) -> Option<Trouble> {
        let scheduled = status.conditions.iter().flatten().find(|one| one.type_ == "PodScheduled");
        let crashed = containers(status).find_map(crash);
        crashed
            .or_else(|| scheduled.and_then(unschedulable))
            .or_else(|| containers(status).find_map(cannot_start))
    }
}

fn phase(pod: &Pod, status: &PodStatus, deleted: bool, scheduled: bool) -> (GangPhase, Option<Trouble>) {
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
    if let Some(trouble) = first_containers(status).find_map(crash) {
        // What runs before the worker brings the model.
        return (GangPhase::CrashLooping, Some(Trouble { kind: TroubleKind::Source, ..trouble }));
    }
    if !scheduled {
        return (GangPhase::Pending, condition("PodScheduled").and_then(unschedulable));
    }
    let mut all = first_containers(status).chain(containers(status));
    let trouble = all.find_map(cannot_start).or_else(|| downloading(pod, status));
    (GangPhase::Starting, trouble)
}

fn downloading(pod: &Pod, status: &PodStatus) -> Option<Trouble> {
    let mut first = first_containers(status).filter(|container| container.name == download::CONTAINER);
    let running = first.find_map(|container| container.state.as_ref()?.running.as_ref())?;
    let spec = pod.spec.as_ref()?;
    let containers = spec.init_containers.iter().flatten();
    let mut variables = containers.flat_map(|container| container.env.iter().flatten());
    let source = variables.find(|variable| variable.name == download::SOURCE)?.value.as_deref()?;
    let node = spec.node_name.as_deref().unwrap_or("its node");
    let since = running.started_at.as_ref().map_or(String::new(), |time| format!(" since {}", time.0));
    let message = format!("{source} is being downloaded to {node}{since}");
    Some(Trouble::new(TroubleKind::Download, reason::DOWNLOADING.to_owned(), &message))
}

fn lost(status: &PodStatus) -> Trouble {
    let reason = status.reason.clone().unwrap_or_else(|| "PodFailed".to_owned());
    let message = status.message.clone().unwrap_or_else(|| "the pod ended".to_owned());
    Trouble::new(TroubleKind::Lost, reason, &message)
}

fn unschedulable(condition: &PodCondition) -> Option<Trouble> {
    let message = condition.message.as_deref().unwrap_or("no node fits");
    (condition.status == "False")
        .then(|| Trouble::new(TroubleKind::Scheduling, reason::UNSCHEDULABLE.to_owned(), message))
}

/// The error a container ended with, now or before its last start.
fn crash(container: &ContainerStatus) -> Option<Trouble> {
    let ended = [&container.state, &container.last_state].into_iter().flatten();
    let ended = ended.filter_map(|state| state.terminated.as_ref()).find(|ended| ended.exit_code != 0)?;
    let ContainerStateTerminated { exit_code, message, reason, signal, .. } = ended;
    if let Some(LastWords { reason, message }) =
        message.as_deref().and_then(|words| serde_json::from_str(words).ok())
    {
        return Some(Trouble::new(TroubleKind::Worker, reason, &message));
    }
    let ended = last_words::ended(reason.as_deref(), *exit_code, *signal);
    let message = match message.as_deref().and_then(last_words::logged) {
        Some(said) => format!("{ended}; it logged last: {said}"),
        None => ended,
    };
    Some(Trouble::new(TroubleKind::Worker, reason::WORKER_FAILED.to_owned(), &message))
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
    Some(Trouble::new(TroubleKind::Source, reason.to_owned(), message))
}
