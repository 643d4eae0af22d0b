//! The stored form of a revision.

use herd_api::{labels, names};
use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::apimachinery::pkg::runtime::RawExtension;

use super::metadata;
use crate::ValidatedDeployment;
use crate::plan::PlannedRevision;
use crate::revision::{Defaults, GangTemplate};

/// Created once and never changed: what it says is what its gangs are made from.
pub fn revision(
    deployment: &ValidatedDeployment,
    planned: &PlannedRevision,
    defaults: &Defaults,
) -> Result<ControllerRevision, serde_json::Error> {
    let PlannedRevision { revision, number, spec, pin } = planned;
    let mut labels = labels::of_deployment(&deployment.name);
    labels.insert(labels::REVISION.to_owned(), revision.clone());
    let template = GangTemplate::new(spec, defaults).with_pin(pin.as_deref(), defaults);
    let name = names::revision(&deployment.name, revision);
    Ok(ControllerRevision {
        metadata: metadata(&deployment.namespace, name, &deployment.owner, labels),
        revision: Some(*number),
        data: RawExtension(serde_json::to_value(template)?),
    })
}
