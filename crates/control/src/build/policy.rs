//! What keeps voluntary evictions from taking too much at once.

use std::collections::BTreeMap;

use herd_api::{Role, labels, names};
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::metadata;
use crate::ValidatedDeployment;

/// One gang of a role at a time may be evicted: the next one when it is replaced and Ready.
pub fn disruption_budget(deployment: &ValidatedDeployment, role: Role) -> PodDisruptionBudget {
    let selector = [(labels::DEPLOYMENT, deployment.name.as_str()), (labels::ROLE, role.as_str())];
    PodDisruptionBudget {
        metadata: metadata(
            &deployment.namespace,
            names::disruption_budget(&deployment.name, role),
            &deployment.owner,
            labels::of_pool(&deployment.name, role),
        ),
        spec: Some(PodDisruptionBudgetSpec {
            max_unavailable: Some(IntOrString::Int(1)),
            selector: Some(LabelSelector {
                match_labels: Some(BTreeMap::from(
                    selector.map(|(key, value)| (key.to_owned(), value.to_owned())),
                )),
                match_expressions: None,
            }),
            // A pod that is not Ready serves nobody: it never holds up a node that is emptied.
            unhealthy_pod_eviction_policy: Some("AlwaysAllow".to_owned()),
            ..PodDisruptionBudgetSpec::default()
        }),
        ..PodDisruptionBudget::default()
    }
}
