//! LlamaDeployment -> LlamaPools and revisions.

use herd_api::{LlamaPool, Role, Target};
use k8s_openapi::api::apps::v1::ControllerRevision;
use kube::ResourceExt as _;

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
    let ObservedDeployment { pools, revisions } = observed;
    if deployment.served_names.is_empty() && pools.is_empty() {
        return DeploymentPlan::default();
    }
    let mut plan = DeploymentPlan::default();
    let mut number = revisions.iter().filter_map(|stored| stored.revision).max().unwrap_or(0);
    for ValidatedPool { role, min_replicas, max_replicas, gang } in &deployment.pools {
        let hash = revision::hash(gang);
        let stored = revisions
            .iter()
            .any(|stored| stored.name_any() == herd_api::names::revision(&deployment.name, &hash));
        if !stored && plan.revisions.iter().all(|planned| planned.revision != hash) {
            number += 1;
            plan.revisions.push(PlannedRevision { revision: hash.clone(), number, spec: gang.clone() });
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
    let ObservedDeployment { pools, revisions } = observed;
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
