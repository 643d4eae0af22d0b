//! LlamaDeployment -> LlamaPools and revisions.

use herd_api::{LlamaPool, Role, Target};
use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt as _;

use super::pin::{self, Pin, PlannedResolver, Unresolved};
use crate::gang::PodId;
use crate::{GangSpec, ValidatedDeployment, ValidatedPool, revision};

/// Revisions kept beyond those that are in use.
const HISTORY: usize = 5;

/// What there is of a LlamaDeployment.
#[derive(Clone, Debug, Default)]
pub struct ObservedDeployment {
    /// Its pools.
    pub pools: Vec<LlamaPool>,
    /// Its revisions.
    pub revisions: Vec<ControllerRevision>,
    /// Pods that ask its source what it has.
    pub resolvers: Vec<Pod>,
    /// When it was looked at.
    pub now: Timestamp,
}

/// What to make and to remove, in this order: revisions, pools, deletions.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DeploymentPlan {
    /// Revisions that are not stored yet.
    pub revisions: Vec<PlannedRevision>,
    /// A pool a role.
    pub pools: Vec<PlannedPool>,
    /// Names of pools of roles that are no longer wanted.
    pub delete_pools: Vec<String>,
    /// Names of revisions that nothing was made from for long.
    pub delete_revisions: Vec<String>,
    /// A pod to make that asks the source what it has.
    pub resolve: Option<PlannedResolver>,
    /// Such pods that are done, or never will be.
    pub delete_resolvers: Vec<PodId>,
    /// That is not known, and no gang of what the spec asks for can be made.
    pub unresolved: Option<Unresolved>,
}

/// A revision to store.
#[derive(Clone, Debug, PartialEq)]
pub struct PlannedRevision {
    /// Its hash.
    pub revision: String,
    /// Rises with every new one.
    pub number: i64,
    /// What the user wrote.
    pub spec: GangSpec,
    /// Which files of its source, where pods download them.
    pub pin: Option<String>,
}

/// A pool to apply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedPool {
    /// Whose gangs.
    pub role: Role,
    /// Whether it is not there yet: then its replicas are written, once.
    pub is_new: bool,
    /// Gangs at least, and to begin with.
    pub min_replicas: i32,
    /// Gangs at most.
    pub max_replicas: i32,
    /// How many gangs of which revision.
    pub targets: Vec<Target>,
}

impl PlannedPool {
    /// Gangs wanted of all revisions.
    pub fn desired(&self) -> i32 {
        self.targets.iter().map(|target| target.replicas).sum()
    }
}

/// Plans towards `deployment`. One that has lost every served name makes nothing new, and keeps what runs.
pub fn plan_deployment(deployment: &ValidatedDeployment, observed: &ObservedDeployment) -> DeploymentPlan {
    let ObservedDeployment { pools, revisions, resolvers, now: _ } = observed;
    if deployment.served_names.is_empty() && pools.is_empty() {
        return DeploymentPlan { delete_resolvers: pin::ids(resolvers), ..DeploymentPlan::default() };
    }
    let pin = match pin::find(deployment, observed) {
        Pin::None => None,
        Pin::Known(pin) => Some(pin),
        Pin::Unknown(asked) => return hold(deployment, observed, *asked),
    };
    // Once what they found is stored they are not needed.
    let mut plan = DeploymentPlan { delete_resolvers: pin::ids(resolvers), ..DeploymentPlan::default() };
    let mut number = revisions.iter().filter_map(|stored| stored.revision).max().unwrap_or(0);
    for ValidatedPool { role, min_replicas, max_replicas, gang } in &deployment.pools {
        let hash = revision::hash_pinned(gang, pin.as_deref());
        let stored = revisions
            .iter()
            .any(|stored| stored.name_any() == herd_api::names::revision(&deployment.name, &hash));
        if !stored && plan.revisions.iter().all(|planned| planned.revision != hash) {
            number += 1;
            plan.revisions.push(PlannedRevision {
                revision: hash.clone(),
                number,
                spec: gang.clone(),
                pin: pin.clone(),
            });
        }
        let observed = pools.iter().find(|pool| pool.spec.role == *role);
        let replicas = observed.and_then(|pool| pool.spec.replicas).unwrap_or(*min_replicas);
        plan.pools.push(PlannedPool {
            role: *role,
            is_new: observed.is_none(),
            min_replicas: *min_replicas,
            max_replicas: *max_replicas,
            targets: vec![Target { revision: hash, replicas: replicas.clamp(*min_replicas, *max_replicas) }],
        });
    }
    plan.delete_pools = replaced_pools(deployment, pools);
    plan.delete_revisions = old_revisions(&deployment.name, &plan, observed);
    plan
}

/// What there is goes on, scaled as it is asked to be, until it is known what to make in its place.
fn hold(
    deployment: &ValidatedDeployment,
    observed: &ObservedDeployment,
    asked: pin::Asked,
) -> DeploymentPlan {
    let pin::Asked { unresolved, resolve, delete } = asked;
    let held = deployment.pools.iter().filter_map(|wanted| {
        let ValidatedPool { role, min_replicas, max_replicas, gang: _ } = wanted;
        let pool = observed.pools.iter().find(|pool| pool.spec.role == *role)?;
        let mut targets = pool.spec.targets.clone();
        if let ([target], Some(replicas)) = (&mut targets[..], pool.spec.replicas) {
            target.replicas = replicas.clamp(*min_replicas, *max_replicas);
        }
        Some(PlannedPool {
            role: *role,
            is_new: false,
            min_replicas: *min_replicas,
            max_replicas: *max_replicas,
            targets,
        })
    });
    DeploymentPlan {
        pools: held.collect(),
        resolve,
        delete_resolvers: delete,
        unresolved: Some(unresolved),
        ..DeploymentPlan::default()
    }
}

/// Pools of other roles go once every role that is wanted can serve.
fn replaced_pools(deployment: &ValidatedDeployment, pools: &[LlamaPool]) -> Vec<String> {
    let wanted = |role: Role| deployment.pools.iter().any(|pool| pool.role == role);
    let serves = |role: Role| {
        let pool = pools.iter().find(|pool| pool.spec.role == role);
        pool.and_then(|pool| pool.status.as_ref()).is_some_and(|status| status.ready_replicas > 0)
    };
    if deployment.pools.iter().all(|pool| serves(pool.role)) {
        pools.iter().filter(|pool| !wanted(pool.spec.role)).map(kube::ResourceExt::name_any).collect()
    } else {
        Vec::new()
    }
}

fn old_revisions(deployment: &str, plan: &DeploymentPlan, observed: &ObservedDeployment) -> Vec<String> {
    let ObservedDeployment { pools, revisions, .. } = observed;
    let targets = plan.pools.iter().flat_map(|pool| &pool.targets).map(|target| &target.revision);
    let before = pools.iter().flat_map(|pool| &pool.spec.targets).map(|target| &target.revision);
    let gangs = pools.iter().filter_map(|pool| pool.status.as_ref()).flat_map(|status| &status.gangs);
    let used: Vec<String> = targets
        .chain(before)
        .chain(gangs.map(|gang| &gang.revision))
        .map(|revision| herd_api::names::revision(deployment, revision))
        .collect();
    let mut unused: Vec<&ControllerRevision> =
        revisions.iter().filter(|stored| !used.contains(&stored.name_any())).collect();
    unused.sort_by_key(|stored| stored.revision);
    unused[..unused.len().saturating_sub(HISTORY)].iter().map(|stored| stored.name_any()).collect()
}
