//! What a source was found to have: asked once for each change of a LlamaDeployment, and the same for all of its roles.

use herd_api::{is_pin, labels};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use serde::Deserialize;

use crate::gang::{PodTrouble, Trouble, TroubleKind};

/// How far a pod is that asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// It has the answer.
    Done(String),
    /// It has none yet, perhaps for a reason.
    Waits(Option<Trouble>),
    /// It ended without, and is not started again.
    Lost(Trouble),
}

/// What it wrote, see `herd-worker resolve`.
#[derive(Deserialize)]
struct Answer {
    pin: String,
}

/// The word for what a pod asks for.
pub(crate) fn word(pod: &Pod) -> Option<&str> {
    pod.labels().get(labels::RESOLVES).map(String::as_str)
}

impl Resolution {
    /// Of a pod that [`crate::build::resolver`] made.
    pub fn of(pod: &Pod) -> Self {
        let status = pod.status.clone().unwrap_or_default();
        let lost = |trouble: Trouble| Self::Lost(Trouble { kind: TroubleKind::Source, ..trouble });
        match status.phase.as_deref() {
            Some("Succeeded") => {
                let ended = status.container_statuses.iter().flatten();
                let mut ended = ended.filter_map(|container| container.state.as_ref()?.terminated.as_ref());
                let said = ended.find_map(|ended| ended.message.as_deref());
                let answer = said.and_then(|said| serde_json::from_str::<Answer>(said).ok());
                match answer.filter(|answer| is_pin(&answer.pin)) {
                    Some(Answer { pin }) => Self::Done(pin),
                    None => lost(PodTrouble::lost(&status)),
                }
            }
            Some("Failed") => lost(PodTrouble::lost(&status)),
            _ => {
                let trouble = PodTrouble::of(&status);
                Self::Waits(trouble.map(|trouble| Trouble { kind: TroubleKind::Source, ..trouble }))
            }
        }
    }
}
