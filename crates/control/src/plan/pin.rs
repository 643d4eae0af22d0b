//! Which files of its source a LlamaDeployment is made of. All of its roles are made of the same: gangs of others could exchange
//! no KV with them. What runs stays as it is however its source moves; fields that ran before are what they were then.

use herd_api::ModelSource;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::SignedDuration;
use kube::ResourceExt as _;

use super::ObservedDeployment;
use crate::gang::{PodId, Trouble};
use crate::resolve::{Resolution, word};
use crate::revision::{self, GangTemplate};
use crate::{GangSpec, ValidatedDeployment};

/// One that ended without an answer is made anew so long after it was made.
const AGAIN_AFTER: SignedDuration = SignedDuration::from_mins(1);

/// A pod to make that asks a source.
#[derive(Clone, Debug, PartialEq)]
pub struct PlannedResolver {
    /// For what it is asked for.
    pub word: String,
    /// Of one of the gangs that are to be made.
    pub spec: GangSpec,
}

/// A source of which is not known what it has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unresolved {
    /// As written.
    pub source: String,
    /// Why not, where that is known.
    pub trouble: Option<Trouble>,
}

/// Files of a source.
pub(super) enum Pin {
    /// Kubernetes brings them.
    None,
    Known(String),
    Unknown(Box<Asked>),
}

/// What is done to know them.
pub(super) struct Asked {
    pub(super) unresolved: Unresolved,
    pub(super) resolve: Option<PlannedResolver>,
    pub(super) delete: Vec<PodId>,
}

/// Those of what runs, where a role of it is what the spec asks for; else those that all roles had when they were asked for
/// before; else those that the source has now.
pub(super) fn find(deployment: &ValidatedDeployment, observed: &ObservedDeployment) -> Pin {
    let ObservedDeployment { pools, revisions, resolvers, now } = observed;
    let Some(first) = deployment.pools.first().map(|pool| &pool.gang) else { return Pin::None };
    let needs_one = matches!(first.source.parse(), Ok(ModelSource::HuggingFace(_) | ModelSource::Bucket(_)));
    if !needs_one {
        return Pin::None;
    }
    let mut stored: Vec<(String, Option<i64>, GangTemplate)> = revisions
        .iter()
        .filter_map(|stored| Some((stored.name_any(), stored.revision, GangTemplate::read(stored).ok()?)))
        .collect();
    stored.sort_by_key(|(_, number, _)| std::cmp::Reverse(*number));
    let runs = deployment.pools.iter().find_map(|wanted| {
        let pool = pools.iter().find(|pool| pool.spec.role == wanted.role)?;
        let target = herd_api::names::revision(&deployment.name, &pool.spec.targets.last()?.revision);
        let (_, _, template) = stored.iter().find(|(name, _, _)| *name == target)?;
        (template.spec == wanted.gang).then(|| template.pin()).flatten()
    });
    let ran = || {
        let pins = stored.iter().filter_map(|(_, _, template)| template.pin());
        let of_all = |pin: &&str| {
            let has = |spec: &GangSpec| {
                stored.iter().any(|(_, _, one)| one.spec == *spec && one.pin() == Some(pin))
            };
            deployment.pools.iter().all(|wanted| has(&wanted.gang))
        };
        pins.into_iter().find(of_all)
    };
    if let Some(pin) = runs.or_else(ran) {
        return Pin::Known(pin.to_owned());
    }
    let wanted = word_for(deployment);
    let (asks, others): (Vec<&Pod>, Vec<&Pod>) =
        resolvers.iter().partition(|pod| word(pod) == Some(wanted.as_str()));
    let mut delete: Vec<PodId> = others.into_iter().map(id).collect();
    let mut unresolved = Unresolved { source: first.source.clone(), trouble: None };
    let Some(asks) = asks.first() else {
        let resolve = Some(PlannedResolver { word: wanted, spec: first.clone() });
        return Pin::Unknown(Box::new(Asked { unresolved, resolve, delete }));
    };
    match Resolution::of(asks) {
        Resolution::Done(pin) => return Pin::Known(pin),
        Resolution::Waits(trouble) => unresolved.trouble = trouble,
        Resolution::Lost(trouble) => {
            let made = asks.creation_timestamp().map(|time| time.0);
            if made.is_some_and(|made| made.saturating_add(AGAIN_AFTER).is_ok_and(|due| due <= *now)) {
                delete.push(id(asks));
            }
            unresolved.trouble = Some(trouble);
        }
    }
    Pin::Unknown(Box::new(Asked { unresolved, resolve: None, delete }))
}

/// The same for the same fields of all roles.
fn word_for(deployment: &ValidatedDeployment) -> String {
    let hashes: Vec<String> = deployment.pools.iter().map(|pool| revision::hash(&pool.gang)).collect();
    revision::short(&hashes.join(" "))
}

pub(super) fn ids(pods: &[Pod]) -> Vec<PodId> {
    pods.iter().map(id).collect()
}

fn id(pod: &Pod) -> PodId {
    PodId { name: pod.name_any(), uid: pod.uid().unwrap_or_default() }
}
