//! LlamaPools. Their replicas belong to whoever scales them.

use herd_api::{DeploymentRef, LlamaPool, LlamaPoolSpec, Role, labels, names};

use super::metadata;
use crate::ValidatedDeployment;
use crate::plan::PlannedPool;

/// To be created, by the field manager of scalers: it alone sets replicas.
pub fn new_pool(deployment: &ValidatedDeployment, planned: &PlannedPool) -> LlamaPool {
    let mut pool = pool(deployment, planned);
    pool.spec.replicas = Some(planned.desired());
    pool
}

/// To be applied: everything but replicas.
pub fn pool(deployment: &ValidatedDeployment, planned: &PlannedPool) -> LlamaPool {
    let PlannedPool { role, is_new: _, min_replicas, max_replicas, targets } = planned;
    let role: Role = *role;
    LlamaPool {
        metadata: metadata(
            &deployment.namespace,
            names::pool(&deployment.name, role),
            &deployment.owner,
            labels::of_pool(&deployment.name, role),
        ),
        spec: LlamaPoolSpec {
            deployment_ref: DeploymentRef { name: deployment.name.clone() },
            role,
            replicas: None,
            min_replicas: Some(*min_replicas),
            max_replicas: Some(*max_replicas),
            targets: targets.clone(),
        },
        status: None,
    }
}
