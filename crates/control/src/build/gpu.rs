//! What a pod has more where its ranks compute on GPUs.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    EmptyDirVolumeSource, EnvVar, Pod, PodResourceClaim, ResourceClaim, Toleration, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use crate::{GangSpec, Gpu};

/// Name of the pod's claim, and of the container's to it.
const CLAIM: &str = "accelerator";
/// Through which processes and threads of a node exchange data where GPUs cannot reach each other directly; a container has
/// 64 MiB of it otherwise, of which NCCL runs out with "unhandled system error".
const SHARED_MEMORY: &str = "shm";
/// For each rank. NCCL takes some 10 MiB a peer and channel at most; without a bound, a fault would fill the node's memory.
const SHARED_MEMORY_PER_RANK_GIB: usize = 1;
/// Chosen by the worker's image otherwise.
const BACKEND: &str = "HERD_BACKEND";

/// Adds it to a pod that has so many ranks.
pub(super) fn add(pod: &mut Pod, spec: &GangSpec, gpu: &Gpu, ranks: usize) {
    let Gpu { resource_name: _, claim_template_name, runtime_class_name } = gpu;
    let Some(pod) = &mut pod.spec else { return };
    pod.runtime_class_name.clone_from(runtime_class_name);
    pod.volumes.get_or_insert_default().push(shared_memory(ranks));
    pod.resource_claims = claim_template_name.as_ref().map(|template| {
        let template = Some(template.clone());
        vec![PodResourceClaim {
            name: CLAIM.to_owned(),
            resource_claim_name: None,
            resource_claim_template_name: template,
        }]
    });
    // Nodes with GPUs are kept free of pods that need none, by a taint of the resource's name.
    pod.tolerations.get_or_insert_default().extend(gpu.resource().map(tolerates));
    for container in &mut pod.containers {
        container.volume_mounts.get_or_insert_default().push(VolumeMount {
            name: SHARED_MEMORY.to_owned(),
            mount_path: "/dev/shm".to_owned(),
            ..VolumeMount::default()
        });
        let resources = container.resources.get_or_insert_default();
        if let Some(resource) = gpu.resource() {
            let count = Quantity(ranks.to_string());
            for list in [&mut resources.requests, &mut resources.limits] {
                list.get_or_insert_with(BTreeMap::new).insert(resource.to_owned(), count.clone());
            }
        } else {
            resources.claims = Some(vec![ResourceClaim { name: CLAIM.to_owned(), request: None }]);
        }
        if spec.env.iter().all(|variable| variable.name != BACKEND) {
            let (name, value) = (BACKEND.to_owned(), Some("cuda".to_owned()));
            container.env.get_or_insert_default().push(EnvVar { name, value, value_from: None });
        }
    }
}

fn shared_memory(ranks: usize) -> Volume {
    Volume {
        name: SHARED_MEMORY.to_owned(),
        empty_dir: Some(EmptyDirVolumeSource {
            medium: Some("Memory".to_owned()),
            size_limit: Some(Quantity(format!("{}Gi", ranks * SHARED_MEMORY_PER_RANK_GIB))),
            ..EmptyDirVolumeSource::default()
        }),
        ..Volume::default()
    }
}

pub(super) fn tolerates(resource: &str) -> Toleration {
    Toleration {
        key: Some(resource.to_owned()),
        operator: Some("Exists".to_owned()),
        effect: Some("NoSchedule".to_owned()),
        ..Toleration::default()
    }
}
