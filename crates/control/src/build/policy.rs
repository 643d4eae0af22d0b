//! What keeps voluntary evictions from taking too much at once.

use std::collections::BTreeMap;

use herd_api::{labels, names};
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::metadata;
use crate::ValidatedDeployment;
use crate::plan::PlannedPool;

/// One gang of a role at a time may be evicted: the next one when it is replaced and Ready.
///
/// Kubernetes takes the pods that there should be from the pool's `/scale`, which counts gangs. So what may be missing can be
/// said where a gang is a pod; where it is several, what must be there is: every pod but one. The others of its gang are not
/// Ready once that one goes, and then none that is Ready may go before the gang is replaced.
pub fn disruption_budget(deployment: &ValidatedDeployment, planned: &PlannedPool) -> PodDisruptionBudget {
    let role = planned.role;
    let pods_per_gang = deployment
        .pools
        .iter()
        .find(|pool| pool.role == role)
        .map_or(1, |pool| pool.gang.first_ranks().len());
    let (max_unavailable, min_available) = if pods_per_gang == 1 {
        (Some(IntOrString::Int(1)), None)
    } else {
        let pods = planned.desired().saturating_mul(pods_per_gang as i32);
        (None, Some(IntOrString::Int((pods - 1).max(0))))
    };
    let selector = [(labels::DEPLOYMENT, deployment.name.as_str()), (labels::ROLE, role.as_str())];
    PodDisruptionBudget {
        metadata: metadata(
            &deployment.namespace,
            names::disruption_budget(&deployment.name, role),
            &deployment.owner,
            labels::of_pool(&deployment.name, role),
        ),
        spec: Some(PodDisruptionBudgetSpec {
            max_unavailable,
            min_available,
            selector: Some(LabelSelector {
                match_labels: Some(BTreeMap::from(
                    selector.map(|(key, value)| (key.to_owned(), value.to_owned())),
                )),
                match_expressions: None,
            }),
            // A pod that is not Ready serves nobody: it never holds up a node that is emptied.
            unhealthy_pod_eviction_policy: Some("AlwaysAllow".to_owned()),
        }),
        ..PodDisruptionBudget::default()
    }
}
