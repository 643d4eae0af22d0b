//! Pods whose ranks compute on GPUs, and why they wait.

use herd_api::condition::reason;
use k8s_openapi::api::core::v1::{Container, Node, Pod, PodSpec};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use serde_json::{Value, json};

use super::{checked, pods};
use crate::gang::gangs;
use crate::revision::hash;
use crate::room::Room;

/// The default: GPUs.
fn without_kind(spec: &mut Value) {
    spec.as_object_mut().unwrap().remove("accelerator");
}

fn first(change: impl FnOnce(&mut Value)) -> (PodSpec, Container) {
    let spec = pods(change).remove(0).spec.unwrap();
    let container = spec.containers[0].clone();
    (spec, container)
}

fn backend(container: &Container) -> Vec<&str> {
    let of_backend = container.env.iter().flatten().filter(|variable| variable.name == "HERD_BACKEND");
    of_backend.filter_map(|variable| variable.value.as_deref()).collect()
}

#[test]
fn a_rank_has_a_gpu_unless_it_is_told_otherwise() {
    let (spec, container) = first(without_kind);
    let resources = container.resources.as_ref().unwrap();
    let three = Quantity("3".to_owned());
    for list in [&resources.requests, &resources.limits] {
        assert_eq!(list.as_ref().unwrap()["nvidia.com/gpu"], three);
    }
    assert_eq!(backend(&container), ["cuda"]);
    let shm = spec.volumes.iter().flatten().find(|volume| volume.name == "shm").unwrap();
    let empty_dir = shm.empty_dir.as_ref().unwrap();
    assert_eq!(empty_dir.medium.as_deref(), Some("Memory"));
    assert_eq!(empty_dir.size_limit, Some(Quantity("3Gi".to_owned())));
    assert!(container.volume_mounts.iter().flatten().any(|mount| mount.mount_path == "/dev/shm"));
    let tolerated = spec.tolerations.iter().flatten();
    let tolerated = tolerated.filter(|one| one.effect.as_deref() == Some("NoSchedule"));
    let tolerated = tolerated.map(|toleration| toleration.key.as_deref());
    assert_eq!(tolerated.collect::<Vec<_>>(), [Some("nvidia.com/gpu")]);
    assert_eq!((spec.runtime_class_name, spec.resource_claims), (None, None));
}

#[test]
fn each_pod_of_a_gang_has_the_gpus_of_its_ranks() {
    let all = pods(|spec| {
        spec["accelerator"] = json!({"resourceName": "amd.com/gpu", "runtimeClassName": "amd"});
        spec["parallelism"] = json!({"tensor": 4, "ranksPerPod": 2});
        spec["worker"] = json!({"resources": {"requests": {"cpu": 2}},
            "env": [{"name": "HERD_BACKEND", "value": "cpu"}]});
    });
    assert_eq!(all.len(), 2);
    for pod in all {
        let spec = pod.spec.unwrap();
        assert_eq!(spec.runtime_class_name.as_deref(), Some("amd"));
        let resources = spec.containers[0].resources.clone().unwrap();
        let requests = resources.requests.unwrap();
        assert_eq!((&requests["amd.com/gpu"].0, &requests["cpu"].0), (&"2".to_owned(), &"2".to_owned()));
        assert_eq!(resources.limits.unwrap().len(), 1);
        assert_eq!(backend(&spec.containers[0]), ["cpu"]);
    }
}

#[test]
fn a_claim_stands_in_for_the_resource() {
    let (spec, container) = first(|spec| spec["accelerator"] = json!({"claimTemplateName": "h100"}));
    let claim = &spec.resource_claims.unwrap()[0];
    assert_eq!(claim.resource_claim_template_name.as_deref(), Some("h100"));
    let resources = container.resources.unwrap();
    assert_eq!(resources.claims.unwrap()[0].name, claim.name);
    assert_eq!((resources.requests, resources.limits), (None, None));
}

#[test]
fn what_the_gpus_are_is_part_of_the_revision() {
    let of =
        |accelerator: Value| hash(&checked(|spec| spec["accelerator"] = accelerator).unwrap().pools[0].gang);
    let hashes = [
        of(json!({"kind": "CPU"})),
        of(json!({"kind": "GPU"})),
        of(json!({"resourceName": "amd.com/gpu"})),
        of(json!({"claimTemplateName": "amd.com/gpu"})),
        of(json!({"runtimeClassName": "nvidia"})),
    ];
    for (index, one) in hashes.iter().enumerate() {
        assert!(!hashes[..index].contains(one), "{index} of {hashes:?}");
    }
    assert_eq!(of(json!({})), hashes[1]);
    let twice = checked(|spec| {
        without_kind(spec);
        spec["worker"] = json!({"resources": {"limits": {"nvidia.com/gpu": 8}}});
    });
    assert_eq!(twice.unwrap_err().reason, reason::ACCELERATOR_INVALID);
}

/// A gang's words while its pod waits for a node, with nodes that have so many GPUs.
fn waits(change: impl FnOnce(&mut Value), nodes: &[u32]) -> String {
    let mut waiting: Vec<Pod> = pods(change);
    let said = json!({"conditions": [{"type": "PodScheduled", "status": "False", "message": "0/2 nodes"}]});
    for pod in &mut waiting {
        pod.status = Some(serde_json::from_value(said.clone()).unwrap());
    }
    let mut room = Room::default();
    for gpus in nodes {
        let has = json!({"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": gpus.to_string()});
        let node =
            json!({"apiVersion": "v1", "kind": "Node", "metadata": {}, "status": {"allocatable": has}});
        room.add(&serde_json::from_value::<Node>(node).unwrap());
    }
    let mut gangs = gangs(&waiting);
    room.explain(&mut gangs);
    gangs[0].trouble.as_ref().unwrap().message.clone()
}

#[test]
fn a_gang_that_fits_on_no_node_says_what_it_lacks() {
    let too_big = "needs 3 nvidia.com/gpu on one node; the best node has 2 (0/2 nodes)";
    assert_eq!(waits(without_kind, &[2, 1]), too_big);
    assert_eq!(waits(without_kind, &[]), too_big.replace("has 2", "has 0"));
    // What is large enough is in use, or keeps it out: the scheduler knows.
    assert_eq!(waits(without_kind, &[2, 8]), "0/2 nodes");
    let spread = |spec: &mut Value| {
        without_kind(spec);
        spec["parallelism"]["ranksPerPod"] = json!(1);
    };
    assert_eq!(waits(spread, &[2]), "0/2 nodes");
    assert_eq!(waits(|_| {}, &[]), "0/2 nodes");
}
