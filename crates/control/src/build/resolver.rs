//! A pod that asks a model's source what it has now, and ends. So the operator reads no Secret and talks to no source.

use std::collections::BTreeMap;

use herd_api::{SourceError, labels, names};
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::{download, gpu, metadata, pod};
use crate::ValidatedDeployment;
use crate::plan::PlannedResolver;
use crate::revision::{Defaults, GangTemplate};

const CONTAINER: &str = "resolve";

/// To be created; it is asked again, later and later, while it fails.
pub fn resolver(
    deployment: &ValidatedDeployment,
    planned: &PlannedResolver,
    defaults: &Defaults,
) -> Result<Pod, SourceError> {
    let PlannedResolver { word, spec } = planned;
    let GangTemplate { spec, image, download: _ } = GangTemplate::new(spec, defaults);
    let env = download::source_env(&spec, &spec.source.parse()?);
    // Of no gang: Services and pools do not find it by these.
    let mut labels = labels::of_deployment(&deployment.name);
    labels.remove(labels::DEPLOYMENT);
    labels.insert(labels::RESOLVES.to_owned(), word.clone());
    let quantity = |name: &str, quantity: &str| (name.to_owned(), Quantity(quantity.to_owned()));
    let container = Container {
        args: Some(vec!["resolve".to_owned()]),
        resources: Some(ResourceRequirements {
            requests: Some(BTreeMap::from([quantity("cpu", "10m"), quantity("memory", "32Mi")])),
            limits: Some(BTreeMap::from([quantity("memory", "256Mi")])),
            ..ResourceRequirements::default()
        }),
        ..download::container(CONTAINER, &image, download::user_after(env, &spec))
    };
    // Where the gangs will be: the source can be reached from there, or not.
    let mut tolerations = spec.tolerations.clone();
    tolerations.extend(spec.gpu.as_ref().and_then(|gpu| gpu.resource()).map(gpu::tolerates));
    Ok(Pod {
        metadata: metadata(
            &deployment.namespace,
            names::resolver(&deployment.name, word),
            &deployment.owner,
            labels,
        ),
        spec: Some(PodSpec {
            containers: vec![container],
            node_selector: (!spec.node_selector.is_empty()).then(|| spec.node_selector.clone()),
            tolerations: (!tolerations.is_empty()).then_some(tolerations),
            priority_class_name: spec.priority_class_name.clone(),
            security_context: Some(pod::nobody()),
            automount_service_account_token: Some(false),
            enable_service_links: Some(false),
            restart_policy: Some("OnFailure".to_owned()),
            ..PodSpec::default()
        }),
        status: None,
    })
}
