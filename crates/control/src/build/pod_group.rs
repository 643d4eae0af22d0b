//! What tells the scheduler that the pods of a gang get nodes together or not at all.

use herd_api::{labels, names};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::scheduling::v1beta1::{
    GangSchedulingPolicy, PodGroup, PodGroupSchedulingPolicy, PodGroupSpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::ResourceExt as _;

use super::{PodInput, metadata};

/// The group of a gang of several pods, which goes with its leader; `None` for a gang of one. The scheduler waits for it with
/// those of its pods that are there already.
pub fn pod_group(input: PodInput<'_>, leader: &Pod) -> Option<PodGroup> {
    let PodInput { deployment, namespace, owner: _, role, gang, revision, template, pod_groups } = input;
    let pods = template.spec.first_ranks().len();
    if pods == 1 || !pod_groups {
        return None;
    }
    let owner = OwnerReference {
        api_version: "v1".to_owned(),
        kind: "Pod".to_owned(),
        name: leader.name_any(),
        uid: leader.uid().unwrap_or_default(),
        ..OwnerReference::default()
    };
    let labels = labels::of_pod(deployment, role, gang, 0, revision);
    Some(PodGroup {
        metadata: metadata(namespace, names::pod_group(deployment, gang), &owner, labels),
        spec: PodGroupSpec {
            scheduling_policy: PodGroupSchedulingPolicy {
                gang: Some(GangSchedulingPolicy { min_count: pods as i32 }),
                ..PodGroupSchedulingPolicy::default()
            },
            // It has to be that of the pods.
            priority_class_name: template.spec.priority_class_name.clone(),
            ..PodGroupSpec::default()
        },
        status: None,
    })
}
