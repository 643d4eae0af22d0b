//! What a decision needs of a deployment, out of what is watched and what Prometheus says.

use std::sync::Arc;

use herd_api::{GangPhase, LlamaDeployment, LlamaPool, names};
use herd_control::autoscale::{GangInput, Input, Policy, PoolInput, Reading};
use herd_control::{Claims, ValidatedDeployment, ValidatedPool, validate};
use kube::ResourceExt as _;

use super::queries::Gathered;
use crate::controllers::Watched;

/// A deployment that this autoscaler scales.
#[derive(Debug)]
pub(super) struct Scaled {
    pub(super) object: LlamaDeployment,
    pub(super) uid: String,
    pub(super) validated: ValidatedDeployment,
}

impl Scaled {
    /// `None` where it is somebody else's to scale, or cannot be read, or goes.
    pub(super) fn new(object: &LlamaDeployment) -> Option<Self> {
        // Who has which name is nothing to scale by.
        let validated = validate(object, &Claims::default()).ok().filter(ValidatedDeployment::is_scaled)?;
        let uid = object.uid().filter(|_| object.metadata.deletion_timestamp.is_none())?;
        Some(Self { object: object.clone(), uid, validated })
    }

    /// `None` while it has not all of its pools.
    pub(super) fn input(
        &self,
        pools: &[Arc<Watched<LlamaPool>>],
        gathered: &Result<Gathered, String>,
        policy: Policy,
        now_ms: i64,
    ) -> Option<Input> {
        let is_owned = |pool: &&LlamaPool| pool.owner_references().iter().any(|owner| owner.uid == self.uid);
        let own: Vec<&LlamaPool> =
            pools.iter().filter_map(|pool| pool.0.as_ref().ok()).filter(is_owned).collect();
        let inputs: Option<Vec<PoolInput>> = self
            .validated
            .pools
            .iter()
            .map(|wanted| {
                let pool = own.iter().find(|pool| pool.spec.role == wanted.role)?;
                Some(self.pool(wanted, pool, gathered.as_ref().ok()))
            })
            .collect();
        let scaling = &self.validated.scaling;
        Some(Input {
            now_ms,
            policy,
            gpu_budget: scaling.gpu_budget.map(i64::from),
            drain_within_ms: i64::try_from(scaling.time_to_first_token.as_millis()).unwrap_or(i64::MAX),
            trouble: gathered.as_ref().err().cloned(),
            pools: inputs?,
        })
    }

    fn pool(&self, wanted: &ValidatedPool, pool: &LlamaPool, gathered: Option<&Gathered>) -> PoolInput {
        let ValidatedPool { role, min_replicas, max_replicas, gang } = wanted;
        let status = pool.status.clone().unwrap_or_default();
        let reading = |id: &str| match gathered {
            Some(gathered) => {
                gathered.reading(&self.validated.namespace, &names::pod(&self.validated.name, id, 0))
            }
            None => Reading::Missing { metric: "answer".to_owned() },
        };
        let ready = status.gangs.iter().filter(|gang| gang.phase == GangPhase::Ready);
        PoolInput {
            role: *role,
            min: *min_replicas,
            max: *max_replicas,
            ranks: i64::try_from(gang.ranks()).unwrap_or(i64::MAX),
            revision: pool.spec.targets.last().map(|target| target.revision.clone()).unwrap_or_default(),
            replicas: runs(pool, wanted),
            live: status.replicas,
            draining: status.draining_replicas,
            ready: status.ready_replicas,
            gangs: ready
                .map(|gang| GangInput {
                    id: gang.id.clone(),
                    revision: gang.revision.clone(),
                    reading: reading(&gang.id),
                })
                .collect(),
        }
    }
}

/// Gangs wanted, within the bounds.
pub(super) fn runs(pool: &LlamaPool, wanted: &ValidatedPool) -> i32 {
    let ValidatedPool { min_replicas, max_replicas, .. } = wanted;
    pool.spec.replicas.unwrap_or(*min_replicas).clamp(*min_replicas, *max_replicas)
}
